"""Stages that learn by themselves: cut where they end, and fitting together again."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from script_modules import SCRIPTS, load_script
from test_train_resident import SIDE, options_of, store
from test_train_resident import train as train_resident

from pyiqa_clipkd.encoders import PRESETS, build_timm_encoder
from pyiqa_clipkd.hints import STRIDES
from pyiqa_clipkd.network import CLIPKDStudent, build_from_config, load_network
from pyiqa_clipkd.options import load_options

__all__ = ['store']  # a fixture

train = partial(train_resident, script='train_stages.py')

# Wide enough for the maps of `ENCODER`, and each stage ends with an activation.
STUDENT = 'timm:test_resnet'
PART = {'sizes': [32], 'lr': 2e-3, 'photographs': 6, 'copies': 1, 'mixed': 1}
STAGE_FILES = sorted((SCRIPTS.parent / 'configs/release/stages').glob('*.yml'))
TEACHER = 'experiments/teacher/models/net_best.pth'


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return load_script


@pytest.mark.parametrize('name', [*PRESETS])
def test_stages_one_after_the_other_are_the_network(name: str, scripts: Any) -> None:
    encoder = build_timm_encoder(PRESETS[name], embed_dim=8, input_size=64).eval()
    cut = scripts('network_stages').Stages(encoder.backbone)
    images = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        values = images
        for stride in STRIDES:
            values = cut.run(stride, values)
            assert values.shape == (2, cut.channels[stride], 64 // stride, 64 // stride)
        pooled = cut.rest(values).mean((2, 3))
        assert torch.allclose(pooled, encoder.backbone(images), atol=1e-6)


def test_a_network_without_stages_is_an_error(scripts: Any) -> None:
    encoder = build_timm_encoder('timm:test_vit', embed_dim=8)
    with pytest.raises(ValueError, match=r'needs stages of the strides \[4, 8, 16, 32'):
        scripts('network_stages').Stages(encoder.backbone)


def test_an_activation_at_the_end_is_seen(scripts: Any) -> None:
    images = torch.rand(1, 3, 64, 64)
    for name, wanted in (
        ('mobilevit', [False, True, True, True]),
        ('resnet18', [True] * 4),
        ('efficientnet', [False] * 4),
    ):
        encoder = build_timm_encoder(PRESETS[name], embed_dim=8).eval()
        found = scripts('network_stages').Stages(encoder.backbone).ends_active(images)
        assert [*found.values()] == wanted, name


def student_of(*parts: dict[str, Any], **changes: Any) -> dict[str, Any]:
    network = {'type': 'CLIPKDStudent', 'encoder': STUDENT, 'input_size': SIDE}
    student = options_of('student', network=network, teacher={'weights': TEACHER})
    student['train']['parts'] = [PART | part for part in parts]
    student['train'] |= {'optim': {'weight_decay': 0.02}, 'clip_grad_norm': 5}
    return student | changes


@pytest.fixture(scope='module')
def taught(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher."""
    folder = tmp_path_factory.mktemp('taught')
    said = train_resident(folder, store, options_of('teacher'))
    assert 'net_best.pth' in said, said
    return folder


@pytest.fixture
def training_of(
    store: Path, taught: Path, scripts: Any, monkeypatch: pytest.MonkeyPatch
) -> Callable[[dict[str, Any]], Any]:
    """Options -> a training in this process, not begun."""
    monkeypatch.chdir(taught)
    device = torch.device('cpu')
    arrays = scripts('resident_views').Store([store], device)
    return lambda options: scripts('train_stages').Training(options, arrays, device)


def history_of(folder: Path) -> list[dict[str, Any]]:
    record = json.loads((folder / 'experiments/student/run.json').read_text())
    history: list[dict[str, Any]] = record['history']
    return history


def mean_of(lines: list[dict[str, Any]], key: str) -> float:
    return sum(line[key] for line in lines) / len(lines)


def test_stages_learn_and_a_rerun_repeats_only_what_has_changed(
    store: Path, taught: Path
) -> None:
    early = {'stages': [4, 8], 'steps': 40}
    late = {'stages': [16, 32], 'steps': 40, 'own': [0, 0.5]}
    said = train(taught, store, student_of(early, late))
    history = history_of(taught)
    assert [line['part'] for line in history] == [1] * 20 + [2] * 20, said
    first, second = history[:20], history[20:]
    assert mean_of(first[-5:], '4') < 0.8 * mean_of(first[:5], '4')
    assert first[-1]['held_out']['8'] < 0.8 * first[0]['held_out']['8']
    assert second[-1]['held_out']['cells'] < 0.2 * second[0]['held_out']['cells']
    network = load_network(taught / 'experiments/student/models/net_best.pth')
    assert network.config['encoder'] == STUDENT

    last = {'stages': [*STRIDES], 'steps': 2, 'own': [1, 1]}
    said = train(taught, store, student_of(early, late, last))
    assert said.count('"step"') == 2  # those of the new part alone
    assert history_of(taught)[: len(history)] == history

    said = train(taught, store, student_of(early, late | {'steps': 3}))
    assert said.count('"step"') == 3
    assert history_of(taught)[:20] == first


def test_targets_are_the_teacher_s_channels_where_the_student_can_reach_them(
    scripts: Any, training_of: Callable[[dict[str, Any]], Any]
) -> None:
    """Normalized, above 0 for an activation, and constant in the channels to spare."""
    active = scripts('train_stages').ACTIVE
    training = training_of(student_of({'stages': [4], 'steps': 1}))
    training.views = training._views(0)
    training._measure()
    training._move_up()
    phase = training.parts[0].phase(0)
    images = torch.cat([training._images(phase) for _ in range(30)])
    maps, _ = training._teachers_maps(images, 32)
    for stride in (4, 8, 16):
        target = training._target(maps[stride], stride)
        used = maps[stride].shape[1]
        assert target.shape[1] == training.mine.channels[stride]
        assert (target[:, used:] == active).all()
        deviation, mean = torch.std_mean(target[:, :used], (0, 2, 3))
        assert torch.allclose(mean, torch.tensor(active), atol=0.4)
        assert 0.7 < float(deviation.mean()) < 1.3


def test_a_loss_without_weight_teaches_nothing(
    training_of: Callable[[dict[str, Any]], Any],
) -> None:
    part = {'stages': [4, 8], 'steps': 2, 'weights': {8: 0}}
    options = student_of(part)
    options['train']['optim'] = {'weight_decay': 0}
    training = training_of(options)
    before = copy.deepcopy(training.mine.parts)
    training.run()
    for place, learns in ((0, True), (1, False)):
        pairs = zip(
            before[place].parameters(),
            training.mine.parts[place].parameters(),
            strict=True,
        )
        same = [torch.equal(*pair) for pair in pairs if pair[0].ndim > 1]
        assert all(same) != learns


def test_no_block_is_left_out_while_stages_learn(
    training_of: Callable[[dict[str, Any]], Any],
) -> None:
    """timm's Swin leaves out one in ten by default."""
    network = {'type': 'CLIPKDStudent', 'encoder': 'swin', 'input_size': SIDE}
    training = training_of(student_of({'stages': [16], 'steps': 1}, network=network))
    training.mine.train()
    maps = torch.rand(4, training.mine.channels[8], 7, 7)
    first = training.mine.run(16, maps)
    assert all(torch.equal(training.mine.run(16, maps), first) for _ in range(3))


def test_batches_grow_in_size_and_shrink_in_number(scripts: Any) -> None:
    options = PART | {'stages': [4], 'steps': 9, 'sizes': [32, 64, 96], 'own': [0, 0.5]}
    part = scripts('train_stages').part_of(options, 96)
    phases = [part.phase(progress) for progress in (0.0, 0.4, 1.0)]
    assert [phase.size for phase in phases] == [32, 64, 96]
    assert [phase.photographs for phase in phases] == [6, 3, 3]
    assert [part.share_of_own(p) for p in (0, 0.25, 0.5, 1)] == [0, 0.25, 0.5, 0.5]


@pytest.mark.parametrize(
    ('wrong', 'words'),
    [
        ({'stages': [4, 16]}, r'stages` must be neighbours among \[4, 8, 16, 32\]'),
        ({'stages': []}, 'stages` must be neighbours'),
        ({'stages': [8, 4]}, 'stages` must be neighbours'),
        ({'sizes': []}, r'sizes` must be multiples of 32, at most .* \(96\)'),
        ({'sizes': [128]}, 'sizes` must be multiples of 32'),
        ({'sizes': [40]}, r'sizes` must be .*, but got \[40\]'),
        ({'steps': 0}, 'steps` must be at least 1, but got 0'),
        ({'lr': 0}, 'lr` must be above 0'),
        ({'photographs': 1}, 'photographs` must be at least 2'),
        ({'copies': 7}, 'copies` must be 0 to `photographs`, but got 7'),
        ({'mixed': -1}, 'mixed` must be at least 0'),
        ({'own': [0, 2]}, r'own` must be two shares in \[0, 1\], but got \[0, 2\]'),
        ({'weights': {4: -1}}, r'weights` must be numbers of at least 0 .* \(4\)'),
        ({'weights': {'4': 'a'}}, 'weights` must be numbers'),
        ({'weights': {'hint': 1}}, r"losses of this part \(4\), but got {'hint': 1}"),
        ({'weights': [1]}, 'weights` must be numbers'),
        ({'step': 3}, 'parts` must each have stages, sizes, steps, lr, photographs'),
    ],
)
def test_a_wrong_part_is_one_error(
    wrong: dict[str, Any], words: str, scripts: Any
) -> None:
    with pytest.raises(ValueError, match=words):
        scripts('train_stages').part_of(
            PART | {'stages': [4], 'steps': 1} | wrong, largest=96
        )


@pytest.mark.parametrize('file', STAGE_FILES, ids=lambda file: file.stem)
def test_shipped_option_files_can_be_trained(file: Path, scripts: Any) -> None:
    options = load_options(file)
    network = build_from_config(dict(options['network']))
    cut = scripts('network_stages').Stages(network.encoder.backbone)
    teacher = build_timm_encoder(PRESETS['efficientnet_lite'], embed_dim=8)
    teachers = scripts('network_stages').Stages(teacher.backbone)
    scripts('train_stages').check_channels(cut, teachers)
    for part in options['train']['parts']:
        scripts('train_stages').part_of(part, options['network']['input_size'])


def test_no_parts_and_no_teacher_are_errors(scripts: Any) -> None:
    training = scripts('train_stages').Training
    for options, words in (
        (student_of(), 'needs `train: parts`'),
        (student_of({'stages': [4], 'steps': 1}, teacher=None), 'needs `teacher: w'),
    ):
        with pytest.raises(ValueError, match=words):
            training(options, None, torch.device('cpu'))


def test_a_network_that_pools_otherwise_is_an_error(scripts: Any) -> None:
    network = CLIPKDStudent('timm:mobilenetv3_small_050', input_size=SIDE)
    with pytest.raises(ValueError, match='run one after the other and whose features'):
        scripts('network_stages').check_cut(network)


def test_a_student_too_narrow_for_the_maps_is_an_error(scripts: Any) -> None:
    student, teacher = (
        scripts('network_stages').Stages(build_timm_encoder(name, embed_dim=8).backbone)
        for name in ('timm:mobilenetv3_small_050', 'timm:test_efficientnet')
    )
    with pytest.raises(ValueError, match='student has 8 channels at 4 pixels a cell'):
        scripts('train_stages').check_channels(student, teacher)


def test_a_start_of_another_encoder_is_an_error(scripts: Any, taught: Path) -> None:
    network = CLIPKDStudent(STUDENT, input_size=SIDE)
    with pytest.raises(ValueError, match='is not of an encoder timm:test_resnet'):
        scripts('train_stages').take_encoder(network, str(taught / TEACHER))
