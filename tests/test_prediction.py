"""Predictions: maps, masks, drawings, and their display in notebooks."""

from __future__ import annotations

import base64
import io
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers import save_picture
from PIL import Image, ImageShow

from anomaly_clip.data.transforms import Resize
from anomaly_clip.drawing.overlay import CONTOUR, overlay
from anomaly_clip.drawing.panels import heat_map
from anomaly_clip.image_inputs import ImageSource
from anomaly_clip.prediction import ImageMap, Prediction
from anomaly_clip.results.map_store import resize_map

GREY = np.full((30, 60, 3), 100, dtype=np.uint8)


def hot_map(side: int = 16) -> np.ndarray:
    """Return a map whose upper left quarter is hot."""
    values = np.zeros((side, side), dtype=np.float32)
    values[: side // 2, : side // 2] = 4
    return values


def predicted(**changed: Any) -> Prediction:
    options: dict[str, Any] = {
        "score": 0.75,
        "category": "plank",
        "source": ImageSource(GREY),
        "image_map": ImageMap(hot_map(), (30, 60), Resize(), 32),
        **changed,
    }
    return Prediction(**options)


def test_a_map_has_the_size_of_its_image() -> None:
    prediction = predicted()
    assert prediction.map is not None
    assert prediction.map.shape == (30, 60)
    assert prediction.map.dtype == np.float32
    assert np.array_equal(prediction.map, resize_map(hot_map(), (30, 60)))
    assert prediction.mask is None
    assert Prediction(1.0, "plank").map is None


def test_a_mask_is_what_is_above_the_threshold() -> None:
    prediction = predicted(map_threshold=3.0)
    assert prediction.mask is not None
    assert prediction.mask.dtype == np.bool_
    assert np.array_equal(prediction.mask, prediction.map > 3.0)  # type: ignore[operator]
    assert prediction.mask[5, 10]
    assert not prediction.mask[25, 50]


def test_pixels_outside_a_crop_are_nan_and_not_marked() -> None:
    crop = ImageMap(np.ones((8, 8), np.float32), (30, 60), Resize("shorter_crop", 40), 32)
    prediction = predicted(image_map=crop, map_threshold=0.5)
    seen = ~np.isnan(prediction.map)  # type: ignore[arg-type]
    assert prediction.mask is not None
    assert np.array_equal(prediction.mask, seen)
    rows, columns = np.nonzero(seen)
    assert (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1) == (3, 27, 18, 42)


def test_a_drawing_has_the_contour_of_the_marked_pixels() -> None:
    drawn = np.asarray(predicted(map_threshold=3.0).overlay())
    values = resize_map(hot_map(), (30, 60))
    assert np.array_equal(drawn, overlay(GREY, values, 3.0))
    assert (drawn == CONTOUR).all(axis=-1).any()


def test_a_drawing_without_a_threshold_is_a_heat_map() -> None:
    drawn = np.asarray(predicted().overlay()).astype(int)
    values = resize_map(hot_map(), (30, 60))
    expected = (GREY.astype(float) + heat_map(values, values.min(), values.max())) / 2
    assert np.abs(drawn - expected).max() <= 1
    constant = predicted(image_map=ImageMap(np.ones((4, 4), np.float32), (30, 60), Resize(), 32))
    assert np.asarray(constant.overlay()).shape == (30, 60, 3)
    without = predicted(image_map=None).overlay()
    assert np.array_equal(np.asarray(without), GREY)


def test_a_heat_map_leaves_out_what_a_crop_does_not_show() -> None:
    crop = ImageMap(hot_map(8), (30, 60), Resize("shorter_crop", 40), 32)
    drawn = np.asarray(predicted(image_map=crop).overlay())
    assert (drawn[:, :17] == 100).all()
    assert (drawn[4:26, 20:40] != 100).any()


def test_notebooks_show_a_small_drawing_with_the_result() -> None:
    large = np.full((1200, 2000, 3), 100, dtype=np.uint8)
    image_map = ImageMap(hot_map(), (1200, 2000), Resize(), 32)
    name = "<script>&'.png"
    prediction = predicted(
        source=ImageSource(large), image_map=image_map, map_threshold=3.0, path=f"a/{name}"
    )
    with Image.open(io.BytesIO(prediction._repr_png_() or b"")) as shown:
        assert shown.size == (800, 480)
    page = prediction._repr_html_()
    assert "<script>" not in page
    assert "&lt;script&gt;&amp;&#x27;.png" in page
    encoded = page.partition("base64,")[2].partition('"')[0]
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as shown:
        assert max(shown.size) == 256


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({}, "<Prediction of image: score 0.75>"),
        (
            {"path": "a/b.png", "decision": "anomalous", "p_value": 0.05},
            "<Prediction of b.png: anomalous, score 0.75, p-value 0.05>",
        ),
        (
            {"path": "a/b\n.png", "error": "it is\nbroken", "score": np.nan},
            "<Prediction of b\\n.png: not read, it is broken>",
        ),
    ],
)
def test_a_prediction_is_one_line(changed: dict[str, Any], line: str) -> None:
    assert repr(predicted(**changed)) == line


def test_an_image_that_could_not_be_read_has_no_drawing(tmp_path: Path) -> None:
    failed = Prediction(np.nan, "plank", "a.png", error="broken & lost")
    assert failed._repr_png_() is None
    assert "broken &amp; lost" in failed._repr_html_()
    with pytest.raises(ValueError, match=r"a.png: there is no image to draw \(broken & lost\)"):
        failed.show()
    file = save_picture(tmp_path / "a.png", GREY)
    kept = predicted(source=ImageSource(str(file)), path=str(file))
    kept.overlay()
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"a.png"):
        kept.overlay()
    assert kept._repr_png_() is None
    assert kept._repr_html_() == "<div><b>a.png</b><br>score 0.75</div>"


def test_show_uses_the_viewer_or_the_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Image.Image] = []

    def view(image: Image.Image, title: str | None = None) -> bool:
        shown.append(image)
        return title == "image"

    monkeypatch.setattr(ImageShow, "show", view)
    predicted().show()
    monkeypatch.setattr(ImageShow, "show", lambda image, title: False)
    with pytest.raises(RuntimeError, match=r"use overlay\(\).save\(FILE\) instead"):
        predicted().show()
    notebook: Any = SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=1))
    display: Any = SimpleNamespace(display=shown.append)
    monkeypatch.setitem(sys.modules, "IPython", notebook)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    predicted().show()
    assert [image.size for image in shown] == [(60, 30), (60, 30)]


def test_predictions_can_be_sent_to_other_processes() -> None:
    prediction = predicted(parts={"r0": 0.5}, map_threshold=3.0)
    again: Any = pickle.loads(pickle.dumps(prediction))
    assert (again.score, again.parts) == (0.75, {"r0": 0.5})
    assert np.array_equal(again.mask, prediction.map > 3.0)  # type: ignore[operator]
