"""From photographs and a table to a bundled metric, by one command and in processes."""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import pytest
import torch
import yaml
from script_modules import SCRIPTS, load_script
from test_train_resident import options_of
from training_data import (
    ENCODER,
    SIZE,
    finished,
    start,
    student_options,
    write_images,
    write_options,
)

from pyiqa_clipkd.files import file_hash
from pyiqa_clipkd.network import CLIPKDStudent, load_network
from pyiqa_clipkd.runtime import Runtime
from pyiqa_clipkd.weights import read_weights

# Of a plan: what it has to say.
PLAN: dict[str, Any] = {
    'splits': [1],
    'size': 48,
    'teacher': {'training': 'one.yml'},
    'trainings': ['one.yml'],
    'card': {},
    'metrics': {},
}

SCRIPT = SCRIPTS / 'release.py'
NAME = 'clipkd_tiny'


def test_each_origin_is_held_out_once() -> None:
    table = pd.DataFrame({'subset': ['x', 'y', 'x']})
    wide = load_script('release').add_columns(table)
    for name in ('x', 'y'):
        held_out = wide[f'without_{name}_split'] == 'test'
        assert (held_out == (table.subset == name)).all()


def test_tasks_run_after_what_they_need_and_in_their_order() -> None:
    needs = {'a': [], 'b': ['c'], 'c': [], 'd': ['elsewhere', 'b']}
    done: list[str] = []
    tasks = {name: partial(done.append, name) for name in needs}
    load_script('release').in_order(tasks, jobs=1, needs=needs.__getitem__)
    assert done == ['a', 'c', 'b', 'd']


def test_a_task_that_fails_stops_those_that_need_it() -> None:
    done: list[str] = []
    tasks = {'a': partial(int, 'none'), 'b': partial(done.append, 'b')}
    with pytest.raises(ValueError, match='none'):
        load_script('release').in_order(
            tasks, 2, lambda name: 'a' if name == 'b' else ()
        )
    assert done == []


def networks(folder: Path, *sizes: int) -> list[str]:
    """Checkpoints of random students with embeddings of these sizes."""
    files = []
    for number, size in enumerate(sizes):
        network = CLIPKDStudent(ENCODER, embed_dim=size, input_size=SIZE)
        files.append(str(folder / f'{number}.pth'))
        torch.save({'params': network.state_dict()}, files[-1])
    return files


@pytest.fixture
def average(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return load_script('average').average


def test_an_average_lies_between_its_two_networks(tmp_path: Path, average: Any) -> None:
    shares = dict(zip(networks(tmp_path, 8, 8), (0.25, 0.75), strict=True))
    first, second = (read_weights(file).tensors for file in shares)
    mean = average(shares)
    torch.save({'params': mean}, tmp_path / 'mean.pth')
    found = read_weights(tmp_path / 'mean.pth')
    assert found.metadata['config']['embed_dim'] == 8
    for name, value in found.tensors.items():
        if value.is_floating_point():
            wanted = 0.25 * first[name] + 0.75 * second[name]
            assert torch.allclose(value, wanted), name
        assert value.dtype == first[name].dtype


def test_an_average_says_what_cannot_be_averaged(tmp_path: Path, average: Any) -> None:
    first, other = networks(tmp_path, 8, 16)
    with pytest.raises(ValueError, match=r'0\.pth is not the same network as .*1\.pth'):
        average({first: 0.5, other: 0.5})
    with pytest.raises(ValueError, match='shares must sum to 1, but got'):
        average({first: 0.7})


def test_two_splits_in_one_folder_are_refused_before_any_training(
    tmp_path: Path,
) -> None:
    options = {'name': 'one', 'data': {'split_index': 1}, 'path': {}}
    write_options(tmp_path / 'one.yml', options)
    (tmp_path / 'plan.yml').write_text(yaml.safe_dump(PLAN | {'splits': [1, 2]}))
    args = argparse.Namespace(configs=tmp_path, force_yml=None)
    with pytest.raises(ValueError, match='trains the splits 1 and 2 in one folder'):
        load_script('release').Release(args).trainings()
    options['name'] = 'one_{split}'
    write_options(tmp_path / 'one.yml', options)
    assert [t.split for t in load_script('release').Release(args).trainings()] == [1, 2]


def test_a_plan_of_before_is_not_half_understood(tmp_path: Path) -> None:
    metrics = {'clipkd_mine': {'training': 'one.yml', 'average': {'a.pth': 1}}}
    (tmp_path / 'plan.yml').write_text(yaml.safe_dump(PLAN | {'metrics': metrics}))
    args = argparse.Namespace(configs=tmp_path, force_yml=None)
    words = r'clipkd_mine: `average` must be one of training, splits'
    with pytest.raises(ValueError, match=words):
        load_script('release').Release(args)


@pytest.mark.parametrize('missing', ['training', 'precision', 'trained_on'])
def test_what_a_metric_lacks_is_told_before_any_training(
    missing: str, tmp_path: Path
) -> None:
    metric = {'training': 'one.yml', 'precision': 'int8', 'trained_on': 'a laptop'}
    del metric[missing]
    args = argparse.Namespace(configs=tmp_path, force_yml=None)
    plan = PLAN | {'metrics': {'clipkd_mine': metric}}
    (tmp_path / 'plan.yml').write_text(yaml.safe_dump(plan))
    with pytest.raises(ValueError, match=f'clipkd_mine: `{missing}` is missing'):
        load_script('release').Release(args)
    (tmp_path / 'plan.yml').write_text(yaml.safe_dump(PLAN | {'teacher': {}}))
    with pytest.raises(ValueError, match='teacher: `training` is missing'):
        load_script('release').Release(args)


def test_a_wrong_plan_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan = tmp_path / 'plan.yml'
    words = ['release.py', '--images', 'a', '--csv', 'b.csv', '--configs']
    monkeypatch.setattr('sys.argv', [*words, str(tmp_path)])
    for text in (None, 'splits: [1', '', 'splits: [1]'):
        if text is not None:
            plan.write_text(text)
        with pytest.raises(SystemExit):
            load_script('release').main()
        *_, said = capsys.readouterr().err.splitlines()
        assert said.startswith(f'release.py: error: {plan}: '), text


@pytest.fixture
def release(tmp_path: Path) -> list[str]:
    """The command, with a plan of three tiny trainings and the mean of two."""
    csv = write_images(tmp_path / 'data')
    folder = tmp_path / 'configs'
    folder.mkdir()
    options = student_options(Path('datasets/tiny'))
    options['data'] = {'split_index': 1}
    for data in options['datasets'].values():
        del data['split_index']
    teacher = {
        **options,
        'name': 'tiny_teacher_{split}',
        'network': {'type': 'CLIPLikert', 'encoder': ENCODER, 'input_size': SIZE},
        'teacher': None,
        'train': {**options['train'], 'mos_loss_opt': {'type': 'MSELoss'}},
    }
    weights = 'experiments/tiny_teacher_{split}/models/net_best.pth'
    student = {
        **options,
        'name': 'tiny_student_{split}',
        'teacher': {'weights': weights},
    }
    last = options_of(
        'tiny_more_{split}', **{k: student[k] for k in ('teacher', 'data')}
    )
    last |= {'script': 'train_resident.py', 'num_gpu': 0}
    last['network'] = student['network']
    weights = 'experiments/tiny_student_{split}/models/net_best.pth'
    last['path'] = {'pretrain_network': weights}
    write_options(folder / 'more.yml', last)
    names = ('student', 'more')
    files = [f'experiments/tiny_{n}_{{split}}/models/net_best.pth' for n in names]
    mean: dict[str, Any] = {'name': 'tiny_mean_{split}', 'script': 'average.py'}
    mean |= {key: student[key] for key in ('network', 'datasets', 'data')} | {
        'path': {}
    }
    mean['average'] = dict(zip(files, (0.25, 0.75), strict=True))
    write_options(folder / 'mean.yml', mean)
    write_options(folder / 'teacher.yml', teacher)
    write_options(folder / 'student.yml', student)
    plan = {
        'splits': [1, 2],
        'size': SIZE,
        'teacher': {'training': 'teacher.yml', 'input_size': SIZE},
        'trainings': ['teacher.yml', 'student.yml', 'more.yml', 'mean.yml'],
        'card': {'Data': 'noise', 'Licence': 'none'},
        'metrics': {
            NAME: {
                'training': 'mean.yml',
                'precision': 'float16',
                'trained_on': 'a test machine',
            }
        },
    }
    (folder / 'plan.yml').write_text(yaml.safe_dump(plan))
    where = {
        '--images': csv.parent / 'images',
        '--csv': csv,
        '--configs': folder,
        '--results': tmp_path / 'results',
        '-o': tmp_path / 'bundled',
    }
    return [str(SCRIPT), *(str(w) for pair in where.items() for w in pair)]


@pytest.mark.slow
def test_one_command_makes_a_metric_with_its_card_and_does_nothing_twice(
    tmp_path: Path, release: list[str]
) -> None:
    finished(start(tmp_path, *release, '--jobs', '2'))
    weights = tmp_path / 'bundled' / f'{NAME}.safetensors'
    assert load_network(weights).config['encoder'] == ENCODER
    assert Runtime(weights.with_suffix('.onnx')).sha256 == file_hash(weights)
    card = weights.with_suffix('.md').read_text()
    assert file_hash(weights) in card
    for row in (
        'noise',
        'Results',
        'The same recipe on others',
        'Falls with damage',
        'Stays where',
        'Speed',
        'Cost',
    ):
        assert row in card
    assert 'teacher.yml, student.yml, more.yml, mean.yml; seed' in card
    scores = json.loads((tmp_path / f'results/{NAME}.scores.json').read_text())
    assert scores['weights_sha256'] == file_hash(weights)
    assert scores['all']['images'] == 6
    assert (tmp_path / f'results/{NAME}.reliability.png').is_file()
    robustness = json.loads((tmp_path / f'results/{NAME}.robustness.json').read_text())
    assert set(robustness['scores']) == {'astronaut', 'chelsea', 'coffee', 'rocket'}
    assert robustness['moves']['png'] == {'median': 0, 'p95': 0}
    stores = [*tmp_path.glob('datasets/resident_*/photographs.npy')]
    shapes = {np.load(store, mmap_mode='r').shape[1:] for store in stores}
    assert shapes == {(SIZE, SIZE, 3)}
    row = pd.read_csv(tmp_path / 'results/release.csv').iloc[0]
    assert row['sha256'] == file_hash(weights)
    assert row['srcc'] == pytest.approx(scores['all']['srcc'], abs=1e-4)

    (tmp_path / f'results/{NAME}.scores.json').unlink()
    again = finished(start(tmp_path, *release))
    commands = [line for line in again.splitlines() if line.startswith('== ')]
    assert len(commands) == 1, again
    assert f'evaluate.py {NAME} ' in commands[0]
