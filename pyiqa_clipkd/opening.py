"""Which image files are opened, and why others are not."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from pyiqa_clipkd.files import one_line

# Pillow refuses larger ones by default; see PIL.Image.MAX_IMAGE_PIXELS.
MAX_PIXELS = 178_000_000

# What Pillow may open, as it calls them: each further decoder is one more for strangers
# to attack, and none of them is for photographs. HEIF is that of an add-on.
FORMATS = (
    *('JPEG', 'PNG', 'WEBP', 'GIF', 'TIFF', 'BMP', 'AVIF'),
    *('HEIF', 'JPEG2000', 'PPM'),
)

# Formats that Pillow would hand to an interpreter, and others that tell themselves.
PROGRAMS, OTHERS = ('EPS',), ('PSD', 'DDS', 'QOI', 'ICNS')

# Formats that no other file begins like.
WELL_MARKED = ('JPEG', 'PNG', 'WEBP', 'GIF', 'TIFF', 'AVIF')

# How HEIC files of phones go on after 4 bytes: Pillow alone can't read them.
HEIC = (b'ftypheic', b'ftypheix', b'ftyphevc', b'ftyphevx', b'ftypmif1', b'ftypmsf1')

# The largest file that may hold so many pixels: 16 bits a channel, not compressed, and
# beside them what cameras and programs add. Some decoders read the file as a whole.
FILE_BYTES_A_PIXEL, FILE_BYTES_BESIDE = 8, 1 << 28


class UnreadableError(ValueError):
    """Says in one line, without the file's name, why there are no pixels to score."""


@contextmanager
def open_image(
    source: str | Path | BinaryIO, *, max_pixels: int = MAX_PIXELS
) -> Iterator[Image.Image]:
    """What Pillow says of a file by its header; nothing is decoded yet.

    Raises:
        UnreadableError: if it is no file, or too large for so many pixels.
        Exception: whatever Pillow raises.
    """
    if not isinstance(source, (str, Path)):
        with contextlib.suppress(AttributeError, OSError):  # of one that can't go back
            _check_size(source.seek(0, os.SEEK_END), max_pixels)
        with Image.open(source, formats=_formats()) as image:
            yield image
        return
    # Pillow gets no name: it would map a plain file into memory, and the process would
    # be killed if that shrinks meanwhile.
    with (
        _opened(Path(source), max_pixels) as file,
        Image.open(file, formats=_formats()) as image,
    ):
        yield image


@contextmanager
def _opened(path: Path, max_pixels: int) -> Iterator[BinaryIO]:
    if path.is_dir():
        raise UnreadableError('a folder')
    _check_file(path.stat(), max_pixels)  # to open a device may do something
    with open(path, 'rb', opener=_at_once) as file:
        _check_file(os.fstat(file.fileno()), max_pixels)  # may be another one by now
        yield file


def _at_once(path: str, flags: int) -> int:
    """Open a file, and don't wait for whoever writes into a pipe."""
    return os.open(path, flags | getattr(os, 'O_NONBLOCK', 0))


def _check_file(status: os.stat_result, max_pixels: int) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise UnreadableError('a pipe or a device, not a file')
    if status.st_size == 0:
        raise UnreadableError('the file is empty')
    _check_size(status.st_size, max_pixels)


def _check_size(size: int, max_pixels: int) -> None:
    if size > FILE_BYTES_A_PIXEL * max_pixels + FILE_BYTES_BESIDE:
        raise UnreadableError(
            f'too large: a file of {size / 1e6:,.0f} MB, more than '
            f'{max_pixels / 1e6:g} megapixels take'
        )


def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow knows."""
    _add_heif()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@cache
def _add_heif() -> None:
    """Whoever has installed pillow-heif wants HEIC files to be read."""
    Image.init()
    try:
        from pillow_heif import register_heif_opener  # type: ignore[import-not-found]
    except ImportError:
        return
    register_heif_opener()


def reason(source: str | Path | BinaryIO, error: Exception) -> str:
    """What an error means to a user, in one line without the file's name."""
    if isinstance(error, FileNotFoundError):
        return 'no such file'
    if isinstance(error, PermissionError):
        return 'no permission to read it'
    if isinstance(error, UnidentifiedImageError):
        return _what_instead(_beginning(source))
    if isinstance(error, (Image.DecompressionBombError, MemoryError)):
        return 'too large'
    if isinstance(error, OSError) and (error.filename or error.errno == errno.EIO):
        return f'cannot be read: {error.strerror}'
    text = one_line(error)
    if 'embedded null' in text:
        return 'no such file: no name has a NUL byte'
    if 'truncated' in text.lower():
        return f'truncated: {text}'
    return f'damaged: {type(error).__name__}: {text}' if text else 'damaged'


def _beginning(source: str | Path | BinaryIO) -> bytes:
    """The bytes by which Pillow tells formats apart, at least 16 of them."""
    try:
        if isinstance(source, (str, Path)):
            with open(source, 'rb', opener=_at_once) as file:
                return file.read(16).ljust(16)
        source.seek(0)
        return source.read(16).ljust(16)
    except (OSError, ValueError):  # a stream that can't go back
        return bytes(16)


def _what_instead(beginning: bytes) -> str:
    """Why a file is none of `FORMATS`, going by its first bytes."""
    if beginning[4:12] in HEIC:
        return (
            'HEIC, which Pillow does not read: `pip install pillow-heif`, or convert '
            'it to JPEG first'
        )
    for name in (*PROGRAMS, *OTHERS):
        _, accepts = Image.OPEN.get(name, (None, None))
        if accepts and accepts(beginning) is True:
            if name in PROGRAMS:
                return f'{name} is a program, not pixels'
            return f'{name}, which is not read: convert it to PNG first'
    for name in WELL_MARKED:
        _, accepts = Image.OPEN.get(name, (None, None))
        if accepts and accepts(beginning) is True:
            return f'damaged: it begins like {name}, but cannot be opened'
    return 'not an image'
