"""A map from one look of a convolutional encoder at the whole; needs torch."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pyiqa_clipkd.images import BYTE
from pyiqa_clipkd.maps.windows import QualityMap, starts, whole_score
from pyiqa_clipkd.scoring.backends import Backend, TorchBackend
from pyiqa_clipkd.scoring.core import finite
from pyiqa_clipkd.scoring.reading import in_order
from pyiqa_clipkd.stages import deviation

# Large photographs are seen in tiles, for the memory that the first layers take, with
# so many pixels more on each side, so that no seams show. Multiples of the usual cells.
TILE, MARGIN = 1024, 192

# Windows that are scored at once.
WINDOWS = 4096

# Side of the photograph that shows whether an encoder allows a coarse map.
PROBE = 128


def coarse_map(
    image: Image.Image,
    backend: Backend,
    *,
    window: int,
    stride: int | None,
    workers: int,
) -> QualityMap:
    """The arguments of `quality_map`, checked, with an RGB image.

    Raises:
        ValueError: if the backend or its encoder allows no coarse map.
    """
    if not isinstance(backend, TorchBackend):
        raise ValueError(
            f'`coarse` needs the torch backend, but got {backend.name}: '
            'create_backend(metric, kind="torch"), or --backend torch.'
        )
    cell = _cell(backend)
    cells = _cells(image, backend, cell, workers)
    rows, columns = cells.shape[-2:]
    side = min(max(1, round(window / cell)), rows, columns)
    step = min(max(1, round((stride or cell) / cell)), side)
    tops, lefts = starts(rows, side, step), starts(columns, side, step)
    with torch.inference_mode():
        means = F.avg_pool2d(cells, side, 1)[:, tops][:, :, lefts]
        parts = means.flatten(1).T.split(WINDOWS)
        looks = (_embeddings(part, backend) for part in parts)
        scores = torch.cat([backend.network.head(x).score for x in looks]).cpu().numpy()
    return QualityMap(
        finite(scores.reshape(len(tops), len(lefts))),
        tops * cell,
        lefts * cell,
        side * cell,
        step * cell,
        image.width,
        image.height,
        whole_score(image, backend),
    )


def _cell(backend: TorchBackend) -> int:
    """Pixels of the photograph along the side of one place of the last feature map.

    Raises:
        ValueError: if the encoder's features are no mean over such places.
    """
    probe = torch.rand(1, 3, PROBE, PROBE, generator=torch.Generator().manual_seed(0))
    probe = probe.to(backend.device)
    encoder: Any = backend.network.encoder
    try:
        with torch.inference_mode():
            features = encoder.backbone.forward_features(probe)
            pooled = encoder.backbone(probe)
    except (AttributeError, AssertionError, RuntimeError):  # or one size only
        features = pooled = probe[0]
    fits = features.dim() == 4 and features.shape[:2] == pooled.shape
    if not fits or not torch.allclose(features.mean((2, 3)), pooled, 1e-3, 1e-4):
        raise ValueError(
            f'`coarse` needs an encoder whose features are the mean of a map that it '
            f'makes of photographs of any size, as efficientnet_lite, efficientnet, '
            f'resnet18 and mobilevit have; {backend.metric} has none.'
        )
    return PROBE // features.shape[-1]


def _embeddings(means: Tensor, backend: TorchBackend) -> Tensor:
    """Means over windows of what `_look` gives, (M, C) -> embeddings (M, D)."""
    encoder: Any = backend.network.encoder
    if encoder.readout is None:
        return means
    readout = encoder.readout
    embeddings, moments = means.tensor_split([encoder.embed_dim], 1)
    parts = readout.parts(moments)
    found = []
    for usual, mean, square in zip(
        readout.usual_means(), parts[::2], parts[1::2], strict=True
    ):
        found += [mean + usual, deviation(square - mean * mean)]
    return embeddings + readout.of_statistics(torch.cat(found, 1))


def _cells(
    image: Image.Image, backend: TorchBackend, cell: int, workers: int
) -> Tensor:
    """(C, rows, columns): what `_look` gives, of cells that cover the photograph."""
    rows, columns = (-(-side // cell) for side in (image.height, image.width))
    step = TILE // cell
    corners = list(product(range(0, rows, step), range(0, columns, step)))

    def look(corner: tuple[int, int]) -> Tensor:
        top, left = corner
        bottom, right = min(top + step, rows), min(left + step, columns)
        # In cells, with the margin as far as the photograph has it.
        margin = MARGIN // cell
        box = (
            max(left - margin, 0),
            max(top - margin, 0),
            min(right + margin, columns),
            min(bottom + margin, rows),
        )
        found = _look(backend, _pixels(image, box, cell))
        return found[
            :,
            top - box[1] : bottom - box[1],
            left - box[0] : right - box[0],
        ]

    result = torch.empty(0)
    looks = in_order(look, corners, workers, 4 * workers)
    for (top, left), part in zip(corners, looks, strict=True):
        if not result.numel():
            result = part.new_empty(len(part), rows, columns)
        result[:, top : top + part.shape[1], left : left + part.shape[2]] = part
    return result


def _pixels(image: Image.Image, box: tuple[int, int, int, int], cell: int) -> Tensor:
    """(1, 3, H, W) in [0, 1] of whole cells; beyond the photograph, a mirror image."""
    left, top, right, bottom = (side * cell for side in box)
    inside = (left, top, min(right, image.width), min(bottom, image.height))
    pixels = np.asarray(image.crop(inside)).astype(np.float32) / BYTE
    beyond = ((0, bottom - inside[3]), (0, right - inside[2]), (0, 0))
    pixels = np.pad(pixels, beyond, 'symmetric')
    return torch.from_numpy(pixels.transpose(2, 0, 1))[None]


def _look(backend: TorchBackend, pixels: Tensor) -> Tensor:
    """(1, 3, H, W) in [0, 1] -> (C, rows, columns), C numbers of each cell.

    These are embeddings (the projection is linear: that of a mean is the mean of those
    here), and for a readout of the stages, of each of their channels and its square,
    the mean. Channels are seen from their usual mean: of a nearly constant one, that
    lies far from 0, the square would tell nothing in float32.
    """
    network = backend.network
    encoder: Any = network.encoder
    with torch.inference_mode():
        mean, std = network.preprocessing.mean, network.preprocessing.std
        pixels = (pixels.to(backend.device) - mean) / std
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        if encoder.readout is None:
            features = encoder.backbone.forward_features(pixels)
            maps = []
        else:
            features, maps = encoder.backbone.forward_intermediates(pixels)
            maps = [
                values - usual[:, None, None]
                for values, usual in zip(
                    encoder.readout.seen(maps),
                    encoder.readout.usual_means(),
                    strict=True,
                )
            ]
        embeddings = encoder.projection(features[0].movedim(0, -1)).movedim(-1, 0)
        shape = embeddings.shape[-2:]
        parts = [embeddings]
        for values in maps:
            means = (F.adaptive_avg_pool2d(x, shape)[0] for x in (values, values**2))
            parts += means
        return torch.cat(parts)
