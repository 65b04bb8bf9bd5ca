"""Every shipped option file, and the three stages as a user runs them."""

from __future__ import annotations

import csv
import functools
import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from pyiqa.archs import build_network
from pyiqa.losses import build_loss
from pyiqa.utils.options import ordered_yaml
from torch import Tensor, nn

from pyiqa_clipkd import pipeline
from pyiqa_clipkd.model import CLIPKDModel
from pyiqa_clipkd.network import CLIPKDStudent, CLIPLikert, QualityNetwork, load_network
from pyiqa_clipkd.options import load_options

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / 'configs'
# A file of its own is a recipe; an overlay goes behind one.
OVERLAYS = sorted(
    str(path.relative_to(CONFIGS))
    for path in [
        *CONFIGS.glob('variants/*.yml'),
        *CONFIGS.glob('*/protocol_*.yml'),
        *(CONFIGS / 'attributes' / name for name in ('biq2021.yml', 'start.yml')),
    ]
)
# Without human scores, so unlike the others: tests/test_attribute_model.py runs it.
PRETRAINING = 'attributes/pretrain.yml'
FILES = sorted(
    name
    for path in CONFIGS.glob('*/*.yml')
    if path.parent.name not in ('_base_', 'results')
    if path != CONFIGS / 'release' / 'plan.yml'
    if (name := str(path.relative_to(CONFIGS))) not in [*OVERLAYS, PRETRAINING]
)
DISTILLED = [file for file in FILES if file.endswith('stage3_student.yml')]
VARIANTS = [Path(name).name for name in OVERLAYS if name.startswith('variants/')]
SOFT_WEIGHTS = {
    'hard.yml': [0, 0, 0],
    'soft.yml': [1, 1, 1],
    'fixed_0.5.yml': [0.5, 0.5, 0.5],
    'fixed_0.9.yml': [0.9, 0.9, 0.9],
}
PAPER_SETS = ('koniq10k', 'spaq', 'csiq', 'live')
STAGES = ('stage1_zeroshot', 'stage2_teacher', 'stage3_student')
FULL_REFERENCE = ('csiq', 'live')
BIQ2021 = ('biq2021', 'biq2021_small', 'release', 'attributes')
SECOND_SIDE = dict.fromkeys(BIQ2021, 'test')  # all others: val
TINY = 'timm:test_efficientnet'
PRESETS = ('swin', 'resnet18', 'mobilevit', 'efficientnet', 'efficientnet_lite')


def options_of(file: str, *overrides: str) -> dict[str, Any]:
    return load_options(CONFIGS / file, overrides)


def variant_of(file: str, variant: str, *overrides: str) -> dict[str, Any]:
    return load_options([CONFIGS / file, CONFIGS / 'variants' / variant], overrides)


def is_test(options: dict[str, Any]) -> bool:
    return 'train' not in options['datasets']


# --- what the files say ------------------------------------------------------------


def test_there_is_a_file_for_each_stage_of_each_set() -> None:
    wanted = {f'{data}/{stage}.yml' for data in PAPER_SETS for stage in STAGES}
    wanted |= {f'smoke/{stage}.yml' for stage in STAGES}
    assert wanted <= set(FILES)


@pytest.mark.parametrize('file', FILES)
def test_a_file_expands_to_plain_options_that_the_host_reads(file: str) -> None:
    options = options_of(file)
    text = yaml.safe_dump(options, sort_keys=False)
    assert json.loads(json.dumps(yaml.load(text, ordered_yaml()[0]))) == options
    assert '{' not in options['name'] + options['save_final_results_path']
    assert options['model_type'] == 'CLIPKDModel'
    assert {'name', 'num_gpu', 'manual_seed', 'path', 'val', 'logger'} <= set(options)
    phases = {'test_1'} if is_test(options) else {'train', 'val'}
    assert set(options['datasets']) == phases


@pytest.mark.parametrize('file', FILES)
def test_the_labels_of_a_data_set_become_0_to_1_and_images_one_size(file: str) -> None:
    for phase, data in options_of(file)['datasets'].items():
        assert data['mos_normalize'] is True
        assert data['mos_range'][0] < data['mos_range'][1]
        assert data['lower_better'] in (True, False)
        assert data['augment']['resize'] == {
            'size': data['augment']['center_crop'],
            'interpolation': 3,
        }
        crops = [key for key in data['augment'] if key != 'hflip']
        assert crops in (
            ['resize', 'center_crop'],
            ['resize', 'center_crop', 'random_crop'],
        )
        assert data.get('override_phase', 'train') == (
            'train' if phase == 'train' else SECOND_SIDE.get(file.split('/')[0], 'val')
        )
        assert data['type'] == (
            'GeneralFRDataset' if data['name'] in FULL_REFERENCE else 'GeneralNRDataset'
        )


def test_no_two_files_write_to_the_same_folder() -> None:
    names = [options_of(file)['name'] for file in FILES]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize('data', [*PAPER_SETS, 'biq2021', 'biq2021_small', 'smoke'])
def test_a_student_takes_the_teacher_that_stage_2_of_its_set_makes(data: str) -> None:
    teacher = options_of(f'{data}/stage2_teacher.yml')['name']
    weights = options_of(f'{data}/stage3_student.yml')['teacher']['weights']
    assert weights == f'experiments/{teacher}/models/net_best.pth'


@pytest.mark.parametrize('data', PAPER_SETS)
def test_the_paper_sets_have_the_paper_settings(data: str) -> None:
    for stage in STAGES:
        options = options_of(f'{data}/{stage}.yml')
        assert options['num_gpu'] == 'auto'
        for phase in options['datasets'].values():
            assert phase['batch_size_per_gpu'] == 64
            assert phase['split_index'] == 1
            assert phase['augment'] == {
                'hflip': False,
                'resize': {'size': 224, 'interpolation': 3},
                'center_crop': 224,
            }
        if stage == 'stage1_zeroshot':
            continue
        train = options['train']
        assert train['total_epoch'] == 100
        assert train['optim']['type'] == 'AdamW'
        lr = 5e-6 if stage == 'stage2_teacher' else 1e-4
        assert train['optim']['lr'] == lr
        assert train['scheduler'] == {'type': 'CosinePerIteration', 'min_ratio': 0.1}


@pytest.mark.parametrize('data', PAPER_SETS)
def test_the_paper_sets_have_the_paper_networks_and_losses(data: str) -> None:
    clip = {
        'type': 'CLIPLikert',
        'encoder': 'open_clip:ViT-B-32-quickgelu',
        'pretrained': 'openai',
    }
    zeroshot, teacher, student = (options_of(f'{data}/{stage}.yml') for stage in STAGES)
    assert zeroshot['network'] == teacher['network'] == clip
    assert teacher['train']['mos_loss_opt'] == {'type': 'MSELoss'}
    assert student['network'] == {
        'type': 'CLIPKDStudent',
        'encoder': 'swin',
        'encoder_weights': 'timm',
    }
    loss = {'type': 'CosineSoftHardLoss', 'schedule': 'cosine'}
    assert student['train']['distillation_loss_opt'] == loss


@pytest.mark.parametrize('encoder', PRESETS)
def test_another_student_is_one_override_away_and_gets_its_own_folder(
    encoder: str,
) -> None:
    options = options_of('koniq10k/stage3_student.yml', f'network:encoder={encoder}')
    assert options['name'] == f'stage3_{encoder}_koniq10k'


@functools.cache
def built(network: str) -> nn.Module:
    return build_network(json.loads(network))


@pytest.mark.parametrize('file', FILES)
def test_network_loss_and_optimizer_of_a_file_can_be_built(file: str) -> None:
    check_that_it_can_be_built(options_of(file))


def check_that_it_can_be_built(options: dict[str, Any]) -> None:
    network_options = {
        key: None if key in ('pretrained', 'encoder_weights') else value
        for key, value in options['network'].items()
    }
    if network_options['type'] == 'CLIPLikert':
        network_options['pretrained'] = None
    network = built(json.dumps(network_options, sort_keys=True))
    kind = CLIPLikert if options['network']['type'] == 'CLIPLikert' else CLIPKDStudent
    assert isinstance(network, kind)
    if is_test(options):
        return
    train = options['train']
    losses = [train[key] for key in train if key.endswith('_loss_opt') and train[key]]
    assert losses
    for loss in losses:
        assert isinstance(build_loss(loss), nn.Module)
    optim = dict(train['optim'])
    optimizer = getattr(torch.optim, optim.pop('type'))(network.parameters(), **optim)
    assert optimizer.param_groups[0]['lr'] == train['optim']['lr']


@pytest.mark.parametrize('variant', VARIANTS)
def test_a_variant_fits_behind_every_recipe_of_a_student(variant: str) -> None:
    names = set()
    for file in DISTILLED:
        options = variant_of(file, variant)
        check_that_it_can_be_built(options)
        names.add(options['name'])
        train, head = options['train'], options['network'].get('head', 'likert')
        if variant == 'regression.yml':
            assert (head, options['teacher']) == ('regression', None)
            assert train['distillation_loss_opt'] is None
            continue
        assert head == 'likert'
        assert options['teacher']['weights']
        cache = None if variant == 'ridge_hints.yml' else 'experiments/teacher_cache'
        assert options['teacher']['cache'] == cache
        loss = build_loss(train['distillation_loss_opt'])
        weights = [loss.soft_weight_at(progress) for progress in (0, 0.5, 1)]
        assert weights == pytest.approx(SOFT_WEIGHTS.get(variant, [1, 0.5, 0]))
        start = 'ridge' if variant.startswith('ridge') else None
        assert train.get('projection_start') == start
    assert len(names) == len(DISTILLED)
    assert not names & {options_of(file)['name'] for file in FILES}


@pytest.mark.parametrize('file', [name for name in OVERLAYS if '/protocol_' in name])
def test_a_protocol_changes_the_split_alone(file: str) -> None:
    for stage in STAGES:
        recipe = CONFIGS / Path(file).parent / f'{stage}.yml'
        plain, other = load_options(recipe), load_options([recipe, CONFIGS / file])
        for phase, data in other['datasets'].items():
            before = plain['datasets'][phase]
            changed = {key for key in data if data[key] != before[key]}
            assert changed
            assert changed <= {'meta_info_file', 'split_index', 'override_phase'}
        assert other | {'datasets': None} == plain | {'datasets': None}


def test_a_student_has_a_teacher_with_weights_or_none() -> None:
    """Not one that has nothing but a cache."""
    for file in FILES:
        teacher = options_of(file).get('teacher')
        assert teacher is None or teacher['weights']


def test_the_readme_has_a_row_for_every_file_and_no_other() -> None:
    text = (CONFIGS / 'README.md').read_text()
    rows = set(re.findall(r'^\| `([\w/.]+\.yml)`', text, flags=re.MULTILINE))
    assert rows == {*FILES, *OVERLAYS, PRETRAINING}


# --- one iteration of each ---------------------------------------------------------


def write_data(folder: Path, data: dict[str, Any], second_side: str) -> list[str]:
    """A tiny set in the columns of a data set's type, labels over its whole range."""
    folder.mkdir(parents=True)
    low, high = data['mos_range']
    reference = data['type'] == 'GeneralFRDataset'
    rng = np.random.default_rng(0)
    with (folder / 'meta.csv').open('w', newline='') as file:
        writer = csv.writer(file)
        header = ['ref_name'] * reference + ['dist_name', 'label']
        writer.writerow([*header, 'ratio802_seed123_split_01'])
        for i in range(8):
            pixels = rng.integers(0, 256, (40, 50, 3)) * i // 7
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f'{i}.png')
            label = low + (high - low) * i / 7
            side = second_side if i % 2 else 'train'
            writer.writerow(['7.png'] * reference + [f'{i}.png', label, side])
    return [
        override
        for override in (
            f'dataroot_target={folder}',
            f'dataroot_ref={folder}',
            f'meta_info_file={folder / "meta.csv"}',
            'batch_size_per_gpu=4',
            'num_worker_per_gpu=0',
            'pin_memory=false',
        )
        if reference or not override.startswith('dataroot_ref')
    ]


def tiny_overrides(folder: Path, file: str) -> list[str]:
    """Tiny data, a tiny network and one iteration, instead of what the file names."""
    options = options_of(file)
    sets = options['datasets']
    second_side = SECOND_SIDE.get(file.split('/')[0], 'val')
    data = write_data(folder / 'data', next(iter(sets.values())), second_side)
    data += ['split_index=1']
    overrides = [f'datasets:{phase}:{item}' for phase in sets for item in data]
    overrides += ['num_gpu=0', f'network:encoder={TINY}', 'network:encoder_weights=~']
    if options['network']['type'] == 'CLIPLikert':
        overrides += ['network:pretrained=~']
    if not is_test(options):
        overrides += ['train:total_epoch=~', 'train:total_iter=1']
        overrides += ['logger:print_freq=1', 'logger:use_tb_logger=false']
    if options.get('teacher'):
        torch.manual_seed(0)
        teacher = CLIPLikert('timm:test_resnet', input_size=224, embed_dim=24)
        torch.save({'params': teacher.state_dict()}, folder / 'teacher.pth')
        overrides += [f'teacher:weights={folder / "teacher.pth"}']
    if options['path'].get('pretrain_network'):
        size = options['network'].get('input_size', 224)
        width = 24 if options.get('teacher') else 512
        student = CLIPKDStudent(TINY, input_size=size, embed_dim=width)
        torch.save({'params': student.state_dict()}, folder / 'student.pth')
        overrides += [f'path:pretrain_network={folder / "student.pth"}']
    return overrides


class Recorder:
    """What a run of the host's loop logged, the labels it saw, and its models."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.logged: list[dict[str, float]] = []
        self.labels: list[Tensor] = []
        self.shapes: set[tuple[int, ...]] = set()
        self.models: list[CLIPKDModel] = []
        self.first: list[dict[str, Tensor]] = []
        optimize, feed = CLIPKDModel.optimize_parameters, CLIPKDModel.feed_data
        start = CLIPKDModel.__init__

        def init(model: CLIPKDModel, opt: dict[str, Any]) -> None:
            start(model, opt)
            self.models.append(model)
            self.first.append(copied(model.net))

        def optimize_parameters(model: CLIPKDModel, current_iter: int) -> None:
            optimize(model, current_iter)
            self.logged.append(dict(model.log_dict))

        def feed_data(model: CLIPKDModel, data: dict[str, Any]) -> None:
            feed(model, data)
            self.labels.append(model.gt_mos)
            self.shapes.add(tuple(data['img'].shape[1:]))

        monkeypatch.setattr(CLIPKDModel, '__init__', init)
        monkeypatch.setattr(CLIPKDModel, 'optimize_parameters', optimize_parameters)
        monkeypatch.setattr(CLIPKDModel, 'feed_data', feed_data)


def copied(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Recorder:
    """A recorder; `tmp_path` is the working directory."""
    monkeypatch.chdir(tmp_path)
    return Recorder(monkeypatch)


@pytest.mark.parametrize('variant', VARIANTS)
def test_one_iteration_of_a_variant_runs_in_the_host(
    variant: str, tmp_path: Path, recorder: Recorder
) -> None:
    file = 'biq2021_small/stage3_student.yml'
    overrides = tiny_overrides(tmp_path, file)
    if variant == 'regression.yml':
        overrides = [o for o in overrides if not o.startswith('teacher:')]
    files = [str(CONFIGS / file), str(CONFIGS / 'variants' / variant)]
    pipeline.train(['-opt', *files, '--force_yml', *overrides])
    assert len(recorder.logged) == 1
    assert all(math.isfinite(value) for value in recorder.logged[0].values())
    assert (recorder.models[0].teacher is None) == (variant == 'regression.yml')


@pytest.mark.parametrize('file', FILES)
def test_one_iteration_of_a_file_runs_in_the_host(
    file: str, tmp_path: Path, recorder: Recorder
) -> None:
    overrides = tiny_overrides(tmp_path, file)
    options = options_of(file, *overrides)
    arguments = ['-opt', str(CONFIGS / file), '--force_yml', *overrides]
    augments = [data['augment'] for data in options['datasets'].values()]
    sizes = {augment['center_crop'] for augment in augments}
    sizes |= {augment.get('random_crop', min(sizes)) for augment in augments}
    if is_test(options):
        pipeline.test(arguments)
        name = options['datasets']['test_1']['name']
        results = tmp_path / 'results' / options['name'] / f'{name}.json'
        assert set(json.loads(results.read_text())) == {'srcc', 'plcc'}
    else:
        pipeline.train(arguments)
        assert len(recorder.logged) == 1
        assert all(math.isfinite(value) for value in recorder.logged[0].values())
        models = tmp_path / 'experiments' / options['name'] / 'models'
        assert isinstance(load_network(models / 'net_latest.pth'), QualityNetwork)
    labels = torch.cat(recorder.labels)
    assert recorder.shapes == {(3, size, size) for size in sizes}
    assert 1 <= labels.min() < 2
    assert 4 < labels.max() <= 5


@pytest.mark.parametrize('data', [*FULL_REFERENCE, 'koniq10k'])
def test_the_best_image_gets_the_best_label(
    data: str, tmp_path: Path, recorder: Recorder
) -> None:
    file = f'{data}/stage1_zeroshot.yml'
    overrides = tiny_overrides(tmp_path, file)
    pipeline.test(['-opt', str(CONFIGS / file), '--force_yml', *overrides])
    rising = data == 'koniq10k'  # the others count differences from the original
    labels = torch.cat(recorder.labels).flatten()
    assert torch.equal(labels.diff() > 0, torch.full((3,), rising))


# --- the smoke set -----------------------------------------------------------------


def make_smoke_data(folder: Path, *flags: str) -> Path:
    script = ROOT / 'scripts' / 'make_smoke_data.py'
    subprocess.run([sys.executable, str(script), *flags], cwd=folder, check=True)
    return folder / 'datasets' / 'smoke'


def test_the_smoke_set_is_small_content_safe_and_the_same_every_time(
    tmp_path: Path,
) -> None:
    folder = make_smoke_data(tmp_path, '--no-clip')
    with (folder / 'meta_info_smoke.csv').open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 40
    assert {0 <= float(row['mos']) <= 1 for row in rows} == {True}
    held_out: list[set[str]] = []
    for split in ('01', '02', '03'):
        sides: dict[str, set[str]] = {'train': set(), 'val': set()}
        for row in rows:
            sides[row[f'ratio802_seed123_split_{split}']].add(row['photograph'])
        assert len(sides['train']) == 8
        assert len(sides['val']) == 2
        assert not sides['train'] & sides['val']
        held_out.append(sides['val'])
    assert not held_out[0] & held_out[1]
    for row in rows:
        with Image.open(folder / 'images' / row['img_name']) as image:
            assert image.size == (256, 256)
    first = {path.name: path.read_bytes() for path in (folder / 'images').iterdir()}
    make_smoke_data(tmp_path, '--no-clip')
    some = random.Random(0).sample(sorted(first), 5)
    assert all((folder / 'images' / name).read_bytes() == first[name] for name in some)


@pytest.mark.slow
def test_the_three_stages_run_on_the_smoke_set_from_the_shipped_files(
    tmp_path: Path, recorder: Recorder
) -> None:
    make_smoke_data(tmp_path)
    smoke = CONFIGS / 'smoke'

    pipeline.test(['-opt', str(smoke / 'stage1_zeroshot.yml')])
    scores = json.loads(Path('results/stage1_zeroshot_smoke/smoke.json').read_text())
    assert all(math.isfinite(value) for value in scores.values())
    assert recorder.models.pop().teacher is None

    pipeline.train(['-opt', str(smoke / 'stage2_teacher.yml')])
    clip = recorder.first[1]
    check_what_moved(clip, copied(recorder.models.pop().net))

    pipeline.train(['-opt', str(smoke / 'stage3_student.yml')])
    model = recorder.models.pop()
    saved = load_network('experiments/stage2_teacher_smoke/models/net_best.pth')
    assert model.teacher is not None
    assert not model.teacher.training
    teacher, best = model.teacher.state_dict(), saved.state_dict()
    assert teacher.keys() == best.keys()
    assert all(torch.equal(teacher[name], best[name]) for name in best)
    check_what_moved(recorder.first[2], copied(model.net))
    student = model.net.state_dict()
    assert torch.equal(student['head.anchors'], clip['head.anchors'])
    assert torch.equal(student['head.temperature'], clip['head.temperature'])
    latest = load_network('experiments/stage3_resnet18_smoke/models/net_latest.pth')
    assert not any('teacher' in name for name in latest.state_dict())

    assert len(recorder.logged) == 6
    for logged in recorder.logged:
        assert all(math.isfinite(value) for value in logged.values())
    weights = [log['soft_weight'] for log in recorder.logged[3:]]
    assert weights == pytest.approx([1, 0.5, 0])

    script = [sys.executable, str(ROOT / 'scripts' / 'train_nsplits.py')]
    for split in ('00', '01'):  # the real thing needs stage 2 of both splits
        copy = Path(f'experiments/stage2_teacher_smoke_Split{split}')
        copy.symlink_to('stage2_teacher_smoke', target_is_directory=True)
    of_split = 'experiments/stage2_teacher_smoke_Split{split}/models/net_best.pth'
    script += ['-opt', str(smoke / 'stage3_student.yml')]
    script += ['--force_yml', 'split_num=2', f'teacher:weights={of_split}']
    subprocess.run(script, check=True, capture_output=True)
    text = Path('experiments/stage3_resnet18_smoke_splits.txt').read_text()
    assert text.splitlines()[-1].startswith('Median over 2 splits in smoke: srcc ')


def check_what_moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    """Every weight of the encoder has moved; anchors and temperature are bit-equal."""
    frozen = ('head.anchors', 'head.temperature')
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    moved = [not torch.equal(before[name], after[name]) for name in before]
    encoder = [name.startswith('encoder.') for name in before]
    assert sum(moved) > 0.9 * sum(encoder)
