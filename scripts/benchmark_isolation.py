"""What `score --max-seconds` costs: beside plain `score` on the same files, in turn.

    python scripts/benchmark_isolation.py --images photos -o isolation.json

Medians over the rounds; processor time and memory are those of all processes together
(Linux). Ratios are those of each round, with limit to without.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmark_scoring import LARGE, OURS, SMALL, make

from pyiqa_clipkd.experiment import recorded_command, recorded_commit
from pyiqa_clipkd.scoring.files import find_photographs

ROOT = Path(__file__).resolve().parents[1]
PHOTOS = ROOT / 'tests' / 'photos'
KINDS = {'threads': [], 'processes': ['--max-seconds', '60']}

# Linux: what a child leaves behind becomes ours, and its time is counted.
PR_SET_CHILD_SUBREAPER = 36


def measured(folder: Path, words: list[str]) -> dict[str, float]:
    """Seconds, processor seconds, seconds to the first score, megabytes of a run."""
    before = _processor()
    begin = time.perf_counter()
    command = [*OURS, str(folder), '--quiet', *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as run:
        assert run.stdout is not None
        run.stdout.readline()
        first = time.perf_counter() - begin
        most, lines = _memory(run.pid), 1
        for _ in run.stdout:
            lines += 1
            if lines % 10 == 0:
                most = max(most, _memory(run.pid))
    wall = time.perf_counter() - begin
    while True:  # the others end after it
        try:
            os.wait()
        except ChildProcessError:
            break
    return {
        'images_a_second': (lines - 1) / (wall - first),
        'processor_s': _processor() - before,
        'first_score_s': first,
        'mb': most,
    }


def _processor() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _memory(pid: int) -> float:
    """Of a process and all below it; what they share counts once."""
    total = 0.0
    try:
        for line in Path(f'/proc/{pid}/smaps_rollup').read_text().splitlines():
            if line.startswith('Pss:'):
                total += int(line.split()[1]) / 1024
        for task in Path(f'/proc/{pid}/task').iterdir():
            for child in (task / 'children').read_text().split():
                total += _memory(int(child))
    except OSError:
        pass
    return total


def compare(folder: Path, rounds: int) -> dict[str, Any]:
    raw: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for number in range(rounds):
        order = list(KINDS)[:: 1 if number % 2 else -1]
        for kind in order:
            raw[kind].append(measured(folder, KINDS[kind]))
    names = raw['threads'][0]
    medians = {
        kind: {
            name: round(statistics.median(run[name] for run in runs), 3)
            for name in names
        }
        for kind, runs in raw.items()
    }
    pairs = list(zip(raw['processes'], raw['threads'], strict=True))
    ratios = {
        name: [round(with_[name] / without[name], 3) for with_, without in pairs]
        for name in names
    }
    middle = {name: statistics.median(values) for name, values in ratios.items()}
    return {**medians, 'ratio': middle, 'ratios': ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add('-o', '--output', type=Path, required=True)
    add('--images', type=Path, default=PHOTOS, help='photographs to make others of')
    add('--small', type=int, default=200)
    add('--large', type=int, default=20)
    add('--rounds', type=int, default=5)
    args = parser.parse_args()
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    sources = list(find_photographs([str(args.images)]))
    result: dict[str, Any] = {
        'command': recorded_command(sys.argv, ROOT),
        'commit': recorded_commit(ROOT),
        'python': platform.python_version(),
        'pillow': version('pillow'),
        'cores': os.cpu_count(),
        'load': os.getloadavg(),
    }
    kinds = {'512 px': (args.small, SMALL), '12 megapixels': (args.large, LARGE)}
    with tempfile.TemporaryDirectory() as name:
        for kind, (count, size) in kinds.items():
            folder = Path(name, kind.replace(' ', '_'))
            make(folder, sources, count, size)
            result[f'{count} photographs of {kind}'] = compare(folder, args.rounds)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + '\n')


if __name__ == '__main__':
    main()
