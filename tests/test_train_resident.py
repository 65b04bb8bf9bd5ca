"""Trainings from arrays: photographs are cut, copies belong to them, networks learn."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from script_modules import SCRIPTS, load_script
from training_data import ENCODER, write_images

from pyiqa_clipkd.network import load_network
from pyiqa_clipkd.ranking import DegradationRankingLoss

COLUMN = 'ratio802_seed123_split_01'
SIDE = 32


@pytest.fixture(scope='module')
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Arrays of 22 photographs to train on, with copies, and of 6 others."""
    folder = tmp_path_factory.mktemp('store')
    table = write_images(folder / 'data')
    command = [sys.executable, SCRIPTS / 'photograph_store.py', table]
    command += ['--images', folder / 'data/images', '--column', COLUMN]
    command += ['--size', SIDE, '--chains', 2, '--jobs', 1, '-o', folder / 'arrays']
    subprocess.run([*map(str, command)], check=True, capture_output=True)
    return folder / 'arrays'


@pytest.fixture
def views(monkeypatch: pytest.MonkeyPatch, store: Path) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    module = load_script('resident_views')
    arrays = module.Store([store], torch.device('cpu'))
    return module.Views(arrays, DegradationRankingLoss(), 1.0, seed=0)


def test_copies_are_damaged_and_the_second_more(store: Path) -> None:
    levels = np.load(store / 'levels.npy')
    assert levels.shape == (22, 2, 2)
    assert (levels[..., 0] < levels[..., 1]).all()
    photographs = np.load(store / 'photographs.npy')[np.load(store / 'train.npy')]
    moved = np.abs(
        np.load(store / 'copies.npy') - photographs[:, None, None].astype(int)
    )
    # Blur of a few pixels' width is nothing in pictures as small as these.
    assert (moved.mean((2, 3, 4, 5)) > 0).mean() > 0.8


def test_a_batch_has_each_photograph_once_and_its_own_label(views: Any) -> None:
    phase = load_script('resident_views').Phase(1.0, SIDE, photographs=11, copies=4)
    batches = [views.batch(phase) for _ in range(2)]
    assert all(len(batch.images) == 11 + 3 * 4 for batch in batches)
    labels = torch.cat([batch.mos for batch in batches]).flatten().sort().values
    assert torch.equal(labels, views.store.mos[views.store.train, 0].sort().values)


def test_a_photograph_and_its_copies_show_the_same_window(views: Any) -> None:
    views.store.copies[:] = views.store.photographs[views.store.train][:, None, None]
    phase = load_script('resident_views').Phase(1.0, 16, photographs=4, copies=4)
    images = views.batch(phase).images
    assert torch.equal(images[8:12], images[:4])
    assert torch.equal(images[12:], images[:4])
    assert not torch.equal(images[4:8], images[:4])


def options_of(name: str, **changes: Any) -> dict[str, Any]:
    return {
        'name': name,
        'manual_seed': 1,
        'datasets': {'train': {'split_index': 1}},
        'path': {},
        'network': {'type': 'CLIPKDStudent', 'encoder': ENCODER, 'input_size': SIDE},
        'train': {
            'steps': [2, 1],
            'optim': {'lr': 1e-3},
            'scheduler': {'min_ratio': 0.1, 'warmup': 0.1},
            'ranking_loss_opt': {'type': 'DegradationRankingLoss'},
            'phases': [
                {'share': 0.5, 'size': 32, 'photographs': 4, 'copies': 2, 'mixed': 2},
                {'share': 0.5, 'size': 32, 'photographs': 4, 'copies': 0},
            ],
        },
        **changes,
    }


def train(
    folder: Path,
    store: Path,
    *options: dict[str, Any],
    script: str = 'train_resident.py',
) -> str:
    files = []
    for one in options:
        files.append(folder / f'{one["name"]}.yml')
        files[-1].write_text(yaml.safe_dump(one))
    command = [
        sys.executable,
        SCRIPTS / script,
        '--device',
        'cpu',
        '--store',
        store,
        '-opt',
    ]
    done = subprocess.run(
        [*map(str, [*command, *files])], capture_output=True, text=True, cwd=folder
    )
    return done.stdout if done.returncode == 0 else done.stderr


def test_a_student_follows_the_teacher_that_was_trained_before_it(
    store: Path, tmp_path: Path
) -> None:
    network = {'type': 'CLIPLikert', 'encoder': ENCODER, 'input_size': SIDE}
    teacher = options_of('teacher_00', network=network | {'pretrained': None})
    weights = 'experiments/teacher_{split}/models/net_best.pth'
    student = options_of('student', teacher={'weights': weights})
    student['train']['feature_hints'] = 1
    said = train(tmp_path, store, teacher, student)
    assert 'student' in said, said
    record = json.loads((tmp_path / 'experiments/student/run.json').read_text())
    assert {'hard', 'soft', 'score', 'hints', 'srcc'} <= record['history'][0].keys()
    files = [
        tmp_path / 'experiments' / name / 'models/net_best.pth'
        for name in ('teacher_00', 'student')
    ]
    first, second = (load_network(file).state_dict() for file in files)
    assert torch.equal(first['head.anchors'], second['head.anchors'])


def test_a_training_that_blows_up_ends_with_its_losses(
    store: Path, tmp_path: Path
) -> None:
    options = options_of('wild')
    options['train']['optim'] = {'lr': 1e30}
    said = train(tmp_path, store, options)
    assert 'RuntimeError: wild: the losses are' in said
    assert not (tmp_path / 'experiments/wild/run.json').exists()
