"""Photographs resized once equal photographs resized while training."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd  # type: ignore[import-untyped]
import torch
from PIL import Image
from pyiqa.data import build_dataset
from training_data import data_options

SCRIPT = Path(__file__).parents[1] / 'scripts' / 'resize_images.py'


def test_the_pixels_are_those_of_the_training(
    tmp_path: Path, photographs: dict[str, Image.Image]
) -> None:
    folder = tmp_path / 'data'
    (folder / 'images' / 'sub').mkdir(parents=True)
    names = ['sub/astronaut.jpg', 'chelsea.jpg', 'coffee.png']
    for name in names:
        photographs[Path(name).stem].save(folder / 'images' / name)
    table = {'img_name': names, 'mos': [0.2, 0.5, 0.9], 'scene': ['a', 'b', 'a']}
    pd.DataFrame(table).to_csv(folder / 'meta.csv', index=False)
    command = [sys.executable, str(SCRIPT), str(folder / 'meta.csv'), '--images']
    command += [str(folder / 'images'), '--size', '64', '-o', str(tmp_path / 'small')]
    for _ in range(2):  # the second run keeps what is there
        subprocess.run(command, check=True, capture_output=True)
    written = pd.read_csv(tmp_path / 'small' / 'meta.csv')
    assert list(written.img_name) == ['sub/astronaut.png', 'chelsea.png', 'coffee.png']
    assert list(written.scene) == ['a', 'b', 'a']

    augment: dict[str, Any] = {
        'hflip': False,
        'resize': {'size': 64, 'interpolation': 3},
    }
    options: dict[str, Any] = {
        'augment': {**augment, 'center_crop': 64},
        'split_index': None,
    }
    large = build_dataset({**data_options(folder)['train'], **options})
    options |= {
        'dataroot_target': str(tmp_path / 'small' / 'images'),
        'meta_info_file': str(tmp_path / 'small' / 'meta.csv'),
    }
    small = build_dataset({**data_options(folder)['train'], **options})
    for one, other in zip(large, small, strict=True):
        assert torch.equal(one['img'], other['img'])
        assert one['mos_label'] == other['mos_label']


def test_names_that_would_meet_are_an_error(tmp_path: Path) -> None:
    table = pd.DataFrame({'image': ['a.jpg', 'a.bmp'], 'mos': [1, 2]})
    table.to_csv(tmp_path / 'scores.csv', index=False)
    command = [sys.executable, str(SCRIPT), str(tmp_path / 'scores.csv'), '--images']
    command += [str(tmp_path), '--size', '64', '-o', str(tmp_path / 'small')]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert 'differ in their suffix only' in result.stderr
