"""The loss of the pretraining: the order within the batch, with margins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyiqa_clipkd.attributes.names import ATTRIBUTES


class AttributeTerms(NamedTuple):
    """Scalars: `total` = `ranking` + calibration weight * `calibration`."""

    total: Tensor
    ranking: Tensor
    calibration: Tensor


def attribute_rank_loss(
    predictions: Tensor,
    labels: Tensor,
    *,
    weights: Tensor | None = None,
    margin: float = 0.5,
    largest_margin: float = 0.2,
    threshold: float = 0.05,
) -> Tensor:
    r"""Hinge on all pairs of the batch whose labels differ enough.

    .. math:: L = \frac{\sum_a w_a \sum_{(i, j) \in P_a}
              [\min(k (y_{ia} - y_{ja}), m) - (p_{ia} - p_{ja})]_+}
              {\sum_a w_a |P_a|}, \quad
              P_a = \{(i, j): y_{ia} - y_{ja} > t\}

    Args:
        predictions: p, (N, A), usually in [0, 1].
        labels: y, (N, A), higher is better as of the predictions.
        weights: w, (A,), >= 0; `None` for equal ones.
        margin: k in [0, 1], the share of the labels' difference that the predictions
            must have.
        largest_margin: m, from which on a larger difference asks for no more.
        threshold: t, in units of the labels.

    Returns:
        A scalar >= 0. Without any pair it is 0, with a gradient of 0.

    Raises:
        ValueError: if the shapes differ.
    """
    if predictions.shape != labels.shape or predictions.dim() != 2:
        raise ValueError(
            '`predictions` and `labels` must have the same shape (N, A), but got '
            f'{tuple(predictions.shape)} and {tuple(labels.shape)}.'
        )
    wanted = labels[:, None] - labels[None, :]  # (N, N, A), each pair both ways round
    found = predictions[:, None] - predictions[None, :]
    pairs = (wanted > threshold).to(predictions)
    if weights is not None:
        pairs = pairs * weights.to(predictions)
    lacking = ((margin * wanted).clamp(max=largest_margin) - found).relu()
    total = pairs.sum()
    return (pairs * lacking).sum() / torch.where(total > 0, total, 1)


class AttributeRankLoss(nn.Module):
    """`attribute_rank_loss`, and a little calibration to the labels' own values.

    What makes it robust to noisy labels, as those of a large model are:

    - pairs whose labels are within `threshold` of each other say nothing: there the
      noise decides which is better;
    - the hinge is linear, so that a pair in the wrong order pulls with a bounded force,
      whatever its labels say, and a pair in the right order doesn't pull at all;
    - the margin grows with the labels' difference, but only up to `largest_margin`;
    - absolute values count through the absolute, not the squared, difference.

    As margins are never larger than the labels' difference, predictions that equal
    their labels cost nothing: order and calibration don't contradict each other. Those
    in the right order but far too close together do cost something, so values can't
    shrink to a point.

    How it follows or departs from its source, ATTIQA (Kwon et al., arXiv 2406.01020):
    it follows its abstract, which is all that was at hand, in pretraining on a large
    model's pseudo-labels for five quality attributes. The abstract says nothing of the
    loss. So all of this one is our own and may depart from the paper's: the order
    within the batch, margins, threshold, the mean over pairs, the calibration. With
    `calibration=0` it is a loss of order alone; the values of the heads then mean
    nothing beyond their order.

    Args:
        margin: k in [0, 1].
        largest_margin: m in [0, 1].
        threshold: t in [0, 1), in units of the labels.
        calibration: weight of the mean absolute difference to the labels; 0 for none.
        weights: attribute -> its weight >= 0; 1 for those that aren't named, 0 leaves
            an attribute out.

    Raises:
        ValueError: if an argument isn't allowed.
    """

    weights: Tensor

    def __init__(
        self,
        margin: float = 0.5,
        largest_margin: float = 0.2,
        threshold: float = 0.05,
        calibration: float = 0.1,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        for name, value in (('margin', margin), ('largest_margin', largest_margin)):
            if not 0 <= value <= 1:
                raise ValueError(f'`{name}` must be in [0, 1], but got {value}.')
        if not 0 <= threshold < 1:
            raise ValueError(f'`threshold` must be in [0, 1), but got {threshold}.')
        if not calibration >= 0:
            raise ValueError(f'`calibration` must be >= 0, but got {calibration}.')
        self.margin = margin
        self.largest_margin = largest_margin
        self.threshold = threshold
        self.calibration = calibration
        values = torch.tensor(_checked_weights(weights or {}))
        self.register_buffer('weights', values, persistent=False)

    def forward(self, predictions: Tensor, labels: Tensor) -> AttributeTerms:
        """The named terms of predictions and labels (N, 5), both in [0, 1].

        Raises:
            ValueError: if the shapes aren't those.
        """
        ranking = attribute_rank_loss(
            predictions,
            labels,
            weights=self.weights,
            margin=self.margin,
            largest_margin=self.largest_margin,
            threshold=self.threshold,
        )
        off = (predictions - labels).abs().mean(dim=0)
        calibration = (self.weights * off).sum() / self.weights.sum()
        total = ranking + self.calibration * calibration
        return AttributeTerms(total, ranking, calibration)

    def extra_repr(self) -> str:
        margin = f'min({self.margin:g} d, {self.largest_margin:g})'
        return (
            f'mean over pairs with d = y_i - y_j > {self.threshold:g} of '
            f'[{margin} - (p_i - p_j)]_+, + {self.calibration:g} * mean |p - y|'
        )


def _checked_weights(weights: Mapping[str, float]) -> list[float]:
    if unknown := [name for name in weights if name not in ATTRIBUTES]:
        raise ValueError(
            f'`weights` must name some of {", ".join(ATTRIBUTES)}, but got '
            f'{unknown[0]!r}.'
        )
    values = [float(weights.get(name, 1)) for name in ATTRIBUTES]
    if not (min(values) >= 0 and sum(values) > 0):
        raise ValueError(
            f'`weights` must be >= 0 and not all 0, but got {dict(weights)}.'
        )
    return values
