"""Measures follow what they're named after, and hardly anything else."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter
from script_modules import load_script

from pyiqa_clipkd.attributes.measures import at_scale, measure
from pyiqa_clipkd.attributes.names import ATTRIBUTES
from pyiqa_clipkd.attributes.ranks import REFERENCE, MeasureLabeller, Ranks
from pyiqa_clipkd.images import UnreadableError, read_photograph

BIQ2021 = os.environ.get('PYIQA_CLIPKD_BIQ2021')


def from_array(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8)).convert('RGB')


def edges(blur: float, low: float = 60, high: float = 200) -> Image.Image:
    """Vertical edges, 64 pixels apart, blurred by a sigma in pixels."""
    from scipy.ndimage import gaussian_filter1d

    row = np.where(np.arange(384) // 64 % 2, high, low).astype(float)
    row = gaussian_filter1d(row, blur) if blur else row
    return from_array(np.tile(row, (256, 1)))


@pytest.mark.parametrize('blur', [0, 1, 2, 4])
def test_sharpness_is_that_of_the_closed_form(blur: float) -> None:
    # The slope of an edge with sigma b after a blur with s falls with sqrt(s^2 + b^2).
    expected = np.sqrt((3**2 + blur**2) / (1 + blur**2))
    assert measure(edges(blur))['sharpness'] == pytest.approx(expected, rel=0.09)


def test_sharpness_heeds_neither_contrast_nor_noise() -> None:
    sharp, blurred = edges(0.5), edges(2)
    rng = np.random.default_rng(0)
    for image in (sharp, blurred):
        own = measure(image)['sharpness']
        pixels = np.asarray(image, float)
        flat = from_array(128 + 0.4 * (pixels - 128))
        assert measure(flat)['sharpness'] == pytest.approx(own, rel=0.03)
        noise = rng.normal(0, 20, (*pixels.shape[:2], 1))
        noisy = from_array(pixels + noise)
        assert measure(noisy)['sharpness'] == pytest.approx(own, rel=0.1)


@pytest.mark.parametrize('sigma', [2, 5, 15])
def test_noise_is_found_beside_detail(
    sigma: float, photographs: dict[str, Image.Image]
) -> None:
    image = photographs['rocket'].filter(ImageFilter.GaussianBlur(1))
    pixels = np.asarray(image, float)
    noise = np.random.default_rng(0).normal(0, sigma, (*pixels.shape[:2], 1))
    found = measure(from_array(pixels + noise))['noisiness']
    # The plainest tenth, of which each square is some luck: a little less than all.
    assert 0.75 * sigma < found < 1.1 * sigma
    assert measure(image)['noisiness'] < 1


def test_light_contrast_and_colour_are_those_of_the_definitions() -> None:
    flat = measure(Image.new('RGB', (64, 64), (200, 100, 50)))
    luma = 0.299 * 200 + 0.587 * 100 + 0.114 * 50
    assert flat['brightness'] == pytest.approx(luma, abs=0.5)
    assert flat['contrast'] == pytest.approx(0, abs=1e-3)
    # Hasler and Suesstrunk: 0.3 times the distance of the mean from grey.
    assert flat['colorfulness'] == pytest.approx(0.3 * np.hypot(100, 100), rel=0.001)
    halves = Image.new('RGB', (64, 64), (100, 100, 100))
    halves.paste((200, 200, 200), (0, 0, 32, 64))
    found = measure(halves)
    assert found['contrast'] == pytest.approx(50)
    assert found['colorfulness'] == pytest.approx(0, abs=1e-3)
    halves.paste((255, 0, 0), (0, 0, 32, 64))  # half of it red, half grey
    spread, mean = np.hypot(127.5, 63.75), np.hypot(127.5, 63.75)
    assert measure(halves)['colorfulness'] == pytest.approx(spread + 0.3 * mean)


def test_a_large_photograph_is_measured_as_it_is_seen(
    photographs: dict[str, Image.Image],
) -> None:
    image = photographs['astronaut']
    twice = image.resize((1024, 1024), Image.Resampling.BOX)
    assert at_scale(twice).size == (512, 512)
    assert measure(twice) == measure(image)
    assert at_scale(photographs['chelsea']) is photographs['chelsea']


def test_what_is_too_small_is_refused() -> None:
    with pytest.raises(UnreadableError, match='too small to be measured: 31 x 99'):
        measure(Image.new('RGB', (31, 99)))
    assert set(measure(Image.new('RGB', (32, 32)))) == set(ATTRIBUTES)
    assert at_scale(Image.new('RGB', (8192, 512))).size == (4096, 256)
    with pytest.raises(UnreadableError, match='too small to be measured: 5000 x 33'):
        measure(Image.new('RGB', (5000, 33)))


@pytest.fixture
def quantiles() -> dict[str, list[float]]:
    rising = [10.0, 20.0, 40.0]
    return dict.fromkeys(ATTRIBUTES, rising) | {
        'noisiness': [-9.0, -3.0, -1.0, -1.0, -1.0],
        'colorfulness': [0.0, 0.0, 8.0],
    }


def ranked(ranks: Ranks, **measures: float) -> dict[str, float]:
    return ranks(dict.fromkeys(ATTRIBUTES, 20.0) | measures)


def test_a_value_is_the_share_that_is_no_better(
    quantiles: dict[str, list[float]],
) -> None:
    ranks = Ranks(quantiles)
    values = [
        ranked(ranks, contrast=x)['contrast'] for x in (5, 10, 15, 20, 30, 40, 99)
    ]
    assert values == [0, 0, 0.25, 0.5, 0.75, 1, 1]
    noise = [ranked(ranks, noisiness=x)['noisiness'] for x in (20, 9, 6, 3, 1, 0.2, 0)]
    assert noise == [0, 0, 0.12, 0.25, 1, 1, 1]  # what nobody sees is clean
    colour = [ranked(ranks, colorfulness=x)['colorfulness'] for x in (0, 4, 8)]
    assert colour == [0.5, 0.75, 1]  # of as many grey photographs


@pytest.mark.parametrize('wrong', [[], [1.0], [2.0, 1.0], [1.0, float('nan')]])
def test_quantiles_that_are_none_are_refused(
    quantiles: dict[str, list[float]], wrong: list[float]
) -> None:
    with pytest.raises(ValueError, match='`quantiles` of contrast must be two or more'):
        Ranks({**quantiles, 'contrast': wrong})
    del quantiles['contrast']
    with pytest.raises(ValueError, match='`quantiles` of contrast must be two or more'):
        Ranks(quantiles)


def test_labels_are_hundredths_and_name_their_reference(
    tmp_path: Path, photographs: dict[str, Image.Image]
) -> None:
    labeller = MeasureLabeller()
    labels = labeller(photographs['coffee'])
    assert list(labels) == [*ATTRIBUTES, *(f'raw_{name}' for name in ATTRIBUTES)]
    for attribute in ATTRIBUTES:
        assert 0 < labels[attribute] <= 1
        assert round(labels[attribute], 2) == labels[attribute]
    other = tmp_path / 'reference.json'
    stored = json.loads(REFERENCE.read_text())
    stored['quantiles']['contrast'][0] = 0
    other.write_text(json.dumps(stored))
    assert MeasureLabeller(other).identity != labeller.identity
    assert MeasureLabeller().identity == labeller.identity


def test_values_follow_their_own_change_and_leave_others_alone(
    photographs: dict[str, Image.Image],
) -> None:
    script = load_script('attribute_table')
    images = [
        photographs[name].resize((300, 200), Image.Resampling.BOX)
        for name in ('coffee', 'chelsea', 'rocket')
    ]
    labeller = script.create_labeller('measures')
    found = script.summary([script.agreements(image, labeller, 0) for image in images])
    assert min(found['own'].values()) >= 0.9, found['own']
    assert max(found['others'].values()) < 0.4, found['table']


@pytest.mark.slow
@pytest.mark.skipif(not BIQ2021, reason='PYIQA_CLIPKD_BIQ2021 names no folder')
def test_they_do_so_on_photographs_in_the_wild() -> None:
    import pandas as pd  # type: ignore[import-untyped]

    folder = Path(str(BIQ2021))
    table = pd.read_csv(folder / 'meta_info_BIQ2021_subset.csv')
    held_out = table[table['ratio802_seed123_split_01'] == 'test'].img_name
    script = load_script('attribute_table')
    labeller = MeasureLabeller()
    tables = []
    for number, name in enumerate(held_out.sample(16, random_state=0)):
        image = at_scale(read_photograph(folder / 'Images' / name).image)
        if measure(image)['colorfulness'] >= script.PALE:
            tables.append(script.agreements(image, labeller, number))
    found = script.summary(tables)
    assert min(found['own'].values()) >= 0.9, found['own']
    assert max(found['others'].values()) < 0.4, found['table']
