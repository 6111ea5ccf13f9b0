"""Preprocessing of images before they are scored, from a checkpoint or a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

import anomaly_clip.data as data_sets
from anomaly_clip.commands.checkpoint_option import config_of_fit
from anomaly_clip.commands.yaml_text import read_yaml_text
from anomaly_clip.data.dataset import AnomalyData
from anomaly_clip.data.info import dataset_info
from anomaly_clip.data.transforms import Resize
from anomaly_clip.documents import load_yaml
from anomaly_clip.errors import UserError
from anomaly_clip.images import MAX_PIXELS

__all__ = ["Preprocessing"]

DEFAULT_PRECISION = "32-true"


@dataclass(frozen=True)
class Preprocessing:
    """Everything besides the method that the score of an image depends on.

    Args:
        resize: How images are made square.
        bit_depth: Significant bits of images with 16 bits per channel; None: chosen from them.
        max_pixels: Largest number of pixels of an image file.
        precision: Precision of Lightning's trainer, such as ``32-true``.
        data: Name of the data set, on which automatic settings of methods depend; None: unknown.
        words: Name of each category in prompts. The keys are the categories of the fit.
        is_named: False if the only category has the name of its folder.
    """

    resize: Resize = field(default_factory=Resize)
    bit_depth: int | None = None
    max_pixels: int = MAX_PIXELS
    precision: str = DEFAULT_PRECISION
    data: str | None = None
    words: Mapping[str, str] = field(default_factory=dict)
    is_named: bool = True

    @classmethod
    def of_data(cls, data: AnomalyData, precision: str) -> Preprocessing:
        """Return the settings of a data module and a trainer."""
        bit_depth = data.reading.bit_depth
        fixed = None if bit_depth == "auto" else int(bit_depth)
        return cls.of_record({**data.reading.preprocessing(), "precision": precision}, fixed)

    @classmethod
    def of_record(cls, record: Mapping[str, Any], bit_depth: int | None) -> Preprocessing:
        """Return the settings that a checkpoint stores; see ``ImageReading.preprocessing``.

        Raises:
            KeyError, TypeError, ValueError: If the record is damaged.
        """
        return cls(
            Resize(**record["resize"]),
            bit_depth,
            int(record["max_pixels"]),
            str(record["precision"]),
            record["data"],
            {str(name): str(word) for name, word in record["words"].items()},
            bool(record["is_named"]),
        )

    @classmethod
    def of_checkpoint(cls, checkpoint: Mapping[str, Any], path: Path) -> Preprocessing:
        """Return the settings of a fit, from its checkpoint or the configuration next to it.

        Args:
            checkpoint: Content of the checkpoint.
            path: Its file.

        Raises:
            UserError: If neither tells them.
        """
        record, bit_depth = checkpoint.get("preprocessing"), checkpoint.get("bit_depth")
        if record is None:
            return _of_config(_config_of_fit(path), bit_depth, checkpoint.get("fitted_category"))
        try:
            return cls.of_record(record, bit_depth)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{path}: its preprocessing is damaged ({type(error).__name__}: {error}): give a "
                f"checkpoint that fit has written"
            ) from None


def _config_of_fit(path: Path) -> Path:
    try:
        return config_of_fit(path)
    except UserError:
        raise UserError(
            f"{path}: the checkpoint, of an earlier version or a fit without a data module, does "
            f"not tell how its images were resized: put the config-fit.yaml of the fit next to it, "
            f"or load the folder of the run"
        ) from None


def _of_config(file: Path, bit_depth: int | None, category: str | None) -> Preprocessing:
    """Return the settings in the configuration of a fit, of which only plain values are read.

    Raises:
        UserError: If the configuration cannot be read, or lacks them.
    """
    try:
        content = load_yaml(read_yaml_text(file, str(file)))
        data, trainer = content["data"], content["trainer"]
        options = data["init_args"]
        resize = Resize(**options["resize"])
        name = _dataset_name(str(data["class_path"]))
        chosen = options.get("categories") or [options.get("category") or category]
        names = {**dataset_info(name).words, **(options.get("words") or {})}
        return Preprocessing(
            resize,
            bit_depth,
            int(options.get("max_pixels", MAX_PIXELS)),
            str(trainer.get("precision") or DEFAULT_PRECISION),
            name,
            {each: names.get(each, each) for each in chosen if each is not None},
            name != data_sets.ImageFolder.dataset_name or options.get("category") is not None,
        )
    except (yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{file}: not the configuration of a fit, or a damaged one ({type(error).__name__}: "
            f"{error}): restore the file as it was saved"
        ) from None


def _dataset_name(class_path: str) -> str | None:
    """Return the name of a data set of this package; None for others, which are not imported."""
    kind: Any = getattr(data_sets, class_path.rpartition(".")[2], None)
    is_data = isinstance(kind, type) and issubclass(kind, AnomalyData)
    return str(kind.dataset_name) if is_data else None
