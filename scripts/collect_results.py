"""One table from the records (`run.json`) of several trainings."""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

COLUMNS = [
    'name',
    'data',
    'split',
    'seed',
    'encoder',
    'input_size',
    'head',
    'loss',
    'teacher',
    'epochs',
    'iterations',
    'srcc',
    'plcc',
    'seconds',
    'commit',
    'command',
]


def row(record: dict[str, Any]) -> dict[str, Any]:
    """What a reader of the table wants to know of one training."""
    options = record['options']
    network, training = options['network'], options['train']
    data, metrics = next(iter(record['results'].items()))
    distillation = training.get('distillation_loss_opt')
    if distillation:
        loss = distillation['schedule']
        loss += f' {distillation["soft_weight"]:g}' if loss == 'fixed' else ''
        loss = f'soft and hard, lambda {loss}'
    else:
        loss = training['mos_loss_opt']['type']
    return {
        'name': options['name'],
        'data': data,
        'split': options['datasets']['train'].get('split_index'),
        'seed': options['manual_seed'],
        'encoder': network['encoder'],
        'input_size': network.get('input_size', 224),
        'head': network.get('head', 'likert'),
        'loss': loss,
        'teacher': (options.get('teacher') or {}).get('weights', ''),
        'epochs': training.get('total_epoch'),
        'iterations': metrics['srcc']['iter'],
        'srcc': f'{metrics["srcc"]["val"]:.4f}',
        'plcc': f'{metrics["plcc"]["val"]:.4f}',
        'seconds': record['seconds'],
        'commit': record['commit'],
        'command': record['command'],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('experiments', nargs='+', type=Path, help='folders')
    parser.add_argument('-o', '--output', required=True, type=Path, help='CSV file')
    args = parser.parse_args()
    rows = [row(json.loads((e / 'run.json').read_text())) for e in args.experiments]
    with args.output.open('w', newline='') as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    for one in rows:
        print(f'| {one["name"]} | {one["loss"]} | {one["srcc"]} | {one["plcc"]} |')


if __name__ == '__main__':
    main()
