"""Markdown tables of the raw results: medians, the paper's figures, differences."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

from pyiqa_clipkd.reproduce.plan import OURS, TEACHER, TRIALS, VARIANTS, ZEROSHOT
from pyiqa_clipkd.reproduce.results import METRICS, Row

ROWS = tuple(dict.fromkeys((ZEROSHOT, TEACHER, *VARIANTS, *TRIALS)))
# (first, second): how much higher the first is on the same split.
PAIRS = (
    (OURS, 'regression'),
    (OURS, 'hard'),
    (OURS, 'soft'),
    (OURS, 'fixed_0.5'),
    (OURS, 'fixed_0.9'),
    ('ridge', OURS),
    (OURS, TEACHER),
    *((trial, 'ridge') for trial in TRIALS[1:]),
)
Figures = dict[tuple[str, str, str], dict[str, str]]


def read_paper(path: Path) -> Figures:
    """(data, student, variant) -> metric -> the paper's figure, where it gives one."""
    figures: Figures = {}
    with path.open(newline='') as file:
        for row in csv.DictReader(file):
            place = figures.setdefault(
                (row['data'], row['student'], row['variant']), {}
            )
            place.update({m: row[m] for m in METRICS if row[m]})
    return figures


def markdown(
    title: str, rows: Iterable[Row], paper: Figures, current: Collection[str] = ()
) -> str:
    """One section a data set and protocol.

    Args:
        rows: raw results.
        paper: what `read_paper` gave.
        current: hashes of the recipes as they are now. Of a network that has any of
            them, rows of other configurations are left out.
    """
    parts = [
        f'# {title}',
        'Median over the runs [lowest to highest], on the held-out side. The raw rows '
        'are in raw.csv.',
    ]
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in _without_outdated(list(rows), current):
        groups.setdefault((row['data'], row['protocol']), []).append(row)
    for (data, protocol), group in sorted(groups.items()):
        parts += [f'## {data}, {protocol}', _results(group, paper)]
        if differences := _differences(group):
            parts += [
                'Differences on the same split and seed; "higher" counts the runs '
                'in which the first is the higher one.',
                differences,
            ]
    return '\n\n'.join(parts) + '\n'


def _without_outdated(rows: Sequence[Row], current: Collection[str]) -> list[Row]:
    def network(row: Row) -> list[str]:
        return [row[key] for key in ('data', 'protocol', 'student', 'variant')]

    known = [network(row) for row in rows if row['config'] in current]
    return [r for r in rows if r['config'] in current or network(r) not in known]


def _results(rows: Sequence[Row], paper: Figures) -> str:
    has_figures = any(data == rows[0]['data'] for data, *_ in paper)
    header = ['student', 'variant', 'runs', 'PLCC', 'SRCC']
    header += ['paper PLCC', 'paper SRCC'] * has_figures
    lines = []
    for (student, variant), group in _by_network(rows):
        line = [f'{student}', variant, str(len(group))]
        line += [spread([float(row[m]) for row in group]) for m in METRICS]
        figures = paper.get((rows[0]['data'], student, variant), {})
        line += [figures.get(m, '') for m in METRICS] * has_figures
        lines.append(line)
    return table(header, lines)


def _by_network(rows: Sequence[Row]) -> Iterator[tuple[tuple[str, str], list[Row]]]:
    """((student, variant), rows), in the order of the paper's tables.

    Where a variant has several configurations, each is on its own, by its hash.
    """
    configs: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        known = configs.setdefault((row['student'], row['variant']), [])
        if row['config'] not in known:
            known.append(row['config'])
    alone = (ZEROSHOT, TEACHER)

    def place(key: tuple[str, str]) -> tuple[bool, str, int, str]:
        student, variant = key
        number = ROWS.index(variant) if variant in ROWS else len(ROWS)
        return variant not in alone, student, number, variant

    for key in sorted(configs, key=place):
        student, variant = key
        for config in sorted(configs[key]):
            label = variant if len(configs[key]) == 1 else f'{variant} ({config})'
            yield (
                (student, label),
                [
                    row
                    for row in rows
                    if (row['student'], row['variant'], row['config'])
                    == (student, variant, config)
                ],
            )


def _differences(rows: Sequence[Row]) -> str:
    networks = {key: _by_split(group) for key, group in _by_network(rows)}
    students = [s for s, variant in networks if variant not in (ZEROSHOT, TEACHER)]
    teachers = [s for s, variant in networks if variant == TEACHER]
    lines = []
    for student in dict.fromkeys(students):
        for first, second in PAIRS:
            owner = teachers[0] if second == TEACHER and teachers else student
            a, b = networks.get((student, first)), networks.get((owner, second))
            common = sorted(a.keys() & b.keys()) if a and b else []
            if not common or a is None or b is None:
                continue
            line = [student, f'{first} - {second}', str(len(common))]
            for metric in METRICS:
                values = [float(a[i][metric]) - float(b[i][metric]) for i in common]
                line += [spread(values, '+'), str(sum(value > 0 for value in values))]
            lines.append(line)
    header = ['student', 'difference', 'runs', 'PLCC', 'higher', 'SRCC', 'higher']
    return table(header, lines) if lines else ''


def _by_split(rows: Iterable[Row]) -> dict[tuple[str, str], Row]:
    return {(row['split'], row['seed']): row for row in rows}


def spread(values: Sequence[float], sign: str = '') -> str:
    """Median [lowest to highest]."""
    median = f'{statistics.median(values):{sign}.3f}'
    if len(values) == 1:
        return median
    return f'{median} [{min(values):{sign}.3f} to {max(values):{sign}.3f}]'


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [header, ['---'] * len(header), *lines]
    return '\n'.join(f'| {" | ".join(row)} |' for row in rows)
