"""What an exported model says of itself: numpy-free, torch-free, for both sides."""

from __future__ import annotations

import json
from typing import NamedTuple

ONNX = '.onnx'

# Key of our JSON text in the metadata of ONNX and safetensors files, and its name in a
# .pt2 file.
KEY = 'pyiqa_clipkd'

# Precision of a graph whose weights are in the weight file beside it.
EXTERNAL = 'external'

# What a model takes. Squares: float32 (N, 3, S, S) in [0, 1], resized by the caller.
# Photographs: uint8 (N, H, W, 3) RGB of any size, resized inside.
SQUARES, PHOTOGRAPHS = 'squares', 'photographs'
FORMS = (PHOTOGRAPHS, SQUARES)

# Side in pixels of the squares of a network that comes from a file: memory for one goes
# with its area. The largest that are known to us see 1,024.
LARGEST_INPUT = 2048
INPUT_NAMES = {SQUARES: 'squares', PHOTOGRAPHS: 'image'}
SCORE, PROBABILITIES, ATTRIBUTES = 'score', 'probabilities', 'attributes'


class Description(NamedTuple):
    """A model's description of itself.

    Attributes:
        metric: name of the metric, or empty.
        input: `squares` or `photographs`.
        input_size: side in pixels of the square that the encoder sees.
        levels: words for quality, worst first.
        weights: name of the weight file it was made of, or empty.
        sha256: of that file, 64 digits, or empty.
        precision: `float32`, `float16`, `int8`, or `external`: the weights are not in
            the model but in the weight file, which must lie beside it.
        version: of our package when it was made.
        attributes: names of the values of the output `attributes`, if there is one.
        heads_sha256: of the file of attribute heads that an `external` model reads, 64
            digits, or empty.
    """

    metric: str
    input: str
    input_size: int
    levels: tuple[str, ...]
    weights: str
    sha256: str
    precision: str
    version: str
    attributes: tuple[str, ...] = ()
    heads_sha256: str = ''

    def encode(self) -> str:
        """As JSON text."""
        return json.dumps(self._asdict())

    @classmethod
    def decode(cls, text: str) -> Description:
        """The inverse of `encode`.

        Raises:
            ValueError: if it is no such text.
        """
        try:
            values = json.loads(text)
            values['levels'] = tuple(values['levels'])
            values['attributes'] = tuple(values.get('attributes', ()))
            description = cls(**values)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f'no description of a model: {error}') from error
        description._check()
        return description

    def _check(self) -> None:
        """The text comes from whoever made the file.

        Raises:
            ValueError: if a value can't be.
        """
        words = [*self.levels, *self.attributes]
        plain = [self.metric, self.weights, self.sha256, self.precision, self.version]
        for name, fits in {
            'input': self.input in FORMS,
            'input_size': type(self.input_size) is int
            and 1 <= self.input_size <= LARGEST_INPUT,
            'levels': len(self.levels) <= 100 and all(type(w) is str for w in words),
            'weights': all(type(text) is str for text in [*plain, self.heads_sha256]),
        }.items():
            if not fits:
                value = repr(getattr(self, name))[:80]
                raise ValueError(f'no description of a model: `{name}` is {value}')
        if not is_plain_name(self.weights) and self.weights:
            raise ValueError(
                f'no description of a model: `weights` must lie beside it, but got '
                f'{self.weights[:80]!r}'
            )


def is_plain_name(name: str) -> bool:
    """Whether it names a file in a folder, and no other folder."""
    odd = ('', '.', '..')
    return name not in odd and not any(c in name for c in '/\\\0')
