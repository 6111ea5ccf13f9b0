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
    remove_abandoned,
)


def test_numbers_continue_and_are_never_shared(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: create_run_folder(tmp_path, "sdp"), range(24)))
    assert sorted(int(f.name) for f in folders) == list(range(1, 25))
    (tmp_path / "sdp" / "notes").mkdir()
    assert create_run_folder(tmp_path, "sdp").name == "25"
    assert create_run_folder(tmp_path, "other").name == "1"


def test_a_root_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"output.root .*file: cannot create a run folder"):
        create_run_folder(tmp_path / "file", "sdp")


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
    assert create_run_folder(tmp_path, "c") == tmp_path / "c" / "1"
    assert [(tmp_path / place / SCRATCH).exists() for place in places] == [False] * 3
    assert (tmp_path / "a" / "2").is_dir()
    assert [folder.exists() for folder in (other, unknown, claimed)] == [True] * 3
    remove_abandoned(tmp_path / "nowhere")
