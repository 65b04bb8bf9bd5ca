"""Decode and resize a data set once, for trainings that would do it in every epoch.

Where photographs are large, reading them sets the pace. This writes files without loss
with the very pixels that `augment: {resize: {size: N, interpolation: 3}, center_crop:
N}` makes of the originals, and the table with their new names. PNG files are small; BMP
files are larger, and faster to read.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import pandas as pd
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize
from tqdm import tqdm

from pyiqa_clipkd.files import written_whole

OPTIONS: dict[str, dict[str, int]] = {'png': {'compress_level': 1}, 'bmp': {}}


def preparation(size: int) -> Compose:
    """What an option file's `resize` and `center_crop` do with a photograph."""
    bicubic = Resize(size, interpolation=InterpolationMode.BICUBIC)
    return Compose([bicubic, CenterCrop(size)])


def resize(name: str, images: Path, output: Path, size: int, form: str) -> str:
    """Write one photograph below `output`; what exists is kept. Returns its name."""
    new = Path(name).with_suffix(f'.{form}')
    path = output / new
    if not path.is_file():
        image = Image.open(images / name).convert('RGB')
        path.parent.mkdir(parents=True, exist_ok=True)
        small = preparation(size)(image)
        with written_whole(path) as partial:
            small.save(partial, form, **OPTIONS[form])
    return str(new)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('csv', type=Path, help='first column: names below --images')
    parser.add_argument('--images', type=Path, required=True, help='folder')
    parser.add_argument('--size', type=int, required=True, help='side in pixels')
    parser.add_argument('-o', '--output', type=Path, required=True, help='folder')
    parser.add_argument('--format', choices=OPTIONS, default='png', help='of the files')
    parser.add_argument('--jobs', type=int, help='processes; default: one a core')
    args = parser.parse_args()
    table = pd.read_csv(args.csv)
    names = table.iloc[:, 0].astype(str)
    if names.map(lambda name: Path(name).with_suffix('')).duplicated().any():
        parser.error(f'{args.csv}: two images differ in their suffix only.')
    one = partial(
        resize,
        images=args.images,
        output=args.output / 'images',
        size=args.size,
        form=args.format,
    )
    with ProcessPoolExecutor(args.jobs) as pool:
        done = pool.map(one, names, chunksize=16)
        table.isetitem(0, list(tqdm(done, total=len(names), unit='image')))
    table.to_csv(args.output / args.csv.name, index=False)
    print(f'Wrote {len(names)} images and {args.output / args.csv.name}.')


if __name__ == '__main__':
    main()
