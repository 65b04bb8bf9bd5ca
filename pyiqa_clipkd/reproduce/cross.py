"""Networks trained on one data set, tested on the whole of another."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from pyiqa_clipkd.options import without_weights
from pyiqa_clipkd.reproduce.plan import Run
from pyiqa_clipkd.reproduce.recipe import STUDENT_FILE, Recipe, short_hash
from pyiqa_clipkd.reproduce.report import METRICS, spread, table
from pyiqa_clipkd.reproduce.results import RUN, RawResults, Row, finished_row

COLUMNS = ('train_data', 'test_data', *RUN, *METRICS, 'config', 'name')
# Options of a data set that belong to the network, not to the data.
OF_THE_NETWORK = ('augment', 'batch_size_per_gpu', 'num_worker_per_gpu', 'pin_memory')


@dataclass(frozen=True)
class CrossRun(Run):
    """A test of a trained network on another data set."""

    trained: Run | None = field(default=None)


class CrossResults(RawResults):
    """One row a pair of trained network and test set."""

    def row(self, run: Run, rows: dict[str, Row], seconds: float | None) -> Row | None:
        row = finished_row(run, None, seconds)
        if row is None or not isinstance(run, CrossRun) or run.trained is None:
            return None
        return row | {'train_data': run.trained.data, 'test_data': run.data}


def cross_run(trained: Run, recipe: Recipe, split: int | None, folder: Path) -> Run:
    """Plan the test of one trained network.

    Args:
        trained: a finished training.
        recipe: of the data set to test on.
        split: its held-out side to test on; `None`: all of its images.
        folder: where the option file is to be.
    """
    own = trained.options['datasets']['val']
    other = recipe.options(STUDENT_FILE)['datasets']['val']
    kept = {key: own[key] for key in OF_THE_NETWORK if key in own}
    data = {**other, **kept, 'split_index': split}
    name = f'{trained.name}_on_{data["name"]}'
    if split is not None:
        name += f'_split{split:02d}'
    else:
        data.pop('override_phase', None)
    # Another label range or table is another test.
    name += f'_{short_hash(json.dumps(data, sort_keys=True))}'
    options = copy.deepcopy(
        {key: trained.options[key] for key in ('model_type', 'num_gpu', 'val')}
    )
    options |= {
        'name': name,
        'manual_seed': trained.seed,
        'network': without_weights(trained.options['network']),
        'datasets': {'test_1': data},
        'path': {'pretrain_network': trained.weights.as_posix(), 'strict_load': True},
    }
    return CrossRun(
        data=data['name'],
        protocol=trained.protocol,
        student=trained.student,
        variant=trained.variant,
        config=trained.config,
        files=(folder / f'{name}.yml',),
        overrides=(f'name={name}',),
        options=options,
        split=trained.split,
        seed=trained.seed,
        name=name,
        trained=trained,
    )


def write_option_file(run: Run) -> None:
    """The file that `scripts/test.py` reads."""
    run.files[0].parent.mkdir(parents=True, exist_ok=True)
    run.files[0].write_text(yaml.safe_dump(run.options, sort_keys=False))


def cross_markdown(rows: Iterable[Row]) -> str:
    """One line a pair of data sets and network."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    keys = COLUMNS[:5]
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    lines: list[Sequence[str]] = [
        [
            *key,
            str(len(group)),
            *(spread([float(r[m]) for r in group]) for m in METRICS),
        ]
        for key, group in sorted(groups.items())
    ]
    header = ['trained on', 'tested on', *keys[2:], 'runs', 'PLCC', 'SRCC']
    return (
        '# Trained on one data set, tested on another\n\nMedian over the networks '
        f'[lowest to highest]. The raw rows are in raw.csv.\n\n{table(header, lines)}\n'
    )
