"""The weights in the package: there, small, offline, and worth something."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pyiqa
import pytest
import torch
from PIL import Image
from scipy.stats import spearmanr
from torch import Tensor

from pyiqa_clipkd.degradations import PLAIN
from pyiqa_clipkd.export import export
from pyiqa_clipkd.export.check import check_photographs, differences
from pyiqa_clipkd.files import file_hash
from pyiqa_clipkd.locations import BUNDLED_FOLDER, bundled_metrics
from pyiqa_clipkd.network import load_network
from pyiqa_clipkd.runtime import Runtime
from pyiqa_clipkd.weights import read_weights

FILES = [BUNDLED_FOLDER / f'{name}.safetensors' for name in bundled_metrics()]
SMALL = ('clipkd_efficientnet_lite', 'clipkd_efficientnet', 'clipkd_mobilevit')

# Less than each reached on photographs that it hasn't seen: a guard against mistakes.
# The figures are in configs/results/release/.
LEAST_SRCC = {
    'clipkd_efficientnet_lite': 0.82,
    'clipkd_efficientnet': 0.8,
    'clipkd_mobilevit': 0.72,
    'clipkd_resnet18': 0.74,
    'clipkd_swin': 0.72,
}
STUDENTS = sorted(LEAST_SRCC)
HELD_OUT = 250

# A folder with BIQ2021's photographs and human scores; they are not ours to ship.
BIQ2021 = Path(os.environ.get('PYIQA_CLIPKD_BIQ2021', 'datasets/biq2021'))


@pytest.fixture(scope='module', params=STUDENTS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope='module')
def metric(name: str) -> torch.nn.Module:
    return pyiqa.create_metric(name, device='cpu')


def views(image: Image.Image) -> list[Image.Image]:
    """The photograph and its four overlapping corners."""
    width, height = image.size
    w, h = int(0.7 * width), int(0.7 * height)
    corners = [(x, y) for x in (0, width - w) for y in (0, height - h)]
    return [image, *(image.crop((x, y, x + w, y + h)) for x, y in corners)]


def test_bundled_files_are_small_and_say_what_they_are() -> None:
    assert [file.stem for file in FILES] == STUDENTS
    everything = [file for file in BUNDLED_FOLDER.iterdir() if file.is_file()]
    in_the_wheel = sum(len(zlib.compress(file.read_bytes())) for file in everything)
    assert in_the_wheel <= 60e6
    for file in FILES:
        assert file.stat().st_size <= 10e6 or file.stem not in SMALL
        metadata = read_weights(file).metadata
        card = file.with_suffix('.md').read_text()
        assert metadata['name'] == file.stem
        assert file_hash(file) in card, 'the card belongs to other weights'
        assert metadata['card'].keys() >= {'Data', 'Licence', 'Start', 'Limits'}
        assert '| Results | SRCC' in card


@pytest.mark.parametrize('name', ['clipkd_efficientnet_lite'], indirect=True)
def test_damaged_copies_score_lower(
    metric: torch.nn.Module,
    photographs: dict[str, Image.Image],
    as_tensor: Callable[[Image.Image], Tensor],
) -> None:
    right = total = 0
    for image in photographs.values():
        for view in views(image):
            score = metric(as_tensor(view)).item()
            for damage in PLAIN.values():
                total += 1
                right += metric(as_tensor(damage(view))).item() < score
    assert total == 60
    assert right / total >= 0.9


def test_scores_differ_between_photographs_and_stay_in_range(
    metric: torch.nn.Module,
    photographs: dict[str, Image.Image],
    as_tensor: Callable[[Image.Image], Tensor],
) -> None:
    scores = [metric(as_tensor(image)).item() for image in photographs.values()]
    assert all(1 <= score <= 5 for score in scores)
    assert max(scores) - min(scores) > 0.1


def test_the_same_photograph_has_the_same_score_every_time_and_in_any_batch(
    metric: torch.nn.Module, photo: Tensor
) -> None:
    alone = metric(photo)
    assert torch.equal(alone, metric(photo))
    batch = metric(torch.cat([photo.flip(-1), photo, photo * 0.5]))
    assert batch[1] == pytest.approx(alone[0], abs=1e-5)


def test_a_photograph_and_its_mirror_image_have_the_same_score(
    name: str, metric: torch.nn.Module, photo: Tensor
) -> None:
    runtime = Runtime(name)
    # Of 450 px both sides lose as much, of 451 one loses a pixel more.
    for width, most in ((450, 1e-5), (451, 0.05)):
        view = photo[..., :width]
        images = [
            Image.fromarray((255 * one[0]).round().byte().permute(1, 2, 0).numpy())
            for one in (view, view.flip(-1))
        ]
        scores = [runtime.score(image).score for image in images]
        assert scores[0] == pytest.approx(scores[1], abs=most)
        scores = [metric(one).item() for one in (view, view.flip(-1))]
        assert scores[0] == pytest.approx(scores[1], abs=most)


def test_as_a_loss_it_gives_the_image_a_gradient(name: str, photo: Tensor) -> None:
    loss = pyiqa.create_metric(name, as_loss=True, device='cpu')
    image = photo.clone().requires_grad_(True)
    loss(image).backward()
    assert image.grad is not None
    assert image.grad.isfinite().all()
    assert image.grad.abs().sum() > 0


@pytest.mark.slow
def test_the_host_s_command_scores_a_file_and_a_folder_without_a_network(
    name: str, tmp_path: Path, photographs: dict[str, Image.Image]
) -> None:
    if not (unshare := shutil.which('unshare')):
        pytest.skip('needs `unshare` to take the network away')
    folder = tmp_path / 'photographs'
    folder.mkdir()
    for photograph, image in photographs.items():
        image.save(folder / f'{photograph}.jpg')
    environment = {k: v for k, v in os.environ.items() if not k.startswith('HF_')}
    offline = [unshare, '--map-root-user', '--net']
    if subprocess.run([*offline, 'true'], check=False).returncode:
        pytest.skip('this system lets nobody take the network away')
    for target in (folder / 'coffee.jpg', folder):
        result = subprocess.run(
            [*offline, sys.executable, '-m', 'pyiqa.pyiqa_cmd', name, '-t', target],
            capture_output=True,
            text=True,
            env=environment | {'HOME': str(tmp_path)},
            check=False,
        )
        assert f"'{name}': {{'mean':" in result.stdout, result.stderr


@pytest.mark.slow
def test_eight_bits_move_no_score_far(name: str, tmp_path: Path) -> None:
    photographs = check_photographs()
    seen, others = photographs[::2], photographs[1::2]
    model = tmp_path / 'int8.onnx'
    export(name, model, precision='int8', photographs=seen)
    network = load_network(BUNDLED_FOLDER / f'{name}.safetensors')
    found = differences(network, model, others)
    assert found.median < 0.02
    assert found.maximum < 0.2


@pytest.mark.slow
def test_the_ranks_of_held_out_photographs_follow_people_s(
    name: str, metric: torch.nn.Module, as_tensor: Callable[[Image.Image], Tensor]
) -> None:
    if not BIQ2021.is_dir():
        pytest.skip('needs BIQ2021; PYIQA_CLIPKD_BIQ2021 may name its folder')
    import pandas as pd  # type: ignore[import-untyped]

    table = pd.read_csv(BIQ2021 / 'meta_info_BIQ2021_subset.csv')
    table = table[table['ratio802_seed123_split_01'] == 'test']
    table = table.sample(HELD_OUT, random_state=0)
    scores = [
        metric(as_tensor(Image.open(BIQ2021 / 'Images' / file).convert('RGB'))).item()
        for file in table['img_name']
    ]
    assert spearmanr(scores, table['mos']).statistic >= LEAST_SRCC[name]
