"""CLIP as a labeller of attributes: which of two opposite prompts fits an image better.

CLIP's released weights could not be had where this was written. The formula, the files
that it reads and their parity with OpenAI's class are tested with random weights; how
well its labels agree with people is not known here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from pyiqa_clipkd.attributes.names import ATTRIBUTES
from pyiqa_clipkd.attributes.prompts import PROMPTS, Pair, check_prompts
from pyiqa_clipkd.encoders import (
    OPEN_CLIP,
    build_open_clip_model,
    clip_anchors,
    has_quick_gelu,
    image_size,
)
from pyiqa_clipkd.files import SHORT_HASH
from pyiqa_clipkd.head import LikertHead
from pyiqa_clipkd.images import squares
from pyiqa_clipkd.locations import find_weights
from pyiqa_clipkd.names import RELEASED
from pyiqa_clipkd.preprocessing import CLIP_MEAN, CLIP_STD, CLIPPreprocessing
from pyiqa_clipkd.weights import Weights, read_weights, tensors_hash

ENCODER, TAG = 'open_clip:ViT-B-32-quickgelu', 'openai'

# The metric whose weights are CLIP's own: a file under its name is taken for the tag.
CLIP_METRIC = 'clipkd_zeroshot'


class PromptPairs(nn.Module):
    r"""How probable the good side of each pair of prompts is, given an image.

    With the embedding :math:`v` and the text features :math:`g_k` and :math:`b_k` of
    the good and the bad prompt of pair k,

    .. math:: p_k = \frac{e^{\cos(v, g_k) / \tau}}
                         {e^{\cos(v, g_k) / \tau} + e^{\cos(v, b_k) / \tau}}

    Args:
        visual: CLIP's image tower: normalized (N, 3, S, S) -> (N, D).
        anchors: (K, 2, D), text features, the good side first.
        temperature: tau, one over CLIP's logit scale.
        input_size: S, side in pixels of the square that the tower sees.
        identity: what the tower and its weights are, as one line.
    """

    def __init__(
        self,
        visual: nn.Module,
        anchors: Tensor,
        *,
        temperature: float,
        input_size: int,
        identity: str = '',
    ) -> None:
        super().__init__()
        if anchors.dim() != 3 or anchors.shape[1] != 2:
            raise ValueError(
                '`anchors` must have the shape (K, 2, D), but got '
                f'{tuple(anchors.shape)}.'
            )
        self.identity = identity
        self.preprocessing = CLIPPreprocessing(input_size)
        self.visual = visual
        # Worst level first: the good side is the last.
        self.heads = nn.ModuleList(LikertHead(p.flip(0), temperature) for p in anchors)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3 or 1, H, W) in [0, 1], any size -> (N, K) in [0, 1].

        On the device of the tower; in float32 at least.
        """
        device = self.preprocessing.mean.device
        embedding = self.visual(self.preprocessing(images.to(device)))
        values = [head(embedding).probabilities[:, -1] for head in self.heads]
        return torch.stack(values, dim=1)

    @torch.inference_mode()
    def of_images(self, images: Sequence[Image.Image]) -> Tensor:
        """N RGB images of any sizes -> (N, K) in [0, 1], on the CPU.

        Raises:
            ValueError: if an image isn't RGB.
        """
        size = self.preprocessing.input_size
        seen = np.concatenate([squares(_rgb(image), size) for image in images])
        result: Tensor = self(torch.from_numpy(seen))
        return result.cpu()


def load_pairs(
    encoder: str, pretrained: str | Path | Weights | None, pairs: Sequence[Pair]
) -> PromptPairs:
    """CLIP with any number of pairs. The text tower is used once, and dropped.

    Args:
        encoder: `open_clip:` and a model name.
        pretrained: a tag of open_clip (downloads if it isn't cached), a local file or
            its content in one of the forms that `clipkd_zeroshot` takes, or `None` for
            random weights (for tests: its values mean nothing). In place of `openai`
            for the default encoder a clipkd_zeroshot.safetensors in the weights folder
            is taken, as that metric does.
        pairs: K of them.

    Raises:
        ValueError: if the encoder is unknown, wants another preprocessing than CLIP's,
            or the file doesn't fit or has no text tower.
        FileNotFoundError: if `pretrained` is neither a tag nor a file.
        RuntimeError: if the tag's weights can't be had.
    """
    if not encoder.startswith(OPEN_CLIP):
        raise ValueError(
            f"`encoder` must start with '{OPEN_CLIP}', for it needs a text tower, but "
            f'got {encoder!r}.'
        )
    model: Any = build_open_clip_model(encoder, _weights(encoder, pretrained))
    _check_preprocessing(model.visual, encoder)
    gelu = 'QuickGELU' if has_quick_gelu(model) else 'GELU'
    digest = tensors_hash(model.state_dict())[:SHORT_HASH]
    anchors = clip_anchors(
        model, encoder, [prompt for pair in pairs for prompt in pair]
    )
    return PromptPairs(
        model.visual,
        anchors.unflatten(0, (-1, 2)),
        temperature=float(1 / model.logit_scale.detach().exp()),
        input_size=image_size(model.visual, default=224),
        identity=f'{encoder} {gelu} weights {digest}',
    )


class ClipLabeller:
    """Values of the five attributes by CLIP: 1 is the good side, `noisiness` 1 clean.

    CLIP sees the central square of the photograph, reduced to 224 pixels (ViT-B/32):
    the grain of a large photograph and what is at its borders are beyond it. Values are
    probabilities for one of two prompts; their order means more than their size.

    Args:
        encoder: `open_clip:` and a model name.
        pretrained: as in `load_pairs`.
        prompts: attribute -> (good prompt, bad prompt); `read_prompts` reads those that
            scripts/select_prompts.py has chosen.
        device: where the image tower runs.

    Attributes:
        prompts: the pairs, in the order of `ATTRIBUTES`.
        identity: model, weights (their SHA-256, the same for every form of file) and
            prompts as one line: labels of equal lines come from the same labeller.

    Raises:
        ValueError: if the prompts are wrong, and as `load_pairs`.
    """

    def __init__(
        self,
        encoder: str = ENCODER,
        pretrained: str | Path | Weights | None = TAG,
        prompts: Mapping[str, tuple[str, str]] = PROMPTS,
        device: str | torch.device = 'cpu',
    ) -> None:
        self.prompts = check_prompts(prompts)
        pairs = list(self.prompts.values())
        self.network = load_pairs(encoder, pretrained, pairs).to(device)
        digest = hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:SHORT_HASH]
        self.identity = f'CLIP {self.network.identity} prompts {digest}'

    def __call__(self, image: Image.Image) -> dict[str, float]:
        """An RGB photograph of any size -> attribute -> value in [0, 1].

        Raises:
            ValueError: if the image isn't RGB.
        """
        values = self.network.of_images([image])[0].tolist()
        return dict(zip(ATTRIBUTES, values, strict=True))

    @torch.inference_mode()
    def batch(self, images: Tensor) -> Tensor:
        """(N, 3 or 1, H, W) in [0, 1] -> (N, 5), columns in the order of `ATTRIBUTES`.

        The same values as one by one, to a rounding of the floating-point numbers; on
        the labeller's device.
        """
        values: Tensor = self.network(images)
        return values

    def __repr__(self) -> str:
        return f'{type(self).__name__}({self.identity!r})'


def _weights(
    encoder: str, pretrained: str | Path | Weights | None
) -> str | Path | Weights | None:
    """CLIP's own file in the weights folder in place of the tag, if there is one."""
    released = (ENCODER, RELEASED[CLIP_METRIC]['pretrained'])
    file = find_weights(CLIP_METRIC) if (encoder, pretrained) == released else None
    if file is None:
        return pretrained
    weights = read_weights(file)
    # What this package has published is without the text tower.
    return pretrained if 'config' in weights.metadata else weights


def _check_preprocessing(visual: nn.Module, encoder: str) -> None:
    ours = {'mean': CLIP_MEAN, 'std': CLIP_STD, 'resize_mode': ('shortest',)}
    wanted: Mapping[str, Any] = getattr(visual, 'preprocess_cfg', {})
    for key, value in ours.items():
        other = wanted.get(key, value)
        other = (other,) if isinstance(other, str) else tuple(other)
        if other != value:
            raise ValueError(
                f"`encoder` must have CLIP's preprocessing ({key} {value}), but "
                f'{encoder} has {other}.'
            )


def _rgb(image: Image.Image) -> Image.Image:
    if not isinstance(image, Image.Image) or image.mode != 'RGB':
        got = getattr(image, 'mode', type(image).__name__)
        raise ValueError(
            f'`image` must be an RGB image of Pillow, but got {got}. '
            '`pyiqa_clipkd.images.read_photograph` gives one.'
        )
    return image
