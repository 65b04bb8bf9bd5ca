"""The training model: test, fine-tuning and distillation in the host's loop."""

from __future__ import annotations

import csv
import json
import math
import time
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pyiqa.archs import build_network
from pyiqa.data import build_dataset
from pyiqa.losses import build_loss
from pyiqa.models.base_model import BaseModel
from pyiqa.models.general_iqa_model import GeneralIQAModel
from pyiqa.utils import get_root_logger
from pyiqa.utils.dist_util import master_only
from torch import Tensor, nn
from tqdm import tqdm

from pyiqa_clipkd.distributed import share, wrap
from pyiqa_clipkd.encoders import open_gates
from pyiqa_clipkd.engine import TrainingEngine
from pyiqa_clipkd.experiment import loop_iterations
from pyiqa_clipkd.files import written_whole
from pyiqa_clipkd.head import QualityOutput
from pyiqa_clipkd.hints import FeatureHintLoss, StageOutputs
from pyiqa_clipkd.loss import DistillationTerms
from pyiqa_clipkd.names import HIGHEST, LOWEST
from pyiqa_clipkd.network import CLIPKDStudent, QualityNetwork, load_network
from pyiqa_clipkd.options import with_split, without_weights
from pyiqa_clipkd.projection import start_projection
from pyiqa_clipkd.teacher_cache import TeacherCache, view_key
from pyiqa_clipkd.views import check_views, one_view_each
from pyiqa_clipkd.weights import check_numbers, read_weights

PER_ITERATION = 'CosinePerIteration'
PROJECTION_STARTS = ('default', 'ridge')


def mos_to_score_range(mos: Tensor) -> Tensor:
    """Labels in [0, 1] (the host's, higher is better) -> [1, 5].

    Raises:
        ValueError: if a label is outside [0, 1].
    """
    low, high = mos.min().item(), mos.max().item()
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f'Labels must be in [0, 1], but got {low:g} to {high:g}: set '
            '`mos_normalize: true`, `mos_range` and `lower_better` of the data set.'
        )
    return LOWEST + (HIGHEST - LOWEST) * mos


def iterations_that_run(opt: dict[str, Any]) -> int:
    """`loop_iterations` of an option file with its data.

    Raises:
        ValueError: if the training set doesn't fill one batch.
    """
    data = opt['datasets']['train']
    images = len(build_dataset(data)) * data.get('dataset_enlarge_ratio', 1)
    world_size = opt.get('world_size', 1)
    batch = data['batch_size_per_gpu']
    loaded = batch if opt['dist'] else batch * max(1, opt['num_gpu'])
    a_rank = math.ceil(images / world_size)
    if a_rank < loaded:
        raise ValueError(
            f'The training set {data["name"]} has {a_rank} images for one process, '
            f'fewer than one batch of {loaded}: lower `batch_size_per_gpu` or raise '
            '`dataset_enlarge_ratio`.'
        )
    return loop_iterations(
        opt['train'], images, batch, world_size=world_size, loaded=loaded
    )


def check_data_sets(opt: dict[str, Any]) -> None:
    """Find an empty side of a split and wrong labels before the work, not after it.

    Raises:
        ValueError: if a data set has no images, or labels outside [0, 1].
    """
    for phase, data in opt['datasets'].items():
        rows = build_dataset(data).paths_mos
        where = f'The data set {data["name"]} ({phase})'
        if not rows:
            word = data.get('override_phase') or data['phase']
            raise ValueError(
                f'{where} has no images: its split column '
                f'({data.get("split_index")!r}) has no {word!r}, the word that '
                '`override_phase` asks for. If the column says val, set '
                '`data:override_phase=val`.'
            )
        try:
            labels = np.array([row[-1] for row in rows], dtype=np.float32)
            mos_to_score_range(torch.from_numpy(labels))
        except ValueError as error:
            raise ValueError(f'{where}: {error}') from error


class CLIPKDModel(GeneralIQAModel):
    """One training model for the three stages.

    - Zero-shot guidance (stage 1): test options, no training.
    - Fine-tuning (stage 2): `train` without a teacher; loss `mos_loss_opt`.
    - Distillation (stage 3): `teacher` (`weights: FILE`, or a network's options); loss
      `distillation_loss_opt`, a `CosineSoftHardLoss`. `teacher: cache: FOLDER` keeps
      the teacher's embeddings on disk, `train: projection_start: ridge` begins with
      the projection that fits them best.

    In each stage `metric_loss_opt` may add a loss of the host, for instance `PLCCLoss`,
    and `ranking_loss_opt` a `DegradationRankingLoss`. `feature_hints: WEIGHT` lets the
    student's feature maps follow the teacher's, as far as lambda is above 0.
    The teacher is frozen, in evaluation mode, in no checkpoint and in no optimizer.
    """

    # What `predictions_DATA.csv` says of an image.
    prediction_columns: tuple[str, ...] = ('score', 'mos')

    def __init__(self, opt: dict[str, Any]) -> None:
        BaseModel.__init__(self, opt)
        self.use_ref = False
        if self.is_train:
            self.engine = TrainingEngine(opt['train'], self.device)
        self.view_keys: Tensor | None = None
        self.copies: tuple[Tensor | None, Tensor | None] = (None, None)
        self._started, self._seconds_before = time.time(), 0.0
        self._predictions: list[tuple[str, list[float]]] = []
        check_data_sets(opt)
        self.teacher = self._build_teacher()
        self.cache = self._open_cache()
        net = self._build_network().to(self.device)
        if self.is_train:
            self.engine.prepare(net)
        self.hints = self._build_hints(net)
        self.net: Any = wrap(net, opt, self.device)
        self.print_network(self.net)
        if self.is_train:
            self.init_training_settings()
        else:
            self.net_best = self.net

    # --- networks ---------------------------------------------------------------

    def _build_teacher(self) -> QualityNetwork | None:
        options = dict(self.opt.get('teacher') or {})
        options.pop('cache', None)
        if not self.opt.get('teacher') or not self.is_train:
            return None
        if weights := options.pop('weights', None):
            teacher = load_network(self._of_this_split(weights), **options)
        elif 'type' not in options:
            raise ValueError(
                '`teacher` must give `weights`, a file, or a network with its `type`, '
                f'but got {self.opt["teacher"]}.'
            )
        else:
            teacher = build_network(options)
        teacher = teacher.to(self.device).eval().requires_grad_(False)
        if self.engine.channels_last:
            teacher.to(memory_format=torch.channels_last)
        share(teacher)
        return teacher

    def _open_cache(self) -> TeacherCache | None:
        folder = (self.opt.get('teacher') or {}).get('cache')
        if self.teacher is None:
            return None
        check_views(self.opt['datasets']['train'], cache=folder is not None)
        return TeacherCache(folder, self.teacher) if folder else None

    def _teacher_embedding(
        self, teacher: QualityNetwork, img: Tensor, view_keys: Tensor | None
    ) -> Tensor:
        """(N, 3, H, W) -> (N, D), from the cache where there is one."""
        with torch.no_grad():
            if self.cache is None:
                return teacher.embed(self.engine.images(img))
            if view_keys is None:  # from a loader that isn't ours
                view_keys = torch.stack([view_key(one) for one in img.cpu()])
            return self.cache.embed(img, view_keys)

    def _build_hints(self, student: QualityNetwork) -> nn.Module | None:
        train = self.opt.get('train') or {}
        weight = train.get('feature_hints')
        if weight is None or not self.is_train:
            return None
        if type(weight) not in (int, float) or weight < 0:
            raise ValueError(
                f'`train: feature_hints` must be a number >= 0, but got {weight!r}.'
            )
        if self.teacher is None:
            raise ValueError('`train: feature_hints` needs a `teacher`.')
        others = {
            '`teacher: cache`': self.cache is not None,
            '`train: accumulate`': self.engine.accumulate > 1,
            '`train: compile`': self.engine.compile,
            'several GPUs in one process': self.opt['num_gpu'] > 1,
        }
        if clash := [name for name, there in others.items() if there]:
            raise ValueError(
                f'`train: feature_hints` and {clash[0]} exclude each other.'
            )
        self.teacher.preprocessing.mirror_invariant = False  # maps lie as the student's
        self.student_stages = StageOutputs(student)
        self.teacher_stages = StageOutputs(self.teacher)
        hints = FeatureHintLoss(
            self.student_stages.channels, self.teacher_stages.channels
        ).to(self.device)
        share(hints)
        return wrap(hints, self.opt, self.device)

    def _of_this_split(self, weights: str) -> str:
        """`{split}` in a path -> the word of the training's split.

        A teacher of another split has seen this split's test images.
        """
        split = self.opt['datasets']['train'].get('split_index')
        return with_split(weights, split)

    def _build_network(self) -> QualityNetwork:
        options = self.opt['network']
        if self.is_train and options.get('encoder_weights'):
            weights = str(options['encoder_weights'])
            options['encoder_weights'] = self._of_this_split(weights)
        known: dict[str, Any] = {}
        path = self.opt['path'].get('pretrain_network')
        if path and self.is_train:
            path = self._of_this_split(path)
        if path:
            # What the options leave open (width, input size), the checkpoint knows.
            known = read_weights(path).metadata.get('config', {})
        if self.teacher is not None:
            own = known.keys() & {'stage_readout', 'mirror_invariant'}
            known = {key: known[key] for key in own} | {
                key: self.teacher.config[key] for key in ('embed_dim', 'levels')
            }
        if known.get('type', options['type']) == options['type']:
            for key, value in known.items():
                options.setdefault(key, value)
        network = build_network(options)
        if self.teacher is not None and not isinstance(network, CLIPKDStudent):
            raise ValueError(
                '`network` must be a CLIPKDStudent where there is a `teacher`, but '
                f'got {type(network).__name__}.'
            )
        if path:
            strict = self.opt['path'].get('strict_load', True)
            if not strict and not options.get('encoder_weights'):
                open_gates(network)
            self.load_network(network, path, strict)
        if self.teacher is not None:  # last: not the anchors of an earlier teacher
            network.adopt_head(self.teacher)
            self._start_projection(self.teacher, network)
        return network

    def _start_projection(
        self, teacher: QualityNetwork, student: CLIPKDStudent
    ) -> None:
        start = self.opt['train'].get('projection_start') or 'default'
        if start not in PROJECTION_STARTS:
            raise ValueError(
                f'`train: projection_start` must be one of {PROJECTION_STARTS}, but '
                f'got {start!r}.'
            )
        resumed = self.opt['path'].get('resume_state')
        if start == 'default' or resumed or self.opt.get('rank', 0) > 0:
            return
        student.to(self.device)
        views = one_view_each(
            build_dataset(self.opt['datasets']['train']), self.opt['manual_seed']
        )

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for batch in views:
                img = batch['img'].to(self.device)
                yield img, self._teacher_embedding(teacher, img, batch['view_key'])

        report = start_projection(student, batches())
        get_root_logger().info(f'Projection: {report}')

    def load_network(
        self,
        net: nn.Module,
        load_path: str | Path,
        strict: bool = True,
        param_key: str = 'params',
    ) -> None:
        """Load weights from any file that `read_weights` accepts.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is refused, or `strict` and it doesn't fit.
        """
        tensors: dict[str, Tensor] = dict(read_weights(load_path).tensors)
        check_numbers(tensors, {}, load_path)
        tensors['_extra_state'] = torch.empty(0)
        self._print_different_keys_loading(net, tensors, strict)
        try:
            self.get_bare_model(net).load_state_dict(tensors, strict=strict)
        except RuntimeError as error:
            raise ValueError(
                f'`pretrain_network`: {load_path} does not fit: {error}'
            ) from error
        get_root_logger().info(f'Loaded {load_path}.')

    # --- training ---------------------------------------------------------------

    def init_training_settings(self) -> None:
        self.total_iterations = iterations_that_run(self.opt)
        self._build_losses()
        self.net.train()
        self.net_best = build_network(without_weights(self.opt['network']))
        self.net_best.to(self.device)
        # What the weights decided (QuickGELU, levels) belongs to their copy, too.
        self.net_best.config = self.get_bare_model(self.net).config
        self._cosine_floor: float | None = None
        self.setup_optimizers()
        self.engine.start(self.optimizer, self.total_iterations)
        self.setup_schedulers()
        self._deferred_save: tuple[int, int] | None = None
        self._validated = 0
        self._progress_bar: tqdm | None = None
        if self.opt['logger'].get('progress_bar') and self.opt.get('rank', 0) == 0:
            self._progress_bar = tqdm(total=self.total_iterations, unit='step')

    def setup_optimizers(self) -> None:
        super().setup_optimizers()
        if self.hints is not None:
            self.optimizer.add_param_group({'params': list(self.hints.parameters())})

    def _build_losses(self) -> None:
        train_opt = self.opt['train']
        self.cri_metric = self.cri_ranking = None
        if self.teacher is None:
            self.cri_mos = self._build_loss('mos_loss_opt')
        else:
            self.cri_distillation = self._build_loss('distillation_loss_opt')
            get_root_logger().info(f'Distillation: {self.cri_distillation}')
        if train_opt.get('metric_loss_opt'):
            self.cri_metric = self._build_loss('metric_loss_opt')
        if train_opt.get('ranking_loss_opt'):
            self.cri_ranking = self._build_loss('ranking_loss_opt')

    def _build_loss(self, key: str) -> Any:
        options = self.opt['train'].get(key)
        if not options:
            stage = 'with' if self.teacher is not None else 'without'
            raise ValueError(f'Training {stage} a teacher needs `train: {key}`.')
        return build_loss(options).to(self.device)

    def setup_schedulers(self, scheduler_name: str = 'scheduler') -> None:
        """The host's schedulers step once an epoch; `CosinePerIteration` is smooth.

        It falls on a cosine from the initial learning rate to `min_ratio` times it, at
        the last iteration that runs, after a linear warm-up over `warmup` (a share of
        the iterations).
        """
        options = self.opt['train'].get(scheduler_name) or {'type': PER_ITERATION}
        if options['type'] != PER_ITERATION:
            super().setup_schedulers(scheduler_name)
            return
        self._cosine_floor = float(options.get('min_ratio', 0.1))
        self._warmup = float(options.get('warmup', 0.0))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group['initial_lr'] = group['lr']

    def _set_learning_rate(self, progress: float) -> None:
        if self._cosine_floor is None:
            return
        factor = self.engine.rate_factor(progress, self._cosine_floor, self._warmup)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group['lr'] = group['initial_lr'] * factor

    def feed_data(self, data: dict[str, Any]) -> None:
        """Take images and labels; a reference image, where there is one, is ignored."""
        self.img_input = data['img'].to(self.device)
        self.view_keys = data.get('view_key')
        self.copies = data.get('copies'), data.get('levels')
        self.img_paths = data.get('img_path', [])
        if 'mos_label' in data:
            self.gt_mos = self._labels(data['mos_label']).to(self.device)

    def _labels(self, labels: Tensor) -> Tensor:
        """The data set's labels -> what the network is to say."""
        return mos_to_score_range(labels)

    def optimize_parameters(self, current_iter: int) -> None:
        # Dropout and drop path depend on the iteration alone, so a resumed run sees the
        # same draws as an uninterrupted one.
        seed = 1_000_003 * int(self.opt['manual_seed']) + current_iter
        rank, world_size = self.opt.get('rank', 0), self.opt.get('world_size', 1)
        torch.manual_seed(seed * world_size + rank)
        progress = self.engine.progress(current_iter)
        self._set_learning_rate(progress)
        terms, logged = self._losses(progress, seed * world_size + rank)
        logged['lr'] = self.get_current_learning_rate()[0]
        logged.update(self.engine.backward(terms['l_total'], current_iter))
        self.log_dict = {**self.reduce_loss_dict(terms), **logged}
        if self._progress_bar is not None:
            self._progress_bar.update(current_iter - self._progress_bar.n)
            if current_iter == self.total_iterations:
                self._progress_bar.close()

    def _losses(
        self, progress: float, seed: int
    ) -> tuple[OrderedDict[str, Tensor], dict[str, float]]:
        """The terms of the loss of a batch, `l_total` among them, and what else to log.

        Args:
            progress: t / T in [0, 1].
            seed: of what is drawn in this iteration.
        """
        output, copies, levels = self._forward(seed)
        self.output_score = output.score
        terms: OrderedDict[str, Tensor] = OrderedDict()
        logged: dict[str, float] = {}
        if self.teacher is None:
            total = self.cri_mos(output.score, self.gt_mos)
            terms['l_mos'] = total
        else:
            result = self._distill(self.teacher, output, progress)
            total = result.total
            terms.update(l_soft=result.soft, l_hard=result.hard)
            logged['soft_weight'] = result.soft_weight
            if self.hints is not None and result.soft_weight > 0:
                # The teacher has just seen the batch, for its embedding.
                n = len(self.img_input)
                mine = {s: maps[:n] for s, maps in self.student_stages.maps.items()}
                terms['l_hints'] = self.hints(mine, self.teacher_stages.maps)
                weight = self.opt['train']['feature_hints'] * result.soft_weight
                total = total + weight * terms['l_hints']
        if self.cri_ranking is not None:
            terms['l_ranking'] = self.cri_ranking(output.score, copies, levels)
            total = total + terms['l_ranking']
        if self.cri_metric is not None:
            terms['l_metric'] = self.cri_metric(output.score, self.gt_mos)
            total = total + terms['l_metric']
        terms['l_total'] = total
        return terms, logged

    def _forward(self, seed: int) -> tuple[QualityOutput, Tensor, Tensor]:
        """What the network says of the batch, and of copies for the ranking.

        Returns:
            Of the N images, scores of 3n copies (3n, 1), their levels (n, 2); without a
            ranking n is 0.
        """
        images, levels = self.img_input, self.img_input.new_zeros(0, 2)
        if self.cri_ranking is not None:
            copies, levels = self.copies
            if copies is None:  # from a loader that isn't ours
                copies, levels = self.cri_ranking.views(images, seed)
            images = torch.cat([images, copies.to(self.device)])
            levels = levels.to(self.device)
        with self.engine.autocast():
            output = self.net(self.engine.images(images), return_details=True)
        n = len(self.img_input)
        probabilities = output.probabilities
        if probabilities is not None:
            probabilities = probabilities[:n]
        own = QualityOutput(output.score[:n], output.embedding[:n], probabilities)
        return own, output.score[n:], levels

    def _distill(
        self, teacher: QualityNetwork, output: QualityOutput, progress: float
    ) -> DistillationTerms:
        """The teacher is asked only where its answer has a weight."""
        teacher_embedding = None
        if self.cri_distillation.soft_weight_at(progress) > 0:
            teacher_embedding = self._teacher_embedding(
                teacher, self.img_input, self.view_keys
            )
        terms: DistillationTerms = self.cri_distillation(
            output.embedding, teacher_embedding, output.score, self.gt_mos, progress
        )
        return terms

    # --- validation and checkpoints -----------------------------------------------

    def test(self) -> None:
        self.net.eval()
        with torch.no_grad():
            # Not the parallel wrapper: one process validates alone.
            self.output_score = self.get_bare_model(self.net)(self.img_input)
        self.net.train(self.is_train)
        values = torch.cat([self.output_score, self.gt_mos], dim=1).tolist()
        self._predictions += zip(self.img_paths, values, strict=False)

    def validation(
        self, dataloader: Any, current_iter: Any, tb_logger: Any, save_img: bool = False
    ) -> None:
        if self.is_train:  # after its last iteration the host counts one more
            current_iter = min(current_iter, self.total_iterations)
        self._predictions = []
        trained = self.net
        if self.is_train:
            self.net = self.engine.evaluated(trained)
        super().validation(dataloader, current_iter, tb_logger, save_img)
        self.net = trained
        self._write_predictions(dataloader.dataset.opt['name'])
        if not self.is_train or self._deferred_save is None:
            return
        self._validated += 1
        if self._validated == self._validation_sets():
            self._save_now(*self._deferred_save)
            self._deferred_save, self._validated = None, 0

    @master_only
    def _write_predictions(self, data: str) -> None:
        """`predictions_DATA.csv`: image, then what the network and the labels say."""
        folder = 'experiments_root' if self.is_train else 'results_root'
        path = Path(self.opt['path'][folder], f'predictions_{data}.csv')
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open('w', newline='') as file:
            writer = csv.writer(file)
            writer.writerow(['image', *self.prediction_columns])
            for image, values in self._predictions:
                writer.writerow([Path(image).name, *(f'{v:.5f}' for v in values)])

    def _validation_sets(self) -> int:
        return sum(phase.split('_')[0] == 'val' for phase in self.opt['datasets'])

    def _log_validation_metric_values(
        self, current_iter: Any, dataset_name: str, tb_logger: Any
    ) -> None:
        super()._log_validation_metric_values(current_iter, dataset_name, tb_logger)
        if not self.is_train:
            results = {k: float(v) for k, v in self.metric_results.items()}
            path = Path(self.opt['path']['results_root']) / f'{dataset_name}.json'
            path.write_text(json.dumps(results, indent=2) + '\n')

    def save(self, epoch: int, current_iter: int, save_net_label: str = 'net') -> None:
        """Save after the validation of the same iteration, where there is one.

        So the best result up to a checkpoint is always in its training state, and
        a resumed run needn't repeat a validation.
        """
        val = self.opt.get('val')
        due = val and self._validation_sets() and current_iter % val['val_freq'] == 0
        if current_iter > 0 and due:
            self._deferred_save, self._validated = (epoch, current_iter), 0
        else:
            self._save_now(epoch, current_iter)

    def _save_now(self, epoch: int, current_iter: int) -> None:
        self.save_network(self.net, 'net', current_iter)
        self.save_training_state(epoch, current_iter)

    @master_only
    def save_network(
        self,
        net: nn.Module,
        net_label: str,
        current_iter: int | None = None,
        param_key: str = 'params',
    ) -> None:
        """Write a checkpoint, whole or not at all. Nothing is written in a test."""
        if not self.is_train:
            return
        label = {None: '', -1: '_latest'}.get(current_iter, f'_{current_iter}')
        path = Path(self.opt['path']['models']) / f'{net_label}{label}.pth'
        if net is self.net:
            _save(self.engine.checkpoint(), path)
        else:
            state = net.state_dict()
            _save({param_key: {name: v.cpu() for name, v in state.items()}}, path)

    @master_only
    def save_training_state(self, epoch: int, current_iter: int) -> None:
        """Write optimizers, schedulers and the best results, whole or not at all."""
        if current_iter == -1:
            return
        _save(
            {
                'epoch': epoch,
                'iter': current_iter,
                'processes': self.opt.get('world_size', 1),
                'seconds': self._seconds_before + time.time() - self._started,
                'optimizers': [o.state_dict() for o in self.optimizers],
                'schedulers': [s.state_dict() for s in self.schedulers],
                'engine': self.engine.state_dict(),
                'hints': None if self.hints is None else self.hints.state_dict(),
                'best_metric_results': {
                    data: {
                        m: {**best, 'val': float(best['val'])} for m, best in r.items()
                    }
                    for data, r in getattr(self, 'best_metric_results', {}).items()
                },
            },
            Path(self.opt['path']['training_states']) / f'{current_iter}.state',
        )

    def resume_training(self, resume_state: dict[str, Any]) -> None:
        """Go on from a training state: optimizers, schedulers and the weights.

        The host itself restores no weights here: it looks for `network_*` options, but
        its own option files say `network`.

        Raises:
            FileNotFoundError: if the weights that belong to the state are gone.
        """
        super().resume_training(resume_state)
        self._seconds_before = resume_state.get('seconds', 0.0)
        folder = self.opt['path']['models']
        iteration = resume_state['iter']
        self.engine.load_checkpoint(Path(folder) / f'net_{iteration}.pth')
        self.engine.load_state_dict(resume_state.get('engine', {}), iteration)
        if self.hints is not None:
            self.hints.load_state_dict(resume_state['hints'])
        if results := resume_state.get('best_metric_results'):
            self.best_metric_results = results
            self.key_metric = self.opt['val'].get('key_metric')
            self.metric_results = dict.fromkeys(self.opt['val']['metrics'], 0)


def _save(content: dict[str, Any], path: Path) -> None:
    # A file of Python's: on a full disk torch's own forgets why.
    with written_whole(path) as partial, partial.open('wb') as file:
        torch.save(content, file)
