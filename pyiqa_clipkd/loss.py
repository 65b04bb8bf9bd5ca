"""The distillation loss: soft and hard labels, and the weight between them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SCHEDULES = ('cosine', 'linear', 'fixed')


class DistillationTerms(NamedTuple):
    """Scalars: `total` = `soft_weight` * `soft` + (1 - `soft_weight`) * `hard`."""

    total: Tensor
    soft: Tensor
    hard: Tensor
    soft_weight: float


def soft_weight_at(
    progress: float, schedule: str = 'cosine', soft_weight: float = 0.5
) -> float:
    """lambda at `progress` = t / T in [0, 1] (equation 10 for `cosine`).

    Args:
        progress: 0 at the first iteration, 1 at the last.
        schedule: `cosine` and `linear` fall from 1 to 0; `fixed` stays at
            `soft_weight`.
        soft_weight: the fixed lambda in [0, 1].

    Raises:
        ValueError: if `progress` isn't in [0, 1], or there is no such schedule.
    """
    if schedule not in SCHEDULES:
        raise ValueError(
            f'`schedule` must be one of {SCHEDULES}, but got {schedule!r}.'
        )
    if not 0 <= progress <= 1:
        raise ValueError(f'`progress` must be in [0, 1], but got {progress}.')
    if schedule == 'cosine':
        return (1 + math.cos(math.pi * progress)) / 2
    if schedule == 'linear':
        return 1 - progress
    return float(soft_weight)


def cosine_soft_hard_loss(
    embedding: Tensor,
    teacher_embedding: Tensor | None,
    score: Tensor,
    mos: Tensor,
    *,
    soft_weight: float,
) -> DistillationTerms:
    r"""Equations 6-9 of the paper.

    .. math:: L = \lambda (1 - \overline{\cos(u, v)})
                + (1 - \lambda) \overline{(\hat s - s)^2}

    Args:
        embedding: u, the student's, (N, D).
        teacher_embedding: v, the teacher's, (N, D); no gradient reaches it. May be
            `None` if `soft_weight` is 0; the soft term then is 0.
        score: the student's scores, (N, 1).
        mos: human scores on the same scale, (N, 1).
        soft_weight: lambda in [0, 1].

    Raises:
        ValueError: if `soft_weight` is outside [0, 1] or shapes differ.
    """
    if not 0 <= soft_weight <= 1:
        raise ValueError(f'`soft_weight` must be in [0, 1], but got {soft_weight}.')
    if score.shape != mos.shape:
        raise ValueError(
            f'`score` and `mos` must have the same shape, but got {tuple(score.shape)} '
            f'and {tuple(mos.shape)}.'
        )
    hard = F.mse_loss(score, mos)
    if teacher_embedding is None:
        if soft_weight:
            raise ValueError(
                f'`teacher_embedding` is needed where `soft_weight` is {soft_weight}.'
            )
        soft = torch.zeros_like(hard)
    elif embedding.shape != teacher_embedding.shape:
        raise ValueError(
            '`embedding` and `teacher_embedding` must have the same shape, but got '
            f'{tuple(embedding.shape)} and {tuple(teacher_embedding.shape)}: set the '
            "student's `embed_dim` to the teacher's."
        )
    else:
        cosine = F.cosine_similarity(embedding, teacher_embedding.detach(), dim=-1)
        soft = 1 - cosine.mean()
    total = soft_weight * soft + (1 - soft_weight) * hard
    return DistillationTerms(total, soft, hard, soft_weight)


class CosineSoftHardLoss(nn.Module):
    """`cosine_soft_hard_loss` with a schedule for lambda.

    Args:
        schedule: `cosine` (the paper's), `linear` or `fixed`.
        soft_weight: lambda of the fixed schedule: 1 is soft labels only, 0 hard only.

    Raises:
        ValueError: if an argument isn't allowed.
    """

    def __init__(self, schedule: str = 'cosine', soft_weight: float = 0.5) -> None:
        super().__init__()
        if schedule not in SCHEDULES:
            raise ValueError(
                f'`schedule` must be one of {SCHEDULES}, but got {schedule!r}.'
            )
        if not 0 <= soft_weight <= 1:
            raise ValueError(f'`soft_weight` must be in [0, 1], but got {soft_weight}.')
        self.schedule = schedule
        self.soft_weight = soft_weight

    def soft_weight_at(self, progress: float) -> float:
        """lambda at `progress` = t / T in [0, 1]."""
        return soft_weight_at(progress, self.schedule, self.soft_weight)

    def forward(
        self,
        embedding: Tensor,
        teacher_embedding: Tensor | None,
        score: Tensor,
        mos: Tensor,
        progress: float = 0.0,
    ) -> DistillationTerms:
        """The named terms at `progress` = t / T; shapes as in the function."""
        return cosine_soft_hard_loss(
            embedding,
            teacher_embedding,
            score,
            mos,
            soft_weight=self.soft_weight_at(progress),
        )

    def extra_repr(self) -> str:
        weight = {
            'cosine': '(1 + cos(pi t/T))/2',
            'linear': '1 - t/T',
            'fixed': f'{self.soft_weight:g}',
        }[self.schedule]
        loss = 'lambda * (1 - cos(u, v)) + (1 - lambda) * MSE(s_hat, s)'
        return f'{loss}, lambda = {weight}'
