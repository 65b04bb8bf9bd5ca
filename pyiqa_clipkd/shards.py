"""Files of keyed embeddings that many processes read and one of them appends to."""

from __future__ import annotations

import os
import secrets
import stat
import zlib
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

KEY_BYTES = 16

# A shard is a header and records of one size: key, embedding, CRC-32 of both.
MAGIC = b'CLIPKDTE'
VERSION = 1  # raise it where the same teacher gives other embeddings than before
HEADER_BYTES = 16


class Shard:
    """One file, mapped for reading.

    Attributes:
        size: bytes at the last look.
        torn: whether there is a part of a record at the end.
    """

    def __init__(self, path: Path, dim: int) -> None:
        self.path = path
        self.header = _header(dim)
        self.record = _record_bytes(dim)
        self.size = 0
        self._rows = 0  # whose keys are known
        self._map: NDArray[Any] = np.empty((0, self.record), np.uint8)

    @property
    def torn(self) -> bool:
        return max(0, self.size - HEADER_BYTES) % self.record != 0

    def update(self) -> tuple[int, bytes]:
        """Map the file as it is now.

        Returns:
            The first row that is new, and the keys from there on.

        Raises:
            OSError: if the file can't be read.
            ValueError: if it isn't one of this cache.
        """
        known = self._rows
        self._remap()
        self._rows = len(self._map)
        return known, self._map[known:, :KEY_BYTES].tobytes()

    def _remap(self) -> None:
        if not stat.S_ISREG(os.stat(self.path).st_mode):
            raise ValueError('not a plain file')
        with self.path.open('rb') as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(HEADER_BYTES)
            if not self.header.startswith(start):
                raise ValueError(f'it starts with {start!r}')
            rows = max(0, size - HEADER_BYTES) // self.record
            shape = (rows, self.record)
            self._map = (
                np.memmap(file, np.uint8, 'r', HEADER_BYTES, shape)
                if rows
                else np.empty(shape, np.uint8)
            )
        self.size = size

    def drop(self, size: int) -> None:
        """Read nothing from it until its size changes once more."""
        self.size, self._rows = size, 0
        self._map = np.empty((0, self.record), np.uint8)

    def grown(self, rows: int) -> None:
        """This process has written so many rows: their keys are known."""
        self._rows = rows
        self.size = HEADER_BYTES + rows * self.record

    def read(self, row: int, key: bytes) -> NDArray[Any] | None:
        """The embedding (D,) in a row, or `None` if it isn't whole or not of `key`."""
        if row >= len(self._map):
            try:
                self._remap()
            except (OSError, ValueError):
                return None
            if row >= len(self._map):
                return None
        record = self._map[row].tobytes()
        whole = zlib.crc32(record[:-4]) == int.from_bytes(record[-4:], 'little')
        if not whole or record[:KEY_BYTES] != key:
            return None
        return np.frombuffer(record[KEY_BYTES:-4], '<f4')


class Writer:
    """A new file that only this process appends to."""

    def __init__(self, folder: Path, dim: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.pid = os.getpid()
        self.path = folder / f'shard-{secrets.token_hex(8)}.bin'
        self._file = FileIO(str(self.path), 'x')
        self._rows = 0
        self._header = _header(dim)

    def is_usable(self) -> bool:
        """Not in a forked process, nor after someone has removed the file."""
        return self.pid == os.getpid() and self.path.exists()

    def append(self, embeddings: dict[bytes, NDArray[Any]]) -> int:
        """Write records whole and at once; returns the first one's row.

        Raises:
            OSError: if they don't fit. What fitted stays (others may have mapped it),
                whole records can be read, and nothing more may be appended.
        """
        first = self._rows
        content = b''.join(_record(*item) for item in embeddings.items())
        left = memoryview(content if first else self._header + content)
        while left:
            left = left[self._file.write(left) or 0 :]
        self._rows += len(embeddings)
        return first


def _header(dim: int) -> bytes:
    return MAGIC + VERSION.to_bytes(4, 'little') + dim.to_bytes(4, 'little')


def _record_bytes(dim: int) -> int:
    return KEY_BYTES + 4 * dim + 4


def _record(key: bytes, embedding: NDArray[Any]) -> bytes:
    content = key + embedding.astype('<f4').tobytes()
    return content + zlib.crc32(content).to_bytes(4, 'little')


def split_keys(keys: bytes) -> Iterator[bytes]:
    return (keys[i : i + KEY_BYTES] for i in range(0, len(keys), KEY_BYTES))
