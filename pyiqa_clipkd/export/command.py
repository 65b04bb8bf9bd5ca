"""A metric as one file for other runtimes: `pyiqa-clipkd export`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pyiqa_clipkd.description import FORMS, ONNX, PHOTOGRAPHS
from pyiqa_clipkd.export import PRECISIONS, TORCH, export
from pyiqa_clipkd.export.check import (
    Differences,
    attribute_move,
    check_photographs,
    differences,
    without_unreadable,
)
from pyiqa_clipkd.metric import CLIPKDMetric
from pyiqa_clipkd.names import DEFAULT_METRIC

# What a score may move by, in points, before the command calls the export a failure.
# Eight bits have no such bound: the loss is told, and what is much of it (median), that
# is more than a change that nobody sees may move a score by.
LIMITS = {'float32': 0.005, 'float16': 0.02}
MUCH_LOSS = 0.02


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `pyiqa-clipkd export`."""
    add = parser.add_argument
    add('-m', '--metric', required=True, help=f'for instance {DEFAULT_METRIC}')
    add('output', type=Path, help=f'ends with {ONNX} or {TORCH} (torch.export)')
    add('--weights', type=Path, metavar='FILE', help="instead of the metric's own")
    add(
        '--input',
        choices=FORMS,
        default=PHOTOGRAPHS,
        help='photographs: uint8 RGB of any size, resized inside (default); '
        'squares: float, resized by the caller, as our own runtime does',
    )
    help_text = (
        'also give five values in [0, 1], 1 the good side; needs attribute heads'
    )
    add('--attributes', action='store_true', help=help_text)
    add('--precision', choices=PRECISIONS, default='float32', help='of the encoder')
    add(
        '--check',
        type=Path,
        metavar='FOLDER',
        help='photographs to compare scores on, and for int8 to set ranges with '
        '(half of them each); default: those of scikit-image',
    )


def run(arguments: argparse.Namespace) -> int:
    """Export, then measure what it changed.

    Returns:
        0, 1 if scores moved further than the precision explains, 2 on a mistake.
    """
    try:
        files, errors = without_unreadable(check_photographs(arguments.check))
        for error in errors:
            print(f'{error}: left out of the check.', file=sys.stderr)
        measured = _exported(arguments, files)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f'pyiqa-clipkd export: error: {error}', file=sys.stderr)
        return 2
    print(f'Against eager torch, {measured}.')
    if arguments.precision == 'int8' and measured.median > MUCH_LOSS:
        print('Eight bits cost this network a lot; float16 costs it next to nothing.')
    limit = LIMITS.get(arguments.precision)
    if limit is not None and measured.maximum > limit:
        print(
            f'pyiqa-clipkd export: error: that is more than {limit}: do not use '
            f'{arguments.output}.',
            file=sys.stderr,
        )
        return 1
    return 0


def _exported(arguments: argparse.Namespace, files: Sequence[Path]) -> Differences:
    calibration = None
    if arguments.precision == 'int8':
        files, calibration = files[::2], files[1::2]
    path = export(
        arguments.metric,
        arguments.output,
        weights=arguments.weights,
        form=arguments.input,
        precision=arguments.precision,
        photographs=calibration,
        attributes=arguments.attributes,
    )
    megabytes = path.stat().st_size / 1e6
    print(f'Wrote {path}: {arguments.precision}, {megabytes:.1f} MB.')
    network = CLIPKDMetric(arguments.metric, pretrained_model_path=arguments.weights)
    if arguments.attributes and path.suffix == ONNX:
        move = attribute_move(network, path, files)
        print(f'Against eager torch, attributes differ by {move:.3f} at most.')
    return differences(network, path, files)
