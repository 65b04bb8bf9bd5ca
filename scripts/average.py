"""The weighted mean of trained networks, as if it were a training of its own.

    python scripts/average.py -opt configs/release/readout/efficientnet_lite_mean.yml

Of networks that have a training in common it keeps most of what each of them gained
(Wortsman et al. 2022). `average` of the option file names the checkpoints and their
shares, which sum to 1. The mean and a run.json lie where those of a training would.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from resident_run import ROOT, forget_record, write_checkpoint, write_record
from torch import Tensor

from pyiqa_clipkd.experiment import recorded_commit
from pyiqa_clipkd.options import load_options, with_split
from pyiqa_clipkd.weights import CONFIG_KEY, encode_config, read_weights


def average(shares: Mapping[str, float]) -> dict[str, Tensor]:
    """Weighted mean of the tensors of checkpoints; whole numbers, and the
    description of the network, are those of the last one.

    Args:
        shares: file -> its share.

    Raises:
        ValueError: if the shares don't sum to 1, or the networks are not the same one.
    """
    if not math.isclose(sum(shares.values()), 1):
        raise ValueError(f'`average`: shares must sum to 1, but got {dict(shares)}.')
    parts = {file: read_weights(file) for file in shares}
    last = list(parts)[-1]
    shapes = {file: shapes_of(part.tensors) for file, part in parts.items()}
    for file, found in shapes.items():
        if found != shapes[last]:
            raise ValueError(f'`average`: {file} is not the same network as {last}.')
    mean: dict[str, Tensor] = {
        name: sum(  # type: ignore[misc]
            share * parts[file].tensors[name] for file, share in shares.items()
        )
        if tensor.is_floating_point()
        else tensor
        for name, tensor in parts[last].tensors.items()
    }
    return mean | {CONFIG_KEY: encode_config(parts[last].metadata['config'])}


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def written(options: dict[str, Any]) -> Path:
    """The checkpoint of the mean that an option file describes."""
    split = options['datasets']['train']['split_index']
    shares = {with_split(f, split): s for f, s in options['average'].items()}
    params = average(shares)
    forget_record(options)
    path = write_checkpoint(options, {'params': params})
    record = {
        'name': options['name'],
        'seconds': 0,
        'torch': torch.__version__,
        'commit': recorded_commit(ROOT),
        'options': options,
    }
    write_record(options, record)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('-opt', type=Path, required=True, help='option file')
    parser.add_argument('--force_yml', nargs='+', metavar='KEY:KEY=VALUE')
    args = parser.parse_args()
    print(written(load_options(args.opt, args.force_yml or [])))


if __name__ == '__main__':
    main()
