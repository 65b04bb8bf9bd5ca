"""The network of the pretraining, its files, and who can start from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pyiqa.archs import build_network
from torch import Tensor
from training_data import ENCODER, SIZE

from pyiqa_clipkd.attributes.names import ATTRIBUTES
from pyiqa_clipkd.attributes.student import (
    AttributeHeads,
    AttributeStudent,
    load_attribute_student,
)
from pyiqa_clipkd.network import CLIPKDStudent, CLIPLikert, load_network


@pytest.fixture
def student() -> AttributeStudent:
    torch.manual_seed(0)
    return AttributeStudent(ENCODER, input_size=SIZE).eval()


@pytest.fixture
def checkpoint(student: AttributeStudent, tmp_path: Path) -> Path:
    torch.save({'params': student.state_dict()}, tmp_path / 'student.pth')
    return tmp_path / 'student.pth'


def backbone(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    prefix = 'encoder.backbone.'
    return {name: value for name, value in tensors.items() if name.startswith(prefix)}


@pytest.mark.parametrize('shape', [(3, 3, 50, 40), (2, 1, 9, 200), (1, 3, 1, 1)])
@torch.no_grad()
def test_any_image_gets_five_values_from_0_to_1(
    student: AttributeStudent, shape: tuple[int, ...]
) -> None:
    values = student(torch.rand(shape))
    assert values.shape == (shape[0], len(ATTRIBUTES))
    assert 0 < values.min() < values.max() < 1


@pytest.mark.parametrize('name', ATTRIBUTES)
def test_each_head_has_its_name_and_the_order_is_that_of_the_names(name: str) -> None:
    heads = AttributeHeads(4)
    features = torch.rand(2, 4)
    alone = heads[name](features).sigmoid().squeeze(1)
    assert torch.allclose(alone, heads(features)[:, ATTRIBUTES.index(name)])


def test_every_head_teaches_the_one_encoder(student: AttributeStudent) -> None:
    for place in range(len(ATTRIBUTES)):
        student.zero_grad()
        student(torch.rand(2, 3, SIZE, SIZE))[:, place].sum().backward()
        gradients = [p.grad for p in student.encoder.parameters()]
        assert any(g is not None and g.abs().sum() > 0 for g in gradients)


def test_values_are_full_precision_under_autocast(student: AttributeStudent) -> None:
    with torch.autocast('cpu', dtype=torch.bfloat16):
        values = student(torch.rand(2, 3, SIZE, SIZE))
    assert values.dtype == torch.float32


@torch.no_grad()
def test_a_checkpoint_is_rebuilt_without_any_options(
    student: AttributeStudent, checkpoint: Path
) -> None:
    again = load_attribute_student(checkpoint)
    assert again.config == student.config
    assert not again.training
    image = torch.rand(2, 3, 60, 45)
    assert torch.equal(again(image), student(image))


def test_files_of_other_networks_are_refused(tmp_path: Path, checkpoint: Path) -> None:
    other = CLIPKDStudent(ENCODER, embed_dim=8, input_size=SIZE)
    torch.save(other.state_dict(), tmp_path / 'other.pth')
    with pytest.raises(ValueError, match='AttributeStudent, but it is one of CLIPKDS'):
        load_attribute_student(tmp_path / 'other.pth')
    torch.save({'a': torch.zeros(1)}, tmp_path / 'nothing.pth')
    with pytest.raises(ValueError, match='AttributeStudent, but it names no network'):
        load_attribute_student(tmp_path / 'nothing.pth')
    with pytest.raises(ValueError, match="of another network, 'AttributeStudent'"):
        load_network(checkpoint)  # it gives no score
    with pytest.raises(FileNotFoundError, match='no weight file'):
        load_attribute_student(tmp_path / 'missing.pth')


class Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ('run',))


def test_a_file_that_could_run_code_is_refused(
    student: AttributeStudent, tmp_path: Path
) -> None:
    content = {'params': student.state_dict(), 'more': Code()}
    torch.save(content, tmp_path / 'code.pth')
    with pytest.raises(ValueError, match=r'is refused.*could run code'):
        load_attribute_student(tmp_path / 'code.pth')


def test_a_file_that_lacks_a_head_does_not_fit(
    student: AttributeStudent, tmp_path: Path
) -> None:
    state = dict(student.state_dict())
    del state['heads.noisiness.bias']
    torch.save(state, tmp_path / 'four.pth')
    with pytest.raises(ValueError, match=r'(?s)does not fit.*heads\.noisiness\.bias'):
        load_attribute_student(tmp_path / 'four.pth')


@pytest.mark.parametrize(
    'options',
    [
        {'type': 'CLIPKDStudent', 'embed_dim': 8},
        {'type': 'CLIPKDStudent', 'head': 'regression'},
        {'type': 'CLIPLikert', 'pretrained': None, 'embed_dim': 8},
        {'type': 'AttributeStudent'},
    ],
)
def test_a_network_starts_from_its_encoder_by_one_option(
    checkpoint: Path, options: dict[str, Any]
) -> None:
    options |= {'encoder': ENCODER, 'input_size': SIZE}
    learned = backbone(load_attribute_student(checkpoint).state_dict())
    started = build_network({**options, 'encoder_weights': str(checkpoint)})
    assert isinstance(started, (CLIPKDStudent, CLIPLikert, AttributeStudent))
    mine = backbone(started.state_dict())
    assert mine.keys() == learned.keys()
    assert all(torch.equal(mine[name], learned[name]) for name in learned)
    random = backbone(build_network(options).state_dict())
    assert not all(torch.equal(random[name], learned[name]) for name in learned)


def test_a_student_with_another_encoder_is_an_error(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r'`encoder_weights`: .* tensors of ResNet'):
        CLIPKDStudent('timm:test_resnet', encoder_weights=str(checkpoint))


def test_clip_s_tower_is_no_encoder_here() -> None:
    with pytest.raises(ValueError, match="preset or a timm model, but got 'open_c"):
        AttributeStudent('open_clip:tiny')
