"""How far the scores of one set of photographs are above those of another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from pyiqa_clipkd.compare.pairing import pair, scored_pairs
from pyiqa_clipkd.compare.runs import Run

FEWEST = 5  # with fewer photographs an interval says nothing
RESAMPLES = 2000
# For each of several intervals, so that at 95 % ten draws lie beyond either end; of
# very many there are fewer, for time's sake.
RESAMPLES_EACH, MOST_RESAMPLES = 400, 12_000
# BCa corrects for skew, which no longer matters for the mean of so many, and takes
# time that grows with the square.
MOST_CORRECTED = 2000


class Difference(NamedTuple):
    """The mean of B's scores minus the mean of A's, in points of the 1-5 scale.

    Of an attribute: of its values, in [-1, 1].

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
        check_size(f'{word} ({run.name})', run)
    if pairs is None:
        pairs = scored_pairs(first, second, pair(first, second))
    both = samples((first, second), pairs)
    return both.difference(confidence=confidence, seed=seed)


def check_size(name: str, run: Run) -> None:
    """Raises a ValueError if a run has too few photographs for an interval."""
    if len(run.scored) < FEWEST:
        raise ValueError(
            f'{name} has {len(run.scored)} scored photographs; a comparison needs at '
            f'least {FEWEST}.'
        )


class Samples(NamedTuple):
    """Values of A and of B, (N,) and (M,): N pairs if they are `paired`."""

    first: np.ndarray
    second: np.ndarray
    paired: bool

    def difference(
        self, *, confidence: float = 0.95, seed: int = 0, comparisons: int = 1
    ) -> Difference:
        """B - A; see `of_pairs`."""
        measured = of_pairs if self.paired else of_groups
        return measured(
            self.first,
            self.second,
            confidence=confidence,
            seed=seed,
            comparisons=comparisons,
        )


def samples(runs: tuple[Run, Run], pairs: np.ndarray, column: str = 'score') -> Samples:
    """What is compared: the pairs, where half of the smaller run has one; or all.

    Args:
        runs: A and B.
        pairs: (N, 2), of `scored_pairs`.
        column: a number that each photograph with a score has.
    """
    if enough(len(pairs), runs):
        a, b = (
            run.rows[column].to_numpy(float)[places]
            for run, places in zip(runs, pairs.T, strict=True)
        )
        return Samples(a, b, paired=True)
    a, b = (run.scored[column].to_numpy(float) for run in runs)
    return Samples(a, b, paired=False)


def enough(count: int, runs: Sequence[Run]) -> bool:
    """Whether so many photographs that all runs have can stand for them."""
    return count >= max(FEWEST, min(len(run.scored) for run in runs) / 2)


def of_pairs(
    first: np.ndarray,
    second: np.ndarray,
    *,
    confidence: float = 0.95,
    seed: int = 0,
    comparisons: int = 1,
) -> Difference:
    """The difference over N pairs.

    Args:
        first, second: (N,) values of A and of B.
        confidence: level of the interval, in (0, 1); of all of `comparisons` together.
        seed: of the draws.
        comparisons: intervals that are looked at together. Each has the level
            1 - (1 - confidence) / comparisons (Bonferroni), so that with probability
            `confidence` none of them misses its truth.
    """
    from scipy.stats import wilcoxon

    change = second - first
    confidence = _level(confidence, comparisons)
    low, high = _interval(
        [change],
        lambda x, axis: x.mean(axis),
        confidence=confidence,
        seed=seed,
        resamples=_resamples(comparisons),
    )
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
    first: np.ndarray,
    second: np.ndarray,
    *,
    confidence: float = 0.95,
    seed: int = 0,
    comparisons: int = 1,
) -> Difference:
    """The difference of two groups: (N,) values of A and (M,) of B; see `of_pairs`."""
    from scipy.stats import mannwhitneyu

    test = mannwhitneyu(second, first)
    # U counts a tie as one half; a sorted search counts wins and losses alone.
    order = np.sort(first)
    total = len(first) * len(second)
    confidence = _level(confidence, comparisons)
    low, high = _interval(
        [first, second],
        lambda x, y, axis: y.mean(axis) - x.mean(axis),
        confidence=confidence,
        seed=seed,
        resamples=_resamples(comparisons),
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


def _level(confidence: float, comparisons: int) -> float:
    """Bonferroni; a single one stays to the last digit what it was."""
    if comparisons == 1:
        return confidence
    return 1 - (1 - confidence) / comparisons


def _resamples(comparisons: int) -> int:
    return min(max(RESAMPLES, RESAMPLES_EACH * comparisons), MOST_RESAMPLES)


def _interval(
    samples: Sequence[np.ndarray],
    statistic: Callable[..., np.ndarray],
    *,
    confidence: float,
    seed: int,
    resamples: int,
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
            n_resamples=resamples,
            batch=max(1, 10_000_000 // largest),
            confidence_level=confidence,
            method=method,
            random_state=np.random.default_rng(seed),
        ).confidence_interval
        if np.isfinite([low, high]).all():  # BCa of some few values isn't defined
            break
    return float(low), float(high)
