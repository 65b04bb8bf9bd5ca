"""The page's words and small tables: what was scored, and how the scores lie."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from html import escape

import numpy as np

from pyiqa_clipkd.compare.difference import Difference
from pyiqa_clipkd.compare.runs import Run
from pyiqa_clipkd.report.charts import Axis
from pyiqa_clipkd.scale import level_scores

MOST_BAD = 200  # rows of the list of bad files; the table has all of them


def facts(run: Run) -> str:
    """What was scored with what, as a description list."""

    def words(column: str) -> str:
        return ' and '.join(run.values(column)) or 'unknown'

    written = (
        datetime.fromtimestamp(run.written).strftime('%Y-%m-%d %H:%M')
        if run.written
        else 'unknown'
    )
    scored, bad = len(run.scored), len(run.bad)
    pairs = [
        ('Photographs', f'{scored:,} scored, {bad:,} could not be'),
        *([('Faults', fault_words(run))] if run.has_attributes else []),
        ('Folder', run.folder or '.'),
        ('Metric', words('metric')),
        ('Weights', f'{words("weights")}, SHA-256 {words("sha256")}'),
        ('Input size', f'{words("input_size")} px'),
        ('Native crops', words('crops')),
        ('Backend', words('backend')),
        ('Results', f'{run.name}, written {written}'),
    ]
    return description_list(pairs)


def fault_words(run: Run) -> str:
    """How many photographs have each fault that there is: "3 blurred, 1 noisy"."""
    found = [f'{count:,} {word}' for word, count in run.fault_counts.items() if count]
    return ', '.join(found) or 'none'


def description_list(pairs: Sequence[tuple[str, str]]) -> str:
    items = [f'<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>' for k, v in pairs]
    return f'<dl class="facts">{"".join(items)}</dl>'


def meaning(levels: Sequence[str]) -> str:
    """What a score says, in plain words."""
    pairs = zip(level_scores(levels), levels, strict=True)
    names = ', '.join(f'{place:g} {word}' for place, word in pairs)
    return escape(
        f'A score is the level that people would give on average: {names}. Higher is '
        'better. It is an estimate: of single photographs small differences mean '
        'little; means over many are far more certain.'
    )


def statistics(runs: Sequence[Run]) -> str:
    """Mean, median and percentiles, a column for each run."""
    figures: dict[str, Callable[[np.ndarray], float]] = {
        'Mean': np.mean,
        'Standard deviation': np.std,
        'Lowest': np.min,
        '5th percentile': lambda x: np.percentile(x, 5),
        '25th percentile': lambda x: np.percentile(x, 25),
        'Median': np.median,
        '75th percentile': lambda x: np.percentile(x, 75),
        '95th percentile': lambda x: np.percentile(x, 95),
        'Highest': np.max,
    }
    scores = [run.scored['score'].to_numpy() for run in runs]
    rows = [
        (word, [f'{figure(s):.2f}' if len(s) else '-' for s in scores])
        for word, figure in figures.items()
    ]
    return table('Figures', heads(runs, 'Score'), rows)


def level_counts(runs: Sequence[Run], levels: Sequence[str]) -> str:
    """How many photographs have each level; the levels' names filter the table."""
    rows = []
    for name in reversed(levels):
        counts = [int((run.scored['level'] == name).sum()) for run in runs]
        cells = [
            f'{n:,} ({n / max(1, len(run.scored)):.0%})'
            for n, run in zip(counts, runs, strict=True)
        ]
        rows.append((name, cells))
    return table('Levels', heads(runs, 'Photographs'), rows, chooses='level')


def bar_counts(label: str, axis: Axis, columns: dict[str, np.ndarray]) -> str:
    """The numbers behind a histogram, for those who can't see it."""
    counts = [axis.counts(values) for values in columns.values()]
    rows = [
        (f'{low:g} to {high:g}', [f'{count[i]:,}' for count in counts])
        for i, (low, high) in enumerate(zip(axis.edges, axis.edges[1:], strict=False))
    ]
    body = table(label, list(columns), rows)
    return f'<details><summary>{escape(label)} as a table</summary>{body}</details>'


def table(
    caption: str,
    heads: Sequence[str],
    rows: Sequence[tuple[str, Sequence[str]]],
    *,
    chooses: str = '',
    style: str = 'small',
) -> str:
    """A small table of words; its rows' names may be buttons: `level`, `fault`."""

    def head(name: str) -> str:
        word = escape(name)
        if not chooses:
            return word
        button = f'<button type="button" class="link" data-{chooses}="{word}">'
        return f'{button}{word}</button>'

    top = ''.join(f'<th scope="col">{escape(head)}</th>' for head in heads)
    body = ''.join(
        f'<tr><th scope="row">{head(name)}</th>'
        f'{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>'
        for name, cells in rows
    )
    return (
        f'<table class="{style}"><caption>{escape(caption)}</caption>'
        f'<thead><tr><td></td>{top}</tr></thead><tbody>{body}</tbody></table>'
    )


def bad_files(run: Run, title: str) -> str:
    """The files that could not be scored, and why."""
    if not len(run.bad):
        return ''
    shown = run.bad.head(MOST_BAD)
    rows = [(run.relative(row.path), [row.error]) for row in shown.itertuples()]
    more = len(run.bad) - len(shown)
    note = f'<p>And {more:,} more: they are in the table.</p>' if more else ''
    return table(title, ['Reason'], rows, style='small bad') + note


def difference_facts(difference: Difference, alone: tuple[int, int]) -> str:
    """The difference of two runs: `alone` have a score but no partner, of A and B."""
    d = difference
    how = (
        f'over {d.photographs[0]:,} pairs; without a scored partner: '
        f'{alone[0]:,} of A, {alone[1]:,} of B'
        if d.paired
        else f'unpaired: {d.photographs[0]:,} of A against {d.photographs[1]:,} of B'
    )
    shares = f'{d.better:.1%} better in B, {d.worse:.1%} worse'
    return description_list(
        [
            ('Mean of B - A', f'{d.value:+.3f}, {how}'),
            (f'{d.confidence:.0%} interval', f'{d.low:+.3f} to {d.high:+.3f}'),
            ('Pairs' if d.paired else 'All pairs that can be made', shares),
            (f'{d.test} test', f'p = {d.p:.2g}'),
        ]
    )


def heads(runs: Sequence[Run], single: str) -> list[str]:
    """The headings of a column for each run."""
    return [single] if len(runs) == 1 else ['A', 'B']
