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
from collections.abc import Callable
from pathlib import Path
from typing import Any

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

DISTILLATION = """
import json, math, statistics, sys, time
from itertools import cycle, islice
import torch
from torch.utils.data import DataLoader
from pyiqa.data import build_dataset
from pyiqa.models import build_model
from pyiqa_clipkd.options import load_options
from pyiqa_clipkd.pipeline import keep_freed_memory
from pyiqa_clipkd.views import EpochSampler, SeededDataset
keep_freed_memory()
BATCH, ROUNDS, LOADED = 16, 9, 4
TEACHER = dict(type='CLIPLikert', encoder='timm:efficientnet_lite2', pretrained=None)
MODES = {
    'supervised': dict(teacher=None),
    'cached': dict(teacher=TEACHER | {'cache': 'cache'}),
    'uncached': dict(teacher=TEACHER),
}

def built(mode):
    file = sys.argv[1] + '/configs/smoke/stage3_student.yml'
    options = load_options(file, ['network:encoder=efficientnet_lite',
        f'data:batch_size_per_gpu={BATCH}', 'network:encoder_weights=~']) | MODES[mode]
    options['train']['channels_last'] = True
    options['train']['total_iter'] = 1000
    # All of it soft: the teacher is asked in every step.
    options['train']['distillation_loss_opt'] = (
        dict(type='CosineSoftHardLoss', schedule='fixed', soft_weight=0.5))
    options['train']['mos_loss_opt'] = dict(type='MSELoss')
    options |= dict(is_train=True, dist=False, rank=0, world_size=1)
    for phase, data in options['datasets'].items():
        data['phase'] = phase
    return build_model(options)

models = {mode: built(mode) for mode in MODES}
data = next(iter(models.values())).opt['datasets']['train']

def batches(keys, workers):
    views = SeededDataset(build_dataset(data), 1, keys=keys)
    order = [(0, i, i % len(views)) for i in range(BATCH * LOADED)]
    return DataLoader(views, batch_size=BATCH, sampler=order, num_workers=workers)

def step(mode, batch, iteration):
    models[mode].feed_data(batch)
    models[mode].optimize_parameters(iteration)

kept = list(islice(batches(True, 0), 2))
times = {mode: [] for mode in MODES}
for turn in range(ROUNDS + 2):
    for mode in MODES:
        start = time.perf_counter()
        step(mode, kept[turn % 2], turn + 1)
        if turn > 1:
            times[mode].append((time.perf_counter() - start) * 1000 / BATCH)
result = {mode: statistics.median(values) for mode, values in times.items()}
result |= {
    f'{mode}_ratio': statistics.median(
        a / b for a, b in zip(times[mode], times['supervised']))
    for mode in ('cached', 'uncached')
}
loaded = {mode: [] for mode in MODES}
for turn in range(3):
    for mode in MODES:
        start = time.perf_counter()
        for batch in batches(mode == 'cached', 1):
            step(mode, batch, 500)
        loaded[mode].append((time.perf_counter() - start) * 1000 / BATCH / LOADED)
result['with_loader'] = {m: statistics.median(v) for m, v in loaded.items()}
result['with_loader'] |= {
    f'{mode}_ratio': statistics.median(
        a / b for a, b in zip(loaded[mode], loaded['supervised']))
    for mode in ('cached', 'uncached')
}
print(json.dumps(result))
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


def distillation_step() -> dict[str, Any]:
    """Milliseconds an image of 224 px of whole training steps, in one process, in turn.

    EfficientNet-Lite0 alone, distilled with the teacher's cache, and distilled from an
    EfficientNet-Lite2 that is asked each time. `with_loader` counts reading and the
    digests of the images, too.
    """
    root = Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory() as folder:
        data = [str(root / 'scripts' / 'make_smoke_data.py'), '--no-clip']
        subprocess.run([sys.executable, *data], cwd=folder, check=True)
        result = subprocess.run(
            [sys.executable, '-c', DISTILLATION, str(root)],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        )
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('-o', '--output', type=Path, help='JSON file for the figures')
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--only', nargs='+', help='names of figures; default: all')
    args = parser.parse_args()
    repeats: int = args.repeats
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        'start_up_ms': lambda: start_up(20 * repeats),
        'create_metric_s': lambda: create_metric(repeats),
        'memory_12_megapixel_mb': lambda: memory(repeats),
        'training_step_ms_an_image': lambda: training_step(max(1, repeats // 2)),
        'distillation_step_ms_an_image': distillation_step,
    }
    figures = {
        'command': ' '.join(['python', *sys.argv]),
        'python': platform.python_version(),
        'cores': os.cpu_count(),
    } | {name: parts[name]() for name in args.only or parts}
    text = json.dumps(figures, indent=2)
    print(text)
    if args.output:
        args.output.write_text(text + '\n')


if __name__ == '__main__':
    main()
