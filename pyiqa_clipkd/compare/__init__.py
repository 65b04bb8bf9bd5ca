"""Comparing runs: whether they differ, by how much, and in what."""
