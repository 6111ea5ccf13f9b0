"""AUROC of an exported program and of torch, on a folder with labelled images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import default_collate

from anomaly_clip.data.folder_forms import understand
from anomaly_clip.data.info import MaskRule
from anomaly_clip.data.mask_files import OWN_MISFIT, OWN_MISFIT_SHARE
from anomaly_clip.data.reading_errors import ReadingGuard, UnreadableError
from anomaly_clip.data.samples import Sample, SampleDataset, read_sample
from anomaly_clip.decisions.calibration import CategoryCalibration
from anomaly_clip.decisions.conformal import binomial_interval
from anomaly_clip.detector import Detector
from anomaly_clip.errors import UserError
from anomaly_clip.exporting.parity import Arrays, Run, num_flips
from anomaly_clip.exporting.parity_images import generated_images
from anomaly_clip.image_inputs import ImageInputs
from anomaly_clip.images import ReadRule, evenly_spaced
from anomaly_clip.maps import resize_maps
from anomaly_clip.metrics.evaluator import Evaluator, EvaluatorSettings
from anomaly_clip.progress import number_of

__all__ = [
    "NOT_MEASURED",
    "Drift",
    "LabelledImages",
    "labelled_images",
    "measure_drift",
    "range_images",
]

NOT_MEASURED = "AUROC drift not measured: give --data.root, a folder with labelled images"
MAX_MEASURED = 2000
"""Images of a folder that are scored; of more, as many evenly spaced ones."""
BATCH = 8
NUM_RANGE_IMAGES = 32
"""Normal images from which ranges of 8-bit integers are derived. Our choice."""
LARGEST_DRIFT = 0.005
"""Change of an AUROC above which a warning is printed: half a point, our choice."""
AUROCS = {"image_auroc": "image AUROC", "pixel_auroc": "pixel AUROC"}


@dataclass(frozen=True)
class Measured:
    """Metrics of one program.

    Args:
        image_auroc: Fraction.
        pixel_auroc: Fraction; None without masks or maps.
        flips: Number of decisions that differ from those of torch; None without a calibration.
    """

    image_auroc: float
    pixel_auroc: float | None = None
    flips: int | None = None


@dataclass(frozen=True)
class Drift:
    """Metrics of torch and of programs on the same labelled images.

    Args:
        source: The folder.
        images: Number of images.
        anomalous: How many of them are anomalous.
        unreadable: Number of further images that could not be read.
        left_out: Number of further images, because there are many.
        torch: Metrics of torch in float32.
        programs: Metrics of each program by its runtime.
    """

    source: str
    images: int
    anomalous: int
    unreadable: int
    left_out: int
    torch: Measured
    programs: Mapping[str, Measured] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for ``detector.json``; AUROCs are fractions."""
        programs = {}
        for name, measured in self.programs.items():
            programs[name] = {
                **{key: getattr(measured, key) for key in AUROCS},
                **{f"{key}_drift": self._change(measured, key) for key in AUROCS},
                "flips": measured.flips,
                "flip_rate": None
                if measured.flips is None
                else list(binomial_interval(measured.flips, self.images)),
            }
        counts = ("source", "images", "anomalous", "unreadable", "left_out")
        return {
            **{name: getattr(self, name) for name in counts},
            "torch": {key: getattr(self.torch, key) for key in AUROCS},
            "programs": programs,
        }

    def lines(self, file: str) -> list[str]:
        """Return lines for the screen.

        Args:
            file: Name of the program.
        """
        lines = []
        for name, measured in self.programs.items():
            parts = []
            for key, title in AUROCS.items():
                change = self._change(measured, key)
                if change is not None:
                    value, points = getattr(measured, key), 100 * change
                    parts.append(f"{title} {value:.2%}, {points:+.3f} points from torch")
            if measured.flips is not None:
                parts.append(self._flips(measured.flips))
            lines.append(
                f"{file} in {name}, {number_of(self.images, 'labelled image')} of {self.source} "
                f"({self.anomalous} anomalous): {'; '.join(parts)}"
            )
        for count, reason in (
            (self.unreadable, "could not be read"),
            (self.left_out, f"were left out: at most {MAX_MEASURED} are scored, evenly spaced"),
        ):
            if count:
                lines.append(f"{number_of(count, 'further image')} of {self.source} {reason}")
        return lines

    def warnings(self, file: str) -> list[str]:
        """Return a warning for each program with other decisions, or a large change of an AUROC."""
        messages = []
        for name, measured in self.programs.items():
            parts = [
                f"its {title} changes by {100 * change:+.2f} points"
                for key, title in AUROCS.items()
                if (change := self._change(measured, key)) is not None
                and abs(change) > LARGEST_DRIFT
            ]
            if measured.flips:
                parts.append(f"{measured.flips} of {self.images} decisions differ")
            if parts:
                messages.append(f"{file} in {name} is not as good as torch: {', '.join(parts)}")
        return messages

    def _change(self, measured: Measured, key: str) -> float | None:
        value, reference = getattr(measured, key), getattr(self.torch, key)
        return None if value is None or reference is None else value - reference

    def _flips(self, flips: int) -> str:
        low, high = binomial_interval(flips, self.images)
        return (
            f"{flips} of {number_of(self.images, 'decision')} differ "
            f"({low:.1%} to {high:.1%} with 95 % confidence)"
        )


class LabelledImages:
    """The labelled images of a folder, read as the detector reads images.

    Args:
        detector: The detector.
        folder: The folder.
        samples: Its labelled images.
        has_masks: Whether defects have masks.
    """

    def __init__(
        self, detector: Detector, folder: Path, samples: list[Sample], has_masks: bool
    ) -> None:
        self.folder = folder
        self.category = samples[0].category
        chosen = [samples[place] for place in evenly_spaced(MAX_MEASURED, len(samples))]
        self.left_out = len(samples) - len(chosen)
        self.unreadable = 0
        """Number of images that could not be read, in the last pass."""
        self._dataset = _dataset(detector, chosen, has_masks)

    def batches(self) -> Iterator[dict[str, Any]]:
        """Yield batches of the images that can be read, with masks of the size of the images."""
        self.unreadable = 0
        for start in range(0, len(self._dataset), BATCH):
            items = []
            for place in range(start, min(start + BATCH, len(self._dataset))):
                try:
                    items.append(self._dataset[place])
                except UnreadableError:
                    self.unreadable += 1
            if items:
                yield default_collate(items)


def _dataset(detector: Detector, samples: list[Sample], has_masks: bool) -> SampleDataset:
    preprocessing, side = detector.preprocessing, detector.method.image_size
    paths = ImageInputs([sample.image for sample in samples], samples[0].category)
    bits, _ = paths.depth(preprocessing.bit_depth)
    reading = ReadRule(bits or 16, preprocessing.max_pixels)
    rule = MaskRule(
        fitted=OWN_MISFIT,
        fitted_share=OWN_MISFIT_SHARE,
        lenient=not has_masks,
        max_pixels=preprocessing.max_pixels,
    )
    return SampleDataset(
        samples,
        side,
        side,
        has_masks=has_masks,
        guard=ReadingGuard(lambda sample: read_sample(sample, rule, reading)),
        mask_rule=rule,
        reading=reading,
        resize=preprocessing.resize,
    )


def labelled_images(detector: Detector, folder: Path) -> LabelledImages | None:
    """Return the labelled images of a folder.

    The forms of folders are those of a fit. Images of ``train/`` are left out.

    Args:
        detector: The detector.
        folder: The folder.

    Returns:
        None if the folder has no labels, or not both normal and anomalous images.
    """
    if not folder.is_dir():
        return None
    form = understand(folder, detector.resolve()[0])
    labels = {sample.label for sample in form.labelled}
    if labels != {False, True}:
        return None
    samples = sorted(form.labelled, key=lambda sample: sample.image)
    return LabelledImages(detector, folder, samples, form.has_masks)


def range_images(detector: Detector, folder: Path | None) -> tuple[NDArray[np.uint8], str]:
    """Return normal images, from which ranges of 8-bit integers are derived.

    Args:
        detector: The detector.
        folder: A folder in which labels tell the normal images; others count all images.

    Returns:
        uint8 ``(N, 3, S, S)``, and a description of where they are from.

    Raises:
        UserError: If none of the images can be read.
    """
    if folder is None:
        # Every second generated image has a defect.
        generated = generated_images(detector, 2 * NUM_RANGE_IMAGES).square[::2]
        return generated, number_of(len(generated), "generated image")
    form = understand(folder, detector.resolve()[0]) if folder.is_dir() else None
    samples = [] if form is None else [*form.train, *form.labelled]
    normal = [sample for sample in samples if not sample.label]
    if form is not None and not normal:
        normal = form.unlabelled
    if not normal:
        raise UserError(f"--data.root {folder}: it has no normal image: give a folder with some")
    normal = sorted(normal, key=lambda sample: sample.image)
    chosen = [normal[place] for place in evenly_spaced(NUM_RANGE_IMAGES, len(normal))]
    batches = [b["image"] for b in LabelledImages(detector, folder, chosen, False).batches()]
    if not batches:
        raise UserError(f"--data.root {folder}: none of its normal images can be read: correct it")
    images = torch.cat(batches).numpy()
    return images, f"{number_of(len(images), 'normal image')} of {folder}"


def measure_drift(
    images: LabelledImages,
    eager: Run,
    runs: Mapping[str, Run],
    record: CategoryCalibration | None = None,
    threshold: float = float("nan"),
    scaled_parts: Sequence[bool] = (),
) -> Drift:
    """Compute the AUROC of torch and of programs on the same images, by the package's evaluator.

    Args:
        images: The images.
        eager: Torch in float32.
        runs: The programs by their names.
        record: Calibration of the category; None without one.
        threshold: Its threshold.
        scaled_parts: Whether each score part is scaled; empty: all are.

    Raises:
        UserError: If the images that can be read are all normal or all anomalous.
    """
    settings = EvaluatorSettings(pro_steps=10, fine=True)  # of PRO nothing is used
    evaluators = {
        name: Evaluator([images.category], settings, scaled_parts) for name in ("", *runs)
    }
    flips = dict.fromkeys(runs, 0)
    count = anomalous = 0
    for batch in images.batches():
        pixels = batch["image"].numpy()
        expected = eager(pixels)
        _update(evaluators[""], expected, batch)
        count, anomalous = count + len(pixels), anomalous + int(batch["label"].sum())
        for name, run in runs.items():
            outputs = run(pixels)
            _update(evaluators[name], outputs, batch)
            if record is not None:
                flips[name] += num_flips(expected, outputs, record, threshold)
    if not 0 < anomalous < count:
        raise UserError(
            f"--data.root {images.folder}: of the images that can be read, {anomalous} of {count} "
            f"are anomalous, so that there is no AUROC: correct the files"
        )
    programs = {
        name: _measured(evaluators[name], None if record is None else flips[name]) for name in runs
    }
    return Drift(
        str(images.folder),
        count,
        anomalous,
        images.unreadable,
        images.left_out,
        _measured(evaluators[""], None),
        programs,
    )


def _update(evaluator: Evaluator, outputs: Arrays, batch: dict[str, Any]) -> None:
    scores: Any = {name: torch.from_numpy(np.array(values)) for name, values in outputs.items()}
    if "anomaly_map" in scores and "mask" in batch:
        height, width = batch["mask"].shape[-2:]
        scores["anomaly_map"] = resize_maps(scores["anomaly_map"], (height, width))
    labelled: Any = batch
    evaluator.update(scores, labelled)


def _measured(evaluator: Evaluator, flips: int | None) -> Measured:
    [metrics] = evaluator.compute()["categories"].values()
    image_auroc = metrics["image_auroc"]
    assert image_auroc is not None
    return Measured(image_auroc, metrics["pixel_auroc"], flips)
