"""How far the scores of an exported model are from those of its network."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pyiqa_clipkd.description import KEY, ONNX, PHOTOGRAPHS, Description
from pyiqa_clipkd.images import UnreadableError, read_photograph, squares
from pyiqa_clipkd.network import QualityNetwork
from pyiqa_clipkd.runtime import Runtime

# Photographs that ship with scikit-image, which pyiqa needs.
SHIPPED = (
    *('astronaut.png', 'brick.png', 'camera.png', 'chelsea.png', 'clock_motion.png'),
    *('coffee.png', 'coins.png', 'grass.png', 'gravel.png', 'moon.png'),
    *('motorcycle_left.png', 'motorcycle_right.png', 'rocket.jpg'),
)


class Differences(NamedTuple):
    """Between two ways to score the same photographs, in points of the scale [1, 5].

    Attributes:
        median, maximum: of the absolute difference.
        photographs: how many.
    """

    median: float
    maximum: float
    photographs: int

    @classmethod
    def of(cls, scores: Sequence[float], expected: Sequence[float]) -> Differences:
        """Between `scores` and those `expected`."""
        apart = np.abs(np.subtract(scores, expected))
        return cls(float(np.median(apart)), float(apart.max()), len(apart))

    def __str__(self) -> str:
        return (
            f'on {self.photographs} photographs scores differ by {self.median:.4f} in '
            f'the median, {self.maximum:.4f} at most'
        )


def check_photographs(folder: str | Path | None = None) -> list[Path]:
    """The image files of a folder, or the photographs that ship with scikit-image.

    Raises:
        ValueError: if there are less than two.
    """
    if folder is not None:
        known = Image.registered_extensions()
        inside = sorted(Path(folder).expanduser().iterdir())
        files = [path for path in inside if path.suffix.lower() in known]
    else:
        spec = importlib.util.find_spec('skimage')
        where = Path(spec.origin).parent if spec and spec.origin else Path()
        files = [where / 'data' / name for name in SHIPPED]
        files = [path for path in files if path.is_file()]
    if len(files) < 2:
        raise ValueError(
            f'The check needs two photographs or more, but {folder or "scikit-image"} '
            f'has {len(files)}: give a folder with `--check`.'
        )
    return files


def without_unreadable(
    files: Sequence[Path],
) -> tuple[list[Path], list[UnreadableError]]:
    """The files that can be read, and what is wrong with the others.

    Raises:
        ValueError: if there are less than two.
    """
    good, errors = [], []
    for path in files:
        try:
            _read(path)
        except UnreadableError as error:
            errors.append(error)
        else:
            good.append(path)
    if len(good) < 2:
        raise ValueError(
            f'The check needs two photographs or more, but {files[0].parent} has '
            f'{len(good)} that can be read: {"; ".join(map(str, errors))}.'
        )
    return good, errors


def _read(path: Path) -> Image.Image:
    try:
        return read_photograph(path).image
    except UnreadableError as error:
        raise UnreadableError(f'{path}: {error}') from error


def model_input(path: Path, description: Description) -> np.ndarray:
    """A photograph as a batch of one, as the model takes it."""
    image = _read(path)
    if description.input == PHOTOGRAPHS:
        return np.asarray(image)[None]
    return squares(image, description.input_size)


def differences(
    network: QualityNetwork, model: Path, files: Sequence[Path]
) -> Differences:
    """Between an exported file and the network in torch, resized by torch."""
    score = _onnx_scorer(model) if model.suffix == ONNX else _torch_scorer(model)
    expected = [eager_score(network, path) for path in files]
    return Differences.of([score(path) for path in files], expected)


@torch.inference_mode()
def attribute_move(
    network: QualityNetwork, model: Path, files: Sequence[Path]
) -> float:
    """How far an attribute of an ONNX model is from the network's, at most."""
    runtime = Runtime(model, attributes=True)
    moves = []
    for path in files:
        found = runtime.score(path).attributes
        _, why = network(_pixels(path), return_attributes=True)
        moves += [abs(found[name] - value) for name, value in why.named()[0].items()]
    return max(moves)


@torch.inference_mode()
def eager_score(network: QualityNetwork, path: Path) -> float:
    """The score of a photograph by torch alone."""
    return float(network(_pixels(path)))


def _pixels(path: Path) -> Tensor:
    """(1, 3, H, W) in [0, 1]."""
    pixels = torch.from_numpy(np.array(_read(path)))
    return pixels.permute(2, 0, 1)[None].float() / 255


def _onnx_scorer(model: Path) -> Callable[[Path], float]:
    runtime = Runtime(model)
    return lambda path: runtime.score(path).score


def _torch_scorer(model: Path) -> Callable[[Path], float]:
    notes = {KEY: ''}
    program = torch.export.load(model, extra_files=notes)
    description, module = Description.decode(notes[KEY]), program.module()

    @torch.inference_mode()
    def score(path: Path) -> float:
        outputs: Sequence[Tensor] = module(
            torch.from_numpy(model_input(path, description).copy())
        )
        return float(outputs[0])

    return score
