"""Measure `pyiqa-clipkd score --engine ray`: two workers against one, and what is lost.

    python scripts/benchmark_ray.py --images photos -o configs/results/ray

Scores the same photographs of 512 pixels with one worker and with two, in turn, on a
cluster of this machine's processes. A rate counts from the first rows that come back to
the last ones, and once more with all that starts before. Then the rows of each run, of
one whose worker is killed (kill -9), and of one whose driver is killed and that is
started again, are compared with those of the one-machine path, bit by bit. Without
--images the tests' photographs are scored again and again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmark_scoring import SMALL, make

from pyiqa_clipkd.experiment import recorded_command, recorded_commit
from pyiqa_clipkd.scoring.files import find_photographs
from pyiqa_clipkd.scoring.results import read_results

ROOT = Path(__file__).resolve().parents[1]
SCORE = [sys.executable, '-m', 'pyiqa_clipkd', 'score']
# Parts come soon, so that a stop has something to keep.
SOON = (
    'import sys; from pyiqa_clipkd.command import main; '
    'from pyiqa_clipkd.scoring.ray import parts; parts.PART_SECONDS = 1; '
    'raise SystemExit(main(sys.argv[1:]))'
)
KILLABLE = [sys.executable, '-c', SOON, 'score']
OWN = ['seconds', 'source', 'row']  # of a row, beside what was seen


def rates(folder: Path, total: int, workers: int) -> dict[str, Any]:
    """One run whose rows are printed as they come; the rows themselves, too."""
    options = ['--engine', 'ray', '--workers', str(workers), '--format', 'jsonl']
    start = time.perf_counter()
    process = subprocess.Popen(
        [*SCORE, str(folder), *options, '--quiet', '--device', 'cpu'],
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    rows, times = [], []
    for line in process.stdout:
        rows.append(json.loads(line))
        times.append(time.perf_counter() - start)
    if process.wait() or len(rows) != total:
        raise SystemExit(f'{workers} workers gave {len(rows)} of {total} rows.')
    # Rows come back a block at a time: the first block isn't counted.
    first = sum(moment < times[0] + 0.05 for moment in times)
    return {
        'images_a_second': (total - first) / (times[-1] - times[0]),
        'images_a_second_with_start': total / times[-1],
        'first_row_s': times[0],
        'rows': rows,
    }


def killed_worker(folder: Path, output: Path) -> dict[str, Any]:
    """Kill one of two workers once there are rows, and let the job end."""
    job = start_job(folder, output, 2)
    wait_for_part(output, job)
    killed = scorers(job.pid)[0]
    os.kill(killed, signal.SIGKILL)
    return {'killed': 'a worker', 'exit_code': job.wait()}


def killed_driver(folder: Path, output: Path) -> dict[str, Any]:
    """Kill the driver once there are rows, and start the same command again."""
    job = start_job(folder, output, 2)
    wait_for_part(output, job)
    job.kill()
    job.wait()
    kept = len(read_results(output))
    return {
        'killed': 'the driver',
        'rows_kept': kept,
        'exit_code': start_job(folder, output, 2).wait(),
    }


def start_job(folder: Path, output: Path, workers: int) -> subprocess.Popen[bytes]:
    options = ['--engine', 'ray', '--workers', str(workers), '--device', 'cpu']
    return subprocess.Popen([*KILLABLE, str(folder), '-o', str(output), *options])


def wait_for_part(output: Path, job: subprocess.Popen[bytes]) -> None:
    while not [*output.glob('scores-*')]:
        if job.poll() is not None:
            raise SystemExit('The job ended before it could be killed: more --images.')
        time.sleep(0.05)


def scorers(driver: int) -> list[int]:
    """The processes below a driver that have a model."""
    parents = {}
    for path in Path('/proc').glob('[0-9]*'):
        try:
            parents[int(path.name)] = int(
                (path / 'stat').read_text().rpartition(')')[2].split()[1]
            )
        except OSError:  # it has just ended
            continue
    found = []
    for number in parents:
        above = number
        while above in parents and above != driver:
            above = parents[above]
        if above == driver and 'Scorer' in Path(f'/proc/{number}/cmdline').read_text():
            found.append(number)
    return sorted(found)


def differences(rows: Any, expected: Any) -> dict[str, int]:
    """Rows that are missing, doubled, or different in any bit."""
    mine, theirs = (
        [tuple(row.values()) for row in sorted(table, key=lambda row: row['path'])]
        for table in (plain(rows), plain(expected))
    )
    paths = [row['path'] for row in rows]
    return {
        'rows': len(paths),
        'doubled': len(paths) - len(set(paths)),
        'missing': len({row['path'] for row in expected} - set(paths)),
        'different': len(set(mine) ^ set(theirs)),
    }


def plain(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without what differs from run to run; of floats, all their bits."""
    return [
        {
            key: value.hex() if isinstance(value, float) else value
            for key, value in row.items()
            if key not in OWN
        }
        for row in rows
    ]


def records(path: Path) -> list[dict[str, Any]]:
    table = read_results(path)
    return [dict(zip(table, row, strict=True)) for row in table.itertuples(index=False)]


def measure(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    sources = list(find_photographs([str(args.images)]))[: args.number]
    if not sources:
        raise SystemExit(f'There are no photographs in {args.images}.')
    photographs = work / 'photographs'
    make(photographs, sources, args.number, SMALL)
    local = work / 'local.parquet'
    subprocess.run([*SCORE, str(photographs), '-o', str(local), '--quiet'], check=True)
    expected = records(local)
    lines = work / 'local.jsonl'
    subprocess.run([*SCORE, str(photographs), '-o', str(lines), '--quiet'], check=True)
    printed = [json.loads(line) for line in lines.read_text().splitlines()]
    rounds, equal = [], []
    for turn in range(args.rounds):
        one = {}
        for workers in (1, 2) if turn % 2 else (2, 1):
            one[workers] = rates(photographs, args.number, workers)
            found = differences(one[workers].pop('rows'), printed)
            equal.append({'workers': workers, **found})
        rounds.append(one | {'load': os.getloadavg()[0]})
        print(json.dumps(rounds[-1]), file=sys.stderr, flush=True)
    for kill in (killed_worker, killed_driver):
        output = work / f'{kill.__name__}.parquet'
        equal.append(kill(photographs, output))
        equal[-1] |= differences(records(output), expected)
    return {'speed': summary(rounds), 'against_one_machine': equal, 'rounds': rounds}


def summary(rounds: Sequence[dict[Any, Any]]) -> dict[str, Any]:
    """Medians of both sides, and of the ratios within a round."""
    found: dict[str, Any] = {}
    for name in ('images_a_second', 'images_a_second_with_start'):
        sides = {n: [one[n][name] for one in rounds] for n in (1, 2)}
        ratios = [two / one for one, two in zip(*sides.values(), strict=True)]
        found[name] = {
            '1 worker': round(statistics.median(sides[1]), 2),
            '2 workers': round(statistics.median(sides[2]), 2),
            'ratio': round(statistics.median(ratios), 3),
            'ratios': [round(ratio, 3) for ratio in ratios],
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    help_text = "folder of any photographs; default: the tests'"
    add('--images', type=Path, default=ROOT / 'tests' / 'photos', help=help_text)
    add('-o', '--output', type=Path, help='folder for benchmark.json')
    add('--number', type=int, default=500, help='of photographs that are scored')
    add('--rounds', type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(args, Path(folder))
    packages = ('ray', 'pyarrow', 'onnxruntime', 'pillow', 'numpy')
    figures = {
        'command': recorded_command(sys.argv, ROOT),
        'commit': recorded_commit(ROOT),
        'python': platform.python_version(),
        **{name: version(name) for name in packages},
        'cores': os.cpu_count(),
        **measured,
    }
    print(json.dumps(figures, indent=2))
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        text = json.dumps(figures, indent=2) + '\n'
        (args.output / 'benchmark.json').write_text(text)


if __name__ == '__main__':
    main()
