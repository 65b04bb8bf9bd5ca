"""Trainings on several machines: what is shared, what is noticed, what is taken up."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from script_modules import load_script

from pyiqa_clipkd import distributed, peers, pipeline
from pyiqa_clipkd.distributed import check_alike, first_reads
from pyiqa_clipkd.peers import PeerLostError, Watch, explained

two_nodes = load_script('two_nodes')

EPOCHS, EVERY = 30, 25  # 180 steps, a checkpoint after each 25
LIMIT = 90  # seconds until a survivor must have ended


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first process of two, as far as anybody asks."""
    monkeypatch.setattr(dist, 'is_initialized', lambda: True)
    monkeypatch.setattr(dist, 'get_rank', lambda: 0)
    monkeypatch.setattr(dist, 'get_world_size', lambda: 2)


# --- noticed --------------------------------------------------------------------------


@pytest.mark.parametrize(
    'text',
    [
        '[pair.cc:545] Read error [10.0.0.2]:50: Connection reset by peer.',
        'Connection closed by peer [10.0.0.2]:50',
        'NCCL error: remote process exited or there was a network error',
    ],
)
def test_a_lost_connection_says_what_to_do(alone: None, text: str) -> None:
    with pytest.raises(PeerLostError, match=r'has ended .* --auto_resume'), explained():
        raise RuntimeError(text)


def test_other_errors_stay_as_they_are(
    alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RuntimeError, match='shapes'), explained():
        raise RuntimeError('shapes do not fit')
    monkeypatch.setattr(dist, 'is_initialized', lambda: False)
    with pytest.raises(RuntimeError, match='reset'), explained():
        raise RuntimeError('Connection reset by peer')


@pytest.fixture
def watch(
    alone: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[int], Watch]]:
    """Watches of two processes; what they would end with is in `said`."""
    store = dist.HashStore()
    monkeypatch.setattr(peers, '_connected', lambda: store)
    monkeypatch.setattr(peers, 'BEAT', 0.02)
    monkeypatch.setattr(peers, 'SILENCE', 0.4)
    made: list[Watch] = []

    def make(rank: int) -> Watch:
        one = Watch()
        one.rank = rank
        made.append(one)
        one.start()
        return one

    yield make
    for one in made:
        one.stopped.set()
        one.join()


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    texts: list[str] = []

    def end(self: Watch, text: str) -> None:
        texts.append(f'{self.rank}: {text}')
        self.stopped.set()

    monkeypatch.setattr(Watch, '_end', end)
    return texts


def test_silence_of_a_process_ends_the_others(
    watch: Callable[[int], Watch], said: list[str]
) -> None:
    first, second = watch(0), watch(1)
    time.sleep(1)
    assert said == [], 'both were there'
    second.stopped.set()
    first.join(5)
    assert len(said) == 1
    assert said[0].startswith('0: Nothing was heard of process 1 of 2')
    assert '--auto_resume' in said[0]


def test_a_process_without_torchrun_ends(
    watch: Callable[[int], Watch], said: list[str]
) -> None:
    one = watch(0)
    watch(1)
    one.parent = -1
    one.join(5)
    assert said == ['0: torchrun, which started this process, has ended.']


def test_a_store_that_is_gone_counts_as_silence(
    watch: Callable[[int], Watch], said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone() -> dist.Store:
        raise dist.DistNetworkError('connection refused')

    monkeypatch.setattr(peers, '_connected', gone)
    watch(0).join(5)
    assert 'process 1 of 2' in said[0]


# --- shared ---------------------------------------------------------------------------


def test_what_the_first_process_reads_or_fails_at(
    alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Any] = []
    monkeypatch.setattr(
        dist, 'broadcast_object_list', lambda values, src: sent.append(values[0])
    )
    assert first_reads(lambda: 5) == 5
    assert sent == [None, 5]

    def read() -> int:
        raise FileNotFoundError('no 7.state')

    with pytest.raises(FileNotFoundError, match=r'no 7\.state'):
        first_reads(read)
    assert sent[2:] == ['FileNotFoundError: no 7.state']
    monkeypatch.setattr(distributed, 'shared', lambda value: sent[2])
    monkeypatch.setattr(dist, 'get_rank', lambda: 1)
    with pytest.raises(ValueError, match=r'Process 0 met File.*: no 7\.state'):
        first_reads(read)


def test_what_differs_between_machines_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_alike('Labels', 3)
    monkeypatch.setattr(distributed, 'of_all', lambda value: [value, 4, value])
    with pytest.raises(ValueError, match=r'Labels must be .* process 1 differ'):
        check_alike('Labels', 3)


def test_a_state_of_another_number_of_processes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / '25.state'
    opt = {'auto_resume': False, 'path': {'resume_state': str(path)}, 'world_size': 1}
    torch.save({'iter': 25, 'processes': 2}, path)
    with pytest.raises(ValueError, match=r'25\.state was written by 2 .* there are 1'):
        pipeline.load_training_state(opt)
    for state in ({'iter': 25, 'processes': 1}, {'iter': 25}):
        torch.save(state, path)
        assert pipeline.load_training_state(opt) == state


# --- real machines, as far as one computer can be two ---------------------------------


@pytest.fixture(scope='module')
def options() -> str:
    text: str = two_nodes.option_file(2, EPOCHS, EVERY)
    return text


@pytest.fixture(scope='module')
def whole(tmp_path_factory: pytest.TempPathFactory, options: str) -> Path:
    """The folder of node 0 after a training on two nodes that nothing befell."""
    folder: Path = two_nodes.uninterrupted(tmp_path_factory.mktemp('whole'), options)
    return folder


def log_of(node: Any) -> str:
    return (node.folder / 'log').read_text(errors='replace')


def ended(agents: list[subprocess.Popen[bytes]], limit: float = LIMIT) -> list[int]:
    """Exit codes; nothing is left behind if one doesn't end."""
    try:
        return [agent.wait(limit) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()


def both(nodes: Any, *flags: str, **options: Any) -> list[subprocess.Popen[bytes]]:
    return [
        two_nodes.start(node, rank, nodes[0], *flags, **options)
        for rank, node in enumerate(nodes)
    ]


@pytest.mark.slow
def test_two_nodes_train_as_one_process_and_the_first_alone_writes(
    tmp_path: Path, whole: Path
) -> None:
    two_nodes.alone(tmp_path / 'one', two_nodes.option_file(1, EPOCHS, EVERY))
    assert two_nodes.farthest(tmp_path / 'one', whole) < 1e-5
    names = {path.name for path in (whole.parent / 'node1').iterdir()}
    assert names == {'data', 'o.yml', 'log'}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_killed_on_one_node_the_other_ends_and_both_go_on(
    tmp_path: Path, whole: Path, options: str
) -> None:
    """Resumed, although the second node has no checkpoint."""
    row = two_nodes.befallen(tmp_path, options, 'kill -9 on node 1', EVERY)
    assert row['survivor_exit_code'] == 1
    assert row['survivor_ended_after_s'] < LIMIT
    assert row['all_processes_gone_after_s'] < LIMIT
    assert 'Another process of this training has ended' in row['survivor_said']
    assert row['resumed_exit_codes'] == [0, 0]
    assert 'Resuming training' in (Path(row['folder']) / 'log').read_text()
    assert two_nodes.farthest(whole, Path(row['folder'])) == 0


@pytest.mark.slow
@pytest.mark.skipif(not two_nodes.can_split(), reason='needs root and `ip`')
def test_a_pulled_cable_is_noticed_on_both_ends(tmp_path: Path) -> None:
    script = tmp_path / 'train.py'
    script.write_text(
        'from pyiqa_clipkd import peers, pipeline\n'
        'peers.BEAT, peers.SILENCE = 0.5, 6\n'
        'pipeline.train()\n'
    )
    with two_nodes.two_nodes(tmp_path) as nodes:
        two_nodes.prepare(nodes, two_nodes.option_file(2, 1000, EVERY))
        agents = both(nodes, script=script)
        state = nodes[0].folder / two_nodes.STATES / f'{EVERY}.state'
        two_nodes.wait_for(state, agents[0], nodes[0].folder / 'log')
        two_nodes.pull_cable(nodes[1])
        codes = ended(agents)
    assert 0 not in codes
    for rank, node in enumerate(nodes):
        assert f'heard of process {1 - rank} of 2 for 6 seconds' in log_of(node)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_torchrun_restarts_what_was_killed(
    tmp_path: Path, whole: Path, options: str
) -> None:
    with two_nodes.two_nodes(tmp_path) as nodes:
        two_nodes.prepare(nodes, options)
        elastic = ('--rdzv-backend', 'c10d', '--rdzv-id', '1', '--max-restarts', '5')
        # All that either may write is on one disk here: any of them may come first.
        shared = tmp_path / 'experiments'
        shared.mkdir()
        for node in nodes:
            (node.folder / 'experiments').symlink_to(shared)
        agents = both(nodes, *elastic, '--', '--auto_resume')
        state = nodes[0].folder / two_nodes.STATES / f'{EVERY}.state'
        two_nodes.wait_for(state, agents[0], nodes[0].folder / 'log')
        (worker,) = two_nodes.workers(agents[1])
        os.kill(worker, signal.SIGKILL)
        assert ended(agents, 120) == [0, 0], log_of(nodes[0]) + log_of(nodes[1])
    assert any('Resuming training' in log_of(node) for node in nodes)
    assert two_nodes.farthest(whole, nodes[0].folder) == 0


@pytest.mark.slow
def test_other_labels_on_one_node_are_an_error_not_a_wait(
    tmp_path: Path, options: str
) -> None:
    with two_nodes.two_nodes(tmp_path) as nodes:
        two_nodes.prepare(nodes, options)
        table = nodes[1].folder / 'data/meta.csv'
        table.write_text(table.read_text().replace(',0.', ',0.0', 1))
        assert 0 not in ended(both(nodes))
    for node in nodes:
        assert 'Images and labels of the training set must be' in log_of(node)


@pytest.mark.slow
def test_a_checkpoint_on_the_wrong_node_is_named(
    tmp_path: Path, whole: Path, options: str
) -> None:
    with two_nodes.two_nodes(tmp_path) as nodes:
        two_nodes.prepare(nodes, options)
        shutil.copytree(whole / 'experiments', nodes[1].folder / 'experiments')
        assert 0 not in ended(both(nodes, '--auto_resume'))
    for node in nodes:
        assert '.state, is on the machine of process 1' in log_of(node)
