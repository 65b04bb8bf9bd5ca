"""Files that are there whole or not at all, and what is in them."""

from __future__ import annotations

import errno
import hashlib
import os
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# First digits of a hash that rows, tables and messages show.
SHORT_HASH = 16

# What a file system answers that has no room: full, a quota, a limit of file sizes.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


# Characters of what others say that are shown.
WORDS = 250


def one_line(words: Exception | str) -> str:
    """What an error says, which may repeat what is in a file: printable, and short."""
    text = ' '.join(str(words).split())
    line = text if len(text) <= WORDS else f'{text[:WORDS]}...'
    return ''.join('?' if unicodedata.category(c)[0] == 'C' else c for c in line)


# Bytes of a file of weights that is read: CLIP's largest take ten gigabytes.
LARGEST_FILE = 16 << 30


def checked_file(path: str | Path, what: str) -> Path:
    """A plain file that can be read: no folder, device or pipe, which would not end.

    Args:
        path: may begin with `~`.
        what: for messages, for instance `weight file`.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is too large.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        there = '' if not path.exists() else ': that is a folder, a device or a pipe'
        if path.is_symlink() and not there:
            there = ': that is a link to nothing'
        raise FileNotFoundError(f'There is no {what} {path}{there}.')
    if path.stat().st_size > LARGEST_FILE:
        raise ValueError(
            f'{path} is no {what}: it has {path.stat().st_size} bytes, and at most '
            f'{LARGEST_FILE} are read.'
        )
    return path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A place beside `path` to write to; it becomes `path` if nothing was raised.

    Raises:
        OSError: names `path` if there is no room for it.
    """
    partial = path.with_name(f'.{path.name}.{os.getpid()}.part')
    try:
        with naming(path):
            yield partial
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Where there is no room to write, say which file that was, and what to do.

    Raises:
        OSError: instead of any exception that comes from a full disk.
    """
    try:
        yield
    except Exception as error:
        if (cause := _full_disk(error)) is None:
            raise
        words = 'no room for it; what was complete before is kept: make room, then run '
        raise OSError(
            cause.errno, f'{words}the same command again', str(path)
        ) from error


def _full_disk(error: BaseException | None) -> OSError | None:
    """The error of the file system, of which libraries make their own."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return error
        error = error.__cause__ or error.__context__
    return None


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file in hexadecimal digits."""
    digest = hashlib.sha256()
    with Path(path).open('rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
