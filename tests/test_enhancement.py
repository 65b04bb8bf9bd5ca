"""Enhancement: nothing at first, within limits after, and a metric can train it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import pyiqa
import pytest
import torch
from PIL import Image
from script_modules import SCRIPTS, load_script
from torch import Tensor

from pyiqa_clipkd.degradations import degrade
from pyiqa_clipkd.enhancement import (
    MAX_FACTOR,
    MAX_STOPS,
    OUTPUTS,
    EnhancementNetwork,
    enhance,
    noise,
    settings_from,
)
from pyiqa_clipkd.metric import CLIPKDMetric

METRIC = 'clipkd_efficientnet_lite'
DENOISING, EXPOSURE, CONTRAST, SATURATION, CURVES = 0, 1, 2, 3, slice(4, None)


def positions(slider: int | slice = 0, value: float | Tensor = 0.0) -> Tensor:
    """All sliders at 0 but for one."""
    result = torch.zeros(1, OUTPUTS)
    result[:, slider] = value
    return result


def moved(img: Tensor, slider: int | slice, value: float | Tensor) -> Tensor:
    return enhance(img, settings_from(positions(slider, value)))


def psnr(img: Tensor, other: Tensor) -> float:
    return -10 * float((img - other).square().mean().log10())


def trembling(network: EnhancementNetwork) -> EnhancementNetwork:
    """With sliders that stand somewhere."""
    weight = network.get_parameter('head.2.weight')
    torch.nn.init.normal_(weight, generator=torch.manual_seed(0))
    return network


@pytest.fixture(scope='module')
def script() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)  # it takes pieces from other scripts
        yield load_script('train_enhancement')


# --- the network ----------------------------------------------------------------------


@pytest.mark.parametrize(
    'shape', [(2, 3, 48, 64), (1, 1, 30, 7), (1, 3, 1, 1), (1, 3, 2, 500)]
)
def test_a_new_network_changes_nothing_at_any_size(shape: tuple[int, ...]) -> None:
    img = torch.rand(shape, generator=torch.manual_seed(0))
    same = EnhancementNetwork()(img)
    assert same.shape == (shape[0], 3, *shape[2:])
    assert (same - img).abs().max() < 1e-5


def test_settings_stay_within_their_limits_for_any_weights(photo: Tensor) -> None:
    network = trembling(EnhancementNetwork())
    with torch.no_grad():
        network.get_parameter('head.2.weight').mul_(100)
        settings = settings_from(network.positions(photo))
        enhanced = network(photo)
    assert 0 <= settings.denoising <= 1
    assert abs(settings.exposure) <= MAX_STOPS
    for factor in (settings.contrast, settings.saturation):
        assert 0.999 / MAX_FACTOR <= factor <= 1.001 * MAX_FACTOR
    assert (settings.curves.diff(dim=-1) > 0).all()
    assert (settings.curves[..., 0] == 0).all()
    assert settings.curves[..., -1].numpy() == pytest.approx(1)
    assert enhanced.min() >= 0
    assert enhanced.max() <= 1


def test_each_photograph_of_a_batch_has_settings_of_its_own(photo: Tensor) -> None:
    network = trembling(EnhancementNetwork()).eval()
    batch = torch.cat([photo, photo.flip(3) / 3])
    with torch.inference_mode():
        together, alone = network(batch), torch.cat([network(x[None]) for x in batch])
        sliders = network.positions(batch)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    assert (sliders[0] - sliders[1]).abs().max() > 0.05


def test_half_precision_is_enhanced_in_full(photo: Tensor) -> None:
    assert EnhancementNetwork()(photo.half()).dtype == torch.float32


# --- what the sliders mean ------------------------------------------------------------


def test_a_stop_is_twice_the_light_and_undoes_underexposure(
    photographs: dict[str, Image.Image], as_tensor: Callable[[Image.Image], Tensor]
) -> None:
    gray = torch.full((1, 3, 8, 8), 0.3)
    brighter = moved(gray, EXPOSURE, 1 / MAX_STOPS)
    assert float(brighter.mean() ** 2.2 / 0.3**2.2) == pytest.approx(2, rel=1e-3)
    pristine = as_tensor(photographs['coffee'])
    dark = as_tensor(degrade(photographs['coffee'], 'underexposure', 2))  # 1.3 stops
    assert (
        psnr(moved(dark, EXPOSURE, 1.3 / MAX_STOPS), pristine)
        > 35
        > psnr(dark, pristine)
    )


def test_contrast_and_saturation_undo_their_loss(
    photographs: dict[str, Image.Image], as_tensor: Callable[[Image.Image], Tensor]
) -> None:
    pristine = as_tensor(photographs['coffee'])
    flat = as_tensor(degrade(photographs['coffee'], 'contrast_loss', 3))  # by half
    double = np.log(2) / np.log(MAX_FACTOR)
    assert psnr(moved(flat, CONTRAST, double), pristine) > psnr(flat, pristine) + 10
    gray = moved(pristine, SATURATION, -1.0)
    assert gray.std(1).mean() < 0.5 * pristine.std(1).mean()
    assert moved(pristine, SATURATION, 1.0).std(1).mean() > pristine.std(1).mean()


def test_denoising_takes_noise_away_and_leaves_a_clean_photograph(
    photographs: dict[str, Image.Image], as_tensor: Callable[[Image.Image], Tensor]
) -> None:
    pristine = as_tensor(photographs['coffee'])
    noisy = as_tensor(degrade(photographs['coffee'], 'white_noise', 3))
    assert float(255 * noise(noisy)[0, 1]) == pytest.approx(16, rel=0.15)
    assert psnr(moved(noisy, DENOISING, 1.0), pristine) > psnr(noisy, pristine) + 4
    assert psnr(moved(pristine, DENOISING, 1.0), pristine) > 45
    assert torch.equal(
        moved(noisy, DENOISING, -1.0), moved(noisy, DENOISING, 0.0)
    )  # no other side


def test_a_curve_rises_and_each_colour_has_its_own() -> None:
    ramp = torch.linspace(0, 1, 200).view(1, 1, 1, -1).expand(1, 3, 1, 200)
    wild = 2 * torch.rand(18, generator=torch.manual_seed(3)) - 1
    curved = moved(ramp, CURVES, wild)
    # Saturation and contrast are left at 1, so each channel shows its own curve.
    assert (curved.diff(dim=3) > -1e-6).all()
    assert curved[..., 0].abs().max() < 1e-5
    assert (curved[..., -1] - 1).abs().max() < 1e-5
    assert (curved[:, 0] - curved[:, 1]).abs().max() > 0.02


@pytest.mark.parametrize('start', [0.0, -0.5])
def test_every_slider_has_a_gradient_where_it_starts(
    photo: Tensor, start: float
) -> None:
    sliders = positions(DENOISING, start).requires_grad_(True)
    weights = torch.rand(photo.shape, generator=torch.manual_seed(0))
    (enhance(0.8 * photo + 0.1, settings_from(sliders)) * weights).sum().backward()
    assert sliders.grad is not None
    assert sliders.grad.isfinite().all()
    assert (sliders.grad != 0).all()


# --- training -------------------------------------------------------------------------


def test_the_metric_as_pyiqas_loss_has_the_gradient_of_the_metric(
    photo: Tensor,
) -> None:
    gradients = []
    for score in (
        pyiqa.create_metric(METRIC, as_loss=True, input_size=64, device='cpu'),
        CLIPKDMetric(METRIC, input_size=64),
    ):
        torch.manual_seed(0)
        network = trembling(EnhancementNetwork())
        (-score(network(photo)).mean()).backward()
        found = [p.grad for p in network.parameters() if p.grad is not None]
        gradients.append(torch.cat([gradient.flatten() for gradient in found]))
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize('name', ['price_0', 'price_0.05', 'l1'])
def test_a_few_steps_bring_dark_photographs_back(
    script: Any,
    photographs: dict[str, Image.Image],
    as_tensor: Callable[[Image.Image], Tensor],
    name: str,
) -> None:
    pristine = torch.cat(
        [as_tensor(photographs[key].resize((96, 96))) for key in ('coffee', 'chelsea')]
    )
    dark = pristine / 3
    args = script.parse_arguments(
        ['--images', 'x', '--csv', 'x', '-o', 'x', '--size', '96']
    )
    score = CLIPKDMetric(METRIC, input_size=96)
    torch.manual_seed(0)
    network = script.train(
        iter([(dark, pristine)] * 12),
        script.objectives(args)[name],
        steps=12,
        rate=0.01,
    )
    with torch.inference_mode():
        better = network(dark)
        assert psnr(better, pristine) > psnr(dark, pristine) + 1
        if name != 'l1':
            assert float((score(better) - score(dark)).mean()) > 0.05


def test_a_price_keeps_sliders_nearer_to_where_they_began(
    script: Any, photo: Tensor
) -> None:
    sliders = {}
    small = photo[..., :96, :96]
    args = script.parse_arguments(
        ['--images', 'x', '--csv', 'x', '-o', 'x', '--size', '96', '--prices', '0', '9']
    )
    for name in ('price_0', 'price_9'):
        torch.manual_seed(0)
        objective = script.objectives(args)[name]
        network = script.train(iter([(small,) * 2] * 6), objective, steps=6, rate=0.01)
        sliders[name] = float(network.positions(small).abs().sum())
    assert sliders['price_9'] < 0.5 * sliders['price_0']


def test_gains_are_counted_from_the_damaged_copy(script: Any) -> None:
    case = {'group': 'free', 'photograph': 'a', 'kind': 'white_noise'}
    rows = pd.DataFrame(
        [
            {**case, 'way': 'damaged', 'psnr': 20.0},
            {**case, 'way': 'l1', 'psnr': 23.0},
            {**case, 'way': 'price_0', 'psnr': 18.0},
        ]
    )
    assert script.gains(rows).gain.tolist() == [0, 3, -2]


def test_the_sheet_shows_typical_cases_and_the_worst_ones_once(script: Any) -> None:
    rng = np.random.default_rng(0)
    rows = []
    for photograph, kind in product([*'abcdef', 'equal'], script.DAMAGES):
        case = {'group': 'free', 'photograph': photograph, 'kind': kind}
        before = 80.0 if kind == 'none' or photograph == 'equal' else 20.0
        after = 15.0 if photograph == 'equal' else before + rng.normal()
        rows.append({**case, 'way': 'damaged', 'psnr': before})
        rows.append({**case, 'way': 'price_0', 'psnr': after})
    gains = script.gains(pd.DataFrame(rows))
    lines = script.chosen(pd.DataFrame(rows), 'price_0')
    typical = [case for word, case in lines if word == 'typical']
    worst = [case for word, case in lines if word == 'worst']
    assert [case.kind for case in typical] == list(script.DAMAGES)
    for case in typical:
        of_kind = gains[(gains.kind == case.kind) & (gains.way == 'price_0')].gain
        assert case.gain == of_kind.median()
    assert {case.kind for case in worst} == set(script.DAMAGES) - {'none'}
    for case in worst:
        assert case.photograph != 'equal'
        of_kind = gains[(gains.kind == case.kind) & (gains.photograph != 'equal')]
        assert case.gain == of_kind.gain.min()


@pytest.mark.parametrize('kind', ['underexposure', 'colour_fade', 'white_noise'])
def test_damage_is_repeatable_and_grows_with_its_level(
    script: Any, photographs: dict[str, Image.Image], kind: str
) -> None:
    image = photographs['chelsea']
    damage = script.DAMAGES[kind]
    mild, severe = (np.asarray(damage(image, level, 7), float) for level in (1, 4))
    assert np.array_equal(mild, np.asarray(damage(image, 1, 7)))
    original = np.asarray(image, float)
    assert abs(severe - original).mean() > abs(mild - original).mean() > 0
    assert script.DAMAGES['none'](image, 4, 7) is image


@pytest.mark.slow
def test_the_script_trains_judges_shows_and_goes_on(
    photographs: dict[str, Image.Image], tmp_path: Path
) -> None:
    names = list(photographs)
    for name, image in photographs.items():
        image.resize((96, 64)).save(tmp_path / f'{name}.png')
    table = pd.DataFrame({'name': [f'{n}.png' for n in names], 'mos': 0.9})
    table['split'] = ['train', 'train', 'train', 'test']
    table.to_csv(tmp_path / 'scores.csv', index=False)
    words = [SCRIPTS / 'train_enhancement.py', '--images', tmp_path, '--size', '32']
    words += ['--csv', tmp_path / 'scores.csv', '--column', 'split', '--steps', '2']
    words += ['--batch', '2', '--prices', '0', '--l1-steps', '1']
    words += ['--networks', tmp_path / 'networks']
    words += ['--free', tmp_path, '-o', tmp_path / 'results']
    command = [sys.executable, *map(str, words)]
    subprocess.run(command, check=True, capture_output=True)
    rows = pd.read_csv(tmp_path / 'results' / 'rows.csv')
    ways = ['damaged', 'auto_contrast', 'price_0', 'l1']
    assert rows.way.unique().tolist() == ways
    assert len(rows) == 5 * 6 * len(ways)
    assert rows.notna().all(axis=None)
    facts = json.loads((tmp_path / 'results' / 'record.json').read_text())
    assert facts['photographs_seen'] == {'metric': 4, 'l1': 2}
    sheet = Image.open(tmp_path / 'results' / 'examples.jpg')
    assert sheet.width > 500
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / 'networks').iterdir()}
    assert len(before) == 2
    subprocess.run(command, check=True, capture_output=True)
    assert before == {p: p.stat().st_mtime_ns for p in before}


# --- mistakes -------------------------------------------------------------------------


def test_images_of_eight_bits_or_of_another_shape_are_refused() -> None:
    network = EnhancementNetwork()
    with pytest.raises(TypeError, match=r'must be floating point.*uint8'):
        network(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r'\(N, 3 or 1, H, W\).*\(3, 8, 8\)'):
        network(torch.zeros(3, 8, 8))


def test_settings_of_another_number_of_photographs_are_refused(photo: Tensor) -> None:
    with pytest.raises(ValueError, match='those of 1 photographs, but got those of 2'):
        enhance(photo, settings_from(torch.zeros(2, OUTPUTS)))


def test_a_side_without_photographs_is_named(script: Any, tmp_path: Path) -> None:
    table = tmp_path / 'scores.csv'
    table.write_text('name,mos,split\na.png,0.2,train\n')
    args = script.parse_arguments(
        ['--images', 'x', '--csv', str(table), '-o', 'x', '--column', 'split']
    )
    with pytest.raises(SystemExit, match=r"no well scored photograph .* 'train'"):
        script.well_scored(args, 'train')


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--steps', '0'], '`--steps` must be at least 1, but got 0'),
        (['--prices', '-1'], '`--prices` must be 0 or more, but got -1'),
    ],
)
def test_a_wrong_argument_gives_one_clear_line(
    script: Any, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        script.parse_arguments(['--images', 'x', '--csv', 'x', '-o', 'x', *arguments])
    assert message in capsys.readouterr().err
