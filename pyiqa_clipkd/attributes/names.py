"""The five attributes that SPAQ annotates: their names and words, as pure data.

All values are in [0, 1], and 1 is always the good side, as SPAQ annotates: sharp,
bright, rich in contrast, colourful, and **free of noise**: `noisiness` 1 means clean.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

ATTRIBUTES = ('sharpness', 'brightness', 'contrast', 'colorfulness', 'noisiness')

# Attribute -> the word of its low side and of its high side.
WORDS: dict[str, tuple[str, str]] = {
    'sharpness': ('blurred', 'sharp'),
    'brightness': ('too dark', 'bright'),
    'contrast': ('flat', 'rich in contrast'),
    'colorfulness': ('pale', 'colourful'),
    'noisiness': ('noisy', 'clean'),
}

# A value below is a fault, and has the word of its low side. Of 950 photographs of
# BIQ2021, whose mean human score is 3.6, those below have 2.3 (sharpness; 5 % of all),
# 3.2 (brightness; 9 %), 3.0 (contrast; 7 %) and 3.2 (colorfulness; 3 %). Noise that
# shows in the measure is rare there (1 %) and went unpunished.
LOW = {
    'sharpness': 0.2,
    'brightness': 0.1,
    'contrast': 0.1,
    'colorfulness': 0.1,
    'noisiness': 0.2,
}


def named_attributes(values: Iterable[float]) -> dict[str, float]:
    """(5,) in the order of `ATTRIBUTES` -> attribute -> value."""
    return dict(zip(ATTRIBUTES, map(float, values), strict=True))


def faults(values: Mapping[str, float]) -> list[str]:
    """What is wrong with a photograph, in words.

    Args:
        values: attribute -> its value in [0, 1]; those that are missing have none.

    Returns:
        The low words of the attributes below `LOW`, in the order of `ATTRIBUTES`:
        `['blurred', 'too dark']`; of an empty list all is well.
    """
    return [WORDS[name][0] for name in ATTRIBUTES if values.get(name, 1) < LOW[name]]
