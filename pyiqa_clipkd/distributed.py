"""Several processes, on GPUs or on CPUs: start, wrapper, and what must be shared."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any, TypeVar
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from pyiqa_clipkd.peers import explained, watched

Value = TypeVar('Value')

# Process 0 validates alone. The default (10 minutes on GPUs) would end the job then.
# That a process is gone is noticed sooner (`peers`).
LONGEST_WAIT = timedelta(days=1)


@contextmanager
def launched(options: Mapping[str, Any]) -> Iterator[None]:
    """Let the host's `--launcher` work on CPUs, too, and end all processes together.

    Without a launcher it does nothing. With one, and without GPUs or with `num_gpu: 0`,
    the processes talk over gloo; otherwise over nccl, one GPU each.

    Args:
        options: the whole option file.

    Raises:
        ValueError: when the host starts the processes: without torchrun, with more
            processes than GPUs, or `slurm` on CPUs.
    """
    import pyiqa.utils.options as host

    original = host.init_dist
    on_cpu = options.get('num_gpu') == 0 or not torch.cuda.is_available()

    def init_dist(launcher: str, **kwargs: Any) -> None:
        if launcher == 'pytorch':
            _check_torchrun(None if on_cpu else torch.cuda.device_count())
            kwargs['timeout'] = LONGEST_WAIT
        if not on_cpu:
            original(launcher, **kwargs)
        elif launcher == 'pytorch':
            dist.init_process_group('gloo', **kwargs)
        else:
            raise ValueError(
                f'`--launcher {launcher}` needs GPUs; on CPUs use torchrun and '
                '`--launcher pytorch`.'
            )
        if launcher == 'pytorch' and dist.is_initialized():
            watch.enter_context(watched())

    with (
        mock.patch.object(host, 'init_dist', init_dist),
        ExitStack() as watch,
        explained(),
    ):
        yield
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()


def _check_torchrun(gpus: int | None) -> None:
    if 'RANK' not in os.environ:
        raise ValueError(
            '`--launcher pytorch` must be started by torchrun: '
            '`torchrun --standalone --nproc_per_node=2 scripts/train.py --launcher '
            'pytorch -opt ...`.'
        )
    processes = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    if gpus is not None and processes > gpus:
        raise ValueError(
            f'`--nproc_per_node` must be at most {gpus}, the number of GPUs, but got '
            f'{processes}.'
        )


def wrap(net: nn.Module, opt: Mapping[str, Any], device: torch.device) -> nn.Module:
    """Put a network on its device, and in training into its parallel wrapper.

    Several processes start from the weights of process 0. Each has the batch norm of
    its own batch (the saved statistics are those of process 0), unless
    `train: sync_batch_norm` is on, which needs GPUs.

    Raises:
        ValueError: if an option doesn't go with the wrapper.
    """
    net = net.to(device)
    if not opt['is_train']:
        return net
    train = opt['train']
    if opt['dist']:
        if train.get('sync_batch_norm'):
            net = _synchronized(net, device)
        return DistributedDataParallel(
            net,
            device_ids=[torch.cuda.current_device()] if device.type == 'cuda' else None,
            find_unused_parameters=opt.get('find_unused_parameters', False),
        )
    if opt['num_gpu'] > 1:
        # Its threads don't know about either.
        for key in ('mixed_precision', 'compile'):
            if train.get(key):
                raise ValueError(
                    f'`train: {key}` needs one GPU a process: set `num_gpu: 1`, or '
                    'start one process a GPU with torchrun and `--launcher pytorch`.'
                )
        return DataParallel(net)
    return net


def _synchronized(net: nn.Module, device: torch.device) -> nn.Module:
    from timm.layers import convert_sync_batchnorm

    if device.type != 'cuda':
        raise ValueError('`train: sync_batch_norm` needs GPUs.')
    return convert_sync_batchnorm(net)


def share(net: nn.Module) -> None:
    """Give all processes the weights and buffers of process 0, in place.

    Each process draws other random weights (the host seeds them differently).
    """
    if dist.is_initialized():
        for tensor in (*net.parameters(), *net.buffers()):
            dist.broadcast(tensor.data, src=0)


def shared(value: Value) -> Value:
    """The value that process 0 gave."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, src=0)
    return values[0]


def first_reads(read: Callable[[], Value]) -> Value:
    """What process 0 reads, in all: the others may be on machines without the file.

    Raises:
        Exception: what process 0 met; in the others a ValueError that quotes it.
    """
    if not dist.is_initialized():
        return read()
    value: Value | None = None
    failure: Exception | None = None
    if dist.get_rank() == 0:
        try:
            value = read()
        except Exception as error:
            failure = error
    words = shared(None if failure is None else f'{type(failure).__name__}: {failure}')
    if failure is not None:
        raise failure
    if words is not None:
        raise ValueError(f'Process 0 met {words}')
    return shared(value)  # type: ignore[return-value]


def of_all(value: Value) -> list[Value]:
    """The values of all processes, by their rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def check_alike(what: str, value: Any) -> None:
    """Find what differs between machines, before they wait for each other forever.

    Args:
        what: words for the message, in the plural.
        value: in all processes equal, if all is well.

    Raises:
        ValueError: if it isn't.
    """
    values = of_all(value)
    if others := [rank for rank, one in enumerate(values) if one != values[0]]:
        names = ', '.join(map(str, others))
        raise ValueError(
            f'{what} must be the same for all processes, but those of process {names} '
            'differ from those of process 0: copy them anew to all machines.'
        )
