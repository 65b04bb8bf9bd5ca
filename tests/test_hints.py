"""Feature hints: which maps are compared, what they cost, and in the host's loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training_data import checkpoint, run, student_options

from pyiqa_clipkd.encoders import PRESETS
from pyiqa_clipkd.hints import STRIDES, FeatureHintLoss, StageOutputs
from pyiqa_clipkd.network import CLIPKDStudent


@pytest.mark.parametrize('encoder', PRESETS)
def test_every_preset_shows_a_map_at_each_stride(encoder: str) -> None:
    student = CLIPKDStudent(encoder, embed_dim=8, input_size=128).eval()
    stages = StageOutputs(student)
    with torch.no_grad():
        student(torch.rand(2, 3, 128, 128))
    assert list(stages.maps) == list(STRIDES)
    for stride, maps in stages.maps.items():
        side = 128 // stride
        assert maps.shape == (2, stages.channels[stride], side, side)


def test_maps_as_high_as_they_have_channels_keep_their_axes() -> None:
    student = CLIPKDStudent('swin', embed_dim=8, input_size=384).eval()
    stages = StageOutputs(student)
    upper = torch.rand(1, 3, 384, 384)
    upper[:, :, 192:] = 0.5  # flat below, so that the rows differ and the channels not
    with torch.no_grad():
        student(upper)
    maps = stages.maps[4][0]
    assert maps.shape == (96, 96, 96)
    above, below = maps[:, 8:40], maps[:, 56:88]
    assert below.std(dim=(1, 2)).mean() < 0.7 * above.std(dim=(1, 2)).mean()


def test_an_encoder_without_stages_is_an_error_that_names_it() -> None:
    student = CLIPKDStudent('timm:test_vit', embed_dim=8, input_size=160)
    with pytest.raises(ValueError, match=r'strides \[4, 8, 16, 32\], but timm:test_vi'):
        StageOutputs(student)


def test_a_student_with_the_teacher_s_maps_can_reach_zero() -> None:
    maps = {4: torch.rand(4, 6, 8, 8), 8: torch.rand(4, 3, 4, 4)}
    loss = FeatureHintLoss({4: 6, 8: 3}, {4: 6, 8: 3})
    with torch.no_grad():
        for stride, adapter in loss.adapters.items():
            std, mean = torch.std_mean(maps[int(stride)], dim=(0, 2, 3))
            adapter.get_parameter('weight').copy_(torch.diag(1 / std)[..., None, None])
            adapter.get_parameter('bias').copy_(-mean / std)
    assert loss(maps, maps).item() == pytest.approx(0, abs=1e-9)


def test_an_answer_that_is_always_the_same_costs_one() -> None:
    teacher = {4: 50 + 7 * torch.randn(8, 5, 8, 8)}
    loss = FeatureHintLoss({4: 2}, {4: 5})
    with torch.no_grad():
        loss.adapters['4'].get_parameter('bias').zero_()
    got = loss({4: torch.zeros(8, 2, 8, 8)}, teacher).item()
    assert got == pytest.approx(1, abs=0.01)


def test_maps_of_other_sizes_are_compared_at_the_smaller_one() -> None:
    loss = FeatureHintLoss({4: 2}, {4: 2})
    small, large = torch.rand(1, 2, 5, 6), torch.rand(1, 2, 7, 9)
    assert loss({4: small}, {4: large}).isfinite()
    assert loss({4: large}, {4: small}).isfinite()


# --- in the host's loop ---------------------------------------------------------------


def test_hints_bring_the_student_s_maps_nearer_and_leave_no_trace(
    data: Path, steps: list[dict[str, Any]]
) -> None:
    run(student_options(data) | {'name': 'without'})
    steps.clear()
    run(student_options(data, feature_hints=1, total_epoch=8) | {'name': 'with'})
    hints = [step['l_hints'] for step in steps if 'l_hints' in step]
    assert len(hints) == len(steps) - 1, 'none where lambda has reached 0'
    assert sum(hints[-5:]) < 0.9 * sum(hints[:5])
    first = steps[0]
    total = first['soft_weight'] * (first['l_soft'] + first['l_hints'])
    assert first['l_total'] == pytest.approx(total, abs=1e-4)
    assert checkpoint('with').keys() == checkpoint('without').keys()


def test_a_stopped_training_with_hints_goes_on_as_if_it_hadn_t(data: Path) -> None:
    options = student_options(data, feature_hints=1)
    run(options)
    expected = checkpoint('student')
    for file in Path('experiments/student/training_states').glob('*.state'):
        if file.stem != '7':
            file.unlink()
    Path('experiments/student/models/net_latest.pth').unlink()
    run(options, '--auto_resume')
    again = checkpoint('student')
    assert all(torch.equal(again[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'feature_hints': -1}, r'`train: feature_hints` must be a number >= 0, .*-1'),
        ({'feature_hints': 'yes'}, r"must be a number >= 0, but got 'yes'"),
        ({'feature_hints': 1, 'accumulate': 2}, r'hints` and `train: accumulate` ex'),
    ],
)
def test_mistakes_are_named(data: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(student_options(data, **changes))


def test_hints_need_a_teacher_and_no_cache(data: Path) -> None:
    options = student_options(data, feature_hints=1, mos_loss_opt={'type': 'MSELoss'})
    options['teacher'] = None
    with pytest.raises(ValueError, match=r'feature_hints` needs a `teacher`'):
        run(options)
    options = student_options(data, feature_hints=1)
    options['teacher']['cache'] = 'cache'
    options['datasets']['train']['views'] = 2
    with pytest.raises(ValueError, match=r'`teacher: cache` exclude each other'):
        run(options)
