"""The runtime of exported detectors, on a program written by hand."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import anomaly_clip.runtime.detector as runtime
from anomaly_clip.data.transforms import Resize
from anomaly_clip.decisions.calibration import CategoryCalibration, scaled_score
from anomaly_clip.prediction import ImageMap
from anomaly_clip.runtime.detector import Detector, Prediction, open_session

pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")

SIDE = 16
RATES = (0.1, 0.2, 0.01)


def program(opset: int = 18, with_maps: bool = True, with_parts: bool = True) -> bytes:
    """Return a program: the map is the mean of the colours, the score its maximum."""
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["float", "one"], ["anomaly_map"], keepdims=0),
        helper.make_node("ReduceMax", ["anomaly_map", "two"], ["image_score"], keepdims=0),
        helper.make_node("ReduceMin", ["anomaly_map", "two"], ["lowest"], keepdims=0),
        helper.make_node("Unsqueeze", ["lowest", "one"], ["a"]),
        helper.make_node("Unsqueeze", ["image_score", "one"], ["b"]),
        helper.make_node("Concat", ["a", "b"], ["score_parts"], axis=1),
    ]
    outputs = [helper.make_tensor_value_info("image_score", TensorProto.FLOAT, ["batch"])]
    if with_maps:
        shape: list[Any] = ["batch", SIDE, SIDE]
        outputs.append(helper.make_tensor_value_info("anomaly_map", TensorProto.FLOAT, shape))
    if with_parts:
        shape = ["batch", 2]
        outputs.append(helper.make_tensor_value_info("score_parts", TensorProto.FLOAT, shape))
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", 3, SIDE, SIDE])],
        outputs,
        [
            helper.make_tensor("one", TensorProto.INT64, [1], [1]),
            helper.make_tensor("two", TensorProto.INT64, [2], [1, 2]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    content: bytes = model.SerializeToString()
    return content


def calibration(record: CategoryCalibration, bit_depth: int | None = None) -> dict[str, Any]:
    levels = [record.level(rate) for rate in RATES]
    return {
        "n": record.num_images,
        "kind": record.kind,
        "alpha": [RATES[0]],
        "confidence": None,
        "scores": list(record.scores),
        "counts": None if record.counts is None else list(record.counts),
        "map_threshold": record.map_threshold,
        "part_ranges": None if record.part_ranges is None else [*map(list, record.part_ranges)],
        "bit_depth": bit_depth,
        "levels": [
            {
                "alpha": level.alpha,
                "k": level.k,
                "threshold": level.threshold,
                "as_asked": level.is_as_asked,
                "sentence": f"The sentence of {level.alpha:g}.",
            }
            for level in levels
        ],
    }


SCORES = CategoryCalibration(tuple(range(100, 240, 10)), map_threshold=150.0)


def write(
    folder: Path,
    record: CategoryCalibration | None = SCORES,
    bits: int | None = None,
    **changes: Any,
) -> Path:
    """Write an exported folder."""
    folder.mkdir(parents=True, exist_ok=True)
    content = changes.pop("content", None) or program()
    (folder / "detector.onnx").write_bytes(content)
    preprocessing = {
        **{"image_size": SIDE, "rule": "square", "size": None, "filter": "bicubic"},
        **{"bit_depth": None, "max_pixels": 10**8},
        **changes.pop("preprocessing", {}),
    }
    document = {
        "format": 1,
        "method": "Mean",
        "category": "part",
        "program": {
            "file": "detector.onnx",
            "format": "onnx",
            "precision": "float32",
            "sha256": hashlib.sha256(content).hexdigest(),
            "bytes": len(content),
            "external_data": None,
        },
        "preprocessing": preprocessing,
        "outputs": {
            "image_score": {"low": 0.0, "high": 255.0},
            "anomaly_map": {"shape": [SIDE, SIDE], "low": 0.0, "high": 255.0},
            "score_parts": {"names": ["low", "high"], "low": [0.0, 0.0], "high": [255.0, 255.0]},
        },
        "calibration": None if record is None else calibration(record, bits),
        "parity": {"bounds": {"image_score": 1e-5, "anomaly_map": 1e-5, "score_parts": 1e-5}},
        "remarks": [],
        "versions": {"pillow": PIL.__version__},
    }
    document |= changes
    (folder / "detector.json").write_text(json.dumps(document))
    shutil.copy(runtime.__file__, folder / "detector.py")
    return folder


def write_check(folder: Path) -> None:
    detector = Detector(folder)
    (folder / "check").mkdir()
    images = [photograph(10 * n, 200) for n in range(2)]
    for number, image in enumerate(images):
        image.save(folder / "check" / f"{number}.png")
    squares = [np.asarray(image.resize((SIDE, SIDE), 3)).transpose(2, 0, 1) for image in images]
    stacked = np.stack(squares)
    outputs: Any = detector.run(stacked)
    np.savez(folder / "check" / "expected.npz", images=stacked, **outputs)


def photograph(low: int, high: int, size: tuple[int, int] = (48, 36)) -> Image.Image:
    """Return an image of one value with a bright square."""
    pixels = np.full((size[1], size[0], 3), low, np.uint8)
    pixels[size[1] // 4 : size[1] // 2, size[0] // 4 : size[0] // 2] = high
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write(tmp_path_factory.mktemp("exported") / "part")
    write_check(folder)
    return folder


def test_a_score_must_exceed_the_threshold_by_more_than_roundings(tmp_path: Path) -> None:
    image, folder = photograph(0, 255), write(tmp_path / "part")
    assert Detector(folder).predict(image).decision == "anomalous"
    record = json.loads((folder / "detector.json").read_text())
    record["calibration"]["tolerance"] = 1e6
    (folder / "detector.json").write_text(json.dumps(record))
    result = Detector(folder).predict(image)
    assert (result.decision, result.p_value) == ("normal", 1.0)


def test_another_version_of_pillow_is_told(tmp_path: Path, folder: Path) -> None:
    assert Detector(folder).remarks == []
    same, _, _ = PIL.__version__.partition(".")
    assert Detector(write(tmp_path / "same", versions={"pillow": f"{same}.99"})).remarks == []
    old = write(tmp_path / "old", versions={"pillow": "1.2.3"})
    message = rf"Pillow {PIL.__version__}, not 1\.2\.3 as at the export: see --check"
    with pytest.warns(UserWarning, match=message):
        Detector(old)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of a normal image, an anomalous one, and a damaged one."""
    folder = tmp_path_factory.mktemp("photographs")
    photograph(20, 120).save(folder / "a.png")
    photograph(20, 250).save(folder / "b.png")
    (folder / "c.png").write_bytes(b"no image")
    (folder / "notes.txt").write_text("no image")
    for name in (".hidden", "@eaDir", "ground_truth"):
        (folder / name).mkdir()
        photograph(20, 250).save(folder / name / "d.png")
    return folder


def cli(folder: Path, monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """Run the command line of a folder in this process."""
    monkeypatch.setattr(runtime, "__file__", str(folder / "detector.py"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return runtime.main([str(word) for word in words])


# -- decisions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [None, *RATES])
@pytest.mark.parametrize(
    "record",
    [
        SCORES,
        CategoryCalibration((90.0, 120.0, 120.0, 120.0, 200.0) * 1, map_threshold=3.0),
        CategoryCalibration((90.0, 120.0, 200.0), counts=(7, 11, 3)),
        CategoryCalibration(
            (0.2, 0.9, 1.1, 1.3, 1.7), part_ranges=((10.0, 60.0), (100.0, 180.0)), kind="split"
        ),
        CategoryCalibration((0.2, 0.9, 1.1), part_ranges=((50.0, 50.0), (100.0, 180.0))),
    ],
)
@pytest.mark.filterwarnings("ignore:The sentence of")
def test_decisions_are_those_of_the_calibration(
    record: CategoryCalibration, alpha: float | None, tmp_path: Path
) -> None:
    detector = Detector(write(tmp_path / "part", record))
    images = [photograph(low, high) for low in (0, 30, 90) for high in (90, 120, 201, 254)]
    results = detector.predict(images, alpha=alpha, batch_size=5)
    level = record.level(alpha or RATES[0])
    for result, image in zip(results, images, strict=True):
        square = np.asarray(image.resize((SIDE, SIDE), 3)).astype(np.float32).mean(axis=-1)
        parts = [float(square.min()), float(square.max())]
        score = parts[1]
        if record.part_ranges is not None:
            score = float(scaled_score(parts, record.part_ranges)[0])
        assert result.score == pytest.approx(score, rel=1e-6)
        assert result.p_value == record.p_values([result.score])[0]
        assert result.decision == ("anomalous" if result.score > level.threshold else "normal")
        assert result.parts == pytest.approx({"low": parts[0], "high": parts[1]}, rel=1e-6)
        assert result.map_threshold == record.map_threshold
        assert result.category == "part"
        assert result.path is None
        assert result.error is None


def test_a_score_equal_to_the_threshold_is_normal(tmp_path: Path) -> None:
    record = CategoryCalibration((7.0,) * 9)
    detector = Detector(write(tmp_path / "part", record))
    results = detector.predict([np.full((SIDE, SIDE), value, np.uint8) for value in (7, 8)])
    assert [result.decision for result in results] == ["normal", "anomalous"]
    assert [result.p_value for result in results] == [1.0, 0.1]


def test_rates_are_those_of_the_folder(folder: Path, tmp_path: Path) -> None:
    detector = Detector(folder, alpha=0.2)
    assert detector.guarantee() == "The sentence of 0.2."
    assert detector.guarantee(0.1) == "The sentence of 0.1."
    assert detector.guarantee(np.float32(0.1)) == "The sentence of 0.1."
    assert detector.is_calibrated
    for call in (lambda: Detector(folder, alpha=0.3), lambda: detector.predict([], alpha=0.3)):
        with pytest.raises(ValueError, match=r"alpha 0.3: .* give one of 0.01, 0.1, 0.2"):
            call()
    with pytest.warns(UserWarning, match=r"The sentence of 0.01"):
        detector.predict(photograph(1, 2), alpha=0.01)
    plain = Detector(write(tmp_path / "plain", None))
    assert not plain.is_calibrated
    assert "anomaly_clip calibrate" in plain.guarantee()
    with pytest.raises(ValueError, match=r"alpha 0.1: .* anomaly_clip calibrate"):
        plain.predict(photograph(1, 2), alpha=0.1)
    result = plain.predict(photograph(1, 200))
    assert (result.decision, result.p_value, result.mask) == (None, None, None)
    assert "score" in repr(result)


def test_a_score_that_is_no_number_is_never_normal(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = Detector(folder)
    outputs = {"image_score": np.array([np.nan, 5.0], np.float32)}
    monkeypatch.setattr(detector, "_run", lambda images: outputs)
    detector.record["outputs"].pop("score_parts")
    first, second = detector.predict([photograph(1, 2), photograph(1, 2)])
    assert first.decision is None
    assert "not a number" in str(first.error)
    assert second.decision == "normal"


# -- images ----------------------------------------------------------------------------------------


def test_images_of_every_kind_have_one_score(folder: Path, tmp_path: Path) -> None:
    detector = Detector(folder)
    image = photograph(20, 180)
    image.save(tmp_path / "a.png")
    array = np.asarray(image)
    kinds = [tmp_path / "a.png", str(tmp_path / "a.png"), image, array, array[..., 0]]
    single = [detector.predict(kind) for kind in kinds]
    several = detector.predict(kinds, batch_size=2)
    assert len({result.score for result in [*single, *several]}) == 1
    assert [result.path for result in single] == [str(tmp_path / "a.png")] * 2 + [None] * 3
    assert [len(detector.predict(kind)) for kind in (tmp_path, iter(kinds), tuple(kinds))] == [
        1,
        5,
        5,
    ]
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "b.jpg", exif=exif, quality=95)
    with Image.open(tmp_path / "b.jpg") as turned:
        result = detector.predict(turned)
    assert result.map.shape == (48, 36)
    assert result.score == detector.predict(tmp_path / "b.jpg").score


def test_a_reused_array_is_copied(folder: Path) -> None:
    detector, frame = Detector(folder), np.full((20, 30, 3), 50, np.uint8)
    result = detector.predict(frame)
    frame[:] = 200
    assert np.asarray(result.overlay(longest=10)).max() < 200 or result.mask.any() is False
    assert detector.predict(frame).score > result.score


@pytest.mark.parametrize(
    "wrong",
    [
        b"bytes",
        5,
        [5],
        np.zeros((3, 8, 8), np.uint8),
        np.zeros((2, 8, 8, 3), np.uint8),
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((8, 8, 3)),
        np.zeros(8, np.uint8),
        torch.zeros(3, 8, 8),
        Image.new("I;16", (4, 4)),
        Image.new("F", (4, 4)),
        np.zeros((0, 5, 3), np.uint8),
        Image.new("RGB", (0, 5)),
        {"a.png": 1},
    ],
)
def test_what_is_no_image_is_refused(wrong: Any, folder: Path) -> None:
    with pytest.raises(ValueError, match=r"give a path, a PIL image of 8 bits, or uint8"):
        Detector(folder).predict(wrong)


def test_an_empty_path_is_not_the_working_directory(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photograph(1, 2).save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no path: there is no such file"):
        Detector(folder).predict("")
    assert len(Detector(folder).predict(".")) == 1


def test_a_folder_has_the_images_that_predict_finds(folder: Path, tmp_path: Path) -> None:
    names = ["a.jfif", "b.qoi", "c.heic", "sub/d.png", "mask/x.png", "sub/Ground_Truth/x.png"]
    for name in [*names, ".hidden/x.png", "notes.txt", "raw.dng", "gtx/e.png"]:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        photograph(1, 2).save(tmp_path / name, "PNG")
    scored = [Path(str(result.path)).name for result in Detector(folder).predict(tmp_path)]
    assert scored == ["a.jfif", "b.qoi", "c.heic", "e.png", "d.png"]


def test_files_that_cannot_be_read(folder: Path, photographs: Path, tmp_path: Path) -> None:
    detector = Detector(folder)
    results = detector.predict(photographs)
    assert [Path(str(result.path)).name for result in results] == ["a.png", "b.png", "c.png"]
    assert [result.decision for result in results] == ["normal", "anomalous", None]
    assert "c.png" in str(results[2].error)
    assert np.isnan(results[2].score)
    assert results[2].map is None
    assert results[2]._repr_png_() is None
    with pytest.raises(ValueError, match="there is no image to draw"):
        results[2].overlay()
    with pytest.raises(ValueError, match=r"c.png: cannot be read"):
        detector.predict(photographs / "c.png")
    with pytest.raises(FileNotFoundError, match=r"missing.png: there is no such file"):
        detector.predict(photographs / "missing.png")
    with pytest.raises(ValueError, match="there is no image in this folder"):
        detector.predict(tmp_path)
    with pytest.raises(ValueError, match="batch_size 0"):
        detector.predict(photographs, batch_size=0)


def deep(path: Path, values: int = 3000) -> Path:
    Image.fromarray(np.full((20, 24), values, np.uint16)).save(path)
    return path


def test_images_must_have_the_depth_of_the_calibration(folder: Path, tmp_path: Path) -> None:
    eight = tmp_path / "8.png"
    photograph(10, 20).save(eight)
    sixteen = deep(tmp_path / "16.png")
    with pytest.raises(ValueError, match=r"16.png: .*16 bits per channel.*calibrate"):
        Detector(folder).predict(sixteen)
    calibrated = Detector(write(tmp_path / "12", bits=12))
    assert calibrated.predict(sixteen).error is None
    with pytest.raises(ValueError, match=r"8.png: .*8 bits per channel.*calibrate"):
        calibrated.predict(eight)
    assert calibrated.predict(photograph(1, 2)).error is None  # images in memory have lost theirs
    assert calibrated.predict(sixteen).score == pytest.approx(round(3000 / 4095 * 255))
    plain = write(tmp_path / "plain", None)
    with pytest.raises(ValueError, match=r"16.png: .*give bit_depth"):
        Detector(plain).predict(sixteen)
    assert Detector(plain, bit_depth=12).predict(sixteen).score == pytest.approx(187)
    with pytest.raises(ValueError, match="bit_depth 7"):
        Detector(plain, bit_depth=7)
    fixed = write(tmp_path / "fixed", None, preprocessing={"bit_depth": 14})
    with pytest.raises(ValueError, match="bit_depth 12: must be 14"):
        Detector(fixed, bit_depth=12)
    with pytest.raises(ValueError, match=r"values up to 20000, but 14 bits end at 16383"):
        Detector(fixed).predict(deep(tmp_path / "above.png", 20000))


# -- maps and drawings -----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(16, 16), (48, 36), (7, 5), (1, 1), (301, 17), (1500, 900)])
@pytest.mark.parametrize("rule", ["square", "square_crop", "shorter_crop"])
def test_maps_have_the_size_of_the_image(rule: str, size: tuple[int, int]) -> None:
    before = None if rule == "square" else 20
    values = np.random.default_rng(0).random((SIDE, SIDE), dtype=np.float32)
    how = {"image_size": SIDE, "rule": rule, "size": before}
    actual = runtime._full_map(values, size, how)
    resize = Resize(rule, before)  # type: ignore[arg-type]
    expected = ImageMap(values, size[::-1], resize, SIDE).full()
    assert actual.dtype == np.float32
    assert np.array_equal(np.isnan(actual), np.isnan(expected))
    assert np.nanmax(np.abs(actual - expected)) < 1e-5  # torch rounds positions to float32


def test_maps_of_other_shapes_are_stretched_as_torch_does() -> None:
    values = np.random.default_rng(0).random((9, 13), dtype=np.float32)
    how = {"image_size": SIDE, "rule": "square", "size": None}
    expected = F.interpolate(torch.from_numpy(values)[None, None], (50, 70), mode="bilinear")[0, 0]
    assert np.abs(runtime._full_map(values, (70, 50), how) - expected.numpy()).max() < 1e-5


@pytest.mark.parametrize("size", [(48, 36), (640, 480), (2000, 1500)])
@pytest.mark.parametrize("low", [0, 120])
def test_overlays_mark_the_pixels_above_the_threshold(
    low: int, size: tuple[int, int], folder: Path
) -> None:
    result = Detector(folder).predict(photograph(low, 254, size))
    drawn, mask = np.asarray(result.overlay()), result.mask
    image = np.asarray(photograph(low, 254, size))
    width = max(1, round(max(size) / 320))
    rows, columns = np.nonzero(mask)
    bright = (drawn == (0, 255, 255)).all(axis=-1)
    assert mask.any()
    assert bright.any()
    assert bright[rows.min(), (columns.min() + columns.max()) // 2]
    changed = (drawn != image).any(axis=-1)
    assert not changed[: max(0, rows.min() - 2 * width - 2)].any()
    middle = (rows.min() + rows.max()) // 2, (columns.min() + columns.max()) // 2
    if min(size) > 400:
        assert not changed[middle]
    small = result.overlay(longest=32)
    assert max(small.size) == 32
    assert result._repr_png_()[:4] == b"\x89PNG"


def test_without_a_threshold_there_is_a_heat_map(tmp_path: Path) -> None:
    how = {"rule": "shorter_crop", "size": 20}
    result = Detector(write(tmp_path / "part", None, preprocessing=how)).predict(
        photograph(50, 250)
    )
    drawn, image = np.asarray(result.overlay()), np.asarray(photograph(50, 250))
    unseen = np.isnan(result.map)
    assert unseen.any()
    assert (drawn[unseen] == image[unseen]).all()
    hottest = np.unravel_index(np.nanargmax(result.map), result.map.shape)
    coldest = np.unravel_index(np.nanargmin(result.map), result.map.shape)
    assert drawn[hottest].min() > 240
    assert drawn[coldest].max() == 25
    maps = write(tmp_path / "scores", None, content=program(with_maps=False))
    result = Detector(maps).predict(photograph(50, 250))
    assert result.map is None
    assert (np.asarray(result.overlay()) == image).all()


def test_predictions_can_be_sent_to_other_processes(folder: Path) -> None:
    result = Detector(folder).predict(photograph(20, 250))
    copy: Prediction = pickle.loads(pickle.dumps(result))
    assert copy.score == result.score
    assert np.array_equal(np.asarray(copy.overlay()), np.asarray(result.overlay()))


def test_several_threads_get_the_results_of_one(folder: Path) -> None:
    detector = Detector(folder)
    images = [photograph(value, 250 - value) for value in range(12)]
    expected = [detector.predict(image).score for image in images]
    actual: dict[int, float] = {}

    def score(number: int) -> None:
        actual[number] = detector.predict(images[number]).score

    threads = [threading.Thread(target=score, args=(number,)) for number in range(len(images))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [actual[number] for number in range(len(images))] == expected


# -- folders ---------------------------------------------------------------------------------------


def change(folder: Path, **values: Any) -> None:
    file = folder / "detector.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


MISTAKES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no record": (lambda f: (f / "detector.json").unlink(), r"detector.json: there is none"),
    "no JSON": (lambda f: (f / "detector.json").write_text("{"), r"detector.json: damaged"),
    "a list": (lambda f: (f / "detector.json").write_text("[]"), r"detector.json: damaged"),
    "not text": (lambda f: (f / "detector.json").write_bytes(b"\xff\xfe"), r"json: damaged"),
    "a key": (lambda f: change(f, program={}), r"detector.json: damaged"),
    "format": (lambda f: change(f, format=2), r"detector.json: a newer format"),
    "no program": (lambda f: (f / "detector.onnx").unlink(), r"detector.onnx: missing, or not"),
    "another": (
        lambda f: (f / "detector.onnx").write_bytes(b"a"),
        r"detector.onnx: missing, or not",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_damaged_folders_are_refused(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "part")
    damage, message = MISTAKES[name]
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        Detector(folder)
    assert "\n" not in str(error.value)


def test_programs_that_cannot_be_opened(folder: Path, tmp_path: Path) -> None:
    newer = write(tmp_path / "newer", content=program(opset=99))
    with pytest.raises(ValueError, match=r"onnxruntime cannot open it .*pip install --upgrade"):
        Detector(newer)
    with pytest.raises(ValueError, match=r"nosuch cannot open it \(No module named 'nosuch'\)"):
        open_session(folder / "detector.onnx", "nosuch")
    with pytest.raises(ValueError, match="threads 0"):
        Detector(folder, threads=0)
    with pytest.raises(ValueError, match=r"runtime torch: give one of onnxruntime, openvino"):
        Detector(folder, runtime="torch")


def test_openvino_computes_the_same(folder: Path) -> None:
    pytest.importorskip("openvino")
    images = np.random.default_rng(0).integers(0, 256, (3, 3, SIDE, SIDE), dtype=np.uint8)
    expected = Detector(folder).run(images)
    actual = Detector(folder, runtime="openvino", threads=1).run(images)
    assert expected.keys() == actual.keys() == {"image_score", "anomaly_map", "score_parts"}
    for name in expected:
        assert np.allclose(actual[name], expected[name], rtol=1e-6)


@pytest.mark.parametrize("shape", [(3, SIDE, SIDE), (1, 3, SIDE, SIDE + 1), (1, SIDE, SIDE, 3)])
def test_run_takes_square_images_of_the_right_size(shape: tuple[int, ...], folder: Path) -> None:
    with pytest.raises(ValueError, match="give uint8"):
        Detector(folder).run(np.zeros(shape, np.uint8))


def test_the_check_tells_what_differs(folder: Path, tmp_path: Path) -> None:
    assert Detector(folder).check() == []
    copied = tmp_path / "copy"
    shutil.copytree(folder, copied)
    file = copied / "check" / "expected.npz"
    content = dict(np.load(file))
    np.savez(file, **content | {"anomaly_map": content["anomaly_map"] + 1})
    [problem] = Detector(copied).check()
    assert problem.startswith("anomaly_map differs by")
    np.savez(file, **content)
    photograph(99, 200).save(copied / "check" / "1.png")
    assert (
        f"decoded or resized otherwise: use Pillow {PIL.__version__}" in Detector(copied).check()[0]
    )


# -- the command line ------------------------------------------------------------------------------


def test_one_line_per_image(
    folder: Path,
    photographs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = [tmp_path / "a.json", tmp_path / "a.csv", tmp_path / "overlays"]
    options = [
        f"--{name}={file}" for name, file in zip(("json", "csv", "overlays"), files, strict=True)
    ]
    assert cli(folder, monkeypatch, photographs, *options, "--threads=1", "--check") == 1
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert [line.split()[0] for line in lines] == ["normal", "anomalous", "unreadable"]
    assert lines[0].endswith("a.png")
    assert "The sentence of 0.1." in captured.err
    rows = json.loads(files[0].read_text())
    assert [row["decision"] for row in rows] == ["normal", "anomalous", None]
    assert rows[2]["score"] is None
    assert "c.png" in rows[2]["error"]
    assert files[1].read_text().splitlines()[0] == "path,decision,p_value,score,error"
    assert len(files[1].read_text().splitlines()) == 4
    assert [path.name for path in files[2].iterdir()] == ["00002_b.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "a.json", "overlays"]


def test_exit_codes(
    folder: Path,
    photographs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    normal, anomalous = photographs / "a.png", photographs / "b.png"
    assert cli(folder, monkeypatch, normal) == 0
    assert cli(folder, monkeypatch, normal, anomalous) == 0
    assert cli(folder, monkeypatch, normal, anomalous, "--fail_on=anomalous") == 3
    assert cli(folder, monkeypatch, normal, "--fail_on=anomalous") == 0
    capsys.readouterr()
    assert cli(folder, monkeypatch, "--check") == 0
    assert capsys.readouterr().err == "check: as at the export\nThe sentence of 0.1.\n"
    plain = write(tmp_path.parent / f"{tmp_path.name}-plain", None)
    assert cli(plain, monkeypatch, normal) == 0
    assert "anomaly_clip calibrate" in capsys.readouterr().err
    mistakes: list[list[Any]] = [
        [],
        ["missing.png"],
        [normal, "--alpha=0.3"],
        [normal, "--threads=0"],
        [normal, "--batch_size=0"],
        [normal, "--runtime=nosuch"],
        [normal, "--bit_depth=3"],
        [tmp_path],
        [normal, f"--json={tmp_path / 'nosuch' / 'a.json'}"],
    ]
    for words in mistakes:
        assert cli(folder, monkeypatch, *words) == 2, words
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: "), words
    with pytest.raises(SystemExit) as exit_code:
        cli(folder, monkeypatch, "--nosuch")
    assert exit_code.value.code == 2
    monkeypatch.setattr(runtime, "_listed", lambda given: signal.raise_signal(signal.SIGINT))
    assert cli(folder, monkeypatch, normal) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"


def test_fail_on_needs_a_calibration(
    photographs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain = write(tmp_path / "plain", None)
    assert cli(plain, monkeypatch, photographs / "a.png", "--fail_on=anomalous") == 2
    assert "--fail_on anomalous: not calibrated: calibrate" in capsys.readouterr().err


def test_results_need_a_place_before_images_are_scored(
    folder: Path,
    photographs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wrong = [f"--csv={tmp_path / 'none' / 'a.csv'}", f"--csv={tmp_path}", f"--json={os.devnull}"]
    wrong += [f"--overlays={photographs}", f"--overlays={photographs / 'overlays'}"]
    for option in wrong:
        assert cli(folder, monkeypatch, photographs, option) == 2, option
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "error: " in captured.err
    assert not Path(os.devnull).is_file()
    assert list(tmp_path.iterdir()) == []


def test_results_are_whole_or_absent(
    folder: Path, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, link = tmp_path / "a.csv", tmp_path / "link.csv"
    target.write_text("before")
    link.symlink_to(target)

    def full(path: Path, text: str, **options: Any) -> None:
        path.write_bytes(text[:5].encode())
        raise OSError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        assert cli(folder, monkeypatch, photographs / "a.png", f"--csv={link}") == 2
    assert target.read_text() == "before"
    assert cli(folder, monkeypatch, photographs / "a.png", f"--csv={link}") == 0
    assert target.read_text().startswith("path,")
    assert {path.name for path in tmp_path.iterdir()} == {"a.csv", "link.csv"}


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_names_of_any_kind_stop_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for name in ("a" * 250 + ".png", os.fsdecode(b"\xff.png"), "\u6c49.png"):
        photograph(20, 250).save(images / name)
    output = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", output)
    csv_file = tmp_path / "a.csv"
    words = [images, f"--csv={csv_file}", f"--overlays={tmp_path / 'overlays'}"]
    assert cli(folder, monkeypatch, *words) == 0
    assert rb"\u6c49.png" in output.buffer.getvalue()
    assert r"\udcff.png" in csv_file.read_text(encoding="utf-8")
    assert len(list((tmp_path / "overlays").iterdir())) == 3


def test_the_file_runs_alone_without_torch(folder: Path, photographs: Path) -> None:
    code = (
        "import sys, runpy; sys.argv[0] = sys.argv[1]; del sys.argv[1]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: assert not {'torch', 'cv2', 'scipy', 'anomaly_clip'} & set(sys.modules)\n"
    )
    words = [str(folder / "detector.py"), str(photographs / "b.png")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("anomalous  p 0.0")
    assert process.stderr == "The sentence of 0.1.\n"
