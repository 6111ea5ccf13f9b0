"""``anomaly_clip export``: a detector for other machines, or trained weights for other programs."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError

from anomaly_clip import methods
from anomaly_clip.commands.checkpoint_content import DAMAGE, read_checkpoint
from anomaly_clip.commands.checkpoint_option import config_of_fit
from anomaly_clip.commands.detector_options import (
    DetectorSource,
    add_detector_options,
    detector_source,
    split_words,
)
from anomaly_clip.commands.experiment import class_of_checkpoint
from anomaly_clip.commands.foreign_code import seed_in_config
from anomaly_clip.commands.library_messages import quieten
from anomaly_clip.commands.saved_backbone import changed_backbone
from anomaly_clip.errors import UserError, reason, user_errors
from anomaly_clip.exporting.exporter import Exported, ExportSettings, export_detector
from anomaly_clip.exporting.folder import RUNTIME
from anomaly_clip.exporting.precision import FLOAT32, PRECISIONS
from anomaly_clip.exporting.programs import FORMATS
from anomaly_clip.methods.base import AnomalyMethod
from anomaly_clip.methods.evaluated import EvaluatedModule, Exporter
from anomaly_clip.progress import say

__all__ = ["run_export"]

FOLDER = Path("detector")
"""Default folder of an exported detector."""
NUM_IMAGES = ExportSettings.num_images
"""Default number of images of the comparison."""


def run_export(words: Sequence[str]) -> int:
    """Export a detector, or the weights of a checkpoint, and return an exit code.

    Raises:
        UserError: If it cannot be exported, or a file already exists.
    """
    parser = _parser()
    with user_errors():
        own_words, settings = split_words(words[1:])
    options = parser.parse_args(own_words)
    quieten()
    with user_errors():
        source = detector_source(options, settings)
        kind = None if source.checkpoint is None else class_of_checkpoint(source.checkpoint)
        if options.projections:
            _check_projections(options, source, kind)
        if options.format is None and kind is not None and hasattr(kind, "export"):
            _check_no_detector_options(options, source, kind)
            return _export_weights(kind, source, options)
        if kind is not None and not issubclass(kind, AnomalyMethod):
            raise _nothing_to_export(kind, source)
        return _export_detector(source, options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="anomaly_clip export",
        description="Write a folder that scores images without this package: a program (ONNX, or "
        "torch.export), the preprocessing, the calibration, and detector.py, which runs them. The "
        "program is compared with torch first. Without --format, "
        f"{' and '.join(_in_two(_exporters()))} write their trained weights instead: prompts or "
        "linear layers in the authors' format, a torchvision ResNet (.safetensors and .pt), a CLIP "
        "with open_clip's names.",
        allow_abbrev=False,
    )
    add_detector_options(parser)
    parser.add_argument("--format", choices=FORMATS, help="format of the program; default: onnx")
    parser.add_argument(
        "--folder",
        type=Path,
        help="output folder; default: detector, and for weights the working directory",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    parser.add_argument(
        "--projections",
        action="store_true",
        help="for the prompts of AnomalyCLIP: add the unused layers, as zeros, without which the "
        "authors' code does not load the file",
    )
    parser.add_argument("--opset", type=int, help="version of ONNX's operators; default: 18")
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="precision of the frozen backbone; default: float32",
    )
    parser.add_argument("--images", type=int, help="number of images of the comparison; default: 8")
    parser.add_argument(
        "--include_images",
        action="store_true",
        help="put two images of --data.root into the folder, in place of generated ones",
    )
    return parser


# -- weights ---------------------------------------------------------------------------------------


def _nothing_to_export(kind: Any, source: DetectorSource) -> UserError:
    name = f"--ckpt_path {source.checkpoint}: {kind.__name__}"
    if hasattr(kind, "export"):
        return UserError(
            f"{name} scores no images, so that there is no program to write: leave --format out, "
            f"which exports its weights"
        )
    why = kind.not_exportable if issubclass(kind, EvaluatedModule) else None
    return UserError(
        f"{name} has nothing to export{'' if why is None else f': it {why}'}: give a checkpoint of "
        f"a detector, or of {' or '.join(_in_two(_exporters()))}"
    )


def _exporters() -> list[str]:
    """Return the names of the methods that export their trained weights."""
    return sorted(name for name in methods.__all__ if hasattr(getattr(methods, name), "export"))


def _in_two(names: Sequence[str]) -> list[str]:
    """Return all names but the last as one text, and the last one, to be joined by a word."""
    return [", ".join(names[:-1]), names[-1]]


def _check_projections(options: argparse.Namespace, source: DetectorSource, kind: Any) -> None:
    """Check that ``--projections`` has an effect.

    Raises:
        UserError: If no prompts of AnomalyCLIP are written.
    """
    if kind is None or not issubclass(kind, methods.AnomalyCLIP):
        given = "a detector" if kind is None else f"--ckpt_path {source.checkpoint}"
        name = "" if kind is None else f" of {kind.__name__}"
        raise UserError(
            f"--projections is for the prompts of AnomalyCLIP, not for {given}{name}: leave it out"
        )
    if options.format is not None:
        raise UserError(
            f"--projections is for the prompts of AnomalyCLIP, but --format {options.format} "
            f"writes a detector: leave one of them out"
        )


def _check_no_detector_options(
    options: argparse.Namespace, source: DetectorSource, kind: type
) -> None:
    """Check that nothing was asked for that only the export of a detector has.

    Raises:
        UserError: If it was.
    """
    given = {
        "--opset": options.opset,
        "--precision": options.precision,
        "--include_images": options.include_images,
        "--data.root": source.images,
        "--calibration.file": source.calibration,
        "--data.category": source.category,
        "--references": source.references,
        "--images": options.images,
    }
    for name, value in given.items():
        if value is not None and value is not False:
            raise UserError(
                f"{name} is for the export of a detector, but without --format {kind.__name__} "
                f"writes its weights: add --format onnx, or leave {name} out"
            )


def _export_weights(kind: Any, source: DetectorSource, options: argparse.Namespace) -> int:
    checkpoint = source.checkpoint
    assert checkpoint is not None
    changed = changed_backbone(kind, read_checkpoint(checkpoint), source.backbone, checkpoint)
    with torch.random.fork_rng(devices=[]):
        _seed_like_the_fit(checkpoint)
        try:
            method: Any = kind.load_from_checkpoint(checkpoint, map_location="cpu", **changed)
        except (*DAMAGE, ArgumentError) as error:
            if not kind.__module__.startswith("anomaly_clip."):
                raise
            cause = f"{type(error).__name__}: {reason(error).rstrip(' .:')}"
            raise UserError(
                f"--ckpt_path {checkpoint}: the checkpoint does not fit {kind.__name__}, or is "
                f"damaged ({cause}): give one that fit has written"
            ) from None
    assert isinstance(method, Exporter)
    write: Callable[[Path], Path] = method.export
    if options.projections:
        assert isinstance(method, methods.AnomalyCLIP)
        write = partial(method.export, projections=True)
    target = options.folder or Path()
    with tempfile.TemporaryDirectory() as scratch:
        name = write(Path(scratch)).name
        files = sorted(Path(scratch).iterdir())
        existing = [file.name for file in files if (target / file.name).exists()]
        if existing and not options.overwrite:
            raise UserError(
                f"{target / existing[0]} exists: give another --folder, or add --overwrite"
            )
        write(target)
    print(target / name)
    return 0


def _seed_like_the_fit(checkpoint: Path) -> None:
    """Seed torch as the fit did, so that a backbone of random weights is the one of the fit."""
    with contextlib.suppress(UserError):  # the configuration of a moved checkpoint is unknown
        seed = seed_in_config(config_of_fit(checkpoint))
        torch.manual_seed(0 if seed is None else seed)


# -- detectors -------------------------------------------------------------------------------------


def _export_detector(source: DetectorSource, options: argparse.Namespace) -> int:
    settings = ExportSettings(
        options.format or FORMATS[0],
        options.opset,
        NUM_IMAGES if options.images is None else options.images,
        source.images,
        options.include_images,
        options.overwrite,
        options.precision or FLOAT32,
    )
    folder = options.folder or FOLDER
    loaded = source.load()
    exported = export_detector(loaded.detector, folder, settings, loaded.method)
    for line in _lines(exported, settings):
        say(line)
    print(folder)
    return 0


def _lines(exported: Exported, settings: ExportSettings) -> list[str]:
    parity, program = exported.record["parity"], exported.record["program"]
    where = "generated images" if settings.images is None else f"images of {settings.images}"
    sizes = ", ".join(map(str, parity["batches"]))
    titles = {"torch": "torch.export"}
    lines = [
        f"{program['file']} in {titles.get(name, name)} and torch, {parity['images']} {where}, "
        f"batches of {sizes}: {difference.describe(parity['images'])}"
        for name, difference in exported.differences.items()
    ]
    if exported.drift is not None:
        lines += exported.drift.lines(program["file"])
    lines += [f"{program['file']}: {cause}" for cause in exported.failures.values()]
    lines += exported.remarks
    return [*lines, f"{exported.folder}: {program['bytes'] / 1e6:.1f} MB; {_next_step(exported)}"]


def _next_step(exported: Exported) -> str:
    program = shlex.quote(str(exported.folder / RUNTIME))  # blanks in names
    return f"python {program} IMAGE_OR_FOLDER scores images"
