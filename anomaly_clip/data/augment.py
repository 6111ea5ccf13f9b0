"""Augmentation of training images and their masks by albumentations.

The published protocols have none. A user lists transforms by class path and arguments. The package
imports albumentations only then, because the import takes seconds, and without its check for a new
version, which would need the network.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray

from anomaly_clip.errors import reason, suggest

if TYPE_CHECKING:
    import albumentations

__all__ = ["Augmentation"]

AUGMENT = 0xA06  # purpose: a separate stream of random numbers
EXAMPLE = "{class_path: HorizontalFlip, init_args: {p: 0.5}}"


class Augmentation:
    """Random transforms of an image and its mask, sampled by (seed, epoch, row).

    Args:
        transforms: The transforms, applied in order. Each has a ``class_path``, such as
            ``albumentations.HorizontalFlip`` or ``HorizontalFlip``, and optional ``init_args``.
            ``transforms`` in ``init_args`` may be such a list again, as for ``OneOf``.
        seed: Another seed gives other augmentations.

    Raises:
        ValueError: If an entry is malformed, a transform is unknown, or its arguments are invalid.

    Example:
        >>> import numpy as np
        >>> from anomaly_clip.data.augment import Augmentation
        >>> flip = Augmentation([{"class_path": "HorizontalFlip", "init_args": {"p": 1.0}}])
        >>> image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
        >>> flipped, _ = flip(image, None, epoch=0, row=0)
        >>> bool((flipped == image[:, ::-1]).all())
        True
    """

    def __init__(self, transforms: Sequence[dict[str, Any]], seed: int = 0) -> None:
        self.settings = list(transforms)
        self.seed = seed
        self._pipeline: albumentations.Compose | None = _compose(self.settings)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pipeline": None}  # workers that are not forked build their own

    def __call__(
        self, image: NDArray[np.uint8], mask: NDArray[np.bool_] | None, epoch: int, row: int
    ) -> tuple[NDArray[np.uint8], NDArray[np.bool_] | None]:
        """Augment an image and its mask in the same way.

        Args:
            image: ``(S, S, 3)``.
            mask: ``(s, s)``, which may differ in size from the image; or None.
            epoch: Number of the epoch.
            row: Row of the image in its listing.

        Returns:
            Image and mask of the same sizes.

        Raises:
            ValueError: If the transforms change the size of the image or its number of channels.
        """
        if self._pipeline is None:
            self._pipeline = _compose(self.settings)
        sequence = np.random.SeedSequence([self.seed, AUGMENT, epoch, row])
        self._pipeline.set_random_seed(int(sequence.generate_state(1)[0]))
        inputs: dict[str, NDArray[Any]] = {"image": image}
        if mask is not None:
            inputs["mask"] = _resized(mask, image.shape[0])
        try:
            outputs = self._pipeline(**inputs)
        except Exception as error:  # transforms raise many types
            raise ValueError(
                f"data.augment: the transforms cannot be applied to an image of {image.shape[1]} x "
                f"{image.shape[0]} pixels ({reason(error)}): change or remove them"
            ) from None
        augmented = outputs["image"]
        if augmented.shape != image.shape or augmented.dtype != image.dtype:
            raise ValueError(
                f"data.augment: the transforms turn {image.dtype} {image.shape} into "
                f"{augmented.dtype} {augmented.shape}: leave out those that change size, channels "
                f"or type; data.resize and the backbone do that"
            )
        if mask is None:
            return np.ascontiguousarray(augmented), None
        return np.ascontiguousarray(augmented), _resized(outputs["mask"] > 0, mask.shape[0]) > 0


def _resized(mask: NDArray[np.bool_], side: int) -> NDArray[np.uint8]:
    levels = mask.astype(np.uint8)
    if levels.shape == (side, side):
        return levels
    return np.asarray(cv2.resize(levels, (side, side), interpolation=cv2.INTER_NEAREST_EXACT))


def _compose(settings: Sequence[dict[str, Any]]) -> albumentations.Compose:
    albumentations = _library()
    return albumentations.Compose([_transform(entry) for entry in settings])


def _library() -> Any:
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    import albumentations

    return albumentations


def _transform(entry: Any) -> Any:
    """Build a transform from its class path and arguments.

    Raises:
        ValueError: If that is impossible; the message names the entry.
    """
    if not isinstance(entry, dict) or not set(entry) <= {"class_path", "init_args"}:
        raise ValueError(f"data.augment: expected transforms such as {EXAMPLE}, got {entry}")
    path, arguments = entry.get("class_path"), entry.get("init_args") or {}
    if not isinstance(path, str) or not isinstance(arguments, dict):
        raise ValueError(f"data.augment: expected transforms such as {EXAMPLE}, got {entry}")
    kind = _find(path)
    if not isinstance(arguments.get("transforms", []), list):
        raise ValueError(f"data.augment: {path}: expected a list of transforms, got {arguments}")
    if "transforms" in arguments:
        nested = [_transform(inner) for inner in arguments["transforms"]]
        arguments = {**arguments, "transforms": nested}
    with warnings.catch_warnings():
        # The library only warns of unknown arguments, and then ignores them.
        warnings.simplefilter("error", UserWarning)
        try:
            return kind(**arguments)
        except (TypeError, ValueError, UserWarning) as error:
            reason = " ".join(str(error).partition("For further information")[0].split())
            raise ValueError(
                f"data.augment: {path} does not accept {arguments} ({reason}); see the "
                f"documentation of albumentations {_library().__version__}"
            ) from None


def _find(path: str) -> Any:
    """Return the class of a transform: one of albumentations, or any that is importable."""
    library = _library()
    kinds = (library.BasicTransform, library.BaseCompose)
    module, _, name = path.removeprefix("albumentations.").rpartition(".")
    try:
        kind = getattr(importlib.import_module(module) if module else library, name, None)
    except ImportError:
        kind = None
    if isinstance(kind, type) and issubclass(kind, kinds):
        return kind
    names = [n for n, v in vars(library).items() if isinstance(v, type) and issubclass(v, kinds)]
    raise ValueError(
        f"data.augment: there is no transform {path} in albumentations {library.__version__} or "
        f"elsewhere ({suggest(name, names) or 'see the documentation of albumentations'})"
    )
