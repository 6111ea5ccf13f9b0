"""Published results against values typed again from the papers, and commands for our results."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

import anomaly_clip.methods
from anomaly_clip.cli import main
from anomaly_clip.data.info import DATASETS
from anomaly_clip.methods import musc
from anomaly_clip.reporting.published import PublishedCell, RunSpec
from anomaly_clip.reporting.published_reader import FILE, load_published

ROOT = Path(__file__).parent.parent
PACKAGED = ROOT / "anomaly_clip" / "reporting" / FILE


def row_of(table: str, method: str, of: str | None = None) -> tuple[float | None, ...]:
    """Return the metrics of a row in percent."""
    rows = [r for r in load_published().tables[table].rows if (r.method, r.of) == (method, of)]
    (row,) = rows
    return tuple(None if cell is None else round(100 * cell.value, 6) for cell in row.cells)


SPOTS: list[tuple[str, str, str | None, tuple[float | None, ...]]] = [
    ("tab1", "PaDiM, ImageNet", None, (96.40, 87.63, 90.55)),
    ("tab1", "PaDiM, TAB", None, (97.19, 90.37, 92.64)),
    ("tab1", "SimpleNet, ImageNet", None, (98.98, 95.40, 96.60)),
    ("tab1", "RegAD, 8 references, TAB*", None, (97.62, 89.10, 91.94)),
    ("tab2", "RD4AD, TAB", None, (97.53, 98.45, 98.14)),
    ("tab2", "RegAD, 4 references, ImageNet", None, (94.66, 96.32, 95.77)),
    ("tab3", "frozen, ImageNet", None, (22, 34, 28, 25)),
    ("tab3", "unfrozen, TAB", None, (98, 98, 98, 98)),
    ("tab4", "SimpleNet, TAB, KSDD2", None, (70.47, 88.04)),
    ("tab4", "RD4AD, ImageNet, BTAD", None, (89.53, 96.93)),
    ("tab4", "PaDiM, TAB, BTAD", None, (94.43, 95.50)),
    ("tab5", "SimpleNet, classification", None, (96.96, 94.45)),
    ("tab6", "CutPaste", None, (91.52, 96.42)),
    ("tab7", "Normal only", None, (90.78, 96.54)),
    ("tab8", "One-Class", None, (45.31, 69.11)),
    ("tab8", "+ CLIP Template", None, (90.58, 96.10)),
    ("clip_ada", "CLIP-ADA, MVTec-AD", None, (97.5, 55.6)),
    ("clip_ada", "CLIP-ADA, VisA", None, (89.3, 33.1)),
    ("clip_ada_mvtec", "DeSTSeg", None, (96.4, 98.6, 96.2, 92.0, 71.1, 68.2, 83.4)),
    ("clip_ada_visa", "PyramidFlow", None, (58.2, 66.3, 74.4, 77.0, 7.2, 9.6, 42.8)),
    ("clip_ada_visa_300", "MambaAD", None, (93.6, 34.0)),
    ("clip_ada_diad", "DiAD, VisA", None, (86.8, 88.3, 85.1, 96.0, 26.1, 33.0, 75.2)),
    ("clip_ada_uniad", "UniAD", "metal_nut", (99.2, 94.8)),
    ("clip_ada_few_shot", "APRIL-GAN, VisA", None, (92.6, 96.2, 32.2)),
    ("clip_ad", "SDP", None, (35.9, 75.3)),
    ("clip_ad", "SDP+", None, (40.0, 85.1)),
    ("clip_ad_mvtec", "PromptAD (WACV)", None, (90.8, None, None, 92.1, 36.2, None, 72.8)),
    ("clip_ad_visa", "APRIL-GAN", None, (78.0, 78.7, 81.4, 94.2, 32.3, 25.7, 86.8)),
    ("winclip_mvtec", "4 references", None, (95.2, 97.3, 94.7, 96.2, 59.5, 89.0)),
    ("winclip_visa", "1 reference", None, (83.8, 85.1, 83.1, 96.4, 41.3, 85.1)),
    ("winclip_mvtec_categories", "WinCLIP", "metal_nut", (97.1, 61.0, 96.3, 32.4)),
    ("winclip_visa_categories", "WinCLIP", "macaroni2", (63.7, 59.3, 69.8, 1.0)),
    ("winclip_again", "VisA, 2 references", None, (95.1, 23.9, 16.6, 81.2, 83.4, 82.5, 84.6)),
    ("padim_categories", "PaDiM", "zipper", (74.1, 97.6)),
    ("padim_categories", "PaDiM", "textures", (96.4, 95.3)),
    ("detectors", "RegAD, 4 references, re-run by its authors", None, (89.2, 96.2)),
    ("detectors", "PatchCore, WRN-50-2, 25 % memory bank", None, (99.1, 98.1)),
    ("clip_ad_again", "CLIP-AD, BTAD", None, (85.8, 85.2, 93.1, 46.7)),
    ("clip_ad_again", "CLIP-AD, CVC-ClinicDB", None, (None, None, 85.8, 39.0)),
    ("clip_ad_again_other", "CLIP-AD, RSDD", None, (88.3, 73.9, 99.2, 31.9)),
    ("clip_ad_again_other", "CLIP-AD, Liver CT", None, (62.7, 51.6, 95.4, 7.1)),
    ("nsa", "NSA", None, (97.2, 96.3)),
    ("subspace_ad", "SubspaceAD, MVTec-AD, 1 reference", None, (97.1, 97.5, None)),
    ("subspace_ad", "SubspaceAD, VisA, 1 reference", None, (93.2, 98.2, None)),
    ("subspace_ad", "SubspaceAD, VisA, 4 references", None, (94.7, None, None)),
    ("subspace_ad", "AnomalyDINO, MVTec-AD, 1 reference", None, (96.6, 96.8, 92.7)),
    ("subspace_ad", "AnomalyDINO, VisA, 2 references", None, (89.7, None, None)),
    ("subspace_ad", "PromptAD, VisA, 4 references", None, (89.1, None, None)),
    ("subspace_ad_batched", "AnomalyDINO, VisA", None, (90.7,)),
    ("musc_backbones", "DINOv2 ViT-L/14, 518 px, VisA", None, (91.73, 98.78, 92.40)),
    ("anomalyclip", "AnomalyCLIP, VisA", None, (82.1, 85.4, 95.5, 87.0)),
    ("anomalyclip", "AnomalyCLIP, CVC-ClinicDB", None, (None, None, 82.9, 67.8)),
    ("anomalyclip_other", "AnomalyCLIP, DTD-Synthetic", None, (93.5, 97.0, 97.9, 92.3)),
    ("anomalyclip_other", "APRIL-GAN, CVC-ColonDB", None, (None, None, 78.4, 64.6)),
    ("anomalyclip_competitors", "CoOp, BTAD", None, (66.8, 77.4, 28.6, 3.8)),
    ("anomalyclip_competitors", "APRIL-GAN, Head CT", None, (89.1, 89.4, None, None)),
    ("anomalyclip_mvtec_categories", "AnomalyCLIP", "metal_nut", (92.4, 98.2, 74.6, 71.1)),
    ("anomalyclip_visa_categories", "AnomalyCLIP", "macaroni2", (72.2, 70.8, 97.6, 84.0)),
    ("crane", "Crane, BTAD", None, (94.4, 95.9, 91.7, 96.6, 81.3, 56.9)),
    ("crane", "Crane+, VisA", None, (83.6, 86.7, 81.2, 95.3, 90.6, 30.2)),
    (
        "april_gan",
        "APRIL-GAN, MVTec-AD, 4 references",
        None,
        (92.8, 92.8, 96.3, 95.9, 56.9, 54.5, 91.8),
    ),
]


@pytest.mark.parametrize(("table", "method", "of", "values"), SPOTS)
def test_values_are_those_of_the_papers(
    table: str, method: str, of: str | None, values: tuple[float | None, ...]
) -> None:
    assert row_of(table, method, of) == values


def test_deviations_and_doubts_are_kept() -> None:
    tables = load_published().tables
    cell = tables["winclip_mvtec"].rows[3].cells[4]
    assert cell is not None
    assert (cell.value, cell.spread) == (pytest.approx(0.595), pytest.approx(0.018))
    assert "51.7" in str(cell.doubt)
    assert "abstract" in str(tables["clip_ad"].rows[1].doubt)
    assert "F1-max" in str(tables["clip_ada"].doubt)
    assert "within the variation" in str(tables["tab1"].rows[7].doubt)


@pytest.mark.parametrize("name", ["tab1", "tab2"])
def test_the_overall_mean_is_that_of_five_textures_and_ten_objects(name: str) -> None:
    for row in load_published().tables[name].rows:
        textures, objects, overall = (cell.value for cell in row.cells if cell is not None)
        assert (5 * textures + 10 * objects) / 15 == pytest.approx(overall, abs=1.01e-4)


@pytest.mark.parametrize(
    ("by_category", "means", "columns"),
    [
        ("winclip_mvtec_categories", ("winclip_mvtec", "no reference"), (0, 3, 2, 4)),
        ("winclip_visa_categories", ("winclip_visa", "no reference"), (0, 3, 2, 4)),
        ("clip_ada_uniad", ("clip_ada_uniad", "UniAD"), (0, 1)),
        ("padim_categories", ("padim_categories", "PaDiM"), (0, 1)),
        *(
            (name, (name, "AnomalyCLIP"), (0, 1, 2, 3))
            for name in ("anomalyclip_mvtec_categories", "anomalyclip_visa_categories")
        ),
    ],
)
def test_values_per_category_have_the_published_means(
    by_category: str, means: tuple[str, str], columns: tuple[int, ...]
) -> None:
    rows = [
        r
        for r in load_published().tables[by_category].rows
        if r.of not in (None, "textures", "objects")
    ]
    of_all = row_of(*means)
    for at, column in enumerate(columns):
        values = [100 * cell.value for r in rows if (cell := r.cells[at]) is not None]
        assert sum(values) / len(values) == pytest.approx(of_all[column], abs=0.061)


def test_a_value_is_the_same_in_all_tables_of_a_paper() -> None:
    assert row_of("tab1", "PaDiM, TAB")[2] == row_of("tab5", "PaDiM, TAB")[0]
    for table, method in (
        ("tab6", "NSA"),
        ("tab7", "Normal and abnormal"),
        ("tab8", "+ Industrial Association"),
    ):
        assert row_of(table, method) == row_of("tab5", "PaDiM, TAB")
    assert row_of("tab7", "Classification") == row_of("tab5", "PaDiM, classification")
    assert row_of("tab2", "RD4AD, ImageNet")[2] == row_of("tab5", "RD4AD, ImageNet")[1]


def test_a_method_has_the_same_values_in_all_zero_shot_tables() -> None:
    names = ("clip_ad_mvtec", "clip_ad_visa", "clip_ada_later_mvtec", "clip_ada_later_visa")
    seen: dict[tuple[str, str, str], set[float]] = {}
    shared = 0
    for name in names:
        table = load_published().tables[name]
        for row in table.rows:
            for column, cell in zip(table.columns, row.cells, strict=True):
                if cell is None:
                    continue
                key = row.method.partition(" (")[0], row.data, column.key
                shared += key in seen
                assert seen.setdefault(key, {*cell.values}) == {*cell.values}, (name, key)
    assert shared > 8


def test_values_that_sources_disagree_on_are_all_listed() -> None:
    tables = load_published().tables

    def cell(table: str, method: str, at: int = 0) -> PublishedCell:
        (row,) = (r for r in tables[table].rows if r.method.startswith(method))
        cell_of_row = row.cells[at]
        assert cell_of_row is not None
        return cell_of_row

    for table in ("clip_ad_mvtec", "clip_ada_later_mvtec"):
        assert cell(table, "AnomalyCLIP").values == (0.915, 0.916, 0.919)
        assert cell(table, "AdaCLIP").values == (0.892, 0.915, 0.92)
        assert cell(table, "AdaCLIP").sources[1].source == "listed by others, source not named"
    assert cell("clip_ad_again", "CLIP-AD, VisA", 2).values == (0.95, 0.952)
    assert cell("subspace_ad", "SubspaceAD, VisA, 1").values == (0.932, 0.934, 0.933)


def test_two_data_sets_of_one_name_are_never_compared() -> None:
    rows = [row for table in load_published().tables.values() for row in table.rows]
    (namesake,) = (row for row in rows if "BrainMRI" in row.method)
    assert namesake.data not in DATASETS
    assert "another data set than BrainMRI" in str(namesake.other_data)
    assert all(row.run is None for row in rows if row.data not in DATASETS)


def test_reimplemented_winclip_is_compared_with_its_own_patches() -> None:
    rows = load_published().tables["winclip_again"].rows
    few_shot = [row.run for row in rows if row.run is not None and "no reference" not in row.method]
    assert len(few_shot) == 6
    for run in few_shot:
        assert run.match["model.patch_norm"] is False
        assert all("--model.patch_norm false" in line for line in run.commands)
    assert all("LN_post" in str(row.doubt) for row in rows if row.run in few_shot)


def test_every_table_of_the_tab_paper_has_runs_and_every_run_has_commands() -> None:
    source = load_published()
    for number in range(1, 9):
        table = source.tables[f"tab{number}"]
        assert all(row.run is not None for row in table.rows)
    for table in source.tables.values():
        for run in table.runs:
            assert run.commands
            assert run.match["method"] in anomaly_clip.methods.__all__


def runs() -> dict[str, RunSpec]:
    return {run.name: run for table in load_published().tables.values() for run in table.runs}


def commands() -> list[str]:
    return list(dict.fromkeys(line for run in runs().values() for line in run.commands))


def config_of(line: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Return the configuration of a command; ``each`` takes the options of ``fit``."""
    _, verb, *words = shlex.split(line)
    assert verb in ("fit", "test", "each")
    assert main(["fit" if verb == "each" else verb, *words, "--print_config"]) == 0, line
    out = capsys.readouterr().out
    config: dict[str, Any] = yaml.safe_load(out)
    return config


@pytest.mark.slow
def test_every_command_parses_and_matches_its_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    checked = set()
    for run in runs().values():
        *earlier, last = run.commands
        folder = run.folder
        if run.draws > 1:  # draws differ only in seed and folder
            draw = run.draws - 1
            folder += f"/{draw}"
            assert [
                line.replace(f"{run.folder}/{n}", folder).replace(f"seed {n}", f"seed {draw}")
                for n, line in enumerate(run.commands)
            ] == [last] * run.draws
            earlier = []
        if "--ckpt_path" in last:
            assert f"{run.folder}/checkpoints/last.ckpt --output.folder {run.folder}" in last
            assert main(shlex.split(last)[1:]) == 2
            assert "there is no such file" in capsys.readouterr().err
            last = earlier.pop()
        config = config_of(last, capsys)
        model, data = config["model"], config["data"]["init_args"]
        options = model["init_args"]
        backbone = options["backbone"]
        # The training data of a file of prompts are unknown.
        auxiliary = None if options.get("prompts_file") else data.get("auxiliary")
        recorded = {
            "method": model["class_path"].rpartition(".")[2],
            "data": config["data"]["class_path"].rpartition(".")[2],
            "backbone": backbone["name"],
            "image_size": options.get("image_size") or backbone.get("image_size") or 240,
            "shots": options.get("shots") or data["shots"],
            "fraction": data["fraction"],
            "stitch": (data.get("auxiliary") or {}).get("init_args", {}).get("stitch") or None,
            "auxiliary": auxiliary and auxiliary["class_path"].rpartition(".")[2],
            "train_categories": data["train_categories"],
            "each": " each " in last,
            "frozen": options.get("frozen"),
            "targets": data.get("targets"),
        }
        if recorded["method"].endswith(("SubspaceAD", "AnomalyDINO")):
            recorded["layers"] = options["layers"]
            recorded["transductive"] = recorded["method"].startswith("Batched")
        if recorded["method"] == "MuSc":
            recorded |= {k: options[k] for k in ("scoring", "layers", "r_list", "interval", "grid")}
            k_list = musc.K_LIST.get(recorded["data"], musc.DEFAULT_K_LIST)
            recorded |= {"transductive": True, "k_list": k_list}
            assert options["k_list"] == "auto"
        for key, value in run.match.items():
            actual: Any = recorded.get(key)
            if key.startswith("model."):
                actual = options
                for part in key.split(".")[1:]:
                    actual = actual[part]
                actual = actual == "true" if actual in ("true", "false") else actual
            assert actual == value, (run.name, key)
        weights = backbone.get("weights") or backbone["pretrained"]
        assert config["output"]["folder"] == folder
        if run.weights not in load_published().weights:
            assert weights == run.weights
            continue
        (fit,) = earlier
        assert weights == f"runs/{run.weights}/tab_resnet18.safetensors"
        if fit not in checked:
            checked.add(fit)
            check_weights(run.weights, config_of(fit, capsys))
    assert len(checked) == len(load_published().weights)


def check_weights(name: str, config: dict[str, Any]) -> None:
    """Check that the configuration of a fit has the provenance required of its weights."""
    record = {
        **config["model"]["init_args"],
        "method": config["model"]["class_path"].rpartition(".")[2],
        "data": config["data"]["class_path"].rpartition(".")[2],
        "synthesis": config["data"]["init_args"]["synthesis"],
    }
    for key, value in load_published().weights[name].provenance.items():
        actual: Any = record
        for part in key.split("."):
            actual = actual[part]
        assert actual == value, (name, key)
    assert config["output"]["folder"] == f"runs/{name}"


def test_tables_in_the_readme_need_the_command_of_their_row() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("## The papers")[2]
    rows = re.findall(r"^\| .+ \| `(anomaly_clip .+?)`.* \| (`.+`) \|$", text, re.MULTILINE)
    assert len(rows) == 5
    for command, tables in rows:
        (name,) = re.findall(r"--config (\S+)", command)
        config = f"--config {name} "
        for table in re.findall(r"`(\w+)`", tables):
            needed = [line for run in load_published().tables[table].runs for line in run.commands]
            assert any(config in line for line in needed), (table, config)
