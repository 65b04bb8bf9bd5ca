"""By which attributes two runs differ: "B is sharper and noisier than A".

Of five intervals at once, one leaves out 0 by chance more often than a single one does.
So each has a level of 99 % where all five together are to hold with 95 % (Bonferroni).
The score isn't one of them: its interval is the same with and without attributes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pyiqa_clipkd.attributes.names import ATTRIBUTES
from pyiqa_clipkd.compare.difference import Difference, Samples, samples
from pyiqa_clipkd.compare.runs import Run

# Attribute -> the word for a lower value, and for a higher one.
COMPARED: dict[str, tuple[str, str]] = {
    'sharpness': ('less sharp', 'sharper'),
    'brightness': ('darker', 'brighter'),
    'contrast': ('flatter', 'richer in contrast'),
    'colorfulness': ('paler', 'more colourful'),
    'noisiness': ('noisier', 'cleaner'),
}
SLIGHT = 0.02  # smaller ones are called slight
LEAST = 0.005  # smaller ones aren't named
SCALE = 'Attributes, from 0 to 1, where 1 is the good side (of noisiness: clean)'

Differences = dict[str, Difference]


def attribute_differences(
    runs: tuple[Run, Run],
    pairs: np.ndarray,
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> Differences | None:
    """B - A of each attribute, in [-1, 1]; `None` if a run has no attributes.

    Args:
        runs: A and B.
        pairs: (N, 2), of `difference.scored_pairs`.
        confidence: that all five intervals hold their truths, in (0, 1).
        seed: of the draws.

    Returns:
        Attribute -> difference, in the order of `ATTRIBUTES`.
    """
    if not all(run.has_attributes for run in runs):
        return None
    values = {name: samples(runs, pairs, name) for name in ATTRIBUTES}
    return differences_of(values, confidence=confidence, seed=seed)


def differences_of(
    values: Mapping[str, Samples],
    *,
    confidence: float = 0.95,
    seed: int = 0,
    comparisons: int = 1,
) -> Differences:
    """The differences of several columns, whose intervals hold together.

    Args:
        values: name -> samples of two runs.
        confidence, seed: see `attribute_differences`.
        comparisons: pairs of runs that are looked at together.
    """
    return {
        name: both.difference(
            confidence=confidence, seed=seed, comparisons=comparisons * len(values)
        )
        for name, both in values.items()
    }


def sentence(found: Differences, first: str = 'A', second: str = 'B') -> str:
    """The differences that are shown, in one sentence, the largest first."""
    if all(d.low == d.high == 0 for d in found.values()):
        return f'{first} and {second} have the same attributes.'
    order = sorted(found, key=lambda name: -abs(found[name].value))
    words = [
        _compared(name, found[name].value)
        for name in order
        if found[name].shown and abs(found[name].value) >= LEAST
    ]
    if not words:
        return f'No difference of an attribute is shown between {first} and {second}.'
    return f'{second} is {listed(words)} than {first}.'


def _compared(name: str, value: float) -> str:
    word = COMPARED[name][value > 0]
    return f'slightly {word}' if abs(value) < SLIGHT else word


def listed(words: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    *most, last = words
    return f'{", ".join(most)} and {last}' if most else last


def percent(confidence: float) -> str:
    """A level with all the digits that a corrected one needs: 99%, 99.83%."""
    return f'{confidence * 100:.4g}%'


def levels_of(found: Differences) -> tuple[str, str]:
    """The level of each interval, and that of all together, as words."""
    each = next(iter(found.values())).confidence
    return percent(each), percent(1 - len(found) * (1 - each))


def as_dict(found: Differences) -> dict[str, Any]:
    """All figures, for programs; `confidence` is that of the single interval."""
    keys = ('value', 'low', 'high', 'confidence', 'better', 'worse', 'shown')
    return {name: {key: getattr(d, key) for key in keys} for name, d in found.items()}


def as_lines(found: Differences, runs: tuple[Run, Run]) -> list[str]:
    """All figures of A and B, for people; the last line says what they mean."""
    first, second = (run.attribute_means for run in runs)
    each, together = levels_of(found)
    return [
        f'{SCALE}.',
        f'{each} intervals, so that all five hold with {together}:',
        *(
            f'  {name:12}   A {first[name]:.3f}   B {second[name]:.3f}   '
            f'B - A {d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}]'
            for name, d in found.items()
        ),
        sentence(found),
    ]
