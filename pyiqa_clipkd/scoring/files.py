"""Which photographs are meant: files, folders, patterns and lists."""

from __future__ import annotations

import codecs
import glob
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from queue import Empty, Queue
from typing import BinaryIO

from pyiqa_clipkd.scoring.contents import Source

STDIN = '-'

# Pillow knows their endings, but has no decoder of its own for them, or calls another
# program for it; icons, textures and what measures the sky are no photographs either.
NO_PHOTOGRAPHS = {
    *('BUFR', 'EPS', 'GRIB', 'HDF5', 'IPTC', 'MPEG', 'WMF'),
    *('BLP', 'CUR', 'FITS', 'FLI', 'FTEX', 'GBR', 'ICNS', 'ICO', 'XBM', 'XPM'),
}

# Photographs that Pillow has no decoder for, unless an add-on brings it: they come
# through with those it has, for their rows to say so. A raw file may look like a TIFF
# with a thumbnail.
RAW = frozenset(('.cr2', '.cr3', '.nef', '.arw', '.dng', '.raf', '.orf', '.rw2'))
FOREIGN = RAW | {'.heic', '.heif'}

# Bytes that are read from a list at once.
CHUNK = 1 << 16

# Paths of a list that are read ahead of those that are worked on.
AHEAD = 1000

# Seconds to wait for the next path of a list before others are told.
PATIENCE = 0.1


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


def unbuffered_stdin() -> BinaryIO:
    """Standard input without a lock: a thread may wait for it when the process ends."""
    return open(sys.stdin.fileno(), 'rb', buffering=0, closefd=False)


def listed_ahead(
    paths: Iterator[Path], found: Callable[[], None] | None = None, *, most: int = 0
) -> Iterator[Path | None]:
    """The same paths, found by a thread; `None` now and then while there is none yet.

    Args:
        paths: searched in the thread.
        found: called for each path, there.
        most: paths to be found ahead; 0 for any number.
    """
    queue: Queue[Path | BaseException | None] = Queue(most)

    def search() -> None:
        end = None
        try:
            for path in paths:
                if found is not None:
                    found()
                queue.put(path)
        except BaseException as error:
            end = error
        queue.put(end)

    threading.Thread(target=search, daemon=True).start()
    while True:
        try:
            item = queue.get(timeout=PATIENCE)
        except Empty:
            yield None
            continue
        if item is None:
            return
        if isinstance(item, BaseException):
            raise item
        yield item


def _named(paths: Sequence[str], stdin: BinaryIO | None, end: bytes) -> Iterator[str]:
    for path in paths:
        if path == STDIN and stdin is not None:
            yield from entries(stdin, end)
        elif glob.has_magic(path) and not os.path.lexists(path):
            yield from _matches(path)
        else:
            yield path


def entries(stream: BinaryIO, end: bytes) -> Iterator[str]:
    """The entries of a list, as soon as they're there; names may be any bytes."""
    begin = codecs.BOM_UTF8
    for entry in _split(stream, end):
        if end == b'\n':  # lists from Windows
            entry, begin = entry.removeprefix(begin).removesuffix(b'\r'), b''
        if entry:
            yield os.fsdecode(entry)


def _split(stream: BinaryIO, end: bytes) -> Iterator[bytes]:
    rest = b''
    read = getattr(stream, 'read1', stream.read)
    while chunk := read(CHUNK):
        *whole, rest = (rest + chunk).split(end)
        yield from whole
    yield rest


def _matches(pattern: str) -> Iterator[str]:
    matches = sorted(
        _recursive(pattern) if '**' in Path(pattern).parts else glob.iglob(pattern)
    )
    # `*` and `**` name no kind of file: images are meant, as in a folder.
    any_kind = os.path.basename(pattern) in ('*', '**')
    for match in matches:
        if not any_kind or os.path.isdir(match) or is_image_name(match):
            yield match
    if not matches:
        yield pattern


def _recursive(pattern: str) -> Iterator[str]:
    """As `glob.iglob`, which would follow links that lead back, and never end."""
    parts = Path(pattern).parts
    first = parts.index('**')
    for root in glob.glob(str(Path(*parts[:first]))):
        for names in tree(root):
            if _fits(names, parts[first:]):
                yield os.path.join(root, *names)


def tree(root: str) -> Iterator[tuple[str, ...]]:
    """The names that lead to all that is in a folder and below; each folder once."""
    folders: set[tuple[int, int]] = set()
    waiting: list[tuple[str, ...]] = [()]
    while waiting:
        names = waiting.pop()
        yield names
        hidden = names and names[-1].startswith('.')
        found = [] if hidden else _listed(os.path.join(root, *names), folders)
        for name, is_folder in found or ():
            if is_folder:
                waiting.append((*names, name))
            else:
                yield (*names, name)


def _fits(names: Sequence[str], parts: Sequence[str]) -> bool:
    if not parts:
        return not names
    if parts[0] == '**':
        hidden = [i for i, name in enumerate(names) if name.startswith('.')]
        most = min(hidden, default=len(names))
        return any(_fits(names[i:], parts[1:]) for i in range(most + 1))
    if not names or (names[0].startswith('.') and not parts[0].startswith('.')):
        return False
    return fnmatch(names[0], parts[0]) and _fits(names[1:], parts[1:])


def _below(path: str, folders: set[tuple[int, int]]) -> Iterator[str]:
    """A file, or the images in a folder and below; `folders` were seen before."""
    waiting = [(path, os.path.isdir(path))]
    while waiting:  # folders may lie deeper than calls may
        path, is_folder = waiting.pop()
        found = _listed(path, folders) if is_folder else None
        if found is None:
            yield path
            continue
        for name, inner in reversed(found):
            if not name.startswith('.') and (inner or is_image_name(name)):
                waiting.append((os.path.join(path, name), inner))


def _listed(path: str, folders: set[tuple[int, int]]) -> list[tuple[str, bool]] | None:
    """The names in a folder, and whether they are folders; `None`: it can't be read.

    Nothing of one that was named twice, or that a link leads back to.
    """
    try:
        status = os.stat(path)
        with os.scandir(path) as entries:
            found = sorted((entry.name, _is_folder(entry)) for entry in entries)
    except OSError:
        return None
    folder = (status.st_dev, status.st_ino)
    if folder in folders:
        return []
    folders.add(folder)
    return found


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself, or to where we may not look
        return False


def is_image_name(name: str) -> bool:
    """Whether a name ends like that of an image."""
    ending = os.path.splitext(name)[1].lower()
    return ending in FOREIGN or ending in _image_endings()


def is_raw(path: Source) -> bool:
    """Whether a file is a camera's raw data, going by a name that Pillow lacks."""
    ending = path.suffix.lower()
    return ending in RAW and ending not in _image_endings()


@cache
def _image_endings() -> frozenset[str]:
    from PIL import Image

    return frozenset(
        ending
        for ending, name in Image.registered_extensions().items()
        if name in Image.OPEN and name not in NO_PHOTOGRAPHS
    )
