"""Weight files from strangers: refused through every door, and nothing of them is run.

Of each: one clear message that names the file, in bounded time and memory, without code
being executed, a process started, a socket opened, or another file read.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import resource
import shutil
import sys
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import pyiqa
import pytest
import torch
from hostile_weight_files import (
    ALL,
    CANARY,
    CODE,
    DAMAGE,
    LIES,
    PLACES,
    SECRET,
    module_in_many_places,
    published,
    saved,
    student,
    write_all,
)
from safetensors.torch import save_file

from pyiqa_clipkd import locations
from pyiqa_clipkd.checkpoints import read_checkpoint
from pyiqa_clipkd.command import main
from pyiqa_clipkd.description import EXTERNAL, KEY, Description
from pyiqa_clipkd.encoders import build_timm_encoder
from pyiqa_clipkd.files import file_hash, one_line
from pyiqa_clipkd.fit.starts import find_start
from pyiqa_clipkd.locations import BUNDLED_FOLDER, find_weights
from pyiqa_clipkd.metric import CLIPKDMetric
from pyiqa_clipkd.network import CLIPLikert, load_network
from pyiqa_clipkd.options import load_options
from pyiqa_clipkd.publish import publish
from pyiqa_clipkd.runtime import Runtime
from pyiqa_clipkd.torchscript import read_torchscript

LITE = 'clipkd_efficientnet_lite'
COFFEE = Path(__file__).parent / 'photos' / 'coffee.jpg'

# Of one file. Most take a few milliseconds; a busy machine may be slow.
MOST_SECONDS = 10.0
MOST_MEGABYTES = 700.0

FORBIDDEN = (
    'socket.connect', 'socket.getaddrinfo', 'socket.bind', 'os.system', 'os.exec',
    'os.posix_spawn', 'os.fork', 'subprocess.Popen', 'pickle.find_class',
)  # fmt: skip


class Watch:
    """What this process does, by Python's own audit events."""

    def __init__(self) -> None:
        self.on = False
        self.seen: list[str] = []
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        is_secret = event == 'open' and str(arguments[0]).endswith(SECRET.name)
        if event in FORBIDDEN or is_secret:
            self.seen.append(f'{event} {arguments}')


@pytest.fixture(scope='module')
def watcher() -> Watch:
    return Watch()  # a hook can't be taken away again


@pytest.fixture
def watch(watcher: Watch) -> Iterator[Watch]:
    watcher.seen.clear()
    watcher.on = True
    yield watcher
    watcher.on = False


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('strangers')
    save_file({'x': torch.ones(1)}, folder / SECRET)
    write_all(folder)
    return folder


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of all files, which is the working directory, too."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv('HF_HUB_OFFLINE', '0')
    return folder


def peak() -> float:
    """Megabytes that this process has taken at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def refused(open_it: Callable[[], Any], path: Path) -> str:
    """What is said of the file."""
    memory, start = peak(), time.perf_counter()
    with pytest.raises((ValueError, FileNotFoundError)) as info:
        open_it()
    assert time.perf_counter() - start < MOST_SECONDS, path.name
    assert peak() - memory < MOST_MEGABYTES, path.name
    text = str(info.value)
    assert path.name in text
    assert len(text) < 1000
    assert text.isprintable()
    return text


def test_there_are_at_least_forty_files() -> None:
    assert len(ALL) >= 40
    assert len(ALL) == sum(map(len, (CODE, DAMAGE, LIES, PLACES)))


@pytest.mark.parametrize('name', ALL)
def test_a_network_of_a_stranger_is_refused(
    name: str, here: Path, watch: Watch
) -> None:
    text = refused(lambda: load_network(here / name), here / name)
    assert watch.seen == []
    assert not CANARY.exists()
    if name in CODE:
        assert 'is refused' in text
        assert 'could run code' in text
    if name in DAMAGE:
        assert 'is damaged or no weight file' in text
    if name in PLACES:
        assert 'no weight file' in text


def test_the_traps_work(here: Path) -> None:
    """Otherwise the tests above could not fail."""
    for name in ('pickle.bin', 'pickle called safetensors.safetensors'):
        pickle.loads((here / name).read_bytes())
        assert CANARY.exists()
        CANARY.unlink()
    torch.load(here / 'checkpoint.pth', weights_only=False)
    assert CANARY.exists()
    CANARY.unlink()


def test_a_whole_file_is_read(here: Path, watch: Watch) -> None:
    for name, content in {
        'a.safetensors': published(),
        'a.pth': saved(student().state_dict()),
    }.items():
        (here / name).write_bytes(content)
        assert load_network(here / name).config == student().config
        (here / name).unlink()
    assert watch.seen == []


def test_what_training_saves_beside_tensors_is_read(tmp_path: Path) -> None:
    tensor = torch.ones(2)
    content = {
        'params': OrderedDict(a=tensor),
        'milestones': Counter([3, 3, 5]),
        'device': torch.device('cuda', 0),
    }
    for zipped in (True, False):
        (tmp_path / 'a.pth').write_bytes(saved(content, zipped=zipped))
        assert torch.equal(read_checkpoint(tmp_path / 'a.pth')['a'], tensor)


def test_a_module_may_be_in_two_places(tmp_path: Path) -> None:
    (tmp_path / 'a.pt').write_bytes(module_in_many_places(3))
    assert read_torchscript(tmp_path / 'a.pt') == {}


def test_words_of_a_file_are_printable_and_short() -> None:
    assert one_line('a\n \x1b[2J\x9b\u202e\ud800b') == 'a ?[2J???b'
    assert len(one_line('x' * 10_000)) < 400
    assert one_line(ValueError('two\nlines')) == 'two lines'


# --- the other doors --------------------------------------------------------------

SOME = [
    'checkpoint.pth', 'TorchScript.pt', 'a zip bomb.pth',
    'overlapping tensors.safetensors',
    'an input of a gigapixel.safetensors', 'a hub of open_clip.safetensors',
    'NaN.safetensors', 'a pipe.safetensors', 'a terabyte.safetensors',
]  # fmt: skip
SOME_AND_ALL = pytest.mark.parametrize(
    'names',
    [
        pytest.param(SOME, id='some'),
        pytest.param(list(ALL), id='all', marks=pytest.mark.slow),
    ],
)


def through_create_metric(path: Path) -> None:
    pyiqa.create_metric('clipkd_swin', pretrained_model_path=str(path), device='cpu')


def through_the_metric(path: Path) -> None:
    CLIPKDMetric('clipkd_teacher', pretrained_model_path=path)


def through_publish(path: Path) -> None:
    publish(path, 'clipkd_mine', folder=path.parent / 'published')


def as_a_start(path: Path) -> None:
    find_start('timm:test_resnet', str(path))


def as_an_encoder(path: Path) -> None:
    build_timm_encoder('timm:test_efficientnet', weights=path, embed_dim=8)


def as_clip(path: Path) -> None:
    CLIPLikert('open_clip:tiny', pretrained=path, input_size=32)


DOORS = [
    through_create_metric, through_the_metric, through_publish, as_a_start,
    as_an_encoder, as_clip,
]  # fmt: skip


@SOME_AND_ALL
@pytest.mark.parametrize('door', DOORS, ids=lambda door: door.__name__)
def test_every_door_is_closed(
    names: list[str], door: Callable[[Path], None], here: Path, watch: Watch
) -> None:
    # What a start says of its network must fit; its tensors the training reads.
    skipped = LIES if door is as_a_start else {}
    for name in [name for name in names if name not in skipped]:
        refused(partial(door, here / name), here / name)
    assert watch.seen == []
    assert not CANARY.exists()


@SOME_AND_ALL
@pytest.mark.parametrize('command', ['score', 'export', 'map'])
def test_a_command_says_one_line_and_no_traceback(
    names: list[str],
    command: str,
    here: Path,
    watch: Watch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = {
        'score': [str(COFFEE), '--backend', 'torch'],
        'export': ['out.onnx', '-m', LITE],
        'map': [str(COFFEE), '-o', 'map.png', '--backend', 'torch'],
    }[command]
    for name in names:
        assert main([command, *words, '--weights', str(here / name)]) == 2, name
        shown = capsys.readouterr()
        assert name in shown.err
        assert shown.err.startswith(f'pyiqa-clipkd {command}: error: ')
        assert shown.err.count('\n') == 1
    assert watch.seen == []
    assert not CANARY.exists()


@SOME_AND_ALL
def test_in_the_folder_of_weights_too(
    names: list[str],
    here: Path,
    tmp_path: Path,
    watch: Watch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv('PYIQA_CLIPKD_WEIGHTS', str(tmp_path))
    mine = tmp_path / 'clipkd_mine.safetensors'
    for name in [name for name in names if name not in PLACES]:
        shutil.copy(here / name, mine)
        refused(lambda: CLIPKDMetric('clipkd_mine'), mine)
        assert main(['models']) == 0
        assert main(['models', 'clipkd_mine']) in (0, 2)
    assert watch.seen == []


@pytest.mark.parametrize(
    'name', ['../../secret', '/etc/passwd', '..', '', 'a/b', 'a\\b', 'a\0b']
)
def test_no_name_leads_out_of_the_folder(name: str) -> None:
    with pytest.raises(ValueError, match='The name of a metric must be a plain word'):
        find_weights(name)
    with pytest.raises(FileNotFoundError, match='`model` must be the name of a metric'):
        Runtime(name)


# --- the package's own files ------------------------------------------------------


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the package's weights."""
    folder = tmp_path / 'bundled'
    folder.mkdir()
    for file in BUNDLED_FOLDER.glob(f'{LITE}.*'):
        shutil.copy(file, folder)
    shutil.copy(BUNDLED_FOLDER / locations.SUMS, folder)
    for module in ('locations', 'metric', 'runtime'):
        monkeypatch.setattr(f'pyiqa_clipkd.{module}.BUNDLED_FOLDER', folder)
    return folder


def test_every_bundled_file_is_what_was_released() -> None:
    lines = (BUNDLED_FOLDER / locations.SUMS).read_text().split()
    stated = dict(zip(lines[1::2], lines[::2], strict=True))
    files = [*BUNDLED_FOLDER.glob('*.onnx'), *BUNDLED_FOLDER.glob('*.safetensors')]
    assert stated == {file.name: file_hash(file) for file in files}


@pytest.mark.parametrize(
    'file', ['.safetensors', '.attributes.safetensors', '.onnx', '.attributes.onnx']
)
def test_a_bundled_file_that_was_changed_is_refused(bundle: Path, file: str) -> None:
    path = bundle / f'{LITE}{file}'
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    opened = {
        '.safetensors': lambda: CLIPKDMetric(LITE),
        '.onnx': lambda: Runtime(LITE, attributes='attributes' in file),
    }[path.suffix]
    why = ('is damaged', 'was made of other weights')
    text = refused(opened, path)
    assert any(word in text for word in why), text


def test_a_changed_file_is_refused_by_any_path(bundle: Path, tmp_path: Path) -> None:
    path = bundle / f'{LITE}.safetensors'
    whole = path.read_bytes()
    link = tmp_path / 'link.safetensors'
    link.symlink_to(path)
    (tmp_path / 'elsewhere').mkdir()
    paths = [link, tmp_path / 'elsewhere' / '..' / 'bundled' / path.name]
    for other in paths:
        locations.check_bundled(other, file_hash(other))
    path.write_bytes(whole[:-1] + b'\0')
    moved = path.rename(tmp_path / 'moved.safetensors')
    path.symlink_to(moved)
    for other in (path, paths[1]):
        with pytest.raises(ValueError, match='is damaged or was changed'):
            locations.check_bundled(other, file_hash(other))
    path.unlink()
    moved.rename(path)
    for other in paths:
        with pytest.raises(ValueError, match='is damaged or was changed'):
            locations.check_bundled(other, file_hash(other))


def test_whoever_makes_a_bundled_file_states_it_by_any_path(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = bundle / f'{LITE}.safetensors'
    path.write_bytes(b'new')
    monkeypatch.chdir(bundle.parent)
    locations.state_sum(Path('bundled', path.name))
    locations.check_bundled(path, file_hash(path))


# --- graphs -----------------------------------------------------------------------


def graph(
    folder: Path,
    *,
    location: str | None = None,
    operator: tuple[str, str] = ('', 'Identity'),
    **described: Any,
) -> Path:
    """A small graph that says it is one of ours, but for what is changed."""
    folder.mkdir(exist_ok=True)
    (folder / 'w.safetensors').write_bytes(bytes(64))
    description = Description(
        metric='clipkd_mine', input='squares', input_size=8, levels=('bad', 'good'),
        weights='w.safetensors', sha256=file_hash(folder / 'w.safetensors'),
        precision=EXTERNAL, version='0.1.0',
    )  # fmt: skip
    text = json.dumps(description._asdict() | described)
    kind, helper = onnx.TensorProto, onnx.helper
    weight = kind(name='w', dims=[1], data_type=kind.FLOAT)
    weight.data_location = kind.EXTERNAL
    weight.external_data.add(key='location', value=location or 'w.safetensors')
    weight.external_data.add(key='length', value='4')
    domain, name = operator
    nodes = [
        helper.make_node('ReduceMean', ['squares', 'axes'], ['mean'], keepdims=0),
        helper.make_node(name, ['mean'], ['same'], domain=domain),
        helper.make_node('Add', ['same', 'w'], ['score']),
    ]
    inputs = [helper.make_tensor_value_info('squares', kind.FLOAT, ['batch', 3, 8, 8])]
    outputs = [helper.make_tensor_value_info('score', kind.FLOAT, ['batch'])]
    axes = helper.make_tensor('axes', kind.INT64, [3], [1, 2, 3])
    made = helper.make_graph(nodes, 'g', inputs, outputs, [axes, weight])
    opsets = [helper.make_opsetid('', 20), helper.make_opsetid('evil', 1)]
    model = helper.make_model(made, opset_imports=opsets, ir_version=10)
    helper.set_model_props(model, {KEY: text})
    path = folder / 'clipkd_mine.onnx'
    path.write_bytes(model.SerializeToString())
    return path


def test_a_graph_that_is_ours_is_read(tmp_path: Path) -> None:
    assert Runtime(graph(tmp_path)).input_size == 8


GRAPHS: dict[str, tuple[dict[str, Any], str]] = {
    'a file above': ({'location': '../secret'}, "would read '../secret'"),
    'an absolute path': ({'location': '/etc/passwd'}, "would read '/etc/passwd'"),
    'a file beside it': ({'location': 'other'}, "would read 'other'"),
    'a folder below': ({'location': './w.safetensors'}, 'would read'),
    'weights above': ({'weights': '../w.safetensors'}, 'must lie beside it'),
    'weights anywhere': ({'weights': '/w.safetensors'}, 'must lie beside it'),
    'numbers inside': ({'precision': 'float32'}, 'would read'),
    'weights that are none': ({'weights': ''}, 'would read'),
    'other weights': ({'sha256': '0' * 64}, 'was made of other weights'),
    'a loop': ({'operator': ('', 'Loop')}, 'no export of ours has Loop'),
    'a branch': ({'operator': ('', 'If')}, 'no export of ours has If'),
    'an operator of others': (
        {'operator': ('evil', 'Run')},
        r'no export of ours has evil\.Run',
    ),
    'a gigapixel': ({'input_size': 10**9}, '`input_size` is 1000000000'),
    'a negative size': ({'input_size': -1}, '`input_size` is -1'),
    'another size': ({'input_size': 16}, 'takes or gives something else'),
    'whole photographs': ({'input': 'photographs'}, 'takes or gives something else'),
    'an unknown form': ({'input': 'film'}, "`input` is 'film'"),
    'levels that are numbers': ({'levels': [1, 2]}, '`levels` is'),
    'a million levels': ({'levels': ['x'] * 10**6}, '`levels` is'),
    'attributes of its own': ({'attributes': ['x']}, 'takes or gives something else'),
    'an odd hash': ({'sha256': 7}, '`weights` is'),
    'something more': ({'more': 1}, 'no description of a model'),
}


@pytest.mark.parametrize('name', GRAPHS)
def test_a_graph_that_lies_is_refused(name: str, tmp_path: Path, watch: Watch) -> None:
    change, words = GRAPHS[name]
    (tmp_path / 'secret').write_bytes(bytes(64))
    path = graph(tmp_path / 'graph', **change)
    (path.parent / 'other').write_bytes(bytes(64))
    text = refused(lambda: Runtime(path), path)
    assert re.search(words, text)
    assert watch.seen == []


def test_damaged_graphs_are_refused_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = graph(tmp_path)
    whole = path.read_bytes()
    for size in range(0, len(whole), 37):
        path.write_bytes(whole[:size])
        refused(lambda: Runtime(path), path)
    path.write_bytes(b'\x3a\x80\x80\x80\x80\x10' * 1000)
    refused(lambda: Runtime(path), path)
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ('', '')


def test_a_graph_whose_weights_are_a_pipe_does_not_wait(tmp_path: Path) -> None:
    path = graph(tmp_path)
    (tmp_path / 'w.safetensors').unlink()
    os.mkfifo(tmp_path / 'w.safetensors')
    assert 'missing' in refused(lambda: Runtime(path), path)


def test_a_score_that_is_no_number_is_an_error(tmp_path: Path) -> None:
    import numpy as np

    path = graph(tmp_path)
    (tmp_path / 'w.safetensors').write_bytes(np.full(16, np.nan, 'f4').tobytes())
    path = _restated(path)
    with pytest.raises(ValueError, match='gives scores that are no numbers'):
        Runtime(path)(np.zeros((1, 3, 8, 8), np.float32))


def _restated(path: Path) -> Path:
    """The graph, whose description has the hash that its weights have now."""
    model = onnx.load(path, load_external_data=False)
    (note,) = model.metadata_props
    weights = file_hash(path.with_name('w.safetensors'))
    note.value = json.dumps(json.loads(note.value) | {'sha256': weights})
    path.write_bytes(model.SerializeToString())
    return path


# --- attribute heads, option files ------------------------------------------------


@pytest.mark.parametrize(
    ('config', 'tensors'),
    [
        ({'channels': [10**9], 'width': 10**9}, None),
        ({'channels': [-1], 'width': 4}, None),
        ({'channels': 'abc', 'width': 4}, None),
        ({'channels': [[2]], 'width': 4}, None),
        ({'channels': [2], 'width': 4, 'more': 1}, None),
        ({'width': 4}, None),
        ({'channels': [2], 'width': 4}, float('nan')),
    ],
)
def test_attribute_heads_of_a_stranger_are_refused(
    config: dict[str, Any], tensors: float | None, tmp_path: Path
) -> None:
    weights = publish(_checkpoint(tmp_path), 'clipkd_mine', folder=tmp_path)
    heads = {
        'hidden_weight': torch.full((4, 4), tensors or 0.0),
        'hidden_bias': torch.zeros(4),
        'weight': torch.zeros(5, 4),
        'bias': torch.zeros(5),
    }
    metadata = {'config': config, 'belongs_to': file_hash(weights)}
    path = locations.attributes_file(weights)
    save_file(heads, path, {KEY: json.dumps(metadata)})
    refused(lambda: CLIPKDMetric('clipkd_mine', pretrained_model_path=weights), path)


def _checkpoint(folder: Path) -> Path:
    torch.save({'params': student().state_dict()}, folder / 'net.pth')
    return folder / 'net.pth'


def test_an_option_file_that_unfolds_without_end_is_refused(tmp_path: Path) -> None:
    lines = ['name: x', 'a0: &a0 [x, x, x, x, x, x, x, x, x, x]']
    for n in range(1, 10):
        parts = ', '.join([f'*a{n - 1}'] * 10)
        lines.append(f'a{n}: &a{n} [{parts}]')
    (tmp_path / 'bomb.yml').write_text('\n'.join(lines))
    refused(lambda: load_options(tmp_path / 'bomb.yml'), tmp_path / 'bomb.yml')


def test_an_option_file_runs_no_code(tmp_path: Path, watch: Watch) -> None:
    path = tmp_path / 'code.yml'
    path.write_text(f'name: !!python/object/apply:os.system ["touch {CANARY}"]')
    refused(lambda: load_options(path), path)
    assert watch.seen == []


def test_what_reads_weights_never_calls_what_a_file_names() -> None:
    """The one word that would make a pickle dangerous is nowhere in the package."""
    folder = locations.BUNDLED_FOLDER.parent
    # What a Ray job itself gives its workers; nothing that was read from a file.
    own = folder / 'scoring' / 'ray'
    for file in folder.rglob('*.py'):
        text = file.read_text()
        assert 'import pickle\n' not in text or file.parent == own, file
        assert 'weights_only=False' not in text, file
        assert 'allow_pickle' not in text, file
        assert 'yaml.load(' not in text, file
        for line in text.splitlines():
            assert 'torch.load(' not in line or 'weights_only=True' in line, file
