"""A photograph that is no file of its own: a member of a shard, a cell of a table."""

from __future__ import annotations

import io
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple


class Content(NamedTuple):
    """What would be in the file; takes the place of its path.

    Attributes:
        name: what its row has as `path`.
        data: the bytes of the file.
        error: why there are none.
    """

    name: str
    data: bytes
    error: str = ''

    def __str__(self) -> str:
        return self.name

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    def open(self) -> BinaryIO:
        """The bytes as a file.

        Raises:
            UnreadableError: if there are none.
        """
        from pyiqa_clipkd.images import UnreadableError  # after `prepare_pillow`

        if self.error or not self.data:
            raise UnreadableError(self.error or 'the file is empty')
        return io.BytesIO(self.data)


# Where a photograph is read from.
Source = Path | Content


def opened(source: Source) -> Path | BinaryIO:
    """What Pillow opens."""
    return source.open() if isinstance(source, Content) else source
