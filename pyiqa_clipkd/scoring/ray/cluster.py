"""A Ray cluster, quiet: a running one, or one of this machine's processes."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pyiqa_clipkd.scoring.core import default_workers
from pyiqa_clipkd.scoring.pillow import PILLOW_MEMORY

# Nothing is sent to anybody. What Ray has to say of processes that died would go to
# standard output, among the scores; their photographs are scored again in any case.
QUIET = {
    'RAY_USAGE_STATS_ENABLED': '0',
    'RAY_DEDUP_LOGS_SKIP_REGEX': '.',
    'RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO': '0',
    'RAY_BACKEND_LOG_LEVEL': 'fatal',
}


class Workers(NamedTuple):
    """How many processes with a model, and what each of them has of the cluster."""

    number: int
    cpus: int
    gpus: float


@contextlib.contextmanager
def connected(address: str | None, cpus: int | None) -> Iterator[None]:
    """Within a cluster.

    Args:
        address: of a running one; by default that of RAY_ADDRESS. Without any, one is
            started that ends with the block.
        cpus: processor cores of one that is started; by default all.

    Raises:
        ConnectionError: if there is none at the address.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    import ray

    address = address or os.environ.get('RAY_ADDRESS')
    _check_reachable(address)
    own = {'num_cpus': cpus or default_workers(), 'include_dashboard': False}
    with _without_noise(), _same_sigterm():
        ray.init(
            address=address or 'local',
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={'env_vars': {**PILLOW_MEMORY, 'OPENBLAS_NUM_THREADS': '1'}},
            **({} if address else own),
        )
    try:
        _hush()
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str | None) -> None:
    """Ray itself would go on trying for minutes, without a word."""
    host, _, port = (address or '').rpartition(':')
    if not host or not port.isdigit() or '/' in host:  # Ray knows what it means
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise ConnectionError(
            f'There is no Ray cluster at {address}: {error}.'
        ) from None


@contextlib.contextmanager
def _without_noise() -> Iterator[None]:
    """What Ray's C++ part says of its own log level, past Python, isn't shown."""
    kept = os.dup(2)
    with open(os.devnull, 'wb') as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextlib.contextmanager
def _same_sigterm() -> Iterator[None]:
    """Ray's own handler would end the process with another code, and not in order."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        mine = threading.current_thread() is threading.main_thread()
        if mine and handler is not None:
            signal.signal(signal.SIGTERM, handler)


def _hush() -> None:
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name in ('ray', 'ray.data'):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings('ignore', module=r'ray\.')


def plan(
    device: str, workers: int | None, cpus: int | None, gpus: float | None
) -> Workers:
    """How a connected cluster is shared out.

    Args:
        device: `cpu`, `cuda`, or `auto`: GPUs where the cluster has any.
        workers: how many; by default as many as there is room for.
        cpus, gpus: of each.

    Raises:
        ValueError: if the cluster has not so much.
    """
    import ray

    nodes = [
        (int(node['Resources'].get('CPU', 0)), node['Resources'].get('GPU', 0))
        for node in ray.nodes()
        if node['Alive']
    ]
    cards = sum(there for _, there in nodes)
    if device == 'cuda' or gpus or (device == 'auto' and cards):
        gpus = gpus or 1
        count = workers or max(1, room(nodes, cpus or 1, gpus))
        if room(nodes, 0, gpus) < count:
            raise ValueError(
                f'{count} workers with {gpus:g} GPUs each need more than the {cards:g} '
                'of the cluster: choose --workers and --worker-gpus, or --device cpu.'
            )
        most = max(cores for cores, _ in nodes)
        fitting = (c for c in range(most, 1, -1) if room(nodes, c, gpus) >= count)
        cpus = cpus or next(fitting, 1)
    else:
        gpus, cpus = 0, cpus or 1
        count = workers or max(1, room(nodes, cpus, gpus))
    if room(nodes, cpus, gpus) < count:
        beside = f' and {gpus:g} GPUs' if gpus else ''
        raise ValueError(
            f'{count} workers with {cpus} cores{beside} each need more than the '
            f'machines of the cluster have ({_listed(nodes)}): choose --workers and '
            '--worker-cpus.'
        )
    return Workers(count, cpus, gpus)


def room(nodes: Sequence[tuple[int, float]], cpus: int, gpus: float) -> int:
    """How many workers fit: each has its cores and GPUs on one machine.

    Args:
        nodes: cores and GPUs of each machine.
        cpus, gpus: of each worker.
    """
    return sum(
        min(cores // cpus if cpus else sys.maxsize, _shares(cards, gpus))
        for cores, cards in nodes
    )


def _shares(cards: float, gpus: float) -> int:
    """For how many workers GPUs suffice; a part of one isn't made of two."""
    if not gpus:
        return sys.maxsize
    if gpus < 1:
        return int(cards) * int(1 / gpus + 1e-9)
    return int(cards / gpus)


def _listed(nodes: Sequence[tuple[int, float]]) -> str:
    kinds = sorted(Counter(nodes).items(), reverse=True)[:5]
    words = [
        f'{count} with {cores} cores' + (f' and {cards:g} GPUs' if cards else '')
        for (cores, cards), count in kinds
    ]
    return ', '.join(words)
