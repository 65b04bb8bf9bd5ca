"""Which prompts are chosen where the right ones are known, and the script's command."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import pytest
import torch
from PIL import Image
from script_modules import SCRIPTS, load_script
from torch import Tensor, nn

from pyiqa_clipkd.attributes.changes import LEVELS, order_agreement
from pyiqa_clipkd.attributes.clip import PromptPairs
from pyiqa_clipkd.attributes.names import ATTRIBUTES
from pyiqa_clipkd.attributes.prompts import PROMPTS, Pair, read_prompts
from pyiqa_clipkd.attributes.selection import flat_pairs, measure, rank
from pyiqa_clipkd.preprocessing import CLIP_MEAN, CLIP_STD

# What the two prompts of a pair look for in the statistics of a photograph: luma and
# colour, beside a number that never changes.
DIRECTIONS = {
    'right': (1.0, 0.0, 0.0),
    'reversed': (-1.0, 0.0, 0.0),
    'leaking': (1.0, 1.0, 0.0),
    'other': (0.0, 1.0, 0.0),
    'deaf': (0.0, 0.0, 0.0),
}
BRIGHTNESS = ('deaf', 'other', 'leaking', 'reversed', 'right')
WORDS: dict[str, tuple[str, ...]] = dict.fromkeys(ATTRIBUTES, ('deaf', 'other'))
WORDS |= {'brightness': BRIGHTNESS, 'noisiness': ('deaf',)}
RIGGED = {
    name: tuple(Pair(word, f'not {word}') for word in WORDS[name])
    for name in ATTRIBUTES
}


class Statistics(nn.Module):
    """An image tower that sees how bright and how colourful a photograph is."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def forward(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
        pixels = images * std + mean
        luma = (pixels * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1)
        colour = (pixels - luma[:, None]).abs()
        constant = torch.full((len(images),), 10.0)
        return torch.stack([luma.mean((1, 2)), colour.mean((1, 2, 3)), constant], dim=1)


def rigged(pairs: Sequence[Pair]) -> PromptPairs:
    sides = torch.tensor([DIRECTIONS[pair.good] for pair in pairs])
    anchors = torch.stack([sides, -sides], dim=1)
    return PromptPairs(
        Statistics(), anchors, temperature=0.1, input_size=64, identity='rigged'
    )


def small(photographs: dict[str, Image.Image]) -> list[Image.Image]:
    return [image.resize((96, 80)) for image in photographs.values()]


# --- the ranking ----------------------------------------------------------------------


def test_the_right_pair_wins_and_each_photograph_is_seen_once(
    photographs: dict[str, Image.Image],
) -> None:
    network = rigged([pair for _, pair in flat_pairs(RIGGED)])
    series = measure(small(photographs), network.of_images)
    columns = len(flat_pairs(RIGGED))
    for name, values in series.items():
        assert values.shape == (4, len(LEVELS[name]), columns)
    # The photograph and its changed copies, whatever the number of candidates.
    copies = 1 + sum(len([x for x in levels if x]) for levels in LEVELS.values())
    assert network.visual.seen == 4 * copies

    ranked = rank(series, RIGGED)
    brightness = [one.pair.good for one in ranked['brightness']]
    assert brightness[:2] == ['right', 'leaking']
    assert brightness[-1] == 'reversed'
    right, leaking = ranked['brightness'][:2]
    assert right.own > 0.99
    assert right.leak < 0.2
    assert leaking.leak > right.leak + 0.05
    assert ranked['colorfulness'][0].pair.good == 'other'
    assert ranked['brightness'][-1].own < -0.99
    deaf = next(one for one in ranked['brightness'] if one.pair.good == 'deaf')
    assert (deaf.own, deaf.leak) == (0, 0)


def test_the_figures_are_those_of_the_equation() -> None:
    pairs = {name: (PROMPTS[name],) for name in ATTRIBUTES}
    series = {}
    for name in ATTRIBUTES:
        levels = len(LEVELS[name])
        series[name] = np.full((2, levels, 5), 0.5)
    column = ATTRIBUTES.index('sharpness')
    # Of its own: in order on one photograph (range 0.4), two neighbours swapped on the
    # other (range 0.2, Spearman 0.9).
    series['sharpness'][0, :, column] = [0.1, 0.2, 0.3, 0.4, 0.5]
    series['sharpness'][1, :, column] = [0.1, 0.15, 0.25, 0.2, 0.3]
    # Of the others: downwards on one, upwards on the other, a third as far.
    series['noisiness'][0, :, column] = [0.54, 0.53, 0.52, 0.51, 0.5]
    series['noisiness'][1, :, column] = [0.5, 0.54, 0.58, 0.62, 0.66]
    # Further than its own counts as far as its own.
    series['contrast'][0, :, column] = np.linspace(0, 1, 9)
    (one,) = rank(series, pairs, leak_weight=0.5)['sharpness']
    assert one.own == pytest.approx((1 + 0.9) / 2)
    assert one.move['sharpness'] == pytest.approx(0.3)
    assert one.move['noisiness'] == pytest.approx(0.1)
    leak = (1 * (0.1 / 0.3) + 0.5 * 1 + 0 + 0) / 4
    assert one.leak == pytest.approx(leak)
    assert one.value == pytest.approx(0.95 - 0.5 * leak)
    assert one.order['noisiness'] == pytest.approx(1)
    # The other candidates have never moved.
    (constant,) = rank(series, pairs)['brightness']
    assert (constant.own, constant.leak, constant.value) == (0, 0, 0)


def test_agreement_is_that_of_the_series() -> None:
    rng = np.random.default_rng(0)
    pairs = {name: (PROMPTS[name],) for name in ATTRIBUTES}
    # Few different values, so that there are ties.
    series = {
        name: rng.integers(0, 4, (6, len(LEVELS[name]), 5)) / 4 for name in ATTRIBUTES
    }
    for column, name in enumerate(ATTRIBUTES):
        (one,) = rank(series, pairs)[name]
        own = [order_agreement(values) for values in series[name][..., column]]
        assert one.own == pytest.approx(np.mean(own))


def test_of_equal_candidates_the_earlier_one_wins() -> None:
    pairs = {name: (Pair('b', 'c'), Pair('a', 'd')) for name in ATTRIBUTES}
    series = {name: np.full((1, len(LEVELS[name]), 10), 0.5) for name in ATTRIBUTES}
    assert [one.pair.good for one in rank(series, pairs)['contrast']] == ['b', 'a']


def test_wrong_arguments_of_the_ranking_are_told() -> None:
    pairs = {name: (PROMPTS[name],) for name in ATTRIBUTES}
    series = {name: np.zeros((1, len(LEVELS[name]), 4)) for name in ATTRIBUTES}
    with pytest.raises(ValueError, match=r'`leak_weight` must be >= 0, but got -1'):
        rank(series, pairs, -1)
    with pytest.raises(ValueError, match=r'sharpness .* \(P, 5, 5\).* \(1, 5, 4\)'):
        rank(series, pairs)
    with pytest.raises(ValueError, match='one or more images, but got none'):
        measure([], rigged([Pair('right', 'wrong')]).of_images)


# --- the script -----------------------------------------------------------------------


@pytest.fixture
def folder(photographs: dict[str, Image.Image], tmp_path: Path) -> Path:
    (tmp_path / 'photos' / 'more').mkdir(parents=True)
    for name, image in zip(('a', 'b', 'more/c'), small(photographs), strict=False):
        image.save(tmp_path / 'photos' / f'{name}.png')
    (tmp_path / 'photos' / 'broken.jpg').write_bytes(b'no image')
    return tmp_path


def run_main(
    monkeypatch: pytest.MonkeyPatch, folder: Path, *options: str
) -> list[bytes]:
    """The bytes of both files."""
    script: Any = load_script('select_prompts')
    monkeypatch.setattr(script, 'CANDIDATES', RIGGED)
    monkeypatch.setattr(script, 'load_pairs', lambda *given: rigged(given[2]))
    monkeypatch.chdir(folder)
    words = ['select_prompts', 'photos', '-o', 'chosen.json', '--scores', 'chosen.csv']
    monkeypatch.setattr('sys.argv', [*words, *options])
    script.main()
    return [(folder / name).read_bytes() for name in ('chosen.json', 'chosen.csv')]


def test_the_script_writes_the_chosen_prompts_and_the_scores_of_all(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run_main(monkeypatch, folder)
    output = capsys.readouterr()
    prompts = read_prompts(folder / 'chosen.json')
    assert prompts['brightness'] == Pair('right', 'not right')
    assert prompts['colorfulness'] == Pair('other', 'not other')
    assert "'right' / 'not right'" in output.out
    assert 'broken.jpg: not an image' in output.err
    assert 'noisiness: no candidate follows' in output.err

    made_by = json.loads((folder / 'chosen.json').read_text())['made_by']
    assert made_by['photographs'] == 3
    assert made_by['clip'] == 'rigged'

    table = pd.read_csv(folder / 'chosen.csv')
    assert len(table) == len(flat_pairs(RIGGED))
    assert table.groupby('attribute', sort=False)['value'].first().index.tolist() == (
        list(ATTRIBUTES)
    )
    best = table[table.attribute == 'brightness'].iloc[0]
    assert best.good == 'right'
    others = [name for name in ATTRIBUTES if name != 'brightness']
    leak = np.mean(
        [
            best[f'order_{name}']
            * min(1, best[f'move_{name}'] / best['move_brightness'])
            for name in others
        ]
    )
    assert best.leak == pytest.approx(leak, abs=1e-3)
    assert best.value == pytest.approx(best.own - 0.5 * best.leak, abs=1e-4)

    assert run_main(monkeypatch, folder) == first


def test_number_and_seed_say_which_photographs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = [
        run_main(monkeypatch, folder, '--photographs', '1', '--seed', str(seed))[1]
        for seed in range(4)
    ]
    assert 1 < len(set(tables)) <= 3
    made_by = json.loads((folder / 'chosen.json').read_text())['made_by']
    assert made_by['photographs'] == 1


@pytest.mark.parametrize(
    ('options', 'told'),
    [
        (['--photographs', '0'], '`--photographs` must be at least 1, but got 0'),
        (['--leak-weight', '-1'], '`--leak-weight` must be >= 0, but got -1'),
        (['--longest', '0'], '`--longest` must be at least 1'),
    ],
)
def test_wrong_options_are_told_before_any_work(
    options: list[str],
    told: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        run_main(monkeypatch, folder, *options)
    assert told in capsys.readouterr().err
    assert not (folder / 'chosen.json').exists()


def test_weights_that_can_not_be_had_are_told_before_any_photograph_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script: Any = load_script('select_prompts')
    monkeypatch.chdir(folder)
    words = ['photos', '-o', 'chosen.json', '--scores', 'chosen.csv']
    monkeypatch.setattr('sys.argv', ['select', *words, '--pretrained', 'gone.pt'])
    with pytest.raises(SystemExit, match=r"or one of the tags openai.*'gone.pt'"):
        script.main()
    assert 'broken.jpg' not in capsys.readouterr().err


def test_a_folder_without_photographs_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in (folder / 'photos').rglob('*.png'):
        file.unlink()
    with pytest.raises(SystemExit, match='there is no photograph in photos'):
        run_main(monkeypatch, folder)


@pytest.mark.slow
def test_the_command_runs_with_a_clip_of_the_released_shape(tmp_path: Path) -> None:
    result = subprocess.run(
        [
            *(sys.executable, str(SCRIPTS / 'select_prompts.py')),
            *(str(SCRIPTS.parent / 'tests' / 'photos'), '--pretrained', 'random'),
            *('-o', 'prompts.json', '--scores', 'candidates.csv'),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert set(read_prompts(tmp_path / 'prompts.json')) == set(ATTRIBUTES)
    assert len(pd.read_csv(tmp_path / 'candidates.csv')) > 40
