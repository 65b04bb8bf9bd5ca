"""Real installs into fresh environments, and what their users see."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import os
import shutil
import subprocess
import sysconfig
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest

from pyiqa_clipkd import __version__
from pyiqa_clipkd._build import add_to_wheel, startup_files
from pyiqa_clipkd.names import METRICS

pytest.importorskip('setuptools', minversion='64')
pytest.importorskip('pip')

pytestmark = pytest.mark.slow

CHECKOUT = Path(__file__).parents[1]
BUILD_SDIST = 'from setuptools.build_meta import build_sdist; build_sdist("dist")'
WHERE = (
    'import json, pyiqa_clipkd\n'
    'print(json.dumps([pyiqa_clipkd.__file__, pyiqa_clipkd.__version__]))'
)
STATE = """
import json, sys
finders = [type(finder).__name__ for finder in sys.meta_path]
modules = [name for name in sys.modules if 'clipkd' in name]
print(json.dumps([
    [name for name in finders if 'Clipkd' in name],
    [name for name in modules if not name.startswith('__editable__')],
]))
"""
LIST_MODELS = 'import json, pyiqa; print(json.dumps(pyiqa.list_models()))'


class Environment:
    """A virtual environment that borrows every package but ours from this one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        venv.create(folder, with_pip=False)
        base = {'base': str(folder), 'platbase': str(folder)}
        self.site = Path(sysconfig.get_path('purelib', 'venv', base))
        self.python = Path(sysconfig.get_path('scripts', 'venv', base), 'python')
        borrowed = folder / 'borrowed'
        borrowed.mkdir()
        for name in ('purelib', 'platlib'):
            for item in Path(sysconfig.get_path(name)).iterdir():
                ours = 'pyiqa_clipkd' in item.name
                link = borrowed / item.name
                if not ours and item.suffix != '.pth' and not link.exists():
                    link.symlink_to(item)
        (self.site / 'borrowed.pth').write_text(f'{borrowed}\n')

    def run(self, *arguments: str, **environment: str) -> str:
        """Run this environment's Python; returns what it printed."""
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(('PYIQA_CLIPKD', 'PYTHON', 'PIP_'))
        }
        process = subprocess.run(
            [str(self.python), *arguments],
            cwd=environment.pop('cwd', self.folder),
            env={**inherited, 'PYTHONDONTWRITEBYTECODE': '1', **environment},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert process.returncode == 0, process.stdout + process.stderr
        assert 'clipkd' not in process.stderr, process.stderr
        return process.stdout

    def pip(self, *arguments: str, cwd: Path) -> None:
        self.run('-m', 'pip', '--disable-pip-version-check', *arguments, cwd=str(cwd))

    def files(self) -> set[Path]:
        """Every file and link in the environment, without what Python caches."""
        return {
            path
            for path in self.folder.rglob('*')
            if '__pycache__' not in path.parts and not path.is_dir()
        }


@pytest.fixture(scope='module')
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, without what earlier builds left there."""
    folder = tmp_path_factory.mktemp('source') / 'checkout'
    folder.mkdir()
    for name in ('pyiqa_clipkd', 'configs', 'scripts', 'tests'):
        ignored = shutil.ignore_patterns('__pycache__')
        shutil.copytree(CHECKOUT / name, folder / name, ignore=ignored)
    for file in CHECKOUT.iterdir():
        if file.is_file():
            shutil.copy(file, folder)
    bundled = folder / 'pyiqa_clipkd' / 'bundled'
    bundled.mkdir(exist_ok=True)
    (bundled / 'clipkd_probe.safetensors').touch()
    (bundled / 'clipkd_probe.md').touch()
    return folder


@pytest.fixture(
    params=['normal', 'editable', 'editable strict', 'editable compat', 'sdist'],
    scope='module',
)
def installed(
    request: pytest.FixtureRequest,
    source: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Environment, set[Path], str]:
    """An environment with our package, its files before that, and how it was done."""
    environment = Environment(tmp_path_factory.mktemp('environment'))
    before = environment.files()
    how: str = request.param
    work = source.parent / how.replace(' ', '_')
    shutil.copytree(source, work)
    offline = ('--no-index', '--no-deps', '--no-build-isolation')
    what = ['.']
    if how == 'sdist':
        environment.run('-c', BUILD_SDIST, cwd=str(work))
        (sdist,) = (work / 'dist').iterdir()
        environment.pip('wheel', *offline, '-w', 'wheels', str(sdist), cwd=work)
        (wheel,) = (work / 'wheels').iterdir()
        what = [str(wheel)]
    elif how.startswith('editable'):
        what = ['--editable', '.']
        if mode := how.removeprefix('editable').strip():
            what += ['--config-settings', f'editable_mode={mode}']
    environment.pip('install', *offline, *what, cwd=work)
    return environment, before, how


def test_the_installed_package_is_the_one_that_gets_imported(
    installed: tuple[Environment, set[Path], str], source: Path
) -> None:
    environment, _, how = installed
    file, version = json.loads(environment.run('-c', WHERE).splitlines()[-1])
    home = source.parent if how.startswith('editable') else environment.site
    assert Path(file).is_relative_to(home)
    assert version == __version__
    metadata = 'from importlib.metadata import version; print(version("pyiqa-clipkd"))'
    assert environment.run('-c', metadata).strip() == __version__


def test_a_bare_import_of_pyiqa_lists_our_metrics(
    installed: tuple[Environment, set[Path], str],
) -> None:
    environment, _, _ = installed
    listed = json.loads(environment.run('-c', LIST_MODELS).splitlines()[-1])
    assert set(METRICS) < set(listed)


def test_the_pyiqa_command_lists_our_metrics(
    installed: tuple[Environment, set[Path], str],
) -> None:
    environment, _, _ = installed
    shown = environment.run('-m', 'pyiqa.pyiqa_cmd', '-ls')
    assert all(repr(name) in shown for name in METRICS)


def test_the_start_up_files_are_at_the_root_and_recorded(
    installed: tuple[Environment, set[Path], str],
) -> None:
    environment, _, _ = installed
    (record,) = environment.site.glob('pyiqa_clipkd-*.dist-info/RECORD')
    with record.open(newline='') as file:
        recorded = {row[0] for row in csv.reader(file)}
    for name, text in startup_files().items():
        assert (environment.site / name).read_text() == text
        assert name in recorded


def test_the_data_files_ship(
    installed: tuple[Environment, set[Path], str],
) -> None:
    environment, _, _ = installed
    code = 'import pyiqa_clipkd; print(pyiqa_clipkd.__path__[0])'
    package = Path(environment.run('-c', code).strip())
    for name in ('py.typed', 'bundled/clipkd_probe.safetensors'):
        assert (package / name).is_file()
    assert (package / 'bundled/clipkd_probe.md').is_file()


def test_a_plain_start_of_python_leaves_our_package_alone(
    installed: tuple[Environment, set[Path], str],
) -> None:
    environment, _, _ = installed
    finders, modules = json.loads(environment.run('-c', STATE))
    assert finders == ['PyiqaClipkdFinder']
    assert modules == ['_pyiqa_clipkd_hook']


def test_zero_in_the_environment_keeps_the_hook_out(
    installed: tuple[Environment, set[Path], str],
) -> None:
    environment, _, _ = installed
    finders, _ = json.loads(environment.run('-c', STATE, PYIQA_CLIPKD_AUTOLOAD='0'))
    assert finders == []


def test_uninstalling_leaves_no_file(
    installed: tuple[Environment, set[Path], str], source: Path
) -> None:
    # Last of those that share an installed environment.
    environment, before, _ = installed
    assert environment.files() > before
    environment.pip('uninstall', '--yes', 'pyiqa-clipkd', cwd=source)
    assert environment.files() == before
    assert json.loads(environment.run('-c', STATE)) == [[], []]


def test_the_sdist_holds_what_a_build_and_the_tests_need(
    source: Path, tmp_path: Path
) -> None:
    environment = Environment(tmp_path / 'environment')
    work = tmp_path / 'work'
    shutil.copytree(source, work)
    environment.run('-c', BUILD_SDIST, cwd=str(work))
    (sdist,) = (work / 'dist').iterdir()
    shutil.unpack_archive(sdist, tmp_path / 'unpacked')
    (root,) = (tmp_path / 'unpacked').iterdir()
    for file in [*source.rglob('*.py'), *source.rglob('*.yml'), source / 'LICENSE']:
        assert (root / file.relative_to(source)).is_file()


def test_a_file_added_to_a_wheel_is_in_its_record(tmp_path: Path) -> None:
    """pip fills the gaps of a RECORD; other installers needn't."""
    wheel = tmp_path / 'p-1-py3-none-any.whl'
    record = 'p-1.dist-info/RECORD'
    with ZipFile(wheel, 'w') as archive:
        archive.writestr('p-1.dist-info/METADATA', 'Name: p\n')
        archive.writestr(record, f'p-1.dist-info/METADATA,,\n{record},,\n')
    add_to_wheel(wheel, {'p.pth': 'import p\n'})
    digest = base64.urlsafe_b64encode(hashlib.sha256(b'import p\n').digest())
    with ZipFile(wheel) as archive:
        assert sorted(archive.namelist()) == [
            'p-1.dist-info/METADATA',
            record,
            'p.pth',
        ]
        assert archive.read('p.pth') == b'import p\n'
        assert archive.read(record).decode().splitlines() == [
            'p-1.dist-info/METADATA,,',
            f'{record},,',
            f'p.pth,sha256={digest.decode().rstrip("=")},9',
        ]
