"""Networks as they are exported: plain tensors in, plain tensors out."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyiqa_clipkd.description import SQUARES
from pyiqa_clipkd.geometry import LONGEST_STRIP
from pyiqa_clipkd.network import QualityNetwork
from pyiqa_clipkd.weights import unpack_int8

# Score (N,), probabilities (N, L) but of a regression head, attributes (N, 5) of a
# network that has heads for them.
Outputs = tuple[Tensor, ...]

# Of a photograph's sides in a .pt2 file, and of a batch.
LARGEST = 65_535

# While tracing, no two sizes may be alike, or be taken for a fixed one.
TRACED_BATCH, TRACED_HEIGHT, TRACED_WIDTH = 2, 300, 451


class SquaresNetwork(nn.Module):
    """float32 (N, 3, S, S) in [0, 1] -> `Outputs`."""

    def __init__(self, network: QualityNetwork, attributes: bool) -> None:
        super().__init__()
        self.network = network
        self.attributes = attributes

    def forward(self, squares: Tensor) -> Outputs:
        # A square of its own size passes the network's preprocessing unchanged.
        return _outputs(self, squares)


class PhotographsNetwork(nn.Module):
    """uint8 RGB (N, H, W, 3) of any size -> `Outputs`."""

    def __init__(self, network: QualityNetwork, attributes: bool) -> None:
        super().__init__()
        self.network = network
        self.attributes = attributes

    def forward(self, image: Tensor) -> Outputs:
        pixels = image.permute(0, 3, 1, 2).float() / 255
        squares = resize_and_crop(pixels, self.network.preprocessing.input_size)
        return _outputs(self, squares)


class StoredNetwork(nn.Module):
    """As `SquaresNetwork`, with the tensors of a weight file as a second input.

    So they stay whole and keep their names when the graph is simplified, and can be
    read from the weight file when the model is loaded. Precisions as in the file.
    """

    def __init__(self, network: QualityNetwork, attributes: bool) -> None:
        super().__init__()
        self.network = network
        self.attributes = attributes

    def forward(self, squares: Tensor, stored: Mapping[str, Tensor]) -> Outputs:
        tensors = {name: t.float() for name, t in unpack_int8(stored).items()}
        return _outputs(self, squares, tensors)


def _outputs(
    module: Any, squares: Tensor, tensors: Mapping[str, Tensor] | None = None
) -> Outputs:
    """What a network says, with `tensors` instead of its own where they are given."""
    wanted = {'return_details': True, 'return_attributes': module.attributes}
    if tensors is None:
        result = module.network(squares, **wanted)
    else:
        result = torch.func.functional_call(
            module.network, dict(tensors), (squares,), wanted
        )
    output, attributes = result if module.attributes else (result, None)
    parts = (
        output.score[:, 0],
        output.probabilities,
        attributes.values if attributes else None,
    )
    return tuple(part for part in parts if part is not None)


class _Half(nn.Module):
    """An encoder in half precision between float32 preprocessing and head."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder: Any = encoder.half()

    def forward(self, img: Tensor) -> Tensor:
        return self.encoder(img.half()).float()

    def forward_with_maps(self, img: Tensor) -> tuple[Tensor, list[Tensor]]:
        embedding, maps = self.encoder.forward_with_maps(img.half())
        return embedding.float(), maps


def half(network: QualityNetwork) -> QualityNetwork:
    """A copy with its encoder in half precision; it takes and gives float32."""
    network = copy.deepcopy(network)
    network.encoder = _Half(network.encoder)
    return network


def resize_and_crop(img: Tensor, size: int) -> Tensor:
    """`preprocessing.resize_and_crop` without a decision that depends on the shape.

    Decisions are taken once, when a graph is traced, for the photograph of that moment.
    What the other one spares is done here always; it changes nothing (a resize to the
    same size gives the same pixels).
    """
    # While tracing these are symbols that look like whole numbers.
    height: Any
    width: Any
    height, width = img.shape[-2:]
    longest = LONGEST_STRIP * torch.sym_min(height, width)
    height, width = torch.sym_min(height, longest), torch.sym_min(width, longest)
    img = _central(_central(img, -2, height), -1, width)
    short = torch.sym_min(height, width)
    wide = size * width // short
    for shape in ((height, wide), (size * height // short, wide)):
        img = F.interpolate(
            img, shape, mode='bicubic', align_corners=False, antialias=True
        ).clamp(0, 1)
    return _central(_central(img, -2, size), -1, size)


def _central(img: Tensor, side: int, count: int) -> Tensor:
    """The central `count` pixels along a side.

    In whole numbers `geometry.centre`, which rounds halves to even; by an index, for a
    slice would fix the order of its ends.
    """
    spare = img.shape[side] - count
    first = (spare + spare // 2 % 2) // 2
    return img.index_select(side, first + torch.arange(count, device=img.device))


def traced(
    network: QualityNetwork, form: str, *, attributes: bool = False
) -> torch.export.ExportedProgram:
    """The network as one graph, for any batch and, of photographs, any size.

    Args:
        network: in evaluation mode, on the CPU, without crops.
        form: `squares` or `photographs`.
        attributes: whether to give these, too.
    """
    batch = torch.export.Dim('batch', min=1, max=LARGEST)
    size = network.preprocessing.input_size
    if form == SQUARES:
        module: nn.Module = SquaresNetwork(network, attributes)
        example = torch.zeros(TRACED_BATCH, 3, size, size)
        shapes = {0: batch}
    else:
        module = PhotographsNetwork(network, attributes)
        shape = (TRACED_BATCH, TRACED_HEIGHT, TRACED_WIDTH, 3)
        example = torch.zeros(shape, dtype=torch.uint8)
        sides = (torch.export.Dim(s, min=1, max=LARGEST) for s in ('height', 'width'))
        shapes = {0: batch, **dict(enumerate(sides, start=1))}
    return _export(module, (example,), (shapes,))


def traced_without_weights(
    network: QualityNetwork,
    stored: Mapping[str, Tensor],
    *,
    attributes: bool = False,
) -> torch.export.ExportedProgram:
    """The network of squares as a graph whose further inputs are `stored`, in order."""
    size = network.preprocessing.input_size
    example = (torch.zeros(TRACED_BATCH, 3, size, size), dict(stored))
    batch = torch.export.Dim('batch', min=1, max=LARGEST)
    shapes = ({0: batch}, dict.fromkeys(stored))
    return _export(StoredNetwork(network, attributes), example, shapes)


def _export(
    module: nn.Module, example: tuple, shapes: tuple
) -> torch.export.ExportedProgram:
    module.eval().requires_grad_(False)
    return torch.export.export(module, example, dynamic_shapes=shapes)
