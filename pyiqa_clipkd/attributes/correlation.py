"""The figures of a validation on attributes, for `val: metrics` of an option file."""

from __future__ import annotations

import numpy as np

from pyiqa_clipkd.attributes.names import ATTRIBUTES
from pyiqa_clipkd.correlation import pearson, spearman

FIGURES = {'srcc': spearman, 'plcc': pearson}


def calculate_attribute_correlation(
    predictions: np.ndarray,
    labels: np.ndarray,
    attribute: str | None = None,
    figure: str = 'srcc',
) -> float:
    """How well predicted attributes follow their labels, for `val: metrics`.

    Args:
        predictions: (N, 5), in the order of `ATTRIBUTES`.
        labels: (N, 5).
        attribute: one of `ATTRIBUTES`; `None`: the mean over all.
        figure: `srcc` or `plcc`.

    Returns:
        In [-1, 1]. An attribute whose predictions or labels are all the same counts
        as 0.

    Raises:
        ValueError: if there is no such attribute or figure.
    """
    if attribute is not None and attribute not in ATTRIBUTES:
        raise ValueError(
            f'`attribute` must be one of {", ".join(ATTRIBUTES)}, but got '
            f'{attribute!r}.'
        )
    if figure not in FIGURES:
        raise ValueError(
            f'`figure` must be one of {", ".join(FIGURES)}, but got {figure!r}.'
        )
    values = np.nan_to_num(FIGURES[figure](predictions.T, labels.T))
    if attribute is None:
        return float(values.mean())
    return float(values[ATTRIBUTES.index(attribute)])
