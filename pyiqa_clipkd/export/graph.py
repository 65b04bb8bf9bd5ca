"""From a traced network to an ONNX model: names, description, weights, eight bits."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pyiqa_clipkd.description import (
    ATTRIBUTES,
    INPUT_NAMES,
    KEY,
    PROBABILITIES,
    SCORE,
    Description,
)
from pyiqa_clipkd.header import read_header

if TYPE_CHECKING:
    import onnx

# The operator set: any onnxruntime since 1.18 has it.
OPSET = 20

# Of safetensors and of ONNX.
DTYPES = {'F32': 'FLOAT', 'F16': 'FLOAT16', 'I8': 'INT8'}

# Elements of the largest tensor of which twins are looked for: masks of attention.
LARGEST_TWIN = 1 << 20

QUANTIZED = ('Conv', 'Gemm', 'MatMul')

# Parts of a network that stay in full precision: small, and near the score.
PRECISE = ('head', 'readout', 'encoder.readout')


def to_onnx(
    program: torch.export.ExportedProgram,
    description: Description,
    *,
    further_inputs: Sequence[str] = (),
) -> onnx.ModelProto:
    """A simplified ONNX model that knows what it is.

    Args:
        program: of `export.network.traced`.
        description: goes into the model's metadata.
        further_inputs: names of the inputs behind the first.
    """
    import onnx
    from onnx_ir.passes.common import DeduplicateInitializersPass

    with _quiet():
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT_NAMES[description.input], *further_inputs],
            output_names=_output_names(program, description),
            verbose=False,
        )
    assert exported is not None
    # Masks of windowed attention come once a block.
    DeduplicateInitializersPass(size_limit=LARGEST_TWIN)(exported.model)
    model = exported.model_proto
    onnx.helper.set_model_props(model, {KEY: description.encode()})
    _name_sizes(model)
    return model


def _output_names(
    program: torch.export.ExportedProgram, description: Description
) -> list[str]:
    last = [ATTRIBUTES] if description.attributes else []
    count = len(program.graph_signature.user_outputs)
    middle = [PROBABILITIES] if count > 1 + len(last) else []
    return [SCORE, *middle, *last]


def _name_sizes(model: onnx.ModelProto) -> None:
    """Free sizes of inputs and outputs get names for people, not a tracer's symbols."""
    for value in (*model.graph.input, *model.graph.output):
        for dim, name in zip(
            value.type.tensor_type.shape.dim, ('batch', 'height', 'width'), strict=False
        ):
            if dim.dim_param:
                dim.dim_param = name


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of its own workings."""
    level = logging.getLogger('torch.onnx').level
    logging.getLogger('torch.onnx').setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        logging.getLogger('torch.onnx').setLevel(level)


def without_traces(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model without what the exporter noted about each node: most of its size."""
    del model.graph.value_info[:]
    del model.graph.metadata_props[:]
    for part in (*model.graph.node, *model.graph.input, *model.graph.output):
        del part.metadata_props[:]
        part.doc_string = ''
    return model


# --- weights that stay in their file --------------------------------------------------


def point_to_weights(
    model: onnx.ModelProto, files: Mapping[str, Path]
) -> onnx.ModelProto:
    """Inputs behind the first become tensors that are read from safetensors files.

    Args:
        model: its further inputs are named as tensors of the files, with the prefix.
        files: prefix -> a file; the model must lie beside all of them.
    """
    known = {
        prefix + name: (entry, header.begin, path.name)
        for prefix, path in files.items()
        for header in [read_header(path)]
        for name, entry in header.tensors.items()
    }
    used = {name for node in model.graph.node for name in node.input}
    further = [value.name for value in model.graph.input[1:]]
    del model.graph.input[1:]
    for name in further:
        if name in used:
            model.graph.initializer.append(_external(name, *known[name]))
    return model


def _external(
    name: str, entry: dict[str, Any], begin: int, location: str
) -> onnx.TensorProto:
    from onnx import TensorProto

    first, last = entry['data_offsets']
    tensor = TensorProto(
        name=name,
        dims=entry['shape'],
        data_type=TensorProto.DataType.Value(DTYPES[entry['dtype']]),
        data_location=TensorProto.EXTERNAL,
    )
    values = {'location': location, 'offset': begin + first, 'length': last - first}
    for key, value in values.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


# --- eight bits -----------------------------------------------------------------------


def quantize(
    model: onnx.ModelProto,
    calibration: Sequence[np.ndarray],
    path: Path,
    early: Sequence[str],
) -> None:
    """Write the model with eight-bit weights and eight-bit values between layers.

    By onnxruntime's static quantization: one scale an output channel for weights, the
    range seen in calibration for values. The first convolution, those in groups (most
    are depthwise) and what is near the score stay in float. In networks with groups all
    before the end of the early stages stays, too: in eight bits it would take longer,
    for all values change their format time and again, and move the score of an
    EfficientNet-Lite0 three times, of a B0 nine times as far.

    Args:
        model: of `to_onnx`, with its traces.
        calibration: inputs of the model, each a batch.
        path: where to.
        early: the early stages, as the network calls them.
    """
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    name = model.graph.input[0].name

    class Inputs(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(calibration)

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {name: batch}

    kept = _kept_in_float(model, early)
    with _quiet_root():
        quantize_static(
            without_traces(model),
            str(path),
            Inputs(),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            op_types_to_quantize=list(QUANTIZED),
            nodes_to_exclude=kept,
        )


@contextmanager
def _quiet_root() -> Iterator[None]:
    """The quantizer advises on the root logger to prepare the model, which is done."""
    root = logging.getLogger()
    root.addFilter(_is_error)
    try:
        yield
    finally:
        root.removeFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def _kept_in_float(model: onnx.ModelProto, early: Sequence[str]) -> list[str]:
    """Names of the nodes of which eight bits would move the score most."""
    nodes = list(model.graph.node)
    convolutions = [node for node in nodes if node.op_type == 'Conv']
    in_groups = [
        node
        for node in convolutions
        if any(a.name == 'group' and a.i > 1 for a in node.attribute)
    ]
    kept = [*convolutions[:1], *in_groups, *(n for n in nodes if _within(n, PRECISE))]
    ends = [place for place, n in enumerate(nodes, 1) if _within(n, early)]
    if in_groups and ends:
        kept += nodes[: ends[-1]]
    return [node.name for node in kept]


def _within(node: onnx.NodeProto, modules: Sequence[str]) -> bool:
    notes = {note.key: note.value for note in node.metadata_props}
    scopes = notes.get('pkg.torch.onnx.name_scopes', '')
    return any(f"'network.{module}'" in scopes for module in modules)
