"""Photographs read in processes that are ended when one takes too long.

A megabyte can keep a decoder busy for minutes, and a thread can't be stopped. A process
can: its file is reported, and another process takes its place. A decoder that crashes
ends its own process alone. It is no sandbox: such a process may do what its user may.
"""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from queue import Empty, LifoQueue
from typing import Any, NoReturn, Protocol, TypeVar

import numpy as np

from pyiqa_clipkd.command import silence
from pyiqa_clipkd.images import MAX_PIXELS, UnreadableError
from pyiqa_clipkd.scoring.pillow import allow_pixels, prepare_pillow
from pyiqa_clipkd.scoring.reading import OTHER_BYTES, reason_of

try:
    import resource
except ModuleNotFoundError:  # Windows
    resource = None  # type: ignore[assignment]

# Seconds that a process may take to begin: it imports numpy and Pillow.
BEGIN = 60.0

# Memory beside the pixels: squares, the file itself, what decoders need.
BESIDE = 1 << 29

CORES = os.cpu_count() or 1

# The longest answer in words.
MOST_WORDS = 1 << 20

HAS_SERVER = 'forkserver' in multiprocessing.get_all_start_methods()

T = TypeVar('T')


class Call(Protocol):
    """Calls a function of a module, for one file."""

    def __call__(self, function: Callable[..., T], *arguments: Any) -> T: ...


class Here:
    """Reads in the thread that asks; nothing bounds the time."""

    @contextmanager
    def one_file(self) -> Iterator[Call]:
        """What calls functions."""
        yield lambda function, *arguments: function(*arguments)

    def close(self) -> None:
        """There is nothing to end."""


class Isolated:
    """Reads in processes: one for each thread that asks at the same time.

    Args:
        max_seconds: for one file; without waits of the caller between its calls.
        max_pixels: the largest photographs that must fit into a process's memory. A
            file that needs more is refused; on Linux only, elsewhere nothing can tell.

    Raises:
        ValueError: if `max_seconds` isn't above 0.
    """

    def __init__(self, max_seconds: float, max_pixels: int = MAX_PIXELS) -> None:
        if not 0 < max_seconds < math.inf:
            raise ValueError(f'`max_seconds` must be above 0, but got {max_seconds!r}.')
        self.max_seconds = max_seconds
        self.max_pixels = max_pixels
        self.idle: LifoQueue[_Worker] = LifoQueue()
        self.context: Any = multiprocessing.get_context(
            'forkserver' if HAS_SERVER else 'spawn'
        )
        if HAS_SERVER:  # so that the next process takes milliseconds
            self.context.set_forkserver_preload([__name__])
            from multiprocessing import forkserver, resource_tracker  # not on Windows

            resource_tracker.ensure_running()  # else the server does it, and unblocks
            with _no_interrupt():
                forkserver.ensure_running()

    @contextmanager
    def one_file(self) -> Iterator[Call]:
        """What calls functions in a process, all within the time of one file.

        Raises:
            UnreadableError: in the call, if the file was refused, took too long, or
                crashed its decoder.
            RuntimeError: if no process can begin.
        """
        try:
            worker = self.idle.get_nowait()
        except Empty:
            worker = _Worker(self.context, self.max_pixels)
        worker.begin_file(self.max_seconds)
        try:
            yield worker.call
        finally:
            if worker.alive:
                self.idle.put(worker)

    def close(self) -> None:
        """End the processes, once nobody asks any more."""
        with contextlib.suppress(Empty):
            while True:
                self.idle.get_nowait().end()


@contextmanager
def _no_interrupt() -> Iterator[None]:
    """What begins here doesn't see Ctrl-C, which is for all processes of a terminal.

    The server would show a traceback if it came while it imports.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Worker:
    """A process, and this end of the line to it."""

    def __init__(self, context: Any, max_pixels: int) -> None:
        self.alive = True
        self.line, other = context.Pipe()
        arguments = {'target': work, 'args': (other, max_pixels), 'daemon': True}
        self.process = context.Process(**arguments)
        self.process.start()
        other.close()
        try:
            if not self.line.poll(BEGIN):
                raise EOFError
            self.line.recv_bytes(MOST_WORDS)
        except (EOFError, OSError):
            self.end(now=True)
            raise RuntimeError(
                'A process that reads photographs did not begin. In a script of your '
                "own what is run must be below `if __name__ == '__main__':`."
            ) from None

    def begin_file(self, max_seconds: float) -> None:
        self.limit = self.left = max_seconds

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        begin = time.perf_counter()
        try:
            self.line.send((function, arguments, self.left))
            if not self.line.poll(max(self.left, 0)):
                self._give_up(f'takes more than {self.limit:g} s to read')
            answer = _received(self.line)
        except (EOFError, OSError):
            self._ended_by_itself()
        self.left -= time.perf_counter() - begin
        if 'error' in answer:
            raise UnreadableError(answer['error'])
        return answer['value']

    def _ended_by_itself(self) -> NoReturn:
        self.process.join(BEGIN)
        code = self.process.exitcode or 0
        if code == -signal.SIGINT:  # Ctrl-C is for all processes of a terminal
            raise KeyboardInterrupt
        name = signal.Signals(-code).name if code < 0 else f'exit code {code}'
        self._give_up(f'crashes its decoder: {name}')

    def _give_up(self, reason: str) -> NoReturn:
        self.end(now=True)
        raise UnreadableError(reason)

    def end(self, *, now: bool = False) -> None:
        """Wait until the process sees that nobody is there, or kill it."""
        self.alive = False
        self.line.close()
        if now:
            self.process.kill()
        self.process.join(BEGIN)
        self.process.close()


def work(line: Connection, max_pixels: int) -> None:
    """What a process does: calls functions until nobody is at the other end."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if HAS_SERVER:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    if sys.stderr is not None:
        silence(sys.stderr)  # libtiff speaks there, and doesn't say of which file
    prepare_pillow()
    allow_pixels(max_pixels)
    _limit_memory(OTHER_BYTES * max_pixels + BESIDE)
    with contextlib.suppress(EOFError, OSError):
        line.send_bytes(b'ready')
        while True:
            function, arguments, seconds = line.recv()
            _limit_time(seconds)
            try:
                value = function(*arguments)
            except Exception as error:
                _send(line, {'error': reason_of(error)})
            else:
                _send(line, {'value': value})


def _limit_memory(memory: int) -> None:
    status = Path('/proc/self/statm')
    if resource is None or not status.exists():
        return
    now = int(status.read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + memory, now + memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _limit_time(seconds: float) -> None:
    """For the case that whoever should end this process was itself killed.

    Some decoders use all cores at once, and the time of each of them counts.
    """
    if resource is None:
        return
    usage = resource.getrusage(resource.RUSAGE_SELF)
    most = math.ceil(usage.ru_utime + usage.ru_stime + CORES * seconds) + 1
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    if hard == resource.RLIM_INFINITY or most < hard:
        resource.setrlimit(resource.RLIMIT_CPU, (most, hard))


def _send(line: Connection, answer: dict[str, Any]) -> None:
    """Words as JSON, and an array as it is.

    Nothing that the other end would have to trust, as it would a pickle.
    """
    array = None
    if isinstance(answer.get('value'), tuple):
        words, array = answer['value']
        answer = {'value': words, 'shape': array.shape}
    line.send_bytes(json.dumps(answer).encode())
    if array is not None:
        line.send_bytes(array)


def _received(line: Connection) -> dict[str, Any]:
    try:
        answer: dict[str, Any] = json.loads(line.recv_bytes(MOST_WORDS))
        if 'shape' in answer:
            array = np.empty(answer['shape'], np.float32)
            line.recv_bytes_into(array.reshape(-1).view(np.uint8))
            answer['value'] = answer['value'], array
    except ValueError as error:
        raise EOFError from error
    return answer
