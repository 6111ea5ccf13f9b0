"""Detectors from Python: load or fit one, and give it images."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from anomaly_clip.data.reading_errors import PredictionImages, UnreadableError
from anomaly_clip.decisions.calibration import (
    ANOMALOUS,
    CALIBRATION_FILE,
    NORMAL,
    Calibration,
    CategoryCalibration,
    Level,
    scaled_score,
)
from anomaly_clip.errors import UserError, check_at_least
from anomaly_clip.image_inputs import ImageInput, ImageInputs
from anomaly_clip.loading import CATEGORY, LoadedMethod, in_python, load_method
from anomaly_clip.methods.base import AnomalyMethod
from anomaly_clip.prediction import ImageMap, Prediction
from anomaly_clip.preprocessing import Preprocessing
from anomaly_clip.recording.scoring_conditions import check_conditions, scoring_conditions
from anomaly_clip.records import Batch, UnreadableImage

__all__ = ["Detector", "load"]

CalibrationSource = str | os.PathLike[str] | Mapping[str, Any] | Calibration
"""A ``calibration.json`` or its content, or the folder of a calibrated run."""
MAKE_ONE = "anomaly_clip calibrate makes one"


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
        calibration: Calibration that decides; default: the one in the checkpoint, if any.
        alpha: False-alarm rate of decisions; default: the first one of the calibration.
        device: ``cpu``, ``cuda``, ``cuda:1`` or ``mps``; default: a GPU if there is one.
        backbone: Settings of the backbone that replace the stored ones, such as the path of weights
            that have moved; other weights than those of the fit are refused.
        references: Folder with normal images, for methods that compare images with them.
        options: Options of the command line for a configuration, such as ``model={"sigma": 4}``, or
            with dots, ``**{"model.sigma": 4}``.

    Raises:
        ValueError: If the source cannot be loaded, or the calibration does not fit it; in one
            sentence, with the way out.
    """
    loaded = load_method(source, category, device, backbone, references, options)
    return Detector(loaded, calibration=calibration, alpha=alpha)


class Detector:
    """A method that is ready to score images, and to decide if it is calibrated.

    Several threads may use it at once: images are decoded in parallel and scored in turn.

    Args:
        loaded: The method; :func:`load` makes it.
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
        self._lock = threading.Lock()
        self.alpha = alpha
        """False-alarm rate of decisions; None: the first one of the calibration."""
        self.calibration: Calibration | None = None
        """The calibration; None: there are scores, but no decisions."""
        with in_python():
            self._calibrate(loaded.method.calibration if calibration is None else calibration)
            if self.calibration is not None and loaded.category is not None:
                self.calibration.of(loaded.category, loaded.is_named)

    def _calibrate(self, content: CalibrationSource | None) -> None:
        if content is None:
            return
        method, name = self.method, type(self.method).__name__
        calibration, source = _calibration(content, self._loaded.source)
        if calibration.method != name:
            raise UserError(
                f"{source} is a calibration of {calibration.method}, but the method is {name}: "
                f"give one of {name} ({MAKE_ONE})"
            )
        # The bit depth of the images is known, and compared, when they are given.
        bits, preprocessing = calibration.conditions.get("bit_depth"), self.preprocessing
        precision = str(self._loaded.trainer.precision)
        resize = str(preprocessing.resize)
        current = scoring_conditions(method, method.image_size, resize, bits, precision)
        check_conditions(calibration.conditions, current, source)
        self.calibration = calibration

    @property
    def method(self) -> AnomalyMethod:
        """The method, a Lightning module."""
        return self._loaded.method

    @property
    def preprocessing(self) -> Preprocessing:
        """What images go through before they are scored."""
        return self._loaded.preprocessing

    @property
    def category(self) -> str | None:
        """Category of the images; None if it must be given with them."""
        return self._loaded.category

    @property
    def device(self) -> torch.device:
        """The device that scores images."""
        return self.method.device

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
        name, record, level = self._resolve(category, alpha)
        size = self._loaded.batch_size if batch_size is None else batch_size
        check_at_least("batch_size", size, 1)
        inputs = ImageInputs(images, name)
        bits, remark = inputs.depth(self.preprocessing.bit_depth)
        self._check_depth(bits)
        if remark is not None:
            warnings.warn(f"{remark}", stacklevel=2)
        dataset = inputs.dataset(self.method.image_size, self.preprocessing, bits)
        predictions: list[Prediction] = []
        for start in range(0, len(dataset), size):
            places = range(start, min(start + size, len(dataset)))
            batch = self._read(dataset, places, inputs.is_single)
            predictions += self._predicted(batch, places, inputs, record, level)
        return predictions[0] if inputs.is_single else predictions

    # -- one call --------------------------------------------------------------------------------

    def _resolve(
        self, category: str | None, alpha: float | None
    ) -> tuple[str, CategoryCalibration | None, Level | None]:
        """Return the name of the category, its calibration, and the level that decides."""
        loaded, calibration = self._loaded, self.calibration
        name = loaded.category if category is None else category
        if name is None and self.method.uses_category_names:
            raise ValueError(
                f"{type(self.method).__name__} inserts the name of the object in the images into "
                f'its prompts: name it, such as category="laser-cut plank"'
            )
        if self.method.reference_paths and name not in self.method.reference_paths:
            raise ValueError(
                f"category {name!r}: the reference images are of {loaded.category!r}: load a "
                f"detector for each category"
            )
        alpha = self.alpha if alpha is None else alpha
        if calibration is None:
            if alpha is not None:
                raise ValueError(
                    f"alpha {alpha}: {loaded.source} is not calibrated, so nothing is decided: "
                    f"give a calibration ({MAKE_ONE}), or leave alpha out"
                )
            return name or CATEGORY, None, None
        is_named = category is not None or (name is not None and loaded.is_named)
        with in_python():
            record = calibration.of(name or CATEGORY, is_named)
            rate = calibration.alphas[0] if alpha is None else alpha
            level = record.level(rate, calibration.confidence)
        if not level.is_as_asked:
            warnings.warn(
                f"alpha {rate:g} cannot be had with {record.num_images} calibration images: "
                f"{level.average:.3g} is used",
                stacklevel=3,
            )
        return name or next(iter(calibration.categories)), record, level

    def _check_depth(self, bits: int | None) -> None:
        if bits is None or self.calibration is None:
            return
        calibrated = self.calibration.conditions.get("bit_depth")
        if bits != calibrated:
            raise ValueError(
                f"these images have {bits} bits per channel, but the calibration images had "
                f"{calibrated or 8}: calibrate on images of this camera"
            )

    def _read(self, dataset: PredictionImages, places: range, is_single: bool) -> Batch:
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

    def _predicted(
        self,
        batch: Batch,
        places: range,
        inputs: ImageInputs,
        record: CategoryCalibration | None,
        level: Level | None,
    ) -> list[Prediction]:
        """Score a batch, and return the predictions of its places in order."""
        failed: dict[int, UnreadableImage] = {e.index: e for e in batch.get("unreadable", [])}
        rows, maps = self._score(batch)
        predictions = []
        read = iter(range(len(rows)))
        for place in places:
            source = inputs.sources[place]
            path = None if source.path is None else os.fspath(source.path)
            if place in failed:
                predictions.append(
                    Prediction(float("nan"), inputs.category, path, error=failed[place].reason)
                )
                continue
            number = next(read)
            row = rows[number]
            fixed = ("path", "category", "label", "image_score")
            parts = {key: value for key, value in row.items() if key not in fixed}
            score = float(row["image_score"])
            if record is not None and record.part_ranges is not None:
                score = float(scaled_score(list(parts.values()), record.part_ranges)[0])
            image_map = None
            if maps is not None:
                resize, side = self.preprocessing.resize, self.method.image_size
                image_map = ImageMap(maps[number], inputs.size(place), resize, side)
            predictions.append(
                Prediction(
                    score,
                    inputs.category,
                    path,
                    None if record is None else float(record.p_values([score])[0]),
                    None if level is None else _decision(score, level),
                    None,
                    parts,
                    None if record is None else record.map_threshold,
                    source,
                    image_map,
                )
            )
        return predictions

    def _score(self, batch: Batch) -> tuple[list[dict[str, Any]], NDArray[np.float32] | None]:
        """Return a row of scores per image, and the anomaly maps ``(B, h, w)`` if there are any."""
        if not batch["path"]:
            return [], None
        method = self.method
        plugin = self._loaded.trainer.precision_plugin
        with self._lock, torch.inference_mode(), plugin.predict_step_context():
            moved: Any = {**batch, "image": batch["image"].to(self.device)}
            scores = method.predict_step(moved, 0)
            rows = method.image_rows(scores, batch)
            maps = scores["anomaly_map"].float().cpu().numpy() if "anomaly_map" in scores else None
        return rows, maps


def _decision(score: float, level: Level) -> str:
    return ANOMALOUS if score > level.threshold else NORMAL


def _calibration(content: CalibrationSource, default: str) -> tuple[Calibration, str]:
    """Return a calibration, and a description of where it is from.

    Raises:
        UserError: If there is none, or it is damaged.
    """
    if isinstance(content, Calibration):
        return content, "the calibration"
    if isinstance(content, Mapping):
        return Calibration.from_dict(content, f"the calibration of {default}"), default
    path = Path(os.fsdecode(content)).expanduser()
    if path.is_dir():
        files = [folder / CALIBRATION_FILE for folder in (path, path / "checkpoints")]
        found = next((file for file in files if file.is_file()), None)
        if found is None:
            raise UserError(f"{path} has no {CALIBRATION_FILE}: name a calibrated run ({MAKE_ONE})")
        path = found
    return Calibration.read(path), str(path)
