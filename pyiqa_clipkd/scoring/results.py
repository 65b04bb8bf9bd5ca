"""Result files: appended to safely, taken up again after a stop, and read."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from pyiqa_clipkd.files import naming, written_whole
from pyiqa_clipkd.scoring.tables import (
    ENDINGS,
    FAULTS,
    FIRST,
    HEADS,
    LAST,
    PARQUET,
    TEXT_FORMATS,
    WHY,
    Row,
    columns,
    is_folder_of_parts,
    is_number,
    parquet_rows,
    valid_text,
    write_parquet,
)

if TYPE_CHECKING:
    import pandas  # type: ignore[import-untyped]

__all__ = ['Results', 'RowFile', 'check_ending', 'columns', 'read_results']

# Rows of scores that differ in one of these don't belong in one file.
IDENTITY = ('metric', 'sha256', 'crops', 'input_size')

JOURNAL = '.jsonl'

Self = TypeVar('Self', bound='RowFile')


def check_ending(path: Path) -> str:
    """The ending of a result file, which says how it is written.

    Raises:
        ValueError: if there is no such format.
        ModuleNotFoundError: if its library isn't there.
    """
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise ValueError(
            f'A result file must end in {", ".join(ENDINGS)}, but got {path.name!r}.'
        )
    if ending == PARQUET and find_spec('pyarrow') is None:
        raise ModuleNotFoundError(f'{path.name} needs pyarrow: `pip install pyarrow`.')
    return ending


def journal_path(path: Path) -> Path:
    """Where the rows of an unfinished Parquet file are, which can't be appended to."""
    return path.with_name(f'.{path.name}.rows{JOURNAL}')


class RowFile:
    """A file that grows by whole rows, a photograph each.

    A run that was stopped, even in the middle of a row, is taken up again: what the
    file has is in `done`, and a torn row at its end is dropped. A Parquet file appears
    at the end; until then its rows are in a hidden file beside it.

    Args:
        path: its ending says how it is written: .csv, .jsonl or .parquet.
        names: the columns, beginning with `path`; one is `error`.
        identity: columns that are the same in all rows, and what they hold.
        overwrite: begin anew, whatever the file holds.
        retry: drop the rows with an error, for these files to be read again.

    Attributes:
        kind: what the rows are, in a word for messages.
        value: the column that bad files don't have.
        done: path -> value of the photographs in the file, `None` for a bad one.
        errors: path -> error of the bad ones.

    Raises:
        ValueError: if the file holds something else, or rows of another identity.
    """

    kind, value = 'rows', 'score'

    def __init__(
        self,
        path: Path,
        names: Sequence[str],
        identity: Mapping[str, Any],
        *,
        overwrite: bool = False,
        retry: bool = False,
    ) -> None:
        self.path = path
        self.names = list(names)
        self.identity = dict(identity)
        self.is_parquet = check_ending(path) == PARQUET
        self.rows_path = journal_path(path) if self.is_parquet else path
        self.format = TEXT_FORMATS[self.rows_path.suffix.lower()]
        self.done: dict[str, float | None] = {}
        self.errors: dict[str, str] = {}
        if overwrite:
            self.rows_path.unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        if self.is_parquet and path.exists():
            for row in _read(path, parquet_rows(path)):
                self._take(row)
        self.file = self._opened(retry)

    def _opened(self, retry: bool) -> BinaryIO:
        """The file of rows, ready to be appended to."""
        end = self._read_rows() if self.rows_path.exists() else 0
        if retry and self.errors:
            self._drop_errors()
            end = self.rows_path.stat().st_size if end else 0
        self.rows_path.parent.mkdir(parents=True, exist_ok=True)
        file = self.rows_path.open('ab')
        if end == 0:
            file.truncate(0)
            with naming(self.path):
                file.write(self.format.header(self.names))
                file.flush()
        else:
            file.truncate(end)
        return file

    def _read_rows(self) -> int:
        """Take the rows that are there; returns where the last whole one ends."""
        header = self.format.header(self.names)
        with self.rows_path.open('rb') as file:
            # Only what we began may be cut: a torn header, or a torn first row.
            expected = header or b'{"path": '
            start = file.read(len(expected))
            if not expected.startswith(start):
                line, *_ = (start + file.readline()).splitlines() or [b'']
                found = line.decode(errors='replace').split(',')
                raise ValueError(_other(self.path, self.names, found))
            if start != expected:
                return 0
            file.seek(0)
            end = len(header)
            for row, end in _read(self.path, self.format.records(file)):  # noqa: B007
                self._take(row)
        return end

    def _drop_errors(self) -> None:
        for key in self.errors:
            del self.done[key]
        self.errors.clear()
        if self.is_parquet and self.path.exists():
            write_parquet(self.path, self.names, self._good(parquet_rows(self.path)))
        if self.rows_path.exists():
            target = Path(os.path.realpath(self.rows_path))  # a link stays one
            with (
                self.rows_path.open('rb') as file,
                written_whole(target) as partial,
                partial.open('wb') as new,
            ):
                new.write(self.format.header(self.names))
                rows = (record.row for record in self.format.records(file))
                new.writelines(map(self.format.encode, self._good(rows)))

    def _take(self, row: Row) -> None:
        if [*row] != self.names:
            raise ValueError(_other(self.path, self.names, [*row]))
        found = {key: row[key] for key in self.identity}
        if found != self.identity:
            raise ValueError(
                f'{self.path} holds {self.kind} of {self.words(found)}, but these are '
                f'of {self.words(self.identity)}. Choose another file, or '
                '--overwrite it.'
            )
        key = self.key(row['path'])
        self.done[key] = row[self.value]
        if row[self.value] is None:
            self.errors[key] = row['error']
        else:
            self.errors.pop(key, None)

    def _good(self, rows: Iterator[Row]) -> Iterator[Row]:
        return (row for row in rows if row[self.value] is not None)

    def words(self, identity: Mapping[str, Any]) -> str:
        """What rows of an identity are of, for messages."""
        return ', '.join(f'{name} {value}' for name, value in identity.items())

    def key(self, path: str) -> str:
        """A path as `done` has it."""
        return valid_text(path) if self.is_parquet else path

    def add(self, row: Row) -> None:
        """Append a row; it is in the file when this returns."""
        with naming(self.path):
            self.file.write(
                self.format.encode({name: row[name] for name in self.names})
            )
            self.file.flush()

    def finish(self) -> None:
        """All rows are there: write what can only be written whole."""
        if self.is_parquet:
            write_parquet(self.path, self.names, self._all_rows())
            self.file.close()
            self.rows_path.unlink()

    def _all_rows(self) -> Iterator[Row]:
        seen = set()
        if self.path.exists():
            for row in parquet_rows(self.path):
                seen.add(row['path'])
                yield row
        with self.rows_path.open('rb') as file:
            for row, _ in self.format.records(file):
                # A run that ended between the last two steps has left them twice.
                if valid_text(row['path']) not in seen:
                    yield row

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with naming(self.path):  # a row that found no room is tried once more
            try:
                if kind is None:
                    self.finish()
            finally:
                self.file.close()


class Results(RowFile):
    """The scores of one metric.

    Args:
        path: see `RowFile`.
        levels: the metric's words.
        identity: `metric`, `sha256`, `crops`, `input_size` of the rows to come, and
            `heads` where they have attributes.
        overwrite, retry: see `RowFile`.

    Attributes:
        faults: path -> faults of those that have any.
    """

    kind = 'scores'

    def __init__(
        self,
        path: Path,
        levels: Sequence[str],
        identity: Mapping[str, Any],
        *,
        overwrite: bool = False,
        retry: bool = False,
    ) -> None:
        self.faults: dict[str, str] = {}
        own = {key: identity[key] for key in IDENTITY}
        if HEADS in identity:
            own[HEADS] = identity[HEADS]
        names = columns(levels, attributes=HEADS in own)
        super().__init__(path, names, own, overwrite=overwrite, retry=retry)

    def _take(self, row: Row) -> None:
        super()._take(row)
        if row.get(FAULTS):
            self.faults[self.key(row['path'])] = row[FAULTS]

    def words(self, identity: Mapping[str, Any]) -> str:
        return identity_words(identity)


def identity_words(identity: Mapping[str, Any]) -> str:
    """What decides the scores of a run, for messages."""
    return (
        f'{identity["metric"]} (weights {identity["sha256"]}, crops '
        f'{identity["crops"]}, input size {identity["input_size"]}'
        f'{", heads " + identity[HEADS] if HEADS in identity else ""})'
    )


def _read(path: Path, rows: Iterator[Any]) -> Iterator[Any]:
    """Rows of a file; what can't be read is an error that names the file."""
    try:
        yield from rows
    except (ValueError, KeyError) as error:
        if str(path) in str(error):
            raise
        raise ValueError(f'{path} is damaged or no result file ({error}).') from error


def _other(path: Path, names: Sequence[str], found: Sequence[str]) -> str:
    if {*names} ^ {*found} == {*WHY}:
        now, then = ('with', 'without') if HEADS in names else ('without', 'with')
        return (
            f'{path} was begun {then} --attributes, and this run is {now} them. Choose '
            'another file, --overwrite it, or do as before.'
        )
    return (
        f'{path} is no result file with the columns {", ".join(names)}. Choose another '
        'file, or --overwrite it.'
    )


def read_results(path: Path | str) -> pandas.DataFrame:
    """The rows of a result file.

    Args:
        path: .csv, .jsonl or .parquet, as `pyiqa-clipkd score -o` writes them. Of one
            that is being written, the rows so far. A .parquet may be a folder of parts.

    Returns:
        The columns of `columns`, one row a file. Numbers are NaN, texts empty where a
        file could not be scored.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it isn't a result file.
    """
    import pandas

    path = Path(path)
    ending = check_ending(path)
    if ending == PARQUET and not path.exists() and journal_path(path).exists():
        raise FileNotFoundError(
            f'{path} is not finished: the command that began it goes on with it.'
        )
    # pyarrow opens a file by itself, and of a folder each.
    with nullcontext() if is_folder_of_parts(path) else path.open('rb') as file:
        rows = (
            parquet_rows(path)
            if file is None or ending == PARQUET
            else (record.row for record in TEXT_FORMATS[ending].records(file))
        )
        table = pandas.DataFrame(list(_read(path, rows)), dtype=object)
    if table.empty:
        raise ValueError(f'{path} has no rows.')
    missing = [name for name in (*FIRST, *LAST) if name not in table]
    if missing:
        raise ValueError(
            f'{path} is no result file of `pyiqa-clipkd score`: it has no column '
            f'{", ".join(missing)}.'
        )
    for name in table:
        if is_number(str(name)):
            whole = name in IDENTITY
            table[name] = table[name].astype(int if whole else float)
        else:
            table[name] = table[name].fillna('').astype(object)
    return table
