"""Controlled changes: one attribute moves step by step, the others stay."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from pyiqa_clipkd.attributes.changes import LEVELS, change, order_agreement
from pyiqa_clipkd.attributes.names import ATTRIBUTES

NAMES = ('coffee', 'chelsea')


@pytest.fixture(scope='module', params=NAMES)
def image(
    request: pytest.FixtureRequest, photographs: dict[str, Image.Image]
) -> Image.Image:
    photograph = photographs[request.param]
    return photograph.resize((240, 160), Image.Resampling.BOX)


def luma(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert('L'), float)


def from_afar(image: Image.Image) -> np.ndarray:
    """(40, 60, 3): neither noise nor fine detail."""
    return np.asarray(image.resize((60, 40), Image.Resampling.BOX), float)


def saturation(image: Image.Image) -> float:
    pixels = from_afar(image)
    return float((pixels - pixels.mean(axis=-1, keepdims=True)).std())


def detail(image: Image.Image) -> float:
    return float(np.abs(np.diff(luma(image))).mean())


PLAIN = {
    'sharpness': detail,
    'brightness': lambda image: luma(image).mean(),
    'contrast': lambda image: from_afar(image).mean(axis=-1).std(),
    'colorfulness': saturation,
    'noisiness': lambda image: -detail(image),
}


@pytest.mark.parametrize('attribute', ATTRIBUTES)
def test_each_level_has_more_of_its_attribute(
    attribute: str, image: Image.Image
) -> None:
    values = [PLAIN[attribute](change(image, attribute, x)) for x in LEVELS[attribute]]
    steps = np.diff(values)
    assert (steps > 0).all(), values
    # No step is lost among the others: people and networks should see each.
    assert steps.min() > 0.02 * abs(values[-1] - values[0])


@pytest.mark.parametrize('attribute', ATTRIBUTES)
def test_light_contrast_and_colour_stay_where_another_changes(
    attribute: str, image: Image.Image
) -> None:
    low, high = (change(image, attribute, LEVELS[attribute][end]) for end in (0, -1))
    for other in ('brightness', 'contrast', 'colorfulness'):
        if other == attribute:
            continue
        own = PLAIN[other](image)
        for changed in (low, high):
            assert PLAIN[other](changed) == pytest.approx(own, rel=0.16), other


@pytest.mark.parametrize('attribute', ['brightness', 'contrast'])
def test_other_light_makes_no_noise(attribute: str, image: Image.Image) -> None:
    rng = np.random.default_rng(0)
    flat = Image.new('RGB', image.size, (70, 90, 80))
    flat.paste((180, 160, 170), (0, 0, image.width // 2, image.height))
    noise = rng.normal(0, 4, (image.height, image.width, 1))
    pixels = np.asarray(flat, float) + noise
    noisy = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
    plain = (slice(20, 140), slice(150, 230))  # within one half
    before = luma(noisy)[plain].std()
    for level in (-1, -0.5, 0.5, 1):
        after = luma(change(noisy, attribute, level))[plain].std()
        assert after == pytest.approx(before, rel=0.25)


def test_noise_is_grey_new_with_each_seed_and_the_same_with_the_same(
    image: Image.Image,
) -> None:
    first, again, other = (change(image, 'noisiness', -0.5, seed) for seed in (1, 1, 2))
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() != other.tobytes()
    moved = np.asarray(first, float) - np.asarray(image, float)
    assert moved.std() > 8
    assert moved.std(axis=-1).max() < 1


def test_level_0_is_the_photograph_and_the_lowest_colour_is_grey(
    image: Image.Image,
) -> None:
    for attribute in ATTRIBUTES:
        assert change(image, attribute, 0) is image
        assert 0 in LEVELS[attribute]
    grey = np.asarray(change(image, 'colorfulness', -1))
    assert (grey == grey[..., :1]).all()


@pytest.mark.parametrize('attribute', ATTRIBUTES)
@pytest.mark.parametrize('size', [(1, 1), (3, 200), (17, 5)])
def test_every_size_stays_as_it_is(attribute: str, size: tuple[int, int]) -> None:
    image = Image.new('RGB', size, (200, 100, 50))
    for level in (-1, 0 if attribute == 'noisiness' else 1):
        changed = change(image, attribute, level)
        assert changed.size == size
        assert changed.mode == 'RGB'


@pytest.mark.parametrize(
    ('attribute', 'level', 'message'),
    [
        ('beauty', 0.5, "`attribute` must be one of sharpness, .*got 'beauty'"),
        ('contrast', 1.5, r'`level` must be in \[-1, 1\], but got 1.5'),
        ('contrast', float('nan'), r'`level` must be in \[-1, 1\], but got nan'),
        ('noisiness', 0.5, r'noisiness must be in \[-1, 0\], but got 0.5'),
    ],
)
def test_mistakes_are_named(attribute: str, level: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        change(Image.new('RGB', (8, 8)), attribute, level)


def test_the_agreement_with_the_order() -> None:
    assert order_agreement([0.1, 0.2, 0.9]) == pytest.approx(1)
    assert order_agreement([3, 2, 1]) == pytest.approx(-1)
    assert order_agreement([0.5, 0.5, 0.5, 0.5]) == 0
    assert order_agreement([1, 3, 2, 4]) == pytest.approx(0.8)
    for wrong in ([1], [1, float('nan')], []):
        with pytest.raises(ValueError, match='`values` must be two or more finite'):
            order_agreement(wrong)
