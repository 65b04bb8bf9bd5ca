"""A readout of the stages: it begins as nothing, learns, and is exported too."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnxruntime import InferenceSession
from test_train_resident import SIDE, store
from test_train_resident import train as train_resident
from torch import nn

from pyiqa_clipkd.encoders import build_timm_encoder
from pyiqa_clipkd.export import export, write_graph
from pyiqa_clipkd.network import CLIPKDStudent, build_from_config, load_network
from pyiqa_clipkd.publish import publish
from pyiqa_clipkd.stages import StageReadout, statistics

__all__ = ['store']  # a fixture

ENCODER = 'timm:test_efficientnet'
NAME = 'clipkd_tiny-stages'
SIZE = 48
IMAGES = torch.rand(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5))


def readout_of(network: Any) -> StageReadout:
    readout = network.encoder.readout
    assert isinstance(readout, StageReadout)
    return readout


@pytest.fixture
def student() -> CLIPKDStudent:
    """With a readout that says something."""
    torch.manual_seed(0)
    student = CLIPKDStudent(ENCODER, embed_dim=300, input_size=SIZE, stage_readout=500)
    nn.init.normal_(readout_of(student).last.weight, std=0.05)
    return student.eval()


def published(student: CLIPKDStudent, folder: Path, precision: str) -> Path:
    torch.save({'params': student.state_dict()}, folder / 'net_best.pth')
    return publish(folder / 'net_best.pth', NAME, folder=folder, precision=precision)


@pytest.mark.parametrize('encoder', ['test_resnet', 'test_vit', 'test_byobnet'])
def test_it_begins_as_the_network_without(encoder: str) -> None:
    options: dict[str, Any] = {'encoder': f'timm:{encoder}', 'embed_dim': 8}
    options['input_size'] = 160
    images = torch.rand(2, 3, 160, 160)
    plain = CLIPKDStudent(**options).eval()
    more = CLIPKDStudent(**options, stage_readout=16).eval()
    more.load_state_dict(plain.state_dict(), strict=False)
    torch.testing.assert_close(more(images), plain(images))


def test_what_it_reads_are_means_and_deviations() -> None:
    maps = [torch.randn(2, channels, 5, 7) * 3 + 4 for channels in (6, 2)]
    found = statistics(maps)
    first, second = maps
    expected = [x.flatten(2) for x in (first, first, second, second)]
    wanted = [
        x.std(2, correction=0) if i % 2 else x.mean(2) for i, x in enumerate(expected)
    ]
    torch.testing.assert_close(found, torch.cat(wanted, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('values', [0.0, 7.0, 60_000.0])
def test_a_channel_that_is_the_same_everywhere_has_a_gradient(values: float) -> None:
    maps = torch.full((2, 3, 4, 4), values).half().requires_grad_()
    found = statistics([maps])
    found.sum().backward()
    assert found.isfinite().all()
    assert maps.grad is not None
    assert maps.grad.isfinite().all()


def test_damage_that_the_last_features_do_not_know_is_learned() -> None:
    """Noise of which the encoder, random and frozen, has no word but in its stages."""
    torch.manual_seed(0)
    student = CLIPKDStudent(ENCODER, embed_dim=16, input_size=SIZE, stage_readout=32)
    images = (
        0.5
        + torch.randn(64, 3, SIZE, SIZE)
        * torch.linspace(0, 0.2, 64)[:, None, None, None]
    )
    wanted = torch.linspace(4.5, 1.5, 64)[:, None]
    student.encoder.backbone.requires_grad_(False)
    optimizer = torch.optim.Adam(readout_of(student).parameters(), lr=1e-2)
    for _ in range(40):
        loss = nn.functional.mse_loss(student(images.clamp(0, 1)), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1


def test_what_is_the_same_in_all_photographs_is_not_seen() -> None:
    """Else the noise of half precision or of eight bits would be read as a finding."""
    readout = StageReadout([4], width=16, embed_dim=3)
    nn.init.normal_(readout.last.weight)
    photographs = torch.randn(50, 4, 6, 6) * torch.rand(50, 4, 1, 1)
    photographs[:, 1] = 2 + 1e-4 * photographs[:, 1]
    seen = statistics([photographs])
    readout.norm.load_state_dict(
        {'running_mean': seen.mean(0), 'running_var': seen.var(0)}, strict=False
    )
    readout.eval()
    noisy = photographs.clone()
    noisy[:, 1] += 0.01 * torch.randn(50, 6, 6)
    before = readout([photographs])
    moved = (readout([noisy]) - before).abs().mean()
    readout.overlook_constant()
    once = readout.hidden.weight.clone()
    readout.overlook_constant()
    assert torch.equal(readout.hidden.weight, once)
    after = readout([photographs])
    assert (readout([noisy]) - after).abs().max() < 1e-3 < 0.3 < moved
    photographs[:, 0] *= 2
    assert (readout([photographs]) - after).abs().mean() > 0.1
    assert (before - after).abs().mean() < 1


def test_one_photograph_can_be_trained_on(student: CLIPKDStudent) -> None:
    readout_of(student).train()
    assert student.encoder.readout is not None
    student(IMAGES[:1]).sum().backward()
    assert readout_of(student).hidden.weight.grad is not None


@pytest.mark.parametrize('precision', ['float32', 'float16', 'int8'])
def test_a_weight_file_says_that_it_has_one(
    student: CLIPKDStudent, tmp_path: Path, precision: str
) -> None:
    again = load_network(published(student, tmp_path, precision))
    assert again.config['stage_readout'] == 500
    atol = {'float32': 1e-5, 'float16': 0.01, 'int8': 0.1}[precision]
    torch.testing.assert_close(again(IMAGES), student(IMAGES), rtol=0, atol=atol)


def test_networks_without_one_are_described_as_before() -> None:
    plain = CLIPKDStudent(ENCODER, embed_dim=8, input_size=SIZE)
    assert 'stage_readout' not in plain.config
    assert build_from_config(plain.config).state_dict().keys() == (
        plain.state_dict().keys()
    )


def test_exported_it_scores_the_same(student: CLIPKDStudent, tmp_path: Path) -> None:
    weights = published(student, tmp_path, 'int8')
    network = load_network(weights)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 61, 80, 3), np.uint8)
    batch = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    with torch.inference_mode():
        expected = network(batch)[:, 0]
        squares = network(IMAGES)[:, 0]
    model = export(NAME, tmp_path / 'photographs.onnx', weights=weights)
    score = InferenceSession(model).run(None, {'image': pixels})[0]
    np.testing.assert_allclose(score, expected, atol=2e-4)
    graph = write_graph(NAME, tmp_path)
    assert graph.stat().st_size < 0.3 * weights.stat().st_size
    kinds = {
        x.data_type
        for x in onnx.load(graph, load_external_data=False).graph.initializer
    }
    assert onnx.TensorProto.INT8 in kinds
    session = InferenceSession(graph)
    found = session.run(None, {session.get_inputs()[0].name: IMAGES.numpy()})[0]
    np.testing.assert_allclose(found, squares, atol=2e-4)


def test_under_autocast_it_is_read_in_full_precision(student: CLIPKDStudent) -> None:
    with torch.inference_mode():
        expected = student(IMAGES)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            found = student(IMAGES)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0.1)


@pytest.mark.parametrize('kind', [torch.float16, torch.bfloat16])
def test_a_network_in_half_precision_reads_its_stages_too(
    student: CLIPKDStudent, kind: torch.dtype
) -> None:
    with torch.inference_mode():
        expected = student(IMAGES)
        found = student.to(kind)(IMAGES.to(kind))
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.1)


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        (
            {'stage_readout': -1},
            '`stage_readout` must be a whole number >= 0, but got -1',
        ),
        ({'stage_readout': 'yes'}, "`stage_readout` must be .* but got 'yes'"),
        ({'stage_readout': True}, '`stage_readout` must be .* but got True'),
        ({'stage_readout': 8, 'head': 'regression'}, 'needs `head: likert`'),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        CLIPKDStudent(ENCODER, **options)


def test_an_encoder_that_tells_no_stages_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from timm.models.efficientnet import EfficientNet

    monkeypatch.delattr(EfficientNet, 'forward_intermediates')
    with pytest.raises(ValueError, match=f'tells its stages .* {ENCODER} does not'):
        build_timm_encoder(ENCODER, embed_dim=8, stage_readout=4)


# --- the script -----------------------------------------------------------------------


train = partial(train_resident, script='train_readout.py')

# A channel of the last stage; that has 64, of one cell each, and 104 are before it.
LAST_NORM, CONSTANT = 'encoder.backbone.blocks.4.0.bn3', 5
OVERLOOKED = [2 * 104 + CONSTANT, *range(2 * 104 + 64, 2 * 104 + 128)]


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    torch.manual_seed(1)
    network = {'type': 'CLIPKDStudent', 'encoder': ENCODER, 'input_size': SIDE}
    for name in ('start', 'teacher'):
        plain = build_from_config(network)
        plain.state_dict()[f'{LAST_NORM}.weight'][CONSTANT] = 0
        torch.save({'params': plain.state_dict()}, tmp_path / f'{name}_00.pth')
    return {
        'name': 'stages',
        'manual_seed': 1,
        'datasets': {'train': {'split_index': 1}},
        'path': {'pretrain_network': str(tmp_path / 'start_{split}.pth')},
        'teacher': {'score_with': [str(tmp_path / 'teacher_{split}.pth')]},
        'network': {**network, 'stage_readout': 32},
        'train': {
            'mixed_precision': None,
            'copies': 0.5,
            'epochs': 30,
            'batch_size': 8,
            'optim': {'lr': 1e-2, 'projection': 0.1, 'weight_decay': 0.0},
            'forget': 0.1,
            'keep': 0.0,
            'score_weight': 0.2,
            'ranking_loss_opt': {'type': 'DegradationRankingLoss', 'weight': 0.1},
        },
    }


def test_readout_and_projection_learn_and_the_encoder_stays(
    store: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    said = train(tmp_path, store, options)
    folder = tmp_path / 'experiments/stages'
    assert 'srcc' in said, said
    *history, end = json.loads((folder / 'run.json').read_text())['history']
    assert end['mae'] == history[-1]['mae']
    assert history[-1]['hard'] < 0.7 * history[1]['hard']
    network = load_network(folder / 'models/net_best.pth')
    start = load_network(tmp_path / 'start_00.pth').state_dict()
    changed = {
        name
        for name, tensor in network.state_dict().items()
        if name not in start or not torch.equal(tensor, start[name])
    }
    assert {'encoder.projection.weight', 'encoder.readout.last.weight'} <= changed
    assert not any(name.startswith('encoder.backbone') for name in changed)
    overlooked = (readout_of(network).hidden.weight == 0).all(0).nonzero()[:, 0]
    assert overlooked.tolist() == OVERLOOKED
    # What was learned from kept features is what the network says of the pixels.
    pixels = torch.from_numpy(np.load(store / 'photographs.npy'))
    held_out = pixels[~np.load(store / 'train.npy')].permute(0, 3, 1, 2).float() / 255
    mos = 1 + 4 * np.load(store / 'mos.npy')[~np.load(store / 'train.npy')]
    with torch.inference_mode():
        error = np.abs(network(held_out)[:, 0].numpy() - mos).mean()
    assert error == pytest.approx(history[-1]['mae'], abs=1e-3)


def test_what_is_kept_of_the_start_is_its_share_of_the_embedding(
    store: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    images = torch.rand(4, 3, SIDE, SIDE)
    found = {}
    for keep in (0.0, 0.25, 1.0):
        options['train'] |= {'keep': keep, 'epochs': 2}
        said = train(tmp_path, store, options)
        assert 'srcc' in said, said
        network = load_network(tmp_path / 'experiments/stages/models/net_best.pth')
        with torch.inference_mode():
            found[keep] = network.embed(images)
    with torch.inference_mode():
        start = load_network(tmp_path / 'start_00.pth').embed(images)
    torch.testing.assert_close(found[1.0], start)
    torch.testing.assert_close(found[0.25], 0.75 * found[0.0] + 0.25 * start)


def test_features_are_computed_once_and_anew_for_other_networks(
    store: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    options['train']['epochs'] = 1
    kept = ('photographs', 'moved', 'damaged', 'worse')
    said = train(tmp_path, store, options)
    assert all(f'{kind}.npz' in said for kind in kept), said
    again = train(tmp_path, store, options)
    assert 'srcc' in again
    assert '.npz' not in again
    options['path']['pretrain_network'] = str(tmp_path / 'teacher_00.pth')
    assert 'photographs.npz' in train(tmp_path, store, options)
    options['train']['ranking_loss_opt']['zoom'] = 0.1
    assert 'moved.npz' in train(tmp_path, store, options)


def test_a_network_without_a_readout_or_of_another_kind_is_an_error(
    store: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    other = {
        **options,
        'network': {**options['network'], 'encoder': 'timm:test_resnet'},
    }
    assert 'does not fit the network' in train(tmp_path, store, other)
    trained = CLIPKDStudent(ENCODER, input_size=SIDE, stage_readout=32)
    torch.save({'params': trained.state_dict()}, tmp_path / 'start_00.pth')
    assert 'has a readout already' in train(tmp_path, store, options)
    options['train']['copies'] = 0
    assert '`train: copies` must be in (0, 1]' in train(tmp_path, store, options)
    del options['network']['stage_readout']
    assert 'needs `network: stage_readout`' in train(tmp_path, store, options)


def test_a_nearly_constant_channel_keeps_its_deviation() -> None:
    """Its square less the square of its mean would be noise of float32."""
    maps = 2 + 1e-3 * torch.randn(1, 4, 96, 96, generator=torch.Generator())
    found, exact = (statistics([one])[0, 4:] for one in (maps, maps.double()))
    assert torch.allclose(found.double(), exact, rtol=1e-4)
