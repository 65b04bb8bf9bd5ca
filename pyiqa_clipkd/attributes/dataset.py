"""Photographs with labels of five attributes, for the host's loop."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import torch
from pyiqa.data.base_iqa_dataset import BaseIQADataset

from pyiqa_clipkd.attributes.names import ATTRIBUTES
from pyiqa_clipkd.images import UnreadableError, read_photograph

PATH, ERROR = 'path', 'error'


class AttributeDataset(BaseIQADataset):
    """A table of photographs and their attributes, with the host's augmentation.

    The host's own data sets know one label a photograph; this one knows five.

    Options, beside the host's `augment`, `phase`, `override_phase` and `split_index`:

    - `meta_info_file`: Parquet, CSV or JSONL with the columns `path` and `ATTRIBUTES`,
      as `pyiqa-clipkd label` writes it. Rows with an `error`, without a label or
      without their file are left out; the log says how many.
    - `dataroot_target`: folder to which relative paths belong; without it the working
      directory.
    - `split_table`: CSV whose first column names photographs and which has the split
      columns, for instance the `meta_info_file` of a data set with human scores: so
      what is held out there is held out here. Photographs are found by their file name;
      those that it doesn't name are left out.
    - `mos_normalize`, `mos_range`, `lower_better`: as everywhere in the host, for all
      five columns. Without them labels are in [0, 1] already, 1 is the good side.

    An item has `img`, (3, H, W) in [0, 1], `mos_label`, (5,) in [0, 1] in the order of
    `ATTRIBUTES`, and `img_path`. Photographs are read as for labelling and scoring.

    Raises:
        FileNotFoundError: if a table is missing.
        ValueError: if it lacks columns or splits, or no labelled photograph is left.
    """

    def init_path_mos(self, opt: dict[str, Any]) -> None:
        file = Path(opt['meta_info_file'])
        table = _read(file, '`meta_info_file`')
        _check_columns(table, (PATH, *ATTRIBUTES), f'`meta_info_file` {file}')
        rows = len(table)
        table = _labelled(table)
        if opt.get('split_table'):
            table = _with_splits(table, Path(opt['split_table']))
        folder = Path(opt.get('dataroot_target') or '')
        table = table.assign(path=[str(folder / path) for path in table[PATH]])
        there = table[PATH].map(os.path.isfile).astype(bool)
        if not there.all():
            gone = table[PATH][~there]
            self.logger.warning(f'{len(gone)} files are missing, first {gone.iloc[0]}.')
        table = table[there].reset_index(drop=True)
        if table.empty:
            raise ValueError(
                f'`meta_info_file`: {file} has no photograph with labels below '
                f'`dataroot_target`, {folder}.'
            )
        if opt.get('split_index') is not None:
            _check_splits(table, file)
        self.logger.info(f'{file}: {len(table)} photographs of {rows} rows are used.')
        self.meta_info = table
        labels = table[list(ATTRIBUTES)].to_numpy(np.float32)
        self.paths_mos = [list(row) for row in zip(table[PATH], labels, strict=True)]

    def mos_normalize(self, opt: dict[str, Any]) -> None:
        if not opt.get('mos_normalize'):
            return
        low, high = opt['mos_range']
        for row in self.paths_mos:
            row[1] = (row[1] - low) / (high - low)
            if opt.get('lower_better'):
                row[1] = 1 - row[1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        path, labels = self.paths_mos[index]
        try:
            image = read_photograph(path).image
        except UnreadableError as error:
            raise ValueError(f'{path} has labels, but no pixels: {error}.') from error
        return {
            'img': self.trans(image) * self.img_range,
            'mos_label': torch.from_numpy(labels),
            'img_path': path,
        }


def _read(file: Path, option: str) -> pd.DataFrame:
    if not file.is_file():
        raise FileNotFoundError(f'{option}: there is no file {file}.')
    if file.suffix == '.parquet':
        return pd.read_parquet(file)
    if file.suffix == '.jsonl':
        return pd.read_json(file, lines=True)
    return pd.read_csv(file)


def _check_columns(table: pd.DataFrame, names: tuple[str, ...], what: str) -> None:
    if missing := [name for name in names if name not in table.columns]:
        raise ValueError(
            f'{what} must have the columns {", ".join(names)}, but lacks '
            f'{", ".join(missing)}.'
        )


def _check_splits(table: pd.DataFrame, file: Path) -> None:
    if not any('split' in name for name in table.columns):
        raise ValueError(
            f'`split_index`: {file} has no column with splits. Add them with '
            'scripts/make_splits.py, name a `split_table` that has them, or set '
            '`data:split_index=~` and a `meta_info_file` each for train and val.'
        )


def _labelled(table: pd.DataFrame) -> pd.DataFrame:
    """The rows that have a label of each attribute and no error."""
    labels = table[list(ATTRIBUTES)].apply(pd.to_numeric, errors='coerce')
    good = np.isfinite(labels.to_numpy(float)).all(axis=1)
    if ERROR in table.columns:
        good &= (table[ERROR].isna() | (table[ERROR] == '')).to_numpy()
    return table.assign(**labels)[good]


def _with_splits(table: pd.DataFrame, file: Path) -> pd.DataFrame:
    """The rows that `file` names, with its split columns in place of their own."""
    splits = _read(file, '`split_table`')
    columns = [name for name in splits.columns if 'split' in name]
    if not columns:
        raise ValueError(f'`split_table` {file} has no column with splits.')
    names = [Path(str(name)).name for name in splits.iloc[:, 0]]
    if len(set(names)) < len(names):
        raise ValueError(f'`split_table` {file} names a photograph twice.')
    sides = splits[columns].set_axis(names)
    own = [name for name in table.columns if 'split' not in name]
    found = table[PATH].map(lambda path: Path(path).name)
    rows = found.isin(sides.index).to_numpy()
    words = sides.loc[found[rows]].set_axis(table.index[rows])
    return table.loc[rows, own].join(words)
