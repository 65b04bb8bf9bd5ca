"""What a fresh Python finds: whatever is broken there can't stop who asks."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyiqa_clipkd.names import DEFAULT_METRIC

if TYPE_CHECKING:
    import numpy as np

# Seconds: importing pyiqa takes ten on a busy machine, and longer from a cold disk.
TIME_LIMIT = 180

# What each process runs; `answer` is what it found. The first must not import our
# package: that would register the names which it looks for.
PROBES = {
    'pyiqa': """
        from pyiqa.default_model_configs import DEFAULT_CONFIGS
        answer = {'names': [n for n in DEFAULT_CONFIGS if n.startswith('clipkd_')]}
    """,
    'torch': """
        from pyiqa_clipkd.doctor.processes import of_torch
        answer = of_torch()
    """,
    'onnxruntime': """
        from pyiqa_clipkd.doctor.processes import of_onnxruntime
        answer = of_onnxruntime()
    """,
}

# What the hook says where it could not do its work.
HOOK_WARNING = 'pyiqa has no clipkd metrics. '


def probe(name: str, seconds: float = TIME_LIMIT) -> dict[str, Any]:
    """Run one of `PROBES` in a process of its own.

    Returns:
        What it found; `error` is a line on what went wrong, `warning` one of the hook.
    """
    try:
        process = subprocess.run(
            [sys.executable, '-c', _code(name)],
            cwd=sys.prefix,  # which is on the path of `-c`: not the user's folder
            capture_output=True,
            encoding='utf-8',
            errors='replace',
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {'error': f'no answer within {seconds:g} seconds'}
    except OSError as error:
        return {'error': f'no process could be started: {error}'}
    answer = _answer(process)
    for line in process.stderr.splitlines():
        if HOOK_WARNING in line:
            answer['warning'] = HOOK_WARNING + line.partition(HOOK_WARNING)[2]
    return answer


def _code(name: str) -> str:
    lines = ['import json', textwrap.dedent(PROBES[name]), 'print()']
    if name != 'pyiqa':
        # A checkout that isn't installed: the same code as the one that asks.
        root = str(Path(__file__).parents[2])
        lines.insert(0, f'import sys; root = {root!r}')
        lines.insert(1, 'if root not in sys.path: sys.path.insert(0, root)')
    return '\n'.join([*lines, 'print(json.dumps(answer))'])


def _answer(process: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    if process.returncode < 0:
        return {'error': f'the process was ended by signal {-process.returncode}'}
    try:
        return dict(json.loads(process.stdout.splitlines()[-1]))
    except (IndexError, ValueError):
        lines = process.stderr.split('\n')
        said = [line.strip() for line in lines if line.strip()]
        return {'error': said[-1] if said else f'exit code {process.returncode}'}


def picture() -> np.ndarray:
    """uint8 (480, 640, 3): a sky with a sun, stripes below; the same everywhere."""
    import numpy as np

    y, x = np.mgrid[0:480, 0:640]
    sun = 200 * np.exp(-((x - 420) ** 2 + (y - 130) ** 2) / 5000)
    stripes = np.where(y > 300, 60 * ((x // (4 + (y - 300) // 12)) % 2), 0)
    channels = [60 + y / 4 + sun, 90 + y / 6 + sun / 2 + stripes, 190 - y / 3 + stripes]
    return np.stack(channels, axis=-1).clip(0, 255).astype(np.uint8)


def of_torch() -> dict[str, Any]:
    """Devices that torch can compute on, and the score of the picture."""
    import torch

    answer: dict[str, Any] = {'cuda': torch.version.cuda or 'no'}
    answer['devices'] = {'cpu': f'{torch.get_num_threads()} threads'}
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            name = torch.cuda.get_device_name(number)
            answer['devices'][f'cuda:{number}'] = f'{name}{_failure(f"cuda:{number}")}'
    if torch.backends.mps.is_available():
        answer['devices']['mps'] = f'Apple{_failure("mps")}'
    try:
        answer['score'] = _torch_score()
    except Exception as error:
        answer['error'] = _last_line(error)
    return answer


def _failure(device: str) -> str:
    """A driver that doesn't fit is found by the first computation only."""
    import torch

    try:
        (torch.ones(2, device=device) + 1).sum().item()
    except Exception as error:
        return f', but it fails: {_last_line(error)}'
    return ''


def _torch_score() -> float:
    import torch

    from pyiqa_clipkd.metric import CLIPKDMetric

    pixels = torch.from_numpy(picture()).permute(2, 0, 1)[None] / 255
    with torch.inference_mode():
        return float(CLIPKDMetric(DEFAULT_METRIC)(pixels))


def of_onnxruntime() -> dict[str, Any]:
    """Providers of onnxruntime, and the score of the picture without torch."""
    import onnxruntime  # type: ignore[import-not-found,import-untyped,unused-ignore]

    answer: dict[str, Any] = {'providers': onnxruntime.get_available_providers()}
    try:
        from PIL import Image

        from pyiqa_clipkd.runtime import Runtime

        score = Runtime(DEFAULT_METRIC).score(Image.fromarray(picture()))
        answer['score'] = float(score.score)
    except Exception as error:
        answer['error'] = _last_line(error)
    return answer


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f'{type(error).__name__}: {lines[-1]}' if lines else type(error).__name__
