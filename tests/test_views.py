"""Which view of an image the training sees."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pyiqa.data import build_dataset
from torch.utils.data import DataLoader
from training_data import data_options, write_images

from pyiqa_clipkd.views import EpochSampler, SeededDataset, check_views, one_view_each


class CountingSampler:
    epoch = 0

    def __iter__(self) -> Any:
        return iter(range(10 * self.epoch, 10 * self.epoch + 6))

    def __len__(self) -> int:
        return 6

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


def test_the_sampler_leaves_out_what_the_interrupted_epoch_had_seen() -> None:
    sampler = EpochSampler(CountingSampler(), start_epoch=1, done=4)
    sampler.set_epoch(1)
    assert list(sampler) == [(1, 4, 14), (1, 5, 15)]
    sampler.set_epoch(2)
    assert list(sampler) == [(2, i, 20 + i) for i in range(6)]


class RandomDataset:
    opt: ClassVar[dict[str, Any]] = {}

    def __getitem__(self, index: int) -> tuple[float, float]:
        return torch.rand(1).item(), random.random()

    def __len__(self) -> int:
        return 5


def test_augmentation_depends_on_seed_epoch_position_and_index_alone() -> None:
    data = SeededDataset(RandomDataset(), seed=1)
    again = SeededDataset(RandomDataset(), seed=1)
    torch.rand(3)
    assert data[0, 0, 1] == again[0, 0, 1]
    assert len({data[0, 0, 1], data[1, 0, 1], data[0, 0, 2], data[0, 5, 1]}) == 4
    assert SeededDataset(RandomDataset(), seed=2)[0, 0, 1] != data[0, 0, 1]


@pytest.fixture
def dataset(tmp_path: Path) -> Any:
    write_images(tmp_path / 'data')
    options = data_options(tmp_path / 'data')['train']
    return build_dataset({**options, 'phase': 'train', 'override_phase': 'train'})


def keys_of(dataset: SeededDataset, index: int, epochs: int) -> set[bytes]:
    items = (dataset[epoch, 5, index] for epoch in range(epochs))
    return {bytes(item['view_key'].tolist()) for item in items}


def test_an_image_has_as_many_views_as_asked_for(dataset: Any) -> None:
    endless = SeededDataset(dataset, 1, keys=True)
    assert len(keys_of(endless, 0, 40)) > 30  # random crops
    stored = SeededDataset(dataset, 1, views=3, keys=True)
    first = keys_of(stored, 0, 40)
    assert len(first) == 3
    assert keys_of(stored, 0, 60) == first
    assert not keys_of(stored, 1, 40) & first
    assert keys_of(SeededDataset(dataset, 2, views=3, keys=True), 0, 40) != first


def test_flips_alone_are_two_views(tmp_path: Path) -> None:
    write_images(tmp_path / 'data')
    augment = {'hflip': True, 'center_crop': 32}
    options = data_options(tmp_path / 'data', augment=augment)['train']
    flips = build_dataset({**options, 'phase': 'train', 'override_phase': 'train'})
    assert len(keys_of(SeededDataset(flips, 1, keys=True), 0, 40)) == 2


def test_views_are_the_same_in_every_worker(dataset: Any) -> None:
    def keys(workers: int) -> torch.Tensor:
        views = SeededDataset(dataset, 1, views=4, keys=True)
        order = [(3, position, 21 - position) for position in range(22)]
        loader: DataLoader = DataLoader(
            views, batch_size=4, num_workers=workers, sampler=order
        )
        return torch.cat([batch['view_key'] for batch in loader])

    alone = keys(0)
    assert alone.shape == (22, 16)
    assert torch.equal(alone, keys(2))


def test_no_keys_where_nobody_needs_them(dataset: Any) -> None:
    assert 'view_key' not in SeededDataset(dataset, 1)[0, 0, 0]


def test_one_view_each_is_among_the_views_of_the_training(dataset: Any) -> None:
    dataset.opt['views'] = 2
    batches = list(one_view_each(dataset, seed=1))
    assert sum(len(batch['img']) for batch in batches) == len(dataset) == 22
    training = SeededDataset(dataset, 1, views=2, keys=True)
    for index, key in enumerate(torch.cat([batch['view_key'] for batch in batches])):
        assert bytes(key.tolist()) in keys_of(training, index, 20)


@pytest.mark.parametrize('views', [0, -1, 2.5, 'all', True])
def test_a_wrong_number_of_views_is_an_error(views: Any) -> None:
    with pytest.raises(ValueError, match=r'`views` must be a positive integer'):
        check_views({'views': views}, cache=False)


def test_a_cache_of_endless_views_is_an_error() -> None:
    data: dict[str, Any] = {'augment': {'hflip': True, 'random_crop': 32}}
    check_views(data, cache=False)
    check_views({**data, 'views': 4}, cache=True)
    check_views({'augment': {'hflip': True, 'random_crop': None}}, cache=True)
    with pytest.raises(ValueError, match=r'random_crop would never.*views'):
        check_views(data, cache=True)
