"""The command `pyiqa-clipkd` itself, in real processes."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pyiqa_clipkd import __version__
from pyiqa_clipkd.command import SUBCOMMANDS, main

MODULE = [sys.executable, '-m', 'pyiqa_clipkd']

# A subcommand `probe` whose `run` is given.
FAKE = """
import sys, types
from pyiqa_clipkd import command
module = types.ModuleType('pyiqa_clipkd.fake', 'What it does.')
module.add_arguments = lambda parser: parser.add_argument('--many', type=int)
def run(arguments):
    {body}
module.run = run
sys.modules['pyiqa_clipkd.fake'] = module
command.SUBCOMMANDS['fake'] = ('fake', 'for a test')
sys.exit(command.main())
"""


def run(
    *arguments: str, command: list[str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*(command or MODULE), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def fake(body: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    code = FAKE.format(body=body)
    return run('fake', *arguments, command=[sys.executable, '-c', code])


def installed() -> list[str]:
    script = shutil.which('pyiqa-clipkd', path=str(Path(sys.executable).parent))
    if script is None:
        pytest.skip('the package is not installed beside this Python')
    return [script]


def test_the_installed_command_and_the_module_are_the_same() -> None:
    for command in (MODULE, installed()):
        for option in ('--version', '--help'):
            result = run(option, command=command)
            assert result.returncode == 0
            assert result.stderr == ''
            assert result.stdout == run(option).stdout
        assert (
            run('--version', command=command).stdout == f'pyiqa-clipkd {__version__}\n'
        )


def test_help_lists_every_subcommand_with_what_it_does() -> None:
    words = ' '.join(run('--help').stdout.split())
    for name, (_, text) in SUBCOMMANDS.items():
        assert f'{name} {text}' in words


def test_without_arguments_it_prints_its_help_and_fails() -> None:
    result = run()
    assert result.returncode == 2
    assert result.stdout == run('--help').stdout


@pytest.mark.parametrize('words', [['scroe'], ['--fast'], ['models', '--fast']])
def test_what_it_does_not_know_is_an_error(words: list[str]) -> None:
    result = run(*words)
    assert result.returncode == 2
    assert words[-1] in result.stderr.splitlines()[-1]
    assert 'Traceback' not in result.stderr


@pytest.mark.parametrize('name', ['models', 'doctor'])
def test_help_of_a_subcommand_begins_with_what_it_is_for(name: str) -> None:
    result = run(name, '--help')
    assert result.returncode == 0
    assert f'usage: pyiqa-clipkd {name}' in result.stdout
    assert '--json' in result.stdout


@pytest.mark.parametrize('words', [['--help'], ['models'], ['doctor', '--help']])
def test_it_starts_without_torch_pyiqa_and_numpy(words: list[str]) -> None:
    code = (
        'import sys, pyiqa_clipkd.command as c\n'
        f'try: c.main({words})\n'
        'except SystemExit: pass\n'
        'heavy = {"torch", "pyiqa", "numpy", "PIL", "pandas", "onnxruntime"}\n'
        'print(heavy & set(sys.modules), file=sys.stderr)'
    )
    assert run('-c', code, command=[sys.executable]).stderr.strip() == 'set()'


@pytest.mark.parametrize('code', [0, 1, 3])
def test_the_exit_code_is_that_of_the_subcommand(code: int) -> None:
    assert fake(f'return {code}').returncode == code


@pytest.mark.parametrize(
    ('body', 'told'),
    [
        ("raise ValueError('`crops` must be 0.')", '`crops` must be 0.'),
        ("open('/gone/file')", 'No such file or directory'),
        ('import module_that_is_missing', '`pip install module_that_is_missing`'),
        ("raise ModuleNotFoundError(name='PIL.Image')", '`pip install pillow`'),
        ('from os import gone', "cannot import name 'gone'"),
    ],
)
def test_a_mistake_of_the_user_is_one_line(body: str, told: str) -> None:
    result = fake(body)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith('pyiqa-clipkd fake: error: ')
    assert told in line


def test_a_mistake_of_ours_keeps_its_traceback() -> None:
    result = fake("raise TypeError('ours')")
    assert result.returncode == 70
    assert 'Traceback' in result.stderr


def test_a_subcommand_whose_module_is_missing_is_one_line() -> None:
    code = (
        'import sys; from pyiqa_clipkd import command; '
        "command.SUBCOMMANDS['gone'] = ('gone_module', ''); sys.exit(command.main())"
    )
    result = run('gone', '--help', command=[sys.executable, '-c', code])
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith('pyiqa-clipkd gone: error: ')
    assert 'gone_module' in line


@pytest.mark.skipif(not Path('/bin/sh').exists(), reason='needs a shell')
@pytest.mark.parametrize('closed', ['>&-', '2>&-', '>&- 2>&-'])
def test_closed_streams_are_no_error(closed: str) -> None:
    body = "print('out'); print('err', file=sys.stderr); return 3"
    line = f'"$0" -c "$1" fake {closed}'
    result = run(
        line, sys.executable, FAKE.format(body=body), command=['/bin/sh', '-c']
    )
    assert result.returncode == 3
    assert result.stdout == ('' if closed.startswith('>') else 'out\n')
    assert result.stderr == ('' if '2>' in closed else 'err\n')


def test_names_of_any_bytes_are_shown_somehow() -> None:
    result = fake("print('caf\\udce9.jpg'); return 0")
    assert result.returncode == 0
    assert result.stdout == 'caf\\udce9.jpg\n'


@pytest.mark.skipif(sys.platform == 'win32', reason='signals of Unix')
def test_ctrl_c_stops_it_without_a_traceback() -> None:
    code = FAKE.format(body="import time; print('ready', flush=True); time.sleep(60)")
    with subprocess.Popen(
        [sys.executable, '-c', code, 'fake'],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == 'ready\n'
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip() == 'Stopped.'
    assert time.monotonic() - start < 30


@pytest.mark.skipif(not Path('/bin/sh').exists(), reason='needs a shell')
def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    body = "print('line\\n' * 100_000); return 0"
    pipe = '"$0" -c "$1" fake | head -1'
    result = run(
        pipe, sys.executable, FAKE.format(body=body), command=['/bin/sh', '-c']
    )
    assert result.stdout == 'line\n'
    assert result.stderr == ''


def test_numpy_gets_one_thread_for_its_products_unless_the_user_says_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for given, expected in ((None, '1'), ('4', '4')):
        monkeypatch.delenv('OPENBLAS_NUM_THREADS', raising=False)
        if given:
            monkeypatch.setenv('OPENBLAS_NUM_THREADS', given)
        body = "import os; print(os.environ['OPENBLAS_NUM_THREADS']); return 0"
        assert fake(body).stdout.strip() == expected


def test_words_may_be_given_from_python(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('OPENBLAS_NUM_THREADS', '1')
    assert main([]) == 2
    assert 'usage: pyiqa-clipkd' in capsys.readouterr().out
