"""An exported folder in a fresh environment of NumPy, Pillow and ONNX Runtime, on real images."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from anomaly_clip.cli import main
from anomaly_clip.exporting.programs import OLDEST_TORCH

pytest.importorskip("onnxruntime")
pytest.importorskip("torch", minversion=OLDEST_TORCH)
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.slow

LOWEST = ("numpy==1.26.4", "pillow==11.3.0", "onnxruntime")
NEWEST = ("numpy", "pillow", "onnxruntime")
KINDS = ("good", "good", "blowhole", "break", "crack", "fray", "uneven")
ALPHA = 0.1


@pytest.fixture(scope="module")
def tiles(
    tmp_path_factory: pytest.TempPathFactory, shared_data: Callable[[str], Path]
) -> tuple[Path, Path]:
    """Return a folder of 48 normal tiles, and another of 21 tiles of all kinds."""
    root = shared_data("magnetic_tile") / "magnetic_tile"
    folder = tmp_path_factory.mktemp("tiles")
    normal, new = folder / "tile" / "good", folder / "new"
    normal.mkdir(parents=True)
    new.mkdir()
    for path in sorted((root / "train" / "good").iterdir())[::5][:48]:
        shutil.copy(path, normal)
    for number in range(21):
        kind, turn = KINDS[number % 7], number // 7
        path = sorted((root / "test" / kind).iterdir())[5 * turn + number % 2]
        shutil.copy(path, new / f"{number:02}_{kind}{path.suffix}")
    return folder / "tile", new


@pytest.fixture(scope="module")
def exported(tiles: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a calibrated PatchCore, its export, and its predictions."""
    folder = tmp_path_factory.mktemp("patchcore")
    source = (
        Path(__file__).parent.parent / "shared" / "weights" / "squeezenet1_1_imagenet.safetensors"
    )
    backbone = f"--model.backbone.weights={source if source.exists() else 'random'}"
    words = ["fit", "--config=own_patchcore", f"--data.root={tiles[0]}", backbone]
    words += ["--model.backbone.name=squeezenet1_1", "--model.layers=[features.7,features.10]"]
    words += ["--calibrate=true", f"--calibration.alpha=[{ALPHA}]"]
    assert main([*words, f"--output.folder={folder / 'run'}"]) == 0
    assert main(["export", str(folder / "run"), f"--folder={folder / 'exported'}"]) == 0
    words = ["predict", f"--ckpt_path={folder / 'run'}", f"--data.root={tiles[1]}"]
    assert main([*words, f"--output.folder={folder / 'predicted'}"]) == 0
    return folder


@pytest.mark.parametrize("packages", [NEWEST, LOWEST])
def test_decisions_are_those_of_predict_file_by_file(
    packages: tuple[str, ...], tiles: tuple[Path, Path], exported: Path, tmp_path: Path
) -> None:
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    python = str(environment / ("Scripts" if os.name == "nt" else "bin") / "python")
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages]
    installed = subprocess.run(pip, capture_output=True, text=True, check=False)
    if installed.returncode != 0:
        pytest.skip(f"no packages could be installed: {installed.stderr[-300:]}")
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [str(exported / "exported" / "detector.py"), str(tiles[1])]
    # Older versions of Pillow resize some images otherwise, which --check reports as a problem.
    words += ["--check"] if packages == NEWEST else []
    process = subprocess.run(
        [python, *words, f"--csv={tmp_path / 'decisions.csv'}"],
        capture_output=True,
        text=True,
        env=variables,
        cwd=tmp_path,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    [scores] = (exported / "predicted").rglob("scores.csv")
    with scores.open() as file:
        expected = {Path(row["path"]).name: row for row in csv.DictReader(file)}
    with (tmp_path / "decisions.csv").open() as file:
        actual = {Path(row["path"]).name: row for row in csv.DictReader(file)}
    assert len(actual) == 21
    assert actual.keys() == expected.keys()
    record = json.loads((exported / "exported" / "detector.json").read_text(encoding="utf-8"))
    threshold = record["calibration"]["levels"][0]["threshold"]
    # Pillow 12.2 and older resize some images to values that differ by 1 from those of 13.0.
    tolerance = 1e-5 if packages == NEWEST else 0.03
    for name, row in actual.items():
        score = float(expected[name]["image_score"])
        assert float(row["score"]) == pytest.approx(score, rel=tolerance), name
        if packages == NEWEST or abs(score / threshold - 1) > tolerance:
            assert row["decision"] == expected[name]["decision"], name
        if packages == NEWEST:
            assert float(row["p_value"]) == float(expected[name]["p_value"]), name
    assert {row["decision"] for row in actual.values()} == {"normal", "anomalous"}
