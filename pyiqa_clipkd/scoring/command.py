"""Score photographs: files, folders, patterns and lists.

A PATH is a file, a folder (with all below it), a pattern in quotes ('photos/**/*.jpg')
or - for a list on standard input. Scores go from 1 (bad) to 5 (perfect).
With --engine ray it is also a shard (.tar), a table with photographs (.parquet) or a
URI of an object store, and -o is a folder of Parquet files, or a URI of one.

The screen gets a line a photograph: score, level, path. With -o the rows go to a file
instead, with absolute paths: CSV, JSONL or Parquet. The same command goes on where a
run was stopped; it skips what the file has. Files that can't be read are named, in
their row or on standard error, and the run goes on.

Exit codes:
  0    all were scored, and with --min-score none is below it
  1    some scores are below --min-score
  2    wrong usage, or results can't be written
  3    some files could not be scored (also if others are below --min-score)
  70   a bug: please report what is shown
  130  stopped with Ctrl-C; 143 with SIGTERM
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pyiqa_clipkd.command import FINE, INTERRUPTED, UNREADABLE
from pyiqa_clipkd.names import DEFAULT_METRIC
from pyiqa_clipkd.scoring.files import STDIN
from pyiqa_clipkd.scoring.pillow import (
    check_megapixels,
    check_seconds,
    most_pixels,
    prepare_pillow,
)
from pyiqa_clipkd.scoring.ray.options import (
    RAY,
    add_cluster,
    check_engine,
    located_output,
)
from pyiqa_clipkd.scoring.results import check_ending
from pyiqa_clipkd.scoring.selection import FOLDER, grouping

if TYPE_CHECKING:
    from pyiqa_clipkd.scoring.session import Session, Tally

# The exit code of --min-score.
BELOW = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('paths', nargs='+', metavar='PATH', help=f'file, folder, pattern or {STDIN}')
    help_text = f'default: {DEFAULT_METRIC}, or that of an .onnx file'
    add('-m', '--metric', help=help_text)
    help_text = '.csv, .jsonl or .parquet'
    add('-o', '--output', type=located_output, metavar='FILE', help=help_text)
    again = parser.add_mutually_exclusive_group()
    again.add_argument('--overwrite', action='store_true', help='begin FILE anew')
    again.add_argument(
        '--retry',
        action='store_true',
        help='drop the rows of FILE that have an error, and score these files again',
    )
    _add_screen(parser.add_argument_group('what is shown'))
    _add_network(parser.add_argument_group('how it is scored'))
    add_cluster(parser.add_argument_group('on a cluster'))


def _add_screen(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add('--format', choices=('csv', 'jsonl'), help='whole rows instead of lines')
    add('--paths-only', action='store_true', help='paths alone, for xargs')
    add(
        *('-0', '--null'),
        action='store_true',
        help=f'the list of {STDIN} and --paths-only are separated by NUL bytes',
    )
    add('--min-score', type=float, metavar='X', help='show those with at least X')
    only = group.add_mutually_exclusive_group()
    only.add_argument('--top', type=_whole(1), metavar='N', help='the N best')
    only.add_argument('--bottom', type=_whole(1), metavar='N', help='the N worst')
    only.add_argument(
        '--best-of',
        metavar=f'{FOLDER}|PATTERN',
        help='the best of each folder, or of each group that has the same text where '
        "the regular expression (its first group) matches, e.g. '(IMG_\\d+)'",
    )
    add('--quiet', action='store_true', help='neither progress nor summary')


def _add_network(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        '--crops',
        type=_whole(0),
        default=0,
        metavar='K',
        help='also score K squares at full resolution, and take the mean',
    )
    help_text = 'also say why: columns of five attributes, and faults in words'
    add('--attributes', action='store_true', help=help_text)
    add('--device', choices=('auto', 'cpu', 'cuda', 'mps'), default='auto')
    add('--backend', choices=('auto', 'torch', 'onnx'), default='auto')
    add('--weights', type=Path, metavar='FILE', help="instead of the metric's own")
    help_text = 'torch only; attributes are made for the own size'
    add('--input-size', type=_whole(1), metavar='PIXELS', help=help_text)
    add(
        '--workers',
        type=_whole(1),
        metavar='N',
        help='photographs at a time, or with ray processes that have the network; '
        'default: one a core, over --threads',
    )
    add('--threads', type=_whole(1), metavar='N', help='of one network; default: 1')
    add('--batch-size', type=_whole(1), metavar='N', help='default: 1 on processors')
    add('--max-megapixels', type=float, metavar='X', help='refuse larger photographs')
    help_text = (
        'give up a photograph after so long: for files of strangers, which are then '
        'read in processes of their own'
    )
    add('--max-seconds', type=float, metavar='X', help=help_text)


def _whole(least: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(
                f'must be a whole number >= {least}, but got {text!r}'
            )
        return value

    return convert


def run(arguments: argparse.Namespace) -> int:
    """`pyiqa-clipkd score`; returns the exit code."""
    check(arguments)
    prepare_pillow()
    arguments.max_pixels = most_pixels(arguments.max_megapixels)
    session = _session(arguments)
    try:
        session.score_all()
    except KeyboardInterrupt:
        session.interrupted()
        return INTERRUPTED
    return _exit_code(session.tally, arguments)


def _session(arguments: argparse.Namespace) -> Session:
    from pyiqa_clipkd.scoring.backends import create_backend
    from pyiqa_clipkd.scoring.session import Session

    settings = {
        'metric': arguments.metric,
        'kind': arguments.backend,
        'device': arguments.device,
        'threads': arguments.threads,
        'weights': arguments.weights,
        'input_size': arguments.input_size,
        'attributes': arguments.attributes,
    }
    if arguments.engine == RAY:
        from pyiqa_clipkd.scoring.ray.session import RaySession

        return RaySession(settings, arguments)
    return Session(create_backend(**settings), arguments)


def _exit_code(tally: Tally, arguments: argparse.Namespace) -> int:
    if not tally.files and STDIN not in arguments.paths:
        raise ValueError(f'no photographs in {", ".join(arguments.paths)}.')
    if tally.bad:
        return UNREADABLE
    return BELOW if tally.below else FINE


def check(arguments: argparse.Namespace) -> None:
    """What can be wrong with the arguments, before anything costly begins.

    Raises:
        ValueError: says what, and what to do.
    """
    if arguments.output:
        check_ending(Path(arguments.output))
    elif arguments.overwrite:
        raise ValueError('`--overwrite` needs a file: -o FILE.')
    elif arguments.retry:
        raise ValueError('`--retry` needs a file: -o FILE.')
    if arguments.output and arguments.format:
        raise ValueError('`--format` is for the screen: the ending of -o says it.')
    if arguments.paths_only and arguments.format:
        raise ValueError('Give either `--paths-only` or `--format`.')
    if arguments.null and not (arguments.paths_only or STDIN in arguments.paths):
        raise ValueError(f'`-0` needs `--paths-only` or a list on {STDIN}.')
    if STDIN in arguments.paths and sys.stdin is None:
        raise ValueError(f'{STDIN} needs standard input.')
    if arguments.best_of is not None:
        grouping(arguments.best_of)
    check_engine(arguments)
    check_megapixels(arguments.max_megapixels)
    check_seconds(arguments.max_seconds)
    low = arguments.min_score
    if low is not None and not 1 <= low <= 5:
        raise ValueError(f'`--min-score` must be in [1, 5], but got {low:g}.')
