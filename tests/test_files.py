from __future__ import annotations

import csv
import errno
from pathlib import Path

import pytest

from anomaly_clip.files import (
    CACHE_VARIABLE,
    atomic_path,
    cache_folder,
    read_csv,
    safe_name,
    write_csv,
)


def test_an_error_leaves_the_old_content_and_no_temporary_file(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "file.json"
    with atomic_path(target) as temporary:
        temporary.write_text("old")
    with pytest.raises(OSError, match="disk full"):
        _write_half(target)
    assert target.read_text() == "old"
    assert [p.name for p in target.parent.iterdir()] == ["file.json"]


def _write_half(target: Path) -> None:
    with atomic_path(target) as temporary:
        temporary.write_text("half")
        raise OSError("disk full")


def test_the_error_of_a_full_disk_names_the_file(tmp_path: Path) -> None:
    def write(error: OSError) -> None:
        with atomic_path(tmp_path / "metrics.json"):
            raise error

    for error in (
        OSError(errno.ENOSPC, "No space left on device"),  # names no file
        OSError("2304 requested and 1984 written"),  # of NumPy
    ):
        with pytest.raises(OSError, match=r"No space left on device: '.*metrics\.json'"):
            write(error)
    with pytest.raises(OSError, match=r"^2304 requested$"):
        write(OSError("2304 requested"))


def test_the_suffix_stays_so_that_writers_know_the_format(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "map.npy") as temporary:
        assert temporary.suffix == ".npy"
        assert temporary.parent == tmp_path
        temporary.write_text("")


def test_cache_folder_follows_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "here"))
    assert cache_folder() == tmp_path / "here"
    monkeypatch.delenv(CACHE_VARIABLE)
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "anomaly_clip"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("metal nut", "metal nut"),
        ("a/b\\c:d", "a_b_c_d"),
        (" what? *.* ", "what_ _._"),
        ("..", "_"),
        ("", "_"),
    ],
)
def test_a_safe_name_keeps_what_it_can_and_leads_nowhere_else(text: str, name: str) -> None:
    assert safe_name(text) == name


CELLS = [
    "=1+1",
    "+a",
    "-b",
    "@c",
    "\td",
    "\re",
    "'=1",
    "''=1",
    "'f",
    "'",
    "",
    "a=1",
    "-1.5",
    "+2e3",
]


def test_texts_that_a_spreadsheet_would_run_are_guarded_and_restored(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    write_csv(file, ["=name", "number"], [[cell, -1.5] for cell in CELLS])
    assert list(read_csv(file)) == [{"=name": cell, "number": "-1.5"} for cell in CELLS]
    with file.open(newline="") as opened:
        written = [row[0] for row in csv.reader(opened)]
    assert all(not cell or cell[0] not in "=@\t\r" for cell in written)
    assert [cell for cell in written if cell[:1] in ("+", "-")] == ["-1.5", "+2e3"]  # numbers
    assert written[-6:] == CELLS[-6:]
    for content in ("a,b\n1\n", "a\n" + "x" * 200_000, "a\n\xff"):
        file.write_bytes(content.encode("latin-1"))
        with pytest.raises(ValueError, match=r"line 2 has 1 cells|field larger|can't decode"):
            list(read_csv(file))
