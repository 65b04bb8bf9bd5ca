"""What `torch.save` writes, read as data: without `torch.load`, which calls functions.

With `weights_only=True` these are few, but more than a state dict needs: some take as
much memory as a file of 100 bytes asks for, and some versions of torch ran code.
"""

from __future__ import annotations

import math
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from pyiqa_clipkd.header import MOST_DIMENSIONS
from pyiqa_clipkd.plain_pickle import Allowed, NeedsCodeError, PlainUnpickler, dict_of

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

# All compressed records together take no more (those of tensors are not compressed), no
# pickle is larger, and no tensor whose elements share their place.
MOST_BYTES = 1 << 28

# Where training loops of this field put the tensors inside a checkpoint.
WRAPPERS = ('params', 'params_ema', 'state_dict', 'model')

# The first pickle of a file of torch before 1.6.
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


class Storage(NamedTuple):
    dtype: torch.dtype
    key: str
    numel: int


class StoredTensor(NamedTuple):
    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def _value(value: Any, *_: Any) -> Any:
    return value


def _device(*parts: Any) -> str:
    """For instance `cuda:0`: short, as each call may be given what another one gave."""
    if len(parts) > 2 or any(type(part) not in (str, int) for part in parts):
        raise ValueError('it has a device that is none')
    name = ':'.join(map(str, parts))
    if len(name) > 32:
        raise ValueError(f'it has a device with a name of {len(name)} characters')
    return name


# What a checkpoint may name, and what stands for calling it.
REBUILD = Allowed(
    'tensor',
    lambda storage, offset, size, stride, *_: StoredTensor(
        storage, offset, size, stride
    ),
)
ALLOWED = {
    ('torch._utils', '_rebuild_tensor'): REBUILD,
    ('torch._utils', '_rebuild_tensor_v2'): REBUILD,
    ('torch._utils', '_rebuild_parameter'): Allowed('parameter', _value),
    ('torch', 'Size'): Allowed('Size', _value),
    ('torch', 'device'): Allowed('device', _device),
    ('collections', 'OrderedDict'): Allowed('OrderedDict', dict_of, dict),
    ('collections', 'Counter'): Allowed('Counter', dict_of, dict),
} | {('torch', name): Allowed(name) for name in DTYPES}


def find(module: str, name: str) -> Allowed:
    """What a checkpoint may name.

    Raises:
        NeedsCodeError: of everything else.
    """
    if (module, name) not in ALLOWED:
        raise NeedsCodeError(f'it names {module}.{name}')
    return ALLOWED[module, name]


def storage_of(pid: Any) -> Storage:
    """What a persistent id of torch stands for; its first five parts matter."""
    if not isinstance(pid, tuple) or len(pid) not in (5, 6):
        raise ValueError('it has a storage without description')
    kind, storage, key, _, numel, *view = pid
    if kind != 'storage':
        raise NeedsCodeError(f'it holds a {kind}')
    if not isinstance(storage, Allowed) or view not in ([], [None]):
        raise ValueError('it has a storage of an unknown type')
    return Storage(DTYPES[storage.name], _checked(key, str), _checked(numel, int))


def _checked(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f'a {type(value).__name__} stands for a {kind.__name__}')
    return value


class Storages:
    """Bytes by key, each made into a tensor once."""

    def __init__(self) -> None:
        self.known: dict[Storage, Tensor] = {}

    def content(self, storage: Storage) -> bytes | bytearray:
        raise NotImplementedError

    def load_storage(self, storage: Storage) -> Tensor:
        if storage not in self.known:
            content = bytearray(self.content(storage))
            size = storage.numel * storage.dtype.itemsize
            if len(content) != size:
                raise ValueError(f'{len(content)} bytes of {size} in {storage.key}')
            self.known[storage] = (
                torch.frombuffer(content, dtype=storage.dtype)
                if content
                else torch.empty(0, dtype=storage.dtype)
            )
        return self.known[storage]

    def load_tensor(self, stored: StoredTensor) -> Tensor:
        """A view of its storage; torch checks that it stays within."""
        if not isinstance(stored.storage, Storage):
            raise ValueError('it has a tensor without a storage')
        storage = self.load_storage(stored.storage)
        most = max(len(storage), MOST_BYTES // 8)
        sizes = [_checked(size, int) for size in stored.size]
        if len(sizes) > MOST_DIMENSIONS or any(size > most for size in sizes):
            raise ValueError('it has a tensor of an odd size')
        if math.prod(sizes) > most:
            raise ValueError(
                f'a tensor of {math.prod(sizes)} numbers has {len(storage)}'
            )
        return storage.as_strided(stored.size, stored.stride, stored.offset)


class Archive(Storages):
    """A zip file as torch writes it; nothing is ever unpacked to disk.

    Args:
        file: the zip file.
        root: the folder that all of it is in.
    """

    def __init__(self, file: zipfile.ZipFile, root: str) -> None:
        super().__init__()
        self.file = file
        self.root = root
        order = self.read('byteorder', optional=True).decode() or 'little'
        if order != sys.byteorder:
            raise ValueError(f'its bytes are in the order {order}')

    def content(self, storage: Storage) -> bytes:
        return self.read(f'data/{storage.key}')

    def read(self, name: str, *, optional: bool = False) -> bytes:
        """A record of the zip file."""
        try:
            info = self.file.getinfo(f'{self.root}/{name}')
        except KeyError:
            if optional:
                return b''
            raise ValueError(f'it has no {name}') from None
        if info.file_size > MOST_BYTES and name.endswith('.pkl'):
            raise ValueError(f'{name} takes {info.file_size} bytes')
        return self.file.read(info)


@contextmanager
def opened_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    """A zip file none of whose parts is another one's, too.

    Raises:
        ValueError: if its parts would be larger than the file, or those that are
            compressed than `MOST_BYTES`.
    """
    with zipfile.ZipFile(path) as file:
        stored, packed = 0, [0]
        for info in file.infolist():
            if info.compress_type == zipfile.ZIP_STORED:
                stored += info.file_size
            else:
                packed.append(info.file_size)
        if stored > path.stat().st_size:
            raise ValueError('its parts are larger than the file')
        if sum(packed) > MOST_BYTES:
            raise ValueError(
                f'its compressed parts would take {sum(packed)} bytes, one of them '
                f'{max(packed)} bytes'
            )
        yield file


def root_of(file: zipfile.ZipFile, name: str) -> str | None:
    """The folder that a record is in."""
    for entry in file.namelist():
        if entry.endswith(f'/{name}'):
            return entry.removesuffix(f'/{name}')
    return None


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The state dict in a file of `torch.save`, of any version of torch.

    Raises:
        NeedsCodeError: if it holds more than tensors and plain values.
        TypeError: if it holds no state dict.
        Exception: of many kinds, if it is damaged.
    """
    if not zipfile.is_zipfile(path):
        with path.open('rb') as file:
            return _read_legacy(file)
    with opened_zip(path) as zipped:
        root = root_of(zipped, 'data.pkl')
        if root is None:
            raise ValueError('a zip file, but none of torch')
        archive = Archive(zipped, root)
        content = PlainUnpickler(archive.read('data.pkl'), find, storage_of).load()
        return _state_dict(content, archive)


def _state_dict(content: Any, storages: Storages) -> dict[str, Tensor]:
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    if not isinstance(content, Mapping):
        is_tensor = isinstance(content, StoredTensor)
        raise TypeError('Tensor' if is_tensor else type(content).__name__)
    return {
        str(name).removeprefix('module.'): storages.load_tensor(value)
        for name, value in content.items()
        if isinstance(value, StoredTensor)
    }


class _LegacyStorages(Storages):
    """Behind the pickles: a count and the numbers of each storage."""

    def __init__(self, file: BinaryIO, keys: list[Any], known: set[Storage]) -> None:
        super().__init__()
        by_key = {storage.key: storage for storage in known}
        self.bytes: dict[str, bytes] = {}
        for key in keys:
            storage = by_key[_checked(key, str)]
            numel = int.from_bytes(file.read(8), 'little', signed=True)
            if numel != storage.numel or numel < 0:
                raise ValueError(f'{numel} numbers of {storage.numel} in {key}')
            self.bytes[key] = file.read(numel * storage.dtype.itemsize)

    def content(self, storage: Storage) -> bytes:
        return self.bytes[storage.key]


def _read_legacy(file: BinaryIO) -> dict[str, Tensor]:
    """Five pickles (magic number, version, machine, content, keys), then the bytes."""
    known: set[Storage] = set()

    def remember(pid: Any) -> Storage:
        known.add(storage := storage_of(pid))
        return storage

    def load() -> Any:
        return PlainUnpickler(file, find, remember).load()

    if load() != LEGACY_MAGIC:
        raise ValueError('a pickle, but none of torch')
    load()
    if load().get('little_endian') is not (sys.byteorder == 'little'):
        raise ValueError('its bytes are in another order')
    content, keys = load(), load()
    return _state_dict(content, _LegacyStorages(file, keys, known))
