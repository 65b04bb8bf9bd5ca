"""Two runs compared: the truth is in the interval, errors are clear."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from result_files import row, write_results

from pyiqa_clipkd.command import main
from pyiqa_clipkd.difference import measure, of_groups, of_pairs, pair, scored_pairs
from pyiqa_clipkd.runs import read_run

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
    monkeypatch.setattr('pyiqa_clipkd.compare.find_spec', lambda name: None)
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
