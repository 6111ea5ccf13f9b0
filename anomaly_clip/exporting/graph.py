"""The inference of a method on images of one category, as a graph of tensors."""

from __future__ import annotations

import warnings
from contextlib import suppress

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from anomaly_clip.errors import UserError, reason, shortened
from anomaly_clip.methods.base import AnomalyMethod

__all__ = ["INPUT", "OUTPUTS", "DetectorGraph", "trace"]

INPUT = "images"
"""Name of the input of a graph."""
OUTPUTS = ("image_score", "anomaly_map", "score_parts")
"""Names of the outputs of a graph, in this order; a method may lack the last two."""
EXAMPLES = 2
"""Images of the example batch: a batch of 1 would be taken as a constant."""
MAX_BATCH = 65536
"""Largest batch size of a graph. An unlimited one is not accepted by all versions of torch."""
MAX_REASON = 300


class DetectorGraph(nn.Module):
    """A method with its category as a constant: uint8 images in, raw scores and maps out.

    Decoding and resizing of images stay outside, as do thresholds, scaling and p-values.

    Args:
        method: The method, prepared for the category.
        category: The category of all images.
    """

    def __init__(self, method: AnomalyMethod, category: str) -> None:
        super().__init__()
        self.method = method
        self.category = category
        self.names: tuple[str, ...] = ()
        """Those of :data:`OUTPUTS` that the method has; known after the first call."""

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return those of :data:`OUTPUTS` that the method has, in float32.

        Args:
            images: uint8 ``(B, 3, S, S)``, RGB.
        """
        scores = self.method.score_category(images, self.category)
        names = [name for name in OUTPUTS if name in scores]
        if not torch.compiler.is_compiling():
            self.names = tuple(names)
        return tuple(scores[name].float() for name in names)  # type: ignore[literal-required]


def trace(graph: DetectorGraph) -> ExportedProgram:
    """Trace a graph for batches of any size.

    The method should have scored images before, so that constants such as the features of prompts
    are cached.

    Args:
        graph: The graph; its method is left as it was.

    Raises:
        UserError: If the method has operations that cannot be traced, or are for one batch size.
    """
    method, side = graph.method, graph.method.image_size
    images = torch.zeros(EXAMPLES, 3, side, side, dtype=torch.uint8, device=method.device)
    shapes = {INPUT: {0: Dim("batch", min=1, max=MAX_BATCH)}}
    _start_autograd()
    is_fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # torch 2.6 cannot trace fused attention
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks about torch's own tracing
            program = torch.export.export(graph, (images,), dynamic_shapes=shapes, strict=True)
    except Exception as error:  # torch raises errors of many kinds, also of the method's code
        cause = shortened(" ".join(reason(error).split()), MAX_REASON).rstrip(" .:")
        raise UserError(
            f"{type(method).__name__} cannot be traced as a graph for batches of any size "
            f"({type(error).__name__}: {cause}): write its score_category in operations of tensors "
            f"whose shapes do not depend on values (docs/export.md)"
        ) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(is_fused)
        with suppress(AttributeError):  # the traced code, which holds the weights
            torch.compiler.reset()
    _drop_unused(program)
    return program


def _drop_unused(program: ExportedProgram) -> None:
    """Remove the weights that the graph does not use, such as those of a text tower."""
    used = {spec.target for spec in program.graph_signature.input_specs}
    for name in program.state_dict.keys() - used:
        del program.state_dict[name]


def _start_autograd() -> None:
    """Start autograd, which on the CPU alone needs no threads.

    After a graph was traced, torch takes the device of its fake tensors for a real one. Autograd
    would then start with a thread for it, and processes that are forked later could not train.
    """
    if not torch.cuda.is_available():
        with torch.inference_mode(False), torch.enable_grad():
            torch.zeros(1, requires_grad=True).sum().backward()
