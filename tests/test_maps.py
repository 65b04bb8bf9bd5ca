"""Quality maps: damage is found where it is, borders are covered, errors are clear."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scoring_data import photograph

from pyiqa_clipkd.command import main
from pyiqa_clipkd.degradations import degrade
from pyiqa_clipkd.images import UnreadableError
from pyiqa_clipkd.maps import QualityMap, overlay, quality_map
from pyiqa_clipkd.maps import coarse as coarse_module
from pyiqa_clipkd.maps.pictures import RAMP, colour_range
from pyiqa_clipkd.maps.windows import ENOUGH_WINDOWS, starts, view
from pyiqa_clipkd.names import DEFAULT_METRIC
from pyiqa_clipkd.runtime import Runtime
from pyiqa_clipkd.scoring.backends import TorchBackend

CHECKOUT = Path(__file__).parents[1]
COFFEE = CHECKOUT / 'tests' / 'photos' / 'coffee.jpg'


class Brightness:
    """A metric that anyone can check: white is perfect, black is bad."""

    metric, weights, sha256, name = 'brightness', 'none', '', 'onnx'
    levels = ('bad', 'poor', 'fair', 'good', 'perfect')

    def __init__(self, input_size: int = 32) -> None:
        self.input_size = input_size
        self.seen = 0

    def __call__(self, squares: np.ndarray) -> tuple[np.ndarray, None]:
        assert squares.shape[1:] == (3, self.input_size, self.input_size)
        assert squares.dtype == np.float32
        self.seen += len(squares)
        return 1 + 4 * squares.mean((1, 2, 3)), None


def gray_with_spot(
    size: tuple[int, int], spot: tuple[int, int, int, int]
) -> Image.Image:
    image = Image.new('RGB', size, (200, 200, 200))
    image.paste((0, 0, 0), spot)
    return image


def with_damaged_quadrant(image: Image.Image, kind: str) -> Image.Image:
    """The lower right quadrant is damaged."""
    corner = (image.width // 2, image.height // 2)
    result = image.copy()
    result.paste(degrade(image, kind, 5).crop((*corner, *image.size)), corner)
    return result


@pytest.fixture(scope='module')
def coarse_backend() -> TorchBackend:
    return TorchBackend(DEFAULT_METRIC)


# --- windows --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('length', 'window', 'stride'),
    [(512, 192, 64), (500, 192, 64), (193, 192, 64), (192, 192, 1), (7, 3, 2)],
)
def test_windows_reach_both_borders_without_gaps(
    length: int, window: int, stride: int
) -> None:
    begin = starts(length, window, stride)
    assert begin[0] == 0
    assert begin[-1] == length - window
    steps = np.diff(begin)
    assert (steps >= 1).all()
    assert (steps <= stride).all()


def test_the_worst_window_lies_where_the_spot_is() -> None:
    image = gray_with_spot((300, 200), (220, 30, 280, 90))
    quality = quality_map(image, Brightness(), window=60, stride=10)
    assert quality.scores.shape == (15, 25)
    assert quality.scores.dtype == np.float32
    assert quality.worst.box == (220, 30, 280, 90)
    assert quality.worst.score == pytest.approx(1)
    assert quality.best.score == pytest.approx(1 + 4 * 200 / 255)
    assert quality.scores[quality.worst.row, quality.worst.column] == 1
    assert len(quality.windows()) == 15 * 25
    for one in quality.windows():
        left, top, right, bottom = one.box
        assert right - left == bottom - top == 60
        assert 0 <= left < right <= 300
        assert 0 <= top < bottom <= 200


def test_any_number_of_workers_gives_the_same_map() -> None:
    maps = [
        quality_map(COFFEE, Brightness(), window=90, workers=workers)
        for workers in (1, 3)
    ]
    assert np.array_equal(maps[0].scores, maps[1].scores)


def test_large_photographs_have_a_bounded_number_of_touching_windows() -> None:
    backend = Brightness(384)
    quality = quality_map(Image.new('RGB', (3200, 2400)), backend)
    assert backend.seen == quality.scores.size + 1  # and the whole
    assert 100 < quality.scores.size <= ENOUGH_WINDOWS
    assert quality.window == 384
    for begin in (quality.tops, quality.lefts):
        assert np.diff(begin).max() <= 384


def test_a_stride_for_large_photographs_fits_small_ones_too() -> None:
    quality = quality_map(
        Image.new('RGB', (90, 40)), Brightness(), window=200, stride=100
    )
    assert (quality.window, quality.stride) == (40, 40)
    assert quality.lefts.tolist() == [0, 25, 50]


@pytest.mark.parametrize('size', [(1, 1), (40, 40), (90, 40), (1, 300)])
def test_photographs_smaller_than_a_window_have_smaller_ones(
    size: tuple[int, int],
) -> None:
    quality = quality_map(Image.new('RGB', size, 'white'), Brightness(64))
    assert quality.window == min(size)
    assert np.allclose(quality.scores, 5)
    assert quality.worst.box[2:] <= size
    assert (quality.scores.size == 1) == (size[0] == size[1])


def test_a_small_window_is_mirrored_and_a_large_one_reduced() -> None:
    image = photograph(1)
    seen = view(image, (10, 20, 42, 52), 64)
    pixels = np.asarray(image)[20:52, 10:42].transpose(2, 0, 1) / 255
    assert np.allclose(seen[:, 16:48, 16:48], pixels)
    assert np.allclose(seen[:, 16:48, :16], pixels[:, :, 15::-1])
    assert np.allclose(seen[:, 48:, 16:48], pixels[:, :15:-1])
    reduced = view(image, (0, 0, 128, 128), 64)
    assert reduced.shape == (3, 64, 64)
    whole = np.asarray(image)[:128, :128].mean() / 255
    assert reduced.mean() == pytest.approx(whole, abs=0.01)


def test_rotated_photographs_are_mapped_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter to the right
    image = gray_with_spot((90, 60), (0, 0, 30, 30))
    image.save(tmp_path / 'turned.png', exif=exif)
    quality = quality_map(tmp_path / 'turned.png', Brightness(), window=30, stride=15)
    assert (quality.width, quality.height) == (60, 90)
    assert quality.worst.box == (30, 0, 60, 30)


@pytest.mark.parametrize('kind', ['gaussian_blur', 'white_noise'])
def test_a_damaged_quadrant_of_a_photograph_is_found(kind: str) -> None:
    image = with_damaged_quadrant(photograph(0), kind)  # 512 x 512
    quality = quality_map(image, window=192, stride=160)
    assert quality.scores.shape == (3, 3)
    left, top, *_ = quality.worst.box
    assert min(left, top) >= 256
    assert quality.worst.score < quality.score - 0.3


def test_the_score_of_the_whole_is_the_usual_one() -> None:
    runtime = Runtime(DEFAULT_METRIC, threads=1)
    quality = quality_map(COFFEE, runtime, window=400, stride=400)
    assert quality.scores.shape == (1, 2)
    assert quality.score == pytest.approx(runtime.score(COFFEE).score, abs=1e-6)


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        ({'window': 0}, '`window` must be a whole number >= 1, but got 0'),
        ({'stride': 2.5}, '`stride` must be a whole number >= 1, but got 2.5'),
        ({'workers': -1}, '`workers` must be a whole number >= 1, but got -1'),
        ({'window': 50, 'stride': 51}, 'at most the window of 50 pixels, .* got 51'),
        ({'window': 50, 'stride': 1}, 'at most 100,000 windows, but 1 gives 193,'),
        ({'coarse': True}, 'needs the torch backend, but got onnx'),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        quality_map(COFFEE, Brightness(), **options)


def test_a_metric_that_gives_no_number_is_reported() -> None:
    class Broken(Brightness):
        def __call__(self, squares: np.ndarray) -> tuple[np.ndarray, None]:
            return np.full(len(squares), np.nan, np.float32), None

    with pytest.raises(UnreadableError, match='gives no number'):
        quality_map(COFFEE, Broken())


# --- one look -------------------------------------------------------------------------


def test_one_look_finds_the_damaged_quadrant(coarse_backend: TorchBackend) -> None:
    image = with_damaged_quadrant(photograph(0), 'gaussian_blur')
    quality = quality_map(image, coarse_backend, coarse=True)
    assert (quality.window, quality.stride) == (192, 32)
    assert quality.scores.shape == (11, 11)
    left, top, right, bottom = quality.worst.box
    assert min(left + right, top + bottom) / 2 >= 256


def test_one_look_covers_photographs_of_every_size(
    coarse_backend: TorchBackend,
) -> None:
    runtime = Runtime(DEFAULT_METRIC, threads=1)
    for size in ((75, 130), (20, 20), (1, 1)):
        image = photograph(2).crop((0, 0, *size))
        quality = quality_map(image, coarse_backend, window=64, coarse=True)
        assert quality.at(-1, -1).box[2:] == size
        assert quality.score == pytest.approx(runtime.score(image).score, abs=1e-3)


@pytest.mark.parametrize('name', ['efficientnet_lite', 'resnet18', 'mobilevit'])
def test_one_look_at_all_of_a_photograph_is_the_network_s_score(name: str) -> None:
    backend = TorchBackend(f'clipkd_{name}')
    image = photograph(0).crop((0, 0, 384, 384))
    quality = quality_map(image, backend, window=384, coarse=True)
    assert quality.scores.shape == (1, 1)
    assert quality.scores[0, 0] == pytest.approx(quality.score, abs=1e-5)


@pytest.mark.parametrize('name', ['resnet18', 'efficientnet_lite'])
def test_tiles_of_a_large_photograph_leave_no_seams(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = TorchBackend(f'clipkd_{name}')
    options = {'window': 64, 'stride': 32}
    whole = quality_map(COFFEE, backend, coarse=True, **options)
    monkeypatch.setattr(coarse_module, 'TILE', 256)
    tiled = quality_map(COFFEE, backend, coarse=True, **options)
    difference = np.abs(whole.scores - tiled.scores)
    assert difference.max() < 0.1
    assert np.median(difference) < 0.01


def test_an_encoder_without_such_a_map_is_refused() -> None:
    backend = TorchBackend('clipkd_swin')
    with pytest.raises(ValueError, match=r'resnet18 .*; clipkd_swin has none'):
        quality_map(COFFEE, backend, coarse=True)


@pytest.mark.parametrize('name', ['resnet18', 'efficientnet', 'mobilevit'])
def test_other_convolutional_encoders_look_once_too(name: str) -> None:
    image = photograph(1).crop((0, 0, 160, 130))
    quality = quality_map(image, TorchBackend(f'clipkd_{name}'), coarse=True)
    assert quality.scores.size > 1
    assert ((quality.scores >= 1) & (quality.scores <= 5)).all()


# --- pictures -------------------------------------------------------------------------


def made_map(scores: list[list[float]], window: int = 100) -> QualityMap:
    rows, columns = np.shape(scores)
    return QualityMap(
        np.array(scores, np.float32),
        window * np.arange(rows),
        window * np.arange(columns),
        window,
        window,
        window * columns,
        window * rows,
        3.0,
    )


def test_bad_parts_are_vermilion_and_good_ones_blue() -> None:
    quality = made_map([[2.0, 4.0]])
    picture = overlay(Image.new('RGB', (200, 100), 'gray'), quality, caption='words')
    margin = 12  # above the photograph
    bad, good = (np.array(picture.getpixel((x, margin + 50))) for x in (30, 190))
    assert bad[0] > bad[2] + 50
    assert good[2] > good[0] + 50
    assert picture.width > 200
    assert picture.height > 100
    light = np.asarray(picture.convert('L'))[margin + 50]
    assert light[0] < 50  # the frame around the worst window
    assert light[199] > 50


def test_an_even_photograph_looks_even() -> None:
    low, high = colour_range(np.array([[3.0, 3.1]]))
    assert (low, high) == pytest.approx((2.55, 3.55))
    assert colour_range(np.array([[4.9, 5.0]])) == pytest.approx((4.0, 5.0))
    assert colour_range(np.array([[1.0, 3.0]])) == (1, 3)


def test_the_colours_differ_for_people_who_do_not_see_red_or_green() -> None:
    """Brightness or blue against yellow must carry the difference."""
    bad, _, middle, _, good = (np.array(colour, float) for colour in RAMP)
    for first, second in ((bad, middle), (middle, good), (bad, good)):
        yellow = [colour[:2].mean() - colour[2] for colour in (first, second)]
        light = [colour.mean() for colour in (first, second)]
        assert max(abs(np.diff(yellow)), abs(np.diff(light))) > 80


def test_large_photographs_become_smaller_pictures() -> None:
    quality = made_map([[2.0, 4.0, 3.0]], 300)
    picture = overlay(Image.new('RGB', (900, 300)), quality, size=300)
    assert 300 < picture.width < 450
    assert 100 < picture.height < 220


def test_a_map_of_another_photograph_is_refused() -> None:
    quality = made_map([[2.0, 4.0]])
    with pytest.raises(ValueError, match=r'200 x 100 pixels, .* has 100 x 200'):
        overlay(Image.new('RGB', (100, 200)), quality)
    with pytest.raises(ValueError, match=r'`size` must be .* >= 64, but got 3'):
        overlay(Image.new('RGB', (200, 100)), quality, size=3)


# --- the command ----------------------------------------------------------------------

FEW = ['--window', '200', '--stride', '200']


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two photographs of one name, and a file that is none."""
    monkeypatch.chdir(tmp_path)
    for number in range(2):
        path = tmp_path / 'photos' / str(number) / 'a.png'
        path.parent.mkdir(parents=True)
        photograph(number, (200, 200)).save(path)
    (tmp_path / 'photos' / 'text.jpg').write_text('no image')
    return tmp_path / 'photos'


def test_a_picture_and_an_array_are_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arrays = [tmp_path / name for name in ('new/map.npy', 'map.csv')]
    for array, picture in zip(arrays, ('map.png', 'map.jpg'), strict=True):
        output = ['-o', str(tmp_path / picture), '--array', str(array)]
        assert main(['map', str(COFFEE), *output, *FEW, '--size', '300']) == 0
        with Image.open(tmp_path / picture) as image:
            assert 300 < image.width < 450
    scores = np.load(arrays[0])
    assert scores.shape == (2, 3)
    rows = list(csv.DictReader(arrays[1].open()))
    assert [float(row['score']) for row in rows] == pytest.approx(
        scores.ravel().tolist(), abs=1e-5
    )
    assert (rows[-1]['right'], rows[-1]['bottom']) == ('600', '400')
    worst = rows[int(scores.argmin())]
    shown = capsys.readouterr().out.splitlines()[0]
    assert shown.startswith(f'{COFFEE}: score ')
    assert f'by {DEFAULT_METRIC}; worst of 6 windows: {scores.min():.2f}' in shown
    assert shown.endswith(f'left {worst["left"]}, top {worst["top"]}')


def test_of_a_folder_each_photograph_gets_a_map_and_bad_files_are_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):  # a second run makes no maps of maps
        assert main(['map', 'photos', '-o', 'photos/maps', *FEW]) == 3
        printed = capsys.readouterr()
        assert len(printed.out.splitlines()) == 2
        assert printed.err == 'photos/text.jpg: not an image\n'
        names = sorted(path.name for path in (folder / 'maps').iterdir())
        assert names == ['a_2_map.png', 'a_map.png']


def test_a_photograph_is_never_taken_for_a_map_or_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / 'city_map.png'
    photograph(1, (200, 200)).save(own)
    content = own.read_bytes()
    assert main(['map', str(tmp_path), '-o', str(tmp_path / 'maps'), *FEW]) == 0
    assert (tmp_path / 'maps' / 'city_map_map.png').is_file()
    photograph(2, (200, 200)).save(tmp_path / 'city.png')
    assert main(['map', str(tmp_path), '-o', str(tmp_path), *FEW]) == 2
    assert 'city_map.png is there, and no map' in capsys.readouterr().err
    assert own.read_bytes() == content


def test_too_many_windows_of_one_photograph_stop_no_other(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr('pyiqa_clipkd.maps.windows.MOST_WINDOWS', 20)
    Image.new('RGB', (200, 900)).save(folder / 'long.png')
    words = ['--window', '100', '--stride', '50']
    assert main(['map', 'photos', '-o', 'maps', *words]) == 3
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 2
    assert 'long.png: `stride` must give at most 20 windows' in printed.err


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (['photos/0/a.png', '-o', 'map.doc'], '`--output` must end in .png'),
        (['photos', '-o', 'map.png'], '`--output` must be a folder for several'),
        (['photos', '-o', 'maps', '--array', 'a.npy'], '`--array` is for one'),
        (['photos/0/a.png', '-o', 'm.png', '--array', 'a.txt'], 'must end in .npy or'),
        (['photos/0/a.png', '-o', 'photos/0/a.png'], 'it stays as it is'),
        (['photos/0/a.png', '-o', 'm.png', '--size', '9'], '`--size` must be .* got 9'),
        (['photos/0/a.png', '-o', 'm.png', '--threads', '0'], '`--threads` must be'),
        (['empty', '-o', 'maps'], 'no photographs in empty'),
        (
            ['photos/0/a.png', '-o', 'm.png', '--coarse', '--backend', 'onnx'],
            '`--coarse` needs --backend torch',
        ),
        (
            ['photos/0/a.png', '-o', 'm.png', '--window', '9', '--stride', '10'],
            '`stride` must be at most the window',
        ),
        (['photos/0/a.png', '-o', 'm.png', '-m', 'clipkd_resnet'], 'did you mean'),
    ],
)
def test_mistakes_are_one_clear_line(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    (folder.parent / 'empty').mkdir()
    before = (folder / '0' / 'a.png').read_bytes()
    assert main(['map', *arguments]) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith('pyiqa-clipkd map: error: ')
    assert re.search(words, line), line
    assert (folder / '0' / 'a.png').read_bytes() == before


WITHOUT = """
import sys
for name in ('torch', 'onnx', 'pandas', 'pyiqa', 'timm', 'scipy', 'matplotlib'):
    sys.modules[name] = None
from pyiqa_clipkd.command import main
raise SystemExit(main(['map', *sys.argv[1:]]))
"""


def test_the_command_needs_neither_torch_nor_matplotlib(tmp_path: Path) -> None:
    output = tmp_path / 'map.webp'
    subprocess.run(
        [sys.executable, '-c', WITHOUT, str(COFFEE), '-o', str(output), *FEW],
        check=True,
        cwd=CHECKOUT,
    )
    with Image.open(output) as image:
        assert image.format == 'WEBP'


def test_the_command_looks_once_with_torch(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    output = ['-o', str(tmp_path / 'map.png'), '--array', str(tmp_path / 'map.npy')]
    try:
        assert main(['map', str(COFFEE), *output, '--coarse']) == 0
    finally:
        torch.set_num_threads(threads)
    assert np.load(tmp_path / 'map.npy').shape == (9, 15)


def test_larger_photographs_than_allowed_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = ['-o', str(tmp_path / 'map.png'), '--max-megapixels', '0.2']
    assert main(['map', str(COFFEE), *output]) == 3
    assert 'coffee.jpg: too large: 600 x 400 pixels' in capsys.readouterr().err
    assert not (tmp_path / 'map.png').exists()
