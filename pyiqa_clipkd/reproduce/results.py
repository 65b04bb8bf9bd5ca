"""Raw results in one CSV, one row a run."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyiqa_clipkd.files import written_whole
from pyiqa_clipkd.reproduce.plan import Run

try:
    import fcntl
except ImportError:  # not a Unix: calls don't take turns
    fcntl = None  # type: ignore[assignment]

RUN = ('protocol', 'student', 'variant', 'split', 'seed')
METRICS = ('plcc', 'srcc')
COLUMNS = (
    'data',
    *RUN,
    *METRICS,
    'teacher_plcc',
    'teacher_srcc',
    'iterations',
    'seconds',
    'commit',
    'config',
    'name',
)
ORDER = ('train_data', 'test_data', 'data', *RUN, 'name')
Row = dict[str, str]


@dataclass(frozen=True)
class RawResults:
    """The table of raw results, which grows run by run.

    Attributes:
        path: the CSV.
        columns: its columns; `name` is the key.
    """

    path: Path
    columns: tuple[str, ...] = COLUMNS

    def read(self) -> dict[str, Row]:
        """Name of a run -> its row; empty where there is no file yet."""
        if not self.path.is_file():
            return {}
        with self.path.open(newline='') as file:
            return {row['name']: row for row in csv.DictReader(file)}

    def write(self, rows: Iterable[Row]) -> None:
        """Write the table whole or not at all, in an order that no time decides."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        in_order = sorted(rows, key=self._place)
        with (
            written_whole(self.path) as partial,
            partial.open('w', newline='') as file,
        ):
            writer = csv.DictWriter(
                file, self.columns, extrasaction='ignore', lineterminator='\n'
            )
            writer.writeheader()
            writer.writerows(in_order)

    def _place(self, row: Row) -> list[tuple[int, int, str]]:
        words = (row[key] for key in ORDER if key in row)
        return [(0, int(w), '') if w.isdigit() else (1, 0, w) for w in words]

    def collect(self, run: Run, seconds: float | None = None) -> bool:
        """Add the run's row if the run has finished.

        Args:
            seconds: how long it took, where it doesn't say so itself.
        """
        with self._alone():
            rows = self.read()
            row = self.row(run, rows, seconds)
            if row is not None:
                rows[run.name] = row
                self.write(rows.values())
        return row is not None

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Calls that write to the same table take turns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_name(f'.{self.path.name}.lock').open('w') as file:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def row(self, run: Run, rows: dict[str, Row], seconds: float | None) -> Row | None:
        """What `collect` adds to `rows`."""
        teacher = None
        if run.teacher:
            teacher = rows.get(run.teacher.name) or finished_row(run.teacher)
        return finished_row(run, teacher, seconds)


def finished_row(
    run: Run, teacher: Row | None = None, seconds: float | None = None
) -> Row | None:
    """The row of a run from what it left on disk; `None` if it isn't finished."""
    if run.is_test:
        record = _read(run.folder / f'{run.data}.json')
        values, ran = record, 0
    else:
        record = _read(run.folder / 'run.json') if run.weights.is_file() else None
        best = next(iter(record['results'].values())) if record else {}
        values = {metric: result['val'] for metric, result in best.items()}
        ran = best['srcc']['iter'] if best else 0
    if not record or not values:
        return None
    seconds = record.get('seconds', seconds)
    return {
        'data': run.data,
        'protocol': run.protocol,
        'student': run.student,
        'variant': run.variant,
        'split': run.split,
        'seed': str(run.seed),
        'plcc': f'{float(values["plcc"]):.4f}',
        'srcc': f'{float(values["srcc"]):.4f}',
        'teacher_plcc': teacher['plcc'] if teacher else '',
        'teacher_srcc': teacher['srcc'] if teacher else '',
        'iterations': str(ran),
        'seconds': '' if seconds is None else f'{seconds:.0f}',
        'commit': (record.get('commit') or _commit())[:10],
        'config': run.config,
        'name': run.name,
    }


def _read(path: Path) -> dict[str, Any] | None:
    """A JSON file; `None` if it isn't there or only half written."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def _commit() -> str:
    """A test leaves no record: the commit of the checkout as it is now."""
    from pyiqa_clipkd import pipeline

    return pipeline.checkout_commit() or ''
