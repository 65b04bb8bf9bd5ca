"""Which runs a table needs: protocols x splits x students x variants of a recipe.

Nothing is trained here and no data is needed. A run's name ends with the hash of its
configuration, so an edited recipe never mixes with the results of the old one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pyiqa_clipkd.options import encoder_word
from pyiqa_clipkd.reproduce.recipe import (
    STUDENT_FILE,
    TEACHER_FILE,
    ZEROSHOT_FILE,
    Recipe,
    config_hash,
)

ZEROSHOT, TEACHER, OURS = 'zeroshot', 'teacher', 'ours'
VARIANTS = ('regression', 'hard', 'soft', 'fixed_0.5', 'fixed_0.9', OURS, 'ridge')
# What may beat the paper's recipe, each beside `ridge` with the same budget.
TRIALS = (
    'ridge',
    'ridge_plcc',
    'ridge_ranking',
    'ridge_ema',
    'ridge_views',
    'ridge_hints',
)
OFFICIAL = 'official'


@dataclass(frozen=True)
class Run:
    """One training, or one test of a network, in a process of its own.

    Attributes:
        config: hash of the configuration, without split and seed.
        files: option files.
        options: what the files and overrides expand to.
        teacher: the run that must be finished before.
    """

    data: str
    protocol: str
    student: str
    variant: str
    config: str
    files: tuple[Path, ...]
    overrides: tuple[str, ...]
    options: dict[str, Any] = field(compare=False, repr=False)
    teacher: Run | None = None
    split: str = ''
    seed: int = 0
    name: str = ''

    @property
    def is_test(self) -> bool:
        return 'train' not in self.options['datasets']

    @property
    def folder(self) -> Path:
        """Where the host writes the run, below the working directory."""
        return Path('results' if self.is_test else 'experiments', self.name)

    @property
    def weights(self) -> Path:
        """Where the best weights of a training are."""
        return self.folder / 'models' / 'net_best.pth'

    def arguments(self) -> list[str]:
        """What follows `scripts/train.py` or `scripts/test.py`."""
        resume = [] if self.is_test else ['--auto_resume']
        files = [str(file) for file in self.files]
        return ['-opt', *files, '--force_yml', *self.overrides, *resume]

    def turn(self, split: int | None, seed: int, teacher: Run | None) -> Run:
        """The same with another split (`None`: the options fix it), seed, teacher."""
        word = OFFICIAL if split is None else f'{split:02d}'
        encoder = encoder_word(self.student)
        what = [self.data, self.protocol, encoder, self.variant]
        name = '_'.join([*what, f'split{word}', f'seed{seed}', self.config])
        options = copy.deepcopy(self.options) | {'name': name, 'manual_seed': seed}
        overrides = [f'name={name}', f'manual_seed={seed}']
        if split is not None:
            for phase, data in options['datasets'].items():
                overrides.append(f'datasets:{phase}:split_index={split}')
                data['split_index'] = split
        if teacher is not None:
            overrides.append(f'teacher:weights={teacher.weights.as_posix()}')
            options['teacher']['weights'] = teacher.weights.as_posix()
        return replace(
            self,
            name=name,
            split=word.lstrip('0'),
            seed=seed,
            overrides=(*self.overrides, *overrides),
            options=options,
            teacher=teacher,
        )


def expand(
    recipe: Recipe,
    *,
    variants: Sequence[Path],
    students: Sequence[str] = (),
    protocols: Sequence[str] = (),
    splits: Sequence[int] = (1,),
    seeds: Sequence[int] = (123,),
    zeroshot: bool = False,
) -> list[Run]:
    """All runs of one data set, split by split, each teacher before its students.

    Args:
        variants: option files that make the variants, named as they are.
        students: encoders; none: all that the recipe lists.
        protocols: names; none: all that there are.
        splits: numbers of columns; a protocol with a fixed split has only that one.
        zeroshot: also test the untrained network, where the recipe has one.

    Raises:
        ValueError: if the recipe has no such protocol or student.
    """
    weights = recipe.students()
    student_file = recipe.folder / STUDENT_FILE
    check_names('student', students, weights, f'`students` of {student_file}')
    there = recipe.protocols()
    check_names('protocol', protocols, there, str(recipe.folder))
    runs = []
    for protocol in protocols or there:
        behind = there[protocol]
        teacher = _template(recipe, TEACHER_FILE, TEACHER, protocol, behind)
        first = [teacher]
        if zeroshot and (recipe.folder / ZEROSHOT_FILE).is_file():
            zero = _template(recipe, ZEROSHOT_FILE, ZEROSHOT, protocol, behind)
            first.insert(0, zero)
        others = [
            _template(
                recipe,
                STUDENT_FILE,
                variant.stem,
                protocol,
                (variant, *behind),
                overrides=(
                    f'network:encoder={student}',
                    f'network:encoder_weights={weights[student] or "~"}',
                ),
                teacher=teacher,
            )
            for student in students or weights
            for variant in variants
        ]
        for split, seed in _turns(teacher.options, splits, seeds):
            done = [one.turn(split, seed, None) for one in first]
            of_this_turn = {None: None, teacher: done[-1]}
            runs += done
            runs += [one.turn(split, seed, of_this_turn[one.teacher]) for one in others]
    return runs


def check_names(
    what: str, given: Sequence[str], allowed: Iterable[str], where: str
) -> None:
    """Raise a ValueError for a name that isn't allowed."""
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
    index = options['datasets']['train'].get('split_index')
    for split in splits if isinstance(index, int) else (None,):
        for seed in seeds:
            yield split, seed


def _template(
    recipe: Recipe,
    stage: str,
    variant: str,
    protocol: str,
    behind: tuple[Path, ...],
    *,
    overrides: tuple[str, ...] = (),
    teacher: Run | None = None,
) -> Run:
    """A run without split and seed."""
    options = recipe.options(stage, behind, overrides)
    if not options.get('teacher'):
        teacher = None
    return Run(
        data=next(iter(options['datasets'].values()))['name'],
        protocol=protocol,
        student=options['network']['encoder'],
        variant=variant,
        config=config_hash(options, teacher.config if teacher else None),
        files=recipe.files(stage, behind),
        overrides=(*recipe.overrides, *overrides),
        options=options,
        teacher=teacher,
    )
