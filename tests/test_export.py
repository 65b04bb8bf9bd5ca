"""One file for other runtimes: the same scores, whatever the form and the size."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnxruntime import InferenceSession
from PIL import Image
from torch import Tensor

from pyiqa_clipkd import __version__
from pyiqa_clipkd.description import KEY, Description
from pyiqa_clipkd.export import export, write_graph
from pyiqa_clipkd.export.check import Differences, check_photographs
from pyiqa_clipkd.export.command import add_arguments, run
from pyiqa_clipkd.files import file_hash
from pyiqa_clipkd.network import CLIPKDStudent, load_network
from pyiqa_clipkd.publish import publish

NAME = 'clipkd_tiny-mine'
SIZE = 48

# Photographs of every kind of shape: high, wide, tiny, strips, the size itself, odd
# and even rests at the crop, one pixel.
SHAPES = [(61, 80), (80, 61), (48, 48), (48, 99), (99, 48), (1, 1), (1, 300), (300, 1)]
SHAPES += [(47, 50), (50, 47), (7, 200), (200, 7), (500, 333), (49, 48), (48, 49)]


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp('export')


@pytest.fixture(scope='module')
def weights(folder: Path) -> Path:
    """A tiny student as an int8 weight file, with an uncommon temperature and range."""
    torch.manual_seed(0)
    student = CLIPKDStudent('timm:test_efficientnet', embed_dim=400, input_size=SIZE)
    student.state_dict()['head.temperature'].fill_(0.02)
    torch.save({'params': student.state_dict()}, folder / 'net_best.pth')
    return publish(folder / 'net_best.pth', NAME, folder=folder, precision='int8')


@pytest.fixture(scope='module')
def network(weights: Path) -> torch.nn.Module:
    return load_network(weights).requires_grad_(False)


@pytest.fixture(scope='module')
def model(weights: Path, folder: Path) -> Path:
    return export(NAME, folder / 'photographs.onnx', weights=weights)


@pytest.fixture(scope='module')
def session(model: Path) -> InferenceSession:
    return InferenceSession(model)


def pixels(height: int, width: int, count: int = 1) -> np.ndarray:
    """Noise: what a resize changes most."""
    shape = (count, height, width, 3)
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def eager(network: torch.nn.Module, image: np.ndarray) -> tuple[Tensor, Tensor]:
    batch = torch.from_numpy(image).permute(0, 3, 1, 2).float() / 255
    output = network(batch, return_details=True)
    return output.score[:, 0], output.probabilities


def scored(session: InferenceSession, image: np.ndarray) -> tuple[np.ndarray, ...]:
    return tuple(session.run(None, {session.get_inputs()[0].name: image}))


@pytest.mark.parametrize('shape', SHAPES)
def test_photographs_of_every_shape_score_as_in_torch(
    session: InferenceSession, network: torch.nn.Module, shape: tuple[int, int]
) -> None:
    image = pixels(*shape)
    score, probabilities = scored(session, image)
    expected = eager(network, image)
    np.testing.assert_allclose(score, expected[0], atol=2e-4)
    np.testing.assert_allclose(probabilities, expected[1], atol=2e-4)


def test_a_batch_scores_as_its_photographs_do_alone(session: InferenceSession) -> None:
    batch = pixels(61, 80, count=5)
    together, _ = scored(session, batch)
    alone = np.concatenate([scored(session, image[None])[0] for image in batch])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert len(set(together.tolist())) == len(batch)


def test_a_model_says_what_it_is(model: Path, weights: Path) -> None:
    properties = {p.key: p.value for p in onnx.load(model).metadata_props}
    assert Description.decode(properties[KEY]) == Description(
        metric=NAME,
        input='photographs',
        input_size=SIZE,
        levels=('bad', 'poor', 'fair', 'good', 'perfect'),
        weights=weights.name,
        sha256=file_hash(weights),
        precision='float32',
        version=__version__,
    )


def test_a_model_is_valid_and_says_its_shapes(
    model: Path, session: InferenceSession
) -> None:
    onnx.checker.check_model(onnx.load(model), full_check=True)
    (image,) = session.get_inputs()
    assert (image.name, image.type) == ('image', 'tensor(uint8)')
    assert image.shape == ['batch', 'height', 'width', 3]


@pytest.mark.slow
def test_half_precision_is_half_as_large_and_scores_nearly_the_same(
    model: Path, weights: Path, network: torch.nn.Module, tmp_path: Path
) -> None:
    path = tmp_path / 'half.onnx'
    export(NAME, path, weights=weights, precision='float16')
    assert path.stat().st_size < 0.65 * model.stat().st_size
    image = pixels(61, 80)
    score, _ = scored(InferenceSession(path), image)
    np.testing.assert_allclose(score, eager(network, image)[0], atol=0.02)


@pytest.mark.slow
def test_eight_bits_are_a_choice_with_a_measured_loss(
    model: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / 'small.onnx'
    command = [str(path), '-m', NAME, '--weights', str(weights), '--precision', 'int8']
    assert command_line(*command) == 0
    assert path.stat().st_size < 0.6 * model.stat().st_size
    graph = onnx.load(path).graph
    kinds = {node.op_type for node in graph.node}
    assert 'QuantizeLinear' in kinds
    names = {tensor.name for tensor in graph.initializer}
    in_eight_bits = {name for name in names if name.endswith('weight_quantized')}
    assert any('.blocks.3.' in name for name in in_eight_bits)
    # Those of the early stages, which bring no time and cost most, are in float.
    assert not any(f'.blocks.{k}.' in name for k in range(3) for name in in_eight_bits)
    shown = capsys.readouterr().out
    assert 'Against eager torch, on 7 photographs scores differ by 0.0' in shown


def test_a_program_of_torch_export_takes_every_shape(
    weights: Path, network: torch.nn.Module, tmp_path: Path
) -> None:
    path = export(NAME, tmp_path / 'out.pt2', weights=weights)
    notes = {KEY: ''}
    module = torch.export.load(path, extra_files=notes).module()
    assert Description.decode(notes[KEY]).input_size == SIZE
    for shape in SHAPES:
        image = pixels(*shape, count=2)
        score, probabilities = module(torch.from_numpy(image))
        expected = eager(network, image)
        torch.testing.assert_close(score, expected[0], atol=1e-4, rtol=0)
        torch.testing.assert_close(probabilities, expected[1], atol=1e-4, rtol=0)


@pytest.mark.slow
def test_a_network_of_fixed_input_size_and_a_regression_head_can_be_exported(
    tmp_path: Path,
) -> None:
    torch.manual_seed(1)
    student = CLIPKDStudent('timm:test_vit', head='regression', input_size=160).eval()
    path = export(student, tmp_path / 'vit.onnx')
    image = pixels(61, 80, count=3)
    (score,) = scored(InferenceSession(path), image)
    batch = torch.from_numpy(image).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        np.testing.assert_allclose(score, student(batch)[:, 0], atol=2e-4)


def test_a_graph_reads_the_weights_beside_it_and_has_none_itself(
    weights: Path, network: torch.nn.Module
) -> None:
    path = write_graph(NAME, weights.parent)
    graph = onnx.load(path, load_external_data=False).graph
    outside = [
        t for t in graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL
    ]
    assert {entry.value for t in outside for entry in t.external_data[:1]} == {
        weights.name
    }
    kinds = {tensor.data_type for tensor in outside}
    kind = onnx.TensorProto
    assert kinds == {kind.FLOAT, kind.FLOAT16, kind.INT8}
    assert path.stat().st_size < 0.2 * weights.stat().st_size
    squares = np.random.default_rng(0).random((2, 3, SIZE, SIZE), np.float32)
    score, probabilities = scored(InferenceSession(path), squares)
    expected = network(torch.from_numpy(squares), return_details=True)
    np.testing.assert_allclose(score, expected.score[:, 0], atol=1e-4)
    np.testing.assert_allclose(probabilities, expected.probabilities, atol=1e-4)
    weights.with_suffix('.onnx').unlink()


# --- mistakes and the command ---------------------------------------------------------


def command_line(*words: str) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args(words))


@pytest.mark.parametrize(
    ('path', 'options', 'message'),
    [
        ('a.tflite', {}, r"`path` must end with .onnx or .pt2, but got '.*a.tflite'"),
        ('a.onnx', {'precision': 'int4'}, "`precision` must be one of .* got 'int4'"),
        ('a.onnx', {'form': 'film'}, "`form` must be one of .* but got 'film'"),
        ('a.pt2', {'precision': 'int8'}, "must be float32, but got 'int8': take .onnx"),
    ],
)
def test_wrong_arguments_are_named_before_any_work(
    path: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        export('clipkd_nobody', tmp_path / path, **options)
    assert not [*tmp_path.iterdir()]


def test_a_network_with_crops_is_refused(tmp_path: Path) -> None:
    student = CLIPKDStudent('timm:test_efficientnet', embed_dim=8, crops=2)
    with pytest.raises(ValueError, match='must have no crops, but has 2'):
        export(student, tmp_path / 'a.onnx')


def test_without_the_onnx_package_the_command_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        'pyiqa_clipkd.export.find_spec', lambda name: None if name == 'onnx' else name
    )
    assert command_line(str(tmp_path / 'a.onnx'), '-m', 'clipkd_swin') == 2
    shown = capsys.readouterr().err
    assert "needs onnx: pip install 'pyiqa-clipkd[export]'" in shown


def test_what_fails_halfway_leaves_no_file_and_keeps_the_old_one(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / 'out.pt2'
    old.write_text('old')

    def fail(program: object, file: object, **options: object) -> None:
        raise OSError('disk full')

    monkeypatch.setattr(torch.export, 'save', fail)
    with pytest.raises(OSError, match='disk full'):
        export(NAME, old, weights=weights)
    assert [path.name for path in tmp_path.iterdir()] == ['out.pt2']
    assert old.read_text() == 'old'


def test_the_command_measures_on_the_photographs_of_a_folder(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photographs = tmp_path / 'photographs'
    photographs.mkdir()
    for number in range(3):
        image = Image.fromarray(pixels(60 + number, 80)[0])
        image.save(photographs / f'{number}.png')
    (photographs / 'notes.txt').touch()
    output = str(tmp_path / 'new' / 'out.onnx')
    words = ['-m', NAME, '--weights', str(weights), '--input', 'squares']
    assert command_line(output, *words, '--check', str(photographs)) == 0
    shown = capsys.readouterr().out
    assert f'Wrote {output}: float32' in shown
    assert 'on 3 photographs scores differ by 0.0000' in shown


def test_unreadable_photographs_are_named_and_left_out(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / 'empty.png').touch()
    Image.fromarray(pixels(60, 80)[0]).save(tmp_path / 'a.png')
    output = tmp_path / 'out.pt2'
    words = [str(output), '-m', NAME, '--weights', str(weights)]
    words += ['--check', str(tmp_path)]
    assert command_line(*words) == 2
    assert 'has 1 that can be read' in capsys.readouterr().err
    assert not output.exists()
    Image.fromarray(pixels(80, 60)[0]).save(tmp_path / 'b.png')
    assert command_line(*words) == 0
    shown = capsys.readouterr()
    assert f'{tmp_path / "empty.png"}: the file is empty' in shown.err
    assert 'on 2 photographs scores differ' in shown.out


def test_the_command_fails_where_scores_moved_too_far(
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        'pyiqa_clipkd.export.command.differences',
        lambda *_: Differences(0.001, 0.006, 13),
    )
    words = (str(tmp_path / 'a.pt2'), '-m', NAME, '--weights', str(weights))
    assert command_line(*words) == 1
    assert 'that is more than 0.005: do not use' in capsys.readouterr().err


def test_a_check_needs_photographs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'two photographs or more, but .* has 0'):
        check_photographs(tmp_path)
