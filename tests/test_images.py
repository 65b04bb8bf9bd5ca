"""Files to pixels: the same squares as with torch, from every kind of image file."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile
from torch import Tensor

from pyiqa_clipkd.images import UnreadableError, read_photograph, squares
from pyiqa_clipkd.preprocessing import native_crops, resize_and_crop

# Far below a rounding to eight bits (1/510), which would move scores.
CLOSE = 5e-5

SHAPES = [
    (1, 1),
    (1, 2),
    (2, 1),
    (1, 300),
    (300, 1),
    (1, 5000),
    (5000, 3),
    (7, 112),
    (8, 129),
    (31, 33),
    (64, 64),
    (64, 65),
    (65, 64),
    (63, 64),
    (127, 254),
    (480, 640),
    (641, 479),
    (1001, 1499),
]

Photos = dict[str, Image.Image]


def random_image(height: int, width: int) -> Image.Image:
    """Noise: the hardest to resize alike."""
    rng = np.random.default_rng(height * 10_000 + width)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def with_torch(image: Image.Image, size: int, crops: int) -> np.ndarray:
    """The same squares by `preprocessing`."""
    img = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    native = native_crops(img, size, crops)
    views: list[Tensor] = [img, *native]
    return torch.cat([resize_and_crop(view, size) for view in views]).numpy()


# --- squares --------------------------------------------------------------------------


@pytest.mark.parametrize('size', [64, 65])
@pytest.mark.parametrize(('height', 'width'), SHAPES)
def test_squares_are_those_of_torch(height: int, width: int, size: int) -> None:
    image = random_image(height, width)
    ours, theirs = squares(image, size, crops=3), with_torch(image, size, 3)
    assert ours.dtype == np.float32
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= CLOSE
    assert ours.min() >= 0
    assert ours.max() <= 1


@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    size=st.integers(2, 70),  # torch resizes columns of width 1 otherwise than others
    crops=st.integers(0, 3),
)
@settings(max_examples=150, deadline=None)
def test_squares_of_any_shape_are_those_of_torch(
    height: int, width: int, size: int, crops: int
) -> None:
    image = random_image(height, width)
    ours, theirs = squares(image, size, crops=crops), with_torch(image, size, crops)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= CLOSE


def test_squares_of_photographs_are_those_of_torch(photographs: Photos) -> None:
    for image in photographs.values():
        for size in (224, 384):
            difference = squares(image, size, crops=2) - with_torch(image, size, 2)
            assert np.abs(difference).max() <= CLOSE


def test_one_square_that_fills_the_photograph_is_all_there_is() -> None:
    image = random_image(64, 64)
    for size in (64, 100):
        assert len(squares(image, size, crops=4)) == 1
    pixels = squares(image, 64)[0].transpose(1, 2, 0) * 255
    assert np.array_equal(pixels.round().astype(np.uint8), np.asarray(image))
    assert len(squares(image, 63, crops=4)) == 5


# --- kinds of files -------------------------------------------------------------------


@pytest.fixture
def upright(photographs: Photos) -> Image.Image:
    """(60, 90): no side is like another."""
    return photographs['coffee'].resize((90, 60))


def saved(folder: Path, name: str, image: Image.Image, **options: Any) -> Path:
    path = folder / name
    image.save(path, **options)
    return path


# What turns a photograph back that was stored in EXIF's orientations 1 to 8.
STORED: list[Callable[[Image.Image], Image.Image]] = [
    lambda image: image,
    lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    lambda image: image.transpose(Image.Transpose.ROTATE_180),
    lambda image: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
    lambda image: image.transpose(Image.Transpose.TRANSPOSE),
    lambda image: image.transpose(Image.Transpose.ROTATE_90),
    lambda image: image.transpose(Image.Transpose.TRANSVERSE),
    lambda image: image.transpose(Image.Transpose.ROTATE_270),
]


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('suffix', ['png', 'tif', 'webp'])
def test_exif_orientations_give_the_same_upright_pixels(
    tmp_path: Path, upright: Image.Image, suffix: str, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = STORED[orientation - 1](upright)
    options = {'lossless': True} if suffix == 'webp' else {}
    path = saved(tmp_path, f'a.{suffix}', stored, exif=exif, **options)
    photo = read_photograph(path)
    assert (photo.width, photo.height) == (90, 60)
    assert np.array_equal(np.asarray(photo.image), np.asarray(upright))
    assert ('rotated by EXIF' in photo.notes) == (orientation != 1)


def test_an_orientation_that_does_not_exist_is_ignored(
    tmp_path: Path, upright: Image.Image
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 9
    path = saved(tmp_path, 'a.png', upright, exif=exif)
    assert read_photograph(path)[1:] == (90, 60, 'PNG', ())


def test_a_plain_jpeg_is_decoded_as_pillow_does(
    tmp_path: Path, upright: Image.Image
) -> None:
    path = saved(tmp_path, 'a.jpg', upright)
    photo = read_photograph(path)
    assert photo[1:] == (90, 60, 'JPEG', ())
    assert np.array_equal(np.asarray(photo.image), np.asarray(Image.open(path)))
    for source in (str(path), io.BytesIO(path.read_bytes()), path.open('rb')):
        assert np.array_equal(
            np.asarray(read_photograph(source).image), np.asarray(photo.image)
        )


def test_the_suffix_does_not_matter(tmp_path: Path, upright: Image.Image) -> None:
    path = saved(tmp_path, 'a.png', upright).rename(tmp_path / 'a.jpg')
    assert read_photograph(path).format == 'PNG'


def test_cmyk_becomes_rgb(tmp_path: Path, upright: Image.Image) -> None:
    path = saved(tmp_path, 'a.tif', upright.convert('CMYK'))
    photo = read_photograph(path)
    assert photo.notes == ('CMYK',)
    assert np.array_equal(np.asarray(photo.image), np.asarray(upright))
    path = saved(tmp_path, 'a.jpg', upright.convert('CMYK'), quality=95)
    difference = np.asarray(read_photograph(path).image).astype(int) - np.asarray(
        upright
    )
    assert np.abs(difference).mean() < 5


def test_sixteen_bits_become_eight_and_not_white(
    tmp_path: Path, upright: Image.Image
) -> None:
    gray = np.asarray(upright.convert('L'))
    for name in ('a.png', 'a.tif'):
        sixteen = Image.fromarray(gray.astype(np.uint16) * 257)
        photo = read_photograph(saved(tmp_path, name, sixteen))
        assert photo.notes == ('16 bit',)
        assert photo.image.mode == 'RGB'
        assert np.array_equal(np.asarray(photo.image)[..., 1], gray)


def test_gray_becomes_three_equal_channels(
    tmp_path: Path, upright: Image.Image
) -> None:
    gray = upright.convert('L')
    photo = read_photograph(saved(tmp_path, 'a.png', gray))
    assert photo.notes == ()
    for channel in photo.image.split():
        assert np.array_equal(np.asarray(channel), np.asarray(gray))


def test_one_bit_is_black_and_white(tmp_path: Path, upright: Image.Image) -> None:
    photo = read_photograph(saved(tmp_path, 'a.png', upright.convert('1')))
    assert set(np.unique(np.asarray(photo.image))) == {0, 255}


@pytest.mark.parametrize('mode', ['RGBA', 'LA'])
def test_transparency_is_laid_over_white(
    tmp_path: Path, upright: Image.Image, mode: str
) -> None:
    image = upright.convert(mode)
    alpha = np.full((60, 90), 255, np.uint8)
    alpha[:, :30], alpha[:, 30:60] = 0, 128
    image.putalpha(Image.fromarray(alpha))
    photo = read_photograph(saved(tmp_path, 'a.png', image))
    assert photo.notes == ('alpha over white',)
    pixels = np.asarray(photo.image).astype(float)
    opaque = np.asarray(upright.convert(mode[:-1]).convert('RGB')).astype(float)
    assert (pixels[:, :30] == 255).all()
    half = opaque[:, 30:60] * 128 / 255 + 255 * 127 / 255
    assert np.abs(pixels[:, 30:60] - half).max() <= 1
    assert np.array_equal(pixels[:, 60:], opaque[:, 60:])


def test_an_alpha_channel_that_hides_nothing_has_no_note(
    tmp_path: Path, upright: Image.Image
) -> None:
    photo = read_photograph(saved(tmp_path, 'a.png', upright.convert('RGBA')))
    assert photo.notes == ()
    assert np.array_equal(np.asarray(photo.image), np.asarray(upright))


def test_one_colour_that_stands_for_transparent_is_white(tmp_path: Path) -> None:
    image = Image.new('RGB', (20, 10), (200, 0, 0))
    image.paste((0, 0, 200), (10, 0, 20, 10))
    path = saved(tmp_path, 'a.png', image, transparency=(200, 0, 0))
    photo = read_photograph(path)
    assert photo.notes == ('alpha over white',)
    assert photo.image.getpixel((0, 0)) == (255, 255, 255)
    assert photo.image.getpixel((15, 5)) == (0, 0, 200)


def test_a_palette_becomes_its_colours_and_its_transparency_white(
    tmp_path: Path,
) -> None:
    image = Image.new('P', (20, 10), 0)
    image.putpalette([200, 0, 0, 0, 0, 200])
    image.paste(1, (10, 0, 20, 10))
    plain = read_photograph(saved(tmp_path, 'a.png', image))
    assert plain.notes == ()
    assert plain.image.getpixel((0, 0)) == (200, 0, 0)
    photo = read_photograph(saved(tmp_path, 'b.png', image, transparency=0))
    assert photo.notes == ('alpha over white',)
    assert photo.image.getpixel((0, 0)) == (255, 255, 255)
    assert photo.image.getpixel((15, 5)) == (0, 0, 200)


@pytest.mark.parametrize('name', ['a.gif', 'a.webp', 'a.png', 'a.tif'])
def test_of_several_frames_the_first_is_taken(tmp_path: Path, name: str) -> None:
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    first, *others = (Image.new('RGB', (20, 10), colour) for colour in colours)
    options = {'lossless': True} if name == 'a.webp' else {}
    path = saved(tmp_path, name, first, save_all=True, append_images=others, **options)
    photo = read_photograph(path)
    assert photo.notes == ('first frame',)
    assert photo.image.getpixel((5, 5)) == (200, 0, 0)


@pytest.mark.parametrize('mode', ['LAB', 'YCbCr'])
def test_other_colour_spaces_become_rgb(
    tmp_path: Path, upright: Image.Image, mode: str
) -> None:
    if mode == 'LAB':
        from PIL import ImageCms

        rgb, lab = (ImageCms.createProfile(name) for name in ('sRGB', 'LAB'))
        image = ImageCms.applyTransform(
            upright, ImageCms.buildTransform(rgb, lab, 'RGB', 'LAB')
        )
        assert image is not None
    else:
        image = upright.convert(mode)
    photo = read_photograph(saved(tmp_path, 'a.tif', image))
    assert photo.image.mode == 'RGB'
    difference = np.asarray(photo.image).astype(int) - np.asarray(upright)
    assert np.abs(difference).mean() < 5


# --- files without pixels to score ----------------------------------------------------


@pytest.mark.parametrize('name', ['a.jpg', 'a.png', 'a.webp', 'a.gif', 'a.tif'])
@pytest.mark.parametrize('share', [0.3, 0.8])
def test_a_truncated_file_is_named_so(
    tmp_path: Path, photographs: Photos, name: str, share: float
) -> None:
    path = saved(tmp_path, name, photographs['coffee'])
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(
        UnreadableError, match=r'^(truncated|damaged|not an image)'
    ) as e:
        read_photograph(path)
    if name in ('a.jpg', 'a.png'):
        assert str(e.value).startswith('truncated: ')


def text_file(folder: Path) -> Path:
    (folder / 'a.jpg').write_text('<html>Not found</html>')
    return folder / 'a.jpg'


def empty_file(folder: Path) -> Path:
    (folder / 'a.jpg').touch()
    return folder / 'a.jpg'


def heic_file(folder: Path) -> Path:
    path = folder / 'a.jpg'  # as a phone's, whatever the name says
    path.write_bytes(b'\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic')
    return path


def float_file(folder: Path) -> Path:
    return saved(folder, 'a.tif', Image.fromarray(np.ones((8, 8), np.float32)))


@pytest.mark.parametrize(
    ('make', 'reason'),
    [
        (text_file, 'not an image'),
        (
            heic_file,
            'HEIC, which Pillow does not read: `pip install pillow-heif`, or convert '
            'it to JPEG first',
        ),
        (empty_file, 'the file is empty'),
        (lambda folder: folder, 'a folder'),
        (lambda folder: folder / 'gone.jpg', 'no such file'),
        (float_file, 'floating-point pixels, whose range is unknown'),
    ],
)
def test_what_is_no_photograph_is_named(
    tmp_path: Path, make: Callable[[Path], Path], reason: str
) -> None:
    path = make(tmp_path)
    for source in (path, str(path)):
        with pytest.raises(UnreadableError) as caught:
            read_photograph(source)
        assert str(caught.value) == reason


def test_an_empty_file_object_is_no_image() -> None:
    with pytest.raises(UnreadableError, match=r'^not an image$'):
        read_photograph(io.BytesIO())


def test_damage_inside_a_png_is_an_error(tmp_path: Path, photographs: Photos) -> None:
    path = saved(tmp_path, 'a.png', photographs['coffee'])
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 200] = bytes(200)
    path.write_bytes(content)
    with pytest.raises(UnreadableError, match=r'^(damaged|truncated)'):
        read_photograph(path)


def test_too_many_pixels_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    path = saved(tmp_path, 'a.png', Image.new('L', (300, 200)))
    path.write_bytes(path.read_bytes()[:60])  # decoding would fail
    with pytest.raises(UnreadableError, match=r'too large: 300 x 200 .* 0\.05 mega'):
        read_photograph(path, max_pixels=50_000)
    whole = saved(tmp_path, 'b.png', Image.new('L', (300, 200)))
    assert read_photograph(whole, max_pixels=60_000).width == 300


def test_a_bomb_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, 'a.png', Image.new('1', (20_000, 20_000)))
    with pytest.raises(UnreadableError, match=r'^too large'):
        read_photograph(path)


def test_reasons_are_one_line_without_the_name_of_the_file(
    tmp_path: Path, photographs: Photos
) -> None:
    for name in ('a.jpg', 'a.png', 'a.webp', 'a.tif', 'a.bmp'):
        path = saved(tmp_path, name, photographs['rocket'])
        path.write_bytes(path.read_bytes()[:3000])
        with pytest.raises(UnreadableError) as caught:
            read_photograph(path)
        assert '\n' not in str(caught.value)
        assert str(tmp_path) not in str(caught.value)


def test_torch_is_not_imported() -> None:
    code = (
        'import sys, pyiqa_clipkd.images; '
        'print({"torch", "pyiqa", "scipy", "pandas"} & set(sys.modules))'
    )
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == 'set()'


def test_a_postscript_file_is_refused_before_an_interpreter_runs_it(
    tmp_path: Path, photographs: Photos
) -> None:
    file = tmp_path / 'x.eps'
    photographs['chelsea'].save(file)
    with pytest.raises(UnreadableError, match='EPS is a program, not pixels'):
        read_photograph(file)


@pytest.mark.parametrize('name', ['half.jpg', 'half.png'])
def test_half_a_file_is_an_error_although_pyiqa_wants_it_filled_up(
    name: str, tmp_path: Path, photographs: Photos, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile, 'LOAD_TRUNCATED_IMAGES', True)
    file = tmp_path / name
    photographs['chelsea'].save(file)
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(UnreadableError, match='truncated'):
        read_photograph(file)
    assert ImageFile.LOAD_TRUNCATED_IMAGES  # as it was
