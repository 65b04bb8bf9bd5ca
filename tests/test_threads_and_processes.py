"""One metric for several threads and processes: the same scores, bit by bit."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyiqa
import pytest
import torch
from PIL import Image
from scoring_data import METRIC, photograph
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import to_tensor

from pyiqa_clipkd.metric import CLIPKDMetric
from pyiqa_clipkd.runtime import Runtime
from pyiqa_clipkd.torchmetric import QualityScore

SIZES = ((60, 90), (200, 120), (320, 240), (91, 333), (150, 150), (64, 64))
THREADS = 4
WAIT = 120  # seconds; a child that hangs is an error

needs_fork = pytest.mark.skipif(
    'fork' not in multiprocessing.get_all_start_methods(), reason='no fork here'
)

Scorer = Callable[[Image.Image], Any]


def images() -> list[Image.Image]:
    return [photograph(number, size) for number, size in enumerate(SIZES)]


def batch(image: Image.Image) -> Tensor:
    tensor: Tensor = to_tensor(image)[None]
    return tensor


def with_host() -> Scorer:
    metric = pyiqa.create_metric(METRIC, device='cpu')
    return lambda image: float(metric(batch(image)))


def with_attributes() -> Scorer:
    metric = CLIPKDMetric(METRIC)

    def score(image: Image.Image) -> Any:
        value, why = metric(batch(image), return_attributes=True)
        return float(value), why.values.tolist()

    return score


def with_crops() -> Scorer:
    metric = CLIPKDMetric(METRIC, crops=2)
    return lambda image: float(metric(batch(image)))


def with_runtime() -> Scorer:
    return Runtime(METRIC, attributes=True).score


def with_torchmetrics() -> Scorer:
    network = QualityScore(METRIC).network
    return lambda image: float(network(batch(image)))


@pytest.mark.parametrize(
    'make',
    [with_host, with_attributes, with_crops, with_runtime, with_torchmetrics],
)
def test_threads_that_share_a_metric_get_the_same_bits(
    make: Callable[[], Scorer],
) -> None:
    score = make()
    photographs = images()
    alone = [score(image) for image in photographs]
    with ThreadPoolExecutor(THREADS) as executor:
        together = list(executor.map(score, 2 * photographs))
    assert together == 2 * alone


AT_ONCE = """
import sys, threading
sys.setswitchinterval(1e-5)
import pyiqa, torch
ready, made, failed = threading.Barrier(4), [], []
def make():
    ready.wait()
    try:
        metric = pyiqa.create_metric('clipkd_efficientnet_lite', device='cpu')
        made.append(float(metric(torch.full((1, 3, 64, 64), 0.5))))
    except BaseException as error:
        failed.append(error)
threads = [threading.Thread(target=make) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert not failed, failed
assert len(made) == 4 and len(set(made)) == 1, made
"""


@pytest.mark.slow
def test_metrics_are_made_by_several_threads_at_once() -> None:
    """In a new process, where nothing is imported or registered yet."""
    subprocess.run([sys.executable, '-c', AT_ONCE], check=True, timeout=WAIT)


# --- copies and processes -------------------------------------------------------------


@pytest.mark.parametrize(
    'make',
    [
        lambda: pyiqa.create_metric(METRIC, device='cpu'),
        lambda: CLIPKDMetric(METRIC, crops=1),
    ],
    ids=['host', 'own'],
)
def test_copies_of_a_metric_score_alike(make: Callable[[], Any]) -> None:
    metric, image = make(), batch(images()[1])
    expected = metric(image)
    for other in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        assert torch.equal(other(image), expected)


@pytest.mark.parametrize('attributes', [False, True])
def test_copies_of_a_runtime_open_the_file_anew(attributes: bool) -> None:
    runtime, image = Runtime(METRIC, threads=1, attributes=attributes), images()[1]
    expected = runtime.score(image)
    for other in (copy.deepcopy(runtime), pickle.loads(pickle.dumps(runtime))):
        assert other.score(image) == expected
        assert other.path == runtime.path
        assert other.attributes == attributes


@pytest.fixture
def several_threads() -> Iterator[None]:
    """What torch does by default on machines with several cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def _score(metric: Any, pixels: np.ndarray) -> float:
    image = Image.fromarray(pixels)
    if isinstance(metric, Runtime):
        return metric.score(image).score
    with torch.no_grad():
        return float(metric(batch(image)))


_given: list[Any] = []


def _give(metric: Any) -> None:
    _given.append(metric)


def _score_given(pixels: np.ndarray) -> float:
    return _score(_given[0], pixels)


def scores_in(method: str, metric: Any) -> list[float]:
    """Of two processes that are given the metric."""
    context = multiprocessing.get_context(method)
    pixels = [np.asarray(image) for image in images()]
    executor = ProcessPoolExecutor(
        2, mp_context=context, initializer=_give, initargs=(metric,)
    )
    try:
        futures = [executor.submit(_score_given, one) for one in pixels]
        return [future.result(WAIT) for future in futures]
    finally:
        for process in list(executor._processes.values()):
            process.kill()
        executor.shutdown()


def in_turn(metric: Any) -> list[float]:
    """By one thread, as in processes that share a machine: others round otherwise."""
    torch.set_num_threads(1)
    return [_score(metric, np.asarray(image)) for image in images()]


@needs_fork
@pytest.mark.parametrize('make', [CLIPKDMetric, Runtime])
def test_forked_processes_score_after_their_parent_has(
    make: Callable[[str], Any], several_threads: None
) -> None:
    """OpenMP's threads don't come along: torch would wait for them forever."""
    metric = make(METRIC)
    _score(metric, np.asarray(images()[0]))
    assert scores_in('fork', metric) == in_turn(metric)


class Stuck:
    """A session whose threads stayed with the parent, one of them with a lock."""

    def run(self, *arguments: Any) -> None:
        time.sleep(2 * WAIT)


@needs_fork
def test_a_forked_process_never_runs_its_parent_s_session(tmp_path: Path) -> None:
    metric = Runtime(METRIC)
    expected = in_turn(metric)
    metric._session = Stuck()
    assert scores_in('fork', metric) == expected
    graph = shutil.copy(metric.path, tmp_path)
    shutil.copy(metric.path.with_suffix('.safetensors'), tmp_path)
    own = Runtime(graph)
    (tmp_path / f'{METRIC}.safetensors').write_bytes(b'another')
    with pytest.raises(ValueError, match='was made of other weights'):
        scores_in('fork', own)


@pytest.mark.slow
@pytest.mark.parametrize('make', [CLIPKDMetric, Runtime])
def test_spawned_processes_get_the_metric(make: Callable[[str], Any]) -> None:
    metric = make(METRIC)
    expected = in_turn(metric)
    found = scores_in('spawn', metric)  # with as many threads as they like
    assert found == pytest.approx(expected, abs=1e-5)


class Scored(Dataset[float]):
    """A data set that asks the metric by itself."""

    def __init__(self, metric: Any) -> None:
        self.metric = metric

    def __len__(self) -> int:
        return len(SIZES)

    def __getitem__(self, index: int) -> float:
        return _score(self.metric, np.asarray(photograph(index, SIZES[index])))


@pytest.mark.slow
# Not forkserver: torch sends a file for each tensor, and that takes at most 250.
@pytest.mark.parametrize('method', ['fork', 'spawn'])
@pytest.mark.parametrize('workers', [1, 2])
def test_loaders_may_score_in_their_workers(
    method: str, workers: int, several_threads: None
) -> None:
    metric = CLIPKDMetric(METRIC)
    _score(metric, np.asarray(images()[0]))  # with several threads
    loader: DataLoader[float] = DataLoader(
        Scored(metric),
        num_workers=workers,
        multiprocessing_context=method,
        timeout=WAIT,
    )
    assert [float(score) for score in loader] == in_turn(metric)


# --- what is promised of numbers ------------------------------------------------------


def test_threads_and_batches_move_scores_by_rounding_alone(
    several_threads: None,
) -> None:
    """Other numbers of threads or other batches may sum in another order."""
    metric = CLIPKDMetric(METRIC)
    together = torch.stack([to_tensor(photograph(n, (90, 80))) for n in range(6)])
    scores = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        scores[threads, 1] = torch.cat([metric(one[None]) for one in together])
        scores[threads, 6] = metric(together)
        assert torch.equal(metric(together), scores[threads, 6]), 'again: every bit'
    for found in scores.values():
        torch.testing.assert_close(found, scores[1, 1], atol=1e-5, rtol=0)
