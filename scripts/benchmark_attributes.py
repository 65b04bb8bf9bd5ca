"""What attributes cost: `pyiqa-clipkd score` with `--attributes` and without, in turn.

    python scripts/benchmark_attributes.py --images photos -o results.json

Both score the same photographs, in processes of their own. What counts are seconds of
processor time a photograph, which other work on the machine moves less than the clock;
the median of the rounds' ratios, and the raw figures.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmark_scoring import LARGE, OURS, SMALL, make, run

from pyiqa_clipkd.experiment import recorded_command, recorded_commit
from pyiqa_clipkd.scoring.files import find_photographs

ROOT = Path(__file__).resolve().parents[1]
WAYS = {'plain': (), 'attributes': ('--attributes',)}


def measure(folder: Path, count: int, rounds: int) -> dict[str, Any]:
    """Seconds of processor time of each way and round, and their ratio."""
    command = [*OURS, str(folder), '--quiet', '--device', 'cpu']
    found: list[dict[str, float]] = []
    for _ in range(rounds):
        seconds = {
            way: run([*command, *options], count)['cpu_s'] / count
            for way, options in WAYS.items()
        }
        found.append(seconds)
        print(folder.name, json.dumps(seconds), file=sys.stderr, flush=True)
    ratios = [one['attributes'] / one['plain'] for one in found]
    return {'ratio': round(statistics.median(ratios), 4), 'rounds': found}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('--images', type=Path, required=True, help='folder of any photographs')
    add('-o', '--output', type=Path, help='JSON file for the figures')
    add('--rounds', type=int, default=5)
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
            figures[name] = measure(photos, count, args.rounds)
    print(json.dumps(figures, indent=2))
    if args.output:
        args.output.write_text(json.dumps(figures, indent=2) + '\n')


if __name__ == '__main__':
    main()
