"""The header of a safetensors file, checked before anything is read or allocated."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from pyiqa_clipkd.description import KEY

# Bytes: that of a network of 1,000 tensors takes a tenth of a megabyte.
LARGEST_HEADER = 10 << 20

# Of a tensor; networks have up to 5.
MOST_DIMENSIONS = 16

# Bits of an element.
DTYPES = {
    'BOOL': 8, 'U8': 8, 'I8': 8, 'F8_E4M3': 8, 'F8_E5M2': 8,
    'U16': 16, 'I16': 16, 'F16': 16, 'BF16': 16,
    'U32': 32, 'I32': 32, 'F32': 32,
    'U64': 64, 'I64': 64, 'F64': 64,
}  # fmt: skip


class Header(NamedTuple):
    """What a safetensors file says of itself.

    Attributes:
        tensors: name -> `dtype`, `shape` and `data_offsets`.
        metadata: what we wrote about a network; empty in files of others.
        begin: where the numbers begin.
    """

    tensors: dict[str, dict[str, Any]]
    metadata: dict[str, Any]
    begin: int


def read_header(path: Path) -> Header:
    """Read and check the header.

    Raises:
        OSError: if the file can't be read.
        ValueError: if it is no such file or damaged, with the reason.
    """
    size = path.stat().st_size
    with path.open('rb') as file:
        length = int.from_bytes(file.read(8), 'little')
        if not 2 <= length <= size - 8:
            raise ValueError('no weight file: it has no header of safetensors')
        if length > LARGEST_HEADER:
            raise ValueError(
                f'no weight file: its header takes {length} bytes, and at most '
                f'{LARGEST_HEADER} are read'
            )
        text = file.read(length)
    try:
        tensors = json.loads(text, object_pairs_hook=_once)
        metadata = tensors.pop('__metadata__', {})
        own = dict(json.loads(metadata.get(KEY, '{}')))
        end = _end(tensors, size)
    except (
        *(ValueError, TypeError, AttributeError, KeyError, RecursionError),
        *(OverflowError, MemoryError),
    ) as error:
        raise ValueError(
            f'no weight file: its header is damaged ({type(error).__name__}: '
            f'{str(error)[:100]})'
        ) from error
    if 8 + length + end != size:
        raise ValueError(
            f'damaged: {size} bytes, but its header says {8 + length + end}'
        )
    return Header(tensors, own, 8 + length)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f'{name!r} is there twice')
        values[name] = value
    return values


def _end(tensors: dict[str, Any], size: int) -> int:
    """Where the numbers end: each tensor's begin where those of another one end.

    Args:
        tensors: as the header has them.
        size: of the file: no number in it is larger.
    """
    end = 0
    for name, entry in sorted(
        tensors.items(), key=lambda item: tuple(item[1]['data_offsets'])
    ):
        first, last = entry['data_offsets']
        sizes = (first, last, *entry['shape'])
        if len(sizes) > 2 + MOST_DIMENSIONS or any(
            type(number) is not int or not 0 <= number <= size for number in sizes
        ):
            raise ValueError(f'{name!r} has odd sizes')
        if entry['dtype'] not in DTYPES:
            raise ValueError(f'{name!r} is of the unknown type {entry["dtype"]!r}')
        bits = math.prod(entry['shape']) * DTYPES[entry['dtype']]
        if first != end or (last - first) * 8 != bits:
            raise ValueError(f'{name!r} has other bytes than its shape and type need')
        end = last
    return end
