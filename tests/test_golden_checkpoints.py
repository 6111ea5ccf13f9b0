"""Compatibility with checkpoints, configurations and run folders of earlier versions."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import TESTS
from helpers import Golden
from safetensors.torch import load_file

from anomaly_clip.cli import main

pytestmark = pytest.mark.golden

ROOT = Path(os.environ.get("ANOMALY_CLIP_GOLDEN") or TESTS / "golden") / "checkpoints"
SETS = sorted(file.parent.name for file in ROOT.glob("*/numbers.json"))
TOLERANCE = 1e-6
ROUNDED = 1e-3
"""Difference of pixel metrics that were stored without bounds."""
ABSOLUTE_PATHS = re.compile(rb"/(home|root|tmp|work|mnt|Users)/")


def numbers_of(version: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((ROOT / version / "numbers.json").read_text())
    return content


def marks(version: str) -> list[pytest.MarkDecorator]:
    """Return the marks of a set: ``make test`` reads the oldest, ``make contract`` all others."""
    return [] if version == SETS[0] else [pytest.mark.slow]


every_method = pytest.mark.parametrize(
    ("version", "method"),
    [
        pytest.param(version, name, id=f"{version}-{name}", marks=marks(version))
        for version in SETS
        for name in numbers_of(version)["methods"]
    ],
)
every_set = pytest.mark.parametrize(
    "version", [pytest.param(version, marks=marks(version)) for version in SETS]
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as when the files were written
    yield
    torch.set_num_threads(before)


@pytest.fixture
def inside(
    golden: Callable[[str], Golden], version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Copy the files of a version, make the copy the working directory, and return it."""
    folder = tmp_path / "set"
    shutil.copytree(golden("checkpoints").folder / version, folder)
    monkeypatch.chdir(folder)
    return folder


def read_csv(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


def read(file: Path) -> list[tuple[str, torch.Tensor]]:
    """Return the tensors of a file with their names."""
    return list(load_file(file).items())


def logged(folder: Path) -> dict[str, float]:
    """Return the last value of every metric that a run logged."""
    rows = [row for file in folder.glob("logs/**/metrics.csv") for row in read_csv(file)]
    return {name: float(value) for row in rows for name, value in row.items() if value}


def check_metrics(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(actual["categories"]) == list(expected["categories"])
    for category, theirs in (*expected["categories"].items(), ("mean", expected["mean"])):
        ours = actual["mean"] if category == "mean" else actual["categories"][category]
        check_values(ours, theirs, expected.get("intervals", {}).get(category, {}))


def check_values(
    ours: dict[str, Any], theirs: dict[str, Any], bounds: dict[str, tuple[float, float]]
) -> None:
    """Check metrics; pixel metrics need only lie within the bounds of the earlier ones.

    Version 0.1.0 rounded scores to half precision for pixel metrics.
    """
    for name, value in theirs.items():
        metric = name.removeprefix("test/")
        if value is None or not metric.startswith("pixel"):
            assert ours[name] == pytest.approx(value, abs=TOLERANCE), name
        else:
            low, high = bounds.get(metric, (value - ROUNDED, value + ROUNDED))
            assert low - TOLERANCE <= ours[name] <= high + TOLERANCE, name


@every_method
def test_results_are_those_of_the_earlier_version(method: str, inside: Path) -> None:
    checkpoint = inside / method / "fit" / "checkpoints" / "last.ckpt"
    [*_, verb] = numbers_of_copy(inside)["methods"][method]
    before = inside / method / verb
    where = ["--output.folder", "again", "--output.page", "false"]
    if verb == "fit":  # a module that scores no images: resume its finished training and export it
        content = torch.load(checkpoint, weights_only=True)
        state = content["state_dict"]  # shifted to values that no new training would reach
        state |= {key: value + 0.25 for key, value in state.items() if value.ndim}
        torch.save(content, checkpoint)
        words = ["--config", str(before / "config-fit.yaml"), "--ckpt_path", str(checkpoint)]
        assert main([verb, *words, *where]) == 0
        exported = [pair for file in inside.glob("again/*.safetensors") for pair in read(file)]
        compared = 0
        for name, tensor in exported:
            keys = [key for key in state if key.endswith(f".{name}")]
            if keys:  # other exported tensors are computed from several stored ones
                stored = state[min(keys, key=len)].to(tensor.dtype)  # exports may be float16
                torch.testing.assert_close(tensor, stored, atol=1e-3, rtol=1e-3)
                compared += 1
        assert compared > len(exported) / 2
        return
    if checkpoint.is_file():
        words = ["--ckpt_path", str(checkpoint.relative_to(inside))]
    else:
        words = ["--config", str(before / f"config-{verb}.yaml")]
    assert main([verb, *words, *where]) == 0
    again = inside / "again"
    bounds = {}
    if (before / "metrics.json").is_file():
        stored = json.loads((before / "metrics.json").read_text())
        bounds = stored["intervals"].get("mean", {})
    check_values(logged(again), logged(before), bounds)
    if (before / "metrics.json").is_file():
        actual, expected = (
            json.loads((folder / "metrics.json").read_text()) for folder in (again, before)
        )
        check_metrics(actual, expected)
        assert actual["run"]["weights"] == expected["run"]["weights"]
        ours, theirs = (read_csv(folder / "scores.csv") for folder in (again, before))
        assert [row["path"] for row in ours] == [row["path"] for row in theirs]
        for row, other in zip(ours, theirs, strict=True):
            if "image_score" in other:
                score = float(other["image_score"])
                assert float(row["image_score"]) == pytest.approx(score, rel=1e-4, abs=1e-5)
            if "decision" in other:
                assert row["decision"] == other["decision"]
                assert float(row["p_value"]) == pytest.approx(float(other["p_value"]))


def numbers_of_copy(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "numbers.json").read_text())
    return content


def check_options(stored: Any, read: Any, path: str = "") -> None:
    """Check that all options of a stored configuration are read with their values."""
    if not isinstance(stored, dict):
        assert read == stored, path
        return
    for name, value in stored.items():
        assert name in read, f"{path}.{name}"
        if name != "class_path":  # a class may have been renamed
            check_options(value, read[name], f"{path}.{name}")


@every_method
def test_a_configuration_is_read_with_all_its_options(
    method: str, inside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verb = next(iter(numbers_of_copy(inside)["methods"][method]))
    file = inside / method / verb / f"config-{verb}.yaml"
    assert main([verb, "--config", str(file), "--print_config"]) == 0
    check_options(yaml.safe_load(file.read_text()), yaml.safe_load(capsys.readouterr().out))


@every_set
def test_runs_are_reported(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = sorted(file.parent for file in inside.glob("*/test/metrics.json"))
    alike: dict[tuple[str, ...], list[str]] = {}
    for run in [*runs, *inside.glob("compare/*/")]:
        if (run / "metrics.json").is_file():
            categories = json.loads((run / "metrics.json").read_text())["categories"]
            alike.setdefault(tuple(categories), []).append(str(run))
    for names in alike.values():  # only runs of the same categories can be compared
        assert main(["report", *names]) == 0
        assert capsys.readouterr().out
    assert main(["report", "compare"]) == 0
    assert main(["report", *map(str, runs), "--page"]) == 0
    for run in runs:
        name = json.loads((run / "metrics.json").read_text())["run"]["method"]
        assert name in (run / "report.html").read_text(), run


@every_set
def test_each_is_resumed(inside: Path) -> None:
    expected = numbers_of_copy(inside)["several"]["each"]["metrics"]
    finished = list(inside.glob("each/*/metrics.json"))
    assert 0 < len(finished) < len(expected["categories"])
    files = [file for done in finished for file in done.parent.rglob("*") if file.is_file()]
    before = {file: file.stat().st_mtime_ns for file in files}
    assert main(["each", "--resume", "each"]) == 0
    check_metrics(json.loads((inside / "each" / "metrics.json").read_text()), expected)
    assert {file: file.stat().st_mtime_ns for file in files} == before
    assert main(["report", "each"]) == main(["report", "each", "--page"]) == 0


@every_set
def test_a_sweep_is_resumed(inside: Path) -> None:
    [file] = inside.glob("sweep/*/sweep.json")
    record = json.loads(file.read_text())
    # A sweep must be resumed in the directory in which it was started.
    file.write_text(json.dumps({**record, "directory": str(inside)}))
    finished = [row["state"] for row in read_csv(file.with_name("sweep.csv"))].count("finished")
    assert 0 < finished < len(record["runs"])
    first = file.with_name("1") / "checkpoints" / "last.ckpt"
    before = first.stat().st_mtime_ns
    assert main(["sweep", "--resume", str(file.parent)]) == 0
    assert first.stat().st_mtime_ns == before
    rows = read_csv(file.with_name("sweep.csv"))
    expected = numbers_of_copy(inside)["several"]["sweep"]["logged"]
    goals = {row["run"]: float(row[record["metric"]]) for row in rows}
    assert goals == pytest.approx(expected, abs=1e-5)


@every_set
def test_a_set_is_safe_to_read_and_contains_no_absolute_paths(
    version: str, golden: Callable[[str], Golden]
) -> None:
    folder = golden("checkpoints").folder / version
    for file in (file for file in folder.rglob("*") if file.is_file()):
        assert not ABSOLUTE_PATHS.search(file.read_bytes()), file
        if file.suffix in (".ckpt", ".pt"):
            torch.load(file, map_location="cpu", weights_only=True)
