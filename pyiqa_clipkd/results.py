"""Raw results, one row a run."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pyiqa_clipkd.plan import Run, iterations

COLUMNS = [
    'data',
    'protocol',
    'student',
    'variant',
    'split',
    'seed',
    'plcc',
    'srcc',
    'teacher_plcc',
    'teacher_srcc',
    'iterations',
    'seconds',
    'commit',
    'config',
    'name',
]
Row = dict[str, str]


def read_rows(path: Path) -> dict[str, Row]:
    """Name of a run -> its row; empty where there is no file yet."""
    if not path.is_file():
        return {}
    with path.open(newline='') as file:
        return {row['name']: row for row in csv.DictReader(file)}


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write the table whole or not at all, in an order that doesn't depend on time."""

    def order(row: Row) -> tuple[Any, ...]:
        split = row['split']
        number = (0, int(split)) if split.isdigit() else (1, split)
        what = [row[key] for key in ('data', 'protocol', 'student', 'variant')]
        return (*what, number, int(row['seed']), row['config'])

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f'.{path.name}.{os.getpid()}.part')
    with partial.open('w', newline='') as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator='\n')
        writer.writeheader()
        writer.writerows(sorted(rows, key=order))
    os.replace(partial, path)


def finished_row(run: Run, teacher: Row | None) -> Row | None:
    """The row of a run from what it left on disk; `None` if it isn't finished."""
    if run.is_test:
        record = _read(run.folder / f'{run.data}.json')
        measured = {key: record[key] for key in ('plcc', 'srcc')} if record else {}
    else:
        record = _read(run.folder / 'run.json') if run.weights.is_file() else None
        best = next(iter(record['results'].values())) if record else {}
        measured = {key: best[key]['val'] for key in ('plcc', 'srcc') if best}
    if not record:
        return None
    planned = iterations(run.options)
    teacher = teacher if run.teacher else None
    return {
        'data': run.data,
        'protocol': run.protocol,
        'student': run.student,
        'variant': run.variant,
        'split': run.split,
        'seed': str(run.seed),
        **{key: f'{float(value):.4f}' for key, value in measured.items()},
        'teacher_plcc': teacher['plcc'] if teacher else '',
        'teacher_srcc': teacher['srcc'] if teacher else '',
        'iterations': str(planned),
        'seconds': str(record.get('seconds', '')),
        'commit': str(record.get('commit') or '')[:10],
        'config': run.config,
        'name': run.name,
    }


def _read(path: Path) -> dict[str, Any] | None:
    """A JSON file; `None` if it isn't there or only half written."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
