"""Does a quality map find the damaged quadrant of a sharp photograph?

A quadrant of each photograph is replaced by its damaged copy with a hard edge, each of
the four in turn, blurred and noisy in turn. Found: the worst window lies in that
quadrant, as a whole or at least with its centre. With `--csv` the photographs are those
that `--column` holds out and that people scored well; `--images` alone takes a folder
as it is. Of both only those count that are sharp in all four quadrants, which their
pixels say, not the metric: blur can't be found where nothing was sharp. `--any` takes
the others, too.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from evaluate import ROOT, write
from PIL import Image
from scipy.ndimage import laplace
from tqdm import tqdm

from pyiqa_clipkd.degradations import ALL_DISTORTIONS, degrade
from pyiqa_clipkd.experiment import recorded_command, recorded_commit
from pyiqa_clipkd.images import read_photograph
from pyiqa_clipkd.maps import QualityMap, quality_map
from pyiqa_clipkd.maps.windows import Box
from pyiqa_clipkd.names import DEFAULT_METRIC
from pyiqa_clipkd.scoring.backends import Backend, create_backend
from pyiqa_clipkd.scoring.files import find_photographs

# A quadrant is sharp from this standard deviation of its Laplacian on, in grey levels;
# half of the well scored photographs of BIQ2021 have four such quadrants.
SHARP = 12.0

# Least human score of a good photograph, as a share of the scale.
GOOD = 0.7


def candidates(args: argparse.Namespace) -> list[Path]:
    """Photographs in an order that the seed decides."""
    if args.csv is None:
        paths = list(find_photographs([str(args.images)]))
    else:
        table = pd.read_csv(args.csv)
        low, high = args.mos_range
        good = (table.iloc[:, 1] - low) / (high - low) >= GOOD
        held_out = table[args.column] == args.side
        paths = [args.images / name for name in table.iloc[:, 0][good & held_out]]
    order = np.random.default_rng(args.seed).permutation(len(paths))
    return [paths[place] for place in order]


def quadrants(image: Image.Image) -> list[Box]:
    """Left, top, right and bottom of the four of them."""
    xs, ys = ((0, side // 2, side) for side in image.size)
    return [
        (xs[column], ys[row], xs[column + 1], ys[row + 1])
        for row, column in product((0, 1), repeat=2)
    ]


def is_sharp(image: Image.Image) -> bool:
    """Whether all four quadrants have detail."""
    gray = image.convert('L')
    details = (
        laplace(np.asarray(gray.crop(box), np.float32)).std()
        for box in quadrants(image)
    )
    return min(details) >= SHARP


def photographs(args: argparse.Namespace) -> Iterator[tuple[str, Image.Image]]:
    """Names and photographs: as many as are wanted, if there are."""
    count = 0
    for path in candidates(args):
        image = read_photograph(path).image
        if args.any or is_sharp(image):
            count += 1
            yield path.name, image
        if count == args.photographs:
            return


def found(quality: QualityMap, quadrant: Box) -> dict[str, bool]:
    """Whether the worst window lies in the quadrant, and its centre does."""
    left, top, right, bottom = quality.worst.box
    outer = quadrant
    x, y = (left + right) / 2, (top + bottom) / 2
    return {
        'inside': outer[0] <= left
        and outer[1] <= top
        and right <= outer[2]
        and bottom <= outer[3],
        'centre': outer[0] <= x <= outer[2] and outer[1] <= y <= outer[3],
    }


def measure(args: argparse.Namespace, backend: Backend) -> list[dict[str, Any]]:
    """A row for each case."""
    rows = []
    chosen = list(photographs(args))
    for number, (name, image) in enumerate(tqdm(chosen, unit='image')):
        for place, box in enumerate(quadrants(image)):
            kind = args.kinds[(number + place) % len(args.kinds)]
            damaged = degrade(image, kind, args.level, args.seed + number)
            pasted = image.copy()
            pasted.paste(damaged.crop(box), box[:2])
            quality = quality_map(
                pasted,
                backend,
                window=args.window,
                stride=args.stride,
                coarse=args.coarse,
                workers=args.workers,
            )
            rows.append(
                {
                    'photograph': name,
                    'kind': kind,
                    'quadrant': place,
                    'windows': quality.scores.size,
                    'window': quality.window,
                    **found(quality, box),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add('metric', nargs='?', default=DEFAULT_METRIC)
    add('--images', type=Path, required=True, help='folder')
    add('--csv', type=Path, help='file names and human scores')
    add('--column', default='ratio802_seed123_split_01', help='of the split')
    add('--side', default='test', help='word in that column')
    add('--mos-range', type=float, nargs=2, default=(0, 1))
    add('--any', action='store_true', help='not only photographs that are sharp')
    add('--photographs', type=int, default=25, help='four cases each')
    add('--kinds', nargs='+', default=['gaussian_blur', 'white_noise'])
    add('--level', type=float, default=4, help='of the damage, up to 6')
    add('--seed', type=int, default=0, help='of choice and noise')
    add('--window', type=int, help='pixels')
    add('--stride', type=int, help='pixels')
    add('--coarse', action='store_true', help='one look of the network')
    add('--backend', default='auto', help='auto, onnx or torch')
    add('--workers', type=int, help='threads')
    add('-o', '--output', type=Path, help='JSON file')
    args = parser.parse_args()
    if unknown := set(args.kinds) - set(ALL_DISTORTIONS):
        parser.error(f'`--kinds`: there is no {", ".join(sorted(unknown))}.')
    start = time.time()
    kind = 'torch' if args.coarse else args.backend
    backend = create_backend(args.metric, kind=kind, device='cpu')
    rows = measure(args, backend)
    if not rows:
        parser.error(f'`--images`: there is no such photograph in {args.images}.')
    table = pd.DataFrame(rows)
    shares = table.groupby('kind')[['inside', 'centre']].mean()
    shares.loc['all'] = table[['inside', 'centre']].mean()
    results = {
        'command': recorded_command(sys.argv, ROOT),
        'metric': args.metric,
        'weights_sha256': backend.sha256,
        'backend': backend.name,
        'seed': args.seed,
        'level': args.level,
        'cases': table.groupby('kind').size().to_dict(),
        'windows': table[['windows', 'window']].drop_duplicates().to_numpy().tolist(),
        'found': shares.to_dict('index'),
        'not_found': [
            f'{row.photograph} {row.kind} {row.quadrant}'
            for row in table[~table.centre].itertuples()
        ],
        'versions': {
            name: version(name) for name in ('pyiqa-clipkd', 'onnxruntime', 'pillow')
        },
        'commit': recorded_commit(ROOT),
        'load': os.getloadavg(),
        'seconds': round(time.time() - start),
    }
    write(results, args.output)


if __name__ == '__main__':
    main()
