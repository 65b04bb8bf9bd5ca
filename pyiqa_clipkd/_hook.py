"""Adds our metrics to pyiqa's table as soon as pyiqa has it.

An install puts this file in two places: here, and as `_pyiqa_clipkd_hook.py` beside
the start-up files (see `_build.py`). There it runs whenever Python starts, without
importing the package: that stays untouched until pyiqa is imported, and even a broken
package can't disturb Python's start. So this file is one module of the standard
library only, and spares what is slow to import (`typing`, `importlib.util`, ...).
"""

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

HOST = 'pyiqa'
HOST_TABLE = 'pyiqa.default_model_configs'

# Entry points that a host may read by itself (host_entry_points.patch): no hook then.
HOST_GROUP = 'pyiqa.metric_configs'
OLDEST_HOST = '0.1.16'
OPT_OUT = 'PYIQA_CLIPKD_AUTOLOAD'


def start() -> None:
    """What the start-up files call."""
    if _turned_on():
        install()


def install(*, strict: bool = False) -> None:
    """Add our metrics now, or as soon as pyiqa's table of metrics is imported.

    Again is fine. Once strict, it stays strict. A pyiqa that has no place for us is one
    RuntimeWarning in any case: all that doesn't need it goes on.

    Args:
        strict: raise what is wrong with this package; without, it is that warning, too.
    """
    for finder in sys.meta_path:
        # By name: the finder may come from the start-up copy of this file.
        if type(finder).__name__ == PyiqaClipkdFinder.__name__:
            finder.strict |= strict  # type: ignore[attr-defined]
            return
    if HOST_TABLE in sys.modules:
        _register(strict)
    elif HOST in sys.modules:
        _check_there()
    else:
        sys.meta_path.insert(0, PyiqaClipkdFinder(strict))


class PyiqaClipkdFinder:
    """Waits on `sys.meta_path` for pyiqa's table; the other finders find it."""

    def __init__(self, strict: bool) -> None:
        self.strict = strict

    def find_spec(
        self,
        fullname: str,
        path: 'Sequence[str] | None' = None,
        target: 'ModuleType | None' = None,
    ) -> 'ModuleSpec | None':
        if fullname not in (HOST, HOST_TABLE) or not (self.strict or _turned_on()):
            return None
        for finder in sys.meta_path:
            find_spec = getattr(finder, 'find_spec', None)
            if finder is self or find_spec is None:
                continue
            spec: ModuleSpec | None = find_spec(fullname, path, target)
            if spec is not None:
                if hasattr(spec.loader, 'exec_module'):
                    spec.loader = _Loader(spec.loader, self)  # type: ignore[assignment]
                return spec
        return None


class _Loader:
    """The module's own loader, which afterwards adds our metrics."""

    def __init__(self, loader: 'Any', finder: PyiqaClipkdFinder) -> None:
        self.loader = loader
        self.finder = finder

    def __getattr__(self, name: str) -> 'Any':
        return getattr(self.loader, name)

    def create_module(self, spec: 'ModuleSpec') -> 'ModuleType | None':
        module: ModuleType | None = self.loader.create_module(spec)
        return module

    def exec_module(self, module: 'ModuleType') -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        if module.__name__ == HOST and HOST_TABLE not in sys.modules:
            _check_there()
            return
        # Only now: if pyiqa failed, the user may import it again.
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
        if module.__name__ == HOST:
            return
        try:
            _register(self.finder.strict)
        except Exception:
            sys.meta_path.insert(0, self.finder)
            raise


def _turned_on() -> bool:
    return os.environ.get(OPT_OUT) != '0'


def _check_there() -> None:
    """Warn if pyiqa is there, but its table can't be found any more."""
    host = sys.modules[HOST]
    for finder in sys.meta_path:
        find_spec = getattr(finder, 'find_spec', None)
        if find_spec and find_spec(HOST_TABLE, getattr(host, '__path__', None)):
            return  # imported later
    _warn(
        f'This pyiqa has no `{HOST_TABLE}`, which our metrics are added to: it is too '
        f'new. Upgrade pyiqa-clipkd, or downgrade pyiqa: pip install '
        f"'pyiqa=={OLDEST_HOST}'."
    )


def _register(strict: bool) -> None:
    if _host_reads_entry_points():
        return
    try:
        # Not strict: this may be the first import of our package, which is strict.
        from pyiqa_clipkd.host import add_metrics

        add_metrics(_host_table())
    except RuntimeError as error:
        _warn(str(error))
    except Exception as error:
        if strict:
            raise
        _warn(f'{type(error).__name__}: {error}. Reinstall pyiqa-clipkd.')


def _warn(cause: str) -> None:
    """Once a process: a start and an import of the package may both get here."""
    host = sys.modules[HOST]
    if getattr(host, '_clipkd_warned', False):
        return
    host._clipkd_warned = True  # type: ignore[attr-defined]
    import warnings

    warnings.warn(
        f'pyiqa has no clipkd metrics. {cause} Everything that needs no pyiqa works: '
        'the command pyiqa-clipkd, `pyiqa_clipkd.runtime.Runtime`, '
        f'`pyiqa_clipkd.metric.CLIPKDMetric`. {OPT_OUT}=0 in the environment turns '
        'this off.',
        RuntimeWarning,
        stacklevel=2,
    )


def _host_reads_entry_points() -> bool:
    """Whether pyiqa itself adds the metrics that our installed package declares."""
    if getattr(sys.modules[HOST_TABLE], 'ENTRY_POINT_GROUP', None) != HOST_GROUP:
        return False
    from importlib.metadata import entry_points

    return any(point.name == 'pyiqa_clipkd' for point in entry_points(group=HOST_GROUP))


def _host_table() -> 'dict[str, Any]':
    """pyiqa's table of metrics.

    Raises:
        RuntimeError: if this pyiqa is too old or too new for us.
    """
    version = _host_version()
    if _numbers(version) < _numbers(OLDEST_HOST):
        raise RuntimeError(
            f'pyiqa must be {OLDEST_HOST} or newer, but got {version}. '
            f"Upgrade it: pip install -U 'pyiqa>={OLDEST_HOST}'."
        )
    if not _host_loads_plugins():
        raise RuntimeError(
            f'pyiqa {version} loads no plugins by entry points. Upgrade pyiqa-clipkd, '
            f"or install a pyiqa that does: pip install 'pyiqa=={OLDEST_HOST}'."
        )
    table = getattr(sys.modules[HOST_TABLE], 'DEFAULT_CONFIGS', None)
    if not isinstance(table, dict):
        raise RuntimeError(
            f'`{HOST_TABLE}.DEFAULT_CONFIGS` must be a dict, but got '
            f'{type(table).__name__} from pyiqa {version}, which is too new. Upgrade '
            f"pyiqa-clipkd, or downgrade pyiqa: pip install 'pyiqa=={OLDEST_HOST}'."
        )
    return table


def _host_module(name: str) -> 'ModuleType':
    from importlib import import_module

    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f'This pyiqa has no `{error.name}`: it is too new. Upgrade pyiqa-clipkd, '
            f"or downgrade pyiqa: pip install 'pyiqa=={OLDEST_HOST}'."
        ) from error


def _host_version() -> str:
    return str(getattr(_host_module('pyiqa.version'), '__version__', '0'))


def _host_loads_plugins() -> bool:
    """Whether pyiqa's registries look for entry points, as ours are."""
    from inspect import signature

    registry = getattr(_host_module('pyiqa.utils.registry'), 'Registry', None)
    return registry is not None and (
        'entry_point_group' in signature(registry).parameters
    )


def _numbers(version: str) -> tuple[int, ...]:
    """`0.1.16.dev2` -> (0, 1, 16)."""
    import re

    return tuple(int(number) for number in re.findall(r'\d+', version)[:3])
