"""From photographs and a CSV to the weight files in the package, in one command.

    python scripts/release.py --images datasets/biq2021/Images \
        --csv datasets/biq2021/meta_info_BIQ2021_subset.csv

It resizes the photographs once, trains what plan.yml in `--configs` lists, publishes
the metrics, measures each of them, and writes the model cards from these measurements.
The bundled weights are those of the plan's first split; where it has more, the same
recipe on these says how much a figure owes to the split. What is finished is left
alone, so the same command goes on where a stopped one was: a training at its last
checkpoint, a measurement where the weights have changed. `--jobs` at once suit a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import cache, partial
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
import yaml

from pyiqa_clipkd.attributes.names import ATTRIBUTES
from pyiqa_clipkd.attributes.readout import find_readout
from pyiqa_clipkd.experiment import recorded_command
from pyiqa_clipkd.export import write_graph
from pyiqa_clipkd.files import file_hash, one_line, written_whole
from pyiqa_clipkd.locations import BUNDLED_FOLDER, attributes_file
from pyiqa_clipkd.metric import CLIPKDMetric
from pyiqa_clipkd.names import WEIGHTS_VARIABLE
from pyiqa_clipkd.options import load_options, split_word, with_split
from pyiqa_clipkd.publish import model_card, publish
from pyiqa_clipkd.splits import split_column
from pyiqa_clipkd.weights import read_weights

ROOT = Path(__file__).resolve().parents[1]
TEACHER = 'clipkd_teacher'
WORDS = {True: 'train', False: 'test'}
# What the plan has to say, and what it may say of a metric.
PARTS = {'splits', 'size', 'teacher', 'trainings', 'card', 'metrics'}
SETTINGS = (
    'training',
    'splits',
    'precision',
    'input_size',
    'mirror_invariant',
    'trained_on',
    'card',
)
NEEDED = {'training', 'precision', 'trained_on'}  # of a metric
STEPS = ('prepare', 'train', 'publish', 'score', 'disturb', 'write')

# Decimals of the table; the others have four.
COARSER = {'megabytes': 2, 'mean_absolute_error': 3, 'milliseconds': 1}

# How long each metric is timed, in turn with the others.
SECONDS_OF_TIMING = 3.0

Split = int | str


def add_columns(table: pd.DataFrame) -> pd.DataFrame:
    """With `without_NAME_split` for each word of `subset`: that one is held out."""
    table = table.copy()
    if 'subset' in table:
        for name in sorted(table.subset.unique()):
            table[f'without_{name}_split'] = (table.subset != name).map(WORDS)
    return table


def run(script: str, *arguments: Any, log: Path | None = None) -> None:
    """Run another script of this folder; its failure ends this one."""
    command = [sys.executable, str(ROOT / 'scripts' / script), *map(str, arguments)]
    print('==', *command[1:], flush=True)
    paths = [str(ROOT), os.environ.get('PYTHONPATH', '')]
    path = os.pathsep.join(filter(None, paths))
    env = os.environ | {'PYTHONPATH': path}
    if log is None:
        subprocess.run(command, check=True, env=env)
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open('a') as file:
        code = subprocess.run(command, env=env, stdout=file, stderr=file).returncode
    if code:
        raise RuntimeError(f'{script} ended with {code}: see {log}.')


def in_order(
    tasks: dict[Any, Callable[[], Any]],
    jobs: int,
    needs: Callable[[Any], Iterable[Any]] = lambda task: (),
) -> None:
    """Run each task after those that it needs, `jobs` at a time; earlier ones first.

    Raises:
        Exception: that of the first task that failed, when those beside it have ended;
            no further one is started.
    """
    order = TopologicalSorter({task: set(needs(task)) & set(tasks) for task in tasks})
    order.prepare()
    ready: list[Any] = []
    running: dict[Future[Any], Any] = {}
    with ThreadPoolExecutor(jobs) as pool:
        while order.is_active():
            ready = sorted([*ready, *order.get_ready()], key=list(tasks).index)
            while ready and len(running) < jobs:
                task = ready.pop(0)
                running[pool.submit(tasks[task])] = task
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                future.result()
                order.done(running.pop(future))


class Training(NamedTuple):
    """An option file on one split."""

    file: str
    split: Split


class Release:
    """The steps, in order; each does what is still to do.

    Args:
        args: of the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        plan = args.configs / 'plan.yml'
        self.plan: dict[str, Any] = yaml.safe_load(plan.read_text(encoding='utf-8'))
        if not isinstance(self.plan, dict) or PARTS - self.plan.keys():
            raise ValueError(f'it must be a mapping with {", ".join(sorted(PARTS))}.')
        self.metrics: dict[str, dict[str, Any]] = self.plan['metrics']
        for name, settings in self.metrics.items():
            if unknown := sorted(set(settings) - set(SETTINGS)):
                raise ValueError(
                    f'{name}: `{unknown[0]}` must be one of {", ".join(SETTINGS)}.'
                )
            if missing := sorted(NEEDED - set(settings)):
                raise ValueError(f'{name}: `{missing[0]}` is missing.')
        if 'training' not in self.plan['teacher']:
            raise ValueError('teacher: `training` is missing.')
        self.options = cache(self._options)
        self.first: Split = self.plan['splits'][0]  # of the bundled weights

    def _options(self, training: Training) -> dict[str, Any]:
        file = self.args.configs / training.file
        return load_options(file, self.overrides(training))

    def overrides(self, training: Training) -> list[str]:
        return [f'data:split_index={training.split}', *(self.args.force_yml or [])]

    def experiment(self, training: Training) -> Path:
        return Path('experiments', self.options(training)['name'])

    def checkpoint(self, training: Training) -> Path:
        return self.experiment(training) / 'models' / 'net_best.pth'

    def of(self, name: str, split: Split) -> Training:
        """The training that a metric, or the teacher, comes from."""
        return Training(self.settings(name)['training'], split)

    def settings(self, name: str) -> dict[str, Any]:
        """What the plan says of a metric, or of the teacher."""
        found: dict[str, Any] = (self.metrics | {TEACHER: self.plan['teacher']})[name]
        return found

    def splits(self, name: str) -> list[Split]:
        """Those of a metric or the teacher: its own, or the plan's."""
        splits: list[Split] = self.settings(name).get('splits', self.plan['splits'])
        return splits

    def trainings(self) -> list[Training]:
        """All that the metrics and the teacher need: split by split, as in the plan."""
        wanted = [
            self.of(name, split)
            for name in [TEACHER, *self.metrics]
            for split in self.splits(name)
        ]
        files = self.plan['trainings']
        if missing := sorted({training.file for training in wanted} - set(files)):
            raise ValueError(f'`trainings` lacks {", ".join(missing)}.')
        needed = {t for training in wanted for t in self.before(training)}
        folders: dict[Path, Training] = {}
        for training in sorted(needed, key=str):  # one error, whatever the hashes
            other = folders.setdefault(self.experiment(training), training)
            if other != training:
                raise ValueError(
                    f'{training.file} trains the splits {other.split} and '
                    f'{training.split} in one folder; its `name` must hold {{split}}.'
                )
        splits = list(dict.fromkeys(training.split for training in wanted))
        return sorted(
            needed, key=lambda t: (splits.index(t.split), files.index(t.file))
        )

    # --- steps ------------------------------------------------------------------------

    def prepare(self) -> None:
        """The resized photographs and their table, where the option files look."""
        resized = self.options(self.of(TEACHER, self.first))
        data = resized['datasets']['train']
        target = Path(data['meta_info_file'])
        if target.is_file():
            return
        table = add_columns(pd.read_csv(self.args.csv))
        where = ['--images', self.args.images, '-o', target.parent]
        with tempfile.TemporaryDirectory() as folder:
            wide = Path(folder, target.name)
            table.to_csv(wide, index=False)
            size = ['--size', self.plan['size'], '--format', 'bmp']
            run('resize_images.py', wide, *size, *where)

    def train(self) -> None:
        """Each training from its last checkpoint, after those that it needs."""
        todo = [
            training
            for training in self.trainings()
            if not (self.experiment(training) / 'run.json').is_file()
        ]
        tasks = {training: partial(self._train, training) for training in todo}
        in_order(tasks, self.args.jobs, lambda training: self.before(training)[:-1])

    def _train(self, training: Training) -> None:
        script = self.options(training).get('script', 'train.py')
        words: list[Any] = []
        if script == 'train.py':
            words = ['--auto_resume']
        elif script != 'average.py':
            words = ['--store', self.store(training.split)]
        file = self.args.configs / training.file
        command = [script, '-opt', file, *words]
        command += ['--force_yml', *self.overrides(training)]
        self._run(command, self.experiment(training).name)

    def store(self, split: Split) -> Path:
        """The photographs as arrays, for trainings from memory."""
        column = self.column(split)
        folder = Path('datasets', f'resident_{self.plan["size"]}_{column}')
        if not (folder / 'names.csv').is_file():
            where = ['--images', self.args.images, '--column', column, '-o', folder]
            form = ['--size', self.plan['size'], '--chains', 2]
            command = ['photograph_store.py', self.args.csv, *where, *form]
            self._run(command, folder.name)
        return folder

    def column(self, split: Split) -> str:
        """Of the table. Another word than a number is a column itself."""
        return split_column(split) if isinstance(split, int) else split

    def _run(self, command: list[Any], log: str) -> None:
        """What runs beside others prints to `experiments/LOG.log`."""
        several = self.args.jobs > 1
        run(*command, log=Path('experiments', f'{log}.log') if several else None)

    def publish(self) -> None:
        """All weight files, but those of which only the training's record is here."""
        for name in self.metrics:
            for split in self.splits(name):
                training = self.of(name, split)
                elsewhere = (self.experiment(training) / 'run.json').is_file()
                if self.checkpoint(training).is_file() or not elsewhere:
                    self._publish(name, split)

    def _publish(self, name: str, split: Split) -> None:
        """The weight file of a metric, with what is known before any measurement."""
        settings = self.metrics[name]
        made_by = ', '.join(t.file for t in self.before(self.of(name, split)))
        card = {**self.plan['card'], **settings.get('card', {})}
        publish(
            self.checkpoint(self.of(name, split)),
            name,
            folder=self.file(name, split).parent,
            precision=settings['precision'],
            card=card | {'Made by': f'scripts/release.py: {made_by}; seed 123'},
            input_size=settings.get('input_size'),
            mirror_invariant=settings.get('mirror_invariant'),
        )

    def file(self, name: str, split: Split) -> Path:
        """The weights of a metric; those of the first split are the bundled ones."""
        if name == TEACHER:
            return self.checkpoint(self.of(name, split))
        if split == self.first:
            return Path(self.args.output, f'{name}.safetensors')
        return Path(
            'experiments', f'published_{split_word(split)}', f'{name}.safetensors'
        )

    def measure(self, name: str, split: Split, what: str) -> dict[str, Any]:
        """What evaluate.py (`scores`) or robustness.py say of a weight file."""
        args, weights = self.args, self.file(name, split)
        column = self.column(split)
        first = split == self.first
        words = [name] if first else [name, column]
        path = args.results / ('.'.join([*words, what]) + '.json')
        if what == 'scores':
            files = ['--images', args.images, '--csv', args.csv, '--columns', column]
            plot = ['--plot', args.results / f'{name}.reliability.png'] * first
            command = ['evaluate.py', name, *files, *plot]
        else:
            photographs = ['--images', args.photographs] if args.photographs else []
            command = ['robustness.py', name, *photographs]
        command += ['--weights', weights, '-o', path]
        if name == TEACHER:
            command += ['--input-size', self.plan['teacher']['input_size']]
        known = json.loads(path.read_text()) if path.is_file() else {}
        recorded = recorded_command([f'scripts/{command[0]}', *command[1:]], ROOT)
        same = known.get('command') == recorded
        if not weights.is_file() and same:  # measured where it was trained
            return known
        if not same or known['weights_sha256'] != file_hash(weights):
            self._run(command, path.stem)
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    def score(self) -> None:
        """All held-out sides."""
        names = [TEACHER, *self.metrics]
        every = [(name, split) for name in names for split in self.splits(name)]
        tasks = {one: partial(self.measure, *one, 'scores') for one in every}
        in_order(tasks, self.args.jobs)

    def disturb(self) -> None:
        """Damage, and harmless changes, for the bundled weights."""
        tasks = {
            name: partial(self.measure, name, self.first, 'robustness')
            for name in self.metrics
        }
        in_order(tasks, self.args.jobs)

    def write(self) -> None:
        """The table of all metrics, and from its rows their cards; ONNX graphs."""
        files = {name: self.file(name, self.first) for name in self.metrics}
        times = milliseconds(files)
        rows = []
        for name, path in files.items():
            scores = {s: self.measure(name, s, 'scores') for s in self.splits(name)}
            robustness = self.measure(name, self.first, 'robustness')
            row = table_row(name, path, scores, robustness)
            row['trained_on'] = self.metrics[name]['trained_on']
            row['training_minutes'] = round(
                self.seconds(self.of(name, self.first)) / 60
            )
            rows.append(row | {'milliseconds': times[name]})
            figures = measured(rows[-1]) | heads_row(path)
            card = model_card(path, read_weights(path).metadata, figures)
            with written_whole(path.with_suffix('.md')) as unfinished:
                unfinished.write_text(card, encoding='utf-8')
            write_graph(name, path.parent)
        table = pd.DataFrame(rows).round(4).round(COARSER)
        table.to_csv(self.args.results / 'release.csv', index=False)
        shown = ['metric', 'megabytes', 'srcc_median', 'right_order', 'milliseconds']
        print(table[shown].to_string(index=False))

    # --- what a metric came from ------------------------------------------------------

    def before(self, training: Training) -> list[Training]:
        """What a training needs, itself last."""
        options = self.options(training)
        teacher = options.get('teacher') or {}
        needed = [
            *(options.get('average') or ()),
            options['path'].get('pretrain_network'),
            teacher.get('weights'),
            *teacher.get('score_with', ()),
        ]
        paths = [Path(with_split(path, training.split)) for path in needed if path]
        found: list[Training] = []
        for file in self.plan['trainings']:
            other = Training(file, training.split)
            if self.checkpoint(other) in paths:
                found += [t for t in self.before(other) if t not in found]
        return [*found, training]

    def seconds(self, training: Training) -> int:
        """Of a training and of all that it needs."""
        records = [self.experiment(t) / 'run.json' for t in self.before(training)]
        return sum(json.loads(record.read_text())['seconds'] for record in records)


def heads_row(weights: Path) -> dict[str, str]:
    """The row of a model card about attribute heads, if there are any."""
    heads = attributes_file(weights).with_suffix('.md')
    if find_readout(weights) is None:
        return {}
    return {
        'Attributes': f'{", ".join(ATTRIBUTES)}: heads beside the weights, which '
        f'scripts/attribute_heads.py made; see {heads.name}'
    }


def milliseconds(files: dict[str, Path]) -> dict[str, float]:
    """Time of one photograph of 512 px on one thread: the best of many, in turn."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    metrics = {n: CLIPKDMetric(n, pretrained_model_path=p) for n, p in files.items()}
    image = torch.rand(1, 3, 512, 512)
    best = dict.fromkeys(metrics, float('inf'))
    end = time.time() + SECONDS_OF_TIMING * len(metrics)
    with torch.inference_mode():
        while time.time() < end:
            for name, metric in metrics.items():
                start = time.perf_counter()
                metric(image)
                best[name] = min(best[name], time.perf_counter() - start)
    torch.set_num_threads(threads)
    return {name: 1000 * seconds for name, seconds in best.items()}


def table_row(
    name: str,
    path: Path,
    scores: dict[Split, dict[str, Any]],
    robustness: dict[str, Any],
) -> dict[str, Any]:
    """What the cards and README say of a metric.

    Args:
        name: of the metric.
        path: its bundled weights, which the first of `scores` measured.
        scores: split -> what evaluate.py said of the weights of that split.
        robustness: what robustness.py said of the bundled weights.
    """
    metadata = read_weights(path).metadata
    columns = [found['all'] for found in scores.values()]
    own = columns[0]
    row: dict[str, Any] = {
        'metric': name,
        'encoder': metadata['config']['encoder'].split(':')[-1],
        'input_size': metadata['config']['input_size'],
        'megabytes': path.stat().st_size / 1e6,
        'precision': metadata['precision'],
        'splits': len(columns),
        'held_out': own['images'],
        'srcc': own['srcc'],
        'plcc': own['plcc'],
        'mean_absolute_error': own['mean_absolute_error'],
    }
    for key in ('srcc', 'plcc'):
        values = [column[key] for column in columns]
        row[f'{key}_median'] = statistics.median(values)
        row[f'{key}_lowest'] = min(values)
        row[f'{key}_highest'] = max(values)
    row['right_order'] = robustness['right_order_all']
    for kind, share in robustness['right_order'].items():
        row[f'order: {kind}'] = share
    for kind, share in robustness['right_order_unseen'].items():
        row[f'unseen: {kind}'] = share
    for kind, values in robustness['moves'].items():
        for word, value in values.items():
            row[f'move: {kind}, {word}'] = value
    return row | {'sha256': file_hash(path)}


def measured(row: dict[str, Any]) -> dict[str, str]:
    """The rows of a model card that come from measurements."""

    def some(prefix: str) -> dict[str, float]:
        part = {
            k.removeprefix(prefix): v for k, v in row.items() if k.startswith(prefix)
        }
        return {key.replace('_', ' '): value for key, value in part.items()}

    falls, unseen = (
        ', '.join(f'{kind} {share:.0%}' for kind, share in some(prefix).items())
        for prefix in ('order: ', 'unseen: ')
    )
    moves = some('move: ')
    stays = ', '.join(
        f'{key.removesuffix(", median")} {value:.3f} '
        f'({moves[key.replace("median", "p95")]:.3f})'
        for key, value in moves.items()
        if key.endswith('median')
    )
    srcc, plcc = (
        f'{row[f"{key}_median"]:.3f} [{row[f"{key}_lowest"]:.3f} to '
        f'{row[f"{key}_highest"]:.3f}]'
        for key in ('srcc', 'plcc')
    )
    rows = {
        'Results': f'SRCC {row["srcc"]:.3f}, PLCC {row["plcc"]:.3f}, mean absolute '
        f'error {row["mean_absolute_error"]:.2f} points on the {row["held_out"]} '
        'photographs of the held-out side; one seed',
    }
    if row['splits'] > 1:
        rows['The same recipe on others'] = (
            f'SRCC {srcc}, PLCC {plcc}: median [range] of {row["splits"]} splits, each '
            'with its own teacher; one seed'
        )
    return rows | {
        'Falls with damage': f'{row["right_order"]:.1%} of neighbouring levels in the '
        f'right order: {falls}. Of kinds that no training here knew: {unseen}',
        'Stays where nothing changed': 'moves of the score, median (95th percentile): '
        f'{stays}',
        'Speed': f'{row["milliseconds"]:.0f} ms for 512 x 512 pixels, one CPU thread',
        'Cost': f'{row["training_minutes"]} minutes of training with the teacher and '
        f'all starts, {row["trained_on"]}',
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('--images', type=Path, required=True, help='folder')
    add('--csv', type=Path, required=True, help='with the columns of the splits')
    add('--photographs', type=Path, help='good ones, for robustness.py')
    add('--configs', type=Path, default=ROOT / 'configs/release', help='has plan.yml')
    add('--results', type=Path, default=ROOT / 'configs/results/release')
    add('--jobs', type=int, default=1, help='trainings and measurements at once')
    add('--force_yml', nargs='+', metavar='KEY:KEY=VALUE', help='for all trainings')
    add('--stop-after', choices=STEPS, help='the rest is for another machine')
    add('-o', '--output', type=Path, default=BUNDLED_FOLDER, help='of the weights')
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error(f'`--jobs` must be at least 1, but got {args.jobs}.')
    if args.output != BUNDLED_FOLDER:  # so that pyiqa knows these names, too
        os.environ[WEIGHTS_VARIABLE] = str(args.output.resolve())
    try:
        release = Release(args)
        release.trainings()
    except (OSError, ValueError, yaml.YAMLError) as error:
        parser.error(f'{args.configs}/plan.yml: {one_line(error)}')
    for step in STEPS:
        getattr(release, step)()
        if step == args.stop_after:
            return


if __name__ == '__main__':
    main()
