"""CLIP's preprocessing on tensors: one place, differentiable, for every image size."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyiqa_clipkd.geometry import (
    centre,
    crop_corners,
    in_unit_range,
    resized_shape,
    strip_shape,
)

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def check_images(img: Tensor) -> Tensor:
    """Return `img` as float (N, 3, H, W), or say what is wrong with it.

    Args:
        img: (N, 3, H, W) or gray (N, 1, H, W), floating point, values in [0, 1].

    Raises:
        TypeError: if `img` isn't a floating-point tensor.
        ValueError: if the shape isn't (N, 3 or 1, H, W) or a side is empty; or if
            values are NaN or outside [0, 1], where no gradients are recorded.
    """
    if not isinstance(img, Tensor):
        raise TypeError(f'`img` must be a torch.Tensor, but got {type(img).__name__}.')
    if img.dim() != 4 or img.shape[1] not in (1, 3) or 0 in img.shape:
        raise ValueError(
            '`img` must have the shape (N, 3 or 1, H, W) without empty sides, '
            f'but got {tuple(img.shape)}.'
        )
    if not img.is_floating_point():
        raise TypeError(
            f'`img` must be floating point with values in [0, 1], but got {img.dtype}. '
            'For 8-bit images use `img.float() / 255`.'
        )
    _check_values(img)
    return img.expand(-1, 3, -1, -1)


def _check_values(img: Tensor) -> None:
    """Not in trainings, which would wait for a GPU, nor where a graph is recorded."""
    recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if torch.is_grad_enabled() or recorded or img.is_meta:
        return
    low, high = (limit.item() for limit in img.aminmax())
    if not in_unit_range(low, high):
        raise ValueError(
            f'`img` must be in [0, 1], but got values from {low:g} to {high:g}. '
            'Of 0 to 255 take `img / 255`, of -1 to 1 `(img + 1) / 2`, and clamp.'
        )


def _center_crop(img: Tensor, height: int, width: int) -> Tensor:
    top, left = centre(img.shape[-2], height), centre(img.shape[-1], width)
    return img[..., top : top + height, left : left + width]


def resize_and_crop(img: Tensor, size: int) -> Tensor:
    """Shorter side to `size` (bicubic, antialiased), then the central square.

    An image that already is `size` x `size` is returned as it is.

    Args:
        img: (N, C, H, W), floating point, values in [0, 1].
        size: side of the square in pixels.

    Returns:
        (N, C, size, size), values in [0, 1].
    """
    img = _center_crop(img, *strip_shape(*img.shape[-2:]))
    height, width = img.shape[-2:]
    if min(height, width) != size:
        rows, (height, width) = height, resized_shape(height, width, size)
        # Along the rows, then along the columns, as PIL does: it also cuts what goes
        # beyond black and white after the first pass.
        for shape in ((rows, width), (height, width)):
            img = F.interpolate(
                img, shape, mode='bicubic', align_corners=False, antialias=True
            ).clamp(0, 1)
    if (height, width) != (size, size):
        img = _center_crop(img, size, size)
    return img


def native_crops(img: Tensor, size: int, count: int) -> Iterator[Tensor]:
    """Squares of the image as it is, without a resize.

    Their places fill the image evenly and depend on its size alone: the first is the
    centre, and more of them never move the ones before (a low-discrepancy sequence).

    Args:
        img: (N, C, H, W).
        size: side of the squares; the shorter side of a smaller image.
        count: how many. None come from an image that one square fills.

    Yields:
        (N, C, size, size).
    """
    height, width = img.shape[-2:]
    side = min(size, height, width)
    if side == height == width:
        return
    for top, left in crop_corners(height, width, side, count):
        yield img[..., top : top + side, left : left + side]


def light_to_the_right(img: Tensor) -> Tensor:
    """Of each image and its mirror image that whose light lies further right.

    So an image and its mirror image become one, but for those whose light is in
    balance, though they are not symmetric.

    Args:
        img: (N, C, H, W).

    Returns:
        The same shape.
    """
    columns = img.sum(2).sum(1)
    width = img.shape[-1]
    places = torch.arange(width, dtype=columns.dtype, device=columns.device)
    # Of the mirror image exactly the opposite: differences first.
    light = ((columns - columns.flip(-1)) * (places - (width - 1) / 2)).sum(-1)
    return torch.where((light < 0).view(-1, 1, 1, 1), img.flip(-1), img)


class CLIPPreprocessing(nn.Module):
    """CLIP's resize, centre crop and normalization, differentiable.

    Within 2/255 of open_clip's PIL transform on photographs (the rest is PIL's
    rounding to eight bits after each of its two passes; recent versions of PIL take
    some tall images column by column first, which moves a few of their pixels further).

    Args:
        input_size: side in pixels of the square that the encoder sees.
        mirror_invariant: turn each square, outside of training, so that its light lies
            on the right: a photograph and its mirror image look alike to the encoder.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, input_size: int = 224, mirror_invariant: bool = False) -> None:
        super().__init__()
        if type(mirror_invariant) is not bool:
            raise ValueError(
                '`mirror_invariant` must be True or False, but got '
                f'{mirror_invariant!r}.'
            )
        if not isinstance(input_size, int) or input_size < 1:
            raise ValueError(
                f'`input_size` must be a positive integer, but got {input_size!r}.'
            )
        self.input_size = input_size
        self.mirror_invariant = mirror_invariant
        for name, values in (('mean', CLIP_MEAN), ('std', CLIP_STD)):
            self.register_buffer(
                name, torch.tensor(values).view(1, 3, 1, 1), persistent=False
            )

    def forward(self, img: Tensor) -> Tensor:
        """(N, 3 or 1, H, W) in [0, 1] -> normalized (N, 3, size, size).

        Images of any float precision; the result has that of the module.
        """
        # Half precision has no antialiased resize on a CPU.
        precision = torch.promote_types(self.mean.dtype, torch.float32)
        img = resize_and_crop(check_images(img).to(precision), self.input_size)
        if self.mirror_invariant and not self.training:
            img = light_to_the_right(img)
        return ((img - self.mean) / self.std).to(self.mean.dtype)

    def extra_repr(self) -> str:
        words = f'input_size={self.input_size}'
        return f'{words}, mirror_invariant=True' if self.mirror_invariant else words
