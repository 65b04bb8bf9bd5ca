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

HOST_TABLE = 'pyiqa.default_model_configs'
OLDEST_HOST = '0.1.16'
OPT_OUT = 'PYIQA_CLIPKD_AUTOLOAD'


def start() -> None:
    """What the start-up files call."""
    if _turned_on():
        install()


def install(*, strict: bool = False) -> None:
    """Add our metrics now, or as soon as pyiqa's table of metrics is imported.

    Again is fine. Once strict, it stays strict.

    Args:
        strict: raise what goes wrong; without, it becomes one RuntimeWarning.
    """
    for finder in sys.meta_path:
        # By name: the finder may come from the start-up copy of this file.
        if type(finder).__name__ == PyiqaClipkdFinder.__name__:
            finder.strict |= strict  # type: ignore[attr-defined]
            return
    if HOST_TABLE in sys.modules:
        _register(strict)
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
        if fullname != HOST_TABLE or not (self.strict or _turned_on()):
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
        # Only now: if pyiqa failed, the user may import it again.
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
        try:
            _register(self.finder.strict)
        except Exception:
            sys.meta_path.insert(0, self.finder)
            raise


def _turned_on() -> bool:
    return os.environ.get(OPT_OUT) != '0'


def _register(strict: bool) -> None:
    try:
        # Not strict: this may be the first import of our package, which is strict.
        from pyiqa_clipkd.host import add_metrics

        add_metrics(_host_table())
    except Exception as error:
        if strict:
            raise
        import warnings

        cause = str(error)
        if not isinstance(error, RuntimeError):
            cause = f'{type(error).__name__}: {error}. Reinstall pyiqa-clipkd.'
        warnings.warn(
            f'pyiqa has no clipkd metrics. {cause} `import pyiqa_clipkd` shows where '
            f'it failed; {OPT_OUT}=0 in the environment turns this off.',
            RuntimeWarning,
            stacklevel=2,
        )


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


def _host_version() -> str:
    from importlib import import_module

    return str(import_module('pyiqa.version').__version__)


def _host_loads_plugins() -> bool:
    """Whether pyiqa's registries look for entry points, as ours are."""
    from importlib import import_module
    from inspect import signature

    registry = getattr(import_module('pyiqa.utils.registry'), 'Registry', None)
    return registry is not None and (
        'entry_point_group' in signature(registry).parameters
    )


def _numbers(version: str) -> tuple[int, ...]:
    """`0.1.16.dev2` -> (0, 1, 16)."""
    import re

    return tuple(int(number) for number in re.findall(r'\d+', version)[:3])
