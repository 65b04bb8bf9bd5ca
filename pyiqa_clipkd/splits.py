"""Split a table of photographs so that near copies don't end up on both sides."""

from __future__ import annotations

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pyiqa_clipkd.near_copies import near_copies

HELD_OUT = 0.2


def split_column(split: int) -> str:
    """The name under which pyiqa's tables have split number `split`."""
    return f'ratio802_seed123_split_{split:02d}'


def add_splits(
    table: pd.DataFrame, group: str | None, splits: int = 10, seed: int = 123
) -> pd.DataFrame:
    """Columns `ratio802_seed123_split_01` and on, with the words train and val.

    Args:
        table: one row a photograph.
        group: column whose equal words stay on one side; an empty cell is a group by
            itself. `None`: every row by itself.
        splits: how many columns.
        seed: of the shuffles. The columns have the names that pyiqa reads, whatever
            the seed.

    Returns:
        A copy of the table with the columns; a fifth of the rows is held out, or a
        little less where groups are large.
    """
    groups = _numbers(table[group]) if group else np.arange(len(table))
    rng = np.random.default_rng(seed)
    result = table.copy()
    for split in range(1, splits + 1):
        sides = np.where(hold_out(groups, rng), 'val', 'train')
        result[split_column(split)] = sides
    return result


def hold_out(groups: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Whole groups in random order, as long as they fit into a fifth of the rows.

    Args:
        groups: (N,) numbers of the groups.
        rng: decides the order.

    Returns:
        (N,) bool, true for what is held out: at least one group, the smallest.
    """
    names, sizes = np.unique(groups, return_counts=True)
    room = max(1, round(HELD_OUT * len(groups)))
    chosen = []
    for place in rng.permutation(len(names)):
        if sizes[place] <= room:
            chosen.append(names[place])
            room -= sizes[place]
    return np.isin(groups, chosen or [names[sizes.argmin()]])


def content_groups(
    fingerprints: np.ndarray, words: pd.Series | None = None
) -> np.ndarray:
    """Rows that must stay on one side: near copies, and equal words.

    Args:
        fingerprints: (N, B) bool; as `near_copies` takes them.
        words: (N,) groups that are known; empty: a group by itself.

    Returns:
        (N,) numbers of the groups, from 0.
    """
    return groups_of(len(fingerprints), near_copies(fingerprints), words)


def groups_of(
    rows: int,
    pairs: tuple[np.ndarray, np.ndarray],
    words: pd.Series | None = None,
) -> np.ndarray:
    """`content_groups` where the pairs of near copies are known."""
    first, second = pairs
    if words is not None:
        numbers = _numbers(words)
        # Each row is tied to the first one with the same word.
        _, leaders, which = np.unique(numbers, return_index=True, return_inverse=True)
        first = np.concatenate([first, np.arange(rows)])
        second = np.concatenate([second, leaders[which]])
    ties = coo_array((np.ones(len(first)), (first, second)), shape=(rows, rows))
    return connected_components(ties, directed=False)[1]


def _numbers(words: pd.Series) -> np.ndarray:
    """A number for each word; one of its own for each empty cell."""
    numbers, known = pd.factorize(words.replace('', np.nan))
    alone = numbers < 0
    numbers[alone] = len(known) + np.arange(alone.sum())
    return numbers
