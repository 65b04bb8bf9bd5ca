"""Training with all photographs, and damaged copies of them, in memory.

Reading files sets the pace of a small network on a fast GPU; on CPU cores it takes time
from the network. Here nothing is read: crops, mirrors, zooms and mixtures are cut from
what `photograph_store.py` wrote. The loss is that of the paper with what the training
model adds in the host's loop (hints, ranking of damaged copies), plus the distance to
the teachers' mean score. Several option files are trained one after the other, for
instance configs/release/resident/teacher_ranked.yml.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import resident_run
import torch
import torch.nn.functional as F
from resident_views import Batch, Phase, Store, Views, in_unit_range, resized
from same_blocks import BlockOutputs, begin_as_lite, block_distance, measure_statistics
from torch import Tensor, nn

from pyiqa_clipkd.encoders import open_gates
from pyiqa_clipkd.engine import TrainingEngine
from pyiqa_clipkd.head import QualityOutput
from pyiqa_clipkd.hints import FeatureHintLoss, StageOutputs
from pyiqa_clipkd.loss import CosineSoftHardLoss, soft_weight_at
from pyiqa_clipkd.network import QualityNetwork, build_from_config, load_network
from pyiqa_clipkd.options import with_split
from pyiqa_clipkd.weights import read_weights

ENGINE = ('mixed_precision', 'clip_grad_norm', 'ema_decay', 'channels_last')
STEPS_TO_TIME = 6
BATCHES_TO_MEASURE, PHOTOGRAPHS_TO_MEASURE = 12, 16
LOOKS = 4  # at the held-out side, in a training


class Training:
    """One option file.

    Args:
        options: the whole file.
        store: the photographs.
        device: to train on.
        seconds: that it may take, in place of `train: steps`.
        validated: how many photographs of the held-out side, at least.
    """

    def __init__(
        self,
        options: dict[str, Any],
        store: Store,
        device: torch.device,
        seconds: float | None = None,
        validated: int = 10**6,
    ) -> None:
        self.options, self.store, self.device = options, store, device
        self.seconds = seconds
        self.validated = validated
        self.train: dict[str, Any] = options['train']
        torch.manual_seed(options['manual_seed'])
        split = options['datasets']['train']['split_index']
        teacher = options.get('teacher') or {}
        files = [teacher['weights'], *teacher.get('score_with', ())] if teacher else []
        self.teachers = [
            load_network(with_split(file, split))
            .to(device)
            .to(memory_format=torch.channels_last)
            .requires_grad_(False)
            for file in files
        ]
        self.net = self._network(with_split_of(options, split)).to(device)
        self.phases = [Phase(**phase) for phase in self.train['phases']]
        self.ranking = resident_run.ranking_loss(options)
        distillation = dict(self.train.get('distillation_loss_opt') or {})
        distillation.pop('type', None)
        self.distillation = CosineSoftHardLoss(**distillation)
        self.input_size = int(options['network']['input_size'])
        if self.train.get('begin_as_lite'):
            measure_statistics(self.net, self._photographs())

    def _photographs(self) -> Iterator[Tensor]:
        """Some of those to train on, undamaged and of the size to be scored."""
        views = self._views()
        phase = Phase(1.0, self.input_size, PHOTOGRAPHS_TO_MEASURE, copies=0)
        for _ in range(BATCHES_TO_MEASURE):
            yield views.batch(phase).images

    def _network(self, path: str | None) -> Any:
        network = dict(self.options['network'])
        net: Any = build_from_config(network)
        if self.train.get('begin_as_lite') and not path:
            raise ValueError(
                '`train: begin_as_lite` needs `path: pretrain_network`, the weights of '
                'an efficientnet_lite.'
            )
        if path:
            tensors = dict(read_weights(path).tensors)
            if self.train.get('begin_as_lite'):
                begin_as_lite(net, tensors)
                return net
            open_gates(net)
            mine = net.state_dict()
            fitting = {k: v for k, v in tensors.items() if k in mine}
            net.load_state_dict(fitting, strict=False)
        if self.teachers:
            net.adopt_head(self.teachers[0])
        return net

    def run(self) -> dict[str, Any]:
        """Train; returns the record.

        Raises:
            RuntimeError: if a loss isn't finite any more.
        """
        start = time.time()
        steps = self._steps(self.seconds)
        self.engine = TrainingEngine(self._engine_options(), self.device)
        self.engine.prepare(self.net)
        step = Step(self, self.engine, self.net)
        total = sum(steps)
        self.engine.start(step.optimizer, total)
        views = self._views()
        phases = [p for p, n in zip(self.phases, steps, strict=True) for _ in range(n)]
        history = []
        for iteration, phase in enumerate(phases, 1):
            losses = step(views.batch(phase), phase, iteration)
            if iteration % max(1, total // LOOKS) == 0 or iteration == total:
                history.append({'iteration': iteration, **self._look(losses)})
                print(self.options['name'], json.dumps(history[-1]), flush=True)
                self.save()
        cuda = self.device.type == 'cuda'
        return {
            'name': self.options['name'],
            'seconds': round(time.time() - start),
            'steps': steps,
            'device': torch.cuda.get_device_name() if cuda else 'cpu',
            'torch': torch.__version__,
            'validated': len(self._held_out()),
            'history': history,
            'options': self.options,
        }

    def _engine_options(self) -> dict[str, Any]:
        return {key: self.train.get(key) for key in ENGINE}

    def _look(self, losses: dict[str, Tensor]) -> dict[str, float]:
        """The losses of a batch, and figures of the held-out side."""
        values = resident_run.finite(self.options['name'], losses)
        return values | self.validate(self.engine.evaluated(self.net))

    def _views(self) -> Views:
        scale = self.input_size / self.store.side
        return Views(self.store, self.ranking, scale, self.options['manual_seed'])

    def _steps(self, seconds: float | None) -> list[int]:
        """Of each phase: those of the file, or as many as take `seconds`."""
        if seconds is None:
            return [int(steps) for steps in self.train['steps']]
        start = time.time()
        times = [self._seconds_a_step(phase) for phase in self.phases]
        left = seconds - (time.time() - start)
        return [
            max(1, round(phase.share * left / one))
            for phase, one in zip(self.phases, times, strict=True)
        ]

    def _seconds_a_step(self, phase: Phase) -> float:
        """Measured on a copy of the network."""
        engine = TrainingEngine(self._engine_options(), self.device)
        net = copy.deepcopy(self.net)
        engine.prepare(net)
        step = Step(self, engine, net)
        engine.start(step.optimizer, 10**6)
        views = self._views()
        for i in range(2 * STEPS_TO_TIME):
            if i == STEPS_TO_TIME:
                self._wait()
                start = time.time()
            step(views.batch(phase), phase, i + 1)
        self._wait()
        return (time.time() - start) / STEPS_TO_TIME

    def _wait(self) -> None:
        if self.device.type == 'cuda':
            torch.cuda.synchronize()

    @torch.inference_mode()
    def validate(self, net: Any) -> dict[str, float]:
        """On whole held-out photographs, in the precision of training."""
        net.eval()
        net.preprocessing.input_size = self.input_size
        store = self.store
        scores = []
        held_out = self._held_out()
        for rows in held_out.split(64):
            images = in_unit_range(store.photographs[rows])
            with self.engine.autocast():
                scores.append(net(resized(images, self.input_size)))
        net.train()
        return resident_run.agreement(torch.cat(scores)[:, 0], store.mos[held_out, 0])

    def _held_out(self) -> Tensor:
        """Rows of all photographs of that side, or of every n-th."""
        held_out = self.store.held_out
        return held_out[:: max(1, len(held_out) // self.validated)]

    def save(self) -> Path:
        """Below experiments/, where release.py looks; returns the checkpoint."""
        return resident_run.write_checkpoint(self.options, self.engine.checkpoint())


def with_split_of(options: dict[str, Any], split: int) -> str | None:
    path = options['path'].get('pretrain_network')
    return with_split(path, split) if path else None


class Step:
    """One step of the optimizer.

    Args:
        training: its losses and teachers.
        engine: from the loss to the weights.
        net: the network that learns.
    """

    def __init__(
        self, training: Training, engine: TrainingEngine, net: QualityNetwork
    ) -> None:
        self.training, self.engine, self.net = training, engine, net
        keep = training.train.get('keep_statistics', False)
        norms = (m for m in net.modules() if isinstance(m, nn.BatchNorm2d))
        self.kept = [*norms] if keep else []
        self.hints: FeatureHintLoss | None = None
        for teacher in training.teachers:  # maps lie as the student's
            teacher.preprocessing.mirror_invariant = False
        if training.train.get('feature_hints'):
            self.stages = StageOutputs(net), StageOutputs(training.teachers[0])
            mine, theirs = self.stages
            self.hints = FeatureHintLoss(mine.channels, theirs.channels)
            self.hints.to(training.device)
        self.blocks: tuple[BlockOutputs, BlockOutputs] | None = None
        if training.train.get('follow_blocks'):
            if not training.teachers:
                raise ValueError('`train: follow_blocks` needs `teacher: weights`.')
            self.blocks = BlockOutputs(net), BlockOutputs(training.teachers[0])
        optim = training.train['optim']
        self.lr: float = optim['lr']
        decay = float(optim.get('weight_decay', 0))
        parameters = [*net.parameters()]
        if self.hints is not None:
            parameters += [*self.hints.parameters()]
        groups = resident_run.decay_groups(parameters)
        fused = training.device.type == 'cuda'
        self.optimizer = torch.optim.AdamW(
            groups, lr=self.lr, weight_decay=decay, fused=fused
        )

    def __call__(self, batch: Batch, phase: Phase, iteration: int) -> dict[str, Tensor]:
        self.net.train()
        for norm in self.kept:
            norm.eval()
        progress = self.engine.progress(iteration)
        self._set_learning_rate(progress)
        images = self.engine.images(batch.images)
        for network in (self.net, *self.training.teachers):
            network.preprocessing.input_size = phase.size
        targets = self._targets(images)
        with self.engine.autocast():
            output = self.net(images, return_details=True)
        losses = self._losses(output, targets, batch, progress)
        self.engine.backward(sum(losses.values()), iteration)  # type: ignore[arg-type]
        return losses

    def _set_learning_rate(self, progress: float) -> None:
        scheduler = self.training.train['scheduler']
        factor = self.engine.rate_factor(
            progress, scheduler['min_ratio'], scheduler['warmup']
        )
        for group in self.optimizer.param_groups:
            group['lr'] = self.lr * factor

    @torch.no_grad()
    def _targets(self, images: Tensor) -> list[QualityOutput]:
        with self.engine.autocast():
            return [
                teacher(images, return_details=True)
                for teacher in self.training.teachers
            ]

    def _losses(
        self,
        output: QualityOutput,
        targets: list[QualityOutput],
        batch: Batch,
        progress: float,
    ) -> dict[str, Tensor]:
        training = self.training
        score, n = output.score, len(batch.mos)
        hard = F.mse_loss(score[:n], batch.mos)
        losses = {'hard': hard}
        if targets:
            weight = training.distillation.soft_weight_at(progress)
            mean = torch.stack([target.score for target in targets]).mean(0)
            cosine = F.cosine_similarity(output.embedding, targets[0].embedding)
            losses = {
                'hard': (1 - weight) * hard,
                'soft': weight * (1 - cosine).mean(),
                'score': weight * F.mse_loss(score, mean),
            }
        if self.hints is not None:
            mine, theirs = (stages.maps for stages in self.stages)
            losses['hints'] = soft_weight_at(progress) * self.hints(mine, theirs)
        if self.blocks is not None:
            mine, theirs = (outputs.maps for outputs in self.blocks)
            follow = training.train['follow_blocks'] * soft_weight_at(progress)
            losses['blocks'] = follow * block_distance(mine, theirs)
        if k := len(batch.levels):
            copies = score[n : n + 3 * k]
            losses['ranking'] = training.ranking(score[:n], copies, batch.levels)
        return losses


def main() -> None:
    parser = resident_run.parser(__doc__)
    parser.add_argument('--seconds', type=float, help='in place of `train: steps`')
    parser.add_argument('--validated', type=int, default=10**6, help='photographs')
    args = parser.parse_args()

    def build(options: dict[str, Any], store: Store, device: torch.device) -> Training:
        return Training(options, store, device, args.seconds, args.validated)

    resident_run.train_all(args, build)


if __name__ == '__main__':
    main()
