"""What to paste into a bug report: versions, hook, weights, devices, a self-test."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any

from pyiqa_clipkd.doctor import sections
from pyiqa_clipkd.doctor.findings import problems
from pyiqa_clipkd.doctor.processes import PROBES, probe
from pyiqa_clipkd.doctor.sections import Report


def examine() -> Report:
    """Everything there is to know, as plain values; what is broken is told, too."""
    report: Report = {'versions': sections.versions()}
    installed = [name for name in PROBES if find_spec(name)]
    with ThreadPoolExecutor(len(PROBES)) as pool:
        found = dict(zip(installed, pool.map(probe, installed), strict=True))
    parts: dict[str, Callable[[], Report]] = {
        'package': sections.package,
        'hook': lambda: sections.hook(found.get('pyiqa')),
        'weights': sections.weights,
        'devices': lambda: sections.devices(found),
        'image formats': sections.image_formats,
        'environment': sections.environment,
        'self-test': lambda: sections.self_test(found),
    }
    for name, part in parts.items():
        try:
            report[name] = part()
        except Exception as error:  # the next section may say why
            report[name] = {'error': f'{type(error).__name__}: {error}'}
    report['problems'] = [
        {'problem': problem, 'remedy': remedy} for problem, remedy in problems(report)
    ]
    return _without_home(report)


def _without_home(value: Any) -> Any:
    """The same with ~ for the user's home: nobody needs to know their name."""
    if isinstance(value, dict):
        return {key: _without_home(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_home(inner) for inner in value]
    home = os.path.expanduser('~')
    if isinstance(value, str) and len(home) > 1:
        return re.sub(rf'(?<![\w.-]){re.escape(home)}(?![\w.-])', '~', value)
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument('--json', action='store_true', help='for programs')


def run(arguments: argparse.Namespace) -> int:
    """Print the report; the exit code is 1 if there are problems."""
    report = examine()
    print(json.dumps(report, indent=2) if arguments.json else _text(report))
    return 1 if report['problems'] else 0


def _text(report: Report) -> str:
    lines: list[str] = []
    for name, section in report.items():
        if name != 'problems':
            lines += [name, *(_lines(section) or ['  none']), '']
    if not report['problems']:
        return '\n'.join([*lines, 'No problems found.'])
    lines.append('PROBLEMS')
    for found in report['problems']:
        lines += [f'  {found["problem"]}', f'    -> {found["remedy"]}']
    return '\n'.join(lines)


def _lines(section: Report, indent: str = '  ') -> list[str]:
    lines = []
    for key, value in section.items():
        if isinstance(value, dict) and any(isinstance(v, dict) for v in value.values()):
            lines += [f'{indent}{key}:', *_lines(value, indent + '  ')]
        else:
            lines.append(f'{indent}{key}: {_words(value)}')
    return lines


def _words(value: Any) -> str:
    """A value for people."""
    if isinstance(value, dict):
        known = {key: inner for key, inner in value.items() if inner is not None}
        return ', '.join(f'{key}: {_words(inner)}' for key, inner in known.items())
    if isinstance(value, list):
        return ', '.join(map(_words, value)) or 'none'
    if isinstance(value, bool):
        return 'yes' if value else 'no'
    return f'{value:.5g}' if isinstance(value, float) else str(value)
