"""From the loss to the weights: alone on a tiny network, and in the host's loop."""

from __future__ import annotations

import copy
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_data import (
    data_options,
    student_options,
    write_images,
    write_options,
    write_teacher,
)

from pyiqa_clipkd import pipeline
from pyiqa_clipkd.engine import TrainingEngine, check_options
from pyiqa_clipkd.network import CLIPKDStudent, load_network

CPU = torch.device('cpu')
SGD = {'type': 'SGD', 'lr': 0.02}
WITHOUT_BATCH_NORM = 'timm:test_vit'


def tiny_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))


def started(
    iterations: int, net: nn.Module | None = None, **train: Any
) -> TrainingEngine:
    engine = TrainingEngine(train, CPU)
    engine.prepare(tiny_network() if net is None else net)
    engine.start(torch.optim.SGD(engine.net.parameters(), 0.1), iterations)
    return engine


def images_and_labels(images: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(images, 6, generator=generator),
        torch.randn(images, 1, generator=generator),
    )


def loss_of(engine: TrainingEngine, images: Tensor, labels: Tensor) -> Tensor:
    with engine.autocast():
        output = engine.net(images)
    return nn.functional.mse_loss(output.float(), labels)


def run_batches(
    engine: TrainingEngine, size: int, images: int, first: int = 1
) -> list[dict[str, float]]:
    images_of, labels_of = (part.split(size) for part in images_and_labels(images))
    batches = zip(images_of, labels_of, strict=True)
    return [
        engine.backward(loss_of(engine, *batch), iteration)
        for iteration, batch in enumerate(batches, 1)
        if iteration >= first
    ]


def weights(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()]).clone()


# --- options ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ('wrong', 'message'),
    [
        ({'mixed_precision': 'half'}, "must be bf16 or fp16, but got 'half'"),
        ({'mixed_precision': True}, 'must be bf16 or fp16, but got True'),
        ({'accumulate': 0}, 'must be a whole number >= 1, but got 0'),
        ({'accumulate': 1.5}, 'must be a whole number >= 1, but got 1.5'),
        ({'accumulate': True}, 'must be a whole number >= 1, but got True'),
        ({'clip_grad_norm': -1}, 'must be a number > 0, but got -1'),
        ({'clip_grad_norm': math.inf}, 'must be a number > 0, but got inf'),
        ({'clip_grad_norm': '1'}, "must be a number > 0, but got '1'"),
        ({'ema_decay': 1}, r'must be a number in \(0, 1\), but got 1'),
        ({'ema_decay': 0.0}, r'must be a number in \(0, 1\), but got 0.0'),
        ({'compile': 'inductor'}, "must be true or false, but got 'inductor'"),
        ({'channels_last': 1}, 'must be true or false, but got 1'),
        ({'sync_batch_norm': 'yes'}, "must be true or false, but got 'yes'"),
    ],
)
def test_a_wrong_value_is_an_error_that_says_what_is_allowed(
    wrong: dict[str, Any], message: str
) -> None:
    (key,) = wrong
    with pytest.raises(ValueError, match=f'^`train: {key}` {message}.$'):
        TrainingEngine(wrong, CPU)


@pytest.mark.parametrize(
    ('key', 'meant'),
    [
        ('acumulate', 'accumulate'),
        ('mixed_precison', 'mixed_precision'),
        ('clip_grad_nrom', 'clip_grad_norm'),
        ('ema_deacy', 'ema_decay'),
        ('channel_last', 'channels_last'),
    ],
)
def test_a_misspelt_option_is_an_error(key: str, meant: str) -> None:
    with pytest.raises(ValueError, match=f'`train: {key}` is unknown.*`{meant}`'):
        check_options({key: 2})


def test_options_of_others_and_options_turned_off_are_left_alone() -> None:
    host = ('total_epoch', 'optim', 'scheduler', 'mos_loss_opt', 'warmup_iter')
    check_options(dict.fromkeys(host, 1))
    check_options({'mixed_precision': None, 'accumulate': None, 'ema_decay': False})


# --- one thing each ---------------------------------------------------------------


def test_without_options_it_is_backward_and_step() -> None:
    engine, net = started(3), tiny_network()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    assert run_batches(engine, 4, 12) == [{}, {}, {}]
    first, second = (part.split(4) for part in images_and_labels(12))
    for images, labels in zip(first, second, strict=True):
        optimizer.zero_grad()
        nn.functional.mse_loss(net(images), labels).backward()
        optimizer.step()
    assert torch.equal(weights(engine.net), weights(net))
    assert list(engine.checkpoint()) == ['params']


@pytest.mark.parametrize(('size', 'accumulate'), [(4, 3), (2, 6), (1, 12), (12, 1)])
def test_accumulated_batches_make_the_step_of_one_large_batch(
    size: int, accumulate: int
) -> None:
    large = started(2)
    run_batches(large, 12, 24)
    small = started(2 * accumulate, accumulate=accumulate)
    run_batches(small, size, 24)
    torch.testing.assert_close(weights(small.net), weights(large.net))


def test_the_last_short_group_makes_a_step_of_its_own_mean() -> None:
    """Five batches of four in groups of three: batches of 12 and of 8."""
    small, large = started(5, accumulate=3), started(2)
    run_batches(small, 4, 20)
    images, labels = images_and_labels(20)
    for iteration, part in enumerate((slice(0, 12), slice(12, 20)), 1):
        large.backward(loss_of(large, images[part], labels[part]), iteration)
    torch.testing.assert_close(weights(small.net), weights(large.net))
    assert small.steps == 2


def test_progress_counts_optimizer_steps() -> None:
    engine = started(8, accumulate=3)
    progress = [engine.progress(iteration) for iteration in range(1, 9)]
    assert progress == [0, 0, 0, 0.5, 0.5, 0.5, 1, 1]
    assert [started(4).progress(i) for i in (1, 4)] == [0, 1]
    assert started(1).progress(1) == 0


def test_a_large_gradient_is_clipped_and_a_small_one_is_not() -> None:
    def moved(**train: Any) -> tuple[float, Tensor, list[dict[str, float]]]:
        engine = started(1, **train)
        before = weights(engine.net)
        logged = run_batches(engine, 8, 8)
        return (weights(engine.net) - before).norm().item(), weights(engine.net), logged

    free, reached, _ = moved()
    norm = free / 0.1
    distance, _, logged = moved(clip_grad_norm=norm / 4)
    assert distance == pytest.approx(free / 4, rel=1e-4)
    assert logged == [{'grad_norm': pytest.approx(norm, rel=1e-4)}]
    assert torch.equal(moved(clip_grad_norm=norm * 4)[1], reached)


def test_what_is_clipped_is_the_mean_over_the_group() -> None:
    large = started(1, clip_grad_norm=0.3)
    run_batches(large, 12, 12)
    small = started(3, clip_grad_norm=0.3, accumulate=3)
    run_batches(small, 4, 12)
    torch.testing.assert_close(weights(small.net), weights(large.net))


@pytest.mark.parametrize('precision', ['bf16', 'fp16'])
def test_mixed_precision_computes_in_half_and_keeps_weights_in_float32(
    precision: str,
) -> None:
    exact, engine = started(3), started(3, mixed_precision=precision)
    seen: list[torch.dtype] = []
    engine.net.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    run_batches(exact, 8, 24)
    run_batches(engine, 8, 24)
    half = {'bf16': torch.bfloat16, 'fp16': torch.float16}[precision]
    assert seen == [half] * 3
    assert {p.dtype for p in engine.net.parameters()} == {torch.float32}
    difference = (weights(engine.net) - weights(exact.net)).abs().max()
    assert 0 < difference < 0.01


def test_the_clipped_norm_is_that_of_the_unscaled_gradient() -> None:
    engine = started(1, mixed_precision='fp16', clip_grad_norm=0.01)
    before = weights(engine.net)
    (logged,) = run_batches(engine, 8, 8)
    assert (weights(engine.net) - before).norm() == pytest.approx(0.001, rel=1e-3)
    assert 0.01 < logged['grad_norm'] < 100
    assert logged['loss_scale'] == 2**16


def test_an_overflow_in_fp16_is_no_step_but_a_smaller_scale() -> None:
    engine = started(2, mixed_precision='fp16')
    before = weights(engine.net)
    images, labels = images_and_labels(8)
    engine.backward(loss_of(engine, images, labels) * 1e37, 1)
    assert torch.equal(weights(engine.net), before)
    logged = engine.backward(loss_of(engine, images, labels), 2)
    assert logged['loss_scale'] == 2**15
    assert not torch.equal(weights(engine.net), before)


def test_the_average_is_the_moving_one_with_a_short_start() -> None:
    engine = started(40, ema_decay=0.9)
    images, labels = images_and_labels(8)
    average = weights(engine.net)
    for step in range(40):
        engine.backward(loss_of(engine, images, labels), step + 1)
        decay = min(0.9, 1 - (1 + step) ** (-2 / 3))
        average = decay * average + (1 - decay) * weights(engine.net)
    assert decay == 0.9
    averaged = engine.evaluated(engine.net)
    torch.testing.assert_close(weights(averaged), average)
    content = engine.checkpoint()
    assert content['params'].keys() == content['params_raw'].keys()
    assert torch.equal(content['params']['0.weight'], averaged[0].weight)  # type: ignore
    assert torch.equal(content['params_raw']['0.weight'], engine.net[0].weight)  # type: ignore


def test_the_average_moves_once_a_group() -> None:
    large, small = started(2, ema_decay=0.9), started(6, ema_decay=0.9, accumulate=3)
    run_batches(large, 12, 24)
    run_batches(small, 4, 24)
    torch.testing.assert_close(
        weights(small.evaluated(small.net)), weights(large.evaluated(large.net))
    )


def test_averaging_does_not_touch_the_training() -> None:
    plain, averaged = started(3), started(3, ema_decay=0.99)
    run_batches(plain, 4, 12)
    run_batches(averaged, 4, 12)
    assert torch.equal(weights(plain.net), weights(averaged.net))


def test_channels_last_is_for_images_and_weights() -> None:
    net = nn.Conv2d(3, 4, 3)
    engine = started(1, net, channels_last=True)
    images = engine.images(torch.rand(2, 3, 5, 5))
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert net.weight.is_contiguous(memory_format=torch.channels_last)
    assert started(1).images(images) is images


def test_compiling_keeps_the_names_and_the_average_is_not_compiled() -> None:
    engine = started(1, compile=True, ema_decay=0.9)
    assert engine.net._compiled_call_impl is not None
    assert engine.net.state_dict().keys() == tiny_network().state_dict().keys()
    assert engine.evaluated(engine.net)._compiled_call_impl is None


# --- resume -----------------------------------------------------------------------

EVERYTHING = {
    'accumulate': 3,
    'clip_grad_norm': 0.5,
    'ema_decay': 0.9,
    'mixed_precision': 'fp16',
}


def resumed(
    engine: TrainingEngine, folder: Path, iteration: int, **train: Any
) -> TrainingEngine:
    """A fresh engine that goes on from the files of another."""
    torch.save(engine.checkpoint(), folder / 'net.pth')
    torch.save(engine.state_dict(), folder / 'state')
    state = torch.load(folder / 'state', weights_only=True)
    fresh = started(engine.iterations, **train)
    fresh.load_checkpoint(folder / 'net.pth')
    fresh.load_state_dict(state, iteration)
    return fresh


@pytest.mark.parametrize('train', [{}, {'accumulate': 3}, EVERYTHING])
@pytest.mark.parametrize('iteration', [3, 4, 5, 7])
def test_a_resume_anywhere_in_a_group_is_exact(
    tmp_path: Path, train: dict[str, Any], iteration: int
) -> None:
    whole = started(8, **train)
    run_batches(whole, 3, 24)
    stopped = started(8, **train)
    images, labels = images_and_labels(24)
    for i in range(iteration):
        part = slice(3 * i, 3 * i + 3)
        stopped.backward(loss_of(stopped, images[part], labels[part]), i + 1)
    fresh = resumed(stopped, tmp_path, iteration, **train)
    run_batches(fresh, 3, 24, first=iteration + 1)
    assert torch.equal(weights(fresh.net), weights(whole.net))
    expected = weights(whole.evaluated(whole.net))
    assert torch.equal(weights(fresh.evaluated(fresh.net)), expected)


def test_the_scale_of_fp16_survives_a_resume(tmp_path: Path) -> None:
    engine = started(2, mixed_precision='fp16')
    images, labels = images_and_labels(8)
    engine.backward(loss_of(engine, images, labels) * 1e37, 1)
    fresh = resumed(engine, tmp_path, 1, mixed_precision='fp16')
    assert fresh.backward(loss_of(fresh, images, labels), 2)['loss_scale'] == 2**15


@pytest.mark.parametrize('now', [{'accumulate': 4}, {}])
def test_a_resume_with_another_group_size_is_an_error(
    tmp_path: Path, now: dict[str, Any]
) -> None:
    engine = started(8, accumulate=3)
    images, labels = images_and_labels(4)
    for iteration in range(1, 5):
        engine.backward(loss_of(engine, images, labels), iteration)
    with pytest.raises(ValueError, match=r'`train: accumulate` is .* another value'):
        resumed(engine, tmp_path, 4, **now)


def test_averaging_may_begin_or_end_at_a_resume(tmp_path: Path) -> None:
    raw = started(4)
    run_batches(raw, 3, 6)
    begun = resumed(raw, tmp_path, 2, ema_decay=0.9)
    assert torch.equal(weights(begun.evaluated(begun.net)), weights(raw.net))
    averaged = started(4, ema_decay=0.9)
    run_batches(averaged, 3, 6)
    ended = resumed(averaged, tmp_path, 2)
    assert torch.equal(weights(ended.net), weights(averaged.net))


def test_weights_of_another_network_are_one_clear_error(tmp_path: Path) -> None:
    torch.save({'params': nn.Linear(2, 2).state_dict()}, tmp_path / 'net.pth')
    with pytest.raises(ValueError, match=r'net\.pth does not fit the network'):
        started(1).load_checkpoint(tmp_path / 'net.pth')
    with pytest.raises(FileNotFoundError):
        started(1).load_checkpoint(tmp_path / 'gone.pth')


# --- in the host's loop -----------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """24 images and a teacher; the working directory is their parent."""
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / 'data', train=24)
    write_teacher(tmp_path / 'data')
    return tmp_path / 'data'


def options_of(
    folder: Path, name: str, batch: int = 4, encoder: str = '', **train: Any
) -> dict[str, Any]:
    options = student_options(folder, **train)
    options['name'] = name
    options['datasets'] = data_options(folder, batch_size_per_gpu=batch)
    options['logger'] |= {'use_tb_logger': False}
    if encoder:
        options['network']['encoder'] = encoder
    return options


def run(options: dict[str, Any], *flags: str) -> Any:
    file = write_options(Path(f'{options["name"]}.yml'), options)
    return pipeline.train(['-opt', str(file), *flags])


def saved(name: str, label: str = 'net_latest', key: str = 'params') -> Any:
    path = Path(f'experiments/{name}/models/{label}.pth')
    return torch.load(path, weights_only=True)[key]


def differences(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(
        (first[name].double() - second[name].double()).abs().max().item()
        for name in first
    )


def test_accumulated_batches_train_as_one_large_batch_in_the_loop(data: Path) -> None:
    """Schedules, learning rate and augmentation follow, too."""
    shared: dict[str, Any] = {'encoder': WITHOUT_BATCH_NORM, 'optim': SGD}
    run(options_of(data, 'large', 6, **shared))  # four steps an epoch
    run(options_of(data, 'small', 2, accumulate=3, **shared))
    assert differences(saved('small'), saved('large')) < 1e-5
    run(options_of(data, 'other', 2, accumulate=2, **shared))
    assert differences(saved('other'), saved('large')) > 1e-4


def test_no_option_changes_the_training_but_the_one_that_is_on(data: Path) -> None:

    def trained(name: str, **option: Any) -> None:
        run(options_of(data, name, total_epoch=1, optim=SGD, **option))

    trained('plain')
    plain = saved('plain')
    trained('averaged', ema_decay=0.9)
    assert differences(saved('averaged', key='params_raw'), plain) == 0
    trained('unclipped', clip_grad_norm=1e6)
    assert differences(saved('unclipped'), plain) == 0
    for name, option in (
        ('bf16', {'mixed_precision': 'bf16'}),
        ('fp16', {'mixed_precision': 'fp16'}),
        ('clipped', {'clip_grad_norm': 0.01}),
    ):
        trained(name, **option)
        assert differences(saved(name), plain) > 0, name
        assert all(v.isfinite().all() for v in saved(name).values()), name


def test_the_averaged_weights_are_validated_and_published(data: Path) -> None:
    options = options_of(data, 'averaged', ema_decay=0.9)
    options['logger']['save_checkpoint_freq'] = 1
    best = run(options)['tiny']
    average = {k: v.double() for k, v in saved('averaged', 'net_1').items()}
    for step in range(12):
        decay = min(0.9, 1 - (1 + step) ** (-2 / 3))
        raw = saved('averaged', f'net_{step + 1}', 'params_raw')
        for name, value in average.items():
            average[name] = decay * value + (1 - decay) * raw[name].double()
    running = [n for n in average if n.endswith('num_batches_tracked')]
    assert running, 'a network with batch norm'
    for name in running:
        average[name] = saved('averaged')[name].double()
    assert differences(saved('averaged'), average) < 1e-5
    assert differences(saved('averaged'), saved('averaged', key='params_raw')) > 1e-5

    network = load_network('experiments/averaged/models/net_latest.pth')
    assert isinstance(network, CLIPKDStudent)
    assert differences(network.state_dict(), saved('averaged')) == 0
    at = best['srcc']['iter']
    expected = saved('averaged', f'net_{at}' if at < 12 else 'net_latest')
    assert differences(saved('averaged', 'net_best'), expected) == 0
    pipeline.test(['-opt', 'averaged.yml'])
    results = json.loads(Path('results/averaged/tiny.json').read_text())
    assert results['srcc'] == pytest.approx(best['srcc']['val'], abs=1e-6)
    assert results['plcc'] == pytest.approx(best['plcc']['val'], abs=1e-4)


def test_the_teacher_answers_in_float32(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: list[tuple[bool, torch.dtype, torch.dtype]] = []
    original = CLIPKDStudent.forward

    def forward(self: CLIPKDStudent, *args: Any, **kwargs: Any) -> Any:
        output: Any = original(self, *args, **kwargs)
        if self.training:
            half = torch.is_autocast_enabled('cpu')
            answers.append((half, output.embedding.dtype, output.score.dtype))
        return output

    from pyiqa_clipkd.network import CLIPLikert

    embed = CLIPLikert.embed
    labels: list[Tensor] = []

    def embed_as_label(self: CLIPLikert, img: Tensor) -> Tensor:
        labels.append(embed(self, img))
        assert torch.equal(labels[-1], embed(copy.deepcopy(self), img))
        assert not torch.is_autocast_enabled('cpu')
        return labels[-1]

    monkeypatch.setattr(CLIPKDStudent, 'forward', forward)
    monkeypatch.setattr(CLIPLikert, 'embed', embed_as_label)
    run(options_of(data, 'half', mixed_precision='bf16', total_epoch=1))
    assert set(answers) == {(True, torch.float32, torch.float32)}
    assert {label.dtype for label in labels} == {torch.float32}


@pytest.mark.parametrize(
    ('name', 'train'),
    [
        ('grouped', {'accumulate': 3}),
        ('everything', EVERYTHING | {'channels_last': True}),
        ('half', {'mixed_precision': 'bf16', 'accumulate': 2, 'ema_decay': 0.8}),
    ],
)
def test_a_resume_in_the_loop_is_exact(
    data: Path, name: str, train: dict[str, Any]
) -> None:
    """The checkpoint of iteration 7 is in the middle of a group."""
    options = options_of(data, name, **train)
    run(options)
    whole = {label: saved(name, label) for label in ('net_latest', 'net_best')}
    folder = Path('experiments', name)
    states = [path.stem for path in (folder / 'training_states').iterdir()]
    assert states == ['7']
    for label in whole:
        (folder / f'models/{label}.pth').unlink()
    torch.rand(3)  # nothing hangs on the state of the random numbers
    run(options, '--auto_resume')
    assert differences(saved(name), whole['net_latest']) == 0
    if (best := folder / 'models/net_best.pth').exists():
        assert differences(torch.load(best)['params'], whole['net_best']) == 0
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ('train', 'message'),
    [
        ({'acumulate': 2}, 'did you mean `accumulate`'),
        ({'mixed_precision': 'float16'}, 'must be bf16 or fp16'),
    ],
)
def test_a_wrong_option_stops_the_run_before_the_data_are_read(
    data: Path, train: dict[str, Any], message: str
) -> None:
    options = options_of(data, 'wrong', **train)
    options['datasets']['val']['override_phase'] = 'nothing'
    with pytest.raises(ValueError, match=message):
        run(options)


@pytest.mark.slow
def test_a_compiled_network_trains_as_the_plain_one() -> None:
    if not shutil.which('c++') and not shutil.which('g++'):
        pytest.skip('torch.compile needs a compiler')
    plain, compiled = started(3), started(3, compile=True)
    run_batches(plain, 8, 24)
    run_batches(compiled, 8, 24)
    torch.testing.assert_close(weights(compiled.net), weights(plain.net))


@pytest.mark.slow
def test_a_compiled_student_trains_as_the_plain_one_in_the_loop(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the last part of the compiler, which takes minutes."""
    compiled: list[nn.Module] = []

    def compile_fast(self: nn.Module) -> None:
        compiled.append(self)
        self._compiled_call_impl = torch.compile(self._call_impl, backend='aot_eager')

    monkeypatch.setattr(nn.Module, 'compile', compile_fast)
    train: dict[str, Any] = {'optim': SGD, 'total_epoch': 1}
    run(options_of(data, 'plain', encoder=WITHOUT_BATCH_NORM, **train))
    assert not compiled
    run(options_of(data, 'compiled', encoder=WITHOUT_BATCH_NORM, compile=True, **train))
    assert len(compiled) == 1
    assert differences(saved('compiled'), saved('plain')) < 1e-4
    assert load_network('experiments/compiled/models/net_best.pth') is not None
