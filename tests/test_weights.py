from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save as safetensors_bytes
from safetensors.torch import save_file
from torch import Tensor, nn

from pyiqa_clipkd import locations
from pyiqa_clipkd.files import file_hash
from pyiqa_clipkd.locations import find_weights
from pyiqa_clipkd.weights import (
    CONFIG_KEY,
    METADATA_KEY,
    decode_config,
    encode_config,
    read_weights,
    write_weights,
)


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        'linear.weight': torch.randn(3, 4, generator=generator),
        'linear.bias': torch.randn(3, generator=generator).half(),
        'steps': torch.tensor(7),
    }


class Trap:
    """A pickle of it creates a file when somebody loads it."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.file, 'executed')


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        assert torch.equal(actual[name], tensor)


def test_safetensors_are_read(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, tmp_path / 'a.safetensors', metadata={'format': 'pt'})
    weights = read_weights(tmp_path / 'a.safetensors')
    assert_equal(weights.tensors, tensors)
    assert weights.metadata == {}
    assert not weights.torchscript


@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize(
    'wrapper', ['params', 'params_ema', 'state_dict', 'model', None]
)
def test_state_dicts_and_the_checkpoints_around_them_are_read(
    wrapper: str | None, zipped: bool, tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    content = tensors if wrapper is None else {wrapper: tensors, 'iter': 7}
    path = tmp_path / 'a.pth'
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    weights = read_weights(str(path))
    assert_equal(weights.tensors, tensors)
    assert weights.metadata == {}
    assert not weights.torchscript


def test_names_of_a_distributed_run_lose_their_prefix(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    prefixed = {f'module.{name}': tensor for name, tensor in tensors.items()}
    torch.save({'params': prefixed}, tmp_path / 'a.pth')
    assert_equal(read_weights(tmp_path / 'a.pth').tensors, tensors)


def test_torchscript_archives_are_read(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval()
    path = tmp_path / 'a.pt'
    torch.jit.save(torch.jit.trace(module, torch.rand(2, 4)), str(path))
    weights = read_weights(path)
    assert_equal(weights.tensors, dict(module.state_dict()))
    assert weights.torchscript


@pytest.mark.parametrize('name', ['a.pt', 'a.bin', 'a'])
def test_the_content_decides_not_the_name(
    name: str, tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    save_file(tensors, tmp_path / name)
    assert_equal(read_weights(tmp_path / name).tensors, tensors)


def test_a_state_dict_under_the_name_of_safetensors_is_read(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    torch.save(tensors, tmp_path / 'a.safetensors')
    assert_equal(read_weights(tmp_path / 'a.safetensors').tensors, tensors)


def test_what_was_read_says_from_where(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    path = write_weights(tmp_path / 'a.safetensors', tensors, {})
    assert read_weights(path).source == str(path)


@pytest.mark.parametrize('name', ['a.pth', 'a.pt', 'a.safetensors'])
@pytest.mark.parametrize('form', ['zip', 'legacy', 'pickle'])
def test_code_in_a_file_is_refused_and_not_executed(
    name: str, form: str, tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    path, proof = tmp_path / name, tmp_path / 'proof'
    content = {**tensors, 'trap': Trap(proof)}
    if form == 'pickle':
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == 'zip')

    with pytest.raises(ValueError, match=rf'{name} is refused: .* could run code'):
        read_weights(path)
    assert not proof.exists()

    # The trap does work: the test above could fail.
    with path.open('rb') as file:
        (pickle.load if form == 'pickle' else _load_unsafely)(file)
    assert proof.exists()


def _load_unsafely(file: Any) -> Any:
    return torch.load(file, weights_only=False)


def damaged_files(tensors: dict[str, Tensor], folder: Path) -> dict[str, bytes]:
    torch.save(tensors, folder / 'zip')
    torch.save(tensors, folder / 'legacy', _use_new_zipfile_serialization=False)
    module = torch.jit.trace(nn.Linear(4, 3), torch.rand(2, 4))
    torch.jit.save(module, str(folder / 'archive'))
    whole = {
        name: (folder / name).read_bytes() for name in ('zip', 'legacy', 'archive')
    }
    whole['safetensors'] = safetensors_bytes(tensors)
    damaged = {f'truncated_{name}': data[:-60] for name, data in whole.items()}
    damaged |= {f'half_{name}': data[: len(data) // 2] for name, data in whole.items()}
    return damaged | {
        'empty': b'',
        'one_byte': b'{',
        'text': b'Not Found\n',
        'html': b'<!DOCTYPE html><html><body>404</body></html>' * 20,
        'comment': b'(This is no weight file.)\n',  # these letters are a pickle's too
        'image': b'\x89PNG\r\n\x1a\n' + bytes(range(256)),
        'git_lfs': b'version https://git-lfs.github.com/spec/v1\noid sha256:0\n',
        'zero': bytes(1000),
    }


DAMAGED = (
    *(f'{how}_{what}' for how in ('truncated', 'half')
      for what in ('zip', 'legacy', 'archive', 'safetensors')),
    'empty', 'one_byte', 'text', 'html', 'comment', 'image', 'git_lfs', 'zero',
)  # fmt: skip


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
@pytest.mark.parametrize('kind', DAMAGED)
def test_damaged_files_give_an_error_that_names_them(
    kind: str, suffix: str, tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    path = tmp_path / f'{kind}{suffix}'
    path.write_bytes(damaged_files(tensors, tmp_path)[kind])
    with pytest.raises(ValueError, match=rf'{path.name} is damaged or no weight file'):
        read_weights(path)


@pytest.mark.parametrize('text', ['{not json', '[1]', '7', 'null'])
def test_metadata_that_is_no_mapping_gives_an_error_that_names_the_file(
    text: str, tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    path = tmp_path / 'a.safetensors'
    save_file(tensors, path, metadata={METADATA_KEY: text})
    with pytest.raises(ValueError, match=r'a\.safetensors is damaged'):
        read_weights(path)


@pytest.mark.parametrize(
    'value', [torch.rand(3), torch.tensor([200, 3], dtype=torch.uint8), torch.empty(0)]
)
def test_a_description_that_is_none_gives_an_error_that_names_the_file(
    value: Tensor, tmp_path: Path
) -> None:
    path = tmp_path / 'a.pth'
    torch.save({CONFIG_KEY: value}, path)
    with pytest.raises(ValueError, match=r'a\.pth is damaged'):
        read_weights(path)


@pytest.mark.parametrize('content', [7, [1.0], 'text', torch.ones(2)])
def test_a_file_without_a_state_dict_says_what_it_holds(
    content: Any, tmp_path: Path
) -> None:
    torch.save(content, tmp_path / 'a.pth')
    with pytest.raises(
        ValueError, match=f'no state dict, but {type(content).__name__}'
    ):
        read_weights(tmp_path / 'a.pth')


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r'There is no weight file .*gone\.pth'):
        read_weights(tmp_path / 'gone.pth')
    with pytest.raises(FileNotFoundError, match='There is no weight file'):
        read_weights(tmp_path)


def test_the_home_folder_is_understood(
    tmp_path: Path, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv('USERPROFILE', str(tmp_path))
    write_weights('~/a.safetensors', tensors, {})
    assert (tmp_path / 'a.safetensors').is_file()
    assert_equal(read_weights('~/a.safetensors').tensors, tensors)


def test_what_is_written_is_read_again(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    tensors['transposed'] = torch.arange(6).view(2, 3).T  # not contiguous
    metadata = {'config': {'type': 'X', 'levels': ['bad', 'good']}, 'card': {'a': 1.5}}
    path = write_weights(tmp_path / 'new' / 'a.safetensors', tensors, metadata)
    weights = read_weights(path)
    assert_equal(weights.tensors, tensors)
    assert weights.metadata == metadata
    assert [file.name for file in path.parent.iterdir()] == ['a.safetensors']


def test_the_same_content_gives_the_same_bytes(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    first = write_weights(tmp_path / 'a.safetensors', tensors, {'a': 1, 'b': 2})
    turned = dict(reversed(tensors.items()))
    second = write_weights(tmp_path / 'b.safetensors', turned, {'b': 2, 'a': 1})
    assert file_hash(first) == file_hash(second)


@pytest.mark.parametrize('failing', ['pathlib.Path.write_bytes', 'os.replace'])
def test_a_write_that_fails_leaves_the_old_file_and_no_litter(
    failing: str,
    tmp_path: Path,
    tensors: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write_weights(tmp_path / 'a.safetensors', tensors, {'version': 1})

    def fail(partial: Path, _: Any) -> None:
        with partial.open('wb') as file:
            file.write(b'half a f')
        raise OSError('disk full')

    monkeypatch.setattr(failing, fail)
    with pytest.raises(OSError, match='disk full'):
        write_weights(path, {'other': torch.ones(1)}, {'version': 2})

    assert read_weights(path).metadata == {'version': 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_description_survives_its_encoding() -> None:
    config = {'encoder': 'timm:test_vit', 'levels': ['schlecht', 'größer'], 'size': 224}
    encoded = encode_config(config)
    assert encoded.dtype == torch.uint8
    assert decode_config(encoded) == config


def test_the_description_in_a_state_dict_becomes_metadata(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    config = {'type': 'CLIPKDStudent'}
    torch.save(
        {'params': {**tensors, CONFIG_KEY: encode_config(config)}}, tmp_path / 'a.pth'
    )
    weights = read_weights(tmp_path / 'a.pth')
    assert weights.metadata == {'config': config}
    assert_equal(weights.tensors, tensors)


def test_the_hash_is_sha256(tmp_path: Path) -> None:
    data = b'x' * (3 << 20)
    (tmp_path / 'a').write_bytes(data)
    assert file_hash(tmp_path / 'a') == hashlib.sha256(data).hexdigest()


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Put a weight file of `clipkd_x` into the user's folder or the bundle."""
    folders = {'user': tmp_path / 'user', 'bundle': tmp_path / 'bundle'}
    monkeypatch.setenv('PYIQA_CLIPKD_WEIGHTS', str(folders['user']))
    monkeypatch.setattr(locations, 'BUNDLED_FOLDER', folders['bundle'])

    def put(place: str) -> Path:
        folders[place].mkdir()
        (folders[place] / 'clipkd_x.safetensors').write_text(json.dumps(place))
        return folders[place] / 'clipkd_x.safetensors'

    return put


def test_weights_are_looked_for_as_path_then_user_then_bundle(
    places: Callable[[str], Path], tmp_path: Path
) -> None:
    assert find_weights('clipkd_x') is None
    bundled = places('bundle')
    assert find_weights('clipkd_x') == bundled
    own = places('user')
    assert find_weights('clipkd_x') == own
    assert find_weights('clipkd_y') is None
    given = tmp_path / 'given.pth'
    given.touch()
    assert find_weights('clipkd_x', str(given)) == given


def test_a_given_path_that_is_missing_is_an_error_and_not_skipped(
    places: Callable[[str], Path], tmp_path: Path
) -> None:
    places('user')
    message = r'`pretrained_model_path` of clipkd_x: there is no file .*gone\.pth'
    with pytest.raises(FileNotFoundError, match=message):
        find_weights('clipkd_x', tmp_path / 'gone.pth')


@pytest.mark.parametrize('ending', ['.onnx', '.pt2'])
def test_an_exported_model_is_named_as_one(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f'out{ending}'
    path.write_bytes(b'whatever')
    with pytest.raises(ValueError, match=rf'out\{ending} is an exported model'):
        read_weights(path)
