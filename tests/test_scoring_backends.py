from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scoring_data import METRIC, photograph

from pyiqa_clipkd.files import file_hash
from pyiqa_clipkd.images import squares
from pyiqa_clipkd.locations import BUNDLED_FOLDER
from pyiqa_clipkd.scoring import backends
from pyiqa_clipkd.scoring.backends import create_backend, resolve_device
from pyiqa_clipkd.weights import write_weights

Without = Callable[[str], None]


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Without:
    """Make a library look as if it weren't installed."""
    find_spec = backends.find_spec

    def hide(library: str) -> None:
        monkeypatch.setattr(
            backends, 'find_spec', lambda n: None if n == library else find_spec(n)
        )

    return hide


def test_both_backends_say_what_they_are_and_agree() -> None:
    made = [
        create_backend(METRIC, kind=kind, device='cpu') for kind in ('onnx', 'torch')
    ]
    weights = BUNDLED_FOLDER / f'{METRIC}.safetensors'
    for backend, name in zip(made, ('onnx', 'torch'), strict=True):
        assert backend.name == name
        assert backend.metric == METRIC
        assert backend.weights == weights.name
        assert backend.sha256 == file_hash(weights)
        assert list(backend.levels) == ['bad', 'poor', 'fair', 'good', 'perfect']
        assert backend.input_size == 384
    images = np.concatenate([squares(photograph(n), 384, crops=1) for n in range(4)])
    (first, a), (second, b) = (backend(images) for backend in made)
    assert first.shape == second.shape == (8,)
    assert np.abs(first - second).max() <= 1e-3
    assert a is not None
    assert b is not None
    assert a.shape == b.shape == (8, 5)
    assert np.abs(a - b).max() <= 1e-3


def test_on_a_processor_onnxruntime_is_taken_where_it_can_do_it(
    without: Without, tmp_path: Path
) -> None:
    def kind(**options: Any) -> str:
        return create_backend(METRIC, device='cpu', **options).name

    copy = tmp_path / 'copy.safetensors'
    copy.write_bytes((BUNDLED_FOLDER / f'{METRIC}.safetensors').read_bytes())
    assert kind() == 'onnx'
    assert kind(weights=BUNDLED_FOLDER / f'{METRIC}.onnx') == 'onnx'
    assert kind(weights=copy) == 'torch'
    assert kind(input_size=64) == 'torch'
    without('onnxruntime')
    assert kind() == 'torch'
    with pytest.raises(ModuleNotFoundError, match='pip install onnxruntime'):
        kind(kind='onnx')
    without('torch')
    assert kind() == 'onnx'
    for options in ({'kind': 'torch'}, {'input_size': 64}, {'weights': copy}):
        with pytest.raises(ModuleNotFoundError, match='pip install torch'):
            kind(**options)


def test_a_broken_onnxruntime_gives_way_to_torch(
    without: Without, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / 'onnxruntime.py').write_text("raise ImportError('DLL load failed')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, 'onnxruntime', raising=False)
    assert create_backend(METRIC, device='cpu').name == 'torch'
    with pytest.raises(ImportError, match='DLL load failed'):
        create_backend(METRIC, kind='onnx')
    without('torch')
    with pytest.raises(ImportError, match='DLL load failed'):
        create_backend(METRIC)


@pytest.fixture(scope='module')
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One network in two precisions with a name, and without one."""
    from pyiqa_clipkd.export import export
    from pyiqa_clipkd.network import CLIPKDStudent

    folder = tmp_path_factory.mktemp('exported')
    network = CLIPKDStudent('timm:test_resnet', embed_dim=16, input_size=64)
    tensors = {k: v for k, v in network.state_dict().items() if k != '_extra_state'}
    weights = folder / 'a.safetensors'
    write_weights(weights, tensors, {'config': network.config})
    return {
        'weights': weights,
        'nameless': export(network, folder / 'nameless.onnx', form='squares'),
        **{
            precision: export(
                'clipkd_resnet18',
                folder / f'{precision}.onnx',
                weights=weights,
                form='squares',
                precision=precision,
            )
            for precision in ('float32', 'float16')
        },
    }


def test_rows_tell_exported_models_apart(exported: dict[str, Path]) -> None:
    for precision, other in (('float32', 'clipkd_resnet18'), ('float16', None)):
        path = exported[precision]
        backend = create_backend(other, weights=path)
        assert (backend.metric, backend.weights) == ('clipkd_resnet18', path.name)
        assert backend.sha256 == file_hash(path)
    nameless = create_backend(METRIC, weights=exported['nameless'])
    assert nameless.sha256 == file_hash(exported['nameless'])


def test_a_model_of_another_metric_is_refused(exported: dict[str, Path]) -> None:
    with pytest.raises(
        ValueError,
        match=r'float32.onnx is a model of clipkd_resnet18, not of clipkd_sw',
    ):
        create_backend('clipkd_swin', weights=exported['float32'])


def test_only_an_onnx_file_is_a_model_for_onnxruntime(
    exported: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r'must be an \.onnx file, .*a\.safetensors'):
        create_backend(METRIC, kind='onnx', weights=exported['weights'])
    capitals = tmp_path / 'X.ONNX'
    shutil.copy(exported['float32'], capitals)
    assert create_backend('clipkd_resnet18', weights=capitals).weights == 'X.ONNX'


def test_weights_of_a_users_own_are_never_scored_with_a_graph_of_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from pyiqa_clipkd.network import CLIPKDStudent

    monkeypatch.setenv('PYIQA_CLIPKD_WEIGHTS', str(tmp_path))
    network = CLIPKDStudent('timm:test_resnet', embed_dim=16, input_size=64)
    tensors = {k: v for k, v in network.state_dict().items() if k != '_extra_state'}
    path = tmp_path / f'{METRIC}.safetensors'
    write_weights(path, tensors, {'config': network.config})
    backend = create_backend(METRIC, device='cpu')
    assert backend.name == 'torch'
    assert backend.sha256 == file_hash(path)


def test_a_regression_head_has_no_probabilities(tmp_path: Path) -> None:
    from pyiqa_clipkd.network import CLIPKDStudent

    network = CLIPKDStudent('timm:test_resnet', head='regression', input_size=64)
    tensors = {k: v for k, v in network.state_dict().items() if k != '_extra_state'}
    path = write_weights(
        tmp_path / 'a.safetensors', tensors, {'config': network.config}
    )
    scores, probabilities = create_backend(METRIC, weights=path, device='cpu')(
        np.zeros((2, 3, 64, 64), np.float32)
    )
    assert scores.shape == (2,)
    assert probabilities is None


def test_devices(monkeypatch: pytest.MonkeyPatch, without: Without) -> None:
    there = {'cuda': False, 'mps': False}
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: there['cuda'])
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: there['mps'])
    monkeypatch.setattr(backends, '_may_have_gpu', lambda: True)
    assert resolve_device('auto') == resolve_device('cpu') == 'cpu'
    for device in ('cuda', 'mps'):
        with pytest.raises(ValueError, match=f'`device` is {device}, but torch finds'):
            resolve_device(device)
    there['mps'] = True
    assert resolve_device('auto') == 'mps'
    there['cuda'] = True
    assert resolve_device('auto') == 'cuda'
    without('torch')
    assert resolve_device('auto') == 'cpu'
    with pytest.raises(ModuleNotFoundError, match='needs torch'):
        resolve_device('cuda')
