"""Damaged image files, thousands of them, through the reading path of `score`.

    python scripts/fuzz_images.py -o images.json                 # 9,000 files, seed 0
    python scripts/fuzz_images.py -o images.json --files 500 --formats PNG --seed 7

Each file is read as `score --max-seconds` reads it: header, pixels, the network's
squares, in a process of its own. A process that dies is a crash, one that takes longer
than the limit a hang; both are kept with --keep. Memory is the process's peak above
what it had before the file (Linux).
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from image_mutations import mutated, seeds

from pyiqa_clipkd.experiment import recorded_command, recorded_commit
from pyiqa_clipkd.images import UnreadableError, read_photograph
from pyiqa_clipkd.scoring.isolated import Isolated
from pyiqa_clipkd.scoring.pillow import prepare_pillow
from pyiqa_clipkd.scoring.reading import decoded_bytes, read_squares

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / 'tests' / 'photos' / 'coffee.jpg'
SIZE = (96, 64)

# Side of the squares, and squares at the photograph's own resolution.
INPUT_SIZE, CROPS = 64, 1

CRASH, HANG = 'crashes its decoder', 'takes more than'


class Figures:
    """What became of the files of one format."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.crashes: list[str] = []
        self.hangs: list[str] = []
        self.unclear: list[str] = []
        self.seconds: list[float] = []
        self.slowest = ('', 0.0)
        self.most = ('', 0.0)

    def add(self, name: str, reason: str, seconds: float, megabytes: float) -> None:
        self.outcomes[_kind(reason) if reason else 'read'] += 1
        if reason.startswith(CRASH):
            self.crashes.append(name)
        if reason.startswith(HANG):
            self.hangs.append(name)
        if reason and not (reason.isprintable() and len(reason) < 300):
            self.unclear.append(name)
        self.seconds.append(seconds)
        self.slowest = max(self.slowest, (name, seconds), key=lambda pair: pair[1])
        self.most = max(self.most, (name, megabytes), key=lambda pair: pair[1])

    def summary(self) -> dict[str, Any]:
        files = self.outcomes.total()
        return {
            'files': files,
            'read': self.outcomes['read'],
            'refused': files - self.outcomes['read'],
            'crashes': self.crashes,
            'hangs': self.hangs,
            'reasons that are not one printable line': self.unclear,
            'median_s': round(float(np.median(self.seconds)), 5),
            'slowest': {'file': self.slowest[0], 's': round(self.slowest[1], 3)},
            'most_memory': {'file': self.most[0], 'mb': round(self.most[1], 1)},
            'outcomes': dict(self.outcomes.most_common()),
        }


def _kind(reason: str) -> str:
    """A reason without numbers and what was in the file."""
    return re.sub(r"b?'[^']*'|0x[0-9a-f]+|\d+", '_', reason)[:100]


class Memory:
    """The peak of a process since a moment, in megabytes; 0 where it's unknown."""

    def __init__(self, pid: int) -> None:
        self.folder = Path(f'/proc/{pid}')
        self.before = 0.0
        if self.folder.exists():
            (self.folder / 'clear_refs').write_text('5')
            self.before = self._read('VmRSS')

    def peak(self) -> float:
        return max(self._read('VmHWM') - self.before, 0.0)

    def _read(self, name: str) -> float:
        try:
            text = (self.folder / 'status').read_text()
        except OSError:
            return 0.0
        found = re.search(rf'{name}:\s+(\d+)', text)
        return int(found[1]) / 1024 if found else 0.0


def read_one(
    path: Path, readers: Isolated, max_pixels: int
) -> tuple[str, float, float]:
    """Why a file was refused (empty: it was read), seconds, megabytes."""
    with readers.one_file() as call:
        begin = time.perf_counter()
        memory = Memory(call.__self__.process.pid)  # type: ignore[attr-defined]
        reason = ''
        try:
            call(decoded_bytes, path)
            _, squares = call(read_squares, path, max_pixels, INPUT_SIZE, CROPS)
            if not (squares.min() >= 0 and squares.max() <= 1):
                reason = 'squares are outside [0, 1]'
        except UnreadableError as error:
            reason = str(error)
        return reason, time.perf_counter() - begin, memory.peak()


def fuzz(args: argparse.Namespace) -> dict[str, Figures]:
    picture = read_photograph(args.picture).image.resize(SIZE)
    wholes = seeds(picture)
    formats = args.formats or list(wholes)
    figures = {kind: Figures() for kind in formats}
    readers = Isolated(args.max_seconds, args.max_pixels)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, 'file')
        for number in range(args.files):
            kind = formats[number % len(formats)]
            # Of its own, so that any file can be made again alone.
            rng = np.random.default_rng([args.seed, number])
            how, data = mutated(kind, wholes[kind], rng)
            path.write_bytes(data)
            reason, seconds, megabytes = read_one(path, readers, args.max_pixels)
            name = f'{number} {kind} {how}'
            figures[kind].add(name, reason, seconds, megabytes)
            if args.keep and reason.startswith((CRASH, HANG)):
                args.keep.mkdir(parents=True, exist_ok=True)
                (args.keep / name.replace(' ', '_')).write_bytes(data)
            if number % 500 == 499:
                print(f'{number + 1} files', file=sys.stderr, flush=True)
    readers.close()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add('-o', '--output', type=Path, required=True)
    add('--files', type=int, default=9000)
    add('--formats', nargs='+', help='default: all')
    add('--seed', type=int, default=0)
    add('--max-seconds', type=float, default=20.0)
    add('--max-pixels', type=int, default=178_000_000)
    add('--picture', type=Path, default=PICTURE)
    add('--keep', type=Path, help='folder for files that crash or hang')
    args = parser.parse_args()
    prepare_pillow()
    begin = time.perf_counter()
    figures = fuzz(args)
    parts = {kind: one.summary() for kind, one in figures.items()}
    result = {
        'command': recorded_command(sys.argv, ROOT),
        'commit': recorded_commit(ROOT),
        'seed': args.seed,
        'python': platform.python_version(),
        'pillow': version('pillow'),
        'minutes': round((time.perf_counter() - begin) / 60, 1),
        'files': sum(part['files'] for part in parts.values()),
        'read': sum(part['read'] for part in parts.values()),
        'crashes': sum(len(part['crashes']) for part in parts.values()),
        'hangs': sum(len(part['hangs']) for part in parts.values()),
        'slowest_s': max(part['slowest']['s'] for part in parts.values()),
        'most_memory_mb': max(part['most_memory']['mb'] for part in parts.values()),
        'formats': parts,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + '\n')


if __name__ == '__main__':
    main()
