"""Base class of CLIP methods that are trained on the labelled images of another data set."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from anomaly_clip.backbones import blocks, clip, clip_towers, frozen, surgery
from anomaly_clip.errors import check_above, check_at_least
from anomaly_clip.files import source_hash
from anomaly_clip.methods.clip_method import CLIPMethod
from anomaly_clip.progress import say
from anomaly_clip.records import Batch, Encoder, Scores, UseOfShots

if TYPE_CHECKING:
    from anomaly_clip.data.dataset import AnomalyData

__all__ = ["AuxiliaryTraining"]


TOKEN_CODE = (blocks, clip, clip_towers, frozen, surgery)
"""Modules that the tokens of a frozen image tower depend on."""


class AuxiliaryTraining(CLIPMethod, ABC):
    """A method with a frozen CLIP that ``fit`` trains on the test split of ``data.auxiliary``.

    The tokens of the frozen image tower are encoded once and cached. A subclass implements
    :meth:`tokens`, :meth:`score_tokens`, :meth:`losses`, :meth:`configure_optimizers` and
    :meth:`export`, and calls :meth:`set_training` in its constructor.
    """

    can_be_fitted: ClassVar[bool] = True
    use_of_shots: ClassVar[UseOfShots] = "none"
    token_code: ClassVar[tuple[ModuleType, ...]] = ()
    """Modules that :meth:`tokens` uses, other than its own and those of the backbone."""

    def set_training(self, lr: float, feature_cache_gb: float) -> None:
        """Set and check the options that all these methods share.

        Args:
            lr: Learning rate of Adam.
            feature_cache_gb: Maximum size of the cache of features, in GB (1e9 bytes).

        Raises:
            ValueError: If an option is out of its range.
        """
        check_above("model.lr", lr, 0)
        check_at_least("model.feature_cache_gb", feature_cache_gb, 0)
        self.lr = lr
        self.feature_cache_gb = feature_cache_gb
        self.fitted = False
        """True if trained weights were read from a file."""
        self._external: dict[str, str] | None = None
        self._started_from: dict[str, str] | None = None
        """File and sha256 of the trained weights that a fit started from."""
        self._cached: dict[str, Encoder] = {}
        """Encoders of those sets of the fit, ``fit`` and ``validation``, whose features are cached.
        """

    # -- parts of a method -----------------------------------------------------------------------

    @abstractmethod
    def tokens(self, images: Tensor, *, scoring: bool) -> dict[str, Tensor]:
        """Return the tokens of the frozen image tower, in the dtype of the tower.

        Args:
            images: uint8 ``(B, 3, H, W)``, or floating point and already normalised.
            scoring: True: return all tokens that scoring needs. False: return only those that a
                training step needs.
        """

    @abstractmethod
    def score_tokens(self, tokens: dict[str, Tensor], categories: list[str]) -> Scores:
        """Score tokens that :meth:`tokens` returned for scoring, maybe in half precision.

        Args:
            tokens: Tokens by name.
            categories: The category of each image.
        """

    @abstractmethod
    def losses(self, tokens: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Return the weighted terms of the loss, which are summed, by name.

        Args:
            tokens: Tokens that :meth:`tokens` returned for training, maybe in half precision.
            batch: Masks, labels and categories.
        """

    @abstractmethod
    def token_options(self, scoring: bool) -> str:
        """Return text that identifies the options that :meth:`tokens` depends on."""

    @property
    @abstractmethod
    def export_name(self) -> str:
        """Name of the exported file."""

    @abstractmethod
    def export(self, folder: Path) -> Path:
        """Write the trained weights in the authors' format."""

    # -- data ------------------------------------------------------------------------------------

    @property
    def must_be_fitted(self) -> bool:  # type: ignore[override]
        """True while there are no trained weights."""
        return not self.fitted

    @property
    def external_weights(self) -> dict[str, str] | None:
        """File and sha256 of the trained weights, if they were read from a file."""
        return self._external

    def evaluation_protocol(self) -> dict[str, Any]:
        """Return how the metrics were computed, and the file that the fit started from, if any."""
        protocol = super().evaluation_protocol()
        if self._external is not None or self._started_from is None:
            return protocol
        # The training images of the file are unknown, so their overlap with test images is, too.
        return {**protocol, "started_from": self._started_from, "overlap": None}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Record the file that the fit started from; see the base class."""
        super().on_save_checkpoint(checkpoint)
        record = self._external or self._started_from
        if record is not None:
            checkpoint["started_from"] = record

    def take_fit_record(self, checkpoint: Mapping[str, Any]) -> None:
        """Take the file that the fit started from; see the base class."""
        super().take_fit_record(checkpoint)
        self._started_from = checkpoint.get("started_from")

    def setup(self, stage: str) -> None:
        """Check that there is a labelled data set to train on; see the base class.

        Raises:
            ValueError: If ``fit`` has no auxiliary data set, or one without masks or anomalies.
        """
        super().setup(stage)
        name = type(self).__name__
        if stage == "fit" and (self.data is None or self.data.auxiliary is None):
            raise ValueError(
                f"{name} is trained on the labelled test images of another data set, but "
                "data.auxiliary is not set: name one, as in --data.auxiliary VisA "
                "--data.auxiliary.root DIR"
            )
        if stage == "fit" and not self.auxiliary_data.has_masks:
            raise ValueError(
                f"{name} is trained on masks, but data.auxiliary "
                f"{self.auxiliary_data.dataset_name} has none: choose a data set with masks, such "
                f"as VisA or MVTecAD"
            )
        if stage != "fit":
            return
        assert self.data is not None
        labels = {bool(sample.label) for sample in self.data.fit_samples()}
        if labels == {True}:
            say(
                f"none of the training images of data.auxiliary "
                f"{self.auxiliary_data.dataset_name} is normal, so that nothing is learnt about "
                f"normal images as a whole"
            )
        if True not in labels:
            raise ValueError(
                f"{name} is trained on normal and anomalous images, but none of those of "
                f"data.auxiliary {self.auxiliary_data.dataset_name} is anomalous: choose a data "
                f"set or categories with defects"
            )

    @property
    def auxiliary_data(self) -> AnomalyData:
        """Auxiliary data set that ``fit`` trains on."""
        assert self.data is not None
        assert self.data.auxiliary is not None
        return self.data.auxiliary

    # -- cached features -------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Encode all images once with the frozen image tower; see ``feature_cache_gb``.

        Raises:
            ValueError: If the features would exceed ``feature_cache_gb``.
        """
        self._cached = {}
        data = self.data
        if self.feature_cache_gb == 0 or data is None or self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        encoders = {
            name: Encoder(partial(self.tokens, scoring=scoring), self._key(scoring), self.device)
            for name, scoring in (("fit", False), ("validation", True))
        }
        sets = data.cache_features(encoders, self.feature_cache_gb, "model.feature_cache_gb")
        self._cached = {name: encoders[name] for name in sets}

    def _key(self, scoring: bool) -> str:
        backbone = self.backbone
        files = [str(module.__file__) for module in (*TOKEN_CODE, *self.token_code)]
        encoder = Path(inspect.unwrap(type(self).tokens).__code__.co_filename)
        code = source_hash(*files, *([str(encoder)] if encoder.is_file() else []))
        dtype = next(backbone.tower.parameters()).dtype
        pixels = f"{backbone.mean.flatten().tolist()} {backbone.std.flatten().tolist()}"
        options = f"{type(self).__name__} {self.token_options(scoring)} {scoring}"
        packages = [version(name) for name in ("open_clip_torch", "timm")]
        return f"{backbone.identity} {dtype} {pixels} {options} {code} {packages}"

    def _halves(self, name: str, batch: Batch) -> dict[str, Tensor]:
        """Encode images whose features are not in the cache, with the values that it would keep."""
        try:
            return self._cached[name].halves(batch["image"])
        except OverflowError as error:
            raise ValueError(
                f"{error}, in the batch that starts with {batch['path'][0]}: set "
                f"model.feature_cache_gb to 0"
            ) from None

    # -- steps -----------------------------------------------------------------------------------

    @torch.no_grad()
    def score_features(self, features: dict[str, Tensor], categories: list[str]) -> Scores:
        """Score tokens that :meth:`tokens` returned and that were cached in half precision."""
        return self.score_tokens(features, categories)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch of labelled images of the auxiliary data set."""
        if "features" in batch:
            tokens = batch["features"]
        elif "fit" in self._cached:
            tokens = self._halves("fit", batch)
        else:
            tokens = self.tokens(batch["image"], scoring=False)
        with self.backbone.out_of_autocast():
            terms = self.losses(tokens, batch)
            loss = torch.stack(list(terms.values())).sum()
        count = len(batch["label"])
        metrics = {f"train/{name}": value.detach() for name, value in terms.items()}
        self.log_dict(metrics, on_step=False, on_epoch=True, batch_size=count, sync_dist=True)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=count)
        return loss

    def _score(self, batch: Batch) -> Scores:
        fitting = self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        if fitting and "image" in batch and "validation" in self._cached:
            batch = Batch({**batch, "features": self._halves("validation", batch)})
        return super()._score(batch)
