"""Measure a metric on photographs with human scores: ranks, errors, calibration.

The CSV's first two columns are file name and score, as pyiqa's meta-info files have
them. `--columns` names columns of splits, of which only one `--side` is scored: each
gives its own row, and all photographs of that side together give the reliability (the
mean human score of the photographs at each level). `--weights`, `--crops` and
`--input-size` go to the metric.
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

from pyiqa_clipkd.experiment import recorded_command
from pyiqa_clipkd.files import file_hash, written_whole
from pyiqa_clipkd.locations import find_weights
from pyiqa_clipkd.names import HIGHEST, LEVELS, LOWEST

ROOT = Path(__file__).resolve().parents[1]


def agreement(scores: np.ndarray, mos: np.ndarray) -> dict[str, float]:
    """SRCC and PLCC, and errors in points; both on the 1-5 scale."""
    return {
        'images': len(scores),
        'srcc': spearmanr(scores, mos).statistic,
        'plcc': pearsonr(scores, mos).statistic,
        'mean_absolute_error': np.abs(scores - mos).mean(),
        'mean_score': scores.mean(),
        'mean_mos': mos.mean(),
        'score_std': scores.std(),
    }


def reliability(scores: np.ndarray, mos: np.ndarray) -> list[dict[str, Any]]:
    """For each level name that scores round to: how people judged those photographs."""
    rows = []
    for level, word in enumerate(LEVELS, start=int(LOWEST)):
        there = np.rint(scores) == level
        if there.any():
            rows.append(
                {
                    'level': word,
                    'images': int(there.sum()),
                    'mean_score': scores[there].mean(),
                    'mean_mos': mos[there].mean(),
                    'mos_std': mos[there].std(),
                }
            )
    return rows


def plot_reliability(scores: np.ndarray, mos: np.ndarray, path: Path) -> None:
    """Mean human score in twenty equally filled bins of the metric's score."""
    import matplotlib as mpl

    mpl.use('Agg')
    import matplotlib.pyplot as plt

    bins = np.array_split(np.argsort(scores), 20)
    x = [scores[one].mean() for one in bins]
    y = [mos[one].mean() for one in bins]
    spread = [mos[one].std() for one in bins]
    figure, axes = plt.subplots(figsize=(4.2, 4))
    axes.plot([LOWEST, HIGHEST], [LOWEST, HIGHEST], color='0.6', linewidth=1)
    axes.errorbar(x, y, spread, fmt='o', markersize=4, capsize=2)
    ticks = [f'{n}\n{word}' for n, word in enumerate(LEVELS, start=int(LOWEST))]
    axes.set_xticks(range(int(LOWEST), int(HIGHEST) + 1), ticks)
    axes.set_xlabel('score, mean of a bin')
    axes.set_ylabel('human score, mean and standard deviation')
    axes.set_aspect('equal')
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as partial:
        figure.savefig(partial, format='png', dpi=120)


def add_metric(parser: argparse.ArgumentParser) -> None:
    """The arguments that say which metric is measured."""
    parser.add_argument('metric', help='for instance clipkd_efficientnet_lite')
    parser.add_argument('--weights', help="a file in place of the metric's own")
    parser.add_argument('--crops', type=int, help='at native resolution, beside it all')
    parser.add_argument('--input-size', type=int, help='side in pixels')
    parser.add_argument('--device', help='default: cuda where there is a GPU, or cpu')


def device(args: argparse.Namespace) -> str:
    return args.device or ('cuda' if torch.cuda.is_available() else 'cpu')


def create_metric(args: argparse.Namespace) -> torch.nn.Module:
    """The metric of `add_metric`'s arguments."""
    options = {
        'pretrained_model_path': args.weights,
        'crops': args.crops,
        'input_size': args.input_size,
    }
    given = {key: value for key, value in options.items() if value is not None}
    return pyiqa.create_metric(args.metric, device=device(args), **given)


def record(args: argparse.Namespace, start: float) -> dict[str, Any]:
    """What a reader needs to repeat a measurement."""
    weights = find_weights(args.metric, args.weights)
    return {
        'command': recorded_command(sys.argv, ROOT),
        'metric': args.metric,
        'weights_sha256': file_hash(weights) if weights else None,
        'python': platform.python_version(),
        'torch': torch.__version__,
        'device': device(args),
        'threads': torch.get_num_threads(),
        'seconds': round(time.time() - start),
    }


def write(results: dict[str, Any], output: Path | None) -> None:
    """Print JSON, and write it to `output`, whole or not at all."""
    text = json.dumps(results, indent=2, default=float)
    print(text)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(output) as partial:
            partial.write_text(text + '\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_metric(parser)
    parser.add_argument('--images', type=Path, required=True, help='folder')
    parser.add_argument('--csv', type=Path, required=True)
    parser.add_argument('--columns', nargs='+', default=[], help='columns of splits')
    parser.add_argument('--side', default='test', help='word in those columns')
    parser.add_argument('--sample', type=int, help='so many at random, always the same')
    parser.add_argument('--mos-range', type=float, nargs=2, default=(0, 1))
    parser.add_argument('--plot', type=Path, help='PNG file: reliability')
    parser.add_argument('-o', '--output', type=Path, help='JSON file')
    args = parser.parse_args()
    table = pd.read_csv(args.csv)
    if missing := [name for name in args.columns if name not in table]:
        parser.error(f'`--columns`: {args.csv} has no {", ".join(missing)}.')
    sides = {name: table[name] == args.side for name in args.columns}
    if sides:
        anywhere = np.logical_or.reduce(list(sides.values()))
        table = table[anywhere]
    if not len(table):
        parser.error(f'`--side`: {args.csv} has no {args.side!r} in these columns.')
    if args.sample and args.sample < len(table):
        table = table.sample(args.sample, random_state=0)
    low, high = args.mos_range
    mos = (table.iloc[:, 1].to_numpy(float) - low) / (high - low)
    mos = LOWEST + (HIGHEST - LOWEST) * mos
    start = time.time()
    metric = create_metric(args)
    scores = np.array(
        [
            float(
                metric(to_tensor(Image.open(args.images / name).convert('RGB'))[None])
            )
            for name in tqdm(table.iloc[:, 0], unit='image')
        ]
    )
    results = record(args, start)
    results |= {'columns': {}, 'all': agreement(scores, mos)}
    for name, side in sides.items():
        there = side[table.index].to_numpy()
        results['columns'][name] = agreement(scores[there], mos[there])
    if sides:
        rows = list(results['columns'].values())
        results['median_of_columns'] = {
            key: np.median([row[key] for row in rows])
            for key in ('srcc', 'plcc', 'mean_absolute_error')
        }
    results['reliability'] = reliability(scores, mos)
    write(results, args.output)
    if args.plot:
        plot_reliability(scores, mos, args.plot)


if __name__ == '__main__':
    main()
