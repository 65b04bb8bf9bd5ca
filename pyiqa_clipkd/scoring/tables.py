"""Result rows as CSV, JSONL and Parquet: how they're written, and read again.

A row is a dictionary with the keys of `columns`, or of `LABEL_COLUMNS`; what a bad file
hasn't is `None`.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from pyiqa_clipkd.attributes.names import ATTRIBUTES
from pyiqa_clipkd.files import written_whole

Row = dict[str, Any]

PROBABILITY, RAW = 'p_', 'raw_'
FIRST = ('path', 'score', 'score_100', 'level')
LAST = (
    *('metric', 'weights', 'sha256', 'backend', 'crops', 'input_size'),
    *('width', 'height', 'format', 'notes', 'seconds', 'error'),
)
# Only where attributes were asked for: these, words with FAULT_SEPARATOR between them,
# and which heads they come from, as `sha256` says it of the weights.
FAULTS, FAULT_SEPARATOR, HEADS = 'faults', '; ', 'heads'
WHY = (*ATTRIBUTES, FAULTS, HEADS)
LABEL_COLUMNS = (
    *('path', *ATTRIBUTES, *(RAW + attribute for attribute in ATTRIBUTES)),
    *('labeller', 'width', 'height', 'format', 'notes', 'error'),
)
# Only where a cluster has written the rows: the shard or table that a photograph is in,
# and which one of it; empty for a file of its own.
SOURCE, ROW = 'source', 'row'
FLOATS = {'score', 'score_100', 'seconds', *ATTRIBUTES}
INTEGERS = {'crops', 'input_size', 'width', 'height', ROW}

# Rows that are held in memory at once when a Parquet file is written.
CHUNK = 20_000


def columns(levels: Sequence[str], *, attributes: bool = False) -> list[str]:
    """The columns of a metric with these levels, in the order of the files."""
    probabilities = (PROBABILITY + level for level in levels)
    return [*FIRST, *probabilities, *(WHY if attributes else ()), *LAST]


def is_number(column: str) -> bool:
    """Whether a column holds numbers; the others hold text."""
    return column in FLOATS | INTEGERS or column.startswith((PROBABILITY, RAW))


class Record(NamedTuple):
    """A row of a file, and where in the file it ends, in bytes."""

    row: Row
    end: int


class CSVFormat:
    """Fields are quoted where they must be; a missing value is an empty field.

    UTF-8; the bytes of a path that isn't are written as they are (`surrogateescape`).
    """

    def header(self, names: Sequence[str]) -> bytes:
        return self._line(names)

    def encode(self, row: Row) -> bytes:
        return self._line(['' if value is None else value for value in row.values()])

    def _line(self, values: Sequence[Any]) -> bytes:
        text = io.StringIO()
        # With this end of a line, both of its characters are quoted inside of fields.
        csv.writer(text, lineterminator='\r\n').writerow(values)
        line = text.getvalue().removesuffix('\r\n') + '\n'
        return line.encode(errors='surrogateescape')

    def records(self, file: BinaryIO) -> Iterator[Record]:
        """The whole records of a file; a torn one at its end is left out."""
        names: list[str] = []
        for fields, end in self._fields(file):
            if not names:
                names = fields
                continue
            if len(fields) != len(names):
                raise ValueError(f'a row has {len(fields)} of {len(names)} columns')
            pairs = zip(names, fields, strict=True)
            yield Record({name: _parsed(name, text) for name, text in pairs}, end)

    def _fields(self, file: BinaryIO) -> Iterator[tuple[list[str], int]]:
        lines: list[bytes] = []
        end = quotes = 0
        for line in file:
            lines.append(line)
            end += len(line)
            quotes += line.count(b'"')
            # A line that ends inside of quotes goes on in the next one.
            if line.endswith(b'\n') and quotes % 2 == 0:
                text = b''.join(lines).decode(errors='surrogateescape')
                yield next(csv.reader(io.StringIO(text, newline='')), []), end
                lines, quotes = [], 0


class JSONLFormat:
    """A JSON object a line, in ASCII; bytes that aren't UTF-8 are lone surrogates."""

    def header(self, names: Sequence[str]) -> bytes:
        return b''

    def encode(self, row: Row) -> bytes:
        return json.dumps(row).encode() + b'\n'

    def records(self, file: BinaryIO) -> Iterator[Record]:
        """The whole records of a file; a torn one at its end is left out."""
        end = 0
        for line in file:
            end += len(line)
            if line.endswith(b'\n'):
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError('a line is no object')
                yield Record(row, end)


TextFormat = CSVFormat | JSONLFormat
TEXT_FORMATS: dict[str, TextFormat] = {'.csv': CSVFormat(), '.jsonl': JSONLFormat()}
PARQUET = '.parquet'
ENDINGS = (*TEXT_FORMATS, PARQUET)


def _parsed(column: str, text: str) -> str | float | int | None:
    if not text:
        return None if is_number(column) else ''
    if column in INTEGERS:
        return int(text)
    return float(text) if is_number(column) else text


def valid_text(path: str) -> str:
    """A path as Parquet can hold it: bytes that aren't UTF-8 become `\\udcff`."""
    return path.encode(errors='backslashreplace').decode()


def is_folder_of_parts(path: Path) -> bool:
    """Whether results are a folder, as a cluster writes them, and not one file."""
    return path.suffix.lower() == PARQUET and path.is_dir()


def parquet_rows(path: Path) -> Iterator[Row]:
    """The rows of a Parquet file or of a folder of them, some in memory at a time."""
    from pyarrow import parquet  # type: ignore[import-untyped]

    for part in sorted(path.glob(f'[!.]*{PARQUET}')) if path.is_dir() else [path]:
        with parquet.ParquetFile(part) as file:
            for batch in file.iter_batches(CHUNK):
                yield from batch.to_pylist()


def parquet_schema(names: Sequence[str]) -> Any:
    """pyarrow's schema of these columns."""
    import pyarrow

    def kind(name: str) -> Any:
        if name in INTEGERS:
            return pyarrow.int64()
        return pyarrow.float64() if is_number(name) else pyarrow.string()

    return pyarrow.schema([(name, kind(name)) for name in names])


def write_parquet(path: Path, names: Sequence[str], rows: Iterable[Row]) -> None:
    """Write a Parquet file, whole or not at all, a part of it in memory at a time."""
    import pyarrow
    from pyarrow import parquet

    schema = parquet_schema(names)
    rows = iter(rows)
    with (
        written_whole(path) as partial,
        parquet.ParquetWriter(partial, schema, compression='zstd') as writer,
    ):
        while chunk := list(islice(rows, CHUNK)):
            for row in chunk:
                row['path'] = valid_text(row['path'])
            writer.write_table(pyarrow.Table.from_pylist(chunk, schema))
