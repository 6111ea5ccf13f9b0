"""Files of traced graphs, in the formats that other programs run."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.torch_version import TorchVersion as Version

from anomaly_clip.errors import UserError, reason, shortened
from anomaly_clip.exporting.graph import INPUT, OUTPUTS
from anomaly_clip.files import write_bytes

__all__ = [
    "DEFAULT_OPSET",
    "FILES",
    "FORMATS",
    "OLDEST_TORCH",
    "OPSETS",
    "PROTOBUF_LIMIT",
    "check_packages",
    "file_record",
    "write_program",
]

FORMATS = ("onnx", "torch_export")
FILES = {"onnx": "detector.onnx", "torch_export": "detector.pt2"}
"""Name of the file of each format."""
DEFAULT_OPSET = 18
"""Version of ONNX's operators. Our choice: torch translates to this one, without a conversion."""
OPSETS = range(18, 24)
"""Versions that can be asked for."""
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OLDEST_TORCH = "2.7"
"""First version of torch whose traced graphs of these methods can be written as ONNX."""
MAX_REASON = 300
PROTOBUF_LIMIT = 1_900_000_000
"""Bytes of weights above which they get a file of their own; protobuf ends at 2 GiB."""


def check_packages() -> None:
    """Check that the packages that write and run ONNX are installed.

    Raises:
        UserError: If one is missing, or torch is too old.
    """
    if Version(torch.__version__) < Version(OLDEST_TORCH):
        raise UserError(
            f"--format onnx needs torch {OLDEST_TORCH} or newer, but this is {torch.__version__}: "
            f"update torch, or choose --format torch_export"
        )
    for name in PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(
                f"--format onnx needs the package {name} ({error}): pip install "
                f"'anomaly_clip[export]', or choose --format torch_export"
            ) from None


def write_program(program: ExportedProgram, kind: str, folder: Path, opset: int | None) -> Path:
    """Write a traced graph; return its file.

    Args:
        program: The graph.
        kind: One of :data:`FORMATS`.
        folder: An existing folder.
        opset: Version of ONNX's operators; None: the default.

    Raises:
        UserError: If an operator does not exist in the format.
    """
    file = folder / FILES[kind]
    if kind == "torch_export":
        content = io.BytesIO()  # torch's writer raises errors of its own if the disk is full
        torch.export.save(program, content)
        write_bytes(file, content.getbuffer())
        return file
    model = _onnx_model(program, DEFAULT_OPSET if opset is None else opset)
    size = sum(value.const_value.nbytes for value in model.model.graph.initializers.values())
    if size < PROTOBUF_LIMIT:
        write_bytes(file, model.model_proto.SerializeToString())
    else:
        model.save(file, external_data=True)
    return file


def _onnx_model(program: ExportedProgram, opset: int) -> Any:
    names = list(OUTPUTS[: len(program.graph_signature.user_outputs)])
    if len(names) == 2 and _rank(program, 1) == 2:  # scores and their parts, without a map
        names[1] = OUTPUTS[2]
    try:
        with _quiet(), torch.no_grad():  # with gradients, attention has other operators
            model = torch.onnx.export(
                program,
                dynamo=True,
                input_names=[INPUT],
                output_names=names,
                opset_version=opset,
                verbose=False,
            )
    except Exception as error:  # the exporter raises errors of many kinds
        causes = [*_causes(error)]
        cause = shortened(" ".join(reason(causes[-1]).split()), MAX_REASON).rstrip(" .:")
        raise UserError(
            f"the graph cannot be written as ONNX ({type(causes[-1]).__name__}: {cause}): choose "
            f"--format torch_export, which has all operators of torch"
        ) from error
    assert model is not None
    written = model.model.opset_imports.get("")
    if written != opset:
        raise UserError(
            f"--opset {opset}: the graph needs operators of version {written}, which cannot be "
            f"converted: leave --opset out"
        )
    return model


def _rank(program: ExportedProgram, place: int) -> int:
    name = program.graph_signature.user_outputs[place]
    [node] = [node for node in program.graph.nodes if node.name == name]
    return int(node.meta["val"].ndim)


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter, whose remarks are about its own optimisations."""
    names = ("onnxscript", "onnx_ir", "torch.onnx")
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def file_record(file: Path) -> dict[str, Any]:
    """Return name, sha256 and size in bytes of a file."""
    with file.open("rb") as content:
        digest = _sha256(lambda: content.read(1 << 20))
    return {"file": file.name, "sha256": digest, "bytes": file.stat().st_size}


def _sha256(read: Callable[[], bytes]) -> str:
    digest = hashlib.sha256()
    while block := read():
        digest.update(block)
    return digest.hexdigest()
