"""Which photographs of two runs belong together, by their names."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable

import numpy as np

from pyiqa_clipkd.compare.runs import Run


def pair(first: Run, second: Run) -> np.ndarray:
    """Which files of two runs belong together, bad ones included.

    By path, by path below the run's own folder, that without its ending, file name, or
    that without its ending: the first of these that pairs the most. What is there twice
    on a side isn't paired.

    Returns:
        (N, 2) places in `first.rows` and in `second.rows`.
    """
    keys: list[Callable[[Run, str], str]] = [
        lambda run, path: path,
        lambda run, path: run.relative(path),
        lambda run, path: os.path.splitext(run.relative(path))[0],
        lambda run, path: os.path.basename(path),
        lambda run, path: os.path.splitext(os.path.basename(path))[0],
    ]
    return max((_pair_by(key, first, second) for key in keys), key=len)


def _pair_by(key: Callable[[Run, str], str], first: Run, second: Run) -> np.ndarray:
    places = []
    for run in (first, second):
        words = [key(run, path) for path in run.rows['path']]
        count = Counter(words)
        places.append({w: i for i, w in enumerate(words) if count[w] == 1})
    here, there = places
    pairs = [(here[word], there[word]) for word in here if word in there]
    return np.array(pairs, dtype=int).reshape(-1, 2)


def scored_pairs(first: Run, second: Run, pairs: np.ndarray) -> np.ndarray:
    """Those of the pairs, (N, 2), that have two scores, by B - A: (M, 2) places."""
    change = _scores(second)[pairs[:, 1]] - _scores(first)[pairs[:, 0]]
    order = np.argsort(change, kind='stable')  # what is missing comes last
    return pairs[order[: np.isfinite(change).sum()]]


def _scores(run: Run) -> np.ndarray:
    """(N,) of all rows, NaN where there is none."""
    return run.rows['score'].to_numpy(float)
