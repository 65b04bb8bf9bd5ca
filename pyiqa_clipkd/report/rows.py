"""The rows of the page's table: columns of plain values for the script."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pyiqa_clipkd.attributes.names import ATTRIBUTES
from pyiqa_clipkd.compare.runs import Run
from pyiqa_clipkd.report.gallery import href

DIGITS = 4  # of a score; the bars count the rounded ones, so that filters agree
ALWAYS = ('name', 'score', 'score_a', 'score_b')


class Column(NamedTuple):
    """One column of the table.

    Attributes:
        key, label: its name for the script, and its heading.
        kind: `file`, `text`, `number`, `change`, or `attribute`: a number in [0, 1].
        values: one a row; `None` or '' where there is none. Of `file` there are none:
            the names of the files are the values.
        digits: of a number, behind the point.
        run: whose file the cell links to, if it does.
    """

    key: str
    label: str
    kind: str
    values: list[Any]
    digits: int = 2
    run: int | None = None


class Files(NamedTuple):
    """The files of one run: `root` is a link to their folder, `None` no file."""

    root: str
    names: list[str | None]


class Table(NamedTuple):
    """All columns, and the files of the runs that they are about."""

    columns: list[Column]
    files: list[Files]

    def numbers(self, key: str) -> np.ndarray:
        """The values of a column that are there: (N,)."""
        values = next(column.values for column in self.columns if column.key == key)
        return np.array([value for value in values if value is not None], float)

    def as_json(self) -> str:
        """JSON that may stand inside a script element, whatever a path holds."""
        data = {
            'files': [files._asdict() for files in self.files],
            'columns': [column._asdict() for column in self.columns],
        }
        text = json.dumps(data, separators=(',', ':'), allow_nan=False)
        for sign in '<>&':
            text = text.replace(sign, f'\\u{ord(sign):04x}')
        return text


def one_run(run: Run, page: Path) -> Table:
    """The table of one run, on a page that will be at `page`."""
    every = np.arange(len(run.rows))
    columns = [
        Column('name', 'Photograph', 'file', []),
        Column('score', 'Score', 'number', _numbers(run, 'score', every)),
        Column('level', 'Level', 'text', _words(run, 'level', every)),
        Column('score_100', '0-100', 'number', _numbers(run, 'score_100', every), 1),
        *_attributes(run, every),
        Column('width', 'Width', 'number', _numbers(run, 'width', every), 0),
        Column('height', 'Height', 'number', _numbers(run, 'height', every), 0),
        Column('seconds', 'Seconds', 'number', _numbers(run, 'seconds', every), 3),
        Column('notes', 'Notes', 'text', _words(run, 'notes', every)),
        Column('error', 'Error', 'text', _words(run, 'error', every)),
    ]
    return Table(_in_use(columns), [_files(run, every, page)])


def two_runs(runs: tuple[Run, Run], pairs: np.ndarray, page: Path) -> Table:
    """The pairs of two runs, and below them what has no partner.

    Args:
        runs: A and B.
        pairs: (N, 2) places in their `rows`.
        page: where the page will be.
    """
    places = _with_the_lonely(runs, pairs)
    a, b = (_numbers(runs[i], 'score', places[i]) for i in (0, 1))
    errors = [_words(runs[i], 'error', places[i]) for i in (0, 1)]
    columns = [
        Column('name', 'Photograph', 'file', []),
        Column('score_a', 'Score A', 'number', a, run=0),
        Column('score_b', 'Score B', 'number', b, run=1),
        Column('change', 'B - A', 'change', _changes(a, b)),
        Column('level_a', 'Level A', 'text', _words(runs[0], 'level', places[0])),
        Column('level_b', 'Level B', 'text', _words(runs[1], 'level', places[1])),
        *_attribute_changes(runs, places),
        Column(
            'error', 'Error', 'text', [_error(*e) for e in zip(*errors, strict=True)]
        ),
    ]
    files = [_files(runs[i], places[i], page) for i in (0, 1)]
    return Table(_in_use(columns), files)


def _attributes(run: Run, places: np.ndarray) -> list[Column]:
    if not run.has_attributes:
        return []
    return [
        *(
            Column(name, name.capitalize(), 'attribute', _numbers(run, name, places))
            for name in ATTRIBUTES
        ),
        Column('faults', 'Faults', 'text', _words(run, 'faults', places)),
    ]


def _attribute_changes(runs: tuple[Run, Run], places: np.ndarray) -> list[Column]:
    """How much each attribute changed, and the faults of both."""
    if not all(run.has_attributes for run in runs):
        return []
    columns = []
    for name in ATTRIBUTES:
        a, b = (_numbers(runs[i], name, places[i]) for i in (0, 1))
        label = f'{name.capitalize()} B - A'
        columns.append(Column(f'{name}_change', label, 'change', _changes(a, b)))
    for i, letter in enumerate('AB'):
        words = _words(runs[i], 'faults', places[i])
        key = f'faults_{letter.lower()}'
        columns.append(Column(key, f'Faults {letter}', 'text', words))
    return columns


def _changes(
    first: Sequence[float | None], second: Sequence[float | None]
) -> list[float | None]:
    return [
        None if x is None or y is None else round(y - x, DIGITS)
        for x, y in zip(first, second, strict=True)
    ]


def _with_the_lonely(runs: tuple[Run, Run], pairs: np.ndarray) -> np.ndarray:
    """(2, N) places in the runs' `rows`, -1 where there is no partner."""
    first, second = (
        np.setdiff1d(np.arange(len(run.rows)), pairs[:, i])
        for i, run in enumerate(runs)
    )
    nobody = [np.full_like(alone, -1) for alone in (second, first)]
    return np.stack(
        [
            np.concatenate([pairs[:, 0], first, nobody[0]]),
            np.concatenate([pairs[:, 1], nobody[1], second]),
        ]
    )


def _numbers(
    run: Run, column: str, places: np.ndarray, digits: int = DIGITS
) -> list[float | None]:
    """Rounded values at these places, `None` where there is none."""
    values = np.append(run.rows[column].astype(float).to_numpy(), np.nan)[places]
    return [None if v != v else round(v, digits) for v in values.tolist()]


def _words(run: Run, column: str, places: np.ndarray) -> list[str]:
    """Words at these places, '' where there is none."""
    values = [*run.rows[column], '']
    return [values[i] for i in places]


def _files(run: Run, places: np.ndarray, page: Path) -> Files:
    names = [*(Path(run.relative(p)).as_posix() for p in run.rows['path']), None]
    return Files(href(run.locate(run.folder), page), [names[i] for i in places])


def _error(first: str, second: str) -> str:
    return '; '.join(f'{r}: {e}' for r, e in (('A', first), ('B', second)) if e)


def _in_use(columns: list[Column]) -> list[Column]:
    """The columns that have any value; names and scores in any case."""
    return [
        column
        for column in columns
        if column.key in ALWAYS or any(v not in (None, '') for v in column.values)
    ]
