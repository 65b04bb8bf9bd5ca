"""One call of scripts/reproduce.py: plan, show or run, write the tables."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from pyiqa_clipkd.reproduce.cross import (
    COLUMNS,
    CrossResults,
    cross_markdown,
    cross_run,
    write_option_file,
)
from pyiqa_clipkd.reproduce.data import (
    OWN,
    download,
    explain,
    iterations,
    make_split_file,
    missing,
    own_data,
)
from pyiqa_clipkd.reproduce.hours import Hours
from pyiqa_clipkd.reproduce.jobs import Jobs, done, keep_best
from pyiqa_clipkd.reproduce.plan import OURS, TRIALS, VARIANTS, Run, check_names, expand
from pyiqa_clipkd.reproduce.recipe import STUDENT_FILE, Recipe
from pyiqa_clipkd.reproduce.report import markdown, read_paper
from pyiqa_clipkd.reproduce.results import RawResults, finished_row

TABLES = {'table1': (OURS,), 'table2': VARIANTS, 'trials': TRIALS}


class Session:
    """One call of the command."""

    def __init__(self, root: Path, args: argparse.Namespace) -> None:
        self.args = args
        self.scripts = root / 'scripts'
        self.configs = Path(os.path.relpath(root / 'configs'))
        self.output: Path = args.output or Path('results', args.what)
        self.raw = RawResults(self.output / 'raw.csv')
        self.current: set[str] = set()

    # --- tables -------------------------------------------------------------------

    def table(self) -> int:
        """Plan a table, then show the plan or run it."""
        args = self.args
        recipes = [self._recipe(data) for data in self._data()]
        plans = {recipe: self._expand(recipe) for recipe in recipes}
        runs = [run for plan in plans.values() for run in plan]
        absent = self._absent(plans)
        rows = self.raw.read()
        finished = {run for run in runs if run.name in rows or finished_row(run)}
        taught = {run.teacher for run in runs if run not in finished}
        todo = [
            run
            for run in runs
            if run not in finished or (run in taught and not run.weights.is_file())
        ]
        if args.dry_run:
            self._show(runs, todo, absent)
            return 0
        for run in runs:
            if run.name not in rows and run in finished:
                self.raw.collect(run)
                keep_best(run)
        self.current = {run.config for run in runs}
        here = [run for run in todo if (run.data, run.protocol) not in absent]
        for run in here:
            iterations(run.options)  # finds a split that the data hasn't
        failed = self._run(here)
        self._write_markdown()
        print(f'{self.raw.path}, {self.output / "TABLE.md"}')
        return 1 if failed or absent else 0

    def _data(self) -> list[str]:
        """What `--data` names, or the option file that `--csv` becomes."""
        args = self.args
        if args.csv is None:
            return list(args.data)
        if args.images is None:
            raise ValueError('`--csv` needs `--images`, the folder of the images.')
        own = own_data(
            args.csv,
            args.images,
            OWN,
            mos_range=args.mos_range,
            group=args.group,
        )
        return [str(own)]

    def _recipe(self, data: str) -> Recipe:
        """A folder below configs or anywhere, or one's own option file."""
        overrides = tuple(self.args.force_yml)
        for folder in (self.configs / data, Path(data)):
            if (folder / STUDENT_FILE).is_file():
                return Recipe(folder, overrides=overrides)
        if Path(data).is_file():
            behind = self.configs / self.args.recipe
            if not (behind / STUDENT_FILE).is_file():
                raise ValueError(f'`--recipe`: there is no {behind / STUDENT_FILE}.')
            return Recipe(behind, (Path(data),), overrides)
        there = sorted(f.parent.name for f in self.configs.glob(f'*/{STUDENT_FILE}'))
        raise ValueError(
            f'A data set must be one of {", ".join(there)}, a folder with a '
            f'{STUDENT_FILE}, or an option file, but got {data!r}.'
        )

    def _expand(self, recipe: Recipe) -> list[Run]:
        args = self.args
        folder = self.configs / 'variants'
        variants = args.variants or TABLES.get(args.what, (OURS,))
        there = [file.stem for file in sorted(folder.glob('*.yml'))]
        check_names('variant', variants, there, str(folder))
        return expand(
            recipe,
            variants=[folder / f'{variant}.yml' for variant in variants],
            students=args.students,
            protocols=args.protocol,
            splits=args.splits,
            seeds=args.seeds,
            zeroshot=args.what == 'table1',
        )

    def _absent(self, plans: dict[Recipe, list[Run]]) -> set[tuple[str, str]]:
        """(data, protocol) without data; prints one message for each data set."""
        absent: dict[tuple[str, str], str] = {}
        write = not self.args.dry_run
        asked: set[str] = set()
        for recipe, plan in plans.items():
            for run in {(run.data, run.protocol): run for run in plan}.values():
                wanted = self.args.download and write and run.data not in asked
                if wanted and missing(run.options):
                    asked.add(run.data)
                    try:
                        download(run)
                    except (ValueError, RuntimeError) as error:
                        print(error)
                made = make_split_file(recipe, run, write)
                if paths := [path for path in missing(run.options) if path != made]:
                    absent[run.data, run.protocol] = explain(run, paths)
        for data in dict.fromkeys(data for data, _ in absent):
            print(next(text for key, text in absent.items() if key[0] == data))
        return set(absent)

    def _show(
        self, runs: Sequence[Run], todo: Sequence[Run], absent: set[tuple[str, str]]
    ) -> None:
        """Print state, iterations and hours of each run, and their sum."""
        hours = Hours(self.raw.read().values())
        steps, hours_left = 0, 0.0
        unfinished = set(todo)
        print(f'{"state":14}{"iterations":>10}{"hours left":>12}  run')
        for run in runs:
            whole, before = iterations(run.options), done(run)
            state, left = 'to resume' if before else 'to do', whole - before
            if (run.data, run.protocol) in absent:
                state = 'data missing'
            if run not in unfinished:
                state, left = 'finished', 0
            needed = hours.of(run, left)
            steps, hours_left = steps + left, hours_left + needed
            print(f'{state:14}{whole:10}{needed:12.2f}  {run.name}')
        print(
            f'{len(runs)} runs, {len(runs) - len(todo)} of them finished; {steps} '
            f'iterations to do, about {hours_left:.1f} hours one after another.'
        )
        if hours.timed:
            print(
                'From a few steps timed on this machine, without reading images: '
                f'{", ".join(sorted(hours.timed))}.'
            )

    def _run(self, runs: Iterable[Run]) -> set[Run]:
        jobs = Jobs(
            self.scripts,
            logs=self.output / 'logs',
            at_once=self.args.jobs,
            collect=self._collect,
            gpus=_gpus(),
        )
        return jobs.run(list(runs))

    def _collect(self, run: Run, seconds: float | None) -> bool:
        new = self.raw.collect(run, seconds)
        if new:
            self._write_markdown()
        return new

    def _write_markdown(self) -> None:
        rows = self.raw.read().values()
        if self.args.what == 'cross':
            text = cross_markdown(rows)
        else:
            what = self.args.what
            title = 'Trials' if what == 'trials' else f'Table {what[-1]}'
            paper = read_paper(self.configs / 'results' / 'paper.csv')
            text = markdown(title, rows, paper, self.current)
        self.output.mkdir(parents=True, exist_ok=True)
        (self.output / 'TABLE.md').write_text(text)

    # --- cross-evaluation -----------------------------------------------------------

    def cross(self) -> int:
        """Test what is trained of one data set on others."""
        args = self.args
        self.raw = CrossResults(self.output / 'raw.csv', COLUMNS)
        trained = self._expand(self._recipe(args.train))
        ready = [run for run in trained if run.weights.is_file()]
        if not ready:
            raise ValueError(
                f'None of the {len(trained)} networks of {args.train} is trained: run '
                'table1 or table2 with the same recipe, students and splits first.'
            )
        runs = []
        for data in args.test:
            recipe = self._recipe(data)
            some = cross_run(ready[0], recipe, args.test_split, self.output)
            if some.data == ready[0].data:
                raise ValueError(
                    f'`--test` must be other data than `--train`, but got {data}.'
                )
            runs += [
                cross_run(run, recipe, args.test_split, self.output / 'options')
                for run in ready
            ]
        absent = {}
        for run in {run.data: run for run in runs}.values():
            if paths := missing(run.options):
                absent[run.data] = explain(run, paths)
                print(absent[run.data])
        rows = self.raw.read()
        here = [run for run in runs if run.data not in absent and run.name not in rows]
        if args.dry_run:
            print(*(run.name for run in here), sep='\n')
            return 0
        for run in here:
            write_option_file(run)
        failed = self._run(here)
        self._write_markdown()
        print(f'{self.raw.path}, {self.output / "TABLE.md"}')
        return 1 if failed or absent else 0


def _gpus() -> list[str]:
    """What `CUDA_VISIBLE_DEVICES` may be for one process each."""
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get('CUDA_VISIBLE_DEVICES', '')
    names = named.split(',') if named else [str(i) for i in range(count)]
    return names[:count]
