"""Train a small enhancement network with the metric as loss, and judge it.

The same network is trained with minus the score of its output as loss, with that and a
price on every slider that it moves, and with L1 to the undamaged photograph, which the
others never see. All learn from damaged copies (and, one in six, undamaged ones) of the
well scored photographs of one side of a split. They are judged on the other side and on
a folder of free photographs by full-reference metrics, by the metric itself and by a
metric that took no part, beside Pillow's auto-contrast. Written are all rows, a table,
a record, and a sheet of typical and worst cases among the free photographs, to look at.
Networks that are there already, of the same options, aren't trained again.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyiqa
import torch
from evaluate import ROOT
from map_accuracy import candidates
from PIL import Image, ImageDraw, ImageFont, ImageOps
from restore import to_image
from robustness import photographs
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchvision.transforms.functional import to_tensor
from tqdm import tqdm

from pyiqa_clipkd.attributes.changes import change
from pyiqa_clipkd.degradations import degrade
from pyiqa_clipkd.enhancement import EnhancementNetwork, enhance, settings_from
from pyiqa_clipkd.experiment import recorded_command, recorded_commit
from pyiqa_clipkd.files import file_hash
from pyiqa_clipkd.images import read_photograph
from pyiqa_clipkd.locations import find_weights
from pyiqa_clipkd.names import DEFAULT_METRIC
from pyiqa_clipkd.pipeline import keep_freed_memory

# (photograph, level, seed) -> a damaged copy. 0.2 of the colour a level are lost.
Damage = Callable[[Image.Image, float, int], Image.Image]
DAMAGES: dict[str, Damage] = {
    'none': lambda image, level, seed: image,
    'underexposure': lambda image, level, seed: degrade(image, 'underexposure', level),
    'overexposure': lambda image, level, seed: degrade(image, 'overexposure', level),
    'contrast_loss': lambda image, level, seed: degrade(image, 'contrast_loss', level),
    'colour_fade': lambda image, level, seed: change(
        image, 'colorfulness', -0.2 * level
    ),
    'white_noise': lambda image, level, seed: degrade(
        image, 'white_noise', level, seed
    ),
}
LOWEST_LEVEL, HIGHEST_LEVEL = 1.0, 4.0

# (enhanced (N, 3, H, W), undamaged, sliders (N, 22)) -> the loss.
Objective = Callable[[Tensor, Tensor, Tensor], Tensor]

# What a network depends on: one of the same options isn't trained again.
OPTIONS = ('images', 'csv', 'column', 'train_side', 'mos_range')
OPTIONS += ('metric', 'size', 'batch', 'rate', 'seed')

# Full-reference metrics of pyiqa that need no weights. NLPD is a distance.
LIKENESS = ('psnr', 'ssim', 'nlpd')
COLUMNS = (*LIKENESS, 'score', 'judge')
DAMAGED, AUTO_CONTRAST, L1 = 'damaged', 'auto_contrast', 'l1'

# Photographs are judged at this longest side in pixels.
LONGEST = 320

# What stands above the tables.
KEY = """\
`damaged`: the copy as it is. `price_0`: trained with the metric alone. Others: and a
price for each slider that is moved. `l1`: trained with the undamaged photographs.
PSNR and SSIM: higher is more like the undamaged photograph (80 dB: equal to it); NLPD:
lower is. `score` is the metric of the training, `judge` the other one."""

# A copy is seen to be damaged below this PSNR in decibels.
SEEN = 35.0

# Of the sheet, in pixels.
CELL, LINE = (176, 117), 14


def well_scored(args: argparse.Namespace, side: str) -> list[Path]:
    """Of one side of the split, in an order that the seed decides."""
    paths = candidates(argparse.Namespace(**{**vars(args), 'side': side}))
    if not paths:
        raise SystemExit(f'`--csv`: no well scored photograph is on the side {side!r}.')
    return paths


def damaged(image: Image.Image, seed: tuple[int, ...]) -> Image.Image:
    """A copy with damage of a kind and strength that the seed decides."""
    rng = np.random.default_rng(seed)
    damage = DAMAGES[rng.choice(list(DAMAGES))]
    return damage(
        image, rng.uniform(LOWEST_LEVEL, HIGHEST_LEVEL), int(rng.integers(99))
    )


def batches(
    paths: list[Path], steps: int, args: argparse.Namespace
) -> Iterator[list[Tensor]]:
    """Damaged copies and the photographs themselves: (N, 3, S, S) in [0, 1] each."""
    for step in range(steps):
        pairs = []
        for place in range(args.batch):
            number = step * args.batch + place
            image = read_photograph(paths[number % len(paths)]).image
            image = ImageOps.fit(image, (args.size, args.size))
            pairs.append((damaged(image, (args.seed, number)), image))
        yield [
            torch.stack([to_tensor(one) for one in side])
            for side in zip(*pairs, strict=True)
        ]


def objectives(args: argparse.Namespace) -> dict[str, Objective]:
    """The losses to compare."""
    score = pyiqa.create_metric(
        args.metric, as_loss=True, input_size=args.size, device='cpu'
    )

    def priced(price: float) -> Objective:
        return lambda enhanced, _, sliders: (
            price * sliders.abs().sum(1).mean() - score(enhanced)
        )

    found: dict[str, Objective] = {f'price_{p:g}': priced(p) for p in args.prices}
    found[L1] = lambda enhanced, undamaged, _: (enhanced - undamaged).abs().mean()
    return found


def train(
    pairs: Iterator[list[Tensor]], objective: Objective, *, steps: int, rate: float
) -> EnhancementNetwork:
    """A new network, trained on pairs of damaged copies and photographs."""
    network = EnhancementNetwork()
    optimizer = torch.optim.Adam(network.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for copies, originals in (bar := tqdm(pairs, total=steps, unit='step')):
        sliders = network.positions(copies)
        enhanced = enhance(copies, settings_from(sliders))
        loss = objective(enhanced, originals, sliders)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f'{loss.item():.3f}', refresh=False)
    return network.eval().requires_grad_(False)


def trained(
    args: argparse.Namespace,
) -> tuple[dict[str, EnhancementNetwork], dict[str, float]]:
    """Networks by name, and the minutes that each took (or had taken)."""
    options = {name: str(getattr(args, name)) for name in OPTIONS}
    paths = well_scored(args, args.train_side)
    args.networks.mkdir(parents=True, exist_ok=True)
    networks, minutes = {}, {}
    for name, objective in objectives(args).items():
        steps = args.l1_steps if name == L1 else args.steps
        options['steps'] = str(steps)
        file = args.networks / f'{name}.safetensors'
        if (stored := _metadata(file)) and options.items() <= stored.items():
            networks[name] = EnhancementNetwork().eval().requires_grad_(False)
            networks[name].load_state_dict(load_file(file))
            minutes[name] = float(stored['minutes'])
            continue
        torch.manual_seed(args.seed)
        start = time.time()
        pairs = batches(paths, steps, args)
        networks[name] = train(pairs, objective, steps=steps, rate=args.rate)
        minutes[name] = round((time.time() - start) / 60, 1)
        metadata = {**options, 'minutes': str(minutes[name])}
        save_file(networks[name].state_dict(), file, metadata)
    return networks, minutes


def _metadata(file: Path) -> dict[str, str]:
    if not file.is_file():
        return {}
    with safe_open(file, 'pt') as stored:
        return stored.metadata() or {}


def ways_of(
    copy: Image.Image, networks: dict[str, EnhancementNetwork]
) -> dict[str, Image.Image]:
    """The damaged copy as it is and as each way enhances it, in eight bits."""
    found = {
        DAMAGED: copy,
        AUTO_CONTRAST: ImageOps.autocontrast(copy, cutoff=1, preserve_tone=True),
    }
    img = to_tensor(copy)[None]
    return found | {name: to_image(network(img)) for name, network in networks.items()}


def held_out(args: argparse.Namespace) -> Iterator[tuple[str, str, Image.Image]]:
    """Group, name and photograph: those of the data set, then the free ones."""
    for path in well_scored(args, args.test_side)[: args.photographs]:
        image = read_photograph(path).image
        image.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
        yield 'held_out', path.name, image
    for name, image in photographs(args.free, LONGEST):
        yield 'free', name, image


def cases(
    args: argparse.Namespace,
) -> Iterator[tuple[dict[str, Any], Image.Image, Image.Image]]:
    """What it is, the photograph, and a copy: each photograph with each damage."""
    for number, (group, name, image) in enumerate(held_out(args)):
        rng = np.random.default_rng((args.seed, number))
        for kind, damage in DAMAGES.items():
            level = round(float(rng.uniform(LOWEST_LEVEL, HIGHEST_LEVEL)), 2)
            case = {'group': group, 'photograph': name, 'kind': kind, 'level': level}
            yield case, image, damage(image, level, number)


@torch.inference_mode()
def judge(
    args: argparse.Namespace, networks: dict[str, EnhancementNetwork]
) -> pd.DataFrame:
    """A row for each case and each way to enhance it."""
    alike = {name: pyiqa.create_metric(name, device='cpu') for name in LIKENESS}
    blind = {
        'score': pyiqa.create_metric(args.metric, device='cpu'),
        'judge': pyiqa.create_metric(args.judge, device='cpu'),
    }
    rows = []
    for case, image, copy in tqdm(cases(args), unit='case'):
        ways = ways_of(copy, networks)
        shown = torch.stack([to_tensor(one) for one in ways.values()])
        original = to_tensor(image).expand_as(shown)
        values = {key: metric(shown, original) for key, metric in alike.items()}
        values |= {key: metric(shown) for key, metric in blind.items()}
        for place, way in enumerate(ways):
            numbers = {key: round(v[place].item(), 4) for key, v in values.items()}
            rows.append({**case, 'way': way, **numbers})
    return pd.DataFrame(rows)


def gains(rows: pd.DataFrame) -> pd.DataFrame:
    """Each row with `gain`: its PSNR less that of the damaged copy."""
    case = ['group', 'photograph', 'kind']
    before = rows[rows.way == DAMAGED].set_index(case).psnr
    return rows.assign(gain=rows.psnr - rows[case].join(before, on=case).psnr)


def tables(rows: pd.DataFrame) -> str:
    """Means by kind of damage, and the share that became less alike, in Markdown."""
    ways = list(dict.fromkeys(rows.way))
    kinds = list(DAMAGES)
    text = [KEY]
    for group, of_group in gains(rows).groupby('group', sort=False):
        count = of_group.photograph.nunique()
        for column in (*COLUMNS, 'worse'):
            values = of_group.assign(worse=100 * (of_group.gain < 0))
            table = values.pivot_table(column, 'way', 'kind').loc[ways, kinds]
            title = 'PSNR lower than before, %' if column == 'worse' else column
            digits = 0 if column == 'worse' else 1 if column == 'psnr' else 3
            text += ['', f'## {title}: {group}, {count} photographs', '']
            text += ['| ' + ' | '.join(['', *kinds]) + ' |', '|---' * 7 + '|']
            for way, line in table.iterrows():
                cells = [f'{value:.{digits}f}' for value in line]
                text.append('| ' + ' | '.join([f'`{way}`', *cells]) + ' |')
    return '\n'.join(text).strip() + '\n'


def chosen(rows: pd.DataFrame, way: str) -> list[tuple[str, pd.Series]]:
    """Cases for the sheet: of each kind the median gain, then the lowest one."""
    found = gains(rows)
    found = found[(found.way == way) & (found.group == 'free')].sort_values('gain')
    typical = [found[found.kind == kind] for kind in DAMAGES]
    middle = [('typical', of_kind.iloc[len(of_kind) // 2]) for of_kind in typical]
    # What fades without colour to lose isn't damaged: any change of it is a loss.
    found = found[found.psnr - found.gain < SEEN]
    worst = found.drop(case.name for _, case in middle if case.name in found.index)
    return middle + [
        ('worst', row) for _, row in worst.groupby('kind').head(1).iterrows()
    ]


def sheet(
    args: argparse.Namespace,
    networks: dict[str, EnhancementNetwork],
    rows: pd.DataFrame,
) -> Image.Image:
    """Pristine, damaged, and enhanced by the networks: a line for each chosen case."""
    columns = [DAMAGED, *networks]
    lines = chosen(rows, f'price_{args.prices[-1]:g}')
    wanted = {
        (case.photograph, case.kind): place for place, (_, case) in enumerate(lines)
    }
    psnr = rows[rows.group == 'free'].set_index(['photograph', 'kind', 'way']).psnr
    width, height = CELL[0] + 4, CELL[1] + 2 * LINE + 4
    page = Image.new('RGB', (width * (1 + len(columns)), height * len(lines)), 'white')
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(11)
    for case, image, copy in cases(args):
        key = case['photograph'], case['kind']
        if case['group'] != 'free' or key not in wanted:
            continue
        top = height * wanted[key]
        title = f'{lines[wanted[key]][0]}, {key[1]} {case["level"]}: {key[0]}'
        draw.text((2, top), title, 'black', font)
        made = ways_of(copy, networks)
        cells = [('pristine', image)]
        cells += [(f'{way} {psnr[(*key, way)]:.1f} dB', made[way]) for way in columns]
        for place, (caption, shown) in enumerate(cells):
            small = ImageOps.contain(shown, CELL, Image.Resampling.LANCZOS)
            draw.text((place * width + 2, top + LINE), caption, 'black', font)
            page.paste(small, (place * width, top + 2 * LINE))
    return page


def record(args: argparse.Namespace, minutes: dict[str, float]) -> dict[str, Any]:
    """What a reader needs to repeat it."""
    weights = {name: find_weights(name) for name in (args.metric, args.judge)}
    return {
        'command': recorded_command(sys.argv, ROOT),
        'commit': recorded_commit(ROOT),
        'seed': args.seed,
        'photographs_seen': {
            'metric': args.steps * args.batch,
            L1: args.l1_steps * args.batch,
        },
        'minutes_of_training': minutes,
        'weights_sha256': {n: file_hash(f) if f else None for n, f in weights.items()},
        'threads': torch.get_num_threads(),
        'python': platform.python_version(),
        'versions': {
            name: version(name) for name in ('pyiqa-clipkd', 'pyiqa', 'torch', 'pillow')
        },
    }


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('--images', type=Path, required=True, help='folder of the data set')
    add('--csv', type=Path, required=True, help='file names and human scores')
    add('--column', default='ratio802_seed123_split_01', help='of the split')
    add('--train-side', default='train', help='word in that column')
    add('--test-side', default='test', help='word in that column')
    add('--mos-range', type=float, nargs=2, default=(0, 1))
    add('--free', type=Path, help="folder; by default scikit-image's photographs")
    add('--photographs', type=int, default=12, help='so many of the test side')
    add('--metric', default=DEFAULT_METRIC, help='the loss')
    add('--judge', default='clipkd_resnet18', help='a metric that takes no part')
    add('--prices', type=float, nargs='+', default=(0, 0.05), help='of moved sliders')
    add('--size', type=int, default=224, help='side in training, pixels')
    add('--steps', type=int, default=250)
    add('--l1-steps', type=int, default=1000, help='of L1, which needs no metric')
    add('--batch', type=int, default=8)
    add('--rate', type=float, default=8e-3, help='of Adam, falling to 0')
    add('--seed', type=int, default=0, help='of choice, damage and first weights')
    add('--networks', type=Path, default=Path('experiments', 'enhancement'))
    add('-o', '--output', type=Path, required=True, help='folder of the results')
    args = parser.parse_args(words)
    for name in ('steps', 'l1_steps', 'batch', 'size'):
        if getattr(args, name) < 1:
            parser.error(
                f'`--{name}` must be at least 1, but got {getattr(args, name)}.'
            )
    if min(args.prices) < 0:
        parser.error(f'`--prices` must be 0 or more, but got {min(args.prices):g}.')
    return args


def main() -> None:
    args = parse_arguments()
    keep_freed_memory()
    networks, minutes = trained(args)
    rows = judge(args, networks)
    args.output.mkdir(parents=True, exist_ok=True)
    rows.to_csv(args.output / 'rows.csv', index=False)
    (args.output / 'TABLE.md').write_text(text := tables(rows))
    facts = json.dumps(record(args, minutes), indent=2)
    (args.output / 'record.json').write_text(facts + '\n')
    page = sheet(args, networks, rows)
    page.save(args.output / 'examples.jpg', quality=72, optimize=True)
    print(text)


if __name__ == '__main__':
    main()
