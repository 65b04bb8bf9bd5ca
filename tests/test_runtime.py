"""Scores without torch: the same ones, from any thread, in any batch."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from scoring_data import ODD

from pyiqa_clipkd.files import file_hash
from pyiqa_clipkd.images import UnreadableError, squares
from pyiqa_clipkd.locations import BUNDLED_FOLDER, bundled_metrics
from pyiqa_clipkd.metric import CLIPKDMetric
from pyiqa_clipkd.network import CLIPKDStudent
from pyiqa_clipkd.runtime import Runtime

CHECKOUT = Path(__file__).parents[1]
COFFEE = CHECKOUT / 'tests' / 'photos' / 'coffee.jpg'
LITE = 'clipkd_efficientnet_lite'
BUNDLED = bundled_metrics()

# Swin has the largest graph: its masks of attention are constants.
LARGEST_GRAPH = 1_000_000


@pytest.fixture(scope='module')
def runtime() -> Runtime:
    return Runtime(LITE)


@pytest.fixture(scope='module')
def views(photographs: dict[str, Image.Image]) -> np.ndarray:
    """Five squares of different photographs."""
    images = [Image.open(COFFEE), *photographs.values()]
    return np.concatenate([squares(image, 384) for image in images])


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / 'weights'
    folder.mkdir()
    monkeypatch.setenv('PYIQA_CLIPKD_WEIGHTS', str(folder))
    return folder


def eager_score(metric: torch.nn.Module, image: Image.Image) -> float:
    batch = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    with torch.inference_mode():
        return float(metric(batch))


@pytest.mark.parametrize('name', BUNDLED)
def test_every_bundled_graph_belongs_to_the_weights_beside_it(name: str) -> None:
    graph = BUNDLED_FOLDER / f'{name}.onnx'
    assert graph.stat().st_size < LARGEST_GRAPH
    runtime = Runtime(name)
    assert (runtime.path, runtime.metric) == (graph, name)
    assert runtime.sha256 == file_hash(BUNDLED_FOLDER / runtime.weights)
    model = onnx.load(graph, load_external_data=False)
    floats = sum(len(t.raw_data) for t in model.graph.initializer)
    assert floats < LARGEST_GRAPH


@pytest.mark.parametrize(
    'name',
    [n if n == LITE else pytest.param(n, marks=pytest.mark.slow) for n in BUNDLED],
)
def test_bundled_graphs_score_photographs_as_torch_does(
    name: str, photographs: dict[str, Image.Image]
) -> None:
    metric, runtime = CLIPKDMetric(name), Runtime(name)
    for image in (Image.open(COFFEE), *photographs.values()):
        assert abs(runtime.score(image).score - eager_score(metric, image)) < 1e-4


def test_crops_are_those_of_torch(runtime: Runtime) -> None:
    image = Image.open(COFFEE).resize((900, 600))
    expected = eager_score(CLIPKDMetric(LITE, crops=2), image)
    assert abs(runtime.score(image, crops=2).score - expected) < 1e-4
    assert abs(runtime.score(image).score - expected) > 1e-3


def test_a_score_comes_with_its_level_and_probabilities(runtime: Runtime) -> None:
    score = runtime.score(COFFEE)
    assert score.level == 'good'
    assert score.score == pytest.approx(3.95, abs=0.01)
    assert score.score_100 == pytest.approx(25 * (score.score - 1))
    assert [*score.probabilities] == ['bad', 'poor', 'fair', 'good', 'perfect']
    mean = sum(p * (k + 1) for k, p in enumerate(score.probabilities.values()))
    assert mean == pytest.approx(score.score, abs=1e-5)


def test_paths_files_and_images_score_alike(runtime: Runtime) -> None:
    expected = runtime.score(COFFEE)
    assert runtime.score(str(COFFEE)) == expected
    assert runtime.score(io.BytesIO(COFFEE.read_bytes())) == expected
    assert runtime.score(Image.open(COFFEE)) == expected
    assert runtime.score(np.asarray(Image.open(COFFEE))) == expected


@pytest.mark.parametrize('name', ['exif.jpg', 'alpha.png', 'sixteen.png', 'gif.gif'])
def test_odd_photographs_score_alike_as_files_and_as_images(
    runtime: Runtime, name: str, tmp_path: Path
) -> None:
    file = tmp_path / name
    file.write_bytes(ODD[name].content())
    with Image.open(file) as image:
        assert runtime.score(image) == runtime.score(file)


def test_alone_or_in_a_batch_in_any_order_the_score_is_the_same(
    runtime: Runtime, views: np.ndarray
) -> None:
    alone = np.concatenate([runtime(view[None])[0] for view in views])
    for order in (range(5), reversed(range(5)), (2, 2, 0, 4)):
        chosen = [*order]
        together, _ = runtime(views[chosen])
        np.testing.assert_allclose(together, alone[chosen], atol=1e-5, rtol=0)


def test_runs_and_threads_give_the_same_bits(views: np.ndarray) -> None:
    expected, probabilities = Runtime(LITE)(views)
    runtime = Runtime(LITE)
    with ThreadPoolExecutor(4) as pool:
        for score, other in pool.map(runtime, [views] * 8):
            assert np.array_equal(score, expected)
            assert other is not None
            assert probabilities is not None
            assert np.array_equal(other, probabilities)


# --- which model ----------------------------------------------------------------------


def test_weights_of_ones_own_hide_the_bundled_graph(own_folder: Path) -> None:
    shutil.copy(BUNDLED_FOLDER / f'{LITE}.safetensors', own_folder)
    with pytest.raises(FileNotFoundError, match=f'export -m {LITE} .* --input squares'):
        Runtime(LITE)
    shutil.copy(BUNDLED_FOLDER / f'{LITE}.onnx', own_folder)
    assert Runtime(LITE).path.parent == own_folder


def test_a_graph_beside_other_weights_is_refused(own_folder: Path) -> None:
    shutil.copy(BUNDLED_FOLDER / f'{LITE}.onnx', own_folder)
    weights = bytearray((BUNDLED_FOLDER / f'{LITE}.safetensors').read_bytes())
    weights[-1] ^= 1
    (own_folder / f'{LITE}.safetensors').write_bytes(weights)
    with pytest.raises(
        ValueError, match=r'was made of other weights .* export it again'
    ):
        Runtime(LITE)


def test_an_unknown_name_says_which_there_are() -> None:
    with pytest.raises(FileNotFoundError, match=f'which has .*{LITE}'):
        Runtime('clipkd_nobody')
    for other in ('out.pt2', 'folder/clipkd_nobody'):
        with pytest.raises(FileNotFoundError, match=r'`model` must be .* or an \.onnx'):
            Runtime(other)


def test_a_graph_without_its_weights_says_so(tmp_path: Path) -> None:
    path = shutil.copy(BUNDLED_FOLDER / f'{LITE}.onnx', tmp_path)
    with pytest.raises(ValueError, match='the weight file beside it is missing'):
        Runtime(path)


def test_files_that_are_none_of_ours_are_refused(tmp_path: Path) -> None:
    (tmp_path / 'noise.onnx').write_bytes(b'noise')
    with pytest.raises(ValueError, match='is damaged, is no ONNX model'):
        Runtime(tmp_path / 'noise.onnx')
    value = onnx.helper.make_tensor_value_info('x', onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node('Identity', ['x'], ['y'])],
        'other',
        [value],
        [onnx.helper.make_tensor_value_info('y', onnx.TensorProto.FLOAT, [1])],
    )
    opset = onnx.helper.make_opsetid('', 20)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10)
    onnx.save(model, tmp_path / 'other.onnx')
    with pytest.raises(ValueError, match='was not written by `pyiqa-clipkd export`'):
        Runtime(tmp_path / 'other.onnx')
    for name in ('nothing.onnx', 'NOTHING.ONNX'):
        with pytest.raises(FileNotFoundError, match='There is no model'):
            Runtime(str(tmp_path / name))


def test_a_model_of_whole_photographs_is_scored_too(tmp_path: Path) -> None:
    from pyiqa_clipkd.export import export

    torch.manual_seed(0)
    student = CLIPKDStudent('timm:test_efficientnet', embed_dim=16, input_size=48)
    runtime = Runtime(export(student, tmp_path / 'whole.onnx'))
    assert runtime.metric == ''
    assert (runtime.weights, runtime.sha256) == ('whole.onnx', file_hash(runtime.path))
    image = Image.open(COFFEE)
    expected = eager_score(student.eval(), image)
    assert abs(runtime.score(COFFEE).score - expected) < 2e-4
    with pytest.raises(ValueError, match='takes whole photographs: use `score`'):
        runtime(squares(image, 48))
    with pytest.raises(ValueError, match='`crops` must be 0, but got 3'):
        runtime.score(image, crops=3)


@pytest.mark.parametrize('shape', [(1, 3, 224, 224), (3, 384, 384)])
def test_squares_of_another_shape_are_refused(
    runtime: Runtime, shape: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r'shape \(N, 3, 384, 384\), but got float32'):
        runtime(np.zeros(shape, np.float32))


def test_wrong_options_are_named(runtime: Runtime, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'`threads` must be .* but got 0'):
        Runtime(LITE, threads=0)
    with pytest.raises(ValueError, match=r"`providers` must be .* got \['Abacus'\]"):
        Runtime(LITE, providers=['Abacus'])
    with pytest.raises(ValueError, match=r'uint8 RGB .* but got float32 \(8, 8, 3\)'):
        runtime.score(np.zeros((8, 8, 3), np.float32))
    with pytest.raises(ValueError, match=r'`crops` must be .* but got -1'):
        runtime.score(COFFEE, crops=-1)
    (tmp_path / 'a.jpg').touch()
    with pytest.raises(UnreadableError, match='the file is empty'):
        runtime.score(tmp_path / 'a.jpg')


# --- without torch --------------------------------------------------------------------

WITHOUT = """
import sys
for name in ('torch', 'onnx', 'pandas', 'pyiqa', 'timm', 'safetensors', 'scipy'):
    sys.modules[name] = None
from pyiqa_clipkd.runtime import Runtime
print(Runtime().score(sys.argv[1]).score)
"""
FRESH = """
import importlib.util, json, sys
from pyiqa_clipkd.runtime import Runtime
there = [name for name in ('torch', 'pyiqa', 'onnx') if importlib.util.find_spec(name)]
print(json.dumps([there, Runtime('clipkd_efficientnet_lite').score(sys.argv[1]).score]))
"""


def test_the_runtime_imports_nothing_but_its_three_packages() -> None:
    shown = subprocess.run(
        [sys.executable, '-c', WITHOUT, str(COFFEE)],
        capture_output=True,
        text=True,
        check=True,
        cwd=CHECKOUT,
    )
    assert float(shown.stdout) == pytest.approx(3.95, abs=0.01)


def test_without_onnxruntime_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    with pytest.raises(ImportError, match='pip install onnxruntime'):
        Runtime(LITE)


def test_a_broken_onnxruntime_keeps_its_own_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / 'onnxruntime.py').write_text("raise ImportError('DLL load failed')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, 'onnxruntime', raising=False)
    with pytest.raises(ImportError, match='cannot be loaded: DLL load failed') as info:
        Runtime(LITE)
    assert 'pip install onnxruntime' not in str(info.value)


@pytest.mark.slow
def test_a_fresh_environment_without_torch_scores_a_photograph(tmp_path: Path) -> None:
    """A real wheel, and links to numpy, Pillow, onnxruntime and nothing else."""
    source = tmp_path / 'source'
    shutil.copytree(
        CHECKOUT / 'pyiqa_clipkd',
        source / 'pyiqa_clipkd',
        ignore=shutil.ignore_patterns('__pycache__'),
    )
    for file in CHECKOUT.iterdir():
        if file.is_file():
            shutil.copy(file, source)
    wheels, environment = tmp_path / 'wheels', tmp_path / 'environment'
    offline = ['--no-index', '--no-deps']
    pip = [sys.executable, '-m', 'pip', '--disable-pip-version-check']
    build = ['wheel', *offline, '--no-build-isolation', '-w', str(wheels), '.']
    subprocess.run([*pip, *build], cwd=source, check=True, capture_output=True)
    (wheel,) = wheels.iterdir()
    venv.create(environment, with_pip=False, symlinks=True)
    base = {'base': str(environment), 'platbase': str(environment)}
    python = Path(sysconfig.get_path('scripts', 'venv', base), 'python')
    install = ['--python', str(python), 'install', *offline, str(wheel)]
    subprocess.run([*pip, *install], check=True, capture_output=True)
    borrow(environment, 'numpy', 'PIL', 'onnxruntime')
    shown = subprocess.run(
        [str(python), '-c', FRESH, str(COFFEE)],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={**os.environ, 'PYTHONPATH': ''},
    )
    assert not shown.stderr
    there, score = json.loads(shown.stdout)
    assert there == []
    expected = eager_score(CLIPKDMetric(LITE), Image.open(COFFEE))
    assert abs(score - expected) < 1e-3
    command = [str(python.with_name('pyiqa-clipkd')), 'score', str(COFFEE)]
    shown = subprocess.run(
        [*command, '--format', 'jsonl'],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={**os.environ, 'PYTHONPATH': ''},
    )
    assert abs(json.loads(shown.stdout)['score'] - expected) < 1e-3


def borrow(environment: Path, *modules: str) -> None:
    """Links to packages of this environment, and to what their wheels put beside."""
    (site,) = environment.rglob('site-packages')
    for name in modules:
        spec = find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        home = Path(spec.origin).parent
        beside = [home.with_name(f'{home.name}.libs'), home.with_name('pillow.libs')]
        for item in (home, *beside):
            if item.exists() and not (site / item.name).exists():
                (site / item.name).symlink_to(item)


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -1, 255])
def test_squares_with_values_that_no_image_has_are_refused(
    runtime: Runtime, value: float
) -> None:
    side = runtime.input_size
    squares = np.full((1, 3, side, side), 0.5, np.float32)
    squares[0, 1, 2, 3] = value
    with pytest.raises(ValueError, match=r'must be in \[0, 1\], but got values from'):
        runtime(squares)
    with pytest.raises(TypeError, match='must be a numpy array, but got list'):
        runtime(squares.tolist())
