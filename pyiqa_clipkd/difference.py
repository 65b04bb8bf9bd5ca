"""How far the scores of one set of photographs are above those of another."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from pyiqa_clipkd.runs import Run

FEWEST = 5  # with fewer photographs an interval says nothing
RESAMPLES = 2000
# BCa corrects for skew, which no longer matters for the mean of so many, and takes
# time that grows with the square.
MOST_CORRECTED = 2000


class Difference(NamedTuple):
    """The mean of B's scores minus the mean of A's, in points of the 1-5 scale.

    `value`: the difference, above 0 where B is better; `low`, `high`: the ends of its
    bootstrap interval of level `confidence`; `paired`: whether it is the mean over
    pairs; `photographs`: how many of A and of B took part; `better`, `worse`: shares in
    [0, 1] of the pairs in which B is better or worse (unpaired: of all pairs that could
    be made); `p`: of a two-sided Wilcoxon signed-rank test (unpaired: Mann-Whitney).
    """

    value: float
    low: float
    high: float
    confidence: float
    paired: bool
    photographs: tuple[int, int]
    better: float
    worse: float
    p: float

    @property
    def shown(self) -> bool:
        """Whether the interval leaves out 0."""
        return not self.low <= 0 <= self.high

    @property
    def test(self) -> str:
        return 'Wilcoxon signed-rank' if self.paired else 'Mann-Whitney'

    def sentence(self, first: str = 'A', second: str = 'B') -> str:
        """What it means, in one sentence."""
        if self.low == self.high == 0:
            return f'{first} and {second} have the same scores.'
        interval = f'[{self.low:+.3f}, {self.high:+.3f}]'
        if not self.shown:
            return (
                f'No difference shown: {second} - {first} is {self.value:+.3f}, and '
                f'its interval {interval} holds 0.'
            )
        low, high = sorted((abs(self.low), abs(self.high)))
        return (
            f'{second} scores {abs(self.value):.2f} '
            f'{"higher" if self.value > 0 else "lower"} [{low:.2f}, {high:.2f}] than '
            f'{first}: a difference of this size is unlikely to be chance.'
        )


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


def measure(
    first: Run,
    second: Run,
    *,
    pairs: np.ndarray | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> Difference:
    """The difference of two runs: over pairs, where half of the smaller run has one.

    Args:
        first, second: the runs A and B.
        pairs: of `scored_pairs`, where they are known already.
        confidence: level of the interval, in (0, 1).
        seed: of the draws.

    Raises:
        ValueError: if there are too few photographs.
    """
    for word, run in (('A', first), ('B', second)):
        if len(run.scored) < FEWEST:
            raise ValueError(
                f'{word} ({run.name}) has {len(run.scored)} scored photographs; a '
                f'comparison needs at least {FEWEST}.'
            )
    if pairs is None:
        pairs = scored_pairs(first, second, pair(first, second))
    if len(pairs) >= max(FEWEST, min(len(first.scored), len(second.scored)) / 2):
        a, b = _scores(first)[pairs[:, 0]], _scores(second)[pairs[:, 1]]
        return of_pairs(a, b, confidence=confidence, seed=seed)
    a, b = first.scored['score'].to_numpy(), second.scored['score'].to_numpy()
    return of_groups(a, b, confidence=confidence, seed=seed)


def _scores(run: Run) -> np.ndarray:
    """(N,) of all rows, NaN where there is none."""
    return run.rows['score'].to_numpy(float)


def of_pairs(
    first: np.ndarray, second: np.ndarray, *, confidence: float = 0.95, seed: int = 0
) -> Difference:
    """The difference over N pairs: (N,) scores of A and (N,) of B."""
    from scipy.stats import wilcoxon

    change = second - first
    low, high = _interval([change], lambda x, axis: x.mean(axis), confidence, seed)
    return Difference(
        value=float(change.mean()),
        low=low,
        high=high,
        confidence=confidence,
        paired=True,
        photographs=(len(change), len(change)),
        better=float((change > 0).mean()),
        worse=float((change < 0).mean()),
        p=float(wilcoxon(change).pvalue) if change.any() else 1.0,
    )


def of_groups(
    first: np.ndarray, second: np.ndarray, *, confidence: float = 0.95, seed: int = 0
) -> Difference:
    """The difference of two groups: (N,) scores of A and (M,) of B."""
    from scipy.stats import mannwhitneyu

    test = mannwhitneyu(second, first)
    # U counts a tie as one half; a sorted search counts wins and losses alone.
    order = np.sort(first)
    total = len(first) * len(second)
    low, high = _interval(
        [first, second],
        lambda x, y, axis: y.mean(axis) - x.mean(axis),
        confidence,
        seed,
    )
    return Difference(
        value=float(second.mean() - first.mean()),
        low=low,
        high=high,
        confidence=confidence,
        paired=False,
        photographs=(len(first), len(second)),
        better=float(np.searchsorted(order, second, 'left').sum() / total),
        worse=1 - float(np.searchsorted(order, second, 'right').sum() / total),
        p=float(test.pvalue),
    )


def _interval(
    samples: Sequence[np.ndarray],
    statistic: Callable[..., np.ndarray],
    confidence: float,
    seed: int,
) -> tuple[float, float]:
    """A bootstrap interval of a statistic: BCa, or percentiles of many values."""
    from scipy.stats import bootstrap

    if all(np.ptp(sample) == 0 for sample in samples):
        value = float(statistic(*samples, axis=-1))
        return value, value
    largest = max(map(len, samples))
    methods = ['BCa', 'percentile'] if largest <= MOST_CORRECTED else ['percentile']
    for method in methods:
        low, high = bootstrap(
            samples,
            statistic,
            n_resamples=RESAMPLES,
            batch=max(1, 10_000_000 // largest),
            confidence_level=confidence,
            method=method,
            random_state=np.random.default_rng(seed),
        ).confidence_interval
        if np.isfinite([low, high]).all():  # BCa of some few values isn't defined
            break
    return float(low), float(high)
