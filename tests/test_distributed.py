"""Several processes: alone, and as real ones that torchrun starts on CPUs."""

from __future__ import annotations

import csv
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyiqa.utils.options as host
import pytest
import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from training_data import (
    data_options,
    finished,
    start,
    student_options,
    write_images,
    write_options,
)

from pyiqa_clipkd.distributed import launched, share, shared, wrap
from pyiqa_clipkd.views import EpochSampler

TRAIN = Path(__file__).parents[1] / 'scripts' / 'train.py'
CPU = torch.device('cpu')


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The only process that torchrun started."""
    here = {'RANK': '0', 'WORLD_SIZE': '1', 'MASTER_ADDR': 'localhost'}
    for key, value in (here | {'MASTER_PORT': '0'}).items():
        monkeypatch.setenv(key, value)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def options(**changes: Any) -> dict[str, Any]:
    return {'is_train': True, 'dist': False, 'num_gpu': 0, 'train': {}, **changes}


def test_processes_on_a_cpu_talk_over_gloo_and_part_in_the_end(alone: None) -> None:
    original = host.init_dist
    with launched({'num_gpu': 0}):
        host.init_dist('pytorch')
        assert dist.get_backend() == 'gloo'
        net = wrap(nn.Linear(2, 1), options(dist=True), CPU)
        assert isinstance(net, DistributedDataParallel)
        net(torch.ones(1, 2)).sum().backward()
        assert net.module.weight.grad.tolist() == [[1, 1]]
        share(net)
        assert shared({'seed': 3}) == {'seed': 3}
    assert not dist.is_initialized()
    assert host.init_dist is original


def test_after_an_error_the_host_is_as_it_was() -> None:
    original = host.init_dist
    with pytest.raises(KeyError, match='mine'), launched({'num_gpu': 0}):
        raise KeyError('mine')
    assert host.init_dist is original


def test_a_launcher_without_torchrun_is_an_error_that_shows_the_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv('RANK', raising=False)
    with launched({}), pytest.raises(ValueError, match=r'torchrun --standalone'):
        host.init_dist('pytorch')


def test_slurm_without_gpus_is_an_error() -> None:
    with launched({'num_gpu': 0}), pytest.raises(ValueError, match='needs GPUs'):
        host.init_dist('slurm')


@pytest.mark.parametrize(
    ('num_gpu', 'processes', 'reached'),
    [('auto', 2, 'host'), ('auto', 3, 'error'), (0, 3, 'gloo')],
)
def test_on_gpus_the_host_starts_one_process_on_each(
    monkeypatch: pytest.MonkeyPatch, num_gpu: Any, processes: int, reached: str
) -> None:
    calls: list[tuple[str, Any]] = []
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setenv('RANK', '0')
    monkeypatch.setenv('LOCAL_WORLD_SIZE', str(processes))
    monkeypatch.setattr(
        host, 'init_dist', lambda launcher, **kw: calls.append(('host', kw['timeout']))
    )
    monkeypatch.setattr(
        dist, 'init_process_group', lambda name, **kw: calls.append((name, None))
    )
    with launched({'num_gpu': num_gpu}):
        if reached == 'error':
            with pytest.raises(ValueError, match=r'at most 2, .* but got 3'):
                host.init_dist('pytorch')
            return
        host.init_dist('pytorch')
    assert [name for name, _ in calls] == [reached]
    if reached == 'host':  # process 0 may validate for hours
        assert calls[0][1].total_seconds() > 3600


def test_nothing_is_wrapped_in_one_process_or_in_a_test() -> None:
    net = nn.Linear(2, 1)
    assert wrap(net, options(), CPU) is net
    assert wrap(net, options(is_train=False, dist=True), CPU) is net
    parallel = wrap(net, options(num_gpu=2), CPU)
    assert isinstance(parallel, DataParallel)


@pytest.mark.parametrize(
    'train', [{'mixed_precision': 'bf16'}, {'compile': True}], ids=str
)
def test_several_gpus_in_one_process_refuse_what_their_threads_would_ignore(
    train: dict[str, Any],
) -> None:
    with pytest.raises(ValueError, match=r'`train: \w+` needs one GPU a process'):
        wrap(nn.Linear(2, 1), options(num_gpu=2, train=train), CPU)


def test_shared_batch_norm_needs_gpus() -> None:
    asked = options(dist=True, train={'sync_batch_norm': True})
    with pytest.raises(ValueError, match='`train: sync_batch_norm` needs GPUs'):
        wrap(nn.BatchNorm1d(2), asked, CPU)


class HostSampler:
    """Every second index, as the host's sampler for one of two processes."""

    epoch = 1

    def __init__(self, rank: int, world_size: int) -> None:
        self.indices = [7, 3, 5, 1, 0, 2, 6, 4][rank::world_size]

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)


@pytest.mark.parametrize('done', [0, 2])
def test_positions_of_several_processes_are_those_of_one(done: int) -> None:
    one = list(EpochSampler(HostSampler(0, 1), 1, 2 * done))
    two = [
        list(EpochSampler(HostSampler(rank, 2), 1, done, rank=rank, world_size=2))
        for rank in (0, 1)
    ]
    assert [key for pair in zip(*two, strict=True) for key in pair] == one


# --- real processes ---------------------------------------------------------------


def training(folder: Path, processes: int, **changes: Any) -> dict[str, Any]:
    """No batch norm, no Adam: it makes steps out of rounding errors near zero."""
    options = student_options(folder, optim={'type': 'SGD', 'lr': 0.02}, **changes)
    options['datasets'] = data_options(folder, batch_size_per_gpu=4 // processes)
    options['network']['encoder'] = 'timm:test_vit'
    # Random weights, which each process would draw by itself.
    options['teacher'] = {
        'type': 'CLIPLikert',
        'encoder': 'timm:test_resnet',
        'input_size': 32,
        'embed_dim': 24,
    }
    return options


@pytest.fixture(scope='module')
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp('data') / 'd', train=24).parent


def torchrun(
    folder: Path, options: dict[str, Any], processes: int, *flags: str
) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    write_options(folder / 'o.yml', options)
    launcher: list[str] = []
    if processes > 1:
        launcher = ['-m', 'torch.distributed.run', '--standalone']
        launcher += [f'--nproc_per_node={processes}']
        flags = ('--launcher', 'pytorch', *flags)
    return start(folder, *launcher, str(TRAIN), '-opt', 'o.yml', *flags)


def weights(folder: Path, label: str = 'net_latest') -> dict[str, Tensor]:
    path = folder / f'experiments/student/models/{label}.pth'
    return torch.load(path, weights_only=True)['params']


def assert_close(
    first: dict[str, Tensor], second: dict[str, Tensor], atol: float
) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, atol=atol, rtol=0, msg=name)


@pytest.mark.slow
def test_two_processes_train_as_one_with_the_same_batch(
    tmp_path: Path, data: Path
) -> None:
    """And at the same time as others: torchrun finds a free port."""
    started = [
        torchrun(tmp_path / 'one', training(data, 1), 1),
        torchrun(tmp_path / 'two', training(data, 2), 2),
        torchrun(tmp_path / 'grouped', training(data, 4, accumulate=2), 2),
    ]
    for process in started:
        finished(process)
    one = weights(tmp_path / 'one')
    assert_close(one, weights(tmp_path / 'two'), 1e-5)
    assert_close(one, weights(tmp_path / 'grouped'), 1e-5)
    best = [weights(tmp_path / run, 'net_best') for run in ('one', 'two')]
    assert_close(best[0], best[1], 1e-5)
    files: dict[str, list[str]] = {}
    for run in ('one', 'two'):
        root = tmp_path / run
        names = (path.name.split('_2')[0].split('.tf')[0] for path in root.rglob('*'))
        files[run] = sorted(names)
    assert files['two'] == files['one'], 'process 0 alone writes'
    (log,) = (tmp_path / 'two/experiments/student').glob('*.log')
    assert log.read_text().count('iter:      12') == 1
    scores = []
    for run in ('one', 'two'):
        path = tmp_path / run / 'experiments/student/run.json'
        results = yaml.safe_load(path.read_text())['results']['tiny']
        scores.append([results[metric]['val'] for metric in ('srcc', 'plcc')])
    assert scores[1] == pytest.approx(scores[0], abs=1e-4)


@pytest.mark.slow
def test_two_processes_stopped_and_resumed_end_as_two_that_were_not(
    tmp_path: Path, data: Path
) -> None:
    """With everything on: the checkpoint is in the middle of a group."""
    options = training(
        data,
        2,
        total_epoch=20,
        accumulate=2,
        mixed_precision='bf16',
        clip_grad_norm=1.0,
        ema_decay=0.9,
    )
    options['val']['val_freq'] = 1000
    options['logger']['save_checkpoint_freq'] = 31
    finished(torchrun(tmp_path / 'whole', options, 2))

    process = torchrun(tmp_path / 'stopped', options, 2)
    folder = tmp_path / 'stopped/experiments/student/training_states'
    while not (folder / '31.state').exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    process.terminate()  # torchrun ends its processes; they don't notice before
    process.communicate()
    assert not (folder / '93.state').exists(), 'it was stopped too late'
    assert 'Resuming training' in finished(
        torchrun(tmp_path / 'stopped', options, 2, '--auto_resume')
    )
    assert_close(weights(tmp_path / 'whole'), weights(tmp_path / 'stopped'), 0)


@pytest.mark.slow
def test_an_error_in_one_process_ends_the_job_with_that_error(
    tmp_path: Path, data: Path
) -> None:
    """A photograph is missing, and only the second process meets it."""
    options = training(data, 2)
    table = data / 'broken.csv'
    rows = list(csv.reader((data / 'meta.csv').open()))
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0)).tolist()
    rows[1 + order[3]][0] = 'gone.png'
    with table.open('w', newline='') as file:
        csv.writer(file).writerows(rows)
    options['datasets']['train']['meta_info_file'] = str(table)
    process = torchrun(tmp_path / 'run', options, 2)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    last_words = output[output.index('Root Cause') :]
    assert 'rank      : 1' in last_words
    assert 'gone.png' in last_words
