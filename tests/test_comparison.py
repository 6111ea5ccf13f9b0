"""``anomaly_clip report``: what may stand beside what, in four forms."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers import save_picture

from anomaly_clip.cli import main
from anomaly_clip.data.info import FACTS
from anomaly_clip.report.comparison import beside_published, side_by_side
from anomaly_clip.report.published import published
from anomaly_clip.report.table import Line, Sheet
from anomaly_clip.results.finished_run import Finished, find_runs

MVTEC = tuple(FACTS["MVTecAD"].counts)
TEXTURES = ("carpet", "grid", "leather", "tile", "wood")
Figures = Mapping[str, float | None]
Writer = Callable[..., Path]


def figures(image: float | None, pixel: float | None = 0.5) -> Figures:
    return {"image_auroc": image, "image_ap": image, "pixel_auroc": pixel, "pixel_pro": None}


@pytest.fixture
def write(tmp_path: Path) -> Writer:
    """Return a function that makes the folder of a finished run: PaDiM as Table 1 asks for it."""

    def make(
        name: str = "padim",
        categories: Mapping[str, Figures] | None = None,
        *,
        weights: str = "imagenet",
        method: str = "PaDiM",
        backbone: str = "resnet18",
        failed: Mapping[str, str] | None = None,
        **protocol: Any,
    ) -> Path:
        if categories is None:
            categories = {c: figures(0.92 if c in TEXTURES else 0.86) for c in MVTEC}
        own = {"data": "MVTecAD", "image_size": 224, "complete": True, "one_model_a_category": True}
        run = {
            "method": method,
            "weights": {
                "backbone": backbone,
                "pretrained": weights,
                "random": weights == "random",
                "sha256": None,
            },
            "protocol": {**own, **protocol},
            "failed": failed or {},
        }
        folder = tmp_path / name
        folder.mkdir(parents=True)
        content = {"mean": {}, "categories": categories, "intervals": {}, "run": run}
        (folder / "metrics.json").write_text(json.dumps(content), encoding="utf-8")
        return folder

    return make


def report(*words: object) -> int:
    return main(["report", *map(str, words)])


def lines_of(sheet: Sheet, method: str) -> list[Line]:
    """Return the lines of a row: published, and what is ours."""
    starts = [at for at, line in enumerate(sheet.lines) if line.cells[0].startswith(method)]
    (at,) = starts
    found = [sheet.lines[at]]
    for line in sheet.lines[at + 1 :]:
        if line.first:
            break
        found.append(line)
    return found


def beside(table: str, *folders: Path) -> Sheet:
    source = published()
    return beside_published(source.tables[table], find_runs(folders), source).sheet


def test_ours_stands_beside_the_published_figure_with_the_difference(write: Writer) -> None:
    publication, ours, difference = lines_of(beside("tab1", write()), "PaDiM, ImageNet")
    assert publication.cells[1:] == ("published", "96.40 [1]", "87.63", "90.55")
    # Five of 0.92 and ten of 0.86: 0.88.
    assert ours.cells[1:] == ("ours", "92.00", "86.00", "88.00")
    assert difference.cells[2:] == ("-4.40", "-1.63", "-2.55")


def test_draws_of_one_experiment_are_averaged(write: Writer, tmp_path: Path) -> None:
    folders = [
        write(f"sample {seed}", {c: figures(level) for c in MVTEC}, data_seed=seed)
        for seed, level in enumerate((0.80, 0.86, 0.92))
    ]
    found = lines_of(beside("tab1", *folders), "PaDiM, ImageNet")
    mean, difference = found[-2:]
    deviation = 100 * np.std([0.80, 0.86, 0.92], ddof=1)
    assert mean.cells[1:] == ("mean of 3", *[f"86.00\n±{deviation:.2f}"] * 3)
    assert difference.cells[4] == "-4.55"
    assert report(*folders, "--table", "tab1", "--csv", tmp_path / "t.csv") == 0
    with (tmp_path / "t.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["our_deviation"]]
    assert {round(float(row["our_deviation"]), 4) for row in rows} == {round(deviation / 100, 4)}
    assert rows[0]["run"].count("sample") == 3


@pytest.mark.parametrize(("other", "averaged"), [(7, True), (8, False)])
def test_runs_with_other_settings_are_no_draws(write: Writer, other: int, averaged: bool) -> None:
    folders = []
    for seed, dimensions in enumerate((7, other)):
        folder = write(f"run {seed}", data_seed=seed)
        options = {"seed": seed, "dimensions": dimensions}
        config = {"model": {"init_args": options}, "data": {"init_args": {"seed": seed}}}
        (folder / "config-test.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        folders.append(folder)
    found = lines_of(beside("tab1", *folders), "PaDiM, ImageNet")
    assert any(line.cells[1] == "mean of 2" for line in found) == averaged


def test_the_draws_that_are_missing_are_listed(
    write: Writer,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "runs/winclip_1shot-laion400m_e31"
    for seed in (0, 3):
        write(
            f"{name}/{seed}",
            {c: figures(0.9) for c in MVTEC},
            method="WinCLIP",
            backbone="ViT-B-16-plus-240",
            weights="laion400m_e31",
            shots=1,
            image_size=240,
            one_model_a_category=False,
            data_seed=seed,
        )
    assert report(name, "--table", "winclip_mvtec", "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    wanted = [line for line in lines if "winclip_1shot" in line and "anomaly_clip test" in line]
    assert [line[-1] for line in wanted] == ["1", "2", "4"]
    assert lines[-1].count("winclip_1shot") == 3  # those that are there, and where the rest goes


def test_runs_of_one_seed_and_draws_with_gaps_have_no_mean(write: Writer) -> None:
    twice = [write(f"again {number}", data_seed=0) for number in range(2)]
    found = lines_of(beside("tab1", *twice), "PaDiM, ImageNet")
    assert not any(line.cells[1].startswith("mean") for line in found)
    part = write("part", {c: figures(0.9) for c in MVTEC[:14]}, data_seed=1)
    mean, difference = lines_of(beside("tab1", twice[0], part), "PaDiM, ImageNet")[-2:]
    assert mean.cells[1] == "mean of 2"
    assert mean.cells[4] == "1 of 2\ndraws"
    assert difference.cells[4] == "–"


def test_what_nobody_ran_says_so(write: Writer) -> None:
    sheet = beside("tab1", write())
    assert lines_of(sheet, "PaDiM, TAB")[1].cells[1:] == ("ours", *["not run"] * 3)
    text = beside("clip_ada_mvtec").legend[0].text
    assert text == "For reference: no run of ours belongs to a row."


@pytest.mark.parametrize(
    ("weights", "label", "warning"),
    [("random", "random", "RANDOM WEIGHTS"), ("demo", "demo", "demo weights, which know")],
)
def test_figures_of_random_and_demo_weights_are_labelled_and_not_compared(
    write: Writer, weights: str, label: str, warning: str, tmp_path: Path
) -> None:
    folder = write(weights=weights, backbone="demo", image_size=64)
    sheet = beside("tab1", folder)
    _, ours, difference = lines_of(sheet, "PaDiM, ImageNet")
    assert ours.cells[2:] == tuple(f"{v}\n{label}" for v in ("92.00", "86.00", "88.00"))
    assert difference.cells[2:] == ("–", "–", "–")
    assert any(note.loud and warning in note.text for note in sheet.notes)
    assert report(folder, "--table", "tab1", "--csv", tmp_path / "a.csv") == 0
    ours_rows = [row for row in rows_of(tmp_path / "a.csv") if row["run"]]
    assert ours_rows
    assert all(warning in row["note"] and row["difference"] == "" for row in ours_rows)
    alone = side_by_side(find_runs([folder])).sheet
    assert any(warning in note.text and note.loud for note in alone.notes)


def test_a_mean_of_fewer_categories_is_refused(write: Writer) -> None:
    some = {c: figures(0.9) for c in MVTEC if c != "bottle"}
    folder = write(categories=some)
    _, ours, difference = lines_of(beside("tab1", folder), "PaDiM, ImageNet")
    assert ours.cells[2:] == ("90.00", "9 of 10\ncategories", "14 of 15\ncategories")
    assert difference.cells[2:] == ("-6.40", "–", "–")
    alone = side_by_side(find_runs([folder])).sheet.lines[-1]
    assert alone.cells[:2] == ("mean", "incomplete\n(14 of 15)")


def test_a_mean_over_a_failed_category_is_refused(write: Writer) -> None:
    some = {"a": figures(0.9), "b": figures(0.8)}
    folder = write(categories=some, failed={"c": "no image"}, data="Demo", complete=False)
    made = side_by_side(find_runs([folder]))
    assert [line.cells[1] for line in made.sheet.lines] == [
        "90.0",
        "80.0",
        "failed",
        "incomplete\n(2 of 3)",
    ]
    mean = made.records.rows[-1]
    assert mean[0] == "mean"
    assert mean[6] is None
    assert "image_auroc incomplete (2 of 3)" in str(mean[-1])


def test_categories_without_anomalous_images_have_dashes(write: Writer) -> None:
    none = {"a": figures(None, None), "b": figures(None, None)}
    sheet = side_by_side(find_runs([write(categories=none, data="Demo")])).sheet
    assert all(set(line.cells[1:]) == {"–"} for line in sheet.lines)
    one = {"a": figures(0.7), "b": figures(None)}
    sheet = side_by_side(find_runs([write("one", categories=one, data="Demo")])).sheet
    assert sheet.lines[-1].cells[1] == "incomplete\n(1 of 2)"
    assert sheet.lines[-1].cells[3] == "50.0"
    of_table = beside("tab1", write("c", categories={c: figures(None) for c in MVTEC}))
    assert lines_of(of_table, "PaDiM, ImageNet")[1].cells[2:] == ("–", "–", "–")


def test_partial_runs_and_training_on_test_images_are_labelled(write: Writer) -> None:
    for label, protocol in (("partial", {"complete": False}), ("overlap", {"overlap": 3})):
        sheet = beside("tab1", write(label, **protocol))
        _, ours, difference = lines_of(sheet, "PaDiM, ImageNet")
        assert ours.cells[4] == f"88.00\n{label}"
        assert difference.cells[4] == "–"


def test_an_epoch_chosen_on_test_images_is_labelled_and_compared(write: Writer) -> None:
    folder = write(method="SimpleNet", image_size=288, select="best_test")
    sheet = beside("tab1", folder)
    _, ours, difference = lines_of(sheet, "SimpleNet, ImageNet")
    assert (ours.cells[4], difference.cells[4]) == ("88.00\nby test", "-8.60")
    assert any("EPOCH CHOSEN BY THE TEST IMAGES" in note.text for note in sheet.notes)


def test_another_protocol_belongs_to_no_row_and_the_reason_is_said(write: Writer) -> None:
    def reason(*folders: Path) -> str:
        sheet = beside("tab1", *folders)
        return next(note.text for note in sheet.legend if "belongs to no row" in note.text)

    assert "nearest is PaDiM, ImageNet, but image_size is 256, not 224" in reason(
        write("size", image_size=256)
    )
    assert "shots is 4" in reason(write("shots", shots=4))
    assert "it is one model of all categories" in reason(write("all", one_model_a_category=False))
    assert reason(write("other", method="PatchCore")).endswith("tab1: none is of PatchCore")
    assert "none is of PaDiM on VisA" in reason(write("data", data="VisA"))
    assert "its weights are /x/y.pt, not imagenet" in reason(write("file", weights="/x/y.pt"))


def test_options_behind_model_are_read_beside_the_figures(write: Writer) -> None:
    folder = write(method="RD4AD", image_size=256)
    options = {"model": {"class_path": "RD4AD", "init_args": {"amap_mode": "add"}}}
    (folder / "config-each.yaml").write_text(yaml.safe_dump(options))
    assert lines_of(beside("tab1", folder), "RD4AD, ImageNet")[1].cells[4] == "88.00"
    options["model"]["init_args"] = {"amap_mode": "multiply"}
    (folder / "config-each.yaml").write_text(yaml.safe_dump(options))
    assert lines_of(beside("tab1", folder), "RD4AD, ImageNet")[1].cells[4] == "not run"


def tab_export(folder: Path, **changes: Any) -> Path:
    """Write what a fit of TAB leaves beside its weights."""
    folder.mkdir()
    record = {
        "method": "TAB",
        "data": "MVTecAD",
        "backbone": {"name": "resnet18", "weights": "imagenet"},
        "text": {"name": "ViT-B-16", "pretrained": "laion400m_e32"},
        "loss": "align",
        "align": "both",
        "prompts": {"preset": "idpa", "centered": "no"},
    }
    (folder / "tab_resnet18.json").write_text(json.dumps({**record, **changes}))
    config = {"data": {"init_args": {"synthesis": {"recipe": "nsa"}}}}
    (folder / "config-fit.yaml").write_text(yaml.safe_dump(config))
    return folder / "tab_resnet18.safetensors"


def test_weights_are_what_their_own_record_says(write: Writer, tmp_path: Path) -> None:
    weights = tab_export(tmp_path / "tab")
    sheet = beside("tab1", write(weights=str(weights)))
    assert lines_of(sheet, "PaDiM, TAB")[2].cells[4] == "-4.64"
    assert lines_of(sheet, "PaDiM, ImageNet")[1].cells[4] == "not run"
    normal = tab_export(tmp_path / "normal", align="normal")
    sheet = beside("tab7", write("n", weights=str(normal)))
    assert lines_of(sheet, "Normal only")[1].cells[2] == "88.00"
    assert lines_of(sheet, "Normal and abnormal")[1].cells[2] == "not run"


def test_a_backbone_that_followed_demo_texts_is_labelled(write: Writer, tmp_path: Path) -> None:
    text = {"name": "demo", "pretrained": "demo"}
    weights = tab_export(tmp_path / "tab", text=text)
    _, ours, difference = lines_of(beside("tab1", write(weights=str(weights))), "PaDiM, TAB")
    assert (ours.cells[4], difference.cells[4]) == ("88.00\ndemo texts", "–")


def test_weights_without_a_record_are_what_the_command_line_says(
    write: Writer, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(weights="/somewhere/their.pt")
    assert report(folder, "--table", "tab6") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "nothing beside its weights /somewhere/their.pt says what they are" in out
    assert report(folder, "--table", "tab6", "--weights", "tab=/somewhere/their.pt") == 0
    assert "-4.64" in capsys.readouterr().out


def test_one_category_fitted_alone_stands_in_its_row(write: Writer) -> None:
    folder = write(categories={"screw": figures(0.75)}, one_model_a_category=False)
    sheet = beside("padim_categories", folder)
    assert lines_of(sheet, "PaDiM, screw")[2].cells[2] == "+0.5"
    assert lines_of(sheet, "PaDiM, bottle")[1].cells[2] == "not run"
    assert lines_of(sheet, "PaDiM, textures")[1].cells[2] == "not run"
    assert sheet.lines[-2].cells[2] == "1 of 15\ncategories"


def test_own_pictures_in_the_layout_of_a_data_set_are_not_that_data_set(write: Writer) -> None:
    sheet = beside("tab1", write(categories={"mug": figures(0.9)}))
    assert lines_of(sheet, "PaDiM, ImageNet")[1].cells[4] == "other\ncategories"


def test_fractions_are_compared_as_percent(write: Writer) -> None:
    found = {"accuracy": 0.225, "precision": 0.34, "recall": 0.28, "f1": 0.25}
    protocol = {"data": "MixedWM38", "frozen": True, "targets": "single"}
    folder = write(method="LinearProbe", categories={"wafer map": found}, **protocol)
    publication, ours, difference = lines_of(beside("tab3", folder), "frozen, ImageNet")
    assert publication.cells[2] == "22"
    assert (ours.cells[2], difference.cells[2]) == ("22.5", "+0.5")


def test_several_runs_of_a_row_stand_below_each_other(write: Writer) -> None:
    sheet = beside("tab1", write("a"), write("b"))
    assert [line.cells[1] for line in lines_of(sheet, "PaDiM, ImageNet")] == [
        "published",
        "ours A",
        "difference",
        "ours B",
        "difference",
    ]


def test_runs_stand_side_by_side(
    write: Writer, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    some = {"a": figures(0.9, 0.8), "b": figures(0.7, 0.6)}
    others = {"a": figures(0.5), "b": figures(0.5)}
    write("several/one", some, data="Demo")
    write("several/two", others, data="Demo", weights="random")
    assert report(tmp_path / "several", "--csv", tmp_path / "x" / "a.csv") == 0
    out = capsys.readouterr().out
    assert "PaDiM on Demo: 2 categories, percent" in out
    assert "B: RANDOM WEIGHTS: these figures mean nothing" in out
    mean = next(line for line in out.splitlines() if line.strip().startswith("mean"))
    assert mean.split() == ["mean", "80.0", "50.0", "70.0", "50.0"]
    rows = rows_of(tmp_path / "x" / "a.csv")
    assert [(row["category"], row["image_auroc"]) for row in rows] == [
        ("a", "0.9"),
        ("a", "0.5"),
        ("b", "0.7"),
        ("b", "0.5"),
        ("mean", str((0.9 + 0.7) / 2)),
        ("mean", "0.5"),
    ]


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as content:
        return list(csv.DictReader(content))


class Cells(HTMLParser):
    """Collects the texts of cells, and what tags there are."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.cells: list[str] = []
        self.inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.inside = tag == "td"
        if self.inside:
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.cells[-1] += data

    def handle_endtag(self, tag: str) -> None:
        self.inside = False


def test_markup_in_names_is_shown_as_it_is_in_every_form(
    write: Writer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "[bold]x[/bold] <script>alert(1)</script> a|b *c* `d`\x1b[31m"
    folder = write("[red]run[/red] <b>", {name: figures(0.9)}, data="Demo")
    files = {form: tmp_path / f"a.{form}" for form in ("csv", "markdown", "html")}
    words = [word for form, file in files.items() for word in (f"--{form}", file)]
    assert report(folder, *words) == 0
    out = capsys.readouterr().out
    assert "[bold]x[/bold]" in "".join(out.split())
    assert "[red]run[/red] <b>" in out
    assert "\x1b[31m" not in out
    shown = name.replace("\x1b", "\N{REPLACEMENT CHARACTER}")
    assert rows_of(files["csv"])[0]["category"] == shown
    page = files["html"].read_text(encoding="utf-8")
    parsed = Cells()
    parsed.feed(page)
    assert parsed.cells[0] == shown
    assert not {"script", "b"} & parsed.tags
    markdown = files["markdown"].read_text(encoding="utf-8")
    line = next(line for line in markdown.splitlines() if "alert" in line)
    assert line.startswith(
        r"| \[bold\]x\[/bold\] &lt;script&gt;alert(1)&lt;/script&gt; a\|b \*c\* \`d\`"
    )
    assert line.replace(r"\|", "").count("|") == 6
    assert "<b>" not in markdown


def test_the_page_needs_nothing_else_and_is_for_light_and_dark(
    write: Writer, tmp_path: Path
) -> None:
    assert report(write(), "--table", "tab1", "--html", tmp_path / "t.html") == 0
    page = (tmp_path / "t.html").read_text(encoding="utf-8")
    assert "color-scheme: light dark" in page
    assert "width=device-width" in page
    assert "http" not in page
    parsed = Cells()
    parsed.feed(page)
    assert parsed.cells[:5] == ["PaDiM, ImageNet", "published", "96.40 [1]", "87.63", "90.55"]
    assert "-2.55" in parsed.cells


def test_thousands_of_categories_are_in_the_files_and_few_on_the_screen(
    write: Writer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    many = {f"kind {n:04d}": figures(1 - n / 4000) for n in range(3000)}
    folder = write(categories=many, data="Demo")
    files = {form: tmp_path / f"a.{form}" for form in ("csv", "markdown", "html")}
    assert report(folder, *[w for form, file in files.items() for w in (f"--{form}", file)]) == 0
    out = capsys.readouterr().out
    assert "the 40 lowest of 3000 categories by image AUROC" in out
    assert len(out.splitlines()) < 60
    assert "kind 2999" in out
    assert "kind 0000" not in out
    assert "mean" in out
    assert len(rows_of(files["csv"])) == 3001
    assert files["markdown"].read_text().count("| kind ") == 3000
    assert files["html"].read_text().count('<td class="name">kind ') == 3000


def test_the_runs_of_a_table_are_listed(write: Writer, capsys: pytest.CaptureFixture[str]) -> None:
    assert report("--table", "tab6", "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 * 2 + 1
    assert len(set(lines)) == len(lines)
    assert lines[-1].startswith("anomaly_clip report runs/padim-tab_perlin ")
    assert lines[-1].endswith(" --table tab6")
    # What is there is not run again.
    assert report("--table", "tab1", "--dry-run") == 0
    before = capsys.readouterr().out.splitlines()
    folder = write("with a blank")
    assert report(folder, "--table", "tab1", "--dry-run") == 0
    after = capsys.readouterr().out.splitlines()
    assert after[:-1] == before[1:-1]
    assert f"'{folder}'" in after[-1]
    assert report("--table", "nsa", "--dry-run") == 0
    assert capsys.readouterr().out == ""


def test_a_published_table_is_shown_without_runs(capsys: pytest.CaptureFixture[str]) -> None:
    for name in published().tables:
        assert report("--table", name) == 0
    assert "not run" in capsys.readouterr().out


def damaged(text: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / "metrics.json").write_text(text, encoding="utf-8")

    return damage


def without(*keys: str) -> Callable[[Path], None]:
    """Return what takes an entry out of ``metrics.json``."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / "metrics.json").read_text())
        inner = content
        for key in keys[:-1]:
            inner = inner[key]
        del inner[keys[-1]]
        (folder / "metrics.json").write_text(json.dumps(content))

    return damage


def with_value(value: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = json.loads((folder / "metrics.json").read_text())
        content["categories"]["grid"]["image_auroc"] = value
        (folder / "metrics.json").write_text(json.dumps(content))

    return damage


def interrupted(folder: Path) -> None:
    (folder / "metrics.json").unlink()
    (folder / "config-each.yaml").touch()


def untested(folder: Path) -> None:
    (folder / "metrics.json").unlink()
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "last.ckpt").touch()


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (damaged('{"mean": {'), "damaged, it is not JSON"),
        (damaged(""), "damaged, it is not JSON"),
        (damaged("[]"), "is not a table of figures"),
        (without("run"), "has no run"),
        (without("categories"), "has no categories"),
        (without("run", "weights"), "has no run.weights"),
        (without("run", "weights", "random"), "has no run.weights.random"),
        (without("run", "protocol", "data"), "has no run.protocol.data"),
        (with_value("0.9"), "has 0.9 for image_auroc of grid, not a fraction"),
        (with_value(90.5), "not a fraction"),
        (with_value(True), "not a fraction"),
        (with_value(float("nan")), "not a fraction"),
        (interrupted, "the run is not finished"),
        (untested, "fitted but not tested"),
        (lambda folder: (folder / "metrics.json").unlink(), "there is no metrics.json in it"),
    ],
)
def test_incomplete_and_damaged_folders_are_one_sentence(
    write: Writer,
    damage: Callable[[Path], None],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = write()
    damage(folder)
    for words in ((folder,), (folder, "--table", "tab1")):
        assert report(*words) == 2
        err = capsys.readouterr().err.strip().splitlines()
        assert len(err) == 1
        assert sentence in err[0]
        assert str(folder) in err[0]


def test_other_mistakes_are_one_sentence(
    write: Writer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def mistake(*words: object) -> str:
        assert report(*words) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    folder = write()
    other = write("other", {"a": figures(0.5)})
    assert "there is no such folder" in mistake(tmp_path / "nowhere")
    assert "name folders of runs" in mistake()
    assert "no such table; did you mean" in mistake("--table", "tab11")
    assert "--dry-run lists the runs that a published table needs" in mistake("--dry-run", folder)
    assert "--weights tib=x: expected KIND=FILE" in mistake(folder, "--weights", "tib=x")
    assert "is a folder: name a file in it" in mistake(folder, "--csv", tmp_path)
    (tmp_path / "file").touch()
    told = mistake(folder, "--html", tmp_path / "file" / "a.html")
    assert "cannot be written" in told
    told = mistake(folder, other)
    assert "are of different categories" in told
    assert f"only {folder} has bottle, cable, capsule and 12 more" in told
    assert report(folder, other, "--table", "tab1") == 0


def test_a_run_given_twice_is_shown_once(write: Writer) -> None:
    folder = write()
    found: list[Finished] = find_runs([folder, folder / "metrics.json", folder.parent])
    assert len(found) == 1


def test_a_real_run_of_random_weights(
    mvtec_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    for category in ("bottle", "metal_nut"):
        array = rng.integers(0, 256, (40, 40, 3)).astype(np.uint8)
        save_picture(mvtec_root / category / "train" / "good" / "100.png", array)
    folder = tmp_path / "run"
    words = ["--model", "PaDiM", "--model.image_size", "32", "--model.num_channels", "8"]
    words += ["--model.backbone.weights", "random", "--data", "MVTecAD", "--data.root"]
    words += [str(mvtec_root), "--data.num_workers", "0", "--trainer.accelerator", "cpu"]
    assert main(["each", *words, "--output.folder", str(folder)]) == 0
    capsys.readouterr()
    content = json.loads((folder / "metrics.json").read_text())["categories"]
    sheet = beside("padim_categories", folder)
    _, ours, difference = lines_of(sheet, "PaDiM, bottle")
    value = content["bottle"]["image_auroc"]
    assert ours.cells[2] == f"{100 * value:.1f}\nrandom"
    assert difference.cells[2] == "–"
    assert report(folder) == 0
    out = capsys.readouterr().out
    assert "RANDOM WEIGHTS" in out
    assert "(2 of 15)" in out
