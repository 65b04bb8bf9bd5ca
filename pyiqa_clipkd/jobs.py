"""Runs as processes: several at once, safe against kills, teachers first."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pyiqa_clipkd.plan import Run

try:
    import fcntl
except ImportError:  # not a Unix: nothing keeps two processes from one run
    fcntl = None  # type: ignore[assignment]

LOCKS = Path('experiments', '.locks')
SECONDS_BETWEEN_LOOKS = 0.2
PR_SET_PDEATHSIG = 1


@dataclass
class Child:
    """A running process, and where it writes."""

    process: subprocess.Popen[bytes]
    log: Path
    started: float

    def stop(self, how: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, how)


class Jobs:
    """Runs trainings in processes of their own.

    A run holds a lock as long as its process lives, even where this process has been
    killed; whoever wants the same run waits for it.

    Args:
        scripts: folder of train.py and test.py.
        logs: folder for what the processes print.
        at_once: how many processes.
        is_finished: whether a run has its results.
    """

    def __init__(
        self,
        scripts: Path,
        *,
        logs: Path,
        at_once: int,
        is_finished: Callable[[Run], bool],
    ) -> None:
        self.scripts = scripts
        self.logs = logs
        self.at_once = at_once
        self.is_finished = is_finished
        self.failed: dict[Run, str] = {}
        self._waiting: list[Run] = []
        self._active: dict[Run, Child] = {}
        self._elsewhere: set[Run] = set()

    def run(self, runs: Sequence[Run]) -> dict[Run, str]:
        """Run all of them, each after its teacher.

        Returns:
            The runs that failed, and why.
        """
        self._waiting = list(runs)
        try:
            while self._waiting or self._active:
                self._collect()
                self._start_some()
                time.sleep(SECONDS_BETWEEN_LOOKS)
        finally:
            self._stop()
        return self.failed

    def _collect(self) -> None:
        for run, child in list(self._active.items()):
            code = child.process.poll()
            if code is None:
                continue
            del self._active[run]
            seconds = time.time() - child.started
            if self.is_finished(run):
                keep_best(run)
                print(f'finished {run.name} ({seconds:.0f} s)', flush=True)
            else:
                self._fail(run, f'exit code {code}, {child.log}:\n{_tail(child.log)}')

    def _fail(self, run: Run, why: str) -> None:
        self.failed[run] = why
        print(f'FAILED {run.name}: {why}', flush=True)

    def _start_some(self) -> None:
        for run in list(self._waiting):
            if len(self._active) >= self.at_once:
                return
            if run.teacher in self.failed:
                self._waiting.remove(run)
                self._fail(run, 'its teacher failed.')
            elif run.teacher in self._waiting or run.teacher in self._active:
                continue
            elif self._start(run):
                self._waiting.remove(run)

    def _start(self, run: Run) -> bool:
        """Whether the run has begun, or is done; not where another process has it."""
        lock = _lock(LOCKS / run.name)
        if lock is None:
            if run not in self._elsewhere:
                self._elsewhere.add(run)
                print(f'waiting for the process that has {run.name}', flush=True)
            return False
        with lock:
            if self.is_finished(run):
                return True
            clear_unfinished(run)
            self._active[run] = self._process(run, lock)
        print(f'started {run.name}', flush=True)
        return True

    def _process(self, run: Run, lock: IO[str]) -> Child:
        self.logs.mkdir(parents=True, exist_ok=True)
        log = self.logs / f'{run.name}.log'
        script = self.scripts / ('test.py' if run.is_test else 'train.py')
        threads = max(1, available_cores() // self.at_once)
        with log.open('ab') as output:
            process = subprocess.Popen(
                [sys.executable, str(script), *run.arguments()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={'OMP_NUM_THREADS': str(threads), **os.environ},
                pass_fds=[lock.fileno()] if fcntl else [],
                preexec_fn=_die_with_parent() if sys.platform == 'linux' else None,
                start_new_session=True,
            )
        return Child(process, log, time.time())

    def _stop(self) -> None:
        for how in (signal.SIGTERM, signal.SIGKILL):
            for child in self._active.values():
                child.stop(how)
            for child in self._active.values():
                with suppress(subprocess.TimeoutExpired):
                    child.process.wait(timeout=10)
        self._active.clear()


def _die_with_parent() -> Callable[[], None]:
    """Linux: the kernel kills the child when this process ends, however it ends."""
    prctl = ctypes.CDLL(None).prctl

    def ask_the_kernel() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    return ask_the_kernel


def _lock(path: Path) -> IO[str] | None:
    """An open, locked file; `None` if another process has it.

    The lock belongs to the open file, so a child that inherits it keeps it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open('w')
    if fcntl:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
    return file


def can_resume(run: Run) -> bool:
    """Whether there is a training state with its weights."""
    states = (run.folder / 'training_states').glob('*.state')
    models = run.folder / 'models'
    return any((models / f'net_{state.stem}.pth').is_file() for state in states)


def clear_unfinished(run: Run) -> None:
    """Remove what a run left that can't go on; the host would archive it."""
    if not can_resume(run):
        shutil.rmtree(run.folder, ignore_errors=True)
        shutil.rmtree(Path('tb_logger', run.name), ignore_errors=True)


def keep_best(run: Run) -> None:
    """Remove what only a resume needs; ten times the size of `net_best.pth`."""
    shutil.rmtree(run.folder / 'training_states', ignore_errors=True)
    for file in (run.folder / 'models').glob('net_*.pth'):
        if file != run.weights:
            file.unlink(missing_ok=True)


def available_cores() -> int:
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _tail(log: Path, lines: int = 15) -> str:
    text = log.read_text(errors='replace').splitlines()[-lines:]
    return '\n'.join(f'    {line}' for line in text)
