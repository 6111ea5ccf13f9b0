"""Reader of the folders of finished runs, with readable error messages for damaged ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from anomaly_clip.documents import load_json, load_yaml
from anomaly_clip.errors import UserError
from anomaly_clip.metric_values import uncertain_metrics
from anomaly_clip.records import variant_of
from anomaly_clip.results.finished_run import FinishedRun, printable
from anomaly_clip.results.folder import METRICS_FILE, find_run

__all__ = [
    "REPEAT_TEST",
    "expect",
    "find_runs",
    "is_fraction",
    "parse_run",
    "read_json",
    "read_object",
    "read_run",
]

CONFIG_FILES = ("config-each.yaml", "config-test.yaml", "config-fit.yaml")
"""Files with the options of a run; the first one that exists is used."""
RUN_KEYS = ("method", "weights", "protocol")
WEIGHT_KEYS = ("backbone", "pretrained", "random")
REPEAT_TEST = "repeat the test, or leave this folder out"
"""Advice at the end of a message about a damaged file."""


def find_runs(folders: Sequence[Path]) -> list[FinishedRun]:
    """Read runs; a folder with several runs, as written by ``compare``, stands for all of them.

    Raises:
        UserError: If a run is missing, unfinished or damaged.
    """
    runs: dict[Path, FinishedRun] = {}
    for folder in folders:
        for run_folder in _run_folders(folder.expanduser()):
            runs.setdefault(run_folder.resolve(), read_run(run_folder))
    return list(runs.values())


def _run_folders(folder: Path) -> list[Path]:
    """Return the run folders that one command-line argument stands for."""
    folder = find_run(folder.parent if folder.name == METRICS_FILE else folder)
    if (folder / METRICS_FILE).is_file():
        return [folder]
    if not folder.is_dir():
        raise UserError(
            f"{folder}: there is no such folder; name a run folder, such as runs/padim/1-test"
        )
    if (folder / CONFIG_FILES[0]).is_file():
        raise UserError(
            f"{folder}: the run is not finished, as {METRICS_FILE} is missing; resume the run with "
            f"anomaly_clip each --resume {folder}"
        )
    below = sorted(file.parent for file in folder.glob(f"*/{METRICS_FILE}"))
    if below:
        return below
    checkpoint = folder / "checkpoints" / "last.ckpt"
    if checkpoint.is_file():
        raise UserError(
            f"{folder}: the run was fitted but not tested, as {METRICS_FILE} is missing; test it "
            f"with anomaly_clip test --ckpt_path {checkpoint} --output.folder {folder}"
        )
    raise UserError(
        f"{folder} contains no {METRICS_FILE}; name the folder of a finished run of test or each"
    )


def read_run(folder: Path) -> FinishedRun:
    """Read a run of test or each.

    Raises:
        UserError: If ``metrics.json`` is missing or damaged.
    """
    return parse_run(folder, read_json(folder / METRICS_FILE))


def parse_run(folder: Path, content: Any) -> FinishedRun:
    """Check the content of a run's ``metrics.json``, and read the files next to it.

    Args:
        folder: The run's folder.
        content: Parsed JSON of ``metrics.json``.

    Raises:
        UserError: If the content was not written by a run of test or each.
    """
    file = folder / METRICS_FILE
    expect(isinstance(content, dict), file, f"has a {type(content).__name__}, not an object")
    for key in ("categories", "run"):
        expect(isinstance(content.get(key), dict), file, f"has no {key}")
    run, categories = content["run"], content["categories"]
    for key in RUN_KEYS:
        expect(key in run, file, f"has no run.{key}")
    weights, protocol = run["weights"], run["protocol"]
    expect(isinstance(weights, dict), file, "has no run.weights")
    for key in WEIGHT_KEYS:
        expect(key in weights, file, f"has no run.weights.{key}")
    has_data = isinstance(protocol, dict) and isinstance(protocol.get("data"), str)
    expect(has_data, file, "has no run.protocol.data")
    failed = run.get("failed") or {}
    expect(isinstance(failed, dict), file, f"has {printable(failed)} for run.failed, not an object")
    _check_categories(categories, file)
    return FinishedRun(
        folder,
        str(run["method"]),
        protocol["data"],
        str(weights["backbone"]),
        str(weights["pretrained"]),
        bool(weights["random"]),
        categories,
        protocol,
        run["seed"] if isinstance(run.get("seed"), int) else None,
        tuple(failed),
        _read_config(folder),
        {} if weights["random"] else _read_provenance(Path(str(weights["pretrained"]))),
        _read_uncertain(content, file),
        run,
        means if isinstance(means := content.get("mean"), dict) else {},
        variant=variant_of(weights),
    )


def _check_categories(categories: Mapping[str, Any], file: Path) -> None:
    expect(bool(categories), file, "has no categories")
    for category, metrics in categories.items():
        expect(isinstance(metrics, dict), file, f"has no metrics of {printable(category)}")
        for name, value in metrics.items():
            place = f"{printable(name)} of {printable(category)}"
            expect(is_fraction(value), file, f"has {printable(value)} for {place}, not a fraction")
    expect(any(categories.values()), file, "has no metrics")


def _read_uncertain(content: Mapping[str, Any], file: Path) -> dict[str, list[str]]:
    """Return the metrics with wide bounds by category."""
    categories, intervals = content["categories"], content.get("intervals") or {}
    expect(isinstance(intervals, dict), file, "has no object as intervals")
    for name, bounds in intervals.items():
        place = f"intervals of {printable(name)}"
        expect(isinstance(bounds, dict), file, f"has no object as {place}")
        for ends in bounds.values():
            pair = isinstance(ends, list) and len(ends) == 2 and all(map(is_fraction, ends))
            expect(pair and None not in ends, file, f"has {printable(ends)} among the {place}")
    mean = content.get("mean")
    mean = mean if isinstance(mean, dict) else {}
    return uncertain_metrics({"mean": mean, "categories": categories, "intervals": intervals})


def is_fraction(value: object) -> bool:
    """Return whether a value is a metric in 0..1, or None for an undefined metric."""
    if value is None:
        return True
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and 0 <= value <= 1


def read_json(file: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: If the file cannot be read, or is not JSON.
    """
    try:
        return load_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}): check the path") from None
    except ValueError as error:  # not JSON, or not even text
        raise UserError(f"{file}: damaged, not valid JSON ({error}): {REPEAT_TEST}") from None


def read_object(file: Path) -> dict[str, Any]:
    """Read a file with a JSON object.

    Raises:
        UserError: If the file cannot be read, or is not a JSON object.
    """
    content = read_json(file)
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise UserError(f"{file}: damaged, expected a JSON object, got {kind}: {REPEAT_TEST}")
    return content


def expect(valid: bool, file: Path, problem: str) -> None:
    """Check a condition on a file of a run.

    Raises:
        UserError: If the condition is false; the message contains the file and ``problem``.
    """
    if not valid:
        raise UserError(f"{file}: {problem}, unlike the file of a finished run: {REPEAT_TEST}")


def _read_config(folder: Path) -> Mapping[str, Any]:
    """Return the options saved in a folder; empty if they cannot be read."""
    for name in CONFIG_FILES:
        if (folder / name).is_file():
            try:
                content = load_yaml((folder / name).read_text(encoding="utf-8"))
            except (OSError, ValueError, yaml.YAMLError):
                return {}
            return content if isinstance(content, dict) else {}
    return {}


def _read_provenance(weights: Path) -> Mapping[str, Any]:
    """Return the ``.json`` record of weights exported by a fit, and the synthesis of that fit."""
    record_file = weights.with_suffix(".json")
    if weights.suffix not in (".safetensors", ".pt") or not record_file.is_file():
        return {}
    try:
        record = load_json(record_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(record, dict):
        return {}
    data = _read_config(weights.parent).get("data")
    options = data.get("init_args") if isinstance(data, dict) else None
    synthesis = options.get("synthesis") if isinstance(options, dict) else None
    return {**record, "synthesis": synthesis}
