"""Raw measures as values in [0, 1]: where a photograph stands among others.

The reference is fixed and comes with the package, so a value depends on its photograph
alone, not on what lies beside it in a folder: photographs in the wild, each of them as
it is and once more with the attribute changed at random (see `changes`). Its quantiles
are in `reference.json`, made by scripts/attribute_reference.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pyiqa_clipkd.attributes.measures import VERSION, measure
from pyiqa_clipkd.attributes.names import ATTRIBUTES
from pyiqa_clipkd.files import SHORT_HASH, file_hash
from pyiqa_clipkd.scoring.tables import RAW

REFERENCE = Path(__file__).with_name('reference.json')

# Below, in grey levels, noise is that of eight bits and of JPEG, which nobody sees.
INVISIBLE = 1.0

# Of the reference, from share 0 to share 1.
QUANTILES = 101

# Digits after the point: shares of some hundred photographs have no more.
DIGITS = 2


class Ranks:
    """A monotone map of each raw measure to [0, 1], 1 the good side.

    Args:
        quantiles: attribute -> its value at evenly spread shares of the reference
            photographs from 0 to 1, in ascending order and with `goodness` applied.

    Raises:
        ValueError: if an attribute is missing, or its quantiles don't ascend.
    """

    def __init__(self, quantiles: Mapping[str, list[float]]) -> None:
        self.quantiles: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for attribute in ATTRIBUTES:
            values = np.asarray(quantiles.get(attribute, ()), float)
            if len(values) < 2 or not (np.diff(values) >= 0).all():
                raise ValueError(
                    f'`quantiles` of {attribute} must be two or more ascending '
                    f'numbers, but got {values.tolist()}.'
                )
            shares = np.linspace(0, 1, len(values))
            # Where many are equal, as clean ones are: the share that is no better.
            last = np.append(values[1:] > values[:-1], True)
            self.quantiles[attribute] = values[last], shares[last]

    def __call__(self, measures: Mapping[str, float]) -> dict[str, float]:
        """Raw measures -> the share of reference photographs that are no better.

        Linear between the quantiles, and 0 or 1 outside of them; in hundredths.
        """
        values = {}
        for attribute, (quantiles, shares) in self.quantiles.items():
            good = goodness(attribute, measures[attribute])
            share = np.interp(good, quantiles, shares, left=0)
            values[attribute] = round(float(share), DIGITS)
        return values


def goodness(attribute: str, measure: float) -> float:
    """A raw measure with its sign and floor such that more is better."""
    if attribute == 'noisiness':
        return -max(measure, INVISIBLE)
    return measure


class MeasureLabeller:
    """Labels by classical measures: no network, and the same on every machine.

    Attributes:
        identity: the name and, of the reference, the first digits of its SHA-256:
            labels of equal lines come from the same labeller.
    """

    def __init__(self, reference: Path = REFERENCE) -> None:
        stored: dict[str, Any] = json.loads(reference.read_bytes())
        self.ranks = Ranks(stored['quantiles'])
        digest = file_hash(reference)[:SHORT_HASH]
        self.identity = f'measures {VERSION} reference {digest}'

    def __call__(self, image: Image.Image) -> dict[str, float]:
        """RGB -> the five attributes in [0, 1], 1 the good side, and `raw_` measures.

        Raises:
            UnreadableError: if the photograph is too small.
        """
        measures = measure(image)
        raw = {RAW + attribute: value for attribute, value in measures.items()}
        return self.ranks(measures) | raw
