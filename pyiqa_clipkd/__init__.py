"""CLIP knowledge distillation for image quality: a plugin of pyiqa.

Importing it adds our metrics to pyiqa, now or as soon as pyiqa is imported. It needs
the standard library only: the names below import torch when they're first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pyiqa_clipkd import _hook

if TYPE_CHECKING:
    from pyiqa_clipkd.loss import CosineSoftHardLoss, cosine_soft_hard_loss
    from pyiqa_clipkd.network import CLIPKDStudent, CLIPLikert, load_network

__version__ = '0.1.0'

__all__ = [
    'CLIPKDStudent',
    'CLIPLikert',
    'CosineSoftHardLoss',
    'cosine_soft_hard_loss',
    'load_network',
]

_MODULES = {
    'CLIPKDStudent': 'network',
    'CLIPLikert': 'network',
    'load_network': 'network',
    'CosineSoftHardLoss': 'loss',
    'cosine_soft_hard_loss': 'loss',
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from importlib import import_module

    value = getattr(import_module(f'{__name__}.{_MODULES[name]}'), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_hook.install(strict=True)
