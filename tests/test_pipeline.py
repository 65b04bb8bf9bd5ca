"""The pipelines around the host's loop: exact resume, splits, the command line."""

from __future__ import annotations

import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from training_data import (
    finished,
    start,
    student_options,
    write_images,
    write_options,
    write_teacher,
)

from pyiqa_clipkd import pipeline
from pyiqa_clipkd.weights import read_weights

TRAIN = Path(__file__).parents[1] / 'scripts' / 'train.py'


def test_the_newest_state_with_weights_is_resumed(tmp_path: Path) -> None:
    opt = {
        'auto_resume': True,
        'path': {
            'training_states': str(tmp_path / 'states'),
            'models': str(tmp_path / 'models'),
        },
    }
    (tmp_path / 'states').mkdir()
    (tmp_path / 'models').mkdir()
    assert pipeline.load_training_state(opt) is None
    for iteration in (9, 10, 11):
        torch.save({'iter': iteration}, tmp_path / f'states/{iteration}.state')
    (tmp_path / 'models/net_9.pth').touch()
    (tmp_path / 'models/net_10.pth').touch()
    state = pipeline.load_training_state(opt)
    assert state == {'iter': 10}


def long_options(data: Path) -> dict[str, Any]:
    """60 epochs of 5 iterations; checkpoints in the middle of epochs."""
    options = student_options(data, total_epoch=60)
    options['val']['val_freq'] = 28
    options['logger']['use_tb_logger'] = False
    return options


def train(folder: Path, options: Path, *flags: str) -> subprocess.Popen[str]:
    return start(folder, str(TRAIN), '-opt', str(options), *flags)


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)


@pytest.mark.slow
def test_killed_twice_and_resumed_ends_with_the_weights_of_an_uninterrupted_run(
    tmp_path: Path,
) -> None:
    data = tmp_path / 'data'
    write_images(data)
    write_teacher(data)
    options = write_options(tmp_path / 'options.yml', long_options(data))
    finished(train(tmp_path / 'whole', options))

    states = tmp_path / 'killed/experiments/student/training_states'
    for iteration in (49, 140):
        process = train(tmp_path / 'killed', options, '--auto_resume')
        wait_for(states / f'{iteration}.state', process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not (states / '301.state').exists(), 'it was killed too late'
    output = finished(train(tmp_path / 'killed', options, '--auto_resume'))
    assert 'Resuming training from epoch' in output

    for label in ('net_latest', 'net_best', 'net_301'):
        whole, resumed = (
            read_weights(
                tmp_path / f'{run}/experiments/student/models/{label}.pth'
            ).tensors
            for run in ('whole', 'killed')
        )
        assert whole.keys() == resumed.keys()
        assert all(torch.equal(whole[name], resumed[name]) for name in whole), label


@pytest.mark.slow
def test_n_splits_report_the_median(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / 'data')
    write_teacher(tmp_path / 'data')
    options = student_options(tmp_path / 'data')
    options |= {'split_num': 2, 'save_final_results_path': 'experiments/splits.txt'}
    for split in ('00', '01'):
        shutil.copy('data/teacher.pth', f'data/teacher_Split{split}.pth')
    options['teacher']['weights'] = 'data/teacher_Split{split}.pth'
    pipeline.train_nsplits(['-opt', str(write_options(Path('n.yml'), options))])
    lines = Path('experiments/splits.txt').read_text().splitlines()
    rows = [line.split('\t') for line in lines if line.startswith('tiny\t')]
    assert len(rows) == 2
    median = sum(float(row[2]) for row in rows) / 2
    assert lines[-1].startswith('Median over 2 splits in tiny: srcc ')
    assert float(lines[-1].split('srcc ')[1].split(',')[0]) == pytest.approx(
        median, abs=1e-4
    )


@pytest.mark.parametrize(
    ('change', 'flags', 'message'),
    [
        ({}, [], r'must contain \{split\}'),
        ({'teacher': None}, ['--launcher', 'pytorch'], 'runs in one process'),
    ],
)
def test_n_splits_refuse_what_would_go_wrong(
    tmp_path: Path, change: dict[str, Any], flags: list[str], message: str
) -> None:
    options = student_options(tmp_path) | {'split_num': 2} | change
    file = write_options(tmp_path / 'n.yml', options)
    with pytest.raises(ValueError, match=message):
        pipeline.train_nsplits(['-opt', str(file), *flags])


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='a setting of glibc')
def test_glibc_takes_the_memory_settings() -> None:
    code = 'from pyiqa_clipkd import pipeline; print(pipeline.keep_freed_memory())'
    result = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, check=True
    )
    assert result.stdout.split()[-1] == 'True'


def test_the_experiment_keeps_the_command_that_started_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / 'data')
    write_teacher(tmp_path / 'data')
    options = write_options(Path('mine.yml'), student_options(tmp_path / 'data'))
    pipeline.train(['-opt', str(options), '--force_yml', 'train:total_epoch=1'])
    kept = Path('experiments/student/mine.yml').read_text()
    assert '-opt mine.yml --force_yml train:total_epoch=1' in kept
