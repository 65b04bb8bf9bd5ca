"""What a fit will do: its split and option files, before any training."""

from __future__ import annotations

import argparse
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import torch
import yaml

from pyiqa_clipkd.encoders import OPEN_CLIP
from pyiqa_clipkd.fit.checks import (
    NEW_TEACHER,
    SPLIT,
    check_arguments,
    check_name_is_free,
    check_teacher,
    make_split,
)
from pyiqa_clipkd.fit.starts import (
    PUBLISHED,
    Start,
    find_start,
    imagenet_weights,
)
from pyiqa_clipkd.locations import find_weights
from pyiqa_clipkd.names import HIGHEST, LOWEST, PREFIX
from pyiqa_clipkd.options import encoder_word, load_options

TEACHER = 'timm:efficientnet_lite2'  # where no CLIP is at hand
CHECKPOINTS = 5


class Stage(NamedTuple):
    """One training: its option file, and the folder that it writes to."""

    file: Path
    experiment: Path

    @property
    def checkpoint(self) -> Path:
        """Of the last iteration: none is chosen on the held-out side."""
        return self.experiment / 'models' / 'net_latest.pth'


@dataclass
class Plan:
    """A fit whose arguments and data are right.

    Attributes:
        args: of the command, `mos_range` filled in.
        metric: the name that it will have.
        start: where the student begins.
        split: columns img_name, mos, group and the side.
        teacher: its weights, or `None`.
        stages: one training, or the teacher's and the student's.
        options: the content of their option files.
    """

    args: argparse.Namespace
    metric: str
    start: Start
    split: pd.DataFrame
    teacher: Path | None = None
    stages: list[Stage] = field(default_factory=list)
    options: list[dict[str, Any]] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return Path(self.args.output, self.args.name)

    @property
    def held_out(self) -> pd.DataFrame:
        return self.split[self.split[SPLIT] == 'val']

    @property
    def to_train(self) -> int:
        return len(self.split) - len(self.held_out)

    @property
    def labels(self) -> np.ndarray:
        """(N,) scores of the held-out photographs in [1, 5], higher is better."""
        low, high = self.args.mos_range
        share = (self.held_out['mos'].to_numpy(dtype=float) - low) / (high - low)
        share = 1 - share if self.args.lower_better else share
        return LOWEST + (HIGHEST - LOWEST) * share


def make_plan(args: argparse.Namespace, configs: Path) -> Plan:
    """Check everything, decode every photograph, plan the trainings. Writes nothing.

    Args:
        args: of the command.
        configs: folder of the shipped option files.

    Raises:
        FileNotFoundError: if a file that an argument names isn't there.
        ValueError: if an argument or the table is wrong, or the name is taken.
    """
    check_arguments(args)
    metric = f'{PREFIX}{encoder_word(args.student)}-{args.name}'
    check_name_is_free(args, metric)
    if args.teacher not in (None, NEW_TEACHER):
        check_teacher(args.teacher)
    start = find_start(
        args.student, args.start or ('imagenet' if args.teacher else PUBLISHED)
    )
    new_teacher = teacher_network() if args.teacher == NEW_TEACHER else None
    plan = Plan(args, metric, start, make_split(args))
    if new_teacher:
        clip = new_teacher['encoder'].startswith(OPEN_CLIP)
        size = 224 if clip else args.input_size or 224
        own = {'network': {**new_teacher, 'input_size': size}, 'data': _images(size)}
        _add_stage(plan, configs, 'teacher_clip' if clip else 'teacher', own)
        plan.teacher = plan.stages[0].checkpoint
    elif args.teacher:
        plan.teacher = Path(args.teacher)
    size = args.input_size or start.input_size
    network = {'encoder': args.student, 'input_size': size}
    own = {'network': network, 'data': _images(size)}
    if start.path:
        network['encoder_weights'] = None
        own['path'] = {'pretrain_network': str(start.path)}
    else:
        network['encoder_weights'] = start.encoder_weights
        network['temperature'] = 0.05  # until a teacher says another
    if plan.teacher:
        own['teacher'] = {'weights': str(plan.teacher)}
        _add_stage(plan, configs, 'distill', own)
    else:
        _add_stage(plan, configs, 'finetune' if start.path else 'student', own)
    return plan


def teacher_network() -> dict[str, Any]:
    """CLIP where its weights are in the weights folder, else a timm network.

    Raises:
        ValueError: if it has to be a timm network whose weights can't be had.
    """
    if clip := find_weights('clipkd_zeroshot'):
        return {'encoder': 'open_clip:ViT-B-32-quickgelu', 'pretrained': str(clip)}
    weights = imagenet_weights(TEACHER)
    return {'encoder': TEACHER, 'pretrained': None, 'encoder_weights': weights}


def _images(size: int) -> dict[str, Any]:
    resize = {'size': size, 'interpolation': 3}
    return {'augment': {'resize': resize, 'center_crop': size}}


def _add_stage(plan: Plan, configs: Path, recipe: str, own: dict[str, Any]) -> None:
    """The option file of one training: a shipped recipe, and what is of this fit."""
    args = plan.args
    base = configs.resolve() / '_base_' / f'fit_{recipe}.yml'
    # The loader drops a short batch, and takes one for each GPU at once.
    gpus = max(1, torch.cuda.device_count())
    batch = max(1, min(args.batch_size, plan.to_train // gpus))
    epochs = args.epochs or load_options(base, ['name=-'])['train']['total_epoch']
    iterations = epochs * (plan.to_train // (batch * gpus))
    data = {
        'name': args.name,
        'dataroot_target': str(args.images),
        'meta_info_file': str(plan.folder / 'split.csv'),
        'mos_range': args.mos_range,
        'lower_better': args.lower_better,
        'batch_size_per_gpu': batch,
        'num_worker_per_gpu': args.workers,
    }
    if base.is_relative_to(Path.cwd()):
        base = Path(os.path.relpath(base, plan.folder))
    teacher = recipe.startswith('teacher')
    word = 'teacher' if teacher else encoder_word(args.student)
    options = {
        '_base_': [base.as_posix()],
        'name': f'fit_{word}_{args.name}',
        'manual_seed': args.seed,
        **own,
        'data': {**data, **own['data']},
        'train': {'total_epoch': epochs},
        'logger': {'save_checkpoint_freq': max(1, iterations // CHECKPOINTS)},
    }
    file = plan.folder / ('teacher.yml' if teacher else 'train.yml')
    plan.options.append(options)
    plan.stages.append(Stage(file, Path('experiments', str(options['name']))))


def write(plan: Plan) -> None:
    """Write split and option files. On a resume they must be what is there.

    Raises:
        ValueError: if a resumed fit was begun with other arguments or data.
    """
    texts = {'split.csv': plan.split.to_csv(index=False)}
    for stage, options in zip(plan.stages, plan.options, strict=True):
        text = yaml.safe_dump(options, sort_keys=False, allow_unicode=True)
        texts[stage.file.name] = f'# {plan.args.command}\n{text}'
    if plan.folder.exists():
        for name, text in texts.items():
            file = plan.folder / name
            there = file.read_text(encoding='utf-8') if file.is_file() else ''
            if _without_comment(there) != _without_comment(text):
                raise ValueError(
                    '`--resume` needs the command and the data that the fit was begun '
                    f'with, but {file} would change.'
                )
        return
    for stage in plan.stages:
        if stage.experiment.exists():
            raise ValueError(
                f'{stage.experiment} is there already, of a fit with another '
                '`--output` or one that was removed: take another `--name`, or remove '
                'the folder.'
            )
    partial = plan.folder.with_name(f'.{plan.folder.name}.part')
    partial.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (partial / name).write_text(text, encoding='utf-8')
    partial.rename(plan.folder)


def _without_comment(text: str) -> str:
    return re.sub(r'\A#.*\n', '', text)
