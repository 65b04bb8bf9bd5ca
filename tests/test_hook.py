"""The start-up hook in real processes, with made-up hosts and with the real one."""

from __future__ import annotations

import configparser
import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import pyiqa_clipkd
from pyiqa_clipkd import loss, network
from pyiqa_clipkd._build import startup_files
from pyiqa_clipkd.names import DEFAULT_METRIC, METRICS

PACKAGE_ROOT = Path(pyiqa_clipkd.__file__).parents[1]

PHOTOS = Path(__file__).parent / 'photos'
COFFEE = PHOTOS / 'coffee.jpg'

# What a host without us prints.
LIST_MODELS = 'import pyiqa; print(*pyiqa.list_models())'

NO_TABLE = {'table': 'METRICS = {"psnr": {}}'}
ODD_TABLE = {'table': 'METRICS = DEFAULT_CONFIGS = ("psnr",)'}
OLD = {'version': '0.1.15.post1'}
NO_PLUGINS = {'registry': 'class Registry:\n    def __init__(self, name): ...\n'}
UNFIT_HOSTS: list[Any] = [
    pytest.param(
        NO_TABLE, ['must be a dict, but got NoneType', 'downgrade pyiqa'], id='no table'
    ),
    pytest.param(
        ODD_TABLE, ['must be a dict, but got tuple', 'downgrade pyiqa'], id='odd table'
    ),
    pytest.param(
        OLD,
        ['pyiqa must be 0.1.16 or newer, but got 0.1.15.post1', "'pyiqa>=0.1.16'"],
        id='old version',
    ),
    pytest.param(
        {'table': None},
        ['has no `pyiqa.default_model_configs`', "'pyiqa==0.1.16'"],
        id='table moved',
    ),
    pytest.param(
        {'version': None},
        ['has no `pyiqa.version`', 'downgrade pyiqa'],
        id='no version',
    ),
    pytest.param(
        {'registry': None},
        ['has no `pyiqa.utils.registry`', 'downgrade pyiqa'],
        id='registry moved',
    ),
    pytest.param(
        NO_PLUGINS,
        ['loads no plugins by entry points', "'pyiqa==0.1.16'"],
        id='no plugins',
    ),
]


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder like site-packages, with our start-up files."""
    folder = tmp_path / 'site'
    folder.mkdir()
    for name, text in startup_files().items():
        (folder / name).write_text(text)
    return folder


def write_host(
    tmp_path: Path,
    *,
    table: str | None = 'METRICS = DEFAULT_CONFIGS = {"psnr": {}}',
    version: str | None = '0.1.16',
    registry: str | None = (
        'class Registry:\n    def __init__(self, name, entry_point_group=None): ...\n'
    ),
) -> Path:
    """A package `pyiqa` with the modules that the hook looks at.

    `None` for one that it hasn't.
    """
    folder = tmp_path / 'host'
    (folder / 'pyiqa' / 'utils').mkdir(parents=True)
    files: dict[str, str | None] = {
        '__init__.py': 'from pyiqa.api_helpers import list_models',
        'api_helpers.py': (
            'from pyiqa.default_model_configs import METRICS\n'
            'def list_models(): return list(METRICS)\n'
        ),
        'default_model_configs.py': table,
        'version.py': version and f'__version__ = {version!r}',
        'utils/__init__.py': '',
        'utils/registry.py': registry,
    }
    if table is None:  # it has moved
        files['api_helpers.py'] = (
            'from pyiqa.metrics_table import METRICS\n'
            'def list_models(): return list(METRICS)\n'
        )
        files['metrics_table.py'] = 'METRICS = {"psnr": {}}'
        del files['default_model_configs.py']
    for name, text in files.items():
        if text is not None:
            (folder / 'pyiqa' / name).write_text(text)
    return folder


def python(
    code: str,
    *paths: Path,
    site: Path | None = None,
    options: tuple[str, ...] = ('-S',),
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Run code in a new process, after the start-up files of the folder `site`.

    `-S` keeps the environment's own start-up files, and all but `paths`, out of it.
    """
    if site is not None:
        code = f'import site; site.addsitedir({str(site)!r})\n{code}'
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(('PYIQA_CLIPKD', 'PYTHON'))
    }
    return subprocess.run(
        [sys.executable, *options, '-c', code],
        cwd=sys.prefix,  # which is on the path of `-c`: not our checkout
        env={
            **inherited,
            'PYTHONPATH': os.pathsep.join(map(str, paths)),
            'PYTHONDONTWRITEBYTECODE': '1',
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def printed(process: subprocess.CompletedProcess[str]) -> list[str]:
    """The words printed by a process that ended well and had nothing to complain of."""
    assert (process.returncode, process.stderr) == (0, ''), process.stderr
    return process.stdout.split()


def test_the_pth_file_is_one_import_line() -> None:
    (line,) = startup_files()['pyiqa_clipkd.pth'].splitlines()
    assert line.startswith('import ')


def test_the_entry_point_in_the_start_file_does_the_same(
    tmp_path: Path, site: Path
) -> None:
    """As Python 3.15 calls it, for the Pythons before that."""
    (entry_point,) = startup_files()['pyiqa_clipkd.start'].splitlines()
    code = f'import pkgutil; pkgutil.resolve_name({entry_point!r})(); {LIST_MODELS}'
    listed = printed(python(code, write_host(tmp_path), PACKAGE_ROOT, site))
    assert listed == ['psnr', *METRICS]


def test_after_a_start_pyiqa_lists_our_metrics_after_its_own(
    tmp_path: Path, site: Path
) -> None:
    host = write_host(tmp_path)
    listed = printed(python(LIST_MODELS, host, PACKAGE_ROOT, site=site))
    assert listed == ['psnr', *METRICS]


def test_without_the_start_up_files_pyiqa_lists_its_own_only(tmp_path: Path) -> None:
    host = write_host(tmp_path)
    assert printed(python(LIST_MODELS, host, PACKAGE_ROOT)) == ['psnr']


def test_a_metric_of_that_name_in_the_host_stays_as_it_is(
    tmp_path: Path, site: Path
) -> None:
    host = write_host(
        tmp_path, table='METRICS = DEFAULT_CONFIGS = {"clipkd_swin": "theirs"}'
    )
    code = (
        'from pyiqa.default_model_configs import DEFAULT_CONFIGS as table\n'
        'print(table["clipkd_swin"], table["clipkd_teacher"]["metric_mode"])'
    )
    listed = printed(python(code, host, PACKAGE_ROOT, site=site))
    assert listed == ['theirs', 'NR']


def test_two_runs_of_the_start_up_files_put_one_finder_in_place(site: Path) -> None:
    code = (
        f'site.addsitedir({str(site)!r})\n'
        'import sys\n'
        'print(*(type(finder).__name__ for finder in sys.meta_path))'
    )
    finders = printed(python(code, site=site))
    assert finders.count('PyiqaClipkdFinder') == 1


def test_an_import_of_the_package_adds_no_second_finder(site: Path) -> None:
    code = (
        'import pyiqa_clipkd, sys\n'
        'print(*(type(finder).__name__ for finder in sys.meta_path))'
    )
    finders = printed(python(code, PACKAGE_ROOT, site=site))
    assert finders.count('PyiqaClipkdFinder') == 1


def test_no_trace_of_the_hook_is_left_in_the_import_system(
    tmp_path: Path, site: Path
) -> None:
    code = (
        'import sys, pyiqa.default_model_configs as table\n'
        'print(type(table.__loader__).__name__, type(table.__spec__.loader).__name__)\n'
        'print(*(type(finder).__name__ for finder in sys.meta_path))'
    )
    words = printed(python(code, write_host(tmp_path), PACKAGE_ROOT, site=site))
    assert words[:2] == ['SourceFileLoader', 'SourceFileLoader']
    assert 'PyiqaClipkdFinder' not in words


def test_a_start_imports_one_small_module(site: Path) -> None:
    code = (
        'import site, sys\n'
        'before = set(sys.modules)\n'
        f'site.addsitedir({str(site)!r})\n'
        'print(*set(sys.modules) - before)'
    )
    imported = set(printed(python(code, PACKAGE_ROOT)))
    assert {name for name in imported if 'clipkd' in name} == {'_pyiqa_clipkd_hook'}
    slow = {'typing', 're', 'warnings', 'inspect', 'importlib.util', 'importlib.abc'}
    if sys.version_info < (3, 15):  # whose `site` itself imports a few of these
        assert not imported & slow


def test_zero_in_the_environment_turns_the_start_off(
    tmp_path: Path, site: Path
) -> None:
    code = f'import sys; {LIST_MODELS}; print("_pyiqa_clipkd_hook" in sys.modules)'
    host = write_host(tmp_path)
    words = printed(
        python(code, host, PACKAGE_ROOT, site=site, PYIQA_CLIPKD_AUTOLOAD='0')
    )
    # Python 3.15 imports the module of a `.start` file in any case.
    assert words[0] == 'psnr'
    assert words[1:] == [str(sys.version_info >= (3, 15))]


def test_zero_set_after_the_start_turns_it_off_too(tmp_path: Path, site: Path) -> None:
    code = f'import os; os.environ["PYIQA_CLIPKD_AUTOLOAD"] = "0"; {LIST_MODELS}'
    words = printed(python(code, write_host(tmp_path), PACKAGE_ROOT, site=site))
    assert words == ['psnr']


@pytest.mark.parametrize(
    'imports', ['import pyiqa_clipkd, pyiqa', 'import pyiqa, pyiqa_clipkd']
)
@pytest.mark.parametrize('started', [True, False])
@pytest.mark.parametrize('autoload', ['0', '1'])
def test_an_import_of_the_package_always_adds_the_metrics(
    tmp_path: Path, site: Path, imports: str, started: bool, autoload: str
) -> None:
    process = python(
        f'{imports}; {LIST_MODELS}',
        write_host(tmp_path),
        PACKAGE_ROOT,
        site=site if started else None,
        PYIQA_CLIPKD_AUTOLOAD=autoload,
    )
    assert printed(process) == ['psnr', *METRICS]


@pytest.mark.parametrize(('host', 'causes'), UNFIT_HOSTS)
def test_an_unfit_host_gets_one_warning_and_keeps_its_metrics(
    tmp_path: Path, site: Path, host: dict[str, str | None], causes: list[str]
) -> None:
    process = python(LIST_MODELS, write_host(tmp_path, **host), PACKAGE_ROOT, site=site)
    assert process.returncode == 0, process.stderr
    assert process.stdout.split() == ['psnr']
    assert process.stderr.count('Warning') == 1
    assert 'RuntimeWarning: pyiqa has no clipkd metrics.' in process.stderr
    for text in [*causes, 'PYIQA_CLIPKD_AUTOLOAD=0']:
        assert text in process.stderr


@pytest.mark.parametrize(('host', 'causes'), UNFIT_HOSTS)
@pytest.mark.parametrize('started', [True, False])
@pytest.mark.parametrize(
    'imports', ['import pyiqa_clipkd, pyiqa', 'import pyiqa, pyiqa_clipkd']
)
def test_with_an_unfit_host_an_import_of_the_package_warns_once_and_goes_on(
    tmp_path: Path,
    site: Path,
    host: dict[str, str | None],
    causes: list[str],
    started: bool,
    imports: str,
) -> None:
    process = python(
        f'{imports}, pyiqa_clipkd.names; print(*pyiqa_clipkd.names.METRICS)',
        write_host(tmp_path, **host),
        PACKAGE_ROOT,
        site=site if started else None,
    )
    assert (process.returncode, process.stdout.split()) == (0, [*METRICS])
    assert process.stderr.count('Warning: ') == 1
    assert causes[0] in process.stderr


def start_up(site: Path) -> str:
    """Code that runs our start-up files, where the environment's own are off."""
    return (
        'import os; del os.environ["PYIQA_CLIPKD_AUTOLOAD"]\n'
        f'import site; site.addsitedir({str(site)!r})\n'
    )


# Everything that a user does without pyiqa, with a pyiqa that has no place for us.
GOES_ON = """
import sys, warnings
warnings.simplefilter('ignore', DeprecationWarning)
warnings.simplefilter('ignore', FutureWarning)
import pyiqa, pyiqa_clipkd
from pyiqa_clipkd.command import main
from pyiqa_clipkd.metric import CLIPKDMetric
from pyiqa_clipkd.runtime import Runtime
photo, name = sys.argv[1:]
print(round(Runtime(name).score(photo).score, 2))
import torch
print(tuple(CLIPKDMetric(name)(torch.rand(1, 3, 64, 64)).shape))
codes = [
    main(['score', 'photos', '-o', 'a.csv', '--quiet']),
    main(['score', 'photos', '-o', 'b.csv', '--backend', 'torch', '--quiet']),
    main(['report', 'a.csv']),
    main(['compare', 'a.csv', 'b.csv']),
    main(['models']),
    main(['export', '-m', name, 'out.pt2', '--input', 'squares', '--check', 'photos']),
]
print('codes', *codes)
"""


@pytest.mark.slow
def test_with_a_host_that_lacks_everything_the_rest_works(
    tmp_path: Path, site: Path
) -> None:
    (tmp_path / 'photos').mkdir()
    with Image.open(COFFEE) as image:
        for n in range(6):
            view = image.crop((8 * n, 8 * n, image.width, image.height))
            view.save(tmp_path / 'photos' / f'{n}.png')
    host = write_host(tmp_path, **NO_TABLE, **NO_PLUGINS)
    process = subprocess.run(
        [sys.executable, '-c', start_up(site) + GOES_ON, str(COFFEE), DEFAULT_METRIC],
        cwd=tmp_path,
        env={
            **os.environ,
            'PYIQA_CLIPKD_AUTOLOAD': '0',  # of the environment's own hook
            'PYTHONPATH': os.pathsep.join(map(str, (host, PACKAGE_ROOT))),
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert lines[0] == '3.95'
    assert '(1, 1)' in lines
    assert 'codes 0 0 0 0 0 0' in lines, process.stderr
    assert process.stderr.count('pyiqa has no clipkd metrics') == 1


@pytest.mark.parametrize('started', [True, False])
def test_after_an_error_of_the_host_itself_pyiqa_can_be_imported_again(
    tmp_path: Path, site: Path, started: bool
) -> None:
    host = write_host(
        tmp_path,
        table='import sys\n'
        'if not hasattr(sys, "repaired"): raise OSError("no disk")\n'
        'METRICS = DEFAULT_CONFIGS = {"psnr": {}}',
    )
    code = (
        'import sys\n'
        f'{"" if started else "import pyiqa_clipkd"}\n'
        'try: import pyiqa\n'
        'except OSError as error: print(error)\n'
        f'sys.repaired = True; {LIST_MODELS}'
    )
    words = printed(python(code, host, PACKAGE_ROOT, site=site if started else None))
    assert words == ['no', 'disk', 'psnr', *METRICS]


@pytest.mark.parametrize(
    ('text', 'cause'),
    [
        ('1 +', 'SyntaxError: invalid syntax'),
        ('import nowhere', "ModuleNotFoundError: No module named 'nowhere'"),
        (None, "ModuleNotFoundError: No module named 'pyiqa_clipkd'"),
    ],
)
def test_a_broken_or_missing_package_costs_one_warning(
    tmp_path: Path, site: Path, text: str | None, cause: str
) -> None:
    package = tmp_path / 'broken' / 'pyiqa_clipkd'
    if text is not None:
        package.mkdir(parents=True)
        (package / '__init__.py').write_text(text)
    host = write_host(tmp_path)
    assert printed(python('print("fine")', package.parent, site=site)) == ['fine']
    process = python(LIST_MODELS, host, package.parent, site=site)
    assert process.returncode == 0, process.stderr
    assert process.stdout.split() == ['psnr']
    assert process.stderr.count('Warning') == 1
    assert cause in process.stderr
    assert 'Reinstall pyiqa-clipkd' in process.stderr


def test_a_pth_file_left_alone_is_silent(site: Path) -> None:
    for name in startup_files():
        if not name.endswith('.pth'):
            (site / name).unlink()
    assert printed(python('print("fine")', site=site)) == ['fine']


@pytest.mark.parametrize('ours_first', [True, False])
def test_another_plugin_may_wait_for_the_same_module(
    tmp_path: Path, site: Path, ours_first: bool
) -> None:
    """The other one wraps the module's loader like us and restores it like us."""
    (tmp_path / 'other.py').write_text(
        'import sys\n'
        'class Loader:\n'
        '    def __init__(self, loader): self.loader = loader\n'
        '    def create_module(self, spec): return self.loader.create_module(spec)\n'
        '    def exec_module(self, module):\n'
        '        self.loader.exec_module(module)\n'
        '        module.__spec__.loader = module.__loader__ = self.loader\n'
        '        module.METRICS["other"] = {}\n'
        'class Finder:\n'
        '    def find_spec(self, name, path=None, target=None):\n'
        '        if name != "pyiqa.default_model_configs": return None\n'
        '        sys.meta_path.remove(self)\n'
        '        for finder in sys.meta_path:\n'
        '            if spec := finder.find_spec(name, path, target):\n'
        '                spec.loader = Loader(spec.loader)\n'
        '                return spec\n'
        'sys.meta_path.insert(0, Finder())\n'
    )
    start = f'import site; site.addsitedir({str(site)!r})\n'
    both = f'{start}import other' if ours_first else f'import other\n{start}'
    process = python(
        f'{both}\n{LIST_MODELS}', write_host(tmp_path), PACKAGE_ROOT, tmp_path
    )
    assert sorted(printed(process)) == sorted(['psnr', 'other', *METRICS])


def test_the_package_imports_without_pyiqa_and_torch() -> None:
    code = 'import pyiqa_clipkd; print(pyiqa_clipkd.__version__, *dir(pyiqa_clipkd))'
    version, *names = printed(python(code, PACKAGE_ROOT))
    assert version == pyiqa_clipkd.__version__
    assert set(pyiqa_clipkd.__all__) < set(names)


def test_the_public_names_are_those_of_their_modules() -> None:
    for name in pyiqa_clipkd.__all__:
        home = loss if hasattr(loss, name) else network
        assert getattr(pyiqa_clipkd, name) is getattr(home, name)
    with pytest.raises(AttributeError, match=r"^module 'pyiqa_clipkd' has no .*'tea'$"):
        pyiqa_clipkd.tea  # noqa: B018


def test_the_real_host_lists_our_metrics_and_the_users_own_weights(
    tmp_path: Path, site: Path
) -> None:
    weights = tmp_path / 'weights'
    weights.mkdir()
    (weights / 'clipkd_mine.safetensors').touch()
    (weights / 'notes.txt').touch()
    # The environment may hold an install of ours: its start-up files are kept out.
    code = (
        'import os; del os.environ["PYIQA_CLIPKD_AUTOLOAD"]\n'
        f'import json, site; site.addsitedir({str(site)!r})\n'
        'import pyiqa; print(json.dumps(pyiqa.list_models("NR")))'
    )
    process = python(
        code,
        PACKAGE_ROOT,
        options=('-W', 'ignore::DeprecationWarning', '-W', 'ignore::FutureWarning'),
        PYIQA_CLIPKD_AUTOLOAD='0',
        PYIQA_CLIPKD_WEIGHTS=str(weights),
    )
    assert process.returncode == 0, process.stderr
    assert 'clipkd' not in process.stderr
    listed = json.loads(process.stdout.splitlines()[-1])
    assert {name for name in listed if 'clipkd' in name} == {*METRICS, 'clipkd_mine'}
    assert 'brisque' in listed


# --- a host that reads entry points -----------------------------------------------


@pytest.fixture
def patched(tmp_path: Path) -> Path:
    """A copy of the installed pyiqa with the patch that we offer."""
    spec = find_spec('pyiqa')
    assert spec is not None
    assert spec.origin is not None
    folder = tmp_path / 'patched'
    shutil.copytree(
        Path(spec.origin).parent,
        folder / 'pyiqa',
        ignore=shutil.ignore_patterns('__pycache__'),
    )
    patch = PACKAGE_ROOT / 'pyiqa_clipkd' / 'host_entry_points.patch'
    applied = subprocess.run(
        ['git', 'apply', '--unidiff-zero', str(patch)],
        cwd=folder,
        env={**os.environ, 'GIT_CEILING_DIRECTORIES': str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert applied.returncode == 0, applied.stderr
    return folder


@pytest.fixture
def declared(tmp_path: Path) -> Path:
    """The metadata of our package as an install of this checkout would write them."""
    setup = configparser.ConfigParser(delimiters='=')
    setup.read(PACKAGE_ROOT / 'setup.cfg')
    folder = tmp_path / 'metadata' / 'pyiqa_clipkd-0.1.0.dist-info'
    folder.mkdir(parents=True)
    (folder / 'METADATA').write_text('Name: pyiqa-clipkd\nVersion: 0.1.0\n')
    points = setup['options.entry_points'].items()
    lines = [f'[{group}]\n{names.strip()}\n' for group, names in points]
    (folder / 'entry_points.txt').write_text('\n'.join(lines))
    return folder.parent


QUIET = ('-W', 'ignore::DeprecationWarning', '-W', 'ignore::FutureWarning')


@pytest.mark.parametrize(
    ('started', 'code'),
    [
        (True, 'import pyiqa'),
        pytest.param(False, 'import pyiqa', marks=pytest.mark.slow),
        pytest.param(True, 'import pyiqa, pyiqa_clipkd', marks=pytest.mark.slow),
    ],
)
def test_a_host_with_our_patch_finds_the_metrics_by_itself(
    patched: Path, declared: Path, site: Path, started: bool, code: str
) -> None:
    # The hook would be seen: `pyiqa_clipkd.host` is what it adds with, and only it.
    code = (
        f'{start_up(site) if started else ""}{code}\n'
        'import json, sys\n'
        'print("pyiqa_clipkd.host" in sys.modules)\n'
        'print(json.dumps(sorted(n for n in pyiqa.list_models() if "clipkd" in n)))\n'
        'metric = pyiqa.create_metric("clipkd_efficientnet_lite", device="cpu")\n'
        f'print(round(metric({str(COFFEE)!r}).item(), 2))'
    )
    process = python(
        code,
        patched,
        declared,
        PACKAGE_ROOT,
        options=QUIET,
        PYIQA_CLIPKD_AUTOLOAD='0',
    )
    assert process.returncode == 0, process.stderr
    assert 'clipkd' not in process.stderr
    *_, hooked, names, score = process.stdout.splitlines()
    assert hooked == 'False'
    assert json.loads(names) == sorted(METRICS)
    assert float(score) == pytest.approx(3.95, abs=0.01)


@pytest.mark.slow
def test_with_our_patch_the_host_s_command_lists_them_too(
    patched: Path, declared: Path
) -> None:
    code = 'import sys; sys.argv = ["pyiqa", "-ls"]; from pyiqa.pyiqa_cmd import main; '
    process = python(
        f'{code} main()',
        patched,
        declared,
        PACKAGE_ROOT,
        options=QUIET,
        PYIQA_CLIPKD_AUTOLOAD='0',
    )
    assert process.returncode == 0, process.stderr
    assert all(name in process.stdout for name in METRICS)


@pytest.mark.slow
def test_a_host_with_our_patch_but_no_metadata_of_ours_gets_the_hook(
    patched: Path, site: Path
) -> None:
    """A checkout on the path, with start-up files of before: nothing is declared."""
    code = f'{start_up(site)}import pyiqa\nprint(*pyiqa.list_models("NR"))'
    process = python(
        # What is installed here may declare it.
        'import importlib.metadata as m; m.entry_points = lambda **_: m.EntryPoints()\n'
        + code,
        patched,
        PACKAGE_ROOT,
        options=QUIET,
        PYIQA_CLIPKD_AUTOLOAD='0',
    )
    assert process.returncode == 0, process.stderr
    assert {*METRICS} < {*process.stdout.split()}


@pytest.mark.slow
def test_a_plugin_that_fails_costs_the_patched_host_one_warning(
    patched: Path, tmp_path: Path
) -> None:
    folder = tmp_path / 'bad' / 'bad-1.dist-info'
    folder.mkdir(parents=True)
    (folder / 'METADATA').write_text('Name: bad\nVersion: 1\n')
    points = '[pyiqa.metric_configs]\nbad = nowhere:configs\n'
    (folder / 'entry_points.txt').write_text(points)
    process = python(
        'import pyiqa; print(len(pyiqa.list_models()) > 50)',
        patched,
        folder.parent,
        options=QUIET,
        PYIQA_CLIPKD_AUTOLOAD='0',
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.split()[-1] == 'True'
    assert process.stderr.count("plugin 'bad' could not be loaded") == 1
