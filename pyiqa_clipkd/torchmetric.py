"""A metric as a torchmetrics object: collected over batches, devices and processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyiqa_clipkd.geometry import in_unit_range
from pyiqa_clipkd.metric import CLIPKDMetric
from pyiqa_clipkd.names import DEFAULT_METRIC

try:
    from torchmetrics import Metric
except ModuleNotFoundError as error:
    if error.name != 'torchmetrics':
        raise
    raise ModuleNotFoundError(
        'pyiqa_clipkd.torchmetric needs torchmetrics: pip install torchmetrics',
        name=error.name,
    ) from error


class QualityScore(Metric):
    """Mean quality of all images seen, in [1, 5], higher is better.

    For torchmetrics' collections and Lightning's `self.log`. In a `LightningModule`
    its network is neither trained nor switched to training mode.

    Args:
        metric: name of a metric.
        weights: a weight file to use instead of the metric's own.
        kwargs: options of `torchmetrics.Metric`.

    Raises:
        FileNotFoundError: if there are no weights.

    Example:
        >>> quality = QualityScore('clipkd_efficientnet_lite')
        >>> quality.update(torch.rand(8, 3, 256, 256))
        >>> quality.compute()  # doctest: +SKIP
        tensor(1.87)
    """

    is_differentiable = True
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 1.0
    plot_upper_bound = 5.0

    total: Tensor
    count: Tensor

    def __init__(
        self,
        metric: str = DEFAULT_METRIC,
        *,
        weights: str | Path | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.network = CLIPKDMetric(metric, pretrained_model_path=weights)
        self.add_state('total', torch.tensor(0.0), dist_reduce_fx='sum')
        self.add_state('count', torch.tensor(0), dist_reduce_fx='sum')

    def update(self, images: Tensor) -> None:
        """Add images.

        Args:
            images: (N, 3 or 1, H, W), floating point in [0, 1], or uint8.

        Raises:
            TypeError: if they are of another type.
            ValueError: if the shape is another, or values are outside [0, 1].
        """
        if images.dtype == torch.uint8:
            images = images / 255
        scores = self.network(images)
        low, high = (limit.item() for limit in images.detach().aminmax())
        if not in_unit_range(low, high):
            raise ValueError(
                f'`images` must be in [0, 1], but got values from {low:g} to {high:g}. '
                'Of networks that end in [-1, 1] take `(images + 1) / 2`, and clamp.'
            )
        self.total = self.total + scores.sum()
        self.count = self.count + len(scores)

    def compute(self) -> Tensor:
        """Mean score, a tensor without dimensions; NaN if there were no images."""
        return self.total / self.count

    def train(self, mode: bool = True) -> QualityScore:
        """The network stays in evaluation mode, whatever it is part of."""
        super().train(mode)
        self.network.eval()
        return self
