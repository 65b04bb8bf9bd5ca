"""The parts of the report: each a function that says what is there."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import site
import sys
from pathlib import Path
from typing import Any

from pyiqa_clipkd import __version__
from pyiqa_clipkd.cores import usable_cores
from pyiqa_clipkd.description import ONNX
from pyiqa_clipkd.locations import BUNDLED_FOLDER
from pyiqa_clipkd.models import describe, models
from pyiqa_clipkd.names import (
    DEFAULT_METRIC,
    PREFIX,
    SUFFIX,
    WEIGHTS_VARIABLE,
    weights_folder,
)

PACKAGE = 'pyiqa-clipkd'
DISTRIBUTIONS = (
    PACKAGE,
    'pyiqa',
    'torch',
    'torchvision',
    'timm',
    'open_clip_torch',
    'onnxruntime',
    'numpy',
    'Pillow',
    'pandas',
    'scipy',
    'pyarrow',
    'PyWavelets',
    'safetensors',
    'setuptools',
)
# What a missing one takes away, where scores go on without it.
NEEDED_FOR = {
    'pandas': 'report, compare',
    'scipy': 'compare, label',
    'pyarrow': 'Parquet files',
    'PyWavelets': 'label',
}
ABSENT, NO_GRAPH = 'not installed', 'no graph beside the weights'

STARTUP_FILE = 'pyiqa_clipkd.pth'
AUTOLOAD = 'PYIQA_CLIPKD_AUTOLOAD'

# No more than these: other variables may hold secrets.
VARIABLES = (
    AUTOLOAD,
    WEIGHTS_VARIABLE,
    'CUDA_VISIBLE_DEVICES',
    'HF_HUB_OFFLINE',
    'MKL_NUM_THREADS',
    'OMP_NUM_THREADS',
    'PYTHONPATH',
)

Report = dict[str, Any]


def versions() -> Report:
    """Of Python and of what is installed, without importing it."""
    found = {'python': platform.python_version(), 'platform': platform.platform()}
    for name in DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name) or 'unknown'
        except importlib.metadata.PackageNotFoundError:
            needed = NEEDED_FOR.get(name)
            found[name] = f'{ABSENT}; needed for {needed}' if needed else ABSENT
        except Exception as error:  # a record that an aborted pip left behind
            found[name] = f'damaged record ({type(error).__name__})'
    return found


def package() -> Report:
    """Which copy of this package is running."""
    # A checkout has a second record of its own, without that file.
    records = [
        json.loads(found.read_text('direct_url.json') or '{}')
        for found in importlib.metadata.distributions(name=PACKAGE)
    ]
    editable = any(one.get('dir_info', {}).get('editable') for one in records)
    return {
        'version': __version__,
        'install': 'editable' if editable else 'normal' if records else ABSENT,
        'folder': str(BUNDLED_FOLDER.parent),
        'python': sys.executable,
    }


def hook(found: Report | None) -> Report:
    """Whether `pyiqa` alone knows our names; `found` is what a fresh one knew."""
    folders = dict.fromkeys([*site.getsitepackages(), site.getusersitepackages()])
    there = [folder for folder in folders if Path(folder, STARTUP_FILE).is_file()]
    return {
        'start-up file in': there,
        'turned off': os.environ.get(AUTOLOAD) == '0',
        'a fresh pyiqa': {'error': ABSENT} if found is None else found,
    }


def weights() -> Report:
    """Which file belongs to each metric, and what else lies in the user's folder."""
    folder = Path(weights_folder())
    files = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
    return {
        'your folder': str(folder),
        'is there': folder.is_dir(),
        'not metrics in it': [
            name
            for name in files
            if not (name.startswith(PREFIX) and name.endswith(SUFFIX))
            and Path(name).suffix not in ('.md', ONNX)
        ],
        'metrics': {
            model.name: {
                'from': model.source,
                'file': model.file and model.file.name,
                'MB': model.megabytes and round(model.megabytes, 2),
                'sha256': model.sha256,
                'onnx': model.onnx is not None,
                'damage': model.damage,
            }
            for model in models()
        },
    }


def devices(found: Report) -> Report:
    """Processors, memory, and what torch and onnxruntime can compute on."""
    there = {
        'CPUs': f'{usable_cores()} usable of {os.cpu_count()}, {platform.machine()}',
        'memory': _memory(),
    }
    if torch := found.get('torch'):
        there['built for CUDA'] = torch.get('cuda', 'unknown')
        there |= {f'torch {k}': v for k, v in torch.get('devices', {}).items()}
    if onnxruntime := found.get('onnxruntime'):
        there['onnxruntime'] = ', '.join(onnxruntime.get('providers', []))
    return there


def _memory() -> str:
    """Linux tells what is free; a container may get less than the machine has."""
    try:
        text = Path('/proc/meminfo').read_text()
        kilobytes = dict(re.findall(r'^(\w+): +(\d+)', text, re.MULTILINE))
        total, free = (
            int(kilobytes[key]) / 1e6 for key in ('MemTotal', 'MemAvailable')
        )
    except (OSError, KeyError):
        return 'unknown'
    limit = Path('/sys/fs/cgroup/memory.max')
    allowed = limit.read_text().strip() if limit.is_file() else ''
    suffix = f', {int(allowed) / 1e9:.1f} GB allowed' if allowed.isdigit() else ''
    return f'{free:.1f} GB available of {total:.1f} GB{suffix}'


def image_formats() -> Report:
    """What this Pillow can read, beside the formats that each can."""
    from PIL import Image, features

    Image.init()
    return {
        'JPEG by libjpeg-turbo': bool(features.check('libjpeg_turbo')),
        'JPEG 2000': bool(features.check('jpg_2000')),
        'WebP': bool(features.check('webp')),
        'AVIF': bool(features.check('avif')),
        'HEIF': 'HEIF' in Image.OPEN,  # by a plugin that somebody registered
    }


def environment() -> Report:
    """The variables that are set and matter here."""
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}


def self_test(found: Report) -> Report:
    """The score of one generated picture by every backend there is."""
    has_graph = describe(DEFAULT_METRIC).onnx is not None
    result: Report = {'metric': DEFAULT_METRIC}
    for name in ('torch', 'onnxruntime'):
        if name not in found:
            result[name] = ABSENT
        elif name == 'onnxruntime' and not has_graph and 'providers' in found[name]:
            result[name] = NO_GRAPH
        else:
            result[name] = found[name].get('score', found[name].get('error'))
    scores = [value for value in result.values() if isinstance(value, float)]
    result['working'] = len(scores)
    if len(scores) > 1:
        result['difference'] = max(scores) - min(scores)
    return result
