"""Which pair of prompts follows its attribute, and the four others least."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from pyiqa_clipkd.attributes.changes import LEVELS, change
from pyiqa_clipkd.attributes.names import ATTRIBUTES
from pyiqa_clipkd.attributes.prompts import Pair
from pyiqa_clipkd.correlation import spearman

# Of what a pair does to the other attributes, against how well it orders its own.
LEAK_WEIGHT = 0.5


class Candidate(NamedTuple):
    """A pair of prompts and what was measured of it.

    Attributes:
        attribute: the one that it is meant for.
        pair: its prompts.
        value: own - weight * leak; higher is better.
        own: agreement with the order of its attribute's changes, in [-1, 1].
        leak: how it answers to the others' changes, in [0, 1]; lower is better.
        order: attribute -> mean Spearman correlation over the photographs with the
            order of its changes; of the others, the mean of the absolute value.
        move: attribute -> mean range of the probability along its changes, in [0, 1].
    """

    attribute: str
    pair: Pair
    value: float
    own: float
    leak: float
    order: dict[str, float]
    move: dict[str, float]

    def row(self) -> dict[str, Any]:
        """Plain values, one a column of a table."""
        row: dict[str, Any] = {'attribute': self.attribute, **self.pair._asdict()}
        row |= {key: getattr(self, key) for key in ('value', 'own', 'leak')}
        row |= {f'order_{name}': self.order[name] for name in ATTRIBUTES}
        return row | {f'move_{name}': self.move[name] for name in ATTRIBUTES}


def flat_pairs(
    candidates: Mapping[str, Sequence[Pair]],
) -> list[tuple[str, Pair]]:
    """All candidates in the order of `ATTRIBUTES`: the columns of `measure`."""
    return [(name, pair) for name in ATTRIBUTES for pair in candidates[name]]


def measure(
    photographs: Iterable[Image.Image],
    probabilities: Callable[[Sequence[Image.Image]], Any],
) -> dict[str, np.ndarray]:
    """Probabilities of all candidates along all controlled changes.

    Each copy is shown once, whatever the number of candidates.

    Args:
        photographs: P RGB images.
        probabilities: N images -> (N, C) in [0, 1], a column a candidate
            (`PromptPairs.of_images`).

    Returns:
        attribute -> (P, its levels in `LEVELS`, C).

    Raises:
        ValueError: if there is no photograph.
    """
    places = [(a, level) for a in ATTRIBUTES for level in LEVELS[a] if level]
    series: dict[str, list[np.ndarray]] = {name: [] for name in ATTRIBUTES}
    for seed, image in enumerate(photographs):
        copies = [change(image, name, level, seed) for name, level in places]
        original, *values = np.asarray(probabilities([image, *copies]), float)
        found = dict(zip(places, values, strict=True))
        for name, rows in series.items():
            levels = LEVELS[name]
            rows.append(np.stack([found.get((name, x), original) for x in levels]))
    if not series[ATTRIBUTES[0]]:
        raise ValueError('`photographs` must be one or more images, but got none.')
    return {name: np.stack(rows) for name, rows in series.items()}


def rank(
    series: Mapping[str, np.ndarray],
    candidates: Mapping[str, Sequence[Pair]],
    leak_weight: float = LEAK_WEIGHT,
) -> dict[str, list[Candidate]]:
    r"""Candidates of each attribute, the best first.

    With :math:`\rho_{b}` Spearman's correlation of a candidate's probabilities with the
    levels of attribute b on one photograph (0 where they are constant), :math:`m_b` the
    range of these probabilities, bars for means over the photographs, and a the
    candidate's own attribute:

    .. math:: \mathrm{own} = \overline{\rho_a}, \qquad
        \mathrm{leak} = \frac{1}{4} \sum_{b \ne a} \overline{|\rho_b|}
                        \min\left(1, \frac{\overline{m_b}}{\overline{m_a}}\right),
        \qquad \mathrm{value} = \mathrm{own} - w \, \mathrm{leak}

    The ratio of the ranges is there because ranks alone don't know small moves from
    large ones, and even chance has an absolute correlation of 0.4 on five levels.

    Args:
        series: of `measure`.
        candidates: attribute -> pairs, as they were measured.
        leak_weight: w >= 0.

    Returns:
        attribute -> its candidates; of equal values the earlier one first.

    Raises:
        ValueError: if the weight is negative, or the columns are not the candidates.
    """
    if not leak_weight >= 0:
        raise ValueError(f'`leak_weight` must be >= 0, but got {leak_weight}.')
    columns = flat_pairs(candidates)
    for name in ATTRIBUTES:
        wanted = (len(LEVELS[name]), len(columns))
        if series[name].shape[1:] != wanted:
            raise ValueError(
                f'`series` of {name} must have the shape (P, {wanted[0]}, {wanted[1]})'
                f', but got {series[name].shape}.'
            )
    rho = {name: _agreement(series[name], LEVELS[name]) for name in ATTRIBUTES}
    move = {name: np.ptp(series[name], axis=1).mean(axis=0) for name in ATTRIBUTES}
    ranked: dict[str, list[Candidate]] = {name: [] for name in ATTRIBUTES}
    for column, (name, pair) in enumerate(columns):
        order = {b: float(np.abs(rho[b][:, column]).mean()) for b in ATTRIBUTES}
        order[name] = own = float(rho[name][:, column].mean())
        moves = {b: float(move[b][column]) for b in ATTRIBUTES}
        leaks = [
            order[b] * _share(moves[b], moves[name]) for b in ATTRIBUTES if b != name
        ]
        leak = float(np.mean(leaks))
        value = own - leak_weight * leak
        ranked[name].append(Candidate(name, pair, value, own, leak, order, moves))
    # Python's sort keeps the order of equals.
    return {
        name: sorted(rows, key=lambda one: -one.value) for name, rows in ranked.items()
    }


def _agreement(values: np.ndarray, levels: Sequence[float]) -> np.ndarray:
    """(P, L, C) -> Spearman's correlation with the levels, (P, C); constant -> 0."""
    along = np.moveaxis(values, 1, -1)
    return np.nan_to_num(spearman(along, np.asarray(levels)))


def _share(other: float, own: float) -> float:
    return min(1.0, other / own) if own > 0 else float(other > 0)
