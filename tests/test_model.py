"""The training model, in the host's own loop."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import pytest
import torch
from pyiqa.models import build_model
from scipy.stats import spearmanr
from training_data import (
    ENCODER,
    SIZE,
    checkpoint,
    data_options,
    run,
    student_options,
    write_images,
    write_options,
    write_teacher,
)

from pyiqa_clipkd import pipeline
from pyiqa_clipkd.encoders import OPEN_GATE
from pyiqa_clipkd.model import CLIPKDModel, iterations_that_run, mos_to_score_range
from pyiqa_clipkd.network import (
    CLIPKDStudent,
    CLIPLikert,
    QualityNetwork,
    load_network,
)
from pyiqa_clipkd.weights import read_weights


def built(options: dict[str, Any]) -> CLIPKDModel:
    """The model alone, as the host builds it."""
    planned = math.ceil(22 / options['datasets']['train']['batch_size_per_gpu'])
    options['train']['total_iter'] = planned * options['train'].get('total_epoch', 1)
    options |= {'is_train': True, 'dist': False, 'rank': 0, 'world_size': 1}
    for phase, part in options['datasets'].items():
        part['phase'] = phase
    return build_model(options)


def test_distillation_moves_the_student_and_nothing_else(
    data: Path, steps: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[dict[str, torch.Tensor]] = []
    original = CLIPKDModel.init_training_settings

    def init_training_settings(self: CLIPKDModel) -> None:
        original(self)
        started.append({k: v.clone() for k, v in self.net.state_dict().items()})

    monkeypatch.setattr(CLIPKDModel, 'init_training_settings', init_training_settings)
    before = read_weights(data / 'teacher.pth').tensors
    results = run(student_options(data))
    after = checkpoint('student')
    teacher = read_weights(data / 'teacher.pth').tensors
    assert all(torch.equal(before[name], teacher[name]) for name in before)
    assert torch.equal(after['head.anchors'], before['head.anchors'])
    assert torch.equal(after['head.temperature'], before['head.temperature'])
    assert not any('teacher' in name for name in after)
    assert all(math.isfinite(value) for step in steps for value in step.values())
    assert {'l_soft', 'l_hard', 'l_total', 'soft_weight', 'lr'} <= steps[0].keys()
    assert -1 <= results['tiny']['srcc']['val'] <= 1
    trained = [name for name in after if name.startswith('encoder.projection')]
    assert len(trained) == 2
    assert not any(torch.equal(started[0][name], after[name]) for name in trained)


def test_the_terms_and_the_schedule_reach_tensorboard(data: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(student_options(data))
    events = EventAccumulator('tb_logger/student')
    events.Reload()
    weights = [e.value for e in events.Scalars('soft_weight')]
    assert weights[0] == 1
    assert weights[-1] == pytest.approx(0)
    assert {'losses/l_soft', 'losses/l_hard', 'lr'} <= set(events.Tags()['scalars'])
    rates = [e.value for e in events.Scalars('lr')]
    assert rates[0] == pytest.approx(1e-3)
    assert rates[-1] == pytest.approx(1e-4)


@pytest.mark.parametrize(
    ('images', 'train'),
    [
        (22, {'total_epoch': 2}),  # 5 an epoch, 6 planned: a part of the spare epoch
        (9, {'total_epoch': 8}),  # 2 an epoch, 3 planned: fewer than planned run
        (8, {'total_epoch': 1}),
        (4, {'total_epoch': None, 'total_iter': 3}),
        (7, {'total_epoch': None, 'total_iter': 1}),
    ],
)
def test_lambda_reaches_zero_at_the_last_iteration_that_really_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    steps: list[dict[str, Any]],
    images: int,
    train: dict[str, Any],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / 'data', train=images)
    write_teacher(tmp_path / 'data')
    options = student_options(tmp_path / 'data', **train)
    options['val']['val_freq'] = 1000
    run(options)
    if len(steps) > 1:
        assert steps[0]['soft_weight'] == 1
        assert steps[-2]['soft_weight'] > 0
        assert steps[-1]['soft_weight'] == pytest.approx(0)
    options |= {'dist': False}
    planned = math.ceil(images / 4)
    options['train'].setdefault('total_iter', (train['total_epoch'] or 0) * planned)
    options['datasets']['train']['phase'] = 'train'
    assert iterations_that_run(options) == len(steps)


def test_fewer_images_than_a_batch_is_an_error_that_names_the_option(
    data: Path,
) -> None:
    options = student_options(data)
    options['datasets'] = data_options(data, batch_size_per_gpu=23)
    with pytest.raises(
        ValueError, match=r'fewer than one batch of 23.*batch_size_per_gpu'
    ):
        run(options)


@pytest.mark.parametrize(
    ('wrong', 'message'),
    [
        ({'override_phase': 'val'}, r"\(val\) has no images.*no 'val'.*override_phase"),
        ({'mos_range': [0, 0.1]}, r'\(val\): Labels must be in \[0, 1\]'),
    ],
)
def test_a_wrong_validation_set_is_an_error_before_the_training(
    data: Path, steps: list[dict[str, Any]], wrong: dict[str, Any], message: str
) -> None:
    options = student_options(data)
    options['datasets']['val'] |= wrong
    with pytest.raises(ValueError, match=message):
        run(options)
    assert not steps


def test_an_empty_test_set_is_an_error_that_names_the_option(data: Path) -> None:
    options = student_options(data)
    options['datasets'] = {'test': options['datasets']['val'] | {'split_index': 1}}
    options['datasets']['test']['override_phase'] = 'val'
    del options['train'], options['teacher']
    with pytest.raises(ValueError, match=r'has no images.*override_phase'):
        pipeline.test(['-opt', str(write_options(Path('test.yml'), options))])


def test_the_best_checkpoint_scores_as_the_network_that_was_trained(
    data: Path, openai_clip: Callable[..., torch.nn.Module]
) -> None:
    """QuickGELU came from the weights: their copy must keep it."""
    state = openai_clip().state_dict()
    numbers = {'input_resolution': 32, 'context_length': 77, 'vocab_size': 49408}
    torch.save(state | {k: torch.tensor(v) for k, v in numbers.items()}, 'clip.pt')
    options = student_options(data, mos_loss_opt={'type': 'MSELoss'}, total_epoch=1)
    del options['teacher']
    options['network'] = {
        'type': 'CLIPLikert',
        'encoder': 'open_clip:tiny',
        'pretrained': 'clip.pt',
        'input_size': 32,
    }
    options['val']['val_freq'] = 1000
    run(options)
    folder = Path('experiments/student/models')
    best, latest = (load_network(folder / f'net_{n}.pth') for n in ('best', 'latest'))
    assert best.config['quick_gelu'] is True
    image = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(best(image), latest(image))


def test_a_checkpoint_states_the_temperature_that_it_has(data: Path) -> None:
    run(student_options(data, total_epoch=1))
    best = load_network('experiments/student/models/net_best.pth')
    assert best.config['temperature'] == pytest.approx(0.05)
    assert best.state_dict()['head.temperature'] == pytest.approx(0.05)


def test_a_student_of_another_teacher_gets_the_anchors_of_this_one(data: Path) -> None:
    first = built(student_options(data))
    with torch.no_grad():
        first.net.head.anchors.add_(1)
    torch.save({'params': first.net.state_dict()}, data / 'earlier.pth')
    options = student_options(data)
    options['path']['pretrain_network'] = str(data / 'earlier.pth')
    model = built(options)
    assert model.teacher is not None
    theirs = model.teacher.state_dict()['head.anchors']
    assert torch.equal(model.net.head.anchors, theirs)


def test_a_readout_of_the_stages_learns_and_is_a_start_again(data: Path) -> None:
    options = student_options(data)
    options['network'] |= {'stage_readout': 12, 'mirror_invariant': True}
    run(options)
    trained = checkpoint('student', 'net_best')
    assert trained['encoder.readout.last.weight'].abs().sum() > 0
    assert trained['encoder.readout.norm.running_mean'].abs().sum() > 0
    again = student_options(data)
    again['path']['pretrain_network'] = 'experiments/student/models/net_best.pth'
    network = built(again).net
    assert network.config['stage_readout'] == 12
    assert network.config['mirror_invariant'] is True
    for name, tensor in network.state_dict().items():
        if name.startswith('encoder.readout'):
            assert torch.equal(tensor, trained[name]), name


def test_gates_that_the_earlier_weights_lack_begin_open(data: Path) -> None:
    options = student_options(data)
    options['network']['encoder'] = 'efficientnet'
    lite = CLIPKDStudent('efficientnet_lite', embed_dim=16, input_size=SIZE)
    torch.save({'params': lite.state_dict()}, data / 'earlier_00.pth')
    options['path'] |= {
        'pretrain_network': str(data / 'earlier_{split}.pth'),
        'strict_load': False,
    }
    state = built(options).net.state_dict()
    theirs = lite.state_dict()
    gates = [name for name in state if '.conv_expand.bias' in name]
    assert len(gates) == 16
    assert all((state[name] == OPEN_GATE).all() for name in gates)
    shared = [name for name in state if '.conv_pw.weight' in name]
    assert all(torch.equal(state[name], theirs[name]) for name in shared)


def test_the_teacher_of_the_same_split_is_taken(data: Path) -> None:
    (data / 'teacher.pth').rename(data / 'teacher_Split00.pth')
    options = student_options(data)
    options['teacher']['weights'] = str(data / 'teacher_Split{split}.pth')
    assert built(options).teacher is not None
    options['datasets']['train']['split_index'] = 2
    with pytest.raises(FileNotFoundError, match=r'teacher_Split01\.pth'):
        built(options)


def test_labels_outside_their_range_are_an_error_that_names_the_option(
    data: Path,
) -> None:
    options = student_options(data)
    options['datasets'] = data_options(data, mos_range=[0, 0.1])
    with pytest.raises(ValueError, match=r'Labels must be in \[0, 1\].*mos_normalize'):
        run(options)


def test_labels_map_to_one_to_five() -> None:
    mos = torch.tensor([[0.0], [0.25], [1.0]])
    assert mos_to_score_range(mos).tolist() == [[1.0], [2.0], [5.0]]
    with pytest.raises(ValueError, match='but got nan'):
        mos_to_score_range(torch.tensor([[float('nan')]]))


def test_a_reference_image_is_ignored(data: Path) -> None:
    model = built(student_options(data))
    image = torch.rand(2, 3, 32, 32)
    labels = torch.tensor([[0.1], [0.9]])
    model.feed_data({'img': image, 'ref_img': image * 0, 'mos_label': labels})
    model.optimize_parameters(1)
    assert math.isfinite(model.log_dict['l_total'])


def test_two_models_from_the_same_options_are_alike(data: Path) -> None:
    options = student_options(data)
    first, second = built(options), built(options)
    assert first.optimizers[0].param_groups[0]['lr'] == 1e-3
    assert second.optimizers[0].param_groups[0]['lr'] == 1e-3
    assert first.total_iterations == second.total_iterations == 12


def test_the_teacher_is_in_no_optimizer_and_stays_in_evaluation_mode(
    data: Path,
) -> None:
    model = built(student_options(data))
    assert model.teacher is not None
    teacher = {id(p) for p in model.teacher.parameters()}
    optimized = {id(p) for g in model.optimizer.param_groups for p in g['params']}
    assert not teacher & optimized
    assert not any(p.requires_grad for p in model.teacher.parameters())
    model.net.train()
    assert not model.teacher.training
    trained = {n for n, p in model.net.named_parameters() if id(p) in optimized}
    assert trained
    assert all(name.startswith('encoder.') for name in trained)


def test_the_student_takes_width_anchors_and_temperature_from_the_teacher(
    data: Path,
) -> None:
    model = built(student_options(data))
    assert model.teacher is not None
    assert model.net.head.anchors.shape == (5, 24)
    theirs = model.teacher.state_dict()['head.anchors']
    assert torch.equal(model.net.head.anchors, theirs)
    assert model.net.head.temperature == model.teacher.head.temperature


@pytest.mark.parametrize(
    ('loss', 'weight'),
    [
        ({'schedule': 'fixed', 'soft_weight': 0}, 0),
        ({'schedule': 'fixed', 'soft_weight': 1}, 1),
        ({'schedule': 'fixed', 'soft_weight': 0.9}, 0.9),
    ],
)
def test_the_ablations_are_options_of_one_loss(
    data: Path, steps: list[dict[str, Any]], loss: dict[str, Any], weight: float
) -> None:
    options = student_options(data, total_epoch=1)
    options['train']['distillation_loss_opt'] |= loss
    run(options)
    assert {step['soft_weight'] for step in steps} == {weight}


def test_the_plain_regression_head_trains_without_a_teacher(
    data: Path, steps: list[dict[str, Any]]
) -> None:
    options = student_options(data, mos_loss_opt={'type': 'MSELoss'})
    del options['teacher']
    options['network']['head'] = 'regression'
    run(options)
    assert steps[0].keys() == {'iter', 'l_mos', 'l_total', 'lr'}
    network = load_network('experiments/student/models/net_latest.pth')
    assert network.config['head'] == 'regression'


def test_a_loss_of_the_host_can_be_added(
    data: Path, steps: list[dict[str, Any]]
) -> None:
    options = student_options(data, metric_loss_opt={'type': 'PLCCLoss'}, total_epoch=1)
    run(options)
    first = steps[0]
    total = first['soft_weight'] * first['l_soft'] + first['l_metric']
    assert first['l_total'] == pytest.approx(total, abs=1e-5)


def test_a_missing_loss_is_an_error_that_names_it(data: Path) -> None:
    options = student_options(data, distillation_loss_opt=None)
    with pytest.raises(
        ValueError, match=r'with a teacher needs .*distillation_loss_opt'
    ):
        run(options)


def test_a_teacher_without_weights_or_type_is_an_error(data: Path) -> None:
    options = student_options(data)
    options['teacher'] = {'weights': None}
    with pytest.raises(ValueError, match=r'`teacher` must give `weights`'):
        run(options)


def test_a_distilled_network_must_be_a_student(data: Path) -> None:
    options = student_options(data)
    options['network'] = {'type': 'CLIPLikert', 'encoder': ENCODER, 'input_size': 32}
    with pytest.raises(ValueError, match='must be a CLIPKDStudent'):
        run(options)


def test_the_test_pipeline_writes_the_results_of_the_checkpoint(data: Path) -> None:
    best = run(student_options(data))['tiny']
    options = student_options(data)
    options['datasets'] = {'test': options['datasets']['val']}
    options['path']['pretrain_network'] = 'experiments/student/models/net_best.pth'
    del options['train'], options['teacher'], options['network']['input_size']
    pipeline.test(['-opt', str(write_options(Path('test.yml'), options))])
    results = json.loads(Path('results/student/tiny.json').read_text())
    assert results['srcc'] == pytest.approx(best['srcc']['val'], abs=1e-6)
    assert results['plcc'] == pytest.approx(best['plcc']['val'], abs=1e-4)
    assert not list(Path('results').rglob('*.pth'))


def test_a_recipe_for_training_is_tested_with_what_it_trained(data: Path) -> None:
    options = write_options(Path('options.yml'), student_options(data))
    with pytest.raises(FileNotFoundError, match=r'net_best\.pth: train first'):
        pipeline.test(['-opt', str(options)])
    best = pipeline.train(['-opt', str(options)])
    assert best is not None
    pipeline.test(['-opt', str(options)])
    results = json.loads(Path('results/student/tiny.json').read_text())
    assert results['srcc'] == pytest.approx(best['tiny']['srcc']['val'], abs=1e-6)


def test_a_refused_or_foreign_checkpoint_is_one_clear_error(data: Path) -> None:
    torch.save({'params': {'a': torch.zeros(1)}}, data / 'other.pth')
    options = student_options(data)
    options['path']['pretrain_network'] = str(data / 'other.pth')
    with pytest.raises(
        ValueError, match=r'`pretrain_network`: .*other.pth does not fit'
    ):
        run(options)


def test_a_training_leaves_a_record_that_repeats_it(data: Path) -> None:
    results = run(student_options(data, total_epoch=1))
    record = json.loads(Path('experiments/student/run.json').read_text())
    assert record['options']['manual_seed'] == 7
    assert record['results']['tiny']['srcc']['val'] == results['tiny']['srcc']['val']
    assert record['seconds'] >= 0
    assert 'command' in record


# --- the teacher's cache, views, the start of the projection ------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images a teacher has embedded in this process, call by call."""
    seen: list[int] = []
    original = QualityNetwork.embed

    def embed(self: QualityNetwork, img: torch.Tensor) -> torch.Tensor:
        if not self.training and isinstance(self, CLIPLikert):
            seen.append(len(img))
        return original(self, img)

    monkeypatch.setattr(QualityNetwork, 'embed', embed)
    return seen


def cached_options(data: Path, name: str, **train: Any) -> dict[str, Any]:
    """Flips alone: two views of an image."""
    options = student_options(data, **train) | {'name': name}
    options['datasets'] = data_options(data, augment={'hflip': True, 'center_crop': 32})
    options['teacher']['cache'] = 'cache'
    return options


def test_a_training_with_the_cache_is_the_training_without(
    data: Path, asked: list[int]
) -> None:
    """Small steps of SGD: Adam, or large steps, make much of the last rounding."""
    sgd: dict[str, Any] = {'optim': {'type': 'SGD', 'lr': 1e-4}}
    uncached = cached_options(data, 'uncached', **sgd)
    del uncached['teacher']['cache']
    run(uncached)
    every = sum(asked)
    for name in ('first', 'second'):
        asked.clear()
        run(cached_options(data, name, **sgd))
        assert sum(asked) < every if name == 'first' else not asked
        for key, value in checkpoint('uncached').items():
            assert torch.allclose(checkpoint(name)[key], value, atol=1e-6), key


def test_stored_views_are_computed_once(data: Path, asked: list[int]) -> None:
    options = cached_options(data, 'crops', total_epoch=6)
    options['datasets'] = data_options(data)  # random crops
    with pytest.raises(ValueError, match=r'random_crop would never.*views'):
        run(options)
    options['datasets']['train']['views'] = 2
    run(options)
    assert 22 < sum(asked) <= 2 * 22
    asked.clear()
    run(options | {'name': 'again'})
    assert not asked


def test_the_cache_helps_a_loader_that_is_not_ours(
    data: Path, asked: list[int]
) -> None:
    model = built(cached_options(data, 'student'))
    batch = {'img': torch.rand(4, 3, 32, 32), 'mos_label': torch.rand(4, 1)}
    for iteration in (1, 2):
        model.feed_data(batch)
        model.optimize_parameters(iteration)
    assert asked == [4]


def test_the_ridge_start_is_nearer_to_the_teacher(
    data: Path, steps: list[dict[str, Any]]
) -> None:
    run(cached_options(data, 'default'))
    first = steps[0]['l_soft']
    steps.clear()
    run(cached_options(data, 'ridge', projection_start='ridge'))
    assert steps[0]['l_soft'] < first / 2


def test_a_wrong_start_of_the_projection_is_an_error(data: Path) -> None:
    with pytest.raises(ValueError, match=r"must be one of \('default', 'ridge'\)"):
        built(cached_options(data, 'student', projection_start='best'))


# --- what a run leaves ----------------------------------------------------------------


def test_the_predictions_give_the_results(data: Path) -> None:
    results = run(student_options(data))['tiny']
    folder = Path('experiments/student')
    table = pd.read_csv(folder / 'predictions_tiny.csv')
    assert list(table.columns) == ['image', 'score', 'mos']
    assert list(table.image) == [f'{i}.png' for i in range(22, 28)]
    assert table.score.between(1, 5).all()
    labels = pd.read_csv(data / 'meta.csv').mos[22:]
    assert np.allclose(table.mos, 1 + 4 * labels, atol=1e-4)
    last = spearmanr(table.score, table.mos).statistic
    assert results['srcc']['val'] >= last - 1e-6  # the best one, maybe an earlier one
    record = json.loads((folder / 'run.json').read_text())
    assert record['results']['tiny']['srcc']['iter'] in (5, 10, 12)


def test_the_result_belongs_to_the_last_iteration_that_ran(data: Path) -> None:
    options = student_options(data)
    options['val']['val_freq'] = 1000
    assert run(options)['tiny']['srcc']['iter'] == 12


def test_a_progress_bar_shows_the_iterations(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = student_options(data)
    options['logger']['progress_bar'] = True
    run(options)
    assert '12/12' in capsys.readouterr().err
