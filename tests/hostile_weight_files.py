"""Weight files from strangers: each with what is wrong with it, made by code."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from pyiqa_clipkd.description import KEY
from pyiqa_clipkd.network import CLIPKDStudent
from pyiqa_clipkd.weights import CONFIG_KEY, pack_int8, tensors_hash

# A file whose being there proves that code was run, and one that is nobody's business.
CANARY, SECRET = Path('canary'), Path('secret.safetensors')

Make = Callable[[Path], bytes | None]


class Trap:
    """A pickle of it creates the canary when somebody loads it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f'touch {CANARY}',)


def student() -> CLIPKDStudent:
    torch.manual_seed(0)
    return CLIPKDStudent('timm:test_resnet', embed_dim=16, input_size=32)


STATE: dict[str, Tensor] = dict(student().state_dict())
CONFIG = student().config
PLAIN = {name: tensor for name, tensor in STATE.items() if name != CONFIG_KEY}


def published(
    tensors: dict[str, Tensor] | None = None, *, whole: bool = True, **config: Any
) -> bytes:
    """A file as `publish` makes it, but for what is changed."""
    tensors = PLAIN if tensors is None else tensors
    metadata: dict[str, Any] = {'config': CONFIG | config}
    if not whole:
        metadata['tensors_sha256'] = tensors_hash(PLAIN)
    return save(tensors, {KEY: json.dumps(metadata)})


def saved(content: Any, *, zipped: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def with_pickle(data_pkl: bytes, *, name: str = 'archive/data.pkl') -> bytes:
    """A checkpoint, otherwise whole, with another pickle."""
    file = io.BytesIO()
    whole = zipfile.ZipFile(io.BytesIO(saved(PLAIN)))
    with zipfile.ZipFile(file, 'w') as new:
        for info in whole.infolist():
            if not info.filename.endswith('/data.pkl'):
                new.writestr(
                    f'archive/{info.filename.split("/", 1)[1]}', whole.read(info)
                )
        new.writestr(name, data_pkl)
    return file.getvalue()


def torchscript(data_pkl: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w') as new:
        new.writestr('a/data.pkl', data_pkl)
        new.writestr('a/constants.pkl', b'\x80\x02).')
        code = 'class M(Module):\n  __parameters__ = ["w", ]\n'
        new.writestr('a/code/__torch__/m.py', code)
    return file.getvalue()


def header(text: bytes, data: bytes = b'', *, length: int | None = None) -> bytes:
    """A safetensors file of a header as it stands."""
    return struct.pack('<Q', len(text) if length is None else length) + text + data


def entries(*items: str) -> bytes:
    return ('{' + ','.join(items) + '}').encode()


def entry(
    name: str, first: int, last: int, *, dtype: str = 'F32', shape: Any = (1,)
) -> str:
    place = {'dtype': dtype, 'shape': list(shape), 'data_offsets': [first, last]}
    return f'"{name}": {json.dumps(place)}'


def tar(first_name: str) -> bytes:
    """torch's oldest form, whose members a loader may unpickle freely."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode='w') as archive:
        for name in (first_name, 'storages', 'tensors', 'pickle'):
            content = pickle.dumps(Trap())
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def lying_zip(change: Callable[[bytearray, int], None], *, packed: bool) -> bytes:
    """The zip file's list of parts says something else than the parts."""
    file = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    with zipfile.ZipFile(file, 'w', method) as new:
        for name in ('data.pkl', 'data/0', 'data/1'):
            new.writestr(f'archive/{name}', bytes(4096))
    content = bytearray(file.getvalue())
    place = content.find(b'PK\x01\x02')
    while place >= 0:
        change(content, place)
        place = content.find(b'PK\x01\x02', place + 1)
    return bytes(content)


def _sizes(content: bytearray, place: int) -> None:
    struct.pack_into('<I', content, place + 24, 0xFFFFFFF0)


def _same_place(content: bytearray, place: int) -> None:
    """All parts are the first one, and claim what all have together."""
    struct.pack_into('<II', content, place + 20, 8192, 8192)
    struct.pack_into('<I', content, place + 42, 0)


def changed(name: str, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    return {n: change(t) if n == name else t for n, t in PLAIN.items()}


def _poked(value: float) -> dict[str, Tensor]:
    tensor = PLAIN['head.anchors'].clone()
    tensor[0, 0] = value
    return {**PLAIN, 'head.anchors': tensor}


def without(*names: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in PLAIN.items() if name not in names}


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


SYSTEM = b'cposix\nsystem\n'
TOUCH = f'touch {CANARY}'.encode()
CALL = b'(U' + bytes([len(TOUCH)]) + TOUCH + b'tR'
ORDERED = b'ccollections\nOrderedDict\n'
REBUILD = b'ctorch._utils\n_rebuild_tensor_v2\n'
STORAGE = b'((Vstorage\nctorch\nFloatStorage\nV0\nVcpu\nI%d\ntQ'


def tensor_pickle(size: bytes, stride: bytes, numel: int) -> bytes:
    storage = b'(Vstorage\nctorch\nFloatStorage\nV0\nVcpu\nI%d\ntQ' % numel
    return (
        b'\x80\x02}Va\n'
        + REBUILD
        + b'('
        + storage
        + b'K\0'
        + size
        + stride
        + (b'\x89}tRs.')
    )


def _called(name: bytes, argument: bytes, *, times: int = 1) -> bytes:
    """A checkpoint in which `name` is called, and again, each time with the same."""
    return with_pickle(
        b'\x80\x02' + argument + b'q\0' + (name + b'h\0\x85R') * times + b'.'
    )


def doubling_device(times: int) -> bytes:
    """The name of each device is twice that of the one before."""
    twice = b'q\0' + b'ctorch\ndevice\nh\0h\0\x86R'
    return with_pickle(b'\x80\x02Vcuda\n' + twice * times + b'.')


def module_in_many_places(levels: int) -> bytes:
    """Each level holds the one below twice: 2^levels names of one tensor or none."""
    module = b'c__torch__.m\nM\n)\x81}(Vw\nN'
    chain = b'q\0' + module + b'Va\nh\0Vb\nh\0ub'
    return torchscript(b'\x80\x02' + module + b'ub' + chain * levels + b'.')


def packed_parts(size: int, count: int) -> bytes:
    """A zip file whose compressed parts take little, and unpacked much."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w', zipfile.ZIP_DEFLATED, compresslevel=1) as new:
        for number in range(count):
            new.writestr(f'archive/data/{number}', bytes(size))
        new.writestr('archive/data.pkl', b'\x80\x02}.')
    return file.getvalue()


def _unpickled(name: bytes) -> bytes:
    """A checkpoint in which `name` is called with one text."""
    return with_pickle(b'\x80\x02}(Va\n' + name + CALL + b'u.')


def _parts(name: str, whole: Callable[[], bytes]) -> dict[str, Make]:
    """A file that ends early, at many places."""

    def cut(percent: int) -> Make:
        return lambda _: whole()[: len(whole()) * percent // 100]

    return {f'{n} percent of {name}': cut(n) for n in (1, 20, 50, 80, 99)}


# What would run code, or is a pickle that nothing of ours reads. Each says 'refused'.
CODE: dict[str, Make] = {
    'checkpoint.pth': lambda _: saved({**STATE, 'x': Trap()}),
    'old checkpoint.pth': lambda _: saved({**STATE, 'x': Trap()}, zipped=False),
    'pickle.bin': lambda _: pickle.dumps({'state_dict': Trap()}, protocol=2),
    'newest pickle.ckpt': lambda _: pickle.dumps({'state_dict': Trap()}, protocol=5),
    'pickle called safetensors.safetensors': lambda _: pickle.dumps(Trap()),
    'checkpoint called safetensors.safetensors': lambda _: saved({'params': Trap()}),
    'deep inside.pth': lambda _: saved({'state_dict': {'a': [{'b': (Trap(),)}]}}),
    'as metadata of a state dict.pth': lambda _: saved(
        {'params': STATE, 'opt': Trap()}
    ),
    'in a subclass of dict.pth': lambda _: with_pickle(
        b'\x80\x02ccollections\ndefaultdict\n(' + SYSTEM + b'tR.'
    ),
    'GLOBAL and REDUCE.pth': lambda _: with_pickle(b'\x80\x02' + SYSTEM + CALL + b'.'),
    'INST.pth': lambda _: with_pickle(b'(V' + TOUCH + b'\niposix\nsystem\n.'),
    'OBJ.pth': lambda _: with_pickle(b'\x80\x02(' + SYSTEM + b'V' + TOUCH + b'\no.'),
    'STACK_GLOBAL.pth': lambda _: with_pickle(
        b'\x80\x04\x8c\x05posix\x8c\x06system\x93' + CALL + b'.'
    ),
    'NEWOBJ.pth': lambda _: with_pickle(
        b'\x80\x02' + SYSTEM + b'V' + TOUCH + b'\n\x85\x81.'
    ),
    'NEWOBJ_EX.pth': lambda _: with_pickle(
        b'\x80\x04' + SYSTEM + b'V' + TOUCH + b'\n\x85}\x92.'
    ),
    'BUILD.pth': lambda _: with_pickle(b'\x80\x02csubprocess\nPopen\n)\x81}b.'),
    'EXT1.pth': lambda _: with_pickle(b'\x80\x02\x82\x01' + CALL + b'.'),
    'a class with escapes.pth': lambda _: with_pickle(b'\x80\x02cposix\x1b[31m\nx\n.'),
    'PERSID.pth': lambda _: with_pickle(b'P' + TOUCH + b'\n.'),
    'eval.pth': lambda _: _unpickled(b'cbuiltins\neval\n'),
    'getattr.pth': lambda _: _unpickled(b'cbuiltins\ngetattr\n'),
    'torch.load.pth': lambda _: _unpickled(b'ctorch\nload\n'),
    'a pickle in a pickle.pth': lambda _: _unpickled(
        b'ctorch.storage\n_load_from_bytes\n'
    ),
    'numpy.pth': lambda _: _unpickled(b'cnumpy.core.multiarray\n_reconstruct\n'),
    'runpy.pth': lambda _: _unpickled(b'crunpy\n_run_code\n'),
    'bytes of 64 GB.pth': lambda _: with_pickle(
        b'\x80\x02cbuiltins\nbytearray\n\x8a\x05\0\0\0\0\x10\x85R.'
    ),
    'TorchScript.pt': lambda _: torchscript(pickle.dumps(Trap(), protocol=2)),
    'TorchScript with its own state.pt': lambda _: torchscript(
        b'\x80\x02c__torch__.m\nM\n)\x81(Va\ntb.'
    ),
}

# Damage, lies and bombs. Each says that the file is damaged or no weight file.
DAMAGE: dict[str, Make] = {
    'empty.pth': lambda _: b'',
    'tar.pth': lambda _: tar('sys_info'),
    'tar that looks like a pickle.pth': lambda _: tar('\x80\x02.'),
    'a buffer of 64 GB.pth': lambda _: with_pickle(
        b'\x80\x05\x96' + struct.pack('<Q', 1 << 36) + b'.'
    ),
    'a memo of 17 GB.pt': lambda _: torchscript(
        b'\x80\x02Nr' + struct.pack('<I', (1 << 31) - 1) + b'.'
    ),
    'a million steps.pth': lambda _: with_pickle(b'\x80\x02' + b'N0' * 501_000 + b'N.'),
    'tuples in tuples as a key.pth': lambda _: with_pickle(
        b'\x80\x02})' + b'\x85' * 60_000 + b'Ns.'
    ),
    'a list that is its own key.pth': lambda _: with_pickle(
        b'\x80\x02}]q\0h\0a' + b'Ns.'
    ),
    'tuples in tuples as a key of pairs.pth': lambda _: _called(
        ORDERED, b'])' + b'\x85' * 60_000 + b'N\x86a'
    ),
    'a dict of what are no pairs.pth': lambda _: _called(ORDERED, b']Vabc\na'),
    'a dict of text.pth': lambda _: _called(ORDERED, b'Vab\n'),
    'a dict of pairs again and again.pth': lambda _: _called(
        ORDERED, b'}(' + b''.join(b'I%d\nN' % n for n in range(2000)) + b'u', times=600
    ),
    'a device that is a list.pth': lambda _: _called(b'ctorch\ndevice\n', b']'),
    'a device whose name doubles.pth': lambda _: doubling_device(50),
    'a tensor of many dimensions.pth': lambda _: with_pickle(
        tensor_pickle(b'(' + b'K\1' * 17 + b't', b'(' + b'K\1' * 17 + b't', 432)
    ),
    'parts that unpack to 320 MB.pth': lambda _: packed_parts(40 << 20, 8),
    'a module in 2^50 places.pt': lambda _: module_in_many_places(50),
    'a name twice.pth': lambda _: with_pickle(b'\x80\x02}(Va\nK\1Va\nK\2u.'),
    'a tensor of 4 TB in 4 bytes.pth': lambda _: with_pickle(
        tensor_pickle(b'\x8a\x05\0\0\0\0\x10\x85', b'K\0\x85', 1)
    ),
    'a storage of 4 TB.pth': lambda _: with_pickle(
        tensor_pickle(b'K\1\x85', b'K\1\x85', 1 << 40)
    ),
    'a part that leads outside.pth': lambda _: with_pickle(
        tensor_pickle(b'K\1\x85', b'K\1\x85', 1).replace(b'V0', b'V../../secret')
    ),
    'an odd description.pth': lambda _: saved({**PLAIN, CONFIG_KEY: torch.rand(4)}),
    'a description of 1 GB.pth': lambda _: saved(
        {**PLAIN, CONFIG_KEY: torch.zeros(1, dtype=torch.uint8).expand(1 << 30)}
    ),
    'a zip bomb.pth': lambda _: lying_zip(_sizes, packed=True),
    'a zip file of one part many times.pth': lambda _: lying_zip(
        _same_place, packed=False
    ),
    'a zip file of something.pth': lambda _: with_pickle(b'N.', name='archive/x'),
    **_parts('a checkpoint.pth', lambda: saved(STATE)),
    **_parts('an old one.pth', lambda: saved(STATE, zipped=False)),
    **_parts('a published file.safetensors', published),
    'a byte of a checkpoint changed.pth': lambda _: flipped(saved(STATE), -90_000),
    'a header of 2^63 bytes.safetensors': lambda _: header(b'{}', length=1 << 63),
    'a header one byte too long.safetensors': lambda _: header(b'{}', length=3),
    'a header of 11 MB.safetensors': lambda _: header(b'{' + b' ' * (11 << 20) + b'}'),
    'a header of a million names.safetensors': lambda _: header(
        entries(*(entry(f'{n:07}', 0, 0, shape=(0,)) for n in range(150_000)))
        + b' ' * 9
        + b' ' * (4 << 20)
    ),
    'overlapping tensors.safetensors': lambda _: header(
        entries(entry('a', 0, 4), entry('b', 2, 6)), bytes(6)
    ),
    'the same bytes twice.safetensors': lambda _: header(
        entries(entry('a', 0, 4), entry('b', 0, 4)), bytes(4)
    ),
    'a hole.safetensors': lambda _: header(
        entries(entry('a', 0, 4), entry('b', 8, 12)), bytes(12)
    ),
    'a name twice.safetensors': lambda _: header(
        entries(entry('a', 0, 4), entry('a', 0, 4)), bytes(4)
    ),
    'another type.safetensors': lambda _: header(
        entries(entry('a', 0, 4, dtype='F16')), bytes(4)
    ),
    'an unknown type.safetensors': lambda _: header(
        entries(entry('a', 0, 4, dtype='F4096')), bytes(4)
    ),
    'a negative shape.safetensors': lambda _: header(
        entries(entry('a', 0, 4, shape=(-1, -1))), bytes(4)
    ),
    'a tensor of 4 EB.safetensors': lambda _: header(
        entries(entry('a', 0, 4, shape=(1 << 60,))), bytes(4)
    ),
    'a tensor of 300,000 dimensions.safetensors': lambda _: header(
        entries(entry('a', 0, 4, shape=(9,) * 300_000)), bytes(4)
    ),
    'a dimension of 4000 digits.safetensors': lambda _: header(
        entries(entry('a', 0, 4, shape=(10**4000, 0))), bytes(4)
    ),
    'offsets beyond the end.safetensors': lambda _: header(
        entries(entry('a', 1 << 50, (1 << 50) + 4)), bytes(4)
    ),
    'brackets in brackets.safetensors': lambda _: header(b'{"a":' + b'[' * 500_000),
    'a number of a million digits.safetensors': lambda _: header(
        b'{"a":' + b'9' * 1_000_000 + b'}'
    ),
    'metadata that is no JSON.safetensors': lambda _: save(PLAIN, {KEY: '{no'}),
    'metadata that is a list.safetensors': lambda _: save(PLAIN, {KEY: '[1]'}),
    'metadata in brackets.safetensors': lambda _: save(PLAIN, {KEY: '[' * 500_000}),
    'scales that blow up.safetensors': lambda _: save(
        {
            'a': torch.zeros(60_000, 1, dtype=torch.int8),
            'a.int8_scale': torch.zeros(1, 60_000),
        }
    ),
}


def _config(**config: Any) -> Make:
    return lambda _: published(**config)


# Whole files that lie about their network. Each is refused, with what is wrong.
LIES: dict[str, Make] = {
    f'{name}.safetensors': make
    for name, make in {
        'an input of a gigapixel': _config(input_size=10**9),
        'a negative input': _config(input_size=-1),
        'an input that is a text': _config(input_size='224'),
        'an input that is true': _config(input_size=True),
        'an embedding of a billion': _config(embed_dim=10**9),
        'no embedding': _config(embed_dim=0),
        'another embedding': _config(embed_dim=24),
        'one level': _config(levels=['good']),
        'levels that are lists': _config(levels=[[1], [2]]),
        'a million levels': _config(levels=[str(n) for n in range(10**5)]),
        'a temperature of NaN': _config(temperature=float('nan')),
        'a negative temperature': _config(temperature=-1),
        'a temperature of infinity': _config(temperature=float('inf')),
        'a head that is unknown': _config(head='../x'),
        'a hub of timm': _config(encoder='timm:hf-hub:stranger/evil'),
        'another hub of timm': _config(encoder='timm:hf_hub:stranger/evil'),
        'a folder of timm': _config(encoder='timm:local-dir:/tmp'),
        'a hub of open_clip': _config(
            type='CLIPLikert', encoder='open_clip:hf-hub:stranger/evil', pretrained=None
        ),
        'a folder of open_clip': _config(
            type='CLIPLikert', encoder='open_clip:local-dir:.', pretrained=None
        ),
        'an address': _config(encoder='https://example.org/evil.safetensors'),
        'a path': _config(encoder='timm:../../secret'),
        'an absolute path': _config(encoder='timm:/etc/passwd'),
        'a NUL': _config(encoder='timm:test_resnet\0'),
        'no encoder': _config(encoder=None),
        'an unknown encoder': _config(encoder='timm:no_such_network'),
        'an encoder of gigabytes': _config(encoder='timm:eva_giant_patch14_224'),
        'an encoder of gigabytes of open_clip': lambda _: save(
            PLAIN,
            {KEY: json.dumps({'config': {
                'type': 'CLIPLikert', 'encoder': 'open_clip:ViT-bigG-14',
                'pretrained': None, 'input_size': 224, 'temperature': 0.01,
            }})},
        ),
        'another encoder': _config(encoder='timm:test_efficientnet'),
        'a preset': _config(encoder='swin'),
        'weights of a hub': _config(encoder_weights='timm'),
        'weights of another file': _config(encoder_weights=str(SECRET)),
        'weights of a device': _config(encoder_weights='/dev/zero'),
        'a download': _config(type='CLIPLikert', pretrained='openai'),
        'a billion crops': _config(crops=10**9),
        'another kind of network': _config(type='GeneralNet'),
        'a kind that is a list': _config(type=['CLIPKDStudent']),
        'a description that is a list': lambda _: save(
            PLAIN, {KEY: json.dumps({'config': [1]})}
        ),
        'no description': lambda _: save(PLAIN),
        'NaN': lambda _: published(_poked(float('nan'))),
        'infinity': lambda _: published(_poked(float('inf'))),
        'whole numbers': lambda _: published(
            changed('head.anchors', lambda tensor: tensor.to(torch.int64))
        ),
        'a tensor missing': lambda _: published(without('encoder.projection.bias')),
        'a tensor too much': lambda _: published({**PLAIN, 'x': torch.ones(1)}),
        'a name of escapes': lambda _: published(
            {**PLAIN, '\x1b[2J\x9b\u202e' * 2000: torch.ones(1)}
        ),
        'another shape': lambda _: published(
            changed('head.anchors', lambda tensor: tensor.T.contiguous())
        ),
        'nothing': lambda _: published({}),
        'scales that are NaN': lambda _: published(
            pack_int8({**PLAIN, 'head.anchors': torch.full((5, 40_000), float('nan'))})
        ),
        'a bit changed': lambda _: flipped(published(whole=False), -9),
    }.items()
} | {
    'a checkpoint of another kind.pth': lambda _: saved({'params': without('x')}),
    'a memo of 17 GB.pth': lambda _: with_pickle(
        b'\x80\x02Nr' + struct.pack('<I', (1 << 31) - 1) + b'.'
    ),
    'a checkpoint of a list.pth': lambda _: saved([1, 2]),
    'a checkpoint of NaN.pth': lambda _: saved(
        {**STATE, **_poked(float('nan'))}
    ),
}  # fmt: skip


def _link(target: str) -> Make:
    return lambda path: path.symlink_to(target)


def _sparse(path: Path) -> None:
    with path.open('wb') as file:
        file.truncate(1 << 40)


# No files at all, or none that ends.
PLACES: dict[str, Make] = {
    'a link to a device.safetensors': _link('/dev/zero'),
    'a link to a tape that ends.pth': _link('/dev/null'),
    'a link to nothing.pth': _link('nowhere'),
    'a link to itself.pth': _link('a link to itself.pth'),
    'a pipe.safetensors': lambda path: os.mkfifo(path),
    'a folder.safetensors': lambda path: path.mkdir(),
    'a terabyte.safetensors': _sparse,
}

ALL = {**CODE, **DAMAGE, **LIES, **PLACES}


def write_all(folder: Path, makers: dict[str, Make] = ALL) -> list[Path]:
    """Write them into a folder that may be the working directory."""
    for name, make in makers.items():
        content = make(folder / name)
        if content is not None:
            (folder / name).write_bytes(content)
    return [folder / name for name in makers]
