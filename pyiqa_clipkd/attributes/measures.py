"""Classical measures of the five attributes: no network, no weights.

All photographs are measured at one scale, for sharpness and noise depend on it: those
whose shorter side has more than 512 pixels are reduced to it first. So what counts is
what a person sees who looks at the whole photograph, and the scale is the one that
`degradations` has, too. Smaller photographs stay as they are.
"""

from __future__ import annotations

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter, uniform_filter

from pyiqa_clipkd.images import UnreadableError

# Changes with what is measured: labels of two versions don't belong together.
VERSION = 1

# The shorter side in pixels: of what is measured at most, of where contrast and colour
# are measured, which neither noise nor fine detail reaches, and of what can't be. Of
# panoramas the longer side has a limit, too.
SCALE, COARSE, LEAST, LONGEST = 512, 64, 32, 4096

# Sharpness compares the slopes of edges after two blurs, with sigmas in pixels. Edges
# are the share of pixels whose coarse slope stands out most from the mean of the square
# around, of so many pixels a side; there must be some slope at all, squared, in grey
# levels a pixel.
FINE, BROAD, EDGES, AROUND, FLAT = 1.0, 3.0, 0.01, 41, 4.0

# Noise is measured at half the size, which JPEG leaves alone more than the finest
# detail, in squares of so many pixels a side. Most of these have detail, too: the share
# of them that is plainest counts. Where light is clipped, so is noise.
SQUARE, PLAIN, CLIPPED = 32, 0.1, (8, 247)

# Of red, green and blue: Rec. 601, as Pillow has it.
LUMA = np.array([0.299, 0.587, 0.114], np.float32)

# The median of a normal distribution's distances from its mean, in its sigma.
MEDIAN_OF_NORMAL = 0.6745


def measure(image: Image.Image) -> dict[str, float]:
    """Raw measures, an attribute each.

    Args:
        image: RGB, at least 32 pixels on each side.

    Returns:
        - `sharpness`: how many times steeper edges are after a blur by 1 pixel than
          after one by 3: 3 for perfect edges, 1 for very blurred ones. Contrast divides
          out, and noise, which has no side, averages out.
        - `brightness`: mean luma, 0 to 255.
        - `contrast`: RMS contrast, the standard deviation of luma, 0 to 127.5, of the
          photograph reduced to a shorter side of 64 pixels.
        - `colorfulness`: Hasler and Suesstrunk's M3, 0 to about 200, at the same size.
        - `noisiness`: standard deviation of the noise in grey levels of 255 (**higher
          is noisier**), from wavelets, in the plainest tenth of the photograph.

    Raises:
        UnreadableError: if the photograph is too small.
    """
    size = image.size
    image = at_scale(image)
    if min(image.size) < LEAST:
        raise UnreadableError(
            f'too small to be measured: {size[0]} x {size[1]} pixels, and each side '
            f'needs {LEAST}, where the longer one has {LONGEST} at most'
        )
    small = _coarse(image)
    luma = np.asarray(image.convert('L'), np.float32)
    return {
        'sharpness': _sharpness(luma),
        'brightness': float(luma.mean()),
        'contrast': float((small @ LUMA).std()),
        'colorfulness': _colorfulness(small),
        'noisiness': _noise(luma),
    }


def at_scale(image: Image.Image) -> Image.Image:
    """The photograph as it is measured, its shorter side with 512 pixels at most."""
    return _reduced(image, min(SCALE / min(image.size), LONGEST / max(image.size)))


def _reduced(image: Image.Image, scale: float) -> Image.Image:
    if scale >= 1:
        return image
    width, height = (max(1, round(scale * side)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BOX)


def _coarse(image: Image.Image) -> np.ndarray:
    """float32 (h, w, 3), 0 to 255."""
    return np.asarray(_reduced(image, COARSE / min(image.size)), np.float32)


def _sharpness(luma: np.ndarray) -> float:
    fine_y, fine_x = _slopes(luma, FINE)
    y, x = _slopes(luma, BROAD)
    steep = y**2 + x**2
    around = uniform_filter(steep, AROUND)
    # What stands out where it is, not all over: light falls differently everywhere.
    standing = steep / (around + FLAT)
    standing[around < FLAT / 4] = 0
    edges = standing >= max(np.quantile(standing, 1 - EDGES), 1e-6)
    if not edges.any():
        return 0.0
    along = fine_y * y + fine_x * x
    return float(np.median(along[edges] / steep[edges]))


def _slopes(luma: np.ndarray, sigma: float) -> tuple[np.ndarray, np.ndarray]:
    return (
        gaussian_filter(luma, sigma, order=(1, 0)),
        gaussian_filter(luma, sigma, order=(0, 1)),
    )


def _colorfulness(pixels: np.ndarray) -> float:
    red, green, blue = np.moveaxis(pixels, -1, 0)
    red_green, yellow_blue = red - green, (red + green) / 2 - blue
    spread = np.hypot(red_green.std(), yellow_blue.std())
    return float(spread + 0.3 * np.hypot(red_green.mean(), yellow_blue.mean()))


def _noise(luma: np.ndarray) -> float:
    import pywt  # type: ignore[import-untyped]

    reduced, (_, _, diagonal), _ = pywt.wavedec2(luma, 'db2', level=2)
    details = np.abs(_squares(diagonal, SQUARE // 4))
    sigmas = np.median(details, axis=1) / MEDIAN_OF_NORMAL
    light = _squares(reduced, SQUARE // 4).mean(axis=1) / 4  # twice a level
    shown = (light > CLIPPED[0]) & (light < CLIPPED[1])
    return float(np.quantile(sigmas[shown] if shown.any() else sigmas, PLAIN))


def _squares(values: np.ndarray, side: int) -> np.ndarray:
    """(H, W) -> (N, side * side): squares that lie side by side."""
    rows, columns = (length // side for length in values.shape)
    whole = values[: rows * side, : columns * side]
    squares = whole.reshape(rows, side, columns, side).swapaxes(1, 2)
    return squares.reshape(-1, side * side)
