"""Antonym pairs of prompts for CLIP, one an attribute: candidates, defaults, files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pyiqa_clipkd.attributes.names import ATTRIBUTES
from pyiqa_clipkd.files import written_whole


class Pair(NamedTuple):
    """Two prompts that say the opposite of one attribute.

    Attributes:
        good: of the side whose value is 1: sharp, bright, colourful, free of noise.
        bad: of the side whose value is 0.
    """

    good: str
    bad: str


# The first pair of each attribute is that of CLIP-IQA (Wang, Chan and Loy, "Exploring
# CLIP for Assessing the Look and Feel of Images", AAAI 2023, arXiv 2207.12396), as
# torchmetrics has it, too. The others vary its wording, its template and its words.
CANDIDATES: dict[str, tuple[Pair, ...]] = {
    'sharpness': (
        Pair('Sharp photo.', 'Blurry photo.'),
        Pair('a sharp photo', 'a blurry photo'),
        Pair('a photo in focus', 'a photo out of focus'),
        Pair('a crisp photo', 'a soft photo'),
        Pair('a clear photo', 'a hazy, unclear photo'),
        Pair('a photo with sharp edges', 'a photo with blurred edges'),
        Pair('a photo with fine details', 'a photo without details'),
        Pair('a high resolution photo', 'a low resolution photo'),
        Pair('a photo without blur', 'a photo with strong blur'),
        Pair('a photo of high sharpness', 'a photo of low sharpness'),
    ),
    'brightness': (
        Pair('Bright photo.', 'Dark photo.'),
        Pair('a bright photo', 'a dark photo'),
        Pair('a well lit photo', 'a badly lit photo'),
        Pair('a photo taken in bright light', 'a photo taken in the dark'),
        Pair('a well exposed photo', 'an underexposed photo'),
        Pair('a light photo', 'a gloomy photo'),
        Pair('a brightened photo', 'a darkened photo'),
        Pair('a photo that is bright enough', 'a photo that is too dark'),
        Pair('a photo of high brightness', 'a photo of low brightness'),
    ),
    'contrast': (
        Pair('High contrast photo.', 'Low contrast photo.'),
        Pair('a high contrast photo', 'a low contrast photo'),
        Pair('a photo with strong contrast', 'a photo with weak contrast'),
        Pair('a photo rich in contrast', 'a flat photo'),
        Pair('a punchy photo', 'a washed out photo'),
        Pair('a clear photo', 'a foggy photo'),
        Pair('a photo with deep blacks and bright whites', 'a photo all in grey'),
        Pair('a photo with a wide range of tones', 'a photo with a flat tone'),
        Pair('a photo of high contrast', 'a photo without contrast'),
    ),
    'colorfulness': (
        Pair('Colorful photo.', 'Dull photo.'),
        Pair('a colorful photo', 'a dull photo'),
        Pair('a colorful photo', 'a colorless photo'),
        Pair('a color photo', 'a black and white photo'),
        Pair('a photo with vivid colors', 'a photo with faded colors'),
        Pair('a photo with vibrant colors', 'a photo with muted colors'),
        Pair('a saturated photo', 'a desaturated photo'),
        Pair('a photo with rich colors', 'a photo with pale colors'),
        Pair('a photo with strong colors', 'a monochrome photo'),
        Pair('a photo of high saturation', 'a photo of low saturation'),
    ),
    'noisiness': (
        Pair('Clean photo.', 'Noisy photo.'),
        Pair('a clean photo', 'a noisy photo'),
        Pair('a noise-free photo', 'a noisy photo'),
        Pair('a photo without noise', 'a photo with strong noise'),
        Pair('a photo without grain', 'a grainy photo'),
        Pair('a smooth photo', 'a grainy photo'),
        Pair('a photo taken at low ISO', 'a photo taken at high ISO'),
        Pair('a clean photo', 'a photo full of speckles'),
        Pair('a photo with smooth surfaces', 'a photo with noise in smooth surfaces'),
    ),
}

# CLIP-IQA's own pairs, because they are published and in use. It is no choice by
# measurement: CLIP's weights could not be had where this was written, so nobody has run
# scripts/select_prompts.py with them yet. What is known of each without it:
PROMPTS: dict[str, Pair] = {
    # Names the attribute; focus, details and resolution would be more than that.
    'sharpness': CANDIDATES['sharpness'][0],
    # Of the photograph, not of the scene; 'dark' may still find a scene at night.
    'brightness': CANDIDATES['brightness'][0],
    # Names the attribute; 'washed out' or 'foggy' may also mean age or weather.
    'contrast': CANDIDATES['contrast'][0],
    # 'Dull' also means dim and flat, so expect it to follow brightness and contrast;
    # 'black and white' would know no degrees.
    'colorfulness': CANDIDATES['colorfulness'][0],
    # 'Clean' also means tidy; 'grain' is a look that photographers want.
    'noisiness': CANDIDATES['noisiness'][0],
}


def check_prompts(prompts: Mapping[str, tuple[str, str]]) -> dict[str, Pair]:
    """One pair for each attribute, in the order of `ATTRIBUTES`.

    Args:
        prompts: attribute -> (good prompt, bad prompt).

    Raises:
        ValueError: if an attribute is missing or unknown, a prompt is no text or empty,
            or the two of a pair are the same.
    """
    if not isinstance(prompts, Mapping):
        raise ValueError(
            f'`prompts` must map attributes to pairs, but got {prompts!r}.'
        )
    wrong = [f'no {name}' for name in ATTRIBUTES if name not in prompts]
    wrong += [f'unknown {name!r}' for name in prompts if name not in ATTRIBUTES]
    if wrong:
        raise ValueError(
            f'`prompts` must have a pair for each of {", ".join(ATTRIBUTES)}, but got '
            f'{", ".join(wrong)}.'
        )
    return {name: _checked(name, prompts[name]) for name in ATTRIBUTES}


def _checked(attribute: str, pair: Any) -> Pair:
    is_pair = isinstance(pair, (tuple, list)) and len(pair) == 2
    if not is_pair or not all(isinstance(t, str) and t.strip() for t in pair):
        raise ValueError(
            f'`prompts` of {attribute} must be two texts that are not empty, the good '
            f'side first, but got {pair!r}.'
        )
    pair = Pair(*(' '.join(text.split()) for text in pair))
    # CLIP's tokenizer knows no capitals.
    if pair.good.lower() == pair.bad.lower():
        raise ValueError(
            f'`prompts` of {attribute} must be two different texts, but got '
            f'{pair.good!r} twice.'
        )
    return pair


def write_prompts(
    path: str | Path,
    prompts: Mapping[str, tuple[str, str]],
    made_by: Mapping[str, Any] | None = None,
) -> Path:
    """Write pairs of prompts as JSON, whole or not at all.

    Args:
        path: the file; missing folders are made.
        prompts: attribute -> (good prompt, bad prompt).
        made_by: how they were chosen, for readers of the file.

    Raises:
        ValueError: as `check_prompts`.
    """
    path = Path(path).expanduser()
    content: dict[str, Any] = {
        'prompts': {k: pair._asdict() for k, pair in check_prompts(prompts).items()}
    }
    if made_by is not None:
        content['made_by'] = dict(made_by)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=2, ensure_ascii=False) + '\n'
    with written_whole(path) as partial:
        partial.write_text(text, encoding='utf-8')
    return path


def read_prompts(path: str | Path) -> dict[str, Pair]:
    """Read a file that `write_prompts` or scripts/select_prompts.py has written.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it isn't such a file, or as `check_prompts`.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f'There is no file of prompts {path}.')
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:
        raise ValueError(f'{path} is no file of prompts: {error}') from error
    pairs = content.get('prompts') if isinstance(content, dict) else None
    if not isinstance(pairs, dict):
        raise ValueError(f"{path} is no file of prompts: it has no 'prompts'.")
    try:
        return check_prompts({name: _as_pair(pair) for name, pair in pairs.items()})
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from error


def _as_pair(pair: Any) -> Any:
    if isinstance(pair, dict) and pair.keys() == set(Pair._fields):
        return Pair(**pair)
    return pair
