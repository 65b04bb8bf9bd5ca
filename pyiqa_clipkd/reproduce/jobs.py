"""Runs as processes: several at once, teachers first, safe against kills.

A run's process holds a lock as long as it lives, even where the process that started
it has been killed. Whoever else wants the run waits for the lock.
"""

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
from typing import IO, Any

from pyiqa_clipkd.cores import usable_cores
from pyiqa_clipkd.experiment import newest_checkpoint
from pyiqa_clipkd.reproduce.plan import Run

fcntl: Any
try:
    import fcntl
except ImportError:  # not a Unix: nothing keeps two processes from one run
    fcntl = None

LOCKS = Path('experiments', '.locks')
SECONDS_BETWEEN_LOOKS = 0.2
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Child:
    """A running process; `slot` is its number among those that run at once."""

    process: subprocess.Popen[bytes]
    log: Path
    slot: int
    started: float


class Jobs:
    """Runs trainings and tests in processes of their own.

    Args:
        scripts: folder of train.py and test.py.
        logs: folder for what the processes print.
        at_once: how many processes.
        collect: takes a run and the seconds that it took (`None`: another process ran
            it); says whether it has finished.
        gpus: numbers of the GPUs that the processes share, one each.
    """

    def __init__(
        self,
        scripts: Path,
        *,
        logs: Path,
        at_once: int,
        collect: Callable[[Run, float | None], bool],
        gpus: Sequence[str] = (),
    ) -> None:
        self.scripts = scripts
        self.logs = logs
        self.at_once = at_once
        self.collect = collect
        self.gpus = gpus
        self.failed: set[Run] = set()
        self._waiting: list[Run] = []
        self._active: dict[Run, Child] = {}
        self._elsewhere: set[Run] = set()

    def run(self, runs: Sequence[Run]) -> set[Run]:
        """Run all of them, each after its teacher; stop all where this is stopped.

        Returns:
            The runs that failed.
        """
        self._waiting = list(runs)
        try:
            while self._waiting or self._active:
                self._look()
                self._start_some()
                time.sleep(SECONDS_BETWEEN_LOOKS)
        finally:
            self._stop()
        return self.failed

    def _look(self) -> None:
        for run, child in list(self._active.items()):
            code = child.process.poll()
            if code is None:
                continue
            del self._active[run]
            seconds = time.time() - child.started
            if self.collect(run, seconds):
                keep_best(run)
                print(f'finished {run.name} ({seconds:.0f} s)', flush=True)
            else:
                self._fail(run, f'exit code {code}, {child.log}:\n{_tail(child.log)}')

    def _fail(self, run: Run, why: str) -> None:
        self.failed.add(run)
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
            if self.collect(run, None):
                keep_best(run)
                return True
            clear_unfinished(run)
            self._active[run] = self._process(run, lock)
        print(f'started {run.name}', flush=True)
        return True

    def _process(self, run: Run, lock: IO[str]) -> Child:
        self.logs.mkdir(parents=True, exist_ok=True)
        log = self.logs / f'{run.name}.log'
        script = self.scripts / ('test.py' if run.is_test else 'train.py')
        taken = {child.slot for child in self._active.values()}
        slot = min(set(range(self.at_once)) - taken)
        with log.open('ab') as output:
            process = subprocess.Popen(
                [sys.executable, str(script), *run.arguments()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._environment(slot),
                pass_fds=[lock.fileno()] if fcntl else [],
                preexec_fn=_die_with_parent() if sys.platform == 'linux' else None,
                start_new_session=True,  # Ctrl-C is for this process, which stops it
            )
        return Child(process, log, slot, time.time())

    def _environment(self, slot: int) -> dict[str, str]:
        """A share of the cores, and one GPU: a recipe's batch is that of one."""
        threads = max(1, usable_cores() // self.at_once)
        environment = {'OMP_NUM_THREADS': str(threads), **os.environ}
        if self.gpus:
            environment['CUDA_VISIBLE_DEVICES'] = self.gpus[slot % len(self.gpus)]
        return environment

    def _stop(self) -> None:
        for how in (signal.SIGTERM, signal.SIGKILL):
            for child in self._active.values():
                child.process.send_signal(how)
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


def done(run: Run) -> int:
    """The iteration that an unfinished run can go on from; 0 if there is none."""
    return newest_checkpoint(run.folder / 'training_states', run.folder / 'models') or 0


def clear_unfinished(run: Run) -> None:
    """Remove what a run left that can't go on; the host would archive it."""
    if not done(run):
        shutil.rmtree(run.folder, ignore_errors=True)
        shutil.rmtree(Path('tb_logger', run.name), ignore_errors=True)


def keep_best(run: Run) -> None:
    """Remove what only a resume needs; ten times the size of `net_best.pth`."""
    shutil.rmtree(run.folder / 'training_states', ignore_errors=True)
    for file in (run.folder / 'models').glob('net_*.pth'):
        if file != run.weights:
            file.unlink(missing_ok=True)


def _tail(log: Path, lines: int = 15) -> str:
    text = log.read_text(errors='replace').splitlines()[-lines:]
    return '\n'.join(f'    {line}' for line in text)
