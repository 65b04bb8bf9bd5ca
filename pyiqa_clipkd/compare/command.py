"""Do folders of photographs, or runs, differ in quality, and how surely?

For judging image generators or codec settings: A and B are folders, which are scored
first, or result files of `pyiqa-clipkd score`. Photographs whose names match (below the
folder, without the ending) are compared in pairs, which is far more certain. Three or
more are ranked, and each is compared with the next one. Where all have attributes, it
is also said by which of them they differ.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from pyiqa_clipkd.compare import attributes as why
from pyiqa_clipkd.compare import leaderboard_text
from pyiqa_clipkd.compare.attributes import (
    Differences,
    attribute_differences,
    listed,
)
from pyiqa_clipkd.compare.difference import Difference, measure
from pyiqa_clipkd.compare.folders import read_or_score
from pyiqa_clipkd.compare.leaderboard import distinct_names, rank
from pyiqa_clipkd.compare.pairing import pair, scored_pairs
from pyiqa_clipkd.compare.plot import plot
from pyiqa_clipkd.compare.runs import Run, made_differently
from pyiqa_clipkd.names import DEFAULT_METRIC

PLOT_ENDINGS = ('.png', '.svg', '.pdf')
LISTED = 5  # photographs that lost or won most
EQUAL = 0.005  # a change that isn't seen in two digits


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `pyiqa-clipkd compare`."""
    add = parser.add_argument
    add('a', type=Path, metavar='A', help='a folder or a result file')
    add('b', type=Path, metavar='B', help='a folder or a result file')
    add(
        'more', nargs='*', type=Path, metavar='C', help='more of them, to rank them all'
    )
    add(
        '-m',
        '--metric',
        help=f"for folders; default: the other result file's, or {DEFAULT_METRIC}",
    )
    add('--backend', choices=('auto', 'torch', 'onnx'), help='for folders')
    add('--device', default='auto', help='for folders: auto, cpu, cuda or mps')
    help_text = 'score folders with their attributes, and compare these, too'
    add('--attributes', action='store_true', help=help_text)
    add('--confidence', type=float, default=0.95, help='of the interval; default: 0.95')
    add('--seed', type=int, default=0, help='of the bootstrap; default: 0')
    add('--plot', type=Path, metavar='FILE', help='also a plot: .png, .svg or .pdf')
    add('--json', action='store_true', help='print JSON instead of text')
    add('--force', action='store_true', help='compare what was scored differently, too')


def run(arguments: argparse.Namespace) -> int:
    """Compare A and B and print the difference; or rank three and more.

    Raises:
        ValueError: if an argument is wrong, there are too few photographs, or the
            scores were made differently.
        OSError: if a file can't be read or written.
        ModuleNotFoundError: if a plot is wanted, and matplotlib is missing.
    """
    _check(arguments)
    paths = [arguments.a, arguments.b, *arguments.more]
    runs = read_or_score(paths, arguments)
    names = ['A', 'B'] if len(runs) == 2 else distinct_names(runs, paths)
    _check_alike(names, runs, force=arguments.force)
    if len(runs) > 2:
        _rank(names, runs, arguments)
    else:
        _compare(runs[0], runs[1], arguments)
    return 0


def _compare(first: Run, second: Run, arguments: argparse.Namespace) -> None:
    options = {'confidence': arguments.confidence, 'seed': arguments.seed}
    pairs = scored_pairs(first, second, pair(first, second))
    difference = measure(first, second, pairs=pairs, **options)
    attributes = attribute_differences((first, second), pairs, **options)
    if arguments.json:
        found = as_dict(first, second, difference, pairs, attributes)
        print(json.dumps(found, indent=2))
    else:
        print(as_text(first, second, difference, pairs, attributes))
    if arguments.plot:
        plot(first, second, difference, pairs, path=arguments.plot)


def _rank(
    names: Sequence[str], runs: Sequence[Run], arguments: argparse.Namespace
) -> None:
    board = rank(
        dict(zip(names, runs, strict=True)),
        confidence=arguments.confidence,
        seed=arguments.seed,
    )
    if arguments.json:
        print(json.dumps(leaderboard_text.as_dict(board), indent=2))
    else:
        print(leaderboard_text.as_text(board))


def _check_alike(names: Sequence[str], runs: Sequence[Run], *, force: bool) -> None:
    """Whether the scores of all runs were made in the same way, as the first's were."""
    for name, run in zip(names[1:], runs[1:], strict=True):
        if lines := made_differently(runs[0], run):
            both = f'{names[0]} and {name}'
            text = f'{both} were scored differently: {"; ".join(lines)}.'
            if not force:
                raise ValueError(f'{text} Score them alike, or add --force.')
            print(f'Warning: {text}', file=sys.stderr)
    without = [n for n, r in zip(names, runs, strict=True) if not r.has_attributes]
    if 0 < len(without) < len(runs):
        text = f'Attributes are not compared: they are missing in {listed(without)}.'
        print(f'{text} Score again with --attributes.', file=sys.stderr)


def _check(arguments: argparse.Namespace) -> None:
    """Everything that can be known before minutes of scoring."""
    if not 0 < arguments.confidence < 1:
        raise ValueError(
            f'`--confidence` must be between 0 and 1, but got {arguments.confidence}.'
        )
    paths = [arguments.a, arguments.b, *arguments.more]
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f'There is no file or folder {path}.')
        if arguments.more and [p.resolve() for p in paths].count(path.resolve()) > 1:
            raise ValueError(f'{path} is there twice: a ranking needs different runs.')
    if arguments.plot is None:
        return
    if arguments.more:
        count = 2 + len(arguments.more)
        raise ValueError(f'`--plot` shows two runs, but got {count}.')
    if arguments.plot.suffix not in PLOT_ENDINGS:
        raise ValueError(
            f'`--plot` must end in {", ".join(PLOT_ENDINGS)}, but got {arguments.plot}.'
        )
    if not arguments.plot.absolute().parent.is_dir():
        raise FileNotFoundError(f'There is no folder for the plot {arguments.plot}.')
    if find_spec('matplotlib') is None:
        raise ModuleNotFoundError(
            "`--plot` needs matplotlib: pip install 'pyiqa-clipkd[plots]'."
        )


def as_dict(
    first: Run,
    second: Run,
    difference: Difference,
    pairs: np.ndarray,
    attributes: Differences | None = None,
) -> dict[str, Any]:
    """All figures, for programs."""
    found = {
        'a': _run_as_dict(first),
        'b': _run_as_dict(second),
        'pairs': len(pairs),
        'difference': {**difference._asdict(), 'test': difference.test},
        'summary': difference.sentence(),
    }
    if attributes:
        found['attributes'] = why.as_dict(attributes)
        found['attributes_summary'] = why.sentence(attributes)
    return found


def _run_as_dict(run: Run) -> dict[str, Any]:
    scores = run.scored['score']
    found = {
        'name': run.name,
        'metric': run.values('metric'),
        'sha256': run.values('sha256'),
        'scored': len(scores),
        'bad': len(run.bad),
        'mean': float(scores.mean()),
        'median': float(scores.median()),
    }
    if run.has_attributes:
        found['attributes'] = run.attribute_means
    return found


def as_text(
    first: Run,
    second: Run,
    difference: Difference,
    pairs: np.ndarray,
    attributes: Differences | None = None,
) -> str:
    """All figures, for people; the last line says what they mean."""
    d = difference
    lines = [_line(letter, run) for letter, run in (('A', first), ('B', second))]
    alone = [len(run.scored) - len(pairs) for run in (first, second)]
    lines.append('')
    if d.paired:
        lines.append(
            f'{len(pairs):,} pairs by name; without a scored partner, left out: '
            f'{alone[0]:,} of A, {alone[1]:,} of B.'
        )
    else:
        lines.append(f'Not paired: only {len(pairs):,} names match.')
    lines += [
        f'B - A   {d.value:+.3f}   {d.confidence:.0%} interval '
        f'[{d.low:+.3f}, {d.high:+.3f}]',
        f'B is better in {d.better:.1%}, worse in {d.worse:.1%} of '
        f'{"the pairs" if d.paired else "all pairs that can be made"}.',
        f'{d.test} test: p = {d.p:.2g}',
    ]
    if d.paired:
        lines += _moves('Lost most', second, first, pairs)
        lines += _moves('Won most', second, first, pairs[::-1])
    if attributes:
        lines += ['', *why.as_lines(attributes, (first, second))]
    return '\n'.join([*lines, '', d.sentence()])


def _line(letter: str, run: Run) -> str:
    bad = f', {len(run.bad):,} could not be scored' if len(run.bad) else ''
    count = f'{len(run.scored):,} photographs{bad}'
    return f'{letter}   mean {run.scored["score"].mean():.3f}   {count}   {run.name}'


def _moves(title: str, run: Run, before: Run, pairs: np.ndarray) -> Sequence[str]:
    """The first of the pairs, as long as they go the way of the first."""
    lines = []
    for old, new in pairs[:LISTED]:
        a, b = before.rows['score'][old], run.rows['score'][new]
        if abs(b - a) < EQUAL or (b > a) != title.startswith('Won'):
            break
        name = run.relative(run.rows['path'][new])
        lines.append(f'  {b - a:+.2f}   {a:.2f} -> {b:.2f}   {name}')
    return ['', f'{title} in B:', *lines] if lines else []
