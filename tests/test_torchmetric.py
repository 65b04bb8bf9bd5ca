"""The torchmetrics object, with torchmetrics itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pyiqa_clipkd.metric import CLIPKDMetric
from pyiqa_clipkd.network import CLIPKDStudent
from pyiqa_clipkd.weights import write_weights

NAME = 'clipkd_efficientnet_lite'


def write_tiny(folder: Path, seed: int) -> Path:
    """A tiny student with batch normalization."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = CLIPKDStudent(
            'timm:test_resnet', embed_dim=16, temperature=0.5, input_size=64
        )
    tensors = {k: v for k, v in network.state_dict().items() if k != '_extra_state'}
    path = folder / f'tiny{seed}.safetensors'
    return write_weights(path, tensors, {'config': network.config})


@pytest.fixture(scope='module')
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp('weights'), seed=0)


@pytest.fixture
def images(photo: Tensor) -> Tensor:
    """Five different ones."""
    return torch.cat([photo * share for share in (1, 0.8, 0.6, 0.4, 0.2)])


pytest.importorskip('torchmetrics')

from torchmetrics import MetricCollection  # noqa: E402

from pyiqa_clipkd.torchmetric import QualityScore  # noqa: E402


@torch.no_grad()
def test_the_mean_over_unequal_batches_is_that_of_all_images(
    weights: Path, images: Tensor
) -> None:
    expected = CLIPKDMetric(NAME, pretrained_model_path=weights)(images).mean()
    quality = QualityScore(weights=weights)
    quality.update(images[:4])
    quality.update(images[4:])
    assert quality.compute().shape == ()
    assert quality.compute() == pytest.approx(expected.item(), abs=1e-5)
    quality.reset()
    quality.update(images[:1])
    alone = CLIPKDMetric(NAME, pretrained_model_path=weights)(images[:1])
    assert quality.compute() == pytest.approx(alone.item(), abs=1e-5)


def test_forward_gives_the_score_of_the_batch_and_collects(
    weights: Path, images: Tensor
) -> None:
    quality = QualityScore(weights=weights)
    first, second = quality(images[:2]), quality(images[2:])
    assert first != second
    expected = (2 * first + 3 * second) / 5
    assert quality.compute() == pytest.approx(expected.item(), abs=1e-5)


def test_bytes_count_as_their_share_of_255(weights: Path, images: Tensor) -> None:
    quality = QualityScore(weights=weights)
    eight_bits = (255 * images).round().byte()
    assert quality(eight_bits) == quality(eight_bits / 255)


def test_a_bundled_metric_scores_as_by_its_name(photo: Tensor) -> None:
    with torch.no_grad():
        expected = CLIPKDMetric('clipkd_efficientnet')(photo).item()
    score = QualityScore('clipkd_efficientnet')(photo)
    assert score == pytest.approx(expected, abs=1e-5)


def test_values_that_rounding_took_beyond_white_are_no_error(
    weights: Path, photo: Tensor
) -> None:
    quality = QualityScore(weights=weights)
    assert quality(photo + 1e-4) == pytest.approx(quality(photo).item(), abs=1e-2)


def test_a_collection_tells_several_apart(
    weights: Path, tmp_path: Path, images: Tensor
) -> None:
    """It shares the state of metrics that look alike: not of these."""
    other = QualityScore(weights=write_tiny(tmp_path, seed=1))
    quality = {'one': QualityScore(weights=weights), 'other': other}
    collection = MetricCollection(dict(quality))
    for batch in (images[:2], images[2:]):
        collection.update(batch)
    together = collection.compute()
    for name, alone in quality.items():
        alone.reset()
        alone.update(images)
        assert together[name] == pytest.approx(alone.compute().item(), abs=1e-4)
    assert together['one'] != together['other']


def test_inside_a_model_that_trains_nothing_of_it_changes(
    weights: Path, images: Tensor
) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quality = QualityScore(weights=weights)

    model = Model()
    before = {k: v.clone() for k, v in model.quality.network.state_dict().items()}
    score = model.eval().quality(images)
    assert torch.equal(model.train().quality(images), score)
    after = model.quality.network.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert not any(p.requires_grad for p in model.parameters())


def test_forward_is_differentiable_and_the_collected_state_keeps_no_graph(
    weights: Path, images: Tensor
) -> None:
    quality = QualityScore(weights=weights)
    images.requires_grad_(True)
    quality(images).backward()
    assert images.grad is not None
    assert images.grad.flatten(1).abs().sum(dim=1).min() > 0
    assert not quality.total.requires_grad


def test_it_moves_with_its_network(weights: Path) -> None:
    quality = QualityScore(weights=weights).to('meta')
    assert quality.total.device.type == 'meta'
    assert {p.device.type for p in quality.network.parameters()} == {'meta'}


@pytest.mark.parametrize(
    ('change', 'error', 'message'),
    [
        (
            lambda x: 2 * x - 1,
            ValueError,
            r'must be in \[0, 1\], but got values from -',
        ),
        (lambda x: x * torch.nan, ValueError, 'values from nan to nan'),
        (lambda x: x[0], ValueError, r'must have the shape \(N, 3 or 1, H, W\)'),
        (lambda x: (255 * x).int(), TypeError, 'must be floating point'),
    ],
)
def test_wrong_images_are_an_error_and_are_not_counted(
    weights: Path, photo: Tensor, change: object, error: type[Exception], message: str
) -> None:
    assert callable(change)
    quality = QualityScore(weights=weights)
    with pytest.raises(error, match=message):
        quality.update(change(photo))
    assert quality.count == 0


@pytest.mark.slow
def test_two_processes_have_one_mean(weights: Path, tmp_path: Path) -> None:
    """Each sees its own images, one of them more than the other."""
    code = f"""
import sys, torch
import torch.distributed as dist
from pyiqa_clipkd.torchmetric import QualityScore
rank = int(sys.argv[1])
dist.init_process_group(
    'gloo', init_method='file://{tmp_path}/meet', rank=rank, world_size=2
)
images = torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(0))
images *= torch.arange(1, 6).view(5, 1, 1, 1) / 5
quality = QualityScore(weights='{weights}')
quality.update(images[:1] if rank else images[1:])
together = quality.compute()
alone = QualityScore(weights='{weights}', sync_on_compute=False)
alone.update(images)
print(abs(together - alone.compute()).item() < 1e-5)
"""
    processes = [
        subprocess.Popen(
            [sys.executable, '-c', code, str(rank)], stdout=subprocess.PIPE, text=True
        )
        for rank in (0, 1)
    ]
    assert [p.communicate(timeout=120)[0].strip() for p in processes] == ['True'] * 2


def test_without_torchmetrics_the_error_says_what_to_install() -> None:
    code = (
        'import sys; sys.modules["torchmetrics"] = None\n'
        'import pyiqa_clipkd.torchmetric'
    )
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, check=False
    )
    assert (
        'needs torchmetrics: pip install torchmetrics' in done.stderr.splitlines()[-1]
    )
