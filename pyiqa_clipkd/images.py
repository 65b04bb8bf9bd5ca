"""Files to pixels: what is in a file, and the squares that a network looks at.

Numpy and Pillow only. The squares are those of `preprocessing`, in float: a resize in
eight bits, as Pillow's own, would move scores by 0.01 in the median and 0.14 at most.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageFile, ImageOps

from pyiqa_clipkd.geometry import centre, crop_corners, resized_shape, strip_shape
from pyiqa_clipkd.opening import MAX_PIXELS, UnreadableError, open_image, reason

# The orientation in a photograph's EXIF, and its values for one that is upright or not.
ORIENTATION, UPRIGHT, ROTATED = 0x0112, 1, range(2, 9)

# The largest value of eight bits: of a colour, and of what is opaque.
BYTE = 255
WHITE, OVER_WHITE = (BYTE, BYTE, BYTE, BYTE), 'alpha over white'
SIXTEEN_TO_EIGHT = 257  # 65535 / 255
SIXTEEN_BIT = ('I;16', 'I;16L', 'I;16B', 'I;16N', 'I')

# Bicubic kernel: its parameter and its reach, as in Pillow and in torch's `antialias`.
CUBIC, REACH = -0.5, 2.0

# Output pixels of one matrix product, and input rows of it.
BLOCK, BAND = 16, 64

# Rows that are converted to RGB at once.
ROWS = 512


class _Strictly:
    """While any thread is inside, Pillow reports truncated files.

    pyiqa asks it to fill them up with gray, for the whole process: half a photograph
    would get a score.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside = 0
        self.before = False

    def __enter__(self) -> None:
        with self.lock:
            if not self.inside:
                self.before = ImageFile.LOAD_TRUNCATED_IMAGES
                ImageFile.LOAD_TRUNCATED_IMAGES = False
            self.inside += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                ImageFile.LOAD_TRUNCATED_IMAGES = self.before


_STRICT = _Strictly()


class Photograph(NamedTuple):
    """What was in a file.

    Attributes:
        image: RGB, eight bits, upright.
        width, height: in pixels, upright.
        format: Pillow's name of the file format, for instance `JPEG`.
        notes: what had to be done to get there, for instance `alpha over white`.
    """

    image: Image.Image
    width: int
    height: int
    format: str
    notes: tuple[str, ...]


def read_photograph(
    source: str | Path | BinaryIO, *, max_pixels: int = MAX_PIXELS
) -> Photograph:
    """Read an image file of one of the `FORMATS`.

    Of several frames the first is taken, transparency is laid over white, CMYK and
    palettes become RGB, 16 bits become 8, EXIF's rotation is carried out. Colour
    profiles are ignored, as everywhere in this field.

    Args:
        source: a path, or an open binary file.
        max_pixels: larger images are refused before they are decoded, as are files
            that are too large for so many pixels. Time has no bound here: see
            `scoring.isolated`.

    Raises:
        UnreadableError: if there is nothing to score, with the reason.
    """
    try:
        # From the start: what is skipped in a PNG is decided when it is opened.
        with _STRICT, open_image(source, max_pixels=max_pixels) as image:
            return _decoded(image, max_pixels)
    except UnreadableError:
        raise
    except Exception as error:  # damaged files raise whatever the decoder stumbled on
        raise UnreadableError(reason(source, error)) from error


def _decoded(image: Image.Image, max_pixels: int) -> Photograph:
    if not image.width * image.height:
        raise UnreadableError(f'no pixels: {image.width} x {image.height}')
    if image.width * image.height > max_pixels:
        raise UnreadableError(
            f'too large: {image.width} x {image.height} pixels, more than '
            f'{max_pixels / 1e6:g} megapixels'
        )
    return from_image(image)


def upright(source: str | Path | BinaryIO | Image.Image) -> Image.Image:
    """The photograph that is meant, in RGB.

    Raises:
        UnreadableError: if there are no pixels to score.
    """
    if isinstance(source, Image.Image):
        return from_image(source).image
    return read_photograph(source).image


def from_image(image: Image.Image) -> Photograph:
    """What Pillow has opened, upright and in RGB.

    Raises:
        UnreadableError: if there are no pixels to score.
    """
    notes = ['first frame'] if getattr(image, 'is_animated', False) else []
    file_format = image.format or '?'
    rotated = _is_rotated(image)  # of a TIFF that loading turns upright by itself
    with _STRICT:
        image.load()
    if _is_rotated(image):
        image, rotated = ImageOps.exif_transpose(image), True
    notes += ['rotated by EXIF'] if rotated else []
    image, note = _rgb(image)
    notes += [note] if note else []
    return Photograph(image, image.width, image.height, file_format, tuple(notes))


def _is_rotated(image: Image.Image) -> bool:
    return image.getexif().get(ORIENTATION, UPRIGHT) in ROTATED


def _rgb(image: Image.Image) -> tuple[Image.Image, str]:
    """The image as RGB, and what had to be done for it."""
    if image.mode == 'RGB' and 'transparency' not in image.info:
        return image, ''
    if image.mode in SIXTEEN_BIT:
        return _in_bands(image, _eight_bits), '16 bit'
    if image.mode == 'F':
        raise UnreadableError('floating-point pixels, whose range is unknown')
    if image.has_transparency_data:
        if image.mode != 'RGBA':
            image = image.convert('RGBA')
        if image.getchannel('A').getextrema()[0] != BYTE:
            return _in_bands(image, _over_white), OVER_WHITE
    note = image.mode if image.mode in ('CMYK', 'LAB', 'HSV') else ''
    return image.convert('RGB'), note


def _in_bands(
    image: Image.Image, to_rgb: Callable[[Image.Image], Image.Image]
) -> Image.Image:
    """`to_rgb` some rows at a time: it takes several copies of what it is given."""
    result = Image.new('RGB', image.size)
    for top in range(0, image.height, ROWS):
        box = (0, top, image.width, min(top + ROWS, image.height))
        result.paste(to_rgb(image.crop(box)), box)
    return result


def _eight_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.float32) / SIXTEEN_TO_EIGHT
    gray = Image.fromarray(values.round().clip(0, BYTE).astype(np.uint8))
    return gray.convert('RGB')


def _over_white(image: Image.Image) -> Image.Image:
    white = Image.new('RGBA', image.size, WHITE)
    return Image.alpha_composite(white, image).convert('RGB')


def squares(image: Image.Image, size: int, *, crops: int = 0) -> np.ndarray:
    """What a network with this input size looks at.

    Args:
        image: RGB.
        size: side of the squares in pixels.
        crops: squares of the photograph as it is, beside the whole of it.

    Returns:
        float32 (1 + K, 3, size, size) in [0, 1]: first the central square of the whole,
        its shorter side resized (as `preprocessing.resize_and_crop`), then K native
        crops (as `preprocessing.native_crops`): `crops` of them, or none where one
        square fills the photograph.
    """
    views = [_whole(image, size)]
    side = min(size, *image.size)
    if not side == image.width == image.height:
        for top, left in crop_corners(image.height, image.width, side, crops):
            crop = image.crop((left, top, left + side, top + side))
            views.append(_whole(crop, size))
    return np.stack(views)


def _whole(image: Image.Image, size: int) -> np.ndarray:
    """float32 (3, size, size) in [0, 1]."""
    rows, columns = strip_shape(image.height, image.width)
    if (rows, columns) != (image.height, image.width):
        top, left = centre(image.height, rows), centre(image.width, columns)
        image = image.crop((left, top, left + columns, top + rows))
    if min(rows, columns) == size:
        top, left = centre(rows, size), centre(columns, size)
        image = image.crop((left, top, left + size, top + size))
        pixels = np.asarray(image).astype(np.float32) / BYTE
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))
    height, width = resized_shape(rows, columns, size)
    across = _Resampling(columns, width, centre(width, size), size)
    down = _Resampling(rows, height, centre(height, size), size)
    narrow = _fewer_columns(image, across, down)
    result = np.empty((3, size, size), np.float32)
    for block in down.blocks:
        used = narrow[:, block.begin - down.begin : block.end - down.begin]
        np.matmul(block.weights, used, out=result[:, block.out])
    return result.clip(0, 1, out=result)


def _fewer_columns(
    image: Image.Image, across: _Resampling, down: _Resampling
) -> np.ndarray:
    """float32 (3, rows that `down` needs, size) in [0, 1].

    Some rows at a time, which stay in the processor's cache: faster than all at once,
    and no further copy of a large photograph is made.
    """
    columns = across.end - across.begin
    narrow = np.empty((3, down.end - down.begin, across.count), np.float32)
    # The same memory for all bands: threads would wait for each other over more.
    band = Image.new('RGB', (columns, BAND))
    values = np.empty((3, BAND, columns), np.float32)
    result = np.empty((3 * BAND, across.count), np.float32)
    for top in range(down.begin, down.end, BAND):
        band.paste(image, (-across.begin, -top))
        values[...] = np.asarray(band).transpose(2, 0, 1)
        lines = values.reshape(3 * BAND, columns)
        for block in across.blocks:
            used = lines[:, block.begin - across.begin : block.end - across.begin]
            np.matmul(used, block.weights.T, out=result[:, block.out])
        result /= BYTE
        result.clip(0, 1, out=result)
        rows = slice(top - down.begin, min(top + BAND, down.end) - down.begin)
        narrow[:, rows] = result.reshape(3, BAND, -1)[:, : rows.stop - rows.start]
    return narrow


class _Block(NamedTuple):
    """Some pixels of a result, and those before from `begin` to `end` that decide them.

    The weights are float32 (pixels of the result, end - begin).
    """

    out: slice
    begin: int
    end: int
    weights: np.ndarray


class _Resampling:
    """A bicubic resize along one side, of which some pixels are wanted.

    Args:
        old: pixels of the side before.
        new: pixels after.
        first: the first pixel of the result that is wanted.
        count: how many are wanted.

    Attributes:
        blocks: the work, some pixels of the result at a time.
        begin, end: the pixels before that decide all of these.
    """

    def __init__(self, old: int, new: int, first: int, count: int) -> None:
        self.count = count
        scale = max(old / new, 1)
        centres = (np.arange(first, first + count) + 0.5)[:, None] * (old / new)
        begin = np.maximum((centres - REACH * scale + 0.5).astype(int), 0)
        end = np.minimum((centres + REACH * scale + 0.5).astype(int), old)
        self.begin, self.end = int(begin[0, 0]), int(end[-1, 0])
        self.blocks = []
        for number in range(0, count, BLOCK):
            out = slice(number, min(number + BLOCK, count))
            at = np.arange(begin[out][0, 0], end[out][-1, 0])
            weights = _cubic((at - centres[out] + 0.5) / scale)
            weights *= (at >= begin[out]) & (at < end[out])
            weights /= weights.sum(1, keepdims=True)
            used = int(at[0]), int(at[-1]) + 1
            self.blocks.append(_Block(out, *used, weights.astype(np.float32)))


def _cubic(x: np.ndarray) -> np.ndarray:
    """The bicubic kernel at distances x, in pixels."""
    x = np.abs(x)
    near = ((CUBIC + 2) * x - (CUBIC + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * CUBIC
    return np.where(x < 1, near, np.where(x < REACH, far, 0))
