"""Small image files of many kinds, and seeded ways to damage them: for fuzz_images.py.

A bit of chance is not enough: PNG has checksums, and most of a file is pixels. So some
mutations know where a format keeps its sizes and lengths.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image, features

PNG_HEAD = b'\x89PNG\r\n\x1a\n'

# What a size or length is replaced by: nothing, a bit, limits of 8 to 32 bits.
LIES = (0, 1, 7, 127, 128, 255, 4096, 32767, 32768, 65535, 0x7FFFFFFF, 0xFFFFFFFF)

Mutation = Callable[[bytes, Sequence[bytes], np.random.Generator], bytes]


def seeds(picture: Image.Image) -> dict[str, list[bytes]]:
    """Whole files by format, each format in several forms.

    Args:
        picture: RGB, small.
    """
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, 'seed'
    frames = [picture.rotate(angle) for angle in (0, 90, 180)]
    rgba = picture.copy()
    rgba.putalpha(Image.linear_gradient('L').resize(picture.size))
    wide = np.asarray(picture.convert('L')).astype(np.uint16) * 257
    several = {'save_all': True, 'append_images': frames[1:]}
    gray, palette = picture.convert('L'), picture.convert('P')
    kinds: dict[str, list[tuple[Image.Image, dict[str, Any]]]] = {
        'JPEG': [
            (picture, {'exif': exif, 'icc_profile': b'lie' * 99}),
            (picture, {'progressive': True}),
            (picture.convert('CMYK'), {}),
            (gray, {'comment': b'seed', 'restart_marker_rows': 1}),
        ],
        'PNG': [
            (picture, {'exif': exif, 'icc_profile': b'lie' * 99}),
            (palette, {'transparency': 3}),
            (rgba, {}),
            (Image.fromarray(wide), {}),
            (picture, several),
        ],
        'WEBP': [
            (picture, {'exif': exif}),
            (rgba, {'lossless': True}),
            (picture, several),
        ],
        'GIF': [(palette, {'comment': b'seed'}), (picture, several)],
        'TIFF': [
            (picture, {}),
            (picture, {'compression': 'tiff_lzw', 'exif': exif}),
            (rgba, {'compression': 'tiff_adobe_deflate'}),
            (picture, {'compression': 'jpeg'}),
            (picture.convert('1'), {'compression': 'group4'}),
            (Image.fromarray(wide), several),
        ],
        'BMP': [(picture, {}), (palette, {}), (picture.convert('1'), {})],
        'AVIF': [(picture, {'exif': exif}), (rgba, {}), (picture, several)],
        'JPEG2000': [(picture, {}), (rgba, {'tile_size': (32, 32)})],
        'PPM': [(picture, {}), (gray, {})],
    }
    if not features.check('avif'):
        del kinds['AVIF']
    return {
        kind: [_encoded(image, kind, options) for image, options in forms]
        for kind, forms in kinds.items()
    }


def _encoded(image: Image.Image, kind: str, options: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def mutated(
    kind: str, files: Sequence[bytes], rng: np.random.Generator
) -> tuple[str, bytes]:
    """One of `files`, damaged once to four times, and by what at last."""
    data = files[rng.integers(len(files))]
    names = list(MUTATIONS)
    name = ''
    for _ in range(rng.integers(1, 5)):
        name = names[rng.integers(len(names))]
        data = MUTATIONS[name](data, files, rng) or data
    if kind == 'PNG' and rng.random() < 0.7:  # so that more than checksums is reached
        data = with_checksums(data)
    return name, data


def _flip(data: bytes, files: Sequence[bytes], rng: np.random.Generator) -> bytes:
    changed = bytearray(data)
    for at in rng.integers(len(data), size=rng.integers(1, 20)):
        changed[at] ^= 1 << rng.integers(8)
    return bytes(changed)


def _flip_head(data: bytes, files: Sequence[bytes], rng: np.random.Generator) -> bytes:
    return _flip(data[:200], files, rng) + data[200:]


def _truncate(data: bytes, files: Sequence[bytes], rng: np.random.Generator) -> bytes:
    return data[: rng.integers(len(data))]


def _splice(data: bytes, files: Sequence[bytes], rng: np.random.Generator) -> bytes:
    """The beginning of one file and the end of another."""
    other = files[rng.integers(len(files))]
    return data[: rng.integers(len(data))] + other[rng.integers(len(other)) :]


def _repeat(data: bytes, files: Sequence[bytes], rng: np.random.Generator) -> bytes:
    begin, end = _part(data, rng)
    times = int(rng.integers(2, 50))
    return (data[:begin] + data[begin:end] * times + data[end:])[:1_000_000]


def _remove(data: bytes, files: Sequence[bytes], rng: np.random.Generator) -> bytes:
    begin, end = _part(data, rng)
    return data[:begin] + data[end:]


def _move(data: bytes, files: Sequence[bytes], rng: np.random.Generator) -> bytes:
    begin, end = _part(data, rng)
    rest = data[:begin] + data[end:]
    at = int(rng.integers(len(rest) + 1))
    return rest[:at] + data[begin:end] + rest[at:]


def _part(data: bytes, rng: np.random.Generator) -> tuple[int, int]:
    """A segment, if the format has any, or else any part."""
    borders = [*_borders(data), len(data)]
    if len(borders) > 2 and rng.random() < 0.7:
        number = int(rng.integers(len(borders) - 1))
        return borders[number], borders[number + 1]
    begin = int(rng.integers(len(data)))
    return begin, begin + int(rng.integers(1, 300))


def _borders(data: bytes) -> Iterator[int]:
    """Where segments of a JPEG and chunks of PNG, WebP and AVIF begin, as they say."""
    if data[:2] == b'\xff\xd8':
        at = 2
        while at + 4 <= len(data) and data[at] == 0xFF:
            yield at
            at += 2 + int.from_bytes(data[at + 2 : at + 4], 'big')
        return
    starts = {PNG_HEAD[:4]: (8, '>I', 12), b'RIFF': (12, '<I', 8)}
    at, code, beside = starts.get(data[:4], (0, '>I', 0))
    while at + 8 <= len(data):
        yield at
        at += max(struct.unpack_from(code, data, at)[0] + beside, 8)


def _lie(data: bytes, files: Sequence[bytes], rng: np.random.Generator) -> bytes:
    """A number becomes another one: in the head, or where a segment begins."""
    borders = list(_borders(data))
    near = int(rng.integers(min(len(data), 64)))
    if borders and rng.random() < 0.5:
        near = borders[rng.integers(len(borders))] + int(rng.integers(12))
    width, order = int(rng.choice([1, 2, 4])), str(rng.choice(['big', 'little']))
    value = LIES[rng.integers(len(LIES))] & ((1 << 8 * width) - 1)
    return data[:near] + value.to_bytes(width, order) + data[near + width :]


def _size_lie(data: bytes, files: Sequence[bytes], rng: np.random.Generator) -> bytes:
    """Another width or height than the file has pixels for."""
    found = size_field(data)
    if found is None:
        return _lie(data, files, rng)
    at, width, order = found
    at += int(rng.integers(2)) * width
    value = int(rng.choice([0, 1, 63, 1000, 5000, 65535, 0x7FFFFFFF, 0xFFFFFFFF]))
    value &= (1 << 8 * width) - 1
    return data[:at] + value.to_bytes(width, order) + data[at + width :]


def size_field(data: bytes) -> tuple[int, int, Any] | None:
    """Where the first of its two sizes is, in how many bytes, in which order."""
    if data[:4] == PNG_HEAD[:4]:
        return 16, 4, 'big'
    if data[:3] == b'GIF':
        return 6, 2, 'little'
    if data[:2] == b'BM':
        return 18, 4, 'little'
    if data[12:16] == b'VP8X':
        return 24, 3, 'little'
    if data[:2] == b'\xff\xd8':
        for at in _borders(data):
            if 0xC0 <= data[at + 1] <= 0xC2:
                return at + 5, 2, 'big'
    for mark, beyond in ((b'ispe', 8), (b'ihdr', 4)):  # AVIF, JPEG 2000
        if (at := data.find(mark)) > 0:
            return at + beyond, 4, 'big'
    return None


def with_checksums(data: bytes) -> bytes:
    """A PNG with the checksums that its chunks should have, as far as there are any."""
    result, at = bytearray(data), 8
    while at + 12 <= len(data):
        end = at + 8 + struct.unpack_from('>I', data, at)[0]
        if end + 4 > len(data):
            break
        result[end : end + 4] = struct.pack('>I', zlib.crc32(data[at + 4 : end]))
        at = end + 4
    return bytes(result)


MUTATIONS: dict[str, Mutation] = {
    'bits': _flip,
    'bits of the head': _flip_head,
    'truncation': _truncate,
    'splice': _splice,
    'repeated segment': _repeat,
    'removed segment': _remove,
    'moved segment': _move,
    'number': _lie,
    'size': _size_lie,
}
