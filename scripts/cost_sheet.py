"""What scoring a million photographs takes, or a billion: hours, machines, money.

    python scripts/cost_sheet.py --images photos -o configs/results/ray --price 0.04

Measured on one core, one photograph after the other, in seconds of processor time:
reading (bytes that aren't in memory), decoding, the resize to what the network sees,
and the network by each backend; and how many rows the driver of a cluster takes.
All else is arithmetic with these. Without --images it works on the photographs of the
tests. --price is yours: money for one core and hour.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from benchmark_scoring import LARGE, SMALL, make

from pyiqa_clipkd.experiment import recorded_command, recorded_commit
from pyiqa_clipkd.images import read_photograph, squares
from pyiqa_clipkd.names import DEFAULT_METRIC
from pyiqa_clipkd.scoring.backends import Backend, create_backend
from pyiqa_clipkd.scoring.core import identity_of, score_paths
from pyiqa_clipkd.scoring.files import find_photographs
from pyiqa_clipkd.scoring.ray.parts import Parts
from pyiqa_clipkd.scoring.ray.worker import ENCODE
from pyiqa_clipkd.scoring.session import Tally
from pyiqa_clipkd.scoring.tables import ROW, SOURCE

ROOT = Path(__file__).resolve().parents[1]
SIZES = {'512 px': SMALL, '12 megapixels': LARGE}
COUNTS = (10**6, 10**8, 10**9)
WARM = 3  # the first few aren't counted
DRIVER_ROWS = 50_000
GIGABIT = 125  # MB a second


def backends(folder: Path, photographs: Path) -> dict[str, Backend]:
    """onnxruntime in float32 and int8, and torch; one thread each."""
    file = folder / 'int8.onnx'
    export = [
        sys.executable,
        '-m',
        'pyiqa_clipkd',
        'export',
        '-m',
        DEFAULT_METRIC,
        str(file),
    ]
    options = ['--precision', 'int8', '--input', 'squares', '--check', str(photographs)]
    subprocess.run([*export, *options], check=True, stdout=sys.stderr)
    return {
        'onnx': create_backend(DEFAULT_METRIC, kind='onnx'),
        'onnx int8': create_backend(None, kind='onnx', weights=file),
        'torch': create_backend(DEFAULT_METRIC, kind='torch', device='cpu'),
    }


def read_from_storage(path: Path) -> bytes:
    """The bytes of a file, which the system must fetch again if it can forget them."""
    with path.open('rb') as file:
        if hasattr(os, 'posix_fadvise'):
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return file.read()


def measure(folder: Path, networks: dict[str, Backend]) -> dict[str, Any]:
    """Medians: seconds of processor time a photograph, and of the clock for reading."""
    found: dict[str, list[float]] = {}

    def note(name: str, start: float, clock: Any = time.process_time) -> None:
        found.setdefault(name, []).append(clock() - start)

    sizes = []
    for path in sorted(folder.iterdir()):
        clock, start = time.perf_counter(), time.process_time()
        data = read_from_storage(path)
        note('read', start)
        note('read, by the clock', clock, time.perf_counter)
        start = time.process_time()
        photograph = read_photograph(io.BytesIO(data))
        note('decode', start)
        start = time.process_time()
        views = squares(photograph.image, next(iter(networks.values())).input_size)
        note('resize', start)
        for name, network in networks.items():
            start = time.process_time()
            network(views)
            note(name, start)
        sizes.append(len(data))
    seconds = {k: round(float(np.median(v[WARM:])), 6) for k, v in found.items()}
    megabytes = sum(sizes) / len(sizes) / 1e6
    return {
        'photographs': len(sizes),
        'megabytes': round(megabytes, 4),
        'seconds': seconds,
        'storage_mb_s': round(megabytes / seconds['read, by the clock'], 1),
    }


def driver_rows_a_second(backend: Backend, photograph: Path, folder: Path) -> float:
    """How many rows one driver takes: parsed, counted, written, all in one thread."""
    (row,) = score_paths([photograph], backend)
    lines = [
        ENCODE({**row, 'path': f'/s.tar/{i}.jpg', SOURCE: '/s.tar', ROW: i})
        for i in range(DRIVER_ROWS)
    ]
    tally = Tally(None)
    start = time.process_time()
    with Parts(str(folder), backend.levels, identity_of(backend, 0)) as parts:
        for line in lines:
            row = json.loads(line)
            if not parts.has(row):
                parts.add(row)
                tally.add(row)
    return DRIVER_ROWS / (time.process_time() - start)


def sheet(
    measured: dict[str, Any], driver: float, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row for each size and way to run the network; arithmetic only."""
    rows = []
    for size, one in measured.items():
        seconds = one['seconds']
        before = seconds['read'] + seconds['decode'] + seconds['resize']
        for name in ('onnx', 'onnx int8', 'torch', 'a GPU'):
            network = seconds.get(name, 0)  # a GPU leaves the rest to the cores
            rate = 1 / (before + network)
            rows.append(
                {
                    'photographs': size,
                    'network': name,
                    'a_core_a_second': round(rate, 2),
                    'share_before_network': round(before * rate, 3),
                    'mb_s_a_core': round(rate * one['megabytes'], 2),
                    'cores_of_a_link': int(
                        args.gigabits * GIGABIT / rate // one['megabytes']
                    ),
                    'cores_of_a_driver': int(driver / rate),
                    **{f'{n:.0e}': costs(n, rate, args) for n in COUNTS},
                }
            )
    return rows


def costs(number: int, rate: float, args: argparse.Namespace) -> dict[str, float]:
    core_hours = number / rate / 3600
    found = {
        'core_hours': round(core_hours, 1),
        'machines': int(np.ceil(core_hours / args.hours / args.cores)),
    }
    if args.price is not None:
        found['money'] = round(core_hours * args.price, 2)
    return found


def as_text(figures: dict[str, Any], args: argparse.Namespace) -> str:
    """The sheet for people, in Markdown."""
    lines = [
        '# What scoring many photographs takes',
        '',
        f'Machines: of {args.cores} cores, for all to be done in {args.hours:g} hours.',
        f'Link: {args.gigabits:g} Gbit/s a machine. "a GPU": reading, decoding and',
        'resize alone, as if the network took no time.',
        '',
        '| photographs | network | a second and core | before the network '
        '| MB/s a core | cores that fill a link | cores that fill a driver |',
        '|---|---|---|---|---|---|---|',
    ]
    for row in figures['sheet']:
        keys = (
            *('photographs', 'network', 'a_core_a_second', 'share_before_network'),
            *('mb_s_a_core', 'cores_of_a_link', 'cores_of_a_driver'),
        )
        lines.append(f'| {" | ".join(str(row[key]) for key in keys)} |')
    money = ', money' if args.price is not None else ''
    heads = ' | '.join(f'{n:,}: core hours, machines{money}' for n in COUNTS)
    lines += ['', f'| photographs | network | {heads} |', '|---|---|---|---|---|']
    for row in figures['sheet']:
        cells = [', '.join(f'{v:,}' for v in row[f'{n:.0e}'].values()) for n in COUNTS]
        lines.append(
            f'| {row["photographs"]} | {row["network"]} | {" | ".join(cells)} |'
        )
    return '\n'.join([*lines, '', *bottlenecks(figures), ''])


def bottlenecks(figures: dict[str, Any]) -> list[str]:
    """Where time goes, a line for each size."""
    lines = []
    for size, one in figures['measured'].items():
        seconds = one['seconds']
        parts = {k: 1e3 * seconds[k] for k in ('read', 'decode', 'resize', 'onnx')}
        worst = max(parts, key=lambda name: parts[name])
        text = ', '.join(f'{k} {v:.1f} ms' for k, v in parts.items())
        lines.append(
            f'- {size} ({one["megabytes"]:.2f} MB): {text}; most goes to {worst}. '
            f'Storage gave {one["storage_mb_s"]:.0f} MB/s here.'
        )
    return lines


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    help_text = "folder of any photographs; default: the tests'"
    add('--images', type=Path, default=ROOT / 'tests' / 'photos', help=help_text)
    add(
        '-o', '--output', type=Path, help='folder for cost_sheet.json and COST_SHEET.md'
    )
    add('--small', type=int, default=100, help='number of photographs of 512 px')
    add('--large', type=int, default=30, help='of 12 megapixels')
    add('--cores', type=int, default=16, help='of a machine')
    add('--hours', type=float, default=24, help='until all is done')
    add('--gigabits', type=float, default=10, help='a second, of the link of a machine')
    add('--price', type=float, help='of one core and hour, in any currency')
    return parser.parse_args()


def main() -> None:
    args = arguments()
    sources = list(find_photographs([str(args.images)]))[: args.small]
    if not sources:
        raise SystemExit(f'There are no photographs in {args.images}.')
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        measured = {}
        for size, count in zip(SIZES, (args.small, args.large), strict=True):
            photographs = folder / size
            make(photographs, sources, count, SIZES[size])
            if not measured:
                networks = backends(folder, photographs)
            measured[size] = measure(photographs, networks)
        driver = driver_rows_a_second(
            networks['onnx'], next((folder / '512 px').iterdir()), folder / 's.parquet'
        )
    packages = ('torch', 'timm', 'onnxruntime', 'pillow', 'numpy', 'pyarrow')
    figures = {
        'command': recorded_command(sys.argv, ROOT),
        'commit': recorded_commit(ROOT),
        'python': platform.python_version(),
        **{package: version(package) for package in packages},
        'cores': os.cpu_count(),
        'load': os.getloadavg(),
        'metric': DEFAULT_METRIC,
        'driver_rows_a_second': round(driver),
        'measured': measured,
        'sheet': sheet(measured, driver, args),
    }
    text = as_text(figures, args)
    print(text)
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        data = json.dumps(figures, indent=2) + '\n'
        (args.output / 'cost_sheet.json').write_text(data)
        (args.output / 'COST_SHEET.md').write_text(text)


if __name__ == '__main__':
    main()
