from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyiqa_clipkd.loss import (
    CosineSoftHardLoss,
    cosine_soft_hard_loss,
    soft_weight_at,
)

fraction = st.floats(0, 1)


def _reference_loss(
    u: Tensor, v: Tensor, s_hat: Tensor, s: Tensor, t: float
) -> tuple[float, float, float]:
    """Equations 6, 7, 9 and 10 of the paper, number by number; t stands for t/T."""
    n = len(u)
    cosines = []
    for i in range(n):
        product = sum(float(a * b) for a, b in zip(u[i], v[i], strict=True))
        lengths = math.hypot(*u[i].tolist()) * math.hypot(*v[i].tolist())
        cosines.append(product / lengths)
    soft = 1 - sum(cosines) / n
    hard = sum((float(s_hat[i]) - float(s[i])) ** 2 for i in range(n)) / n
    weight = 0.5 * (1 + math.cos(t * math.pi))
    return weight * soft + (1 - weight) * hard, soft, hard


def _batch(n: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    u, v = torch.randn(2, n, 6, generator=generator, dtype=torch.float64)
    scores, mos = 1 + 4 * torch.rand(2, n, 1, generator=generator, dtype=torch.float64)
    return u, v, scores, mos


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 6), seed=st.integers(0, 2**31), progress=fraction)
def test_it_is_the_formula_of_the_paper(n: int, seed: int, progress: float) -> None:
    batch = _batch(n, seed)
    total, soft, hard = _reference_loss(*batch, progress)
    terms = CosineSoftHardLoss()(*batch, progress)
    assert terms.total.item() == pytest.approx(total, abs=1e-9)
    assert terms.soft.item() == pytest.approx(soft, abs=1e-9)
    assert terms.hard.item() == pytest.approx(hard, abs=1e-9)


def test_it_agrees_with_values_worked_by_hand() -> None:
    # Cosines 1, 0 and -1 have the mean 0; squared errors 1, 0 and 4 have the mean 5/3.
    u = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    v = torch.tensor([[1.0, 0.0], [5.0, 0.0], [-3.0, -3.0]])
    scores = torch.tensor([[2.0], [3.0], [5.0]])
    mos = torch.tensor([[1.0], [3.0], [3.0]])
    terms = cosine_soft_hard_loss(u, v, scores, mos, soft_weight=0.25)
    assert terms.soft.item() == pytest.approx(1)
    assert terms.hard.item() == pytest.approx(5 / 3)
    assert terms.total.item() == pytest.approx(0.25 * 1 + 0.75 * 5 / 3)
    assert terms.soft_weight == 0.25


def test_equal_embeddings_have_no_soft_loss() -> None:
    u, _, scores, mos = _batch()
    terms = cosine_soft_hard_loss(u, u.clone(), scores, mos, soft_weight=1)
    assert terms.soft.item() == pytest.approx(0, abs=1e-12)
    assert terms.total.item() == pytest.approx(0, abs=1e-12)


def test_opposite_embeddings_have_a_soft_loss_of_two() -> None:
    u, _, scores, mos = _batch()
    terms = cosine_soft_hard_loss(u, -u, scores, mos, soft_weight=0.5)
    assert terms.soft.item() == pytest.approx(2)


def test_right_scores_have_no_hard_loss() -> None:
    u, v, scores, _ = _batch()
    terms = cosine_soft_hard_loss(u, v, scores, scores.clone(), soft_weight=0)
    assert terms.hard.item() == 0
    assert terms.total.item() == 0


@settings(max_examples=30, deadline=None)
@given(first=st.floats(1e-3, 1e3), second=st.floats(1e-3, 1e3))
def test_the_length_of_the_embeddings_does_not_matter(
    first: float, second: float
) -> None:
    u, v, scores, mos = _batch()
    expected = cosine_soft_hard_loss(u, v, scores, mos, soft_weight=0.5)
    scaled = cosine_soft_hard_loss(first * u, second * v, scores, mos, soft_weight=0.5)
    torch.testing.assert_close(scaled.total, expected.total)


def test_gradients_flow_only_into_the_student() -> None:
    u, v, scores, mos = (tensor.requires_grad_() for tensor in _batch())
    cosine_soft_hard_loss(u, v, scores, mos, soft_weight=0.5).total.backward()
    assert u.grad is not None
    assert u.grad.abs().sum() > 0
    assert scores.grad is not None
    assert scores.grad.abs().sum() > 0
    assert v.grad is None


@pytest.mark.parametrize('progress', [0.0, 0.3, 1.0])
def test_its_gradient_is_the_numerical_one(progress: float) -> None:
    u, v, scores, mos = _batch()

    def total(u: Tensor, scores: Tensor) -> Tensor:
        return CosineSoftHardLoss()(u, v, scores, mos, progress).total

    assert torch.autograd.gradcheck(
        total, (u.requires_grad_(), scores.requires_grad_())
    )


def test_at_the_ends_of_the_schedule_only_one_term_has_a_gradient() -> None:
    u, v, scores, mos = _batch()
    u.requires_grad_()
    scores.requires_grad_()
    CosineSoftHardLoss()(u, v, scores, mos, 0.0).total.backward()
    assert u.grad is not None
    assert u.grad.abs().sum() > 0
    assert scores.grad is not None
    assert scores.grad.abs().sum() == 0
    u.grad = scores.grad = None
    CosineSoftHardLoss()(u, v, scores, mos, 1.0).total.backward()
    assert u.grad is None or u.grad.abs().sum() == 0
    assert scores.grad is not None
    assert scores.grad.abs().sum() > 0


def test_without_a_teacher_it_is_the_mean_squared_error() -> None:
    u, _, scores, mos = _batch()
    terms = cosine_soft_hard_loss(u, None, scores, mos, soft_weight=0)
    torch.testing.assert_close(terms.total, (scores - mos).square().mean())
    assert terms.soft.item() == 0


@pytest.mark.parametrize(
    ('schedule', 'values'),
    [
        ('cosine', [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0]),
        ('linear', [1, 0.75, 0.5, 0.25, 0]),
        ('fixed', [0.9, 0.9, 0.9, 0.9, 0.9]),
    ],
)
def test_the_schedules_take_their_known_values(
    schedule: str, values: list[float]
) -> None:
    loss = CosineSoftHardLoss(schedule, soft_weight=0.9)
    actual = [loss.soft_weight_at(progress) for progress in (0, 0.25, 0.5, 0.75, 1)]
    assert actual == pytest.approx(values)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(fraction, min_size=2, max_size=2), st.sampled_from(['cosine', 'linear'])
)
def test_falling_schedules_stay_between_zero_and_one(
    progress: list[float], schedule: str
) -> None:
    early, late = sorted(progress)
    assert 0 <= soft_weight_at(late, schedule) <= soft_weight_at(early, schedule) <= 1


@pytest.mark.parametrize('schedule', ['cosine', 'linear'])
def test_falling_schedules_end_at_exactly_zero(schedule: str) -> None:
    assert soft_weight_at(1, schedule) == 0


@pytest.mark.parametrize(
    ('arguments', 'formula'),
    [
        ({}, '(1 + cos(pi t/T))/2'),
        ({'schedule': 'linear'}, '1 - t/T'),
        ({'schedule': 'fixed', 'soft_weight': 0.25}, '0.25'),
    ],
)
def test_it_prints_itself_as_a_formula(arguments: dict[str, Any], formula: str) -> None:
    assert repr(CosineSoftHardLoss(**arguments)) == (
        'CosineSoftHardLoss(lambda * (1 - cos(u, v)) + (1 - lambda) * MSE(s_hat, s), '
        f'lambda = {formula})'
    )


@pytest.mark.parametrize('progress', [-0.01, 1.01, math.nan])
def test_progress_outside_of_zero_to_one_is_refused(progress: float) -> None:
    with pytest.raises(ValueError, match=r'`progress` must be in \[0, 1\], but got'):
        soft_weight_at(progress)


@pytest.mark.parametrize('soft_weight', [-0.1, 1.3, math.nan])
def test_a_soft_weight_outside_of_zero_to_one_is_refused(soft_weight: float) -> None:
    message = rf'`soft_weight` must be in \[0, 1\], but got {soft_weight}'
    with pytest.raises(ValueError, match=message):
        CosineSoftHardLoss('fixed', soft_weight)
    with pytest.raises(ValueError, match=message):
        cosine_soft_hard_loss(*_batch(), soft_weight=soft_weight)


def test_an_unknown_schedule_is_refused() -> None:
    message = r"`schedule` must be one of .*'linear'.*, but got 'step'"
    with pytest.raises(ValueError, match=message):
        CosineSoftHardLoss('step')
    with pytest.raises(ValueError, match=message):
        soft_weight_at(0.5, 'step')


def test_scores_and_labels_of_different_shapes_are_refused() -> None:
    u, v, scores, mos = _batch()
    with pytest.raises(ValueError, match=r'same shape, but got \(3, 1\) and \(3,\)'):
        cosine_soft_hard_loss(u, v, scores, mos[:, 0], soft_weight=0.5)


def test_embeddings_of_different_widths_are_refused_with_the_remedy() -> None:
    u, v, scores, mos = _batch()
    message = r"\(3, 6\) and \(3, 4\): set the student's `embed_dim` to the teacher's"
    with pytest.raises(ValueError, match=message):
        cosine_soft_hard_loss(u, v[:, :4], scores, mos, soft_weight=0.5)


def test_soft_labels_without_a_teacher_are_refused() -> None:
    u, _, scores, mos = _batch()
    with pytest.raises(ValueError, match='`teacher_embedding` is needed where'):
        cosine_soft_hard_loss(u, None, scores, mos, soft_weight=0.1)
