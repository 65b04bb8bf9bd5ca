"""A result file is written by one run at a time."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

# What a file system answers where somebody else has the lock; anything else means that
# it has no locks, as some that are shared over a network.
TAKEN = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other runs from writing `path` meanwhile.

    The lock is of a hidden file beside it, which goes at the end. The file of a process
    that was killed stays for the next run, but its lock is gone. Where the file system
    has no locks, the file's being there is the lock, and it tells whose.

    Raises:
        BlockingIOError: if another run, in this process or another, has the lock.
    """
    path = Path(os.path.realpath(path))  # a link and its file are one
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f'.{path.name}.lock')
    file = _opened(lock, path)
    try:
        yield
    finally:
        if sys.platform == 'win32':  # only what nobody has open can be removed there
            file.close()
        for mine in {lock, Path(file.name)}:
            with contextlib.suppress(PermissionError):
                mine.unlink(missing_ok=True)
        file.close()


def _opened(lock: Path, path: Path) -> BinaryIO:
    """The locked file; its lock ends when it is closed, or with this process."""
    while True:
        file = lock.open('ab')
        try:
            _lock(file)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(lock)):
                return file
        except FileNotFoundError:
            pass
        except OSError as error:
            file.close()
            if error.errno not in TAKEN:
                return _claimed(lock, path)
            raise BlockingIOError(
                f'{path} is being written by another run. Wait until that has ended, '
                'or choose another file.'
            ) from None
        file.close()  # a run that has just ended has removed it: once more


def _claimed(lock: Path, path: Path) -> BinaryIO:
    """The file that is the lock itself; one of a process that has ended here goes."""
    claim = lock.with_name(f'{lock.name}.owner')
    host = socket.gethostname()
    while True:
        try:
            file = claim.open('xb')
        except FileExistsError:
            owner = claim.read_text(errors='replace').split()
            if len(owner) == 2 and owner[0] == host and not _runs(int(owner[1])):
                claim.unlink(missing_ok=True)
                continue
            who = f'process {owner[1]} on {owner[0]}' if owner else 'another run'
            raise BlockingIOError(
                f'{path} is being written by {who}. Wait until that has ended; if it '
                f'has, remove {claim}.'
            ) from None
        file.write(f'{host} {os.getpid()}'.encode())
        file.flush()
        return file


def _runs(pid: int) -> bool:
    if sys.platform == 'win32':  # no such question there
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        pass
    return True


def _lock(file: BinaryIO) -> None:
    if sys.platform == 'win32':
        import msvcrt

        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
