"""Measure a metric on photographs with human scores: ranks, errors, damaged copies.

The CSV's first two columns are file name and score, as pyiqa's meta-info files have
them. With `--column` and `--side` only one side of a split is scored.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyiqa
import torch
from PIL import Image
from scipy.stats import pearsonr, spearmanr
from torchvision.transforms.functional import to_tensor
from tqdm import tqdm

from pyiqa_clipkd.degradations import PLAIN
from pyiqa_clipkd.head import HIGHEST, LOWEST
from pyiqa_clipkd.weights import file_hash, find_weights


def evaluate(
    metric: torch.nn.Module, files: list[Path], mos: np.ndarray, damaged: int
) -> dict[str, Any]:
    """SRCC, PLCC and errors in points of the 1-5 scale; `mos` is on that scale.

    The first `damaged` photographs are also scored with plain damage: the share of
    copies that score lower than their original, for each kind.
    """

    def score(image: Image.Image) -> float:
        return float(metric(to_tensor(image)[None]))

    scores = []
    lower: dict[str, list[bool]] = {kind: [] for kind in PLAIN}
    flips = []
    for number, file in enumerate(tqdm(files)):
        image = Image.open(file).convert('RGB')
        scores.append(score(image))
        if number < damaged:
            for kind, damage in PLAIN.items():
                lower[kind].append(score(damage(image)) < scores[-1])
            flipped = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            flips.append(abs(score(flipped) - scores[-1]))
    error = np.abs(np.array(scores) - mos)
    results = {
        'images': len(files),
        'srcc': spearmanr(scores, mos).statistic,
        'plcc': pearsonr(scores, mos).statistic,
        'mean_absolute_error': error.mean(),
        'mean_score': np.mean(scores),
        'mean_mos': mos.mean(),
    }
    if damaged:
        results['damaged_images'] = len(flips)
        results['damaged_score_lower'] = {k: np.mean(v) for k, v in lower.items()}
        results['damaged_score_lower_all'] = np.mean(list(lower.values()))
        results['flip_moves_score_median'] = np.median(flips)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('metric', help='for instance clipkd_efficientnet_lite')
    parser.add_argument('--images', type=Path, required=True, help='folder')
    parser.add_argument('--csv', type=Path, required=True)
    parser.add_argument('--column', help='column of a split')
    parser.add_argument('--side', default='test', help='word in that column')
    parser.add_argument('--mos-range', type=float, nargs=2, default=(0, 1))
    parser.add_argument('--damaged', type=int, default=0, help='photographs to damage')
    parser.add_argument('-o', '--output', type=Path, help='JSON file')
    args = parser.parse_args()
    table = pd.read_csv(args.csv)
    if args.column:
        table = table[table[args.column] == args.side]
    low, high = args.mos_range
    mos = (table.iloc[:, 1].to_numpy(float) - low) / (high - low)
    metric = pyiqa.create_metric(args.metric, device='cpu')
    weights = find_weights(args.metric)
    start = time.time()
    results = evaluate(
        metric,
        [args.images / name for name in table.iloc[:, 0]],
        LOWEST + (HIGHEST - LOWEST) * mos,
        args.damaged,
    )
    record = {
        'command': ' '.join(['python', *sys.argv]),
        'metric': args.metric,
        'weights_sha256': file_hash(weights) if weights else None,
        'python': platform.python_version(),
        'torch': torch.__version__,
        'seconds': round(time.time() - start),
        **results,
    }
    text = json.dumps(record, indent=2, default=float)
    print(text)
    if args.output:
        args.output.write_text(text + '\n')


if __name__ == '__main__':
    main()
