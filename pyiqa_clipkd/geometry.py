"""Where squares lie in a photograph, and their values: for torch and without it."""

from __future__ import annotations

from collections.abc import Iterator

# A strip of 1 x 100,000 pixels would be blown up to 224 x 22,400,000 before the crop.
# Strips longer than this multiple of their width are therefore cut before the resize.
LONGEST_STRIP = 16

# Beyond [0, 1], where images were normalized before and back.
ROUNDING = 1e-3

# 1/g and 1/g^2 with g^3 = g + 1: multiples of it fill a square evenly.
CROP_STEPS = (0.7548776662466927, 0.5698402909980532)


def in_unit_range(low: float, high: float) -> bool:
    """Whether the lowest and highest value of an image are those of one, and no NaN."""
    return low >= -ROUNDING and high <= 1 + ROUNDING


def strip_shape(height: int, width: int) -> tuple[int, int]:
    """The shape that is left of (height, width) when overlong strips are cut."""
    longest = LONGEST_STRIP * min(height, width)
    return min(height, longest), min(width, longest)


def resized_shape(height: int, width: int, size: int) -> tuple[int, int]:
    """(height, width) when the shorter side is `size`."""
    short = min(height, width)
    return size * height // short, size * width // short


def centre(outer: int, inner: int) -> int:
    """Where the central `inner` of `outer` pixels begin."""
    return round((outer - inner) / 2)


def crop_corners(
    height: int, width: int, side: int, count: int
) -> Iterator[tuple[int, int]]:
    """(top, left) of `count` squares of `side` pixels that fill the image evenly.

    They depend on the shape alone: the first is the centre, and more of them never move
    the ones before (a low-discrepancy sequence).
    """
    for number in range(count):
        x, y = ((0.5 + number * step) % 1 for step in CROP_STEPS)
        yield round(y * (height - side)), round(x * (width - side))
