"""The example that restores a photograph, by the script's own command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from script_modules import SCRIPTS, load_script
from torch import Tensor

SCRIPT = SCRIPTS / 'restore.py'


@pytest.fixture(scope='module')
def restore() -> Any:
    return load_script('restore')


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_settings_of_zero_change_nothing(restore: Any, photo: Tensor) -> None:
    same = restore.enhance(photo, torch.zeros(7))
    assert (same - photo).abs().max() < 2e-4


@pytest.mark.parametrize('number', range(7))
def test_each_setting_has_a_gradient_and_stays_in_range(
    restore: Any, photo: Tensor, number: int
) -> None:
    settings = torch.zeros(7, requires_grad=True)
    (restore.enhance(photo, settings) * photo).sum().backward()
    assert settings.grad is not None
    assert settings.grad.isfinite().all()
    assert settings.grad[number] != 0
    for sign in (-1, 1):
        end = torch.zeros(7)
        end[number] = sign * list(restore.SETTINGS.values())[number]
        changed = restore.enhance(photo, end)
        assert (changed - photo).abs().mean() > 0.001
        assert changed.min() >= 0
        assert changed.max() <= 1


def test_brighter_saturated_and_sharper_mean_what_they_say(
    restore: Any, photo: Tensor
) -> None:
    def with_setting(name: str, value: float) -> Tensor:
        settings = torch.zeros(7)
        settings[list(restore.SETTINGS).index(name)] = value
        enhanced: Tensor = restore.enhance(photo, settings)
        return enhanced

    assert with_setting('exposure of red', 0.2)[:, 0].mean() > photo[:, 0].mean()
    assert with_setting('gamma', -0.3).mean() > photo.mean()
    assert with_setting('contrast', 0.3).std() > photo.std()
    assert with_setting('saturation', -0.7).std(1).mean() < photo.std(1).mean()
    sharp = with_setting('sharpness', 1)
    assert sharp.diff(dim=-1).abs().mean() > photo.diff(dim=-1).abs().mean()


@pytest.mark.slow
@pytest.mark.parametrize('free', [False, True])
def test_the_score_goes_up_and_what_was_done_is_told(
    tmp_path: Path, free: bool
) -> None:
    Image.open(SCRIPT.parents[1] / 'tests/photos/coffee.jpg').resize((120, 80)).save(
        tmp_path / 'photo.png'
    )
    result = run(
        *(tmp_path / 'photo.png', '-o', tmp_path / 'out.png', '--steps', '4'),
        *('--damage', 'underexposure', '4', '--json', tmp_path / 'figures.json'),
        *('--side-by-side', tmp_path / 'sheet.jpg'),
        *(['--free-pixels'] if free else []),
    )
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / 'figures.json').read_text())
    assert figures['after']['score'] > figures['before']['score'] + 0.01
    assert figures['scores'][0] == pytest.approx(figures['before']['score'], abs=0.002)
    assert 'psnr' in figures['after']
    assert f'score {figures["after"]["score"]}' in result.stdout
    assert ('settings' in figures) != free
    assert Image.open(tmp_path / 'out.png').size == (120, 80)
    assert Image.open(tmp_path / 'sheet.jpg').width == 3 * 120 + 2 * 8
    if free:  # nobody sees four steps of 0.002
        assert figures['change']['largest'] <= 4


@pytest.mark.parametrize(
    ('options', 'told'),
    [
        (['--steps', '0'], '`--steps` must be at least 1'),
        (['--damage', 'fire', '1'], '`--damage` must be one of gaussian_blur'),
        (['--damage', 'jpeg', '7'], 'levels 1 to 6, but got 7'),
        (['--damage', 'jpeg', '1', '--reference', 'a.png'], 'takes the photograph'),
    ],
)
def test_wrong_options_are_told_before_any_work(
    restore: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    told: str,
) -> None:
    monkeypatch.setattr('sys.argv', ['restore', 'photo.png', '-o', 'out.png', *options])
    with pytest.raises(SystemExit) as caught:
        restore.main()
    assert caught.value.code == 2
    assert told in capsys.readouterr().err


def test_a_reference_of_another_size_is_an_error(
    restore: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, side in (('photo.png', 40), ('other.png', 41)):
        Image.fromarray(np.zeros((side, 40, 3), np.uint8)).save(name)
    words = ['restore', 'photo.png', '-o', 'out.png', '--reference', 'other.png']
    monkeypatch.setattr('sys.argv', words)
    with pytest.raises(SystemExit, match='must have the size of the photograph'):
        restore.main()
    assert not Path('out.png').exists()
