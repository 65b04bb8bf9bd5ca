"""Photographs small enough to be inside a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from pyiqa_clipkd.images import UnreadableError, read_photograph

SIDE = 192  # pixels, the longer side
QUALITY = 82

# A data URI, or why there is none.
Thumbnail = tuple[str | None, str]


def make_thumbnail(path: Path) -> Thumbnail:
    """A photograph as JPEG in a data URI and '', or `None` and what is wrong."""
    try:
        image = read_photograph(path).image
    except UnreadableError as error:
        return None, str(error)
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, 'JPEG', quality=QUALITY, comment=b'')
    code = base64.b64encode(file.getvalue()).decode('ascii')
    return f'data:image/jpeg;base64,{code}', ''


def make_thumbnails(paths: Iterable[Path]) -> dict[Path, Thumbnail]:
    """Thumbnails of several photographs, each made once."""
    different = list(dict.fromkeys(paths))
    with ThreadPoolExecutor() as pool:
        return dict(zip(different, pool.map(make_thumbnail, different), strict=True))
