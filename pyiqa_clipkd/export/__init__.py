"""A metric as one file for other runtimes: ONNX, or a program of `torch.export`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

from pyiqa_clipkd import __version__
from pyiqa_clipkd.attributes.names import ATTRIBUTES
from pyiqa_clipkd.description import (
    EXTERNAL,
    FORMS,
    KEY,
    ONNX,
    PHOTOGRAPHS,
    SQUARES,
    Description,
)
from pyiqa_clipkd.export.check import check_photographs, model_input
from pyiqa_clipkd.export.graph import (
    DTYPES,
    point_to_weights,
    quantize,
    to_onnx,
    without_traces,
)
from pyiqa_clipkd.export.network import half, traced, traced_without_weights
from pyiqa_clipkd.files import file_hash, written_whole
from pyiqa_clipkd.header import read_header
from pyiqa_clipkd.locations import attributes_file, find_weights, state_sum
from pyiqa_clipkd.metric import CLIPKDMetric
from pyiqa_clipkd.names import DEFAULT_METRIC, SUFFIX
from pyiqa_clipkd.network import QualityNetwork
from pyiqa_clipkd.stages import told_stages

TORCH = '.pt2'
PRECISIONS = ('float32', 'float16', 'int8')

# Photographs that set the ranges of eight-bit values. They are not measured on.
CALIBRATION = 32

# Pixels a cell, at most, of the stages that may stay in float with `int8`.
EARLY_STRIDE = 8


class _Source(NamedTuple):
    network: QualityNetwork
    metric: str
    weights: Path | None

    def describe(self, form: str, precision: str, attributes: bool) -> Description:
        """What the exported model says of itself.

        Raises:
            ValueError: if attributes are wanted, but the network has no heads for them.
        """
        if attributes and self.network.readout is None:
            raise ValueError(
                f'`attributes`: {self.metric or "the network"} has no attribute heads; '
                f'{DEFAULT_METRIC} has.'
            )
        config = self.network.config
        heads = attributes_file(self.weights) if attributes and self.weights else None
        return Description(
            metric=self.metric,
            input=form,
            input_size=self.network.preprocessing.input_size,
            levels=tuple(config['levels']),
            weights=self.weights.name if self.weights else '',
            sha256=file_hash(self.weights) if self.weights else '',
            precision=precision,
            version=__version__,
            attributes=ATTRIBUTES if attributes else (),
            heads_sha256=file_hash(heads) if heads and heads.is_file() else '',
        )


def export(
    metric: str | QualityNetwork,
    path: str | Path,
    *,
    weights: str | Path | None = None,
    form: str = PHOTOGRAPHS,
    precision: str = 'float32',
    photographs: Sequence[Path] | None = None,
    attributes: bool = False,
) -> Path:
    """Write a metric as an ONNX model, or as a program of `torch.export`.

    Preprocessing and head are inside. Outputs are `score` (N,), in [1, 5], higher is
    better, `probabilities` (N, L) of the levels, worst first (none of a regression
    head), and on request `attributes` (N, 5). N is free. An ONNX model has a
    description of itself in its metadata under `pyiqa_clipkd`, as JSON.

    Args:
        metric: its name, or a network without crops.
        path: ends with `.onnx` or `.pt2` (float32 only). Written whole or not at all.
        weights: a weight file to use instead of the metric's own.
        form: `photographs` takes `image`, uint8 RGB (N, H, W, 3) of any height and
            width; `squares` takes `squares`, float32 (N, 3, S, S) in [0, 1], resized by
            the caller (`pyiqa_clipkd.images.squares`).
        precision: of the encoder; the rest is float32. `int8` loses accuracy, how much
            depends on the network: measure it (`export.check.differences`).
        photographs: files that set the ranges of `int8`; by default those that ship
            with scikit-image.
        attributes: also give five attributes, in [0, 1], 1 the good side; for metrics
            that have heads for them.

    Raises:
        ValueError: if an argument is none of those.
        FileNotFoundError: if there are no weights.
        ImportError: if a package for ONNX is missing.
    """
    path = Path(path).expanduser()
    _check_arguments(path, form, precision)
    source = _load(metric, weights)
    description = source.describe(form, precision, attributes)
    network = half(source.network) if precision == 'float16' else source.network
    program = traced(network, form, attributes=attributes)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as partial:
        if path.suffix == TORCH:
            with partial.open('wb') as file:
                notes = {KEY: description.encode()}
                torch.export.save(program, file, extra_files=notes)
            return path
        model = to_onnx(program, description)
        if precision == 'int8':
            files = photographs or check_photographs()
            inputs = [model_input(file, description) for file in files[:CALIBRATION]]
            quantize(model, inputs, partial, _early(source.network))
        else:
            partial.write_bytes(without_traces(model).SerializeToString())
    return path


def _early(network: QualityNetwork) -> list[str]:
    """The stages with cells of at most `EARLY_STRIDE` pixels, if the encoder tells."""
    return [
        f'encoder.backbone.{stage["module"]}'
        for stage in told_stages(getattr(network.encoder, 'backbone', None))
        if stage['reduction'] <= EARLY_STRIDE
    ]


def _check_arguments(path: Path, form: str, precision: str) -> None:
    for name, value, allowed in (
        ('form', form, FORMS),
        ('precision', precision, PRECISIONS),
    ):
        if value not in allowed:
            raise ValueError(f'`{name}` must be one of {allowed}, but got {value!r}.')
    if path.suffix not in (ONNX, TORCH):
        raise ValueError(
            f'`path` must end with {ONNX} or {TORCH}, but got {str(path)!r}.'
        )
    if path.suffix == TORCH and precision != 'float32':
        raise ValueError(
            f'`precision` of a {TORCH} file must be float32, but got {precision!r}: '
            f'take {ONNX}.'
        )
    if path.suffix == ONNX:
        _check_packages()


def _check_packages() -> None:
    missing = [n for n in ('onnx', 'onnxscript', 'onnxruntime') if not find_spec(n)]
    if missing:
        raise ImportError(
            f'Export to ONNX needs {", ".join(missing)}: '
            "pip install 'pyiqa-clipkd[export]'"
        )


def _load(metric: str | QualityNetwork, weights: str | Path | None) -> _Source:
    if isinstance(metric, QualityNetwork):
        if metric.crops:
            raise ValueError(
                f'The network must have no crops, but has {metric.crops}: an exported '
                'model scores one view; crops are the business of its caller.'
            )
        return _Source(metric.eval(), '', None)
    network = CLIPKDMetric(metric, pretrained_model_path=weights)
    return _Source(network, metric, find_weights(metric, weights))


def write_graph(metric: str, folder: str | Path, *, attributes: bool = False) -> Path:
    """Write `METRIC.onnx` beside `METRIC.safetensors`, whose tensors it reads.

    The model takes squares. It has no weights of its own and works in that folder only.

    Args:
        metric: its name.
        folder: of the weight file.
        attributes: write `METRIC.attributes.onnx` instead, which also gives these; it
            reads `METRIC.attributes.safetensors`, too.

    Raises:
        FileNotFoundError: if the weight file isn't there.
        ValueError: if attributes are wanted, but there are no heads for them.
        ImportError: if a package for ONNX is missing.
    """
    from safetensors.torch import load_file

    _check_packages()
    weights = Path(folder) / f'{metric}{SUFFIX}'
    source = _load(metric, weights)
    description = source.describe(SQUARES, EXTERNAL, attributes)
    files = {'': weights}
    if attributes:
        files['readout.'] = attributes_file(weights)
    stored = {
        prefix + name: tensor
        for prefix, file in files.items()
        for header in [read_header(file)]
        for name, tensor in load_file(file).items()
        if header.tensors[name]['dtype'] in DTYPES
    }
    model = to_onnx(
        traced_without_weights(source.network, stored, attributes=attributes),
        description,
        further_inputs=tuple(stored),
    )
    path = weights.with_suffix(ONNX)
    path = attributes_file(path) if attributes else path
    with written_whole(path) as partial:
        model = point_to_weights(without_traces(model), files)
        partial.write_bytes(model.SerializeToString())
    state_sum(path)
    return path
