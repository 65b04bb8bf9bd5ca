"""Controlled damage to photographs: what is worse must score lower."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter
from scipy.ndimage import uniform_filter1d

LEVELS = 6


def blur(image: Image.Image, sigma: float) -> Image.Image:
    """Gaussian blur; `sigma` in pixels."""
    return image.filter(ImageFilter.GaussianBlur(sigma))


def motion_blur(image: Image.Image, length: float) -> Image.Image:
    """Blur along the longer side; `length` of the trace in pixels."""
    whole = int(length)
    along = 1 if image.width >= image.height else 0
    pixels = np.asarray(image, np.float32)
    # Between two whole lengths, a mean of both.
    short, long = (
        uniform_filter1d(pixels, max(1, n), axis=along, mode='nearest')
        for n in (whole, whole + 1)
    )
    return _image(short + (length - whole) * (long - short))


def white_noise(image: Image.Image, sigma: float, seed: int = 0) -> Image.Image:
    """Gaussian noise on each channel; `sigma` in grey levels of 255."""
    pixels = np.asarray(image, np.float32)
    noise = np.random.default_rng(seed).standard_normal(pixels.shape, np.float32)
    return _image(pixels + sigma * noise)


def jpeg(image: Image.Image, quality: float) -> Image.Image:
    """JPEG compression; `quality` from 1 to 95."""
    return coded(image, 'JPEG', quality=round(quality))


def jpeg2000(image: Image.Image, ratio: float) -> Image.Image:
    """JPEG 2000 compression to one `ratio`-th of the pixels' bytes."""
    return coded(image, 'JPEG2000', quality_mode='rates', quality_layers=[ratio])


def down_up(image: Image.Image, factor: float) -> Image.Image:
    """Reduce by `factor` >= 1 and enlarge again, both bicubic."""
    width, height = (max(1, round(side / factor)) for side in image.size)
    bicubic = Image.Resampling.BICUBIC
    return image.resize((width, height), bicubic).resize(image.size, bicubic)


def exposure(image: Image.Image, stops: float) -> Image.Image:
    """Exposed by `stops` more (negative: less), in linear light, clipped."""
    linear = (np.asarray(image, np.float32) / 255) ** 2.2
    return _image(255 * (linear * 2.0**stops).clip(0, 1) ** (1 / 2.2))


def less_contrast(image: Image.Image, share: float) -> Image.Image:
    """Pixels move by `share` in [0, 1] of the way to their mean."""
    pixels = np.asarray(image, np.float32)
    return _image(pixels + share * (pixels.mean() - pixels))


def webp(image: Image.Image, quality: float) -> Image.Image:
    """WebP compression; `quality` from 0 to 100."""
    return coded(image, 'WEBP', quality=round(quality))


def pixelate(image: Image.Image, side: float) -> Image.Image:
    """Squares of one colour; `side` in pixels."""
    width, height = (max(1, round(length / side)) for length in image.size)
    small = image.resize((width, height), Image.Resampling.BOX)
    return small.resize(image.size, Image.Resampling.NEAREST)


def impulse_noise(image: Image.Image, share: float, seed: int = 0) -> Image.Image:
    """A `share` of the pixels is black or white."""
    pixels = np.array(image)
    draw = np.random.default_rng(seed).random(pixels.shape[:2])
    pixels[draw < share / 2] = 0
    pixels[draw > 1 - share / 2] = 255
    return Image.fromarray(pixels)


def posterize(image: Image.Image, steps: float) -> Image.Image:
    """Each channel in `steps` + 1 values."""
    pixels = np.asarray(image, np.float32) / 255
    return _image(255 / steps * (steps * pixels).round())


def _image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def coded(image: Image.Image, form: str, **options: object) -> Image.Image:
    """Written as a file of Pillow's format `form` and read again."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return Image.open(file).convert('RGB')


class Distortion(NamedTuple):
    """A kind of damage in graded strength.

    Attributes:
        damage: (image, strength) -> image.
        none: the strength that changes nothing, where the scale begins.
        strengths: at levels 1 to 6, mild to severe.
        in_pixels: strengths are lengths in a photograph whose shorter side has 512
            pixels; they grow with it.
        random: it takes a seed.
    """

    damage: Callable[..., Image.Image]
    none: float
    strengths: tuple[float, ...]
    in_pixels: bool = False
    random: bool = False


DISTORTIONS = {
    'gaussian_blur': Distortion(blur, 0, (0.8, 1.3, 2, 3, 4.5, 6.5), in_pixels=True),
    'motion_blur': Distortion(motion_blur, 1, (4, 7, 11, 17, 25, 36), in_pixels=True),
    'white_noise': Distortion(white_noise, 0, (5, 10, 16, 24, 36, 52), random=True),
    'jpeg': Distortion(jpeg, 95, (50, 35, 24, 16, 10, 6)),
    'jpeg2000': Distortion(jpeg2000, 4, (24, 40, 64, 100, 160, 250)),
    'down_up': Distortion(down_up, 1, (1.7, 2.3, 3, 4, 5.5, 8)),
    'underexposure': Distortion(exposure, 0, (-0.7, -1.3, -2, -2.8, -3.7, -4.7)),
    'overexposure': Distortion(exposure, 0, (0.5, 0.9, 1.3, 1.8, 2.4, 3.1)),
    'contrast_loss': Distortion(less_contrast, 0, (0.2, 0.36, 0.5, 0.64, 0.77, 0.88)),
}

# Kinds that no training here has seen: what they say of a metric wasn't rehearsed.
UNSEEN_DISTORTIONS = {
    'webp': Distortion(webp, 100, (40, 25, 15, 8, 4, 0)),
    'pixelation': Distortion(pixelate, 1, (2, 3, 4, 6, 8, 12), in_pixels=True),
    'impulse_noise': Distortion(
        impulse_noise, 0, (0.005, 0.01, 0.02, 0.04, 0.08, 0.16), random=True
    ),
    'posterization': Distortion(posterize, 255, (24, 14, 9, 6, 4, 2)),
}

ALL_DISTORTIONS = DISTORTIONS | UNSEEN_DISTORTIONS


def degrade(image: Image.Image, kind: str, level: float, seed: int = 0) -> Image.Image:
    """A damaged copy of an RGB photograph.

    Args:
        image: RGB.
        kind: one of `ALL_DISTORTIONS`.
        level: from 0 (unchanged) to 6 (severe); between whole levels the strength is
            interpolated.
        seed: of noise.

    Raises:
        ValueError: if there is no such kind, or the level is outside [0, 6].
    """
    if kind not in ALL_DISTORTIONS:
        raise ValueError(
            f'`kind` must be one of {", ".join(ALL_DISTORTIONS)}, but got {kind!r}.'
        )
    if not 0 <= level <= LEVELS:
        raise ValueError(f'`level` must be in [0, {LEVELS}], but got {level}.')
    if level == 0:
        return image
    distortion = ALL_DISTORTIONS[kind]
    scale = [distortion.none, *distortion.strengths]
    strength = float(np.interp(level, range(LEVELS + 1), scale))
    if distortion.in_pixels:
        strength *= min(image.size) / 512
    seeds = (seed,) if distortion.random else ()
    return distortion.damage(image, strength, *seeds)


# Plain damage that people see at once: sigma of 1/150 of the longer side, sigma of 30
# grey levels, quality 8.
PLAIN = {
    'blur': lambda image: blur(image, max(image.size) / 150),
    'noise': lambda image: white_noise(image, 30),
    'jpeg': lambda image: jpeg(image, 8),
}
