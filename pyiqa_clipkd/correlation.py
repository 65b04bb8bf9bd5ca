"""How well scores follow people's: SRCC and PLCC with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from scipy.stats import rankdata
from torchvision.transforms.functional import to_tensor
from tqdm import tqdm

DRAWS = 2000


class Interval(NamedTuple):
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f'{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]'


@torch.inference_mode()
def score_files(
    network: torch.nn.Module, files: Sequence[Path], desc: str
) -> np.ndarray:
    """Score photographs one by one, as the metric does; on a GPU where there is one.

    Args:
        network: (1, 3, H, W) in [0, 1] -> (1, 1).
        files: the N photographs.
        desc: what the progress bar says.

    Returns:
        (N,) scores.
    """
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    network = network.to(device).eval()
    scores = []
    for file in tqdm(files, unit='photo', desc=desc):
        image = to_tensor(Image.open(file).convert('RGB'))[None]
        scores.append(network(image.to(device)).item())
    return np.array(scores)


def pearson(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """PLCC along the last axis; NaN where one side is constant."""
    first = first - first.mean(axis=-1, keepdims=True)
    second = second - second.mean(axis=-1, keepdims=True)
    norm = np.sqrt((first**2).sum(axis=-1) * (second**2).sum(axis=-1))
    with np.errstate(invalid='ignore', divide='ignore'):
        return (first * second).sum(axis=-1) / norm


def spearman(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """SRCC along the last axis; NaN where one side is constant."""
    return pearson(rankdata(first, axis=-1), rankdata(second, axis=-1))


def correlations(
    scores: dict[str, np.ndarray], mos: np.ndarray, *, seed: int = 123
) -> dict[str, dict[str, Interval]]:
    """SRCC and PLCC of each set of scores, and how far the last is above the first.

    The intervals are percentiles over photographs drawn with replacement, the same
    draws for all (a paired bootstrap).

    Args:
        scores: what made them -> (N,).
        mos: (N,) human scores, higher is better.
        seed: of the draws.

    Returns:
        What made them, and `change` where there are two or more -> `srcc` and `plcc`.
    """
    drawn = np.random.default_rng(seed).integers(len(mos), size=(DRAWS, len(mos)))
    result: dict[str, dict[str, Interval]] = {name: {} for name in scores}
    if len(scores) > 1:
        result['change'] = {}
    for figure, correlate in (('srcc', spearman), ('plcc', pearson)):
        values = {
            name: (correlate(one, mos), correlate(one[drawn], mos[drawn]))
            for name, one in scores.items()
        }
        if len(scores) > 1:
            (first, *_), (last, *_) = values.values(), reversed(values.values())
            values['change'] = (last[0] - first[0], last[1] - first[1])
        for name, (value, draws) in values.items():
            known = draws[np.isfinite(draws)]
            low, high = np.percentile(known, [2.5, 97.5]) if len(known) else (-1, 1)
            result[name][figure] = Interval(float(value), float(low), float(high))
    return result
