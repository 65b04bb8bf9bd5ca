"""What runs on the machines of a cluster: reading, and one model in each process."""

from __future__ import annotations

import hashlib
import os
import pickle
import platform
from collections.abc import Iterable, Iterator, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

from pyiqa_clipkd.scoring.contents import Content, Source
from pyiqa_clipkd.scoring.ray.ledger import FATAL
from pyiqa_clipkd.scoring.ray.reading import Item, read_container, read_photograph
from pyiqa_clipkd.scoring.reading import in_order
from pyiqa_clipkd.scoring.tables import ROW, SOURCE, TEXT_FORMATS, Row

# Photographs of an object store that one process fetches at a time.
FETCHES = 16

# Photographs and bytes that go from reading to scoring at once.
BLOCK_ROWS, BLOCK_BYTES = 64, 8_000_000

# The only column of what comes back: rows as JSON, in which any file's name can be.
LINE = 'line'
ENCODE = TEXT_FORMATS['.jsonl'].encode


class Photographs(NamedTuple):
    """Something to read: files."""

    names: list[str]

    def items(self) -> Iterator[Item]:
        yield from in_order(read_photograph, self.names, FETCHES, 2 * FETCHES)


class Container(NamedTuple):
    """Something to read: a shard or table, without those of its rows that are done."""

    source: str
    done: Set[int]
    column: str | None

    def items(self) -> Iterator[Item]:
        yield from read_container(self.source, self.done, self.column)


class Job(NamedTuple):
    """How to score.

    Attributes:
        backend: arguments of `create_backend`.
        options: those of `score_paths`.
        identity: what the rows must have in common; see `identity_of`.
    """

    backend: dict[str, Any]
    options: dict[str, Any]
    identity: Row


def read(tasks: Any) -> Iterator[Any]:
    """pyarrow's table of pickled `Photographs` and `Container` -> tables of items."""
    for task in tasks['item'].to_pylist():
        items: list[Item] = []
        size = 0
        for item in pickle.loads(task).items():
            items.append(item)
            size += len(item.data or b'')
            if len(items) >= BLOCK_ROWS or size >= BLOCK_BYTES:
                yield _as_table(items)
                items, size = [], 0
        yield _as_table(items)


def _as_table(items: Iterable[Item]) -> Any:
    """Names as bytes: those of files need not be text."""
    import pyarrow  # type: ignore[import-untyped]

    columns = [*zip(*items, strict=True)] or [()] * len(Item._fields)
    name, data, error, source, row = columns
    return pyarrow.table(
        {
            'name': pyarrow.array(map(os.fsencode, name), pyarrow.binary()),
            'data': pyarrow.array(data, pyarrow.large_binary()),
            'error': pyarrow.array(error, pyarrow.string()),
            'source': pyarrow.array(map(os.fsencode, source), pyarrow.binary()),
            'row': pyarrow.array(row, pyarrow.int64()),
        }
    )


def _as_items(table: Any) -> list[Item]:
    return [
        Item(os.fsdecode(name), data, error, os.fsdecode(source), row)
        for name, data, error, source, row in zip(
            *(table[field].to_pylist() for field in Item._fields), strict=True
        )
    ]


class Scorer:
    """One model, in a process of its own.

    Args:
        job: how to score.
        ledger: handle of the job's `Ledger`.

    Raises:
        ValueError: if this machine's weights aren't those of the job.
    """

    def __init__(self, job: Job, ledger: Any) -> None:
        from pyiqa_clipkd.scoring.pillow import most_pixels, prepare_pillow

        prepare_pillow()
        most_pixels(job.options['max_pixels'] / 1e6)
        from pyiqa_clipkd.scoring.backends import create_backend
        from pyiqa_clipkd.scoring.core import identity_of

        self.options = job.options
        self.ledger = ledger
        self.backend = create_backend(**job.backend)
        found = identity_of(self.backend, self.options['crops'])
        if found != job.identity:
            raise ValueError(
                f'{platform.node()} would score with {found}, but the job is of '
                f'{job.identity}. Install the same version and weights everywhere.'
            )

    def __call__(self, table: Any) -> Any:
        """pyarrow's table of items -> one of lines."""
        import pyarrow

        items = _as_items(table)
        there = [item for item in items if item.name]
        lines = [
            ENCODE({**row, SOURCE: item.source, ROW: item.row if item.source else None})
            for item, row in zip(there, self._rows(there), strict=True)
        ]
        lines += [ENCODE(item._asdict()) for item in items if not item.name]
        return pyarrow.table({LINE: pyarrow.array(lines, pyarrow.binary())})

    def _rows(self, items: Sequence[Item]) -> Iterator[Row]:
        import ray

        names = '\0'.join(f'{item.source}\0{item.row}\0{item.name}' for item in items)
        work = hashlib.sha256(os.fsencode(names)).hexdigest()
        careful, fatal = ray.get(self.ledger.begin.remote(work))
        if not careful:
            yield from self._score(map(_source, items))
        for place, item in enumerate(items if careful else ()):
            ray.get(self.ledger.read.remote(work, place))
            error = FATAL if place in fatal else ''
            yield from self._score([_source(item, error)])
        ray.get(self.ledger.end.remote(work))

    def _score(self, sources: Iterable[Source]) -> Iterator[Row]:
        from pyiqa_clipkd.scoring.core import score_paths

        return score_paths(sources, self.backend, **self.options)


def _source(item: Item, error: str = '') -> Source:
    if item.data is None and not error:
        return Path(item.name)
    return Content(item.name, item.data or b'', error or item.error)
