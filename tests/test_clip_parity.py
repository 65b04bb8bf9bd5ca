"""Our teacher against OpenAI's own class, for every form that the weights come in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from pyiqa_clipkd import metric as metric_module
from pyiqa_clipkd.encoders import OPENAI_NUMBERS
from pyiqa_clipkd.head import arc_anchors
from pyiqa_clipkd.metric import CLIPKDMetric
from pyiqa_clipkd.names import RELEASED
from pyiqa_clipkd.network import CLIPLikert, build_from_config, load_network
from pyiqa_clipkd.weights import Weights, read_weights

# OpenAI's tokenizer on "a photo of {} quality".
TOKENS = {
    'bad': [49406, 320, 1125, 539, 2103, 3027, 49407],
    'poor': [49406, 320, 1125, 539, 3665, 3027, 49407],
    'fair': [49406, 320, 1125, 539, 2849, 3027, 49407],
    'good': [49406, 320, 1125, 539, 886, 3027, 49407],
    'perfect': [49406, 320, 1125, 539, 1878, 3027, 49407],
}
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)

FORMS = ('torchscript', 'openai_pt', 'open_clip_pt', 'safetensors', 'checkpoint')

TINY_SIZE = 32
VIT_B_32 = (512, 224, 12, 768, 32, 77, 49408, 512, 8, 12)


class Result(NamedTuple):
    embedding: Tensor
    similarity: Tensor
    probabilities: Tensor
    score: Tensor


def _formula(clip: nn.Module, image: Tensor) -> Result:
    """Equations 1 to 4 of the paper, from OpenAI's class and numbers alone."""
    tokens = torch.zeros(5, 77, dtype=torch.long)
    for row, numbers in zip(tokens, TOKENS.values(), strict=True):
        row[: len(numbers)] = torch.tensor(numbers)
    text = clip.encode_text(tokens)  # type: ignore[operator]
    # `True`: add the positional embedding, which OpenAI's own code always does.
    embedding = clip.encode_image((image - MEAN) / STD, True)  # type: ignore[operator]
    similarity = F.cosine_similarity(embedding[:, None], text[None], dim=-1)
    scaled = clip.get_parameter('logit_scale').exp() * similarity
    probabilities = scaled.exp() / scaled.exp().sum(dim=1, keepdim=True)
    score = sum((i + 1) * probabilities[:, i] for i in range(5))
    return Result(embedding, similarity, probabilities, torch.as_tensor(score))


def _ours(network: CLIPLikert, image: Tensor) -> Result:
    output = network(image, return_details=True)
    assert output.probabilities is not None
    anchors = network.head.get_buffer('anchors')
    similarity = F.normalize(output.embedding) @ F.normalize(anchors).T
    return Result(
        output.embedding, similarity, output.probabilities, output.score[:, 0]
    )


def _tensors(clip: nn.Module) -> dict[str, Tensor]:
    return {k: v for k, v in clip.state_dict().items() if k not in OPENAI_NUMBERS}


def _save(tensors: dict[str, Tensor], form: str, folder: Path, size: int) -> Path:
    """Save the tensors of OpenAI's class in one of the forms that exist."""
    numbers = dict(
        zip(OPENAI_NUMBERS, map(torch.tensor, (size, 77, 49408)), strict=True)
    )
    path = folder / f'{form}.pt'
    if form == 'openai_pt':
        torch.save({**tensors, **numbers}, path)
    elif form == 'open_clip_pt':
        torch.save(tensors, path)
    elif form == 'checkpoint':
        prefixed = {f'module.{name}': tensor for name, tensor in tensors.items()}
        torch.save({'epoch': 3, 'state_dict': prefixed}, path)
    else:
        path = path.with_suffix('.safetensors')
        save_file(tensors, path)
    return path


class Case(NamedTuple):
    clip: nn.Module
    encoder: str
    size: int
    archive: Path


@pytest.fixture(scope='module')
def build_case(
    openai_clip: Callable[..., nn.Module],
    openai_archive: Callable[[nn.Module, int, Path], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Case]:
    def build(name: str) -> Case:
        clip = openai_clip(*(VIT_B_32 if 'ViT' in name else ()))
        size = 224 if 'ViT' in name else TINY_SIZE
        folder = tmp_path_factory.mktemp('clip')
        archive = openai_archive(clip, size, folder / 'archive.pt')
        return Case(clip, f'open_clip:{name}', size, archive)

    return build


@pytest.fixture(
    scope='module',
    params=[
        'tiny-quickgelu',
        pytest.param('ViT-B-32-quickgelu', marks=pytest.mark.slow),
    ],
)
def case(request: pytest.FixtureRequest, build_case: Callable[[str], Case]) -> Case:
    return build_case(request.param)


@pytest.fixture(scope='module')
def tiny_case(build_case: Callable[[str], Case]) -> Case:
    return build_case('tiny-quickgelu')


def _image(case: Case, photo: Tensor) -> Tensor:
    """Different corners of a photograph, of the size that the network takes."""
    size = case.size
    corners = (photo[..., :size, :size], photo[..., -size:, -size:])
    return torch.cat([*corners, corners[0].flip(3), 1 - corners[1]])


def _assert_close(actual: Result, expected: Result, tolerance: float) -> None:
    for name, value, other in zip(Result._fields, actual, expected, strict=True):
        assert value.shape == other.shape, name
        difference = (value - other).abs().max().item()
        assert difference <= tolerance, f'{name} differs by {difference}'


@torch.no_grad()
@pytest.mark.parametrize('form', FORMS)
def test_every_form_of_the_weights_gives_what_the_class_of_openai_gives(
    form: str, case: Case, photo: Tensor, tmp_path: Path
) -> None:
    path = case.archive
    if form != 'torchscript':
        path = _save(_tensors(case.clip), form, tmp_path, case.size)
    network = CLIPLikert(case.encoder, pretrained=str(path), input_size=case.size)

    image = _image(case, photo)
    expected = _formula(case.clip, image)
    _assert_close(_ours(network.eval(), image), expected, 1e-5)
    # It is no test where all images and levels are alike.
    assert expected.similarity.std(dim=1).min() > 1e-3
    assert expected.score.std() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize('form', ['openai_pt', 'safetensors'])
def test_half_precision_weights_are_computed_in_full_precision(
    form: str,
    case: Case,
    photo: Tensor,
    tmp_path: Path,
    openai_clip: Callable[..., nn.Module],
) -> None:
    half = {name: tensor.half() for name, tensor in _tensors(case.clip).items()}
    path = _save(half, form, tmp_path, case.size)
    network = CLIPLikert(
        case.encoder, pretrained=str(path), input_size=case.size
    ).eval()
    assert {p.dtype for p in network.parameters()} == {torch.float32}

    image = _image(case, photo)
    ours, exact = _ours(network, image), _formula(case.clip, image)
    relative = (ours.embedding - exact.embedding).norm(dim=1)
    assert (relative / exact.embedding.norm(dim=1)).max() <= 5e-3
    for name in ('similarity', 'probabilities', 'score'):
        difference = getattr(ours, name) - getattr(exact, name)
        assert difference.abs().max() <= 5e-3, name

    # And nothing but the rounding of the weights stands between them.
    rounded = openai_clip(*(VIT_B_32 if case.size == 224 else ()))
    rounded.load_state_dict(half)
    _assert_close(ours, _formula(rounded, image), 1e-5)


@torch.no_grad()
def test_the_state_dict_of_the_archive_is_that_of_the_files_of_openai(
    case: Case,
) -> None:
    tensors = read_weights(case.archive).tensors
    numbers = {name: int(tensors[name]) for name in OPENAI_NUMBERS}
    assert numbers == {
        'input_resolution': case.size,
        'context_length': 77,
        'vocab_size': 49408,
    }


@torch.no_grad()
def test_an_image_of_another_size_is_resized_first(case: Case, photo: Tensor) -> None:
    network = CLIPLikert(
        case.encoder, pretrained=str(case.archive), input_size=case.size
    )
    network.eval()
    square = photo[..., 75:375]
    small = F.interpolate(
        square, (case.size, case.size), mode='bicubic', antialias=True
    ).clamp(0, 1)
    expected = _formula(case.clip, small).score
    assert (network(square)[:, 0] - expected).abs() < 1e-3


def test_the_prompts_become_the_tokens_of_openai() -> None:
    tokenizer = open_clip.get_tokenizer('ViT-B-32-quickgelu')
    for level, numbers in TOKENS.items():
        tokens = tokenizer([f'a photo of {level} quality'])[0].tolist()
        assert tokens == numbers + [0] * (77 - len(numbers))


@torch.no_grad()
@pytest.mark.parametrize('form', ['torchscript', 'openai_pt'])
@pytest.mark.parametrize('name', ['tiny', 'tiny-quickgelu'])
def test_weights_of_openai_get_quickgelu_whatever_the_name_of_the_encoder(
    name: str, form: str, tiny_case: Case, photo: Tensor, tmp_path: Path
) -> None:
    path = tiny_case.archive
    if form != 'torchscript':
        path = _save(_tensors(tiny_case.clip), form, tmp_path, tiny_case.size)
    network = CLIPLikert(
        f'open_clip:{name}', pretrained=str(path), input_size=32
    ).eval()
    image = _image(tiny_case, photo)
    _assert_close(_ours(network, image), _formula(tiny_case.clip, image), 1e-5)
    assert network.config['quick_gelu'] is True


@torch.no_grad()
def test_plain_gelu_gives_other_embeddings_and_is_left_to_other_weights(
    tiny_case: Case, photo: Tensor, tmp_path: Path
) -> None:
    path = _save(_tensors(tiny_case.clip), 'open_clip_pt', tmp_path, 32)
    plain = CLIPLikert('open_clip:tiny', pretrained=str(path), input_size=32).eval()
    image = _image(tiny_case, photo)
    expected = _formula(tiny_case.clip, image)
    assert (_ours(plain, image).embedding - expected.embedding).abs().max() > 1e-3
    assert plain.config['quick_gelu'] is False


# --- reading a teacher back -------------------------------------------------------


@torch.no_grad()
def test_a_teacher_comes_back_without_text_tower_and_tokenizer(
    case: Case, photo: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = CLIPLikert(
        case.encoder, pretrained=str(case.archive), input_size=case.size
    ).eval()
    torch.save({'params': network.state_dict()}, tmp_path / 'net.pth')

    def fail(*_: object, **__: object) -> None:
        raise AssertionError('a prompt was encoded')

    built: list[Any] = []
    create_model = open_clip.create_model

    def build(*args: Any, **options: Any) -> nn.Module:
        built.append(create_model(*args, **options))
        return built[-1]

    monkeypatch.setattr(open_clip, 'get_tokenizer', fail)
    monkeypatch.setattr(open_clip.CLIP, 'encode_text', fail)
    monkeypatch.setattr(open_clip, 'create_model', build)
    loaded = load_network(tmp_path / 'net.pth')

    assert loaded.config == network.config
    image = _image(case, photo)
    assert isinstance(loaded, CLIPLikert)
    _assert_close(_ours(loaded, image), _ours(network, image), 0)
    # The text tower has 3 (tiny) or 63 million parameters. The first was built without
    # numbers, to see whether the file fits.
    assert [m.logit_scale.device.type for m in built] == ['meta', 'cpu']
    whole, image_tower = (
        sum(p.numel() for p in m.parameters()) for m in (built[-1], loaded)
    )
    assert whole - image_tower < 10_000


@torch.no_grad()
def test_random_weights_have_text_anchors_and_a_description_has_placeholders() -> None:
    network = CLIPLikert('open_clip:tiny', pretrained=None, input_size=32)
    arc = arc_anchors(5, 32)
    assert not torch.equal(network.head.get_buffer('anchors'), arc)
    assert 'text_anchors' not in network.config

    rebuilt = build_from_config(network.config)
    assert torch.equal(rebuilt.head.get_buffer('anchors'), arc)
    assert rebuilt.config == network.config

    wanted = build_from_config(network.config, text_anchors=True)
    assert not torch.equal(wanted.head.get_buffer('anchors'), arc)


@torch.no_grad()
@pytest.mark.parametrize('form', ['torchscript', 'safetensors', 'ours'])
def test_a_metric_reads_its_file_once(
    form: str,
    tiny_case: Case,
    photo: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = {'encoder': tiny_case.encoder, 'input_size': tiny_case.size}
    monkeypatch.setitem(RELEASED, 'clipkd_zeroshot', {'type': 'CLIPLikert', **options})
    path = tiny_case.archive
    if form == 'safetensors':
        path = _save(_tensors(tiny_case.clip), form, tmp_path, tiny_case.size)
    network = CLIPLikert(
        tiny_case.encoder, pretrained=str(path), input_size=tiny_case.size
    ).eval()
    if form == 'ours':
        path = tmp_path / 'net.pth'
        torch.save({'params': network.state_dict()}, path)

    reads = []

    def read(path: str | Path) -> Weights:
        reads.append(str(path))
        return read_weights(path)

    monkeypatch.setattr(metric_module, 'read_weights', read)
    for module in ('encoders', 'network'):
        monkeypatch.setattr(f'pyiqa_clipkd.{module}.read_weights', read)
    metric = CLIPKDMetric('clipkd_zeroshot', pretrained_model_path=path)
    assert reads == [str(path)]
    assert torch.equal(metric(photo), network(photo))


def test_a_metric_of_a_file_that_does_not_fit_names_the_file(
    tmp_path: Path,
) -> None:
    torch.save({'weight': torch.ones(2)}, tmp_path / 'other.pt')
    with pytest.raises(ValueError, match=r'`pretrained`: .*other\.pt does not fit'):
        CLIPKDMetric('clipkd_zeroshot', pretrained_model_path=tmp_path / 'other.pt')
    with pytest.raises(ValueError, match=r'other\.pt does not say which network'):
        CLIPKDMetric('clipkd_teacher', pretrained_model_path=tmp_path / 'other.pt')
