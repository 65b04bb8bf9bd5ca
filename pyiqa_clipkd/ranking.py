"""Degradation ranking: a damaged copy scores lower, a harmless change nothing.

No human has scored the copies. What is sure is their order: a photograph is better than
its damaged copy, and that better than one damaged more. And a mirrored or slightly
moved photograph is as good as it was.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import default_collate

from pyiqa_clipkd.degradations import DISTORTIONS, LEVELS, degrade

# A photograph gives these copies: one moved, one damaged, one damaged more.
COPIES = 3
MILDEST = 0.5


class RankingViews(NamedTuple):
    """Copies of the first n images of a batch.

    Attributes:
        images: (3n, 3, H, W): n moved, n damaged, n damaged more.
        levels: (n, 2), how much the damaged ones were.
    """

    images: Tensor
    levels: Tensor


class DegradationRankingLoss(nn.Module):
    """Margin ranking of damaged copies, and equal scores of moved ones.

    .. math:: L = w \\left( [m l_1 + s_1 - s]_+ + [m (l_2 - l_1) + s_2 - s_1]_+
              + v |s_0 - s| \\right)

    with the scores s of a photograph, s_1 and s_2 of its damaged copies at the levels
    l_1 < l_2 (up to 6) of one of `DISTORTIONS`, and s_0 of a copy that is mirrored,
    moved by up to `shift` pixels, and a little larger or smaller.

    Args:
        weight: w, of the whole.
        margin: m, points of the score that a level costs at least.
        stability: v.
        share: of the batch that gets copies, in (0, 1].
        shift: pixels.
        zoom: the moved copy is enlarged by a factor in [1 - zoom, 1 + zoom]; zoom < 1.

    Raises:
        ValueError: if an argument isn't allowed.
    """

    def __init__(
        self,
        weight: float = 1.0,
        margin: float = 0.05,
        stability: float = 1.0,
        share: float = 0.25,
        shift: int = 8,
        zoom: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value in (
            ('weight', weight),
            ('margin', margin),
            ('stability', stability),
            ('shift', shift),
            ('zoom', zoom),
        ):
            if value < 0:
                raise ValueError(f'`{name}` must be >= 0, but got {value}.')
        if zoom >= 1:
            raise ValueError(f'`zoom` must be < 1, but got {zoom}.')
        if not 0 < share <= 1:
            raise ValueError(f'`share` must be in (0, 1], but got {share}.')
        self.weight = weight
        self.margin = margin
        self.stability = stability
        self.share = share
        self.shift = shift
        self.zoom = zoom

    def views(self, img: Tensor, seed: int) -> RankingViews:
        """Draw the copies of a batch (N, 3, H, W) with values in [0, 1].

        The same seed draws the same.
        """
        draw = np.random.default_rng(seed)
        chosen = img[: max(1, round(self.share * len(img)))]
        moved = [self.moved(one, draw) for one in chosen]
        n = len(chosen)
        kinds = [list(DISTORTIONS)[k] for k in draw.integers(len(DISTORTIONS), size=n)]
        levels = np.sort(draw.uniform(MILDEST, LEVELS, (n, 2)))
        noises = [int(noise) for noise in draw.integers(2**32, size=n)]
        photographs = [_to_image(one) for one in chosen.cpu()]
        damaged = [
            _to_tensor(one)
            for level in levels.T
            for one in map(degrade, photographs, kinds, level, noises)
        ]
        images = torch.cat([torch.stack(moved), torch.stack(damaged).to(img)])
        return RankingViews(images, torch.tensor(levels).to(img))

    def moved(self, img: Tensor, draw: np.random.Generator) -> Tensor:
        """Mirrored half of the times, zoomed, and moved; the border is repeated."""
        if draw.random() < 0.5:
            img = img.flip(-1)
        left, top = draw.integers(0, 2 * self.shift + 1, 2)
        height, width = img.shape[-2:]
        if self.zoom:
            img = _zoomed(img, draw.uniform(1 - self.zoom, 1 + self.zoom))
        # All around: what a smaller copy lacks, what a larger one has too much.
        rows, columns = height - img.shape[-2], width - img.shape[-1]
        around = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
        padding = [side + self.shift for side in around]
        padded = F.pad(img[None], padding, mode='replicate')[0]
        return padded[:, top : top + height, left : left + width]

    def forward(self, score: Tensor, copies: Tensor, levels: Tensor) -> Tensor:
        """The loss of scores (N, 1) and those of the copies (3n, 1): a scalar >= 0."""
        moved, mild, severe = copies.flatten().chunk(COPIES)
        score = score.flatten()[: len(moved)]
        first, second = levels.unbind(1)
        ranking = F.relu(self.margin * first + mild - score)
        ranking = ranking + F.relu(self.margin * (second - first) + severe - mild)
        return self.weight * (ranking + self.stability * (moved - score).abs()).mean()


class BatchWithCopies:
    """Collates a batch with the copies of its images, in the loader's processes.

    To the host's batch it adds `copies` and `levels` (see `RankingViews`). The batch
    must have a `seed` for each image; that of the first draws the copies.

    Args:
        loss: whose `views` they are.
    """

    def __init__(self, loss: DegradationRankingLoss) -> None:
        self.loss = loss

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = default_collate(items)
        batch['copies'], batch['levels'] = self.loss.views(
            batch['img'], int(batch['seed'][0])
        )
        return batch


def _zoomed(img: Tensor, factor: float) -> Tensor:
    """(3, H, W) in [0, 1], resized."""
    size = [max(1, round(side * factor)) for side in img.shape[-2:]]
    resized = F.interpolate(img[None], size, mode='bicubic', antialias=True)[0]
    return resized.clamp(0, 1)


def _to_image(img: Tensor) -> Image.Image:
    pixels = (img.detach() * 255).round().clamp(0, 255).byte()
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
