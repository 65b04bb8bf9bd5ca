"""Do memory, open files and threads stay flat over many thousand photographs?

    python scripts/long_run.py -o configs/results/long_run.json

Each way of scoring runs in a process of its own and goes again and again over the same
few photographs of differing sizes: `score` is the command, `metric` is what pyiqa's
`create_metric` gives, `runtime` is the `Runtime`. Every thousand photographs the kernel
is asked (/proc, so Linux only). The slope is a straight line by least squares through
the samples after the warm-up. In a short run that line follows what an allocator holds
back and returns (with torch 5 MB up and down, and now and then 25 MB for a moment); a
leak raises also what is held usually: the upper quartile of the last third's samples
against that of the first third's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import skimage
from PIL import Image

from pyiqa_clipkd.experiment import recorded_command, recorded_commit
from pyiqa_clipkd.names import DEFAULT_METRIC
from pyiqa_clipkd.scoring.files import find_photographs

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ('astronaut.png', 'coffee.png', 'chelsea.png', 'rocket.jpg')
WAYS = ('score', 'runtime', 'metric')

# Of the default photographs: sides in pixels, and how many.
SIDES, COUNT = (120, 640), 40


def make_photographs(folder: Path) -> list[Path]:
    """Photographs of scikit-image in differing sizes, half of them as PNG."""
    rng = np.random.default_rng(0)
    paths = []
    for number in range(COUNT):
        size = tuple(int(side) for side in rng.integers(*SIDES, size=2))
        name = SOURCES[number % len(SOURCES)]
        image = Image.open(Path(skimage.__file__).parent / 'data' / name)
        paths.append(folder / f'{number:03}.{"png" if number % 2 else "jpg"}')
        image.convert('RGB').resize((size[0], size[1])).save(paths[-1])
    return paths


def usage(pid: int) -> dict[str, float]:
    """Resident memory in MB, open files and threads of a process, now."""
    process = Path('/proc', str(pid))
    pages = int((process / 'statm').read_text().split()[1])
    return {
        'rss_mb': round(pages * os.sysconf('SC_PAGE_SIZE') / 1e6, 2),
        'files': len(os.listdir(process / 'fd')),
        'threads': len(os.listdir(process / 'task')),
    }


# --- the ways, each in its own process ------------------------------------------------


def scored(way: str, paths: Iterator[Path]) -> Iterator[object]:
    """Score paths in this process, one after the other."""
    if way == 'runtime':
        from pyiqa_clipkd.runtime import Runtime

        yield from map(Runtime(DEFAULT_METRIC, threads=1).score, paths)
    if way == 'metric':
        import pyiqa
        import torch

        torch.set_num_threads(1)
        metric = pyiqa.create_metric(DEFAULT_METRIC, device='cpu')
        for path in paths:
            with torch.no_grad():
                yield float(metric(str(path)))


def work(way: str, folder: Path, images: int, every: int) -> None:
    """The process that `samples_of` starts: a line of JSON every so often."""
    paths = islice(cycle(sorted(folder.iterdir())), images)
    for number, _ in enumerate(scored(way, paths), 1):
        if number % every == 0:
            print(json.dumps({'images': number, **usage(os.getpid())}), flush=True)


def samples_of(
    way: str, folder: Path, images: int, every: int
) -> list[dict[str, float]]:
    """What the kernel says of a way, every so many photographs.

    Best a multiple of those in the folder, so that all samples are taken after the same
    one: the size of the last one would look like a slope.
    """
    if way == 'score':
        return samples_of_command(folder, images, every)
    words = [__file__, '--work', way, '--folder', str(folder)]
    words += ['--images', str(images), '--every', str(every)]
    result = subprocess.run(
        [sys.executable, *words], stdout=subprocess.PIPE, text=True, check=True
    )
    lines = result.stdout.splitlines()
    return [json.loads(line) for line in lines if line.startswith('{"images"')]


def samples_of_command(folder: Path, images: int, every: int) -> list[dict[str, float]]:
    """Of `pyiqa-clipkd score` on links to the photographs, by the rows in its file."""
    samples: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as place:
        links, output = Path(place, 'photographs'), Path(place, 'rows.csv')
        links.mkdir()
        for number, path in enumerate(islice(cycle(sorted(folder.iterdir())), images)):
            os.symlink(path, links / f'{number:06}{path.suffix}')
        words = ['score', str(links), '-o', str(output), '--workers', '1', '--quiet']
        process = subprocess.Popen([sys.executable, '-m', 'pyiqa_clipkd', *words])
        while process.poll() is None:
            time.sleep(0.2)
            rows = output.read_bytes().count(b'\n') - 1 if output.exists() else 0
            # Not at the end, where it lets go of everything.
            if every * (len(samples) + 1) <= rows < images:
                samples.append({'images': rows, **usage(process.pid)})
        if process.returncode:
            raise SystemExit(f'`score` ended with {process.returncode}.')
    return samples


# --- what they show -------------------------------------------------------------------


def summary(samples: Sequence[dict[str, float]], warm: int) -> dict[str, Any]:
    """Slopes and ranges of the samples after the warm-up, at least three."""
    rest = [sample for sample in samples if sample['images'] >= warm]
    thousands = np.array([sample['images'] for sample in rest]) / 1000
    rss = np.array([sample['rss_mb'] for sample in rest])
    slope = float(np.polyfit(thousands, rss, 1)[0])
    ranges = {
        key: [min(values), max(values)]
        for key in ('rss_mb', 'files', 'threads')
        if (values := [sample[key] for sample in rest])
    }
    return {
        'kb_per_1000_images': round(1000 * slope, 1),
        'usual_kb_per_1000_images': round(1000 * usual_slope(thousands, rss), 1),
        **ranges,
    }


def usual_slope(thousands: np.ndarray, rss: np.ndarray) -> float:
    """How fast what is usually held grows, MB a thousand: a leak's own slope."""
    third = len(rss) // 3
    first, last = (np.percentile(part, 75) for part in (rss[:third], rss[-third:]))
    return float((last - first) / (thousands[-third] - thousands[0]))


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for way in args.ways:
        start = time.perf_counter()
        samples = samples_of(way, folder, args.images, args.every)
        seconds = time.perf_counter() - start
        figures[way] = {
            **summary(samples, args.warm),
            'seconds': round(seconds),
            'samples': samples,
        }
        shown = {k: v for k, v in figures[way].items() if k != 'samples'}
        print(way, json.dumps(shown), flush=True)
        if args.output:  # what has been measured stays, whatever comes
            write(args, figures)
    return figures


def write(args: argparse.Namespace, figures: dict[str, Any]) -> None:
    packages = ('pyiqa', 'torch', 'timm', 'onnxruntime', 'pillow', 'numpy')
    record = {
        'command': recorded_command(sys.argv, ROOT),
        'commit': recorded_commit(ROOT),
        'python': platform.python_version(),
        **{name: version(name) for name in packages},
        'images': args.images,
        'warm': args.warm,
        'ways': figures,
    }
    args.output.write_text(json.dumps(record, indent=1) + '\n')


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('--folder', type=Path, help='photographs; default: 40 of scikit-image')
    add('--images', type=int, default=20_000, help='how many are scored each way')
    add('--every', type=int, default=1000, help='photographs between two samples')
    add('--warm', type=int, default=2000, help='photographs that the slope leaves out')
    add('--ways', nargs='+', choices=WAYS, default=WAYS)
    add('-o', '--output', type=Path, help='JSON file for the figures')
    add('--work', choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not args.work and (args.images - args.warm) // args.every < 3:
        parser.error('`--images` less `--warm` must be at least three times `--every`.')
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = parse(argv)
    if args.work:
        work(args.work, args.folder, args.images, args.every)
        return {}
    with tempfile.TemporaryDirectory() as place:
        sources = (
            list(find_photographs([str(args.folder)]))
            if args.folder
            else make_photographs(Path(place))
        )
        links = Path(place, 'all')
        links.mkdir()
        for number, path in enumerate(sources):
            os.symlink(Path(path).resolve(), links / f'{number:06}{path.suffix}')
        return measure(args, links)


if __name__ == '__main__':
    main()
