"""What runs the network: torch, or onnxruntime without torch."""

from __future__ import annotations

import platform
import shutil
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from pyiqa_clipkd.description import ONNX, SQUARES
from pyiqa_clipkd.files import file_hash
from pyiqa_clipkd.locations import attributes_file, find_weights
from pyiqa_clipkd.names import DEFAULT_METRIC, METRICS, user_names

if TYPE_CHECKING:
    from pyiqa_clipkd.runtime import Outputs

KINDS = ('auto', 'torch', 'onnx')
DEVICES = ('auto', 'cpu', 'cuda', 'mps')

# Squares at once on a GPU. A CPU is fastest with one a thread: what a layer gives stays
# in the cache for the next one.
GPU_BATCH = 16


class Backend(Protocol):
    """A metric that is ready to score; may be called from several threads.

    Attributes:
        metric: its name.
        weights, sha256: name and SHA-256 of its file.
        levels: words from worst to best.
        input_size: side of the squares in pixels.
        name: `torch` or `onnx`.
    """

    @property
    def metric(self) -> str: ...
    @property
    def weights(self) -> str: ...
    @property
    def sha256(self) -> str: ...
    @property
    def levels(self) -> Sequence[str]: ...
    @property
    def input_size(self) -> int: ...
    @property
    def name(self) -> str: ...

    def __call__(self, squares: np.ndarray, /) -> tuple[np.ndarray, np.ndarray | None]:
        """float32 (N, 3, S, S) in [0, 1] -> score (N,) in [1, 5], probabilities (N, L).

        Regression heads have no probabilities.
        """
        ...


@runtime_checkable
class Explaining(Protocol):
    """A backend that may also say why.

    Attributes:
        heads_sha256: of the attribute heads; empty if it doesn't.
    """

    @property
    def heads_sha256(self) -> str: ...

    def explain(self, squares: np.ndarray, /) -> Outputs:
        """What a call gives, and attributes (N, 5) in [0, 1], if it has them."""
        ...


def heads_of(backend: Backend) -> str:
    """SHA-256 of the heads whose attributes its rows have; empty without them."""
    return backend.heads_sha256 if isinstance(backend, Explaining) else ''


class TorchBackend:
    """A metric in torch: every network, also on a GPU.

    Args:
        metric: its name.
        device: `cpu`, `cuda` or `mps`.
        threads: processor threads of one forward pass; for all of this process.
        weights: a file to use instead of the metric's own.
        input_size: side of the squares, instead of that of the training.
        attributes: also say why.

    Raises:
        ValueError: if the weights have no attribute heads, but attributes are wanted.
    """

    name = 'torch'

    def __init__(
        self,
        metric: str,
        *,
        device: str = 'cpu',
        threads: int | None = None,
        weights: Path | None = None,
        input_size: int | None = None,
        attributes: bool = False,
    ) -> None:
        import torch

        from pyiqa_clipkd.metric import CLIPKDMetric
        from pyiqa_clipkd.weights import tensors_hash

        changes: dict[str, Any] = (
            {} if input_size is None else {'input_size': input_size}
        )
        network = CLIPKDMetric(metric, pretrained_model_path=weights, **changes)
        path = find_weights(metric, weights)
        if attributes and (network.readout is None or path is None):
            raise ValueError(
                f'`attributes`: {path or metric} has no attribute heads beside it. '
                f'The bundled {DEFAULT_METRIC} has; scripts/attribute_heads.py makes '
                'them for weights of your own.'
            )
        self.attributes = attributes
        self.heads_sha256 = (
            file_hash(attributes_file(path)) if attributes and path else ''
        )
        self.metric = metric
        # Those of CLIP itself come from the cache of open_clip.
        self.weights = path.name if path else 'open_clip'
        self.sha256 = file_hash(path) if path else tensors_hash(network.state_dict())
        self.levels = tuple(network.config['levels'])
        self.input_size = network.preprocessing.input_size
        self.batch_size = 1 if device == 'cpu' else GPU_BATCH
        self.device = device
        torch.set_num_threads(threads or 1)
        self.network = network.to(device)

    def __call__(self, squares: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        scores, probabilities, _ = self.explain(squares)
        return scores, probabilities

    def explain(self, squares: np.ndarray) -> Outputs:
        import torch

        with torch.inference_mode():
            images = torch.from_numpy(squares).to(self.device)
            images = images.contiguous(memory_format=torch.channels_last)
            result = self.network(
                images, return_details=True, return_attributes=self.attributes
            )
            output, why = result if self.attributes else (result, None)
            parts = (output.probabilities, why.values if why else None)
            probabilities, attributes = (
                None if part is None else part.cpu().numpy() for part in parts
            )
            return output.score[:, 0].cpu().numpy(), probabilities, attributes


def create_backend(
    metric: str | None,
    *,
    kind: str = 'auto',
    device: str = 'auto',
    threads: int | None = None,
    weights: Path | None = None,
    input_size: int | None = None,
    attributes: bool = False,
) -> Backend:
    """Make a metric ready to score.

    Args:
        metric: its name; `None`: that of the .onnx file in `weights`, or else
            `clipkd_efficientnet_lite`.
        kind: `torch`, `onnx`, or `auto`: onnxruntime on a processor, where it is
            installed and works and the metric has a graph for it, and else torch.
        device: `cpu`, `cuda`, `mps`, or `auto`: the best that is there.
        threads: processor threads of one forward pass; by default 1, for several
            photographs are scored at a time.
        weights: a file to use instead of the metric's own; .onnx needs no torch.
        input_size: side of the squares; torch only.
        attributes: also say why, of a metric that has heads for it.

    Raises:
        ValueError: if an argument is wrong, or two don't fit together.
        FileNotFoundError: if there are no weights.
        ImportError: if the library isn't installed, or broken.
    """
    _check(kind, device, weights)
    if weights is not None and (kind == 'onnx' or weights.suffix.lower() == ONNX):
        _check_onnx(kind, device, input_size)
        return _onnx_file(weights, metric, threads, attributes)
    metric = metric or DEFAULT_METRIC
    _check_metric(metric)
    if kind == 'onnx':
        _check_onnx(kind, device, input_size)
        return _onnx(metric, threads, attributes)
    graph_fits = kind == 'auto' and weights is None and input_size is None
    if graph_fits and find_spec('onnxruntime') and resolve_device(device) == 'cpu':
        try:
            return _onnx(metric, threads, attributes)
        except (FileNotFoundError, ImportError):  # no graph of it, or a broken library
            if find_spec('torch') is None:
                raise
    if find_spec('torch') is None:
        raise ModuleNotFoundError(
            'torch is not installed: `pip install torch timm`, or `pip install '
            'onnxruntime` and leave out --backend, --input-size and --weights.'
        )
    return TorchBackend(
        metric,
        device=resolve_device(device),
        threads=threads,
        weights=weights,
        input_size=input_size,
        attributes=attributes,
    )


def resolve_device(device: str) -> str:
    """`auto` becomes `cuda`, `mps` or `cpu`; torch is only asked if there may be a GPU.

    Raises:
        ValueError: if this machine has no such device.
    """
    if device == 'cpu' or (device == 'auto' and not _may_have_gpu()):
        return 'cpu'
    if find_spec('torch') is None:
        if device == 'auto':
            return 'cpu'
        raise ModuleNotFoundError(
            f'`device` {device} needs torch: `pip install torch`.'
        )
    import torch

    there = {
        'cuda': torch.cuda.is_available(),
        'mps': torch.backends.mps.is_available(),
        'cpu': True,
    }
    if device == 'auto':
        return next(name for name, available in there.items() if available)
    if not there[device]:
        raise ValueError(f'`device` is {device}, but torch finds none here.')
    return device


def _may_have_gpu() -> bool:
    if sys.platform == 'darwin':
        return platform.machine() == 'arm64'
    if sys.platform == 'win32':
        return shutil.which('nvidia-smi') is not None
    return bool([*Path('/dev').glob('nvidia[0-9]*'), *Path('/dev').glob('dxg')])


def _check(kind: str, device: str, weights: Path | None) -> None:
    for name, value, allowed in (('kind', kind, KINDS), ('device', device, DEVICES)):
        if value not in allowed:
            raise ValueError(
                f'`{name}` must be one of {", ".join(allowed)}, but got {value!r}.'
            )
    if weights is not None and not weights.is_file():
        raise FileNotFoundError(f'There is no weight file {weights}.')


def _check_metric(metric: str) -> None:
    names = [*METRICS, *user_names()]
    if metric not in names:
        close = get_close_matches(metric, names, 1)
        hint = (
            f'did you mean {close[0]}?' if close else f'there are {", ".join(names)}.'
        )
        raise ValueError(f'There is no metric {metric!r}: {hint}')


def _check_onnx(kind: str, device: str, input_size: int | None) -> None:
    if kind == 'torch':
        raise ValueError('An .onnx file needs --backend onnx or auto.')
    if device not in ('auto', 'cpu'):
        raise ValueError(f'`device` {device} needs --backend torch.')
    if input_size is not None:
        raise ValueError('`input_size` of an ONNX graph is fixed: use --backend torch.')


def _onnx_file(
    path: Path, metric: str | None, threads: int | None, attributes: bool
) -> Backend:
    """A model in a file, which must be that of the metric if both have a name."""
    if path.suffix.lower() != ONNX:
        raise ValueError(
            f'`weights` for onnxruntime must be an {ONNX} file, but got {path}: make '
            'one with `pyiqa-clipkd export`, or take --backend torch.'
        )
    backend = _onnx(path, threads, attributes)
    if metric and backend.metric and metric != backend.metric:
        raise ValueError(
            f'`weights`: {path.name} is a model of {backend.metric}, not of {metric}.'
        )
    return backend


def _onnx(model: str | Path, threads: int | None, attributes: bool) -> Backend:
    if find_spec('onnxruntime') is None:
        raise ModuleNotFoundError(
            'onnxruntime is not installed: `pip install onnxruntime`.'
        )
    from pyiqa_clipkd.runtime import Runtime

    runtime = Runtime(model, threads=threads or 1, attributes=attributes)
    if runtime.description.input != SQUARES:
        raise ValueError(
            f'{runtime.path} takes whole photographs, for servers without Pillow: '
            'export it with `--input squares`.'
        )
    return runtime
