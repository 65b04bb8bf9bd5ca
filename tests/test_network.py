from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.transformer import QuickGELU
from torch import Tensor, nn

from pyiqa_clipkd.encoders import build_open_clip_model
from pyiqa_clipkd.head import LikertHead, QualityOutput, RegressionHead
from pyiqa_clipkd.network import (
    LEVELS,
    TEMPLATE,
    CLIPKDStudent,
    CLIPLikert,
    QualityNetwork,
    build_from_config,
    load_network,
)
from pyiqa_clipkd.preprocessing import native_crops
from pyiqa_clipkd.weights import write_weights

TINY = 'open_clip:tiny-quickgelu'


def teacher(**options: Any) -> CLIPLikert:
    """A tiny CLIP with seeded random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        options = {'encoder': TINY, 'pretrained': None, 'input_size': 32, **options}
        return CLIPLikert(**options).eval()


def student(encoder: str = 'test_resnet', **options: Any) -> CLIPKDStudent:
    """A tiny student with seeded random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        # The default temperature makes nearly every score of random weights 1 or 5.
        options = {'embed_dim': 32, 'input_size': 64, 'temperature': 0.5, **options}
        network = CLIPKDStudent(f'timm:{encoder}', **options)
        for name, buffer in network.encoder.named_buffers():
            if name.endswith('running_mean'):  # so that a wrong mode shows
                buffer.add_(0.1 * torch.randn_like(buffer))
        return network.eval()


NETWORKS: dict[str, Callable[[], QualityNetwork]] = {
    'teacher': teacher,
    'timm teacher': lambda: teacher(encoder='timm:test_vit', embed_dim=32),
    'student': student,
    'student vit': lambda: student('test_vit', levels=('low', 'mid', 'high')),
    'student efficientnet': lambda: student('test_efficientnet'),
    'regression': lambda: student(head='regression'),
}


@pytest.fixture(params=NETWORKS, scope='module')
def network(request: pytest.FixtureRequest) -> QualityNetwork:
    return NETWORKS[request.param]()


def details(network: QualityNetwork, image: Tensor) -> QualityOutput:
    output = network(image, return_details=True)
    assert isinstance(output, QualityOutput)
    return output


def likert(network: QualityNetwork) -> LikertHead:
    assert isinstance(network.head, LikertHead)
    return network.head


# --- every network --------------------------------------------------------------


@pytest.mark.parametrize(
    'shape',
    [(1, 1), (1, 2), (5, 3), (33, 64), (64, 64), (2000, 300), (300, 2000), (1, 900)],
    ids=str,
)
@torch.no_grad()
def test_images_of_every_size_are_scored_from_one_to_five(
    network: QualityNetwork, shape: tuple[int, int]
) -> None:
    score = network(torch.rand(2, 3, *shape))
    assert score.shape == (2, 1)
    assert score.min() >= 1
    assert score.max() <= 5


@torch.no_grad()
def test_details_hold_the_same_score_the_embedding_and_the_probabilities(
    network: QualityNetwork, photo: Tensor
) -> None:
    output = details(network, photo)
    assert torch.equal(output.score, network(photo))
    assert torch.equal(output.embedding, network.embed(photo))
    assert output.embedding.shape == (1, network.encoder.embed_dim)
    if isinstance(network.head, RegressionHead):
        assert output.probabilities is None
    else:
        assert output.probabilities is not None
        assert output.probabilities.shape == (1, len(network.config['levels']))
        assert output.probabilities.sum().item() == pytest.approx(1)


@torch.no_grad()
def test_an_image_scores_the_same_alone_and_in_a_batch(
    network: QualityNetwork, photo: Tensor
) -> None:
    batch = torch.cat([photo, photo.flip(3), 1 - photo, photo**2])
    together = details(network, batch)
    for i in range(len(batch)):
        alone = details(network, batch[i : i + 1])
        torch.testing.assert_close(
            alone.score, together.score[i : i + 1], atol=1e-5, rtol=0
        )
        torch.testing.assert_close(
            alone.embedding, together.embedding[i : i + 1], atol=1e-5, rtol=1e-5
        )


@torch.no_grad()
def test_the_same_image_gives_the_same_bits(
    network: QualityNetwork, photo: Tensor
) -> None:
    first = details(network, photo)
    network(torch.rand(3, 3, 40, 50))
    second = details(network, photo)
    assert torch.equal(first.score, second.score)
    assert torch.equal(first.embedding, second.embedding)


@torch.no_grad()
def test_gray_is_scored_as_its_copy_in_three_channels(
    network: QualityNetwork, photo: Tensor
) -> None:
    gray = photo.mean(dim=1, keepdim=True)
    assert torch.equal(network(gray), network(gray.repeat(1, 3, 1, 1)))


@torch.no_grad()
@pytest.mark.parametrize('dtype', [torch.float16, torch.float64])
def test_images_of_another_float_precision_are_scored(
    dtype: torch.dtype, network: QualityNetwork, photo: Tensor
) -> None:
    difference = network(photo.to(dtype)) - network(photo)
    assert difference.abs().max() < 0.05


def test_the_gradient_reaches_the_image(network: QualityNetwork, photo: Tensor) -> None:
    image = photo.clone().requires_grad_()
    network(image).sum().backward()
    assert image.grad is not None
    assert image.grad.isfinite().all()
    # The middle of the photograph, which the crop keeps.
    assert (image.grad[..., 100:200, 150:300] != 0).float().mean() > 0.5


@pytest.mark.parametrize('form', ['checkpoint', 'state_dict', 'published'])
@torch.no_grad()
def test_a_checkpoint_is_all_that_it_takes_to_rebuild_a_network(
    form: str, network: QualityNetwork, photo: Tensor, tmp_path: Path
) -> None:
    path, state = tmp_path / 'net.pth', network.state_dict()
    if form == 'checkpoint':
        torch.save({'params': state}, path)
    elif form == 'state_dict':
        torch.save(state, path)
    else:
        tensors = {name: x for name, x in state.items() if name != '_extra_state'}
        write_weights(path, tensors, {'config': network.config})

    loaded = load_network(path)

    assert type(loaded) is type(network)
    assert not loaded.training
    assert loaded.config == network.config
    expected, actual = details(network, photo), details(loaded, photo)
    assert torch.equal(actual.score, expected.score)
    assert torch.equal(actual.embedding, expected.embedding)
    assert loaded.state_dict().keys() == state.keys()


def test_a_network_in_half_precision_is_stored_and_comes_back_in_full(
    photo: Tensor, tmp_path: Path
) -> None:
    network = student()
    with torch.no_grad():
        expected = network(photo)
        torch.save({'params': network.half().state_dict()}, tmp_path / 'net.pth')
        loaded = load_network(tmp_path / 'net.pth')
        assert {p.dtype for p in loaded.parameters()} == {torch.float32}
        assert (loaded(photo) - expected).abs().max() < 0.05


def test_a_network_survives_training_of_one_step_and_a_checkpoint(
    photo: Tensor, tmp_path: Path
) -> None:
    network = student()
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    details(network, photo.repeat(4, 1, 1, 1)).embedding.square().mean().backward()
    optimizer.step()
    torch.save({'params': network.state_dict()}, tmp_path / 'net.pth')
    with torch.no_grad():
        expected = network.eval()(photo)
        assert torch.equal(load_network(tmp_path / 'net.pth')(photo), expected)


@pytest.mark.parametrize('changes', [{}, {'input_size': 96}])
def test_the_input_size_is_stored_and_can_be_changed(
    changes: dict[str, int], photo: Tensor, tmp_path: Path
) -> None:
    torch.save({'params': student().state_dict()}, tmp_path / 'net.pth')
    loaded = load_network(tmp_path / 'net.pth', **changes)
    expected = changes.get('input_size', 64)
    assert loaded.preprocessing.input_size == expected
    assert loaded.config['input_size'] == expected
    assert loaded.preprocessing(photo).shape == (1, 3, expected, expected)
    with torch.no_grad():
        assert 1 <= loaded(photo).item() <= 5


@pytest.mark.parametrize('crops', [1, 3])
@torch.no_grad()
def test_crops_are_scored_beside_the_whole(crops: int, photo: Tensor) -> None:
    network = student(input_size=64)
    output = details(network, photo)
    side = network.preprocessing.input_size
    views = [photo, *native_crops(photo, side, crops)]
    assert [tuple(view.shape[2:]) for view in views[1:]] == [(64, 64)] * crops
    network.crops = crops
    mean = details(network, photo)
    network.crops = 0
    parts = [details(network, view) for view in views]
    score = torch.stack([part.score for part in parts]).mean(0)
    assert torch.allclose(mean.score, score)
    assert mean.probabilities is not None
    levels = (mean.probabilities * likert(network).level_scores).sum(1, keepdim=True)
    assert torch.allclose(levels, mean.score, atol=1e-5)
    assert torch.equal(mean.embedding, output.embedding)


def test_crops_are_stored_in_no_checkpoint_and_can_be_chosen(tmp_path: Path) -> None:
    network = student(input_size=64)
    torch.save({'params': network.state_dict()}, tmp_path / 'net.pth')
    assert load_network(tmp_path / 'net.pth').crops == 0
    assert load_network(tmp_path / 'net.pth', crops=2).crops == 2
    for wrong in (-1, 1.5, True):
        with pytest.raises(ValueError, match='`crops` must be a whole number >= 0'):
            load_network(tmp_path / 'net.pth', crops=wrong)


def test_an_image_that_one_crop_fills_has_none(photo: Tensor) -> None:
    square = photo[..., :50, :50]
    assert not list(native_crops(square, 64, 3))
    assert not list(native_crops(square, 50, 3))
    narrow = photo[..., :50, :90]
    assert [tuple(c.shape[2:]) for c in native_crops(narrow, 64, 2)] == [(50, 50)] * 2


def test_more_crops_keep_the_places_of_the_first() -> None:
    img = torch.arange(100.0 * 80).view(1, 1, 100, 80)
    few, many = list(native_crops(img, 32, 2)), list(native_crops(img, 32, 9))
    assert all(torch.equal(a, b) for a, b in zip(few, many, strict=False))
    assert torch.equal(few[0], img[..., 34:66, 24:56])
    covered = torch.cat([crop.flatten() for crop in many]).unique().numel()
    assert covered / img.numel() > 0.6


def test_files_that_do_not_say_which_network_they_are_give_a_clear_error(
    tmp_path: Path,
) -> None:
    torch.save({'params': nn.Linear(2, 2).state_dict()}, tmp_path / 'other.pth')
    with pytest.raises(ValueError, match=r'other\.pth does not say which network'):
        load_network(tmp_path / 'other.pth')


def test_a_checkpoint_with_a_tensor_missing_gives_a_clear_error(tmp_path: Path) -> None:
    state = student().state_dict()
    del state['encoder.projection.bias']
    torch.save({'params': state}, tmp_path / 'net.pth')
    message = r'(?s)net\.pth does not fit the network: .*encoder\.projection\.bias'
    with pytest.raises(ValueError, match=message):
        load_network(tmp_path / 'net.pth')


def test_a_network_of_an_unknown_type_is_an_error() -> None:
    message = "must be one of CLIPLikert, CLIPKDStudent, but got 'GeneralNet'"
    with pytest.raises(ValueError, match=message):
        build_from_config({'type': 'GeneralNet'})
    with pytest.raises(ValueError, match='but got None'):
        build_from_config({})


# --- teacher --------------------------------------------------------------------


def test_the_text_tower_is_in_no_parameter_and_no_state_dict() -> None:
    network = teacher()
    names = {name for name, _ in network.named_modules()} | set(network.state_dict())
    assert not [name for name in names if 'text' in name or 'token_emb' in name]
    assert sum(p.numel() for p in network.parameters()) < 200_000  # the text: 3 million


@pytest.mark.parametrize('build', [teacher, student], ids=['teacher', 'student'])
def test_only_the_encoder_is_trained(build: Callable[[], QualityNetwork]) -> None:
    network = build().train()
    names = [name for name, p in network.named_parameters() if p.requires_grad]
    assert names
    assert all(name.startswith('encoder.') for name in names)
    assert network.encoder.training
    assert network.head.training
    before = {name: x.clone() for name, x in network.head.state_dict().items()}
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, weight_decay=0.1)
    network(torch.rand(4, 3, 64, 64)).mean().backward()
    assert all(p.grad is not None for p in network.parameters())
    optimizer.step()
    for name, value in network.head.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_timm_teacher_learns_its_anchors_and_has_no_text() -> None:
    network = teacher(encoder='timm:test_resnet', embed_dim=32, levels=('a', 'b', 'c'))
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert 'head.anchors' in trained
    assert 'head.temperature' not in trained
    assert likert(network).anchors.shape == (3, 32)
    assert likert(network).temperature.item() == pytest.approx(0.05)


def test_the_anchors_are_the_text_features_of_the_prompts() -> None:
    network = teacher()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip: Any = build_open_clip_model(TINY, None).eval()
    prompts = [
        f'a photo of {x} quality' for x in ('bad', 'poor', 'fair', 'good', 'perfect')
    ]
    with torch.no_grad():
        expected = clip.encode_text(open_clip.tokenize(prompts))
    torch.testing.assert_close(likert(network).anchors, expected)
    temperature = 1 / clip.logit_scale.exp().item()
    assert likert(network).temperature.item() == pytest.approx(temperature)
    assert TEMPLATE.format(LEVELS[0]) == prompts[0]


def test_template_levels_and_temperature_can_be_chosen() -> None:
    options: dict[str, Any] = {
        'template': 'a {} picture',
        'levels': ['ugly', 'plain', 'pretty'],
        'temperature': 0.2,
    }
    network = teacher(**options)
    assert likert(network).anchors.shape == (3, 32)
    assert likert(network).temperature.item() == pytest.approx(0.2)
    assert likert(network).level_scores.tolist() == [1, 3, 5]
    assert {key: network.config[key] for key in options} == options
    same_levels = likert(teacher(levels=options['levels'])).anchors
    assert not torch.allclose(likert(network).anchors, same_levels)


@pytest.mark.parametrize('template', ['a photo', 'a {} photo of {} quality', ''])
def test_a_template_without_exactly_one_place_is_refused(template: str) -> None:
    with pytest.raises(
        ValueError, match=r"`template` must contain '\{\}' exactly once"
    ):
        teacher(template=template)


@pytest.mark.parametrize('levels', ['bad', ['bad'], [], ['bad', 'bad']])
@pytest.mark.parametrize('build', [teacher, student], ids=['teacher', 'student'])
def test_levels_that_are_not_two_different_words_are_refused(
    build: Callable[..., QualityNetwork], levels: Any
) -> None:
    with pytest.raises(
        ValueError, match='`levels` must be two or more different words'
    ):
        build(levels=levels)


def test_another_input_size_than_that_of_the_tower_is_refused() -> None:
    message = '`input_size` of open_clip:tiny-quickgelu must be 32, but got 64'
    with pytest.raises(ValueError, match=message):
        teacher(input_size=64)


def test_quickgelu_survives_a_checkpoint_whatever_the_name_of_the_encoder(
    openai_clip: Callable[..., nn.Module],
    openai_archive: Callable[[nn.Module, int, Path], Path],
    photo: Tensor,
    tmp_path: Path,
) -> None:
    """Its weights are in the file of OpenAI, but not in the checkpoint's tensors."""
    archive = openai_archive(openai_clip(), 32, tmp_path / 'openai.pt')
    network = teacher(encoder='open_clip:tiny', pretrained=str(archive))
    assert any(isinstance(module, QuickGELU) for module in network.modules())
    torch.save({'params': network.state_dict()}, tmp_path / 'net.pth')
    loaded = load_network(tmp_path / 'net.pth')
    with torch.no_grad():
        assert torch.equal(loaded(photo), network(photo))


def test_random_weights_of_a_quickgelu_encoder_use_quickgelu() -> None:
    def kinds(encoder: str) -> set[type]:
        modules = teacher(encoder=encoder).modules()
        return {type(m) for m in modules if isinstance(m, (QuickGELU, nn.GELU))}

    assert kinds('open_clip:tiny-quickgelu') == {QuickGELU}
    assert kinds('open_clip:tiny') == {nn.GELU}


def test_without_a_network_the_error_names_file_place_and_option() -> None:
    message = (
        "The 'openai' weights of ViT-B-32-quickgelu .* not on this machine .*"
        '`pretrained` .*`pretrained_model_path`.*clipkd_zeroshot.safetensors in the '
        'weights folder'
    )
    with pytest.raises(RuntimeError, match=message):
        CLIPLikert()


def test_a_tag_that_is_neither_known_nor_a_file_is_an_error() -> None:
    message = "a file or one of the tags openai, laion.* of ViT-B-32, but got 'opnai'"
    with pytest.raises(FileNotFoundError, match=message):
        CLIPLikert('open_clip:ViT-B-32', pretrained='opnai')


def test_weights_of_another_model_are_an_error_that_names_the_file(
    tmp_path: Path,
) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / 'other.pt')
    with pytest.raises(
        ValueError, match=r'`pretrained`: .*other\.pt does not fit tiny'
    ):
        teacher(pretrained=str(tmp_path / 'other.pt'))


# --- student --------------------------------------------------------------------


def test_a_student_adopts_anchors_temperature_and_levels(
    photo: Tensor, tmp_path: Path
) -> None:
    source = teacher(levels=['ugly', 'plain', 'pretty'], temperature=0.03)
    network = student(levels=['a', 'b', 'c'])
    network.adopt_head(source)
    assert torch.equal(likert(network).anchors, likert(source).anchors)
    assert likert(network).anchors is not likert(source).anchors
    assert likert(network).temperature.item() == pytest.approx(0.03)
    assert network.config['levels'] == ['ugly', 'plain', 'pretty']
    assert network.config['temperature'] == pytest.approx(0.03)
    embedding = torch.randn(4, 32)
    assert torch.equal(
        likert(network)(embedding).score, likert(source)(embedding).score
    )

    torch.save({'params': network.state_dict()}, tmp_path / 'net.pth')
    with torch.no_grad():
        assert torch.equal(load_network(tmp_path / 'net.pth')(photo), network(photo))


def test_a_student_freezes_the_anchors_that_its_teacher_learned() -> None:
    source = teacher(encoder='timm:test_resnet', embed_dim=32)
    network = student()
    network.adopt_head(source)
    assert torch.equal(likert(network).anchors, likert(source).anchors)
    assert 'head.anchors' not in dict(network.named_parameters())
    assert not likert(network).anchors.requires_grad


@pytest.mark.parametrize(
    ('options', 'shape'), [({'embed_dim': 16}, (5, 16)), ({'levels': 'ab'}, (2, 32))]
)
def test_a_head_of_another_shape_is_an_error_with_both_shapes_and_the_remedy(
    options: dict[str, Any], shape: tuple[int, int]
) -> None:
    if 'levels' in options:
        options = {'levels': list(options['levels'])}
    message = (
        rf"anchors have the shape \({shape[0]}, {shape[1]}\), the teacher's \(5, 32\): "
        'set `embed_dim: 32` and 5 `levels` for the student'
    )
    with pytest.raises(ValueError, match=message):
        student(**options).adopt_head(teacher())


def test_a_regression_head_takes_part_in_no_adoption() -> None:
    regression = student(head='regression')
    with pytest.raises(ValueError, match='`head: regression` has no anchors'):
        regression.adopt_head(teacher())
    with pytest.raises(ValueError, match='this one has a regression head'):
        student().adopt_head(regression)


def test_a_regression_student_is_features_and_one_linear_layer(photo: Tensor) -> None:
    network = student(head='regression')
    assert isinstance(network.encoder.projection, nn.Identity)
    names = {name for name, _ in network.named_parameters() if 'backbone' not in name}
    assert names == {'head.linear.weight', 'head.linear.bias'}
    with torch.no_grad():
        linear = network.head.get_submodule('linear')
        logit = linear(network.embed(photo))
        assert network(photo).item() == pytest.approx(1 + 4 * logit.sigmoid().item())


def test_a_student_can_not_be_a_clip() -> None:
    message = "`encoder` of a student must be a preset or a timm model, but got 'open_c"
    with pytest.raises(ValueError, match=message):
        CLIPKDStudent(TINY)


def test_an_unknown_head_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`head` must be one of .*but got 'linear'"):
        student(head='linear')
