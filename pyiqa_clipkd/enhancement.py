"""A few settings of an editor for each photograph, chosen by a tiny network.

A network that may change every pixel learns to fool the metric that it is trained with.
This one can only turn five sliders, each within limits, and at first it turns none.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyiqa_clipkd.preprocessing import check_images

# How far each setting may go to either side of what changes nothing.
MAX_STOPS = 2.5
MAX_FACTOR = 3.0  # of contrast and saturation; at least one over it

# Of a colour curve: its degree, and how much steeper than another a piece may be.
DEGREE = 6
STEEPNESS = 6.0

# The exponent of light in a file's values: a stop is 2 ** (1 / GAMMA) of a value.
GAMMA = 2.2

# Rec. 709: how bright red, green and blue look.
LUMA = (0.2126, 0.7152, 0.0722)

# What the network looks at: a square of so many pixels, and shares of the photograph
# that are darker than a luma.
THUMBNAIL = 64
QUANTILES = (0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98)

# Noise is measured in so many tiles a side; of these the plainest tenth and the middle.
TILES = 16
NOISE_QUANTILES = (0.1, 0.5)

# Channels of its layers.
WIDTHS, HIDDEN = (12, 16, 24, 32), 48

# Denoising looks so many pixels around, and smooths what varies less than so many sigma
# of the noise; a sigma below one grey level is no noise.
RADIUS = 2
SIGMAS = 2.0
LEAST_SIGMA = 1 / 255


class Settings(NamedTuple):
    """What is done to each of N photographs, in this order.

    Attributes:
        denoising: (N,) in [0, 1], the share of the way to a smoothed copy; 0 is none.
        exposure: (N,) in [-2.5, 2.5] stops more light; 0 is none.
        curves: (N, 3, 7), of red, green and blue: ascending from 0 to 1, the heights of
            a smooth curve's control points at 0, 1/6, ..., 1. Evenly spaced: unchanged.
        contrast: (N,) in [1/3, 3], the factor of distances from the mean luma.
        saturation: (N,) in [1/3, 3], the factor of distances from gray.
    """

    denoising: Tensor
    exposure: Tensor
    curves: Tensor
    contrast: Tensor
    saturation: Tensor


# Numbers that the network gives for each photograph: four and three curves.
OUTPUTS = 4 + 3 * DEGREE


def settings_from(positions: Tensor) -> Settings:
    """Positions of sliders, in their units.

    Args:
        positions: (N, 22) in [-1, 1]; zeros change nothing. Denoising has no negative
            side, but the gradient of 0 there, so that it can be left again.
    """
    denoising, exposure, contrast, saturation = positions[:, :4].unbind(1)
    steps = STEEPNESS ** (positions[:, 4:] / 2)
    steps = steps.unflatten(1, (3, DEGREE))
    heights = (steps / steps.sum(-1, keepdim=True)).cumsum(-1)
    return Settings(
        denoising + (denoising.clamp(min=0) - denoising).detach(),
        MAX_STOPS * exposure,
        F.pad(heights, (1, 0)),
        MAX_FACTOR**contrast,
        MAX_FACTOR**saturation,
    )


def enhance(img: Tensor, settings: Settings) -> Tensor:
    """Photographs as an editor with these settings shows them; differentiable.

    Args:
        img: (N, 3, H, W) or gray (N, 1, H, W), values in [0, 1], any size.
        settings: of N photographs.

    Returns:
        (N, 3, H, W) in [0, 1].

    Raises:
        TypeError: if `img` isn't floating point.
        ValueError: if its shape is another, or that of another number of photographs.
    """
    img = _in_full_precision(img)
    if len(img) != len(settings.exposure):
        raise ValueError(
            f'`settings` must be those of {len(img)} photographs, but got those of '
            f'{len(settings.exposure)}.'
        )
    denoising, exposure, contrast, saturation = (
        value.view(-1, 1, 1, 1)
        for value in (
            settings.denoising,
            settings.exposure,
            settings.contrast,
            settings.saturation,
        )
    )
    img = img + denoising * (smoothed(img, noise(img)[:, 0]) - img)
    img = (img * 2 ** (exposure / GAMMA)).clamp(0, 1)
    img = _through_curves(img, settings.curves)
    middle = luma(img).mean((2, 3), keepdim=True)
    img = middle + contrast * (img - middle)
    gray = luma(img)
    return (gray + saturation * (img - gray)).clamp(0, 1)


def luma(img: Tensor) -> Tensor:
    """(N, 3, H, W) -> (N, 1, H, W)."""
    return (img * img.new_tensor(LUMA).view(3, 1, 1)).sum(1, keepdim=True)


def _through_curves(img: Tensor, heights: Tensor) -> Tensor:
    """Bernstein's polynomial of these heights: ascending, as they are."""
    powers = (heights @ _bernstein().to(heights))[..., None, None]
    result = powers[:, :, DEGREE]
    for power in reversed(range(DEGREE)):
        result = result * img + powers[:, :, power]
    return result


def _bernstein() -> Tensor:
    """(7, 7): heights -> coefficients of the powers 0 to 6."""
    rows = [
        [
            math.comb(DEGREE, point)
            * math.comb(DEGREE - point, power - point)
            * (-1) ** (power - point)
            if power >= point
            else 0
            for power in range(DEGREE + 1)
        ]
        for point in range(DEGREE + 1)
    ]
    return torch.tensor(rows, dtype=torch.float64)


@torch.no_grad()
def noise(img: Tensor) -> Tensor:
    """Sigma of white noise, by Immerkaer's filter that neither flats nor edges pass.

    In the plainest tenth of 16 x 16 tiles, and in the middle one: detail counts as some
    noise, too, mostly in the second.

    Args:
        img: (N, 3, H, W).

    Returns:
        (N, 2), on the scale of the image.
    """
    side = img.new_tensor((1, -2, 1))
    kernel = torch.outer(side, side).expand(3, 1, 3, 3)
    padded = F.pad(img, (1, 1, 1, 1), mode='replicate')
    answer = F.conv2d(padded, kernel, groups=3).abs().mean(1, keepdim=True)
    # The norm of the kernel is 6; the mean of |x| is sqrt(2 / pi) sigma.
    tiles = F.adaptive_avg_pool2d(answer, TILES).flatten(1) * math.sqrt(math.pi / 2) / 6
    return tiles.quantile(img.new_tensor(NOISE_QUANTILES), dim=1).T


def smoothed(img: Tensor, sigma: Tensor) -> Tensor:
    """Without noise, edges as they are: the guided filter (He et al.), self-guided.

    Args:
        img: (N, 3, H, W).
        sigma: (N,), of the noise, on the scale of the image.
    """
    side = 2 * RADIUS + 1

    def mean(values: Tensor) -> Tensor:
        return F.avg_pool2d(values, side, 1, RADIUS, count_include_pad=False)

    average = mean(img)
    variance = (mean(img * img) - average**2).clamp(min=0)
    level = SIGMAS * sigma.clamp(min=LEAST_SIGMA).view(-1, 1, 1, 1)
    share = variance / (variance + level**2)
    return mean(share) * img + mean(average - share * average)


class EnhancementNetwork(nn.Module):
    """Photograph -> thumbnail -> settings -> the photograph with these settings.

    The settings come from a thumbnail, quantiles of its luma and the measured noise;
    they are carried out at full resolution. A new network changes nothing.

    17,182 parameters. No published architecture is followed; that a few global curves
    suffice to touch up photographs is the idea of HDRNet, CURL and their kin.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in pairwise((3, *WIDTHS)):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.SiLU()]
        self.features = nn.Sequential(*layers)
        measures = len(QUANTILES) + len(NOISE_QUANTILES) + 1
        sliders = nn.Linear(HIDDEN, OUTPUTS)
        nn.init.zeros_(sliders.weight)
        nn.init.zeros_(sliders.bias)
        self.head = nn.Sequential(
            nn.Linear(2 * WIDTHS[-1] + measures, HIDDEN), nn.SiLU(), sliders
        )
        for layer in (*self.features, self.head[0]):
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                # By default features would fade from layer to layer.
                nn.init.kaiming_normal_(layer.weight, nonlinearity='relu')
                nn.init.zeros_(layer.get_parameter('bias'))

    def forward(self, img: Tensor) -> Tensor:
        """Enhance photographs.

        Args:
            img: (N, 3, H, W) or gray (N, 1, H, W), values in [0, 1], any size.

        Returns:
            (N, 3, H, W) in [0, 1].

        Raises:
            TypeError: if `img` isn't floating point.
            ValueError: if the shape is another.
        """
        return enhance(img, settings_from(self.positions(img)))

    def positions(self, img: Tensor) -> Tensor:
        """Where each slider stands: (N, 22) in [-1, 1]; see `settings_from`."""
        img = _in_full_precision(img)
        size = (THUMBNAIL, THUMBNAIL)
        thumbnail = F.interpolate(img, size, mode='bilinear', antialias=True)
        features = self.features(2 * thumbnail - 1)
        shares = img.new_tensor(QUANTILES)
        measures = (
            features.mean((2, 3)),
            features.amax((2, 3)),
            2 * luma(thumbnail).flatten(1).quantile(shares, dim=1).T - 1,
            4 * thumbnail.std(1).mean((1, 2))[:, None],  # how colourful
            # A noise of 25 grey levels is about 1.
            10 * noise(img),
        )
        positions: Tensor = self.head(torch.cat(measures, 1)).tanh()
        return positions


def _in_full_precision(img: Tensor) -> Tensor:
    """Half precision has no antialiased resize on a CPU."""
    img = check_images(img)
    return img.to(torch.promote_types(img.dtype, torch.float32))
