"""Exported models against eager torch: how far scores move, how long they take.

All models take whole photographs, uint8, and resize inside; `bundled` is the runtime
without torch as it comes, a graph beside the weights of the package, with its resize in
numpy. Latencies are medians, the contenders in turn, so that a busy machine slows all
of them alike. Photographs that set the ranges of int8 are not among the measured ones.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyiqa_clipkd.experiment import recorded_command, recorded_commit
from pyiqa_clipkd.export import CALIBRATION, PRECISIONS, export
from pyiqa_clipkd.export.check import Differences, check_photographs, eager_score
from pyiqa_clipkd.files import file_hash, written_whole
from pyiqa_clipkd.images import read_photograph
from pyiqa_clipkd.locations import BUNDLED_FOLDER, bundled_metrics
from pyiqa_clipkd.metric import CLIPKDMetric
from pyiqa_clipkd.runtime import Runtime

ROOT = Path(__file__).resolve().parents[1]
STUDENTS = bundled_metrics()
PACKAGES = ('torch', 'onnx', 'onnxscript', 'onnxruntime', 'numpy', 'Pillow', 'timm')
BATCHES = {1: 9, 16: 3}  # size -> rounds
EAGER, BUNDLED = 'eager', 'bundled'


def spread(files: list[Path], count: int) -> list[Path]:
    """`count` files, evenly from the whole list."""
    return [files[number * len(files) // count] for number in range(count)]


def milliseconds(contenders: dict[str, Callable[[], Any]], rounds: int) -> dict:
    """Median time of each, in turn, after one call each that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, call in contenders.items():
            start = time.perf_counter()
            call()
            if number:
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def batch_of(files: list[Path], size: int) -> np.ndarray:
    """uint8 (size, H, W, 3): photographs of the first one's size, over and over."""
    images = [np.asarray(read_photograph(path).image) for path in files[: 3 * size]]
    alike = [image for image in images if image.shape == images[0].shape]
    return np.stack([alike[number % len(alike)] for number in range(size)])


def measure(name: str, files: list[Path], args: argparse.Namespace) -> dict[str, Any]:
    """Everything about one student."""
    measured, calibration = files[: args.count], files[args.count :]
    network = CLIPKDMetric(name)
    bundled = Runtime(name, threads=args.threads)
    rows = {EAGER: {}, BUNDLED: {'megabytes': bundled.path.stat().st_size / 1e6}}
    models: dict[str, Runtime] = {}
    with tempfile.TemporaryDirectory() as folder:
        for precision in PRECISIONS:
            path = export(
                name,
                Path(folder, f'{precision}.onnx'),
                precision=precision,
                photographs=calibration,
            )
            models[precision] = Runtime(path, threads=args.threads)
            rows[precision] = {'megabytes': path.stat().st_size / 1e6}
    expected = [eager_score(network, path) for path in measured]
    for word, runtime in {**models, BUNDLED: bundled}.items():
        scores = [runtime.score(path).score for path in measured]
        rows[word] |= Differences.of(scores, expected)._asdict()
    for size, rounds in BATCHES.items():
        times = latencies(network, models, batch_of(measured, size), rounds)
        for word, value in times.items():
            rows[word][f'milliseconds_batch_{size}'] = round(value, 2)
            rows[word][f'times_eager_batch_{size}'] = round(value / times[EAGER], 3)
    weights = BUNDLED_FOLDER / f'{name}.safetensors'
    return {'weights_sha256': file_hash(weights), 'models': rows}


def latencies(
    network: torch.nn.Module, models: dict[str, Runtime], batch: np.ndarray, rounds: int
) -> dict[str, float]:
    """uint8 photographs to scores, in milliseconds a batch."""
    pixels = torch.from_numpy(batch)

    @torch.inference_mode()
    def eager() -> None:
        network(pixels.permute(0, 3, 1, 2).float() / 255)

    def call(runtime: Runtime) -> Callable[[], Any]:
        return lambda: runtime._run(batch)

    contenders = {word: call(runtime) for word, runtime in models.items()}
    return milliseconds({EAGER: eager, **contenders}, rounds)


def table(students: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        '| student | model | MB | scores differ, median | at most | time of one | '
        'time of 16 |',
        '|---|---|---|---|---|---|---|',
    ]
    for name, found in students.items():
        for word, row in found['models'].items():
            if word == EAGER:
                continue
            times = [
                f'{row[key]:.2f}' if key in row else ''
                for key in (f'times_eager_batch_{size}' for size in BATCHES)
            ]
            lines.append(
                f'| `{name.removeprefix("clipkd_")}` | {word} | {row["megabytes"]:.1f} '
                f'| {row["median"]:.5f} | {row["maximum"]:.5f} | {times[0]} '
                f'| {times[1]} |'
            )
    return '\n'.join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('--images', type=Path, required=True, help='folder of photographs')
    add('--count', type=int, default=100, help='photographs to measure on')
    add('--threads', type=int, default=1, help='of torch and of onnxruntime')
    add('--metrics', nargs='+', default=STUDENTS, choices=STUDENTS)
    add('-o', '--output', type=Path, default=ROOT / 'configs/results/export.json')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    files = check_photographs(args.images)
    files = spread(files, min(args.count + CALIBRATION, len(files)))
    # One in five for int8, from all over the folder too.
    order = np.random.default_rng(0).permutation(len(files))
    files = [files[number] for number in order]
    students = {}
    for name in args.metrics:
        students[name] = measure(name, files, args)
        print(table({name: students[name]}), flush=True)
    result = {
        'command': recorded_command(sys.argv, ROOT),
        'commit': recorded_commit(ROOT),
        'photographs': min(args.count, len(files)),
        'threads': args.threads,
        'machine': f'{platform.machine()}, {os.cpu_count()} cores',
        'python': platform.python_version(),
        'versions': {package: version(package) for package in PACKAGES},
        'students': students,
    }
    with written_whole(args.output) as partial:
        partial.write_text(json.dumps(result, indent=2) + '\n', encoding='utf-8')
    print('\n' + table(students))


if __name__ == '__main__':
    main()
