"""A ranking of three or more runs, for instance of image generators.

Where half of the smallest run is in all of them (photographs are matched by name), only
what all have a score for counts, so that none gains by what it left out. Else each run
counts as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import comb
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pyiqa_clipkd.attributes.names import ATTRIBUTES
from pyiqa_clipkd.compare.attributes import Differences, differences_of
from pyiqa_clipkd.compare.difference import Difference, Samples, check_size, enough
from pyiqa_clipkd.compare.pairing import pair
from pyiqa_clipkd.compare.runs import Run


class Entrant(NamedTuple):
    """A run with a name, and the values that count: column -> (N,)."""

    name: str
    run: Run
    values: dict[str, np.ndarray]

    def mean(self, column: str = 'score') -> float:
        return float(self.values[column].mean())


class Step(NamedTuple):
    """How far a run is above the next one, which is called `below`.

    Attributes:
        below: the name of the next run.
        score: its scores minus those of the next run.
        attributes: the same of each attribute, {} where a run has none.
    """

    below: str
    score: Difference
    attributes: Differences


class Leaderboard(NamedTuple):
    """All runs, best first.

    Attributes:
        entrants: K runs.
        steps: K - 1, from each run to the next.
        common: how many photographs have a score in all runs.
        paired: whether only these count.
        confidence: that all intervals between all pairs of runs hold their truths; the
            scores and the attributes each for themselves.
    """

    entrants: list[Entrant]
    steps: list[Step]
    common: int
    paired: bool
    confidence: float

    @property
    def has_attributes(self) -> bool:
        """Whether all runs have attributes."""
        return len(self.entrants[0].values) > 1


def rank(
    runs: Mapping[str, Run], *, confidence: float = 0.95, seed: int = 0
) -> Leaderboard:
    """Rank runs by their mean score.

    Which runs are neighbours is known from the scores alone. So each interval has the
    level that it needs where all pairs of runs are compared (Bonferroni).

    Args:
        runs: name -> run, at least two.
        confidence: that all intervals hold their truths, in (0, 1).
        seed: of the draws.

    Raises:
        ValueError: if a run has too few photographs.
    """
    for name, run in runs.items():
        check_size(name, run)
    everyone = [*runs.values()]
    places = common_places(everyone)
    paired = enough(len(places), everyone)
    counted = [
        run.rows.iloc[column] if paired else run.scored
        for run, column in zip(everyone, places.T, strict=True)
    ]
    with_attributes = all(run.has_attributes for run in everyone)
    columns = ('score', *(ATTRIBUTES if with_attributes else ()))
    entrants = [
        Entrant(name, run, {c: rows[c].to_numpy(float) for c in columns})
        for (name, run), rows in zip(runs.items(), counted, strict=True)
    ]
    entrants.sort(key=lambda entrant: -entrant.mean())
    steps = [
        _step(
            *(above, below),
            paired=paired,
            confidence=confidence,
            seed=seed,
            comparisons=comb(len(runs), 2),
        )
        for above, below in pairwise(entrants)
    ]
    return Leaderboard(entrants, steps, len(places), paired, confidence)


def distinct_names(runs: Sequence[Run], paths: Sequence[Path]) -> list[str]:
    """A name for each run: its own, or where two have the same one, its path."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def _step(above: Entrant, below: Entrant, *, paired: bool, **options: Any) -> Step:
    score, *attributes = (
        (column, Samples(below.values[column], above.values[column], paired))
        for column in above.values
    )
    return Step(
        below.name,
        score[1].difference(**options),
        differences_of(dict(attributes), **options),
    )


def common_places(runs: Sequence[Run]) -> np.ndarray:
    """Photographs that all runs have, matched by name, with a score in each.

    Returns:
        (N, K) places in the `rows` of the K runs.
    """
    first, *others = runs
    columns = [np.arange(len(first.rows))]
    for other in others:
        partner = np.full(len(first.rows), -1)  # the NaN below
        here, there = pair(first, other).T
        partner[here] = there
        columns.append(partner)
    scores = [
        np.append(run.rows['score'].to_numpy(float), np.nan)[column]
        for run, column in zip(runs, columns, strict=True)
    ]
    return np.stack(columns, 1)[np.isfinite(scores).all(axis=0)]
