from __future__ import annotations

import contextlib
import csv
import json
import os
import random
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scoring_data import METRIC, ODD, damaged, encoded, photograph, write_odd
from torchvision.transforms.functional import to_tensor

from pyiqa_clipkd.command import main
from pyiqa_clipkd.files import file_hash
from pyiqa_clipkd.locations import BUNDLED_FOLDER
from pyiqa_clipkd.metric import CLIPKDMetric
from pyiqa_clipkd.scoring.results import read_results

COMMAND = [sys.executable, '-m', 'pyiqa_clipkd', 'score']

# What a process has used at most: of itself alone, not of the one that started it.
PEAK = """
import sys
from pyiqa_clipkd.command import main
code = main(sys.argv[1:])
peak = next(x for x in open('/proc/self/status') if x.startswith('VmHWM:'))
print('peak', int(peak.split()[1]) // 1024)
raise SystemExit(code)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Photographs of two cameras, and the working directory above them."""
    monkeypatch.chdir(tmp_path)
    for number in range(4):
        path = tmp_path / 'photos' / f'camera{number % 2}' / f'IMG_{number // 2}.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(photograph(number, (280, 240))))
    return tmp_path / 'photos'


def score(
    *arguments: str, given: bytes = b'', code: int | None = 0
) -> subprocess.CompletedProcess[bytes]:
    result = subprocess.run([*COMMAND, *arguments], input=given, capture_output=True)
    assert code is None or result.returncode == code, result.stderr.decode()
    return result


def lines(result: subprocess.CompletedProcess[bytes]) -> list[list[str]]:
    return [line.split() for line in result.stdout.decode().splitlines()]


def test_lines_on_the_screen_and_a_summary(folder: Path) -> None:
    result = score('photos')
    rows = lines(result)
    assert [path for *_, path in rows] == [
        f'photos/camera{camera}/IMG_{number}.jpg'
        for camera in (0, 1)
        for number in (0, 1)
    ]
    for number, level, _ in rows:
        assert 1 <= float(number) <= 5
        assert level in ('bad', 'poor', 'fair', 'good', 'perfect')
    summary = result.stderr.decode()
    mean = np.mean([float(number) for number, *_ in rows])
    found = re.search(r'^4 scored, mean (.*)\.$', summary, re.MULTILINE)
    assert found
    assert float(found[1]) == pytest.approx(mean, abs=0.01)
    assert 'images/s' in summary
    digest = file_hash(BUNDLED_FOLDER / f'{METRIC}.safetensors')[:8]
    assert f'{METRIC}, weights {METRIC}.safetensors ({digest}), onnx.' in summary
    assert score('photos', '--quiet').stderr == b''


def test_torch_is_not_imported_where_onnxruntime_does_it(folder: Path) -> None:
    code = (
        'import sys; from pyiqa_clipkd.command import main; '
        "code = main(['score', 'photos', '--device', 'cpu']); "
        "bad = {'torch', 'timm', 'pandas', 'pyiqa', 'scipy', 'pyarrow'}; "
        'sys.exit(code or str(bad & set(sys.modules)))'
    )
    result = subprocess.run([sys.executable, '-c', code], capture_output=True)
    assert b'set()' in result.stderr


def test_selections(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = ['score', 'photos', '-o', 'all.csv', '--quiet']
    assert main(run) == 0
    assert capfd.readouterr().out == ''
    table = read_results('all.csv')
    table['path'] = table['path'].map(os.path.relpath)
    ordered = list(table.sort_values('score', ascending=False)['path'])
    cameras = [next(p for p in ordered if f'camera{c}' in p) for c in (0, 1)]
    numbers = [next(p for p in ordered if f'IMG_{n}' in p) for n in (0, 1)]
    for arguments, expected in (
        (['--top', '2'], ordered[:2]),
        (['--bottom', '3'], ordered[:0:-1]),
        (['--top', '9'], ordered),
        (['--best-of', 'folder'], cameras),
        (['--best-of', r'IMG_(\d)'], numbers),
        (['--best-of', 'nothing'], []),
        (['--paths-only'], list(table['path'])),
    ):
        assert main([*run, *arguments]) == 0
        shown = capfd.readouterr().out.splitlines()
        assert [line.split()[-1] for line in shown] == expected
    assert len(read_results('all.csv')) == 4


def test_photographs_without_a_group_are_counted(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = ['score', 'photos', '--best-of']
    assert main([*run, 'IMG_0']) == 0
    assert '2 match no group of --best-of' in capfd.readouterr().err
    assert main([*run, 'folder']) == 0
    assert 'match no group' not in capfd.readouterr().err


def test_exit_codes_for_pipelines(folder: Path) -> None:
    numbers = [float(number) for number, *_ in lines(score('photos'))]
    between = str(round(np.mean([min(numbers), max(numbers)]), 3))
    above = lines(score('photos', '--min-score', between, '--paths-only', code=1))
    assert 0 < len(above) < 4
    score('photos', '--min-score', '1')
    (folder / 'bad.jpg').write_bytes(b'text')
    result = score('photos', '--min-score', between, code=3)
    assert b'photos/bad.jpg: not an image' in result.stderr
    assert b'1 could not be scored.' in result.stderr
    (folder / 'empty').mkdir()
    assert b'no photographs in' in score('photos/empty', code=2).stderr


def test_lists_and_paths_go_from_pipe_to_pipe(folder: Path) -> None:
    odd = folder / 'two\nlines.jpg'
    odd.write_bytes((folder / 'camera0' / 'IMG_0.jpg').read_bytes())
    given = b'photos/two\nlines.jpg\0photos/camera1'
    result = score('-', '-0', '--paths-only', given=given)
    assert result.stdout.split(b'\0') == [
        b'photos/two\nlines.jpg',
        b'photos/camera1/IMG_0.jpg',
        b'photos/camera1/IMG_1.jpg',
        b'',
    ]
    score('-', given=b'')


def test_rows_on_the_screen(folder: Path) -> None:
    (folder / 'bad.jpg').write_bytes(b'text')
    out = score('photos', '--format', 'csv', code=3).stdout.decode()
    rows = list(csv.DictReader(out.splitlines()))
    out = score('photos', '--format', 'jsonl', code=3).stdout.decode()
    objects = [json.loads(line) for line in out.splitlines()]
    assert [row['path'] for row in rows] == [row['path'] for row in objects]
    assert rows[0]['error'] == objects[0]['error'] == 'not an image'
    assert float(rows[1]['score']) == objects[1]['score']


@pytest.mark.skipif(sys.platform == 'win32', reason='no such names there')
def test_names_of_strangers_command_no_terminal_program_or_spreadsheet(
    folder: Path,
) -> None:
    content = encoded(photograph(0, (64, 64)))
    for name in ('-rf.jpg', '=1+1.jpg', '\x1b]0;t\x07.jpg'):
        (folder / name).write_bytes(content)
    (folder / 'a\n\x1b[2J.jpg').write_bytes(b'no image')
    os.chdir(folder)
    names = ['-', '--paths-only', '-0', '--quiet']
    result = score(*names, given=b'-rf.jpg\0=1+1.jpg\0', code=0)
    assert result.stdout == b'./-rf.jpg\0./=1+1.jpg\0'
    result = score('=1+1.jpg', '--format', 'csv')
    assert result.stdout.splitlines()[1].startswith(b'./=1+1.jpg,')
    result = score('.', code=3)
    assert b'a\\n\\x1b[2J.jpg: not an image\n' in result.stderr
    assert b'\x1b]0;t\x07.jpg\n' in result.stdout  # a pipe gets the name as it is
    shown = in_a_terminal([*COMMAND, '.', '--quiet'])
    assert b'\\x1b]0;t\\x07.jpg' in shown
    assert b'\x1b]0' not in shown


def in_a_terminal(command: list[str]) -> bytes:
    """What a command writes to a terminal."""
    import pty

    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b''
    with contextlib.suppress(OSError), open(ours, 'rb', buffering=0) as file:
        while part := file.read(4096):
            shown += part
    process.wait(30)
    return shown


@pytest.mark.skipif(sys.platform == 'win32', reason='no head')
def test_a_reader_that_goes_away_is_no_error(folder: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, 'photos', '--quiet'], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b''
    assert process.wait() == 0


@pytest.mark.skipif(sys.platform == 'win32', reason='no head')
def test_a_reader_that_goes_away_does_not_keep_rows_from_the_file(folder: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, 'photos', '-o', 'a.csv', '--paths-only'],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert b'4 scored' in process.stderr.read()
    assert process.wait() == 0
    assert len(read_results('a.csv')) == 4


def test_the_same_names_in_another_folder_are_other_photographs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ('camera0', 'camera1'):
        monkeypatch.chdir(folder / name)
        assert main(['score', '.', '-o', '../../all.csv', '--paths-only']) == 0
        assert capfd.readouterr().out.splitlines() == ['IMG_0.jpg', 'IMG_1.jpg']
    paths = sorted(str(path) for path in folder.rglob('*.jpg'))
    assert sorted(read_results('../../all.csv')['path']) == paths


def test_a_file_is_written_by_one_run_at_a_time(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = folder.parent / 'a.csv'
    run = [*COMMAND, '-', '-o', 'a.csv', '--quiet']
    with subprocess.Popen(run, stdin=subprocess.PIPE) as first:
        while not output.exists():
            time.sleep(0.01)
        for option in ('--quiet', '--overwrite'):
            assert main(['score', 'photos', '-o', str(output), option]) == 2
            (line,) = capfd.readouterr().err.splitlines()
            assert 'a.csv is being written by another run' in line
        first.kill()
    assert main(['score', 'photos', '-o', str(output)]) == 0
    assert len(read_results(output)) == 4
    assert set(folder.parent.iterdir()) == {folder, output}


@pytest.mark.skipif(sys.platform == 'win32', reason='no such terminals')
def test_ctrl_c_while_a_list_is_typed(folder: Path) -> None:
    import pty

    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [*COMMAND, '-', '-o', 'a.csv', '--overwrite'], stdin=theirs, stderr=theirs
    ) as process:
        os.close(theirs)
        while not Path('a.csv').exists():
            time.sleep(0.01)
        time.sleep(0.3)  # until it waits for the list
        process.send_signal(signal.SIGINT)
        shown = b''
        with contextlib.suppress(OSError):  # the other end was closed
            while part := os.read(ours, 1 << 16):
                shown += part
    os.close(ours)
    assert process.returncode == 130
    assert b'Fatal' not in shown
    assert b'The same command without --overwrite goes on.' in shown


@pytest.mark.skipif(sys.platform == 'win32', reason='no such terminals')
def test_a_terminal_gets_a_progress_bar_and_a_pipe_none(folder: Path) -> None:
    import fcntl
    import pty
    import struct
    import termios

    assert b'photo/s' not in score('photos').stderr
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 100, 0, 0))
    with subprocess.Popen(
        [*COMMAND, 'photos'], stdout=subprocess.PIPE, stderr=theirs
    ) as process:
        os.close(theirs)
        shown = b''
        with contextlib.suppress(OSError):  # the other end was closed
            while part := os.read(ours, 1 << 16):
                shown += part
        assert process.stdout is not None
        assert process.stdout.read().count(b'\n') == 4
    os.close(ours)
    assert b'4 scored' in shown
    assert b'/4 [' in shown  # the total is known


@pytest.mark.parametrize('ending', ['.csv', '.jsonl', '.parquet'])
def test_a_second_run_adds_what_is_new(
    ending: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = f'results{ending}'
    run = ['score', 'photos', '-o', output, '--device', 'cpu']
    assert main([*run]) == 0
    first = read_results(output)
    (folder / 'new.jpg').write_bytes(encoded(photograph(7, (260, 250))))
    (folder / 'bad.jpg').write_bytes(b'text')
    for _ in range(2):  # the second of them finds nothing to do, and says the same
        capfd.readouterr()
        assert main([*run]) == 3
        summary = capfd.readouterr().err
        assert '5 scored' in summary
        assert 'photos/bad.jpg: not an image' in summary
    assert '6 were in results' in summary
    assert 'not an image (in an earlier run)' in summary
    second = read_results(output)
    assert second.head(4).equals(first)
    added = [str(folder / name) for name in ('bad.jpg', 'new.jpg')]
    assert sorted(second['path'][4:]) == added
    (folder / 'bad.jpg').write_bytes(encoded(photograph(8, (260, 250))))
    assert main([*run]) == 3
    assert main([*run, '--retry']) == 0
    assert len(read_results(output)) == 6
    (folder / 'bad.jpg').write_bytes(b'text')
    assert main([*run, '--crops', '1']) == 2
    assert 'holds scores of' in capfd.readouterr().err
    assert main([*run, '--crops', '1', '--overwrite']) == 3
    assert set(read_results(output)['crops']) == {1}


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['-o', 'a.txt'], 'must end in .csv, .jsonl, .parquet'),
        (['--overwrite'], 'needs a file'),
        (['--retry'], 'needs a file'),
        (['-o', 'a.csv', '--format', 'csv'], '`--format` is for the screen'),
        (['--format', 'csv', '--paths-only'], 'either `--paths-only` or `--format`'),
        (['--format', 'xml'], 'invalid choice'),
        (['--top', '0'], 'must be a whole number >= 1'),
        (['--top', '3', '--bottom', '3'], 'not allowed with'),
        (['--crops=-1'], 'must be a whole number >= 0'),
        (['--min-score', '6'], '`--min-score` must be in [1, 5], but got 6'),
        (['--max-megapixels', '0'], 'must be above 0'),
        (['--max-megapixels', 'nan'], 'must be above 0'),
        (['--best-of', '('], 'regular expression'),
        (['-0'], '`-0` needs'),
        (['-m', 'clipkd_efficientnet_lit'], 'did you mean clipkd_efficientnet_lite?'),
        (['--device', 'tpu'], 'invalid choice'),
        (['--backend', 'tf'], 'invalid choice'),
        (['--weights', 'gone.safetensors'], 'There is no weight file'),
        (['--backend', 'onnx', '--input-size', '224'], '`input_size` of an ONNX graph'),
        (['--backend', 'onnx', '--device', 'cuda'], '`device` cuda needs'),
        (['--workers', 'many'], "must be a whole number >= 1, but got 'many'"),
    ],
)
def test_wrong_arguments_are_one_error_before_a_file_is_read(
    arguments: list[str],
    message: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr('pyiqa_clipkd.images.read_photograph', None)
    code: object
    try:
        code = main(['score', 'photos', *arguments])
    except SystemExit as error:
        code = error.code
    assert code == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.out == ''
    assert not list(Path().glob('a.*'))


def test_the_help_tells_of_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(['score', '--help'])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    for words in ('Exit codes', '--best-of folder|PATTERN', '-o FILE', '130'):
        assert words in shown


@pytest.mark.skipif(sys.platform == 'win32', reason='no such signal')
def test_ctrl_c_leaves_whole_rows_and_says_how_to_go_on(folder: Path) -> None:
    paths = [str(folder / 'camera0' / 'IMG_0.jpg')]
    for number in range(300):
        path = folder / f'{number}.jpg'
        path.symlink_to(paths[0])
    process = subprocess.Popen(
        [*COMMAND, 'photos', '-o', 'a.csv'], stderr=subprocess.PIPE
    )
    while not Path('a.csv').exists() or Path('a.csv').read_bytes().count(b'\n') < 5:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert b'The same command goes on.' in errors
    assert b'Traceback' not in errors
    assert 4 <= len(read_results('a.csv')) < 304


@pytest.mark.skipif(sys.platform == 'win32', reason='no such pipes')
def test_a_row_does_not_wait_for_the_next_path_of_a_list(folder: Path) -> None:
    with subprocess.Popen(
        [*COMMAND, '-', '--quiet'], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for number in (0, 1):
            process.stdin.write(f'photos/camera0/IMG_{number}.jpg\n'.encode())
            process.stdin.flush()
            ready, _, _ = select.select([process.stdout], [], [], 20)
            if not ready:
                process.kill()
            assert ready
            assert f'IMG_{number}.jpg' in process.stdout.readline().decode()
        process.stdin.close()
    assert process.returncode == 0


# --- slow -----------------------------------------------------------------------------


def _kill_until_done(arguments: Sequence[str], seed: int) -> int:
    """Start a command again and again, killed at random moments; how often it was."""
    chance = random.Random(seed)
    for kills in range(1000):
        process = subprocess.Popen(
            [*COMMAND, *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            assert process.wait(timeout=chance.uniform(1, 12)) == 3
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        else:
            return kills
    raise AssertionError('it never ended')


@pytest.fixture(scope='module')
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,000 photographs, and 300 files that are odd or damaged."""
    folder = tmp_path_factory.mktemp('mixed')
    rng = np.random.default_rng(0)
    for number in range(1000):
        size = tuple(int(side) for side in rng.integers(60, 260, size=2))
        image = photograph(number, (size[0], size[1]))
        kind = ('JPEG', 'PNG', 'WEBP')[number % 3]
        (folder / f'good{number}.{kind.lower()}').write_bytes(encoded(image, kind))
    write_odd(folder)
    for number in range(300 - len(ODD)):
        kind = ('JPEG', 'PNG', 'WEBP', 'GIF', 'TIFF', 'BMP')[number % 6]
        content = encoded(photograph(number, (90, 80)), kind)
        path = folder / f'damaged{number}.{kind.lower()}'
        path.write_bytes(damaged(content, rng))
    return folder


@pytest.fixture(scope='module')
def whole_run(mixed: Path) -> dict[str, tuple[float, str]]:
    """Path -> score and error, of a run that nobody stops, with one worker."""
    output = mixed.parent / 'whole.csv'
    score(str(mixed), '-o', str(output), '--workers', '1', '--quiet', code=3)
    return _scores(output)


def _scores(output: Path) -> dict[str, tuple[float, str]]:
    table = read_results(output)
    assert table['path'].is_unique
    columns = (table['path'], table['score'].fillna(0), table['error'])
    return {path: (value, error) for path, value, error in zip(*columns, strict=True)}


@pytest.mark.slow
def test_300_bad_files_among_1000_good_ones(
    mixed: Path, whole_run: dict[str, tuple[float, str]]
) -> None:
    assert set(whole_run) == {str(path) for path in mixed.iterdir()}
    for path, (value, error) in whole_run.items():
        assert bool(value) != bool(error), path
        if Path(path).name.startswith('good'):
            assert 1 <= value <= 5, error
        elif (odd := ODD.get(Path(path).name)) is not None:
            assert odd.error in error
            assert bool(odd.error) == bool(error)
    bad = [path for path, (_, error) in whole_run.items() if error]
    assert len(bad) > 100
    # A good one scores the same when it is alone.
    some = sorted(path for path in whole_run if 'good' in path)[::100]
    output = mixed.parent / 'some.csv'
    score(*some, '-o', str(output), '--quiet')
    assert _scores(output) == {path: whole_run[path] for path in some}
    metric = CLIPKDMetric(METRIC)
    for path in some:
        image = to_tensor(Image.open(path).convert('RGB'))[None]
        assert abs(float(metric(image)) - whole_run[path][0]) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize('ending', ['.csv', '.jsonl', '.parquet'])
def test_killed_at_random_no_row_is_lost_or_twice(
    ending: str, mixed: Path, whole_run: dict[str, tuple[float, str]], tmp_path: Path
) -> None:
    output = tmp_path / f'results{ending}'
    kills = _kill_until_done([str(mixed), '-o', str(output), '--quiet'], seed=1)
    assert kills > 0
    assert _scores(output) == whole_run
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='no peak here')
@pytest.mark.parametrize('kind', ['plain', 'rotated', 'CMYK', 'alpha', '16 bit'])
def test_48_megapixels_stay_below_a_gigabyte(kind: str, tmp_path: Path) -> None:
    image = photograph().resize((8000, 6000))
    exif = Image.Exif()
    exif[0x0112] = 6 if kind == 'rotated' else 1
    if kind == 'CMYK':
        image = image.convert('CMYK')
    path = tmp_path / ('0.png' if kind in ('alpha', '16 bit') else '0.jpg')
    if kind == 'alpha':
        image.putalpha(100)
    if kind == '16 bit':
        image = Image.fromarray(np.asarray(image.convert('L')).astype(np.uint16) * 257)
    image.save(path, exif=exif)
    for number in range(1, 6):
        os.link(path, path.with_stem(str(number)))
    result = subprocess.run(
        [sys.executable, '-c', PEAK, 'score', str(tmp_path), '--workers', '4'],
        capture_output=True,
    )
    assert result.returncode == 0, result.stderr.decode()
    assert int(result.stdout.split()[-1]) < 1000


@pytest.mark.slow
def test_a_million_names_are_no_reason_to_wait(tmp_path: Path) -> None:
    """The first score is there long before a long list has ended."""
    path = tmp_path / 'a.jpg'
    path.write_bytes(encoded(photograph(2)))
    process = subprocess.Popen(
        [*COMMAND, '-', '--quiet'], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f'{path}\n'.encode())
    for number in range(40):
        (tmp_path / f'{number}.jpg').symlink_to(path)
        process.stdin.write(f'{tmp_path}/{number}.jpg\n'.encode())
    process.stdin.flush()
    assert process.stdout.readline().endswith(b'a.jpg\n')  # the list is still open
    process.stdin.close()
    assert process.wait(timeout=60) == 0
