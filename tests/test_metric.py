from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import open_clip
import pyiqa
import pytest
import torch
from pyiqa.default_model_configs import DEFAULT_CONFIGS
from torch import Tensor, nn

from pyiqa_clipkd import host, locations
from pyiqa_clipkd.files import file_hash
from pyiqa_clipkd.metric import CLIPKDMetric
from pyiqa_clipkd.names import METRICS, RELEASED
from pyiqa_clipkd.network import CLIPKDStudent, CLIPLikert, QualityNetwork
from pyiqa_clipkd.weights import write_weights

NAME = 'clipkd_mobilevit'


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Empty places for weights instead of the user's own and the package's."""
    places = {'user': tmp_path / 'user', 'bundle': tmp_path / 'bundle'}
    monkeypatch.setenv('PYIQA_CLIPKD_WEIGHTS', str(places['user']))
    monkeypatch.setattr(locations, 'BUNDLED_FOLDER', places['bundle'])
    monkeypatch.setattr('pyiqa_clipkd.metric.BUNDLED_FOLDER', places['bundle'])
    return places


@pytest.fixture
def table(folders: dict[str, Path]) -> Iterator[None]:
    """Our metrics in the host's table."""
    before = dict(DEFAULT_CONFIGS)
    host.add_metrics(DEFAULT_CONFIGS)
    yield
    DEFAULT_CONFIGS.clear()
    DEFAULT_CONFIGS.update(before)


def publish(path: Path, seed: int = 0) -> tuple[Path, QualityNetwork]:
    """A tiny student in a published file."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = CLIPKDStudent(
            'timm:test_resnet', embed_dim=16, temperature=0.5, input_size=64
        ).eval()
    tensors = {k: v for k, v in network.state_dict().items() if k != '_extra_state'}
    write_weights(path, tensors, {'config': network.config, 'card': {'data': 'none'}})
    # As the metric has it: another layout rounds its sums in another order.
    return path, network.to(memory_format=torch.channels_last)


@torch.no_grad()
def test_weights_are_taken_from_the_path_then_the_user_then_the_package(
    folders: dict[str, Path], tmp_path: Path, photo: Tensor
) -> None:
    scores = {}
    for seed, place in enumerate(('bundle', 'user', 'path')):
        folder = folders.get(place, tmp_path)
        path, network = publish(folder / f'{NAME}.safetensors', seed)
        scores[place] = network(photo)
        given = path if place == 'path' else None
        metric = CLIPKDMetric(NAME, pretrained_model_path=given)
        assert torch.equal(metric(photo), scores[place])
        assert not metric.training
    assert len({score.item() for score in scores.values()}) == 3


@pytest.mark.parametrize('name', [n for n in METRICS if n != 'clipkd_zeroshot'])
def test_without_weights_the_error_says_which_file_is_missing_and_what_to_do(
    name: str, folders: dict[str, Path]
) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        CLIPKDMetric(name)
    text = str(caught.value)
    assert f'{name}.safetensors' in text
    assert str(folders['user']) in text
    assert str(folders['bundle']) in text
    assert '`pretrained_model_path=`' in text
    assert 'scripts/publish.py' in text


def test_a_path_that_is_missing_is_an_error(folders: dict[str, Path]) -> None:
    publish(folders['user'] / f'{NAME}.safetensors')
    with pytest.raises(FileNotFoundError, match=r'there is no file gone\.pth'):
        CLIPKDMetric(NAME, pretrained_model_path='gone.pth')


def test_options_of_the_network_can_be_changed(tmp_path: Path) -> None:
    path, _ = publish(tmp_path / 'a.safetensors')
    metric = CLIPKDMetric(NAME, pretrained_model_path=path, input_size=96)
    assert metric.preprocessing.input_size == 96


def test_the_log_says_which_weights_are_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = publish(tmp_path / 'a.safetensors')
    monkeypatch.setattr(logging.getLogger('pyiqa'), 'propagate', True)
    with caplog.at_level('INFO', 'pyiqa'):
        CLIPKDMetric(NAME, pretrained_model_path=path)
    assert f'a.safetensors, SHA-256 {file_hash(path)[:8]}' in caplog.text


def test_zero_shot_without_file_and_network_says_what_to_do(
    folders: dict[str, Path],
) -> None:
    message = (
        r'not on this machine .*clipkd_zeroshot\.safetensors in the weights folder'
    )
    with pytest.raises(RuntimeError, match=message):
        CLIPKDMetric('clipkd_zeroshot')


def test_zero_shot_takes_a_published_file_of_another_network_too(
    folders: dict[str, Path], photo: Tensor
) -> None:
    _, network = publish(folders['user'] / 'clipkd_zeroshot.safetensors')
    with torch.no_grad():
        assert torch.equal(CLIPKDMetric('clipkd_zeroshot')(photo), network(photo))


@pytest.fixture
def tiny_release(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {
        'type': 'CLIPLikert',
        'encoder': 'open_clip:tiny-quickgelu',
        'pretrained': None,
        'input_size': 32,
    }
    monkeypatch.setitem(RELEASED, 'clipkd_zeroshot', options)


@torch.no_grad()
@pytest.mark.parametrize('given', [True, False])
def test_zero_shot_takes_a_file_of_openai_from_the_path_and_from_the_user(
    given: bool,
    tiny_release: None,
    folders: dict[str, Path],
    openai_clip: Callable[..., nn.Module],
    openai_archive: Callable[[nn.Module, int, Path], Path],
    photo: Tensor,
) -> None:
    name = 'openai.pt' if given else 'clipkd_zeroshot.safetensors'
    folders['user'].mkdir()
    path = openai_archive(openai_clip(), 32, folders['user'] / name)
    metric = CLIPKDMetric(
        'clipkd_zeroshot', pretrained_model_path=path if given else None
    )
    assert not metric.training
    expected = CLIPLikert(
        'open_clip:tiny-quickgelu', pretrained=str(path), input_size=32
    ).eval()
    assert torch.equal(metric(photo), expected(photo))


def test_zero_shot_without_a_file_is_built_as_released(
    tiny_release: None, folders: dict[str, Path]
) -> None:
    metric = CLIPKDMetric('clipkd_zeroshot', temperature=0.5)
    assert isinstance(metric, CLIPLikert)
    assert not metric.training
    assert metric.head.get_buffer('temperature').item() == 0.5


# --- through the host -----------------------------------------------------------


@pytest.mark.parametrize('given', [True, False])
def test_the_host_scores_images_of_every_kind(
    given: bool,
    table: None,
    folders: dict[str, Path],
    tmp_path: Path,
    photo: Tensor,
) -> None:
    folder = tmp_path if given else folders['user']
    path, network = publish(folder / f'{NAME}.safetensors')
    options = {'pretrained_model_path': str(path)} if given else {}
    metric = pyiqa.create_metric(NAME, device=torch.device('cpu'), **options)
    assert metric.lower_better is False
    assert metric.score_range == '1, 5'
    with torch.no_grad():
        assert torch.equal(metric(photo), network(photo))
    for shape in ((1, 3, 1, 1), (1, 1, 40, 30), (3, 3, 200, 90)):
        score = metric(torch.rand(shape))
        assert score.shape == (shape[0], 1)
        assert score.min() >= 1
        assert score.max() <= 5


@pytest.mark.parametrize('reduction', ['mean', 'sum', 'none'])
def test_as_a_loss_it_has_a_gradient_at_the_image(
    reduction: str, table: None, tmp_path: Path, photo: Tensor
) -> None:
    path, _ = publish(tmp_path / 'a.safetensors')
    loss = pyiqa.create_metric(
        NAME,
        as_loss=True,
        loss_reduction=reduction,
        device=torch.device('cpu'),
        pretrained_model_path=path,
    )
    image = torch.cat([photo, 1 - photo]).requires_grad_()
    value = loss(image)
    assert value.shape == ((2, 1) if reduction == 'none' else ())
    value.sum().backward()
    assert image.grad is not None
    assert image.grad.isfinite().all()
    assert image.grad.flatten(1).abs().sum(dim=1).min() > 0
    # Nothing is spent on gradients of the weights: an optimizer finds none to change.
    assert not any(weight.requires_grad for weight in loss.net.parameters())


def test_a_file_of_the_user_is_a_metric_of_its_own(
    folders: dict[str, Path], request: pytest.FixtureRequest, photo: Tensor
) -> None:
    _, network = publish(folders['user'] / 'clipkd_mine.safetensors')
    request.getfixturevalue('table')
    assert 'clipkd_mine' in pyiqa.list_models(metric_mode='NR', filter='clipkd_*')
    metric = pyiqa.create_metric('clipkd_mine', device=torch.device('cpu'))
    with torch.no_grad():
        assert torch.equal(metric(photo), network(photo))


@pytest.mark.slow
def test_zero_shot_takes_the_file_of_openai(
    table: None,
    openai_clip: Callable[..., nn.Module],
    openai_archive: Callable[[nn.Module, int, Path], Path],
    tmp_path: Path,
    photo: Tensor,
) -> None:
    clip = openai_clip(512, 224, 12, 768, 32, 77, 49408, 512, 8, 12)
    path = openai_archive(clip, 224, tmp_path / 'ViT-B-32.pt')
    metric = pyiqa.create_metric(
        'clipkd_zeroshot', device=torch.device('cpu'), pretrained_model_path=str(path)
    )
    image = photo[..., :224, :224]
    score = metric(image)
    assert score.shape == (1, 1)
    assert 1 <= score.item() <= 5

    prompts = [
        f'a photo of {x} quality' for x in ('bad', 'poor', 'fair', 'good', 'perfect')
    ]
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    with torch.no_grad():
        text = clip.encode_text(open_clip.tokenize(prompts))  # type: ignore[operator]
        visual = clip.encode_image((image - mean) / std, True)  # type: ignore[operator]
        cosine = nn.functional.cosine_similarity(visual, text)
        probabilities = (100 * cosine).softmax(dim=0)
    expected = (probabilities * torch.arange(1, 6)).sum().item()
    assert score.item() == pytest.approx(expected, abs=1e-4)
