"""Reader of run folders, including incomplete and damaged ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from report_helpers import Writer, report, run_writer

from anomaly_clip.results.finished_run import FinishedRun
from anomaly_clip.results.run_reader import find_runs


@pytest.fixture
def write(tmp_path: Path) -> Writer:
    return run_writer(tmp_path)


def damaged(text: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / "metrics.json").write_text(text, encoding="utf-8")

    return damage


def without(*keys: str) -> Callable[[Path], None]:
    """Return a function that removes an entry from ``metrics.json``."""

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
    ("damage", "message"),
    [
        (damaged('{"mean": {'), "damaged, not valid JSON"),
        (damaged(""), "damaged, not valid JSON"),
        (damaged("[]"), "has a list, not an object"),
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
        (untested, "/checkpoints/last.ckpt --output.folder /"),
        (lambda folder: (folder / "metrics.json").unlink(), "contains no metrics.json"),
    ],
)
def test_incomplete_and_damaged_folders_give_an_error_of_one_line(
    write: Writer,
    damage: Callable[[Path], None],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = write()
    damage(folder)
    for words in ((folder,), (folder, "--table", "tab1")):
        assert report(*words) == 2
        err = capsys.readouterr().err.strip().splitlines()
        assert len(err) == 1
        assert message in err[0]
        assert str(folder) in err[0]


def test_a_run_given_twice_is_shown_once(write: Writer) -> None:
    folder = write()
    runs: list[FinishedRun] = find_runs([folder, folder / "metrics.json", folder.parent])
    assert len(runs) == 1


def test_runs_below_a_folder_come_sorted(write: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = write("b").parent
    for name in ("c", "a"):
        write(name)
    glob = Path.glob
    for order in (sorted, lambda files: sorted(files, reverse=True)):
        monkeypatch.setattr(Path, "glob", lambda self, form, o=order: iter(o(glob(self, form))))
        assert [run.folder.name for run in find_runs([parent])] == ["a", "b", "c"]
