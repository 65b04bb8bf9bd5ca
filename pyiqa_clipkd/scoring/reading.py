"""Reading many photographs: by several threads, in order, within bounded memory."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
from PIL import Image

from pyiqa_clipkd.images import (
    ORIENTATION,
    UPRIGHT,
    UnreadableError,
    read_photograph,
    squares,
)
from pyiqa_clipkd.opening import one_line, open_image
from pyiqa_clipkd.scoring.contents import Content, Source, opened
from pyiqa_clipkd.scoring.files import is_raw
from pyiqa_clipkd.scoring.tables import Row

# Bytes of decoded photographs that all workers together hold at a time: two upright
# JPEGs of 48 megapixels. A single larger one is decoded alone.
MEMORY = 400_000_000

# Bytes a pixel: Pillow's RGB, and what it takes at most to get there from elsewhere.
RGB_BYTES, OTHER_BYTES = 4, 12

T = TypeVar('T')
R = TypeVar('R')


def in_order(
    function: Callable[[T], R], items: Iterable[T | None], workers: int, ahead: int
) -> Iterator[R]:
    """`map` by threads that work at most `ahead` items ahead; `None` is no item."""
    executor = ThreadPoolExecutor(workers)
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            if item is not None:
                waiting.append(executor.submit(function, item))
            while waiting and (len(waiting) >= ahead or waiting[0].done()):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:  # also when nobody wants more: what has not begun never does
        executor.shutdown(cancel_futures=True)


def read_image(path: Source, row: Row, max_pixels: int) -> Image.Image:
    """The photograph in RGB; what it is goes into its row.

    Raises:
        UnreadableError: if there is nothing to score.
    """
    refuse(path)
    photograph = read_photograph(opened(path), max_pixels=max_pixels)
    row['width'], row['height'] = photograph.width, photograph.height
    row['format'] = photograph.format
    row['notes'] = '; '.join(photograph.notes)
    return photograph.image


def read_squares(
    path: Source, max_pixels: int, size: int, crops: int
) -> tuple[Row, np.ndarray]:
    """What the row of a photograph says of it, and what the network looks at.

    Raises:
        UnreadableError: if there is nothing to score.
    """
    row: Row = {}
    return row, squares(read_image(path, row, max_pixels), size, crops=crops)


def refuse(path: Source) -> None:
    """What Pillow would describe wrongly, or take its thumbnail for it."""
    if is_raw(path):
        raise UnreadableError("a camera's raw data: develop it first")
    if not isinstance(path, Content) and path.is_dir():
        try:
            os.scandir(path).close()
        except OSError:
            raise UnreadableError('a folder that may not be read') from None


def reason_of(error: Exception) -> str:
    """One line for a row."""
    if isinstance(error, UnreadableError):
        return str(error)
    text = one_line(str(error))
    return f'{type(error).__name__}: {text}' if text else type(error).__name__


def decoded_bytes(path: Source) -> int:
    """About how much memory a photograph takes at most; by its header alone."""
    if not isinstance(path, Content) and not path.is_file():  # a pipe would wait
        return 0
    try:
        with open_image(opened(path)) as image:
            pixels = image.width * image.height
            plain = image.mode == 'RGB' and 'transparency' not in image.info
            if plain and image.format in ('JPEG', 'MPO'):  # others must be decoded
                plain = image.getexif().get(ORIENTATION, UPRIGHT) == UPRIGHT
    except Exception:  # whatever it is, `read_photograph` will say so
        return 0
    return pixels * (RGB_BYTES if plain else OTHER_BYTES)


class Allowance:
    """So much of something for all threads together; who wants more waits."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.left = total
        self.changed = threading.Condition()

    @contextmanager
    def take(self, amount: int) -> Iterator[None]:
        amount = min(amount, self.total)
        with self.changed:
            self.changed.wait_for(lambda: self.left >= amount)
            self.left -= amount
        try:
            yield
        finally:
            with self.changed:
                self.left += amount
                self.changed.notify_all()
