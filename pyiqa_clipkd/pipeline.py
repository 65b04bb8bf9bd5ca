"""The host's train, test and n-splits pipelines, run below the working directory.

The loop is the host's. Around it: option files that build on each other, the working
directory as root, and a resume that is exact (also on the CPU, where the host's own
crashes, and in the middle of an epoch, which the host would begin again).
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml

from pyiqa_clipkd import __version__
from pyiqa_clipkd.distributed import (
    check_alike,
    first_reads,
    launched,
    of_all,
    shared,
)
from pyiqa_clipkd.engine import check_options
from pyiqa_clipkd.experiment import newest_checkpoint
from pyiqa_clipkd.files import written_whole
from pyiqa_clipkd.options import load_options, without_weights
from pyiqa_clipkd.ranking import BatchWithCopies
from pyiqa_clipkd.views import EpochSampler, SeededDataset
from pyiqa_clipkd.weights import load_training_file


def train(argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    """Train with the host's `train_pipeline`; takes the host's flags.

    Returns:
        The best results: data set -> metric -> value and iteration.
    """
    import pyiqa.train as host

    keep_freed_memory()
    start = time.time()
    with _host_arguments(argv) as options, _exact_resume(host) as resumed:
        results = host.train_pipeline(os.getcwd())
    folder = Path('experiments', options['name'])
    if results is not None and folder.is_dir():
        seconds = resumed.get('seconds', 0) + time.time() - start
        record = run_record(options, results, seconds)
        with written_whole(folder / 'run.json') as partial:  # or it isn't finished
            partial.write_text(json.dumps(record, indent=2, default=float) + '\n')
    return results


def run_record(
    options: dict[str, Any], results: dict[str, Any], seconds: float
) -> dict[str, Any]:
    """What a reader of a result needs to repeat it; `run.json` beside the weights.

    Args:
        options: the expanded option file.
        results: data set -> metric -> value and iteration.
        seconds: of this process and of those that it goes on from, up to their last
            checkpoint.
    """
    return {
        'command': ' '.join(['python', *sys.argv]),
        'results': results,
        'seconds': round(seconds),
        'commit': checkout_commit(),
        'version': __version__,
        'torch': torch.__version__,
        'gpus': options['num_gpu'],
        'threads': torch.get_num_threads(),
        'options': options,
    }


def checkout_commit() -> str | None:
    """The commit of this checkout; `None` where the package isn't in one."""
    checkout = Path(__file__).resolve().parents[1]
    git = ['git', '-C', str(checkout), 'rev-parse', '--show-toplevel', 'HEAD']
    try:
        result = subprocess.run(git, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    top, commit = result.stdout.split('\n')[:2]
    return commit if Path(top) == checkout else None


def test(argv: Sequence[str] | None = None) -> None:  # noqa: PT028 - no test
    """Test with the host's `test_pipeline`; results go below `results/`.

    A recipe for training is tested on its validation sets, with the best weights of its
    experiment or those that an override of `path:pretrain_network` names.

    Raises:
        FileNotFoundError: if a recipe for training hasn't been trained.
    """
    import pyiqa.test as host

    with _host_arguments(argv, prepare=_test_what_was_trained):
        host.test_pipeline(os.getcwd())


def _test_what_was_trained(options: dict[str, Any], overrides: Sequence[str]) -> None:
    if 'train' not in options:
        return
    options['datasets'] = {
        phase: data
        for phase, data in options['datasets'].items()
        if phase.split('_')[0] != 'train'
    }
    options['network'] = without_weights(options['network'])  # the checkpoint has all
    if not any(o.startswith('path:pretrain_network=') for o in overrides):
        best = Path('experiments', options['name'], 'models', 'net_best.pth')
        if not best.is_file():
            raise FileNotFoundError(
                f'There is no {best}: train first, or give other weights with '
                '`--force_yml path:pretrain_network=FILE`.'
            )
        options['path']['pretrain_network'] = str(best)


def train_nsplits(argv: Sequence[str] | None = None) -> None:
    """Train on `split_num` splits with the host's `train_nsplits`.

    The host writes each split's results, mean and standard deviation to
    `save_final_results_path`; the median over splits (the paper's figure) is added.
    """
    import pyiqa.train as host
    import pyiqa.train_nsplits as host_nsplits

    keep_freed_memory()
    with _host_arguments(argv) as options, _exact_resume(host):
        if '--launcher' in sys.argv:
            raise ValueError(
                'train_nsplits runs in one process. For `--launcher` run train once a '
                'split, with `data:split_index=` and a `name=` for each.'
            )
        teacher = str((options.get('teacher') or {}).get('weights') or '{split}')
        if '{split}' not in teacher and options['split_num'] > 1:
            raise ValueError(
                f'`teacher: weights` must contain {{split}}, but got {teacher!r}: a '
                "teacher of one split has seen the other splits' test images."
            )
        host_nsplits.train_nsplits(os.getcwd())
    _append_medians(Path(options['save_final_results_path']))


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory for the next step instead of giving it back.

    Every training step allocates the same large blocks. By default glibc maps each of
    them anew, and the kernel clears the pages. On two CPU cores that takes as long as
    the step itself (scripts/benchmark.py measures it).

    Returns:
        Whether the allocator is glibc's and took the settings.
    """
    m_trim_threshold, m_mmap_max = -1, -4
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return bool(mallopt(m_mmap_max, 0) and mallopt(m_trim_threshold, 2**31 - 1))


@contextmanager
def _host_arguments(
    argv: Sequence[str] | None,
    prepare: Callable[[dict[str, Any], Sequence[str]], None] = lambda *_: None,
) -> Iterator[dict[str, Any]]:
    """Expand the option file, and hand the host its arguments."""
    parser = argparse.ArgumentParser(
        description='Flags: those of pyiqa (--auto_resume, --debug, --launcher).'
    )
    parser.add_argument('-opt', required=True, nargs='+', help='option file or files')
    parser.add_argument(
        '--force_yml', nargs='+', default=[], metavar='KEY:KEY=VALUE', help='overrides'
    )
    args, rest = parser.parse_known_args(argv)
    options = load_options(args.opt, args.force_yml)
    check_options(options.get('train') or {})
    prepare(options, args.force_yml)
    with tempfile.TemporaryDirectory() as folder:
        expanded = Path(folder) / Path(args.opt[0]).name
        command = ' '.join(['python', *(sys.argv if argv is None else argv)])
        text = yaml.safe_dump(options, sort_keys=False)
        expanded.write_text(f'# {command}\n{text}')
        arguments = [sys.argv[0], '-opt', str(expanded), *rest]
        with mock.patch.object(sys, 'argv', arguments), launched(options):
            yield options


@contextmanager
def _exact_resume(host: Any) -> Iterator[dict[str, Any]]:
    """Replace two functions of the host's training module while it runs.

    Yields:
        The state that the training goes on from; empty for a fresh start.
    """
    from pyiqa.losses import build_loss

    original = host.create_train_val_dataloader
    resumed: dict[str, Any] = {}

    def load_resume_state(opt: dict[str, Any]) -> dict[str, Any] | None:
        resumed.clear()
        state = load_training_state(opt)
        resumed.update(state or {})
        return state

    def create_train_val_dataloader(opt: dict[str, Any], logger: Any) -> Any:
        opt['manual_seed'] = shared(opt['manual_seed'])
        for data in opt['datasets'].values():
            if not data.get('num_worker_per_gpu'):  # torch refuses them
                data['persistent_workers'] = False
        loader, sampler, *rest = original(opt, logger)
        seed, data = opt['manual_seed'], opt['datasets']['train']
        check_alike('Images and labels of the training set', _content(loader, data))
        check_alike('Options of the training', (opt['train'], loader.batch_size))
        ranking = opt['train'].get('ranking_loss_opt')
        batches = len(loader)
        epoch = resumed.get('epoch', 0)
        done = resumed.get('iter', 0) - epoch * batches
        sampler = EpochSampler(
            sampler,
            epoch,
            done * loader.batch_size,
            rank=opt['rank'],
            world_size=opt['world_size'],
        )
        loader = host.build_dataloader(
            SeededDataset(
                loader.dataset,
                seed,
                views=data.get('views'),
                keys=bool((opt.get('teacher') or {}).get('cache')),
                seeds=bool(ranking),
            ),
            data,
            num_gpu=opt['num_gpu'],
            dist=opt['dist'],
            sampler=sampler,
            seed=seed,
        )
        if ranking:
            loader.collate_fn = BatchWithCopies(build_loss(ranking))
        return loader, sampler, *rest

    with (
        mock.patch.object(host, 'load_resume_state', load_resume_state),
        mock.patch.object(
            host, 'create_train_val_dataloader', create_train_val_dataloader
        ),
    ):
        yield resumed


def _content(loader: Any, data: dict[str, Any]) -> str:
    """Names and labels of a data set, wherever its folder is, in a few digits."""
    root = data['dataroot_target']
    rows = [
        (os.path.relpath(path, root), *map(str, labels))
        for path, *labels in loader.dataset.paths_mos
    ]
    return hashlib.sha256(repr(rows).encode()).hexdigest()


def load_training_state(opt: dict[str, Any]) -> dict[str, Any] | None:
    """The state to go on from, on the CPU, or `None` for a fresh start.

    With `auto_resume` it is the newest one whose weights are there too; otherwise the
    one that `path: resume_state` names. Of several processes the first one looks and
    reads for all of them: it alone writes, maybe to a disk that others don't see.

    Raises:
        ValueError: if only another process's machine has the newest one, or another
            number of processes has written it.
        FileNotFoundError: if `path: resume_state` names no file.
    """
    path = opt['path'].get('resume_state')
    if opt['auto_resume']:
        path = _newest_state(opt)
    path = shared(path)
    if path is None:
        return None
    opt['path']['resume_state'] = str(path)
    state = first_reads(lambda: load_training_file(path))
    now = opt.get('world_size', 1)
    if (then := state.get('processes', now)) != now:
        raise ValueError(
            f'{path} was written by {then} processes, but now there are {now}: its '
            f'iterations had other batches. Resume with {then}, or start from its '
            'weights with `path:pretrain_network=FILE`.'
        )
    return state


def _newest_state(opt: dict[str, Any]) -> Path | None:
    states = Path(opt['path']['training_states'])
    iteration = newest_checkpoint(states, Path(opt['path']['models']))
    newest = [-1 if one is None else one for one in of_all(iteration)]
    if max(newest) > newest[0]:
        rank = newest.index(max(newest))
        raise ValueError(
            f'The newest training state, {states / f"{max(newest)}.state"}, is on the '
            f'machine of process {rank}, but process 0 has to read it. Give that '
            f'machine `--node-rank 0`, or copy {states.parent} to the first machine.'
        )
    return None if iteration is None else states / f'{iteration}.state'


def _append_medians(path: Path) -> None:
    """Add one line a data set: the median of each metric over the splits."""
    header, *lines = path.read_text().splitlines()
    metrics = header.split('\t')[2:]
    results: dict[str, list[list[float]]] = {}
    for line in lines:
        fields = line.split('\t')
        if len(fields) >= 2 + len(metrics) and fields[1].isdigit():
            values = [float(field) for field in fields[2 : 2 + len(metrics)]]
            results.setdefault(fields[0], []).append(values)
    with path.open('a') as file:
        for data, rows in results.items():
            medians = [statistics.median(column) for column in zip(*rows, strict=True)]
            text = ', '.join(
                f'{m} {v:.4f}' for m, v in zip(metrics, medians, strict=True)
            )
            file.write(f'Median over {len(rows)} splits in {data}: {text}\n')
