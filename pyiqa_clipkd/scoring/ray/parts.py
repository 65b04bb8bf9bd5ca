"""Results as a folder of Parquet files: what is in them is done, whatever happens."""

from __future__ import annotations

import json
import os
import re
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from types import TracebackType
from typing import Any

from pyiqa_clipkd.files import written_whole
from pyiqa_clipkd.scoring.ray.stores import is_remote, located, store_of
from pyiqa_clipkd.scoring.results import IDENTITY, identity_words
from pyiqa_clipkd.scoring.tables import (
    FAULTS,
    HEADS,
    ROW,
    SOURCE,
    Row,
    columns,
    parquet_schema,
    valid_text,
)

# A part is written when it has so many rows, or after so many seconds.
PART_ROWS, PART_SECONDS = 50_000, 30

NAME = re.compile(r'scores-[0-9a-f]{32}\.parquet')

# Of a part's metadata: how many photographs the containers have that ended in it.
ENDED = b'pyiqa_clipkd.ended'


def is_part(name: str) -> bool:
    """Whether a path or URI is that of a part, going by its name and folder."""
    folder, file = os.path.split(name)
    return folder.lower().endswith('.parquet') and bool(NAME.fullmatch(file))


class Parts:
    """The scores of one metric, in a folder that grows by whole files.

    Args:
        folder: path or URI.
        levels: the metric's words.
        identity: what the rows have in common; see `Results`.
        overwrite: what is there counts for nothing; `begin` removes it.
        retry: remove the rows with an error.

    Attributes:
        done: names of photographs that are in it; of those in no container.
        done_rows: container -> numbers of its photographs that are in it.
        ended: container -> how many photographs it has, once all were seen.

    Raises:
        ValueError: if the folder holds something else, or rows of another identity.
    """

    def __init__(
        self,
        folder: str,
        levels: Sequence[str],
        identity: Mapping[str, Any],
        *,
        overwrite: bool = False,
        retry: bool = False,
    ) -> None:
        self.folder = located(folder)
        self.store, self.path = store_of(self.folder)
        self.names = [*columns(levels, attributes=HEADS in identity), SOURCE, ROW]
        self.schema = parquet_schema(self.names)
        self.identity = {k: identity[k] for k in (*IDENTITY, HEADS) if k in identity}
        self.done: set[str] = set()
        self.done_rows: dict[str, set[int]] = defaultdict(set)
        self.ended: dict[str, int] = {}
        self.waiting: list[Row] = []
        self.just_ended: dict[str, int] = {}
        self.written = time.monotonic()
        there = self._parts()
        self.outdated = there if overwrite else []
        for part in [] if overwrite else there:
            self._take(part, retry)

    def begin(self) -> None:
        """Remove what is overwritten: nothing stands in the way of new rows."""
        while self.outdated:
            self.store.rm_file(self.outdated.pop())

    def _parts(self) -> list[str]:
        """The files of the folder, which is made.

        Raises:
            ValueError: if others are in it.
        """
        if self.store.isfile(self.path):
            raise ValueError(
                f'{self.folder} is a file, but --engine ray writes a folder of parts. '
                'Choose another name.'
            )
        self.store.makedirs(self.path, exist_ok=True)
        try:
            names = sorted(self.store.ls(self.path, detail=False))
        except FileNotFoundError:  # object stores have no empty folders
            return []
        seen = [name for name in names if not os.path.basename(name).startswith('.')]
        for name in seen:
            if not NAME.fullmatch(os.path.basename(name)):
                raise ValueError(
                    f'{self.folder} holds {os.path.basename(name)}, which is no part '
                    'of results of --engine ray. Choose another folder.'
                )
        return seen

    def _take(self, part: str, retry: bool) -> None:
        rows = self._read(part)
        good = rows.filter(rows['score'].is_valid()) if retry else rows
        if len(good) < len(rows):
            self._write(part, good)
        for name, source, row in zip(
            *(good[c].to_pylist() for c in ('path', SOURCE, ROW)), strict=True
        ):
            if source:
                self.done_rows[source].add(row)
            else:
                self.done.add(name)
        metadata = rows.schema.metadata or {}
        self.ended |= json.loads(metadata.get(ENDED, b'{}'))

    def _read(self, part: str) -> Any:
        """The rows of a part, which must be ours and made in the same way."""
        from pyarrow import ArrowException, parquet  # type: ignore[import-untyped]

        try:
            with self.store.open(part, 'rb') as file:
                rows = parquet.read_table(file)
        except ArrowException as error:
            raise ValueError(f'{part} is damaged ({error}).') from error
        if rows.schema.names != self.names:
            raise ValueError(
                f'{self.folder} was begun with other columns: with --attributes or '
                'without them. Choose another folder, --overwrite it, or do as before.'
            )
        for name, value in self.identity.items():
            if any(other != value for other in rows[name].unique().to_pylist()):
                other = {key: rows[key][0].as_py() for key in self.identity}
                raise ValueError(
                    f'{self.folder} holds scores of {identity_words(other)}, but '
                    f'these are of {identity_words(self.identity)}. Choose another '
                    'folder, or --overwrite it.'
                )
        return rows

    def known(self) -> Iterator[Row]:
        """The rows that are there: what a screen and a summary need of them."""
        wanted = ['path', 'score', 'level', 'error', SOURCE, ROW]
        wanted += [FAULTS] if HEADS in self.identity else []
        for part in [] if self.outdated else self._parts():
            yield from self._read(part).select(wanted).to_pylist()

    def has(self, row: Row) -> bool:
        """Whether a row is there already."""
        if row[SOURCE]:
            return row[ROW] in self.rows_of(row[SOURCE])
        return valid_text(row['path']) in self.done

    def rows_of(self, container: str) -> Set[int]:
        """Which photographs of a shard or table are there."""
        return self.done_rows.get(valid_text(container), frozenset())

    def has_all(self, container: str) -> bool:
        """Whether all photographs of a shard or table are there."""
        return self.ended.get(valid_text(container)) == len(self.rows_of(container))

    def add(self, row: Row) -> None:
        """Take a row; it is on disk when its part is written."""
        row = {**row, **{key: valid_text(row[key]) for key in ('path', SOURCE)}}
        if row[SOURCE]:
            self.done_rows[row[SOURCE]].add(row[ROW])
        else:
            self.done.add(row['path'])
        self.waiting.append(row)
        late = time.monotonic() - self.written > PART_SECONDS
        if late or len(self.waiting) >= PART_ROWS:
            self.flush()

    def end(self, container: str, count: int) -> None:
        """A shard or table has so many photographs, and all have been read."""
        self.just_ended[valid_text(container)] = count

    def flush(self) -> None:
        """Write what waits as a part."""
        import pyarrow

        self.written = time.monotonic()
        if not self.waiting and not self.just_ended:
            return
        rows = pyarrow.Table.from_pylist(self.waiting, self.schema)
        ended = json.dumps(self.just_ended)
        name = f'scores-{uuid.uuid4().hex}.parquet'
        rows = rows.replace_schema_metadata({ENDED: ended})
        self._write(f'{self.path}/{name}', rows)
        self.waiting, self.just_ended = [], {}

    def _write(self, part: str, rows: Any) -> None:
        """One file, whole or not at all, as object stores write any."""
        import pyarrow
        from pyarrow import parquet

        buffer = pyarrow.BufferOutputStream()
        parquet.write_table(rows, buffer, compression='zstd')
        content = buffer.getvalue().to_pybytes()
        if is_remote(self.folder):
            self.store.pipe_file(part, content)
        else:
            with written_whole(Path(part)) as partial:
                partial.write_bytes(content)

    def __enter__(self) -> Parts:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.flush()
