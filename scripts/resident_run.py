"""What trainings from arrays share: the command line, the records, the figures."""

from __future__ import annotations

import argparse
import json
import math
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from resident_views import Store
from scipy.stats import pearsonr, spearmanr
from torch import Tensor, nn

from pyiqa_clipkd.experiment import recorded_commit
from pyiqa_clipkd.files import written_whole
from pyiqa_clipkd.options import load_options
from pyiqa_clipkd.pipeline import keep_freed_memory
from pyiqa_clipkd.ranking import DegradationRankingLoss

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = 50  # one photograph in so many tells a store from another


class Training(Protocol):
    """One option file."""

    def run(self) -> dict[str, Any]:
        """Train; returns the record."""

    def save(self) -> Path:
        """Returns the checkpoint."""


def parser(description: str | None) -> argparse.ArgumentParser:
    """Of the options that `train_all` needs."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('-opt', type=Path, nargs='+', required=True, help='files')
    parser.add_argument('--store', type=Path, nargs='+', required=True, help='folders')
    parser.add_argument('--device', help='default: cuda, or cpu with `num_gpu: 0`')
    parser.add_argument('--commit', default=recorded_commit(ROOT), help='to record')
    parser.add_argument('--force_yml', nargs='+', metavar='KEY:KEY=VALUE')
    return parser


def train_all(
    args: argparse.Namespace,
    build: Callable[[dict[str, Any], Store, torch.device], Training],
) -> None:
    """One option file after the other; each leaves a checkpoint and run.json."""
    files = [load_options(path, args.force_yml or []) for path in args.opt]
    on_gpu = any(options.get('num_gpu', 1) for options in files)
    device = torch.device(args.device or ('cuda' if on_gpu else 'cpu'))
    if device.type == 'cpu':
        keep_freed_memory()
    store = Store(args.store, device)
    for options in files:
        training = build(options, store, device)
        forget_record(options)
        record = training.run() | {'commit': args.commit}
        path = training.save()
        write_record(options, record)
        print(path, record['seconds'], 's', flush=True)


def experiment(options: dict[str, Any]) -> Path:
    """The folder of a training, where release.py looks."""
    return Path('experiments', options['name'])


def write_checkpoint(options: dict[str, Any], checkpoint: dict[str, Any]) -> Path:
    path = experiment(options) / 'models' / 'net_best.pth'
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as unfinished:
        torch.save(checkpoint, unfinished)
    return path


def forget_record(options: dict[str, Any]) -> None:
    """Before it is trained again: until the end, release.py finds it unfinished."""
    (experiment(options) / 'run.json').unlink(missing_ok=True)


def write_record(options: dict[str, Any], record: dict[str, Any]) -> None:
    """The last file of a training."""
    with written_whole(experiment(options) / 'run.json') as unfinished:
        unfinished.write_text(json.dumps(record, indent=1) + '\n')


def ranking_loss(options: dict[str, Any]) -> DegradationRankingLoss:
    """That of `train: ranking_loss_opt`."""
    ranking = dict(options['train']['ranking_loss_opt'])
    ranking.pop('type')
    return DegradationRankingLoss(**ranking)


def decay_groups(parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """For an optimizer: biases and scales of normalizations don't decay."""
    every = [*parameters]
    return [
        {'params': [p for p in every if p.ndim > 1]},
        {'params': [p for p in every if p.ndim < 2], 'weight_decay': 0.0},
    ]


def finite(name: str, losses: dict[str, Tensor]) -> dict[str, float]:
    """The losses of a batch as numbers.

    Raises:
        RuntimeError: if one isn't finite any more.
    """
    values = {key: float(value.detach()) for key, value in losses.items()}
    if not all(map(math.isfinite, values.values())):
        raise RuntimeError(
            f'{name}: the losses are {values}. Lower the learning rate, or train '
            'without `mixed_precision`.'
        )
    return values


def made_of(store: Store) -> dict[str, Any]:
    """What tells a store from another: of one in so many photographs and copies."""
    return {
        'photographs': checksum(store.photographs[::SAMPLE]),
        'copies': checksum(store.copies[::SAMPLE, 0]),
        'train': checksum(store.train),
    }


def checksum(tensor: Tensor) -> int:
    """Of all its bytes."""
    return zlib.crc32(np.ascontiguousarray(tensor.cpu().numpy()).data)


def agreement(scores: Tensor, mos: Tensor) -> dict[str, float]:
    """Of (N,) scores with human ones."""
    found, wanted = scores.float().cpu().numpy(), mos.cpu().numpy()
    return {
        'srcc': round(float(spearmanr(found, wanted)[0]), 4),
        'plcc': round(float(pearsonr(found, wanted)[0]), 4),
        'mae': round(float(np.abs(found - wanted).mean()), 4),
    }
