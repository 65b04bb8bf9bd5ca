"""Does a metric fall with damage, and stay where nothing has changed?

Each photograph is damaged in nine ways at six levels each. Monotonicity is the share of
neighbouring levels (the photograph itself is level 0) in the right order. Four more
ways, which `DegradationRankingLoss` doesn't know, are counted apart. Stability is how
far the score moves under a mirror, a shift by one pixel, a PNG file, and a resize by
2 %. Without `--images` the photographs are those that come with scikit-image.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evaluate import add_metric, create_metric, record, write
from PIL import Image, UnidentifiedImageError
from torchvision.transforms.functional import to_tensor
from tqdm import tqdm

from pyiqa_clipkd.degradations import (
    ALL_DISTORTIONS,
    DISTORTIONS,
    LEVELS,
    UNSEEN_DISTORTIONS,
    coded,
    degrade,
)

SCIKIT_IMAGE = ('astronaut', 'chelsea', 'coffee', 'rocket')


def resized(image: Image.Image) -> Image.Image:
    width, height = (round(0.98 * side) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


# What shouldn't move the score; the shift compares two windows one pixel apart.
HARMLESS: dict[str, Callable[[Image.Image], Image.Image]] = {
    'flip': lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    'shift_1_px': lambda image: image.crop((1, 1, image.width, image.height)),
    'png': lambda image: coded(image, 'PNG'),
    'resize_2_percent': resized,
}


def photographs(folder: Path | None, longest: int) -> Iterator[tuple[str, Image.Image]]:
    """Name and RGB image, reduced to `longest` pixels where it is larger."""
    if folder is None:
        from skimage import data

        for name in SCIKIT_IMAGE:
            yield name, Image.fromarray(getattr(data, name)())
        return
    for path in sorted(folder.iterdir()):
        try:
            image = Image.open(path).convert('RGB')
        except (UnidentifiedImageError, IsADirectoryError):
            continue
        scale = longest / max(image.size)
        if scale < 1:
            width, height = (round(scale * side) for side in image.size)
            image = image.resize((width, height), Image.Resampling.LANCZOS)
        yield path.name, image


def measure(
    metric: torch.nn.Module, images: list[tuple[str, Image.Image]]
) -> dict[str, Any]:
    """Shares in [0, 1], and moves in points of the score."""

    def score(image: Image.Image) -> float:
        return float(metric(to_tensor(image)[None]))

    orders: dict[str, list[list[bool]]] = {kind: [] for kind in ALL_DISTORTIONS}
    moves: dict[str, list[float]] = {name: [] for name in HARMLESS}
    originals = []
    for number, (_, image) in enumerate(tqdm(images, unit='image')):
        original = score(image)
        originals.append(original)
        for kind, rows in orders.items():
            levels = range(1, LEVELS + 1)
            scores = [score(degrade(image, kind, level, number)) for level in levels]
            rows.append((np.diff([original, *scores]) < 0).tolist())
        for name, change in HARMLESS.items():
            window = image.crop((0, 0, image.width - 1, image.height - 1))
            before = score(window) if name.startswith('shift') else original
            moves[name].append(abs(score(change(image)) - before))
    every = np.array([orders[kind] for kind in DISTORTIONS])  # kind, image, level
    return {
        'images': len(images),
        'scores': {name: s for (name, _), s in zip(images, originals, strict=True)},
        'right_order': {k: np.mean(orders[k]) for k in DISTORTIONS},
        'right_order_of_levels': every.mean(axis=(0, 1)).tolist(),
        'right_order_all': every.mean(),
        'right_order_unseen': {k: np.mean(orders[k]) for k in UNSEEN_DISTORTIONS},
        'moves': {
            name: {'median': np.median(values), 'p95': np.percentile(values, 95)}
            for name, values in moves.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_metric(parser)
    parser.add_argument('--images', type=Path, help='folder of good photographs')
    parser.add_argument('--longest', type=int, default=768, help='side in pixels')
    parser.add_argument('--limit', type=int, help='only so many photographs')
    parser.add_argument('-o', '--output', type=Path, help='JSON file')
    args = parser.parse_args()
    images = list(photographs(args.images, args.longest))[: args.limit]
    if not images:
        parser.error(f'`--images`: there is no photograph in {args.images}.')
    start = time.time()
    results = measure(create_metric(args), images)
    write(record(args, start) | results, args.output)


if __name__ == '__main__':
    main()
