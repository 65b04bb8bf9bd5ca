"""Label photographs with five attributes: pseudo-labels to train on, or to sort by.

Sharpness, brightness, contrast, colorfulness and noisiness, each from 0 to 1; 1 is the
good side of all of them, so noisiness 1 means free of noise. The labeller `measures`
takes classical measures and says where a photograph stands among others in the wild;
`metric` gives what clipkd_efficientnet_lite's attribute heads have learned from these;
`clip` asks CLIP which of two prompts fits better, and needs torch and its weights.

A PATH is a file, a folder (with all below it), a pattern in quotes ('photos/**/*.jpg')
or - for a list on standard input. The rows go to a file: Parquet, CSV or JSONL. The
same command goes on where a run was stopped. Files that can't be read are named in
their row, and the run goes on.

Exit codes:
  0    all were labelled
  2    wrong usage, or labels can't be written
  3    some files could not be labelled
  70   a bug: please report what is shown
  130  stopped with Ctrl-C
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from pyiqa_clipkd.command import FINE, INTERRUPTED, UNREADABLE
from pyiqa_clipkd.scoring.files import (
    AHEAD,
    STDIN,
    find_photographs,
    listed_ahead,
    unbuffered_stdin,
)
from pyiqa_clipkd.scoring.pillow import prepare_pillow
from pyiqa_clipkd.scoring.printing import printable
from pyiqa_clipkd.scoring.results import check_ending

if TYPE_CHECKING:
    from pyiqa_clipkd.attributes.labels import Counts, Labeller


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('paths', nargs='+', metavar='PATH', help=f'file, folder, pattern or {STDIN}')
    add(
        *('-o', '--output'),
        type=Path,
        required=True,
        metavar='FILE',
        help='.parquet, .csv or .jsonl',
    )
    add('--labeller', choices=tuple(LABELLERS), default='measures')
    add('--weights', type=Path, metavar='FILE', help="CLIP's own, for --labeller clip")
    help_text = 'chosen by scripts/select_prompts.py, for --labeller clip'
    add('--prompts', type=Path, metavar='FILE', help=help_text)
    again = parser.add_mutually_exclusive_group()
    again.add_argument('--overwrite', action='store_true', help='begin FILE anew')
    again.add_argument(
        '--retry',
        action='store_true',
        help='drop the rows of FILE that have an error, and try these files again',
    )
    add('--workers', type=int, metavar='N', help='default: one a processor core')
    add('--quiet', action='store_true', help='neither progress nor summary')


def run(arguments: argparse.Namespace) -> int:
    """`pyiqa-clipkd label`; returns the exit code."""
    check_ending(arguments.output)
    if STDIN in arguments.paths and sys.stdin is None:
        raise ValueError(f'{STDIN} needs standard input.')
    prepare_pillow()
    labeller = LABELLERS[arguments.labeller](
        weights=arguments.weights, prompts=arguments.prompts
    )
    from pyiqa_clipkd.attributes.labels import write_labels

    stdin = unbuffered_stdin() if STDIN in arguments.paths else None
    found = find_photographs(arguments.paths, stdin=stdin)
    paths: Iterator[Path | None] = found
    if stdin is not None:  # rows that are done need not wait for the list's next line
        paths = listed_ahead(found, most=AHEAD)
    start = time.perf_counter()
    try:
        with ExitStack() as stack:
            counts = write_labels(
                paths,
                arguments.output,
                labeller,
                workers=arguments.workers,
                overwrite=arguments.overwrite,
                retry=arguments.retry,
                found=None if arguments.quiet else _progress(stack),
            )
    except KeyboardInterrupt:
        but = ' without --overwrite' if arguments.overwrite else ''
        print(f'\nStopped. The same command{but} goes on.', file=sys.stderr)
        return INTERRUPTED
    if not counts.labelled + counts.bad and stdin is None:
        raise ValueError(f'no photographs in {", ".join(arguments.paths)}.')
    if not arguments.quiet:
        for line in _summary(counts, labeller, time.perf_counter() - start):
            print(line, file=sys.stderr)
    return UNREADABLE if counts.bad else FINE


def _only_for_clip(options: Mapping[str, Path | None]) -> None:
    for name, value in options.items():
        if value is not None:
            raise ValueError(f'`--{name}` needs --labeller clip.')


def _measures(**options: Path | None) -> Labeller:
    _only_for_clip(options)
    missing = [name for name in ('pywt', 'scipy') if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f'`--labeller measures` needs {" and ".join(missing)}: '
            "`pip install 'pyiqa-clipkd[attributes]'`."
        )
    from pyiqa_clipkd.attributes.ranks import MeasureLabeller

    return MeasureLabeller()


def _metric(**options: Path | None) -> Labeller:
    _only_for_clip(options)
    from pyiqa_clipkd.attributes.metric import MetricLabeller

    return MetricLabeller()


def _clip(*, weights: Path | None = None, prompts: Path | None = None) -> Labeller:
    missing = [name for name in ('torch', 'open_clip') if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f'`--labeller clip` needs {" and ".join(missing)}: `pip install '
            "pyiqa-clipkd` brings them. `--labeller measures` doesn't need them."
        )
    from pyiqa_clipkd.attributes.clip import TAG, ClipLabeller
    from pyiqa_clipkd.attributes.prompts import PROMPTS, read_prompts

    pairs = PROMPTS if prompts is None else read_prompts(prompts)
    try:
        return ClipLabeller(pretrained=weights or TAG, prompts=pairs)
    except RuntimeError as error:
        raise FileNotFoundError(
            f"CLIP's weights can't be had ({error}). Give their file with --weights."
        ) from error


LABELLERS: dict[str, Callable[..., Labeller]] = {
    'measures': _measures,
    'metric': _metric,
    'clip': _clip,
}


def _progress(stack: ExitStack) -> Callable[[], None] | None:
    if not sys.stderr.isatty():
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    bar = stack.enter_context(tqdm(unit='photo', file=sys.stderr, leave=False))

    def update() -> None:
        bar.update()

    return update


def _summary(counts: Counts, labeller: Labeller, seconds: float) -> Iterator[str]:
    yield f'{counts.labelled:,} labelled, {counts.bad:,} could not be.'
    for path, error in counts.first_bad:
        yield f'  {printable(path)}: {error}'
    known = counts.known + counts.known_bad
    new = counts.labelled + counts.bad - known
    yield f'{new:,} files read in {seconds:.1f} s, {known:,} were labelled before.'
    if counts.known_bad:
        yield '--retry tries those of earlier runs again.'
    yield f'Labeller: {labeller.identity}.'
