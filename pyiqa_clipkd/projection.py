"""A start for the student's projection: the linear map that fits the teacher best."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pyiqa_clipkd.network import CLIPKDStudent

ALPHAS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)


class ProjectionReport(NamedTuple):
    """How well a linear map of the features meets the teacher.

    Attributes:
        alpha: the penalty that was chosen.
        cosine: mean cosine to the teacher on the fifth that wasn't fitted, in [-1, 1],
            higher is better.
        n: number of images.
    """

    alpha: float
    cosine: float
    n: int


class RidgeProjection(NamedTuple):
    """Weight (D, F) and bias (D,) of a linear layer, in float64, and their report."""

    weight: Tensor
    bias: Tensor
    report: ProjectionReport


def ridge_projection(
    features: Tensor, embeddings: Tensor, alphas: Sequence[float] = ALPHAS
) -> RidgeProjection:
    """Ridge regression from features to embeddings of unit length, with intercept.

    It minimizes the mean squared distance plus alpha times the squared weights of the
    standardized features (mean 0, standard deviation 1, less only where it is below a
    thousandth of the largest). Alpha is the one with the
    highest mean cosine on a fifth of the rows, always the same one, that the others
    don't know; the result is then fitted on all rows.

    Args:
        features: (N, F), also with N < F.
        embeddings: (N, D), of any length but zero.
        alphas: to choose from, positive.

    Raises:
        ValueError: if the shapes don't fit, there are fewer than two rows, a number
            isn't finite, or an alpha isn't positive.
    """
    _check(features, embeddings, alphas)
    x = features.detach().cpu().double()
    y = F.normalize(embeddings.detach().cpu().double())
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    held_out, fitted = order.tensor_split([max(1, len(x) // 5)])
    cosines = {
        alpha: F.cosine_similarity(x[held_out] @ weight.T + bias, y[held_out]).mean()
        for alpha, (weight, bias) in _ridge(x[fitted], y[fitted], alphas).items()
    }
    alpha = max(cosines, key=lambda alpha: cosines[alpha].item())
    weight, bias = _ridge(x, y, [alpha])[alpha]
    report = ProjectionReport(alpha, cosines[alpha].item(), len(x))
    return RidgeProjection(weight, bias, report)


def _check(features: Tensor, embeddings: Tensor, alphas: Sequence[float]) -> None:
    shapes = f'{tuple(features.shape)} and {tuple(embeddings.shape)}'
    if features.dim() != 2 or embeddings.dim() != 2 or len(features) != len(embeddings):
        raise ValueError(
            '`features` and `embeddings` must have the shapes (N, F) and (N, D), but '
            f'got {shapes}.'
        )
    if len(features) < 2:
        raise ValueError(
            '`features` must have two rows or more, one to fit and one to hold out, '
            f'but got {len(features)}.'
        )
    for name, values in (('features', features), ('embeddings', embeddings)):
        if not values.isfinite().all():
            raise ValueError(f'`{name}` must be finite, but got NaN or infinity.')
    if not alphas or min(alphas) <= 0:
        raise ValueError(
            f'`alphas` must be one or more positive numbers, but got {alphas}.'
        )


def _ridge(
    x: Tensor, y: Tensor, alphas: Sequence[float]
) -> dict[float, tuple[Tensor, Tensor]]:
    """alpha -> weight (D, F) and bias (D,), all from one eigendecomposition."""
    mean, std = x.mean(0), x.std(0, correction=0)
    # A feature that is all but constant says little, and must not be blown up.
    scale = 1 / std.clamp(min=max(1e-3 * std.max().item(), 1e-12))
    x, center = (x - mean) * scale, y.mean(0)
    y = y - center
    rows, columns = x.shape
    wide = rows < columns
    gram = (x @ x.T if wide else x.T @ x) / rows
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp(min=0)
    # (X'X + aI)^-1 X' = X' (XX' + aI)^-1: the smaller of the two is solved.
    target = vectors.T @ (y if wide else x.T @ y) / rows
    fits = {}
    for alpha in alphas:
        solution = vectors @ (target / (values + alpha)[:, None])
        weight = ((x.T @ solution if wide else solution) * scale[:, None]).T
        fits[alpha] = weight, center - weight @ mean
    return fits


@torch.no_grad()
def start_projection(
    student: CLIPKDStudent, batches: Iterable[tuple[Tensor, Tensor]]
) -> ProjectionReport:
    """Put the map that fits the teacher best into the student's projection.

    Only the values of its weight and bias change; the backbone stays as it is. Features
    are those that training begins with: batch norm takes the statistics of each batch
    (before any training those that it has stored mean nothing), nothing is dropped.

    Args:
        student: with a projection, so not with `head: regression`.
        batches: images (N, 3 or 1, H, W) in [0, 1] and the teacher's embeddings (N, D)
            of them.

    Raises:
        ValueError: if the student has no projection, or a readout that has learned,
            there are fewer than two images, or the embeddings are of another width.
    """
    projection = student.encoder.projection
    if not isinstance(projection, nn.Linear):
        raise ValueError(
            'The student must have a projection (`head: likert`), but this one has '
            f'`head: {student.config["head"]}`.'
        )
    readout: Any = student.encoder.readout
    if readout is not None and readout.last.weight.any():
        raise ValueError(
            '`train: projection_start: ridge` would fit the projection alone, but this '
            'student begins with a readout of its stages that has learned already.'
        )
    features: list[Tensor] = []
    embeddings: list[Tensor] = []
    training = [module for module in student.modules() if module.training]
    norms = [m for m in student.modules() if isinstance(m, _BatchNorm)]
    statistics = [(b, b.clone()) for norm in norms for b in norm.buffers()]
    hook = projection.register_forward_pre_hook(
        lambda _, args: features.append(args[0].float().cpu())
    )
    try:
        student.eval()
        for norm in norms:
            norm.train()
        for img, embedding in batches:
            if embedding.shape != (len(img), projection.out_features):
                raise ValueError(
                    f"The teacher's embeddings must have the shape ({len(img)}, "
                    f'{projection.out_features}), but got {tuple(embedding.shape)}.'
                )
            student.embed(img.to(projection.weight.device))
            embeddings.append(embedding.float().cpu())
    finally:
        hook.remove()
        student.eval()
        for module in training:
            module.training = True
        for buffer, before in statistics:
            buffer.copy_(before)
    if not features:
        raise ValueError('`batches` must have two images or more, but got none.')
    weight, bias, report = ridge_projection(torch.cat(features), torch.cat(embeddings))
    # As large as the default start: a cosine doesn't see it, but the first steps of an
    # optimizer would be larger than these weights, which meet unit vectors.
    scale = projection.weight.norm() / weight.norm().clamp(min=1e-12)
    projection.weight.copy_(scale * weight)
    projection.bias.copy_(scale * bias)
    return report
