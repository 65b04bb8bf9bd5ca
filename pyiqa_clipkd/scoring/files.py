"""Which photographs are meant: files, folders, patterns and lists."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import BinaryIO

STDIN = '-'

# Pillow knows their endings, but has no decoder of its own for them, or calls another
# program for it.
NO_PHOTOGRAPHS = {'BUFR', 'EPS', 'GRIB', 'HDF5', 'IPTC', 'MPEG', 'WMF'}

# Bytes that are read from a list at once.
CHUNK = 1 << 16


def find_photographs(
    paths: Sequence[str], *, stdin: BinaryIO | None = None, nul: bool = False
) -> Iterator[Path]:
    """The files that `paths` mean, one after the other, each of them once.

    Nothing named is lost: what isn't there comes through, too, for whoever reads it to
    say so.

    Args:
        paths: files, whatever their endings; folders: all images in them and below, in
            the order of their names, hidden ones left out; patterns with `*`, `?`, `[`
            and `**`, where no file has that name; `-`: a list on `stdin`.
        stdin: a list of files and folders, one a line.
        nul: the list's entries end with a NUL byte instead.
    """
    seen: set[str] = set()
    folders: set[tuple[int, int]] = set()
    for path in _named(paths, stdin, b'\0' if nul else b'\n'):
        for file in _below(path, folders):
            key = os.path.abspath(file)
            if key not in seen:
                seen.add(key)
                yield Path(file)


def _named(paths: Sequence[str], stdin: BinaryIO | None, end: bytes) -> Iterator[str]:
    for path in paths:
        if path == STDIN and stdin is not None:
            yield from _entries(stdin, end)
        elif glob.has_magic(path) and not os.path.lexists(path):
            yield from _matches(path)
        else:
            yield path


def _entries(stream: BinaryIO, end: bytes) -> Iterator[str]:
    """The entries of a list, as soon as they're there; names may be any bytes."""
    rest = b''
    read = getattr(stream, 'read1', stream.read)
    while chunk := read(CHUNK):
        *whole, rest = (rest + chunk).split(end)
        yield from (os.fsdecode(name) for name in map(_stripped, whole) if name)
    if name := _stripped(rest):
        yield os.fsdecode(name)


def _stripped(entry: bytes) -> bytes:
    return entry.removesuffix(b'\r')  # lists from Windows


def _matches(pattern: str) -> Iterator[str]:
    matches = sorted(glob.iglob(pattern, recursive=True))
    # `*` and `**` name no kind of file: images are meant, as in a folder.
    any_kind = os.path.basename(pattern) in ('*', '**')
    for match in matches:
        if not any_kind or os.path.isdir(match) or is_image_name(match):
            yield match
    if not matches:
        yield pattern


def _below(path: str, folders: set[tuple[int, int]]) -> Iterator[str]:
    """A file, or the images in a folder and below; `folders` were seen before."""
    if not os.path.isdir(path):
        yield path
        return
    try:
        status = os.stat(path)
        with os.scandir(path) as entries:
            found = sorted((entry.name, entry.is_dir()) for entry in entries)
    except OSError:
        yield path
        return
    folder = (status.st_dev, status.st_ino)
    if folder in folders:  # it was named twice, or a link leads back to it
        return
    folders.add(folder)
    for name, is_folder in found:
        if name.startswith('.'):
            continue
        if is_folder:
            yield from _below(os.path.join(path, name), folders)
        elif is_image_name(name):
            yield os.path.join(path, name)


def is_image_name(name: str) -> bool:
    """Whether a name ends like that of an image."""
    return os.path.splitext(name)[1].lower() in _image_endings()


@cache
def _image_endings() -> frozenset[str]:
    from PIL import Image

    return frozenset(
        ending
        for ending, name in Image.registered_extensions().items()
        if name in Image.OPEN and name not in NO_PHOTOGRAPHS
    )
