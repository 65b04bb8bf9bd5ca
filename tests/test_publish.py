"""A training checkpoint becomes a metric by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyiqa
import pytest
import torch
from safetensors import safe_open

from pyiqa_clipkd.files import file_hash
from pyiqa_clipkd.network import CLIPKDStudent, load_network
from pyiqa_clipkd.publish import main, publish
from pyiqa_clipkd.weights import read_weights

NAME = 'clipkd_tiny-mydata'


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv('PYIQA_CLIPKD_WEIGHTS', str(tmp_path / 'weights'))
    torch.manual_seed(0)
    student = CLIPKDStudent('timm:test_efficientnet', embed_dim=24, input_size=48)
    student.state_dict()['head.temperature'].fill_(0.05)
    torch.save({'params': student.state_dict()}, tmp_path / 'net_best.pth')
    return tmp_path / 'net_best.pth'


def test_a_published_checkpoint_scores_by_its_name_at_once(checkpoint: Path) -> None:
    published = publish(checkpoint, NAME, precision='float32')
    metric = pyiqa.create_metric(NAME, device='cpu')
    image = torch.rand(2, 3, 60, 80)
    with torch.no_grad():
        expected = load_network(checkpoint)(image)
    # Not bit by bit: on some CPUs sums depend on where in memory the weights lie.
    torch.testing.assert_close(metric(image), expected, atol=1e-5, rtol=0)
    assert published.parent.name == 'weights'


def test_a_published_name_works_in_the_host_s_command(checkpoint: Path) -> None:
    publish(checkpoint, NAME)
    photo = checkpoint.parent / 'photo.png'
    from PIL import Image
    from skimage import data

    Image.fromarray(data.astronaut()).save(photo)
    result = subprocess.run(
        [sys.executable, '-m', 'pyiqa.pyiqa_cmd', NAME, '-t', str(photo)],
        capture_output=True,
        text=True,
        env={**os.environ, 'HF_HUB_OFFLINE': '1'},
        check=True,
    )
    assert f"'{NAME}': {{'mean':" in result.stdout


def test_half_precision_halves_the_file_and_hardly_moves_the_score(
    checkpoint: Path,
) -> None:
    whole = publish(checkpoint, NAME, precision='float32')
    size = whole.stat().st_size
    image = torch.rand(4, 3, 48, 48)
    with torch.no_grad():
        before = load_network(whole)(image)
        half = publish(checkpoint, NAME, precision='float16')
        after = load_network(half)(image)
    assert half.stat().st_size < 0.6 * size
    assert (before - after).abs().max() < 0.02
    kinds = {t.dtype for t in load_network(half).state_dict().values()}
    assert torch.float16 not in kinds


def test_eight_bits_for_large_tensors_hardly_move_the_score(tmp_path: Path) -> None:
    torch.manual_seed(0)
    student = CLIPKDStudent('resnet18', embed_dim=24, input_size=64)
    torch.save({'params': student.state_dict()}, tmp_path / 'net.pth')
    half, eight = (
        publish(
            tmp_path / 'net.pth', NAME, folder=tmp_path / precision, precision=precision
        )
        for precision in ('float16', 'int8')
    )
    assert eight.stat().st_size < 0.55 * half.stat().st_size
    tensors = load_network(eight).state_dict()
    scales = [name for name in tensors if 'scale' in name]
    assert not scales, 'in memory it is the same network'
    for name, value in load_network(half).state_dict().items():
        if name.endswith('_extra_state'):
            continue
        step = value.abs().amax() / 127
        assert (tensors[name] - value).abs().max() <= step, name
    image = torch.rand(4, 3, 64, 64)
    with torch.no_grad():
        moved = load_network(half)(image) - load_network(eight)(image)
    assert moved.abs().max() < 0.05


def test_the_input_size_of_the_metric_can_differ_from_the_training_s(
    checkpoint: Path,
) -> None:
    published = publish(checkpoint, NAME, input_size=64)
    assert read_weights(published).metadata['config']['input_size'] == 64
    assert 'shorter side to 64' in published.with_suffix('.md').read_text()


def test_a_metric_can_give_mirror_images_the_same_score(checkpoint: Path) -> None:
    image = torch.rand(1, 3, 48, 48)
    published = publish(checkpoint, NAME, precision='float32', mirror_invariant=True)
    assert 'where its light lies left' in published.with_suffix('.md').read_text()
    with torch.no_grad():
        network = load_network(published)
        assert network(image).item() == network(image.flip(-1)).item()
        network = load_network(published, mirror_invariant=False)
        assert network(image).item() != network(image.flip(-1)).item()
        expected = load_network(checkpoint)(image).item()
        assert network(image).item() == pytest.approx(expected, abs=1e-6)


def test_the_file_says_what_it_is(checkpoint: Path) -> None:
    published = publish(checkpoint, NAME, card={'Data': 'my photographs'})
    metadata = read_weights(published).metadata
    assert metadata['config']['encoder'] == 'timm:test_efficientnet'
    assert metadata['config']['input_size'] == 48
    assert metadata['config']['temperature'] == pytest.approx(0.05)
    assert metadata['output'] == 'score in [1, 5], higher is better'
    assert metadata['card'] == {'Data': 'my photographs'}
    assert len(metadata['tensors_sha256']) == 64
    card = published.with_suffix('.md').read_text()
    assert file_hash(published) in card
    assert 'my photographs' in card
    with safe_open(published, 'pt') as file:
        assert json.loads(file.metadata()['pyiqa_clipkd'])['name'] == NAME


def test_the_same_tensors_have_the_same_hash_whenever_they_are_written(
    checkpoint: Path,
) -> None:
    first = read_weights(publish(checkpoint, NAME)).metadata
    again = read_weights(publish(checkpoint, f'{NAME}-2')).metadata
    assert first['tensors_sha256'] == again['tensors_sha256']


@pytest.mark.parametrize(
    'name', ['mobilevit', 'clipkd_', 'clipkd_../evil', 'clipkd_a b']
)
def test_a_bad_name_is_refused(checkpoint: Path, name: str) -> None:
    with pytest.raises(ValueError, match='`name` must start with'):
        publish(checkpoint, name)


def test_a_bad_precision_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match='`precision` must be one of'):
        publish(checkpoint, NAME, precision='int4')


def test_the_command_says_what_is_wrong_in_one_line(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([str(checkpoint.parent / 'none.pth'), '--name', NAME])
    assert 'There is no weight file' in capsys.readouterr().err
    torch.save({'params': {'a': torch.zeros(1)}}, checkpoint.parent / 'other.pth')
    with pytest.raises(SystemExit):
        main([str(checkpoint.parent / 'other.pth'), '--name', NAME])
    assert 'does not say which network' in capsys.readouterr().err


def test_the_command_publishes(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(checkpoint), '--name', NAME, '--data', 'mine', '--results', 'SRCC 0.9'])
    output = capsys.readouterr().out
    assert f'pyiqa {NAME} -t' in output
    assert 'Mind the name' not in output
    main([str(checkpoint), '--name', 'clipkd_mobilevit-mine'])
    text = 'Mind the name: this is timm:test_efficientnet, not timm:mobilevit_s'
    assert text in capsys.readouterr().out
    assert NAME in pyiqa.list_models(filter='clipkd_tiny*')
