"""A training as the host's loop counts it, and what it can go on from."""

from __future__ import annotations

import math
import os
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def loop_iterations(
    train: Mapping[str, Any],
    images: float,
    batch: int,
    *,
    world_size: int = 1,
    loaded: int | None = None,
) -> int:
    """How many iterations the host's loop will really run.

    The loop plans with ceil(images / batch) an epoch, but its loader drops the last
    short batch; it adds one spare epoch and stops at `total_iter` (never later).

    Args:
        train: options with `total_epoch` or `total_iter`.
        images: in an epoch, enlarged.
        batch: the `batch_size_per_gpu`.
        world_size: number of processes.
        loaded: images that one loader's batch has, where it isn't `batch`.
    """
    planned = math.ceil(images / (batch * world_size))
    if train.get('total_epoch') is None:
        total = int(train['total_iter'])
    else:
        total = int(train['total_epoch']) * planned
    in_an_epoch = math.ceil(images / world_size) // (loaded or batch)
    return min(total, (math.ceil(total / planned) + 1) * in_an_epoch)


def recorded_command(words: Iterable[object], root: Path) -> str:
    """A Python command as the records of measurements show it.

    Args:
        words: script and arguments.
        root: checkout; paths below it are shown relative to it.
    """
    return ' '.join(['python', *map(str, words)]).replace(f'{root}{os.sep}', '')


def recorded_commit(root: Path) -> str:
    """Of a checkout; marked if it has changes that aren't committed."""
    git = ['git', '-C', str(root), 'describe', '--always', '--dirty', '--abbrev=12']
    return subprocess.run(git, capture_output=True, text=True).stdout.strip()


def newest_checkpoint(states: Path, models: Path) -> int | None:
    """The last iteration with a training state and its weights; `None`: there is none.

    Args:
        states: folder of `<iteration>.state`.
        models: folder of `net_<iteration>.pth`.
    """
    iterations = (
        int(file.stem)
        for file in states.glob('*.state')
        if file.stem.isdigit() and (models / f'net_{file.stem}.pth').is_file()
    )
    return max(iterations, default=None)
