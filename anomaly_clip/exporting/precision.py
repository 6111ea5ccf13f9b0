"""Lower precision of exported programs: the frozen backbone in bfloat16 or in 8-bit integers.

Cosines, softmaxes, distances, Gaussians and blurs stay in float32, as does everything that was
fitted; only OpenVINO, which has no such choice, computes bf16 programs in bfloat16 throughout. The
parts of the backbone are found by their weights: a convolution or matrix product belongs to it if
it multiplies with a tensor of the backbone's image encoder.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anomaly_clip.errors import UserError, check_choice
from anomaly_clip.exporting.programs import PROTOBUF_LIMIT
from anomaly_clip.files import write_bytes
from anomaly_clip.progress import number_of

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

    from anomaly_clip.backbones.frozen import FrozenBackbone

__all__ = [
    "FLOAT32",
    "PRECISIONS",
    "check_precision",
    "lower_program",
    "lowered_backbone",
]

FLOAT32 = "float32"
PRECISIONS = (FLOAT32, "bf16", "int8")
BACKBONE = "method.backbone."
"""Prefix of the names of the backbone's tensors in a traced graph."""
BLOCK = 128
"""Weights of a matrix product that share a scale. Our choice: with 32, ViT-B-16-plus-240 is a fifth
slower in ONNX Runtime, and its maps differ by 1.1 % in place of 1.7 % of their range."""
ZERO = 128
"""Zero point of 8-bit weights, the default of the operator."""
COLOURS = 3
PRODUCTS = ("Conv", "MatMul", "Gemm")
AT_ONCE = 2
"""Images of a calibration that are run at once: all inner values of the program are kept."""


def check_precision(precision: str, kind: str) -> None:
    """Check that a precision exists in a format.

    Args:
        precision: One of :data:`PRECISIONS`.
        kind: Format of the program, ``onnx`` or ``torch_export``.

    Raises:
        ValueError: If there is no such precision.
        UserError: If the format cannot hold it.
    """
    check_choice("--precision", precision, PRECISIONS)
    if precision == "int8" and kind != "onnx":
        raise UserError(
            f"--precision int8: a program of --format {kind} has no products of 8-bit integers: "
            f"add --format onnx, or choose --precision bf16"
        )


@contextmanager
def lowered_backbone(backbone: FrozenBackbone, precision: str) -> Iterator[None]:
    """Cast the image encoder to bfloat16 while a program of ``torch_export`` is written.

    Its own weights are restored afterwards, to the bit. A traced graph shares them.

    Args:
        backbone: The backbone.
        precision: Nothing happens unless it is ``bf16``.
    """
    if precision != "bf16":
        yield
        return
    state: dict[str, Any] = backbone.tower.state_dict(keep_vars=True)
    before = {name: tensor.data for name, tensor in state.items()}
    backbone.cast(torch.bfloat16)
    try:
        yield
    finally:
        # Casting replaces buffers, and the data of parameters.
        for name, tensor in backbone.tower.state_dict(keep_vars=True).items():
            tensor.data = before[name]


def lower_program(
    file: Path,
    backbone: FrozenBackbone,
    precision: str,
    images: Callable[[], NDArray[np.uint8]],
) -> str | None:
    """Lower the precision of the backbone in an ONNX program, in place.

    ``bf16``: weights are stored in bfloat16, which halves the file. OpenVINO computes in bfloat16.
    ONNX Runtime, which has no such products on most processors, computes in float32.

    ``int8``: weights are 8-bit integers. In matrix products, each row of the input has a range of
    its own, so that no image depends on others of its batch; this is ONNX Runtime's operator
    MatMulNBits. The ranges of the inputs of convolutions are constants, derived from images. The
    first convolution, which reads the image itself, stays in float32.

    Args:
        file: The program; it may have external data.
        backbone: The backbone of the method.
        precision: One of :data:`PRECISIONS`; nothing happens with ``float32``.
        images: Returns uint8 ``(N, 3, S, S)``; called only if int8 needs images.

    Returns:
        What a user should know of it; None with ``float32``.

    Raises:
        UserError: If the program has no products with weights of the backbone.
    """
    if precision == FLOAT32:
        return None
    model = _load(file)
    tower = _Tower(model, backbone)
    if not tower.products:
        raise _nothing_to_lower(precision)
    if precision == "bf16":
        count = _store_bfloat16(model, tower)
        _save(model, file)
        return (
            f"{number_of(count, 'tensor')} of its weights are stored in bfloat16; OpenVINO "
            f"computes in bfloat16, ONNX Runtime in float32"
        )
    convolutions = [node.name for node in tower.convolutions]
    if convolutions:
        model = _quantized_convolutions(model, convolutions, images())
        tower = _Tower(model, backbone)
    count = _quantize_products(model, tower)
    if not count and not convolutions:
        raise _nothing_to_lower(precision)
    _save(model, file)
    counts = {"matrix product": count, "convolution": len(convolutions)}
    parts = [number_of(number, name) for name, number in counts.items() if number]
    return f"{' and '.join(parts)} are computed in 8-bit integers"


def _nothing_to_lower(precision: str) -> UserError:
    return UserError(
        f"--precision {precision}: the program has no product with the weights of a frozen "
        f"backbone, the only part whose precision is lowered: leave --precision out"
    )


# -- the backbone in a program ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Weight:
    """A weight of the backbone in a program.

    Args:
        source: Name of the initializer.
        is_transposed: True if the program transposes it before its use.
    """

    source: str
    is_transposed: bool = False


class _Tower:
    """The products of a program with weights of a backbone's image encoder.

    Args:
        model: The program.
        backbone: The backbone.
    """

    def __init__(self, model: ModelProto, backbone: FrozenBackbone) -> None:
        graph = model.graph
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}
        digests = _digests(backbone.tower.state_dict())
        self.weights: dict[str, _Weight] = {
            name: _Weight(name)
            for name, tensor in self.initializers.items()
            if len(tensor.dims) > 1 and _is_of(tensor, digests)
        }
        for node in graph.node:
            if node.op_type == "Transpose" and node.input[0] in self.weights:
                weight = self.weights[node.input[0]]
                if len(self.initializers[weight.source].dims) == 2:
                    is_transposed = not weight.is_transposed
                    self.weights[node.output[0]] = _Weight(weight.source, is_transposed)
        self.products: list[NodeProto] = [
            node
            for node in graph.node
            if node.op_type in PRODUCTS and node.input[1] in self.weights
        ]
        """Convolutions and matrix products, in order."""

    @property
    def convolutions(self) -> list[NodeProto]:
        """The convolutions, without those that read an image."""
        return [
            node
            for node in self.products
            if node.op_type == "Conv" and self.initializers[node.input[1]].dims[1] != COLOURS
        ]


def _digests(state: Mapping[str, Tensor]) -> set[tuple[tuple[int, ...], bytes]]:
    """Return the shapes and bytes' hashes of weights, and of their transposes."""
    digests = set()
    for tensor in state.values():
        values = tensor.detach().float().cpu().numpy()
        if values.ndim > 1:
            digests.add(_digest(values))
        if values.ndim == 2:
            digests.add(_digest(values.T))
    return digests


def _digest(values: NDArray[np.float32]) -> tuple[tuple[int, ...], bytes]:
    content = np.ascontiguousarray(values)
    return content.shape, hashlib.sha256(content.data).digest()


def _is_of(tensor: TensorProto, digests: set[tuple[tuple[int, ...], bytes]]) -> bool:
    """Return whether an initializer is a weight, or a weight that has lost its name."""
    from onnx import TensorProto, numpy_helper

    if tensor.data_type != TensorProto.FLOAT:
        return False
    return tensor.name.startswith(BACKBONE) or _digest(numpy_helper.to_array(tensor)) in digests


# -- bfloat16 --------------------------------------------------------------------------------------


def _store_bfloat16(model: ModelProto, tower: _Tower) -> int:
    """Store the weights of the products in bfloat16, and name the outputs of the backbone."""
    from onnx import TensorProto, helper, numpy_helper

    names = sorted({tower.weights[node.input[1]].source for node in tower.products})
    casts = []
    for name in names:
        tensor = tower.initializers[name]
        values = torch.from_numpy(numpy_helper.to_array(tensor).copy()).bfloat16()
        stored = f"{name}_bf16"
        raw = values.view(torch.int16).numpy().tobytes()
        new = helper.make_tensor(stored, TensorProto.BFLOAT16, tensor.dims, raw, raw=True)
        tensor.CopyFrom(new)
        casts.append(
            helper.make_node("Cast", [stored], [name], f"{stored}_cast", to=TensorProto.FLOAT)
        )
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return len(names)


# -- 8-bit integers --------------------------------------------------------------------------------


def _quantize_products(model: ModelProto, tower: _Tower) -> int:
    """Replace matrix products with those of 8-bit weights; return their number."""
    from onnx import helper

    packed: dict[tuple[str, bool], tuple[list[str], dict[str, Any]]] = {}
    count = 0
    for node in tower.products:
        weight = tower.weights[node.input[1]]
        is_transposed = weight.is_transposed ^ _attribute(node, "transB")
        plain = not _attribute(node, "transA") and _attribute(node, "alpha", 1.0) == 1.0
        if node.op_type == "Conv" or len(tower.initializers[weight.source].dims) != 2 or not plain:
            continue
        key = weight.source, is_transposed
        if key not in packed:
            packed[key] = _pack(model, tower.initializers[weight.source], is_transposed)
        names, attributes = packed[key]
        inputs, bias = [node.input[0], *names], list(node.input[2:])
        if node.op_type == "Gemm" and bias and _attribute(node, "beta", 1.0) != 1.0:
            continue
        product = node.output[0] if not bias else f"{node.output[0]}_product"
        new = helper.make_node(
            "MatMulNBits", inputs, [product], node.name, domain="com.microsoft", **attributes
        )
        added = [helper.make_node("Add", [product, *bias], node.output, f"{node.name}_bias")]
        place = list(model.graph.node).index(node)
        node.CopyFrom(new)
        for extra in added if bias else []:
            model.graph.node.insert(place + 1, extra)
        count += 1
    if count:
        if not any(item.domain == "com.microsoft" for item in model.opset_import):
            model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
        _drop_unused(model)
    return count


def _pack(
    model: ModelProto, tensor: TensorProto, is_transposed: bool
) -> tuple[list[str], dict[str, Any]]:
    """Add a matrix in blocks of 8-bit integers with one scale each.

    Returns:
        The names of the integers uint8 ``(N, blocks, block)`` and of the scales ``(N * blocks,)``,
        and the attributes of the operator.
    """
    from onnx import numpy_helper

    matrix = numpy_helper.to_array(tensor)  # (K, N), or (N, K) if the program transposes it
    rows = np.ascontiguousarray(matrix if is_transposed else matrix.T)  # (N, K)
    num_outputs, num_inputs = rows.shape
    block = min(BLOCK, max(16, 1 << (num_inputs - 1).bit_length()))
    padded = np.pad(rows, [(0, 0), (0, -num_inputs % block)])
    blocks = padded.reshape(num_outputs, -1, block)
    scales = np.abs(blocks).max(axis=2) / 127  # (N, blocks)
    steps = np.where(scales > 0, scales, 1)[..., None]
    integers = (np.rint(blocks / steps) + ZERO).astype(np.uint8)
    name = f"{tensor.name}_int8{'_transposed' if is_transposed else ''}"
    for ending, values in (("", integers), ("_scales", scales.astype(np.float32).ravel())):
        model.graph.initializer.append(numpy_helper.from_array(values, name + ending))
    attributes = {"K": num_inputs, "N": num_outputs, "bits": 8, "block_size": block}
    # Level 4: products of integers, with a range for each block of each row of the input.
    return [name, f"{name}_scales"], {**attributes, "accuracy_level": 4}


def _attribute(node: NodeProto, name: str, default: Any = 0) -> Any:
    from onnx import helper

    for attribute in node.attribute:
        if attribute.name == name:
            return helper.get_attribute_value(attribute)
    return default


def _drop_unused(model: ModelProto) -> None:
    """Remove what nothing depends on: the weights that were replaced, and their transposes."""
    graph = model.graph
    while True:
        used = {name for node in graph.node for name in node.input}
        used |= {output.name for output in graph.output}
        idle = [node for node in graph.node if not used & set(node.output)]
        for node in idle:
            graph.node.remove(node)
        if not idle:
            break
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in used]:
        graph.initializer.remove(tensor)


def _quantized_convolutions(
    model: ModelProto, names: Sequence[str], images: NDArray[np.uint8]
) -> ModelProto:
    """Quantise convolutions with ranges from images, by ONNX Runtime's own tool."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    name = model.graph.input[0].name

    class Images(CalibrationDataReader):
        def __init__(self) -> None:
            self.starts = iter(range(0, len(images), AT_ONCE))

        def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
            start = next(self.starts, None)
            return None if start is None else {name: images[start : start + AT_ONCE]}

    with tempfile.TemporaryDirectory() as scratch, _quiet():
        before, after = Path(scratch, "before.onnx"), Path(scratch, "after.onnx")
        _save(model, before)
        quantize_static(
            before,
            after,
            Images(),
            quant_format=QuantFormat.QDQ,
            nodes_to_quantize=list(names),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
        )
        return _load(after)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence advice that the tool logs."""
    previous = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(previous)


# -- files -----------------------------------------------------------------------------------------


def _load(file: Path) -> ModelProto:
    import onnx

    return onnx.load(str(file))


def _save(model: ModelProto, file: Path) -> None:
    """Write a program; large weights get a file of their own, as in the export."""
    import onnx

    data = file.with_name(f"{file.name}.data")
    data.unlink(missing_ok=True)
    if sum(len(tensor.raw_data) for tensor in model.graph.initializer) < PROTOBUF_LIMIT:
        write_bytes(file, model.SerializeToString())
    else:
        onnx.save_model(model, str(file), save_as_external_data=True, location=data.name)
