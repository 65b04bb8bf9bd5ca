"""From an EfficientNet-Lite0 to an EfficientNet-B0, for `train_resident.py`.

The two are the same network but for three things: B0 has gates, SiLU in place of ReLU,
and no bound at 6. Its gates begin open and alike for all channels. SiLU(s x) / s tends
to ReLU(x) for large s, so what goes into an activation is made s times as large, and
what follows expects that. The bound can't be had; statistics of normalization, measured
anew on some photographs, bring back most of what it did, and learning from the other's
blocks, one by one, the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from timm.models.efficientnet import EfficientNet
from torch import Tensor, nn

from pyiqa_clipkd.encoders import OPEN_GATE, open_gates
from pyiqa_clipkd.network import QualityNetwork

# How much larger an activation's input is: within the network, and before the
# projection, whose weights become smaller by it (and then learn faster than others).
WITHIN, LAST = 16.0, 4.0


@torch.no_grad()
def begin_as_lite(network: QualityNetwork, tensors: Mapping[str, Tensor]) -> None:
    """A B0 gives nearly what a Lite0 with these tensors gives, but for its bound at 6.

    Args:
        network: EfficientNet-B0 with a projection, changed in place.
        tensors: state dict of such a network with EfficientNet-Lite0.

    Raises:
        ValueError: if the tensors are of another network.
    """
    gates = {name for name in network.state_dict() if '.se.' in name}
    mine = network.state_dict().keys() - gates - {'_extra_state'}
    theirs = tensors.keys() - {'_extra_state'}
    alike = isinstance(network.encoder.backbone, EfficientNet) and mine == theirs
    if not gates or not alike:
        raise ValueError(
            '`train: begin_as_lite` needs an efficientnet and the weights of an '
            f'efficientnet_lite; this is {network.config["encoder"]}, and '
            f'{len(mine ^ theirs)} tensors are in one of the two only.'
        )
    network.load_state_dict({name: tensors[name] for name in mine}, strict=False)
    open_gates(network)
    encoder: Any = network.encoder
    _louder(encoder.backbone.bn1, WITHIN)
    input_is_active = True
    gate = float(torch.tensor(OPEN_GATE).sigmoid())
    for block in _blocks(network):
        *active, last = (block.get_submodule(n) for n in _norms(block))
        for norm in active:
            if input_is_active:
                _expect_louder(norm, WITHIN)
            _louder(norm, WITHIN)
            input_is_active = True
        _expect_louder(last, WITHIN * gate)
        input_is_active = False
    _louder(encoder.backbone.bn2, LAST)
    encoder.projection.weight /= LAST


def _blocks(network: QualityNetwork) -> list[nn.Module]:
    backbone: Any = network.encoder.backbone
    if not isinstance(backbone, EfficientNet):
        raise ValueError(
            '`train: follow_blocks` needs an EfficientNet that follows another, but '
            f'one of the two is {network.config["encoder"]}.'
        )
    return [block for stage in backbone.blocks for block in stage]


def _norms(block: nn.Module) -> list[str]:
    """In order; an activation follows each but the last."""
    return [name for name in ('bn1', 'bn2', 'bn3') if hasattr(block, name)]


def _louder(norm: Any, times: float) -> None:
    norm.weight *= times
    norm.bias *= times


def _expect_louder(norm: Any, times: float) -> None:
    """The same output for an input that is so many times as large."""
    norm.running_mean *= times
    norm.running_var.add_(norm.eps).mul_(times**2).sub_(norm.eps)


@torch.no_grad()
def measure_statistics(network: nn.Module, batches: Iterable[Tensor]) -> None:
    """Means and variances of batch normalization: those of these images alone."""
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a mean of all batches
    was_training = network.training
    network.train()
    for images in batches:
        network(images)
    network.train(was_training)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


class BlockOutputs:
    """What the blocks of an EfficientNet gave in its last forward pass.

    Args:
        network: whose encoder is one.

    Attributes:
        maps: one (N, C, H, W) a block, in order.

    Raises:
        ValueError: if it is another network.
    """

    def __init__(self, network: QualityNetwork) -> None:
        blocks = _blocks(network)
        self.maps: list[Tensor] = [torch.empty(0)] * len(blocks)
        for place, block in enumerate(blocks):
            block.register_forward_hook(self._hook(place))

    def _hook(self, place: int) -> Any:
        def keep(module: nn.Module, args: Any, output: Tensor) -> None:
            self.maps[place] = output

        return keep


def block_distance(mine: list[Tensor], theirs: list[Tensor]) -> Tensor:
    """Squared distance of maps, in variances of each block of the other: a scalar.

    1 is that of an answer without any relation but the right mean.
    """
    losses = []
    for one, other in zip(mine, theirs, strict=True):
        target = other.detach().float()
        spread = target.var(dim=(0, 2, 3)).mean().clamp(min=1e-12)
        losses.append((one.float() - target).square().mean() / spread)
    return torch.stack(losses).mean()
