"""What is wrong in a report, and what helps."""

from __future__ import annotations

import os
from collections.abc import Iterator

from pyiqa_clipkd.doctor.sections import (
    ABSENT,
    NO_GRAPH,
    PACKAGE,
    STARTUP_FILE,
    Report,
)
from pyiqa_clipkd.names import DEFAULT_METRIC, WEIGHTS_VARIABLE

# Points by which torch and onnxruntime may differ.
TOLERANCE = 0.005

REINSTALL = f'pip install --force-reinstall --no-deps {PACKAGE}'


def problems(report: Report) -> Iterator[tuple[str, str]]:
    """Each problem with its remedy."""
    for name, section in report.items():
        if 'error' in section:
            yield f'{name}: {section["error"]}', 'Reinstall what this names.'
    yield from _hook_problems(report['hook'])
    yield from _weights_problems(report['weights'])
    yield from _self_test_problems(report['self-test'])


def _hook_problems(hook: Report) -> Iterator[tuple[str, str]]:
    fresh = hook.get('a fresh pyiqa', {'error': ABSENT})
    if fresh.get('error') == ABSENT:
        return
    if 'error' in fresh:
        yield (
            f'pyiqa fails when it is imported: {fresh["error"]}',
            'It fails without this package, too: `python -c "import pyiqa"`. '
            'Reinstall what its last line names.',
        )
    elif hook['turned off']:
        return
    elif 'warning' in fresh:
        yield fresh['warning'], 'Do what this line says.'
    elif not hook['start-up file in']:
        yield (
            f'{STARTUP_FILE} is in no site-packages: pyiqa alone lacks our metrics.',
            f'{REINSTALL} (or write `import pyiqa_clipkd` where you use pyiqa).',
        )
    elif DEFAULT_METRIC not in fresh['names']:
        yield f'A fresh pyiqa does not know {DEFAULT_METRIC}.', REINSTALL


def _weights_problems(weights: Report) -> Iterator[tuple[str, str]]:
    if 'error' in weights:
        return
    if not weights['is there'] and WEIGHTS_VARIABLE in os.environ:
        yield (
            f'{WEIGHTS_VARIABLE} names a folder that is not there: '
            f'{weights["your folder"]}.',
            'Correct the variable, or publish into it (scripts/publish.py makes it).',
        )
    for name, model in weights['metrics'].items():
        if model['damage']:
            mine = 'Copy or publish it again, or remove it.'
            remedy = REINSTALL if model['from'] == 'package' else mine
            yield f'{model["file"]}: {model["damage"]}', remedy
        elif name == DEFAULT_METRIC and model['file'] is None:
            yield f'The package has lost its weights: {name}.', REINSTALL


def _self_test_problems(test: Report) -> Iterator[tuple[str, str]]:
    if 'error' in test:
        return
    remedies = {
        'torch': 'pip install --force-reinstall torch torchvision (both at once)',
        'onnxruntime': 'pip install --force-reinstall onnxruntime',
    }
    for name, remedy in remedies.items():
        failed = not isinstance(test[name], float)
        if failed and test[name] not in (ABSENT, NO_GRAPH):
            yield f'{name} is installed, but does not score: {test[name]}', remedy
    if not test['working']:
        yield 'Nothing here can score.', f'pip install {PACKAGE}'
    if test.get('difference', 0) > TOLERANCE:
        yield (
            f'torch and onnxruntime differ by {test["difference"]:.4f} points.',
            f'The graph belongs to other weights: {REINSTALL}, or export it again.',
        )
