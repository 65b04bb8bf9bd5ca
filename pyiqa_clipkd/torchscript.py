"""TorchScript archives, OpenAI's form of CLIP, read as data.

`torch.jit.load` runs code of the archive (`__setstate__` of its classes). Here a class
is a plain holder of attributes; of the code only the lists of tensor names are read.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from pyiqa_clipkd.checkpoints import (
    ALLOWED,
    Archive,
    StoredTensor,
    find,
    opened_zip,
    root_of,
    storage_of,
)
from pyiqa_clipkd.plain_pickle import Allowed, Holder, PlainUnpickler

# Of all archives of TorchScript, and of these alone.
CONSTANTS = 'constants.pkl'

# Characters of all names together, far more than CLIP's have. A module in two places
# has two names, and a file of two kilobytes can have one in 2^50 places.
MOST_CHARACTERS = 4_000_000

# Lists of one type, and values with their type.
TYPED = Allowed('typed value', lambda value, *_: value)
ALLOWED_HERE = ALLOWED | {
    ('torch.jit._pickle', name): TYPED
    for name in (
        'build_intlist',
        'build_doublelist',
        'build_boollist',
        'build_tensorlist',
        'restore_type_tag',
    )
}


def _find(module: str, name: str) -> Allowed:
    """A class of the archive becomes a holder; the rest is as in a checkpoint."""
    if module.split('.')[0] == '__torch__':
        return Allowed(name, new=lambda: Holder(module, name))
    return ALLOWED_HERE.get((module, name)) or find(module, name)


class _Modules(Archive):
    def __init__(self, file: zipfile.ZipFile, root: str) -> None:
        super().__init__(file, root)
        self.known_names: dict[tuple[str, str], list[str] | None] = {}
        self.characters = 0

    def tensor_names(self, holder: Holder) -> list[str] | None:
        """Names of its parameters and buffers; `None` for what is no module."""
        kind = holder.module, holder.name
        if kind not in self.known_names:
            self.known_names[kind] = self._read_names(holder)
        return self.known_names[kind]

    def _read_names(self, holder: Holder) -> list[str] | None:
        path = f'code/{holder.module.replace(".", "/")}.py'
        code = self.read(path).decode()
        found = re.search(
            rf'^class {re.escape(holder.name)}\(Module\):\n((?:  __\w+__ = .*\n)*)',
            code,
            re.MULTILINE,
        )
        if found is None:
            return None
        lists = re.findall(
            r'^  __(?:parameters|buffers)__ = \[(.*)\]$', found[1], re.MULTILINE
        )
        return [name for text in lists for name in re.findall(r'"([^"]*)"', text)]

    def tensors(self, holder: Holder, prefix: str = '') -> Iterator[tuple[str, Tensor]]:
        names = self.tensor_names(holder)
        if names is None:
            return
        self.characters += sum(
            len(prefix) + len(str(name)) + 1 for name in (*names, *holder.attributes)
        )
        if self.characters > MOST_CHARACTERS:
            raise ValueError(
                f'its names have more than {MOST_CHARACTERS} characters together'
            )
        for name in names:
            value = holder.attributes[name]
            if isinstance(value, StoredTensor):
                yield prefix + name, self.load_tensor(value)
        for name, value in holder.attributes.items():
            if isinstance(value, Holder):
                yield from self.tensors(value, f'{prefix}{name}.')


def is_torchscript(path: Path) -> bool:
    """Whether the file is such an archive."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as file:
        return root_of(file, CONSTANTS) is not None


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """What `torch.jit.load(path).state_dict()` gives, without running any code.

    Raises:
        NeedsCodeError: if the archive holds other things than modules and tensors.
        Exception: of many kinds, if it is damaged.
    """
    with opened_zip(path) as file:
        archive = _Modules(file, root_of(file, CONSTANTS) or '')
        content = archive.read('data.pkl')
        module = PlainUnpickler(content, _find, storage_of).load()
        if not isinstance(module, Holder):
            raise ValueError('it holds no module')
        return dict(archive.tensors(module))
