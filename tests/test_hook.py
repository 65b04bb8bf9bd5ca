"""The start-up hook in real processes, with made-up hosts and with the real one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pyiqa_clipkd
from pyiqa_clipkd import loss, network
from pyiqa_clipkd._build import startup_files
from pyiqa_clipkd.names import METRICS

PACKAGE_ROOT = Path(pyiqa_clipkd.__file__).parents[1]

# What a host without us prints.
LIST_MODELS = 'import pyiqa; print(*pyiqa.list_models())'

NO_TABLE = {'table': 'METRICS = {"psnr": {}}'}
ODD_TABLE = {'table': 'METRICS = DEFAULT_CONFIGS = ("psnr",)'}
OLD = {'version': '0.1.15.post1'}
NO_PLUGINS = {'registry': 'class Registry:\n    def __init__(self, name): ...\n'}
UNFIT_HOSTS = [
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
    table: str = 'METRICS = DEFAULT_CONFIGS = {"psnr": {}}',
    version: str = '0.1.16',
    registry: str = (
        'class Registry:\n    def __init__(self, name, entry_point_group=None): ...\n'
    ),
) -> Path:
    """A package `pyiqa` with the modules that the hook looks at."""
    folder = tmp_path / 'host'
    (folder / 'pyiqa' / 'utils').mkdir(parents=True)
    files = {
        '__init__.py': 'from pyiqa.api_helpers import list_models',
        'api_helpers.py': (
            'from pyiqa.default_model_configs import METRICS\n'
            'def list_models(): return list(METRICS)\n'
        ),
        'default_model_configs.py': table,
        'version.py': f'__version__ = {version!r}',
        'utils/__init__.py': '',
        'utils/registry.py': registry,
    }
    for name, text in files.items():
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
    tmp_path: Path, site: Path, host: dict[str, str], causes: list[str]
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
def test_with_an_unfit_host_an_import_of_the_package_raises(
    tmp_path: Path,
    site: Path,
    host: dict[str, str],
    causes: list[str],
    started: bool,
    imports: str,
) -> None:
    process = python(
        imports,
        write_host(tmp_path, **host),
        PACKAGE_ROOT,
        site=site if started else None,
    )
    assert process.returncode == 1
    assert 'Traceback' in process.stderr
    assert 'in _host_table' in process.stderr
    assert process.stderr.splitlines()[-1].startswith('RuntimeError: ')
    assert causes[0] in process.stderr.splitlines()[-1]


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
