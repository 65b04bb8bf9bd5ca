"""Do the values of five attributes follow their own change, and leave others alone?

Each photograph is changed step by step in one attribute after the other, and labelled
at each step. The table has a row for each attribute's values and a column for each
change: Spearman's correlation with the steps, the mean of all photographs. So the
diagonal should be near 1 and the rest near 0. `absolute` is the mean of the
correlations' absolute values: of a value that moves up in one photograph and down in
the next, however little, it is 1, where the mean is 0. So `moves` says how much that
is: from the lowest to the highest value along the steps, the mean of all photographs.

Photographs are reduced to a shorter side of 512 pixels first. Those without colour, or
with hardly any, can't change in it and are left out.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from tqdm import tqdm

from pyiqa_clipkd.attributes.changes import LEVELS, change, order_agreement
from pyiqa_clipkd.attributes.command import LABELLERS
from pyiqa_clipkd.attributes.labels import Labeller
from pyiqa_clipkd.attributes.measures import at_scale, measure
from pyiqa_clipkd.attributes.names import ATTRIBUTES
from pyiqa_clipkd.experiment import recorded_command, recorded_commit
from pyiqa_clipkd.files import written_whole
from pyiqa_clipkd.images import read_photograph
from pyiqa_clipkd.scoring.files import find_photographs

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ('numpy', 'scipy', 'pillow', 'PyWavelets')

# A colorfulness below is hardly any colour.
PALE = 3.0

# Tables are (5, 5): a row for the values of an attribute, a column for a change.
Tables = dict[str, np.ndarray]


def create_labeller(name: str) -> Labeller:
    """`measures`, `clip`, or what MODULE:NAME gives when it is called."""
    if name in LABELLERS:
        return LABELLERS[name]()
    module, _, function = name.partition(':')
    if not function:
        raise ValueError(
            f'`--labeller` must be one of {", ".join(LABELLERS)} or MODULE:NAME, but '
            f'got {name!r}.'
        )
    labeller: Labeller = getattr(import_module(module), function)()
    return labeller


def agreements(image: Image.Image, labeller: Labeller, seed: int) -> np.ndarray:
    """(2, 5, 5) of one photograph: correlations in [-1, 1], and moves in [0, 1]."""
    table = np.empty((2, len(ATTRIBUTES), len(ATTRIBUTES)))
    for column, changed in enumerate(ATTRIBUTES):
        series = [
            labeller(change(image, changed, level, seed)) for level in LEVELS[changed]
        ]
        for row, attribute in enumerate(ATTRIBUTES):
            values = [labels[attribute] for labels in series]
            table[:, row, column] = order_agreement(values), np.ptp(values)
    return table


def summary(tables: list[np.ndarray]) -> dict[str, Any]:
    """What a table says, for all photographs."""
    every, moves = np.moveaxis(np.array(tables), 1, 0)
    mean, absolute = every.mean(axis=0), np.abs(every).mean(axis=0)
    others = ~np.eye(len(ATTRIBUTES), dtype=bool)
    return {
        'table': _named(mean),
        'absolute': _named(absolute),
        'moves': _named(moves.mean(axis=0)),
        'own': dict(zip(ATTRIBUTES, np.diag(mean).tolist(), strict=True)),
        'others': _rows(np.abs(mean), others),
        'others_absolute': _rows(absolute, others),
        'others_moves': _rows(moves.mean(axis=0), others),
    }


def _named(table: np.ndarray) -> dict[str, dict[str, float]]:
    return {
        attribute: dict(zip(ATTRIBUTES, row.tolist(), strict=True))
        for attribute, row in zip(ATTRIBUTES, table, strict=True)
    }


def _rows(table: np.ndarray, where: np.ndarray) -> dict[str, float]:
    return {
        attribute: float(row[chosen].mean())
        for attribute, row, chosen in zip(ATTRIBUTES, table, where, strict=True)
    }


def photographs(args: argparse.Namespace) -> list[Path]:
    if args.csv is None:
        paths = sorted(find_photographs([str(args.images)]))
    else:
        table = pd.read_csv(args.csv)
        if args.column is not None:
            table = table[table[args.column] == args.side]
        paths = [args.images / name for name in table.iloc[:, 0]]
    order = np.random.default_rng(args.seed).permutation(len(paths))
    return [paths[number] for number in order]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('--labeller', default='measures', help='measures, clip or MODULE:NAME')
    add('--images', type=Path, required=True, help='folder')
    add('--csv', type=Path, help='first column: names in that folder')
    add('--column', help='of a split in the CSV file')
    add('--side', default='test', help='word in that column')
    add('--count', type=int, default=48, help='photographs with colour')
    add('--seed', type=int, default=0)
    add('-o', '--output', type=Path, required=True, help='.json; a .csv beside it')
    args = parser.parse_args()
    labeller = create_labeller(args.labeller)
    tables: list[np.ndarray] = []
    pale = 0
    with tqdm(total=args.count, unit='photo') as bar:
        for path in photographs(args):
            if len(tables) == args.count:
                break
            image = at_scale(read_photograph(path).image)
            if measure(image)['colorfulness'] < PALE:
                pale += 1
                continue
            tables.append(agreements(image, labeller, args.seed + len(tables)))
            bar.update()
    if not tables:
        parser.error(f'`--images`: no photographs with colour in {args.images}.')
    results = {
        'command': recorded_command(sys.argv, ROOT),
        'commit': recorded_commit(ROOT),
        'seed': args.seed,
        'python': platform.python_version(),
        'versions': {package: version(package) for package in PACKAGES},
        'labeller': getattr(labeller, 'identity', args.labeller),
        'photographs': len(tables),
        'left_out_without_colour': pale,
        'levels': LEVELS,
    } | summary(tables)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(args.output) as partial:
        partial.write_text(json.dumps(results, indent=2) + '\n')
    frame = pd.DataFrame(results['table']).T
    with written_whole(args.output.with_suffix('.csv')) as partial:
        frame.to_csv(partial, index_label='values of', float_format='%.3f')
    print(frame.round(2).to_string())
    for key in ('own', 'others', 'others_absolute', 'others_moves'):
        words = (f'{name} {value:.2f}' for name, value in results[key].items())
        print(f'{key}: {", ".join(words)}')


if __name__ == '__main__':
    main()
