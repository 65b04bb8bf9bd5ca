"""TorchScript archives, OpenAI's form of CLIP, read as data.

`torch.jit.load` runs code of the archive (`__setstate__` of its classes). Here a class
is a plain holder of attributes; of the code only the lists of tensor names are read.
"""

from __future__ import annotations

import io
import pickle
import re
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = {
    'DoubleStorage': torch.float64,
    'FloatStorage': torch.float32,
    'HalfStorage': torch.float16,
    'BFloat16Storage': torch.bfloat16,
    'LongStorage': torch.int64,
    'IntStorage': torch.int32,
    'ShortStorage': torch.int16,
    'CharStorage': torch.int8,
    'ByteStorage': torch.uint8,
    'BoolStorage': torch.bool,
}

# No compressed record is unpacked beyond this; those of tensors are not compressed.
MOST_BYTES = 1 << 28


class NeedsCodeError(ValueError):
    """The file can't be read without running code in it."""


class _Storage(NamedTuple):
    dtype: torch.dtype
    key: str
    numel: int


class _StoredTensor(NamedTuple):
    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Holder:
    """An object of a class of the archive."""

    module: str
    name: str
    attributes: dict[str, Any]

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise NeedsCodeError(f'{self.module}.{self.name} unpacks its own state')
        self.attributes = state


class _Function(NamedTuple):
    """What a pickle may call. Being a tuple, no pickle can set its attributes."""

    function: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)


FUNCTIONS = {
    ('torch._utils', '_rebuild_tensor_v2'): _Function(
        lambda storage, offset, size, stride, *_: _StoredTensor(
            storage, offset, size, stride
        )
    ),
    ('collections', 'OrderedDict'): _Function(dict),  # hooks: always empty
} | {
    ('torch.jit._pickle', name): _Function(lambda value, *_: value)
    for name in (
        'build_intlist',
        'build_doublelist',
        'build_boollist',
        'build_tensorlist',
        'restore_type_tag',
    )
}


class _Unpickler(pickle.Unpickler):
    """Makes holders, plain values and descriptions of tensors, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split('.')[0] == '__torch__':
            return type('Holder', (_Holder,), {'module': module, 'name': name})
        if module == 'torch' and name in DTYPES:
            return name
        if (module, name) in FUNCTIONS:
            return FUNCTIONS[module, name]
        raise NeedsCodeError(f'it names {module}.{name}')

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage, key, _, numel = pid
        if kind != 'storage':
            raise NeedsCodeError(f'it holds a {kind}')
        return _Storage(DTYPES[storage], key, numel)


class _Archive:
    def __init__(self, file: zipfile.ZipFile) -> None:
        self.file = file
        self.root = _root(file)
        self.storages: dict[_Storage, Tensor] = {}

    def read(self, name: str, *, optional: bool = False) -> bytes:
        """A record of the zip file; nothing is ever written to disk."""
        try:
            info = self.file.getinfo(f'{self.root}/{name}')
        except KeyError:
            if optional:
                return b''
            raise
        if info.compress_type != zipfile.ZIP_STORED and info.file_size > MOST_BYTES:
            raise ValueError(
                f'{name} is compressed and would take {info.file_size} bytes'
            )
        return self.file.read(info)

    def load_storage(self, storage: _Storage) -> Tensor:
        if storage not in self.storages:
            content = bytearray(self.read(f'data/{storage.key}'))
            size = storage.numel * storage.dtype.itemsize
            if len(content) != size:
                raise ValueError(f'{len(content)} bytes of {size} in {storage.key}')
            self.storages[storage] = (
                torch.frombuffer(content, dtype=storage.dtype)
                if content
                else torch.empty(0, dtype=storage.dtype)
            )
        return self.storages[storage]

    def load_tensor(self, stored: _StoredTensor) -> Tensor:
        # Torch checks that this stays within the storage.
        storage = self.load_storage(stored.storage)
        return storage.as_strided(stored.size, stored.stride, stored.offset)

    def tensor_names(self, holder: _Holder) -> list[str] | None:
        """Names of its parameters and buffers; `None` for what is no module."""
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

    def tensors(
        self, holder: _Holder, prefix: str = ''
    ) -> Iterator[tuple[str, Tensor]]:
        names = self.tensor_names(holder)
        if names is None:
            return
        for name in names:
            value = holder.attributes[name]
            if isinstance(value, _StoredTensor):
                yield prefix + name, self.load_tensor(value)
        for name, value in holder.attributes.items():
            if isinstance(value, _Holder):
                yield from self.tensors(value, f'{prefix}{name}.')


def _root(file: zipfile.ZipFile) -> str | None:
    """The folder that all of a TorchScript archive is in."""
    for name in file.namelist():
        if name.endswith('/constants.pkl'):
            return name.removesuffix('/constants.pkl')
    return None


def is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as file:
        return _root(file) is not None


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """What `torch.jit.load(path).state_dict()` gives, without running any code.

    Raises:
        NeedsCodeError: if the archive holds other things than modules and tensors.
        Exception: of many kinds, if it is damaged.
    """
    with zipfile.ZipFile(path) as file:
        archive = _Archive(file)
        order = archive.read('byteorder', optional=True).decode() or 'little'
        if order != sys.byteorder:
            raise ValueError(f'its bytes are in the order {order}')
        module = _Unpickler(io.BytesIO(archive.read('data.pkl'))).load()
        if not isinstance(module, _Holder):
            raise ValueError('it holds no module')
        return dict(archive.tensors(module))
