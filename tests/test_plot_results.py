"""Plots of raw results, by the script's own command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import pytest
from PIL import Image

SCRIPT = Path(__file__).parents[1] / 'scripts' / 'plot_results.py'


@pytest.mark.slow
def test_raw_rows_and_predictions_become_plots(tmp_path: Path) -> None:
    pytest.importorskip('matplotlib')
    rng = np.random.default_rng(0)
    rows = [
        {'student': student, 'variant': variant, 'split': split}
        for student, variant in [('big', 'teacher'), ('a', 'ours'), ('a', 'hard')]
        for split in (1, 2)
    ]
    table = pd.DataFrame(rows).assign(data='tiny', protocol='by_image')
    table['srcc'] = rng.uniform(0.6, 0.8, len(table))
    table.to_csv(tmp_path / 'raw.csv', index=False)
    mos = rng.uniform(1, 5, 50)  # nearly a line: the logistic has no end of its own
    scores = pd.DataFrame({'image': 'x', 'score': mos + rng.normal(0, 0.1, 50)})
    scores.assign(mos=mos).to_csv(tmp_path / 'predictions_tiny.csv', index=False)
    command = [sys.executable, str(SCRIPT), 'raw.csv', '-o', 'plots', '--scatter']
    subprocess.run([*command, 'predictions_tiny.csv'], cwd=tmp_path, check=True)
    for name in ('tiny_by_image.png', 'scatter.png'):
        assert min(Image.open(tmp_path / 'plots' / name).size) > 300
    assert list(pd.read_csv(tmp_path / 'plots' / 'scatter.csv')) == ['score', 'mos']
