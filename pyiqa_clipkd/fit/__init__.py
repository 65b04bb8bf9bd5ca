"""Own data in one command: check, split, train, measure, publish (scripts/fit.py)."""
