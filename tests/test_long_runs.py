"""What happens in long runs: stops, full disks, second runs, memory over thousands."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from result_files import write_results
from scoring_data import encoded, photograph
from script_modules import load_script
from training_data import (
    finished,
    student_options,
    write_images,
    write_options,
    write_teacher,
)

from pyiqa_clipkd.files import naming, written_whole
from pyiqa_clipkd.scoring.locks import locked
from pyiqa_clipkd.scoring.results import read_results
from pyiqa_clipkd.stops import Stop, run_script, stoppable

pytestmark = pytest.mark.skipif(sys.platform == 'win32', reason='signals, limits')

TRAIN = Path(__file__).parents[1] / 'scripts' / 'train.py'

# Python's own start can't be kept from a traceback, so signals come after this line.
UP = 'import sys; from pyiqa_clipkd.command import main; print(flush=True); '
COMMAND = [sys.executable, '-c', UP + 'sys.exit(main())']


@pytest.fixture(scope='module')
def photographs_of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `a` and `b`: forty small photographs, and the same reduced."""
    folder = tmp_path_factory.mktemp('two')
    for name in ('a', 'b'):
        (folder / name).mkdir()
    for number in range(40):
        image = photograph(number, (80, 60))
        (folder / f'a/{number:02}.jpg').write_bytes(encoded(image))
        small = image.resize((20, 15)).resize(image.size)
        (folder / f'b/{number:02}.jpg').write_bytes(encoded(small))
    return folder


# --- stops ----------------------------------------------------------------------------


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_stops_and_the_second_one_kills(
    number: signal.Signals,
) -> None:
    before = signal.getsignal(number)
    with stoppable() as stop:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
        assert stop.code == 128 + number
        assert signal.getsignal(number) == signal.SIG_DFL
    assert signal.getsignal(number) == before


def test_a_stop_in_the_definition_of_a_dataclass_keeps_the_code(
    tmp_path: Path,
) -> None:
    (tmp_path / 'stopped.py').write_text(
        """
import os, signal, sys
from pyiqa_clipkd.stops import stoppable

try:
    with stoppable() as stop:
        exec('os.kill(os.getpid(), signal.SIGTERM)')  # as dataclasses do with code
except KeyboardInterrupt:
    sys.exit(stop.code)
"""
    )
    done = subprocess.run([sys.executable, '-m', 'stopped'], cwd=tmp_path)
    assert done.returncode == 128 + signal.SIGTERM


# Sends itself SIGTERM when the import of the compiled module argv[1] calls Python.
STOPPED_WHILE_LOADING = """
import builtins, os, signal, sys
from importlib.machinery import ExtensionFileLoader
from pyiqa_clipkd.stops import stoppable

imported, loading = __import__, set()

def noted(step):
    def load(self, what):
        loading.add(getattr(what, '__spec__', what).name)
        try:
            return step(self, what)
        finally:
            loading.clear()
    return load

def stopped_import(*arguments, **names):
    if sys.argv[1] in loading:
        loading.clear()
        os.kill(os.getpid(), signal.SIGTERM)
    return imported(*arguments, **names)

builtins.__import__ = stopped_import
ExtensionFileLoader.create_module = noted(ExtensionFileLoader.create_module)
ExtensionFileLoader.exec_module = noted(ExtensionFileLoader.exec_module)
try:
    with stoppable() as stop:
        import scipy.stats
        import time
        time.sleep(5)
        sys.exit('nothing came')
except KeyboardInterrupt:
    sys.exit(stop.code)
"""


@pytest.mark.parametrize('module', ['_stats_pythran', '_qmc_cy'])
def test_a_stop_while_a_compiled_module_is_imported_is_not_its_failure(
    module: str,
) -> None:
    done = subprocess.run(
        [sys.executable, '-c', STOPPED_WHILE_LOADING, f'scipy.stats.{module}'],
        capture_output=True,
        text=True,
    )
    assert done.stderr == ''
    assert done.returncode == 128 + signal.SIGTERM


def test_ignored_signals_and_those_of_torchrun_are_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with stoppable():
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', '1')
    with stoppable():
        assert not isinstance(signal.getsignal(signal.SIGTERM), Stop)


def test_a_script_says_how_to_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr('pyiqa_clipkd.stops.die_at_once', lambda: None)

    def run() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as caught:
        run_script(run, 'The same again.')
    assert caught.value.code == 143
    assert capsys.readouterr().err == '\nStopped. The same again.\n'


# --- no room --------------------------------------------------------------------------


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / 'page.html'
    path.write_text('before')

    def write() -> None:
        with written_whole(path) as partial:
            partial.write_text('torn')
            try:
                raise OSError(errno.ENOSPC, 'No space left on device')
            except OSError:
                raise RuntimeError('unexpected pos 640 vs 598') from None

    with pytest.raises(OSError, match=r'make room.*page\.html') as caught:
        write()
    assert caught.value.errno == errno.ENOSPC
    assert path.read_text() == 'before'
    assert list(tmp_path.iterdir()) == [path]


def test_other_errors_keep_their_words(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match='bug'), naming(tmp_path):
        raise RuntimeError('bug')
    with pytest.raises(PermissionError), naming(tmp_path):
        raise PermissionError(errno.EACCES, 'no')


# --- two runs on one file -------------------------------------------------------------


@pytest.fixture
def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that is shared by old means."""

    def flock(file: Any, operation: int) -> None:
        raise OSError(errno.ENOLCK, 'No locks available')

    monkeypatch.setattr(fcntl, 'flock', flock)


def test_without_locks_a_second_run_is_refused_all_the_same(
    tmp_path: Path, without_locks: None
) -> None:
    path = tmp_path / 'a.csv'
    words = f'written by process {os.getpid()} on {socket.gethostname()}'
    with locked(path):
        with pytest.raises(BlockingIOError, match=words), locked(path):
            pass
        with pytest.raises(BlockingIOError, match=r'remove .*owner'), locked(path):
            pass
    assert list(tmp_path.iterdir()) == []
    with locked(path):
        pass


@pytest.mark.parametrize('other_host', [False, True])
def test_without_locks_the_owner_decides_what_is_stale(
    tmp_path: Path, without_locks: None, other_host: bool
) -> None:
    ended = subprocess.Popen([sys.executable, '-c', ''])
    ended.wait()
    host = 'elsewhere' if other_host else socket.gethostname()
    (tmp_path / '.a.csv.lock.owner').write_text(f'{host} {ended.pid}')
    if other_host:  # nobody can tell from here
        with (
            pytest.raises(BlockingIOError, match='on elsewhere'),
            locked(tmp_path / 'a.csv'),
        ):
            pass
    else:
        with locked(tmp_path / 'a.csv'):
            pass
        assert list(tmp_path.iterdir()) == []


# --- slow: real processes -------------------------------------------------------------


def stopped(
    words: Sequence[str], number: signal.Signals, after: float, folder: Path
) -> int:
    """Run the command, send the signal; its exit code, if all it said was one line."""
    process = subprocess.Popen(
        [*COMMAND, *words],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(after)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    code = process.returncode
    assert 'Traceback' not in errors, errors
    assert 'Error' not in errors, errors
    if code not in (0, -number):  # at the very end there is nothing left to say
        assert code == 128 + number, errors
        assert 'Stopped.' in errors
    return code


def seconds_of(words: Sequence[str], folder: Path) -> float:
    start = time.monotonic()
    subprocess.run(
        [*COMMAND, *words], cwd=folder, capture_output=True, check=True, text=True
    )
    return time.monotonic() - start


@pytest.mark.slow
@pytest.mark.parametrize('ending', ['csv', 'parquet'])
def test_score_stopped_at_random_moments_loses_nothing(
    ending: str, photographs_of_two: Path, tmp_path: Path
) -> None:
    words = ['score', str(photographs_of_two / 'a'), '--quiet', '-o']
    limit = seconds_of([*words, f'whole.{ending}'], tmp_path)
    chance, codes = random.Random(0), []
    for turn in range(8):
        number = (signal.SIGINT, signal.SIGTERM)[turn % 2]
        after = chance.uniform(0, limit)
        codes.append(stopped([*words, f'a.{ending}'], number, after, tmp_path))
    assert set(codes) - {0}, 'all came too late'
    seconds_of([*words, f'a.{ending}'], tmp_path)
    whole, parts = (read_results(tmp_path / f'{n}.{ending}') for n in ('whole', 'a'))
    columns = ['path', 'score', 'error']
    assert parts[columns].equals(whole[columns])
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f'whole.{ending}', f'a.{ending}'}


def undated(page: Path) -> bytes:
    """Without the minute in which it was written."""
    return re.sub(rb'\d{4}-\d\d-\d\d \d\d:\d\d', b'', page.read_bytes())


@pytest.mark.slow
@pytest.mark.parametrize('command', ['report', 'compare'])
def test_others_stopped_at_random_moments_leave_nothing_half(
    command: str, photographs_of_two: Path, tmp_path: Path
) -> None:
    output = tmp_path / 'out.html'
    scores = {f'{photographs_of_two}/a/{n:02}.jpg': 2 + n / 40 for n in range(40)}
    words = {
        'report': ['report', str(write_results(tmp_path / 'r.csv', scores))],
        'compare': ['compare', *(str(photographs_of_two / name) for name in 'ab')],
    }[command]
    words += ['-o', str(output)] if command == 'report' else []
    limit = seconds_of(words, tmp_path)
    before = {path.name for path in tmp_path.iterdir()}
    content = undated(output) if command == 'report' else b''
    chance = random.Random(1)
    for turn in range(6):
        number = (signal.SIGINT, signal.SIGTERM)[turn % 2]
        stopped(words, number, chance.uniform(0, limit), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == before
    if command == 'report':
        assert undated(output) == content


def small_training(folder: Path) -> Path:
    write_images(folder / 'data')
    write_teacher(folder / 'data')
    options = student_options(Path('data'), total_epoch=8)
    options['logger']['use_tb_logger'] = False
    options['logger']['save_checkpoint_freq'] = 3
    return write_options(folder / 'o.yml', options)


def trained(folder: Path, *flags: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(TRAIN), '-opt', 'o.yml', '--auto_resume', *flags],
        cwd=folder,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / 'experiments/student/models/net_latest.pth'
    found: dict[str, torch.Tensor] = torch.load(path, weights_only=True)['params']
    return found


def assert_same_weights(folder: Path, other: Path) -> None:
    one, two = weights_of(folder), weights_of(other)
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(scope='module')
def whole_training(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('training')
    small_training(folder)
    finished(trained(folder))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ('number', 'code'), [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
def test_a_training_that_is_stopped_says_how_to_go_on(
    number: signal.Signals, code: int, whole_training: Path, tmp_path: Path
) -> None:
    small_training(tmp_path)
    process = trained(tmp_path)
    states = tmp_path / 'experiments/student/training_states'
    while not (states / '9.state').exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code, output
    assert 'Traceback' not in output
    assert output.endswith('\nStopped. The same command with --auto_resume goes on.\n')
    assert not list(tmp_path.rglob('*.part'))
    finished(trained(tmp_path))
    assert_same_weights(whole_training, tmp_path)


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Path]:
    """A real file system of that size; `grow` it to have room again."""
    disk = folder / 'disk'
    disk.mkdir()
    options = f'size={kilobytes}k'
    mount = ['mount', '-t', 'tmpfs', '-o', options, 'tmpfs', str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip('may not mount a small file system')
    try:
        yield disk
    finally:
        subprocess.run(['umount', '-l', str(disk)], check=True)


def grow(disk: Path, kilobytes: int) -> None:
    options = f'remount,size={kilobytes}k'
    subprocess.run(['mount', '-o', options, str(disk)], check=True)


def refused(words: Sequence[str], name: str) -> None:
    """The command ends with one error that names the file."""
    result = subprocess.run([*COMMAND, *words], capture_output=True, text=True)
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.splitlines()
    assert 'no room' in line
    assert name in line


@pytest.mark.slow
@pytest.mark.parametrize('ending', ['csv', 'jsonl', 'parquet'])
def test_scores_on_a_full_disk_go_on_when_there_is_room(
    ending: str, photographs_of_two: Path, tmp_path: Path
) -> None:
    folder = str(photographs_of_two / 'a')
    whole = tmp_path / f'whole.{ending}'
    seconds_of(['score', folder, '--quiet', '-o', str(whole)], tmp_path)
    with small_disk(tmp_path, 4) as disk:
        output = disk / f'a.{ending}'
        words = ['score', folder, '--quiet', '-o', str(output)]
        refused(words, output.name)
        if ending != 'parquet':
            assert len(read_results(output)) > 5
        refused(words, output.name)  # and nothing is lost by trying
        grow(disk, 4000)
        seconds_of(words, tmp_path)
        assert [path.name for path in disk.iterdir()] == [output.name]
        columns = ['path', 'score']
        assert read_results(output)[columns].equals(read_results(whole)[columns])


@pytest.mark.slow
def test_pages_and_exports_on_a_full_disk_keep_what_was_there(
    photographs_of_two: Path, tmp_path: Path
) -> None:
    scores = {f'{photographs_of_two}/a/{n:02}.jpg': 2 + n / 40 for n in range(40)}
    results = write_results(tmp_path / 'r.csv', scores)
    with small_disk(tmp_path, 40) as disk:
        for words, name in (
            (['report', str(results), '-o'], 'page.html'),
            (['export', '-m', 'clipkd_efficientnet_lite'], 'net.onnx'),
        ):
            (disk / name).write_text('before')
            refused([*words, str(disk / name)], name)
            assert (disk / name).read_text() == 'before'
        assert len(list(disk.iterdir())) == 2


@pytest.mark.slow
def test_a_training_on_a_full_disk_goes_on_when_there_is_room(
    whole_training: Path, tmp_path: Path
) -> None:
    small_training(tmp_path)
    with small_disk(tmp_path, 8000) as disk:
        (tmp_path / 'experiments').symlink_to(disk)
        process = trained(tmp_path)
        output, _ = process.communicate(timeout=120)
        assert process.returncode != 0
        assert 'no room for it' in output.splitlines()[-1]
        assert '/experiments/student/' in output.splitlines()[-1]
        assert not list(disk.rglob('*.part'))
        grow(disk, 100_000)
        assert 'Resuming training' in finished(trained(tmp_path))
        assert_same_weights(whole_training, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc/self/statm').exists(), reason='asks the kernel')
@pytest.mark.parametrize(
    ('way', 'images', 'every'),
    [('score', 700, 30), ('runtime', 700, 30), ('metric', 1500, 6)],
)
def test_memory_files_and_threads_stay_flat(
    way: str, images: int, every: int, tmp_path: Path
) -> None:
    """A leak of one decoded square a photograph would be 1,700 MB a thousand.

    Smaller ones fill what the imports left free first, some 10 MB.
    """
    long_run = load_script('long_run')
    for number in range(6):
        photograph(number, (60 + 40 * number, 90)).save(tmp_path / f'{number}.png')
    # A multiple of 6: at each sample the photograph in memory is the same one.
    samples = long_run.samples_of(way, tmp_path, images, every)
    found = long_run.summary(samples, warm=150)
    assert found['usual_kb_per_1000_images'] < 8000
    assert found['files'][1] - found['files'][0] <= 1
    assert found['threads'][1] - found['threads'][0] <= 1


@pytest.mark.parametrize('seed', range(20))
def test_a_leak_would_be_seen_and_what_comes_and_goes_is_none(seed: int) -> None:
    long_run = load_script('long_run')
    # As measured: what an allocator holds back, and how often.
    held = np.random.default_rng(seed).choice(
        [8.0, 6.0, 0.0, -3.0, -6.0, -25.0], 150, p=[0.02, 0.48, 0.25, 0.2, 0.03, 0.02]
    )

    def usual(leak: float) -> float:
        samples = [
            {
                'images': n * 6,
                'rss_mb': 800 + n * 6 * leak + more,
                'files': 8,
                'threads': 2,
            }
            for n, more in enumerate(held, 1)
        ]
        found = long_run.summary(samples, warm=150)['usual_kb_per_1000_images']
        return float(found)

    assert abs(usual(leak=0)) < 8000
    assert 32_000 < usual(leak=0.04) < 48_000
    assert 8000 < usual(leak=0.02) < 32_000
