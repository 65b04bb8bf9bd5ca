"""Scoring on a cluster, by Ray Data: `pyiqa-clipkd score --engine ray`."""
