"""Add ten 80/20 splits to a CSV of image names and scores, as pyiqa reads them.

Rows with the same word in the `--group` column (one scene, one reference image, near
copies) stay on one side.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd  # type: ignore[import-untyped]

from pyiqa_clipkd.splits import add_splits


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
