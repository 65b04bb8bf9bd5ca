"""Photographs small enough to be inside a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from pyiqa_clipkd.images import UnreadableError, from_image, read_photograph

SIDE = 192  # pixels, the longer side
QUALITY = 82

# Photographs at a time: of those that aren't JPEGs each is decoded as a whole.
WORKERS = 2

# A data URI, or why there is none.
Thumbnail = tuple[str | None, str]


def make_thumbnail(path: Path) -> Thumbnail:
    """A photograph as JPEG in a data URI and '', or `None` and what is wrong."""
    try:
        image = _read(path)
    except UnreadableError as error:
        return None, str(error)
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, 'JPEG', quality=QUALITY, comment=b'')
    code = base64.b64encode(file.getvalue()).decode('ascii')
    return f'data:image/jpeg;base64,{code}', ''


def _read(path: Path) -> Image.Image:
    """A photograph; of a JPEG an eighth at least, if that is large enough.

    48 megapixels would take 200 MB, and half a second to decode.
    """
    try:
        if path.is_file():  # a pipe would be waited for
            with Image.open(path, formats=('JPEG',)) as image:
                image.draft('RGB', (2 * SIDE, 2 * SIDE))
                return from_image(image).image
    except Exception:  # another format, or damaged: the other way says what it is
        pass
    return read_photograph(path).image


def make_thumbnails(paths: Iterable[Path]) -> dict[Path, Thumbnail]:
    """Thumbnails of several photographs, each made once."""
    different = list(dict.fromkeys(paths))
    with ThreadPoolExecutor(WORKERS) as pool:
        return dict(zip(different, pool.map(make_thumbnail, different), strict=True))
