"""The scale of all scores, in other words: levels, and 0 to 100."""

from __future__ import annotations

from collections.abc import Sequence

from pyiqa_clipkd.names import HIGHEST, LOWEST


def level_scores(levels: Sequence[str]) -> list[float]:
    """The score of each level, worst first: they lie evenly from 1 to 5."""
    step = (HIGHEST - LOWEST) / max(len(levels) - 1, 1)
    return [LOWEST + step * number for number in range(len(levels))]


def level_of(score: float, levels: Sequence[str]) -> str:
    """The word that is nearest to a score in [1, 5]."""
    return levels[round(_share(score) * (len(levels) - 1))]


def to_100(score: float) -> float:
    """A score in [1, 5] as one in [0, 100]."""
    return 100 * _share(score)


def _share(score: float) -> float:
    return (score - LOWEST) / (HIGHEST - LOWEST)
