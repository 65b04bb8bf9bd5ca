"""Reading in processes: what takes too long or crashes is reported, no more."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile_files import SLOW
from scoring_data import ODD, encoded, photograph, write_odd

from pyiqa_clipkd.images import UnreadableError
from pyiqa_clipkd.names import LEVELS
from pyiqa_clipkd.scoring.core import score_paths
from pyiqa_clipkd.scoring.isolated import Isolated
from pyiqa_clipkd.scoring.tables import Row

COMMAND = [sys.executable, '-m', 'pyiqa_clipkd', 'score']
LIMIT = 1.0


class Brightness:
    """A backend that needs no network."""

    metric, weights, sha256, name = 'clipkd_mean', 'mean', 'ab' * 32, 'torch'
    levels, input_size, batch_size = LEVELS, 32, 1

    def __call__(self, squares: np.ndarray) -> tuple[np.ndarray, None]:
        return 1 + 4 * squares.mean(axis=(1, 2, 3)), None


@pytest.fixture(scope='module')
def readers() -> Iterator[Isolated]:
    readers = Isolated(LIMIT)
    yield readers
    readers.close()


def call(readers: Isolated, function: Any, *arguments: Any) -> Any:
    with readers.one_file() as call:
        return call(function, *arguments)


def rows_of(paths: list[Path], **options: Any) -> list[Row]:
    return list(score_paths(paths, Brightness(), **options))


def test_rows_are_those_of_threads(tmp_path: Path) -> None:
    write_odd(tmp_path)
    for number in range(6):
        path = tmp_path / f'{number}.jpg'
        path.write_bytes(encoded(photograph(number, (200, 150))))
    paths = [*sorted(tmp_path.iterdir()), tmp_path / 'gone.jpg', tmp_path]
    timeless = [{**row, 'seconds': 0} for row in rows_of(paths, crops=1)]
    for batch_size in (1, 4):
        rows = rows_of(paths, crops=1, max_seconds=30, workers=2, batch_size=batch_size)
        for row, expected in zip(rows, timeless, strict=True):
            assert row['score'] == pytest.approx(expected['score'], abs=1e-5)
            row |= {'seconds': 0, 'score': expected['score']}
            row['score_100'] = expected['score_100']
            assert row == expected
    assert sum(bool(row['error']) for row in timeless) == 2 + sum(
        bool(odd.error) for odd in ODD.values()
    )


def test_a_bomb_of_time_is_ended_and_its_neighbours_are_scored(tmp_path: Path) -> None:
    (tmp_path / 'b.jpg').write_bytes(SLOW['jpeg_fill.jpg']())
    for name in ('a.jpg', 'c.jpg'):
        (tmp_path / name).write_bytes(encoded(photograph(0, (200, 150))))
    begin = time.perf_counter()
    rows = rows_of(sorted(tmp_path.iterdir()), max_seconds=LIMIT, workers=1)
    assert time.perf_counter() - begin < LIMIT + 10
    assert [row['error'] for row in rows] == ['', 'takes more than 1 s to read', '']
    assert rows[0]['score'] == rows[2]['score'] is not None
    assert LIMIT * 0.9 < rows[1]['seconds'] < LIMIT + 2


@pytest.mark.parametrize(
    ('function', 'reason'),
    [(os.abort, 'SIGABRT'), (os._exit, 'exit code 7'), (time.sleep, 'more than 1 s')],
)
@pytest.mark.skipif(sys.platform == 'win32', reason='no such signals')
def test_a_process_that_dies_or_sleeps_is_replaced(
    function: Any, reason: str, readers: Isolated
) -> None:
    arguments = () if function is os.abort else (7,)
    with pytest.raises(UnreadableError, match=reason):
        call(readers, function, *arguments)
    assert call(readers, abs, -3) == 3


def test_two_calls_for_one_file_share_its_time(readers: Isolated) -> None:
    begin = time.perf_counter()
    with readers.one_file() as call:
        call(time.sleep, 0.7 * LIMIT)
        with pytest.raises(UnreadableError, match='more than 1 s'):
            call(time.sleep, 0.7 * LIMIT)
    assert time.perf_counter() - begin < 1.3 * LIMIT


def test_a_process_serves_one_file_after_the_other(readers: Isolated) -> None:
    numbers = {call(readers, os.getpid) for _ in range(5)}
    assert len(numbers) == 1
    assert os.getpid() not in numbers


@pytest.mark.skipif(sys.platform != 'linux', reason='no such limit elsewhere')
def test_too_much_memory_is_refused_and_the_process_goes_on() -> None:
    readers = Isolated(30, max_pixels=1_000_000)
    number = call(readers, os.getpid)
    with pytest.raises(UnreadableError, match='MemoryError'):
        call(readers, bytearray, 3 << 30)
    assert call(readers, os.getpid) == number
    readers.close()


@pytest.mark.parametrize('seconds', [0, -1, float('nan'), float('inf')])
def test_a_limit_that_cannot_be_meant_is_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match='`max_seconds` must be above 0, but got'):
        score_paths(iter(()), Brightness(), max_seconds=seconds)


def children(parent: int) -> set[int]:
    found = set()
    for folder in Path('/proc').glob('[0-9]*'):
        try:
            fields = (folder / 'stat').read_text().rpartition(')')[2].split()
        except OSError:
            continue
        if fields[0] != 'Z' and int(fields[1]) == parent:
            found |= {int(folder.name)} | children(int(folder.name))
    return found


@pytest.mark.skipif(sys.platform != 'linux', reason='looks into /proc')
@pytest.mark.parametrize(
    'number', [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)]
)
def test_nothing_is_left_of_a_run_that_was_stopped(
    number: signal.Signals, tmp_path: Path
) -> None:
    path = tmp_path / 'a.jpg'
    path.write_bytes(SLOW['jpeg_fill.jpg']())
    run = subprocess.Popen(
        [*COMMAND, str(path), '--max-seconds', '4'],
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while len(below := children(run.pid)) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)  # a server, and a process of it that reads
    time.sleep(1)
    below = children(run.pid)
    if number is signal.SIGINT:  # as a terminal does it
        os.killpg(run.pid, number)
    else:
        run.kill()
    _, errors = run.communicate(timeout=30)
    if number is signal.SIGINT:
        assert run.returncode == 130
        assert b'Stopped.' in errors
        assert b'Traceback' not in errors
    while any(Path(f'/proc/{pid}').exists() for pid in below):
        assert time.monotonic() < deadline + 30
        time.sleep(0.1)
    assert below


def test_a_script_without_a_guard_is_told_what_to_do(tmp_path: Path) -> None:
    script = tmp_path / 'script.py'
    script.write_text(
        'from pyiqa_clipkd.scoring.isolated import Isolated\n'
        'with Isolated(5).one_file() as call:\n'
        '    call(abs, -1)\n'
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert "below `if __name__ == '__main__':`" in done.stderr


def test_the_command_goes_on_after_a_bomb(tmp_path: Path) -> None:
    (tmp_path / 'a.jpg').write_bytes(SLOW['jpeg_fill.jpg']())
    (tmp_path / 'b.jpg').write_bytes(encoded(photograph(0, (200, 150))))
    done = subprocess.run(
        [*COMMAND, str(tmp_path), '--max-seconds', '1.5'], capture_output=True
    )
    assert done.returncode == 3
    assert done.stdout.split()[-1].endswith(b'b.jpg')
    assert b'a.jpg: takes more than 1.5 s to read\n' in done.stderr
