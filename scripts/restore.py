"""Raise the score of a photograph by gradient ascent: a demonstration, with a warning.

By default seven settings of an ordinary editor are tuned: exposure of red, green and
blue, gamma, contrast, saturation and sharpness, each within limits. That brings a dark
photograph back, and then goes on, too colourful and too sharp, to scores above those
of the undamaged one. With `--free-pixels` every pixel may change. That fools the
metric: its score goes to the top, and nothing looks better. The score of another metric
(`--judge`, best one of your own: the bundled students have learned from each other) and
the likeness to the undamaged photograph (`--reference`, or `--damage`, which damages
the photograph first) show it.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur, to_tensor

from pyiqa_clipkd.degradations import DISTORTIONS, LEVELS, degrade
from pyiqa_clipkd.experiment import recorded_command
from pyiqa_clipkd.files import file_hash
from pyiqa_clipkd.images import read_photograph
from pyiqa_clipkd.locations import find_weights
from pyiqa_clipkd.metric import CLIPKDMetric
from pyiqa_clipkd.names import DEFAULT_METRIC

ROOT = Path(__file__).resolve().parents[1]

# How far each setting may go to either side of 0, which changes nothing. Exposures and
# gamma are logarithms, the other three are shares: -1 takes all of it away.
SETTINGS = {
    'exposure of red': 1.5,
    'exposure of green': 1.5,
    'exposure of blue': 1.5,
    'gamma': 0.7,
    'contrast': 0.7,
    'saturation': 0.7,
    'sharpness': 1.0,
}

# Rec. 709: how bright red, green and blue look.
LUMA = (0.2126, 0.7152, 0.0722)

# Photographs are reduced to this, so that a step takes a fraction of a second.
LONGEST = 512


def enhance(img: Tensor, settings: Tensor) -> Tensor:
    """An editor's sliders, differentiable.

    Args:
        img: (1, 3, H, W) in [0, 1].
        settings: (7,), in the order of `SETTINGS`; zeros change nothing.

    Returns:
        (1, 3, H, W) in [0, 1].
    """
    exposure, (gamma, contrast, saturation, sharpness) = settings[:3], settings[3:]
    img = (img * exposure.exp().view(1, 3, 1, 1)).clamp(1e-4, 1) ** gamma.exp()
    img = img.mean() + (1 + contrast) * (img - img.mean())
    gray = (img * img.new_tensor(LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
    img = gray + (1 + saturation) * (img - gray)
    return (img + sharpness * (img - gaussian_blur(img, [9, 9], [1.5]))).clamp(0, 1)


def ascend(
    values: Tensor, image_of: Callable[[Tensor], Tensor], args: argparse.Namespace
) -> tuple[Tensor, list[float]]:
    """Adam towards a higher score; the best values on the way, and all scores."""
    metric = CLIPKDMetric(args.metric, pretrained_model_path=args.weights)
    values = values.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([values], lr=args.rate)
    best, scores = values.detach().clone(), []
    for _ in range(args.steps + 1):
        score = metric(image_of(values)).mean()
        if not scores or score.item() > max(scores):
            best = values.detach().clone()
        scores.append(score.item())
        optimizer.zero_grad()
        (-score).backward()
        optimizer.step()
    return best, scores


def restore(img: Tensor, args: argparse.Namespace) -> tuple[Tensor, dict[str, Any]]:
    """The image with the highest score, and what was done to it."""
    if args.free_pixels:
        best, scores = ascend(img, lambda pixels: pixels.clamp(0, 1), args)
        return best.clamp(0, 1), {'scores': scores}
    limits = torch.tensor(list(SETTINGS.values()))

    def image_of(values: Tensor) -> Tensor:
        return enhance(img, limits * values.tanh())

    best, scores = ascend(torch.zeros(len(limits)), image_of, args)
    chosen = (limits * best.tanh()).tolist()
    settings = {name: round(x, 3) for name, x in zip(SETTINGS, chosen, strict=True)}
    return image_of(best), {'settings': settings, 'scores': scores}


def to_image(img: Tensor) -> Image.Image:
    pixels = (255 * img[0]).round().clamp(0, 255).byte()
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def reduced(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
    return image


def likeness(image: Image.Image, other: Image.Image) -> dict[str, float]:
    """PSNR in decibels and SSIM, both higher for more alike images."""
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    one, two = np.asarray(image), np.asarray(other)
    return {
        'psnr': round(float(peak_signal_noise_ratio(two, one)), 2),
        'ssim': round(float(structural_similarity(two, one, channel_axis=2)), 4),
    }


def measure(
    images: dict[str, Image.Image],
    args: argparse.Namespace,
    reference: Image.Image | None,
) -> dict[str, dict[str, float]]:
    """Scores by the metric and by the judge, and likeness to the reference."""
    rows: dict[str, dict[str, float]] = {name: {} for name in images}
    for role, name, weights in (
        ('score', args.metric, args.weights),
        ('judge', args.judge, None),
    ):
        metric = CLIPKDMetric(name, pretrained_model_path=weights)
        for row, image in images.items():
            with torch.inference_mode():
                rows[row][role] = round(metric(to_tensor(image)[None]).item(), 3)
    if reference is not None:
        for row in ('before', 'after'):
            rows[row] |= likeness(images[row], reference)
    return rows


def side_by_side(images: list[Image.Image], path: Path) -> None:
    width, height = images[0].size
    sheet = Image.new('RGB', (len(images) * (width + 8) - 8, height), 'white')
    for number, image in enumerate(images):
        sheet.paste(image, (number * (width + 8), 0))
    sheet.thumbnail((1600, 1600), Image.Resampling.LANCZOS)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, quality=85)


def record(args: argparse.Namespace) -> dict[str, Any]:
    """What a reader needs to repeat it."""
    weights = find_weights(args.metric, args.weights)
    return {
        'command': recorded_command(sys.argv, ROOT),
        'metric': args.metric,
        'judge': args.judge,
        'weights_sha256': file_hash(weights) if weights else None,
        'python': platform.python_version(),
        'torch': torch.__version__,
        'seed': 'none: nothing is random',
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('photo', type=Path)
    parser.add_argument('-o', '--output', type=Path, required=True, help='PNG file')
    parser.add_argument('--metric', default=DEFAULT_METRIC)
    parser.add_argument('--weights', help="a file in place of the metric's own")
    parser.add_argument('--judge', default='clipkd_resnet18', help='second metric')
    parser.add_argument('--steps', type=int, default=100)
    parser.add_argument('--rate', type=float, help='of Adam: 0.05; of pixels 0.002')
    parser.add_argument('--free-pixels', action='store_true')
    parser.add_argument('--reference', type=Path, help='the undamaged photograph')
    parser.add_argument(
        '--damage',
        nargs=2,
        metavar=('KIND', 'LEVEL'),
        help='for instance underexposure 3',
    )
    parser.add_argument('--side-by-side', type=Path, help='before and after, a JPEG')
    parser.add_argument('--json', type=Path, help='all figures')
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f'`--steps` must be at least 1, but got {args.steps}.')
    if args.damage and args.reference:
        parser.error('`--damage` takes the photograph itself as `--reference`.')
    if args.damage and args.damage[0] not in DISTORTIONS:
        kinds = ', '.join(DISTORTIONS)
        parser.error(f'`--damage` must be one of {kinds}, but got {args.damage[0]}.')
    if args.damage and args.damage[1] not in map(str, range(1, LEVELS + 1)):
        parser.error(f'`--damage` has levels 1 to {LEVELS}, but got {args.damage[1]}.')
    if args.rate is None:
        args.rate = 0.002 if args.free_pixels else 0.05
    return args


def main() -> None:
    args = parse()
    before = reduced(read_photograph(args.photo).image)
    reference = None
    if args.damage:
        reference = before
        before = degrade(before, args.damage[0], int(args.damage[1]))
    elif args.reference:
        reference = reduced(read_photograph(args.reference).image)
        if reference.size != before.size:
            raise SystemExit(
                f'`--reference` must have the size of the photograph, {before.size}, '
                f'but got {reference.size}.'
            )
    restored, what = restore(to_tensor(before)[None], args)
    after = to_image(restored)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    after.save(args.output, 'PNG')
    images = {'before': before, 'after': after}
    if reference is not None:
        images['reference'] = reference
    rows = measure(images, args, reference)
    moved = np.abs(np.asarray(after, int) - np.asarray(before, int))
    results = record(args) | rows | what
    results['change'] = {
        'mean': round(float(moved.mean()), 2),
        'largest': int(moved.max()),
        'unit': 'grey levels of 255',
    }
    results['scores'] = [round(score, 3) for score in what['scores']]
    for row, values in rows.items():
        print(f'{row:9}', *(f'{key} {value}' for key, value in values.items()))
    print('change   ', *(f'{key} {value}' for key, value in results['change'].items()))
    for name, value in what.get('settings', {}).items():
        print(f'{name}: {value:+}')
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=2) + '\n')
    if args.side_by_side:
        side_by_side(list(images.values()), args.side_by_side)


if __name__ == '__main__':
    main()
