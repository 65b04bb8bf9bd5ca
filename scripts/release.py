"""From photographs and a CSV to the weight files in the package, in one command.

    python scripts/release.py --images datasets/biq2021/Images \
        --csv datasets/biq2021/meta_info_BIQ2021_subset.csv

It resizes the photographs once, trains what plan.yml in `--configs` lists, publishes
the metrics, measures each of them, and writes the model cards from these measurements.
What is finished is left alone, so the same command goes on where a stopped one was: a
training at its last checkpoint, a measurement where the weights have changed.
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
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml

from pyiqa_clipkd.experiment import recorded_command
from pyiqa_clipkd.files import written_whole
from pyiqa_clipkd.metric import CLIPKDMetric
from pyiqa_clipkd.names import WEIGHTS_VARIABLE
from pyiqa_clipkd.options import load_options
from pyiqa_clipkd.publish import model_card, publish
from pyiqa_clipkd.weights import (
    BUNDLED_FOLDER,
    CONFIG_KEY,
    encode_config,
    file_hash,
    read_weights,
)

ROOT = Path(__file__).resolve().parents[1]
COMMON = 'common_split'
WORDS = {True: 'train', False: 'test'}
# How long each metric is timed, in turn with the others.
SECONDS_OF_TIMING = 3.0


def split_columns(splits: list[int]) -> list[str]:
    return [f'ratio802_seed123_split_{number:02d}' for number in splits]


def add_columns(table: pd.DataFrame, splits: list[int]) -> pd.DataFrame:
    """With `common_split`, and `without_NAME_split` for each word of `subset`.

    The train side of the first lies in the train sides of all `splits`: one network
    trained on it may be tested on the test side of each of them.
    """
    table = table.copy()
    sides = table[split_columns(splits)] == 'train'
    table[COMMON] = sides.all(axis=1).map(WORDS)
    if 'subset' in table:
        for name in sorted(table.subset.unique()):
            table[f'without_{name}_split'] = (table.subset != name).map(WORDS)
    return table


def run(script: str, *arguments: Any) -> None:
    """Run another script of this folder; its failure ends this one."""
    command = [sys.executable, str(ROOT / 'scripts' / script), *map(str, arguments)]
    print('==', *command[1:], flush=True)
    paths = [str(ROOT), os.environ.get('PYTHONPATH', '')]
    path = os.pathsep.join(filter(None, paths))
    subprocess.run(command, check=True, env=os.environ | {'PYTHONPATH': path})


def average(files: dict[Path, float]) -> dict[str, torch.Tensor]:
    """Weighted mean of the weights of checkpoints of one network.

    Of two that have a training in common it keeps most of what either of them gained
    (Wortsman et al. 2022).

    Args:
        files: checkpoint -> its share; shares sum to 1.
    """
    states = [(read_weights(path).tensors, share) for path, share in files.items()]
    return {
        name: sum(share * state[name] for state, share in states)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in states[-1][0].items()
    }


class Release:
    """The steps, in order; each does what is still to do.

    Args:
        args: of the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        plan = args.configs / 'plan.yml'
        self.plan: dict[str, Any] = yaml.safe_load(plan.read_text(encoding='utf-8'))
        self.metrics: dict[str, dict[str, Any]] = self.plan['metrics']

    @cached_property
    def options(self) -> dict[str, dict[str, Any]]:
        """Option file -> what it expands to."""
        files = self.plan['trainings']
        return {file: load_options(self.args.configs / file) for file in files}

    def experiment(self, file: str) -> Path:
        return Path('experiments', self.options[file]['name'])

    def checkpoint(self, file: str) -> Path:
        return self.experiment(file) / 'models' / 'net_best.pth'

    def source(self, name: str) -> Path:
        """The checkpoint that a metric is published from."""
        settings = self.metrics[name]
        own = self.checkpoint(settings['training'])
        if 'average_with' not in settings:
            return own
        share = settings['share']
        other = self.checkpoint(settings['average_with'])
        mean: dict[str, Any] = average({other: 1 - share, own: share})
        config = read_weights(own).metadata['config']
        mean[CONFIG_KEY] = encode_config(config)
        path = Path('experiments', f'{name}_average.pth')
        with written_whole(path) as partial:
            torch.save({'params': mean}, partial)
        return path

    # --- steps ------------------------------------------------------------------------

    def prepare(self) -> None:
        """The resized photographs and their table, where the option files look."""
        resized = self.options[self.plan['teacher']['training']]
        data = resized['datasets']['train']
        target = Path(data['meta_info_file'])
        if target.is_file():
            return
        table = add_columns(pd.read_csv(self.args.csv), self.plan['splits'])
        where = ['--images', self.args.images, '-o', target.parent]
        with tempfile.TemporaryDirectory() as folder:
            wide = Path(folder, target.name)
            table.to_csv(wide, index=False)
            size = ['--size', self.plan['size'], '--format', 'bmp']
            run('resize_images.py', wide, *size, *where)

    def train(self) -> None:
        """Each training in turn, from its last checkpoint."""
        for file in self.options:
            if not (self.experiment(file) / 'run.json').is_file():
                run('train.py', '-opt', self.args.configs / file, '--auto_resume')

    def publish(self, name: str) -> Path:
        """The weight file of a metric, with what is known before any measurement."""
        settings = self.metrics[name]
        made_by = ', '.join(self.before(settings['training']))
        if 'average_with' in settings:
            made_by += (
                f'; {settings["share"]:.0%} of these weights and the rest of those of '
                f'{settings["average_with"]}'
            )
        card = {**self.plan['card'], **settings.get('card', {})}
        return publish(
            self.source(name),
            name,
            folder=self.args.output,
            precision=settings['precision'],
            card=card | {'Made by': f'scripts/release.py: {made_by}; seed 123'},
            input_size=settings.get('input_size'),
        )

    def measure(self, name: str, weights: Path, *further: Any) -> dict[str, Any]:
        """What evaluate.py and robustness.py say of a weight file."""
        args, plan = self.args, self.plan
        splits = self.metrics.get(name, {}).get('splits', plan['splits'])
        photographs = ['--images', args.photographs] if args.photographs else []
        files = ['--images', args.images, '--csv', args.csv]
        plot = ['--plot', args.results / f'{name}.reliability.png']
        columns = ['--columns', *split_columns(splits)]
        commands = {
            'scores': ['evaluate.py', name, *files, *columns, *plot],
            'robustness': ['robustness.py', name, *photographs],
        }
        if name not in self.metrics:  # the teacher
            del commands['robustness']
        found: dict[str, Any] = {}
        for what, command in commands.items():
            path = args.results / f'{name}.{what}.json'
            command += ['--weights', weights, *further, '-o', path]
            known = json.loads(path.read_text()) if path.is_file() else {}
            words = [f'scripts/{command[0]}', *command[1:]]
            same = known.get('command') == recorded_command(words, ROOT)
            if not same or known['weights_sha256'] != file_hash(weights):
                run(*command)
            found[what] = json.loads(path.read_text())
        return found

    def write(self, rows: list[dict[str, Any]]) -> None:
        """The table of all metrics, and from its rows their cards."""
        pd.DataFrame(rows).to_csv(self.args.results / 'release.csv', index=False)
        for row in rows:
            path = self.args.output / f'{row["metric"]}.safetensors'
            card = model_card(path, read_weights(path).metadata, measured(row))
            with written_whole(path.with_suffix('.md')) as partial:
                partial.write_text(card, encoding='utf-8')

    # --- what a metric came from ------------------------------------------------------

    def before(self, file: str) -> list[str]:
        """Option files that a training needs, its own last."""
        options = self.options[file]
        needed = [
            options['path'].get('pretrain_network'),
            (options.get('teacher') or {}).get('weights'),
        ]
        files: list[str] = []
        for other in self.options:
            if any(path and Path(path) == self.checkpoint(other) for path in needed):
                files += [f for f in self.before(other) if f not in files]
        return [*files, file]

    def seconds(self, file: str) -> int:
        """Of a training and of all that it needs."""
        records = [self.experiment(f) / 'run.json' for f in self.before(file)]
        return sum(json.loads(record.read_text())['seconds'] for record in records)


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


def table_row(name: str, path: Path, found: dict[str, Any]) -> dict[str, Any]:
    """What the cards and README say of a metric."""
    metadata = read_weights(path).metadata
    columns = found['scores']['columns'].values()
    row: dict[str, Any] = {
        'metric': name,
        'encoder': metadata['config']['encoder'].split(':')[-1],
        'input_size': metadata['config']['input_size'],
        'megabytes': round(path.stat().st_size / 1e6, 2),
        'precision': metadata['precision'],
        'splits': len(columns),
        'held_out': found['scores']['all']['images'],
    }
    for key in ('srcc', 'plcc'):
        values = [column[key] for column in columns]
        row[f'{key}_median'] = round(statistics.median(values), 4)
        row[f'{key}_lowest'] = round(min(values), 4)
        row[f'{key}_highest'] = round(max(values), 4)
    row['mean_absolute_error'] = round(found['scores']['all']['mean_absolute_error'], 3)
    row['right_order'] = round(found['robustness']['right_order_all'], 4)
    for kind, share in found['robustness']['right_order'].items():
        row[f'order: {kind}'] = round(share, 4)
    for kind, values in found['robustness']['moves'].items():
        for word, value in values.items():
            row[f'move: {kind}, {word}'] = round(value, 4)
    return row | {'sha256': file_hash(path)}


def measured(row: dict[str, Any]) -> dict[str, str]:
    """The rows of a model card that come from measurements."""

    def some(prefix: str) -> dict[str, float]:
        part = {
            k.removeprefix(prefix): v for k, v in row.items() if k.startswith(prefix)
        }
        return {key.replace('_', ' '): value for key, value in part.items()}

    falls = ', '.join(f'{kind} {share:.0%}' for kind, share in some('order: ').items())
    moves = some('move: ')
    stays = ', '.join(
        f'{key.removesuffix(", median")} {value:.3f} '
        f'({moves[key.replace("median", "p95")]:.3f})'
        for key, value in moves.items()
        if key.endswith('median')
    )
    several = row['splits'] > 1
    srcc, plcc = (
        f'{row[f"{key}_median"]:.3f}'
        + f' [{row[f"{key}_lowest"]:.3f} to {row[f"{key}_highest"]:.3f}]' * several
        for key in ('srcc', 'plcc')
    )
    where = f'held-out sides of {row["splits"]} splits' if several else 'held-out side'
    return {
        'Results': f'SRCC {srcc}, PLCC {plcc}'
        + ', median [range]' * several
        + f' on the {row["held_out"]} photographs of the {where}; one seed. Mean '
        f'absolute error {row["mean_absolute_error"]:.2f} points',
        'Falls with damage': f'{row["right_order"]:.1%} of neighbouring levels in the '
        f'right order: {falls}',
        'Stays where nothing changed': 'moves of the score, median (95th percentile): '
        f'{stays}',
        'Speed': f'{row["milliseconds"]:.0f} ms for 512 x 512 pixels, one CPU thread',
        'Cost': f'{row["training_minutes"]} minutes of training on a share of two CPU '
        'cores, with the teacher and all starts',
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
    add('--only', nargs='+', help='publish these metrics; measure all')
    add('-o', '--output', type=Path, default=BUNDLED_FOLDER, help='of the weights')
    args = parser.parse_args()
    if args.output != BUNDLED_FOLDER:  # so that pyiqa knows these names, too
        os.environ[WEIGHTS_VARIABLE] = str(args.output.resolve())
    release = Release(args)
    if unknown := set(args.only or ()) - set(release.metrics):
        parser.error(f'`--only`: the plan has no {", ".join(sorted(unknown))}.')
    release.prepare()
    release.train()
    teacher = release.plan['teacher']
    release.measure(
        'clipkd_teacher',
        release.checkpoint(teacher['training']),
        *('--input-size', teacher['input_size']),
    )
    files = {name: args.output / f'{name}.safetensors' for name in release.metrics}
    rows = []
    for name, path in files.items():
        if not args.only or name in args.only:
            release.publish(name)
        row = table_row(name, path, release.measure(name, path))
        seconds = release.seconds(release.metrics[name]['training'])
        rows.append(row | {'training_minutes': round(seconds / 60)})
    times = milliseconds(files)
    rows = [row | {'milliseconds': round(times[row['metric']], 1)} for row in rows]
    release.write(rows)
    shown = ['metric', 'megabytes', 'srcc_median', 'right_order', 'milliseconds']
    print(pd.DataFrame(rows)[shown].to_string(index=False))


if __name__ == '__main__':
    main()
