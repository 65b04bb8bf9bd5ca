"""What an encoder saw on the way: means and deviations of the maps of its stages.

The last features say what a photograph shows; blur, noise and compression are plainer
in earlier ones, and in how much a feature varies over the photograph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyiqa_clipkd.head import in_full_precision

# Stages that a readout looks at, the last ones: of most networks those of 4, 8, 16 and
# 32 pixels a cell, of a plain ViT its last blocks.
STAGES = 4

# Of the variance of a channel, whose root has no gradient at 0.
TINY = 1e-6

# Means, or deviations, that vary less over photographs than this share of what is usual
# for those of their stage say nothing: a distilled stage with more channels than its
# teacher's may keep the others constant.
NEARLY_CONSTANT = 0.05


def deviation(variance: Tensor) -> Tensor:
    """Standard deviation, of the same shape; below 0 a variance counts as 0."""
    return variance.clamp(min=0).add(TINY).sqrt()


def statistics(maps: Sequence[Tensor]) -> Tensor:
    """Maps (N, C_i, H_i, W_i) -> (N, 2 * sum of C_i): of each, means and deviations.

    In float32 at least: the square of half a precision's number may have none.
    """
    parts = []
    for values in maps:
        values = in_full_precision(values)[0]
        mean = values.mean((2, 3), keepdim=True)
        # Not from the mean of squares: of a nearly constant channel little is left.
        variance = (values - mean).square().mean((2, 3))
        parts += [mean.flatten(1), deviation(variance)]
    return torch.cat(parts, 1)


class StageReadout(nn.Module):
    r"""`statistics` of an encoder's last stages -> what they add to its embedding.

    .. math:: r = W_2 \max(W_1 z + b_1, 0) + b_2

    with z the means and deviations of all channels, each normalized to what it is over
    photographs (running mean 0, variance 1). It begins as 0: a network with a readout
    is the network without until it is trained.

    Args:
        channels: of the stages.
        width: of the hidden layer.
        embed_dim: of the embedding.
    """

    def __init__(self, channels: Sequence[int], width: int, embed_dim: int) -> None:
        super().__init__()
        self.channels = tuple(channels)
        count = 2 * sum(self.channels)
        self.norm = nn.BatchNorm1d(count, affine=False)
        self.hidden = nn.Linear(count, width)
        self.last = nn.Linear(width, embed_dim)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (N, C_i, H_i, W_i) of all stages -> (N, D), in float32 at least."""
        return self.of_statistics(statistics(self.seen(maps)))

    def seen(self, maps: Sequence[Tensor]) -> Sequence[Tensor]:
        """Of the maps of all stages those that it looks at."""
        return maps[-len(self.channels) :]

    def usual_means(self) -> list[Tensor]:
        """Of each stage that it looks at what its channels are on average, (C_i)."""
        usual: Any = self.norm.running_mean
        return self.parts(usual)[::2]

    @torch.no_grad()
    def overlook_constant(self) -> None:
        """Take no notice of statistics that are nearly the same in all photographs.

        Normalized, they are the rounding errors of a number's format, which are loud
        with eight bits.
        """
        variances: Any = self.norm.running_var
        constant = [
            part <= NEARLY_CONSTANT**2 * part.mean() for part in self.parts(variances)
        ]
        self.hidden.weight[:, torch.cat(constant)] = 0

    def parts(self, features: Tensor) -> list[Tensor]:
        """`statistics`, (..., 2 * sum of C_i) -> two (..., C_i) of each stage."""
        counts = [count for count in self.channels for _ in '12']
        return list(features.split(counts, -1))

    def of_statistics(self, features: Tensor) -> Tensor:
        """`statistics` of maps, (N, 2 * sum of C_i) -> (N, D), in float32 at least."""
        features, full_precision = in_full_precision(features)
        with full_precision:
            features = self._normalized(features)
            hidden = F.linear(features, *_like(features, self.hidden)).relu()
            return F.linear(hidden, *_like(features, self.last))

    def _normalized(self, features: Tensor) -> Tensor:
        # One image has no variance: it is seen as outside of training.
        if self.training and self.norm.training and len(features) > 1:
            normalized: Tensor = self.norm(features)
            return normalized
        mean: Any = self.norm.running_mean
        variance: Any = self.norm.running_var
        mean, variance = mean.to(features), variance.to(features)
        return (features - mean) * (variance + self.norm.eps).rsqrt()


def _like(features: Tensor, layer: nn.Linear) -> tuple[Tensor, Tensor]:
    return layer.weight.to(features), layer.bias.to(features)


def told_stages(backbone: Any) -> Sequence[dict[str, Any]]:
    """What a timm network tells of each stage: `module`, `num_chs`, `reduction`.

    Empty if it is another network, or tells nothing.
    """
    return getattr(backbone, 'feature_info', None) or ()


def stages_at(
    backbone: Any, strides: Sequence[int], needed_by: str, encoder: str
) -> dict[int, dict[str, Any]]:
    """Stride in pixels -> what a timm network tells of its stage with such cells.

    Raises:
        ValueError: if it doesn't tell its stages, or lacks one of the strides; the
            message says that `needed_by` needs them and `encoder` has none.
    """
    stages = {stage['reduction']: stage for stage in told_stages(backbone)}
    if missing := [stride for stride in strides if stride not in stages]:
        raise ValueError(
            f'{needed_by} needs stages of the strides {list(strides)}, '
            f'but {encoder} has none of {missing}.'
        )
    return {stride: stages[stride] for stride in strides}


def stage_channels(backbone: Any, encoder: str) -> list[int]:
    """Channels of the last `STAGES` stages of a timm network.

    Raises:
        ValueError: if it doesn't tell its stages.
    """
    info = told_stages(backbone)
    if not info or not hasattr(backbone, 'forward_intermediates'):
        raise ValueError(
            f'`stage_readout` needs an encoder that tells its stages (timm: '
            f'`feature_info`), but {encoder} does not.'
        )
    return [stage['num_chs'] for stage in info][-STAGES:]
