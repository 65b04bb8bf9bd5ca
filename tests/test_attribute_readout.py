"""Attributes beside a score: in torch, in onnxruntime, in files; what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyiqa
import pytest
import torch
from scoring_data import METRIC, photograph
from script_modules import load_script
from torch import Tensor

from pyiqa_clipkd.attributes.changes import change
from pyiqa_clipkd.attributes.names import ATTRIBUTES, LOW, WORDS, faults
from pyiqa_clipkd.attributes.readout import (
    AttributeReadout,
    AttributeValues,
    find_readout,
    statistics,
    write_readout,
)
from pyiqa_clipkd.export import export, write_graph
from pyiqa_clipkd.locations import BUNDLED_FOLDER, attributes_file
from pyiqa_clipkd.metric import CLIPKDMetric
from pyiqa_clipkd.names import user_names
from pyiqa_clipkd.runtime import Runtime
from pyiqa_clipkd.scoring.backends import create_backend
from pyiqa_clipkd.scoring.core import identity_of, score_paths
from pyiqa_clipkd.scoring.results import Results, read_results

BUNDLED = BUNDLED_FOLDER / f'{METRIC}.safetensors'

# Values of torch and of onnxruntime agree to this.
CLOSE = 2e-4


@pytest.fixture(scope='module')
def metric() -> torch.nn.Module:
    return CLIPKDMetric(METRIC)


@pytest.fixture(scope='module')
def runtime() -> Runtime:
    return Runtime(METRIC, threads=1, attributes=True)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The bundled weights as a user's own, with their heads."""
    monkeypatch.setenv('PYIQA_CLIPKD_WEIGHTS', str(tmp_path))
    weights = tmp_path / 'clipkd_mine.safetensors'
    shutil.copy(BUNDLED, weights)
    shutil.copy(attributes_file(BUNDLED), attributes_file(weights))
    return weights


def pixels(number: int = 0) -> Tensor:
    image = np.array(photograph(number))
    return torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, '-m', 'pyiqa_clipkd', *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_host_s_metric_says_why() -> None:
    host = pyiqa.create_metric(METRIC, device='cpu')
    score, why = host(pixels(), return_attributes=True)
    assert torch.equal(score, host(pixels()))
    assert why.values.shape == (1, 5)
    assert list(why.named()[0]) == list(ATTRIBUTES)
    assert why.faults() == [faults(why.named()[0])]


def test_the_score_is_the_same_with_and_without(metric: torch.nn.Module) -> None:
    details, _ = metric(pixels(), return_details=True, return_attributes=True)
    plain = metric(pixels(), return_details=True)
    assert all(torch.equal(a, b) for a, b in zip(details, plain, strict=True))


def test_a_batch_is_judged_image_by_image(metric: torch.nn.Module) -> None:
    first, second = photograph(0, (300, 300)), photograph(1, (300, 300))
    batch = torch.stack(
        [torch.from_numpy(np.array(i)).permute(2, 0, 1) / 255 for i in (first, second)]
    )
    together = metric(batch, return_attributes=True)[1].values
    alone = [metric(one[None], return_attributes=True)[1].values for one in batch]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)


def test_attributes_pull_at_the_image(metric: torch.nn.Module) -> None:
    image = pixels().requires_grad_()
    metric(image, return_attributes=True)[1].values[0, 1].backward()
    assert image.grad is not None
    assert image.grad.abs().sum() > 0


@pytest.mark.parametrize('attribute', ATTRIBUTES)
def test_a_strong_change_lowers_its_own_attribute_most(
    runtime: Runtime, attribute: str
) -> None:
    moves = []
    for number in range(4):
        before = runtime.score(photograph(number)).attributes
        after = runtime.score(change(photograph(number), attribute, -1.0)).attributes
        moves.append([after[name] - before[name] for name in ATTRIBUTES])
    mean = dict(zip(ATTRIBUTES, np.mean(moves, axis=0), strict=True))
    assert mean[attribute] < -0.15
    assert min(mean, key=lambda name: mean[name]) == attribute


def test_values_follow_their_own_change_and_hardly_move_with_others() -> None:
    script = load_script('attribute_table')
    labeller = script.create_labeller('metric')
    found = script.summary(
        [script.agreements(photograph(number), labeller, number) for number in (0, 1)]
    )
    assert min(found['own'].values()) >= 0.9, found['own']
    for name, moves in found['moves'].items():
        own = moves.pop(name)
        assert np.mean(list(moves.values())) < own / 3, (name, own, moves)


def test_what_is_wrong_is_said_in_words(runtime: Runtime) -> None:
    fine, dark = photograph(3), change(photograph(3), 'brightness', -1.0)
    assert 'too dark' not in runtime.score(fine).faults
    assert 'too dark' in runtime.score(dark).faults


def test_torch_and_onnxruntime_agree(metric: torch.nn.Module, runtime: Runtime) -> None:
    for number in range(4):
        found = runtime.score(photograph(number))
        score, why = metric(pixels(number), return_attributes=True)
        assert found.score == pytest.approx(score.item(), abs=1e-3)
        assert found.attributes == pytest.approx(why.named()[0], abs=CLOSE)
        assert found.faults == faults(found.attributes)


def test_without_a_wish_there_are_none() -> None:
    runtime = Runtime(METRIC, threads=1)
    assert not runtime.attributes
    assert runtime.score(photograph()).attributes == {}
    assert runtime.score(photograph()).faults == []


@pytest.mark.parametrize('backend', ['onnx', 'torch'])
def test_rows_have_them_after_the_probabilities(backend: str, tmp_path: Path) -> None:
    photograph(1).save(tmp_path / 'a.png')
    (tmp_path / 'bad.png').write_bytes(b'none')
    done = run(
        *('score', tmp_path, '-o', tmp_path / 'r.csv', '--attributes'),
        *('--backend', backend),
    )
    assert done.returncode == 3, done.stderr
    header = (tmp_path / 'r.csv').read_text().splitlines()[0].split(',')
    assert header[9:16] == [*ATTRIBUTES, 'faults', 'heads']
    table = read_results(tmp_path / 'r.csv').set_index('path')
    good = table.loc[str(tmp_path / 'a.png')]
    assert all(0 <= good[name] <= 1 for name in ATTRIBUTES)
    bad = table.loc[str(tmp_path / 'bad.png')]
    assert all(np.isnan(bad[name]) for name in ATTRIBUTES)
    assert bad['faults'] == ''


def test_scores_are_those_of_a_run_without(tmp_path: Path) -> None:
    photograph(1).save(tmp_path / 'a.png')
    plain, explained = (
        next(score_paths([tmp_path / 'a.png'], create_backend(METRIC, attributes=why)))
        for why in (False, True)
    )
    assert set(explained) - set(plain) == {*ATTRIBUTES, 'faults', 'heads'}
    same = [name for name in plain if name != 'seconds']
    assert {n: plain[n] for n in same} == {n: explained[n] for n in same}


def test_crops_say_why_of_the_whole(tmp_path: Path) -> None:
    photograph(1).save(tmp_path / 'a.png')
    backend = create_backend(METRIC, attributes=True)
    whole, crops = (
        next(score_paths([tmp_path / 'a.png'], backend, crops=k)) for k in (0, 2)
    )
    assert whole['score'] != crops['score']
    assert [whole[a] for a in ATTRIBUTES] == [crops[a] for a in ATTRIBUTES]


def test_in_a_batch_each_photograph_has_its_own(tmp_path: Path) -> None:
    for number in range(3):
        photograph(number).save(tmp_path / f'{number}.png')
    paths = sorted(tmp_path.iterdir())
    backend = create_backend(METRIC, attributes=True)
    together = list(score_paths(paths, backend, batch_size=8, crops=1))
    alone = [next(score_paths([path], backend)) for path in paths]
    for one, other in zip(together, alone, strict=True):
        found = [one[a] for a in ATTRIBUTES]
        assert found == pytest.approx([other[a] for a in ATTRIBUTES], abs=CLOSE)
    assert together[0]['brightness'] != together[1]['brightness']


def test_the_runtime_s_crops_say_why_of_the_whole(runtime: Runtime) -> None:
    whole, crops = (runtime.score(photograph(1), crops=k) for k in (0, 2))
    assert crops.attributes == pytest.approx(whole.attributes, abs=CLOSE)


@pytest.mark.slow
def test_a_file_has_one_kind_of_heads(own: Path, tmp_path: Path) -> None:
    photograph(1).save(tmp_path / 'a.png')
    output = tmp_path / 'r.csv'
    command = ('score', tmp_path / 'a.png', '-m', 'clipkd_mine', '-o', output)
    assert run(*command, '--attributes').returncode == 0
    readout = find_readout(own)
    assert readout is not None
    readout.bias += 1
    write_readout(readout, own, {})
    done = run(*command, '--attributes')
    assert done.returncode == 2
    assert ', heads ' in done.stderr


def test_a_resumed_run_shows_the_faults_of_before(tmp_path: Path) -> None:
    change(photograph(3), 'brightness', -1.0).save(tmp_path / 'dark.png')
    command = ('score', tmp_path / 'dark.png', '--attributes', '--top', '1')
    shown = [run(*command, '-o', tmp_path / 'r.jsonl').stdout for _ in range(2)]
    assert 'too dark' in shown[0]
    assert shown[1] == shown[0]


def test_the_labeller_gives_the_metric_s_values(
    runtime: Runtime, tmp_path: Path
) -> None:
    photograph(1).save(tmp_path / 'a.png')
    output = tmp_path / 'labels.jsonl'
    command = ('label', tmp_path / 'a.png', '-o', output, '--labeller', 'metric')
    assert run(*command, '--quiet').returncode == 0
    row = json.loads(output.read_text())
    expected = runtime.score(photograph(1)).attributes
    assert {a: row[a] for a in ATTRIBUTES} == pytest.approx(expected, abs=CLOSE)
    assert runtime.heads_sha256[:16] in row['labeller']


def test_the_screen_names_faults_behind_the_path(tmp_path: Path) -> None:
    change(photograph(3), 'brightness', -1.0).save(tmp_path / 'dark.png')
    done = run('score', tmp_path / 'dark.png', '--attributes', '--quiet')
    assert done.stdout.rstrip().endswith(')')
    assert 'too dark' in done.stdout


def test_whole_rows_on_the_screen_have_them(tmp_path: Path) -> None:
    photograph(1).save(tmp_path / 'a.png')
    done = run('score', tmp_path / 'a.png', '--attributes', '--format', 'csv')
    header, row = (line.split(',') for line in done.stdout.splitlines())
    assert header[9:16] == [*ATTRIBUTES, 'faults', 'heads']
    assert len(row) == len(header)


@pytest.mark.parametrize('ending', ['csv', 'jsonl', 'parquet'])
@pytest.mark.parametrize('first', [True, False])
def test_a_file_has_them_in_all_rows_or_in_none(
    ending: str, first: bool, tmp_path: Path
) -> None:
    backends = {why: create_backend(METRIC, attributes=why) for why in (True, False)}
    photograph(1).save(tmp_path / 'a.png')

    def write(why: bool) -> None:
        row = next(score_paths([tmp_path / 'a.png'], backends[why]))
        identity = identity_of(backends[why], 0)
        path = tmp_path / f'r.{ending}'
        with Results(path, backends[why].levels, identity) as file:
            file.add(row)

    write(first)
    word = 'with' if first else 'without'
    with pytest.raises(ValueError, match=f'was begun {word} --attributes'):
        write(not first)


@pytest.mark.parametrize('backend', ['auto', 'onnx', 'torch'])
def test_a_metric_without_heads_says_so(backend: str, tmp_path: Path) -> None:
    photograph(1).save(tmp_path / 'a.png')
    done = run(
        *('score', tmp_path / 'a.png', '-m', 'clipkd_resnet18', '--attributes'),
        *('--backend', backend),
    )
    assert done.returncode == 2
    assert 'clipkd_resnet18' in done.stderr
    assert METRIC in done.stderr


def test_heads_given_as_weights_are_named() -> None:
    with pytest.raises(ValueError, match='give the weight file beside it'):
        CLIPKDMetric(METRIC, pretrained_model_path=attributes_file(BUNDLED))


def test_a_network_without_heads_says_so() -> None:
    with pytest.raises(ValueError, match='no attribute heads'):
        CLIPKDMetric('clipkd_resnet18')(pixels(), return_attributes=True)


@pytest.mark.slow
def test_own_weights_have_their_own(own: Path) -> None:
    assert user_names() == ['clipkd_mine']  # the heads are no metric
    network = CLIPKDMetric('clipkd_mine')
    expected = CLIPKDMetric(METRIC)(pixels(), return_attributes=True)[1].values
    assert torch.equal(network(pixels(), return_attributes=True)[1].values, expected)
    with pytest.raises(FileNotFoundError, match='--attributes'):
        Runtime('clipkd_mine', attributes=True)
    write_graph('clipkd_mine', own.parent, attributes=True)
    found = Runtime('clipkd_mine', attributes=True).score(photograph())
    assert list(found.attributes.values()) == pytest.approx(
        expected[0].tolist(), abs=CLOSE
    )


def test_heads_of_other_weights_are_left_alone(
    own: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copy(BUNDLED_FOLDER / 'clipkd_efficientnet.safetensors', own)
    assert find_readout(own) is None
    assert 'other weights' in caplog.text
    network = CLIPKDMetric('clipkd_mine')  # scores as before
    with pytest.raises(ValueError, match='no attribute heads'):
        network(pixels(), return_attributes=True)


@pytest.mark.slow
def test_other_heads_than_the_graph_s_are_refused(own: Path) -> None:
    write_graph('clipkd_mine', own.parent, attributes=True)
    heads = attributes_file(own)
    content = bytearray(heads.read_bytes())
    content[-1] ^= 1
    heads.write_bytes(content)
    with pytest.raises(ValueError, match='made of other weights'):
        Runtime('clipkd_mine', attributes=True)


@pytest.mark.slow
def test_other_heads_than_those_of_an_export_are_refused(own: Path) -> None:
    path = attributes_file(own.with_suffix('.onnx'))
    export('clipkd_mine', path, form='squares', attributes=True)
    assert Runtime('clipkd_mine', attributes=True).attributes
    readout = find_readout(own)
    assert readout is not None
    readout.bias += 1
    write_readout(readout, own, {})
    with pytest.raises(ValueError, match='made of other weights'):
        Runtime('clipkd_mine', attributes=True)


def test_damaged_heads_are_an_error_that_names_them(own: Path) -> None:
    heads = attributes_file(own)
    heads.write_bytes(heads.read_bytes()[:2000])
    with pytest.raises(ValueError, match=heads.name):
        CLIPKDMetric('clipkd_mine')


def test_heads_come_back_from_their_file(tmp_path: Path) -> None:
    weights = tmp_path / 'clipkd_x.safetensors'
    weights.write_bytes(b'weights')
    torch.manual_seed(0)
    maps = [torch.rand(2, 3, 8, 8), torch.rand(2, 5, 4, 4)]
    readout = AttributeReadout([3, 5], width=4)
    readout.set({n: torch.randn_like(t) for n, t in readout.tensors().items()})
    write_readout(readout, weights, {'labels': 'mine'})
    again = find_readout(weights)
    assert again is not None
    torch.testing.assert_close(again(maps), readout(maps), atol=1e-3, rtol=0)


def test_heads_are_no_part_of_the_network_s_weights(metric: torch.nn.Module) -> None:
    parts = dict(metric.named_modules())
    heads = [n for n, part in parts.items() if isinstance(part, AttributeReadout)]
    assert heads
    names = {*metric.state_dict(), *(name for name, _ in metric.named_parameters())}
    assert not [name for name in names if name.startswith(tuple(heads))]


def test_statistics_are_means_and_deviations_of_channels() -> None:
    maps = [torch.rand(2, 3, 8, 8), torch.rand(2, 5, 4, 4)]
    expected = [
        part
        for one in maps
        for part in (one.mean((2, 3)), one.std((2, 3), unbiased=False))
    ]
    torch.testing.assert_close(
        statistics(maps), torch.cat(expected, 1), atol=1e-3, rtol=0
    )


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_heads_take_maps_of_every_precision(dtype: torch.dtype) -> None:
    readout = AttributeReadout([3]).to(dtype)
    assert (readout([torch.rand(1, 3, 8, 8, dtype=dtype)]) == 0.5).all()


def test_half_precision_keeps_its_deviations() -> None:
    maps = [1000 + torch.rand(1, 2, 8, 8)]  # whose square half precision hasn't got
    assert statistics([maps[0].half()]).isfinite().all()


@pytest.mark.parametrize('wrong', ['bias', 'more', 'shape'])
def test_heads_that_do_not_fit_are_refused(wrong: str) -> None:
    readout = AttributeReadout([3])
    tensors = readout.tensors()
    if wrong == 'bias':
        del tensors['bias']
    elif wrong == 'more':
        tensors['more'] = torch.zeros(1)
    else:
        tensors['bias'] = torch.zeros(4)
    with pytest.raises(ValueError, match=wrong if wrong == 'more' else 'bias'):
        readout.set(tensors)


def test_faults_are_the_low_words() -> None:
    values = dict.fromkeys(ATTRIBUTES, 0.5) | {'contrast': LOW['contrast']}
    assert faults(values) == []
    values['noisiness'] = LOW['noisiness'] - 0.01
    assert faults(values) == [WORDS['noisiness'][0]]
    assert AttributeValues(torch.tensor([[0.1, 0.5, 0.5, 0.5, 0.5]])).faults() == [
        ['blurred']
    ]


@pytest.mark.slow
@pytest.mark.parametrize('precision', ['float32', 'float16', 'int8'])
def test_an_export_has_them_on_request(
    precision: str, runtime: Runtime, tmp_path: Path
) -> None:
    path = export(METRIC, tmp_path / 'm.onnx', precision=precision, attributes=True)
    found = Runtime(path).score(photograph())
    expected = runtime.score(photograph()).attributes
    allowed = 0.1 if precision == 'int8' else 0.01
    assert found.attributes == pytest.approx(expected, abs=allowed)
    with pytest.raises(ValueError, match='no attribute heads'):
        export('clipkd_resnet18', tmp_path / 'r.onnx', attributes=True)


@pytest.mark.slow
def test_the_command_tells_how_far_an_export_moves_them(tmp_path: Path) -> None:
    command = ('export', '-m', METRIC, tmp_path / 'm.onnx', '--attributes')
    assert 'attributes differ by 0.000 at most' in run(*command).stdout


@pytest.mark.slow
def test_an_export_without_them_is_no_model_with_attributes(tmp_path: Path) -> None:
    path = export(METRIC, tmp_path / 'm.onnx', form='squares')
    with pytest.raises(ValueError, match='--attributes'):
        Runtime(path, attributes=True)
    assert Runtime(path).score(photograph()).attributes == {}


@pytest.mark.slow
def test_a_script_makes_heads_for_weights_of_one_s_own(own: Path) -> None:
    attributes_file(own).unlink()
    folder = own.parent / 'photographs'
    folder.mkdir()
    lines = ['name,split']
    for number in range(8):
        photograph(number, (256, 256)).save(folder / f'{number}.png')
        lines.append(f'{number}.png,{"test" if number > 5 else "train"}')
    (folder / 'split.csv').write_text('\n'.join(lines))
    script = Path(__file__).parents[1] / 'scripts' / 'attribute_heads.py'
    command = [
        *(sys.executable, script, 'clipkd_mine', '--folder', own.parent),
        *('--images', folder, '--csv', folder / 'split.csv', '--column', 'split'),
        *('--work', own.parent / 'work', '--steps', '200'),
    ]
    subprocess.run([str(part) for part in command], check=True)
    runtime = Runtime('clipkd_mine', threads=1, attributes=True)
    before = runtime.score(photograph(0)).attributes
    after = runtime.score(change(photograph(0), 'brightness', -1.0)).attributes
    assert after['brightness'] < before['brightness']
    assert 'not stated' in attributes_file(own).with_suffix('.md').read_text()
