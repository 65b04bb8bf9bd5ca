"""Runs to compare: result files as they are, folders scored now, in the same way."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pyiqa_clipkd.compare.runs import Run, make_run, read_run
from pyiqa_clipkd.names import DEFAULT_METRIC
from pyiqa_clipkd.scoring.tables import is_folder_of_parts


def read_or_score(paths: Sequence[Path], arguments: argparse.Namespace) -> list[Run]:
    """A run for each path; folders are scored as the result file beside them was.

    Args:
        paths: result files and folders.
        arguments: `metric`, `backend`, `device` and `attributes` of the command.

    Raises:
        ValueError: if attributes are wanted, and a result file has none.
    """
    known = {
        path: read_run(path)
        for path in paths
        if is_folder_of_parts(path) or not path.is_dir()
    }
    if arguments.attributes:
        for path, run in known.items():
            if not run.has_attributes:
                raise ValueError(
                    f'{path} has no attributes: score it again with --attributes.'
                )
    if len(known) < len(set(paths)):
        other = next(iter(known.values()), None)
        folders = dict.fromkeys(path for path in paths if path not in known)
        known |= _score_folders([*folders], other, arguments)
    return [known[path] for path in paths]


def _score_folders(
    folders: Sequence[Path], other: Run | None, arguments: argparse.Namespace
) -> dict[Path, Run]:
    """Score folders, with the metric and options of another run if there is one."""
    from pyiqa_clipkd.scoring.pillow import prepare_pillow

    prepare_pillow()
    import pandas as pd  # type: ignore[import-untyped]

    from pyiqa_clipkd.scoring.backends import create_backend
    from pyiqa_clipkd.scoring.core import score_paths
    from pyiqa_clipkd.scoring.files import find_photographs

    def chosen(name: str, default: str) -> str:
        return next(iter(other.values(name)), default) if other else default

    metric = arguments.metric or chosen('metric', DEFAULT_METRIC)
    # Another metric, with --force, may have no attributes.
    alike = other if other and [metric] == other.values('metric') else None
    attributes = arguments.attributes or (alike is not None and alike.has_attributes)
    backend = create_backend(
        metric,
        kind=arguments.backend or chosen('backend', 'auto'),
        device=arguments.device,
        attributes=attributes,
    )
    crops = int(chosen('crops', '0'))
    runs = {}
    for folder in folders:
        print(f'Scoring {folder} with {backend.metric}.', file=sys.stderr, flush=True)
        rows = list(score_paths(find_photographs([str(folder)]), backend, crops=crops))
        if not rows:
            raise ValueError(f'There are no photographs in {folder}.')
        table = pd.DataFrame(rows, dtype=object)
        runs[folder] = make_run(str(folder), table, str(folder))
    return runs
