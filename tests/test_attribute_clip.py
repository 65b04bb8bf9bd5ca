"""CLIP as a labeller: parity with OpenAI's own class, forms of weights, prompts."""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_clip_parity import FORMS, MEAN, STD, TINY_SIZE, _save, _tensors
from torch import Tensor, nn

from pyiqa_clipkd.attributes import clip as clip_module
from pyiqa_clipkd.attributes.clip import ClipLabeller, PromptPairs, load_pairs
from pyiqa_clipkd.attributes.names import ATTRIBUTES
from pyiqa_clipkd.attributes.prompts import (
    CANDIDATES,
    PROMPTS,
    Pair,
    check_prompts,
    read_prompts,
    write_prompts,
)
from pyiqa_clipkd.command import main
from pyiqa_clipkd.network import CLIPLikert

ENCODER = 'open_clip:tiny-quickgelu'

# OpenAI's own tokenizer on the default prompts, the good side first.
TOKENS = {
    'sharpness': ([8157, 1125, 269], [21977, 1125, 269]),
    'brightness': ([4852, 1125, 269], [3144, 1125, 269]),
    'contrast': ([1400, 18501, 1125, 269], [1042, 18501, 1125, 269]),
    'colorfulness': ([11444, 1125, 269], [19433, 1125, 269]),
    'noisiness': ([3772, 1125, 269], [33495, 1125, 269]),
}
START, END, CONTEXT = 49406, 49407, 77

# Not CLIP's 100: it must come from the file, and random prompts aren't all certain.
LOGIT_SCALE = 20.0


def formula(clip: nn.Module, images: Tensor) -> Tensor:
    """Probabilities of the good sides, from OpenAI's class and numbers alone."""
    embedding = clip.encode_image((images - MEAN) / STD, True)  # type: ignore[operator]
    columns = []
    for pair in TOKENS.values():
        tokens = torch.zeros(2, CONTEXT, dtype=torch.long)
        for row, numbers in zip(tokens, pair, strict=True):
            row[: len(numbers) + 2] = torch.tensor([START, *numbers, END])
        good, bad = clip.encode_text(tokens)  # type: ignore[operator]
        scale = clip.get_parameter('logit_scale').exp()
        high = (scale * F.cosine_similarity(embedding, good[None], dim=-1)).exp()
        low = (scale * F.cosine_similarity(embedding, bad[None], dim=-1)).exp()
        columns.append(high / (high + low))
    return torch.stack(columns, dim=1)


@pytest.fixture(scope='module')
def openai(openai_clip: Callable[..., nn.Module]) -> nn.Module:
    clip = openai_clip()
    clip.get_parameter('logit_scale').fill_(math.log(LOGIT_SCALE))
    return clip


@pytest.fixture(scope='module')
def archive(
    openai: nn.Module,
    openai_archive: Callable[[nn.Module, int, Path], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    return openai_archive(openai, TINY_SIZE, tmp_path_factory.mktemp('clip') / 'a.pt')


@pytest.fixture(scope='module')
def labeller(archive: Path) -> ClipLabeller:
    return ClipLabeller(ENCODER, archive)


@pytest.fixture(scope='module')
def corners(photo: Tensor) -> Tensor:
    """Four different images of the size that the network takes."""
    first = photo[..., :TINY_SIZE, :TINY_SIZE]
    last = photo[..., -TINY_SIZE:, -TINY_SIZE:]
    return torch.cat([first, last, first.flip(3), 1 - last])


def tower(size: int = 3) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, size))


# --- the formula ----------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize('form', FORMS)
def test_every_form_of_the_weights_gives_what_the_class_of_openai_gives(
    form: str, openai: nn.Module, archive: Path, corners: Tensor, tmp_path: Path
) -> None:
    path = archive
    if form != 'torchscript':
        path = _save(_tensors(openai), form, tmp_path, TINY_SIZE)
    labeller = ClipLabeller(ENCODER, str(path))
    values, expected = labeller.batch(corners), formula(openai, corners)
    assert values.shape == (4, 5)
    assert (values - expected).abs().max() <= 1e-5
    # It is no test where all images and attributes are alike.
    assert expected.std(dim=0).min() > 1e-3
    assert expected.std(dim=1).min() > 1e-3


@pytest.mark.slow
@torch.no_grad()
def test_the_released_shape_gives_what_the_class_of_openai_gives(
    openai_clip: Callable[..., nn.Module],
    openai_archive: Callable[[nn.Module, int, Path], Path],
    photo: Tensor,
    tmp_path: Path,
) -> None:
    full = openai_clip(512, 224, 12, 768, 32, 77, 49408, 512, 8, 12)
    full.get_parameter('logit_scale').fill_(math.log(LOGIT_SCALE))
    labeller = ClipLabeller(pretrained=openai_archive(full, 224, tmp_path / 'a.pt'))
    images = torch.cat([photo[..., :224, :224], photo[..., -224:, -224:]])
    values, expected = labeller.batch(images), formula(full, images)
    assert (values - expected).abs().max() <= 1e-5
    assert expected.std(dim=0).min() > 1e-3


@torch.no_grad()
def test_half_precision_files_are_computed_in_full_precision(
    openai: nn.Module, corners: Tensor, tmp_path: Path
) -> None:
    half = {name: tensor.half() for name, tensor in _tensors(openai).items()}
    labeller = ClipLabeller(ENCODER, _save(half, 'safetensors', tmp_path, TINY_SIZE))
    values = labeller.batch(corners)
    assert values.dtype == torch.float32
    assert (values - formula(openai, corners)).abs().max() <= 5e-3


def test_the_prompts_become_the_tokens_of_openai() -> None:
    assert list(TOKENS) == list(PROMPTS)
    tokenizer = open_clip.get_tokenizer('ViT-B-32-quickgelu')
    for name, pair in PROMPTS.items():
        for tokens, numbers in zip(tokenizer(list(pair)), TOKENS[name], strict=True):
            wanted = [START, *numbers, END]
            assert tokens.tolist() == wanted + [0] * (CONTEXT - len(wanted))


def test_no_candidate_is_cut_off_by_the_context_of_clip() -> None:
    tokenizer = open_clip.get_tokenizer('ViT-B-32-quickgelu')
    texts = [text for pairs in CANDIDATES.values() for pair in pairs for text in pair]
    assert (tokenizer(texts)[:, -1] == 0).all()


def test_the_good_side_is_near_one_and_the_sides_change_places() -> None:
    good, bad = torch.tensor([1.0, 0, 0]), torch.tensor([0.0, 1, 0])
    visual = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    anchors = torch.stack([torch.stack([good, bad]), torch.stack([bad, good])])
    network = PromptPairs(visual, anchors, temperature=0.01, input_size=8)
    red = torch.tensor([0.9, 0.2, 0.4]).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    first, second = network(red)[0].tolist()
    assert first > 0.99
    assert first + second == pytest.approx(1)


# --- images ---------------------------------------------------------------------------


def test_a_batch_gives_the_same_as_one_by_one(
    labeller: ClipLabeller,
    photographs: dict[str, Image.Image],
    as_tensor: Callable[[Image.Image], Tensor],
) -> None:
    images = [image.crop((0, 0, 300, 200)) for image in photographs.values()]
    values = labeller.batch(torch.cat([as_tensor(image) for image in images]))
    for row, image in zip(values, images, strict=True):
        alone = labeller(image)
        assert list(alone) == list(ATTRIBUTES)
        assert all(type(value) is float for value in alone.values())
        assert list(alone.values()) == pytest.approx(row.tolist(), abs=1e-5)
        assert labeller.batch(as_tensor(image))[0].tolist() == pytest.approx(
            row.tolist(), abs=1e-5
        )
    assert values.std(dim=0).min() > 1e-3


@pytest.mark.parametrize('size', [(1, 1), (1, 90), (640, 40), (33, 32), (1500, 1000)])
def test_photographs_of_every_size_have_values(
    labeller: ClipLabeller, photographs: dict[str, Image.Image], size: tuple[int, int]
) -> None:
    values = labeller(photographs['coffee'].resize(size))
    assert all(0 <= value <= 1 for value in values.values())


def test_gray_tensors_are_taken_and_other_images_are_an_error(
    labeller: ClipLabeller, photo: Tensor
) -> None:
    gray = photo[:, :1, :TINY_SIZE, :TINY_SIZE]
    assert torch.equal(labeller.batch(gray), labeller.batch(gray.expand(-1, 3, -1, -1)))
    with pytest.raises(ValueError, match=r'`image` must be an RGB image .* but got L'):
        labeller(Image.new('L', (9, 9)))
    with pytest.raises(ValueError, match='but got str'):
        labeller('photo.jpg')  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r'torch.uint8.*img.float\(\) / 255'):
        labeller.batch((255 * photo).byte())


def test_values_stay_in_full_precision_under_autocast(
    labeller: ClipLabeller, corners: Tensor
) -> None:
    with torch.autocast('cpu', torch.bfloat16):
        values = labeller.batch(corners)
    assert values.dtype == torch.float32


# --- weights --------------------------------------------------------------------------


def test_the_text_tower_is_dropped(labeller: ClipLabeller, openai: nn.Module) -> None:
    wanted = sum(p.numel() for p in openai.get_submodule('visual').parameters())
    parameters = list(labeller.network.parameters())
    assert sum(p.numel() for p in parameters) == wanted
    assert not any(p.requires_grad for p in parameters)
    assert not labeller.network.training


def test_a_local_file_needs_no_network(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError('the network was asked')

    for name in ('socket', 'create_connection', 'getaddrinfo'):
        monkeypatch.setattr(socket, name, fail)
    ClipLabeller(ENCODER, archive)


def test_the_file_in_the_weights_folder_is_taken_for_the_tag(
    openai: nn.Module,
    labeller: ClipLabeller,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv('PYIQA_CLIPKD_WEIGHTS', str(tmp_path))
    monkeypatch.setattr(clip_module, 'ENCODER', ENCODER)
    path = _save(_tensors(openai), 'safetensors', tmp_path, TINY_SIZE)
    path.rename(tmp_path / 'clipkd_zeroshot.safetensors')
    assert ClipLabeller(ENCODER).identity == labeller.identity


def test_weights_that_can_not_be_had_are_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError('no network')

    with pytest.raises(FileNotFoundError, match='`pretrained` must be a file or one'):
        ClipLabeller(pretrained=tmp_path / 'gone.pt')
    monkeypatch.setattr(open_clip, 'create_model', fail)
    with pytest.raises(RuntimeError, match="The 'openai' weights of ViT-B-32-quickgel"):
        ClipLabeller()


def test_files_that_can_not_label_say_why(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = CLIPLikert(ENCODER, pretrained=str(archive), input_size=TINY_SIZE)
    torch.save({'params': teacher.state_dict()}, tmp_path / 'net.pth')
    with pytest.raises(
        ValueError, match=r'net\.pth is a network of this package.*no te'
    ):
        ClipLabeller(ENCODER, tmp_path / 'net.pth')
    torch.save({'weight': torch.ones(2)}, tmp_path / 'other.pt')
    with pytest.raises(ValueError, match=r'other\.pt does not fit tiny-quickgelu'):
        ClipLabeller(ENCODER, tmp_path / 'other.pt')
    with pytest.raises(ValueError, match=r"must start with 'open_clip:'.*timm:resn"):
        ClipLabeller('timm:resnet18', None)


def test_a_model_with_another_preprocessing_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    build = clip_module.build_open_clip_model

    def other(*arguments: Any) -> Any:
        model: Any = build(*arguments)
        model.visual.preprocess_cfg = {**model.visual.preprocess_cfg, 'mean': (0.5,)}
        return model

    load_pairs(ENCODER, None, [Pair('a', 'b')])
    monkeypatch.setattr(clip_module, 'build_open_clip_model', other)
    with pytest.raises(ValueError, match=r"must have CLIP's preprocessing \(mean"):
        load_pairs(ENCODER, None, [Pair('a', 'b')])


def test_the_identity_is_that_of_weights_model_and_prompts(
    openai: nn.Module, labeller: ClipLabeller, archive: Path, tmp_path: Path
) -> None:
    def identity(path: Path, encoder: str = ENCODER, **changes: Pair) -> str:
        return ClipLabeller(encoder, path, {**PROMPTS, **changes}).identity

    same = _save(_tensors(openai), 'open_clip_pt', tmp_path, TINY_SIZE)
    assert identity(same) == labeller.identity
    assert '\n' not in labeller.identity
    assert ENCODER in labeller.identity

    changed = _tensors(openai)
    changed['visual.class_embedding'] = changed['visual.class_embedding'] + 0.1
    others = {
        labeller.identity,
        identity(_save(changed, 'safetensors', tmp_path, TINY_SIZE)),
        identity(archive, contrast=Pair('punchy', 'flat')),
        identity(same, 'open_clip:tiny'),  # plain GELU
    }
    assert len(others) == 4


def test_wrong_anchors_are_an_error() -> None:
    with pytest.raises(ValueError, match=r'shape \(K, 2, D\), but got \(5, 3, 4\)'):
        PromptPairs(tower(), torch.ones(5, 3, 4), temperature=1, input_size=8)


# --- prompts --------------------------------------------------------------------------


def test_candidates_and_defaults_are_pairs_of_every_attribute() -> None:
    assert check_prompts(PROMPTS) == PROMPTS
    assert list(CANDIDATES) == list(ATTRIBUTES)
    for name, pairs in CANDIDATES.items():
        assert len(set(pairs)) == len(pairs) >= 8
        assert PROMPTS[name] in pairs
        for pair in pairs:
            check_prompts({**PROMPTS, name: pair})


def test_a_file_of_prompts_comes_back(tmp_path: Path) -> None:
    prompts = {**PROMPTS, 'noisiness': Pair('ein reines Foto', 'körniges Foto')}
    path = write_prompts(tmp_path / 'new' / 'prompts.json', prompts, {'seed': 3})
    assert read_prompts(path) == prompts
    assert json.loads(path.read_text(encoding='utf-8'))['made_by'] == {'seed': 3}
    write_prompts(path, dict(reversed(prompts.items())))
    assert list(read_prompts(path)) == list(ATTRIBUTES)


def test_plain_lists_in_a_file_of_prompts_are_pairs(tmp_path: Path) -> None:
    path = tmp_path / 'prompts.json'
    path.write_text(json.dumps({'prompts': PROMPTS}))
    assert read_prompts(path) == PROMPTS


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    'missing': ({'contrast': None}, 'but got no contrast'),
    'unknown': ({'sharpnes': ['a', 'b']}, "but got unknown 'sharpnes'"),
    'empty': ({'contrast': ['rich', '  ']}, 'of contrast must be two texts'),
    'number': ({'contrast': ['rich', 3]}, 'of contrast must be two texts'),
    'text': ({'contrast': 'ab'}, 'of contrast must be two texts'),
    'three': ({'contrast': ['a', 'b', 'c']}, 'of contrast must be two texts'),
    'key': ({'contrast': {'good': 'a', 'worse': 'b'}}, 'of contrast must be two texts'),
    'identical': ({'contrast': ['Flat  photo', 'flat photo']}, 'two different texts'),
}


@pytest.mark.parametrize('kind', WRONG)
def test_a_wrong_file_of_prompts_is_an_error_that_names_it(
    kind: str, tmp_path: Path
) -> None:
    changes, told = WRONG[kind]
    pairs = {**PROMPTS, **changes}
    path = tmp_path / 'prompts.json'
    path.write_text(json.dumps({'prompts': {k: v for k, v in pairs.items() if v}}))
    with pytest.raises(ValueError, match=rf'prompts\.json: .*{told}'):
        read_prompts(path)


@pytest.mark.parametrize('text', ['', '{', '[]', '3', '{"sharpness": ["a", "b"]}'])
def test_other_files_are_no_prompts(text: str, tmp_path: Path) -> None:
    (tmp_path / 'other.json').write_text(text)
    with pytest.raises(ValueError, match=r'other\.json is no file of prompts'):
        read_prompts(tmp_path / 'other.json')
    with pytest.raises(FileNotFoundError, match=r'no file of prompts .*gone\.json'):
        read_prompts(tmp_path / 'gone.json')


def test_a_labeller_refuses_wrong_prompts_before_it_reads_weights(
    tmp_path: Path,
) -> None:
    with pytest.raises(ValueError, match=r'`prompts` .*no sharpness, no brightness'):
        ClipLabeller(ENCODER, tmp_path / 'gone.pt', prompts={})
    with pytest.raises(ValueError, match='`prompts` must map attributes to pairs'):
        ClipLabeller(ENCODER, None, prompts=[('a', 'b')])  # type: ignore[arg-type]


def test_the_command_takes_weights_and_chosen_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    asked: dict[str, Any] = {}

    def labeller(**options: Any) -> None:
        asked.update(options)
        raise ValueError('asked enough')

    monkeypatch.setattr(clip_module, 'ClipLabeller', labeller)
    chosen = {name: pairs[1] for name, pairs in CANDIDATES.items()}
    write_prompts(tmp_path / 'prompts.json', chosen)
    words = ['label', 'x', '-o', str(tmp_path / 'x.csv'), '--labeller', 'clip']
    words += ['--weights', 'ViT-B-32.pt', '--prompts', str(tmp_path / 'prompts.json')]
    assert main(words) == 2
    assert 'asked enough' in capfd.readouterr().err
    assert asked == {'pretrained': Path('ViT-B-32.pt'), 'prompts': chosen}
