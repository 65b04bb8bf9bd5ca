"""Training of what reads an encoder's stages, on features that are computed once.

The encoder stays as it is: its features of the photographs, of moved and of damaged
copies (from what `photograph_store.py` wrote) are computed once and kept beside the
training, kind by kind, so a stopped run goes on. Then the projection and the readout
(`network: stage_readout`) learn from them, which takes a minute: the distance to the
mean opinion scores and to the teachers' scores, and the ranking of damaged copies. For
instance configs/release/readout/resnet18.yml.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import resident_run
import torch
import torch.nn.functional as F
from resident_views import Store, in_unit_range, resized
from torch import Tensor

from pyiqa_clipkd.engine import TrainingEngine
from pyiqa_clipkd.files import file_hash, written_whole
from pyiqa_clipkd.network import (
    QualityNetwork,
    build_from_config,
    load_network,
    load_tensors,
)
from pyiqa_clipkd.options import with_split
from pyiqa_clipkd.stages import statistics
from pyiqa_clipkd.weights import read_weights

LOOK = 16  # photographs at once


class Looks(NamedTuple):
    """What networks saw in N photographs.

    Attributes:
        pooled: (N, C), the student's last features.
        stages: (N, 2 * channels of its stages), their `statistics`.
        targets: (N, 1), the mean of the teachers' scores.
    """

    pooled: Tensor
    stages: Tensor
    targets: Tensor

    def __getitem__(self, rows: Any) -> Looks:  # type: ignore[override]
        return Looks(*(tensor[rows] for tensor in tuple(self)))


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
        self.folder = resident_run.experiment(options)
        torch.manual_seed(options['manual_seed'])
        split = options['datasets']['train']['split_index']
        files = options['teacher']['score_with']
        self.teachers = [
            load_network(with_split(file, split)).to(device) for file in files
        ]
        self.net: Any = build_from_config(dict(options['network']))
        if self.net.encoder.readout is None:
            raise ValueError(
                'train_readout.py needs `network: stage_readout`, a width.'
            )
        self.ranking = resident_run.ranking_loss(options)
        copies = self.train['copies']
        if not 0 < copies <= 1:
            raise ValueError(f'`train: copies` must be in (0, 1], but got {copies}.')
        start = with_split(options['path']['pretrain_network'], split)
        self.start = read_weights(start).tensors
        fill(self.net, self.start, start)
        self.made_of = {
            'start': file_hash(start),
            'teachers': [file_hash(with_split(f, split)) for f in files],
            'input_size': options['network']['input_size'],
            'store': resident_run.made_of(store),
            'copies': copies,
            'mixed_precision': self.train['mixed_precision'],
            'moved': [self.ranking.shift, self.ranking.zoom, options['manual_seed']],
        }
        self.net.to(device).eval()
        self.engine = TrainingEngine(
            {'mixed_precision': self.train['mixed_precision']}, device
        )
        self.draw = np.random.default_rng(options['manual_seed'])

    def run(self) -> dict[str, Any]:
        """Train; returns the record."""
        self.seconds = 0.0  # of the features, whenever they were computed
        photographs, copies = self.looks()
        start = time.time()
        history = self.learn(photographs, copies)
        self.keep(self.train['keep'])
        self.net.encoder.readout.overlook_constant()
        history.append({'epoch': 'end', **self.validate(photographs)})
        return {
            'name': self.options['name'],
            'seconds': round(self.seconds + time.time() - start),
            'copies': len(copies[0].targets),
            'device': self.device.type,
            'torch': torch.__version__,
            'history': history,
            'options': self.options,
        }

    # --- features, once ---------------------------------------------------------------

    def looks(self) -> tuple[Looks, list[Looks]]:
        """Of all photographs, and of the copies: moved, damaged, damaged more."""
        store = self.store
        count = round(self.train['copies'] * len(store.train))

        def moved(rows: slice) -> Tensor:
            whole = in_unit_range(store.photographs[store.train[rows]])
            return torch.stack([self.ranking.moved(one, self.draw) for one in whole])

        kinds: dict[str, tuple[int, Callable[[slice], Tensor]]] = {
            'photographs': (
                len(store.photographs),
                lambda rows: in_unit_range(store.photographs[rows]),
            ),
            'moved': (count, moved),
            'damaged': (count, lambda rows: in_unit_range(store.copies[rows, 0, 0])),
            'worse': (count, lambda rows: in_unit_range(store.copies[rows, 0, 1])),
        }
        all_looks = [self._kept(kind, *what) for kind, what in kinds.items()]
        return all_looks[0], all_looks[1:]

    def _kept(self, kind: str, count: int, images: Callable[[slice], Tensor]) -> Looks:
        """From the file of a run before of the same networks, or computed."""
        file = self.folder / 'looks' / f'{kind}.npz'
        made_of = json.dumps(self.made_of)
        if not file.is_file() or made_of != written_of(file):
            start = time.time()
            parts = [
                self._look(images(slice(first, min(first + LOOK, count))))
                for first in range(0, count, LOOK)
            ]
            whole = {
                name: torch.cat([getattr(part, name) for part in parts]).cpu().numpy()
                for name in Looks._fields
            }
            file.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(file) as unfinished, unfinished.open('wb') as stream:
                np.savez(stream, made_of=made_of, seconds=time.time() - start, **whole)
            print(file, count, f'{time.time() - start:.0f} s', flush=True)
        with np.load(file) as kept:
            self.seconds += float(kept['seconds'])
            return Looks(
                *(
                    torch.from_numpy(kept[name]).to(self.device)
                    for name in Looks._fields
                )
            )

    @torch.inference_mode()
    def _look(self, images: Tensor) -> Looks:
        net, encoder = self.net, self.net.encoder
        pixels = resized(images, net.preprocessing.input_size)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        with self.engine.autocast():
            features, maps = encoder.backbone.forward_intermediates(
                net.preprocessing(pixels)
            )
            pooled = encoder.backbone.forward_head(features)
            scores = [
                teacher(resized(images, teacher.preprocessing.input_size))
                for teacher in self.teachers
            ]
        stages = statistics(encoder.readout.seen(maps))
        return Looks(pooled.float(), stages, torch.stack(scores).mean(0).float())

    # --- training ---------------------------------------------------------------------

    def learn(self, photographs: Looks, copies: list[Looks]) -> list[dict[str, Any]]:
        """Projection and readout; the record of each epoch."""
        store, encoder = self.store, self.net.encoder
        seen = photographs.stages[store.train]
        norm = encoder.readout.norm
        norm.running_mean.copy_(seen.mean(0))
        norm.running_var.copy_(seen.var(0))
        epochs = self.train['epochs']
        size = min(self.train['batch_size'], len(store.train))
        steps = epochs * (len(store.train) // size)
        optimizer = self._optimizer()
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        history = [{'epoch': 0, **self.validate(photographs)}]
        for epoch in range(1, epochs + 1):
            places = torch.randperm(len(store.train), device=self.device)
            sums: dict[str, float] = {}
            for chosen in places.split(size)[: steps // epochs]:
                losses = self._losses(photographs, copies, chosen)
                optimizer.zero_grad()
                torch.stack([*losses.values()]).sum().backward()
                optimizer.step()
                scheduler.step()
                for name, loss in losses.items():
                    sums[name] = sums.get(name, 0) + float(loss.detach())
            means = {k: round(v * epochs / steps, 5) for k, v in sums.items()}
            history.append({'epoch': epoch, **means, **self.validate(photographs)})
            print(self.options['name'], json.dumps(history[-1]), flush=True)
        return history

    @torch.no_grad()
    def keep(self, share: float) -> None:
        """Embeddings lie this share of the way back to those of the start.

        What was learned is known to be good on photographs like these; the start holds
        the order of damage better (Wortsman et al. 2022, of whole networks).
        """
        encoder = self.net.encoder
        for name, tensor in encoder.projection.named_parameters():
            tensor.lerp_(self.start[f'encoder.projection.{name}'].to(tensor), share)
        for tensor in encoder.readout.last.parameters():
            tensor.mul_(1 - share)

    def _optimizer(self) -> torch.optim.Optimizer:
        optim = self.train['optim']
        encoder = self.net.encoder
        slow = optim['lr'] * optim['projection']
        return torch.optim.AdamW(
            [
                {'params': [*encoder.readout.parameters()]},
                {'params': [*encoder.projection.parameters()], 'lr': slow},
            ],
            lr=optim['lr'],
            weight_decay=optim['weight_decay'],
        )

    def _losses(
        self, photographs: Looks, copies: list[Looks], chosen: Tensor
    ) -> dict[str, Tensor]:
        """`chosen` photographs of the train side, and others with their copies."""
        store = self.store
        count, some = len(chosen), len(chosen) // 3
        pairs = torch.randint(len(copies[0].targets), (some,), device=self.device)
        rows = torch.cat([store.train[chosen], store.train[pairs]])
        parts = [photographs[rows], *(kind[pairs] for kind in copies)]
        seen = Looks(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
        score = self.score(seen, self.train['forget'])
        weight = self.train['score_weight']
        hard = F.mse_loss(score[: len(rows)], store.mos[rows])
        levels = store.levels[pairs, 0]
        return {
            'hard': (1 - weight) * hard,
            'score': weight * F.mse_loss(score, seen.targets),
            'ranking': self.ranking(
                score[count : len(rows)], score[len(rows) :], levels
            ),
        }

    def score(self, seen: Looks, forget: float = 0.0) -> Tensor:
        """(N, 1); a share `forget` of the statistics is made what it is in the mean.

        That is dropout, but before the normalization.
        """
        encoder = self.net.encoder
        stages = seen.stages
        if forget:
            mean = encoder.readout.norm.running_mean
            stages = mean + F.dropout(stages - mean, forget)
        embedding = encoder.projection(seen.pooled) + encoder.readout.of_statistics(
            stages
        )
        score: Tensor = self.net.head(embedding).score
        return score

    @torch.no_grad()
    def validate(self, photographs: Looks) -> dict[str, float]:
        """On the held-out side."""
        rows = self.store.held_out
        found = self.score(photographs[rows])[:, 0]
        return resident_run.agreement(found, self.store.mos[rows, 0])

    def save(self) -> Path:
        """Below experiments/, where release.py looks; returns the checkpoint."""
        params = {'params': self.net.state_dict()}
        return resident_run.write_checkpoint(self.options, params)


def fill(network: QualityNetwork, tensors: Mapping[str, Tensor], source: str) -> None:
    """The tensors of a network without a readout into one with.

    Raises:
        ValueError: if they are of another network, or have a readout already.
    """
    if any(name.startswith('encoder.readout.') for name in tensors):
        raise ValueError(f'{source} has a readout already; start from one without.')
    mine = network.state_dict()
    new = {n: x for n, x in mine.items() if n.startswith('encoder.readout.')}
    load_tensors(network, {**tensors, **new}, source)


def written_of(file: Path) -> str:
    """What features were made of."""
    with np.load(file) as kept:
        return str(kept['made_of'])


def main() -> None:
    resident_run.train_all(resident_run.parser(__doc__).parse_args(), Training)


if __name__ == '__main__':
    main()
