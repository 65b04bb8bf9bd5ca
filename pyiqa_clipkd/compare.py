"""Do two folders of photographs, or two runs, differ in quality, and how surely?

For judging image generators or codec settings: A and B are folders, which are scored
first, or result files of `pyiqa-clipkd score`. Photographs whose names match (below the
folder, without the ending) are compared in pairs, which is far more certain.
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

from pyiqa_clipkd.difference import Difference, measure, pair, scored_pairs
from pyiqa_clipkd.files import written_whole
from pyiqa_clipkd.names import DEFAULT_METRIC
from pyiqa_clipkd.runs import Run, made_differently, make_run, read_run

PLOT_ENDINGS = ('.png', '.svg', '.pdf')
LISTED = 5  # photographs that lost or won most
EQUAL = 0.005  # a change that isn't seen in two digits


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `pyiqa-clipkd compare`."""
    add = parser.add_argument
    add('a', type=Path, metavar='A', help='a folder or a result file')
    add('b', type=Path, metavar='B', help='a folder or a result file')
    add(
        '-m',
        '--metric',
        help=f"for folders; default: the other result file's, or {DEFAULT_METRIC}",
    )
    add('--backend', choices=('auto', 'torch', 'onnx'), help='for folders')
    add('--device', default='auto', help='for folders: auto, cpu, cuda or mps')
    add('--confidence', type=float, default=0.95, help='of the interval; default: 0.95')
    add('--seed', type=int, default=0, help='of the bootstrap; default: 0')
    add('--plot', type=Path, metavar='FILE', help='also a plot: .png, .svg or .pdf')
    add('--json', action='store_true', help='print JSON instead of text')
    add('--force', action='store_true', help='compare what was scored differently, too')


def run(arguments: argparse.Namespace) -> int:
    """Compare A and B and print the difference.

    Raises:
        ValueError: if an argument is wrong, there are too few photographs, or the
            scores were made differently.
        OSError: if a file can't be read or written.
        ModuleNotFoundError: if a plot is wanted, and matplotlib is missing.
    """
    _check(arguments)
    first, second = _runs(arguments)
    if lines := made_differently(first, second):
        text = 'A and B were scored differently: ' + '; '.join(lines) + '.'
        if not arguments.force:
            raise ValueError(f'{text} Score them alike, or add --force.')
        print(f'Warning: {text}', file=sys.stderr)
    pairs = scored_pairs(first, second, pair(first, second))
    difference = measure(
        first,
        second,
        pairs=pairs,
        confidence=arguments.confidence,
        seed=arguments.seed,
    )
    if arguments.json:
        print(json.dumps(as_dict(first, second, difference, pairs), indent=2))
    else:
        print(as_text(first, second, difference, pairs))
    if arguments.plot:
        plot(first, second, difference, pairs, path=arguments.plot)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Everything that can be known before minutes of scoring."""
    if not 0 < arguments.confidence < 1:
        raise ValueError(
            f'`--confidence` must be between 0 and 1, but got {arguments.confidence}.'
        )
    for path in (arguments.a, arguments.b):
        if not path.exists():
            raise FileNotFoundError(f'There is no file or folder {path}.')
    if arguments.plot is None:
        return
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


def _runs(arguments: argparse.Namespace) -> list[Run]:
    """A and B; folders are scored as the result file beside them was."""
    paths = [arguments.a, arguments.b]
    known = {path: read_run(path) for path in paths if not path.is_dir()}
    if len(known) < len(set(paths)):
        other = next(iter(known.values()), None)
        folders = dict.fromkeys(path for path in paths if path not in known)
        known |= _score_folders([*folders], other, arguments)
    return [known[path] for path in paths]


def _score_folders(
    folders: Sequence[Path], other: Run | None, arguments: argparse.Namespace
) -> dict[Path, Run]:
    """Score folders, with the metric and options of another run if there is one."""
    from pyiqa_clipkd.scoring.pillow import prepare_pillow

    prepare_pillow()
    import pandas as pd  # type: ignore[import-untyped]

    from pyiqa_clipkd.scoring.backends import create_backend
    from pyiqa_clipkd.scoring.core import score_paths
    from pyiqa_clipkd.scoring.files import find_photographs

    def chosen(name: str, default: str) -> str:
        return next(iter(other.values(name)), default) if other else default

    backend = create_backend(
        arguments.metric or chosen('metric', DEFAULT_METRIC),
        kind=arguments.backend or chosen('backend', 'auto'),
        device=arguments.device,
    )
    crops = int(chosen('crops', '0'))
    runs = {}
    for folder in folders:
        print(f'Scoring {folder} with {backend.metric}.', file=sys.stderr, flush=True)
        rows = list(score_paths(find_photographs([str(folder)]), backend, crops=crops))
        if not rows:
            raise ValueError(f'There are no photographs in {folder}.')
        table = pd.DataFrame(rows, dtype=object)
        runs[folder] = make_run(str(folder), table, str(folder))
    return runs


def as_dict(
    first: Run, second: Run, difference: Difference, pairs: np.ndarray
) -> dict[str, Any]:
    """All figures, for programs."""
    return {
        'a': _run_as_dict(first),
        'b': _run_as_dict(second),
        'pairs': len(pairs),
        'difference': {**difference._asdict(), 'test': difference.test},
        'summary': difference.sentence(),
    }


def _run_as_dict(run: Run) -> dict[str, Any]:
    scores = run.scored['score']
    return {
        'name': run.name,
        'metric': run.values('metric'),
        'sha256': run.values('sha256'),
        'scored': len(scores),
        'bad': len(run.bad),
        'mean': float(scores.mean()),
        'median': float(scores.median()),
    }


def as_text(first: Run, second: Run, difference: Difference, pairs: np.ndarray) -> str:
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


def plot(
    first: Run,
    second: Run,
    difference: Difference,
    pairs: np.ndarray,
    *,
    path: Path,
) -> None:
    """Histograms of both runs, and of the differences where they are paired.

    Args:
        first, second: A and B.
        difference: from `difference.measure`.
        pairs: (N, 2) places in their rows.
        path: where to; its ending chooses the format.
    """
    import matplotlib as mpl

    mpl.use('Agg')
    import matplotlib.pyplot as plt

    panels = 2 if difference.paired else 1
    figure, axes = plt.subplots(1, panels, figsize=(5 * panels, 3.6), squeeze=False)
    for run, letter, colour in ((first, 'A', 'C0'), (second, 'B', 'C1')):
        scores = run.scored['score']
        label = f'{letter}: {run.name}, mean {scores.mean():.2f}'
        axes[0, 0].hist(
            scores, np.linspace(1, 5, 33), color=colour, alpha=0.5, label=label
        )
    axes[0, 0].set(xlabel='score (higher is better)', ylabel='photographs')
    axes[0, 0].legend(fontsize='small', frameon=False)
    if difference.paired:
        _plot_changes(axes[0, 1], first, second, difference, pairs)
    figure.tight_layout()
    with written_whole(path) as partial:
        figure.savefig(partial, format=path.suffix[1:], dpi=150)
    plt.close(figure)


def _plot_changes(
    axes: Any, first: Run, second: Run, difference: Difference, pairs: np.ndarray
) -> None:
    scores = [run.rows['score'].to_numpy() for run in (first, second)]
    axes.hist(
        scores[1][pairs[:, 1]] - scores[0][pairs[:, 0]], 41, color='C2', alpha=0.6
    )
    axes.axvline(0, color='0.3', linewidth=1)
    axes.axvspan(difference.low, difference.high, color='0.2', alpha=0.3)
    axes.axvline(difference.value, color='0.2', linestyle='--')
    title = (
        f'mean {difference.value:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]'
    )
    axes.set(xlabel='B - A', ylabel='pairs', title=title)
