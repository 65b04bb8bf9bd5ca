"""The report for a bug report, in real processes with broken pieces."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pyiqa_clipkd._build import startup_files
from pyiqa_clipkd.doctor import sections
from pyiqa_clipkd.doctor.findings import problems
from pyiqa_clipkd.doctor.processes import probe
from pyiqa_clipkd.names import METRICS

TORCH_ERROR = 'OSError: libcudart.so.12: cannot open shared object file'

# Modules that stand before the installed ones.
BROKEN = {
    'torch.py': "raise OSError('libcudart.so.12: cannot open shared object file')",
    'pyiqa.py': 'def f(:',
    'onnxruntime.py': 'import os, signal; os.kill(os.getpid(), signal.SIGKILL)',
}

HEALTHY: dict[str, Any] = {
    'hook': {
        'start-up file in': ['/site-packages'],
        'turned off': False,
        'a fresh pyiqa': {'names': list(METRICS)},
    },
    'weights': {
        'your folder': '/weights',
        'is there': True,
        'not metrics in it': [],
        'metrics': {
            'clipkd_efficientnet_lite': {
                'from': 'package',
                'file': 'clipkd_efficientnet_lite.safetensors',
                'damage': None,
            }
        },
    },
    'self-test': {
        'torch': 3.0,
        'onnxruntime': 3.001,
        'working': 2,
        'difference': 0.001,
    },
}


def doctor(
    tmp_path: Path,
    *options: str,
    modules: dict[str, str] | None = None,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """The command in a new process, with the given modules in front of all others."""
    folder = tmp_path / 'modules'
    folder.mkdir()
    for name, text in (BROKEN if modules is None else modules).items():
        (folder / name).write_text(text)
    return subprocess.run(
        [sys.executable, '-m', 'pyiqa_clipkd', 'doctor', *options],
        env={
            **os.environ,
            'PYTHONPATH': str(folder),
            'PYIQA_CLIPKD_WEIGHTS': str(folder),
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_broken_pieces_are_reported_with_their_last_line_and_a_remedy(
    tmp_path: Path,
) -> None:
    result = doctor(tmp_path)
    assert result.returncode == 1
    assert result.stderr == ''
    assert 'Pillow: ' in result.stdout
    told = result.stdout.partition('PROBLEMS')[2].splitlines()[1:]
    found, remedies = told[::2], told[1::2]
    assert 'pyiqa fails when it is imported: SyntaxError: invalid syntax' in found[0]
    assert f'torch is installed, but does not score: {TORCH_ERROR}' in found[1]
    assert 'onnxruntime is installed' in found[2]
    assert 'ended by signal 9' in found[2]
    assert 'Nothing here can score' in found[3]
    assert len(found) == len(remedies) == 4
    assert all(line.startswith('    -> ') for line in remedies)


def test_json_holds_the_same_and_neither_secrets_nor_the_name_of_the_user(
    tmp_path: Path,
) -> None:
    weights = tmp_path / 'home' / 'weights'
    weights.mkdir(parents=True)
    (weights / 'clipkd_mine.safetensors').write_bytes(b'not what it seems')
    (weights / 'mine.safetensors').write_bytes(b'')
    result = doctor(
        tmp_path,
        '--json',
        HOME=str(tmp_path / 'home'),
        PYIQA_CLIPKD_WEIGHTS=str(weights),
        PYIQA_CLIPKD_AUTOLOAD='0',
        HF_TOKEN='hf_secret',
    )
    report = json.loads(result.stdout)
    assert report['weights']['your folder'] == '~/weights'
    assert report['weights']['not metrics in it'] == ['mine.safetensors']
    assert list(report['weights']['metrics']) == [*METRICS, 'clipkd_mine']
    assert report['environment']['PYIQA_CLIPKD_WEIGHTS'] == '~/weights'
    assert report['hook']['turned off'] is True
    assert any(
        'clipkd_mine.safetensors: no weight file' in found['problem']
        for found in report['problems']
    )
    assert 'hf_secret' not in result.stdout
    assert str(tmp_path / 'home') not in result.stdout


def test_a_process_that_does_not_answer_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / 'pyiqa.py').write_text('import time; time.sleep(60)')
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    found = probe('pyiqa', seconds=0.5)
    assert found == {'error': 'no answer within 0.5 seconds'}


def test_what_the_hook_warns_of_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host that is too old, and our start-up hook."""
    (tmp_path / 'pyiqa').mkdir()
    for name, text in {
        'pyiqa/__init__.py': '',
        'pyiqa/default_model_configs.py': 'DEFAULT_CONFIGS = {"psnr": {}}',
        'pyiqa/version.py': '__version__ = "0.1.15"',
        'sitecustomize.py': 'import _pyiqa_clipkd_hook as h; h.start()',
        **startup_files(),
    }.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    found = probe('pyiqa')
    assert found['names'] == []
    assert found['warning'].startswith('pyiqa has no clipkd metrics. pyiqa must be 0.1')


def test_a_section_that_fails_leaves_the_others(
    tmp_path: Path,
) -> None:
    modules = {**BROKEN, 'PIL.py': "raise ImportError('libjpeg.so.62 is missing')"}
    result = doctor(tmp_path, modules=modules)
    assert result.returncode == 1
    assert 'image formats: ImportError: libjpeg.so.62 is missing' in result.stdout
    assert 'self-test\n  metric: clipkd_efficientnet_lite' in result.stdout


@pytest.mark.parametrize(
    ('section', 'change', 'told'),
    [
        ('hook', {}, None),
        ('hook', {'a fresh pyiqa': {'error': 'not installed'}}, None),
        ('hook', {'turned off': True, 'a fresh pyiqa': {'names': []}}, None),
        ('hook', {'start-up file in': []}, 'is in no site-packages'),
        ('hook', {'a fresh pyiqa': {'names': []}}, 'does not know clipkd_'),
        (
            'hook',
            {'a fresh pyiqa': {'names': [], 'warning': 'pyiqa has no clipkd ...'}},
            'pyiqa has no clipkd ...',
        ),
        ('weights', {'is there': False}, 'a folder that is not there: /weights'),
        (
            'weights',
            {'metrics': {'clipkd_efficientnet_lite': {'damage': None, 'file': None}}},
            'The package has lost its weights',
        ),
        ('self-test', {'difference': 0.02}, 'differ by 0.0200 points'),
        ('self-test', {'torch': 'not installed', 'working': 1}, None),
        ('self-test', {'onnxruntime': sections.NO_GRAPH, 'working': 1}, None),
        ('self-test', {'onnxruntime': 'Fail: x'}, 'does not score: Fail: x'),
        (
            'self-test',
            {'torch': 'not installed', 'onnxruntime': 'not installed', 'working': 0},
            'Nothing here can score',
        ),
    ],
)
def test_findings(section: str, change: dict[str, Any], told: str | None) -> None:
    report = {**HEALTHY, section: {**HEALTHY[section], **change}}
    found = list(problems(report))
    assert [told in problem for problem, _ in found if told] == [True] * bool(told)
    assert len(found) == bool(told)


def test_the_start_up_file_is_looked_for_in_every_site_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ('one', 'two'):
        (tmp_path / name).mkdir()
    (tmp_path / 'two' / 'pyiqa_clipkd.pth').write_text('')
    monkeypatch.setattr(
        'site.getsitepackages', lambda: [str(tmp_path / 'one'), str(tmp_path / 'two')]
    )
    monkeypatch.setattr('site.getusersitepackages', lambda: str(tmp_path / 'three'))
    assert sections.hook(None)['start-up file in'] == [str(tmp_path / 'two')]


@pytest.mark.slow
def test_an_environment_that_works_has_no_problems(tmp_path: Path) -> None:
    result = doctor(tmp_path, '--json', modules={})
    report = json.loads(result.stdout)
    assert report['problems'] == [], report
    assert result.returncode == 0
    assert set(METRICS) <= set(report['hook']['a fresh pyiqa']['names'])
    assert report['devices']['torch cpu']
    assert 1 <= report['self-test']['torch'] <= 5
    if report['versions']['onnxruntime'] != 'not installed':
        assert report['self-test']['difference'] < 0.005


def test_a_missing_library_says_what_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == 'scipy':
            raise importlib.metadata.PackageNotFoundError
        return '1'

    monkeypatch.setattr(importlib.metadata, 'version', version)
    found = sections.versions()
    assert found['scipy'] == 'not installed; needed for compare, label'
    assert found['pandas'] == '1'
