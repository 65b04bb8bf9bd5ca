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
from importlib.machinery import ExtensionFileLoader
from types import FrameType
from typing import Any

# What shells say of Ctrl-C: 128 and the number of the signal. SIGTERM's is 143.
INTERRUPTED = 130

SIGNALS = (signal.SIGINT, signal.SIGTERM)

# Both run code of a compiled module while it is imported.
LOADING = {
    ExtensionFileLoader.create_module.__code__,
    ExtensionFileLoader.exec_module.__code__,
}
# A stop that came while a compiled module was imported is tried again after so many
# seconds, and not put off for longer.
RETRY, LONGEST = 0.02, 10.0


class Stop:
    """The first signal stops what is done, as a KeyboardInterrupt; a second one kills.

    Compiled modules (of numpy, pybind11, Cython) answer a KeyboardInterrupt in the
    middle of their import with an ImportError of their own, as if they were broken. So
    it waits until such an import is over, where the system has a timer for that.

    Attributes:
        code: the exit code, once there was a signal.
    """

    code = INTERRUPTED
    _over = False
    _put_off = 0.0
    _alarm: Any = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.code = 128 + number
        die_at_once()
        if hasattr(signal, 'setitimer') and _is_loading(frame):
            self._alarm = signal.signal(signal.SIGALRM, self._again)
            signal.setitimer(signal.ITIMER_REAL, RETRY)
        else:
            raise KeyboardInterrupt

    def _again(self, number: int, frame: FrameType | None) -> None:
        self._put_off += RETRY
        if self._over:
            return
        if self._put_off < LONGEST and _is_loading(frame):
            signal.setitimer(signal.ITIMER_REAL, RETRY)
        else:
            raise KeyboardInterrupt

    def end(self) -> None:
        """What was to be stopped has ended: no stop that waits comes any more."""
        self._over = True
        if self._alarm is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self._alarm)


def _is_loading(frame: FrameType | None) -> bool:
    """Whether what runs was called by the import of a compiled module."""
    while frame is not None and frame.f_code not in LOADING:
        frame = frame.f_back
    return frame is not None


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
        stop.end()
        # A KeyboardInterrupt that has come through an `exec` of text (of a dataclass)
        # makes `python -m` end as if Ctrl-C had killed it, until the next such `exec`.
        exec('')
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
