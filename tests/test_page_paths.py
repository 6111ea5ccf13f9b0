"""The page names no folder of the machine that made it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from run_folder import THRESHOLDS, TWO, add_unreadable, decide, make_run, text_of

from anomaly_clip.files import read_csv, write_csv, write_json
from anomaly_clip.reporting.image_table import build_image_table, short_name
from anomaly_clip.reporting.page import PAGE, write_page
from anomaly_clip.reporting.page_paths import PathNames, without_folders
from anomaly_clip.results.run_files import ImageRow, read_files

NAMES = PathNames(Path("/srv/runs/sdp/1-test"), ["/data/jane doe/photos"])


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/data/jane doe/photos", "photos"),
        ("/data/jane doe/photos/", "photos"),
        ("/data/jane doe/photos/a.png is damaged", "a.png is damaged"),
        ("a.png: /data/jane doe/photos/good/1.png, cut", "a.png: photos/good/1.png, cut"),
        ("/srv/runs/sdp/1-test/checkpoints/last.ckpt", "checkpoints/last.ckpt"),
        ("/srv/runs/sdp/1-fit/checkpoints/last.ckpt", "last.ckpt"),
        ("runs/sdp/1-fit/last.ckpt", "runs/sdp/1-fit/last.ckpt"),
        ("C:\\Users\\jane\\photos", "photos"),
        ("lost: C:\\Users\\jane\\a.png", "lost: a.png"),
        ("\\\\server\\jane\\photos", "photos"),
        ("../../home/jane/photos", "photos"),
        ("~/photos", "photos"),
        ("file:///home/jane/photos", "photos"),
        ("see (/home/jane/a.png)", "see (a.png)"),
        ("openai", "openai"),
        ("hf-hub:laion/CLIP-ViT", "hf-hub:laion/CLIP-ViT"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("1/2 and/or 3 km/h, a / b, /m", "1/2 and/or 3 km/h, a / b, /m"),
        ("runs/{name}/1", "runs/{name}/1"),
        ("/", "/"),
        ("", ""),
        ("a\n/home/jane/b\n", "a\nb\n"),
    ],
)
def test_texts(text: str, shown: str) -> None:
    assert NAMES.value(text) == shown


def test_home_and_working_folder_have_no_name() -> None:
    home, working = Path.home(), Path.cwd()
    assert NAMES.value(str(home)) == "~"
    assert NAMES.text(f"in {working}, not in {home} x") in ("in ., not in ~ x", "in ~, not in ~ x")


def test_configurations_stay_valid() -> None:
    config = {
        "data": {"root": "/data/jane doe/photos", "b": "/x/it's: here", "c": ["/a b/c", "d/e"]},
        "/x y/z": "~/photos",
        "text": "a photo of a {}/b",
    }
    text = yaml.safe_dump(config) + "# of /home/jane/c.yaml\n"
    shown = NAMES.configuration(text)
    assert yaml.safe_load(shown) == {
        "data": {"root": "photos", "b": "it's: here", "c": ["c", "d/e"]},
        "z": "photos",
        "text": "a photo of a {}/b",
    }
    assert shown.endswith("# of c.yaml\n")
    assert NAMES.configuration("a: [\n/home/jane/x") == "a: [\nx"  # not valid, and still without
    unchanged = yaml.safe_dump({"a": ["b/c", 1, None], "d": "e"})
    assert NAMES.configuration(unchanged) == unchanged


def test_images_without_a_common_folder_have_their_last_folders() -> None:
    home = str(Path.home())
    paths = [f"{home}/photos/nut/good/1.png", "/mnt/x/nut/cut/2.png"]
    rows = [ImageRow(path, "nut", None, 0.5, 0.5, "", "", "") for path in paths]
    table = build_image_table(rows, ["nut"], {("nut", paths[1]): 7})
    assert table is not None
    assert (table["folder"], table["names"]) == ("", ["nut/good/1.png", "nut/cut/2.png"])
    assert table["cards"] == {1: 7}
    rows = [row._replace(path=f"/srv/jane/photos/{n}.png") for n, row in enumerate(rows)]
    table = build_image_table(rows, ["nut"], {})
    assert table is not None
    assert (table["folder"], table["names"]) == ("photos/", ["0.png", "1.png"])
    assert short_name("D:\\a\\b\\c\\d.png") == "b/c/d.png"


def test_every_record_is_cleaned(tmp_path: Path) -> None:
    """A path in each place of a run's folder that reaches the page."""
    secret = "/home/jane doe/secret"
    run = decide(add_unreadable(make_run(tmp_path / "run", TWO, pictures=4)), THRESHOLDS, False)
    rows = list(read_csv(run / "scores.csv"))
    for row in rows:
        row["path"] = f"{secret}/photos/{row['path']}"
        row["error"] = row["error"] and f"{secret}/photos/lost.png: cut off"
    write_csv(run / "scores.csv", list(rows[0]), [list(row.values()) for row in rows])
    content = json.loads((run / "metrics.json").read_text())
    content["run"]["weights"]["pretrained"] = f"{secret}/w.pt"
    content["run"]["checkpoint"] = f"{secret}/last.ckpt"
    content["run"]["failed"] = {"screw": f"{secret}/screw has no images"}
    content["run"]["protocol"] |= {"root": f"{secret}/photos", "references": [f"{secret}/1.png"]}
    content["run"]["protocol"]["trained_on"] = {"cap": {"file": f"{secret}/2.png"}}
    content["decisions"]["source"] = f"{secret}/calibration.json"
    write_json(run / "metrics.json", content)
    config = {"data": {"root": f"{secret}/photos"}, "a": f"--ckpt_path {secret}/last.ckpt"}
    (run / "config-test.yaml").write_text(yaml.safe_dump(config))
    write_page(run)
    html = (run / PAGE).read_text(encoding="utf-8")
    for part in ("jane", "secret", "/home"):
        assert part not in html, html[html.index(part) - 200 : html.index(part) + 50]
    text = text_of(run)
    assert "root: photos" in text
    for part in ("w.pt", "last.ckpt", "screw has no images", "1.png", "2.png", "Folder: photos/"):
        assert part in text
    assert read_files(run).run["protocol"]["root"] == f"{secret}/photos"  # the files keep it
    assert without_folders(read_files(run)).rows[0].path.startswith(secret)
