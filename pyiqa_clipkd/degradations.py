"""Controlled damage to photographs: what is worse must score lower."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageFilter


def blur(image: Image.Image, sigma: float) -> Image.Image:
    """Gaussian blur; `sigma` in pixels."""
    return image.filter(ImageFilter.GaussianBlur(sigma))


def white_noise(image: Image.Image, sigma: float, seed: int = 0) -> Image.Image:
    """Gaussian noise on each channel; `sigma` in grey levels of 255."""
    pixels = np.asarray(image, np.float32)
    noise = np.random.default_rng(seed).normal(0, sigma, pixels.shape)
    return Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    """JPEG compression; `quality` from 1 to 95."""
    file = io.BytesIO()
    image.save(file, 'JPEG', quality=quality)
    return Image.open(file).convert('RGB')


# Plain damage that people see at once: sigma of 1/150 of the longer side, sigma of 30
# grey levels, quality 8.
PLAIN = {
    'blur': lambda image: blur(image, max(image.size) / 150),
    'noise': lambda image: white_noise(image, 30),
    'jpeg': lambda image: jpeg(image, 8),
}
