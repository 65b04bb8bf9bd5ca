"""Make the reference of measures: what photographs in the wild have of attributes.

Each photograph is measured as it is, and once more for each attribute after that has
been changed to a random level: the reference reaches from damaged to improved.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from pyiqa_clipkd.attributes.changes import change, random_level
from pyiqa_clipkd.attributes.measures import VERSION, at_scale, measure
from pyiqa_clipkd.attributes.names import ATTRIBUTES
from pyiqa_clipkd.attributes.ranks import QUANTILES, REFERENCE, goodness
from pyiqa_clipkd.experiment import recorded_command
from pyiqa_clipkd.files import written_whole
from pyiqa_clipkd.images import read_photograph

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--images', type=Path, required=True, help='folder')
    parser.add_argument('--csv', type=Path, required=True, help='first column: names')
    parser.add_argument('--column', required=True, help='of a split: its `train` side')
    parser.add_argument('--sample', type=int, default=250, help='so many at random')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('-o', '--output', type=Path, default=REFERENCE)
    args = parser.parse_args()
    table = pd.read_csv(args.csv)
    table = table[table[args.column] == 'train']
    names = table.iloc[:, 0].sample(args.sample, random_state=args.seed)
    rng = np.random.default_rng(args.seed)
    values: dict[str, list[float]] = {attribute: [] for attribute in ATTRIBUTES}
    for number, name in enumerate(tqdm(names, unit='photo')):
        image = at_scale(read_photograph(args.images / name).image)
        for attribute, found in measure(image).items():
            values[attribute].append(goodness(attribute, found))
            level = random_level(attribute, rng)
            changed = measure(change(image, attribute, level, number))[attribute]
            values[attribute].append(goodness(attribute, changed))
    shares = np.linspace(0, 1, QUANTILES)
    reference = {
        'command': recorded_command(sys.argv, ROOT),
        'photographs': len(names),
        'measures': VERSION,
        'quantiles': {
            attribute: [round(q, 4) for q in np.quantile(found, shares).tolist()]
            for attribute, found in values.items()
        },
    }
    with written_whole(args.output) as partial:
        partial.write_text(json.dumps(reference, indent=1) + '\n')


if __name__ == '__main__':
    main()
