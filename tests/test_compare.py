"""Two runs compared: the truth is in the interval, errors are clear."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from result_files import explained, row, write_results

from pyiqa_clipkd.attributes.names import ATTRIBUTES
from pyiqa_clipkd.command import main
from pyiqa_clipkd.compare.attributes import attribute_differences, sentence
from pyiqa_clipkd.compare.difference import Samples, measure, of_groups, of_pairs
from pyiqa_clipkd.compare.pairing import pair, scored_pairs
from pyiqa_clipkd.compare.runs import read_run
from pyiqa_clipkd.names import LEVELS

SHIFT = 0.1


def simulated(seed: int, count: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Scores of the same photographs before and after something that adds SHIFT."""
    draw = np.random.default_rng(seed)
    before = draw.normal(3, 0.6, count)
    return before, before + SHIFT + draw.normal(0, 0.2, count)


def write_pair(
    folder: Path, shift: float = SHIFT, count: int = 40, ending: str = 'png'
) -> list[str]:
    """Two result files of the same photographs in two folders."""
    draw = np.random.default_rng(0)
    scores = draw.uniform(2, 4, count)
    after = scores + shift + draw.normal(0, 0.05, count) * bool(shift)
    write_results(
        folder / 'a.csv', {f'a/{i}.jpg': float(s) for i, s in enumerate(scores)}
    )
    write_results(
        folder / 'b.csv', {f'b/{i}.{ending}': float(s) for i, s in enumerate(after)}
    )
    return [str(folder / 'a.csv'), str(folder / 'b.csv')]


# --- statistics -----------------------------------------------------------------------


def test_about_every_twentieth_95_percent_interval_misses_the_truth() -> None:
    hits = 0
    for seed in range(100):
        result = of_pairs(*simulated(seed))
        hits += result.low <= SHIFT <= result.high
    assert 88 <= hits <= 99


def test_pairs_are_more_certain_than_groups_of_the_same_scores() -> None:
    paired, groups = of_pairs(*simulated(0)), of_groups(*simulated(0))
    assert paired.value == pytest.approx(groups.value)
    assert paired.high - paired.low < 0.5 * (groups.high - groups.low)
    assert paired.p < groups.p
    assert paired.shown
    assert not groups.shown


def test_a_higher_confidence_is_a_wider_interval() -> None:
    narrow, wide = (of_pairs(*simulated(0), confidence=c) for c in (0.8, 0.99))
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high


def test_the_same_scores_have_no_difference() -> None:
    before, _ = simulated(0)
    result = of_pairs(before, before)
    assert (result.value, result.low, result.high) == (0, 0, 0)
    assert (result.better, result.worse, result.p) == (0, 0, 1)
    assert result.sentence() == 'A and B have the same scores.'


def test_a_constant_shift_is_certain() -> None:
    before = np.linspace(2, 3, 9)
    result = of_pairs(before, before + 0.5)
    assert (result.low, result.high) == pytest.approx((0.5, 0.5))
    assert result.better == 1
    assert result.sentence().startswith('B scores 0.50 higher [0.50, 0.50] than A')


def test_shares_of_groups_are_those_of_all_pairs() -> None:
    draw = np.random.default_rng(1)
    a, b = draw.integers(1, 6, 17).astype(float), draw.integers(2, 6, 23).astype(float)
    result = of_groups(a, b)
    assert result.better == pytest.approx(np.mean(b[:, None] > a[None]))
    assert result.worse == pytest.approx(np.mean(b[:, None] < a[None]))
    assert result.value == pytest.approx(b.mean() - a.mean())


def test_lower_scores_read_as_lower() -> None:
    before, after = simulated(0)
    sentence = of_pairs(after, before).sentence('mine', 'yours')
    assert sentence.startswith('yours scores 0.1')
    assert ' lower [' in sentence


def test_the_seed_decides_the_interval() -> None:
    one, same, other = (of_pairs(*simulated(0), seed=s) for s in (0, 0, 1))
    assert one == same
    assert one != other
    assert one.value == other.value


# --- pairs ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('first', 'second', 'count'),
    [
        (['x/1.jpg', 'x/2.jpg'], ['x/1.jpg', 'x/2.jpg'], 2),
        (['x/p/1.jpg', 'x/q/1.jpg'], ['y/z/p/1.jpg', 'y/z/q/1.jpg'], 2),
        (['x/p/1.jpg', 'x/q/1.jpg'], ['y/p/1.webp', 'y/q/1.webp'], 2),
        (['x/1.jpg', 'x/2.jpg'], ['y/p/2.jpg', 'y/q/1.jpg'], 2),
        (['x/1.jpg', 'x/1.png', 'x/2.png'], ['y/1.webp', 'y/2.webp'], 1),
        (['x/1.jpg'], ['x/2.jpg'], 0),
        (['./x/1.jpg', './x/2.jpg'], ['/y/1.jpg', '/y/2.jpg'], 2),
    ],
)
def test_photographs_are_paired_by_what_their_names_share(
    tmp_path: Path, first: list[str], second: list[str], count: int
) -> None:
    runs = [
        read_run(write_results(tmp_path / f'{i}.csv', dict.fromkeys(paths, 3.0)))
        for i, paths in enumerate((first, second))
    ]
    pairs = pair(*runs)
    assert len(pairs) == count
    for a, b in pairs:
        names = [Path(paths[i]).stem for paths, i in ((first, a), (second, b))]
        assert names[0] == names[1]


def test_a_bad_file_pairs_but_does_not_count(tmp_path: Path) -> None:
    first, second = (
        read_run(
            write_results(
                tmp_path / f'{score}.csv',
                {f'{n}.jpg': score if n != without else None for n in range(8)},
            )
        )
        for score, without in ((3.0, None), (3.5, 0))
    )
    pairs = pair(first, second)
    assert len(pairs) == 8
    assert len(scored_pairs(first, second, pairs)) == 7
    assert measure(first, second).value == pytest.approx(0.5)


def test_few_equal_names_do_not_make_a_paired_comparison(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    for name in 'ab':
        scores = {f'{name}{i}.jpg': float(draw.uniform(2, 4)) for i in range(30)}
        same = {f'same{i}.jpg': 3.0 for i in range(10)}
        write_results(tmp_path / f'{name}.csv', {**scores, **same})
    runs = [read_run(tmp_path / f'{name}.csv') for name in 'ab']
    result = measure(*runs)
    assert not result.paired
    assert result.photographs == (40, 40)


# --- the command ----------------------------------------------------------------------


def test_it_says_how_far_b_is_above_a_and_what_moved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = write_pair(tmp_path)
    assert main(['compare', a, b]) == 0
    text = capsys.readouterr().out
    assert '40 pairs by name; without a scored partner, left out: 0 of A' in text
    assert 'Won most in B:' in text
    assert 'Wilcoxon signed-rank test: p = ' in text
    last = text.splitlines()[-1]
    assert last.startswith('B scores 0.1')
    assert last.endswith('a difference of this size is unlikely to be chance.')


def test_no_difference_is_said_to_be_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = write_pair(tmp_path, shift=0)
    assert main(['compare', a, b]) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[-1] == 'A and B have the same scores.'
    assert 'most in B' not in text


def test_json_has_all_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = write_pair(tmp_path)
    assert main(['compare', a, b, '--json', '--confidence', '0.9']) == 0
    result = json.loads(capsys.readouterr().out)
    assert result['pairs'] == result['a']['scored'] == 40
    difference = result['difference']
    assert difference['low'] < difference['value'] < difference['high']
    assert difference['confidence'] == 0.9
    means = [result[word]['mean'] for word in 'ab']
    assert means[1] - means[0] == pytest.approx(difference['value'])


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'metric': 'clipkd_swin'}, 'metric: clipkd_efficientnet_lite against clipkd_'),
        ({'sha256': 'f' * 16}, 'sha256: 0123456789abcdef against ffff'),
        ({'crops': 4}, 'crops: 0 against 4'),
        ({'input_size': 512}, 'input_size: 384 against 512'),
    ],
)
def test_what_was_scored_differently_needs_force(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, object],
    words: str,
) -> None:
    a, _ = write_pair(tmp_path)
    scores: dict[str, float | None] = {f'b/{i}.jpg': 3.0 for i in range(40)}
    b = str(write_results(tmp_path / 'b.csv', scores, **changes))
    assert main(['compare', a, b]) == 2
    assert words in capsys.readouterr().err
    assert main(['compare', a, b, '--force']) == 0
    printed = capsys.readouterr()
    assert words in printed.err
    assert '40 pairs by name' in printed.out


def test_another_backend_is_no_other_score(tmp_path: Path) -> None:
    a, _ = write_pair(tmp_path)
    scores: dict[str, float | None] = {f'b/{i}.jpg': 3.0 for i in range(40)}
    b = str(write_results(tmp_path / 'b.csv', scores, backend='onnx'))
    assert main(['compare', a, b]) == 0


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that the command ends with."""
    assert main(['compare', *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ''
    lines = printed.err.splitlines()
    assert len(lines) == 1
    return lines[0]


def test_mistakes_are_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = write_pair(tmp_path)
    few = str(write_results(tmp_path / 'few.csv', {f'{i}.jpg': 3.0 for i in range(4)}))
    none = str(
        write_results(tmp_path / 'none.csv', {f'{i}.jpg': None for i in range(9)})
    )
    assert 'B (few.csv) has 4 scored photographs; a comparison needs at least 5' in (
        fails(capsys, a, few)
    )
    assert 'A (none.csv) has 0 scored photographs' in fails(capsys, none, b)
    assert 'There is no file or folder' in fails(capsys, a, str(tmp_path / 'gone.csv'))
    assert '`--confidence` must be between 0 and 1, but got 95.0.' in (
        fails(capsys, a, b, '--confidence', '95')
    )
    assert '`--plot` must end in .png, .svg, .pdf' in (
        fails(capsys, a, b, '--plot', 'x.doc')
    )
    assert 'There is no folder for the plot' in (
        fails(capsys, a, b, '--plot', str(tmp_path / 'none' / 'x.png'))
    )


@pytest.mark.parametrize('paired', [True, False])
def test_a_plot_is_written(tmp_path: Path, paired: bool) -> None:
    pytest.importorskip('matplotlib')
    a, b = write_pair(tmp_path)
    if not paired:
        scores: dict[str, float | None] = {f'{i}-.jpg': 2 + i / 50 for i in range(50)}
        write_results(tmp_path / 'b.csv', scores)
    file = tmp_path / 'plot.png'
    assert main(['compare', a, b, '--plot', str(file)]) == 0
    with Image.open(file) as image:
        assert (image.width > image.height * 2) == paired


def test_without_matplotlib_a_plot_names_the_remedy(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr('pyiqa_clipkd.compare.command.find_spec', lambda name: None)
    a, b = write_pair(tmp_path)
    assert "pip install 'pyiqa-clipkd[plots]'" in fails(capsys, a, b, '--plot', 'x.png')


def test_a_jsonl_run_is_read_like_a_csv(tmp_path: Path) -> None:
    scores: dict[str, float | None] = {f'p/{i}.jpg': 2 + i / 10 for i in range(6)}
    bad = row('p/bad.jpg', None, 'the file is empty')
    runs = [
        read_run(write_results(tmp_path / name, {**scores, 'p/bad.jpg': bad}))
        for name in ('a.csv', 'a.jsonl')
    ]
    for run in runs:
        assert (len(run.scored), len(run.bad), run.folder) == (6, 1, 'p')
        assert run.bad['error'].tolist() == ['the file is empty']
        assert run.values('crops') == ['0']
    assert measure(*runs).value == 0


# --- attributes -----------------------------------------------------------------------


def write_explained(
    folder: Path, name: str, shift: float, changes: Mapping[str, float], count: int = 40
) -> str:
    """A result file whose scores and attributes are moved from those of all others."""
    same, own = np.random.default_rng(0), np.random.default_rng([*name.encode()])
    rows = {}
    for i in range(count):
        score = same.uniform(2, 4) + shift + own.normal(0, 0.05)
        values = [
            same.uniform(0.3, 0.7) + changes.get(attribute, 0) + own.normal(0, 0.02)
            for attribute in ATTRIBUTES
        ]
        rows[f'{i}'] = explained(f'{name}/{i}.jpg', score, values)
    return str(write_results(folder / f'{name}.csv', rows))


def test_attributes_that_differ_are_named_largest_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = {'noisiness': -0.25, 'sharpness': 0.2, 'contrast': 0.015}
    a = write_explained(tmp_path, 'a', 0, {})
    b = write_explained(tmp_path, 'b', 0.1, moved)
    assert main(['compare', a, b]) == 0
    lines = capsys.readouterr().out.splitlines()
    said = 'B is noisier, sharper and slightly richer in contrast than A.'
    place = lines.index(said)
    assert lines[place - 6] == '99% intervals, so that all five hold with 95%:'
    shown = dict(line.split(maxsplit=1) for line in lines[place - 5 : place])
    assert [*shown] == [*ATTRIBUTES]
    assert re.search(r'B - A -0\.2[45]\d \[-0\.2\d+, -0\.2\d+\]', shown['noisiness'])
    assert lines[-1].startswith('B scores 0.')


def test_json_has_the_attributes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = write_explained(tmp_path, 'a', 0, {})
    b = write_explained(tmp_path, 'b', 0, {'brightness': -0.1})
    assert main(['compare', a, b, '--json', '--confidence', '0.9']) == 0
    result = json.loads(capsys.readouterr().out)
    assert [name for name, d in result['attributes'].items() if d['shown']] == [
        'brightness'
    ]
    found = result['attributes']['brightness']
    assert found['low'] < found['value'] < found['high'] < 0
    assert found['value'] == pytest.approx(-0.1, abs=0.02)
    assert found['confidence'] == pytest.approx(0.98)  # 1 - 0.1 / 5
    means = [result[run]['attributes']['brightness'] for run in 'ab']
    assert means[1] - means[0] == pytest.approx(found['value'])
    assert result['attributes_summary'] == 'B is darker than A.'


@pytest.mark.parametrize('paired', [True, False])
def test_five_intervals_together_are_as_sure_as_a_single_one(paired: bool) -> None:
    first, second = simulated(0)
    both = Samples(first, second, paired)
    one, of_five = both.difference(), both.difference(comparisons=5)
    assert of_five == both.difference(confidence=0.99)._replace(
        confidence=of_five.confidence
    )
    assert of_five.low < one.low < one.high < of_five.high


def test_a_run_without_attributes_is_compared_as_ever(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = write_pair(tmp_path)
    b = write_explained(tmp_path, 'c', 0, {})
    assert main(['compare', plain[0], b]) == 0
    printed = capsys.readouterr()
    assert 'sharpness' not in printed.out
    assert printed.err == (
        'Attributes are not compared: they are missing in A. Score again with '
        '--attributes.\n'
    )
    assert main(['compare', *plain, '--json']) == 0
    printed = capsys.readouterr()
    assert 'attributes' not in printed.out + printed.err
    assert 'a.csv has no attributes: score it again' in (
        fails(capsys, plain[0], b, '--attributes')
    )


def test_the_same_attributes_and_none_that_differs_are_said(tmp_path: Path) -> None:
    runs = [
        read_run(Path(write_explained(tmp_path, name, 0, {}))) for name in ('a', 'b')
    ]
    for second, words in (
        (0, 'A and B have the same attributes.'),
        (1, 'No difference of an attribute is shown between A and B.'),
    ):
        both = (runs[0], runs[second])
        pairs = scored_pairs(*both, pair(*both))
        found = attribute_differences(both, pairs)
        assert found
        assert sentence(found) == words


# --- a ranking ------------------------------------------------------------------------


@pytest.fixture
def generators(tmp_path: Path) -> list[str]:
    """Four runs of the same 40 names; `best` and `second` are as good."""
    return [
        write_explained(tmp_path, 'worst', -0.6, {'sharpness': -0.3}),
        write_explained(tmp_path, 'best', 0.01, {}),
        write_explained(tmp_path, 'third', -0.2, {'noisiness': 0.25}),
        write_explained(tmp_path, 'second', 0, {}),
    ]


def test_four_runs_are_ranked_and_each_compared_with_the_next(
    generators: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(['compare', *generators]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        '4 runs by their mean score, best first, over the 40 photographs that all of '
        'them have:'
    )
    assert [line.split()[2] for line in lines[1:5]] == [
        f'{name}.csv' for name in ('best', 'second', 'third', 'worst')
    ]
    assert lines[-6].startswith('No difference shown: best.csv - second.csv is +0.0')
    assert lines[-5:-4] == [
        'No difference of an attribute is shown between second.csv and best.csv.'
    ]
    assert lines[-4].startswith('second.csv scores 0.18 higher [0.1')
    assert lines[-3] == 'second.csv is noisier than third.csv.'
    assert lines[-1] == 'third.csv is sharper and cleaner than worst.csv.'


def test_a_ranking_in_json_has_all_figures(
    generators: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(['compare', '--json', *generators]) == 0
    result = json.loads(capsys.readouterr().out)
    ranking, steps = result['ranking'], result['steps']
    assert [one['rank'] for one in ranking] == [1, 2, 3, 4]
    means = [one['mean'] for one in ranking]
    assert means == sorted(means, reverse=True)
    for i, step in enumerate(steps):
        assert (step['above'], step['below']) == (
            ranking[i]['name'],
            ranking[i + 1]['name'],
        )
        assert means[i] - means[i + 1] == pytest.approx(step['difference']['value'])
        # Six pairs of runs, and five attributes.
        assert step['difference']['confidence'] == pytest.approx(1 - 0.05 / 6)
        for name, found in step['attributes'].items():
            assert found['confidence'] == pytest.approx(1 - 0.05 / 30)
            own = [one['attributes'][name] for one in ranking[i : i + 2]]
            assert own[0] - own[1] == pytest.approx(found['value'])
    assert len(steps) == 3


def test_what_a_run_left_out_does_not_raise_its_rank(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = {f'{i}.jpg': 1.5 + i / 20 for i in range(40)}
    easy = dict(list(scores.items())[12:])  # the worst of its photographs are bad files
    files = [
        write_results(
            tmp_path / 'x.csv', {f'x/{n}': s * 1.2 for n, s in scores.items()}
        ),
        write_results(tmp_path / 'y.csv', {f'y/{n}': s for n, s in scores.items()}),
        write_results(
            tmp_path / 'z.csv',
            {f'z/{n}': scores[n] * 0.95 if n in easy else None for n in scores},
        ),
    ]
    assert main(['compare', *map(str, files)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert 'over the 28 photographs that all of them have' in lines[0]
    assert lines[1].endswith('x.csv, 12 without a scored partner left out')
    assert lines[3].endswith('z.csv, 12 could not be scored')
    assert not any('sharpness' in line for line in lines)
    assert lines[-1].startswith('y.csv scores 0.14 higher [')


def test_runs_of_other_photographs_are_ranked_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = np.random.default_rng(0)
    for name, mean, count in (('x', 2.0, 20), ('y', 3.0, 30), ('z', 4.0, 25)):
        scores: dict[str, float | None] = {
            f'{name}{i}.jpg': float(draw.normal(mean, 0.2)) for i in range(count)
        }
        write_results(tmp_path / f'{name}.csv', scores)
    files = [str(tmp_path / f'{name}.csv') for name in 'xyz']
    assert main(['compare', *files, '--json']) == 0
    result = json.loads(capsys.readouterr().out)
    assert not result['paired']
    assert [one['counted'] for one in result['ranking']] == [25, 30, 20]
    assert [one['name'] for one in result['ranking']] == ['z.csv', 'y.csv', 'x.csv']


def test_mistakes_of_a_ranking_are_one_clear_line(
    generators: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert 'worst.csv is there twice: a ranking needs different runs.' in (
        fails(capsys, *generators, generators[0])
    )
    assert '`--plot` shows two runs, but got 4.' in (
        fails(capsys, *generators, '--plot', str(tmp_path / 'x.png'))
    )
    assert 'There is no file or folder gone.csv.' in (
        fails(capsys, *generators, 'gone.csv')
    )
    few = str(write_results(tmp_path / 'few.csv', {f'{i}.jpg': 3.0 for i in range(4)}))
    assert 'few.csv has 4 scored photographs; a comparison needs at least 5' in (
        fails(capsys, few, *write_pair(tmp_path))
    )
    scores: dict[str, float | None] = {f'{i}.jpg': 3.0 for i in range(9)}
    other = str(write_results(tmp_path / 'other.csv', scores, metric='clipkd_swin'))
    assert 'a.csv and other.csv were scored differently: metric: clipkd_eff' in (
        fails(capsys, *write_pair(tmp_path), other)
    )


def test_runs_of_one_name_are_told_apart_by_their_paths(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = []
    for name in 'xyz':
        (tmp_path / name).mkdir()
        files.append(write_explained(tmp_path / name, 'scores', 0, {}))
    assert main(['compare', *files, '--json']) == 0
    ranking = json.loads(capsys.readouterr().out)['ranking']
    assert sorted(one['name'] for one in ranking) == files


# --- folders --------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path: Path, photographs: dict[str, Image.Image]) -> list[str]:
    """Photographs as PNG, and the same ones as bad JPEGs."""
    for name in ('fine', 'bad'):
        (tmp_path / name).mkdir()
    for word, photograph in photographs.items():
        for turn in (0, 90):
            turned = photograph.rotate(turn, expand=True).resize((96, 96))
            turned.save(tmp_path / f'fine/{word}{turn}.png')
            turned.save(tmp_path / f'bad/{word}{turn}.jpg', quality=3)
    return [str(tmp_path / name) for name in ('fine', 'bad')]


def test_two_folders_are_scored_and_compared(
    folders: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(['compare', *folders, '--backend', 'torch', '--device', 'cpu']) == 0
    printed = capsys.readouterr()
    assert '8 pairs by name' in printed.out
    assert ' lower [' in printed.out.splitlines()[-1]
    assert printed.err.splitlines() == [
        f'Scoring {folder} with clipkd_efficientnet_lite.' for folder in folders
    ]


@pytest.mark.slow
def test_damaged_metadata_is_not_shown(folders: list[str]) -> None:
    exif = Image.Exif()
    exif[0x010E] = 'text'
    file = Path(folders[0]) / 'corrupt.jpg'
    Image.new('RGB', (64, 48)).save(file, exif=exif)
    content = bytearray(file.read_bytes())
    content[content.index(b'Exif') + 14] = 0xFF  # the number of its entries
    file.write_bytes(content)
    shown = subprocess.run(
        [sys.executable, '-m', 'pyiqa_clipkd', 'compare', *folders],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    lines = shown.stderr.splitlines()
    assert [line.split()[0] for line in lines] == ['Scoring', 'Scoring'], shown.stderr


def test_a_folder_is_scored_as_the_result_file_was(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores: dict[str, float | None] = {
        str(path): 3.0 for path in Path(folders[0]).iterdir()
    }
    known = {'metric': 'clipkd_resnet18', 'crops': 1}
    file = write_results(tmp_path / 'a.csv', scores, **known)
    assert main(['compare', str(file), folders[1], '--force', '--json']) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert result['b']['metric'] == ['clipkd_resnet18']
    assert result['pairs'] == 8
    assert 'crops' not in printed.err
    assert 'sha256' in printed.err  # made-up ones


def test_a_folder_without_photographs_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, _ = write_pair(tmp_path)
    (tmp_path / 'empty').mkdir()
    assert main(['compare', a, str(tmp_path / 'empty'), '--backend', 'torch']) == 2
    assert 'There are no photographs in ' in capsys.readouterr().err


class Light:
    """A backend whose score and attributes are how bright a photograph is."""

    metric, weights, sha256 = 'clipkd_efficientnet_lite', 'light.onnx', 'f' * 64
    name, input_size, levels = 'onnx', 32, tuple(LEVELS)

    def __init__(self, *, attributes: bool) -> None:
        self.heads_sha256 = 'f' * 64 if attributes else ''

    def __call__(self, squares: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        return 1 + 4 * squares.mean((1, 2, 3)), None

    def explain(
        self, squares: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        scores, _ = self(squares)
        values = np.full((len(scores), len(ATTRIBUTES)), 0.5)
        values[:, ATTRIBUTES.index('brightness')] = (scores - 1) / 4
        return scores, None, values


@pytest.mark.parametrize('wanted', [True, False])
def test_folders_have_attributes_if_asked_for_or_if_the_file_has_them(
    folders: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    wanted: bool,
) -> None:
    def create_backend(metric: str, *, attributes: bool, **_: Any) -> Light:
        return Light(attributes=attributes)

    monkeypatch.setattr('pyiqa_clipkd.scoring.backends.create_backend', create_backend)
    for file in Path(folders[1]).iterdir():
        with Image.open(file) as image:
            darker = image.point(lambda value: value // 3)
        darker.save(file)
    options = ['--attributes'] if wanted else []
    assert main(['compare', *folders, *options]) == 0
    assert ('B is darker than A.' in capsys.readouterr().out) == wanted
    rows = {
        f'{i}': explained(str(file), 3.0 + i / 10, [0.5, 0.9, 0.5, 0.5, 0.5])
        for i, file in enumerate(Path(folders[0]).iterdir())
    }
    beside = str(write_results(tmp_path / 'a.csv', rows))
    assert main(['compare', beside, folders[1], *options, '--force']) == 0
    assert 'B is darker than A.' in capsys.readouterr().out
