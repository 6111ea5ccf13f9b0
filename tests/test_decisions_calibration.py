"""The record of a calibration: levels, storage, and refusal of damaged files."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anomaly_clip.decisions.calibration import (
    CALIBRATION_FILE,
    Calibration,
    CategoryCalibration,
    Level,
    scaled_score,
)
from anomaly_clip.errors import UserError

INF = float("inf")


def calibration(**changes: Any) -> Calibration:
    rng = np.random.default_rng(0)
    categories = {
        "plank": CategoryCalibration(
            tuple(np.sort(rng.normal(700, 50, 40)).astype(np.float32)),
            733.5,
            ((-0.25, 0.5), (1e-3, 2.0)),
            ("a1", "b2"),
            "wooden plank",
        ),
        "mug": CategoryCalibration((1.0, 2.0, 2.0, 3.0), kind="cross_validation"),
    }
    values = {"conditions": {"weights": "abc", "resize": {"size": 224}}, "versions": {"a": "1"}}
    return Calibration(**{"method": "PatchCore", "categories": categories, **values, **changes})


@pytest.mark.parametrize("n", [1, 2, 12, 18, 19, 40, 99, 300])
@pytest.mark.parametrize("alpha", [1e-6, 0.001, 0.05, np.float32(0.05), 0.5, 0.99, 0.999999])
@pytest.mark.parametrize("confidence", [None, 0.5, 0.95, 0.999])
def test_a_level_exists_for_every_rate(n: int, alpha: float, confidence: float | None) -> None:
    record = CategoryCalibration(tuple(np.arange(n) / 7))
    level = record.level(alpha, confidence)
    assert 1 <= level.k <= n
    assert level.threshold == sorted(record.scores)[-level.k]
    assert level.average == level.k / (n + 1)
    rate = level.average if confidence is None else level.guaranteed
    assert level.is_as_asked == (rate <= level.alpha)
    assert level.is_as_asked or level.k == 1
    json.dumps(vars(level), allow_nan=False)
    p_values = record.p_values(record.scores)
    above = np.array(record.scores) > level.threshold
    assert (above == (p_values <= level.k / (n + 1))).all()


def test_a_level_states_its_rates() -> None:
    level = CategoryCalibration(tuple(range(40))).level(0.05)
    assert level == Level(0.05, None, 2, 38.0, 2 / 41, level.guaranteed)
    assert level.guaranteed == pytest.approx(0.11319, abs=1e-5)
    assert not CategoryCalibration(tuple(range(40))).level(0.05, 0.95).is_as_asked


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scores": ()}, "0 calibration scores"),
        ({"scores": (1.0, float("nan"))}, "finite, ascending"),
        ({"scores": (1.0, INF)}, "finite, ascending"),
        ({"scores": (2.0, 1.0)}, "finite, ascending"),
        ({"counts": (1,)}, "1 counts: expected 2"),
        ({"counts": (1, 0)}, "counts"),
        ({"map_threshold": INF}, "map threshold must be finite"),
        ({"part_ranges": ((2.0, 1.0),)}, "range of score parts is 2.0 to 1.0"),
        ({"part_ranges": ((float("nan"), 1.0),)}, "range of score parts"),
        ({"part_ranges": ((-INF, 1.0),)}, "range of score parts"),
        ({"kind": "guess"}, "kind must be one of split, cross_validation, got guess"),
    ],
)
def test_a_record_refuses_values_that_decide_nothing(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        CategoryCalibration(**{"scores": (1.0, 2.0), **arguments})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alphas": ()}, "0 rates"),
        ({"categories": {}}, "0 categories"),
        ({"alphas": (0.05, 1.0)}, "alpha must be in"),
        ({"confidence": 1.0}, "confidence must be in"),
    ],
)
def test_a_calibration_needs_categories_and_rates(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibration(**changes)


def test_scaled_parts_are_added_and_not_clamped() -> None:
    ranges = [(0.0, 2.0), (10.0, 20.0), (5.0, 5.0)]
    parts = [[1.0, 10.0, 5.0], [4.0, 0.0, 9.0], [-2.0, 25.0, 1.0]]
    assert scaled_score(parts, ranges).tolist() == [0.5, 1.0, 0.5]
    assert scaled_score(parts[0], ranges).tolist() == [0.5]
    assert scaled_score(np.empty((0, 3)), ranges).shape == (0,)
    for wrong in ([1.0, 2.0], [[1.0] * 6], np.empty((0, 2))):
        with pytest.raises(ValueError, match="score parts, but 3 ranges"):
            scaled_score(wrong, ranges)


def test_a_category_is_selected_by_name() -> None:
    both = calibration()
    alone = calibration(categories={"mug": both.categories["mug"]})
    assert both.of("mug") is both.categories["mug"]
    assert alone.of("IMG_2024", is_named=False) is both.categories["mug"]
    for record, is_named in ((both, True), (both, False), (alone, True)):
        with pytest.raises(UserError, match=r"no category 'tile', only .*mug: calibrate it"):
            record.of("tile", is_named)


@pytest.mark.parametrize("alphas", [(0.05,), (0.05, 0.001, 0.3), (np.float32(0.29),)])
@pytest.mark.parametrize("confidence", [None, 0.95])
def test_the_file_contains_all_of_the_record(
    alphas: tuple[float, ...], confidence: float | None, tmp_path: Path
) -> None:
    written = calibration(alphas=alphas, confidence=confidence)
    file = tmp_path / "run" / CALIBRATION_FILE
    written.write(file)
    for path in (file, file.parent):
        assert Calibration.read(path) == written
    content = written.as_dict()
    assert json.loads(file.read_text(encoding="utf-8")) == content  # plain values: lists, floats
    assert Calibration.from_dict(content, "checkpoint") == written
    assert content["categories"]["plank"]["n"] == 40
    levels = content["categories"]["plank"]["levels"]
    assert [level["alpha"] for level in levels] == list(written.alphas)
    assert levels[0]["threshold"] == written.of("plank").level(alphas[0], confidence).threshold


@pytest.mark.parametrize("values", [20_001, 7])
def test_many_scores_are_stored_as_order_statistics(values: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    scores = np.sort(rng.integers(0, values, 25_000).astype(float))
    record = CategoryCalibration(tuple(scores), 3.0, images=("a",))
    alphas = (0.37, 0.05, 0.6)
    written = Calibration("PaDiM", {"mug": record}, alphas=alphas, confidence=0.95)
    written.write(tmp_path / "c.json")
    read = Calibration.read(tmp_path / "c.json")
    stored = read.of("mug")
    assert len(stored.scores) <= 10_000
    assert stored.num_images == len(stored.all_scores) == 25_000
    assert (stored.all_scores >= scores).all()
    for alpha in alphas:
        for confidence in (None, 0.95):
            assert stored.level(alpha, confidence) == record.level(alpha, confidence)
    new = np.linspace(-1, values, 5001)
    exact, conservative = record.p_values(new), stored.p_values(new)
    assert (conservative >= exact).all()
    assert (conservative - exact).max() < 3e-4 if values > 7 else (conservative == exact).all()
    assert read.as_dict() == written.as_dict()  # writing it again loses nothing more
    assert (tmp_path / "c.json").stat().st_size < 500_000


def test_ten_thousand_scores_are_stored_as_they_are() -> None:
    record = CategoryCalibration(tuple(range(10_000)))
    content = Calibration("PaDiM", {"mug": record}).as_dict()["categories"]["mug"]
    assert content["scores"] == list(record.scores)
    assert content["counts"] is None


@pytest.mark.parametrize("version", [2, 10**6])
def test_a_newer_format_is_refused_with_the_way_out(version: int) -> None:
    content = {**calibration().as_dict(), "format": version}
    with pytest.raises(
        UserError, match=f"^c.json: its format is {version}, but .* calibrate again"
    ):
        Calibration.from_dict(content, "c.json")
    with pytest.raises(UserError, match=f"its format is {version}"):  # whatever else is new in it
        Calibration.from_dict({"format": version}, "c.json")


def changed(path: tuple[str | int, ...], value: object) -> Callable[[dict[str, Any]], None]:
    def change(content: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


WRONG: tuple[Any, ...] = (
    None,
    "text",
    -1,
    0,
    1.5,
    True,
    [],
    {},
    [[1]],
    "0.05",
    float("nan"),
    INF,
    10**400,
    [None],
)
HARMLESS: dict[tuple[str], tuple[Any, ...]] = {  # values that mean something else, but are valid
    ("words",): ("text", "0.05", None), ("map_threshold",): (None, -1, 0, 1.5),
    ("part_ranges",): (None, []), ("images",): ([],), ("counts",): (None,),
    ("versions",): ({},), ("conditions",): ({},), ("confidence",): (None,),
    ("method",): ("text", "0.05"), ("as_asked",): (True,), ("n",): (), ("kind",): (),
}  # fmt: skip
PATHS = [
    *[(key,) for key in ("format", "method", "alpha", "confidence", "categories", "conditions")],
    ("versions",), ("alpha", 0), ("categories", "plank"), ("categories", "plank", "scores", 3),
    *[("categories", "plank", key) for key in (
        "n", "levels", "scores", "counts", "map_threshold", "part_ranges", "images", "words", "kind"
    )],
    *[("categories", "plank", "part_ranges", 0, end) for end in (0, 1)],
    *[("categories", "plank", "levels", 0, key) for key in (
        "alpha", "k", "threshold", "average", "guaranteed", "as_asked"
    )],
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS, ids=lambda path: ".".join(map(str, path)))
def test_a_damaged_value_is_refused_in_one_line(path: tuple[str | int, ...]) -> None:
    valid = HARMLESS.get((str(path[-1]),), ())
    for value in WRONG:
        if any(type(value) is type(other) and value == other for other in valid):
            continue
        content = copy.deepcopy(calibration().as_dict())
        changed(path, value)(content)
        if path[-2:] in [(0, 0), (0, 1)] and value in (-1, 0, 1.5):
            continue  # another range
        with pytest.raises(UserError, match=r"^c\.json: no calibration, or a damaged") as refusal:
            Calibration.from_dict(content, "c.json")
        assert "\n" not in str(refusal.value)
        assert len(str(refusal.value)) < 300


@pytest.mark.parametrize(
    "path",
    [path for path in PATHS if path not in (("categories", "plank"), ("alpha", 0))],
    ids=lambda path: ".".join(map(str, path)),
)
def test_a_missing_value_is_refused(path: tuple[str | int, ...]) -> None:
    content: Any = copy.deepcopy(calibration().as_dict())
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    with pytest.raises(UserError, match="calibrate again"):
        Calibration.from_dict(content, "c.json")


@pytest.mark.parametrize("content", [None, [], "text", 3, [["format", 1]], {}, {"mean": 1}])
def test_another_document_is_refused(content: object, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"c\.json: no calibration, or a damaged one"):
        Calibration.read(tmp_path / "c.json")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"\x00" * 9, b"9" * 5000, b'{"a": NaN}']
)
def test_a_file_that_is_no_json_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_bytes(content)
    with pytest.raises(UserError, match=r"c\.json: no calibration, or a damaged one"):
        Calibration.read(tmp_path / "c.json")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "c.json", tmp_path):
        with pytest.raises(UserError, match=r"\.json: no calibration can be read \(No such file"):
            Calibration.read(path)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_files_are_read_or_refused(data: st.DataObject) -> None:
    """A changed character either leaves a record that decides, or ends in the one error."""
    text = json.dumps(calibration().as_dict())
    position = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.sampled_from([position, position + 1, len(text)]))
    inserted = data.draw(st.sampled_from(["", "0", "9", "-", ",", '"', "null", "]", "e9", "é"]))
    try:
        content = json.loads(text[:position] + inserted + text[end:])
    except ValueError:
        return
    try:
        record = Calibration.from_dict(content, "c.json")
    except UserError:
        return
    for category in record.categories.values():
        level = category.level(0.05)
        assert np.isfinite(level.threshold)
        assert ((category.all_scores > level.threshold).mean()) <= 0.05 or not level.is_as_asked


def test_files_of_format_1_are_read_for_ever() -> None:
    level = {"alpha": 0.2, "confidence": None, "k": 1, "threshold": 3.5, "average": 0.2}
    level |= {"guaranteed": 0.5271292350101577, "as_asked": True}
    record = {"n": 4, "levels": [level], "scores": [1.0, 2.0, 2.5, 3.5], "counts": None}
    record |= {"map_threshold": 7.0, "part_ranges": None, "images": ["ab"], "words": "nut"}
    content = {"format": 1, "method": "PaDiM", "alpha": [0.2], "confidence": None}
    content |= {"categories": {"nut": {**record, "kind": "split"}}}
    calibration = Calibration.from_dict({**content, "conditions": {}, "versions": {}}, "a file")
    assert calibration.categories["nut"].level(0.2).threshold == 3.5
    assert calibration.categories["nut"].map_threshold == 7.0
