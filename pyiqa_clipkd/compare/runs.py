"""A run: the rows of one result file, and what they have in common."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from pyiqa_clipkd.attributes.names import ATTRIBUTES, WORDS
from pyiqa_clipkd.names import LEVELS
from pyiqa_clipkd.scoring.tables import FAULT_SEPARATOR, FAULTS

if TYPE_CHECKING:
    import pandas as pd  # type: ignore[import-untyped]

# What makes the scores of two runs comparable: both must have the same.
MAKERS = ('metric', 'weights', 'sha256', 'crops', 'input_size', 'heads')
_TEXTS = ('path', 'level', 'notes', 'error', 'backend', FAULTS, *MAKERS)


@dataclass(frozen=True)
class Run:
    """Scores of photographs, and the files that could not be scored.

    Args:
        name: what to call it: the name of the result file or of the folder.
        rows: one row a file, in the columns of a result file.
        folder: the folder that all paths begin with, '' if there is none.
        base: what relative paths are relative to.
        written: when the results were written, in seconds of the epoch.
    """

    name: str
    rows: pd.DataFrame
    folder: str = ''
    base: Path = Path()
    written: float | None = None

    @cached_property
    def scored(self) -> pd.DataFrame:
        """The rows with a score."""
        return self.rows[self.rows['score'].notna()]

    @cached_property
    def bad(self) -> pd.DataFrame:
        """The rows without a score: their `error` says why."""
        return self.rows[self.rows['score'].isna()]

    def values(self, column: str) -> list[str]:
        """The different words in a column, in the order of the rows."""
        return [word for word in self.rows[column].unique() if word]

    @cached_property
    def levels(self) -> list[str]:
        """Names of the levels from worst to best."""
        names = [c[2:] for c in self.rows if c.startswith('p_')]
        known = [n for n in names if self.rows[f'p_{n}'].notna().any()]
        return known or list(LEVELS)

    @cached_property
    def has_attributes(self) -> bool:
        """Whether all photographs with a score have values of the five attributes."""
        return set(ATTRIBUTES) <= set(self.rows) and bool(
            self.scored[[*ATTRIBUTES]].notna().all(axis=None)
        )

    @cached_property
    def attribute_means(self) -> dict[str, float]:
        """Attribute -> mean of the photographs with a score; {} without attributes."""
        names = ATTRIBUTES if self.has_attributes else ()
        return {name: float(self.scored[name].mean()) for name in names}

    @cached_property
    def fault_counts(self) -> dict[str, int]:
        """Fault -> how many photographs have it, all faults in their order."""
        count = Counter(word for cell in self.rows[FAULTS] for word in faults_of(cell))
        return {WORDS[name][0]: count[WORDS[name][0]] for name in ATTRIBUTES}

    def relative(self, path: str) -> str:
        """A path without the folder that all of them begin with."""
        path = os.path.normpath(path)
        if not self.folder:
            return path
        return path.removeprefix(self.folder.rstrip(os.sep) + os.sep)

    def locate(self, path: str) -> Path:
        """Where the file of a row should be."""
        return self.base / path


def make_run(name: str, rows: pd.DataFrame, folder: str | None = None) -> Run:
    """A run from rows in the columns of a result file.

    Args:
        name: what to call it.
        rows: at least the columns `path`, `score` and `error`.
        folder: what all paths begin with; by default what they do begin with.
    """
    import pandas as pd

    rows = rows.reset_index(drop=True)
    # Objects: pandas's own strings can't hold the name of a file that isn't UTF-8.
    texts = {
        column: pd.Series(
            [_as_text(value) for value in rows[column]] if column in rows else '',
            index=rows.index,
            dtype=object,
        )
        for column in _TEXTS
    }
    numbers = {c: rows[c].astype(float) for c in ('score', *ATTRIBUTES) if c in rows}
    rows = rows.assign(**texts, **numbers)
    folder = _common_folder(rows['path']) if folder is None else folder
    return Run(name, rows, os.path.normpath(folder) if folder else '')


def read_run(path: Path) -> Run:
    """The run of a result file.

    Raises:
        ValueError: if it isn't a result file or has no rows.
        OSError: if it can't be read.
    """
    from pyiqa_clipkd.scoring.results import read_results

    run = make_run(path.name, read_results(path))
    there = any((path.parent / p).exists() for p in run.rows['path'][:20])
    here = any(Path(p).exists() for p in run.rows['path'][:20])
    base = path.parent if there and not here else Path()
    return replace(run, base=base, written=path.stat().st_mtime)


def made_differently(first: Run, second: Run) -> list[str]:
    """What keeps the scores of two runs from being compared: a line for each."""
    lines = []
    for maker in MAKERS:
        both = [' and '.join(r.values(maker)) or 'unknown' for r in (first, second)]
        if len({*first.values(maker), *second.values(maker)}) > 1:
            lines.append(f'{maker}: {both[0]} against {both[1]}')
    return lines


def faults_of(cell: str) -> list[str]:
    """The words in a cell of the column `faults`."""
    return [word for word in cell.split(FAULT_SEPARATOR) if word]


def _as_text(value: object) -> str:
    """A cell as a word: '' where it is missing, 384 for 384.0."""
    if value is None or value != value:
        return ''
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _common_folder(paths: pd.Series) -> str:
    try:
        folders = [os.path.normpath(os.path.dirname(path)) for path in paths]
        return os.path.commonpath(folders)
    except ValueError:  # absolute and relative ones, or several drives
        return ''
