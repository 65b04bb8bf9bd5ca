"""Attributes of a metric's own features: small heads on an encoder that stays as it is.

The encoder has seen the photograph for its score; what it saw on the way says why.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyiqa_clipkd.attributes.names import ATTRIBUTES, faults, named_attributes
from pyiqa_clipkd.files import SHORT_HASH, file_hash
from pyiqa_clipkd.head import in_full_precision
from pyiqa_clipkd.locations import attributes_file, check_bundled, state_sum
from pyiqa_clipkd.stages import statistics
from pyiqa_clipkd.weights import check_numbers, read_weights, write_weights

logger = logging.getLogger('pyiqa')


@dataclass(frozen=True)
class AttributeValues:
    """Five attributes of N photographs.

    Args:
        values: (N, 5) in [0, 1], in the order of `ATTRIBUTES`; 1 is always the good
            side, of `noisiness` free of noise.
    """

    values: Tensor

    def named(self) -> list[dict[str, float]]:
        """attribute -> value, of each photograph."""
        return [named_attributes(row) for row in self.values.detach().tolist()]

    def faults(self) -> list[list[str]]:
        """What is wrong with each photograph: `['too dark', 'noisy']`."""
        return [faults(row) for row in self.named()]


class AttributeReadout(nn.Module):
    """Mean and deviation of each channel of an encoder's maps -> five attributes.

    .. math:: p = \\sigma(W_2 \\max(W_1 [\\mu_c, \\sigma_c]_c + b_1, 0) + b_2)

    Its tensors are no part of the network's state: weights stay what they are with and
    without it, and no optimizer sees it.

    Args:
        channels: of the maps that it looks at: the first ones of an encoder.
        width: of the hidden layer.
    """

    hidden_weight: Tensor
    hidden_bias: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(self, channels: Sequence[int], width: int = 64) -> None:
        super().__init__()
        self.channels = tuple(channels)
        shapes = {
            'hidden_weight': (width, 2 * sum(self.channels)),
            'hidden_bias': (width,),
            'weight': (len(ATTRIBUTES), width),
            'bias': (len(ATTRIBUTES),),
        }
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape), persistent=False)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (N, C_i, H_i, W_i) -> (N, 5) in [0, 1], in the order of `ATTRIBUTES`.

        There may be more maps than it looks at.
        """
        return self.of_statistics(statistics(maps[: len(self.channels)]))

    def of_statistics(self, features: Tensor) -> Tensor:
        """`statistics` of maps, (N, 2 * sum of C_i) -> (N, 5) in [0, 1]."""
        features, full_precision = in_full_precision(features)
        with full_precision:
            first, last = (
                (weight.to(features), bias.to(features))
                for weight, bias in (
                    (self.hidden_weight, self.hidden_bias),
                    (self.weight, self.bias),
                )
            )
            return F.linear(F.linear(features, *first).relu(), *last).sigmoid()

    def tensors(self) -> dict[str, Tensor]:
        """Its numbers by name, as they are in the file."""
        return dict(self.named_buffers())

    @torch.no_grad()
    def set(self, tensors: Mapping[str, Tensor]) -> AttributeReadout:
        """Take over `tensors`; returns itself.

        Raises:
            ValueError: if names or shapes differ.
        """
        own = self.tensors()
        wrong = [
            name
            for name in own.keys() | tensors.keys()
            if name not in tensors
            or name not in own
            or tensors[name].shape != own[name].shape
        ]
        if wrong:
            raise ValueError(f'attribute heads have another {", ".join(sorted(wrong))}')
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
        return self


def write_readout(
    readout: AttributeReadout, weights: Path, metadata: Mapping[str, Any]
) -> Path:
    """Write attribute heads beside the weight file that they belong to.

    Args:
        readout: the heads.
        weights: a published weight file.
        metadata: what a reader should know of them.
    """
    width = len(readout.hidden_bias)
    stored = {
        name: tensor.half() if tensor.dim() > 1 else tensor
        for name, tensor in readout.tensors().items()
    }
    path = write_weights(
        attributes_file(weights),
        stored,
        {
            'config': {'channels': readout.channels, 'width': width},
            'belongs_to': file_hash(weights),
            **metadata,
        },
    )
    state_sum(path)
    return path


def find_readout(weights: Path) -> AttributeReadout | None:
    """The attribute heads beside a weight file; `None` if it has none.

    Heads of other weights are left alone, with a warning in the log.

    Raises:
        ValueError: if the file is damaged.
    """
    path = attributes_file(weights)
    if not path.is_file():
        return None
    stored = read_weights(path)
    check_bundled(path, file_hash(path))
    digest = file_hash(weights)
    if stored.metadata.get('belongs_to') != digest:
        logger.warning(
            f'{path} belongs to other weights than {weights.name} (SHA-256 '
            f'{digest[:SHORT_HASH]}): there are no attributes.'
        )
        return None
    try:
        config = stored.metadata['config']
        check_numbers(stored.tensors, stored.metadata, path)
        # Before anything is built: a file may claim any size.
        wide = (config['width'], 2 * sum(config['channels']))
        if tuple(stored.tensors['hidden_weight'].shape) != wide:
            raise ValueError('attribute heads have another hidden_weight')
        readout = AttributeReadout(**config)
        return readout.set({n: t.float() for n, t in stored.tensors.items()})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f'{path} is damaged or holds no heads ({error}).') from error
