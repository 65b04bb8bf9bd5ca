"""Read a table of photographs and human scores, and say all that is wrong with it."""

from __future__ import annotations

import csv
import io
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd  # type: ignore[import-untyped]

from pyiqa_clipkd.near_copies import fingerprints

# Fewer can't be split into a side to learn from and one to measure on.
FEWEST = 20
SHOWN = 5  # rows that a finding shows
DELIMITERS = ',;\t'


class TableError(ValueError):
    """What is wrong with a table, one line for each kind of finding."""

    def __init__(self, path: Path, findings: Sequence[str]) -> None:
        lines = ''.join(f'\n  - {finding}' for finding in findings)
        super().__init__(f"{path} can't be used as it is:{lines}")
        self.findings = list(findings)


@dataclass
class Table:
    """A table that was checked.

    Attributes:
        rows: columns `image` (as in the file), `mos` (float) and, where one was asked
            for, `group` (words; empty: a group by itself).
        fingerprints: (N, 128) bool, from `near_copies.fingerprint`.
        columns: names of the columns taken for image and score.
        left_out: photographs that can't be decoded, with the reason (`skip_bad`).
    """

    rows: pd.DataFrame
    fingerprints: np.ndarray
    columns: tuple[str, str]
    left_out: list[str] = field(default_factory=list)


class _Findings(list[str]):
    def note(self, what: str, where: Iterable[str]) -> None:
        """One line: what, how often, the first places. Nothing if there are none."""
        places = list(where)
        if places:
            rest = len(places) - SHOWN
            more = f', and {rest} more' if rest > 0 else ''
            shown = ', '.join(places[:SHOWN])
            self.append(f'{what} ({len(places)}): {shown}{more}.')


def load_table(
    path: str | Path,
    images: str | Path,
    *,
    group: str | None = None,
    mos_range: tuple[float, float] | None = None,
    skip_bad: bool = False,
) -> Table:
    """Read a CSV of photographs and scores; open and decode every photograph once.

    The columns `image` and `mos` are taken, in place of a missing one the first column
    that is left. Commas, semicolons or tabs stand between the cells.

    Args:
        path: the CSV, in UTF-8, with a header.
        images: folder of the photographs.
        group: column whose equal words belong together.
        mos_range: lowest and highest possible score.
        skip_bad: leave out photographs that can't be decoded instead of refusing them.

    Raises:
        TableError: with every finding, not only the first.
    """
    path, images = Path(path), Path(images)
    findings = _Findings()
    if not images.is_dir():
        findings.append(f'There is no folder {images} for `--images`.')
    cells, columns = _read(path, group, findings)
    scores = _scores(cells, columns[1], mos_range, findings)
    files = [images / name for name in cells['image']]
    marks = [f'line {line} {name!r}' for line, name in cells['image'].items()]
    _note_copies(files, marks, findings)
    prints, left_out = _decode(files, marks, images, findings)
    if left_out and skip_bad:
        _note_too_few(len(cells) - len(left_out), findings)
    else:
        findings.note(
            "Photographs that can't be decoded (`--skip-bad` leaves them out)", left_out
        )
    if findings:
        raise TableError(path, findings)
    good = np.array([one is not None for one in prints])
    rows = cells.assign(mos=scores)[good].reset_index(drop=True)
    kept = np.stack([one for one in prints if one is not None])
    return Table(rows, kept, columns, left_out)


def _read(
    path: Path, group: str | None, findings: _Findings
) -> tuple[pd.DataFrame, tuple[str, str]]:
    """Cells as text: columns image, mos and group, the index is the line in the file.

    Raises:
        TableError: if there is nothing to go on with.
    """
    with _readable(path, findings):
        text = path.read_text(encoding='utf-8-sig')
        delimiter = max(DELIMITERS, key=text.partition('\n')[0].count)
        reader = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True)
        table: dict[int, list[str]] = {}
        line = 1
        for row in reader:
            if any(cell.strip() for cell in row):
                table[line] = [cell.strip() for cell in row]
            line = reader.line_num + 1
    if not table:
        raise TableError(path, [*findings, 'The file is empty.'])
    header = table.pop(next(iter(table)))
    places, missing = _columns(header, group)
    if group is not None and group not in header:
        findings.append(
            f'`--group` must be one of the columns {", ".join(header)}, but got '
            f'{group!r}.'
        )
    if missing:
        raise TableError(path, [*findings, missing])
    _note_too_few(len(table), findings)
    width = len(header)
    uneven = {
        line: row for line, row in table.items() if len(row) < width or any(row[width:])
    }
    findings.note(
        f"Rows that don't have {width} cells as the header has",
        (f'line {line} has {len(row)}' for line, row in uneven.items()),
    )
    even = {line: row for line, row in table.items() if line not in uneven}
    cells = pd.DataFrame(
        {name: {n: row[at] for n, row in even.items()} for name, at in places.items()},
        columns=list(places),
        dtype=object,
    )
    return cells, (header[places['image']], header[places['mos']])


@contextmanager
def _readable(path: Path, findings: _Findings) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        reason = f'It is no text in UTF-8 (byte {error.start}): save it as CSV UTF-8.'
    except csv.Error as error:
        reason = f"It can't be read as CSV: {error}."
    except OSError as error:
        reason = f"It can't be opened: {error.strerror or error}."
    else:
        return
    raise TableError(path, [*findings, reason])


def _columns(header: list[str], group: str | None) -> tuple[dict[str, int], str]:
    """Which columns are image, mos and group; or what is missing, in words."""
    names = [name.casefold() for name in header]
    places: dict[str, int] = {
        name: names.index(name) for name in ('image', 'mos') if name in names
    }
    if group in header:
        places['group'] = header.index(group)
    free = [i for i in range(len(header)) if i not in places.values()]
    for name in ('image', 'mos'):
        if name not in places:
            if not free:
                return places, (
                    'It must have a column for the image and one for the score '
                    f'(`image` and `mos`), but got {", ".join(header)}.'
                )
            places[name] = free.pop(0)
    if _number(header[places['mos']]) is not None:
        return places, (
            'The first line must name the columns, for instance image,mos, but got '
            f'{", ".join(header)}.'
        )
    return places, ''


def _number(text: str) -> float | None:
    try:
        return None if '_' in text else float(text)
    except ValueError:
        return None


def _scores(
    cells: pd.DataFrame,
    column: str,
    mos_range: tuple[float, float] | None,
    findings: _Findings,
) -> list[float]:
    texts = cells['mos'].to_dict()
    numbers = {line: _number(text) for line, text in texts.items()}
    where = f'in the score column {column!r}'
    findings.note(f'Empty cells {where}', _at({k for k in texts if not texts[k]}))
    text_at = {k for k in texts if texts[k] and numbers[k] is None}
    findings.note(f'Text {where}', (f'line {k} {texts[k]!r}' for k in sorted(text_at)))
    known = {k: number for k, number in numbers.items() if number is not None}
    wild = {k for k, number in known.items() if not math.isfinite(number)}
    findings.note(
        f'NaN or infinity {where}', (f'line {k} {texts[k]!r}' for k in sorted(wild))
    )
    finite = {k: number for k, number in known.items() if k not in wild}
    if len(finite) > 1 and len(set(finite.values())) == 1:
        findings.append(f'All scores are {next(iter(finite.values())):g}.')
    if mos_range is not None:
        low, high = mos_range
        findings.note(
            f'Scores outside `--mos-range` {low:g} {high:g}',
            (f'line {k} {v:g}' for k, v in finite.items() if not low <= v <= high),
        )
    return [math.nan if number is None else number for number in numbers.values()]


def _at(lines: set[int]) -> list[str]:
    return [f'line {line}' for line in sorted(lines)]


def _decode(
    files: Sequence[Path], marks: Sequence[str], images: Path, findings: _Findings
) -> tuple[list[np.ndarray | None], list[str]]:
    """Fingerprints of the files that have one, and which can't be decoded."""
    there = [i for i, file in enumerate(files) if file.is_file()]
    missing = sorted(set(range(len(files))) - set(there))
    if images.is_dir():
        findings.note(f'No such files below {images}', [marks[i] for i in missing])
    prints: list[np.ndarray | None] = [None] * len(files)
    bad = []
    for i, result in zip(there, fingerprints([files[i] for i in there]), strict=True):
        if isinstance(result, str):
            bad.append(f'{marks[i]} ({result})')
        else:
            prints[i] = result
    return prints, bad


def _note_too_few(photographs: int, findings: _Findings) -> None:
    if photographs < FEWEST:
        findings.append(
            f'At least {FEWEST} photographs are needed, but there are {photographs}.'
        )


def _note_copies(
    files: Sequence[Path], marks: Sequence[str], findings: _Findings
) -> None:
    rows = defaultdict(list)
    for file, mark in zip(files, marks, strict=True):
        rows[os.path.normpath(file)].append(mark)
    twice = [same for same in rows.values() if len(same) > 1]
    findings.note('One image in several rows', (' = '.join(same) for same in twice))
