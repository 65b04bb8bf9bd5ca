"""Controlled changes to photographs, one an attribute, that leave the others alone.

Light and colour are kept apart: luma (Rec. 601, 0.299 R + 0.587 G + 0.114 B of the
values in the file, so roughly what the eye sees) and what the channels differ from it.
Brightness, contrast and noise change luma alone, colourfulness the difference alone.
What a change shifts besides, as seen from afar, is put right: blur takes away a little
contrast and colour, for instance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter
from scipy.ndimage import uniform_filter
from scipy.stats import spearmanr

from pyiqa_clipkd.attributes.measures import LUMA
from pyiqa_clipkd.attributes.names import ATTRIBUTES
from pyiqa_clipkd.degradations import degrade

_BAD_SIDE = (-1.0, -0.75, -0.5, -0.25, 0.0)
_BOTH_SIDES = (-1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0)

# Attribute -> the levels of a controlled series, in ascending order of the attribute.
LEVELS: dict[str, tuple[float, ...]] = {
    'sharpness': _BAD_SIDE,
    'brightness': _BOTH_SIDES,
    'contrast': _BOTH_SIDES,
    'colorfulness': _BOTH_SIDES,
    'noisiness': _BAD_SIDE,
}

# Strengths at level -1 or 1. The blur is a level of `degradations`, 4.5 pixels where
# the shorter side has 512; noise is in grey levels of 255 a pixel, so a photograph that
# is larger than it will be seen should be reduced first.
BLUR = 5.0
UNSHARP_RADIUS, UNSHARP_PERCENT = 2.0, 150
GAMMA = 2.0  # of luma: the power, or one over it
LESS_CONTRAST, MORE_CONTRAST = 0.5, 1.5  # of distances from the mean
SATURATION = 1.0  # distances from grey: more, or less
NOISE = 30.0

# Tones are changed without what varies by so many grey levels within so many pixels,
# where the shorter side has 512: noise stays what it is.
GRAIN, BASE_RADIUS = 12.0, 4.0

# Mean and spread are those of the photograph at about this shorter side in pixels:
# coarse enough that neither noise nor the loss of fine detail counts.
COARSE = 64

# Clipping shifts what was put right; so often it is done again.
ROUNDS = 3

TINY = 1e-3


class _Light(NamedTuple):
    """A photograph in two parts.

    Attributes:
        luma: float32 (H, W), 0 to 255.
        colour: float32 (3, H, W), the channels less the luma.
    """

    luma: np.ndarray
    colour: np.ndarray


def change(
    image: Image.Image, attribute: str, level: float, seed: int = 0
) -> Image.Image:
    """A copy of a photograph in which one attribute is another.

    Args:
        image: RGB.
        attribute: one of `ATTRIBUTES`.
        level: in [-1, 1]. 0 returns the photograph unchanged, below it gets worse:
            blur, darker, less contrast, paler, noise (grey, the same in all channels);
            above it gets more of the good side: unsharp mask, brighter, more contrast,
            more colour.
        seed: of noise.

    Returns:
        RGB, of the same size.

    Raises:
        ValueError: if there is no such attribute, the level is outside [-1, 1], or the
            level of `noisiness` is above 0: nobody can take noise away by a level.
    """
    if attribute not in ATTRIBUTES:
        raise ValueError(
            f'`attribute` must be one of {", ".join(ATTRIBUTES)}, but got '
            f'{attribute!r}.'
        )
    if not -1 <= level <= 1:
        raise ValueError(f'`level` must be in [-1, 1], but got {level}.')
    if attribute == 'noisiness' and level > 0:
        raise ValueError(f'`level` of noisiness must be in [-1, 0], but got {level}.')
    if level == 0:
        return image
    if attribute == 'noisiness':
        return _noise(image, level, seed)
    return _CHANGES[attribute](image, level)


def random_level(attribute: str, rng: np.random.Generator) -> float:
    """A level of `change`, drawn evenly from the lowest to the highest."""
    lowest, *_, highest = LEVELS[attribute]
    return float(rng.uniform(lowest, highest))


def order_agreement(values: Sequence[float]) -> float:
    """How well values along a series keep its order.

    Args:
        values: one for each level of a series, in ascending order of the levels.

    Returns:
        Spearman's rank correlation in [-1, 1]; 0 where all values are equal.

    Raises:
        ValueError: if there are fewer than two values, or one is no finite number.
    """
    series = np.asarray(values, float)
    if series.ndim != 1 or len(series) < 2 or not np.isfinite(series).all():
        raise ValueError(
            f'`values` must be two or more finite numbers, but got {values!r}.'
        )
    if (series == series[0]).all():
        return 0.0
    return float(spearmanr(series, range(len(series))).statistic)


def _sharpness(image: Image.Image, level: float) -> Image.Image:
    if level < 0:
        changed = degrade(image, 'gaussian_blur', -BLUR * level)
    else:
        radius = UNSHARP_RADIUS * min(image.size) / 512
        percent = round(UNSHARP_PERCENT * level)
        changed = image.filter(ImageFilter.UnsharpMask(radius, percent, threshold=0))
    light, original = _parts(changed), _parts(image)
    return _image(_like(light.luma, original.luma), light.colour, original.colour)


def _brightness(image: Image.Image, level: float) -> Image.Image:
    light = _parts(image)
    base = _base(light.luma)
    toned = 255 * (base.clip(0, 255) / 255) ** (GAMMA**-level)
    _, spread = _mean_and_spread(light.luma)
    luma = _toned(light.luma, base, toned, float(toned.mean()), spread)
    return _image(luma, light.colour, light.colour)


def _contrast(image: Image.Image, level: float) -> Image.Image:
    light = _parts(image)
    base = _base(light.luma)
    mean, spread = _mean_and_spread(light.luma)
    factor = (MORE_CONTRAST if level > 0 else LESS_CONTRAST) ** abs(level)
    toned = mean + factor * (base - mean)
    luma = _toned(light.luma, base, toned, float(mean), factor * spread)
    return _image(luma, light.colour, light.colour)


def _toned(
    luma: np.ndarray, base: np.ndarray, toned: np.ndarray, mean: float, spread: float
) -> np.ndarray:
    """Luma whose base became `toned`, with this mean and spread; grain as it was."""
    toned = _like(toned, luma, mean=mean, spread=spread)
    return _like(toned + luma - base, luma, mean=mean, spread=spread)


def _colorfulness(image: Image.Image, level: float) -> Image.Image:
    light = _parts(image)
    return _image(light.luma, (1 + SATURATION * level) * light.colour)


def _noise(image: Image.Image, level: float, seed: int) -> Image.Image:
    light = _parts(image)
    noise = np.random.default_rng(seed).standard_normal(light.luma.shape, np.float32)
    lowest = -light.colour.min(axis=0)
    highest = 255 - light.colour.max(axis=0)
    luma = _like(
        light.luma - NOISE * level * noise, light.luma, limits=(lowest, highest)
    )
    return _image(luma, light.colour)


_CHANGES: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    'sharpness': _sharpness,
    'brightness': _brightness,
    'contrast': _contrast,
    'colorfulness': _colorfulness,
}


def _parts(image: Image.Image) -> _Light:
    pixels = np.asarray(image).transpose(2, 0, 1).astype(np.float32, order='C')
    luma = np.tensordot(LUMA, pixels, axes=1)
    return _Light(luma, pixels - luma)


def _base(luma: np.ndarray) -> np.ndarray:
    """Luma without grain and texture, edges as they are: He et al.'s guided filter."""
    side = 2 * max(1, round(BASE_RADIUS * min(luma.shape) / 512)) + 1

    def mean(values: np.ndarray) -> np.ndarray:
        result: np.ndarray = uniform_filter(values, side, mode='nearest')
        return result

    average = mean(luma)
    variance = (mean(luma**2) - average**2).clip(0)
    share = variance / (variance + GRAIN**2)
    return mean(share) * luma + mean(average - share * average)


def _image(
    luma: np.ndarray, colour: np.ndarray, like: np.ndarray | None = None
) -> Image.Image:
    """The two parts as a photograph.

    Colour that can't be shown gets paler; with `like`, the rest gets richer for it.
    """
    luma = luma.clip(0, 255)
    for _ in range(ROUNDS if like is not None else 1):
        if like is not None:
            colour = _like(colour, like)
        above = (255 - luma) / colour.max(axis=0).clip(TINY)
        below = luma / (-colour.min(axis=0)).clip(TINY)
        colour = np.minimum(np.minimum(above, below), 1) * colour
    pixels = (luma + colour).round().clip(0, 255).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def _like(
    values: np.ndarray,
    original: np.ndarray,
    *,
    mean: float | None = None,
    spread: float | None = None,
    limits: tuple[float | np.ndarray, float | np.ndarray] = (0.0, 255.0),
) -> np.ndarray:
    """Luma or colour whose coarse mean and spread are the original's, or those given.

    As far as the limits of luma allow it.
    """
    wanted = _mean_and_spread(original)
    wanted_mean = wanted[0] if mean is None else mean
    wanted_spread = wanted[1] if spread is None else spread
    is_luma = values.ndim == 2
    for _ in range(ROUNDS if is_luma else 1):
        found_mean, found_spread = _mean_and_spread(values)
        factor = wanted_spread / found_spread if found_spread > 1e-3 else 1
        values = wanted_mean + factor * (values - found_mean)
        if is_luma:
            values = values.clip(*limits)
    return values


def _mean_and_spread(values: np.ndarray) -> tuple[np.ndarray, float]:
    """Mean, a number or (3, 1, 1) of colour, and deviation of means of squares."""
    *_, height, width = values.shape
    side = max(1, min(height, width) // COARSE)
    rows, columns = height // side, width // side
    # One side after the other is five times faster than both at once.
    bands = values[..., : rows * side, :].reshape(*values.shape[:-2], rows, side, width)
    narrow = bands.mean(axis=-2)[..., : columns * side]
    squares = narrow.reshape(*values.shape[:-2], rows, columns, side).mean(axis=-1)
    spread = squares.std(axis=(-2, -1))
    mean = values.mean(axis=(-2, -1), keepdims=values.ndim == 3)
    return mean, float(np.linalg.norm(spread))
