r"""Choose CLIP's prompts for the five attributes by controlled changes of photographs.

    python scripts/select_prompts.py photos -o prompts.json --scores candidates.csv

Photographs are blurred, darkened and brightened, and so on, one attribute at a time.
The best pair of prompts follows the changes of its own attribute in their order
(`own`), and answers little to the other four's (`leak`): value = own - weight * leak;
`pyiqa_clipkd.attributes.selection` has the equations. All candidates and what was
measured of them go to `--scores`, the chosen ones to `-o`, where
`pyiqa_clipkd.attributes.prompts.read_prompts` reads them. The same photographs, seed
and weights give the same files.

It needs CLIP's weights: a tag of open_clip (`openai`, downloaded if it isn't cached),
or a local file. With `--pretrained random` it only shows that everything runs: what
random weights choose means nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from tqdm import tqdm

from pyiqa_clipkd.attributes.clip import ENCODER, TAG, load_pairs
from pyiqa_clipkd.attributes.prompts import CANDIDATES, write_prompts
from pyiqa_clipkd.attributes.selection import LEAK_WEIGHT, flat_pairs, measure, rank
from pyiqa_clipkd.experiment import recorded_command
from pyiqa_clipkd.files import written_whole
from pyiqa_clipkd.images import UnreadableError, read_photograph
from pyiqa_clipkd.scoring.files import find_photographs

ROOT = Path(__file__).resolve().parents[1]
RANDOM = 'random'

# Digits of the measured figures: processors differ in the later ones.
DIGITS = 5


def photographs(
    folder: Path, count: int, seed: int, longest: int
) -> Iterator[Image.Image]:
    """`count` photographs of a folder at random, always the same ones for a seed.

    Larger ones are reduced to `longest` pixels. Another takes the place of one that
    can't be read, which is told on standard error.
    """
    files = list(find_photographs([str(folder)]))
    order = np.random.default_rng(seed).permutation(len(files))
    for number in order:
        if not count:
            return
        try:
            image = read_photograph(files[number]).image
        except UnreadableError as error:
            print(f'{files[number]}: {error}', file=sys.stderr)
            continue
        count -= 1
        image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
        yield image


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('images', type=Path, help='folder of good photographs, with folders in it')
    add('-o', '--output', type=Path, required=True, help='JSON file: chosen prompts')
    add('--scores', type=Path, required=True, help='CSV file: all candidates')
    add('--encoder', default=ENCODER, help=f'default: {ENCODER}')
    add('--pretrained', default=TAG, help=f'tag, file or {RANDOM}; default: {TAG}')
    add('--photographs', type=int, default=100, help='how many; default: 100')
    add('--seed', type=int, default=0, help='which ones; default: 0')
    add('--longest', type=int, default=512, help='side in pixels; default: 512')
    add('--leak-weight', type=float, default=LEAK_WEIGHT, help='default: 0.5')
    add('--device', default='cpu', help='cpu (default) or cuda')
    args = parser.parse_args()
    if not args.images.is_dir():
        parser.error(f'`images` must be a folder, but got {args.images}.')
    for name in ('photographs', 'longest'):
        if getattr(args, name) < 1:
            got = getattr(args, name)
            parser.error(f'`--{name}` must be at least 1, but got {got}.')
    if not args.leak_weight >= 0:
        parser.error(f'`--leak-weight` must be >= 0, but got {args.leak_weight}.')
    return args


def main() -> None:
    args = parse()
    pretrained = None if args.pretrained == RANDOM else args.pretrained
    pairs = [pair for _, pair in flat_pairs(CANDIDATES)]
    try:
        network = load_pairs(args.encoder, pretrained, pairs).to(args.device)
    except (OSError, RuntimeError, ValueError) as error:
        raise SystemExit(str(error)) from error
    images = list(photographs(args.images, args.photographs, args.seed, args.longest))
    if not images:
        raise SystemExit(f'`images`: there is no photograph in {args.images}.')
    series = measure(tqdm(images, unit='photo'), network.of_images)
    ranked = rank(series, CANDIDATES, args.leak_weight)
    chosen = {name: rows[0] for name, rows in ranked.items()}

    table = pd.DataFrame([one.row() for rows in ranked.values() for one in rows])
    args.scores.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(args.scores) as partial:
        table.round(DIGITS).to_csv(partial, index=False)
    made_by = {
        'command': recorded_command(sys.argv, ROOT),
        'clip': network.identity,
        'photographs': len(images),
        'seed': args.seed,
        'longest': args.longest,
        'leak_weight': args.leak_weight,
        'value': {name: round(one.value, DIGITS) for name, one in chosen.items()},
    }
    write_prompts(args.output, {n: one.pair for n, one in chosen.items()}, made_by)
    for name, one in chosen.items():
        print(
            f'{name:13}{one.value:6.3f}  own {one.own:6.3f}  leak {one.leak:5.3f}  '
            f'{one.pair.good!r} / {one.pair.bad!r}'
        )
        if one.own <= 0:
            print(
                f'{name}: no candidate follows the changes; do not use this pair.',
                file=sys.stderr,
            )


if __name__ == '__main__':
    main()
