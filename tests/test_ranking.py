"""Degradation ranking: what it draws, and which scores it is content with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training_data import checkpoint, run, student_options

from pyiqa_clipkd.ranking import BatchWithCopies, DegradationRankingLoss


@pytest.fixture
def batch(photo: Tensor) -> Tensor:
    crop = photo[..., :96, :128]
    return torch.cat([crop, crop.flip(-2), crop * 0.8, crop**2])


def test_copies_are_moved_damaged_and_damaged_more(batch: Tensor) -> None:
    views = DegradationRankingLoss(share=0.5).views(batch, seed=1)
    assert views.images.shape == (6, 3, 96, 128)
    assert views.levels.shape == (2, 2)
    assert (views.levels[:, 0] < views.levels[:, 1]).all()
    assert views.images.min() >= 0
    assert views.images.max() <= 1
    _, mild, severe = views.images.chunk(3)
    for part in (mild, severe):
        assert ((part - batch[:2]).abs().amax(dim=(1, 2, 3)) > 0).all()


def test_a_moved_copy_has_the_pixels_of_its_photograph(batch: Tensor) -> None:
    loss = DegradationRankingLoss(share=1, shift=3)
    moved = loss.views(batch, seed=0).images[: len(batch)]
    for copy, one in zip(moved, batch, strict=True):
        inside = copy[:, 3:-3, 3:-3]
        windows = (
            source[:, y : y + 90, x : x + 122]
            for source in (one, one.flip(-1))
            for y in range(7)
            for x in range(7)
        )
        assert any(torch.equal(inside, window) for window in windows)


def test_a_zoomed_copy_is_larger_or_smaller_around_its_centre() -> None:
    square = torch.zeros(1, 3, 64, 96)
    square[..., 16:48, 24:72] = 1
    loss = DegradationRankingLoss(share=1, shift=0, zoom=0.25)
    areas = []
    for seed in range(12):
        moved = loss.views(square, seed).images[0]
        assert moved.shape == square.shape[1:]
        areas.append(float(moved.mean() / square.mean()))
        rows, columns = (moved[0] > 0.5).nonzero().unbind(1)
        for side, length in ((rows, 64), (columns, 96)):  # the centre stays
            assert abs(int(side.min() + side.max()) - (length - 1)) <= 1
    assert 0.75**2 <= min(areas) < 0.85
    assert 1.15 < max(areas) <= 1.25**2


def test_the_same_seed_draws_the_same_and_another_another(batch: Tensor) -> None:
    loss = DegradationRankingLoss()
    first, again, other = (loss.views(batch, seed) for seed in (5, 5, 6))
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, other.images)


def test_the_right_order_with_its_margin_costs_nothing() -> None:
    loss = DegradationRankingLoss(margin=0.1)
    levels = torch.tensor([[1.0, 3.0], [2.0, 2.5]])
    score = torch.tensor([[4.0], [3.0], [2.0]])
    copies = torch.tensor([[4.0], [3.0], [3.9], [2.8], [3.7], [2.75]])
    assert loss(score, copies, levels).item() == pytest.approx(0, abs=1e-6)


def test_each_wrong_step_costs_what_it_lacks() -> None:
    loss = DegradationRankingLoss(weight=2, margin=0.1, stability=0.5)
    levels = torch.tensor([[1.0, 3.0]])
    score, moved, mild, severe = 3.0, 3.2, 3.1, 3.0
    got = loss(
        torch.tensor([[score]]), torch.tensor([[moved], [mild], [severe]]), levels
    )
    wanted = (0.1 + mild - score) + (0.2 + severe - mild) + 0.5 * abs(moved - score)
    assert got.item() == pytest.approx(2 * wanted, abs=1e-6)


def test_gradients_lift_the_photograph_and_lower_its_copies() -> None:
    score = torch.full((1, 1), 3.0, requires_grad=True)
    copies = torch.full((3, 1), 3.0, requires_grad=True)
    loss = DegradationRankingLoss(stability=0)
    loss(score, copies, torch.tensor([[1.0, 2.0]])).backward()
    assert score.grad is not None
    assert copies.grad is not None
    assert score.grad.item() < 0
    assert copies.grad[2].item() > 0


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'share': 0}, r'`share` must be in \(0, 1\], but got 0'),
        ({'share': 1.5}, r'`share` must be in \(0, 1\], but got 1.5'),
        ({'margin': -1}, '`margin` must be >= 0, but got -1'),
        ({'stability': -0.1}, '`stability` must be >= 0'),
        ({'weight': -2}, '`weight` must be >= 0'),
        ({'shift': -2}, '`shift` must be >= 0'),
        ({'zoom': 1.5}, '`zoom` must be < 1, but got 1.5'),
    ],
)
def test_mistakes_are_named(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DegradationRankingLoss(**options)  # type: ignore[arg-type]


def test_a_batch_is_collated_with_the_copies_that_its_first_seed_draws(
    batch: Tensor,
) -> None:
    loss = DegradationRankingLoss(share=0.5)
    items = [{'img': one, 'seed': 7 + n} for n, one in enumerate(batch)]
    collated = BatchWithCopies(loss)(items)
    images, levels = loss.views(batch, 7)
    assert torch.equal(collated['img'], batch)
    assert torch.equal(collated['copies'], images)
    assert torch.equal(collated['levels'], levels)


# --- in the host's loop ---------------------------------------------------------------


def test_a_training_with_ranking_repeats_itself_and_logs_the_term(
    data: Path, steps: list[dict[str, Any]]
) -> None:
    ranking = {'type': 'DegradationRankingLoss', 'share': 0.5}
    tensors = []
    for name in ('one', 'two'):
        run(student_options(data, ranking_loss_opt=ranking) | {'name': name})
        tensors.append(checkpoint(name))
    first = steps[0]
    total = first['soft_weight'] * first['l_soft'] + first['l_ranking']
    assert first['l_total'] == pytest.approx(total, abs=1e-4)
    assert all(torch.equal(tensors[1][key], value) for key, value in tensors[0].items())


def test_processes_of_the_loader_draw_the_copies_that_one_process_draws(
    data: Path,
) -> None:
    ranking = {'type': 'DegradationRankingLoss', 'share': 0.5}
    tensors = []
    for workers in (0, 2):
        options = student_options(data, ranking_loss_opt=ranking)
        for one in options['datasets'].values():
            one |= {'num_worker_per_gpu': workers, 'persistent_workers': True}
        run(options | {'name': f'with_{workers}'})
        tensors.append(checkpoint(f'with_{workers}'))
    assert all(torch.equal(tensors[1][key], value) for key, value in tensors[0].items())
