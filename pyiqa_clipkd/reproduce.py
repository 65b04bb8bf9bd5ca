"""The paper's tables from the shipped recipes: plan, run, collect."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from pyiqa_clipkd.jobs import Jobs, can_resume
from pyiqa_clipkd.plan import VARIANTS, Recipe, Run, expand, iterations
from pyiqa_clipkd.results import Row, finished_row, read_rows, write_rows


def main(root: Path, argv: Sequence[str] | None = None) -> int:
    """Run a table.

    Args:
        root: the checkout, with `configs` and `scripts`.

    Returns:
        The exit code: 1 where a run failed.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('table', choices=['table1', 'table2'])
    parser.add_argument('--data', nargs='+', required=True)
    parser.add_argument('--students', nargs='+', default=[])
    parser.add_argument('--variants', nargs='+')
    parser.add_argument('--protocol', nargs='+', default=[])
    parser.add_argument('--splits', nargs='+', default=['1-10'])
    parser.add_argument('--seeds', nargs='+', type=int, default=[123])
    parser.add_argument('--jobs', type=int, default=1)
    parser.add_argument('--force_yml', nargs='+', default=[])
    parser.add_argument('-o', '--output', type=Path)
    parser.add_argument('--dry-run', action='store_true')
    args = parser.parse_args(argv)
    configs = root / 'configs'
    variants = args.variants or {'table1': ['ours'], 'table2': VARIANTS}[args.table]
    runs = []
    for data in args.data:
        folder = Path(data) if Path(data).is_dir() else configs / data
        runs += expand(
            Recipe(folder, overrides=tuple(args.force_yml)),
            variants=variants,
            variant_folder=configs / 'variants',
            students=args.students,
            protocols=args.protocol,
            splits=_numbers(args.splits),
            seeds=args.seeds,
            zeroshot=args.table == 'table1',
        )
    output = args.output or Path('results', args.table)
    table = Table(output / 'raw.csv')
    todo = [run for run in runs if not table.has(run)]
    needed = {run.teacher for run in todo}
    todo += [run for run in runs if run in needed and not run.weights.is_file()]
    todo = [run for run in runs if run in todo]
    if args.dry_run:
        for run in runs:
            state = 'finished' if run not in todo else (
                'to resume' if can_resume(run) else 'to do')
            print(f'{state:10} {iterations(run.options):6} {run.name}')
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    jobs = Jobs(
        root / 'scripts',
        logs=output / 'logs',
        at_once=args.jobs,
        is_finished=table.collect,
    )
    failed = jobs.run(todo)
    return 1 if failed else 0


class Table:
    """The raw results in one file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def has(self, run: Run) -> bool:
        """Whether the run has a row, or has left what a row needs."""
        return run.name in read_rows(self.path) or self.collect(run)

    def collect(self, run: Run) -> bool:
        """Add the run's row, if the run has finished."""
        rows = read_rows(self.path)
        teacher: Row | None = rows.get(run.teacher.name) if run.teacher else None
        if run.teacher and teacher is None:
            teacher = finished_row(run.teacher, None)
        row = finished_row(run, teacher)
        if row is None:
            return False
        rows[run.name] = row
        write_rows(self.path, rows.values())
        return True


def _numbers(words: Sequence[str]) -> list[int]:
    """`1-3 7` -> [1, 2, 3, 7]."""
    numbers: list[int] = []
    for word in words:
        first, _, last = word.partition('-')
        numbers += range(int(first), int(last or first) + 1)
    return numbers
