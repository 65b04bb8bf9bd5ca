"""Do the tests pass with the oldest versions that setup.cfg allows, and the newest?

    python scripts/host_versions.py oldest --folder /tmp/oldest
    python scripts/host_versions.py newest --folder /tmp/newest

Makes a virtual environment in `--folder` (some 7 GB), installs every package of
`install_requires` at its lower bound, or the newest of each, and all else that tests
need at its newest, and runs the fast tests that the host's versions matter to. An
environment that is there already is used as it is. Versions, and how many tests passed
and failed, go to configs/results/host_versions.json; the exit code is 1 if any failed.
"""

from __future__ import annotations

import argparse
import configparser
import json
import os
import platform
import re
import subprocess
import sys
import venv
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from pyiqa_clipkd.experiment import recorded_command, recorded_commit

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = Path('configs', 'results', 'host_versions.json')

# What touches pyiqa, timm, open_clip, torch, onnxruntime or the readers of weights.
TESTS = (
    'metric', 'hook', 'bundled', 'encoders', 'network', 'clip_parity', 'preprocessing',
    'weights', 'torchscript', 'hostile_weights', 'engine', 'runtime', 'export',
    'scoring_backends', 'tables',
)  # fmt: skip


def requirements() -> tuple[list[str], list[str]]:
    """What is required, and what tests need beside it."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / 'setup.cfg')
    needed = setup['options']['install_requires'].split('\n')
    for_tests = setup['options.extras_require']['test'].split('\n')
    return [line for line in needed if line], [line for line in for_tests if line]


def make_environment(folder: Path, which: str) -> None:
    """Install the versions, and this checkout without its dependencies."""
    needed, for_tests = requirements()
    if which == 'oldest':
        needed = [re.sub(r'\s*>=\s*', '==', line) for line in needed]
    venv.create(folder, with_pip=True)
    pip = [str(python_of(folder)), '-m', 'pip', 'install', '--quiet']
    subprocess.run([*pip, *needed, *for_tests], check=True)
    subprocess.run([*pip, '--no-deps', '-e', str(ROOT)], check=True)


def python_of(folder: Path) -> Path:
    windows = folder / 'Scripts' / 'python.exe'
    return windows if windows.is_file() else folder / 'bin' / 'python'


def versions(folder: Path) -> dict[str, str]:
    """Of what setup.cfg names."""
    names = [re.split(r'[\s>=<~!]', line)[0] for line in requirements()[0]]
    code = (
        'import json, sys, importlib.metadata as m; '
        'print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))'
    )
    told = subprocess.run(
        [str(python_of(folder)), '-c', code, *names],
        capture_output=True,
        text=True,
        check=True,
    )
    return {'python': platform.python_version(), **json.loads(told.stdout)}


def run_tests(folder: Path) -> dict[str, Any]:
    """The fast tests; how many passed, failed or were skipped, and which failed."""
    report = folder / 'report.xml'
    files = [f'tests/test_{name}.py' for name in TESTS]
    options = ['-q', '-m', 'not slow', '-p', 'no:cacheprovider', f'--junitxml={report}']
    subprocess.run(
        [str(python_of(folder)), '-m', 'pytest', *options, *files],
        cwd=ROOT,
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
        check=False,
    )
    cases = list(ElementTree.parse(report).iter('testcase'))
    bad = [
        c for c in cases if c.find('failure') is not None or c.find('error') is not None
    ]
    skipped = [c for c in cases if c.find('skipped') is not None]
    return {
        'passed': len(cases) - len(bad) - len(skipped),
        'failed': len(bad),
        'skipped': len(skipped),
        'which failed': sorted(f'{c.get("classname")}::{c.get("name")}' for c in bad),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('which', choices=('oldest', 'newest'))
    parser.add_argument('--folder', type=Path, required=True, help='of the environment')
    parser.add_argument('-o', '--output', type=Path, default=ROOT / OUTPUT)
    args = parser.parse_args()
    if not python_of(args.folder).is_file():
        make_environment(args.folder, args.which)
    found: dict[str, Any] = {'versions': versions(args.folder)}
    found |= run_tests(args.folder)
    shown = [sys.argv[0], args.which, '--folder', args.folder.name]
    found['command'] = recorded_command(shown, ROOT)
    found['commit'] = recorded_commit(ROOT)
    known = json.loads(args.output.read_text()) if args.output.is_file() else {}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(known | {args.which: found}, indent=2) + '\n')
    print(json.dumps(found, indent=2))
    sys.exit(1 if found['failed'] else 0)


if __name__ == '__main__':
    main()
