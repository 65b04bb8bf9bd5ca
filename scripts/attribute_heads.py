"""Make the attribute heads of a metric: small heads on its frozen encoder.

Photographs are labelled by classical measures (`pyiqa_clipkd.attributes.measures`):
each as it is, once more with each attribute changed at random, and once with two of
them changed. A copy has a new label of what was changed in it alone: the others stay
those of the photograph, so that what else the measures make of a change isn't learned.

The result lies beside the metric's weights: METRIC.attributes.safetensors, for
onnxruntime METRIC.attributes.onnx, and METRIC.attributes.md says what they are.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from pyiqa_clipkd.attributes.changes import change, random_level
from pyiqa_clipkd.attributes.measures import at_scale
from pyiqa_clipkd.attributes.names import ATTRIBUTES
from pyiqa_clipkd.attributes.ranks import MeasureLabeller
from pyiqa_clipkd.attributes.readout import AttributeReadout, write_readout
from pyiqa_clipkd.correlation import spearman
from pyiqa_clipkd.experiment import recorded_command, recorded_commit
from pyiqa_clipkd.export import write_graph
from pyiqa_clipkd.files import SHORT_HASH, file_hash
from pyiqa_clipkd.images import read_photograph, squares
from pyiqa_clipkd.locations import BUNDLED_FOLDER, attributes_file
from pyiqa_clipkd.metric import CLIPKDMetric
from pyiqa_clipkd.models import card_text
from pyiqa_clipkd.names import DEFAULT_METRIC, SUFFIX
from pyiqa_clipkd.network import QualityNetwork
from pyiqa_clipkd.stages import statistics

ROOT = Path(__file__).resolve().parents[1]

# The photograph, a copy for each attribute, and one in which two were changed.
COPIES = len(ATTRIBUTES) + 2

# Between the seeds of the copies of the two sides.
SIDES_APART = 1_000_000

# How many stages of the encoder the heads see. On 150 held-out photographs the last one
# of EfficientNet-Lite0, at stride 32, made all five worse.
STAGES = 4

# Of the fit.
PHOTOGRAPHS, RATE, DECAY, NOISE = 64, 2e-3, 1e-2, 0.05


class Side(NamedTuple):
    """Photographs, `COPIES` rows each.

    Attributes:
        squares: uint8 (N, S, S, 3), on the disk.
        labels: float32 (N, 5) in [0, 1].
    """

    squares: np.ndarray
    labels: Tensor


def copies(path: Path, seed: int, *, size: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (COPIES, size, size, 3) and their labels (COPIES, 5)."""
    draw = np.random.default_rng(seed)
    label = MeasureLabeller()
    original = at_scale(read_photograph(path).image)
    both = [ATTRIBUTES[i] for i in draw.choice(len(ATTRIBUTES), 2, replace=False)]
    pixels, labels = [_square(original, size)], [_row(label(original))]
    for changed in (*((attribute,) for attribute in ATTRIBUTES), both):
        copy = original
        for attribute in changed:
            level = random_level(attribute, draw)
            copy = change(copy, attribute, level, int(draw.integers(2**32)))
        own = [attribute in changed for attribute in ATTRIBUTES]
        labels.append(np.where(own, _row(label(copy)), labels[0]))
        pixels.append(_square(copy, size))
    return np.stack(pixels), np.stack(labels)


def _row(values: dict[str, float]) -> np.ndarray:
    return np.array([values[attribute] for attribute in ATTRIBUTES], np.float32)


def _square(image: Image.Image, size: int) -> np.ndarray:
    return np.rint(255 * squares(image, size)[0]).astype(np.uint8).transpose(1, 2, 0)


def draw_side(
    paths: Sequence[Path], seeds: Sequence[int], size: int, args: argparse.Namespace
) -> Side:
    """The copies of these photographs, from `--work` where they are there already."""
    made_of = json.dumps([*map(str, paths), seeds, size, MeasureLabeller().identity])
    digest = hashlib.sha256(made_of.encode()).hexdigest()[:SHORT_HASH]
    store = args.work / f'{digest}.npy'
    numbers = store.with_suffix('.labels.npy')
    if not numbers.is_file():
        shape = (len(paths) * COPIES, size, size, 3)
        store.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.lib.format.open_memmap(store, 'w+', np.uint8, shape)
        labels = np.empty((shape[0], len(ATTRIBUTES)), np.float32)
        with ProcessPoolExecutor(args.jobs) as pool:
            work = pool.map(partial(copies, size=size), paths, seeds)
            for i, (some, theirs) in enumerate(tqdm(work, total=len(paths))):
                rows = slice(COPIES * i, COPIES * (i + 1))
                pixels[rows], labels[rows] = some, theirs
        np.save(numbers, labels)
    return Side(np.load(store, mmap_mode='r'), torch.from_numpy(np.load(numbers)))


@torch.inference_mode()
def channels(network: QualityNetwork) -> list[int]:
    """Of the maps that the heads see."""
    encoder: Any = network.encoder
    side = network.preprocessing.input_size
    _, maps = encoder.forward_with_maps(torch.zeros(1, 3, side, side))
    return [each.shape[1] for each in maps[:STAGES]]


@torch.inference_mode()
def features(network: QualityNetwork, side: Side) -> Tensor:
    """(N, F), what the heads see."""
    encoder: Any = network.encoder
    rows = []
    for i in tqdm(range(0, len(side.squares), COPIES)):
        pixels = torch.from_numpy(np.array(side.squares[i : i + COPIES]))
        images = network.preprocessing(pixels.permute(0, 3, 1, 2).float() / 255)
        rows.append(statistics(encoder.forward_with_maps(images)[1][:STAGES]))
    return torch.cat(rows).clone()


def fit(
    seen: Tensor, labels: Tensor, readout: AttributeReadout, *, steps: int, seed: int
) -> None:
    """Fit the heads to features (N, F) and labels (N, 5).

    What counts is how far values are from their labels, and how far the steps from a
    photograph to its copies are from those of the labels.
    """
    torch.manual_seed(seed)
    mean, deviation = seen.mean(0), seen.std(0).clamp(min=1e-6)
    width = len(readout.hidden_bias)
    hidden, last = nn.Linear(seen.shape[1], width), nn.Linear(width, len(ATTRIBUTES))
    net = nn.Sequential(hidden, nn.ReLU(), last, nn.Sigmoid())
    optimizer = torch.optim.AdamW(net.parameters(), RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps)
    inputs = ((seen - mean) / deviation).view(-1, COPIES, seen.shape[1])
    targets = labels.view(-1, COPIES, len(ATTRIBUTES))
    for _ in range(steps):
        chosen = torch.randint(len(inputs), (PHOTOGRAPHS,))
        values = net(inputs[chosen] + NOISE * torch.randn_like(inputs[chosen]))
        off = values - targets[chosen]
        loss = off.abs().mean() + (off[:, 1:] - off[:, :1]).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    weight = hidden.weight.detach() / deviation
    readout.set(
        {
            'hidden_weight': weight,
            'hidden_bias': hidden.bias.detach() - weight @ mean,
            'weight': last.weight.detach(),
            'bias': last.bias.detach(),
        }
    )


def agreement(values: Tensor, labels: Tensor) -> dict[str, Any]:
    """How well values (N, 5) agree with labels, for all copies and for photographs."""
    found: dict[str, Any] = {}
    for name, rows in (('all', slice(None)), ('unchanged', slice(None, None, COPIES))):
        one, other = values[rows].numpy(), labels[rows].numpy()
        found[name] = {
            attribute: {
                'srcc': spearman(one[:, i], other[:, i]),
                'mean_absolute_error': float(np.abs(one[:, i] - other[:, i]).mean()),
            }
            for i, attribute in enumerate(ATTRIBUTES)
        }
    return found


def write_card(
    weights: Path, results: Mapping[str, Any], *, data: str, licence: str
) -> Path:
    """What a reader should know of the heads, beside them."""
    heads = attributes_file(weights)
    sides, test = results['photographs'], results['test']
    rows = {
        'Values': f'{", ".join(ATTRIBUTES)}, in [0, 1], 1 the good side: noisiness 1 '
        'is free of noise',
        'Heads': f'means and deviations of the channels of the first {STAGES} stages '
        f'of {weights.name}, which stays as it is; two linear layers',
        'File': f'{heads.name}, {heads.stat().st_size / 1e6:.2f} MB, float16',
        'SHA-256': f'`{file_hash(heads)}`',
        'Labels': f'{results["labels"]}: classical measures of the photographs and of '
        f'{COPIES - 1} changed copies of each. No person has judged these attributes',
        'Data': f'{sides["train"]} photographs. {data}',
        'Licence': licence,
        'Rank correlation with the labels': _figures(test['all'], 'srcc')
        + f'; {sides["test"]} held-out photographs and their copies',
        'Without the copies': _figures(test['unchanged'], 'srcc'),
        'Mean absolute error': _figures(test['all'], 'mean_absolute_error'),
        'Limits': 'They know what the measures know, seen at the size of the squares: '
        'fine noise of large photographs is gone before, texture all over may count as '
        'noise, and brightness and contrast know no "too much"',
        'Made by': results['command'],
    }
    path = heads.with_suffix('.md')
    text = card_text(f'Attributes of {weights.stem}', rows)
    path.write_text(text, encoding='utf-8')
    return path


def _figures(found: Mapping[str, Any], figure: str) -> str:
    return ', '.join(f'{a} {found[a][figure]:.2f}' for a in ATTRIBUTES)


def names(args: argparse.Namespace, side: str, count: int) -> list[Path]:
    table = pd.read_csv(args.csv)
    table = table[table[args.column] == side]
    drawn = table.iloc[:, 0].sample(min(count, len(table)), random_state=args.seed)
    return [args.images / name for name in drawn]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('metric', nargs='?', default=DEFAULT_METRIC)
    add('--folder', type=Path, default=BUNDLED_FOLDER, help='of its weights')
    add('--images', type=Path, required=True, help='folder')
    add('--csv', type=Path, required=True, help='first column: names in that folder')
    add('--column', required=True, help='of a split: train and test sides')
    add('--count', type=int, default=900, help='photographs to learn from')
    add('--test-count', type=int, default=150)
    add('--width', type=int, default=64, help='of the hidden layer')
    add('--steps', type=int, default=4000, help='of the fit')
    add('--seed', type=int, default=0)
    add('--jobs', type=int, default=1, help='processes that make copies')
    add('--work', type=Path, default=ROOT / 'datasets' / 'attribute_heads')
    add('--data', default='not stated', help='the photographs, for the card')
    add('--licence', default='not stated', help='terms of the heads, for the card')
    add('-o', '--output', type=Path, help='.json, for how well they agree')
    args = parser.parse_args()
    weights = args.folder / f'{args.metric}{SUFFIX}'
    network = CLIPKDMetric(args.metric, pretrained_model_path=weights)
    size = network.preprocessing.input_size
    sides = {}
    for begin, (side, count) in enumerate(
        (('train', args.count), ('test', args.test_count))
    ):
        paths = names(args, side, count)
        first = args.seed + begin * SIDES_APART
        sides[side] = draw_side(
            paths, [first + i for i in range(len(paths))], size, args
        )
    seen = {side: features(network, content) for side, content in sides.items()}
    readout = AttributeReadout(channels(network), args.width)
    labels = sides['train'].labels
    fit(seen['train'], labels, readout, steps=args.steps, seed=args.seed)
    results = {
        'command': recorded_command(sys.argv, ROOT),
        'commit': recorded_commit(ROOT),
        'seed': args.seed,
        'labels': MeasureLabeller().identity,
        'photographs': {side: len(s.labels) // COPIES for side, s in sides.items()},
        'test': agreement(readout.of_statistics(seen['test']), sides['test'].labels),
    }
    write_readout(readout, weights, results)
    write_graph(args.metric, args.folder, attributes=True)
    written = write_card(weights, results, data=args.data, licence=args.licence)
    print(json.dumps(results['test'], indent=2))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(results, indent=2) + '\n')
    print(f'{attributes_file(weights)} and {written.name}')


if __name__ == '__main__':
    main()
