"""From photographs and a CSV to the weight files in the package, in one command.

    python scripts/release.py --images datasets/biq2021/Images \
        --csv datasets/biq2021/meta_info_BIQ2021_subset.csv

It resizes the photographs once, trains what configs/release/plan.yml lists, publishes
the metrics, measures each of them, and writes the model cards from these measurements.
What is finished is left alone, so the same command goes on where a stopped one was:
a training at its last checkpoint, a measurement where the weights have changed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml

from pyiqa_clipkd.files import written_whole
from pyiqa_clipkd.metric import CLIPKDMetric
from pyiqa_clipkd.options import load_options
from pyiqa_clipkd.publish import model_card, publish
from pyiqa_clipkd.weights import BUNDLED_FOLDER, file_hash, read_weights

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / 'configs' / 'release'
RESULTS = ROOT / 'configs' / 'results' / 'release'
COMMON = 'common_split'
WORDS = {True: 'train', False: 'test'}
SECONDS_A_MEASUREMENT = 3.0


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


def prepare(csv: Path, images: Path, plan: dict[str, Any]) -> None:
    """The resized photographs and their table, where the option files expect them."""
    data = load_options(CONFIGS / plan['trainings'][0])['datasets']['train']
    target = Path(data['meta_info_file'])
    if target.is_file():
        return
    wide = target.parent.parent / target.name
    wide.parent.mkdir(parents=True, exist_ok=True)
    add_columns(pd.read_csv(csv), plan['splits']).to_csv(wide, index=False)
    run('resize_images.py', wide, '--images', images, '--size', plan['size'],
        '--format', 'bmp', '-o', target.parent)  # fmt: skip
    wide.unlink()


def run(script: str, *arguments: Any) -> None:
    """Run another script of this folder; its failure ends this one."""
    command = [sys.executable, str(ROOT / 'scripts' / script), *map(str, arguments)]
    print('==', *command[1:], flush=True)
    subprocess.run(command, check=True, env=environment())


def environment() -> dict[str, str]:
    paths = [str(ROOT), os.environ.get('PYTHONPATH', '')]
    return os.environ | {'PYTHONPATH': os.pathsep.join(filter(None, paths))}


def experiment(file: str) -> Path:
    return Path('experiments', load_options(CONFIGS / file)['name'])


def train(plan: dict[str, Any]) -> None:
    """Each training of the plan in turn, from its last checkpoint."""
    for file in plan['trainings']:
        if not (experiment(file) / 'run.json').is_file():
            run('train.py', '-opt', CONFIGS / file, '--auto_resume')


def seconds_of(file: str) -> int:
    """What a training cost, with those that it starts from and its teacher."""
    options = load_options(CONFIGS / file)
    before = [options['path'].get('pretrain_network')]
    before.append((options.get('teacher') or {}).get('weights'))
    seconds = json.loads((experiment(file) / 'run.json').read_text())['seconds']
    for path in filter(None, before):
        [earlier] = [f for f in all_trainings() if experiment(f) in Path(path).parents]
        seconds += seconds_of(earlier)
    return seconds


def all_trainings() -> list[str]:
    return read_plan()['trainings']


def read_plan() -> dict[str, Any]:
    plan: dict[str, Any] = yaml.safe_load((CONFIGS / 'plan.yml').read_text())
    return plan


def measure(name: str, weights: Path, args: argparse.Namespace) -> dict[str, Any]:
    """What the two scripts and a clock say of a weight file."""
    found: dict[str, Any] = {}
    columns = split_columns(args.plan['splits'])
    photographs = ['--images', args.photographs] if args.photographs else []
    commands = {
        'scores': ['evaluate.py', name, '--weights', weights, '--images',
                   args.images, '--csv', args.csv, '--columns', *columns,
                   '--plot', RESULTS / f'{name}.reliability.png'],
        'robustness': ['robustness.py', name, '--weights', weights, *photographs],
    }  # fmt: skip
    for what, command in commands.items():
        path = RESULTS / f'{name}.{what}.json'
        if not path.is_file() or (
            json.loads(path.read_text())['weights_sha256'] != file_hash(weights)
        ):
            run(*command, '-o', path)
        found[what] = json.loads(path.read_text())
    return found


def milliseconds(names: dict[str, Path]) -> dict[str, float]:
    """Time of one photograph of 512 px on one thread: the best of many, in turn."""
    torch.set_num_threads(1)
    metrics = {n: CLIPKDMetric(n, pretrained_model_path=p) for n, p in names.items()}
    image = torch.rand(1, 3, 512, 512)
    best = dict.fromkeys(metrics, float('inf'))
    end = time.time() + SECONDS_A_MEASUREMENT * len(metrics)
    with torch.inference_mode():
        while time.time() < end:
            for name, metric in metrics.items():
                start = time.perf_counter()
                metric(image)
                best[name] = min(best[name], time.perf_counter() - start)
    return {name: 1000 * seconds for name, seconds in best.items()}


def table_row(name: str, path: Path, entry: dict[str, Any]) -> dict[str, Any]:
    """One row of the release's table: what the cards and README say of a metric."""
    found, metadata = entry['found'], read_weights(path).metadata
    columns = found['scores']['columns'].values()
    moves = found['robustness']['moves']
    return {
        'metric': name,
        'encoder': metadata['config']['encoder'],
        'input_size': metadata['config']['input_size'],
        'megabytes': round(path.stat().st_size / 1e6, 2),
        'precision': metadata['precision'],
        'milliseconds': round(entry['milliseconds'], 1),
        **{
            f'{key}_{word}': round(function(row[key] for row in columns), 4)
            for key in ('srcc', 'plcc')
            for word, function in (
                ('median', lambda v: pd.Series(list(v)).median()),
                ('lowest', min),
                ('highest', max),
            )
        },
        'mean_absolute_error': round(found['scores']['all']['mean_absolute_error'], 3),
        'right_order': round(found['robustness']['right_order_all'], 4),
        **{
            f'order_{kind}': round(share, 4)
            for kind, share in found['robustness']['right_order'].items()
        },
        **{
            f'move_{kind}_{word}': round(values[word], 4)
            for kind, values in moves.items()
            for word in ('median', 'p95')
        },
        'training_minutes': round(entry['seconds'] / 60),
        'sha256': file_hash(path),
    }


def measured_rows(row: dict[str, Any], results: Path) -> dict[str, str]:
    """The rows of a model card that come from measurements."""
    orders = {k.removeprefix('order_'): v for k, v in row.items() if 'order_' in k}
    orders.pop('right_order', None)
    kinds = [k[5:-7] for k in row if k.startswith('move_') and k.endswith('_median')]
    moves = [
        f'{kind.replace("_", " ")} {row[f"move_{kind}_median"]:.3f} '
        f'({row[f"move_{kind}_p95"]:.3f})'
        for kind in kinds
    ]
    falls = ', '.join(f'{k.replace("_", " ")} {v:.1%}' for k, v in orders.items())
    return {
        'Results': f'SRCC {row["srcc_median"]:.3f} [{row["srcc_lowest"]:.3f} to '
        f'{row["srcc_highest"]:.3f}], PLCC {row["plcc_median"]:.3f}, median [range] of '
        'the held-out sides of three splits; mean absolute error '
        f'{row["mean_absolute_error"]:.2f} points',
        'Falls with damage': f'{row["right_order"]:.1%} of neighbouring levels of '
        f'damage in the right order: {falls}',
        'Stays where nothing changed': 'score moves, median (95th percentile): '
        + ', '.join(moves),
        'Speed': f'{row["milliseconds"]:.0f} ms a photograph of 512 px, one CPU thread',
        'Cost': f'{row["training_minutes"]} minutes on a share of two CPU cores, its '
        'teacher and starts included',
        'Raw figures': f'configs/results/release/{results.name}',
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--images', type=Path, required=True, help='folder')
    parser.add_argument(
        '--csv', type=Path, required=True, help='with columns of splits'
    )
    parser.add_argument('--photographs', type=Path, help='good ones, for robustness.py')
    parser.add_argument('--only', nargs='+', help='publish and measure these metrics')
    parser.add_argument('-o', '--output', type=Path, default=BUNDLED_FOLDER)
    args = parser.parse_args()
    args.plan = plan = read_plan()
    if unknown := set(args.only or ()) - set(plan['metrics']):
        parser.error(f'`--only`: the plan has no {", ".join(sorted(unknown))}.')
    prepare(args.csv, args.images, plan)
    train(plan)
    entries: dict[str, dict[str, Any]] = {}
    for name, settings in plan['metrics'].items():
        checkpoint = experiment(settings['training']) / 'models' / 'net_best.pth'
        path = args.output / f'{name}.safetensors'
        if not args.only or name in args.only:
            card = plan['card'] | settings['card']
            made_by = ', '.join(f'configs/release/{f}' for f in settings['made_by'])
            card['Made by'] = f'scripts/release.py with {made_by}, seed 123'
            path = publish(
                checkpoint,
                name,
                folder=args.output,
                precision=settings['precision'],
                card=card,
                input_size=settings.get('input_size'),
            )
        entries[name] = {
            'path': path,
            'found': measure(name, path, args),
            'seconds': seconds_of(settings['training']),
        }
    times = milliseconds({name: entry['path'] for name, entry in entries.items()})
    rows = []
    for name, entry in entries.items():
        path = entry['path']
        rows.append(table_row(name, path, entry | {'milliseconds': times[name]}))
        text = model_card(
            path, read_weights(path).metadata, measured_rows(rows[-1], RESULTS / name)
        )
        with written_whole(path.with_suffix('.md')) as partial:
            partial.write_text(text, encoding='utf-8')
    pd.DataFrame(rows).to_csv(RESULTS / 'release.csv', index=False)
    print(pd.DataFrame(rows).iloc[:, :14].to_string())


if __name__ == '__main__':
    main()
