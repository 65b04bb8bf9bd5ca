"""What the training sees: which view of an image, drawn the same way each time."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from pyiqa_clipkd.teacher_cache import view_key

# Augmentations of the host that draw from more views than a cache could hold. The
# others leave the image as it is, or have a handful of outcomes (flips, quarter turns).
UNBOUNDED = ('random_crop', 'random_square_resize', 'random_arp_resize', 'randomerase')

Position = tuple[int, int, int]


def check_views(data: dict[str, Any], cache: bool) -> None:
    """Find what a teacher's cache can't help, before it fills the disk.

    Args:
        data: options of the training set.
        cache: whether the teacher's embeddings are cached.

    Raises:
        ValueError: if `views` is no positive integer; if the images have endlessly many
            views, and there is a cache but no `views`.
    """
    views = data.get('views')
    if views is not None and not (type(views) is int and views > 0):
        raise ValueError(f'`views` must be a positive integer or ~, but got {views!r}.')
    augment = data.get('augment') or {}
    unbounded = [name for name in UNBOUNDED if augment.get(name)]
    if cache and unbounded and views is None:
        raise ValueError(
            f'`teacher: cache` with the augmentation {", ".join(unbounded)} would '
            'never meet the same image twice: set `datasets: train: views`, the number '
            'of stored views of each image, or `teacher: cache: ~`.'
        )


class EpochSampler(Sampler):
    """The host's sampler, from the middle of an epoch on.

    Yields (epoch, position in the epoch, index): an enlarged epoch repeats indices.
    Positions count the images of all processes, which take turns: so an image is
    augmented alike, however many processes share a batch.
    """

    def __init__(
        self,
        sampler: Any,
        start_epoch: int,
        done: int,
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.sampler = sampler
        self.start_epoch = start_epoch
        self.done = done
        self.rank = rank
        self.world_size = world_size

    def __iter__(self) -> Iterator[Position]:
        epoch = self.sampler.epoch
        skip = self.done if epoch == self.start_epoch else 0
        rest = islice(enumerate(self.sampler), skip, None)
        return (
            (epoch, turn * self.world_size + self.rank, index) for turn, index in rest
        )

    def __len__(self) -> int:
        return len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(epoch)


class SeededDataset(Dataset):
    """Augmentation that depends on seed, epoch, position and index alone.

    So it is the same for any number of workers, and after a resume.

    Args:
        dataset: of the host.
        seed: of the augmentation.
        views: how many views of an image there are; `None` draws anew each time. View k
            of an image is always the same, whatever the augmentation.
        keys: add `view_key`, the digest of the image by which a teacher's embedding is
            found again.
        seeds: add `seed`, which drew the view.
    """

    def __init__(
        self,
        dataset: Any,
        seed: int,
        *,
        views: int | None = None,
        keys: bool = False,
        seeds: bool = False,
    ) -> None:
        self.dataset = dataset
        self.opt = dataset.opt
        self.seed = seed
        self.views = views
        self.keys = keys
        self.seeds = seeds

    def __getitem__(self, key: Position) -> dict[str, Any]:
        seed = hash((self.seed, *key))
        if self.views is not None:
            view = random.Random(seed).randrange(self.views)
            seed = hash((self.seed, key[-1], view))
        seed %= 2**32
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        item = self.dataset[key[-1]]
        if self.keys:
            item['view_key'] = view_key(item['img'])
        if self.seeds:
            item['seed'] = seed
        return item

    def __len__(self) -> int:
        return len(self.dataset)


def one_view_each(dataset: Any, seed: int) -> DataLoader:
    """Each image once, in the order of the table, with the key of its view.

    Args:
        dataset: of the host, for training.
        seed: of the augmentation; flips and crops are drawn once for each image.
    """
    data = dataset.opt
    positions = [(0, index, index) for index in range(len(dataset))]
    return DataLoader(
        SeededDataset(dataset, seed, views=data.get('views') or 1, keys=True),
        batch_size=data['batch_size_per_gpu'],
        num_workers=data.get('num_worker_per_gpu', 0),
        sampler=positions,
    )
