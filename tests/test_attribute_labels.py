"""Labels of a folder: all photographs once, bad files named, and stops survived."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from scoring_data import ODD, encoded, photograph, write_odd

from pyiqa_clipkd import command as main_command
from pyiqa_clipkd.attributes import command
from pyiqa_clipkd.attributes.labels import Counts, write_labels
from pyiqa_clipkd.attributes.names import ATTRIBUTES
from pyiqa_clipkd.attributes.ranks import MeasureLabeller
from pyiqa_clipkd.scoring.tables import LABEL_COLUMNS, TEXT_FORMATS, parquet_rows

Rows = list[dict[str, Any]]
LABEL = [sys.executable, '-m', 'pyiqa_clipkd', 'label']


class Sizes:
    """A labeller whose values are known: parts of the width."""

    identity = 'sizes'

    def __init__(self, factor: float = 1e-4) -> None:
        self.factor = factor
        self.calls = 0
        self.lock = threading.Lock()

    def __call__(self, image: Image.Image) -> dict[str, float]:
        with self.lock:
            self.calls += 1
        assert image.mode == 'RGB'
        return {
            attribute: self.factor * number * image.width
            for number, attribute in enumerate(ATTRIBUTES)
        }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Odd and bad files among twelve photographs, each of another width."""
    result = tmp_path / 'photos'
    result.mkdir()
    write_odd(result)
    for number in range(12):
        content = encoded(photograph(number, (90 + number, 80)))
        (result / f'{number:02}.jpg').write_bytes(content)
    return result


BAD = [name for name, odd in ODD.items() if odd.error]


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def rows_of(path: Path) -> Rows:
    if path.suffix == '.parquet':
        return list(parquet_rows(path))
    with path.open('rb') as file:
        return [record.row for record in TEXT_FORMATS[path.suffix].records(file)]


def check(rows: Rows, paths: Sequence[Path]) -> None:
    """All files, each once, in their order, with labels or an error."""
    assert [row['path'] for row in rows] == [str(path) for path in paths]
    for row in rows:
        assert tuple(row) == LABEL_COLUMNS
        bad = Path(row['path']).name in BAD
        assert bool(row['error']) == bad
        for attribute in ATTRIBUTES:
            assert (row[attribute] is None) == bad
            assert bad or 0 <= row[attribute] <= 1


@pytest.mark.parametrize('ending', ['.parquet', '.csv', '.jsonl'])
def test_every_file_has_its_row(ending: str, folder: Path, tmp_path: Path) -> None:
    target = tmp_path / f'labels{ending}'
    counts = write_labels(files(folder), target, Sizes(), workers=3)
    rows = rows_of(target)
    check(rows, files(folder))
    assert (counts.labelled, counts.bad) == (len(rows) - len(BAD), len(BAD))
    assert counts.known == counts.known_bad == 0
    for row in rows:
        name = Path(row['path']).name
        assert row['labeller'] == 'sizes'
        assert row['raw_contrast'] is None
        if name in ODD:
            assert ODD[name].error in row['error']
            assert ODD[name].note in row['notes']
        else:
            assert (row['width'], row['height']) == (90 + int(name[:2]), 80)
            assert row['format'] == 'JPEG'
            assert row['noisiness'] == pytest.approx(4e-4 * row['width'])
    assert [path for path in tmp_path.iterdir() if path.name.startswith('.')] == []


def test_what_is_there_is_not_labelled_again(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / 'labels.parquet'
    first, labeller = files(folder)[:9], Sizes()
    write_labels(first, target, labeller)
    before = labeller.calls
    seen = []
    counts = write_labels(files(folder), target, labeller, found=lambda: seen.append(1))
    check(rows_of(target), files(folder))
    good = [path for path in files(folder)[9:] if path.name not in BAD]
    assert labeller.calls == before + len(good)
    assert counts.known + counts.known_bad == len(first)
    assert counts.labelled + counts.bad == len(seen) == len(files(folder))


def test_bad_files_can_be_tried_again(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / 'labels.parquet'
    write_labels(files(folder), target, Sizes())
    for name in BAD:
        (folder / name).write_bytes(encoded(photograph(3), 'PNG'))
    assert write_labels(files(folder), target, Sizes()).known_bad == len(BAD)
    counts = write_labels(files(folder), target, Sizes(), retry=True)
    assert counts.bad == 0
    rows = rows_of(target)
    assert {row['path'] for row in rows} == {str(path) for path in files(folder)}
    assert len(rows) == len(files(folder))
    assert not any(row['error'] for row in rows)


@pytest.mark.parametrize('factor', [-1e-4, 1.0, float('nan')])
def test_values_that_are_none_are_errors(factor: float, tmp_path: Path) -> None:
    (tmp_path / 'a.jpg').write_bytes(encoded(photograph(0, (90, 80))))
    target = tmp_path / 'labels.jsonl'
    counts = write_labels([tmp_path / 'a.jpg'], target, Sizes(factor))
    assert counts.bad == 1
    assert 'the labeller gives' in rows_of(target)[0]['error']


def test_labels_of_another_labeller_and_scores_are_left_alone(
    folder: Path, tmp_path: Path
) -> None:
    target = tmp_path / 'labels.parquet'
    write_labels(files(folder)[:3], target, Sizes())
    before = target.read_bytes()
    other = Sizes()
    other.identity = 'others'
    with pytest.raises(ValueError, match='holds labels of sizes, but these are of oth'):
        write_labels(files(folder), target, other)
    assert target.read_bytes() == before
    write_labels(files(folder), target, other, overwrite=True)
    assert {row['labeller'] for row in rows_of(target)} == {'others'}
    (tmp_path / 'scores.csv').write_text('path,score\na.jpg,3\n')
    with pytest.raises(ValueError, match='is no result file with the columns path, sh'):
        write_labels(files(folder), tmp_path / 'scores.csv', Sizes())


@pytest.mark.parametrize('wrong', [{'workers': 0}, {'workers': 1.5}, {'max_pixels': 0}])
def test_wrong_options_are_named(wrong: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'must be a whole number >= 1, but got'):
        write_labels([], tmp_path / 'labels.csv', Sizes(), **wrong)


def label(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    words = [*LABEL, *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, check=False)


def test_a_killed_run_goes_on(folder: Path, tmp_path: Path) -> None:
    for number in range(12, 60):
        content = encoded(photograph(number, (250, 240)))
        (folder / f'{number}.jpg').write_bytes(content)
    target, journal = (
        tmp_path / 'labels.parquet',
        tmp_path / '.labels.parquet.rows.jsonl',
    )
    process = subprocess.Popen(
        [*LABEL, str(folder), '-o', str(target), '--quiet', '--workers', '2']
    )
    deadline = time.monotonic() + 60
    while not journal.exists() or journal.read_bytes().count(b'\n') < 9:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not target.exists()
    written = journal.read_bytes()
    assert 9 <= written.count(b'\n') < len(files(folder))
    journal.write_bytes(written[:-20])  # as if it had been in the middle of a row
    done = label(folder, '-o', target)
    assert done.returncode == 3, done.stderr
    bad = [*BAD, 'one_pixel.png', 'strip.png']  # the last two are too small
    assert f'{len(files(folder)) - len(bad)} labelled, {len(bad)}' in done.stderr
    rows = rows_of(target)
    assert [row['path'] for row in rows] == [str(path) for path in files(folder)]
    labeller = MeasureLabeller()
    for row in rows:
        name = Path(row['path']).name
        if name in bad:
            assert row['error']
        elif name not in ODD:
            expected = labeller(Image.open(row['path']))
            assert row['labeller'] == labeller.identity
            for attribute in ATTRIBUTES:
                assert row[attribute] == expected[attribute]
                raw = f'raw_{attribute}'
                assert row[raw] == pytest.approx(expected[raw], abs=1e-4)
    again = label(folder, '-o', target)
    assert rows_of(target) == rows
    assert '0 files read' in again.stderr
    assert not journal.exists()


def test_the_command_says_what_is_wrong(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    target = str(tmp_path / 'labels.csv')
    (tmp_path / 'empty').mkdir()

    def error(*words: str) -> str:
        assert main_command.main(['label', *words]) == 2
        return capfd.readouterr().err

    assert 'must end in .csv, .jsonl, .parquet' in error('x', '-o', 'labels.txt')
    assert 'no photographs in' in error(str(tmp_path / 'empty'), '-o', target)
    assert '`workers` must be' in error(str(folder), '-o', target, '--workers', '0')
    weights = ('--weights', str(folder / '01.jpg'))
    assert '`--weights` needs --labeller' in error(str(folder), '-o', target, *weights)
    monkeypatch.setattr(command, 'find_spec', lambda name: None)
    assert "pip install 'pyiqa-clipkd[attributes]'" in error(str(folder), '-o', target)
    assert '`--labeller clip` needs torch' in error(
        str(folder), '-o', target, '--labeller', 'clip'
    )


def test_other_labellers_go_through_the_command(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(command.LABELLERS, 'clip', lambda **_: Sizes())
    target = tmp_path / 'labels.csv'
    words = ['label', str(folder / '01.jpg'), '-o', str(target), '--labeller', 'clip']
    assert main_command.main(words) == 0
    assert rows_of(target)[0]['labeller'] == 'sizes'
    assert '1 labelled, 0 could not be' in capfd.readouterr().err


def test_rows_do_not_wait_for_the_next_line_of_a_list(
    folder: Path, tmp_path: Path
) -> None:
    target = tmp_path / 'labels.csv'
    first = files(folder)[0]
    process = subprocess.Popen(
        [*LABEL, '-', '-o', target, '--quiet'], stdin=subprocess.PIPE
    )
    assert process.stdin is not None
    process.stdin.write(f'{first}\n'.encode())
    process.stdin.flush()
    end = time.monotonic() + 60
    while not (target.is_file() and len(target.read_text().splitlines()) > 1):
        assert time.monotonic() < end, 'the row is held back'
        time.sleep(0.05)
    process.stdin.close()
    assert process.wait(60) in (0, 3)


def test_a_stop_by_the_user_keeps_the_rows(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / 'labels.parquet'

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_labels(files(folder), target, Sizes(), found=stop)
    assert not target.exists()
    counts: Counts = write_labels(files(folder), target, Sizes())
    assert counts.known + counts.known_bad == 1
    check(rows_of(target), files(folder))
    assert os.listdir(tmp_path).count('labels.parquet') == 1
