"""Matching of runs to rows of a published table, and reasons for a mismatch."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from report_helpers import Writer, compared, lines_of, report, run_writer, tab_export

from anomaly_clip.reporting.published_reader import load_published
from anomaly_clip.reporting.run_matching import differences, mismatch
from anomaly_clip.results.run_reader import find_runs


@pytest.fixture
def write(tmp_path: Path) -> Writer:
    return run_writer(tmp_path)


def test_another_protocol_matches_no_row_and_the_reason_is_given(write: Writer) -> None:
    def reason(*folders: Path) -> str:
        table = compared("tab1", *folders)
        return next(note.text for note in table.legend if "matches no row" in note.text)

    assert "the closest row is PaDiM, ImageNet, but image_size is 256, not 224" in reason(
        write("size", image_size=256)
    )
    assert "shots is 4" in reason(write("shots", shots=4))
    assert "it has one model for all categories" in reason(write("all", one_model_a_category=False))
    assert reason(write("other", method="PatchCore")).endswith("tab1: no row has PatchCore")
    assert "no row has PaDiM on VisA" in reason(write("data", data="VisA"))
    assert "its weights are /x/y.pt, not imagenet" in reason(write("file", weights="/x/y.pt"))


def test_model_options_are_read_from_the_configuration(write: Writer) -> None:
    folder = write(method="RD4AD", image_size=256)
    options = {"model": {"class_path": "RD4AD", "init_args": {"amap_mode": "add"}}}
    (folder / "config-each.yaml").write_text(yaml.safe_dump(options))
    assert lines_of(compared("tab1", folder), "RD4AD, ImageNet")[1].cells[4] == "88.00"
    options["model"]["init_args"] = {"amap_mode": "multiply"}
    (folder / "config-each.yaml").write_text(yaml.safe_dump(options))
    assert lines_of(compared("tab1", folder), "RD4AD, ImageNet")[1].cells[4] == "not run"


def test_weights_are_identified_by_their_record(write: Writer, tmp_path: Path) -> None:
    weights = tab_export(tmp_path / "tab")
    table = compared("tab1", write(weights=str(weights)))
    assert lines_of(table, "PaDiM, TAB")[2].cells[4] == "-4.64"
    assert lines_of(table, "PaDiM, ImageNet")[1].cells[4] == "not run"
    normal = tab_export(tmp_path / "normal", align="normal")
    table = compared("tab7", write("n", weights=str(normal)))
    assert lines_of(table, "Normal only")[1].cells[2] == "88.00"
    assert lines_of(table, "Normal and abnormal")[1].cells[2] == "not run"


def test_a_backbone_trained_with_demo_text_is_labelled(write: Writer, tmp_path: Path) -> None:
    text = {"name": "demo", "pretrained": "demo"}
    weights = tab_export(tmp_path / "tab", text=text)
    _, ours, difference = lines_of(compared("tab1", write(weights=str(weights))), "PaDiM, TAB")
    assert (ours.cells[4], difference.cells[4]) == ("88.00\ndemo text", "–")


def test_weights_without_a_record_can_be_named_on_the_command_line(
    write: Writer, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(weights="/somewhere/their.pt")
    assert report(folder, "--table", "tab6") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "its weights /somewhere/their.pt have no provenance record" in out
    assert report(folder, "--table", "tab6", "--weights", "tab=/somewhere/their.pt") == 0
    assert "-4.64" in capsys.readouterr().out


def test_differences_are_named_and_a_matching_run_has_none(write: Writer) -> None:
    source = load_published()
    table = source.tables["tab1"]
    spec = table.rows[0].run
    assert spec is not None
    (right,) = find_runs([write()])
    assert differences(spec, right, source, {}) == []
    (wrong,) = find_runs([write("wrong", image_size=256, fraction=0.1, weights="/x/y.pt")])
    assert differences(spec, wrong, source, {}) == [
        "fraction is 0.1",
        "image_size is 256, not 224",
        "its weights are /x/y.pt, not imagenet",
    ]
    assert mismatch(table, wrong, source, {}).startswith(f"{wrong.label} matches no row of tab1")
    # The command line can declare which weights a file contains.
    named = {Path("/x/y.pt"): "imagenet"}
    assert len(differences(spec, wrong, source, named)) == 2
    # Random weights are accepted in place of any others, with any backbone.
    (random,) = find_runs([write("random", weights="random", backbone="demo", image_size=64)])
    assert differences(spec, random, source, {}) == []


def test_a_run_from_before_an_option_counts_as_having_its_default(write: Writer) -> None:
    protocol = {"shots": 1, "image_size": 240, "one_model_a_category": False}
    clip = {"backbone": "ViT-B-16-plus-240", "weights": "laion400m_e31", "method": "WinCLIP"}
    folders = {}
    for name, options in (
        ("old", {}),
        ("on", {"patch_norm": True}),
        ("off", {"patch_norm": False}),
    ):
        folders[name] = write(name, **clip, **protocol)
        config = {"model": {"class_path": "WinCLIP", "init_args": {"scales": [2, 3], **options}}}
        (folders[name] / "config-test.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    paper = compared("winclip_mvtec", folders["old"], folders["on"])
    assert [line.cells[1] for line in lines_of(paper, "1 reference")][1::2] == ["ours A", "ours B"]
    assert (
        lines_of(compared("winclip_mvtec", folders["off"]), "1 reference")[1].cells[2] == "not run"
    )
    again = lines_of(compared("winclip_again", folders["off"]), "MVTec-AD, 1 reference")
    assert again[2].cells[1] == "difference"
    note = next(
        n.text for n in compared("winclip_again", folders["old"]).legend if "matches" in n.text
    )
    assert (
        "the closest row is MVTec-AD, 1 reference, but model.patch_norm is true, not false" in note
    )
