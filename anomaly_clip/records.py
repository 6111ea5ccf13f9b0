"""What travels between the parts: one record a stage of the data's way.

Letters used in every shape of the project:

==========  ==========================================================
``B``       images of a batch
``H, W``    pixels of the images that a method sees
``h, w``    pixels of masks and anomaly maps (equal to ``H, W`` unless asked otherwise)
``N``       patches of an image (the class token not counted)
``D``       channels of a feature
``P``       parts of an image score
``K``       classes of a multi-label target
``k``       reference images of a category
==========  ==========================================================
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypedDict, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from typing_extensions import NotRequired  # in typing since Python 3.11

__all__ = [
    "DEMO",
    "RANDOM",
    "Batch",
    "Draw",
    "Encoder",
    "HasLoaderNeeds",
    "LoaderNeeds",
    "Scores",
    "Synthetic",
    "TrainingFeatures",
    "WeightsRecord",
    "needs_of",
    "versions",
]

RANDOM = "random"
"""The one word that asks for untrained weights."""

DEMO = "demo"
"""The one word that asks for the small CLIP that comes with the project."""

PACKAGES = (
    "anomaly_clip",
    "torch",
    "torchvision",
    "lightning",
    "open_clip_torch",
    "torchmetrics",
    "scikit-learn",
    "scipy",
    "numpy",
    "pillow",
    "opencv-python-headless",
)


class Batch(TypedDict):
    """Images and what is known of them; images stay uint8 until they are on the device."""

    image: Tensor
    """uint8 ``(B, 3, H, W)``, RGB."""
    label: Tensor
    """bool ``(B,)``, True = anomalous."""
    category: list[str]
    path: list[str]
    index: Tensor
    """int64 ``(B,)``, the sample's row in its data set's listing."""
    mask: NotRequired[Tensor]
    """bool ``(B, h, w)``, all False for a normal image; absent without pixel labels."""
    target: NotRequired[Tensor]
    """``(B, K)``, targets of a multi-label data set."""
    features: NotRequired[dict[str, Tensor]]
    """What the frozen encoder says of the images, in half precision; ``image`` is then absent."""
    synthetic: NotRequired[Tensor]
    """uint8 ``(B, 3, H, W)``, the image with a synthetic defect (pairs)."""
    synthetic_mask: NotRequired[Tensor]
    """bool ``(B, H, W)``, where the synthetic defect is."""
    defect: NotRequired[list[str]]
    """Kind of the synthetic defect."""
    support: NotRequired[Tensor]
    """uint8 ``(B, k, 3, H, W)``, normal images of the same category."""


class Scores(TypedDict):
    """What a method says of a batch; higher = more anomalous."""

    image_score: Tensor
    """float32 ``(B,)``."""
    anomaly_map: NotRequired[Tensor]
    """float32 ``(B, h, w)``; absent for methods without pixel output."""
    stage_maps: NotRequired[dict[str, Tensor]]
    """Maps of a method's intermediate steps by name, float32 ``(B, ?, ?)``: for pictures only."""
    score_parts: NotRequired[Tensor]
    """float32 ``(B, P)``: min-max scaled per category over the set evaluated, then added, they
    replace ``image_score``; only an evaluator, which sees a whole set, can do so."""


class Synthetic(NamedTuple):
    """One picture with a synthetic defect."""

    image: NDArray[np.uint8]
    """``(H, W, 3)``, RGB."""
    mask: NDArray[np.bool_]
    """``(H, W)``, where the defect is."""
    label: NDArray[np.float32]
    """``(H, W)`` in ``[0, 1]``, how strong it is there; grey levels for NSA's label intensity."""
    info: dict[str, Any]
    """The recipe's name and what it drew."""


class Draw(NamedTuple):
    """Index of a training sample, with its epoch so that every random draw is reproducible."""

    epoch: int
    index: int  # type: ignore[assignment]  # a tuple's method of that name is not missed


class WeightsRecord(TypedDict):
    """Which weights a figure comes from."""

    backbone: str
    pretrained: str
    random: bool
    """Whether they are untrained, so that figures mean nothing."""
    sha256: str | None
    """Over the loaded tensors and the architecture; None for random ones."""


@dataclass(frozen=True)
class LoaderNeeds:
    """Needs of a module from its loaders; data modules read nothing else of it.

    Args:
        image_size: Side of the square images in pixels; None: the data module decides.
        single_pass: Whether ``fit`` looks once at every image, each on one process, and follows no
            gradient.
        support_images: How many other images of its category come with each training image.
        full_batches: Whether the rest of an epoch that fills no batch is left out.
        test_passes: How often the test images are handed out.
    """

    image_size: int | None = None
    single_pass: bool = False
    support_images: int = 0
    full_batches: bool = False
    test_passes: int = 1


@runtime_checkable
class HasLoaderNeeds(Protocol):
    """A module that says what it asks of the loaders."""

    loader_needs: LoaderNeeds


def needs_of(trainer: Trainer | None) -> LoaderNeeds:
    """Return what the module of a trainer asks of the loaders; the defaults for a foreign one."""
    module = None if trainer is None else trainer.lightning_module
    return module.loader_needs if isinstance(module, HasLoaderNeeds) else LoaderNeeds()


@dataclass(frozen=True)
class Encoder:
    """A frozen encoder whose features of unchanging images may be kept.

    Args:
        encode: Returns features by name, ``(B, ...)`` each, for uint8 images ``(B, 3, H, W)``.
        key: Everything but the images that features depend on: weights, layers, code.
        device: Where images are expected.
    """

    encode: Callable[[Tensor], dict[str, Tensor]]
    key: str
    device: torch.device


class TrainingFeatures(NamedTuple):
    """Features of the last images of a training, for a picture of how they lie."""

    features: NDArray[np.float32]
    """``(n, C)``."""
    categories: Sequence[str]
    anomalous: Sequence[bool]


def versions() -> dict[str, str]:
    """Return the versions of packages that a metric depends on."""
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            installed[package] = "not installed as a package"
    return installed
