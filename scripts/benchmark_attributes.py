"""What attributes cost: photographs scored with them and without, in turn.

    python scripts/benchmark_attributes.py --images photos -o results.json

Each photograph is read and scored by both, one right after the other and by turns
first, in one thread. What counts are seconds of processor time, which other work on the
machine moves less than the clock: the sum over the photographs, and the median of their
ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from benchmark_scoring import LARGE, SMALL, make

from pyiqa_clipkd.experiment import recorded_command, recorded_commit
from pyiqa_clipkd.names import DEFAULT_METRIC
from pyiqa_clipkd.scoring.backends import create_backend
from pyiqa_clipkd.scoring.core import score_paths
from pyiqa_clipkd.scoring.files import find_photographs

ROOT = Path(__file__).resolve().parents[1]
WAYS = (False, True)  # without attributes, with them
WARM = 5  # the first few aren't counted


def measure(folder: Path, rounds: int) -> dict[str, float]:
    """Seconds of processor time a photograph, and the ratios."""
    backends = {why: create_backend(DEFAULT_METRIC, attributes=why) for why in WAYS}
    found: dict[bool, list[float]] = {why: [] for why in WAYS}
    for turn, path in enumerate(rounds * sorted(folder.iterdir())):
        for why in WAYS if turn % 2 else WAYS[::-1]:
            start = time.process_time()
            (row,) = score_paths([path], backends[why], workers=1)
            found[why].append(time.process_time() - start)
            assert not row['error'], row
    plain, explained = (np.array(found[why][WARM:]) for why in WAYS)
    return {
        'plain_s': round(float(plain.mean()), 5),
        'attributes_s': round(float(explained.mean()), 5),
        'ratio_of_sums': round(float(explained.sum() / plain.sum()), 4),
        'median_ratio': round(float(np.median(explained / plain)), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('--images', type=Path, required=True, help='folder of any photographs')
    add('-o', '--output', type=Path, help='JSON file for the figures')
    add('--rounds', type=int, default=2)
    add('--small', type=int, default=200, help='number of photographs of 512 px')
    add('--large', type=int, default=40, help='of 12 megapixels')
    args = parser.parse_args()
    sources = list(find_photographs([str(args.images)]))[: args.small]
    if not sources:
        parser.error(f'`--images`: there are no photographs in {args.images}.')
    figures: dict[str, Any] = {
        'command': recorded_command(sys.argv, ROOT),
        'commit': recorded_commit(ROOT),
        'python': platform.python_version(),
        **{name: version(name) for name in ('onnxruntime', 'pillow', 'numpy')},
        'cores': os.cpu_count(),
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, count, size in (
            ('512 px', args.small, SMALL),
            ('12 megapixels', args.large, LARGE),
        ):
            photos = Path(folder, name)
            make(photos, sources, count, size)
            figures[name] = measure(photos, args.rounds)
    print(json.dumps(figures, indent=2))
    if args.output:
        args.output.write_text(json.dumps(figures, indent=2) + '\n')


if __name__ == '__main__':
    main()
