"""Text of the report page."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import save_picture
from PIL import Image
from run_folder import TWO, folders_on, make_run

from anomaly_clip.cli import main
from anomaly_clip.errors import UserError
from anomaly_clip.files import write_json
from anomaly_clip.reporting.page import PAGE, write_page

CONFIGS = Path(__file__).parent.parent / "configs"
VOID = ("meta", "link", "br", "img", "input")
MARKUP = "<b onclick=\"x\">nut</b> & 'bolt'</script>"
MEGABYTE = 1_000_000


class Seen(HTMLParser):
    """Parser that collects links, and texts by tag; tags must be closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [str(value) for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data.strip())


def read(page: Path) -> Seen:
    seen = Seen()
    seen.feed(page.read_text(encoding="utf-8"))
    assert seen.open == []
    return seen


# -- content ---------------------------------------------------------------------------------------


def test_the_page_has_metrics_protocol_weights_and_configuration(tmp_path: Path) -> None:
    page = write_page(make_run(tmp_path, TWO, pictures=8))
    assert page == tmp_path / PAGE
    seen = read(page)
    cells = seen.texts["td"]
    assert cells[:10] == ["cap", "87.5", *["50.0"] * 5, "–", "4", "2"]
    assert cells[20] == "mean"
    assert seen.texts["h1"] == ["SDP on MVTecAD, test"]
    assert "8 images  ·  2 categories  ·  tiny with weights w.pt  ·  seed 0" in seen.texts["p"]
    records = dict(zip(seen.texts["dt"], seen.texts["dd"], strict=True))
    assert (records["split"], records["complete"], records["random"]) == ("test", "yes", "no")
    assert records["sha256"] == "0" * 64
    assert "class_path: SDP  # </pre>" in "".join(seen.texts["pre"])
    titles = ["Image-level ROC", "Image-level precision-recall"]
    assert [text for text in seen.texts["figcaption"] if text in titles] == titles
    assert sum(link.startswith("data:image/webp;base64,") for link in seen.links) == 8


def test_nothing_is_loaded_from_elsewhere(tmp_path: Path) -> None:
    page = write_page(make_run(tmp_path, TWO, pictures=3))
    assert all(link.startswith(("data:", "#")) for link in read(page).links)
    text = re.sub(r"data:image/\w+;base64,[\w+/=]+", "", page.read_text(encoding="utf-8"))
    assert "url(" not in text
    assert "import(" not in text
    assert set(re.findall(r"https?://[^\s\"'<]*", text)) == {
        "http://www.w3.org/2000/svg"
    }  # a namespace, not a link


def test_names_with_markup_are_shown_literally(tmp_path: Path) -> None:
    run = make_run(tmp_path, {MARKUP: TWO["cap"], "nut": TWO["nut"]}, pictures=4)
    seen = read(write_page(run))
    assert seen.texts["td"][0] == MARKUP
    assert MARKUP in seen.texts["option"]
    assert seen.texts["b"] == ["87.5", *["50.0"] * 3]  # only the tiles are bold


def test_warnings_come_first(tmp_path: Path) -> None:
    weights = {"backbone": "tiny", "pretrained": "random", "random": True, "sha256": None}
    run = make_run(tmp_path, TWO, weights=weights, failed={"screw": "no images"})
    content = json.loads((run / "metrics.json").read_text())
    content["run"]["protocol"] |= {"complete": False, "overlap": 3, "select": "best_test"}
    content["run"]["protocol"] |= {"listed": 36, "rounds": 10}
    write_json(run / "metrics.json", content)
    text = " ".join(read(write_page(run)).texts["p"])
    for warning in (
        "RANDOM WEIGHTS: these metrics are meaningless",
        "PARTIAL: 8 of 36 images were scored",
        "means over 10 rounds",
        "Curves, scores, counts and images are those of the first round",
        "3 TEST IMAGES ARE AMONG THE TRAINING IMAGES",
        "EPOCH SELECTED ON THE TEST IMAGES",
        "FAILED: screw: no images",
    ):
        assert warning in text


def test_the_page_has_the_backbone_warnings_of_a_comparison(tmp_path: Path) -> None:
    file = tmp_path / "tab_resnet18.safetensors"
    write_json(file.with_suffix(".json"), {"text": {"pretrained": "demo"}})
    weights = {"backbone": "resnet18", "pretrained": str(file), "random": False, "sha256": None}
    seen = read(write_page(make_run(tmp_path / "run", TWO, weights=weights)))
    assert "the backbone was aligned with text embeddings of demo weights" in seen.texts["p"]


def test_unknown_values_are_not_called_none(tmp_path: Path) -> None:
    run = make_run(tmp_path, TWO)
    content = json.loads((run / "metrics.json").read_text())
    borrowed = {"borrowed": "visa.pth", "auxiliary": None, "overlap": None, "synthesis": None}
    content["run"]["protocol"] |= borrowed
    write_json(run / "metrics.json", content)
    seen = read(write_page(run))
    records = dict(zip(seen.texts["dt"], seen.texts["dd"], strict=True))
    assert records["auxiliary"] == "unknown"
    assert records["overlap"] == "not checked"
    assert "synthesis" in records["not set"].split(", ")


@pytest.mark.parametrize(("label", "missing"), [(0, "anomalous"), (1, "normal")])
def test_a_missing_class_is_named(tmp_path: Path, label: int, missing: str) -> None:
    run = make_run(tmp_path, {"cap": ([0.1, 0.2], [label] * 2)}, pictures=2)
    seen = read(write_page(run))
    assert f"No {missing} image was scored: most metrics are undefined" in seen.texts["p"]
    assert "<polyline" not in (run / PAGE).read_text(encoding="utf-8")


def test_few_images_are_named(tmp_path: Path) -> None:
    few = {"cap": ([0.1, *[0.2] * 12], [0] + [1] * 12)}
    assert (
        "Only 1 normal image: the metrics are uncertain; the 95 % interval of image AUROC is "
        "31.4 to 98.9; all rankings are against this one normal image"
        in read(write_page(make_run(tmp_path / "a", few))).texts["p"]
    )
    many = {"cap": ([0.1] * 10 + [0.2] * 10, [0] * 10 + [1] * 10)}
    assert "uncertain" not in " ".join(read(write_page(make_run(tmp_path / "b", many))).texts["p"])


@pytest.mark.slow
def test_a_page_of_thousands_of_categories_stays_small(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    many = {
        f"category {number}": (rng.random(20).tolist(), [0] * 10 + [1] * 10)
        for number in range(3000)
    }
    page = write_page(make_run(tmp_path, many))
    assert page.stat().st_size < 4 * MEGABYTE
    text = page.read_text(encoding="utf-8")
    assert text.count("<polyline") == 2 * 40
    assert (
        "only the 40 categories with the lowest metrics are shown (curves.json has all 3000)"
        in text
    )


def test_images_left_out_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path, TWO, pictures=8)
    sizes = [file.stat().st_size for file in sorted((run / "gallery").glob("*.webp"))]
    monkeypatch.setattr("anomaly_clip.reporting.page.MAX_IMAGE_BYTES", sum(sizes[:5]))
    text = write_page(run).read_text(encoding="utf-8")
    assert text.count("<img ") == 5
    assert "3 more are in the folder gallery" in text


def test_the_worst_images_come_first_and_no_kind_uses_up_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, TWO, pictures=8)  # labels 0 0 1 1 0 0 0 1
    file = run / "gallery" / "gallery.json"
    listed = json.loads(file.read_text())
    for image, gap in zip(listed["pictures"], (1, 2, 3, 4, 5, 6, 7, 8), strict=True):
        image["gap"] = gap
    write_json(file, listed)
    sizes = [(run / "gallery" / f"{number}.webp").stat().st_size for number in range(8)]
    monkeypatch.setattr(
        "anomaly_clip.reporting.page.MAX_IMAGE_BYTES", sizes[6] + sizes[7] + sizes[3]
    )
    seen = read(write_page(run))
    shown = [text for text in seen.texts["span"] if "/" in text]
    assert shown == ["nut/6", "nut/7", "cap/3"]  # a false positive, two true positives


def test_a_page_that_is_too_large_has_no_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, TWO, pictures=8)
    size = write_page(run).stat().st_size
    monkeypatch.setattr("anomaly_clip.reporting.page.MAX_PAGE_BYTES", size - 1)
    assert "<img " not in write_page(run).read_text(encoding="utf-8")
    assert "8 more are in the folder gallery" in (run / PAGE).read_text(encoding="utf-8")


def test_too_many_scores_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anomaly_clip.reporting.page.MAX_SCORES", 7)
    text = write_page(make_run(tmp_path, TWO)).read_text(encoding="utf-8")
    assert "scores.csv" in text
    assert 'id="threshold"' not in text


@pytest.mark.parametrize("file", ["scores.csv", "curves.json", "config-test.yaml"])
def test_a_folder_with_a_missing_file_still_has_a_page(tmp_path: Path, file: str) -> None:
    run = make_run(tmp_path, TWO, pictures=2)
    (run / file).unlink()
    seen = read(write_page(run))
    assert seen.texts["td"][0] == "cap"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("metrics.json", "{", "metrics.json: damaged, not valid JSON"),
        ("metrics.json", None, "neither metrics.json nor predict.json"),
        ("curves.json", "[]", "curves.json: damaged"),
        ("curves.json", '{"cap": {"image_roc": 3}}', "curves.json: damaged"),
        ("curves.json", '{"cap": {"image_roc": [[], []]}}', "curves.json: damaged"),
        ("curves.json", '{"cap": {"image_roc": [[0, 1], [0]]}}', "curves.json: damaged"),
        ("scores.csv", "path,category,label,image_score\na,cap,0,high\n", "scores.csv: damaged"),
        ("scores.csv", "path,category,label,image_score\na,cap,0,nan\n", "scores.csv: damaged"),
        ("scores.csv", "\0", "scores.csv: damaged"),
        ("gallery/gallery.json", '{"pictures":[{}]}', "gallery.json: damaged"),
    ],
)
def test_a_damaged_file_is_an_error_of_one_line(
    tmp_path: Path, file: str, content: str | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", TWO, pictures=1)
    if content is None:
        (run / file).unlink()
    else:
        (run / file).write_text(content)
    assert main(["report", str(run), "--page"]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (run / PAGE).exists()


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("mean",), []),
        (("run", "versions"), []),
        (("run", "seed"), [0]),
        (("run", "failed"), {str(number): "no" for number in range(999)}),
        (("run", "checkpoint"), {"cap": "a.ckpt"}),
        (("run", "protocol", "images"), ["cap"]),
        (("run", "protocol", "images"), {"cap": "two"}),
        (("run", "protocol", "rounds"), "3"),
        (("run", "protocol", "by_round"), [{"image_auroc": 0.123456789}] * 3),
    ],
)
def test_odd_records_cause_no_error(tmp_path: Path, where: tuple[str, ...], value: Any) -> None:
    run = make_run(tmp_path, TWO)
    content = json.loads((run / "metrics.json").read_text())
    part = content
    for name in where[:-1]:
        part = part[name]
    part[where[-1]] = value
    write_json(run / "metrics.json", content)
    assert "cap" in read(write_page(run)).texts["td"]


def test_an_invalid_mean_or_predict_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "test", TWO)
    content = json.loads((run / "metrics.json").read_text())
    write_json(run / "metrics.json", {**content, "mean": {"image_auroc": "high"}})
    with pytest.raises(UserError, match="has high for the mean image_auroc, not a fraction"):
        write_page(run)
    (tmp_path / "predict").mkdir()
    write_json(tmp_path / "predict" / "predict.json", {})
    with pytest.raises(UserError, match="does not name the method and the data set"):
        write_page(tmp_path / "predict")


def test_images_outside_of_the_run_are_not_embedded(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", TWO, pictures=1)
    (run / "gallery" / "0.webp").rename(tmp_path / "secret.webp")
    file = run / "gallery" / "gallery.json"
    file.write_text(file.read_text().replace("0.webp", "../../secret.webp"))
    assert "<img " not in write_page(run).read_text(encoding="utf-8")


# -- pages of real runs ----------------------------------------------------------------------------


def test_a_test_ends_with_its_page(tiny_sdp: list[str], tmp_path: Path) -> None:
    assert main(["test", *tiny_sdp, "--output.maps=true"]) == 0
    run = tmp_path / "runs" / "sdp" / "1-test"
    assert folders_on(run / PAGE, tmp_path) == []
    seen = read(run / PAGE)
    embedded = [link for link in seen.links if link.startswith("data:image/webp")]
    assert len(embedded) == 8 == len(list((run / "gallery").rglob("*.webp")))
    full = [link for link in seen.links if link.startswith("maps/")]
    assert len(full) == 8
    assert all((run / link).is_file() for link in full)
    listed = json.loads((run / "gallery" / "gallery.json").read_text())["pictures"]
    assert {image["kind"] for image in listed} == {"false_alarm", "miss", "hit"}
    for image in listed:  # the empty mask of a normal image is left out
        num_panels = 4 if image["label"] else 3
        with Image.open(run / "gallery" / image["picture"]) as sheet:
            assert sheet.width == num_panels * 192 + (num_panels - 1) * 4


def test_the_page_can_be_switched_off(tiny_sdp: list[str], tmp_path: Path) -> None:
    assert main(["test", *tiny_sdp, "--output.page=false"]) == 0
    left = {file.name for file in (tmp_path / "runs" / "sdp" / "1-test").iterdir()}
    assert not left & {PAGE, "gallery", ".scratch"}


@pytest.fixture
def predict_options(tiny_sdp: list[str], mvtec_root: Path) -> list[str]:
    """Return the options to predict six images without labels."""
    folder = mvtec_root / "bottle" / "train" / "good"
    for number in range(4):
        save_picture(folder / f"{number}.png", size=30 + number)
    words = [word for word in tiny_sdp if not word.startswith("--data.root")]
    words += ["--data=ImageFolder", "--data.category=bottle", f"--data.root={folder}"]
    return [*words, "--output.name=own"]


def test_a_predict_shows_the_highest_scores(predict_options: list[str], tmp_path: Path) -> None:
    assert main(["predict", *predict_options]) == 0
    run = tmp_path / "runs" / "own" / "1-predict"
    assert folders_on(run / PAGE, tmp_path) == []
    seen = read(run / PAGE)
    assert seen.texts["h1"] == ["SDP on ImageFolder, predict"]
    assert "td" not in seen.texts
    assert "Images with the highest scores" in seen.texts["h3"]
    with (run / "scores.csv").open(newline="") as file:
        scores = sorted((float(row["image_score"]) for row in csv.DictReader(file)), reverse=True)
    shown = re.findall(r'data-score="([^"]+)"', (run / PAGE).read_text(encoding="utf-8"))
    assert [float(score) for score in shown[:4]] == scores[:4]
    assert sum(link.startswith("maps/") for link in seen.links) == 6
    assert "folder maps next to it" in "".join(seen.texts["footer"])
    assert main(["report", str(run), "--page"]) == 0  # needs only the files of a predict run


def test_a_test_and_a_predict_do_not_share_a_folder(
    tiny_sdp: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for verb, other in (("test", "predict"), ("predict", "test")):
        words = [*tiny_sdp, f"--output.folder={tmp_path / verb}"]
        assert main([verb, *words]) == 0
        page = (tmp_path / verb / PAGE).read_bytes()
        capsys.readouterr()
        assert main([other, *words]) == 2
        assert f"has the results of {verb}: give {other} another" in capsys.readouterr().err
        assert (tmp_path / verb / PAGE).read_bytes() == page


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Experiment logs directory")
def test_nothing_of_an_earlier_run_stays_on_the_page(tiny_sdp: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["test", *tiny_sdp, f"--output.folder={run}"]
    assert main([*words, "--output.maps=true"]) == 0
    assert main([*words, "--output.maps=false"]) == 0
    assert not any(link.startswith("maps/") for link in read(run / PAGE).links)
    assert main([*words, "--output.page=false"]) == 0
    assert not (run / PAGE).exists()
    assert not (run / "gallery").exists()


@pytest.mark.slow
def test_each_has_one_page_of_all_categories(mvtec_root: Path, tmp_path: Path) -> None:
    for category in ("bottle", "metal_nut"):
        folder = mvtec_root / category / "train" / "good"
        (folder / "again.png").write_bytes((folder / "000.png").read_bytes())
    words = [f"--config={CONFIGS / 'padim.yaml'}", f"--data.root={mvtec_root}"]
    words += ["--model.backbone.weights=random", "--model.image_size=32", "--data.num_workers=0"]
    words += ["--trainer.accelerator=cpu", f"--output.root={tmp_path / 'runs'}"]
    assert main(["each", *words]) == 0
    run = tmp_path / "runs" / "padim" / "1-each"
    assert folders_on(run / PAGE, tmp_path) == []
    seen = read(run / PAGE)
    assert seen.texts["option"][1:] == ["bottle", "metal_nut"]
    assert sum(link.startswith("data:image/webp") for link in seen.links) == 8
    assert len(re.findall("<polyline", (run / PAGE).read_text())) == 5 * 2
