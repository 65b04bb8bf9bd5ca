"""The recipes of a data set: one option file a stage, and the hash of what they say."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyiqa_clipkd.options import load_options

ZEROSHOT_FILE = 'stage1_zeroshot.yml'
TEACHER_FILE = 'stage2_teacher.yml'
STUDENT_FILE = 'stage3_student.yml'

# Of the expanded options, and of each data set: what decides no result.
NOT_HASHED = (
    'name',
    'num_gpu',
    'logger',
    'manual_seed',
    'split_num',
    'save_final_results_path',
    'students',
)
NOT_HASHED_OF_DATA = (
    'num_worker_per_gpu',
    'pin_memory',
    'protocol',
    'images',
    'source',
)


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
        """Name of a protocol -> the files behind; the recipe's own, then the others."""
        options = self.options(STUDENT_FILE)
        own = options['datasets']['train'].get('protocol', 'by_image')
        others = [] if self.behind else sorted(self.folder.glob('protocol_*.yml'))
        return {own: ()} | {f.stem.removeprefix('protocol_'): (f,) for f in others}

    def students(self) -> dict[str, str | None]:
        """Encoder -> its `encoder_weights`, as the recipe's `students` says."""
        options = self.options(STUDENT_FILE)
        network = options['network']
        alone = {network['encoder']: network.get('encoder_weights')}
        return options.get('students') or alone

    def files(self, stage: str, behind: Iterable[Path] = ()) -> tuple[Path, ...]:
        return (self.folder / stage, *self.behind, *behind)

    def options(
        self, stage: str, behind: Iterable[Path] = (), overrides: Iterable[str] = ()
    ) -> dict[str, Any]:
        """The expanded options of a stage with more files and overrides behind."""
        files = self.files(stage, behind)
        return load_options(files, [*self.overrides, *overrides])


def config_hash(options: dict[str, Any], teacher: str | None = None) -> str:
    """Eight digits of SHA-256 over what decides a result, but for split and seed.

    Args:
        options: expanded options.
        teacher: hash of the teacher's configuration, in place of its path.
    """
    kept = {key: v for key, v in options.items() if key not in NOT_HASHED}
    kept['path'] = {k: v for k, v in options['path'].items() if k != 'resume_state'}
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
    return short_hash(text)


def short_hash(text: str) -> str:
    """Eight digits of SHA-256, for names."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]
