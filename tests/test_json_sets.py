from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import save_picture, write_mvtec
from layouts import Maker, blob

from anomaly_clip.cli import main
from anomaly_clip.data import MetaJSON, MVTecAD, RealIAD
from anomaly_clip.data.json_sets import list_meta_json, list_real_iad, read_json


def meta_of(root: Path) -> dict[str, Any]:
    """Return the content of meta.json for a data set in MVTec-AD's layout."""
    content: dict[str, Any] = {"train": {}, "test": {}}
    for split in ("train", "test"):
        data = MVTecAD(str(root))
        for category in data.categories:
            content[split][category] = [
                {
                    "img_path": sample.image.relative_to(root).as_posix(),
                    "mask_path": "" if sample.mask is None else str(sample.mask.relative_to(root)),
                    "cls_name": category,
                    "specie_name": sample.defect,
                    "anomaly": int(sample.label),
                }
                for sample in data.list_samples(category, split)
            ]
    return content


@pytest.fixture
def meta_root(tmp_path: Path) -> Path:
    root = write_mvtec(tmp_path)
    write_meta(root, meta_of(root))
    return root


def write_meta(root: Path, content: Any) -> None:
    (root / "meta.json").write_text(json.dumps(content), encoding="utf-8")


def test_meta_json_lists_what_the_folders_hold(meta_root: Path) -> None:
    listed, expected = MetaJSON(str(meta_root)), MVTecAD(str(meta_root))
    assert listed.categories == expected.categories == ["bottle", "metal_nut"]
    assert listed.splits == ("train", "test")
    for split in ("train", "test"):
        assert set(listed.samples(split)) == set(expected.samples(split))
    assert listed.has_masks
    assert MetaJSON(str(meta_root / "meta.json")).samples("test") == listed.samples("test")


def test_scores_equal_those_of_the_folders(tiny_sdp: list[str], meta_root: Path) -> None:
    def metrics(name: str, folder: Path) -> Any:
        options = [o for o in tiny_sdp if not o.startswith(("--data.root", "--output"))]
        run = [f"--output.folder={folder}", f"--data={name}", f"--data.root={meta_root}"]
        assert main(["test", *options[:1], *run, *options[1:]]) == 0
        return json.loads((folder / "metrics.json").read_text())["categories"]

    expected = metrics("MVTecAD", meta_root.parent / "a")
    assert metrics("MetaJSON", meta_root.parent / "b") == expected


def test_other_forms_of_the_file(meta_root: Path) -> None:
    content = meta_of(meta_root)
    content["train"]["bottle"].append({**content["test"]["bottle"][-1]})  # a defect to train on
    for entry in content["test"]["bottle"]:
        entry["img_path"] = entry["img_path"].replace("/", "\\")
        entry["anomaly"] = bool(entry["anomaly"])
        del entry["cls_name"]
    content["train"]["metal_nut"] = []
    content["val"] = {"bottle": []}
    (meta_root / "meta.json").write_text("\ufeff" + json.dumps(content), encoding="utf-8")
    data = MetaJSON(str(meta_root))
    assert not any(sample.label for sample in data.listing.rows("bottle", "train"))
    assert set(data.samples("test")) == set(MVTecAD(str(meta_root)).samples("test"))
    content["train"] = {}
    write_meta(meta_root, content)
    assert MetaJSON(str(meta_root)).splits == ("test",)


def test_odd_values_that_are_certain(meta_root: Path) -> None:
    content, expected = meta_of(meta_root), MVTecAD(str(meta_root)).samples("test")
    forms = {0: ("0", False, 0.0, " false "), 1: ("1", True, 1.0, "True")}
    for number, entry in enumerate(e for part in content["test"].values() for e in part):
        entry["anomaly"] = forms[entry["anomaly"]][number % 4]
        entry["img_path"] = str(meta_root.absolute() / entry["img_path"])
    write_meta(meta_root, content)
    assert set(MetaJSON(str(meta_root)).samples("test")) == set(expected)


def test_a_normal_image_may_have_an_empty_mask(meta_root: Path) -> None:
    content = meta_of(meta_root)
    entry = content["test"]["bottle"][0]
    assert not entry["anomaly"]
    entry["mask_path"] = "no_such_mask.png"
    write_meta(meta_root, content)
    assert MetaJSON(str(meta_root)).samples("test")[0].mask is None
    mask = save_picture(meta_root / "mask.png", np.zeros((40, 48), np.uint8))
    entry["mask_path"] = "mask.png"
    write_meta(meta_root, content)
    assert MetaJSON(str(meta_root)).samples("test")[0].mask == mask
    save_picture(mask, blob((48, 40)))
    with pytest.raises(ValueError, match=r"mask\.png: the mask of a normal image is not empty"):
        MetaJSON(str(meta_root)).samples("test")


def test_what_is_not_used_is_counted(meta_root: Path) -> None:
    content = meta_of(meta_root)
    content["train"]["bottle"].append(content["test"]["bottle"][-1])
    content["val"] = {"bottle": content["test"]["bottle"][:2]}
    write_meta(meta_root, content)
    data = MetaJSON(str(meta_root))
    line = data.summary("fit")
    assert "1 anomalous training image is not used: bottle/test/scratch/001.png" in line
    assert "2 images of another split are not used, such as bottle/test/" in line


def test_masks_are_optional_for_all_or_for_none(meta_root: Path) -> None:
    content = meta_of(meta_root)
    for entries in content["test"].values():
        for entry in entries:
            entry.pop("mask_path")
    write_meta(meta_root, content)
    assert not MetaJSON(str(meta_root)).has_masks
    content = meta_of(meta_root)
    content["test"]["metal_nut"][-1]["mask_path"] = None
    write_meta(meta_root, content)
    with pytest.raises(ValueError, match="1 of 4 anomalous test images have no mask_path, such as"):
        _ = MetaJSON(str(meta_root)).has_masks


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"anomaly": 2}, "test, bottle, entry 1: expected anomaly 0 or 1, got 2"),
        ({"anomaly": None}, "expected anomaly 0 or 1, got None"),
        ({"img_path": "../a.png"}, r"\.\./a\.png is not below .*: use paths relative to it"),
        ({"img_path": "/etc/a.png"}, "/etc/a.png is not below"),
        ({"img_path": ""}, "expected the path of an image, got ''"),
        ({"img_path": 3}, "expected the path of an image, got 3"),
        ({"img_path": "C:\\data\\a.png"}, "is not below .*: use paths relative to it"),
        ({"anomaly": "yes"}, "expected anomaly 0 or 1, got 'yes'"),
        ({"anomaly": 0.5}, "expected anomaly 0 or 1, got 0.5"),
        ({"anomaly": [1]}, r"expected anomaly 0 or 1, got \[1\]"),
        ({"anomaly": 1}, "specie_name 'good' contradicts anomaly 1: correct one of them"),
        ({"cls_name": "cable"}, "cls_name 'cable' differs from the category 'bottle'"),
        (
            {"img_path": "bottle/test/good/001.png"},
            "entry 2: .*001.png is also entry 1: remove one of them",
        ),
    ],
)
def test_malformed_entries_are_named(meta_root: Path, change: Any, message: str) -> None:
    content = meta_of(meta_root)
    content["test"]["bottle"][0].update(change)
    with pytest.raises(ValueError, match=message):
        list(list_meta_json(meta_root / "meta.json", content, "bottle", "test"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "expected a JSON object, got list"),
        ("{", "not a JSON file in UTF-8"),
        ("{}", "expected {split: {category: .* got the keys nothing"),
        ('{"images": [1]}', "got the keys images"),
        ('{"test": [1]}', "expected {split: {category"),
        ('{"test": {"": [1]}}', "a category has the name '': give it a name"),
        ('{"test": {"a": [], "a": [1]}}', "the key 'a' occurs twice in one object"),
        ('{"test": {"a": {"img_path": 1}}}', "test, a: expected a list of entries"),
        ('{"test": {"a": 1}}', "test, a: expected a list of entries, got 1"),
        ('{"test": {"a": [1]}}', "test, a, entry 1: expected an object"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "meta.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        MetaJSON(str(tmp_path)).samples("test")


def test_a_missing_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bottle").mkdir()
    assert main(["check", "--data=MetaJSON", f"--data.root={tmp_path}"]) == 2
    assert "expected meta.json" in (err := capsys.readouterr().err)
    assert "found bottle" in err
    assert main(["check", "--data=MetaJSON", f"--data.root={tmp_path / 'other.json'}"]) == 2
    assert "expected other.json" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        read_json(tmp_path / "no.json")


@pytest.fixture
def real_iad(tmp_path: Path) -> Path:
    """One category of Real-IAD's form: 2 training, 1 normal and 1 anomalous test image."""
    root = tmp_path / "Real-IAD"
    make = Maker(3)
    folder = root / "realiad_512" / "audiojack"
    normal = [f"OK/S000{n}/audiojack_000{n}_OK_C1.jpg" for n in range(3)]
    for name in normal:
        make.picture(folder / name, format="JPEG")
    bad = "NG/HS/S0001/audiojack_0001_NG_HS_C1"
    make.picture(folder / f"{bad}.jpg", format="JPEG")
    save_picture(folder / f"{bad}.png", blob())

    def entry(path: str, kind: str = "OK", mask: str | None = None) -> dict[str, Any]:
        entry = {"category": "audiojack", "anomaly_class": kind}
        return {**entry, "image_path": path, "mask_path": mask}

    content = {
        "meta": {"prefix": "realiad_1024/audiojack/", "normal_class": "OK"},
        "train": [entry(normal[1]), entry(normal[0]), entry(f"{bad}.jpg", "HS", f"{bad}.png")],
        "test": [entry(normal[2]), entry(f"{bad}.jpg", "HS", f"{bad}.png")],
    }
    file = root / "realiad_jsons" / "realiad_jsons" / "audiojack.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(content))
    return root


def test_real_iad_is_read_by_its_json(real_iad: Path) -> None:
    data = RealIAD(str(real_iad), image_size=16)
    assert data.categories == ["audiojack"]
    assert [s.image.parent.name for s in data.samples("train")] == ["S0001", "S0000"]  # as listed
    normal, anomalous = data.samples("test")
    assert (normal.label, normal.defect, normal.mask) == (False, "good", None)
    assert (anomalous.label, anomalous.defect) == (True, "HS")
    assert data.dataset("test")[1]["mask"].any()
    assert data.protocol()["resolution"] == "realiad_512"
    assert main(["check", "--data=RealIAD", f"--data.root={real_iad}"]) == 0


def test_mistakes_with_real_iad(real_iad: Path) -> None:
    with pytest.raises(FileNotFoundError, match="the images in realiad_1024/; found"):
        RealIAD(str(real_iad), resolution=1024).samples("test")
    with pytest.raises(FileNotFoundError, match=r"expected realiad_jsons/<category>\.json"):
        RealIAD(str(real_iad), jsons="realiad_jsons_sv").samples("test")
    file = real_iad / "a.json"
    with pytest.raises(ValueError, match="expected the keys meta, train and test, got meta"):
        list(list_real_iad(real_iad, file, {"meta": {}}, "a", "test"))
    entries = {"meta": {}, "test": [{"image_path": "a.jpg", "anomaly_class": "HS"}]}
    normal = {"image_path": "a.jpg", "anomaly_class": "OK"}
    with pytest.raises(ValueError, match=r"test, entry 2: .*a.jpg is also entry 1: remove one"):
        list(list_real_iad(real_iad, file, {"meta": {}, "test": [normal] * 2}, "a", "test"))
    entries = {"meta": {}, "test": [{**normal, "category": "b"}]}
    with pytest.raises(ValueError, match="category 'b' differs from the name of the file"):
        list(list_real_iad(real_iad, file, entries, "a", "test"))
    entries = {"meta": {}, "test": [{**normal, "image_path": "D:\\a.jpg"}]}
    with pytest.raises(ValueError, match="is not below"):
        list(list_real_iad(real_iad, file, entries, "a", "test"))
    entries = {"meta": {}, "test": [{"image_path": "a.jpg", "anomaly_class": "HS"}]}
    with pytest.raises(ValueError, match="test, entry 1: expected the path of a mask, got None"):
        list(list_real_iad(real_iad, file, entries, "a", "test"))


@pytest.mark.parametrize("entries", [None, "a.png", {"a": 1}, 3])
def test_entries_of_a_category_must_be_a_list(
    entries: Any, meta_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_meta(meta_root, {"train": {"plate": entries}, "test": {"plate": []}})
    for verb in (["check"], ["fit", "--model=PaDiM", "--model.backbone.weights=random"]):
        assert main([*verb, "--data=MetaJSON", f"--data.root={meta_root}"]) == 2
        error = capsys.readouterr().err
        assert "train, plate: expected a list of entries, got" in error
        assert "Traceback" not in error
