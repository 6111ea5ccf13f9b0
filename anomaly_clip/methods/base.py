"""Base class of all detectors: steps, evaluation, checkpoints and protocol."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from anomaly_clip.backbones.frozen import FrozenBackbone
from anomaly_clip.files import write_json
from anomaly_clip.maps import resize_maps
from anomaly_clip.methods.evaluated import (
    EvaluatedModule,
    check_backbone,
    evaluation_loader,
    frozen_dtype,
    missing_data_module,
    reached_limit,
    without_backbone,
)
from anomaly_clip.methods.score_input import checked_score
from anomaly_clip.metric_values import CURVES_FILE
from anomaly_clip.metrics.evaluator import Evaluator, EvaluatorSettings
from anomaly_clip.progress import say, track
from anomaly_clip.records import Batch, LoaderNeeds, Scores, WeightsRecord

if TYPE_CHECKING:
    from anomaly_clip.data.dataset import AnomalyData

__all__ = ["AnomalyMethod"]


class AnomalyMethod(EvaluatedModule):
    """A method that scores images. Subclasses implement the scoring; this class does the rest.

    Args:
        evaluator: Settings of the metrics.
    """

    is_detector: ClassVar[bool] = True
    one_category: ClassVar[bool] = False
    """True if each category needs its own model."""
    score_part_names: ClassVar[tuple[str, ...]] = ()
    """Names of the columns of ``score_parts``."""
    scaled_parts: ClassVar[tuple[bool, ...]] = ()
    """True for each part that is min-max scaled over the images of a category before all are added;
    default: all."""
    uses_category_names: ClassVar[bool] = False
    """True if category names are inserted into prompts."""
    inference_arguments: ClassVar[frozenset[str]] = frozenset({"evaluator"})
    metric_arguments: ClassVar[frozenset[str]] = frozenset({"evaluator"})
    """Arguments that affect the metrics of a test, but no score."""
    backbone: FrozenBackbone
    """The frozen image encoder. Under mixed precision its weights are cast once, in ``setup``."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "score" in vars(cls):
            cls.score = checked_score(cls.score)  # type: ignore[method-assign, assignment]

    def __init__(self, evaluator: EvaluatorSettings = EvaluatorSettings()) -> None:
        super().__init__()
        self.evaluator_settings = evaluator
        self.fitted_images: frozenset[str] = frozenset()
        """Hashes of the decoded images of the fit, which a test must not contain."""
        self.validated_images: frozenset[str] = frozenset()
        """Hashes of the images that were held out of the fit for its validation."""
        self.fitted_without = 0
        """Number of images that were left out of the fit, because they could not be read."""
        self.bit_depth: int | None = None
        """Significant bits of the 16-bit images of the fit; None if there were none."""
        self.fitted_category: str | None = None
        """Category of the fit of a method with one model per category; None if unknown."""
        self.calibration: dict[str, Any] | None = None
        """Content of ``calibration.json`` of the fitted state, None without one."""
        self.preprocessing: dict[str, Any] | None = None
        """Preprocessing of the images of the fit, before they were scored; None if unknown."""

    @property
    @abstractmethod
    def image_size(self) -> int:
        """Side of the square input images of ``score``, in pixels."""

    @property
    def loader_needs(self) -> LoaderNeeds:
        """Requirements on the data loaders: images of side ``image_size``."""
        return LoaderNeeds(
            self.image_size,
            category_names=self.uses_category_names,
            fitted_images=self.fitted_images,
            bit_depth=self.bit_depth,
            is_fitted=self.must_be_fitted,
            validated_images=self.validated_images,
            calibrated_images=self._calibrated_images(),
            shots=self.use_of_shots,
        )

    @property
    def weights(self) -> WeightsRecord:
        """The weights of the backbone.

        Raises:
            TypeError: If the method has no backbone.
        """
        if getattr(self, "backbone", None) is None:
            raise TypeError(
                f"{type(self).__name__} has no backbone: assign one of anomaly_clip.backbones to "
                f"self.backbone in its constructor"
            )
        return self.backbone.weights

    @abstractmethod
    def score(self, images: Tensor, categories: list[str]) -> Scores:
        """Score images. This method performs the entire inference.

        The arguments are checked before the code of a subclass runs.

        Args:
            images: uint8 ``(B, 3, H, W)``, RGB from 0 to 255; or floating point and already
                normalised with the backbone's mean and standard deviation.
            categories: The category of each image.

        Raises:
            ValueError: If the images are not such a batch, floating-point values look like 0 to 1
                or 0 to 255, or there is not one category per image.
        """

    def score_category(self, images: Tensor, category: str) -> Scores:
        """Score images of one category, in operations that ``torch.export`` can follow.

        The number of images is unknown while a graph is traced. So :meth:`score` is then called
        with the category once, in place of once per image; its arguments are not checked. This is
        enough for methods that ignore the categories, or whose features of a category
        broadcast over the batch; others override this method. It must score as :meth:`score` does,
        which it calls outside a graph. Call it once before a graph is traced, so that constants
        such as the features of prompts are cached: tracing does not compute them.

        Args:
            images: uint8 ``(B, 3, S, S)``, RGB.
            category: The category of all images.
        """
        if not torch.compiler.is_compiling():
            return self.score(images, [category] * len(images))
        return self.score(images, [category])

    def score_features(self, features: dict[str, Tensor], categories: list[str]) -> Scores:
        """Score cached features of the frozen encoder; only for methods that cache features.

        Args:
            features: Features that the data set returns in place of images.
            categories: The category of each image.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no cached features to score: call score with images"
        )

    def observe(self, batches: Iterable[Batch]) -> None:
        """See all images of an evaluation before the first one is scored; by default do nothing.

        Called of transductive methods only.

        Args:
            batches: The batches of this process that are scored afterwards, on the CPU; they are
                only loaded if they are asked for. They may have ``features`` in place of images;
                see :meth:`cached_features`.
        """

    def cached_features(self, dataset: Any) -> AbstractContextManager[object]:
        """Return a context in which a data set returns cached features to :meth:`observe`."""
        return nullcontext()

    def score_batch(self, batch: Batch) -> Scores:
        """Score the images, or the cached features, of a batch of an evaluation."""
        if "features" in batch:
            return self.score_features(batch["features"], batch["category"])
        return self.score(batch["image"], batch["category"])

    def take_references(self, data: AnomalyData, category: str) -> None:
        """Encode a category's reference images outside a run; by default do nothing."""

    def prepare(self, categories: list[str]) -> None:
        """Prepare the categories before scoring; the model is already on its device."""

    def setup(self, stage: str) -> None:
        """Build the evaluator for the data module's categories; cast the frozen backbone.

        Raises:
            ValueError: If ``validate`` or ``test`` has no data module of this package, or if a
                model of a single category gets several categories.
        """
        _ = self.backbone.identity  # hash the weights now: with bf16-true they are cast next
        dtype = frozen_dtype(str(self.trainer.precision), self.trainer.strategy.root_device)
        if dtype is not None:
            self.backbone.cast(dtype)
        data = self.data
        if data is not None:
            self._check_one_category(data, stage)
            if stage == "fit":
                self.fitted_images = data.fitted_hashes()
                self.validated_images = data.leakage.validation_hashes()
                self.fitted_without = len(data.unreadable.of_fit())
                self.bit_depth = None if data.auxiliary else data.reading.bits_in_use
                precision = str(self.trainer.precision)
                self.preprocessing = {**data.reading.preprocessing(), "precision": precision}
                if self.one_category and data.train_categories == data.categories:
                    self.fitted_category = data.categories[0]
            validating = stage in ("fit", "validate")
            categories = data.validation_categories() if validating else data.categories
            self.evaluator = self.new_evaluator(categories)
        elif stage in ("validate", "test"):
            raise missing_data_module(self, TrainerFn(stage).value)

    def new_evaluator(self, categories: list[str]) -> Evaluator:
        """Return an evaluator of this method's scores."""
        return Evaluator(categories, self.evaluator_settings, self.scaled_parts)

    def _check_one_category(self, data: AnomalyData, stage: str) -> None:
        names = data.train_categories if stage == "fit" else data.categories
        if self.one_category and len(names) > 1:
            raise ValueError(
                f"{type(self).__name__} is one model per category, but data.root {data.root} has "
                f"{len(names)} categories: choose one, as in --data.categories '[{names[0]}]', or "
                f"run all of them with the command anomaly_clip each"
            )

    def words(self, category: str) -> str:
        """Return the name of a category in prompts."""
        return category if self.data is None else self.data.words(category)

    @property
    def dataset_name(self) -> str | None:
        """Name of the evaluated data set; None without a data module."""
        data = self.evaluated_data
        return None if data is None else data.dataset_name

    @property
    def evaluated_data(self) -> AnomalyData | None:
        """The evaluated data set: the data module, or the one of its validation images."""
        data = self.data
        if data is None:
            return None
        validating = self.trainer.state.fn in (TrainerFn.FITTING, TrainerFn.VALIDATING)
        return data.validation.source if validating else data

    @property
    def external_weights(self) -> dict[str, str] | None:
        """File and sha256 of trained weights that come from neither this fit nor a checkpoint."""
        return None

    def evaluation_protocol(self) -> dict[str, Any]:
        """Return how the metrics were computed, and whether they needed fitted weights."""
        settings, external = self.evaluator_settings, self.external_weights
        return {
            **({} if external is None else {"auxiliary": None}),  # unknown training data
            "fitted": self.must_be_fitted or external is not None,
            "borrowed": external,
            "pixels": settings.pixels,
            "pro_steps": settings.pro_steps,
            "fpr_limit": settings.fpr_limit,
            # The training images are unknown, so their overlap with test images is unknown too.
            **({} if external is None else {"overlap": None}),
            **({"fitted_without": self.fitted_without} if self.fitted_without else {}),
        }

    @property
    def evaluation_note(self) -> str:
        """Variant of PRO, for the title of the metrics table."""
        steps = self.evaluator_settings.pro_steps
        return f"; PRO {'over all thresholds' if steps is None else f'in {steps} steps'}"

    def image_rows(self, outputs: Scores, batch: Batch) -> list[dict[str, Any]]:
        """Return path, category, label, image score and score parts of each image."""
        labelled = self.data is None or self.data.has_labels
        scores = outputs["image_score"].float().tolist()
        parts: list[list[float]] = [[] for _ in scores]
        if "score_parts" in outputs:
            parts = outputs["score_parts"].float().tolist()
        return [
            {
                "path": batch["path"][row],
                "category": batch["category"][row],
                "label": int(batch["label"][row]) if labelled else None,
                "image_score": scores[row],
                **(dict(zip(self.score_part_names, parts[row], strict=True)) if parts[row] else {}),
            }
            for row in range(len(scores))
        ]

    def final_scores(self) -> dict[int, float]:
        """Return final image scores by index; scaling their parts needs the whole evaluation."""
        images = self.evaluator.images
        assert images is not None
        return dict(zip(images.index.tolist(), images.score.tolist(), strict=True))

    def write_extras(self, folder: Path) -> None:
        """Write the ROC, precision-recall and PRO curves."""
        write_json(folder / CURVES_FILE, self.evaluator.curves)

    def validation_step(self, batch: Batch, batch_idx: int) -> Scores:
        """Score a batch and pass it to the evaluator."""
        return self._evaluate(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> Scores:
        """Score a batch and pass it to the evaluator."""
        return self._evaluate(batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> Scores:
        """Score a batch; none of its images may have been readable."""
        return self._score(batch) if batch["path"] else Scores(image_score=torch.zeros(0))

    def on_validation_start(self) -> None:
        """Prepare the categories."""
        self._prepare()

    def on_test_start(self) -> None:
        """Prepare the categories."""
        self._prepare()

    def on_predict_start(self) -> None:
        """Prepare the categories."""
        self._prepare()

    def on_validation_epoch_end(self) -> None:
        """Compute the metrics and log them as ``val/...``."""
        self._finish("val")

    def on_test_epoch_end(self) -> None:
        """Compute the metrics and log them as ``test/...``."""
        self._finish("test")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Drop the frozen backbone from the checkpoint; keep its name and hash."""
        checkpoint["state_dict"] = without_backbone(checkpoint["state_dict"])
        checkpoint["backbone"] = {**self.weights, "sha256": self.backbone.identity}
        checkpoint["fitted_images"] = sorted(self.fitted_images)
        if self.validated_images:
            checkpoint["validated_images"] = sorted(self.validated_images)
        if self.fitted_without:
            checkpoint["fitted_without"] = self.fitted_without
        checkpoint["bit_depth"] = self.bit_depth
        if self.fitted_category is not None:
            checkpoint["fitted_category"] = self.fitted_category
        if self.calibration is not None:
            checkpoint["calibration"] = self.calibration
        if self.preprocessing is not None:
            checkpoint["preprocessing"] = self.preprocessing

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the current backbone to the checkpoint, so that its state dict loads strictly.

        Raises:
            ValueError: If the checkpoint was trained with a different backbone, or if a complete
                fit would resume with other training images.
        """
        self._compare_data(checkpoint)
        saved = checkpoint.get("backbone", {})
        check_backbone(saved, saved.get("sha256"), self.weights, self.backbone.identity)
        backbone = {f"backbone.{k}": v for k, v in self.backbone.state_dict().items()}
        checkpoint["state_dict"] = {**checkpoint["state_dict"], **backbone}

    def take_fit_record(self, checkpoint: Mapping[str, Any]) -> None:
        """Take from a checkpoint what data modules need to know of the images of the fit."""
        self.fitted_images = frozenset(checkpoint.get("fitted_images", ()))
        self.validated_images = frozenset(checkpoint.get("validated_images", ()))
        self.bit_depth = checkpoint.get("bit_depth")
        self.fitted_without = checkpoint.get("fitted_without", 0)
        self.calibration = checkpoint.get("calibration")
        self.preprocessing = checkpoint.get("preprocessing")

    def _calibrated_images(self) -> frozenset[str]:
        try:
            categories = (self.calibration or {}).get("categories", {})
            return frozenset(image for c in categories.values() for image in c["images"])
        except (AttributeError, LookupError, TypeError):  # damaged: reported where it decides
            return frozenset()

    def _compare_data(self, checkpoint: dict[str, Any]) -> None:
        """Take what a checkpoint was fitted on, and tell if the current data differs from it.

        Raises:
            ValueError: If a complete fit would resume with other training images.
        """
        images = frozenset(checkpoint.get("fitted_images", ()))
        category = checkpoint.get("fitted_category")
        fitting = self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        data = None if fitting or category is None else self.data
        if data is not None and data.has_default_name and self.trainer.predicting:
            data = None  # the name of a folder of new images names no object
        if fitting and images and self.fitted_images and images != self.fitted_images:
            new, missing = len(self.fitted_images - images), len(images - self.fitted_images)
            differences = f"{new} are new and {missing} are missing"
            if (limit := reached_limit(checkpoint, self.trainer)) is not None:
                raise ValueError(
                    f"the fit of the checkpoint is complete ({limit}), but on other training "
                    f"images: {differences}; leave --ckpt_path out to fit anew, or raise the limit "
                    f"to train on with them"
                )
            say(f"the training images differ from those of the checkpoint: {differences}")
        elif data is not None and [category] != data.categories:
            say(
                f"{type(self).__name__} was fitted on {category}, but now scores "
                f"{', '.join(data.categories)}"
            )
        if fitting:  # the data module has read the current images already
            self.fitted_images |= images  # a calibration is dropped: weights will change
            if self.data is not None:
                self.data.calibration.compare(self.fitted_images)
        else:
            self.take_fit_record(checkpoint)
        self.fitted_category = category if self.fitted_category is None else self.fitted_category

    def configure_optimizers(self) -> Any:
        """Return None: methods trained by gradient descent override this."""
        return None

    def _prepare(self) -> None:
        if self.data is not None:
            with torch.no_grad():
                self.prepare(list(self.evaluator.categories))
        if self.transductive:
            loader, limit = evaluation_loader(self.trainer)
            with torch.no_grad(), self.cached_features(loader.dataset):
                total = min(limit, len(loader))
                self.observe(track(_first(loader, total), "encoding images", total))

    def _score(self, batch: Batch) -> Scores:
        scores = self.score_batch(batch)
        if "anomaly_map" in scores and "mask" in batch:
            size = (batch["mask"].shape[-2], batch["mask"].shape[-1])
            scores["anomaly_map"] = resize_maps(scores["anomaly_map"], size)
        return scores

    def _evaluate(self, batch: Batch) -> Scores:
        scores = self._score(batch)
        self.evaluator.update(scores, batch)
        return scores

    def _finish(self, prefix: str) -> None:
        self.results = self.evaluator.compute()
        self.evaluator.reset()
        self.log_metrics(prefix, self.results["mean"])


def _first(loader: Iterable[Batch], total: int) -> Iterator[Batch]:
    """Yield the first batches; workers of the loader start with the first one."""
    yield from islice(loader, total)
