"""The command line of scripts/reproduce.py."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from pyiqa_clipkd.reproduce.session import TABLES, Session

PAPER_SETS = ('csiq', 'live', 'koniq10k', 'spaq')


def main(root: Path, argv: Sequence[str] | None = None) -> int:
    """Run a table or a cross-evaluation below the working directory.

    Args:
        root: the checkout, with `configs` and `scripts`.

    Returns:
        The exit code: 1 where a run failed or its data is missing, 2 for a mistake in
        the arguments, 130 after Ctrl-C.
    """
    args = _parser().parse_args(argv)
    args.splits = list(chain.from_iterable(args.splits))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        session = Session(root, args)
        return session.cross() if args.what == 'cross' else session.table()
    except (ValueError, FileNotFoundError) as error:
        print(f'reproduce: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('Stopped. The same command goes on where this one was.')
        return 130


def _numbers(word: str) -> list[int]:
    """`1-3` -> [1, 2, 3]; `7` -> [7]."""
    first, _, last = word.partition('-')
    if not first.isdigit() or not (last or first).isdigit():
        raise argparse.ArgumentTypeError(f'must be like 1-10 or 7, but got {word!r}')
    numbers = list(range(int(first), int(last or first) + 1))
    if not numbers:
        raise argparse.ArgumentTypeError(f'must go upwards, but got {word!r}')
    return numbers


def _positive(word: str) -> int:
    if not word.isdigit() or int(word) < 1:
        raise argparse.ArgumentTypeError(f'must be at least 1, but got {word!r}')
    return int(word)


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    add = common.add_argument
    add('--students', nargs='+', default=[], help='default: all of the recipe')
    add('--variants', nargs='+', help='files of configs/variants')
    add('--protocol', nargs='+', default=[], help='default: all that there are')
    add(
        '--splits',
        nargs='+',
        type=_numbers,
        default=[_numbers('1-10')],
        help='such as 1-10, or 1 3',
    )
    add('--seeds', nargs='+', type=int, default=[123])
    add('--recipe', default='koniq10k', help="folder of configs behind one's own data")
    add('--force_yml', nargs='+', default=[], metavar='KEY:KEY=VALUE')
    add('--jobs', type=_positive, default=1, help='runs at once')
    add('--dry-run', action='store_true', help='print the plan only')
    add('-o', '--output', type=Path, help='folder; default: results/<table>')
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest='what', required=True)
    for name, variants in TABLES.items():
        table = commands.add_parser(
            name, parents=[common], help=f'variants {", ".join(variants)}'
        )
        add = table.add_argument
        add('--data', nargs='+', default=PAPER_SETS, help='folders or option files')
        add('--csv', type=Path, help='own data: first two columns image and score')
        add('--images', type=Path, help='folder of the images of --csv')
        add('--mos-range', type=float, nargs=2, help='lowest and highest score')
        add('--group', help='column of --csv whose equal words stay on one side')
        add('--download', action='store_true', help='missing data, by pyiqa')
    cross = commands.add_parser(
        'cross', parents=[common], help='train on one data set, test on others'
    )
    cross.add_argument('--train', required=True, help='data set of a finished table')
    cross.add_argument('--test', nargs='+', required=True, help='other data sets')
    cross.add_argument('--test-split', type=int, help='only its held-out side')
    return parser
