"""Splits for one's own data, by the script's own command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas as pd  # type: ignore[import-untyped]

SCRIPT = Path(__file__).parents[1] / 'scripts' / 'make_splits.py'


def make_splits(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    table = pd.DataFrame({'image': [f'{i}.jpg' for i in range(50)], 'mos': range(50)})
    table['scene'] = table.index // 5
    table.to_csv(folder / 'scores.csv', index=False)
    command = [sys.executable, str(SCRIPT), 'scores.csv', '-o', 'split.csv', *flags]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False
    )


def test_each_of_ten_splits_holds_out_a_fifth(tmp_path: Path) -> None:
    assert make_splits(tmp_path).returncode == 0
    table = pd.read_csv(tmp_path / 'split.csv')
    assert list(table.columns[:2]) == ['image', 'mos']
    splits = [c for c in table if c.startswith('ratio802_seed123_split_')]
    assert len(splits) == 10
    assert all((table[split] == 'val').sum() == 10 for split in splits)
    assert len({tuple(table[split]) for split in splits}) == 10


def test_a_group_stays_on_one_side(tmp_path: Path) -> None:
    assert make_splits(tmp_path, '--group', 'scene').returncode == 0
    table = pd.read_csv(tmp_path / 'split.csv')
    for split in [c for c in table if c.startswith('ratio802')]:
        assert (table.groupby('scene')[split].nunique() == 1).all()
        assert (table[split] == 'val').sum() == 10


def test_a_wrong_group_is_one_clear_error(tmp_path: Path) -> None:
    result = make_splits(tmp_path, '--group', 'content')
    assert result.returncode == 2
    assert "must be one of image, mos, scene, but got 'content'" in result.stderr
