"""The pretraining on attributes in the host's loop, and its validation."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from pyiqa.utils import get_root_logger
from torch import Tensor

from pyiqa_clipkd.attributes.names import ATTRIBUTES
from pyiqa_clipkd.attributes.student import AttributeStudent
from pyiqa_clipkd.model import CLIPKDModel

LOSS = 'attribute_loss_opt'

# What belongs to trainings on human scores.
UNUSED = (
    *('mos_loss_opt', 'distillation_loss_opt', 'metric_loss_opt'),
    *('ranking_loss_opt', 'feature_hints', 'projection_start'),
)


class AttributeModel(CLIPKDModel):
    """Trains an `AttributeStudent` on an `AttributeDataset`, with `attribute_loss_opt`.

    The loop, its precision, accumulation, averaged weights, checkpoints and exact
    resume are those of `CLIPKDModel`. There is no teacher: what a large model knows is
    in the labels.

    Raises:
        ValueError: if the options ask for another network, a teacher, or a loss that
            needs human scores.
    """

    prediction_columns = (*ATTRIBUTES, *(f'label_{name}' for name in ATTRIBUTES))

    def __init__(self, opt: dict[str, Any]) -> None:
        _check(opt)
        super().__init__(opt)

    def _build_losses(self) -> None:
        self.loss = self._build_loss(LOSS)
        get_root_logger().info(f'Pretraining: {self.loss}')

    def _labels(self, labels: Tensor) -> Tensor:
        return labels

    def _losses(
        self, progress: float, seed: int
    ) -> tuple[OrderedDict[str, Tensor], dict[str, float]]:
        with self.engine.autocast():
            predictions = self.net(self.engine.images(self.img_input))
        self.output_score = predictions
        terms = self.loss(predictions, self.gt_mos)
        named = OrderedDict(l_ranking=terms.ranking, l_calibration=terms.calibration)
        named['l_total'] = terms.total
        return named, {}


def _check(opt: dict[str, Any]) -> None:
    kind = opt['network'].get('type')
    if kind != AttributeStudent.__name__:
        raise ValueError(
            f'`network` of an AttributeModel must be an AttributeStudent, but got '
            f'{kind}.'
        )
    train = opt.get('train') or {}
    given = [key for key in UNUSED if train.get(key)]
    given += ['teacher'] if opt.get('teacher') else []
    if given:
        raise ValueError(
            f'An AttributeModel learns from `{LOSS}` alone: remove `{given[0]}`.'
        )
