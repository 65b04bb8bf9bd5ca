"""One run of `pyiqa-clipkd score --engine ray`: the same rows, made by many."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pyiqa_clipkd.scoring.backends import create_backend
from pyiqa_clipkd.scoring.core import identity_of
from pyiqa_clipkd.scoring.files import STDIN, unbuffered_stdin
from pyiqa_clipkd.scoring.locks import locked
from pyiqa_clipkd.scoring.ray.cluster import Workers, connected, plan
from pyiqa_clipkd.scoring.ray.options import device_of
from pyiqa_clipkd.scoring.ray.parts import Parts
from pyiqa_clipkd.scoring.ray.pipeline import Task, stream, tasks_of
from pyiqa_clipkd.scoring.ray.sources import Sources, find_sources
from pyiqa_clipkd.scoring.ray.worker import Container, Job
from pyiqa_clipkd.scoring.session import Session
from pyiqa_clipkd.scoring.tables import ROW, SOURCE, Row, valid_text

# Seconds between two lines about progress.
TELL = 30


class RaySession(Session):
    """Scores what the arguments name on a cluster.

    Args:
        settings: arguments of `create_backend`.
        arguments: those of the command, checked.
    """

    def __init__(self, settings: dict[str, Any], arguments: argparse.Namespace) -> None:
        if weights := settings['weights']:
            settings['weights'] = weights.absolute()
        self.settings = settings
        # It says what will be scored with, and what is wrong before a cluster starts.
        super().__init__(create_backend(**settings | {'device': 'cpu'}), arguments)
        self.names += [SOURCE, ROW]
        self.identity = identity_of(self.backend, arguments.crops)
        self.parts: Parts | None = None
        self.told = 0.0

    def _open(self, stack: ExitStack) -> None:
        output = self.arguments.output
        if isinstance(output, Path):  # object stores have no locks
            stack.enter_context(locked(output))
        parts = Parts(
            str(output),
            self.backend.levels,
            self.identity,
            overwrite=self.arguments.overwrite,
            retry=self.arguments.retry,
        )
        self.parts = stack.enter_context(parts)

    def _rows(self) -> Generator[Row]:
        given = self.arguments.paths
        stdin = unbuffered_stdin() if STDIN in given else None
        sources = find_sources(given, stdin=stdin, nul=self.arguments.null)
        if self.bar is not None:
            # How many there are in containers shows when they are read.
            self.bar.total = None if sources.containers else len(sources.photographs)
        self._take_known(sources)
        photographs, containers = self._left(sources)
        if photographs or containers:
            yield from self._scored(photographs, containers)
        elif self.parts is not None:
            self.parts.begin()

    def _scored(
        self, photographs: Sequence[str], containers: Sequence[Container]
    ) -> Iterator[Row]:
        cpus, number = self.arguments.worker_cpus, self.arguments.workers
        wanted = number and number * (cpus or 1)
        with connected(self.arguments.ray_address, wanted):
            workers = plan(
                device_of(self.arguments), number, cpus, self.arguments.worker_gpus
            )
            if self.parts is not None:  # what is overwritten was kept as far as here
                self.parts.begin()
            tasks: list[Task] = [*containers]
            tasks += tasks_of(photographs, workers.number)
            self.tally.start = self.told = time.perf_counter()
            for row in stream(tasks, self._job(workers), workers, self._ended):
                # A container that can't be read to its end says so in each run.
                if self.parts is None or not self.parts.has(row):
                    yield row
                self._tell()

    def _tell(self) -> None:
        """How far it is, now and then, where there is no bar but a log."""
        now = time.perf_counter()
        if self.arguments.quiet or self.bar is not None or now - self.told < TELL:
            return
        self.told = now
        new = self.tally.files - self.tally.known
        speed = new / (now - self.tally.start)
        text = f'{new:,} scored, {speed:.1f} images/s, {self.tally.bad:,} bad.'
        print(text, file=sys.stderr, flush=True)

    def _job(self, workers: Workers) -> Job:
        if workers.gpus and self.backend.name != 'torch':
            settings = self.settings | {'kind': 'torch', 'device': 'cpu'}
            self.backend = create_backend(**settings)
        options = {
            'crops': self.arguments.crops,
            'batch_size': self.arguments.batch_size,
            'workers': workers.cpus,
            'max_pixels': self.arguments.max_pixels,
            'max_seconds': self.arguments.max_seconds,
        }
        settings = self.settings | {
            'kind': self.backend.name,
            'device': 'cuda' if workers.gpus else 'cpu',
        }
        return Job(settings, options, self.identity)

    def _take_known(self, sources: Sources) -> None:
        """Count and show what the folder has of these sources."""
        if self.parts is None:
            return
        names = {*map(valid_text, (*sources.photographs, *sources.containers))}
        for row in self.parts.known():
            if (row[SOURCE] or row['path']) not in names:
                continue
            if row['score'] is None:
                row['error'] += ' (in an earlier run)'
                self.tally.known_bad += 1
            self.tally.known += 1
            self._take(row, new=False)

    def _left(self, sources: Sources) -> tuple[list[str], list[Container]]:
        """Photographs and containers that the folder hasn't got, or not all of."""
        photographs, names = sources
        column = self.arguments.column
        if self.parts is None:
            return photographs, [Container(n, frozenset(), column) for n in names]
        there = self.parts.done
        return [n for n in photographs if valid_text(n) not in there], [
            Container(name, self.parts.rows_of(name), column)
            for name in names
            if not self.parts.has_all(name)
        ]

    def _ended(self, container: str, count: int) -> None:
        if self.parts is not None:
            self.parts.end(container, count)

    def _record(self, row: Row) -> None:
        if self.parts is not None:
            self.parts.add(row)
