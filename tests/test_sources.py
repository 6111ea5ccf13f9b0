from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_runtime import photograph, write

import anomaly_clip.detector
from anomaly_clip.runtime.detector import Detector
from anomaly_clip.sources import load

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("exported") / "part")


def test_an_exported_folder_or_its_record_is_loaded(folder: Path) -> None:
    for source in (folder, str(folder), folder / "detector.json"):
        detector = load(source)
        assert isinstance(detector, Detector)
        assert detector.predict(photograph(20, 250)).decision == "anomalous"
    assert load(folder, alpha=0.2, threads=1).guarantee() == "The sentence of 0.2."
    assert load(folder, category="part", bit_depth=12).preprocessing["bit_depth"] == 12


@pytest.mark.parametrize(
    "options",
    [
        {"calibration": "calibration.json"},
        {"device": "cpu"},
        {"backbone": {"name": "resnet18"}},
        {"references": "good"},
        {"model": {"sigma": 3}},
    ],
)
def test_what_an_export_has_settled_cannot_be_changed(options: dict, folder: Path) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} cannot be changed .* export it"):
        load(folder, **options)


def test_another_category_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"category screw: the detector in .* is of part"):
        load(folder, category="screw")


def test_other_sources_go_on_to_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = []

    def record(source: object, **options: object) -> str:
        calls.append((source, options))
        return "detector"

    monkeypatch.setattr(anomaly_clip.detector, "load", record)
    names = ("category", "calibration", "alpha", "device", "backbone", "references")
    nothing = dict.fromkeys(names)
    assert load("sdp", category="plank", model={"sigma": 3}) == "detector"
    assert load(tmp_path, threads=2) == "detector"
    assert calls == [
        ("sdp", nothing | {"category": "plank", "model": {"sigma": 3}}),
        (tmp_path, nothing | {"threads": 2}),
    ]


def test_a_missing_record_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"detector.json: there is none: name the folder"):
        load(tmp_path / "detector.json")


def test_an_exported_folder_needs_no_torch(folder: Path, tmp_path: Path) -> None:
    photograph(20, 250).save(tmp_path / "a.png")
    code = (
        "import sys, anomaly_clip\n"
        "detector = anomaly_clip.load(sys.argv[1])\n"
        "print(detector.predict(sys.argv[2]).decision)\n"
        "assert not {'torch', 'cv2', 'scipy', 'lightning'} & set(sys.modules)\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(tmp_path / "a.png")],
        capture_output=True,
        text=True,
        env=dict(os.environ),
        check=False,
    )
    assert (process.returncode, process.stdout) == (0, "anomalous\n"), process.stderr
