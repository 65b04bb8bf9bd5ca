"""A timm network cut at the ends of its stages, for `train_stages.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyiqa_clipkd.hints import STRIDES
from pyiqa_clipkd.stages import stages_at

# What comes after the features that a network gives.
HEADS = ('global_pool', 'classifier', 'fc', 'head')

SIDE_TO_CHECK = 64  # pixels


class Stages(nn.Module):
    """The parts of a convolutional or hierarchical network, to be run one by one.

    Args:
        backbone: a timm network that tells its stages (`feature_info`).

    Attributes:
        channels: stride (pixels a cell) -> C of the map at the end of that stage.

    Raises:
        ValueError: if it doesn't tell them, or lacks one of the strides 4, 8, 16, 32.
    """

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        encoder = type(backbone).__name__
        ends = stages_at(backbone, STRIDES, 'train_stages.py', encoder)
        self.channels = {stride: ends[stride]['num_chs'] for stride in STRIDES}
        self._channels_last = getattr(backbone, 'output_fmt', 'NCHW') == 'NHWC'
        wanted = {ends[stride]['module'] for stride in STRIDES}
        parts: list[list[nn.Module]] = [[]]
        for name, module in _in_order(backbone, wanted):
            parts[-1].append(module)
            if name in wanted:
                parts.append([])
        self.parts = nn.ModuleList(nn.Sequential(*part) for part in parts)

    def part(self, stride: int) -> nn.Module:
        """The modules of a stage."""
        return self.parts[STRIDES.index(stride)]

    def run(self, stride: int, inputs: Tensor) -> Tensor:
        """What a stage makes of the map before it, or of images at the first stride.

        All (N, C, H, W), whatever the network's own order is.
        """
        if self._channels_last and stride != STRIDES[0]:  # Swin
            inputs = inputs.permute(0, 2, 3, 1)
        output: Tensor = self.part(stride)(inputs)
        return output.permute(0, 3, 1, 2) if self._channels_last else output

    def rest(self, inputs: Tensor) -> Tensor:
        """From the map of the last stage to the features that are pooled."""
        if self._channels_last:
            inputs = inputs.permute(0, 2, 3, 1)
        output: Tensor = self.parts[-1](inputs)
        return output.permute(0, 3, 1, 2) if self._channels_last else output

    @torch.no_grad()
    def ends_active(self, images: Tensor) -> dict[int, bool]:
        """Whether a stage ends with an activation, so that its map has a lowest value.

        That is told by the module that runs last in it.
        """
        last: list[nn.Module] = []
        leaves = [
            m for m in self.parts.modules() if not any(True for _ in m.children())
        ]
        hooks = [
            leaf.register_forward_hook(lambda leaf, *_: last.append(leaf))
            for leaf in leaves
        ]
        found, maps = {}, images
        for stride in STRIDES:
            maps = self.run(stride, maps)
            found[stride] = is_bounded_below(last[-1])
        for hook in hooks:
            hook.remove()
        return found


def is_bounded_below(module: nn.Module) -> bool:
    """ReLU, SiLU and such: a map of numbers that doesn't fall far below 0."""
    if next(module.parameters(), None) is not None:
        return False
    return float(module(torch.linspace(-9, 9, 99)).min()) > -1


def _in_order(backbone: nn.Module, wanted: set[str]) -> list[tuple[str, nn.Module]]:
    """Modules as they run; one that holds ends of stages is opened."""
    found: list[tuple[str, nn.Module]] = []
    for name, module in backbone.named_children():
        if name in HEADS:
            continue
        if any(end.startswith(f'{name}.') for end in wanted):
            found += [(f'{name}.{n}', m) for n, m in module.named_children()]
        else:
            found.append((name, module))
    return found


@torch.no_grad()
def check_cut(network: Any) -> None:
    """Raises: ValueError if the parts one after the other aren't the network.

    Its modules may run in another order than they are declared in, or a network may do
    more with its features than taking their mean.
    """
    backbone = network.encoder.backbone
    stages = Stages(backbone)
    device = next(backbone.parameters()).device
    training = backbone.training
    backbone.eval()
    images = torch.rand(2, 3, SIDE_TO_CHECK, SIDE_TO_CHECK, device=device)
    wanted = backbone(images)
    try:
        values = images
        for stride in STRIDES:
            values = stages.run(stride, values)
        found = stages.rest(values).mean((2, 3))
        same = torch.allclose(found, wanted, rtol=1e-3, atol=1e-4)
    except (RuntimeError, IndexError):
        same = False
    backbone.train(training)
    if not same:
        raise ValueError(
            'train_stages.py needs a network whose stages run one after the other and '
            f'whose features are pooled by their mean, not {network.config["encoder"]}.'
        )
