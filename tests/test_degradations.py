"""Controlled damage: graded, repeatable, and of every photograph."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from pyiqa_clipkd.degradations import ALL_DISTORTIONS, LEVELS, degrade


def distance(one: Image.Image, other: Image.Image) -> float:
    pixels = [np.asarray(image, float) for image in (one, other)]
    return float(np.abs(pixels[0] - pixels[1]).mean())


@pytest.mark.parametrize('kind', ALL_DISTORTIONS)
def test_each_level_is_further_from_the_photograph(
    kind: str, photographs: dict[str, Image.Image]
) -> None:
    for name in ('coffee', 'rocket'):
        image = photographs[name]
        distances = [
            distance(degrade(image, kind, level), image) for level in range(LEVELS + 1)
        ]
        assert distances[0] == 0
        assert all(np.diff(distances) > 0), distances


@pytest.mark.parametrize('kind', ALL_DISTORTIONS)
def test_between_two_levels_the_damage_is_between_them(
    kind: str, photographs: dict[str, Image.Image]
) -> None:
    image = photographs['coffee']
    low, between, high = (
        distance(degrade(image, kind, level), image) for level in (3, 3.5, 4)
    )
    assert low < between < high


@pytest.mark.parametrize('kind', ALL_DISTORTIONS)
@pytest.mark.parametrize('size', [(1, 1), (3, 200), (17, 5)])
def test_every_size_stays_as_it_is(kind: str, size: tuple[int, int]) -> None:
    image = Image.new('RGB', size, (200, 100, 50))
    damaged = degrade(image, kind, LEVELS)
    assert damaged.size == size
    assert damaged.mode == 'RGB'


def test_lengths_grow_with_the_photograph(photographs: dict[str, Image.Image]) -> None:
    image = photographs['astronaut']
    double = image.resize((2 * image.width, 2 * image.height), Image.Resampling.BICUBIC)
    for kind in ('gaussian_blur', 'motion_blur'):
        large = degrade(double, kind, 4).resize(image.size, Image.Resampling.BOX)
        assert distance(large, degrade(image, kind, 4)) < 1.5


def test_noise_is_new_with_each_seed_and_the_same_with_the_same(
    photographs: dict[str, Image.Image],
) -> None:
    image = photographs['coffee']
    first, again, other = (degrade(image, 'white_noise', 3, s) for s in (1, 1, 2))
    assert distance(first, again) == 0
    assert distance(first, other) > 1


@pytest.mark.parametrize(
    ('kind', 'level', 'message'),
    [
        ('rain', 1, "`kind` must be one of gaussian_blur, .*got 'rain'"),
        ('jpeg', 7, r'`level` must be in \[0, 6\], but got 7'),
        ('jpeg', -1, r'`level` must be in \[0, 6\], but got -1'),
        ('jpeg', float('nan'), r'`level` must be in \[0, 6\], but got nan'),
    ],
)
def test_mistakes_are_named(kind: str, level: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        degrade(Image.new('RGB', (8, 8)), kind, level)
