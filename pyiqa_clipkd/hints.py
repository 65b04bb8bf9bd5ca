"""Hints: the student's feature maps follow the teacher's, stage by stage.

An embedding is one vector an image; a network that starts from nothing learns slowly
from it. Feature maps are thousands of targets an image, and the early ones are easy
(FitNets, Romero et al. 2015).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyiqa_clipkd.network import QualityNetwork
from pyiqa_clipkd.stages import stages_at

STRIDES = (4, 8, 16, 32)


class StageOutputs:
    """What the stages of a timm encoder gave in its last forward pass.

    Args:
        network: whose encoder is a timm network with `feature_info`.
        strides: the stages to watch, by their pixels a cell.

    Attributes:
        maps: stride -> (N, C, H, W).
        channels: stride -> C.

    Raises:
        ValueError: if the encoder doesn't tell its stages, or lacks one.
    """

    def __init__(
        self, network: QualityNetwork, strides: Sequence[int] = STRIDES
    ) -> None:
        backbone: Any = network.encoder.backbone
        encoder = network.config['encoder']
        stages = stages_at(backbone, strides, '`train: feature_hints`', encoder)
        self._channels_last = getattr(backbone, 'output_fmt', 'NCHW') == 'NHWC'
        self.channels = {stride: stages[stride]['num_chs'] for stride in strides}
        self.maps: dict[int, Tensor] = {}
        for stride in strides:
            module = backbone.get_submodule(stages[stride]['module'])
            module.register_forward_hook(self._hook(stride))

    def _hook(self, stride: int) -> Any:
        def keep(module: nn.Module, args: Any, output: Tensor) -> None:
            if self._channels_last:  # Swin
                output = output.permute(0, 3, 1, 2)
            self.maps[stride] = output

        return keep


class FeatureHintLoss(nn.Module):
    """Mean squared distance to the teacher's feature maps.

    A 1x1 convolution for each stage leads from the student's channels to the teacher's;
    it is learned with the student and dropped afterwards. The teacher's maps have mean
    0 and variance 1 in each channel of a batch, so 1 is the loss of a constant answer.

    Args:
        student: stride -> channels.
        teacher: stride -> channels, the same strides.
    """

    def __init__(self, student: Mapping[int, int], teacher: Mapping[int, int]) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict(
            {str(s): nn.Conv2d(student[s], teacher[s], 1) for s in student}
        )

    def forward(self, student: dict[int, Tensor], teacher: dict[int, Tensor]) -> Tensor:
        """Maps by stride, (N, C, H, W) -> scalar, at best 0.

        Where the two have other sizes, the larger is averaged down.
        """
        losses = []
        for key, adapter in self.adapters.items():
            mine, target = student[int(key)], teacher[int(key)].detach().float()
            size = (
                min(mine.shape[2], target.shape[2]),
                min(mine.shape[3], target.shape[3]),
            )
            mine = F.adaptive_avg_pool2d(mine.float(), size)
            target = F.adaptive_avg_pool2d(target, size)
            std, mean = torch.std_mean(target, dim=(0, 2, 3), keepdim=True)
            target = (target - mean) / std.clamp(min=1e-6)
            losses.append(F.mse_loss(adapter(mine), target))
        return torch.stack(losses).mean()
