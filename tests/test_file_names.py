"""Files with names that are not UTF-8, very long, or full of special characters."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import TINY_CLIP, save_picture

from anomaly_clip.cli import main
from anomaly_clip.data.samples import Sample
from anomaly_clip.files import MAX_NAME_BYTES, name_bytes, readable, safe_name
from anomaly_clip.results.map_store import image_names

LATIN = os.fsdecode(b"gr\xfcn")
NAMES = [
    LATIN,
    "n" * 251,
    "n" * 250 + "m",
    "é" * 125,
    'two\nlines "quoted", it\'s',
    "\x1b[31m\r\t",
    "-dash,comma;semicolon",
    "a",
    "<b>{{x}}%20",
]
FIT = ["--model=PaDiM", "--model.backbone.weights=random", "--model.image_size=32"]
FIT += ["--data=ImageFolder", "--data.num_workers=0", "--trainer.accelerator=cpu"]


def noise(path: Path) -> None:
    rng = np.random.default_rng(list(name_bytes(str(path)[-300:])))
    save_picture(path.with_name("x.png"), rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
    path.with_name("x.png").rename(path)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with awkward names of images, defects and its own."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / os.fsdecode(b"pl\xe4n\nk")
    for name in NAMES:
        noise(folder / "good" / f"{name}.png")
    noise(folder / os.fsdecode(b"sch\xe4den, 1") / f"{LATIN}.png")
    return folder


def test_all_verbs(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Everything is scored, written, and found again by the next command."""
    data = f"--data.root={root}"
    assert main(["fit", *FIT, data, "--data.test_share=0.5", "--output.folder=fit"]) == 0
    assert r"pl\xe4n\nk: " in capsys.readouterr().err
    checkpoint = "--ckpt_path=fit/checkpoints/last.ckpt"
    assert main(["test", checkpoint, "--output.folder=test"]) == 0
    assert r"pl\xe4n\nk" in capsys.readouterr().out
    category = "pl\\xe4n\nk"
    assert list(json.loads(Path("test/metrics.json").read_text())["categories"]) == [category]

    assert main(["predict", checkpoint, "--output.folder=scores", "--output.raw_maps=true"]) == 0
    with Path("scores/scores.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    paths = {row["path"] for row in rows}
    assert paths == {readable(str(p)) for p in root.rglob("*.png")}
    assert {row["category"] for row in rows} == {category}
    assert json.loads(Path("scores/predict.json").read_text())["run"]["protocol"]["complete"]
    maps = {p.stem for p in Path("scores/maps").rglob("*.png")}
    assert maps == {p.stem for p in Path("scores/raw_maps").rglob("*.npy")}
    assert len(list(Path("scores/maps").rglob("*.png"))) == len(NAMES) + 1
    assert r"gr_xfcn" in maps
    assert len(list(Path("scores/gallery").rglob("*.webp"))) > 3
    for page in ("test", "scores"):
        assert main(["report", "--page", page]) == 0
        assert "xe4n" in Path(page, "report.html").read_text(encoding="utf-8")


def test_each_category_finds_its_folder(root: Path) -> None:
    options = [f"--data.root={root}", "--data.test_share=0.5", "--output.folder=each"]
    assert main(["each", *FIT, *options]) == 0
    assert list(json.loads(Path("each/metrics.json").read_text())["categories"]) == ["pl\\xe4n\nk"]
    assert main(["each", "--resume", "each"]) == 0


def test_check_and_preview(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--data=ImageFolder", f"--data.root={root}"]
    assert main(["check", *words, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == len(NAMES) + 1
    assert main(["preview", *words]) == 0


def test_names_of_references(root: Path) -> None:
    Path("clip.json").write_text(json.dumps(TINY_CLIP))
    words = ["--model=WinCLIP", "--model.backbone.name=clip.json", "--data=ImageFolder"]
    words += ["--model.backbone.pretrained=random", "--data.shots=2", f"--data.category={LATIN}"]
    words += ["--data.num_workers=0", "--trainer.accelerator=cpu", f"--data.root={root}"]
    assert main(["predict", *words, "--output.folder=run", "--output.page=false"]) == 0
    references = json.loads(Path("run/references.json").read_text())
    assert list(references) == [r"gr\xfcn"]
    assert set(references[r"gr\xfcn"]) <= {readable(str(p)) for p in root.rglob("*.png")}


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("json_option", [[], ["--json", "-"]])
def test_terminals_of_any_encoding(
    root: Path, encoding: str, json_option: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    words = ["--data=ImageFolder", f"--data.root={root}", "--data.category=größe"]
    assert main(["check", *words, *json_option]) == 0
    assert out.errors == "strict"  # as before
    out.flush()
    text = out.buffer.getvalue()
    if json_option:
        assert json.loads(text.decode(encoding))["rows"][0]["category"] == "größe"
    else:
        assert rb"pl\xe4n\nk" in text
        assert (r"gr\xf6\xdfe" if encoding == "ascii" else "größe").encode(encoding) in text


def test_derived_names_are_distinct_and_fit_the_disk() -> None:
    stems = [*NAMES, "A", "a", "a-9", "a-10", "x", "e\u0301", "\u00e9", "?", ":", "n" * 252]
    samples = [Sample(Path(f"{stem}.png"), "c", False, defect="") for stem in stems]
    samples += [Sample(Path("1.png"), "c", False, defect=d) for d in ("x.png", "o" * 255, "p/q")]
    names = image_names(samples)
    assert len({name.casefold() for name in names}) == len(names)
    for name in names:
        for part in name.split("/"):
            assert len(name_bytes(f"{part}.webp")) <= MAX_NAME_BYTES
            assert not re.search(r'[\\:*?"<>|\x00-\x1f]', part)
    # c/x.png must not be both a folder and a map
    folders = {n.rpartition("/")[0] for n in names}
    assert not {f"{n}.png" for n in names} & folders


def test_other_derived_names_are_what_they_were() -> None:
    samples = [Sample(Path(f"{stem}.png"), "nut/bolt", True, defect="cut") for stem in ("1", "é")]
    assert image_names(samples) == ["nut_bolt/cut/1", "nut_bolt/cut/é"]
    assert image_names([*samples, samples[0]])[2] == "nut_bolt/cut/1-2"
    assert safe_name("n" * 236) == "n" * 236
    assert len(safe_name("n" * 237)) == 236
    assert safe_name(LATIN) == safe_name(readable(LATIN)) == "gr_xfcn"


@pytest.mark.parametrize("words", [["check", "--data=ImageFolder", "--data.root={}"], ["{}"]])
def test_an_error_is_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    name = os.fsdecode(b"no\nwh\xe4re")
    assert main([word.format(name) for word in words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert r"wh\xe4re" in line.replace(r"\udce4", r"\xe4")


def test_folders_of_results_may_have_any_name(root: Path) -> None:
    words = [*FIT, f"--data.root={root}", "--data.test_share=0.5"]
    assert main(["fit", *words, f"--output.root={LATIN}", f"--output.name={LATIN}"]) == 0
    checkpoint = f"--ckpt_path={LATIN}/{LATIN}/1/checkpoints/last.ckpt"
    assert main(["test", checkpoint]) == 0
    assert main(["report", f"{LATIN}/{LATIN}/2"]) == 0
    assert main(["report", "--page", f"{LATIN}/{LATIN}/2"]) == 0
