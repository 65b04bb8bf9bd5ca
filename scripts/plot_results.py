"""Plots of a table's raw results: bars, loss curves, scores against human scores.

`--curves` takes the folder of one distillation below `tb_logger/`, `--scatter` the
`predictions_*.csv` of one training. What they show is written as CSV beside the plots.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib as mpl

mpl.use('Agg')

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from scipy.optimize import curve_fit
from scipy.stats import pearsonr, spearmanr
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pyiqa_clipkd.names import HIGHEST, LOWEST
from pyiqa_clipkd.reproduce.plan import VARIANTS

TEACHER = 'teacher'
CURVES = {'soft_weight': 'soft_weight', 'l_soft': 'losses/l_soft'}
CURVES |= {'l_hard': 'losses/l_hard'}


def plot_bars(table: pd.DataFrame, metric: str, path: Path) -> None:
    """One group of bars a student: the median over splits, and each split's point."""
    students = [s for s in pd.unique(table.student) if s not in teachers(table)]
    trained = table[table.student.isin(students)]
    there = set(trained.variant)
    variants = [v for v in VARIANTS if v in there]
    variants += sorted(there - set(variants))
    figure, axes = plt.subplots(figsize=(1.5 + 3.2 * len(students), 3.6))
    width = 0.8 / len(variants)
    for number, variant in enumerate(variants):
        for place, student in enumerate(students):
            rows = trained[(trained.student == student) & (trained.variant == variant)]
            x = place + (number - (len(variants) - 1) / 2) * width
            axes.bar(
                x,
                rows[metric].median(),
                width,
                color=f'C{number}',
                label=variant if place == 0 else None,
            )
            axes.plot([x] * len(rows), rows[metric], 'k.', markersize=4)
    line = table[table.variant == TEACHER][metric].median()
    axes.axhline(line, color='0.3', linestyle='--', linewidth=1, label='teacher')
    values = table[metric]
    axes.set_ylim(values.min() - 0.2 * np.ptp(values), values.max() + 0.1)
    axes.set_xticks(range(len(students)), students)
    axes.set_ylabel(f'{metric.upper()}, median and each split')
    axes.legend(ncols=4, fontsize='small', frameon=False, loc='upper center')
    save(figure, path)


def teachers(table: pd.DataFrame) -> set[str]:
    return set(table[table.variant == TEACHER].student)


def plot_curves(folder: Path, path: Path) -> None:
    """Weight of the soft labels, soft and hard loss over the iterations."""
    events = EventAccumulator(str(folder))
    events.Reload()
    series = {
        name: pd.Series({e.step: e.value for e in events.Scalars(tag)})
        for name, tag in CURVES.items()
    }
    table = pd.DataFrame(series).rename_axis('iteration')
    table.to_csv(path.with_suffix('.csv'), float_format='%.5f')
    figure, axes = plt.subplots(figsize=(6, 3.4))
    axes.plot(table.index, table.soft_weight, '0.5', label='lambda')
    axes.plot(table.index, table.l_soft, label='soft loss, 1 - cos(u, v)')
    axes.plot(table.index, table.l_hard, label='hard loss, MSE in points²')
    axes.set_xlabel('iteration')
    axes.set_ylim(0, 1.05)
    axes.legend(frameon=False, fontsize='small')
    save(figure, path)


def plot_scatter(predictions: Path, path: Path) -> None:
    """Scores against human scores, with the logistic of four parameters."""
    table = pd.read_csv(predictions)[['score', 'mos']].sort_values('score')
    table.to_csv(path.with_suffix('.csv'), index=False, float_format='%.3f')
    score, mos = table.score.to_numpy(), table.mos.to_numpy()
    fitted = fit_logistic(score, mos)
    figure, axes = plt.subplots(figsize=(4.4, 4.2))
    axes.plot(score, mos, '.', alpha=0.3, markersize=4, markeredgewidth=0)
    axes.plot(score, fitted, 'k', linewidth=1, label='logistic')
    axes.plot([LOWEST, HIGHEST], [LOWEST, HIGHEST], '0.6', linestyle=':', label='equal')
    words = f'SRCC {spearmanr(score, mos).statistic:.3f}'
    words += f', PLCC {pearsonr(score, mos).statistic:.3f}'
    words += f', {pearsonr(fitted, mos).statistic:.3f} after the logistic'
    axes.set_title(f'{words}, {len(table)} photographs', fontsize='small')
    axes.set_xlabel('score')
    axes.set_ylabel('mean opinion score')
    axes.set_aspect('equal')
    axes.legend(frameon=False)
    save(figure, path)


def fit_logistic(score: np.ndarray, mos: np.ndarray) -> np.ndarray:
    """VQEG's logistic of four parameters; its ends are kept on the scale.

    (The host's `fit_curve` leaves them free, and doesn't converge where the relation is
    nearly a line.)
    """

    def logistic(x, low, high, center, width):  # type: ignore[no-untyped-def]
        return low + (high - low) / (1 + np.exp(-(x - center) / width))

    start = LOWEST, HIGHEST, score.mean(), score.std()
    bounds = [(LOWEST, LOWEST, -10, 1e-3), (HIGHEST, HIGHEST + 1e-9, 20, 20)]
    values, _ = curve_fit(logistic, score, mos, start, bounds=bounds, maxfev=10_000)
    return logistic(score, *values)


def save(figure: plt.Figure, path: Path) -> None:
    for axes in figure.axes:
        axes.spines[['top', 'right']].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={'Software': None})
    plt.close(figure)
    print(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('raw', type=Path, help='raw CSV of scripts/reproduce.py')
    parser.add_argument('-o', '--output', type=Path, required=True, help='folder')
    parser.add_argument('--metric', default='srcc', choices=['srcc', 'plcc'])
    parser.add_argument('--curves', type=Path, metavar='tb_logger/NAME')
    parser.add_argument('--scatter', type=Path, metavar='predictions_DATA.csv')
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    table = pd.read_csv(args.raw)
    for (data, protocol), rows in table.groupby(['data', 'protocol'], sort=False):
        plot_bars(rows, args.metric, args.output / f'{data}_{protocol}.png')
    if args.curves:
        plot_curves(args.curves, args.output / 'curves.png')
    if args.scatter:
        plot_scatter(args.scatter, args.output / 'scatter.png')


if __name__ == '__main__':
    main()
