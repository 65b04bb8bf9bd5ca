from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scoring_data import METRIC, ODD, encoded, photograph, write_odd
from torch import Tensor

from pyiqa_clipkd.images import squares
from pyiqa_clipkd.metric import CLIPKDMetric
from pyiqa_clipkd.names import LEVELS
from pyiqa_clipkd.scoring import core, reading
from pyiqa_clipkd.scoring.backends import Backend, create_backend
from pyiqa_clipkd.scoring.core import score_paths
from pyiqa_clipkd.scoring.tables import columns

Row = dict[str, Any]


@pytest.fixture(scope='module', params=['onnx', 'torch'])
def backend(request: pytest.FixtureRequest) -> Backend:
    return create_backend(METRIC, kind=request.param, device='cpu')


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten photographs of several sizes, and every odd file."""
    folder = tmp_path_factory.mktemp('photos')
    for number in range(10):
        size = (200 + 30 * number, 290 - 20 * number)
        (folder / f'{number}.jpg').write_bytes(encoded(photograph(number, size)))
    write_odd(folder)
    return folder


@pytest.fixture(scope='module')
def paths(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


class Brightness:
    """A backend for what has nothing to do with the network: the mean of the image."""

    metric, weights, sha256, name = 'clipkd_mean', 'mean', 'ab' * 32, 'torch'
    levels, input_size = LEVELS, 32

    def __init__(self, batch_size: int = 1) -> None:
        self.batch_size = batch_size
        self.seen: list[int] = []

    def __call__(self, squares: np.ndarray) -> tuple[np.ndarray, None]:
        self.seen.append(len(squares))
        return 1 + 4 * squares.mean(axis=(1, 2, 3)), None


def rows_of(paths: list[Path], backend: Backend, **options: Any) -> list[Row]:
    rows = list(score_paths(paths, backend, **options))
    assert [row['path'] for row in rows] == [str(path) for path in paths]
    assert all(list(row) == columns(backend.levels) for row in rows)
    return rows


def scores_of(rows: list[Row]) -> np.ndarray:
    return np.array([row['score'] or 0 for row in rows])


def test_every_odd_file_is_scored_or_its_row_says_why_not(
    folder: Path, backend: Backend
) -> None:
    missing = folder / 'missing.jpg'
    rows = rows_of([*(folder / name for name in ODD), missing, folder], backend)
    for row, odd in zip(rows, ODD.values(), strict=False):
        assert odd.error in row['error']
        assert odd.note in row['notes']
        assert (row['score'] is None) == bool(odd.error) == bool(row['error'])
    for row, error in zip(rows[-2:], ('no such file', 'a folder'), strict=True):
        assert row['error'] == error
        assert row['score'] is None
    for row in rows:
        assert row['metric'] == METRIC
        assert row['seconds'] > 0
        assert '\n' not in row['error']
        if row['score'] is not None:
            assert 1 <= row['score'] <= 5
            assert row['score_100'] == pytest.approx(25 * (row['score'] - 1), abs=1e-3)
            probabilities = [row[f'p_{level}'] for level in LEVELS]
            assert sum(probabilities) == pytest.approx(1, abs=1e-4)
            expected = np.dot(probabilities, range(1, 6))
            assert row['score'] == pytest.approx(expected, abs=1e-4)
            assert row['level'] == LEVELS[round(row['score']) - 1]


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='no pipes here')
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / 'pipe.jpg')
    (row,) = rows_of([tmp_path / 'pipe.jpg'], Brightness())
    assert row['error']


@pytest.mark.skipif(
    not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='may read everything'
)
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    path = tmp_path / 'secret.jpg'
    path.write_bytes(encoded(photograph(2)))
    path.chmod(0)
    (row,) = rows_of([path], Brightness())
    assert 'permission' in row['error']


def test_a_folder_that_may_not_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(path: Path) -> None:
        raise PermissionError

    monkeypatch.setattr('os.scandir', forbidden)
    (row,) = rows_of([tmp_path], Brightness())
    assert row['error'] == 'a folder that may not be read'


def test_raw_data_are_not_taken_for_their_thumbnail(tmp_path: Path) -> None:
    path = tmp_path / 'a.dng'
    path.write_bytes(encoded(photograph(2), 'TIFF'))
    (row,) = rows_of([path], Brightness())
    assert "camera's raw data" in row['error']


@torch.no_grad()
@pytest.mark.parametrize('crops', [0, 2])
def test_scores_are_those_of_the_metric(
    crops: int, backend: Backend, tmp_path: Path
) -> None:
    metric = CLIPKDMetric(METRIC, crops=crops)
    for number in range(4):
        path = tmp_path / f'{number}.jpg'
        path.write_bytes(encoded(photograph(number)))
        pixels = torch.from_numpy(np.array(Image.open(path)))
        image: Tensor = pixels.permute(2, 0, 1)[None] / 255
        (row,) = rows_of([path], backend, crops=crops)
        assert row['score'] == pytest.approx(metric(image).item(), abs=1e-3)
        assert (row['width'], row['height']) == image.shape[:1:-1]
        assert row['crops'] == crops


def test_neither_order_nor_batch_nor_workers_matter(
    paths: list[Path], backend: Backend
) -> None:
    paths = paths[:3] + paths[10:16]
    rows = rows_of(paths, backend, workers=1, crops=1)
    expected = scores_of(rows)
    assert np.unique(expected).size > 4
    again = rows_of(paths, backend, workers=3, crops=1)
    batches = rows_of(paths[::-1], backend, workers=2, batch_size=5, crops=1)
    assert np.abs(scores_of(batches)[::-1] - expected).max() <= 1e-5
    timeless = [{**row, 'seconds': 0} for row in rows]
    assert [{**row, 'seconds': 0} for row in again] == timeless


def test_batches_hold_the_squares_of_several_photographs(paths: list[Path]) -> None:
    one, many = Brightness(), Brightness(batch_size=8)
    expected = scores_of(rows_of(paths, one))
    good = int((expected > 0).sum())
    assert one.seen == [1] * good
    assert np.abs(scores_of(rows_of(paths, many)) - expected).max() <= 1e-5
    assert many.seen == [8] * (good // 8) + [good % 8] * (good % 8 > 0)


@pytest.mark.parametrize('batch_size', [1, 4])
@pytest.mark.parametrize('error', [MemoryError(), RuntimeError('two\nlines')])
def test_what_fails_for_one_photograph_is_in_its_row_alone(
    batch_size: int, error: Exception, paths: list[Path]
) -> None:
    class Picky(Brightness):
        def __call__(self, squares: np.ndarray) -> tuple[np.ndarray, None]:
            scores, _ = super().__call__(squares)
            if (scores == worst).any():
                raise error
            return scores, None

    plain = scores_of(rows_of(paths, Brightness()))
    worst = Brightness()(squares(photograph(0, (200, 290)), 32))[0][0]
    first = paths[0].parent / 'first.png'
    first.write_bytes(encoded(photograph(0, (200, 290)), 'PNG'))
    gone = first.with_name('gone.png')  # is in the same batch
    rows = rows_of([first, gone, *paths], Picky(), batch_size=batch_size)
    first.unlink()
    assert all(row['seconds'] > 0 for row in rows)
    assert type(error).__name__ in rows[0]['error']
    assert '\n' not in rows[0]['error']
    assert rows[1]['error'] == 'no such file'
    assert np.abs(scores_of(rows[2:]) - plain).max() <= 1e-5


def test_a_decoder_that_breaks_is_an_error_of_the_row(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = reading.read_photograph

    def broken(path: Path, **options: Any) -> Any:
        if path == paths[0]:
            raise MemoryError
        return read(path, **options)

    monkeypatch.setattr(reading, 'read_photograph', broken)
    rows = rows_of(paths, Brightness())
    assert rows[0]['error'] == 'MemoryError'
    assert rows[1]['score']


def test_a_score_that_is_no_number_is_an_error(paths: list[Path]) -> None:
    class Lost(Brightness):
        def __call__(self, squares: np.ndarray) -> tuple[np.ndarray, None]:
            return np.full(len(squares), np.nan), None

    assert 'no number' in rows_of(paths[:1], Lost())[0]['error']


def test_too_many_pixels_are_refused(paths: list[Path]) -> None:
    (row,) = rows_of(paths[:1], Brightness(), max_pixels=200 * 290)
    assert not row['error']
    (row,) = rows_of(paths[:1], Brightness(), max_pixels=200 * 290 - 1)
    assert 'too large' in row['error']


def test_paths_are_read_as_they_are_needed_and_a_stop_is_clean(folder: Path) -> None:
    taken = 0

    def endless() -> Iterator[Path]:
        nonlocal taken
        while True:
            taken += 1
            yield folder / '3.jpg'

    before = threading.active_count()
    rows = score_paths(endless(), Brightness(), workers=2)
    for _ in range(5):
        next(rows)
    assert taken <= 5 + 4 * 2 + 1
    rows.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_large_photographs_wait_for_each_other(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, at_once, most = reading.read_photograph, 0, 0
    lock = threading.Lock()

    def slow(path: Path, **options: Any) -> Any:
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        time.sleep(0.01)
        photograph = read(path, **options)
        with lock:
            at_once -= 1
        return photograph

    monkeypatch.setattr(reading, 'read_photograph', slow)
    path = folder / '3.jpg'
    with Image.open(path) as image:
        needed = image.width * image.height * 4
    for room, expected in ((needed // 2, 1), (2 * needed, 2)):
        monkeypatch.setattr(core, 'MEMORY', room)
        most = 0
        assert all(
            row['score'] for row in rows_of([path] * 12, Brightness(), workers=4)
        )
        assert most == expected


def test_what_must_become_rgb_first_counts_thrice(tmp_path: Path) -> None:
    path = tmp_path / 'a.png'
    image = photograph(2)
    pixels = image.width * image.height
    for options, expected in (({}, 4), ({'transparency': (1, 2, 3)}, 12)):
        path.write_bytes(encoded(image, 'PNG', **options))
        assert reading.decoded_bytes(path) == expected * pixels


def test_seconds_are_without_the_wait_for_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(path: Path, **options: Any) -> Any:
        time.sleep(0.05)
        raise core.UnreadableError('slow')

    monkeypatch.setattr(reading, 'read_photograph', slow)
    monkeypatch.setattr(core, 'MEMORY', 1)
    rows = rows_of([folder / '3.jpg'] * 8, Brightness(), workers=8)
    assert max(row['seconds'] for row in rows) < 0.2


@pytest.mark.parametrize(
    ('option', 'value'),
    [('crops', -1), ('batch_size', 0), ('workers', 0), ('max_pixels', 1.5)],
)
def test_wrong_options_are_errors_before_a_file_is_read(
    option: str, value: float
) -> None:
    message = f'`{option}` must be a whole number >= ., but got {value}'
    with pytest.raises(ValueError, match=message):
        score_paths(iter(()), Brightness(), **{option: value})  # type: ignore[arg-type]


def test_files_are_closed(paths: list[Path]) -> None:
    """Many files at once must not use up the descriptors."""
    folder = Path('/proc/self/fd')
    if not folder.exists():
        pytest.skip('no way to count them here')
    before = len(list(folder.iterdir()))
    rows_of(paths * 3, Brightness(), workers=4)
    assert len(list(folder.iterdir())) <= before
