"""One run of `pyiqa-clipkd score`: rows to a file and a screen, and a summary."""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from pyiqa_clipkd.scoring.backends import Backend
from pyiqa_clipkd.scoring.core import SHORT_HASH, default_workers, level_of, score_paths
from pyiqa_clipkd.scoring.files import STDIN, find_photographs
from pyiqa_clipkd.scoring.results import Results
from pyiqa_clipkd.scoring.selection import (
    BestOfGroups,
    Everything,
    Extremes,
    Selection,
    grouping,
)
from pyiqa_clipkd.scoring.tables import TEXT_FORMATS, Row, columns

# Bad files that the summary names, where a results file has them all.
NAMED = 5


class Tally:
    """What the summary and the exit code are made of."""

    def __init__(self, min_score: float | None) -> None:
        self.least = float('-inf') if min_score is None else min_score
        self.scored = self.known = self.bad = self.below = 0
        self.total = 0.0
        self.first_bad: list[str] = []
        self.start = time.perf_counter()

    @property
    def files(self) -> int:
        return self.scored + self.bad

    def add(self, row: Row) -> bool:
        """Count a row; whether it has a score that is high enough."""
        if row['score'] is None:
            self.bad += 1
            if len(self.first_bad) < NAMED:
                self.first_bad.append(bad_line(row))
            return False
        self.scored += 1
        self.total += row['score']
        enough = row['score'] >= self.least
        self.below += not enough
        return enough


class Session:
    """Scores what the arguments name.

    Args:
        backend: the metric.
        arguments: those of the command, checked.
    """

    def __init__(self, backend: Backend, arguments: argparse.Namespace) -> None:
        self.backend = backend
        self.arguments = arguments
        self.tally = Tally(arguments.min_score)
        self.selection = _selection(arguments)
        self.results: Results | None = None
        self.bar: Any = None
        # With a results file the screen gets only what was asked for.
        self.shows = arguments.output is None or arguments.paths_only
        self.shows |= not isinstance(self.selection, Everything)

    def score_all(self) -> None:
        """Score, write, show; then the summary."""
        with ExitStack() as stack:
            if self.arguments.output:
                self.results = stack.enter_context(self._opened())
            self.bar = self._progress_bar(stack)
            self.tally.start = time.perf_counter()
            if self.arguments.format:
                header = TEXT_FORMATS[f'.{self.arguments.format}'].header
                self._write(header(columns(self.backend.levels)))
            for row in self._rows():
                self._take(row)
            for row in self.selection.rest():
                self._show(row)
        self._summarize()

    def _opened(self) -> Results:
        backend = self.backend
        identity = {
            'metric': backend.metric,
            'sha256': backend.sha256[:SHORT_HASH],
            'crops': self.arguments.crops,
            'input_size': backend.input_size,
        }
        overwrite = self.arguments.overwrite
        path = self.arguments.output
        return Results(path, backend.levels, identity, overwrite=overwrite)

    def _rows(self) -> Iterator[Row]:
        given = self.arguments.paths
        stdin = sys.stdin.buffer if STDIN in given else None
        paths = find_photographs(given, stdin=stdin, nul=self.arguments.null)
        if self.bar is not None:
            paths = _listed_ahead(paths, self._add_to_total)
        threads = self.arguments.threads or 1
        yield from score_paths(
            self._unknown(paths),
            self.backend,
            crops=self.arguments.crops,
            batch_size=self.arguments.batch_size,
            workers=self.arguments.workers or max(1, default_workers() // threads),
            max_pixels=self.arguments.max_pixels,
        )

    def _unknown(self, paths: Iterable[Path]) -> Iterator[Path]:
        """Those that the results file hasn't got; the others are counted and shown."""
        if self.results is None:
            yield from paths
            return
        done = self.results.done
        for path in paths:
            key = self.results.key(str(path))
            if key not in done:
                yield path
                continue
            score = done[key]
            level = '' if score is None else level_of(score, self.backend.levels)
            self.tally.known += 1
            self._take({'path': str(path), 'score': score, 'level': level}, new=False)

    def _take(self, row: Row, *, new: bool = True) -> None:
        if new and self.results is not None:
            self.results.add(row)
        enough = self.tally.add(row)
        if self.bar is not None:
            self.bar.update()
        if row['score'] is None:
            self._show_bad(row)
        elif enough and self.shows:
            for shown in self.selection.add(row):
                self._show(shown)

    def _show_bad(self, row: Row) -> None:
        if self.arguments.format:
            self._show(row)
        elif self.results is None:  # nothing else would say so
            with self._above_bar():
                print(bad_line(row), file=sys.stderr)

    def _show(self, row: Row) -> None:
        path = os.fsencode(row['path'])
        if self.arguments.format:
            self._write(TEXT_FORMATS[f'.{self.arguments.format}'].encode(row))
        elif self.arguments.paths_only:
            self._write(path + (b'\0' if self.arguments.null else b'\n'))
        else:
            words = f'{row["score"]:.3f}  {row["level"]:<7}  '
            self._write(words.encode() + path + b'\n')

    def _write(self, line: bytes) -> None:
        with self._above_bar():
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()

    def _above_bar(self) -> AbstractContextManager[None]:
        if self.bar is None:
            return nullcontext()
        return self.bar.external_write_mode(file=sys.stderr)

    def _progress_bar(self, stack: ExitStack) -> Any:
        if self.arguments.quiet or not sys.stderr.isatty():
            return None
        try:
            from tqdm import tqdm
        except ImportError:  # where only what scores need is installed
            return None
        return stack.enter_context(
            tqdm(total=0, unit='photo', file=sys.stderr, leave=False)
        )

    def _add_to_total(self) -> None:
        self.bar.total += 1

    def interrupted(self) -> None:
        """The user has stopped the run."""
        self._summarize()
        if self.arguments.output:
            print('Stopped. The same command goes on.', file=sys.stderr)
        else:
            print('Stopped.', file=sys.stderr)

    def _summarize(self) -> None:
        if not self.arguments.quiet:
            for line in summary(self.tally, self.backend, self.arguments.output):
                print(line, file=sys.stderr)


def _selection(arguments: argparse.Namespace) -> Selection:
    if arguments.top:
        return Extremes(arguments.top, best=True)
    if arguments.bottom:
        return Extremes(arguments.bottom, best=False)
    if arguments.best_of is not None:
        return BestOfGroups(grouping(arguments.best_of))
    return Everything()


def _listed_ahead(paths: Iterator[Path], found: Callable[[], None]) -> Iterator[Path]:
    """The same paths, found by a thread of its own, for a total to appear early."""
    queue: SimpleQueue[Path | BaseException | None] = SimpleQueue()

    def search() -> None:
        end = None
        try:
            for path in paths:
                found()
                queue.put(path)
        except BaseException as error:
            end = error
        queue.put(end)

    threading.Thread(target=search, daemon=True).start()
    while (item := queue.get()) is not None:
        if isinstance(item, BaseException):
            raise item
        yield item


def bad_line(row: Row) -> str:
    """A file that could not be scored, and why, as far as its name can be printed."""
    path = row['path'].encode(errors='backslashreplace').decode()
    return f'{path}: {row.get("error") or "could not be scored in an earlier run"}'


def summary(tally: Tally, backend: Backend, output: Path | None) -> Iterator[str]:
    """The lines at the end of a run."""
    seconds = time.perf_counter() - tally.start
    new = tally.files - tally.known
    mean = f', mean {tally.total / tally.scored:.3f}' if tally.scored else ''
    yield f'{tally.scored:,} scored{mean}.'
    if new:
        speed = new / max(seconds, 1e-9)
        yield f'{new:,} files read in {seconds:.1f} s ({speed:.1f} images/s).'
    if tally.known:
        yield f'{tally.known:,} were in {output} already.'
    if tally.below:
        yield f'{tally.below:,} below {tally.least:g}.'
    if tally.bad:
        yield f'{tally.bad:,} could not be scored{":" if output else "."}'
        if output:
            yield from (f'  {line}' for line in tally.first_bad)
            if tally.bad > NAMED:
                yield f'  and {tally.bad - NAMED:,} more, in {output}'
    yield (
        f'{backend.metric}, weights {backend.weights} ({backend.sha256[:8]}), '
        f'{backend.name}.'
    )
