"""The metrics' names: pure data and the standard library, for the start-up hook."""

from __future__ import annotations

import os
import sys
from typing import Any

WEIGHTS_VARIABLE = 'PYIQA_CLIPKD_WEIGHTS'
PREFIX = 'clipkd_'
SUFFIX = '.safetensors'

# Of the attribute heads beside a weight file, which are no metric of their own.
ATTRIBUTES_SUFFIX = '.attributes'

# The scale of all scores, and what people call its levels.
LOWEST, HIGHEST = 1.0, 5.0
LEVELS = ('bad', 'poor', 'fair', 'good', 'perfect')

# Metric -> what it is. All of them score in [1, 5], higher is better.
METRICS = {
    'clipkd_zeroshot': 'CLIP ViT-B/32, prompts only (stage 1)',
    'clipkd_teacher': 'fine-tuned teacher (stage 2)',
    'clipkd_swin': 'student: Swin-T (stage 3)',
    'clipkd_resnet18': 'student: ResNet-18 (stage 3)',
    'clipkd_mobilevit': 'student: MobileViT-S (stage 3)',
    'clipkd_efficientnet': 'student: EfficientNet-B0 (stage 3)',
    'clipkd_efficientnet_lite': 'student: EfficientNet-Lite0 (stage 3)',
}

# Where none is named.
DEFAULT_METRIC = 'clipkd_efficientnet_lite'

# Metrics that are a released network as it is: how to build it without a file of ours.
RELEASED: dict[str, dict[str, Any]] = {
    'clipkd_zeroshot': {'type': 'CLIPLikert', 'pretrained': 'openai'},
}


def weights_folder() -> str:
    """The user's folder of weight files (it need not exist).

    `PYIQA_CLIPKD_WEIGHTS`, or the platform's folder for application data.
    """
    if folder := os.environ.get(WEIGHTS_VARIABLE):
        return os.path.expanduser(folder)
    if sys.platform == 'win32':
        base = os.environ.get('LOCALAPPDATA', os.path.expanduser('~/AppData/Local'))
    elif sys.platform == 'darwin':
        base = os.path.expanduser('~/Library/Application Support')
    else:
        base = os.environ.get('XDG_DATA_HOME') or os.path.expanduser('~/.local/share')
    return os.path.join(base, 'pyiqa-clipkd', 'weights')


def user_names() -> list[str]:
    """Names of the weight files in the user's folder, sorted."""
    try:
        files = os.listdir(weights_folder())
    except OSError:
        return []
    return sorted(
        file[: -len(SUFFIX)]
        for file in files
        if file.startswith(PREFIX)
        and file.endswith(SUFFIX)
        and not file.endswith(ATTRIBUTES_SUFFIX + SUFFIX)
    )


def metric_configs() -> dict[str, dict[str, Any]]:
    """Every metric's entry for the host's table, the user's own metrics included."""
    return {
        name: {
            'metric_opts': {'type': 'CLIPKDMetric', 'name': name},
            'metric_mode': 'NR',
            'lower_better': False,
            'score_range': '1, 5',
        }
        for name in [*METRICS, *user_names()]
    }
