"""Make the smoke set: crops of scikit-image's photographs, degraded by known amounts.

Writes `datasets/smoke/` below the working directory, or below `--root`: images, a
meta-info file with labels and three content-safe splits, and a CLIP of ViT-B/32 size
with seeded random weights. Nothing is downloaded. See configs/README.md.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
import skimage
from PIL import Image

from pyiqa_clipkd import degradations

PHOTOGRAPHS = (
    'astronaut.png',
    'camera.png',
    'chelsea.png',
    'coffee.png',
    'coins.png',
    'hubble_deep_field.jpg',
    'ihc.png',
    'motorcycle_left.png',
    'retina.jpg',
    'rocket.jpg',
)
CROPS = 4
SIDE = 256
SPLITS = 3
HELD_OUT = 2  # photographs of ten: 80/20
CLIP_MODEL = 'open_clip:ViT-B-32-quickgelu'


def degrade(image: Image.Image, kind: int, strength: float, seed: int) -> Image.Image:
    """Blur (0), noise (1) or JPEG (2); `strength` in [0, 1], 0 leaves the image."""
    if strength == 0:
        return image
    if kind == 0:
        return degradations.blur(image, 5 * strength)
    if kind == 1:
        return degradations.white_noise(image, 80 * strength, seed)
    return degradations.jpeg(image, round(60 - 57 * strength))


def write_images(folder: Path) -> None:
    """`images/` and `meta_info_smoke.csv`; mos in [0, 1] falls with the strength."""
    source = Path(skimage.__file__).parent / 'data'
    rng = np.random.default_rng(123)
    order = rng.permutation(len(PHOTOGRAPHS)).tolist()
    (folder / 'images').mkdir(parents=True, exist_ok=True)
    with (folder / 'meta_info_smoke.csv').open('w', newline='') as file:
        writer = csv.writer(file)
        columns = [f'ratio802_seed123_split_{i + 1:02d}' for i in range(SPLITS)]
        writer.writerow(['img_name', 'mos', 'photograph', *columns])
        for content, photograph in enumerate(PHOTOGRAPHS):
            turn = order.index(content) // HELD_OUT
            sides = ['val' if turn == split else 'train' for split in range(SPLITS)]
            whole = Image.open(source / photograph).convert('RGB')
            for crop in range(CROPS):
                left, top = (int(rng.integers(0, s - SIDE + 1)) for s in whole.size)
                image = whole.crop((left, top, left + SIDE, top + SIDE))
                step = crop + content / len(PHOTOGRAPHS)
                strength = step / CROPS if crop else 0.0
                name = f'{Path(photograph).stem}_{crop}.png'
                degrade(image, (content + crop) % 3, strength, seed=content).save(
                    folder / 'images' / name
                )
                writer.writerow([name, f'{1 - strength:.4f}', content, *sides])


def write_clip(path: Path) -> None:
    """A CLIP of the released one's size; seeded random weights, half precision."""
    import torch

    from pyiqa_clipkd.encoders import build_open_clip_model

    torch.manual_seed(123)
    state = build_open_clip_model(CLIP_MODEL, None).state_dict()
    torch.save({name: tensor.half() for name, tensor in state.items()}, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--root', type=Path, default=Path(), help='default: here')
    parser.add_argument('--no-clip', action='store_true', help='images and labels only')
    args = parser.parse_args()
    folder = args.root / 'datasets' / 'smoke'
    write_images(folder)
    if not args.no_clip:
        write_clip(folder / 'random_vit_b32.pt')
    print(f'Wrote {folder}.')


if __name__ == '__main__':
    main()
