"""The five attributes that SPAQ annotates: their names and words, as pure data.

All values are in [0, 1], and 1 is always the good side, as SPAQ annotates: sharp,
bright, rich in contrast, colourful, and **free of noise**: `noisiness` 1 means clean.
"""

from __future__ import annotations

ATTRIBUTES = ('sharpness', 'brightness', 'contrast', 'colorfulness', 'noisiness')

# Attribute -> the word of its low side and of its high side.
WORDS: dict[str, tuple[str, str]] = {
    'sharpness': ('blurred', 'sharp'),
    'brightness': ('too dark', 'bright'),
    'contrast': ('flat', 'rich in contrast'),
    'colorfulness': ('pale', 'colourful'),
    'noisiness': ('noisy', 'clean'),
}
