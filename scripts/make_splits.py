"""Add ten 80/20 splits to a CSV of image names and scores, as pyiqa reads them.

Rows with the same word in the `--group` column (one scene, one reference image, near
copies) stay on one side.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd


def add_splits(
    table: pd.DataFrame, group: str | None, splits: int = 10, seed: int = 123
) -> pd.DataFrame:
    """Columns `ratio802_seed123_split_01` and on, with the words train and val."""
    groups = table[group] if group else pd.Series(range(len(table)))
    names = pd.unique(groups)
    rng = np.random.default_rng(seed)
    result = table.copy()
    for split in range(1, splits + 1):
        order = rng.permutation(len(names))
        held_out = set(names[order[: max(1, round(0.2 * len(names)))]])
        sides = ['val' if name in held_out else 'train' for name in groups]
        result[f'ratio802_seed123_split_{split:02d}'] = sides
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('csv', type=Path, help='columns: image, score, and any others')
    parser.add_argument('-o', '--output', type=Path, required=True, help='CSV file')
    parser.add_argument('--group', help='column whose equal words stay together')
    args = parser.parse_args()
    table = pd.read_csv(args.csv)
    if args.group and args.group not in table.columns:
        parser.error(
            f'`--group` must be one of {", ".join(table.columns)}, but got '
            f'{args.group!r}.'
        )
    add_splits(table, args.group).to_csv(args.output, index=False)
    print(f'Wrote {args.output}: {len(table)} rows, ten splits.')


if __name__ == '__main__':
    main()
