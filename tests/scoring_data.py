"""Photographs and damaged files for the tests of `pyiqa_clipkd.scoring`."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import skimage
from PIL import Image

METRIC = 'clipkd_efficientnet_lite'
SOURCES = ('astronaut.png', 'coffee.png', 'chelsea.png', 'rocket.jpg')


def photograph(number: int = 0, size: tuple[int, int] | None = None) -> Image.Image:
    """One of the photographs of scikit-image, or a seeded part of one."""
    name = SOURCES[number % len(SOURCES)]
    image = Image.open(Path(skimage.__file__).parent / 'data' / name).convert('RGB')
    if size is None:
        return image
    rng = np.random.default_rng(number)
    left = int(rng.integers(image.width - size[0] + 1))
    top = int(rng.integers(image.height - size[1] + 1))
    return image.crop((left, top, left + size[0], top + size[1]))


def encoded(image: Image.Image, kind: str = 'JPEG', **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


class Odd(NamedTuple):
    """An odd file: its content, and what its row says: of a note or of an error."""

    content: Callable[[], bytes]
    note: str = ''
    error: str = ''


def _rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(photograph(2), exif=exif)


def _sixteen_bit() -> bytes:
    gray = np.asarray(photograph(2).convert('L')).astype(np.uint16) * 257
    return encoded(Image.fromarray(gray), 'PNG')


def _transparent() -> bytes:
    image = photograph(2)
    image.putalpha(Image.linear_gradient('L').resize(image.size))
    return encoded(image, 'PNG')


def _animated() -> bytes:
    frames = [photograph(number, (90, 80)) for number in (4, 5, 6)]
    return encoded(frames[0], 'GIF', save_all=True, append_images=frames[1:])


def _plain(size: tuple[int, int]) -> bytes:
    return encoded(photograph(2).resize(size), 'PNG')


ODD = {
    'truncated.jpg': Odd(lambda: encoded(photograph())[:9000], error='truncated'),
    'truncated.png': Odd(lambda: encoded(photograph(), 'PNG')[:9000], error='trunc'),
    'text.jpg': Odd(lambda: b'no image at all\n' * 99, error='not an image'),
    'empty.png': Odd(lambda: b'', error='empty'),
    'gif.gif': Odd(_animated, note='frame'),
    'cmyk.jpg': Odd(lambda: encoded(photograph(2).convert('CMYK')), note='CMYK'),
    'sixteen.png': Odd(_sixteen_bit, note='16 bit'),
    'alpha.png': Odd(_transparent, note='alpha over white'),
    'palette.png': Odd(lambda: encoded(photograph(2).convert('P'), 'PNG')),
    'gray.jpg': Odd(lambda: encoded(photograph(2).convert('L'))),
    'exif.jpg': Odd(_rotated, note='EXIF'),
    'one_pixel.png': Odd(lambda: _plain((1, 1))),
    'strip.png': Odd(lambda: _plain((1, 5000))),
    'webp.webp': Odd(lambda: encoded(photograph(2), 'WEBP')),
}


def write_odd(folder: Path) -> None:
    for name, odd in ODD.items():
        (folder / name).write_bytes(odd.content())


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """A file that is cut, overwritten or has its beginning lost."""
    data = bytearray(content)
    kind = rng.integers(4)
    if kind == 0:
        return bytes(data[: rng.integers(len(data))])
    if kind == 1:
        data[: rng.integers(2, 30)] = b''
    if kind == 2:
        at = int(rng.integers(len(data) - 64))
        data[at : at + 64] = rng.bytes(64)
    if kind == 3:
        for at in rng.integers(len(data), size=200):
            data[at] = rng.integers(256)
    return bytes(data)
