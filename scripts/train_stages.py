"""Each stage of a student learns by itself what the teacher's stage does.

A stage gets the map that the teacher's stage before gave, and learns the one that the
teacher's own stage made of it (Wang et al. 2018, "Progressive blockwise knowledge
distillation"). So no stage waits for those before it, every cell of a map is a target,
and early stages, which cost most, learn from small crops. From the middle of a part on
stages get more and more (`own`) of what the student's stage before gave. The last one
learns the teacher's projection cell by cell: it is linear in the pooled features. A
readout of the teacher's stages has no part in that: `train_readout.py` learns one.

The teacher's channels, each with mean 0 and deviation 1, are the student's first ones;
its others are constant, but not 0: a layer normalization would else lose how large the
map is in a cell. So stages fit together afterwards without anything between them.
What comes out is a start for `train_resident.py`; for instance
configs/release/stages/mobilevit.yml.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import resident_run
import torch
import torch.nn.functional as F
from network_stages import Stages, check_cut
from resident_views import Phase, Store, Views, in_unit_range, resized
from timm.layers import DropPath
from torch import Tensor, nn

from pyiqa_clipkd.engine import TrainingEngine
from pyiqa_clipkd.files import file_hash, written_whole
from pyiqa_clipkd.hints import STRIDES
from pyiqa_clipkd.network import build_from_config, load_network
from pyiqa_clipkd.options import with_split
from pyiqa_clipkd.weights import read_weights

FIRST, LAST = STRIDES[0], STRIDES[-1]
ACTIVE = 2.0  # where the targets of an activation lie, in their deviations
SPARE = 0.1  # weight of the channels that the teacher doesn't have
SCORE = 0.3  # weight of the squared distance of scores
BATCHES_TO_MEASURE, SIZE_TO_MEASURE = 16, 256
VALIDATED, BATCH_TO_VALIDATE = 96, 16  # photographs of the held-out side
LINES = 20  # of a part's history


class Part(NamedTuple):
    """Some stages that learn together.

    Attributes:
        stages: their strides, neighbours.
        sizes: sides of crops in pixels; each for the same number of steps.
        steps: of the optimizer.
        lr: the learning rate; it falls on a cosine.
        photographs: in a batch, at the first size; at others fewer, down to a half.
        copies: how many of these get a moved and two damaged copies.
        mixed: mixtures of two.
        own: share of the images in which a stage gets what the student's own stage
            before gave, and not the teacher's: at the begin, and from the middle on.
            Those before the part's first stage run, but don't learn.
        weights: loss -> its weight, 1 if not named. Losses are those of `stages`; of 32
            they are `hint` (its map), `cells`, `embedding` and `score`.
    """

    stages: Sequence[int]
    sizes: Sequence[int]
    steps: int
    lr: float
    photographs: int
    copies: int
    mixed: int
    own: Sequence[float] = (0.0, 0.0)
    weights: dict[str, float] = {}  # noqa: RUF012

    def phase(self, progress: float) -> Phase:
        """The batch at that share of the steps."""
        place = min(int(progress * len(self.sizes)), len(self.sizes) - 1)
        fewer = max(0.5, min(1.0, self.sizes[0] / self.sizes[place]))
        counts = (self.photographs, self.copies, self.mixed)
        return Phase(1.0, self.sizes[place], *(int(fewer * n) for n in counts))

    def share_of_own(self, progress: float) -> float:
        """At that share of the steps."""
        begin, end = self.own
        return begin + (end - begin) * min(1.0, 2 * progress)


class Training:
    """One option file.

    Args:
        options: the whole file.
        store: the photographs.
        device: to train on.
    """

    def __init__(
        self, options: dict[str, Any], store: Store, device: torch.device
    ) -> None:
        self.options, self.store, self.device = options, store, device
        self.train: dict[str, Any] = options['train']
        self.seed: int = options['manual_seed']
        self.size: int = options['network']['input_size']
        self.parts = [part_of(one, self.size) for one in self.train.get('parts') or ()]
        if not self.parts:
            raise ValueError('train_stages.py needs `train: parts`, a list.')
        if not (options.get('teacher') or {}).get('weights'):
            raise ValueError('train_stages.py needs `teacher: weights`, a file.')
        torch.manual_seed(self.seed)
        split = options['datasets']['train']['split_index']
        file = with_split(options['teacher']['weights'], split)
        self.teacher: Any = load_network(file).to(device).eval().requires_grad_(False)
        self.teacher.preprocessing.mirror_invariant = False  # maps lie as crops do
        self.net: Any = build_from_config(dict(options['network']))
        self.net.adopt_head(self.teacher)
        if start := options['path'].get('pretrain_network'):
            start = with_split(start, split)
            take_encoder(self.net, start)
        self.made_of = {
            'teacher': file_hash(file),
            'start': file_hash(start) if start else None,
            'store': resident_run.made_of(store),
            'network': options['network'],
            'train': {k: v for k, v in self.train.items() if k != 'parts'},
            'seed': self.seed,
        }
        for module in self.net.modules():
            if isinstance(module, DropPath):  # targets of cells need all blocks
                module.drop_prob = 0.0
        self.net.to(device)
        for network in (self.net, self.teacher):
            network.to(memory_format=torch.channels_last)
            check_cut(network)
        self.mine = Stages(self.net.encoder.backbone)
        self.theirs = Stages(self.teacher.encoder.backbone)
        check_channels(self.mine, self.theirs)
        self.hint = nn.Conv2d(self.mine.channels[LAST], self.theirs.channels[LAST], 1)
        self.hint.to(device)
        self._begin(0)
        self.ranking = resident_run.ranking_loss(options)  # of it: how far is moved
        self.seconds = 0.0

    def run(self) -> dict[str, Any]:
        """Train; returns the record."""
        self.views = self._views(0)
        self._measure()
        self._move_up()
        history = [
            {'part': place, **line}
            for place, part in enumerate(self.parts, 1)
            for line in self._kept(place, part)
        ]
        return {
            'name': self.options['name'],
            'seconds': round(self.seconds),
            'steps': [part.steps for part in self.parts],
            'device': self.device.type,
            'torch': torch.__version__,
            'history': history,
            'options': self.options,
        }

    def save(self) -> Path:
        """Below experiments/, where release.py looks; returns the checkpoint."""
        params = {'params': self.net.state_dict()}
        return resident_run.write_checkpoint(self.options, params)

    def _begin(self, place: int) -> None:
        """What a part begins with, whether those before it ran or come from files."""
        names = ('mixed_precision', 'clip_grad_norm')
        options = {name: self.train.get(name) for name in names}
        self.engine = TrainingEngine(options | {'channels_last': True}, self.device)
        self.draw = torch.Generator(self.device).manual_seed(self.seed + place)
        torch.manual_seed(self.seed + place)

    def _views(self, place: int) -> Views:
        scale = self.size / self.store.side
        return Views(self.store, self.ranking, scale, self.seed + place)

    # --- targets ----------------------------------------------------------------------

    @torch.no_grad()
    def _measure(self) -> None:
        """Mean and deviation of each channel of the teacher's maps."""
        phase = Phase(1.0, self._size_to_measure(), 24, 4, 4)
        found: dict[int, list[Tensor]] = {stride: [] for stride in STRIDES}
        for _ in range(BATCHES_TO_MEASURE):
            maps, _ = self._teachers_maps(self._images(phase), LAST)
            for stride, values in maps.items():
                values = values.float()
                moments = values.mean((0, 2, 3)), values.square().mean((0, 2, 3))
                found[stride].append(torch.stack(moments))
        self.statistics = {}
        for stride, moments in found.items():
            mean, square = torch.stack(moments).mean(0)
            deviation = (square - mean * mean).clamp(min=1e-8).sqrt()
            self.statistics[stride] = (mean[:, None, None], deviation[:, None, None])

    @torch.no_grad()
    def _move_up(self) -> None:
        """Where a stage ends with an activation: targets above 0, and so its bias.

        Scale and bias of its last normalization, if it has one, begin anew.
        """
        images = self._images(Phase(1.0, self._size_to_measure(), 8, 0))
        self.net.eval()
        active = self.mine.ends_active(images)
        self.offsets = {k: ACTIVE * active[k] for k in STRIDES if k != LAST}
        for stride, offset in self.offsets.items():
            norms = [
                module
                for module in self.mine.part(stride).modules()
                if isinstance(module, nn.BatchNorm2d)
            ]
            if offset and norms:
                used = self.theirs.channels[stride]
                norms[-1].bias.fill_(offset)
                norms[-1].weight[:used] = 1
                norms[-1].weight[used:] = SPARE

    def _size_to_measure(self) -> int:
        return min(SIZE_TO_MEASURE, self.size)

    def _images(self, phase: Phase) -> Tensor:
        return self._prepared(self.views.batch(phase).images)

    def _prepared(self, images: Tensor) -> Tensor:
        """As networks see squares of this size."""
        preprocessing = self.teacher.preprocessing
        preprocessing.input_size = images.shape[-1]
        return self.engine.images(preprocessing(images.to(self.device)))

    def _teachers_maps(
        self, images: Tensor, until: int
    ) -> tuple[dict[int, Tensor], Tensor]:
        """Its maps by stride; its features, if that is the last one."""
        maps: dict[int, Tensor] = {}
        values = images
        with self.engine.autocast():
            for stride in STRIDES[: STRIDES.index(until) + 1]:
                values = maps[stride] = self.theirs.run(stride, values)
            return maps, self.theirs.rest(values) if until == LAST else values

    def _normalized(self, maps: Tensor, stride: int) -> Tensor:
        mean, deviation = self.statistics[stride]
        return (maps.float() - mean) / deviation

    def _target(self, maps: Tensor, stride: int) -> Tensor:
        """The teacher's map, in the student's channels."""
        spare = self.mine.channels[stride] - maps.shape[1]
        values = self._normalized(maps, stride) + self.offsets[stride]
        return F.pad(values, (0, 0, 0, 0, 0, spare), value=ACTIVE)

    # --- training ---------------------------------------------------------------------

    def _kept(self, place: int, part: Part) -> list[dict[str, Any]]:
        """Learn a part, or take it from the file of a run before."""
        file = resident_run.experiment(self.options) / 'parts' / f'{place}.pth'
        done = [one._asdict() for one in self.parts[:place]]
        made_of = json.dumps([self.made_of, done])
        kept: dict[str, Any] = {}
        if file.is_file():
            kept = torch.load(file, map_location=self.device, weights_only=True)
        if kept.get('made_of') != made_of:
            start = time.time()
            self._begin(place)
            self.views = self._views(place)
            history = self._learn(part)
            file.parent.mkdir(parents=True, exist_ok=True)
            kept = {
                'made_of': made_of,
                'seconds': time.time() - start,
                'history': json.dumps(history),
                'net': self.net.state_dict(),
                'hint': self.hint.state_dict(),
            }
            with written_whole(file) as unfinished:
                torch.save(kept, unfinished)
        self.net.load_state_dict(kept['net'])
        self.hint.load_state_dict(kept['hint'])
        self.seconds += kept['seconds']
        found: list[dict[str, Any]] = json.loads(kept['history'])
        return found

    def _learn(self, part: Part) -> list[dict[str, Any]]:
        learning = nn.ModuleList(self.mine.part(stride) for stride in part.stages)
        if LAST in part.stages:
            learning += [self.mine.parts[-1], self.net.encoder.projection, self.hint]
        optimizer = torch.optim.AdamW(
            resident_run.decay_groups(learning.parameters()),
            lr=part.lr,
            weight_decay=self.train['optim']['weight_decay'],
        )
        scheduler = self.train['scheduler']
        self.engine.prepare(learning)
        self.engine.start(optimizer, part.steps)
        history: list[dict[str, Any]] = []
        for step in range(1, part.steps + 1):
            self.net.eval()
            learning.train()
            progress = self.engine.progress(step)
            factor = self.engine.rate_factor(
                progress, scheduler['min_ratio'], scheduler['warmup']
            )
            for group in optimizer.param_groups:
                group['lr'] = part.lr * factor
            images = self._images(part.phase(progress))
            own = part.share_of_own(progress)
            losses = self._losses(images, part.stages, own, self.draw)
            weighted = [part.weights.get(k, 1.0) * loss for k, loss in losses.items()]
            self.engine.backward(torch.stack(weighted).sum(), step)
            if step % max(1, part.steps // LINES) == 0 or step == part.steps:
                values = resident_run.finite(self.options['name'], losses)
                history.append({'step': step, **rounded(values)})
                history[-1]['held_out'] = self.validate(part)
                print(self.options['name'], json.dumps(history[-1]), flush=True)
        return history

    def _losses(
        self,
        images: Tensor,
        strides: Sequence[int],
        own: float,
        draw: torch.Generator,
    ) -> dict[str, Tensor]:
        """Squared distances in variances of the target: 1 is that of a constant.

        Of spare channels they come on top, with the weight `SPARE`.
        """
        with torch.no_grad():
            theirs, features = self._teachers_maps(images, strides[-1])
        losses: dict[str, Tensor] = {}
        maps = self._maps_before(images, strides[0]) if own else images
        for stride in strides:
            inputs = maps
            if stride != FIRST:
                before = STRIDES[STRIDES.index(stride) - 1]
                inputs = self._target(theirs[before], before)
                if own:
                    chance = torch.rand(
                        len(images), 1, 1, 1, device=images.device, generator=draw
                    )
                    inputs = torch.where(chance < own, maps.float(), inputs)
            inputs = inputs.contiguous(memory_format=torch.channels_last)
            with self.engine.autocast():
                maps = self.mine.run(stride, inputs)
            if stride != LAST:
                wrong = (maps.float() - self._target(theirs[stride], stride)).square()
                used = self.theirs.channels[stride]
                losses[str(stride)] = wrong[:, :used].mean()
                if used < wrong.shape[1]:
                    losses[str(stride)] += SPARE * wrong[:, used:].mean()
            else:
                losses |= self._last_losses(maps, theirs[stride], features)
        return losses

    @torch.no_grad()
    def _maps_before(self, images: Tensor, stride: int) -> Tensor:
        """What the student's own stages give to that one; images to the first one."""
        maps = images
        with self.engine.autocast():
            for before in STRIDES[: STRIDES.index(stride)]:
                maps = self.mine.run(before, maps)
        return maps

    def _last_losses(
        self, maps: Tensor, theirs: Tensor, features: Tensor
    ) -> dict[str, Tensor]:
        """Of the last stage: its map, and the embedding of each cell and of all."""
        with self.engine.autocast():
            hint = self.hint(maps).float()
            cells = projected(self.mine.rest(maps), self.net.encoder.projection)
            wanted = projected(features, self.teacher.encoder.projection)
        embedding, target = cells.mean((2, 3)), wanted.mean((2, 3))
        score, right = (self.net.head(one).score for one in (embedding, target))
        return {
            'hint': (hint - self._normalized(theirs, LAST)).square().mean(),
            'cells': distance(cells, wanted, (0, 2, 3)),
            'embedding': distance(embedding, target, (0,)),
            'score': SCORE * F.mse_loss(score, right),
        }

    @torch.no_grad()
    def validate(self, part: Part) -> dict[str, float]:
        """The losses on held-out photographs, at the student's own size."""
        self.net.eval()
        held_out = self.store.held_out
        rows = held_out[:: max(1, len(held_out) // VALIDATED)][:VALIDATED]
        draw = torch.Generator(self.device).manual_seed(self.seed)
        sums: dict[str, float] = {}
        for some in rows.split(BATCH_TO_VALIDATE):
            images = in_unit_range(self.store.photographs[some])
            images = self._prepared(resized(images, self.size))
            losses = self._losses(images, part.stages, part.own[1], draw)
            for key, loss in losses.items():
                share = len(some) / len(rows)
                sums[key] = sums.get(key, 0.0) + share * float(loss)
        return rounded(sums)


def projected(features: Tensor, projection: Any) -> Tensor:
    """Features (N, C, H, W) -> the embedding of each cell, (N, D, H, W)."""
    weight = projection.weight[:, :, None, None]
    return F.conv2d(features, weight.to(features), projection.bias.to(features)).float()


def distance(mine: Tensor, theirs: Tensor, over: tuple[int, ...]) -> Tensor:
    """Mean squared distance, in variances of the other: a scalar."""
    spread = (theirs - theirs.mean(over, keepdim=True)).square().mean()
    return (mine - theirs).square().mean() / spread.clamp(min=1e-12)


def take_encoder(network: Any, path: str) -> None:
    """The encoder's tensors of a weight file, whatever its projection and readout.

    Raises:
        ValueError: if they are of another encoder.
    """
    tensors = read_weights(path).tensors
    mine, theirs = (
        {k: v for k, v in some.items() if k.startswith('encoder.backbone.')}
        for some in (network.state_dict(), tensors)
    )
    if {k: v.shape for k, v in mine.items()} != {k: v.shape for k, v in theirs.items()}:
        raise ValueError(
            f'`path: pretrain_network`: {path} is not of an encoder '
            f'{network.config["encoder"]}.'
        )
    network.load_state_dict(theirs, strict=False)


def part_of(options: Any, largest: int) -> Part:
    """One of `train: parts`.

    Args:
        options: as the file has it.
        largest: side of the squares that the student scores, in pixels.

    Raises:
        ValueError: if a word is missing, unknown or has a value that isn't allowed.
    """
    words = [name for name in Part._fields if name not in Part._field_defaults]
    given = set(options) if isinstance(options, dict) else set()
    if set(words) - given or given - set(Part._fields):
        raise ValueError(
            f'`train: parts` must each have {", ".join(words)}, and may have '
            f'{", ".join(Part._field_defaults)}; got {options!r}.'
        )
    part = Part(**options)
    if isinstance(part.weights, dict):
        part = part._replace(weights={str(k): v for k, v in part.weights.items()})
    stages = list(part.stages)
    losses = [str(stride) for stride in stages if stride != LAST]
    losses += ['hint', 'cells', 'embedding', 'score'] if LAST in stages else []
    first = STRIDES.index(stages[0]) if stages and stages[0] in STRIDES else 0
    allowed = {
        'stages': (
            f'neighbours among {list(STRIDES)}',
            stages and stages == list(STRIDES[first : first + len(stages)]),
        ),
        'sizes': (
            f'multiples of {LAST}, at most `network: input_size` ({largest})',
            part.sizes
            and all(0 < size <= largest and size % LAST == 0 for size in part.sizes),
        ),
        'steps': ('at least 1', part.steps >= 1),
        'lr': ('above 0', part.lr > 0),
        'photographs': ('at least 2', part.photographs >= 2),
        'copies': ('0 to `photographs`', 0 <= part.copies <= part.photographs),
        'mixed': ('at least 0', part.mixed >= 0),
        'weights': (
            f'numbers of at least 0 for losses of this part ({", ".join(losses)})',
            isinstance(part.weights, dict)
            and set(part.weights) <= set(losses)
            and all(
                isinstance(weight, (int, float)) and weight >= 0
                for weight in part.weights.values()
            ),
        ),
        'own': (
            'two shares in [0, 1]',
            len(part.own) == 2 and all(0 <= share <= 1 for share in part.own),
        ),
    }
    for word, (needed, fits) in allowed.items():
        if not fits:
            raise ValueError(
                f'`train: parts: {word}` must be {needed}, but got '
                f'{getattr(part, word)!r}.'
            )
    return part


def check_channels(mine: Stages, theirs: Stages) -> None:
    """Raises: ValueError if a stage of the student can't hold the teacher's map."""
    for stride in STRIDES[:-1]:
        if mine.channels[stride] < theirs.channels[stride]:
            raise ValueError(
                f'The student has {mine.channels[stride]} channels at {stride} pixels '
                f'a cell, fewer than the teacher, which has {theirs.channels[stride]}: '
                'take another teacher.'
            )


def rounded(values: dict[str, float]) -> dict[str, float]:
    return {key: round(value, 4) for key, value in values.items()}


def main() -> None:
    resident_run.train_all(resident_run.parser(__doc__).parse_args(), Training)


if __name__ == '__main__':
    main()
