"""Splits keep near copies and groups on one side."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import pytest
from PIL import Image, ImageEnhance

from pyiqa_clipkd.near_copies import fingerprint, near_copies
from pyiqa_clipkd.splits import add_splits, content_groups, hold_out

SPLIT = 'ratio802_seed123_split_01'


def prints_of(images: list[Image.Image], folder: Path) -> np.ndarray:
    for i, image in enumerate(images):
        image.save(folder / f'{i}.png')
    return np.stack([fingerprint(folder / f'{i}.png') for i in range(len(images))])


def random_prints(rows: int) -> np.ndarray:
    return np.random.default_rng(0).random((rows, 128)) < 0.5


def through_jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = BytesIO()
    image.save(buffer, 'jpeg', quality=quality)
    return Image.open(buffer)


def test_copies_of_a_photograph_are_near_and_others_are_not(
    photographs: dict[str, Image.Image], tmp_path: Path
) -> None:
    photo = photographs['coffee']
    width, height = photo.size
    copies = [
        photo,
        photo.copy(),
        photo.resize((width // 2, height // 2)),
        through_jpeg(photo, 30),
        ImageEnhance.Brightness(photo).enhance(0.8),
    ]
    prints = prints_of([*copies, *photographs.values()], tmp_path)
    coffee = {0, 1, 2, 3, 4, 5 + list(photographs).index('coffee')}
    first, second = near_copies(prints)
    pairs = set(zip(first.tolist(), second.tolist(), strict=True))
    assert pairs == {(i, j) for i in coffee for j in coffee if i < j}


def test_pairs_are_found_across_blocks_of_rows() -> None:
    prints = random_prints(2500)
    prints[2400] = prints[3]
    prints[2400, :12] ^= True
    prints[2401] = prints[1500]
    prints[2401, :13] ^= True
    first, second = near_copies(prints)
    assert (first.tolist(), second.tolist()) == ([3], [2400])


def test_near_copies_and_equal_words_become_one_group() -> None:
    prints = random_prints(8)
    prints[1], prints[3] = prints[0], prints[2]
    words = pd.Series(['', 'a', 'a', '', 'b', 'b', '', ''])
    groups = content_groups(prints, words)
    # 0 ~ 1 (copies), 1 ~ 2 (a), 2 ~ 3 (copies): a chain.
    assert len(set(groups[:4])) == 1
    assert groups[4] == groups[5]
    assert len(set(groups)) == 4


def test_without_words_only_copies_are_tied() -> None:
    prints = random_prints(5)
    prints[4] = prints[0]
    assert content_groups(prints).tolist() == [0, 1, 2, 3, 0]


@pytest.mark.parametrize('seed', range(20))
def test_uneven_groups_hold_out_no_more_than_a_fifth(seed: int) -> None:
    groups = np.repeat(np.arange(12), [30, 25, 5, 5, 5, 5, 5, 5, 5, 5, 3, 2])
    held_out = hold_out(groups, np.random.default_rng(seed))
    assert 15 <= held_out.sum() <= 20
    assert not set(groups[held_out]) & set(groups[~held_out])


def test_where_no_group_fits_the_smallest_is_held_out() -> None:
    groups = np.repeat([0, 1, 2], [40, 25, 35])
    assert set(groups[hold_out(groups, np.random.default_rng(0))]) == {1}


def test_rows_with_an_empty_group_are_by_themselves() -> None:
    table = pd.DataFrame({'image': range(40), 'scene': ['a', None] * 20})
    split = add_splits(table, 'scene', splits=1)[SPLIT]
    assert split[::2].nunique() == 1
    assert (split == 'val').sum() == 8


def test_the_seed_decides() -> None:
    table = pd.DataFrame({'image': range(100)})
    one, same, other = (add_splits(table, None, seed=seed) for seed in (1, 1, 2))
    assert one.equals(same)
    assert not one.equals(other)
