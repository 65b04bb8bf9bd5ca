"""Photographs and damaged copies of them as plain arrays, for `train_resident.py`.

Each photograph is resized as in a training from files. Those of the train side also get
`--chains` pairs of copies: damaged at their own resolution, as a stranger's file would
be, and resized after that; the second copy of a pair is damaged more than the first.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from resize_images import preparation
from tqdm import tqdm

from pyiqa_clipkd.degradations import DISTORTIONS, LEVELS, degrade
from pyiqa_clipkd.ranking import MILDEST

# The copies of a pair are at most so many levels apart: neighbours are the hard ones.
WIDEST = 2.0


def pair_of_levels(draw: np.random.Generator) -> tuple[float, float]:
    """Two levels of one damage, the second above the first."""
    first = draw.uniform(MILDEST, LEVELS - MILDEST)
    return first, min(LEVELS, first + draw.uniform(MILDEST, WIDEST))


def arrays_of(
    row: tuple[str, bool], images: Path, size: int, chains: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One photograph (S, S, 3), its copies (chains, 2, S, S, 3), levels (chains, 2)."""
    name, train = row
    small = preparation(size)
    photograph = Image.open(images / name).convert('RGB')
    draw = np.random.default_rng(list(name.encode()))
    copies, levels = [], []
    for kind in draw.permutation(list(DISTORTIONS))[: chains * train]:
        pair = pair_of_levels(draw)
        seed = int(draw.integers(2**32))
        damaged = [degrade(photograph, str(kind), level, seed) for level in pair]
        copies.append([np.asarray(small(one)) for one in damaged])
        levels.append(pair)
    shape = (-1, 2, size, size, 3)
    return (
        np.asarray(small(photograph)),
        np.array(copies, np.uint8).reshape(shape),
        np.array(levels, np.float32).reshape(-1, 2),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('csv', type=Path, help='img_name, mos in [0, 1], splits')
    parser.add_argument('--images', type=Path, required=True, help='folder')
    parser.add_argument('--column', required=True, help='of the split')
    parser.add_argument('--size', type=int, default=384, help='side in pixels')
    parser.add_argument('--chains', type=int, default=4, help='pairs of copies')
    parser.add_argument('--jobs', type=int, help='processes; default: one a core')
    parser.add_argument('-o', '--output', type=Path, required=True, help='folder')
    args = parser.parse_args()
    table = pd.read_csv(args.csv)
    table = table[[(args.images / name).is_file() for name in table.img_name]]
    if table.empty:
        parser.error(f'`--images`: {args.images} has none of the photographs.')
    train = table[args.column] == 'train'
    one = partial(arrays_of, images=args.images, size=args.size, chains=args.chains)
    with ProcessPoolExecutor(args.jobs) as pool:
        rows = zip(table.img_name, train, strict=True)
        done = pool.map(one, rows, chunksize=8)
        found = list(tqdm(done, total=len(table), unit='image', mininterval=5))
    args.output.mkdir(parents=True, exist_ok=True)
    photographs, copies, levels = zip(*found, strict=True)
    chosen = [c for c in copies if len(c)]
    np.save(args.output / 'photographs.npy', np.stack(photographs))
    np.save(args.output / 'copies.npy', np.stack(chosen))
    np.save(args.output / 'levels.npy', np.stack([v for v in levels if len(v)]))
    np.save(args.output / 'mos.npy', table.mos.to_numpy(np.float32))
    np.save(args.output / 'train.npy', train.to_numpy())
    table.img_name.to_csv(args.output / 'names.csv', index=False)


if __name__ == '__main__':
    main()
