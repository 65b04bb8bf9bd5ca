"""How Pillow reads many photographs: its memory, and what it need not say."""

from __future__ import annotations

import os
import warnings

# Pillow reads these when it is imported. Up to 256 MB of what decoded photographs took
# are kept for the next ones: decoding 12 megapixels takes half the time so. Of blocks
# this large the rest goes back to the system at once.
PILLOW_MEMORY = {'PILLOW_BLOCKS_MAX': '4', 'PILLOW_BLOCK_SIZE': '64m'}


def prepare_pillow() -> None:
    """For this process; before Pillow is imported, which reads its memory's size."""
    for name, value in PILLOW_MEMORY.items():
        os.environ.setdefault(name, value)
    from PIL import Image

    # Of damaged metadata and the like: what matters is in the rows.
    warnings.filterwarnings('ignore', module='PIL')
    warnings.filterwarnings('ignore', category=Image.DecompressionBombWarning)
