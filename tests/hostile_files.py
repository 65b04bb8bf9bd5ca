"""Small files that cost a reader much: memory, or time."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

from PIL import Image

Tag = tuple[int, int, int, int]


def encoded(
    size: tuple[int, int], kind: str, mode: str = 'RGB', **options: Any
) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind, **options)
    return file.getvalue()


def zeros(count: int) -> bytes:
    """That many zeros, deflated: a thousandth of it."""
    packer = zlib.compressobj(9)
    parts = [packer.compress(bytes(1 << 20)) for _ in range(count >> 20)]
    parts.append(packer.compress(bytes(count & 0xFFFFF)))
    return b''.join((*parts, packer.flush()))


def chunk(name: bytes, data: bytes = b'') -> bytes:
    checksum = struct.pack('>I', zlib.crc32(name + data))
    return struct.pack('>I', len(data)) + name + data + checksum


def png(width: int, height: int, *chunks: bytes, pixels: bytes = b'') -> bytes:
    head = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    parts = (chunk(b'IHDR', head), *chunks, chunk(b'IDAT', pixels), chunk(b'IEND'))
    return b'\x89PNG\r\n\x1a\n' + b''.join(parts)


def tiff(tags: list[Tag], data: bytes, *, following: int = 0) -> bytes:
    entries = b''.join(struct.pack('<HHII', *tag) for tag in sorted(tags))
    head = struct.pack('<2sHIH', b'II', 42, 8, len(tags))
    return head + entries + struct.pack('<I', following) + data


def _gray_tiff(width: int, height: int, **changes: int) -> list[Tag]:
    names = {
        'width': (256, 4, width),
        'height': (257, 4, height),
        'bits': (258, 3, 8),
        'compression': (259, 3, 1),
        'colour': (262, 3, 1),
        'begin': (273, 4, 500),
        'samples': (277, 3, 1),
        'rows': (278, 4, height),
        'bytes': (279, 4, width * height),
    }
    return [
        (tag, kind, 1, changes.get(name, value))
        for name, (tag, kind, value) in names.items()
    ]


def segments(segment: bytes, count: int) -> bytes:
    """A JPEG with something in front of its pixels."""
    data = encoded((8, 8), 'JPEG')
    return data[:2] + segment * count + data[2:]


def scans(side: int, count: int) -> bytes:
    """A progressive JPEG that improves its pixels again and again."""
    data = encoded((side, side), 'JPEG', 'L', progressive=True, quality=50)
    starts = [at for at in range(len(data) - 1) if data[at : at + 2] == b'\xff\xda']
    tables = data.rindex(b'\xff\xc4', 0, starts[1])
    return data[:-2] + data[tables : starts[2]] * count + data[-2:]


def gif(*, canvas: int | None = None, inside: bytes = b'', frames: int = 1) -> bytes:
    data = encoded((8, 8), 'GIF', 'P')
    at = data.index(b',')
    if canvas is not None:
        data = data[:6] + struct.pack('<HH', canvas, canvas) + data[10:]
    return data[:at] + inside + data[at:-1] * frames + data[-1:]


def _sized(data: bytes, at: int, size: bytes) -> bytes:
    return data[:at] + size + data[at + len(size) :]


# Lies about sizes, and packed zeros: refused, or read in little time and memory.
CHEAP: dict[str, Callable[[], bytes]] = {
    'png_of_2_gigabytes.png': lambda: png(64, 64, pixels=zeros(300_000_000)),
    'png_text.png': lambda: png(
        8, 8, *[chunk(b'zTXt', b'a\0\0' + zeros(1_000_000))] * 80, pixels=zeros(200)
    ),
    'png_profile.png': lambda: png(
        8, 8, chunk(b'iCCP', b'a\0\0' + zeros(50_000_000)), pixels=zeros(200)
    ),
    'png_without_width.png': lambda: png(0, 9, pixels=zeros(99)),
    'png_65535.png': lambda: png(65535, 65535, pixels=zeros(99)),
    'jpeg_65535.jpg': lambda: _sized(
        data := encoded((8, 8), 'JPEG'), data.index(b'\xff\xc0') + 5, b'\xff' * 4
    ),
    'gif_65535.gif': lambda: gif(canvas=65535),
    'gif_frames.gif': lambda: gif(frames=100_000),
    'gif_comment.gif': lambda: gif(
        inside=b'\x21\xfe' + (b'\xff' + bytes(255)) * 9999 + b'\0'
    ),
    'bmp_negative.bmp': lambda: _sized(
        encoded((8, 8), 'BMP'), 18, struct.pack('<ii', 0x7FFFFFFF, -0x80000000)
    ),
    'webp_canvas.webp': lambda: _sized(
        encoded((8, 8), 'WEBP', exif=b'Exif\0\0'), 24, b'\xff' * 6
    ),
    'tiff_tag.tif': lambda: tiff(
        [*_gray_tiff(64, 64), (270, 2, 0xFFFFFFFF, 8)], bytes(8192)
    ),
    'tiff_loop.tif': lambda: tiff(
        [*_gray_tiff(64, 64), (34665, 4, 1, 8)], bytes(8192), following=8
    ),
    'tiff_tile.tif': lambda: tiff(
        [
            *_gray_tiff(64, 64, compression=8)[:5],
            *((277, 3, 1, 1), (322, 4, 1, 60000), (323, 4, 1, 60000)),
            *((324, 4, 1, 200), (325, 4, 1, 1000)),
        ],
        bytes(200) + zeros(1_000_000),
    ),
    'jpeg_profile.jpg': lambda: segments(
        b'\xff\xe2\xfd\xea' + b'ICC_PROFILE\0\1\2' + bytes(64982), 99
    ),
    'jpeg_exif.jpg': lambda: segments(
        b'\xff\xe1\xfd\xea' + b'Exif\0\0MM\0*\0\0\0\x08\xff\xff' + bytes(64976), 9
    ),
}

# Seconds to minutes of a decoder's time, and growing with their size.
SLOW: dict[str, Callable[[], bytes]] = {
    'jpeg_scans.jpg': lambda: scans(6000, 2000),
    'jpeg_fill.jpg': lambda: segments(b'\xff', 40_000_000),
    'jpeg_comments.jpg': lambda: segments(b'\xff\xfe\0\2', 4_000_000),
    'png_chunks.png': lambda: png(8, 8, chunk(b'teSt') * 2_000_000, pixels=zeros(200)),
    'ppm_comment.ppm': lambda: b'P6 #' + bytes(40_000_000) + b'\n1 1 255 abc',
    'tiff_strips.tif': lambda: tiff(
        [
            *_gray_tiff(64, 10_000_000)[:5],
            *((273, 4, 2_000_000, 300), (277, 3, 1, 1)),
            *((278, 4, 1, 1), (279, 4, 2_000_000, 300)),
        ],
        bytes(8_100_000),
    ),
}
