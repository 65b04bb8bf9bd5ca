"""From the loss to the weights: precision, accumulation, clipping, averaging."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer

from pyiqa_clipkd.distributed import first_reads
from pyiqa_clipkd.weights import load_training_file

PRECISIONS = {'bf16': torch.bfloat16, 'fp16': torch.float16}
SWITCHES = ('channels_last', 'compile', 'sync_batch_norm')
OPTIONS = (
    'mixed_precision',
    'accumulate',
    'clip_grad_norm',
    'ema_decay',
    *SWITCHES,
)


def check_options(train: Mapping[str, Any]) -> None:
    """Check the options of this module among those under `train:`.

    Raises:
        ValueError: if one has a value that isn't allowed, or is misspelt.
    """
    for key in train.keys() - set(OPTIONS):
        if close := difflib.get_close_matches(str(key), OPTIONS, n=1, cutoff=0.85):
            raise ValueError(f'`train: {key}` is unknown; did you mean `{close[0]}`?')
    allowed = {
        'mixed_precision': ('bf16 or fp16', lambda v: v in PRECISIONS),
        'accumulate': ('a whole number >= 1', lambda v: type(v) is int and v >= 1),
        'clip_grad_norm': ('a number > 0', lambda v: _is_number(v) and v > 0),
        'ema_decay': ('a number in (0, 1)', lambda v: _is_number(v) and 0 < v < 1),
        **{key: ('true or false', lambda v: v is True) for key in SWITCHES},
    }
    for key, (words, fits) in allowed.items():
        value = train.get(key)
        if value is not None and value is not False and not fits(value):
            raise ValueError(f'`train: {key}` must be {words}, but got {value!r}.')


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


class TrainingEngine:
    """What happens between a loss and the weights, from the options under `train:`.

    - `mixed_precision`: `bf16`, or `fp16` with a scaled loss. Weights stay float32.
    - `accumulate: k`: k batches of the loader make one optimizer step, as one batch of
      k times the size would (except for batch norm, dropout, and losses that are no
      mean over images). A last, shorter group makes a step, too.
    - `clip_grad_norm: x`: gradients of a greater norm are scaled down to it.
    - `ema_decay: d`: validate and publish an exponential moving average of the weights,
      taken after each optimizer step. Early averages are shorter (timm's warm-up), so
      that it doesn't stay at the first weights in a short training.
    - `compile`, `channels_last`: speed alone.

    Calls: `prepare`, `start`; then in each iteration `progress`, `autocast`, `images`
    and `backward`. Iterations count the loader's batches from 1.

    Args:
        train: the options.
        device: where the network is.

    Raises:
        ValueError: see `check_options`.
    """

    net: nn.Module
    optimizer: Optimizer

    def __init__(self, train: Mapping[str, Any], device: torch.device) -> None:
        check_options(train)
        self.device = device
        self.iterations = self.steps = 0
        self.dtype = PRECISIONS.get(train.get('mixed_precision') or '')
        self.accumulate = train.get('accumulate') or 1
        self.max_norm = train.get('clip_grad_norm') or None
        self.ema_decay = train.get('ema_decay') or None
        self.compile = bool(train.get('compile'))
        self.channels_last = bool(train.get('channels_last'))
        self.ema: ModelEmaV3 | None = None
        scaled = self.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=scaled)

    def prepare(self, net: nn.Module) -> None:
        """Take the network, in place: on its device, before a parallel wrapper."""
        self.net = net
        if self.channels_last:
            net.to(memory_format=torch.channels_last)
        if self.ema_decay is not None:
            self.ema = ModelEmaV3(net, decay=self.ema_decay, use_warmup=True)
        if self.compile:
            net.compile()  # in place: names in the state dict stay

    def start(self, optimizer: Optimizer, iterations: int) -> None:
        """Take the optimizer and the number of iterations that will run."""
        self.optimizer = optimizer
        self.iterations = iterations
        self.steps = math.ceil(iterations / self.accumulate)

    # --- one iteration ------------------------------------------------------------

    def _step(self, iteration: int) -> int:
        """The optimizer step, from 0, that an iteration belongs to."""
        return (iteration - 1) // self.accumulate

    def progress(self, iteration: int) -> float:
        """t / T in optimizer steps: 0 in the first one, 1 in the last one."""
        return min(1.0, self._step(iteration) / max(1, self.steps - 1))

    def rate_factor(self, progress: float, floor: float, warmup: float) -> float:
        """What the learning rate is multiplied by at `progress` = t / T.

        It falls on a cosine from 1 to `floor`, after a linear warm-up over `warmup`, a
        share of the steps.
        """
        factor = floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2
        if progress < warmup:
            factor *= (progress + 1 / self.steps) / warmup
        return min(factor, 1.0)

    def autocast(self) -> AbstractContextManager[Any]:
        """Around the student's forward pass, and nothing else."""
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def images(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in the memory format of the network."""
        if self.channels_last:
            return images.contiguous(memory_format=torch.channels_last)
        return images

    def backward(self, loss: Tensor, iteration: int) -> dict[str, float]:
        """Add a batch's gradients; the last batch of its group makes the step.

        Several processes exchange gradients after every batch, not only after the last
        one of a group: so those in a training state are right for all of them.

        Returns:
            What is worth logging: the `grad_norm` before clipping, the `loss_scale`.
        """
        step = self._step(iteration)
        last = min((step + 1) * self.accumulate, self.iterations)
        size = last - step * self.accumulate
        self.scaler.scale(loss / size).backward()
        logged: dict[str, float] = {}
        if self.scaler.is_enabled():
            logged['loss_scale'] = self.scaler.get_scale()
        if iteration < last:
            return logged
        self.scaler.unscale_(self.optimizer)
        if self.max_norm is not None:
            norm = nn.utils.clip_grad_norm_(self.net.parameters(), self.max_norm)
            logged['grad_norm'] = norm.item()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update(self.net, step=step + 1)
        return logged

    # --- weights and state --------------------------------------------------------

    def evaluated(self, net: nn.Module) -> nn.Module:
        """The network to validate: with averaged weights, where there are some."""
        return net if self.ema is None else self.ema.module

    def checkpoint(self) -> dict[str, dict[str, Tensor]]:
        """`params`: the weights to use. `params_raw`: without averaging, if that is on.

        All tensors are on the CPU.
        """
        states = {'params': self.evaluated(self.net).state_dict()}
        if self.ema is not None:
            states['params_raw'] = self.net.state_dict()
        return {
            key: {name: value.cpu() for name, value in state.items()}
            for key, state in states.items()
        }

    def load_checkpoint(self, path: str | Path) -> None:
        """Go on from the weights of a `checkpoint`.

        Averaging may have been turned on or off since.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it doesn't fit the network.
        """
        content = first_reads(lambda: load_training_file(path))
        try:
            self.net.load_state_dict(content.get('params_raw', content['params']))
            if self.ema is not None:
                self.ema.module.load_state_dict(content['params'])
        except RuntimeError as error:
            raise ValueError(f'{path} does not fit the network: {error}') from error

    def state_dict(self) -> dict[str, Any]:
        """What a training state needs besides weights and optimizer.

        In the middle of a group these are its gradients so far, too.
        """
        gradients = {
            name: parameter.grad.cpu()
            for name, parameter in self.net.named_parameters()
            if parameter.grad is not None
        }
        return {'scaler': self.scaler.state_dict(), 'gradients': gradients}

    def load_state_dict(self, state: Mapping[str, Any], iteration: int) -> None:
        """Go on after `iteration`.

        Raises:
            ValueError: if the gradients aren't those of this option `accumulate`.
        """
        gradients = state.get('gradients') or {}
        unfinished = iteration < self.iterations and iteration % self.accumulate != 0
        if unfinished != bool(gradients):
            raise ValueError(
                f'`train: accumulate` is {self.accumulate}, but the training state of '
                f'iteration {iteration} was written with another value: resume with it.'
            )
        for name, gradient in gradients.items():
            self.net.get_parameter(name).grad = gradient.to(self.device)
        if self.scaler.is_enabled() and state.get('scaler'):
            self.scaler.load_state_dict(state['scaler'])
