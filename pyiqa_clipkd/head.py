"""Quality heads: from an embedding to a score in [1, 5]."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyiqa_clipkd.names import HIGHEST, LOWEST


class QualityOutput(NamedTuple):
    """What the network knows about a batch of N images.

    Attributes:
        score: (N, 1) in [1, 5], higher is better.
        embedding: (N, D), not normalized, in float32 at least.
        probabilities: (N, L) of the quality levels, worst level first, each row sums
            to 1; `None` for a regression head.
    """

    score: Tensor
    embedding: Tensor
    probabilities: Tensor | None


def arc_anchors(levels: int, embed_dim: int, seed: int = 0) -> Tensor:
    """Anchors in the order of their levels on an arc of 120 degrees.

    The start of learned anchors where no text encoder is at hand: neighbours are
    closer to each other than the two ends, as text features of graded words are.

    Returns:
        (levels, embed_dim), unit length.
    """
    generator = torch.Generator().manual_seed(seed)
    # Where a network is built without numbers (`check_fits`), these are there, too.
    random = torch.randn(embed_dim, 2, generator=generator, device='cpu')
    plane, _ = torch.linalg.qr(random)
    angles = torch.linspace(-math.pi / 3, math.pi / 3, levels, device='cpu')
    return torch.stack([angles.sin(), angles.cos()], dim=1) @ plane.T


def in_full_precision(embedding: Tensor) -> tuple[Tensor, AbstractContextManager[Any]]:
    """The embedding in float32 at least, and a context that keeps it so.

    A cosine divided by a temperature of 0.01 is no score any more in half precision,
    neither in training nor under the `torch.autocast` of a caller.
    """
    if embedding.dtype in (torch.float16, torch.bfloat16):
        embedding = embedding.float()
    kind = embedding.device.type
    # Asked of other devices only: torch before 2.7 can't export the question.
    if kind not in ('cpu', 'cuda') and not torch.amp.is_autocast_available(kind):
        return embedding, nullcontext()
    return embedding, torch.autocast(kind, enabled=False)


class LikertHead(nn.Module):
    r"""Cosine to one anchor a level, softmax, expected level (equations 2-4).

    .. math:: s_i = \cos(v, a_i), \quad p = \mathrm{softmax}(s / \tau), \quad
              \hat s = \sum_i p_i w_i

    Args:
        anchors: (L, D), one a level, worst level first.
        temperature: tau > 0.
        learn_anchors: make the anchors parameters. Otherwise they are buffers, so that
            no optimizer can move them. The temperature always is a buffer.
    """

    anchors: Tensor
    temperature: Tensor
    level_scores: Tensor

    def __init__(
        self, anchors: Tensor, temperature: float, *, learn_anchors: bool = False
    ) -> None:
        super().__init__()
        if anchors.dim() != 2 or len(anchors) < 2:
            raise ValueError(
                '`anchors` must have the shape (L >= 2, D), but got '
                f'{tuple(anchors.shape)}.'
            )
        if not temperature > 0:
            raise ValueError(f'`temperature` must be > 0, but got {temperature}.')
        anchors = anchors.detach().clone().float()
        if learn_anchors:
            self.anchors = nn.Parameter(anchors)
        else:
            self.register_buffer('anchors', anchors)
        self.register_buffer('temperature', torch.tensor(float(temperature)))
        self.register_buffer(
            'level_scores',
            torch.linspace(LOWEST, HIGHEST, len(anchors)),
            persistent=False,
        )

    def forward(self, embedding: Tensor) -> QualityOutput:
        """(N, D) -> score (N, 1), embedding (N, D), probabilities (N, L).

        In float32 at least, also under autocast.
        """
        embedding, full_precision = in_full_precision(embedding)
        with full_precision:
            anchors = F.normalize(self.anchors.to(embedding.dtype), dim=-1)
            similarity = F.normalize(embedding, dim=-1) @ anchors.T
            probabilities = (similarity / self.temperature).softmax(dim=-1)
            score = (probabilities * self.level_scores).sum(dim=-1, keepdim=True)
        return QualityOutput(score, embedding, probabilities)

    def extra_repr(self) -> str:
        levels, embed_dim = self.anchors.shape
        kind = 'learned' if isinstance(self.anchors, nn.Parameter) else 'frozen'
        return f'levels={levels}, embed_dim={embed_dim}, anchors={kind}'


class RegressionHead(nn.Module):
    """One linear layer on the encoder's features: the paper's ablation (1).

    A sigmoid keeps the score in [1, 5].
    """

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(embed_dim, 1)

    def forward(self, embedding: Tensor) -> QualityOutput:
        """(N, D) -> score (N, 1), embedding (N, D), no probabilities.

        In float32 at least, also under autocast.
        """
        embedding, full_precision = in_full_precision(embedding)
        with full_precision:
            weight = self.linear.weight.to(embedding.dtype)
            bias = self.linear.bias.to(embedding.dtype)
            score = F.linear(embedding, weight, bias).sigmoid()
            score = LOWEST + (HIGHEST - LOWEST) * score
        return QualityOutput(score, embedding, None)
