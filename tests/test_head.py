from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pyiqa_clipkd.head import LikertHead, RegressionHead, arc_anchors
from pyiqa_clipkd.network import CLIPKDStudent

EYE = torch.eye(5)


def test_it_agrees_with_values_worked_by_hand() -> None:
    # Cosines to the axes are 0.6, 0.8, 0, 0, 0; divided by 0.2 they are 3, 4, 0, 0, 0.
    head = LikertHead(EYE, 0.2)
    output = head(torch.tensor([[3.0, 4.0, 0.0, 0.0, 0.0]]))
    powers = [math.exp(3), math.exp(4), 1, 1, 1]
    expected = [power / sum(powers) for power in powers]
    assert output.probabilities[0].tolist() == pytest.approx(expected)
    score = sum(p * level for p, level in zip(expected, [1, 2, 3, 4, 5], strict=True))
    assert output.score.item() == pytest.approx(score)
    assert output.score.shape == (1, 1)


def test_an_embedding_between_all_anchors_scores_the_middle() -> None:
    assert LikertHead(EYE, 0.01)(torch.ones(2, 5)).score.tolist() == [[3.0], [3.0]]


def test_an_embedding_on_an_anchor_scores_its_level() -> None:
    head = LikertHead(EYE, 0.01)
    scores = head(7 * EYE).score.flatten().tolist()
    assert scores == pytest.approx([1, 2, 3, 4, 5])


@pytest.mark.parametrize('levels', [2, 3, 7])
def test_any_number_of_levels_spans_one_to_five(levels: int) -> None:
    scores = LikertHead(torch.eye(levels), 0.01)(torch.eye(levels)).score.flatten()
    assert scores.tolist() == pytest.approx(torch.linspace(1, 5, levels).tolist())


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    size=st.floats(1e-3, 1e3),
    temperature=st.floats(1e-3, 10),
)
def test_the_score_is_the_expected_level_and_stays_in_range(
    seed: int, size: float, temperature: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    head = LikertHead(torch.randn(5, 8, generator=generator), temperature)
    output = head(size * torch.randn(16, 8, generator=generator))
    assert output.probabilities.shape == (16, 5)
    torch.testing.assert_close(output.probabilities.sum(dim=1), torch.ones(16))
    expected = output.probabilities @ torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    torch.testing.assert_close(output.score[:, 0], expected)
    assert output.score.min() >= 1
    assert output.score.max() <= 5


@settings(max_examples=30, deadline=None)
@given(scale=st.floats(1e-4, 1e4), anchor_scale=st.floats(1e-3, 1e3))
def test_the_length_of_embedding_and_anchors_does_not_matter(
    scale: float, anchor_scale: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    anchors = torch.randn(5, 8, generator=generator)
    embedding = torch.randn(4, 8, generator=generator)
    expected = LikertHead(anchors, 0.05)(embedding)
    actual = LikertHead(anchor_scale * anchors, 0.05)(scale * embedding)
    torch.testing.assert_close(actual.score, expected.score)
    torch.testing.assert_close(actual.probabilities, expected.probabilities)


def test_the_embedding_is_handed_out_as_it_came() -> None:
    embedding = 3 * torch.ones(1, 5)
    assert LikertHead(EYE, 0.01)(embedding).embedding is embedding


def test_a_zero_embedding_gives_a_finite_score() -> None:
    assert LikertHead(EYE, 0.01)(torch.zeros(1, 5)).score.item() == pytest.approx(3)


def test_frozen_anchors_are_no_parameters() -> None:
    head = LikertHead(EYE, 0.01)
    assert not list(head.parameters())
    assert set(head.state_dict()) == {'anchors', 'temperature'}
    head.requires_grad_(True).train()
    assert not head.anchors.requires_grad


def test_learned_anchors_are_the_only_parameter() -> None:
    head = LikertHead(EYE, 0.01, learn_anchors=True)
    assert [name for name, _ in head.named_parameters()] == ['anchors']
    head(torch.rand(2, 5)).score.sum().backward()
    assert head.anchors.grad is not None
    assert head.anchors.grad.abs().sum() > 0
    assert set(head.state_dict()) == {'anchors', 'temperature'}


def test_the_head_keeps_its_own_copy_of_the_anchors() -> None:
    anchors = torch.eye(5)
    head = LikertHead(anchors, 0.01)
    anchors.zero_()
    assert torch.equal(head.anchors, EYE)


def test_gradients_reach_the_embedding() -> None:
    embedding = torch.randn(3, 5, requires_grad=True)
    LikertHead(EYE, 0.1)(embedding).score.sum().backward()
    assert embedding.grad is not None
    assert embedding.grad.isfinite().all()
    assert embedding.grad.abs().min() > 0


@pytest.mark.parametrize(
    'anchors', [torch.ones(5), torch.ones(1, 8), torch.ones(2, 2, 2)]
)
def test_anchors_of_another_shape_are_refused(anchors: torch.Tensor) -> None:
    with pytest.raises(
        ValueError, match=r'`anchors` must have the shape \(L >= 2, D\)'
    ):
        LikertHead(anchors, 0.01)


@pytest.mark.parametrize('temperature', [0, -0.1, math.nan])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match='`temperature` must be > 0, but got'):
        LikertHead(EYE, temperature)


@pytest.mark.parametrize(('learned', 'word'), [(False, 'frozen'), (True, 'learned')])
def test_it_says_whether_its_anchors_are_learned(learned: bool, word: str) -> None:
    head = LikertHead(EYE, 0.01, learn_anchors=learned)
    assert repr(head) == f'LikertHead(levels=5, embed_dim=5, anchors={word})'


@pytest.mark.parametrize('levels', [2, 5, 9])
def test_on_the_arc_closer_levels_are_closer(levels: int) -> None:
    anchors = arc_anchors(levels, 32)
    assert anchors.shape == (levels, 32)
    torch.testing.assert_close(anchors.norm(dim=1), torch.ones(levels))
    cosines = anchors @ anchors.T
    for distance in range(1, levels):
        near = cosines.diagonal(distance - 1)
        assert near.min() > cosines.diagonal(distance).max()
    # The two ends are 120 degrees apart.
    assert cosines[0, -1].item() == pytest.approx(-0.5, abs=1e-5)


def test_the_arc_depends_on_its_seed_alone() -> None:
    first = arc_anchors(5, 32)
    torch.rand(7)
    assert torch.equal(arc_anchors(5, 32), first)
    assert not torch.equal(arc_anchors(5, 32, seed=1), first)


def test_a_walk_along_the_arc_scores_ever_higher() -> None:
    anchors = arc_anchors(5, 32)
    steps = [
        torch.lerp(anchors[i], anchors[i + 1], t) for i in range(4) for t in (0, 0.5)
    ]
    scores = LikertHead(anchors, 0.05)(
        torch.stack([*steps, anchors[4]])
    ).score.flatten()
    assert (scores.diff() > 0).all()


def test_the_regression_head_is_a_sigmoid_of_one_linear_layer() -> None:
    head = RegressionHead(3)
    torch.nn.init.constant_(head.linear.weight, 1)
    torch.nn.init.constant_(head.linear.bias, -6)
    output = head(torch.tensor([[1.0, 2.0, 3.0], [100, 0, 0], [-100, 0, 0]]))
    assert output.score.flatten().tolist() == pytest.approx([3, 5, 1])
    assert output.probabilities is None


def test_cosines_of_the_head_are_those_of_torch() -> None:
    generator = torch.Generator().manual_seed(3)
    anchors = torch.randn(5, 8, generator=generator)
    embedding = torch.randn(1, 8, generator=generator)
    cosines = F.cosine_similarity(embedding, anchors)
    expected = (cosines / 0.07).softmax(dim=0)
    actual = LikertHead(anchors, 0.07)(embedding).probabilities[0]
    torch.testing.assert_close(actual, expected)


def heads() -> list[torch.nn.Module]:
    torch.manual_seed(0)
    return [LikertHead(arc_anchors(5, 32), 0.01), RegressionHead(32)]


@pytest.mark.parametrize('head', heads(), ids=lambda head: type(head).__name__)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_the_head_computes_in_float32_under_autocast(
    head: torch.nn.Module, dtype: torch.dtype
) -> None:
    embedding = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))
    expected = head(embedding).score
    with torch.autocast('cpu', dtype=dtype):
        output = head(embedding)
        assert torch.is_autocast_enabled('cpu'), 'the caller keeps his'
        half = head(embedding.to(dtype))
    assert output.score.dtype == torch.float32
    assert torch.equal(output.score, expected)
    assert half.embedding.dtype == half.score.dtype == torch.float32
    # An embedding in half precision is rounded, what follows isn't.
    assert torch.equal(half.score, head(embedding.to(dtype).float()).score)


@pytest.mark.parametrize('head', heads(), ids=lambda head: type(head).__name__)
def test_double_precision_stays_and_a_head_in_half_precision_works(
    head: torch.nn.Module,
) -> None:
    embedding = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))
    expected = head(embedding).score
    half = copy.deepcopy(head).half()(embedding.half())
    assert half.score.dtype == torch.float32
    assert (half.score - expected).abs().max() < 0.1
    double = copy.deepcopy(head).double()(embedding.double())
    assert double.score.dtype == double.embedding.dtype == torch.float64
    torch.testing.assert_close(double.score.float(), expected, atol=1e-4, rtol=0)


def test_a_network_under_the_autocast_of_a_caller_gives_float32_scores() -> None:
    torch.manual_seed(0)
    network = CLIPKDStudent('timm:test_vit', input_size=32, embed_dim=16).eval()
    image = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        expected = network(image)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            output = network(image, return_details=True)
    assert output.score.dtype == output.embedding.dtype == torch.float32
    assert (output.score - expected).abs().max() < 0.2
    assert not torch.equal(output.score, expected), 'the encoder is in half precision'
    # As fine as float32: in bfloat16 scores near 3 are multiples of 1/64.
    assert not torch.equal(output.score, output.score.bfloat16().float())


@pytest.mark.slow
@pytest.mark.parametrize('head', heads(), ids=lambda head: type(head).__name__)
def test_the_head_can_be_exported_and_compiled(head: torch.nn.Module) -> None:
    embedding = torch.randn(3, 32)
    expected = head(embedding).score
    exported = torch.export.export(head, (embedding,)).run_decompositions().module()
    torch.testing.assert_close(exported(embedding).score, expected)
    compiled = torch.compile(head, backend='eager', fullgraph=True)
    torch.testing.assert_close(compiled(embedding).score, expected)
