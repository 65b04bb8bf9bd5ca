"""Write one page with the results of a run, or of two side by side.

The page is a single file that needs no network: histogram, thumbnails of the best, the
worst and the middle, and a table to sort and filter. A second result file adds what
changed from the first one (A) to the second (B).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pyiqa_clipkd.compare.runs import read_run
from pyiqa_clipkd.files import written_whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `pyiqa-clipkd report`."""
    add = parser.add_argument
    add('results', nargs='+', type=Path, metavar='RESULTS', help='one or two files')
    help_text = 'default: the name of the last results, with .html'
    add('-o', '--output', type=Path, metavar='FILE', help=help_text)
    add('--title', help='heading of the page')
    add(
        '--thumbnails',
        type=int,
        default=12,
        metavar='N',
        help='of the best, the worst, the middle; default: 12, 0: none',
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the page.

    Raises:
        ValueError: if an argument or a result file is wrong.
        OSError: if a file can't be read or written.
    """
    from pyiqa_clipkd.report.page import make_page

    if len(arguments.results) > 2:
        raise ValueError(
            f'`results` must be one or two files, but got {len(arguments.results)}.'
        )
    if arguments.thumbnails < 0:
        raise ValueError(
            f'`--thumbnails` must be >= 0, but got {arguments.thumbnails}.'
        )
    # Another page for other results: none is overwritten by an oversight.
    last: Path = arguments.results[-1]
    output: Path = arguments.output or Path(last.with_suffix('.html').name)
    if not output.parent.is_dir():
        raise FileNotFoundError(f'There is no folder {output.parent} for the page.')
    if output.resolve() in [path.resolve() for path in arguments.results]:
        raise ValueError(f'`--output` would overwrite the results in {output}.')
    runs = [read_run(path) for path in arguments.results]
    names = ' and '.join(run.name for run in runs)
    title = arguments.title or f'Image quality: {names}'
    text = make_page(runs, output, title=title, thumbnails=arguments.thumbnails)
    with written_whole(output) as partial:
        partial.write_text(text, encoding='utf-8')
    scored, bad = (sum(len(getattr(r, w)) for r in runs) for w in ('scored', 'bad'))
    print(f'{output}: {scored:,} scores, {bad:,} bad files, {len(text) / 1e6:.1f} MB.')
    return 0
