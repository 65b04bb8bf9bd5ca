"""Ctrl-C and SIGTERM: end in order, with one line and a code that says so.

Standard library only: what takes seconds to import is imported under its care.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# What shells say of Ctrl-C: 128 and the number of the signal. SIGTERM's is 143.
INTERRUPTED = 130

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """The first signal stops what is done, as a KeyboardInterrupt; a second one kills.

    Attributes:
        code: the exit code, once there was a signal.
    """

    code = INTERRUPTED

    def __call__(self, number: int, frame: Any) -> None:
        self.code = 128 + number
        die_at_once()
        raise KeyboardInterrupt


def die_at_once() -> None:
    """From now on a signal ends the process without a word, whatever it does."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Let both signals raise KeyboardInterrupt, so that files are closed and removed.

    Left alone are threads that can't set handlers, signals that are ignored (`nohup`,
    `&`), and processes of torchrun: it sends SIGTERM to those that wait in the network
    and would never notice.
    """
    stop = Stop()
    mine = threading.current_thread() is threading.main_thread()
    before: dict[int, Any] = {}
    if mine and 'TORCHELASTIC_RUN_ID' not in os.environ:
        for one in SIGNALS:
            handler = signal.getsignal(one)
            if handler in (signal.SIG_DFL, signal.default_int_handler):
                before[one] = signal.signal(one, stop)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_script(run: Callable[[], object], again: str) -> None:
    """What a script does, and how it ends when it is stopped.

    Args:
        run: imports what it needs by itself.
        again: how to go on, for the one who has stopped it.

    Raises:
        SystemExit: with 130 or 143 if it was stopped.
    """
    try:
        with stoppable() as stop:
            run()
    except KeyboardInterrupt:
        print(f'\nStopped. {again}', file=sys.stderr)
        raise SystemExit(stop.code) from None
    finally:
        die_at_once()
