"""What `train_resident.py` trains on: batches cut from arrays that lie on a device."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pyiqa_clipkd.names import HIGHEST, LOWEST
from pyiqa_clipkd.ranking import DegradationRankingLoss

# Half of the views are zoomed by a factor of up to exp(0.25) = 1.28 either way.
ZOOM = 0.25


class Store:
    """Photographs (N, S, S, 3), and copies (M, C, 2, S, S, 3) of the train side's M.

    Args:
        folders: of `photograph_store.py`, several parts of one data set.
        device: where they lie.
    """

    def __init__(self, folders: list[Path], device: torch.device) -> None:
        def whole(name: str) -> Tensor:
            # Copy on write: in several processes on CPUs they are in memory once.
            files = [folder / f'{name}.npy' for folder in folders]
            parts = [np.load(file, mmap_mode='c') for file in files]
            tensors = [torch.from_numpy(part).to(device) for part in parts]
            return torch.cat(tensors) if len(tensors) > 1 else tensors[0]

        self.photographs, self.copies = whole('photographs'), whole('copies')
        self.levels = whole('levels')
        self.mos = LOWEST + (HIGHEST - LOWEST) * whole('mos')[:, None]
        train = whole('train')
        self.train, self.held_out = train.nonzero()[:, 0], (~train).nonzero()[:, 0]
        self.side = self.photographs.shape[1]


class Phase(NamedTuple):
    """A part of a training.

    Attributes:
        share: of the time.
        size: side of what the networks see, pixels.
        photographs: in a batch.
        copies: how many of these get a moved and two damaged copies.
        mixed: mixtures of two, which only teachers score.
    """

    share: float
    size: int
    photographs: int
    copies: int
    mixed: int = 0


class Batch(NamedTuple):
    """Images (B, 3, S, S) in [0, 1]: photographs, copies, mixtures, in this order."""

    images: Tensor
    mos: Tensor
    levels: Tensor


class Views:
    """Draws batches.

    Args:
        store: the photographs.
        ranking: whose copies they are.
        scale: pixels that a network sees of one pixel of a stored photograph.
        seed: of all draws.
    """

    def __init__(
        self, store: Store, ranking: DegradationRankingLoss, scale: float, seed: int
    ) -> None:
        self.store, self.ranking, self.scale = store, ranking, scale
        self.draw = np.random.default_rng(seed)
        self.order: list[int] = []

    def next_photographs(self, count: int) -> Tensor:
        """Places among those of the train side, each once an epoch."""
        while len(self.order) < count:
            self.order += self.draw.permutation(len(self.store.train)).tolist()
        chosen, self.order = self.order[:count], self.order[count:]
        return torch.tensor(chosen, device=self.store.mos.device)

    def batch(self, phase: Phase) -> Batch:
        store, device = self.store, self.store.mos.device
        places = self.next_photographs(phase.photographs)
        rows = store.train[places]
        window = self._window(phase)
        count = len(rows)
        corner = self.draw.integers(0, store.side - window + 1, (2, count))
        mirrored = self.draw.random(count) < 0.5
        cut = Cut(corner, mirrored, window, phase.size)
        photographs = cut(store.photographs[rows])
        images, k = [photographs], phase.copies
        chain = torch.from_numpy(self.draw.integers(store.copies.shape[1], size=k))
        chain = chain.to(device)
        if k:
            moved = [self.ranking.moved(one, self.draw) for one in photographs[:k]]
            copies = store.copies[places[:k], chain]
            images += [torch.stack(moved), cut(copies[:, 0]), cut(copies[:, 1])]
        if phase.mixed:
            images.append(self._mixed(torch.cat(images), phase.mixed))
        return Batch(
            torch.cat(images), store.mos[rows], store.levels[places[:k], chain]
        )

    def _window(self, phase: Phase) -> int:
        """Side of what is cut from a stored photograph; half of the times zoomed."""
        window = phase.size / self.scale
        if self.draw.random() < 0.5:
            window *= math.exp(self.draw.uniform(-ZOOM, ZOOM))
        return min(self.store.side, round(window))

    def _mixed(self, images: Tensor, count: int) -> Tensor:
        first, second = (
            torch.from_numpy(self.draw.integers(len(images), size=count))
            for _ in range(2)
        )
        share = torch.from_numpy(self.draw.uniform(0.1, 0.9, (count, 1, 1, 1)))
        share = share.to(images)
        return share * images[first] + (1 - share) * images[second]


class Cut:
    """The same window of each of the images (N, S, S, 3), then the size wanted."""

    def __init__(
        self, corner: np.ndarray, mirrored: np.ndarray, window: int, size: int
    ) -> None:
        steps = np.arange(window)
        top, left = corner[:, :, None]
        self.rows = torch.from_numpy(top + steps)
        across = np.where(mirrored[:, None], steps[::-1], steps)
        self.columns = torch.from_numpy(left + across)
        self.size = size

    def __call__(self, images: Tensor) -> Tensor:
        n, device = len(images), images.device
        which = torch.arange(n, device=device)[:, None, None]
        rows = self.rows[:n, :, None].to(device)
        columns = self.columns[:n, None, :].to(device)
        cut = images[which, rows, columns]
        return resized(in_unit_range(cut), self.size)


def in_unit_range(pixels: Tensor) -> Tensor:
    """uint8 (N, H, W, 3) -> (N, 3, H, W) in [0, 1]."""
    return pixels.permute(0, 3, 1, 2).float() / 255


def resized(images: Tensor, size: int) -> Tensor:
    if images.shape[-1] == size:
        return images
    shape = (size, size)
    return F.interpolate(images, shape, mode='bicubic', antialias=True).clamp(0, 1)
