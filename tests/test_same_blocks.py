"""A B0 that begins as a Lite0: same answers, same blocks, trained from there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from script_modules import load_script
from test_train_resident import SIDE, options_of, store, train

from pyiqa_clipkd.network import CLIPKDStudent, load_network

__all__ = ['store']  # a fixture

same_blocks = load_script('same_blocks')
WIDTH = 64  # of images whose last maps have more than one cell


@pytest.fixture(autouse=True)
def sharp(monkeypatch: pytest.MonkeyPatch) -> None:
    """SiLU as near to ReLU as it gets: what is left is the bound at 6."""
    monkeypatch.setattr(same_blocks, 'WITHIN', 1e3)
    monkeypatch.setattr(same_blocks, 'LAST', 1e3)


def student(encoder: str) -> Any:
    return CLIPKDStudent(encoder, embed_dim=16, input_size=WIDTH).eval()


@pytest.fixture(scope='module')
def lite() -> Any:
    """Its activations are far below 6, the bound that B0 hasn't."""
    torch.manual_seed(0)
    network = student('efficientnet_lite')
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.3, 0.9)
            torch.nn.init.normal_(module.bias, std=0.2)
    same_blocks.measure_statistics(network, torch.rand(4, 8, 3, WIDTH, WIDTH))
    return network


def test_a_b0_that_begins_as_a_lite0_answers_as_it_does(
    lite: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    b0 = student('efficientnet')
    images = torch.rand(8, 3, WIDTH, WIDTH)
    with torch.no_grad():
        wanted = lite(images, return_details=True).embedding
        before = b0(images, return_details=True).embedding
        same_blocks.begin_as_lite(b0, lite.state_dict())
        after = b0(images, return_details=True).embedding
    assert F.cosine_similarity(before, wanted).abs().max() < 0.9
    assert F.cosine_similarity(after, wanted).min() > 0.99
    assert torch.allclose(after.norm(dim=1), wanted.norm(dim=1), rtol=0.05)
    # Through the whole of a network without training the shipped ones err more.
    monkeypatch.undo()
    shipped = student('efficientnet')
    same_blocks.begin_as_lite(shipped, lite.state_dict())
    with torch.no_grad():
        near = shipped(images, return_details=True).embedding
    apart = (near - wanted).norm(dim=1) / (before - wanted).norm(dim=1)
    assert apart.median() < 0.8


def test_a_small_part_of_the_way_of_each_block_is_left(lite: Any) -> None:
    b0 = student('efficientnet')
    same_blocks.begin_as_lite(b0, lite.state_dict())
    mine, theirs = same_blocks.BlockOutputs(b0), same_blocks.BlockOutputs(lite)
    images = torch.rand(8, 3, WIDTH, WIDTH)
    with torch.no_grad():
        for network in (b0, lite):
            network(images)
    assert len(mine.maps) == len(theirs.maps) == 16
    assert same_blocks.block_distance(mine.maps, theirs.maps) < 0.05
    assert same_blocks.block_distance(theirs.maps, theirs.maps) == 0
    means = [m.mean((0, 2, 3), keepdim=True).expand_as(m) for m in theirs.maps]
    assert same_blocks.block_distance(means, theirs.maps) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize(
    ('encoder', 'start'),
    [
        ('efficientnet', 'resnet18'),
        ('efficientnet', 'efficientnet'),
        ('efficientnet_lite', 'efficientnet_lite'),
        ('resnet18', 'resnet18'),
    ],
)
def test_only_a_b0_begins_as_a_lite0(encoder: str, start: str) -> None:
    network = student(encoder)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    with pytest.raises(ValueError, match='`train: begin_as_lite` needs an efficientn'):
        same_blocks.begin_as_lite(network, student(start).state_dict())
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_only_efficientnets_have_blocks_to_follow() -> None:
    with pytest.raises(ValueError, match=r'follow_blocks` .* is timm:resnet18'):
        same_blocks.BlockOutputs(student('resnet18'))


@pytest.mark.slow
@pytest.mark.parametrize(
    ('wanted', 'message'),
    [
        ({'begin_as_lite': True}, 'needs `path: pretrain_network`, the weights'),
        ({'follow_blocks': 1}, '`train: follow_blocks` needs `teacher: weights`.'),
    ],
)
def test_a_training_without_what_it_begins_as_or_follows_says_so(
    store: Path, tmp_path: Path, wanted: dict[str, Any], message: str
) -> None:
    options = options_of('lost')
    options['train'] |= wanted
    assert message in train(tmp_path, store, options)


def test_statistics_are_those_of_the_images_and_momenta_stay() -> None:
    norm = torch.nn.BatchNorm2d(3, momentum=0.2).eval()
    images = 5 + 2 * torch.randn(4, 16, 3, 9, 9)
    same_blocks.measure_statistics(norm, images)
    mean = norm.state_dict()['running_mean']
    assert torch.allclose(mean, images.mean((0, 1, 3, 4)), atol=1e-5)
    assert norm.momentum == 0.2
    assert not norm.training


@pytest.mark.slow
def test_a_training_begins_as_the_lite0_and_follows_it(
    store: Path, tmp_path: Path, lite: Any
) -> None:
    weights = tmp_path / 'lite.pth'
    torch.save({'params': lite.state_dict()}, weights)
    options = options_of('b0', teacher={'weights': str(weights)})
    options['network'] = lite.config | {'encoder': 'efficientnet', 'input_size': SIDE}
    options['path'] = {'pretrain_network': str(weights)}
    options['train'] |= {'begin_as_lite': True, 'follow_blocks': 1}
    options['train']['optim'] = {'lr': 0.0}
    kept = {**options, 'name': 'kept'}
    kept['train'] = options['train'] | {'keep_statistics': True}
    said = train(tmp_path, store, options, kept)
    assert 'kept' in said, said
    folder = tmp_path / 'experiments/b0'
    history = json.loads((folder / 'run.json').read_text())['history']
    assert history[0]['blocks'] > 0
    trained: Any = load_network(folder / 'models/net_best.pth')
    # Without a learning rate only the statistics have moved, and where they are kept
    # they are those that were measured before the first step.
    first, second, start = (
        network.state_dict()
        for network in (
            trained,
            load_network(tmp_path / 'experiments/kept/models/net_best.pth'),
            lite,
        )
    )
    stem = 'encoder.backbone.bn1'
    assert torch.allclose(first[f'{stem}.weight'], 16 * start[f'{stem}.weight'])
    assert torch.equal(trained.head.anchors, lite.head.anchors)
    assert second[f'{stem}.num_batches_tracked'] == 12
    assert not torch.allclose(
        second[f'{stem}.running_mean'], first[f'{stem}.running_mean']
    )
    assert not torch.allclose(
        second[f'{stem}.running_mean'], start[f'{stem}.running_mean']
    )
