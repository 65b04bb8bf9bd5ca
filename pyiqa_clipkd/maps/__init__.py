"""Where in a photograph it is good, and where bad: `pyiqa-clipkd map`.

The names below import Pillow when they're first used: the command must say first how
Pillow keeps its memory.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyiqa_clipkd.maps.pictures import overlay
    from pyiqa_clipkd.maps.windows import QualityMap, Window, quality_map

__all__ = ['QualityMap', 'Window', 'overlay', 'quality_map']

_MODULES = {
    'QualityMap': 'windows',
    'Window': 'windows',
    'quality_map': 'windows',
    'overlay': 'pictures',
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    value = getattr(import_module(f'{__name__}.{_MODULES[name]}'), name)
    globals()[name] = value
    return value
