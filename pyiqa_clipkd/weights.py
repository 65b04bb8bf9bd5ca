"""Weight files: read without running code in them, write and hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyiqa_clipkd.checkpoints import read_checkpoint
from pyiqa_clipkd.description import KEY as METADATA_KEY
from pyiqa_clipkd.files import checked_file, one_line, written_whole
from pyiqa_clipkd.header import read_header
from pyiqa_clipkd.network_config import OPTIONS, check_config
from pyiqa_clipkd.plain_pickle import NeedsCodeError
from pyiqa_clipkd.torchscript import is_torchscript, read_torchscript

# Endings of what `pyiqa-clipkd export` writes, and what runs it.
EXPORTED = {
    '.onnx': 'for `pyiqa-clipkd score --weights` and `pyiqa_clipkd.runtime.Runtime`',
    '.pt2': 'for `torch.export.load`',
}

# Key under which a network keeps its own description in a state dict (a uint8 tensor of
# JSON text).
CONFIG_KEY = '_extra_state'

# Start of PyTorch's files: a zip file, or a pickle.
TORCH_MAGIC = (b'PK', b'\x80')

# Eight-bit tensors: the smallest one, the largest value, the name of the scales.
INT8_SIZE = 100_000
INT8_MAX = 127
INT8_SCALE = '.int8_scale'
MOST_INT8 = 1 << 30

# Bytes of a description inside a state dict.
LARGEST_CONFIG = 1 << 20


class Weights(NamedTuple):
    """The content of a weight file.

    Attributes:
        tensors: name -> tensor, on the CPU.
        metadata: what the file says of itself: `config` (how to build the network)
            and, in published files, `card` (data, results, licence). May be empty.
        torchscript: the file was a TorchScript archive (OpenAI's form of CLIP).
        source: the file, for messages.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, Any]
    torchscript: bool = False
    source: str = ''


class _RefusedError(ValueError):
    """Names the file and what is wrong with it."""


def _is_safetensors(path: Path) -> bool:
    with path.open('rb') as file:
        start = file.read(9)
    size = int.from_bytes(start[:8], 'little')
    return start[8:] == b'{' and 2 <= size <= path.stat().st_size - 8


def _read_safetensors(path: Path) -> Weights:
    from safetensors import safe_open

    header = read_header(path)
    with safe_open(path, framework='pt') as file:
        tensors = {name: file.get_tensor(name) for name in header.tensors}
    return Weights(unpack_int8(tensors), header.metadata)


def pack_int8(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Large matrices and kernels in eight bits, with one scale an output channel.

    The others stay as they are: they are few bytes, and the score depends on them (in
    EfficientNet-Lite0 eight bits for all kernels move scores by 0.03 in the median, for
    the large ones by 0.004).

    Returns:
        name -> int8 and name + `INT8_SCALE` -> float32 for tensors of two or more
        dimensions and at least `INT8_SIZE` elements; the others unchanged.
    """
    packed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        small = tensor.dim() < 2 or tensor.numel() < INT8_SIZE
        if small or not tensor.is_floating_point():
            packed[name] = tensor
            continue
        values = tensor.detach().float()
        largest = values.abs().amax(dim=tuple(range(1, values.dim())), keepdim=True)
        scale = largest.clamp(min=1e-12) / INT8_MAX
        packed[name] = (values / scale).round().to(torch.int8)
        packed[name + INT8_SCALE] = scale
    return packed


def unpack_int8(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `pack_int8`, in float32; other tensors are left alone.

    Raises:
        ValueError: if scales aren't one an output channel, or all of it is larger than
            any network in eight bits that is known to us.
    """
    packed = [name for name in tensors if name + INT8_SCALE in tensors]
    for name in packed:
        tensor, scale = tensors[name], tensors[name + INT8_SCALE]
        wanted = (*tensor.shape[:1], *(1 for _ in tensor.shape[1:]))
        if scale.shape != wanted or tensor.dtype != torch.int8:
            raise ValueError(f'{name} has scales of another shape or type')
    if sum(tensors[name].numel() for name in packed) > MOST_INT8:
        raise ValueError(f'more than {MOST_INT8} numbers in eight bits')
    return {
        name: tensor * tensors[name + INT8_SCALE]
        if name + INT8_SCALE in tensors
        else tensor
        for name, tensor in tensors.items()
        if not (name.endswith(INT8_SCALE) and name[: -len(INT8_SCALE)] in tensors)
    }


def _read_torch(path: Path) -> Weights:
    with path.open('rb') as file:
        start = file.read(2)
    if not start.startswith(TORCH_MAGIC):
        raise ValueError(f'it starts with {start!r}')
    try:
        return Weights(read_checkpoint(path), {})
    except TypeError as error:
        raise _RefusedError(f'{path} holds no state dict, but {error}.') from error


def _check_metadata(metadata: dict[str, Any], path: Path) -> None:
    """What a file says of its network decides what is built: it must be plausible."""
    config = metadata.get('config', {})
    try:
        if not isinstance(config, Mapping):
            raise ValueError(f'its `config` is no mapping, but {type(config).__name__}')
        if config.get('type') in OPTIONS:  # else the file is of other programs or heads
            metadata['config'] = check_config(config)
    except (TypeError, ValueError) as error:
        raise _RefusedError(f'{path} is refused: {error}.') from error


def check_numbers(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], source: str | Path
) -> None:
    """Refuse what no training gives: NaN, infinite numbers, and changed ones.

    Args:
        tensors: of known shapes.
        metadata: of the same file; where it states the hash of its tensors, they must
            have it.
        source: the file, for messages.

    Raises:
        ValueError: says which tensor.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f'{source} is damaged: {name} holds numbers like NaN.')
    stated = metadata.get('tensors_sha256')
    if stated is not None and stated != tensors_hash(tensors):
        raise ValueError(
            f'{source} is damaged or was changed: its tensors have another SHA-256 '
            'than it states. Get it again.'
        )


def read_weights(path: str | Path) -> Weights:
    """Read a weight file. No code in it is ever executed, of Python or TorchScript.

    Args:
        path: safetensors, a PyTorch file of tensors and plain values (a state dict or a
            training checkpoint around one), or a TorchScript archive.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, no weight file, would need unpickling, or
            says of its network what can't be.
    """
    path = checked_file(path, 'weight file')
    if path.suffix.lower() in EXPORTED:
        raise ValueError(
            f'{path} is an exported model ({EXPORTED[path.suffix.lower()]}), no weight '
            'file: give the file that it was made of.'
        )
    try:
        if _is_safetensors(path):
            weights = _read_safetensors(path)
        elif is_torchscript(path):
            weights = Weights(read_torchscript(path), {}, torchscript=True)
        else:
            weights = _read_torch(path)
        if CONFIG_KEY in weights.tensors:
            weights.metadata['config'] = decode_config(weights.tensors.pop(CONFIG_KEY))
    except _RefusedError:
        raise
    except NeedsCodeError as error:
        raise _RefusedError(
            f'{path} is refused: it holds more than tensors and plain values '
            f'({one_line(error)}), and loading it could run code. Save its state dict '
            'alone, or as safetensors.'
        ) from error
    except Exception as error:
        raise ValueError(
            f'{path} is damaged or no weight file ({type(error).__name__}: '
            f'{one_line(error)}).'
        ) from error
    _check_metadata(weights.metadata, path)
    return weights._replace(source=str(path))


def load_training_file(path: str | Path) -> Any:
    """A checkpoint or state that a training goes on from: also what optimizers keep.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, or holds more than tensors and plain values.
    """
    path = checked_file(path, 'checkpoint')
    try:
        return torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:
        raise ValueError(
            f'{path} is damaged, or refused: only tensors and plain values are read '
            f'({type(error).__name__}: {one_line(error)}).'
        ) from error


def encode_config(config: dict[str, Any]) -> Tensor:
    """A network's description as a uint8 tensor, so that any checkpoint can hold it."""
    return torch.tensor(list(json.dumps(config).encode()), dtype=torch.uint8)


def decode_config(encoded: Tensor) -> dict[str, Any]:
    """The inverse of `encode_config`.

    Raises:
        ValueError: if it is no such tensor.
    """
    if encoded.dtype != torch.uint8 or not 2 <= encoded.numel() <= LARGEST_CONFIG:
        raise ValueError(f'a description of {encoded.numel()} {encoded.dtype}')
    config = json.loads(bytes(encoded.tolist()).decode())
    if not isinstance(config, dict):
        raise ValueError(f'a description that is {type(config).__name__}')
    return config


def write_weights(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: dict[str, Any]
) -> Path:
    """Write one self-contained safetensors file, whole or not at all."""
    from safetensors.torch import save

    path = Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    content = save(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        metadata={METADATA_KEY: json.dumps(metadata, sort_keys=True)},
    )
    with written_whole(path) as partial:
        partial.write_bytes(content)  # with the user's usual permissions
    return path


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and bytes: the same in every container."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f'{name} {tuple(tensor.shape)} {tensor.dtype}'.encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
