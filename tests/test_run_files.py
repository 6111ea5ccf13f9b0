"""Reader of all files in a run's folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from run_folder import TWO, make_run

from anomaly_clip.files import write_json
from anomaly_clip.results.run_files import mapping, read_files


def test_a_run_is_read_whole(tmp_path: Path) -> None:
    files = read_files(make_run(tmp_path, TWO, pictures=3))
    assert list(files.metrics) == ["cap", "nut"]
    assert files.scores["nut"].scores.tolist() == [1.0, 2.0, 4.0, 3.0]
    anomalous = files.scores["nut"].anomalous
    assert anomalous is not None
    assert anomalous.tolist() == [False, False, False, True]
    assert set(files.curves["cap"]) == {"image_roc", "image_pr"}
    assert [(image.name, image.kind) for image in files.gallery] == [
        ("cap/0", "false_alarm"),
        ("cap/1", "false_alarm"),
        ("cap/2", "hit"),
    ]
    assert list(files.configs) == ["config-test.yaml"]
    assert (files.confusion, files.warnings, files.num_rounds) == (None, [], 1)


def test_the_metrics_are_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path, TWO)
    parsed: list[str] = []

    def loads(text: str) -> object:
        parsed.append(text)
        return json.JSONDecoder().decode(text)

    monkeypatch.setattr(json, "loads", loads)
    read_files(run)
    assert parsed.count((run / "metrics.json").read_text()) == 1


def test_a_run_of_each_keeps_files_by_category(tmp_path: Path) -> None:
    run = make_run(tmp_path, TWO)
    (run / "scores.csv").unlink()
    make_run(run / "nut", {"nut": TWO["nut"]}, pictures=1)
    files = read_files(run)
    assert list(files.scores) == ["nut"]
    assert files.gallery[0].file == (run / "nut" / "gallery" / "0.webp").resolve()


def test_scores_without_labels_have_no_classes(tmp_path: Path) -> None:
    run = make_run(tmp_path, TWO)
    text = (run / "scores.csv").read_text().replace("cap/0.png,cap,0", "cap/0.png,cap,")
    (run / "scores.csv").write_text(text)
    files = read_files(run)
    assert files.scores["cap"].anomalous is None
    assert files.scores["nut"].anomalous is not None


def test_a_predict_has_no_metrics(tmp_path: Path) -> None:
    weights = {"pretrained": "random", "random": True}
    run = {"method": "SDP", "protocol": {"data": "ImageFolder", "rounds": 3}, "weights": weights}
    write_json(tmp_path / "predict.json", {"run": run})
    files = read_files(tmp_path)
    assert (files.mean, files.metrics, files.num_rounds) == (None, {}, 3)
    assert files.warnings == ["RANDOM WEIGHTS: these metrics are meaningless"]
    assert mapping([1]) == {}
