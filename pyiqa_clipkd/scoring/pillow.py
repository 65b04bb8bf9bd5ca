"""How Pillow reads many photographs: its memory, and what it need not say."""

from __future__ import annotations

import os
import warnings

# Pillow reads these when it is imported. Up to 256 MB of what decoded photographs took
# are kept for the next ones: decoding 12 megapixels takes half the time so. Of blocks
# this large the rest goes back to the system at once.
PILLOW_MEMORY = {'PILLOW_BLOCKS_MAX': '4', 'PILLOW_BLOCK_SIZE': '64m'}


def check_megapixels(megapixels: float | None) -> None:
    """Of `--max-megapixels`.

    Raises:
        ValueError: if it can't be meant.
    """
    if megapixels is not None and not 1e-6 <= megapixels < 1e6:
        raise ValueError(f'`--max-megapixels` must be above 0, but got {megapixels:g}.')


def check_seconds(seconds: float | None) -> None:
    """Of `--max-seconds`.

    Raises:
        ValueError: if it can't be meant.
    """
    if seconds is not None and not 0 < seconds < 1e6:
        raise ValueError(f'`--max-seconds` must be above 0, but got {seconds:g}.')


def most_pixels(megapixels: float | None) -> int:
    """The largest photographs that are read in this process; `None`: by default."""
    from pyiqa_clipkd.images import MAX_PIXELS

    if megapixels is None:
        return MAX_PIXELS
    return allow_pixels(int(1e6 * megapixels))


def allow_pixels(pixels: int) -> int:
    """Let Pillow read so many in this process."""
    from PIL import Image

    from pyiqa_clipkd.images import MAX_PIXELS

    if pixels > MAX_PIXELS:
        Image.MAX_IMAGE_PIXELS = pixels
    return pixels


def prepare_pillow() -> None:
    """For this process; before Pillow is imported, which reads its memory's size."""
    for name, value in PILLOW_MEMORY.items():
        os.environ.setdefault(name, value)
    from PIL import Image

    # Of damaged metadata and the like: what matters is in the rows.
    warnings.filterwarnings('ignore', module='PIL')
    warnings.filterwarnings('ignore', category=Image.DecompressionBombWarning)
