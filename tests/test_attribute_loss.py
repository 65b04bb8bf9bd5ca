"""The loss on attributes: which predictions content it, and which pairs count."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pyiqa.losses import build_loss
from torch import Tensor

from pyiqa_clipkd.attributes.loss import AttributeRankLoss, attribute_rank_loss
from pyiqa_clipkd.attributes.names import ATTRIBUTES


def reference_loss(
    predictions: Tensor, labels: Tensor, weights: list[float], k: float, m: float
) -> float:
    """The equation of the docstring, pair by pair, with t = 0.05."""
    above = below = 0.0
    for a, weight in enumerate(weights):
        for i in range(len(labels)):
            for j in range(len(labels)):
                d = float(labels[i, a] - labels[j, a])
                if d > 0.05:
                    gap = float(predictions[i, a] - predictions[j, a])
                    above += weight * max(0.0, min(k * d, m) - gap)
                    below += weight
    return above / below


def one_attribute(*values: float) -> Tensor:
    """(N, 5) whose first column are the values; the others are 0."""
    return torch.tensor([[value, 0, 0, 0, 0] for value in values])


def test_it_is_the_equation_of_its_docstring() -> None:
    torch.manual_seed(0)
    predictions, labels = torch.rand(2, 7, 5)
    weights = [1.0, 0.0, 2.0, 0.5, 1.0]
    loss = attribute_rank_loss(
        predictions,
        labels,
        weights=torch.tensor(weights),
        margin=0.7,
        largest_margin=0.3,
    )
    wanted = reference_loss(predictions, labels, weights, k=0.7, m=0.3)
    assert loss.item() == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize('margin', [0, 0.5, 1])
def test_predictions_that_equal_their_labels_cost_nothing(margin: float) -> None:
    labels = torch.rand(16, 5)
    terms = AttributeRankLoss(margin=margin, largest_margin=1)(labels, labels)
    assert terms.total.item() == pytest.approx(0, abs=1e-6)


def test_the_right_order_costs_less_than_none_and_the_wrong_order_most() -> None:
    labels = one_attribute(0.1, 0.4, 0.9)
    loss = AttributeRankLoss(calibration=0)
    right, none, wrong = (
        loss(one_attribute(*values), labels).total.item()
        for values in ((0.3, 0.5, 0.8), (0.5, 0.5, 0.5), (0.8, 0.5, 0.3))
    )
    assert right == pytest.approx(0, abs=1e-6)
    assert none == pytest.approx((0.15 + 0.2 + 0.2) / 3, abs=1e-6)
    assert wrong > none


def test_the_order_counts_and_not_the_values_where_there_is_no_calibration() -> None:
    labels, predictions = torch.rand(2, 8, 5)
    loss = AttributeRankLoss(calibration=0)
    moved = loss(predictions + 0.3, labels).total
    assert moved.item() == pytest.approx(loss(predictions, labels).total.item())


def test_labels_within_the_threshold_say_nothing() -> None:
    predictions = one_attribute(0.2, 0.8).requires_grad_()
    loss = AttributeRankLoss(threshold=0.1, calibration=0)
    assert loss(predictions, one_attribute(0.55, 0.5)).total == 0
    assert loss(predictions, one_attribute(0.65, 0.5)).total > 0


@pytest.mark.parametrize('labels', [torch.full((4, 5), 0.5), torch.full((1, 5), 0.5)])
def test_a_batch_without_a_pair_is_zero_and_can_be_trained_on(labels: Tensor) -> None:
    predictions = torch.rand(labels.shape).requires_grad_()
    total = AttributeRankLoss(calibration=0)(predictions, labels).total
    total.backward()
    assert total.item() == 0
    assert predictions.grad is not None
    assert torch.equal(predictions.grad, torch.zeros_like(predictions))


def test_a_wrong_label_pulls_no_harder_than_any_other() -> None:
    predictions = torch.linspace(0.2, 0.8, 8)[:, None].repeat(1, 5)
    labels = predictions.clone()
    slightly, wildly = labels.clone(), labels.clone()
    slightly[0, 0], wildly[0, 0] = 0.9, 1.0  # the worst photograph is called the best
    pulls = []
    for noisy in (slightly, wildly):
        leaf = predictions.clone().requires_grad_()
        AttributeRankLoss(calibration=0)(leaf, noisy).total.backward()
        assert leaf.grad is not None
        pulls.append(leaf.grad[0, 0].item())
    assert pulls[0] == pytest.approx(pulls[1], abs=1e-7)
    assert pulls[0] < 0


def test_gradients_lift_the_better_and_lower_the_worse_of_one_attribute() -> None:
    predictions = torch.full((2, 5), 0.5, requires_grad=True)
    AttributeRankLoss(calibration=0)(
        predictions, one_attribute(0.9, 0.1)
    ).total.backward()
    assert predictions.grad is not None
    assert predictions.grad[0, 0] < 0 < predictions.grad[1, 0]
    assert predictions.grad[:, 1:].count_nonzero() == 0


def test_an_attribute_without_a_weight_is_left_out() -> None:
    loss = AttributeRankLoss(weights={'sharpness': 0}, calibration=1)
    predictions, labels = torch.rand(2, 6, 5)
    labels[:, 1:] = predictions[:, 1:]
    assert loss(predictions, labels).total.item() == pytest.approx(0, abs=1e-6)


def test_calibration_is_the_mean_absolute_difference() -> None:
    predictions, labels = torch.rand(2, 6, 5)
    terms = AttributeRankLoss(calibration=0.3)(predictions, labels)
    off = (predictions - labels).abs().mean()
    assert terms.calibration.item() == pytest.approx(off.item(), abs=1e-6)
    assert terms.total.item() == pytest.approx(
        terms.ranking.item() + 0.3 * off.item(), abs=1e-6
    )


def test_gradcheck() -> None:
    torch.manual_seed(1)
    predictions = torch.rand(5, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.rand(5, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda values: attribute_rank_loss(values, labels), predictions
    )


def test_minimising_it_orders_free_predictions_in_spite_of_wrong_labels() -> None:
    torch.manual_seed(0)
    truth = torch.rand(64, 5)
    labels = (truth + 0.1 * torch.randn(64, 5)).clamp(0, 1)
    logits = torch.zeros(64, 5, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.05)
    loss = AttributeRankLoss()
    for _ in range(200):
        optimizer.zero_grad()
        loss(logits.sigmoid(), labels).total.backward()
        optimizer.step()
    ranks = [values.argsort(0).argsort(0).double() for values in (logits, truth)]
    for mine, theirs in zip(*(rank.T for rank in ranks), strict=True):
        assert torch.corrcoef(torch.stack([mine, theirs]))[0, 1] > 0.85


def test_the_host_builds_it_from_options() -> None:
    loss = build_loss({'type': 'AttributeRankLoss', 'weights': {'contrast': 2}})
    assert isinstance(loss, AttributeRankLoss)
    assert loss.weights.tolist() == [1, 1, 2, 1, 1]
    assert 'min(0.5 d, 0.2)' in repr(loss)
    assert not loss.state_dict()


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'margin': 1.5}, r'`margin` must be in \[0, 1\], but got 1.5'),
        ({'largest_margin': -1}, r'`largest_margin` must be in \[0, 1\], but got -1'),
        ({'threshold': 1}, r'`threshold` must be in \[0, 1\), but got 1'),
        ({'calibration': -0.1}, '`calibration` must be >= 0, but got -0.1'),
        ({'calibration': math.nan}, '`calibration` must be >= 0, but got nan'),
        ({'weights': {'beauty': 1}}, "must name some of sharpness, .*got 'beauty'"),
        ({'weights': {'contrast': -1}}, '`weights` must be >= 0 and not all 0'),
        ({'weights': dict.fromkeys(ATTRIBUTES, 0)}, '`weights` must be >= 0 and not a'),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttributeRankLoss(**options)


def test_other_shapes_are_an_error() -> None:
    with pytest.raises(ValueError, match=r'same shape .*\(4, 5\) and \(3, 5\)'):
        attribute_rank_loss(torch.rand(4, 5), torch.rand(3, 5))
