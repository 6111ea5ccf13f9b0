"""Runtime of exported detectors: first form, only the sessions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Session", "open_session"]


class Session:
    """A program that is ready to run."""

    def __init__(self, outputs: list[str], call: Any) -> None:
        self.outputs = outputs
        self._call = call

    def run(self, images: Any) -> dict[str, Any]:
        """Return the outputs of images ``(B, 3, S, S)`` by name."""
        return dict(zip(self.outputs, self._call(images), strict=False))


def open_session(file: Path, runtime: str, threads: int | None = None) -> Session:
    """Open a program in a runtime."""
    if runtime == "onnxruntime":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(
            str(file), options, providers=["CPUExecutionProvider"]
        )
        names = [output.name for output in session.get_outputs()]
        return Session(names, lambda images: session.run(None, {"images": images}))
    if runtime == "openvino":
        import openvino

        config = {"INFERENCE_PRECISION_HINT": "f32"}
        if threads is not None:
            config["INFERENCE_NUM_THREADS"] = str(threads)
        model = openvino.Core().compile_model(str(file), "CPU", config)
        names = [output.get_any_name() for output in model.outputs]

        def call(images: Any) -> Any:
            results = model(np.ascontiguousarray(images))
            return [results[number].copy() for number in range(len(names))]

        return Session(names, call)
    import torch

    module = torch.export.load(file).module()

    def call_torch(images: Any) -> Any:
        with torch.no_grad():
            return [output.numpy() for output in module(torch.from_numpy(images))]

    return Session(["image_score", "anomaly_map", "score_parts"], call_torch)
