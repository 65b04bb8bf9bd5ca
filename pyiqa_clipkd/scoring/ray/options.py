"""The options of `pyiqa-clipkd score` for clusters, and what can be wrong with them."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

from pyiqa_clipkd.description import ONNX
from pyiqa_clipkd.scoring.ray.stores import FILE, is_remote, local_path
from pyiqa_clipkd.scoring.results import check_ending
from pyiqa_clipkd.scoring.tables import PARQUET

LOCAL, RAY = 'local', 'ray'
ENGINES = (LOCAL, RAY)

# Options without a meaning on one machine.
ONLY_RAY = ('column', 'ray_address', 'worker_cpus', 'worker_gpus')

INSTALL = "pip install 'pyiqa-clipkd[ray]'"


def add_cluster(group: argparse._ArgumentGroup) -> None:
    """The options of `--engine ray`."""
    add = group.add_argument
    help_text = f'ray: on a cluster, or some processes here ({INSTALL})'
    add('--engine', choices=ENGINES, default=LOCAL, help=help_text)
    help_text = 'of a running cluster; default: RAY_ADDRESS, or else this machine'
    add('--ray-address', metavar='ADDRESS', help=help_text)
    help_text = 'of tables, the one with photographs or their paths'
    add('--column', metavar='NAME', help=help_text)
    help_text = 'cores of one worker; default: 1, or all shared out among GPUs'
    add('--worker-cpus', type=int, metavar='N', help=help_text)
    help_text = 'of one worker; default: 1 with --device cuda; 0.5: two share one'
    add('--worker-gpus', type=float, metavar='X', help=help_text)


def located_output(text: str) -> Path | str:
    """Of -o: a path, or a URI as it is."""
    if is_remote(text):
        return text
    return Path(local_path(text) if text.startswith(FILE) else text)


def check_engine(arguments: argparse.Namespace) -> None:
    """Whether the options fit together and Ray is there.

    Raises:
        ValueError: if they don't.
        ModuleNotFoundError: if it isn't.
    """
    if arguments.engine == RAY:
        _check_ray(arguments)
        return
    for name in ONLY_RAY:
        if getattr(arguments, name) is not None:
            raise ValueError(f'`--{name.replace("_", "-")}` needs --engine ray.')
    if isinstance(arguments.output, str):
        raise ValueError(f'-o {arguments.output} needs --engine ray.')
    if arguments.output and arguments.output.is_dir():
        raise ValueError(
            f'{arguments.output} is a folder. If it has the parts of --engine ray, go '
            'on with that; else choose another name.'
        )


def device_of(arguments: argparse.Namespace) -> str:
    """What workers compute on: a graph stays on processors, also beside GPUs."""
    device: str = arguments.device
    return 'cpu' if device == 'auto' and _is_graph(arguments) else device


def _is_graph(arguments: argparse.Namespace) -> bool:
    weights = arguments.weights
    file = weights is not None and weights.suffix.lower() == ONNX
    return file or arguments.backend == 'onnx'


def _check_ray(arguments: argparse.Namespace) -> None:
    if find_spec('ray') is None or find_spec('pyarrow') is None:
        raise ModuleNotFoundError(f'`--engine ray` needs Ray: `{INSTALL}`.')
    if arguments.output and check_ending(Path(arguments.output)) != PARQUET:
        raise ValueError(
            '`--engine ray` writes a folder of Parquet files: -o NAME.parquet, but '
            f'got {arguments.output}.'
        )
    if arguments.device == 'mps':
        raise ValueError('`--device` mps needs --engine local.')
    if arguments.worker_cpus is not None and arguments.worker_cpus < 1:
        raise ValueError(
            f'`--worker-cpus` must be a whole number >= 1, but got '
            f'{arguments.worker_cpus}.'
        )
    gpus = arguments.worker_gpus
    if gpus is not None and not gpus > 0:
        raise ValueError(f'`--worker-gpus` must be above 0, but got {gpus:g}.')
    if gpus is not None and gpus > 1 and gpus % 1:
        raise ValueError(
            f'`--worker-gpus` above 1 must be a whole number, but got {gpus:g}.'
        )
    if gpus is not None and arguments.device == 'cpu':
        raise ValueError('`--worker-gpus` contradicts --device cpu.')
    if _is_graph(arguments) and (gpus is not None or arguments.device == 'cuda'):
        name = '--device cuda' if gpus is None else '--worker-gpus'
        raise ValueError(f'`{name}` needs --backend torch, and no .onnx file.')
