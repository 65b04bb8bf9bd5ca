"""Scores for any number of files: `pyiqa-clipkd score`, and what it is made of."""
