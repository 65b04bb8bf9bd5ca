"""What a weight file says of its network, checked before any of it is built."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from pyiqa_clipkd.description import LARGEST_INPUT

# Of networks known to us the widest has 1,280 numbers, and the paper five levels.
WIDEST_EMBEDDING = 1 << 14
MOST_LEVELS = 100

# Of the hidden layer of a readout: presets are built before their tensors are seen.
WIDEST_READOUT = 2048

# Whether a value is allowed, and what is, in words.
Check = tuple[Callable[[Any], bool], str]


def whole(most: int) -> Check:
    """A whole number in [1, most]."""
    return (
        lambda value: type(value) is int and 1 <= value <= most,
        f'a whole number in [1, {most}]',
    )


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and value > 0 and math.isfinite(value)


def _is_levels(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple))
        and 2 <= len(value) <= MOST_LEVELS
        and all(isinstance(word, str) for word in value)
        and len(set(value)) == len(value)
    )


def _is_encoder(value: Any) -> bool:
    """A name alone: those with a colon or a slash would be fetched or opened."""
    if not isinstance(value, str):
        return False
    name = value.split(':', 1)[-1] if ':' in value else value
    return name != '' and all(c.isalnum() or c in '._-' for c in name)


ENCODER: Check = (_is_encoder, 'the name of a preset, of a timm or an open_clip model')
SIZE = whole(LARGEST_INPUT)
LEVELS: Check = (_is_levels, f'2 to {MOST_LEVELS} different words')
POSITIVE: Check = (_is_positive, 'a number > 0')
YES_OR_NO: Check = (lambda value: type(value) is bool, 'True or False')

OPTIONS: dict[str, dict[str, Check]] = {
    'CLIPLikert': {
        'encoder': ENCODER,
        'pretrained': (lambda value: value is None, 'None'),
        'template': (lambda value: isinstance(value, str), 'a text'),
        'levels': LEVELS,
        'input_size': SIZE,
        'embed_dim': whole(WIDEST_EMBEDDING),
        'quick_gelu': YES_OR_NO,
        'temperature': POSITIVE,
        'mirror_invariant': YES_OR_NO,
    },
    'CLIPKDStudent': {
        'encoder': ENCODER,
        'embed_dim': whole(WIDEST_EMBEDDING),
        'head': (lambda value: value in ('likert', 'regression'), 'likert, regression'),
        'levels': LEVELS,
        'temperature': POSITIVE,
        'input_size': SIZE,
        'stage_readout': whole(WIDEST_READOUT),
        'mirror_invariant': YES_OR_NO,
    },
    'AttributeStudent': {'encoder': ENCODER, 'input_size': SIZE},
}


def check_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The description of a network in a weight file, whose `type` is one of `OPTIONS`.

    It comes from whoever made the file: what would read another file, ask a hub or take
    all memory is refused, and what is no option of the network as well.

    Raises:
        ValueError: says what is wrong.
    """
    checks = OPTIONS[config['type']]
    for name, value in config.items():
        if name == 'type':
            continue
        if name not in checks:
            raise ValueError(f'it sets `{_short(name)}`, which is no part of a network')
        is_right, allowed = checks[name]
        if not is_right(value):
            raise ValueError(
                f'its `{name}` must be {allowed}, but it is {_short(value)}'
            )
    return dict(config)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f'{text[:80]}...'
