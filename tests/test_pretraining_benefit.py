"""The experiment that asks whether a pretraining helps, tiny."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import pytest
from PIL import Image
from scipy.stats import spearmanr
from script_modules import SCRIPTS, load_script
from training_data import ENCODER, SIZE, write_images

from pyiqa_clipkd.attributes.names import ATTRIBUTES
from pyiqa_clipkd.attributes.ranks import MeasureLabeller
from pyiqa_clipkd.splits import split_column

TRAIN, TEST = 100, 20
SPLITS = (1, 2)
POOL = 40


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script; the others that it runs are run in this process."""
    monkeypatch.syspath_prepend(SCRIPTS)
    module = load_script('pretraining_benefit')

    def run(name: str, *arguments: object, log: Path | None = None) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(sys, 'argv', [name, *map(str, arguments)])
            runpy.run_path(str(SCRIPTS / name), run_name='__main__')

    monkeypatch.setattr(module, 'run', run)
    return module


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Photographs and their table in the working directory; two different splits."""
    monkeypatch.chdir(tmp_path)
    csv = write_images(tmp_path, TRAIN, TEST)
    rows = pd.read_csv(csv)
    rows[split_column(2)] = rows[split_column(2)].to_numpy()[::-1]
    rows.to_csv(csv, index=False)
    return csv


def arguments(table: Path, *more: str) -> list[str]:
    return [
        *('pretraining_benefit.py', '--images', 'images', '--csv', table.name),
        *('--splits', *map(str, SPLITS), '--pool', str(POOL), '--size', str(SIZE)),
        *('--stored', str(SIZE + 8)),
        *('--encoder', ENCODER, '--encoder-weights', '~', '--batch', '4'),
        *('--pretraining-steps', '3', '--steps', '2', '-o', 'out/table.json', *more),
    ]


def main(script: Any, monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    monkeypatch.setattr(sys, 'argv', words)
    script.main()


# --- data ---------------------------------------------------------------------------


def test_few_labels_are_among_the_many_and_none_is_of_a_held_out_photograph(
    script: Any, table: Path
) -> None:
    rows = pd.read_csv(table)
    wide = script.add_subsets(rows, list(SPLITS))
    for split in SPLITS:
        sides = {p: wide[script.labels_column(split, p)] for p in script.PERCENT}
        used = {
            percent: set(np.flatnonzero(s == 'train')) for percent, s in sides.items()
        }
        assert {percent: len(rows) for percent, rows in used.items()} == {
            100: TRAIN,
            20: TRAIN // 5,
            5: TRAIN // 20,
        }
        assert used[5] < used[20] < used[100]
        held_out = rows[split_column(split)] == 'test'
        for side in sides.values():
            assert (side == 'test').equals(held_out)
    few = [
        set(np.flatnonzero(wide[script.labels_column(s, 20)] == 'train'))
        for s in SPLITS
    ]
    assert few[0] != few[1]
    assert script.add_subsets(rows, [2])[script.labels_column(2, 5)].equals(
        wide[script.labels_column(2, 5)]
    )


def test_a_random_change_is_the_same_for_its_seed_and_of_any_attribute(
    script: Any, photographs: dict[str, Image.Image]
) -> None:
    image = photographs['chelsea'].resize((96, 64))
    labels = MeasureLabeller()
    before = labels(image)
    moved = set()
    for seed in range(12):
        changed = script.random_change(image, seed)
        assert changed == script.random_change(image, seed)
        after = labels(changed)
        moved.add(max(ATTRIBUTES, key=lambda name: abs(after[name] - before[name])))
    assert len(moved) >= 3


# --- the experiment -----------------------------------------------------------------


@pytest.mark.slow
def test_the_whole_experiment_is_run_once_and_gives_its_table(
    script: Any,
    table: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    good = Path('good')
    good.mkdir()
    Image.open('images/3.png').save(good / 'photo.png')
    words = arguments(table, '--photographs', 'good')
    main(script, monkeypatch, words)
    printed = capsys.readouterr().out
    _check_rows(pd.read_csv('out/table.csv'))
    _check_pseudo_labels(
        pd.read_csv(f'datasets/benefit_{SIZE + 8}/attributes.csv'), table
    )
    record = json.loads(Path('out/table.json').read_text())
    assert record['command'] == ' '.join(['python', *words])
    assert record['pretrainings'].keys() == {'1', '2'}
    assert {f'srcc_{name}' for name in ATTRIBUTES} < record['pretrainings']['1'].keys()
    assert '| 5 % | PLCC |' in printed

    options = {file: json.loads(file.read_text())['options'] for file in _runs()}
    starts = {
        file.parent.name.removeprefix(f'benefit_test_efficientnet_{SIZE}_'): (
            one['network']['encoder_weights']
        )
        for file, one in options.items()
    }
    for name, start in starts.items():
        own = f'{name[:2]}_pretraining/models/net_best.pth'
        assert start.endswith(own) if name.endswith('_pretrained') else start is None

    before = {file: file.stat().st_mtime_ns for file in _runs()}
    for module, name in ((script, 'run'), (script.pipeline, 'train')):
        monkeypatch.setattr(module, name, None)  # nothing more is done
    main(script, monkeypatch, words)
    assert capsys.readouterr().out == printed[printed.index('| labels') :]
    assert {file: file.stat().st_mtime_ns for file in _runs()} == before


def _runs() -> list[Path]:
    return sorted(Path('experiments').glob('*/run.json'))


def _check_rows(rows: pd.DataFrame) -> None:
    students = [
        (split, percent, arm)
        for percent in (100, 20, 5)
        for split in SPLITS
        for arm in ('plain', 'pretrained', 'longer')
    ]
    keys = list(rows[['split', 'percent', 'arm']].itertuples(index=False, name=None))
    assert keys == students
    assert (rows['labels'] == rows['percent'] * TRAIN // 100).all()
    assert (rows['test'] == TEST).all()
    assert (rows['steps'] == np.where(rows['arm'] == 'longer', 5, 2)).all()
    first = rows['split'] == 1
    assert rows['right_order'].notna().equals(first)
    assert rows['right_order'][first].between(0, 1).all()
    for row in rows.itertuples():
        name = f'benefit_test_efficientnet_{SIZE}_{row.split:02d}_{row.percent:03d}'
        folder = Path('experiments', f'{name}_{row.arm}')
        said = pd.read_csv(folder / 'predictions_biq2021.csv')
        srcc = spearmanr(said.iloc[:, 1], said.iloc[:, 2]).statistic
        assert row.srcc == pytest.approx(srcc, abs=0.02)  # ties


def _check_pseudo_labels(labels: pd.DataFrame, table: Path) -> None:
    """Two rows a photograph, on the photograph's side; measured before it is small."""
    assert len(labels) == 2 * POOL
    rows = pd.read_csv(table)
    rows.index = pd.Index([Path(name).stem for name in rows['img_name']])
    stems = [Path(path).stem for path in labels['path']]
    for split in SPLITS:
        column = split_column(split)
        assert list(labels[column]) == list(rows.loc[stems, column])
    labeller = MeasureLabeller()
    originals = labels[labels['path'].str.contains('/images/')]
    assert len(originals) == POOL
    for row in originals.head(5).itertuples():
        image = Image.open(Path('images', Path(row.path).stem + '.png'))
        assert labeller(image)['contrast'] == row.contrast
        with Image.open(row.path) as small:
            assert small.size == (SIZE + 8, SIZE + 8)


# --- the table ----------------------------------------------------------------------


def test_the_summary_has_median_and_range_and_compares_on_the_same_split(
    script: Any,
) -> None:
    values = {
        'plain': (0.5, 0.6, 0.7),
        'pretrained': (0.75, 0.7, 0.65),
        'longer': (0.8,),
    }
    rows = pd.DataFrame(
        [
            {'split': s, 'percent': 5, 'arm': arm, 'srcc': value, 'plcc': value / 2}
            for arm, figures in values.items()
            for s, value in enumerate(figures, start=1)
        ]
    )
    found = {(row['percent'], row['figure']): row for row in script.summary(rows)}
    srcc = found[5, 'srcc']
    assert srcc['plain'] == [0.6, 0.5, 0.7]
    assert srcc['pretrained'] == [0.7, 0.65, 0.75]
    assert srcc['longer'] == [0.8, 0.8, 0.8]
    assert srcc['adds'] == [0.1, -0.05, 0.25]  # 0.25, 0.1 and -0.05 on its splits
    assert found[5, 'plcc']['plain'] == [0.3, 0.25, 0.35]
    assert 'plain' not in found[100, 'srcc']
    line = '| 5 % | SRCC | 0.600 (0.500 to 0.700) | 0.700 (0.650 to 0.750) |'
    assert line in script.table_of(script.summary(rows))
