"""Two runs as histograms: `pyiqa-clipkd compare --plot`; needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pyiqa_clipkd.compare.difference import Difference
from pyiqa_clipkd.compare.runs import Run
from pyiqa_clipkd.files import written_whole


def plot(
    first: Run,
    second: Run,
    difference: Difference,
    pairs: np.ndarray,
    *,
    path: Path,
) -> None:
    """Histograms of both runs, and of the differences where they are paired.

    Args:
        first, second: A and B.
        difference: from `difference.measure`.
        pairs: (N, 2) places in their rows.
        path: where to; its ending chooses the format.
    """
    import matplotlib as mpl

    mpl.use('Agg')
    import matplotlib.pyplot as plt

    panels = 2 if difference.paired else 1
    figure, axes = plt.subplots(1, panels, figsize=(5 * panels, 3.6), squeeze=False)
    for run, letter, colour in ((first, 'A', 'C0'), (second, 'B', 'C1')):
        scores = run.scored['score']
        label = f'{letter}: {run.name}, mean {scores.mean():.2f}'
        axes[0, 0].hist(
            scores, np.linspace(1, 5, 33), color=colour, alpha=0.5, label=label
        )
    axes[0, 0].set(xlabel='score (higher is better)', ylabel='photographs')
    axes[0, 0].legend(fontsize='small', frameon=False)
    if difference.paired:
        _plot_changes(axes[0, 1], first, second, difference, pairs)
    figure.tight_layout()
    with written_whole(path) as partial:
        figure.savefig(partial, format=path.suffix[1:], dpi=150)
    plt.close(figure)


def _plot_changes(
    axes: Any, first: Run, second: Run, difference: Difference, pairs: np.ndarray
) -> None:
    scores = [run.rows['score'].to_numpy() for run in (first, second)]
    axes.hist(
        scores[1][pairs[:, 1]] - scores[0][pairs[:, 0]], 41, color='C2', alpha=0.6
    )
    axes.axvline(0, color='0.3', linewidth=1)
    axes.axvspan(difference.low, difference.high, color='0.2', alpha=0.3)
    axes.axvline(difference.value, color='0.2', linestyle='--')
    title = (
        f'mean {difference.value:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]'
    )
    axes.set(xlabel='B - A', ylabel='pairs', title=title)
