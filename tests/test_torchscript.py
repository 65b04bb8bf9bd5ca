"""TorchScript archives against `torch.jit.load`, and that none of their code runs."""

from __future__ import annotations

import pickle
import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyiqa_clipkd import checkpoints, plain_pickle, torchscript
from pyiqa_clipkd.torchscript import read_torchscript
from pyiqa_clipkd.weights import read_weights


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer('late', torch.rand(4))
        self.register_buffer('nothing', None)
        self.gain = nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.gain + self.late


class Various(nn.Module):
    """Everything that a state dict can have, and attributes that it hasn't."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.tied = self.block
        self.blocks = nn.ModuleList([Block(), nn.Sequential(nn.BatchNorm1d(4))])
        self.weights = nn.ParameterList([nn.Parameter(torch.rand(4))])
        self.input_resolution = 32
        self.sizes = [1, 2]
        self.factors = [1.0, 2.0]
        self.table = {'a': 1}
        self.attn_mask = torch.rand(4)
        self.masks = [torch.rand(4)]
        storage = torch.rand(20)
        self.register_buffer('start', storage[2:6])
        self.register_buffer('steps', storage[4:12:2])
        self.register_buffer('turned', torch.rand(2, 4).T)
        self.register_buffer('same', torch.rand(1).expand(4))
        self.register_buffer('number', torch.tensor(77))
        self.register_buffer('flags', torch.tensor([True, False, True, True]))
        self.register_buffer('bytes', torch.arange(4, dtype=torch.uint8))
        self.register_buffer('empty', torch.empty(0, 4))
        self.register_buffer('brief', torch.rand(4).bfloat16())
        self.register_buffer('passing', torch.rand(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = (
            self.tied(self.block(x)) * self.attn_mask.to(x.dtype)
            + self.start
            + self.passing
        )
        for block in self.blocks:
            x = block(x)
        return x


class Child(nn.Module):
    """The code of TorchScript that runs when somebody loads an archive of it."""

    def __init__(self, file: str) -> None:
        super().__init__()
        self.file = file
        self.weight = nn.Parameter(torch.rand(2))

    @torch.jit.export
    def __getstate__(self) -> tuple[str, Tensor, bool]:
        return self.file, self.weight, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, Tensor, bool]) -> None:
        self.file = state[0]
        self.weight = state[1]  # type: ignore[assignment]
        self.training = state[2]
        print('executed')
        # Kept, for the compiler drops what nobody uses.
        file = torch.from_file(self.file, shared=True, size=4)
        self.weight = file  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Parent(nn.Module):
    def __init__(self, file: str) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.child = Child(file)

    def forward(self, x: Tensor) -> Tensor:
        return self.child(self.linear(x))


class Trap:
    """A pickle of it creates a file when somebody loads it."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.file, 'executed')


def save(module: nn.Module, path: Path, how: str = 'script') -> Path:
    # TorchScript is deprecated: that is for those who write it.
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        archive = (
            torch.jit.script(module)
            if how == 'script'
            else torch.jit.trace(module, torch.rand(2, 4), check_trace=False)
        )
        torch.jit.save(archive, str(path))
    return path


def loaded_by_torch(path: Path) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return dict(torch.jit.load(str(path), map_location='cpu').state_dict())


def changed(path: Path, data_pkl: bytes) -> Path:
    """A copy of an archive with another pickle."""
    new = path.with_name('changed.pt')
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(new, 'w') as file:
        for name in old.namelist():
            other = name.endswith('/data.pkl')
            file.writestr(name, data_pkl if other else old.read(name))
    return new


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return save(nn.Linear(4, 3), tmp_path / 'a.pt')


def assert_like_torch(path: Path) -> dict[str, Tensor]:
    actual, expected = read_torchscript(path), loaded_by_torch(path)
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert actual[name].stride() == tensor.stride(), name
        assert actual[name].storage_offset() == tensor.storage_offset(), name
        assert torch.equal(actual[name], tensor), name
        assert not actual[name].requires_grad
    return actual


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize('how', ['script', 'trace'])
def test_the_tensors_are_those_that_torch_loads(
    how: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    module = Various().eval()
    path = tmp_path / 'a.pt'
    if dtype == torch.float32 or how == 'script':
        save(module.to(dtype), path, how)
    else:  # the example is in float32
        save(nn.Sequential(Cast(dtype), module.to(dtype)), path, how)
    tensors = assert_like_torch(path)
    names = {name.removeprefix('1.') for name in tensors}
    assert {'number', 'passing', 'block.late', 'tied.gain', 'blocks.1.0.weight'} < names
    assert not names & {'attn_mask', 'input_resolution', 'masks', 'block.nothing'}
    assert read_weights(path).torchscript


class Cast(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)


def test_tensors_that_share_memory_still_do(tmp_path: Path) -> None:
    tensors = read_torchscript(save(Various(), tmp_path / 'a.pt'))
    start, steps = tensors['start'], tensors['steps']
    assert start.untyped_storage().data_ptr() == steps.untyped_storage().data_ptr()
    assert tensors['block.gain'].data_ptr() == tensors['tied.gain'].data_ptr()


@pytest.mark.parametrize('half', [False, True])
def test_an_archive_like_that_of_openai_gives_what_torch_loads(
    half: bool,
    openai_clip: Callable[..., nn.Module],
    openai_archive: Callable[[nn.Module, int, Path], Path],
    tmp_path: Path,
) -> None:
    path = openai_archive(openai_clip(), 32, tmp_path / 'clip.pt')
    if half:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            torch.jit.save(torch.jit.load(str(path)).half(), str(path))
    tensors = assert_like_torch(path)
    kinds = {x.dtype for name, x in tensors.items() if name.startswith('visual')}
    assert kinds == {torch.float16 if half else torch.float32}
    assert tensors['vocab_size'].item() == 49408


def test_reading_causes_no_warning(archive: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        read_weights(archive)


def test_an_archive_under_another_name_and_a_compressed_one_are_read(
    archive: Path, tmp_path: Path
) -> None:
    expected = read_torchscript(archive)
    shutil.copy(archive, tmp_path / 'b.safetensors')
    packed = tmp_path / 'packed.pt'
    with (
        zipfile.ZipFile(archive) as old,
        zipfile.ZipFile(packed, 'w', zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    for path in (tmp_path / 'b.safetensors', packed):
        tensors = read_weights(path).tensors
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)


# --- code -------------------------------------------------------------------------


def test_code_of_torchscript_in_an_archive_is_not_executed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    proof = tmp_path / 'proof'
    path = save(Parent(str(proof)), tmp_path / 'trap.pt')
    proof.unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r'trap\.pt is refused: .* could run code'):
        read_weights(path)
    assert not proof.exists()
    assert 'executed' not in capfd.readouterr().out

    # The trap does work: the test above could fail.
    loaded_by_torch(path)
    assert proof.exists()


def test_code_of_python_in_an_archive_is_refused_and_not_executed(
    archive: Path, tmp_path: Path
) -> None:
    trap = pickle.dumps(Trap(tmp_path / 'proof'), protocol=2)
    path = changed(archive, data_pkl=trap)
    with pytest.raises(ValueError, match=r'changed\.pt is refused: .* could run code'):
        read_weights(path)
    assert not (tmp_path / 'proof').exists()
    pickle.loads(trap)
    assert (tmp_path / 'proof').exists()


@pytest.mark.parametrize(
    'name',
    [
        'builtins eval',
        'builtins getattr',
        'os system',
        'torch load',
        'torch.jit._pickle __builtins__',
        'torch.storage _load_from_bytes',
        'torch__torch__ x',
        'collections OrderedDict.__init__',
    ],
)
def test_no_other_name_is_looked_up(name: str, archive: Path) -> None:
    module, attribute = name.split()
    path = changed(archive, data_pkl=f'c{module}\n{attribute}\n.'.encode())
    with pytest.raises(ValueError, match='is refused'):
        read_weights(path)


def known() -> list[dict[Any, Any]]:
    """All that reading goes by."""
    allowed = torchscript.ALLOWED_HERE
    return [
        dict(allowed),
        dict(checkpoints.ALLOWED),
        *(dict(vars(one)) for one in allowed.values()),
        dict(vars(plain_pickle.Holder)),
    ]


REBUILD = b'ctorch._utils\n_rebuild_tensor_v2\n'


@pytest.mark.parametrize(
    'state',
    [b'}(X\x08\x00\x00\x00functionNub.', b'N}(X\x08\x00\x00\x00functionNu\x86b.'],
    ids=['state', 'slots'],
)
@pytest.mark.parametrize(
    'target',
    [
        REBUILD,
        b'c__torch__\nM\n',
        b'ccollections\nOrderedDict\n',
        b'ctorch\nFloatStorage\n',
    ],
)
def test_a_file_cannot_change_what_later_files_are_read_with(
    target: bytes, state: bytes, archive: Path
) -> None:
    before = known()
    with pytest.raises(ValueError, match='is damaged'):
        read_weights(changed(archive, data_pkl=target + state))
    assert known() == before
    assert_like_torch(archive)


# --- damage -----------------------------------------------------------------------


def linear_pickle(
    *, key: str = '0', numel: int = 4, size: str = '', stride: str = '(K\x01t',
    offset: int = 0, kind: str = 'storage', storage: str = 'FloatStorage',
) -> bytes:  # fmt: skip
    def text(value: str) -> str:
        return f'X{chr(len(value))}\0\0\0{value}'

    size = size or f'(I{numel}\nt'
    pid = f'({text(kind)}ctorch\n{storage}\n{text(key)}{text("cpu")}I{numel}\ntQ'
    tensor = f'{REBUILD.decode()}({pid}I{offset}\n{size}{stride}\x89}}tR'
    module = f'c__torch__.mangled\nM\n)\x81}}({text("w")}{tensor}ub.'
    return ('\x80\x02' + module).encode('latin-1')


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., Path]:
    """An archive that is made by hand."""

    def make(
        data: bytes,
        *,
        record: bytes = bytes(16),
        order: str = 'little',
        packed: bool = False,
    ) -> Path:
        path = tmp_path / 'hand.pt'
        method = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
        with zipfile.ZipFile(path, 'w', method) as file:
            file.writestr('a/data.pkl', data)
            file.writestr('a/data/0', record)
            file.writestr('a/byteorder', order)
            file.writestr('a/constants.pkl', b'\x80\x02).')
            file.writestr(
                'a/code/__torch__/mangled.py',
                'class M(Module):\n  __parameters__ = ["w", ]\n  w : Tensor\n',
            )
        (tmp_path / 'secret').write_bytes(bytes(16))
        return path

    return make


def test_an_archive_made_by_hand_is_read(build: Callable[..., Path]) -> None:
    record = torch.arange(4.0).numpy().tobytes()
    tensors = read_weights(build(linear_pickle(), record=record)).tensors
    assert tensors['w'].tolist() == [0, 1, 2, 3]
    assert not (set(tensors) - {'w'})


@pytest.mark.parametrize(
    'options',
    [
        {'numel': 5},
        {'numel': 3},
        {'numel': -4},
        {'numel': 1 << 40},
        {'offset': 1},
        {'offset': -1},
        {'size': '(I5\nt'},
        {'stride': '(K\x02t'},
        {'stride': '(I-1\nt'},
        {'stride': '(t'},
        {'size': 'N'},
        {'key': '1'},
        {'key': '../data.pkl'},
        {'key': '../../secret'},
        {'storage': 'DoubleStorage'},
    ],
    ids=str,
)
def test_tensors_that_reach_beyond_their_record_are_damage(
    options: dict[str, Any], build: Callable[..., Path]
) -> None:
    with pytest.raises(ValueError, match=r'hand\.pt is damaged'):
        read_weights(build(linear_pickle(**options)))


@pytest.mark.parametrize('record', [b'', bytes(15), bytes(17)], ids=len)
def test_a_record_of_another_length_is_damage(
    record: bytes, build: Callable[..., Path]
) -> None:
    with pytest.raises(ValueError, match=r'hand\.pt is damaged'):
        read_weights(build(linear_pickle(), record=record))


@pytest.mark.parametrize(
    ('what', 'message'),
    [
        ('order', 'is damaged .*order big'),
        ('kind', 'is refused'),
        ('plain', 'is damaged .*no module'),
        ('cycle', 'is damaged .*Recursion'),
        ('missing', 'is damaged'),
    ],
)
def test_other_damage_gives_an_error_that_names_the_file(
    what: str, message: str, build: Callable[..., Path]
) -> None:
    module = b'\x80\x02c__torch__.mangled\nM\n)\x81q\x00}('
    path = build(
        {
            'order': linear_pickle(),
            'kind': linear_pickle(kind='script'),
            'plain': b'\x80\x02).',
            'cycle': module + b'X\x01\x00\x00\x00wNX\x01\x00\x00\x00ah\x00ub.',
            'missing': module + b'ub.',
        }[what],
        order='big' if what == 'order' else 'little',
    )
    with pytest.raises(ValueError, match=rf'hand\.pt {message}'):
        read_weights(path)


@pytest.mark.parametrize('most', [1000, 2000])
def test_a_record_that_unpacks_to_far_too_much_is_damage(
    most: int, build: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = build(linear_pickle(numel=400), record=bytes(1600), packed=True)
    monkeypatch.setattr(checkpoints, 'MOST_BYTES', most)
    if most == 1000:
        with pytest.raises(ValueError, match=r'hand\.pt is damaged .* 1600 bytes'):
            read_weights(path)
    else:
        assert not read_weights(path).tensors['w'].any()
