"""Measure `pyiqa-clipkd score` beside the `pyiqa` command: same weights, same files.

    python scripts/benchmark_scoring.py --images photos -o results.json

Makes photographs of 512 pixels, of 12 and of 48 megapixels out of those in a folder
(the large ones with noise, or there would be little to decode), and scores them by each
command in turn. A rate counts from the hundredth score on of the small ones, from the
first one on of the large ones. The bound is the same decoder in as many threads,
without resize and network. Medians over the rounds; the raw figures are in the file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pyiqa_clipkd.scoring.files import find_photographs
from pyiqa_clipkd.scoring.pillow import PILLOW_MEMORY

OURS = [sys.executable, '-m', 'pyiqa_clipkd', 'score']
PYIQA = [sys.executable, '-m', 'pyiqa.pyiqa_cmd']

SMALL, LARGE, HUGE = (512, 512), (4000, 3000), (8000, 6000)

# Standard deviation of the noise: with it a photograph of 12 megapixels has 4 MB.
NOISE = 8

# Scores of small photographs before the clock starts: the second hundred on.
WARM = 100

DECODE = """
import sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pyiqa_clipkd.images import read_photograph
from pyiqa_clipkd.scoring.core import default_workers
def decode(path):
    read_photograph(path)  # and let go of it
paths = sorted(Path(sys.argv[1]).iterdir())
with ThreadPoolExecutor(default_workers()) as executor:
    times = []
    for _ in executor.map(decode, paths):
        times.append(time.perf_counter())
print((len(times) - 1) / (times[-1] - times[0]))
"""


def make(
    folder: Path, sources: Sequence[Path], count: int, size: tuple[int, int]
) -> None:
    """Photographs of one size: parts of the given ones, enlarged."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    noise = rng.normal(0, NOISE, (size[1], size[0], 3)).astype(np.float32)
    for number in range(count):
        with Image.open(sources[number % len(sources)]) as source:
            image = source.convert('RGB').resize(size, Image.Resampling.BICUBIC)
        if size != SMALL:
            values = np.asarray(image) + np.roll(noise, 97 * number, axis=0)
            image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
        image.save(folder / f'{number:04}.jpg', quality=90)


def run(command: Sequence[str], total: int) -> dict[str, float]:
    """Seconds until each score, memory and mean score of a command in its own process.

    Our command prints a line a score; the progress bar of pyiqa counts them.
    """
    ours = list(command[: len(OURS)]) == OURS
    start = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE if ours else subprocess.DEVNULL,
        stderr=subprocess.DEVNULL if ours else subprocess.PIPE,
        env={**os.environ, 'PYTHONUNBUFFERED': '1'},
    )
    stream = process.stdout if ours else process.stderr
    assert stream is not None
    times: list[float] = []
    while chunk := os.read(stream.fileno(), 1 << 16):
        now = time.perf_counter() - start
        if ours:
            done = len(times) + chunk.count(b'\n')
        else:
            done = max(map(int, re.findall(rb'(\d+)/%d ' % total, chunk)), default=0)
        times += [now] * (done - len(times))
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or len(times) != total:
        raise SystemExit(
            f'{" ".join(command)} ended with {process.returncode} after {len(times)} '
            f'of {total} scores.'
        )
    skip = WARM if total > WARM else 1
    return {
        'images_a_second': (total - skip) / (times[-1] - times[skip - 1]),
        'first_score_s': times[0],
        'peak_mb': usage.ru_maxrss / 1024,
        'cpu_s': usage.ru_utime + usage.ru_stime,
    }


def decode_only(folder: Path) -> float:
    """Images a second of the decoder alone, under the settings of our command."""
    settings = {**PILLOW_MEMORY, 'OPENBLAS_NUM_THREADS': '1'}
    result = subprocess.run(
        [sys.executable, '-c', DECODE, str(folder)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **settings},
    )
    return float(result.stdout)


def commands(metric: str, folder: Path) -> dict[str, list[str]]:
    options = [str(folder), '-m', metric, '--device', 'cpu', '--quiet']
    return {
        'pyiqa': [*PYIQA, metric, '-t', str(folder), '--device', 'cpu'],
        'onnx': [*OURS, *options, '--backend', 'onnx'],
        'torch': [*OURS, *options, '--backend', 'torch'],
    }


def median(rounds: Sequence[dict[str, dict[str, float]]]) -> dict[str, dict[str, Any]]:
    """What each side did, and how many times pyiqa's rate and start ours are."""
    sides = {
        side: {
            figure: round(statistics.median(one[side][figure] for one in rounds), 3)
            for figure in rounds[0][side]
        }
        for side in rounds[0]
    }
    for side in sides:
        for figure in ('images_a_second', 'first_score_s'):
            ratios = [one[side][figure] / one['pyiqa'][figure] for one in rounds]
            sides[side][f'{figure}_to_pyiqa'] = round(statistics.median(ratios), 3)
    return sides


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    sources = list(find_photographs([str(args.images)]))[: args.small]
    if not sources:
        raise SystemExit(f'There are no photographs in {args.images}.')
    small, large, huge = (folder / name for name in ('small', 'large', 'huge'))
    # In a process of its own: what this one takes would count as memory of those that
    # it starts.
    with ProcessPoolExecutor(1, get_context('spawn')) as executor:
        for photos, count, size in (
            (small, args.small, SMALL),
            (large, args.large, LARGE),
            (huge, args.huge, HUGE),
        ):
            executor.submit(make, photos, sources, count, size).result()
    rounds: dict[str, list[dict[str, dict[str, float]]]] = {'small': [], 'large': []}
    bounds = []
    for _ in range(args.rounds):
        for name, photos, count in (
            ('small', small, args.small),
            ('large', large, args.large),
        ):
            sides = commands(args.metric, photos)
            rounds[name].append({s: run(sides[s], count) for s in sides})
            print(name, json.dumps(rounds[name][-1]), file=sys.stderr)
        bounds.append(decode_only(large))
    of_bound = {
        side: statistics.median(
            one[side]['images_a_second'] / bound
            for one, bound in zip(rounds['large'], bounds, strict=True)
        )
        for side in ('onnx', 'torch')
    }
    sides = commands(args.metric, huge)
    return {
        f'{args.small} photographs of 512 px': median(rounds['small']),
        f'{args.large} photographs of 12 megapixels': median(rounds['large']),
        'decode-only bound, 12 megapixels, images a second': statistics.median(bounds),
        'share of the decode-only bound': of_bound,
        'peak MB, 48 megapixels': {
            side: round(run(sides[side], args.huge)['peak_mb'])
            for side in ('onnx', 'torch')
        },
        'raw': {**rounds, 'decode_only': bounds},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('--images', type=Path, required=True, help='folder of any photographs')
    add('-o', '--output', type=Path, help='JSON file for the figures')
    add('-m', '--metric', default='clipkd_efficientnet_lite')
    add('--rounds', type=int, default=3)
    add('--small', type=int, default=500, help='number of photographs of 512 px')
    add('--large', type=int, default=100, help='of 12 megapixels')
    add('--huge', type=int, default=8, help='of 48 megapixels')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(args, Path(folder))
    packages = ('pyiqa', 'torch', 'timm', 'onnxruntime', 'pillow', 'numpy')
    figures = {
        'command': ' '.join(['python', *sys.argv]),
        'python': platform.python_version(),
        **{name: version(name) for name in packages},
        'cores': os.cpu_count(),
        'load': os.getloadavg(),
    } | figures
    print(json.dumps({k: v for k, v in figures.items() if k != 'raw'}, indent=2))
    if args.output:
        args.output.write_text(json.dumps(figures, indent=2) + '\n')


if __name__ == '__main__':
    main()
