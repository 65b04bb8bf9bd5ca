"""The student's projection starts as the linear map that fits the teacher best."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from pyiqa_clipkd.encoders import Encoder
from pyiqa_clipkd.network import CLIPKDStudent, CLIPLikert, QualityNetwork
from pyiqa_clipkd.projection import ALPHAS, ridge_projection, start_projection

SIZE = 32
DIM = 24


def _reference_ridge(x: Tensor, y: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """The normal equations of the standardized features, solved as they stand."""
    x, y = x.double(), F.normalize(y.double())
    mean, std = x.mean(0), x.std(0, correction=0)
    z = (x - mean) / std
    gram = z.T @ z / len(z) + alpha * torch.eye(z.shape[1], dtype=torch.float64)
    weight = (torch.linalg.solve(gram, z.T @ (y - y.mean(0)) / len(z)) / std[:, None]).T
    return weight, y.mean(0) - weight @ mean


def _problem(n: int, features: int, noise: float = 0.3) -> tuple[Tensor, Tensor]:
    """Features of very different means and spreads, and embeddings that follow them."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(n, features, generator=rng, dtype=torch.float64)
    y = x @ torch.randn(features, 8, generator=rng, dtype=torch.float64) / features**0.5
    y = y + 1 + noise * torch.randn(n, 8, generator=rng, dtype=torch.float64)
    spread = torch.logspace(-1, 1, features, dtype=torch.float64)
    return 50 + spread * x, 7 * y


@pytest.mark.parametrize(('n', 'features'), [(60, 10), (60, 59), (30, 80), (2, 3)])
@pytest.mark.parametrize('alpha', [1e-3, 1.0])
def test_weights_are_the_closed_form(n: int, features: int, alpha: float) -> None:
    x, y = _problem(n, features)
    weight, bias, report = ridge_projection(x, y, [alpha])
    expected = _reference_ridge(x, y, alpha)
    torch.testing.assert_close(weight, expected[0], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(bias, expected[1], rtol=1e-6, atol=1e-7)
    assert (report.alpha, report.n) == (alpha, n)


def test_an_exact_map_is_found_again() -> None:
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(200, 12, generator=rng, dtype=torch.float64)
    truth = torch.linalg.qr(torch.randn(12, 12, generator=rng, dtype=torch.float64))[0]
    x = F.normalize(x)
    weight, bias, report = ridge_projection(x, x @ truth.T, [1e-9])
    torch.testing.assert_close(weight, truth, rtol=0, atol=1e-5)
    assert bias.abs().max() < 1e-5
    assert report.cosine > 0.999999


def test_noise_asks_for_a_higher_penalty() -> None:
    clean = ridge_projection(*_problem(400, 20, noise=0)).report
    noisy = ridge_projection(*_problem(60, 20, noise=9)).report
    assert noisy.alpha > 50 * clean.alpha
    assert {clean.alpha, noisy.alpha} <= set(ALPHAS)
    assert noisy.cosine < clean.cosine <= 1


def test_the_cosine_is_that_of_rows_that_were_not_fitted() -> None:
    rng = torch.Generator().manual_seed(2)
    x, y = (torch.randn(100, 90, generator=rng) for _ in range(2))  # unrelated
    weight, bias, report = ridge_projection(x, y, [1e-6])
    fitted = F.cosine_similarity(x @ weight.float().T + bias.float(), y).mean()
    assert fitted > 0.9
    assert report.cosine < 0.1


def test_the_result_is_the_same_each_time_and_leaves_the_seed_alone() -> None:
    x, y = _problem(50, 20)
    torch.manual_seed(3)
    first = ridge_projection(x, y)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), drawn)
    again = ridge_projection(x, y)
    assert torch.equal(first.weight, again.weight)
    assert first.report == again.report


def test_dead_and_nearly_dead_features_are_not_blown_up() -> None:
    x, y = _problem(60, 10)
    dead = torch.zeros(60, 1).double()
    constant = torch.full((60, 1), 0.1).double()
    trembling = 3 + 1e-7 * torch.randn(
        60, 1, generator=torch.Generator().manual_seed(0)
    )
    weight, bias, _ = ridge_projection(torch.cat([x, dead, constant, trembling], 1), y)
    assert weight.isfinite().all()
    assert bias.isfinite().all()
    assert weight[:, 10:].abs().max() < weight[:, :10].abs().max()
    nothing = ridge_projection(torch.ones(10, 4), y[:10])
    assert nothing.weight.abs().max() < 1e-9
    torch.testing.assert_close(nothing.bias, F.normalize(y[:10]).mean(0))


def test_wrong_arguments_are_named() -> None:
    x, y = _problem(10, 4)
    with pytest.raises(ValueError, match=r'\(N, F\).* got \(10, 4\) and \(9, 8\)'):
        ridge_projection(x, y[:9])
    with pytest.raises(ValueError, match=r'two rows or more.* got 1'):
        ridge_projection(x[:1], y[:1])
    with pytest.raises(ValueError, match=r'`embeddings` must be finite'):
        ridge_projection(x, y / 0)
    for alphas in ([], [0.0, 1.0]):
        with pytest.raises(ValueError, match='`alphas` must be'):
            ridge_projection(x, y, alphas)


# --- with networks ----------------------------------------------------------------


@pytest.fixture
def teacher() -> QualityNetwork:
    torch.manual_seed(0)
    teacher = CLIPLikert('timm:test_resnet', input_size=SIZE, embed_dim=DIM)
    return teacher.eval().requires_grad_(False)


@pytest.fixture
def student() -> CLIPKDStudent:
    torch.manual_seed(1)
    return CLIPKDStudent('timm:test_efficientnet', input_size=SIZE, embed_dim=DIM)


@pytest.fixture(scope='module')
def crops(
    photographs: dict[str, Image.Image], as_tensor: Callable[[Image.Image], Tensor]
) -> Tensor:
    """(160, 3, 32, 32): pieces of four photographs, mixed."""
    rng = np.random.default_rng(0)
    pieces = []
    for image in photographs.values():
        for _ in range(40):
            left, top = (int(rng.integers(side - 96)) for side in image.size)
            box = (left, top, left + 96, top + 96)
            pieces.append(as_tensor(image.crop(box).resize((SIZE, SIZE))))
    return torch.cat(pieces)[torch.from_numpy(rng.permutation(len(pieces)))]


def encoder_of(student: CLIPKDStudent) -> Encoder:
    assert isinstance(student.encoder, Encoder)
    return student.encoder


def projection_of(student: CLIPKDStudent) -> nn.Linear:
    projection = encoder_of(student).projection
    assert isinstance(projection, nn.Linear)
    return projection


def batches(teacher: QualityNetwork, img: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(part, teacher.embed(part)) for part in img.split(16)]


def _cosine(student: CLIPKDStudent, teacher: QualityNetwork, img: Tensor) -> float:
    student.eval()
    with torch.no_grad():
        return F.cosine_similarity(student.embed(img), teacher.embed(img)).mean().item()


def test_unseen_images_start_nearer_to_the_teacher(
    student: CLIPKDStudent, teacher: QualityNetwork, crops: Tensor
) -> None:
    before = _cosine(student, teacher, crops[120:])
    report = start_projection(student, batches(teacher, crops[:120]))
    after = _cosine(student, teacher, crops[120:])
    assert after > before + 0.1
    assert after == pytest.approx(report.cosine, abs=0.05)
    assert report.n == 120


def test_the_projection_holds_the_closed_form(
    student: CLIPKDStudent, teacher: QualityNetwork, crops: Tensor
) -> None:
    parts = batches(teacher, crops)
    # As in training, batch norm takes each batch's statistics; nothing is dropped.
    twin = copy.deepcopy(student).eval()
    for module in twin.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
    report = start_projection(student, parts)
    backbone, preprocessing = encoder_of(twin).backbone, twin.preprocessing
    with torch.no_grad():
        features = torch.cat([backbone(preprocessing(img)) for img, _ in parts])
    embeddings = torch.cat([embedding for _, embedding in parts])
    weight, bias, again = ridge_projection(features, embeddings)
    size = projection_of(twin).weight.norm() / weight.norm()  # of the default start
    torch.testing.assert_close(projection_of(student).weight, (size * weight).float())
    torch.testing.assert_close(projection_of(student).bias, (size * bias).float())
    assert again.alpha == report.alpha


def test_only_the_projections_values_change(
    student: CLIPKDStudent, teacher: QualityNetwork, crops: Tensor
) -> None:
    parameters = dict(student.named_parameters())
    state = {name: value.clone() for name, value in student.state_dict().items()}
    student.train()
    encoder_of(student).backbone.get_submodule('bn1').eval()  # frozen by someone
    flags = [module.training for module in student.modules()]
    start_projection(student, batches(teacher, crops))
    assert [module.training for module in student.modules()] == flags
    for name, parameter in student.named_parameters():
        assert parameter is parameters[name]
        assert parameter.requires_grad
    changed = {
        k for k, v in student.state_dict().items() if not torch.equal(v, state[k])
    }
    assert changed == {'encoder.projection.weight', 'encoder.projection.bias'}
    student(crops[:4]).sum().backward()
    grad = projection_of(student).weight.grad
    assert grad is not None
    assert grad.abs().sum() > 0
    assert not projection_of(student)._forward_pre_hooks


def test_a_student_that_cannot_start_so_is_told(
    student: CLIPKDStudent, teacher: QualityNetwork, crops: Tensor
) -> None:
    plain = CLIPKDStudent(
        'timm:test_efficientnet', input_size=SIZE, embed_dim=DIM, head='regression'
    )
    with pytest.raises(ValueError, match=r'must have a projection.*`head: regression`'):
        start_projection(plain, batches(teacher, crops))
    with pytest.raises(ValueError, match=r'shape \(4, 24\), but got \(4, 23\)'):
        start_projection(student, [(crops[:4], torch.rand(4, 23))])
    with pytest.raises(ValueError, match='two images or more, but got none'):
        start_projection(student, [])
    assert student.training
    assert not projection_of(student)._forward_pre_hooks
