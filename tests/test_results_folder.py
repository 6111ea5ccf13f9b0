from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from anomaly_clip.files import write_csv, write_json
from anomaly_clip.records import versions
from anomaly_clip.results.folder import (
    SCRATCH,
    claim_scratch,
    create_run_folder,
    find_run,
    remove_abandoned,
    run_number,
)


def test_numbers_continue_and_are_never_shared(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        verbs = ("fit", "test", "predict") * 8
        folders = list(pool.map(lambda verb: create_run_folder(tmp_path, "sdp", verb), verbs))
    assert sorted(run_number(folder) or 0 for folder in folders) == [*range(1, 25)]
    assert [folder.name.partition("-")[2] for folder in folders] == list(verbs)
    assert set((tmp_path / "sdp").iterdir()) == set(folders)
    (tmp_path / "sdp" / "notes").mkdir()
    (tmp_path / "sdp" / "40").mkdir()  # of 0.1.0
    assert create_run_folder(tmp_path, "sdp", "fit").name == "41-fit"
    assert create_run_folder(tmp_path, "other", "test").name == "1-test"


def test_a_number_stands_for_the_folder_of_its_run(tmp_path: Path) -> None:
    for name in ("1-fit", "2", "3-test", "3-fit", "10-test"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
    assert find_run(tmp_path / "1") == tmp_path / "1-fit"
    assert find_run(tmp_path / "2") == tmp_path / "2"
    assert find_run(tmp_path / "1" / "checkpoints" / "x.ckpt").parent.parent.name == "1-fit"
    for path in ("3", "4", "0", "1-fi", "10-test", "x/1", "1-fit/2"):  # 3: which of the two?
        assert find_run(tmp_path / path) == tmp_path / path


def test_a_root_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"output.root .*file: cannot create a run folder"):
        create_run_folder(tmp_path / "file", "sdp", "fit")


def test_versions_name_what_metrics_depend_on() -> None:
    recorded = versions()
    assert recorded["torch"].split(".")[0].isdecimal()
    assert {"python", "anomaly_clip", "open_clip_torch", "lightning"} <= set(recorded)


def test_json_is_whole_and_without_nan(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"ä": None})
    assert json.loads(path.read_text(encoding="utf-8")) == {"ä": None}
    with pytest.raises(ValueError, match="Out of range"):
        write_json(path, {"a": math.nan})
    assert json.loads(path.read_text(encoding="utf-8")) == {"ä": None}


def test_csv_quotes_and_leaves_missing_cells_empty(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", ["a", "b"], [["x, y", None], [0.1, "z"]])
    assert (tmp_path / "a.csv").read_text() == 'a,b\n"x, y",\n0.1,z\n'


def test_scratch_folders_of_killed_processes_are_removed_by_the_next_run(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    places = {
        "a/1": f"owner-{ended.pid}",
        "a/1/category": f"owner-{ended.pid}",
        "a/2": f"owner-{os.getpid()}",  # the number now belongs to another process
    }
    for place, owner in places.items():
        (tmp_path / place / SCRATCH).mkdir(parents=True)
        (tmp_path / place / SCRATCH / owner).write_text(f"{platform.node()}\n1")
    other = tmp_path / "b" / "1" / SCRATCH
    other.mkdir(parents=True)
    (other / f"owner-{ended.pid}").write_text("another machine\n1")
    unknown = tmp_path / "b" / "2" / SCRATCH
    unknown.mkdir(parents=True)
    claimed = tmp_path / "b" / "3" / SCRATCH
    claim_scratch(claimed)
    claim_scratch(claimed)
    assert create_run_folder(tmp_path, "c", "fit") == tmp_path / "c" / "1-fit"
    assert [(tmp_path / place / SCRATCH).exists() for place in places] == [False] * 3
    assert (tmp_path / "a" / "2").is_dir()
    assert [folder.exists() for folder in (other, unknown, claimed)] == [True] * 3
    remove_abandoned(tmp_path / "nowhere")
