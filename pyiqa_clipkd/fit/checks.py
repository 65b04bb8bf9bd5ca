"""What can be wrong with a fit, found before anything is written."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import numpy as np
import pandas as pd  # type: ignore[import-untyped]

from pyiqa_clipkd.fit.tables import FEWEST, load_table
from pyiqa_clipkd.names import SUFFIX, weights_folder
from pyiqa_clipkd.near_copies import near_copies
from pyiqa_clipkd.splits import add_splits, groups_of
from pyiqa_clipkd.weights import read_weights

NAME = re.compile(r'[A-Za-z0-9][A-Za-z0-9._+-]*')
NEW_TEACHER = 'new'
FEWEST_HELD_OUT = FEWEST // 5
SPLIT = 'ratio802_seed123_split_01'


def check_arguments(args: argparse.Namespace) -> None:
    """What can't be right whatever the data is.

    Raises:
        ValueError: if there is such an argument.
    """
    if not NAME.fullmatch(args.name) or 'debug' in args.name:
        raise ValueError(
            "`--name` must be letters, digits or ._+-, without 'debug' (pyiqa cuts "
            f'trainings of that name short), but got {args.name!r}.'
        )
    for option in ('epochs', 'input_size', 'batch_size', 'workers'):
        value, least = getattr(args, option), 0 if option == 'workers' else 1
        if value is not None and value < least:
            raise ValueError(
                f'`--{option.replace("_", "-")}` must be at least {least}, but got '
                f'{value}.'
            )
    if args.mos_range and not args.mos_range[0] < args.mos_range[1]:
        low, high = args.mos_range
        raise ValueError(
            f'`--mos-range` must give the lower score first, but got {low:g} {high:g}.'
        )


def check_name_is_free(args: argparse.Namespace, metric: str) -> None:
    """Nothing that is there is overwritten, but for a resume.

    Raises:
        ValueError: if there is such a fit or such a metric.
    """
    folder = Path(args.output, args.name)
    if folder.exists() and not args.resume:
        raise ValueError(
            f'{folder} is there already: `--resume` goes on with it; otherwise take '
            'another `--name`, or remove the folder.'
        )
    file = Path(args.weights_folder or weights_folder(), metric + SUFFIX)
    if file.exists() and not folder.exists():
        raise ValueError(
            f'There is a metric {metric} already ({file}): take another `--name`, or '
            'remove the file.'
        )


def check_teacher(file: str) -> None:
    """Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if it is no network of ours.
    """
    if 'config' not in read_weights(file).metadata:
        raise ValueError(
            '`--teacher` must be a checkpoint or a published file of a CLIPLikert or '
            f'CLIPKDStudent, but got {file}.'
        )


def make_split(args: argparse.Namespace) -> pd.DataFrame:
    """The checked table with groups and sides; prints what it found.

    Fills `args.mos_range` in where it wasn't given.

    Raises:
        TableError: if the table is wrong.
        ValueError: if its groups are too large to split.
    """
    table = load_table(
        args.csv,
        args.images,
        group=args.group,
        mos_range=tuple(args.mos_range) if args.mos_range else None,
        skip_bad=args.skip_bad,
    )
    mos = table.rows['mos'].astype(float)
    args.mos_range = args.mos_range or [float(mos.min()), float(mos.max())]
    pairs = near_copies(table.fingerprints)
    groups = groups_of(len(mos), pairs, table.rows.get('group'))
    names = _plain(table.rows['image'])
    split = pd.DataFrame({'img_name': names, 'mos': mos, 'group': groups})
    split = add_splits(split, 'group', splits=1, seed=args.seed)
    held_out = int((split[SPLIT] == 'val').sum())
    to_train = len(split) - held_out
    near = len(np.unique(np.concatenate(pairs)))
    image, score = table.columns
    low, high = args.mos_range
    better = 'lower' if args.lower_better else 'higher'
    print(
        f'{args.csv}: images in {image!r}, scores in {score!r}, {low:g} to {high:g}, '
        f'{better} is better.'
    )
    if table.left_out:
        print(f'Left out ({len(table.left_out)}):', *table.left_out, sep='\n  ')
    print(
        f'{len(split)} photographs, {near} of them near copies of others, in '
        f'{groups.max() + 1} groups that stay together: {to_train} to train, '
        f'{held_out} held out.'
    )
    if min(held_out, to_train) < FEWEST_HELD_OUT:
        raise ValueError(
            f'{args.csv}: each side of the split needs at least {FEWEST_HELD_OUT} '
            f'photographs, but got {to_train} and {held_out}: the groups of `--group` '
            'or of near copies are too large.'
        )
    return split


def _plain(names: pd.Series) -> list[str]:
    """Names that pyiqa's reader can't take for numbers, or for missing."""
    return [name if Path(name).suffix[1:].isalpha() else f'./{name}' for name in names]
