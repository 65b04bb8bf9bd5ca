"""Histograms as inline SVG whose bars are buttons that filter the table."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np

from pyiqa_clipkd.names import HIGHEST, LOWEST
from pyiqa_clipkd.scale import level_scores

HEIGHT, TOP, BOTTOM = 230, 22, 34  # pixels: all, above the bars, below them
FOOT = HEIGHT - BOTTOM
SCORE_EDGES = np.linspace(LOWEST, HIGHEST, 17)


class Series(NamedTuple):
    """Values of one kind.

    Attributes:
        label: what they are.
        column: their key in the table.
        values: (N,).
        style: a class of the style sheet; bars of `change` are worse or better ones.
    """

    label: str
    column: str
    values: np.ndarray
    style: str


class Axis(NamedTuple):
    """The edges of the bars, and the words at places of the axis."""

    edges: np.ndarray
    ticks: list[tuple[float, str]]

    def percent(self, value: float) -> float:
        """A value's place, in percent of the width."""
        low, high = self.edges[0], self.edges[-1]
        return float(np.clip((value - low) / (high - low), 0, 1) * 100)

    def limits(self, bar: int) -> tuple[float | None, float | None]:
        """From where to below where a bar counts; the outer ones have no end."""
        last = len(self.edges) - 2
        start = None if bar == 0 else round(float(self.edges[bar]), 4)
        end = None if bar == last else round(float(self.edges[bar + 1]), 4)
        return start, end

    def counts(self, values: np.ndarray) -> np.ndarray:
        """How many values are in each bar: (bars,), the outer ones without an end."""
        inner = np.searchsorted(self.edges[1:-1], values, 'right')
        return np.bincount(inner, minlength=len(self.edges) - 1)


def score_axis(levels: Sequence[str]) -> Axis:
    """The scale from 1 to 5 in steps of a quarter, with the levels' names."""
    pairs = zip(level_scores(levels), levels, strict=True)
    ticks = [(place, f'{place:g} {word}') for place, word in pairs]
    return Axis(SCORE_EDGES, ticks)


def change_axis(changes: np.ndarray) -> Axis:
    """An axis around 0 that holds nearly all of the changes: (N,)."""
    reach = max(0.05, float(np.percentile(np.abs(changes), 99)))
    half = next(step for step in (0.1, 0.2, 0.5, 1, 2, 4) if step >= min(reach, 4))
    ticks = [
        (x, f'{x:+g}' if x else '0') for x in (-half, -half / 2, 0, half / 2, half)
    ]
    return Axis(np.linspace(-half, half, 17), ticks)


def histogram(
    title: str, series: Sequence[Series], axis: Axis, marks: Sequence[tuple[float, str]]
) -> str:
    """One or two series as bars beside each other.

    Args:
        title: what is shown, for those who can't see it.
        series: the values.
        axis: edges and ticks.
        marks: places and words of vertical lines, for instance the median.
    """
    counts = [axis.counts(one.values) for one in series]
    top = max(1, *(int(c.max()) for c in counts))
    bars = [
        _bar(one, number, axis, (int(count[number]), top), (place, len(series)))
        for number in range(len(axis.edges) - 1)
        for place, (one, count) in enumerate(zip(series, counts, strict=True))
        if count[number]
    ]
    lines = ''.join(
        f'<line class="mark" x1="{axis.percent(value):.2f}%" '
        f'x2="{axis.percent(value):.2f}%" y1="{TOP - 4}" y2="{FOOT}"/>'
        f'{_text("mark", axis.percent(value), TOP - 9, word)}'
        for value, word in marks
    )
    ticks = ''.join(
        _text('tick', axis.percent(value), FOOT + 20, word)
        for value, word in axis.ticks
    )
    return (
        f'<svg class="histogram" width="100%" height="{HEIGHT}" role="group" '
        f'aria-label="{escape(title)}. Each bar is a button that filters the table.">'
        f'<line class="grid" x1="0" x2="100%" y1="{TOP}" y2="{TOP}"/>'
        f'{_peak(top, left=any(axis.percent(value) > 50 for value, _ in marks))}'
        f'{"".join(bars)}'
        f'<line class="axis" x1="0" x2="100%" y1="{FOOT}" y2="{FOOT}"/>'
        f'{lines}{ticks}</svg>'
    )


def _peak(count: int, *, left: bool) -> str:
    """What the upper line stands for, on the side that has no mark."""
    where = 'x="0" text-anchor="start"' if left else 'x="100%" text-anchor="end"'
    return f'<text class="peak" {where} y="{TOP - 9}">{_photographs(count)}</text>'


def _bar(
    one: Series,
    number: int,
    axis: Axis,
    count: tuple[int, int],
    place: tuple[int, int],
) -> str:
    """One bar: `count` of the highest count; the `place`-th of several in its bin."""
    full = 100 / (len(axis.edges) - 1)
    width = full * 0.88 / place[1]
    x = number * full + full * 0.06 + place[0] * width
    height = max(2.0, (FOOT - TOP) * count[0] / count[1])
    start, end = axis.limits(number)
    style = one.style
    if style == 'change':
        style = 'worse' if end is not None and end <= 0 else 'better'
    label = escape(f'{one.label}: {_span(start, end)}, {_photographs(count[0])}')
    data = f'data-column="{one.column}" data-from="{_number(start)}"'
    return (
        f'<g class="bar {style}" role="button" tabindex="0" aria-pressed="false" '
        f'aria-label="{label}" {data} data-below="{_number(end)}">'
        f'<title>{label}</title>'
        f'<rect class="hit" x="{x:.2f}%" width="{width:.2f}%" y="{TOP}" '
        f'height="{FOOT - TOP}"/>'
        f'<rect class="ink" x="{x:.2f}%" width="{width:.2f}%" y="{FOOT - height:.1f}" '
        f'height="{height:.1f}" rx="2"/></g>'
    )


def _span(start: float | None, end: float | None) -> str:
    if start is None:
        return f'below {end:g}'
    return f'{start:g} and above' if end is None else f'{start:g} to below {end:g}'


def _photographs(count: int) -> str:
    return f'{count:,} photograph{"" if count == 1 else "s"}'


def _number(value: float | None) -> str:
    return '' if value is None else f'{value:g}'


def _text(style: str, percent: float, y: int, word: str) -> str:
    where = 'start' if percent < 8 else 'end' if percent > 92 else 'middle'
    return (
        f'<text class="{style}" x="{percent:.2f}%" y="{y}" text-anchor="{where}">'
        f'{escape(word)}</text>'
    )
