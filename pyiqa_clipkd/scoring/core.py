"""The engine: photographs in, a row for each out, in the same order."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pyiqa_clipkd.attributes.names import faults, named_attributes
from pyiqa_clipkd.cores import usable_cores
from pyiqa_clipkd.files import SHORT_HASH
from pyiqa_clipkd.images import MAX_PIXELS, UnreadableError
from pyiqa_clipkd.scale import level_of, to_100
from pyiqa_clipkd.scoring.backends import Backend, Explaining, heads_of
from pyiqa_clipkd.scoring.contents import Source
from pyiqa_clipkd.scoring.isolated import Here, Isolated
from pyiqa_clipkd.scoring.reading import (
    MEMORY,
    Allowance,
    decoded_bytes,
    in_order,
    read_squares,
    reason_of,
)
from pyiqa_clipkd.scoring.tables import (
    FAULT_SEPARATOR,
    FAULTS,
    HEADS,
    PROBABILITY,
    Row,
    columns,
    is_number,
)

if TYPE_CHECKING:
    from pyiqa_clipkd.runtime import Outputs

# Digits after the point of what is written; scores are good for five.
DIGITS = 6


def score_paths(
    paths: Iterable[Source | None],
    backend: Backend,
    *,
    crops: int = 0,
    batch_size: int | None = None,
    workers: int | None = None,
    max_pixels: int = MAX_PIXELS,
    max_seconds: float | None = None,
) -> Iterator[Row]:
    """Score files, a few at a time, and go on after those that can't be read.

    Whatever goes wrong with a file is in the `error` of its row. A score depends on its
    photograph alone: not on the order, on `batch_size` (beyond 1e-5) or on `workers`.

    Args:
        paths: read as they're needed; `Content` for what is no file of its own. `None`
            says that the next is not there yet: rows that are ready need not wait.
        backend: see `create_backend`.
        crops: squares at the photograph's own resolution, scored beside the whole; the
            score is the mean.
        batch_size: squares that the network sees at once; by default what suits the
            backend. With 1 each worker also runs the network.
        workers: threads that decode; by default one a processor core.
        max_pixels: larger photographs are refused.
        max_seconds: for one photograph. The workers then read in processes of their
            own, so that one can be ended, or crash, and the others go on: for files of
            strangers.

    Yields:
        A row with the keys of `columns` for each path, in their order.

    Raises:
        ValueError: if an option is out of its range, before a file is read.
    """
    if batch_size is None:
        batch_size = getattr(backend, 'batch_size', 1)
    workers = default_workers() if workers is None else workers
    for name, value, least in (
        ('crops', crops, 0),
        ('batch_size', batch_size, 1),
        ('workers', workers, 1),
        ('max_pixels', max_pixels, 1),
    ):
        if type(value) is not int or value < least:
            raise ValueError(
                f'`{name}` must be a whole number >= {least}, but got {value!r}.'
            )
    sources: Iterable[Any] = paths
    readers = Here() if max_seconds is None else Isolated(max_seconds, max_pixels)
    engine = _Engine(backend, crops, max_pixels, readers)
    if batch_size == 1:
        rows = in_order(engine.score, sources, workers, 4 * workers)
    else:  # what waits for its batch are squares, not whole photographs
        prepared = in_order(engine.prepare, sources, workers, workers + batch_size)
        rows = engine.score_batches(prepared, batch_size)
    return _closing(rows, readers)


def _closing(rows: Iterator[Row], readers: Here | Isolated) -> Iterator[Row]:
    """The rows; at their end, or when nobody wants more, nothing of it is left."""
    with closing(readers), closing(rows):  # type: ignore[type-var]
        yield from rows


def default_workers(threads: int | None = None) -> int:
    """One for each processor core that this process may use, or each `threads`."""
    return max(1, usable_cores() // (threads or 1))


def identity_of(backend: Backend, crops: int) -> Row:
    """What decides a score beside the photograph: rows of one file agree in it."""
    return {
        'metric': backend.metric,
        'sha256': backend.sha256[:SHORT_HASH],
        'crops': crops,
        'input_size': backend.input_size,
    } | ({HEADS: heads[:SHORT_HASH]} if (heads := heads_of(backend)) else {})


class _Prepared(NamedTuple):
    """A row without a score, and what to score: (1 + K, 3, S, S), or `None`."""

    row: Row
    squares: np.ndarray | None
    seconds: float


class _Engine:
    """One photograph or one batch at a time; called from several threads."""

    def __init__(
        self,
        backend: Backend,
        crops: int,
        max_pixels: int,
        readers: Here | Isolated,
    ) -> None:
        self.backend = backend
        self.readers = readers
        self.crops = crops
        self.max_pixels = max_pixels
        self.memory = Allowance(MEMORY)
        self.common = identity_of(backend, crops) | {
            'weights': backend.weights,
            'backend': backend.name,
        }

    def score(self, path: Source) -> Row:
        prepared = self.prepare(path)
        self.add_scores([prepared])
        return prepared.row

    def prepare(self, path: Source) -> _Prepared:
        start = time.perf_counter()
        names = columns(self.backend.levels, attributes=HEADS in self.common)
        row: Row = {name: None if is_number(name) else '' for name in names}
        row |= self.common | {'path': str(path)}
        pixels = None
        try:
            with (
                self.readers.one_file() as call,
                self.memory.take(call(decoded_bytes, path)),
            ):
                start = time.perf_counter()  # without the wait for other photographs
                size = self.backend.input_size
                found, pixels = call(
                    read_squares, path, self.max_pixels, size, self.crops
                )
                row |= found
        except Exception as error:
            row['error'] = reason_of(error)
        return _Prepared(row, pixels, time.perf_counter() - start)

    def score_batches(
        self, prepared: Iterator[_Prepared], batch_size: int
    ) -> Iterator[Row]:
        for batch in _batches(prepared, batch_size):
            self.add_scores(batch)
            yield from (one.row for one in batch)

    def add_scores(self, batch: Sequence[_Prepared]) -> None:
        """Run the network, and write into the rows what comes out."""
        start = time.perf_counter()
        good = [one for one in batch if one.squares is not None]
        try:
            self._add_scores(good)
        except Exception as error:
            if len(good) > 1:  # one of them, or all at once were too many
                for one in batch:
                    self.add_scores([one])
                return
            for one in good:
                one.row['error'] = reason_of(error)
        share = (time.perf_counter() - start) / max(len(good), 1)
        for one in batch:
            seconds = one.seconds + (share if one.squares is not None else 0)
            one.row['seconds'] = round(seconds, DIGITS)

    def _add_scores(self, good: Sequence[_Prepared]) -> None:
        if not good:
            return
        views = [one.squares for one in good if one.squares is not None]
        squares = views[0] if len(views) == 1 else np.concatenate(views)
        scores, probabilities, attributes = self._run(squares)
        finite(scores)
        begin = 0
        for one, view in zip(good, views, strict=True):
            own = slice(begin, begin := begin + len(view))
            score = float(np.mean(scores[own], dtype=np.float64))
            one.row.update(_described(score, self.backend.levels))
            if probabilities is not None:
                means = probabilities[own].mean(axis=0, dtype=np.float64).tolist()
                for level, mean in zip(self.backend.levels, means, strict=True):
                    one.row[PROBABILITY + level] = round(mean, DIGITS)
            if attributes is not None:
                one.row.update(_why(attributes[own.start]))

    def _run(self, squares: np.ndarray) -> Outputs:
        if isinstance(self.backend, Explaining) and HEADS in self.common:
            return self.backend.explain(squares)
        return *self.backend(squares), None


def finite(scores: np.ndarray) -> np.ndarray:
    """The scores, if they are numbers.

    Raises:
        UnreadableError: if they aren't.
    """
    if not np.isfinite(scores).all():
        raise UnreadableError('the network gives no number for it')
    return scores


def _batches(
    prepared: Iterable[_Prepared], batch_size: int
) -> Iterator[list[_Prepared]]:
    """Photographs with at least `batch_size` squares together, except at the end."""
    batch: list[_Prepared] = []
    count = 0
    for one in prepared:
        batch.append(one)
        count += 0 if one.squares is None else len(one.squares)
        if count >= batch_size:
            yield batch
            batch, count = [], 0
    if batch:
        yield batch


def _why(attributes: np.ndarray) -> dict[str, Any]:
    """(5,) of the whole photograph, which is the first of its views."""
    named = named_attributes(attributes)
    values = {name: round(value, DIGITS - 2) for name, value in named.items()}
    return {**values, FAULTS: FAULT_SEPARATOR.join(faults(values))}


def _described(score: float, levels: Sequence[str]) -> dict[str, Any]:
    return {
        'score': round(score, DIGITS),
        'score_100': round(to_100(score), DIGITS - 2),
        'level': level_of(score, levels),
    }
