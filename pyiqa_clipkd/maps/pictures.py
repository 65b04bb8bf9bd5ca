"""A map as a picture: colours over the photograph, a scale beside it, words below."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

from pyiqa_clipkd.images import upright
from pyiqa_clipkd.maps.windows import QualityMap, Source
from pyiqa_clipkd.names import HIGHEST, LOWEST

# Bad to good: vermilion and blue of Okabe and Ito's colours, which people tell apart
# whatever their colour vision, and a pale middle.
RAMP = ((190, 60, 0), (235, 140, 50), (240, 235, 225), (95, 165, 215), (0, 90, 165))

# Share of the colours in the mixture with the grey photograph.
OPACITY = 0.55

# The least range of the colours, in points: an even photograph should look even.
LEAST_RANGE = 1.0

# Longest side of the photograph in the picture, in pixels, and its least one: words
# must fit below.
SIZE, LEAST_SIZE = 1600, 64

INK, PAPER = (29, 36, 41), (255, 255, 255)


def overlay(
    source: Source, quality: QualityMap, *, size: int = SIZE, caption: str = ''
) -> Image.Image:
    """Draw a map over its photograph.

    Vermilion is bad, blue is good; the scale at the right says which scores they are.
    The colours span the map's own scores, or one point around them where they lie
    closer. Between the centres of the windows they are interpolated. A frame shows the
    worst window.

    Args:
        source: the photograph, as `quality_map` takes it.
        quality: its map.
        size: longest side of the photograph in the picture, in pixels; smaller ones are
            not enlarged.
        caption: words below.

    Raises:
        UnreadableError: if there are no pixels to show.
        ValueError: if `size` is too small, or the map is one of another photograph.
    """
    if type(size) is not int or size < LEAST_SIZE:
        raise ValueError(
            f'`size` must be a whole number >= {LEAST_SIZE}, but got {size!r}.'
        )
    image = upright(source)
    if image.size != (quality.width, quality.height):
        raise ValueError(
            f'`quality` is a map of {quality.width} x {quality.height} pixels, but the '
            f'photograph has {image.width} x {image.height}.'
        )
    scale = min(1, size / max(image.size))
    width, height = (max(1, round(scale * side)) for side in image.size)
    gray = image.resize(
        (width, height), Image.Resampling.LANCZOS, reducing_gap=2
    ).convert('L')
    low, high = colour_range(quality.scores)
    values = (interpolated(quality, width, height) - low) / (high - low)
    mixed = (1 - OPACITY) * np.asarray(gray)[..., None] + OPACITY * colours(values)
    picture = Image.fromarray(mixed.round().astype(np.uint8))
    _frame(picture, quality.worst.box, scale)
    return _with_margins(picture, low, high, caption)


def colour_range(scores: np.ndarray) -> tuple[float, float]:
    """The scores of the first and the last colour."""
    low, high = float(scores.min()), float(scores.max())
    more = max(0.0, LEAST_RANGE - (high - low)) / 2
    low, high = low - more, high + more
    beyond = max(LOWEST - low, 0) - max(high - HIGHEST, 0)
    return low + beyond, high + beyond


def interpolated(quality: QualityMap, width: int, height: int) -> np.ndarray:
    """float (height, width): scores between the windows' centres, linearly.

    Beyond the outermost centres they stay as they are.
    """
    rows = _weights(quality.tops, quality.window, quality.height, height)
    columns = _weights(quality.lefts, quality.window, quality.width, width)
    return rows @ quality.scores.astype(np.float64) @ columns.T


def _weights(begin: np.ndarray, window: int, length: int, pixels: int) -> np.ndarray:
    """(pixels, windows): what each window counts for each pixel; the rows sum to 1."""
    end = np.minimum(begin + window, length)
    centres = (begin + end) / 2 * pixels / length
    at = np.arange(pixels) + 0.5
    return np.stack([np.interp(at, centres, one) for one in np.eye(len(begin))], axis=1)


def colours(values: np.ndarray) -> np.ndarray:
    """Colours of values in [0, 1]: float (..., 3) in [0, 255]."""
    at = np.linspace(0, 1, len(RAMP))
    bands = np.transpose(RAMP)
    return np.stack([np.interp(values, at, band) for band in bands], axis=-1)


def _frame(picture: Image.Image, box: tuple[int, int, int, int], scale: float) -> None:
    """Black and white, to be seen on everything."""
    width = max(1, max(picture.size) // 300)
    left, top, right, bottom = (round(scale * side) for side in box)
    draw = ImageDraw.Draw(picture)
    inner = (left, top, max(left, right - 1), max(top, bottom - 1))
    draw.rectangle(inner, outline=INK, width=3 * width)
    if min(right - left, bottom - top) > 6 * width:
        inner = (left + width, top + width, right - 1 - width, bottom - 1 - width)
        draw.rectangle(inner, outline=PAPER, width=width)


def _with_margins(
    picture: Image.Image, low: float, high: float, caption: str
) -> Image.Image:
    """The scale at the right, the words below."""
    text = max(12, max(picture.size) // 50)
    font = _font(text)
    gap, bar = text, 2 * text
    lines = _wrapped(caption, font, picture.width + 2 * gap + bar)
    height = max(picture.height, 6 * text)
    page = Image.new(
        'RGB',
        (picture.width + 6 * text, height + (len(lines) * 3 * text) // 2 + 2 * gap),
        PAPER,
    )
    page.paste(picture, (0, gap))
    left, bottom = picture.width + gap, gap + height
    ramp = colours(np.linspace(1, 0, height))[:, None].repeat(bar, 1)
    page.paste(Image.fromarray(ramp.round().astype(np.uint8)), (left, gap))
    draw = ImageDraw.Draw(page)
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = bottom - round(share * (height - 1)) - 1
        draw.line((left + bar, y, left + bar + text // 3, y), INK)
        value = f'{low + share * (high - low):.2f}'
        place = (left + bar + text // 2, y)
        draw.text(place, value, INK, font, anchor='lm')
    for number, line in enumerate(lines):
        place = (gap, bottom + gap // 2 + number * 3 * text // 2)
        draw.text(place, line, INK, font)
    return page


def _wrapped(
    words: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> list[str]:
    lines: list[str] = []
    for word in words.split():
        longer = f'{lines[-1]} {word}' if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    if features.check('freetype2'):
        return ImageFont.load_default(size)
    return ImageFont.load_default()
