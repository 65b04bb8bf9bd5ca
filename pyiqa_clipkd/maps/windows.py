"""Scores of overlapping windows of a photograph: an array, and what it says."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from pyiqa_clipkd.description import ONNX
from pyiqa_clipkd.images import BYTE, squares, upright
from pyiqa_clipkd.names import DEFAULT_METRIC
from pyiqa_clipkd.scoring.backends import Backend, create_backend
from pyiqa_clipkd.scoring.core import default_workers, finite
from pyiqa_clipkd.scoring.reading import in_order

Source = str | Path | BinaryIO | Image.Image
Box = tuple[int, int, int, int]

# The default window is this share of the shorter side, and has at least so many pixels.
WINDOW_SHARE, SMALLEST_WINDOW = 3 / 8, 128

# The default stride is this share of the window, or more: the default map of a large
# photograph has at most so many windows, as long as they touch each other.
STRIDE_SHARE, ENOUGH_WINDOWS = 1 / 3, 120

# Windows that nobody can have meant to ask for.
MOST_WINDOWS = 100_000


class StrideError(ValueError):
    """The stride doesn't suit this photograph, though it may suit others."""


class Window(NamedTuple):
    """One window of a map.

    Attributes:
        row, column: its place in the map.
        box: left, top, right and bottom in pixels of the upright photograph, the last
            two exclusive, as Pillow has them.
        score: in [1, 5], higher is better.
    """

    row: int
    column: int
    box: Box
    score: float


@dataclass(frozen=True, eq=False)
class QualityMap:
    """Scores of the windows of one photograph.

    They tell the photograph's better parts from its worse ones. Content moves them,
    too: an empty sky or a background out of focus scores lower than a subject with
    detail. So compare windows of one photograph, or the same window before and after a
    change, but not windows of different photographs, nor a window with `score`.

    Attributes:
        scores: float32 (R, C) in [1, 5], higher is better; top row first.
        tops, lefts: (R,) and (C,), where the windows begin, in pixels.
        window: side of the windows in pixels.
        stride: pixels from one window to the next, at most.
        width, height: of the upright photograph, in pixels.
        score: of the whole photograph, as `pyiqa-clipkd score` gives it.
    """

    scores: np.ndarray
    tops: np.ndarray
    lefts: np.ndarray
    window: int
    stride: int
    width: int
    height: int
    score: float

    def at(self, row: int, column: int) -> Window:
        """The window in a row and a column of the map."""
        left, top = int(self.lefts[column]), int(self.tops[row])
        right = min(left + self.window, self.width)
        bottom = min(top + self.window, self.height)
        score = float(self.scores[row, column])
        return Window(row, column, (left, top, right, bottom), score)

    @property
    def worst(self) -> Window:
        """The window with the lowest score."""
        return self.at(*divmod(int(self.scores.argmin()), len(self.lefts)))

    @property
    def best(self) -> Window:
        """The window with the highest score."""
        return self.at(*divmod(int(self.scores.argmax()), len(self.lefts)))

    def windows(self) -> list[Window]:
        """All windows, row by row."""
        rows, columns = self.scores.shape
        return [self.at(*place) for place in product(range(rows), range(columns))]


def quality_map(
    source: Source,
    model: str | Path | Backend = DEFAULT_METRIC,
    *,
    window: int | None = None,
    stride: int | None = None,
    coarse: bool = False,
    workers: int | None = None,
) -> QualityMap:
    """Score overlapping windows of a photograph at its own resolution.

    Args:
        source: a path, an open binary file, or an image of Pillow.
        model: name of a metric, path of an .onnx file that takes squares, or what
            `create_backend` or `Runtime` gives, for several photographs.
        window: side of the windows in pixels, at most the photograph's shorter side; by
            default 3/8 of that, from 128 pixels to what the network takes. Windows
            above what the network takes are reduced to it.
        stride: pixels from one window to the next, at most as many as a window has; the
            windows are spread evenly from border to border, so they may lie a little
            closer. By default a third of the window, in large photographs more, for at
            most 120 windows as long as they touch each other.
        coarse: let the network see the photograph once, and take the mean of its last
            feature map over each window. Needs torch, and an encoder whose embedding is
            such a mean: `efficientnet_lite`, `efficientnet`, `resnet18`, `mobilevit`.
            Window and stride are rounded to the map's cells (32 pixels); the default
            stride is one cell.
        workers: threads; by default one a processor core.

    Returns:
        The map. A photograph no larger than a window has one window.

    Raises:
        UnreadableError: if there are no pixels to score.
        ValueError: if an argument is out of its range, or the encoder allows no coarse
            map.
        FileNotFoundError: if there is no such model.
        ImportError: if what runs the model isn't installed.
    """
    for name, value in (('window', window), ('stride', stride), ('workers', workers)):
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(
                f'`{name}` must be a whole number >= 1, but got {value!r}.'
            )
    if window is not None and stride is not None and stride > window:
        raise ValueError(
            f'`stride` must be at most the window of {window} pixels, or there are '
            f'gaps, but got {stride}.'
        )
    backend = _backend(model, coarse)
    image = upright(source)
    side = _window(image, window, backend.input_size)
    workers = workers or default_workers()
    if coarse:
        from pyiqa_clipkd.maps.coarse import coarse_map

        return coarse_map(image, backend, window=side, stride=stride, workers=workers)
    stride = min(stride or _stride(image, side), side)
    return _windows_map(image, backend, window=side, stride=stride, workers=workers)


def _windows_map(
    image: Image.Image, backend: Backend, *, window: int, stride: int, workers: int
) -> QualityMap:
    """The arguments of `quality_map`, checked, with an RGB image."""
    tops, lefts = (starts(n, window, stride) for n in (image.height, image.width))
    if len(tops) * len(lefts) > MOST_WINDOWS:
        raise StrideError(
            f'`stride` must give at most {MOST_WINDOWS:,} windows, but {stride} gives '
            f'{len(tops) * len(lefts):,}.'
        )
    size = backend.input_size
    boxes = [(x, y, x + window, y + window) for y, x in product(tops, lefts)]
    batch = getattr(backend, 'batch_size', 1)
    groups = [boxes[at : at + batch] for at in range(0, len(boxes), batch)]

    def score(group: list[Box]) -> np.ndarray:
        return backend(np.stack([view(image, box, size) for box in group]))[0]

    scores = np.concatenate(list(in_order(score, groups, workers, 4 * workers)))
    return QualityMap(
        finite(scores).astype(np.float32).reshape(len(tops), len(lefts)),
        tops,
        lefts,
        window,
        stride,
        image.width,
        image.height,
        whole_score(image, backend),
    )


def whole_score(image: Image.Image, backend: Backend) -> float:
    """The score of a photograph as `pyiqa-clipkd score` gives it."""
    return float(finite(backend(squares(image, backend.input_size))[0]).mean())


def starts(length: int, window: int, stride: int) -> np.ndarray:
    """Where windows begin: evenly from border to border, at most `stride` apart."""
    count = -(-(length - window) // stride) + 1
    return np.linspace(0, length - window, count).round().astype(int)


def view(image: Image.Image, box: Box, size: int) -> np.ndarray:
    """What a network sees of a window: float32 (3, size, size) in [0, 1].

    A window smaller than that is continued by its own mirror images: enlarged, it would
    look blurred.
    """
    crop = image.crop(box)
    missing = size - crop.width
    if missing <= 0:
        return squares(crop, size)[0]
    pixels = np.asarray(crop).astype(np.float32).transpose(2, 0, 1) / BYTE
    around = (missing // 2, missing - missing // 2)
    return np.pad(pixels, ((0, 0), around, around), 'symmetric')


def _backend(model: str | Path | Backend, coarse: bool) -> Backend:
    if not isinstance(model, (str, Path)):
        return model
    kind = 'torch' if coarse else 'auto'
    if Path(model).suffix.lower() == ONNX:
        return create_backend(None, kind=kind, weights=Path(model))
    return create_backend(str(model), kind=kind)


def _window(image: Image.Image, window: int | None, input_size: int) -> int:
    short = min(image.size)
    if window is None:
        window = min(max(round(WINDOW_SHARE * short), SMALLEST_WINDOW), input_size)
    return min(window, short)


def _stride(image: Image.Image, window: int) -> int:
    """The smallest stride that is a good one and doesn't give too many windows."""
    stride = max(1, round(STRIDE_SHARE * window))
    while stride < window:
        rows, columns = (1 - (window - side) // stride for side in image.size)
        if rows * columns <= ENOUGH_WINDOWS:
            break
        stride += 1
    return stride
