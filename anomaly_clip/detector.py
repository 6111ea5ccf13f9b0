"""Detectors from Python: load one, and give it images."""

from __future__ import annotations

import math
import os
import threading
import warnings
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NoReturn, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from anomaly_clip.data.reading_errors import PredictionImages, UnreadableError
from anomaly_clip.decisions.calibration import Calibration
from anomaly_clip.decisions.sentences import guarantee
from anomaly_clip.errors import check_at_least
from anomaly_clip.image_inputs import ImageInput, ImageInputs
from anomaly_clip.loading import CATEGORY, LoadedMethod, check_category, load_method
from anomaly_clip.methods.base import AnomalyMethod
from anomaly_clip.prediction import ImageMap, Prediction
from anomaly_clip.preprocessing import Preprocessing
from anomaly_clip.python_calls import in_python
from anomaly_clip.recording.calibration_files import calibration_file
from anomaly_clip.recording.decisions import Decisions
from anomaly_clip.recording.scoring_conditions import (
    check_calibration,
    check_conditions,
    scoring_conditions,
)
from anomaly_clip.records import Batch, Scores, UnreadableImage
from anomaly_clip.results.map_store import Rows

__all__ = ["CalibrationSource", "Detector", "load"]

CalibrationSource = str | os.PathLike[str] | Mapping[str, Any] | Calibration
"""A ``calibration.json`` or its content, or the folder of a calibrated run."""
GIVE_ONE = "give a calibration, which anomaly_clip calibrate makes"
COLUMNS = ("path", "category", "label", "image_score", "p_value", "decision")
"""Columns of a row that are no parts of a score."""


def load(
    source: str | os.PathLike[str] | AnomalyMethod,
    *,
    category: str | None = None,
    calibration: CalibrationSource | None = None,
    alpha: float | None = None,
    device: str | torch.device | None = None,
    backbone: Mapping[str, Any] | None = None,
    references: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Detector:
    """Load a detector, which scores images as ``anomaly_clip predict`` does.

    Images go through what the checkpoint or the configuration says: size, resize rule, bit depth
    and precision are not the caller's choice.

    Args:
        source: Folder of a run, checkpoint, name of a configuration of the package such as ``sdp``,
            configuration file, or a method in memory. Configurations are for methods that need no
            fit. The images are the caller's own, whatever data set a configuration names.
        category: Name of the object in the images, for methods with prompts; default: that of the
            fit or of the configuration.
        calibration: Calibration that decides; default: the one in the checkpoint or the run's
            folder, if any.
        alpha: False-alarm rate of decisions; default: the first one of the calibration.
        device: ``cpu``, ``cuda``, ``cuda:1`` or ``mps``; default: a GPU if there is one.
        backbone: Settings of the backbone that replace the stored ones, such as the path of weights
            that have moved; other weights than those of the fit are refused.
        references: Folder with normal images, for methods that compare images with them. With a
            configuration, ``data.shots`` of them are drawn; with a fit, all of them are used.
        options: Options of the command line for a configuration, such as ``model={"sigma": 4}``, or
            with dots, ``**{"model.sigma": 4}``.

    Raises:
        ValueError: If the source cannot be loaded, or the calibration does not fit it; in one
            sentence, with the way out.
    """
    loaded = load_method(source, category, device, backbone, references, options)
    for remark in _remarks(loaded):
        warnings.warn(remark, stacklevel=2)
    return Detector(loaded, calibration=calibration, alpha=alpha)


class Detector:
    """A method that is ready to score images, and to decide if it is calibrated.

    Several threads may use it at once: images are decoded in parallel and scored in turn.

    Args:
        loaded: The method; :func:`load` and :func:`fit` make it.
        calibration: See :func:`load`.
        alpha: See :func:`load`.

    Raises:
        ValueError: If the calibration is of another method or of other conditions.
    """

    def __init__(
        self,
        loaded: LoadedMethod,
        *,
        calibration: CalibrationSource | None = None,
        alpha: float | None = None,
    ) -> None:
        self._loaded = loaded
        self._lock = threading.RLock()
        self._decisions_of = lru_cache(maxsize=64)(self._decisions)
        self.alpha = alpha
        """False-alarm rate of decisions; None: the first one of the calibration."""
        self.calibration: Calibration | None = None
        """The calibration; None: there are scores, but no decisions."""
        content, source = calibration, "the calibration"
        if content is None:
            content = loaded.method.calibration or loaded.calibration
            source = f"the calibration of {loaded.source}"
        if content is not None:
            with in_python():
                self.calibration = self._comparable(content, source)
        if loaded.category is not None or (alpha is not None and self.calibration is None):
            self.resolve(None, None)

    def _comparable(self, content: CalibrationSource, source: str) -> Calibration:
        """Return a calibration, after checking that it is of this method and its conditions."""
        method = self.method
        calibration, source = _calibration(content, source)
        check_calibration(method, calibration, source)
        # The bit depth of images is known, and compared, when they are given.
        bits, resize = calibration.conditions.get("bit_depth"), str(self.preprocessing.resize)
        precision = str(self._loaded.trainer.precision)
        # Reference images are loaded for one category.
        categories = [*method.reference_paths] or calibration.categories
        current = scoring_conditions(
            *(method, method.image_size, resize, bits, precision), categories
        )
        check_conditions(calibration.conditions, current, source)
        return calibration

    @property
    def method(self) -> AnomalyMethod:
        """The method, a Lightning module."""
        return self._loaded.method

    @property
    def preprocessing(self) -> Preprocessing:
        """Settings of reading and resizing of the images."""
        return self._loaded.preprocessing

    @property
    def category(self) -> str | None:
        """Category of the images; None if it must be given with them."""
        return self._loaded.category

    @property
    def device(self) -> torch.device:
        """The device that scores images."""
        return self.method.device

    def __reduce__(self) -> NoReturn:
        """Refuse copies and other processes, in which the method would have no trainer.

        Raises:
            TypeError: Always.
        """
        raise TypeError(
            f"a Detector cannot be copied or sent to another process: call anomaly_clip.load with "
            f"{self._loaded.source} there"
        )

    def __repr__(self) -> str:
        """Return one line with method, source, category and calibration."""
        parts = [f"{type(self.method).__name__} of {self._loaded.source}"]
        parts += [] if self.category is None else [f"category {self.category!r}"]
        state = "not calibrated"
        if self.calibration is not None:
            state = f"calibrated, alpha {self.alpha or self.calibration.alphas[0]:g}"
        return f"<Detector: {', '.join([*parts, state, str(self.device)])}>"

    @overload
    def predict(
        self,
        images: Image.Image | NDArray[Any],
        *,
        category: str | None = ...,
        alpha: float | None = ...,
        batch_size: int | None = ...,
    ) -> Prediction: ...

    @overload
    def predict(
        self,
        images: str | os.PathLike[str],
        *,
        category: str | None = ...,
        alpha: float | None = ...,
        batch_size: int | None = ...,
    ) -> Any: ...  # a Prediction of a file, a list of a folder

    @overload
    def predict(
        self,
        images: Iterable[ImageInput],
        *,
        category: str | None = ...,
        alpha: float | None = ...,
        batch_size: int | None = ...,
    ) -> list[Prediction]: ...

    def predict(
        self,
        images: Any,
        *,
        category: str | None = None,
        alpha: float | None = None,
        batch_size: int | None = None,
    ) -> Any:
        """Score one image or several, and decide if there is a calibration.

        Args:
            images: A path, a PIL image, or a uint8 array ``(H, W, 3)`` in RGB or ``(H, W)``, grey.
                Or a folder, a pattern such as ``photos/*.jpg``, or a list of paths, PIL images and
                arrays.
            category: Category of these images; default: that of the detector.
            alpha: False-alarm rate of the decisions; default: that of the detector.
            batch_size: Images that are scored at once; default: that of the configuration, or 16.
                Scores of different batch sizes may differ in the last digits.

        Returns:
            A :class:`Prediction`; for several images, a list in the order given, or sorted by path.
            An image of several that cannot be read has an ``error`` and no score.

        Raises:
            FileNotFoundError: If a single path does not exist.
            ValueError: If a single image cannot be read, or something is not an image, the category
                is missing or unknown, or the bit depth is not that of the calibration.
        """
        name, decisions = self.resolve(category, alpha)
        size = self._loaded.batch_size if batch_size is None else batch_size
        check_at_least("batch_size", size, 1)
        inputs = ImageInputs(images, name)
        bits, remark = inputs.depth(self.preprocessing.bit_depth)
        self._check_depth(bits, inputs)
        remarks = inputs.remarks
        if remark is not None:
            remarks.append(f"{remark}; the option data.bit_depth, or a fit, fixes this number")
        for remark in remarks:
            warnings.warn(remark, stacklevel=2)
        dataset = inputs.dataset(self.method.image_size, self.preprocessing, bits)
        blocks = [
            range(start, min(start + size, len(dataset))) for start in range(0, len(dataset), size)
        ]
        predictions: list[Prediction] = []
        with self._lock if self.method.transductive else nullcontext():
            if self.method.transductive:
                with torch.inference_mode():
                    self.method.observe(_read(dataset, p, inputs.is_single) for p in blocks)
            for places in blocks:
                batch = _read(dataset, places, inputs.is_single)
                predictions += self._predicted(batch, places, inputs, decisions)
        return predictions[0] if inputs.is_single else predictions

    def guarantee(self, category: str | None = None, alpha: float | None = None) -> str:
        """Return what the calibration promises of the rate of false alarms, in a sentence or two.

        Args:
            category: See :meth:`predict`.
            alpha: See :meth:`predict`.

        Raises:
            ValueError: If there is no calibration, or none of the category.
        """
        _, decisions = self.resolve(category, alpha)
        if decisions is None:
            raise ValueError(f"{self._loaded.source} is not calibrated: {self._way_out}")
        [(name, level)] = decisions.levels.items()
        return guarantee(decisions.records[name], level)

    def export(
        self,
        folder: str | os.PathLike[str],
        *,
        format: Literal["onnx", "torch_export"] = "onnx",
        images: str | os.PathLike[str] | None = None,
        overwrite: bool = False,
    ) -> Path:
        """Write a folder that scores images without this package; see docs/export.md.

        Args:
            folder: The folder; it is new, or holds an exported detector.
            format: Format of the program: ONNX, or PyTorch's own.
            images: Folder of images for the comparison with PyTorch; default: generated ones.
            overwrite: Whether an exported detector may be replaced.

        Returns:
            The folder.

        Raises:
            ValueError: If the method cannot be exported, its scores are not in float32, or the
                folder must not be written.
        """
        from anomaly_clip.exporting.exporter import ExportSettings, export_detector

        precision = self.preprocessing.precision
        if precision != "32-true":
            raise ValueError(
                f"{self._loaded.source} scores in {precision}, but programs are in float32: export "
                f"it with the command anomaly_clip export, which loads it again"
            )
        source = None if images is None else Path(os.fsdecode(images)).expanduser()
        with in_python(), self._lock:
            settings = ExportSettings(format, images=source, overwrite=overwrite)
            exported = export_detector(self, Path(os.fsdecode(folder)).expanduser(), settings)
        for remark in [*exported.remarks, *exported.failures.values()]:
            warnings.warn(remark, stacklevel=2)
        return exported.folder

    @property
    def _way_out(self) -> str:
        """Advice on a missing calibration."""
        if self.method.transductive:
            return "choose another method, as scores of images by each other cannot be calibrated"
        return GIVE_ONE

    def resolve(
        self, category: str | None = None, alpha: float | None = None
    ) -> tuple[str, Decisions | None]:
        """Return the name of the category, and the decisions on its images, if it is calibrated.

        Args:
            category: See :meth:`predict`.
            alpha: See :meth:`predict`.

        Raises:
            ValueError: If a category is needed and missing, or has no calibration.
        """
        if category is not None:
            check_category(category)
        loaded, name = self._loaded, self.category if category is None else category
        alpha = self.alpha if alpha is None else alpha
        if self.calibration is None and alpha is not None:
            raise ValueError(
                f"alpha {alpha}: {loaded.source} is not calibrated, so that nothing is decided: "
                f"{self._way_out}, or leave alpha out"
            )
        if name is None and self.method.uses_category_names:
            raise ValueError(
                f"{type(self.method).__name__} inserts the name of the object in the images into "
                f'its prompts: name it, such as category="laser-cut plank", or --data.category on '
                "the command line"
            )
        if self.method.reference_paths and name not in self.method.reference_paths:
            raise ValueError(
                f"category {name}: the reference images are of {self.category}: load a detector "
                f"for each category"
            )
        if self.calibration is None:
            return name or CATEGORY, None
        is_named = category is not None or (name is not None and loaded.is_named)
        if name is None and len(self.calibration.categories) == 1:
            [name] = self.calibration.categories
        with in_python():
            return name or CATEGORY, self._decisions_of(name or CATEGORY, is_named, alpha)

    # -- one call --------------------------------------------------------------------------------

    def _decisions(self, category: str, is_named: bool, alpha: float | None) -> Decisions:
        """Return the decisions at a rate; warn once if it cannot be had."""
        assert self.calibration is not None
        calibration = self.calibration
        if alpha is not None:
            calibration = replace(calibration, alphas=(alpha,))
        decisions = Decisions(
            calibration, self._loaded.source, categories=[category], is_named=is_named
        )
        if not decisions.levels[category].is_as_asked:
            record, level = decisions.records[category], decisions.levels[category]
            warnings.warn(guarantee(record, level), stacklevel=4)
        return decisions

    def _check_depth(self, bits: int | None, inputs: ImageInputs) -> None:
        """Check that files have the bit depth of the calibration; arrays have lost theirs."""
        if self.calibration is None or (bits is None and not inputs.has_files):
            return
        calibrated = self.calibration.conditions.get("bit_depth")
        if bits != calibrated:
            images = f"{inputs.deep[0]} has" if inputs.deep else "these images have"
            raise ValueError(
                f"{images} {bits or 8} bits per channel, but the calibration images had "
                f"{calibrated or 8}: calibrate again, on images of this camera"
            )

    def _predicted(
        self, batch: Batch, places: range, inputs: ImageInputs, decisions: Decisions | None
    ) -> list[Prediction]:
        """Score a batch, and return the predictions of its places in order."""
        failed: dict[int, UnreadableImage] = {e.index: e for e in batch.get("unreadable", [])}
        rows, maps = self._score(batch)
        if decisions is not None:
            decisions.decide(rows, replaces_score=True)
        positions = {place: number for number, place in enumerate(rows)}
        predictions = []
        for place in places:
            source = inputs.sources[place]
            path = None if source.path is None else os.fspath(source.path)
            if place in failed:
                error = failed[place].reason
                predictions.append(Prediction(math.nan, inputs.category, path, error=error))
                continue
            row, image_map = rows[place], None
            if maps is not None:
                # A copy, as a view would keep the maps of the whole batch.
                values, size = maps[positions[place]].copy(), inputs.size(place)
                resize, side = self.preprocessing.resize, self.method.image_size
                image_map = ImageMap(values, size, resize, side)
            predictions.append(
                Prediction(
                    row["image_score"],
                    inputs.category,
                    path,
                    row.get("p_value"),
                    row.get("decision"),
                    parts={name: value for name, value in row.items() if name not in COLUMNS},
                    map_threshold=None
                    if decisions is None
                    else decisions.map_thresholds.get(inputs.category),
                    source=source,
                    image_map=image_map,
                )
            )
        return predictions

    def _score(self, batch: Batch) -> tuple[Rows, NDArray[np.float32] | None]:
        """Return rows of scores by place, and the anomaly maps ``(B, h, w)`` if there are any."""
        if not batch["path"]:
            return {}, None
        plugin = self._loaded.trainer.precision_plugin
        with self._lock, torch.inference_mode(), plugin.predict_step_context():
            moved: Any = {**batch, "image": batch["image"].to(self.device)}
            scores: Scores = self.method.predict_step(moved, 0)
            rows = self.method.image_rows(scores, batch)
            maps = scores["anomaly_map"].float().cpu().numpy() if "anomaly_map" in scores else None
        return dict(zip(batch["index"].tolist(), rows, strict=True)), maps


def _remarks(loaded: LoadedMethod) -> list[str]:
    """Return what a user has to know of the scores."""
    remarks, resize, side = [], loaded.preprocessing.resize, loaded.method.image_size
    if loaded.method.weights["random"]:
        remarks.append(f"{loaded.source} has random weights: its scores mean nothing")
    if resize.size is not None and resize.size > side:
        remarks.append(
            f"{loaded.source} sees only the centre of each image (data.resize {resize.rule}, "
            f"{resize.size} to {side} pixels): the rest is not scored, and NaN in maps"
        )
    return remarks


def _read(dataset: PredictionImages, places: range, is_single: bool) -> Batch:
    """Read some images; one that cannot be read is described, unless it is the only one.

    Raises:
        ValueError: If the only image cannot be read.
    """
    if not is_single:
        return dataset.collate([dataset[place] for place in places])
    try:
        return dataset.collate([dataset.images[0]])
    except UnreadableError as error:
        raise ValueError(error.reason) from None


def _calibration(content: CalibrationSource, source: str) -> tuple[Calibration, str]:
    """Return a calibration, and a description of where it is from.

    Args:
        content: See :func:`load`.
        source: Description of a content that is no file.

    Raises:
        UserError: If there is none, or it is damaged.
    """
    if isinstance(content, Calibration):
        return content, source
    if isinstance(content, Mapping):
        return Calibration.from_dict(content, source), source
    file = calibration_file(os.fsdecode(content))
    return Calibration.read(file), str(file)
