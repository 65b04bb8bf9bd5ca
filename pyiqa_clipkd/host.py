"""All contact with the host's registries and its table of metrics."""

from __future__ import annotations

from typing import Any

from pyiqa_clipkd.names import metric_configs


def _register(registry: Any, *objects: Any) -> None:
    """Register objects under their names; again is fine, somebody else's name isn't."""
    known = dict(iter(registry))
    for thing in objects:
        if thing.__name__ not in known:
            registry.register(thing)
        elif known[thing.__name__] is not thing:
            raise RuntimeError(
                f'pyiqa already has another {thing.__name__}: {known[thing.__name__]}.'
            )


def register_archs() -> None:
    """Entry point of the group `pyiqa.archs`."""
    from pyiqa.utils.registry import ARCH_REGISTRY

    from pyiqa_clipkd.attributes.student import AttributeStudent
    from pyiqa_clipkd.metric import CLIPKDMetric
    from pyiqa_clipkd.network import CLIPKDStudent, CLIPLikert

    _register(ARCH_REGISTRY, CLIPLikert, CLIPKDStudent, CLIPKDMetric, AttributeStudent)


def register_losses() -> None:
    """Entry point of the group `pyiqa.losses`."""
    from pyiqa.utils.registry import LOSS_REGISTRY

    from pyiqa_clipkd.attributes.loss import AttributeRankLoss
    from pyiqa_clipkd.loss import CosineSoftHardLoss
    from pyiqa_clipkd.ranking import DegradationRankingLoss

    _register(
        LOSS_REGISTRY, CosineSoftHardLoss, DegradationRankingLoss, AttributeRankLoss
    )


def register_models() -> None:
    """Entry point of the group `pyiqa.models`."""
    from pyiqa.utils.registry import MODEL_REGISTRY

    from pyiqa_clipkd.attributes.model import AttributeModel
    from pyiqa_clipkd.model import CLIPKDModel

    _register(MODEL_REGISTRY, CLIPKDModel, AttributeModel)


def register_datasets() -> None:
    """Entry point of the group `pyiqa.datasets`."""
    from pyiqa.utils.registry import DATASET_REGISTRY

    from pyiqa_clipkd.attributes.dataset import AttributeDataset

    _register(DATASET_REGISTRY, AttributeDataset)


def register_metrics() -> None:
    """Entry point of the group `pyiqa.metrics`: the figures of a validation."""
    from pyiqa.utils.registry import METRIC_REGISTRY

    from pyiqa_clipkd.attributes.correlation import (
        calculate_attribute_correlation,
    )

    _register(METRIC_REGISTRY, calculate_attribute_correlation)


def add_metrics(table: dict[str, Any]) -> None:
    """Add our metrics, and those in the user's weights folder, to the host's table."""
    for name, config in metric_configs().items():
        table.setdefault(name, config)
