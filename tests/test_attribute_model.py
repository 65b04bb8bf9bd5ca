"""The pretraining on attributes in the host's loop, and what starts from it."""

from __future__ import annotations

import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import pytest
import torch
from PIL import Image
from pyiqa.data import build_dataset
from scipy.stats import spearmanr
from torch import Tensor
from training_data import (
    ENCODER,
    SIZE,
    checkpoint,
    run,
    student_options,
    write_options,
    write_teacher,
)

from pyiqa_clipkd import pipeline
from pyiqa_clipkd.attributes.changes import change
from pyiqa_clipkd.attributes.correlation import calculate_attribute_correlation
from pyiqa_clipkd.attributes.names import ATTRIBUTES
from pyiqa_clipkd.attributes.student import load_attribute_student
from pyiqa_clipkd.model import CLIPKDModel
from pyiqa_clipkd.options import load_options

CONFIGS = Path(__file__).parents[1] / 'configs'
SPLIT = 'ratio802_seed123_split_01'
TRAIN, VAL = 48, 16
KINDS = ('params', 'params_raw')
RANKING = {'type': 'DegradationRankingLoss'}


@pytest.fixture(scope='module')
def made(
    tmp_path_factory: pytest.TempPathFactory, photographs: dict[str, Image.Image]
) -> Path:
    """A folder of changed crops of photographs and their table.

    The label of an attribute is how far the crop was changed towards its good side.
    """
    folder = tmp_path_factory.mktemp('attributes')
    (folder / 'images').mkdir()
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for i in range(TRAIN + VAL):
        left, top = (int(place) for place in rng.integers(0, 40, 2))
        box = (left + 80, top + 40, left + 272, top + 200)
        image = photographs['chelsea'].crop(box).resize((48, 40))
        levels = rng.uniform(-1, 0, len(ATTRIBUTES))
        for attribute, level in zip(ATTRIBUTES, levels, strict=True):
            image = change(image, attribute, level, seed=i)
        image.save(folder / f'images/{i}.png')
        values = dict(zip(ATTRIBUTES, 1 + levels, strict=True))
        side = 'train' if i < TRAIN else 'test'
        rows.append({'path': f'{i}.png', **values, 'error': None, SPLIT: side})
    pd.DataFrame(rows).to_csv(folder / 'labels.csv', index=False)
    return folder


@pytest.fixture
def labels(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The table, beside its photographs in the working directory."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / 'labels.csv'


def dataset_options(table: Path, **changes: Any) -> dict[str, Any]:
    return {
        'name': 'tiny',
        'type': 'AttributeDataset',
        'phase': 'train',
        'dataroot_target': 'images',
        'meta_info_file': str(table),
        'augment': {'hflip': True, 'random_crop': SIZE},
        **changes,
    }


def pretrain_options(table: Path, **train: Any) -> dict[str, Any]:
    """The shipped recipe, tiny."""
    options = load_options(
        CONFIGS / 'attributes' / 'pretrain.yml',
        [
            *('num_gpu=0', 'manual_seed=7', 'name=pretrained'),
            *('data:name=tiny', 'data:override_phase=test'),
            *('data:dataroot_target=images', f'data:meta_info_file={table}'),
            *('data:batch_size_per_gpu=8', 'data:num_worker_per_gpu=0'),
            *('datasets:train:override_phase=train', 'data:augment:resize:size=40'),
            f'data:augment:center_crop={SIZE}',
            f'network:input_size={SIZE}',
            *(f'network:encoder={ENCODER}', 'network:encoder_weights=~'),
            *('logger:print_freq=1', 'logger:save_checkpoint_freq=5'),
            'logger:use_tb_logger=false',
        ],
    )
    options['train'] |= {'total_epoch': 2, **train}
    return options


def backbone(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    prefix = 'encoder.backbone.'
    return {name: value for name, value in tensors.items() if name.startswith(prefix)}


# --- the data set -------------------------------------------------------------------


def test_an_item_has_its_image_and_its_five_labels(labels: Path) -> None:
    data = build_dataset(dataset_options(labels, augment=None, split_index=1))
    table = pd.read_csv(labels)
    assert len(data) == TRAIN
    item = data[3]
    assert item['img_path'] == str(Path('images', '3.png'))
    assert item['img'].shape == (3, 40, 48)
    pixels = np.array(Image.open('images/3.png')).transpose(2, 0, 1) / 255
    assert np.allclose(item['img'].numpy(), pixels, atol=1e-6)
    wanted = table.loc[3, list(ATTRIBUTES)].to_numpy(float)
    assert np.allclose(item['mos_label'].numpy(), wanted)


@pytest.mark.parametrize('ending', ['parquet', 'jsonl'])
def test_another_format_with_absolute_paths_is_the_same(
    labels: Path, ending: str
) -> None:
    table = pd.read_csv(labels)
    table['path'] = [str(Path('images', name).resolve()) for name in table['path']]
    file = Path(f'labels.{ending}')
    if ending == 'parquet':
        pytest.importorskip('pyarrow')
        table.to_parquet(file)
    else:
        table.to_json(file, orient='records', lines=True)
    options = dataset_options(file, augment=None, dataroot_target=None)
    mine, theirs = build_dataset(options)[5], build_dataset(dataset_options(labels))[5]
    assert torch.allclose(mine['mos_label'], theirs['mos_label'])
    assert mine['img_path'] == str(Path('images/5.png').resolve())


def test_rows_with_errors_or_without_labels_are_left_out(labels: Path) -> None:
    table = pd.read_csv(labels).astype({'error': object})
    table.loc[0, 'error'] = 'not an image'
    table.loc[1, 'contrast'] = None
    table.to_csv('some.csv', index=False)
    data = build_dataset(dataset_options(Path('some.csv'), split_index=1))
    assert len(data) == TRAIN - 2
    assert data[0]['img_path'].endswith('2.png')
    table['error'] = 'gone'
    table.to_csv('none.csv', index=False)
    with pytest.raises(ValueError, match=r'none\.csv has no photograph with labels'):
        build_dataset(dataset_options(Path('none.csv')))


def test_missing_files_are_left_out_and_named(
    labels: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger('pyiqa'), 'propagate', True)
    for i in (4, 7):
        Path(f'images/{i}.png').unlink()
    data = build_dataset(dataset_options(labels, split_index=1))
    assert len(data) == TRAIN - 2
    assert data[4]['img_path'].endswith('5.png')
    assert '2 files are missing, first images/4.png.' in caplog.text
    with pytest.raises(ValueError, match=r'has no photograph .*, nowhere'):
        build_dataset(dataset_options(labels, dataroot_target='nowhere'))


def test_another_table_says_what_is_held_out(labels: Path) -> None:
    """Rows in another order, in other folders, and fewer of them."""
    names = [f'other/{i}.png' for i in (60, 2, 9, 50, 3)]
    sides = ['train', 'train', 'test', 'train', 'test']
    splits = pd.DataFrame({'image': names, 'mos': 1.0, SPLIT: sides})
    splits.to_csv('splits.csv', index=False)
    options = dataset_options(labels, split_table='splits.csv', split_index=1)
    paths = [item[0] for item in build_dataset(options).paths_mos]
    assert [Path(path).stem for path in paths] == ['2', '50', '60']
    options['override_phase'] = 'test'
    assert len(build_dataset(options)) == 2
    pd.concat([splits, splits]).to_csv('splits.csv', index=False)
    with pytest.raises(ValueError, match='names a photograph twice'):
        build_dataset(options)
    splits[['image', 'mos']].to_csv('splits.csv', index=False)
    with pytest.raises(ValueError, match='has no column with splits'):
        build_dataset(options)


def test_other_ranges_become_0_to_1(labels: Path) -> None:
    table = pd.read_csv(labels)
    table[list(ATTRIBUTES)] *= 100
    table.to_csv('percent.csv', index=False)
    options = dataset_options(Path('percent.csv'), mos_normalize=True)
    mine = build_dataset({**options, 'mos_range': [0, 100], 'lower_better': False})
    theirs = build_dataset(dataset_options(labels))
    assert torch.allclose(mine[4]['mos_label'], theirs[4]['mos_label'], atol=1e-6)


def test_what_is_wrong_with_a_table_or_a_file_is_named(labels: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r'there is no file gone\.csv'):
        build_dataset(dataset_options(Path('gone.csv')))
    pd.read_csv(labels).drop(columns='contrast').to_csv('four.csv', index=False)
    with pytest.raises(ValueError, match=r'four\.csv must have .*but lacks contrast'):
        build_dataset(dataset_options(Path('four.csv')))
    table = pd.read_csv(labels).drop(columns=SPLIT)
    table.to_csv('whole.csv', index=False)
    with pytest.raises(ValueError, match=r'whole\.csv has no column with splits\. Add'):
        build_dataset(dataset_options(Path('whole.csv'), split_index=1))
    Path('images/0.png').write_bytes(b'')
    with pytest.raises(ValueError, match=r'0\.png has labels, .*the file is empty'):
        build_dataset(dataset_options(labels))[0]


# --- the figures --------------------------------------------------------------------


def test_the_figures_are_scipy_s_a_column_and_their_mean() -> None:
    predictions, labels = np.random.default_rng(0).random((2, 20, 5))
    singly = [
        calculate_attribute_correlation(predictions, labels, attribute=name)
        for name in ATTRIBUTES
    ]
    wanted = [
        spearmanr(*columns).statistic
        for columns in zip(predictions.T, labels.T, strict=True)
    ]
    assert singly == pytest.approx(wanted)
    whole = calculate_attribute_correlation(predictions, labels)
    assert whole == pytest.approx(np.mean(wanted))
    plcc = calculate_attribute_correlation(predictions, labels, figure='plcc')
    assert plcc != pytest.approx(whole)


def test_an_attribute_that_never_changes_counts_as_0() -> None:
    labels = np.random.default_rng(0).random((20, 5))
    predictions = labels.copy()
    predictions[:, 2] = 0.5
    assert calculate_attribute_correlation(predictions, labels, 'contrast') == 0
    assert calculate_attribute_correlation(predictions, labels) == pytest.approx(0.8)


def test_unknown_figures_and_attributes_are_errors() -> None:
    values = np.zeros((2, 5))
    with pytest.raises(ValueError, match=r"one of sharpness, .*but got 'beauty'"):
        calculate_attribute_correlation(values, values, 'beauty')
    with pytest.raises(ValueError, match="one of srcc, plcc, but got 'mse'"):
        calculate_attribute_correlation(values, values, figure='mse')


# --- in the host's loop ---------------------------------------------------------------


def test_the_pretraining_learns_the_attributes_and_reports_each(
    labels: Path, steps: list[dict[str, Any]]
) -> None:
    optim = {'type': 'AdamW', 'lr': 3e-3}
    options = pretrain_options(labels, total_epoch=12, optim=optim)
    options['network']['encoder'] = 'timm:test_resnet'
    results = run(options)['tiny']
    figures = {name: result['val'] for name, result in results.items()}
    singly = [figures[f'srcc_{name}'] for name in ATTRIBUTES]
    assert figures['srcc'] == pytest.approx(np.mean(singly), abs=1e-6)
    assert figures['srcc'] > 0.5
    assert all(math.isfinite(value) for step in steps for value in step.values())
    assert {'l_ranking', 'l_calibration', 'l_total', 'lr'} <= steps[0].keys()
    assert steps[-1]['l_total'] < steps[0]['l_total']

    record = json.loads(Path('experiments/pretrained/run.json').read_text())
    assert record['results']['tiny']['srcc']['val'] == pytest.approx(figures['srcc'])
    table = pd.read_csv('experiments/pretrained/predictions_tiny.csv')
    assert list(table.columns[:6]) == ['image', *ATTRIBUTES]
    assert len(table) == VAL
    assert table[list(ATTRIBUTES)].stack().between(0, 1).all()
    truth = pd.read_csv(labels).iloc[TRAIN:]
    for name in ATTRIBUTES:
        assert np.allclose(table[f'label_{name}'], truth[name], atol=1e-4)
        again = spearmanr(table[name], table[f'label_{name}']).statistic
        assert figures[f'srcc_{name}'] == pytest.approx(again, abs=1e-3)


def test_a_stopped_pretraining_goes_on_as_if_it_hadn_t(labels: Path) -> None:
    options = pretrain_options(labels)
    run(options)
    expected = checkpoint('pretrained')
    for file in Path('experiments/pretrained/training_states').glob('*.state'):
        if file.stem != '5':
            file.unlink()
    Path('experiments/pretrained/models/net_latest.pth').unlink()
    run(options, '--auto_resume')
    again = checkpoint('pretrained')
    assert all(torch.equal(again[name], expected[name]) for name in expected)


def test_precision_accumulation_and_averages_are_those_of_every_training(
    labels: Path, steps: list[dict[str, Any]]
) -> None:
    engine = {'mixed_precision': 'bf16', 'accumulate': 2, 'ema_decay': 0.9}
    run(pretrain_options(labels, total_epoch=1, **engine))
    assert all(math.isfinite(value) for step in steps for value in step.values())
    content = torch.load('experiments/pretrained/models/net_latest.pth')
    averaged, raw = (content[key]['heads.contrast.weight'] for key in KINDS)
    assert not torch.equal(averaged, raw)


def test_a_pretrained_network_is_tested_by_its_recipe(labels: Path) -> None:
    options = pretrain_options(labels)
    best = run(options)['tiny']
    pipeline.test(['-opt', str(write_options(Path('options.yml'), options))])
    results = json.loads(Path('results/pretrained/tiny.json').read_text())
    assert results.keys() == options['val']['metrics'].keys()
    assert results['srcc'] == pytest.approx(best['srcc']['val'], abs=1e-6)


@pytest.mark.parametrize('stage', ['fine-tuning', 'distillation'])
def test_the_next_training_starts_from_the_pretrained_encoder_by_one_option(
    labels: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    run(pretrain_options(labels))
    file = 'experiments/pretrained/models/net_best.pth'
    pretrained = load_attribute_student(file)

    started: list[dict[str, Tensor]] = []
    original = CLIPKDModel.init_training_settings

    def init_training_settings(self: CLIPKDModel) -> None:
        started.append({k: v.clone() for k, v in self.net.state_dict().items()})
        original(self)

    monkeypatch.setattr(CLIPKDModel, 'init_training_settings', init_training_settings)
    write_scores(labels)
    options = student_options(labels.parent)
    if stage == 'fine-tuning':
        del options['teacher'], options['train']['distillation_loss_opt']
        options['train']['mos_loss_opt'] = {'type': 'MSELoss'}
    options['network']['encoder_weights'] = file  # the one option
    results = run(options)
    learned = backbone(dict(pretrained.state_dict()))
    mine = backbone(started[0])
    assert mine.keys() == learned.keys()
    assert all(torch.equal(mine[name], learned[name]) for name in learned)
    after = backbone(checkpoint('student'))
    assert not all(torch.equal(after[name], learned[name]) for name in learned)
    assert math.isfinite(results['tiny']['srcc']['val'])


def write_scores(labels: Path) -> None:
    """Human scores of the same photographs, and a teacher, for `student_options`."""
    table = pd.read_csv(labels)
    scores = pd.DataFrame(
        {'img_name': table['path'], 'mos': table['contrast'], SPLIT: table[SPLIT]}
    )
    scores.to_csv(labels.parent / 'meta.csv', index=False)
    write_teacher(labels.parent)


def test_the_encoder_of_the_same_split_is_taken(labels: Path) -> None:
    run(pretrain_options(labels, total_epoch=1) | {'name': 'pretrained_00'})
    write_scores(labels)
    options = student_options(labels.parent, total_epoch=1)
    folder = 'experiments/pretrained_{split}/models/net_best.pth'
    options['network']['encoder_weights'] = folder
    run(options)
    options['datasets']['train']['split_index'] = 2
    with pytest.raises(FileNotFoundError, match='pretrained_01'):
        CLIPKDModel._build_network(_model_of(options))


def _model_of(options: dict[str, Any]) -> CLIPKDModel:
    model = CLIPKDModel.__new__(CLIPKDModel)
    model.opt, model.is_train, model.teacher = options, True, None
    return model


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'network': {'type': 'CLIPKDStudent'}}, 'an AttributeStudent, .*CLIPKDStude'),
        ({'teacher': {'weights': 'a.pth'}}, 'loss_opt` alone: remove `teacher`'),
        ({'train': {'ranking_loss_opt': RANKING}}, 'remove `ranking_loss_opt`'),
        ({'train': {'mos_loss_opt': {'a': 1}}}, 'remove `mos_loss_opt`'),
        ({'train': {}}, 'needs `train: attribute_loss_opt`'),
    ],
)
def test_options_of_other_trainings_are_errors(
    labels: Path, changes: dict[str, Any], message: str
) -> None:
    options = pretrain_options(labels)
    if changes.get('train') == {}:
        options['train']['attribute_loss_opt'] = None
    for key, value in changes.items():
        options[key] = {**(options.get(key) or {}), **value}
    with pytest.raises(ValueError, match=message):
        run(options)


def test_labels_outside_of_0_to_1_are_an_error_before_the_training(
    labels: Path,
) -> None:
    table = pd.read_csv(labels)
    table.loc[60, 'brightness'] = 55
    table.to_csv(labels, index=False)
    with pytest.raises(ValueError, match=r'\(val\): Labels must be in \[0, 1\], but'):
        run(pretrain_options(labels))


# --- the shipped files ----------------------------------------------------------------


@pytest.mark.parametrize('data', ['biq2021', 'biq2021_small', 'koniq10k'])
def test_a_student_starts_from_what_the_pretraining_of_its_data_leaves(
    data: str,
) -> None:
    folder = CONFIGS / 'attributes'
    pretraining = load_options(folder / 'pretrain.yml', [f'data:name={data}'])
    recipe = CONFIGS / data / 'stage3_student.yml'
    encoder = 'network:encoder=efficientnet_lite'
    student = load_options([recipe, folder / 'start.yml'], [encoder])
    left = f'experiments/{pretraining["name"]}/models/net_best.pth'
    assert student['network']['encoder_weights'] == left
    plain = load_options(recipe, [encoder])
    assert plain['name'] != student['name']
    for options in (plain, student):
        del options['name'], options['network']['encoder_weights']
        del options['save_final_results_path']
    assert student == plain


def test_the_pretraining_on_biq2021_has_the_sides_of_its_trainings() -> None:
    folder = CONFIGS / 'attributes'
    files = [folder / 'pretrain.yml', folder / 'biq2021.yml']
    pretraining = load_options(files)['datasets']
    training = load_options(folder / 'finetune.yml')['datasets']
    for phase in ('train', 'val'):
        mine, theirs = pretraining[phase], training[phase]
        assert mine['split_table'] == theirs['meta_info_file']
        for key in ('split_index', 'override_phase', 'dataroot_target', 'augment'):
            assert mine[key] == theirs[key]
