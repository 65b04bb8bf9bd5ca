"""The paper's tables from the shipped recipes: plan, run, collect, compare."""
