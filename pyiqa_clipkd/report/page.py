"""The whole page: all of it in one file that loads nothing."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from datetime import datetime
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

import numpy as np

from pyiqa_clipkd import __version__
from pyiqa_clipkd.compare.difference import FEWEST, measure
from pyiqa_clipkd.compare.pairing import pair, scored_pairs
from pyiqa_clipkd.compare.runs import Run, made_differently
from pyiqa_clipkd.report import attributes, figures, rows
from pyiqa_clipkd.report.charts import Series, change_axis, histogram, score_axis
from pyiqa_clipkd.report.gallery import Cards, files_of, galleries
from pyiqa_clipkd.report.thumbnails import make_thumbnails

Section = tuple[str, str, str]  # id, heading, body


def make_page(
    runs: Sequence[Run], page: Path, *, title: str, thumbnails: int = 12
) -> str:
    """The page of one or two runs.

    Args:
        runs: one, or A and B.
        page: where it will be written, for the links to the photographs.
        title: its heading.
        thumbnails: how many photographs each gallery shows.

    Returns:
        HTML.
    """
    sections = [_overview(runs)]
    if len(runs) == 2:
        first, second = runs
        pairs = pair(first, second)
        table = rows.two_runs((first, second), pairs, page)
        sections += _comparison((first, second), pairs, page, number=thumbnails)
    else:
        table = rows.one_run(runs[0], page)
    sections.insert(1, _scores(runs, table))
    if body := attributes.means_and_faults(runs):
        sections.insert(2, ('attributes', 'Attributes', body))
    sections += _galleries(runs, page, thumbnails)
    return _fill(runs, table, sections, title)


def _overview(runs: Sequence[Run]) -> Section:
    names = [''] if len(runs) == 1 else ['<h3>A</h3>', '<h3>B</h3>']
    blocks = [
        f'<div>{name}{figures.facts(run)}</div>'
        for name, run in zip(names, runs, strict=True)
    ]
    return 'scored', 'What was scored', f'<div class="columns">{"".join(blocks)}</div>'


def _scores(runs: Sequence[Run], table: rows.Table) -> Section:
    levels = runs[0].levels
    keys = ['score'] if len(runs) == 1 else ['score_a', 'score_b']
    names = ['Scores'] if len(runs) == 1 else ['A', 'B']
    series = [
        Series(name, key, table.numbers(key), style)
        for name, key, style in zip(names, keys, ('first', 'second'), strict=False)
    ]
    axis = score_axis(levels)
    marks = [
        (float(np.median(s.values)), f'median {np.median(s.values):.2f}')
        for s in series[: 1 if len(runs) == 1 else 0]
        if len(s.values)
    ]
    body = (
        f'<p>{figures.meaning(levels)}</p>{_legend(series)}'
        f'{histogram("Histogram of the scores", series, axis, marks)}'
        '<p class="hint">A bar or a level filters <a href="#table">the table</a>.</p>'
        '<div class="columns">'
        f'{figures.statistics(runs)}{figures.level_counts(runs, levels)}</div>'
        f'{figures.bar_counts("Histogram", axis, {s.label: s.values for s in series})}'
    )
    return 'scores', 'Scores', body


def _legend(series: Sequence[Series]) -> str:
    if len(series) == 1:
        return ''
    items = [f'<li class="{s.style}">{escape(s.label)}</li>' for s in series]
    return f'<ul class="legend">{"".join(items)}</ul>'


def _comparison(
    runs: tuple[Run, Run], pairs: np.ndarray, page: Path, *, number: int
) -> list[Section]:
    """How B differs from A, and the photographs that moved most."""
    first, second = runs
    both = scored_pairs(first, second, pairs)
    scores = [run.rows['score'].to_numpy() for run in runs]
    change = scores[1][both[:, 1]] - scores[0][both[:, 0]]
    body = _verdict(first, second, both)
    if len(change):
        axis = change_axis(change)
        series = [Series('B - A', 'change', change.round(rows.DIGITS), 'change')]
        title = 'Histogram of the differences B - A'
        marks = [(float(change.mean()), f'mean {change.mean():+.2f}')]
        body += histogram(title, series, axis, marks)
        body += figures.bar_counts(title, axis, {'Pairs': series[0].values})
    fell = [tuple(p) for p in both[: int((change < 0).sum())][:number]]
    rose = [tuple(p) for p in both[::-1][: int((change > 0).sum())][:number]]
    paths = [run.rows['path'].to_numpy() for run in runs]
    wanted = [
        run.locate(paths[i][p[i]]) for p in [*fell, *rose] for i, run in enumerate(runs)
    ]
    cards = Cards(page, make_thumbnails(wanted))
    body += cards.of_moves('Fell most in B', runs, fell)
    body += cards.of_moves('Rose most in B', runs, rose)
    return [('difference', 'B against A', body)]


def _verdict(first: Run, second: Run, pairs: np.ndarray) -> str:
    fewest = min(len(first.scored), len(second.scored))
    if fewest < FEWEST:
        return f'<p>A run with {fewest} scored photographs is too small to compare.</p>'
    difference = measure(first, second, pairs=pairs)
    alone = (len(first.scored) - len(pairs), len(second.scored) - len(pairs))
    return (
        f'<p class="verdict">{escape(difference.sentence())}</p>'
        f'{figures.difference_facts(difference, alone)}'
        f'{attributes.differences(first, second, pairs)}'
    )


def _galleries(runs: Sequence[Run], page: Path, number: int) -> list[Section]:
    sections = []
    for run, letter in zip(runs, 'AB', strict=False):
        shown = galleries(run, number)
        cards = Cards(page, make_thumbnails(files_of(run, shown)))
        body = ''.join(cards.of_run(run, gallery) for gallery in shown)
        title = 'Photographs' if len(runs) == 1 else f'Photographs of {letter}'
        if body and len(runs) == 2:  # what moved comes first; these are for a look
            body = f'<details><summary>Worst, middle, best</summary>{body}</details>'
        if body:
            sections.append((f'photographs-{letter.lower()}', title, body))
    return sections


def _fill(
    runs: Sequence[Run], table: rows.Table, sections: list[Section], title: str
) -> str:
    resources = files('pyiqa_clipkd.report')
    style, script, template = (
        (resources / name).read_text(encoding='utf-8')
        for name in ('style.css', 'script.js', 'page.html')
    )
    names = ['Files that could not be scored']
    if len(runs) == 2:
        names = [f'Files of {letter} that could not be scored' for letter in 'AB']
    bad = ''.join(figures.bad_files(r, n) for r, n in zip(runs, names, strict=True))
    links = [*sections, ('table', 'All photographs', '')]
    links += [('bad', 'Bad files', '')] if bad else []
    levels = dict.fromkeys(name for run in runs for name in run.levels)
    with_faults = all(run.has_attributes for run in runs)
    faults = runs[0].fault_counts if with_faults else ()
    text = Template(template).substitute(
        policy=_policy(style, script),
        title=escape(title),
        lead=escape(_lead(runs)),
        warning=_warning(runs),
        links=''.join(f'<a href="#{i}">{heading}</a>' for i, heading, _ in links),
        sections=''.join(_section(*section) for section in sections),
        levels=_options(levels),
        searched='name, faults, notes or error' if faults else 'name, notes or error',
        faults=_fault_filter(faults) if faults else '',
        bad=_section('bad', 'Bad files', bad) if bad else '',
        data=table.as_json(),
        style=style,
        script=script,
        version=__version__,
        date=datetime.now().strftime('%Y-%m-%d %H:%M'),
    )
    # A name that isn't UTF-8 on disk has half a character in it.
    return text.encode('utf-8', 'replace').decode('utf-8')


def _options(words: Iterable[str]) -> str:
    return ''.join(f'<option>{escape(word)}</option>' for word in words)


def _fault_filter(faults: Iterable[str]) -> str:
    options = f'<option value="">all</option>{_options(faults)}'
    return f'\n<label>Fault <select name="fault">{options}</select></label>'


def _section(name: str, heading: str, body: str) -> str:
    return (
        f'<section id="{name}" aria-labelledby="{name}-title">'
        f'<h2 id="{name}-title">{escape(heading)}</h2>{body}</section>'
    )


def _lead(runs: Sequence[Run]) -> str:
    parts = []
    for run, letter in zip(runs, 'AB', strict=False):
        scored = run.scored['score']
        mean = f', mean {scored.mean():.2f}' if len(scored) else ''
        name = '' if len(runs) == 1 else f'{letter}, {run.name}: '
        plural = '' if len(scored) == 1 else 's'
        parts.append(f'{name}{len(scored):,} photograph{plural} scored{mean}')
    return '. '.join(parts) + '.'


def _warning(runs: Sequence[Run]) -> str:
    """What makes the scores hard to compare: several makers in one run, or in two."""
    lines = made_differently(runs[0], runs[-1])
    if not lines:
        return ''
    what = 'Scores of different makers are side by side here, which may mislead: '
    return f'<p class="warning">{escape(what + "; ".join(lines))}.</p>'


def _policy(style: str, script: str) -> str:
    """A content security policy: no network, and no script and style but our own."""

    def source(text: str) -> str:
        digest = hashlib.sha256(text.encode()).digest()
        return f"'sha256-{base64.b64encode(digest).decode()}'"

    return (
        f"default-src 'none'; img-src data:; style-src {source(style)}; "
        f"script-src {source(script)}; base-uri 'none'; form-action 'none'"
    )
