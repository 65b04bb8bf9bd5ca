"""One run of `pyiqa-clipkd score`: rows to a file and a screen, and a summary."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from pathlib import Path
from typing import Any

from pyiqa_clipkd.command import silence
from pyiqa_clipkd.scale import level_of
from pyiqa_clipkd.scoring.backends import Backend, heads_of
from pyiqa_clipkd.scoring.core import default_workers, identity_of, score_paths
from pyiqa_clipkd.scoring.files import (
    AHEAD,
    STDIN,
    find_photographs,
    listed_ahead,
    unbuffered_stdin,
)
from pyiqa_clipkd.scoring.locks import locked
from pyiqa_clipkd.scoring.printing import printable, safe_name
from pyiqa_clipkd.scoring.results import Results
from pyiqa_clipkd.scoring.selection import (
    BestOfGroups,
    Everything,
    Extremes,
    Selection,
    grouping,
)
from pyiqa_clipkd.scoring.tables import FAULTS, TEXT_FORMATS, Row, columns

# Bad files that the summary names, where a results file has them all.
NAMED = 5


class Tally:
    """What the summary and the exit code are made of."""

    def __init__(self, min_score: float | None) -> None:
        self.least = float('-inf') if min_score is None else min_score
        self.scored = self.known = self.bad = self.known_bad = self.below = 0
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
        self.names = columns(backend.levels, attributes=bool(heads_of(backend)))
        self.bar: Any = None
        # With a results file the screen gets only what was asked for.
        self.shows = arguments.output is None or arguments.paths_only
        self.shows |= not isinstance(self.selection, Everything)

    def score_all(self) -> None:
        """Score, write, show; then the summary."""
        with ExitStack() as stack:
            if self.arguments.output:
                self._open(stack)
            self.bar = self._progress_bar(stack)
            self.tally.start = time.perf_counter()
            if self.arguments.format:
                header = TEXT_FORMATS[f'.{self.arguments.format}'].header
                self._write(header(self.names))
            # Whatever ends this, what works in the background ends first.
            for row in stack.enter_context(closing(self._rows())):
                self._take(row)
            for row in self.selection.rest():
                self._show(row)
        self._summarize()

    def _open(self, stack: ExitStack) -> None:
        """Where the rows go to, for this run alone."""
        stack.enter_context(locked(self.arguments.output))
        results = Results(
            self.arguments.output,
            self.backend.levels,
            identity_of(self.backend, self.arguments.crops),
            overwrite=self.arguments.overwrite,
            retry=self.arguments.retry,
        )
        self.results = stack.enter_context(results)

    def _record(self, row: Row) -> None:
        if self.results is not None:
            # Whatever the folder of the next run: its paths must mean the same files.
            self.results.add({**row, 'path': os.path.abspath(row['path'])})

    def _rows(self) -> Generator[Row]:
        given = self.arguments.paths
        stdin = unbuffered_stdin() if STDIN in given else None
        found = find_photographs(given, stdin=stdin, nul=self.arguments.null)
        paths: Iterator[Path | None] = found
        if self.bar is not None:  # all of them: the total should appear early
            paths = listed_ahead(found, self._add_to_total)
        elif stdin is not None:  # whoever writes the list may wait for our answers
            paths = listed_ahead(found, most=AHEAD)
        yield from score_paths(
            self._unknown(paths),
            self.backend,
            crops=self.arguments.crops,
            batch_size=self.arguments.batch_size,
            workers=self.arguments.workers or default_workers(self.arguments.threads),
            max_pixels=self.arguments.max_pixels,
            max_seconds=self.arguments.max_seconds,
        )

    def _unknown(self, paths: Iterable[Path | None]) -> Iterator[Path | None]:
        """Those that the results file hasn't got; the others are counted and shown."""
        if self.results is None:
            yield from paths
            return
        done = self.results.done
        for path in paths:
            if path is None:
                yield None
                continue
            key = self.results.key(os.path.abspath(path))
            if key not in done:
                yield path
                continue
            score = done[key]
            level = '' if score is None else level_of(score, self.backend.levels)
            row = {'path': str(path), 'score': score, 'level': level}
            row[FAULTS] = self.results.faults.get(key, '')
            if score is None:
                row['error'] = f'{self.results.errors[key]} (in an earlier run)'
                self.tally.known_bad += 1
            self.tally.known += 1
            self._take(row, new=False)

    def _take(self, row: Row, *, new: bool = True) -> None:
        if new:
            self._record(row)
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
        elif not self.arguments.output:  # nothing else would say so
            with self._above_bar():
                print(bad_line(row), file=sys.stderr)

    def _show(self, row: Row) -> None:
        name = safe_name(row['path'])
        path = os.fsencode(name)
        if self.arguments.format:
            encode = TEXT_FORMATS[f'.{self.arguments.format}'].encode
            self._write(encode({**row, 'path': name}))
        elif self.arguments.paths_only:
            self._write(path + (b'\0' if self.arguments.null else b'\n'))
        else:
            if sys.stdout.isatty():
                path = printable(name).encode()
            words = f'{row["score"]:.3f}  {row["level"]:<7}  '
            why = f'  ({row[FAULTS]})' if row.get(FAULTS) else ''
            self._write(words.encode() + path + why.encode() + b'\n')

    def _write(self, line: bytes) -> None:
        try:
            with self._above_bar():
                sys.stdout.buffer.write(line)
                sys.stdout.buffer.flush()
        except BrokenPipeError:  # `| head` has seen enough, but the file has not
            if not self.arguments.output:
                raise
            silence(sys.stdout)

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
        text = 'Stopped.'
        if self.arguments.output:
            but = ' without --overwrite' if self.arguments.overwrite else ''
            text += f' The same command{but} goes on.'
        print(text, file=sys.stderr)

    def _summarize(self) -> None:
        if not self.arguments.quiet:
            for line in summary(self.tally, self.backend, self.arguments.output):
                print(line, file=sys.stderr)
            if note := self.selection.note():
                print(note, file=sys.stderr)


def _selection(arguments: argparse.Namespace) -> Selection:
    if arguments.top:
        return Extremes(arguments.top, best=True)
    if arguments.bottom:
        return Extremes(arguments.bottom, best=False)
    if arguments.best_of is not None:
        return BestOfGroups(grouping(arguments.best_of))
    return Everything()


def bad_line(row: Row) -> str:
    """A file that could not be scored, and why, as far as its name can be printed."""
    return f'{printable(row["path"])}: {row["error"]}'


def summary(tally: Tally, backend: Backend, output: Path | str | None) -> Iterator[str]:
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
            if tally.known_bad:
                yield '  --retry scores those of earlier runs again.'
    yield (
        f'{backend.metric}, weights {backend.weights} ({backend.sha256[:8]}), '
        f'{backend.name}.'
    )
