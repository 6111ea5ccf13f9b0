"""Records passed between the subpackages: samples, batches, scores, and descriptions of encoders.

Letters in the shapes of all docstrings:

==========  ==========================================================
``B``       images in a batch
``H, W``    pixels of a method's input images
``h, w``    pixels of masks and anomaly maps (equal to ``H, W`` by default)
``N``       patches of an image (without the class token)
``D``       channels of a feature
``P``       parts of an image score
``K``       classes of a multi-label target
``k``       reference images of a category
==========  ==========================================================
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypedDict, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from anomaly_clip import __version__

if TYPE_CHECKING:
    import torch
    from lightning.pytorch import Trainer
    from torch import Tensor
    from typing_extensions import NotRequired  # in typing since Python 3.11

__all__ = [
    "DEMO",
    "EVALUATED",
    "RANDOM",
    "Batch",
    "Draw",
    "Encoder",
    "HasLoaderNeeds",
    "LoaderNeeds",
    "Scores",
    "Synthetic",
    "TrainingFeatures",
    "UnreadableImage",
    "UseOfShots",
    "WeightsRecord",
    "needs_of",
    "source_of",
    "variant_of",
    "versions",
]

RANDOM = "random"
"""Value of an option for weights that selects untrained weights."""

DEMO = "demo"
"""Value of an option for weights that selects the small CLIP included in the package."""

EVALUATED = frozenset({"label", "mask", "index"})
"""Parts of a batch that no score depends on: an evaluation reads them on the CPU."""

PACKAGES = (
    "anomaly_clip",
    "torch",
    "torchvision",
    "lightning",
    "open_clip_torch",
    "timm",
    "torchmetrics",
    "scikit-learn",
    "scipy",
    "numpy",
    "pillow",
    "opencv-python-headless",
)


class UnreadableImage(NamedTuple):
    """An image that could not be read."""

    index: int  # type: ignore[assignment]  # hides the method of tuples, which is not needed
    """Index in the listing of its data set."""
    path: str
    category: str
    reason: str
    """Why it could not be read, without the path of the image."""


class Batch(TypedDict):
    """Images with labels and metadata; images stay uint8 until they are on the device."""

    image: Tensor
    """uint8 ``(B, 3, H, W)``, RGB."""
    label: Tensor
    """bool ``(B,)``, True = anomalous."""
    category: list[str]
    path: list[str]
    index: Tensor
    """int64 ``(B,)``, index of the sample in the listing of its data set."""
    mask: NotRequired[Tensor]
    """bool ``(B, h, w)``, all False for a normal image; absent without pixel labels."""
    target: NotRequired[Tensor]
    """``(B, K)``, targets of a multi-label data set."""
    features: NotRequired[dict[str, Tensor]]
    """Cached features of a frozen encoder, in half precision; they replace ``image``."""
    synthetic: NotRequired[Tensor]
    """uint8 ``(B, 3, H, W)``, the image with a synthetic defect (for training on pairs)."""
    synthetic_mask: NotRequired[Tensor]
    """bool ``(B, H, W)``, mask of the synthetic defect."""
    defect: NotRequired[list[str]]
    """Kind of the synthetic defect."""
    support: NotRequired[Tensor]
    """uint8 ``(B, k, 3, H, W)``, normal images of the same category."""
    unreadable: NotRequired[list[UnreadableImage]]
    """Images that predict could not read. They are in no other entry, so that ``B`` may be 0."""


class Scores(TypedDict):
    """Output of a method for a batch; higher = more anomalous."""

    image_score: Tensor
    """float32 ``(B,)``."""
    anomaly_map: NotRequired[Tensor]
    """float32 ``(B, h, w)``; absent for methods without pixel output."""
    stage_maps: NotRequired[dict[str, Tensor]]
    """Maps of a method's intermediate steps by name, float32 ``(B, ?, ?)``: for display only."""
    score_parts: NotRequired[Tensor]
    """float32 ``(B, P)``: parts that are min-max scaled per category over the evaluated set and
    then added; the sum replaces ``image_score``. An evaluator must see the whole set for this."""


class Synthetic(NamedTuple):
    """Image with a synthetic defect."""

    image: NDArray[np.uint8]
    """``(H, W, 3)``, RGB."""
    mask: NDArray[np.bool_]
    """``(H, W)``, True on the defect."""
    label: NDArray[np.float32]
    """``(H, W)``, strength of the defect in ``[0, 1]``; grey levels for NSA label ``intensity``."""
    info: dict[str, Any]
    """Name of the recipe and its sampled parameters."""


class Draw(NamedTuple):
    """Epoch and index of a training sample, which make its random augmentation reproducible."""

    epoch: int
    index: int  # type: ignore[assignment]  # hides the method of tuples, which is not needed


class WeightsRecord(TypedDict):
    """Description of the weights that produced a result."""

    backbone: str
    pretrained: str
    random: bool
    """True if the weights are untrained, so that metrics are meaningless."""
    sha256: str | None
    """Hash of the loaded tensors and the architecture; None for random weights."""
    activation: NotRequired[str]
    """``GELU`` or ``QuickGELU``; absent if it is the default: that of the tag's record or, for a
    file, both that of ``auto`` and that of the model name."""
    positions: NotRequired[str]
    """Interpolation of positional embeddings; absent for the default."""
    kind: NotRequired[str]
    """``ViT`` for a ViT without texts; absent for a CNN and a CLIP model."""


def variant_of(weights: Mapping[str, object]) -> str:
    """Return the options with which weights are not used as trained, or as their name suggests.

    Args:
        weights: A :class:`WeightsRecord`.

    Example:
        >>> from anomaly_clip.records import variant_of
        >>> variant_of({"pretrained": "openai", "activation": "GELU", "positions": "bicubic"})
        'GELU, bicubic positions'
    """
    activation, positions = weights.get("activation"), weights.get("positions")
    parts = [str(activation)] if activation else []
    return ", ".join([*parts, f"{positions} positions"] if positions else parts)


def source_of(weights: Mapping[str, object]) -> str:
    """Return the source of weights with the options of :func:`variant_of`."""
    return ", ".join(filter(None, [str(weights.get("pretrained")), variant_of(weights)]))


UseOfShots = Literal["fit", "references", "none"]
"""``fit``: few images are trained on; ``references``: images are compared with them; ``none``."""


@dataclass(frozen=True)
class LoaderNeeds:
    """Requirements of a module on its data loaders; data modules use no other attribute of it.

    Args:
        image_size: Side of the square images in pixels; None: the data module decides.
        single_pass: Whether ``fit`` visits every image exactly once, on one of the processes and
            without gradients.
        support_images: Number of images of the same category that accompany each training image.
        full_batches: Whether to drop the incomplete last batch of an epoch.
        test_passes: Number of passes over the test images.
        category_names: Whether category names are inserted into prompts.
        fitted_images: Hashes of the decoded images that the module was fitted on.
        bit_depth: Significant bits of the 16-bit images that the module was fitted on; None if it
            was fitted on other images.
        whole_epochs: Whether a fit can only be resumed from the end of an epoch.
        is_fitted: Whether the module needs a fit.
        validated_images: Hashes of the images that were held out of the fit for its validation.
        calibrated_images: Hashes of the images that the module was calibrated on.
        shots: Use of the images of data.shots; see :attr:`.EvaluatedModule.use_of_shots`.
    """

    image_size: int | None = None
    single_pass: bool = False
    support_images: int = 0
    full_batches: bool = False
    test_passes: int = 1
    category_names: bool = False
    fitted_images: frozenset[str] = frozenset()
    bit_depth: int | None = None
    whole_epochs: bool = False
    is_fitted: bool = False
    validated_images: frozenset[str] = frozenset()
    calibrated_images: frozenset[str] = frozenset()
    shots: UseOfShots = "fit"


@runtime_checkable
class HasLoaderNeeds(Protocol):
    """A module that declares requirements on its data loaders."""

    loader_needs: LoaderNeeds


def needs_of(trainer: Trainer | None) -> LoaderNeeds:
    """Return the requirements of a trainer's module, or the defaults if it declares none."""
    module = None if trainer is None else trainer.lightning_module
    return module.loader_needs if isinstance(module, HasLoaderNeeds) else LoaderNeeds()


@dataclass(frozen=True)
class Encoder:
    """A frozen encoder whose features can be cached for images that do not change.

    Args:
        encode: Returns features by name, ``(B, ...)`` each, for uint8 images ``(B, 3, H, W)``.
        key: Text that identifies everything that features depend on except the images: weights,
            layers, code.
        device: Device that the images must be on.
    """

    encode: Callable[[Tensor], dict[str, Tensor]]
    key: str
    device: torch.device

    def halves(self, images: Tensor) -> dict[str, Tensor]:
        """Return features as the cache keeps them: in half precision, contiguous, on the device.

        Raises:
            OverflowError: If a value is NaN, or beyond the range of half precision.
        """
        import torch

        with torch.no_grad():
            encoded = self.encode(images.to(self.device))
        halves = {key: value.half().contiguous() for key, value in encoded.items()}
        for key, value in halves.items():
            if not value.isfinite().all():
                raise OverflowError(f"features {key} exceed the range of half precision or are NaN")
        return halves


class TrainingFeatures(NamedTuple):
    """Features of the last images of a training run, for a plot of their embedding."""

    features: NDArray[np.float32]
    """``(n, C)``."""
    categories: Sequence[str]
    anomalous: Sequence[bool]


def versions() -> dict[str, str]:
    """Return the versions of the packages that results depend on."""
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            installed[package] = "not installed as a package"
    if "anomaly_clip" in installed:  # an editable installation keeps the version of its set-up
        installed["anomaly_clip"] = __version__
    return installed
