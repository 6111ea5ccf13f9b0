"""Checks of ``export``: a method as a graph, its scores elsewhere, and its weights."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from anomaly_clip.errors import UserError
from anomaly_clip.exporting.graph import DetectorGraph, trace
from anomaly_clip.exporting.programs import check_packages, write_program
from anomaly_clip.methods.evaluated import Exporter
from anomaly_clip.runtime.detector import open_session
from anomaly_clip.testing.run_files import load
from anomaly_clip.testing.subject import Flat, Subject

__all__ = [
    "detector_is_exported",
    "exported_weights_load_without_code",
    "tracing_leaves_the_method_as_it_was",
]

TOLERANCE = 1e-3
"""Largest difference, as a fraction of the range. The bounds of an export are closer, but untrained
networks enlarge roundings."""


def detector_is_exported(subject: Subject) -> None:
    """A graph for batches of any size scores as ``score`` does, in torch and in ONNX Runtime."""
    graph, images = _exportable(subject)
    expected = _scores(graph, images)
    program = trace(graph)
    count = len(images)
    sizes = sorted({1, min(3, count), count})
    module = program.module()
    for size in sizes:
        with torch.no_grad():
            parts = [module(part) for part in images.split(size)]
        outputs = [torch.cat(part) for part in zip(*parts, strict=True)]
        _check_close(expected, dict(zip(expected, outputs, strict=True)), f"a graph of {size}")
    try:
        check_packages()
    except UserError as error:
        subject.require(False, f"is compared in torch alone: {error}")
    folder = subject.folder / "program"
    folder.mkdir(exist_ok=True)
    run = open_session(write_program(program, "onnx", folder, None), "onnxruntime", None).run
    for size in sizes:
        runs = [run(part.numpy()) for part in images.split(size)]
        arrays = {
            name: torch.from_numpy(np.concatenate([part[name] for part in runs]))
            for name in expected
        }
        _check_close(expected, arrays, f"ONNX Runtime with batches of {size}")


def tracing_leaves_the_method_as_it_was(subject: Subject) -> None:
    """A traced method keeps its tensors, modes, hooks and random states, and scores as before."""
    graph, images = _exportable(subject)
    expected, before = _scores(graph, images), _state(graph)
    tensors = {name: value.detach().clone() for name, value in _tensors(graph)}
    trace(graph)
    after = _state(graph)
    for name, value in before.items():
        assert after[name] == value, f"tracing changes {name}"
    for name, tensor in _tensors(graph):
        assert torch.equal(tensor, tensors[name]), f"tracing changes {name}"
    for name, scores in _scores(graph, images).items():
        assert torch.equal(scores, expected[name]), f"{name} differs after tracing"


def exported_weights_load_without_code(subject: Subject) -> None:
    """The files of exported weights load with ``weights_only=True``, and are finite."""
    subject.require(subject.can_be_fitted, "cannot be fitted")
    subject.require(isinstance(subject.built, Exporter), "has no weights for other programs")
    folder = subject.folder / "weights"
    words = ["export", "--ckpt_path", str(subject.checkpoint), "--folder", str(folder)]
    finished = subject.command(words)
    assert finished.code == 0, finished.last_line
    loaded = [values for file in sorted(folder.rglob("*")) for values in _floating(file)]
    assert loaded, "export has written no file of tensors"
    assert all(values.isfinite().all() for values in loaded), "exported weights are not finite"


detector_is_exported.slow = True  # type: ignore[attr-defined]
tracing_leaves_the_method_as_it_was.slow = True  # type: ignore[attr-defined]


def _exportable(subject: Subject) -> tuple[DetectorGraph, Tensor]:
    """Return the graph of a method and test images of its category, on the CPU."""
    subject.require(subject.scores, "is not a detector")
    subject.require(not subject.is_transductive, "is transductive: scores depend on other images")
    scorer = subject.scorer
    reason = scorer.method.not_exportable
    assert reason is None or reason.strip(), "not_exportable needs a reason in words"
    subject.require(reason is None, f"is not exportable: it {reason}")
    category = scorer.categories[0]
    rows = [row for row, name in enumerate(scorer.categories) if name == category]
    return DetectorGraph(scorer.method, category), scorer.images[rows]


def _scores(graph: DetectorGraph, images: Tensor) -> Flat:
    """Return the outputs of a graph, as ``score`` returns them."""
    with torch.no_grad():
        graph(images[:1])  # finds the names, and fills caches
        scores: Any = graph.method.score(images, [graph.category] * len(images))
    return {name: scores[name] for name in graph.names}


def _state(graph: DetectorGraph) -> dict[str, Any]:
    """Return what tracing might change besides the values of tensors, by name."""
    method = graph.method
    state: dict[str, Any] = {
        "the random state of torch": torch.get_rng_state().tolist(),
        "the random state of NumPy": str(np.random.get_state()),
        "the random state of Python": random.getstate(),
        "the hyper-parameters": dict(method.hparams),
        "whether gradients are computed": torch.is_grad_enabled(),
    }
    for name, module in method.named_modules():
        hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
        state[f"mode and hooks of {name or 'the method'}"] = module.training, hooks
    for name, value in _tensors(graph):
        described = type(value), value.dtype, value.device, value.requires_grad
        state[f"type, device or gradient of {name}"] = *described, value.grad is None
    return state


def _tensors(graph: DetectorGraph) -> Iterator[tuple[str, Tensor]]:
    yield from graph.method.named_parameters()
    yield from graph.method.named_buffers()


def _floating(file: Path) -> Iterator[Tensor]:
    """Yield the floating-point tensors of a weights file; none of a file of another type."""
    waiting: list[Any] = []
    if file.suffix == ".safetensors":
        waiting = [load_file(file)]
    elif file.suffix in (".pt", ".pth", ".bin", ".ckpt"):
        waiting = [load(file)]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, (list, tuple)):
            waiting += value
        elif isinstance(value, Tensor) and value.is_floating_point():
            yield value


def _check_close(expected: Flat, actual: Flat, by: str) -> None:
    """Compare scores by a fraction of their range; see :data:`TOLERANCE`."""
    for name, value in expected.items():
        shape = tuple(actual[name].shape)
        assert shape == tuple(value.shape), f"{by} gives {name} {shape}, not {tuple(value.shape)}"
        difference = float((value - actual[name]).abs().max())
        spread = float(value.max() - value.min()) or float(value.abs().max()) or 1.0
        assert difference <= TOLERANCE * spread, (
            f"{by} changes {name} by {difference / spread:.2g} of its range, above {TOLERANCE:g}"
        )
