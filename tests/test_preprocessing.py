from __future__ import annotations

import math
from collections.abc import Callable

import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from pyiqa_clipkd.preprocessing import (
    CLIP_MEAN,
    CLIP_STD,
    CLIPPreprocessing,
    check_images,
    resize_and_crop,
)

TOLERANCE = 2 / 255

# OpenAI's constants, written out again: a digit wrong in the package must show.
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)

side = st.integers(1, 90)


def test_the_constants_are_those_of_openai() -> None:
    assert tuple(MEAN.flatten().tolist()) == pytest.approx(CLIP_MEAN)
    assert tuple(STD.flatten().tolist()) == pytest.approx(CLIP_STD)
    assert (CLIP_MEAN, CLIP_STD) == (
        open_clip.OPENAI_DATASET_MEAN,
        open_clip.OPENAI_DATASET_STD,
    )


@pytest.fixture(
    params=[
        None,
        (224, 300),
        (600, 225),
        (500, 500),
        (333, 1001),
        (97, 101),
        (300, 40),
    ],
    ids=str,
)
def shape(request: pytest.FixtureRequest) -> tuple[int, int] | None:
    """Width and height to make of a photograph; `None` leaves it as it is."""
    result: tuple[int, int] | None = request.param
    return result


@pytest.mark.parametrize('size', [32, 224, 256])
@pytest.mark.parametrize('name', ['astronaut', 'coffee', 'chelsea', 'rocket'])
def test_photographs_come_out_as_from_the_pil_transform_of_open_clip(
    name: str,
    shape: tuple[int, int] | None,
    size: int,
    photographs: dict[str, Image.Image],
    as_tensor: Callable[[Image.Image], Tensor],
) -> None:
    image = photographs[name]
    if shape is not None:
        image = image.resize(shape, Image.Resampling.LANCZOS)

    expected = open_clip.image_transform(size, is_train=False)(image)
    actual = CLIPPreprocessing(size)(as_tensor(image))

    assert actual.shape == (1, 3, size, size)
    difference = ((actual[0] - expected) * STD).abs()
    # Recent versions of PIL take tall images column by column first. That moves a few
    # pixels beside hard edges; the test after this one pins the order down.
    tall = image.height > image.width
    assert (difference > TOLERANCE).float().mean() <= (0.003 if tall else 0)
    assert difference.mean() <= 0.5 / 255


@pytest.mark.parametrize('name', ['astronaut', 'coffee'])
def test_it_is_pil_row_by_row_and_then_column_by_column(
    name: str,
    shape: tuple[int, int] | None,
    photographs: dict[str, Image.Image],
    as_tensor: Callable[[Image.Image], Tensor],
) -> None:
    image = photographs[name]
    if shape is not None:
        image = image.resize(shape, Image.Resampling.LANCZOS)
    short = min(image.size)
    width, height = 192 * image.width // short, 192 * image.height // short
    left, top = round((width - 192) / 2), round((height - 192) / 2)

    expected = (
        image.resize((width, image.height), Image.Resampling.BICUBIC)
        .resize((width, height), Image.Resampling.BICUBIC)
        .crop((left, top, left + 192, top + 192))
    )
    actual = resize_and_crop(as_tensor(image), 192)

    assert (actual - as_tensor(expected)).abs().max() <= TOLERANCE


def test_an_image_of_the_right_size_is_only_normalized(photo: Tensor) -> None:
    image = photo[..., :224, :224]
    assert torch.equal(resize_and_crop(image, 224), image)
    torch.testing.assert_close(
        CLIPPreprocessing(224)(image)[0], (image[0] - MEAN) / STD
    )


def test_where_the_shorter_side_is_right_the_centre_is_cut_out(photo: Tensor) -> None:
    image = photo[..., :224, :301]
    left = round((301 - 224) / 2)
    assert torch.equal(resize_and_crop(image, 224), image[..., left : left + 224])


def test_gray_equals_its_copy_in_three_channels(photo: Tensor) -> None:
    gray = photo.mean(dim=1, keepdim=True)
    preprocessing = CLIPPreprocessing(64)
    assert torch.equal(preprocessing(gray), preprocessing(gray.repeat(1, 3, 1, 1)))


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 3), height=side, width=side, size=st.integers(1, 40))
def test_every_size_gives_a_finite_square(
    count: int, height: int, width: int, size: int
) -> None:
    generator = torch.Generator().manual_seed(height * 91 + width)
    image = torch.rand(count, 3, height, width, generator=generator)
    square = resize_and_crop(image, size)
    assert square.shape == (count, 3, size, size)
    assert square.isfinite().all()
    assert square.min() >= 0
    assert square.max() <= 1
    assert CLIPPreprocessing(size)(image).isfinite().all()


@pytest.mark.parametrize(
    'shape',
    [(1, 1), (1, 2), (1, 20000), (20000, 1), (3, 5000), (2, 33), (7, 5), (2000, 300)],
    ids=str,
)
def test_single_pixels_and_long_strips_give_a_square(shape: tuple[int, int]) -> None:
    square = CLIPPreprocessing(64)(torch.rand(1, 3, *shape))
    assert square.shape == (1, 3, 64, 64)
    assert square.isfinite().all()


def test_a_strip_that_is_cut_first_gives_the_same_centre() -> None:
    # 20 x 360 is cut to 20 x 320 before the resize; what is far from the centre, and
    # its distance, play no role.
    image = torch.rand(1, 3, 20, 360, generator=torch.Generator().manual_seed(0))
    short = resize_and_crop(image[..., 60:300], 64)
    torch.testing.assert_close(resize_and_crop(image, 64), short, atol=1e-5, rtol=0)
    tall = resize_and_crop(image.transpose(2, 3), 64)
    assert (tall.transpose(2, 3) - short).abs().mean() < 0.01


@pytest.mark.parametrize('shape', [(37, 53), (64, 64), (64, 90), (300, 200)], ids=str)
def test_the_gradient_reaches_the_image(shape: tuple[int, int]) -> None:
    image = torch.rand(1, 3, *shape, generator=torch.Generator().manual_seed(0))
    image = (0.25 + image / 2).requires_grad_()  # so that nothing is clamped
    CLIPPreprocessing(64)(image).square().sum().backward()
    assert image.grad is not None
    assert image.grad.isfinite().all()
    seen = image.grad[..., shape[0] // 2, shape[1] // 2]
    assert (seen != 0).all()


def test_the_gradient_is_the_numerical_one() -> None:
    image = 0.3 + 0.4 * torch.rand(1, 3, 7, 9, dtype=torch.float64)
    preprocessing = CLIPPreprocessing(5).double()
    assert torch.autograd.gradcheck(preprocessing, image.requires_grad_())


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_images_of_any_float_precision_come_out_in_that_of_the_module(
    dtype: torch.dtype, photo: Tensor
) -> None:
    preprocessing = CLIPPreprocessing(64)
    result = preprocessing(photo.to(dtype))
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, preprocessing(photo), atol=0.03, rtol=0)
    assert CLIPPreprocessing(64).to(dtype)(photo).dtype == dtype


@pytest.mark.parametrize(('size', 'width'), [(63, 240), (64, 300)])
def test_an_image_and_its_mirror_image_can_be_made_one(
    size: int, width: int, photo: Tensor
) -> None:
    preprocessing = CLIPPreprocessing(size, mirror_invariant=True)
    both = torch.cat([photo, photo.flip(-1)])[..., :240, :width]
    mirrored = both.flip(-1)
    plain = CLIPPreprocessing(size)
    assert not torch.equal(plain(both), plain(mirrored))
    assert torch.equal(preprocessing(both), plain(both))  # while it is trained
    preprocessing.eval()
    seen = preprocessing(both)
    assert torch.allclose(seen, preprocessing(mirrored), atol=1e-5)
    for one, view, mirror in zip(seen, plain(both), plain(mirrored), strict=True):
        assert any(torch.allclose(one, x, atol=1e-5) for x in (view, mirror))


def test_what_is_seen_has_its_light_on_the_right() -> None:
    preprocessing = CLIPPreprocessing(4, mirror_invariant=True).eval()
    light = torch.zeros(2, 3, 4, 4)
    light[0, :, 0, 0] = light[1, :, 2, 2] = 1
    seen = preprocessing(light) * STD + MEAN
    assert seen[:, 0].flatten(1).argmax(1).tolist() == [3, 10]


@pytest.mark.parametrize('wrong', [1, 'yes', None])
def test_what_is_neither_true_nor_false_is_refused(wrong: object) -> None:
    with pytest.raises(ValueError, match='`mirror_invariant` must be True or False'):
        CLIPPreprocessing(64, mirror_invariant=wrong)  # type: ignore[arg-type]


def test_nothing_of_it_goes_into_a_state_dict() -> None:
    assert not CLIPPreprocessing(64).state_dict()


def test_it_says_its_input_size() -> None:
    words = 'CLIPPreprocessing(input_size=64)'
    assert repr(CLIPPreprocessing(64)) == words
    words = 'CLIPPreprocessing(input_size=64, mirror_invariant=True)'
    assert repr(CLIPPreprocessing(64, True)) == words


@pytest.mark.parametrize('size', [0, -1, 224.0, '224', None, math.inf])
def test_an_input_size_that_is_no_positive_integer_is_refused(size: object) -> None:
    with pytest.raises(ValueError, match='`input_size` must be a positive integer'):
        CLIPPreprocessing(size)  # type: ignore[arg-type]


def test_eight_bit_images_are_refused_with_the_remedy() -> None:
    with pytest.raises(TypeError, match=r'torch.uint8.*use `img.float\(\) / 255`'):
        check_images(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


@pytest.mark.parametrize(
    'shape',
    [(3, 8, 8), (8, 8), (1, 2, 8, 8), (1, 4, 8, 8), (0, 3, 8, 8), (1, 3, 0, 8)],
    ids=str,
)
def test_images_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match=r'`img` must have the shape \(N, 3 or 1, H, W\)'
    ):
        check_images(torch.zeros(shape))


def test_what_is_no_tensor_is_refused() -> None:
    with pytest.raises(TypeError, match=r'`img` must be a torch\.Tensor, but got list'):
        check_images([[0.5]])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ('scale', 'shift', 'limits'),
    [
        (255, 0, 'from 0 to 255'),
        (2, -1, 'from -1 to 1'),
        (1, float('nan'), 'nan to nan'),
    ],
)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.float16])
def test_values_that_no_image_has_are_an_error(
    scale: float, shift: float, limits: str, dtype: torch.dtype
) -> None:
    img = (torch.linspace(0, 1, 3 * 16 * 16).view(1, 3, 16, 16) * scale + shift).to(
        dtype
    )
    with torch.no_grad(), pytest.raises(ValueError, match=limits):
        CLIPPreprocessing(8)(img)
    with torch.inference_mode(), pytest.raises(ValueError, match='take `img / 255`'):
        check_images(img)


@pytest.mark.parametrize('bad', [float('nan'), float('inf'), -float('inf'), 1.01])
def test_one_value_that_no_image_has_is_found(bad: float) -> None:
    img = torch.rand(2, 1, 16, 16)
    img[1, 0, 7, 7] = bad
    with torch.no_grad(), pytest.raises(ValueError, match=r'must be in \[0, 1\]'):
        check_images(img)


def test_a_loss_may_leave_the_range_and_rounding_is_no_error() -> None:
    img = torch.full((1, 3, 16, 16), 1.2, requires_grad=True)
    assert CLIPPreprocessing(8)(img).isfinite().all()  # a gradient leads it back
    with torch.no_grad():
        check_images(torch.full((1, 3, 4, 4), 1 + 5e-4))
        check_images(torch.empty(1, 3, 4, 4, device='meta'))
