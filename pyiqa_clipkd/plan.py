"""Which runs a table needs: recipes x protocols x students x variants x splits.

Nothing is trained here and no data is needed. A run's name ends with the hash of its
configuration, so an edited recipe never mixes with the results of the old one.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from pyiqa_clipkd.options import load_options

ZEROSHOT, TEACHER, STUDENT = 'stage1_zeroshot.yml', 'stage2_teacher.yml', 'stage3_student.yml'
VARIANTS = 'regression', 'hard', 'soft', 'fixed_0.5', 'fixed_0.9', 'ours', 'ridge'
OFFICIAL = 'official'

# Of the expanded options: what says nothing about the result, at the top, of a data set.
NOT_HASHED = {
    'name', 'num_gpu', 'logger', 'manual_seed', 'split_num', 'save_final_results_path',
    'students',
}  # fmt: skip
NOT_HASHED_OF_DATA = {
    'num_worker_per_gpu', 'pin_memory', 'protocol', 'images', 'source',
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """A folder with one option file a stage, and what stands behind each of them.

    Attributes:
        folder: has `stage2_teacher.yml`, `stage3_student.yml`, perhaps
            `stage1_zeroshot.yml` and `protocol_*.yml`.
        behind: option files that follow the recipe: one's own data.
        overrides: `key:key=value` for every run.
    """

    folder: Path
    behind: tuple[Path, ...] = ()
    overrides: tuple[str, ...] = ()

    def protocols(self) -> dict[str, tuple[Path, ...]]:
        """Name of a protocol -> the files that it puts behind; the recipe's own first."""
        own = self.options(STUDENT)['datasets']['train'].get('protocol', 'by_image')
        return {own: ()} | {
            file.stem.removeprefix('protocol_'): (file,)
            for file in sorted(self.folder.glob('protocol_*.yml'))
            if not self.behind
        }

    def options(
        self, stage: str, files: Iterable[Path] = (), overrides: Iterable[str] = ()
    ) -> dict[str, Any]:
        """The expanded options of a stage with more files and overrides behind."""
        paths = [self.folder / stage, *self.behind, *files]
        return load_options(paths, [*self.overrides, *overrides])

    def students(self) -> dict[str, str | None]:
        """Encoder -> its `encoder_weights`, as the recipe's `students` says."""
        options = self.options(STUDENT)
        network = options['network']
        return options.get('students') or {
            network['encoder']: network.get('encoder_weights')
        }


@dataclass(frozen=True)
class Run:
    """One training (or one test, of the zero-shot network) in a process of its own."""

    name: str
    data: str
    protocol: str
    student: str
    variant: str
    split: str
    seed: int
    config: str
    files: tuple[Path, ...]
    overrides: tuple[str, ...]
    options: dict[str, Any] = field(compare=False, repr=False)
    teacher: Run | None = None

    @property
    def is_test(self) -> bool:
        return 'train' not in self.options['datasets']

    @property
    def folder(self) -> Path:
        """Where the host writes the run, below the working directory."""
        return Path('results' if self.is_test else 'experiments', self.name)

    @property
    def weights(self) -> Path:
        return self.folder / 'models' / 'net_best.pth'

    def missing_data(self) -> list[str]:
        """Paths of the data sets that aren't there."""
        data = self.options['datasets'].values()
        keys = 'meta_info_file', 'dataroot_target', 'dataroot_ref'
        paths = dict.fromkeys(str(d[key]) for d in data for key in keys if d.get(key))
        return [path for path in paths if not Path(path).exists()]

    def arguments(self) -> list[str]:
        """What follows `scripts/train.py` (or `test.py`)."""
        resume = [] if self.is_test else ['--auto_resume']
        files = [str(file) for file in self.files]
        return ['-opt', *files, '--force_yml', *self.overrides, *resume]


def expand(
    recipe: Recipe,
    *,
    variants: Sequence[str],
    variant_folder: Path,
    students: Sequence[str] = (),
    protocols: Sequence[str] = (),
    splits: Sequence[int] = (1,),
    seeds: Sequence[int] = (123,),
    zeroshot: bool = False,
) -> list[Run]:
    """All runs of one data set, split by split, each teacher before its students.

    Args:
        variants: names of files in `variant_folder`.
        students: encoders; none: all that the recipe lists.
        protocols: names; none: all that there are.
        splits: numbers of columns; a protocol with a fixed split has only that one.
        zeroshot: also test the untrained network, where the recipe has one.

    Raises:
        ValueError: if the recipe has no such protocol or student, if there is no such
            variant.
    """
    table = recipe.students()
    _check('student', students, table, f'`students` of {recipe.folder / STUDENT}')
    there = recipe.protocols()
    _check('protocol', protocols, there, str(recipe.folder))
    shipped = sorted(file.stem for file in variant_folder.glob('*.yml'))
    _check('variant', variants, shipped, str(variant_folder))
    runs = []
    for protocol in protocols or there:
        own = there[protocol]
        builder = _Builder(recipe, protocol, own)
        stages = [builder.stage(TEACHER, 'teacher')]
        if zeroshot and (recipe.folder / ZEROSHOT).is_file():
            stages.insert(0, builder.stage(ZEROSHOT, 'zeroshot'))
        for student in students or table:
            for variant in variants:
                file = variant_folder / f'{variant}.yml'
                stages.append(builder.student(student, table[student], file, stages))
        for split, seed in _turns(stages[0].options, splits, seeds):
            done: list[Run] = []
            for stage in stages:
                done.append(stage.run(split, seed, done))
            runs += done
    return runs


def _check(what: str, given: Sequence[str], allowed: Iterable[str], where: str) -> None:
    for name in given:
        if name not in allowed:
            raise ValueError(
                f'A {what} must be one of {", ".join(allowed)} ({where}), but got '
                f'{name!r}.'
            )


def _turns(
    options: dict[str, Any], splits: Sequence[int], seeds: Sequence[int]
) -> Iterator[tuple[int | None, int]]:
    """(split, seed); `None` where the options fix the split by a column's name."""
    index = next(iter(options['datasets'].values())).get('split_index')
    for split in splits if isinstance(index, int) else (None,):
        for seed in seeds:
            yield split, seed


@dataclass(frozen=True)
class _Stage:
    """A run but for its split and seed."""

    variant: str
    data: str
    protocol: str
    student: str
    files: tuple[Path, ...]
    overrides: tuple[str, ...]
    options: dict[str, Any]
    config: str

    def run(self, split: int | None, seed: int, done: Sequence[Run]) -> Run:
        number = OFFICIAL if split is None else f'{split:02d}'
        encoder = re.sub(r'[^\w.-]+', '-', self.student.split(':')[-1])
        name = '_'.join(
            [self.data, self.protocol, encoder, self.variant]
            + [f'split{number}', f'seed{seed}', self.config]
        )
        options = json.loads(json.dumps(self.options)) | {'manual_seed': seed}
        overrides = [*self.overrides, f'name={name}', f'manual_seed={seed}']
        if split is not None:
            overrides.append(f'data:split_index={split}')
            for data in options['datasets'].values():
                data['split_index'] = split
        teacher = None
        if options.get('teacher'):
            teacher = next(run for run in done if run.variant == 'teacher')
            overrides.append(f'teacher:weights={teacher.weights.as_posix()}')
        return Run(
            name=name,
            data=self.data,
            protocol=self.protocol,
            student=self.student,
            variant=self.variant,
            split=number.lstrip('0'),
            seed=seed,
            config=self.config,
            files=self.files,
            overrides=tuple(overrides),
            options=options,
            teacher=teacher,
        )


@dataclass(frozen=True)
class _Builder:
    """The stages of one recipe under one protocol."""

    recipe: Recipe
    protocol: str
    own: tuple[Path, ...]

    def stage(
        self,
        file: str,
        variant: str,
        behind: tuple[Path, ...] = (),
        overrides: tuple[str, ...] = (),
        teacher: str | None = None,
    ) -> _Stage:
        options = self.recipe.options(file, [*behind, *self.own], overrides)
        data = next(iter(options['datasets'].values()))
        return _Stage(
            variant=variant,
            data=data['name'],
            protocol=self.protocol,
            student=options['network']['encoder'],
            files=(
                self.recipe.folder / file,
                *self.recipe.behind,
                *behind,
                *self.own,
            ),
            overrides=(*self.recipe.overrides, *overrides),
            options=options,
            config=config_hash(options, teacher),
        )

    def student(
        self, encoder: str, weights: str | None, file: Path, stages: Sequence[_Stage]
    ) -> _Stage:
        teacher = next(s.config for s in stages if s.variant == 'teacher')
        overrides = (
            f'network:encoder={encoder}',
            f'network:encoder_weights={weights or "~"}',
        )
        return self.stage(STUDENT, file.stem, (file,), overrides, teacher)


def config_hash(options: dict[str, Any], teacher: str | None = None) -> str:
    """Eight digits of SHA-256 over what decides a result, but for split and seed.

    Args:
        options: expanded options.
        teacher: hash of the teacher's configuration, in place of its path.
    """
    kept = {key: v for key, v in options.items() if key not in NOT_HASHED}
    kept['path'] = {k: v for k, v in kept['path'].items() if k != 'resume_state'}
    kept['datasets'] = {
        phase: {
            key: value
            for key, value in data.items()
            if key not in NOT_HASHED_OF_DATA
            and not (key == 'split_index' and isinstance(value, int))
        }
        for phase, data in options['datasets'].items()
    }
    if options.get('teacher'):
        rest = {k: v for k, v in options['teacher'].items() if k != 'cache'}
        kept['teacher'] = rest | {'weights': teacher}
    text = json.dumps(kept, sort_keys=True, separators=(',', ':'))
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def iterations(options: dict[str, Any]) -> int:
    """How many iterations a training will run; 0 for a test.

    The images are counted in the data, or taken from the recipe's `images`.
    """
    if 'train' not in options['datasets']:
        return 0
    data, train = options['datasets']['train'], options['train']
    images = _training_images(data) * data.get('dataset_enlarge_ratio', 1)
    batch = data['batch_size_per_gpu']
    planned, loaded = math.ceil(images / batch), images // batch
    if train.get('total_epoch') is None:
        total = int(train['total_iter'])
    else:
        total = int(train['total_epoch']) * planned
    # The host's loader drops the last short batch, and its loop adds an epoch.
    return min(total, (math.ceil(total / planned) + 1) * loaded)


def _training_images(data: dict[str, Any]) -> int:
    if not Path(data['meta_info_file']).is_file():
        return round(0.8 * data.get('images', 0)) or data['batch_size_per_gpu']
    table = pd.read_csv(data['meta_info_file'])
    index = data.get('split_index')
    if index is None:
        return len(table)
    ratio = data.get('split_ratio', '802')
    column = f'ratio{ratio}_seed123_split_{index:02d}' if isinstance(index, int) else index
    return int((table[column] == data.get('override_phase', 'train')).sum())
