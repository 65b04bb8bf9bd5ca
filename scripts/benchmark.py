"""Measure what the package costs: at start-up, to create a metric, in memory, to train.

Each figure is the median over processes of its own, the two sides of a comparison in
turn. Writes the raw figures as JSON with `-o`.
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pyiqa_clipkd._build import startup_files

METRIC = 'clipkd_efficientnet_lite'

CREATE = f"""
import time, pyiqa
start = time.perf_counter()
pyiqa.create_metric({METRIC!r}, device='cpu')
print(time.perf_counter() - start)
"""

MEMORY = f"""
import resource, sys, pyiqa
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
metric = pyiqa.create_metric({METRIC!r}, device='cpu')
before = peak()
metric(sys.argv[1])
print(before, peak())
"""

STEP = """
import sys, time, torch
from pyiqa_clipkd.network import CLIPKDStudent
from pyiqa_clipkd.pipeline import keep_freed_memory
if sys.argv[1] == 'keep':
    keep_freed_memory()
net = CLIPKDStudent('efficientnet_lite').to(memory_format=torch.channels_last).train()
images = torch.rand(32, 3, 224, 224).contiguous(memory_format=torch.channels_last)
times = []
for _ in range(6):
    start = time.perf_counter()
    net(images).mean().backward()
    times.append(time.perf_counter() - start)
print(sorted(times)[2])
"""


def run(code: str, *arguments: str, **variables: str) -> list[float]:
    """The numbers that a fresh process prints on its last line."""
    result = subprocess.run(
        [sys.executable, '-c', code, *arguments],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **variables},
    )
    return [float(word) for word in result.stdout.split('\n')[-2].split()]


def start_up(repeats: int) -> dict[str, float]:
    """Milliseconds of a Python that does nothing, with and without the start-up files.

    Both read a folder as site-packages; one of them holds our files.
    """
    times: dict[str, list[float]] = {'with': [], 'without': []}
    with tempfile.TemporaryDirectory() as root:
        for side in times:
            Path(root, side).mkdir()
        for name, text in startup_files().items():
            Path(root, 'with', name).write_text(text)
        compileall.compile_dir(root, quiet=1)  # as pip does
        for _ in range(repeats):
            for side in times:
                code = f'import site; site.addsitedir({str(Path(root, side))!r})'
                start = time.perf_counter()
                subprocess.run([sys.executable, '-S', '-c', code], check=True)
                times[side].append(1000 * (time.perf_counter() - start))
    pairs = zip(times['with'], times['without'], strict=True)
    return {side: statistics.median(values) for side, values in times.items()} | {
        'cost': statistics.median(a - b for a, b in pairs)
    }


def create_metric(repeats: int) -> dict[str, float]:
    """Seconds of `create_metric` after `import pyiqa`."""
    times = [run(CREATE)[0] for _ in range(repeats)]
    return {'median': statistics.median(times), 'max': max(times)}


def memory(repeats: int) -> dict[str, float]:
    """MB of resident memory before and at the peak of scoring 4000 x 3000 pixels."""
    from PIL import Image
    from skimage import data

    with tempfile.TemporaryDirectory() as folder:
        photo = Path(folder) / '12-megapixel.jpg'
        Image.fromarray(data.astronaut()).resize((4000, 3000)).save(photo)
        rows = [run(MEMORY, str(photo)) for _ in range(repeats)]
    before, peak = (statistics.median(column) for column in zip(*rows, strict=True))
    return {'before': before, 'peak': peak, 'added': peak - before}


def training_step(repeats: int) -> dict[str, float]:
    """Milliseconds an image of 224 px: EfficientNet-Lite0, forward and backward."""
    times: dict[str, list[float]] = {'keep': [], 'default': []}
    for _ in range(repeats):
        for mode in times:
            times[mode].append(1000 / 32 * run(STEP, mode)[0])
    medians = {mode: statistics.median(values) for mode, values in times.items()}
    return medians | {'ratio': medians['default'] / medians['keep']}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('-o', '--output', type=Path, help='JSON file for the figures')
    parser.add_argument('--repeats', type=int, default=5)
    args = parser.parse_args()
    figures = {
        'command': ' '.join(['python', *sys.argv]),
        'python': platform.python_version(),
        'cores': os.cpu_count(),
        'start_up_ms': start_up(20 * args.repeats),
        'create_metric_s': create_metric(args.repeats),
        'memory_12_megapixel_mb': memory(args.repeats),
        'training_step_ms_an_image': training_step(max(1, args.repeats // 2)),
    }
    text = json.dumps(figures, indent=2)
    print(text)
    if args.output:
        args.output.write_text(text + '\n')


if __name__ == '__main__':
    main()
