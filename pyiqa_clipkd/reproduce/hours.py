"""How long a run will take: from finished runs, or from a few timed steps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from typing import Any

from pyiqa_clipkd.options import without_weights
from pyiqa_clipkd.reproduce.plan import Run
from pyiqa_clipkd.reproduce.results import Row

STEPS = 4  # the first one warms up
SECONDS = 10.0  # no further steps after these
IMAGES_ON_A_CPU = 4  # a step there takes as long as its images do


class Hours:
    """Expected hours of runs.

    Args:
        rows: raw results, from whose seconds the pace is taken.
    """

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = [row for row in rows if row['seconds'] and int(row['iterations'])]
        self.timed: dict[str, float] = {}

    def of(self, run: Run, steps: int) -> float:
        """Expected hours for iterations of a run in one process."""
        return self._pace(run) * steps / 3600 if steps else 0.0

    def _pace(self, run: Run) -> float:
        """Seconds an iteration."""
        known = [
            float(row['seconds']) / int(row['iterations'])
            for row in self.rows
            if (row['data'], row['student']) == (run.data, run.student)
        ]
        if known:
            return statistics.median(known)
        data = run.options['datasets']['train']
        size = run.options['network'].get('input_size', 224)
        what = f'{run.student} ({data["batch_size_per_gpu"]} images of {size} px)'
        if what not in self.timed:
            self.timed[what] = seconds_a_step(run.options)
        return self.timed[what]


def seconds_a_step(options: dict[str, Any]) -> float:
    """Time training steps of a recipe's network on this machine, on random images."""
    import torch

    from pyiqa_clipkd.network import build_from_config

    data = options['datasets']['train']
    gpu = torch.cuda.is_available() and options['num_gpu'] != 0
    device = 'cuda' if gpu else 'cpu'
    batch = data['batch_size_per_gpu'] if gpu else IMAGES_ON_A_CPU
    model = build_from_config(without_weights(options['network'])).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9)
    size = options['network'].get('input_size', 224)
    images = torch.rand(batch, 3, size, size, device=device)
    if options['train'].get('channels_last'):
        model.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    times: list[float] = []
    while len(times) < STEPS and sum(times) < SECONDS:
        start = time.perf_counter()
        optimizer.zero_grad()
        model(images).mean().backward()
        optimizer.step()
        if gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:] or times) * data['batch_size_per_gpu'] / batch
