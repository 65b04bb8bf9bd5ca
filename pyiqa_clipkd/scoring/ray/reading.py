"""Photographs out of shards, tables and object stores, as bytes, a few at a time.

Ray Data has readers of its own. They end the job at the first file that is missing or
damaged, and decode by themselves; here such a file is a row with an error.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any, BinaryIO, NamedTuple

from pyiqa_clipkd.images import UnreadableError
from pyiqa_clipkd.scoring.files import is_image_name
from pyiqa_clipkd.scoring.ray.sources import is_shard
from pyiqa_clipkd.scoring.ray.stores import SCHEME, is_remote, located, store_of
from pyiqa_clipkd.scoring.reading import reason_of

# Bytes of one file; of larger ones nothing is read.
MOST_BYTES = 1 << 30
TOO_LARGE, EMPTY = 'too large', 'an empty cell'

# Rows of a table that are in memory at once.
TABLE_ROWS = 16

# Columns of paths or URIs, where no column has the photographs themselves.
PATH_COLUMNS = ('path', 'file', 'file_name', 'filename', 'image', 'uri', 'url')


class Item(NamedTuple):
    """A photograph on its way to be scored.

    Attributes:
        name: what its row has as `path`.
        data: the bytes of its file; `None`: `name` is a local path.
        error: why there are none.
        source: the shard or table that it is in; empty: it is a file of its own.
        row: which one of its source.
    """

    name: str
    data: bytes | None = None
    error: str = ''
    source: str = ''
    row: int = -1


# How the data of a row are had, once it is known that they are wanted.
Load = Callable[[], Item]


def read_photograph(name: str, source: str = '', row: int = -1) -> Item:
    """A file with one photograph: a local one is read where it is scored."""
    if not is_remote(name):
        return Item(name, None, '', source, row)
    try:
        store, path = store_of(name)
        with store.open(path, 'rb') as file:
            return Item(name, _all_of(file), '', source, row)
    except Exception as error:
        return Item(name, b'', _reason(error), source, row)


def read_container(
    source: str, done: Collection[int] = (), column: str | None = None
) -> Iterator[Item]:
    """The photographs of a shard or table, each with its number.

    Args:
        source: path or URI.
        done: numbers that are left out.
        column: of a table, the one with photographs; by default `image_column` says.

    Yields:
        At the end one without a name, whose `row` is how many there are; or, if it
        could not be read as far as that, one with the name of the source and an error.
    """
    known, total = frozenset(done), 0
    try:
        store, path = store_of(source)
        with store.open(path, 'rb') as file:
            rows = (
                _members(file, source)
                if is_shard(source)
                else _cells(file, source, known, column)
            )
            for total, load in rows:
                if load is not None and total - 1 not in known:
                    yield load()
    except Exception as error:
        yield Item(source, b'', _reason(error))
    else:
        yield Item('', None, '', source, total)


def _members(file: BinaryIO, source: str) -> Iterator[tuple[int, Load]]:
    """The images of a tar file, as WebDataset has them, one after the other."""
    row = 0
    with tarfile.open(fileobj=file, mode='r|*') as shard:
        for member in shard:
            hidden = os.path.basename(member.name).startswith('.')
            if not member.isfile() or hidden or not is_image_name(member.name):
                continue
            row += 1
            yield row, partial(_member, shard, member, source, row - 1)


def _member(
    shard: tarfile.TarFile, member: tarfile.TarInfo, source: str, row: int
) -> Item:
    name = f'{source}/{member.name}'
    if member.size > MOST_BYTES:
        return Item(name, b'', TOO_LARGE, source, row)
    file = shard.extractfile(member)
    return Item(name, file.read() if file else b'', '', source, row)


def _cells(
    file: BinaryIO, source: str, done: Collection[int], column: str | None
) -> Iterator[tuple[int, Load | None]]:
    """The rows of a Parquet file; groups of rows that are done aren't read."""
    from pyarrow import parquet  # type: ignore[import-untyped]

    table = parquet.ParquetFile(file)
    column = image_column(table.schema_arrow, column)
    row = 0
    for group in range(table.num_row_groups):
        count = table.metadata.row_group(group).num_rows
        if all(number in done for number in range(row, row + count)):
            row += count
            yield row, None
            continue
        for batch in table.iter_batches(
            TABLE_ROWS, row_groups=[group], columns=[column]
        ):
            for cell in batch.column(0):
                row += 1
                yield row, partial(_cell, cell, source, row - 1)


def _cell(cell: Any, source: str, row: int) -> Item:
    """Bytes, a path or URI, or both as Hugging Face writes them."""
    value = cell.as_py()
    data, path = (
        (value.get('bytes'), value.get('path'))
        if isinstance(value, dict)
        else (value, None)
    )
    if isinstance(data, str):
        data, path = None, data
    value, kind = (path, str) if data is None else (data, bytes)
    if value is not None and not isinstance(value, kind):
        error = f'neither bytes nor a path, but {cell.type}'
        return Item(f'{source}/{row}', b'', error, source, row)
    if data is None and path:
        return read_photograph(_beside(path, source), source, row)
    return Item(f'{source}/{row}', data or b'', '' if data else EMPTY, source, row)


def _beside(path: str, source: str) -> str:
    """A path in a table: relative to the folder of the table."""
    if SCHEME in path or os.path.isabs(path):
        return located(path)
    if is_remote(source):
        return f'{source.rpartition("/")[0]}/{path}'
    return os.path.normpath(os.path.join(os.path.dirname(source), path))


def image_column(schema: Any, wanted: str | None = None) -> str:
    """The column of a table that has the photographs.

    Args:
        schema: pyarrow's.
        wanted: its name; by default the only one with bytes, or with bytes and path as
            Hugging Face writes them, or else the first of `PATH_COLUMNS` with text.

    Raises:
        UnreadableError: if there is none, or more than one could be it.
    """
    from pyarrow import types

    def has_bytes(kind: Any) -> bool:
        if types.is_struct(kind):
            return any(kind.field(i).name == 'bytes' for i in range(kind.num_fields))
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    def has_paths(kind: Any) -> bool:
        if types.is_struct(kind):
            return any(kind.field(i).name == 'path' for i in range(kind.num_fields))
        if types.is_dictionary(kind):
            kind = kind.value_type
        return bool(types.is_string(kind) or types.is_large_string(kind))

    names = [field.name for field in schema]
    if wanted is not None:
        if wanted not in names:
            raise UnreadableError(f'no column {wanted}: there are {", ".join(names)}')
        return wanted
    found = [field.name for field in schema if has_bytes(field.type)]
    texts = {field.name for field in schema if has_paths(field.type)}
    found = found or [name for name in PATH_COLUMNS if name in texts][:1]
    if len(found) != 1:
        which = f'{" and ".join(found)} could be it' if found else 'no such column'
        raise UnreadableError(f'which column has the photographs? ({which}): --column')
    return found[0]


def _all_of(file: BinaryIO) -> bytes:
    data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise UnreadableError(TOO_LARGE)
    return data


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return 'no such file'
    if isinstance(error, PermissionError):
        return 'no permission to read it'
    return reason_of(error)
