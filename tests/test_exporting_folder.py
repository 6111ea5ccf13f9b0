from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from anomaly_clip.errors import UserError
from anomaly_clip.exporting.folder import RECORD, atomic_folder, check_folder


def exported(folder: Path, text: str = "first") -> Path:
    folder.mkdir(parents=True)
    (folder / RECORD).write_text(text)
    return folder


def ended_process() -> int:
    """Return a number that no process has any more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_folder_of_other_files_is_never_replaced(tmp_path: Path) -> None:
    check_folder(tmp_path / "new", overwrite=False)
    (tmp_path / "empty").mkdir()
    check_folder(tmp_path / "empty", overwrite=False)
    (tmp_path / "file").write_text("text")
    with pytest.raises(UserError, match="file is a file: give the name of a new folder"):
        check_folder(tmp_path / "file", overwrite=True)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("photo")
    with pytest.raises(UserError, match="holds other files"):
        check_folder(tmp_path / "photos", overwrite=True)
    with pytest.raises(UserError, match="or add --overwrite"):
        check_folder(exported(tmp_path / "old"), overwrite=False)
    check_folder(tmp_path / "old", overwrite=True)


@pytest.mark.parametrize("name", ["notes.txt", "overlays"])
def test_files_of_a_user_next_to_a_detector_are_kept(tmp_path: Path, name: str) -> None:
    folder = exported(tmp_path / "detector")
    exported(folder / name)
    with pytest.raises(UserError, match=f"--overwrite would remove, such as {name}: move them"):
        check_folder(folder, overwrite=True)


def test_a_mount_point_is_refused_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path)
    with pytest.raises(UserError, match=r"is a mount point, .* such as .*detector$"):
        check_folder(tmp_path, overwrite=False)


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_a_link_stays_a_link(tmp_path: Path) -> None:
    exported(tmp_path / "first")
    link = tmp_path / "detector"
    link.symlink_to("first")
    with atomic_folder(link, overwrite=True) as temporary:
        (temporary / RECORD).write_text("second")
    assert (link.is_symlink(), (tmp_path / "first" / RECORD).read_text()) == (True, "second")
    assert {path.name for path in tmp_path.iterdir()} == {"first", "detector"}


def test_a_faster_export_to_the_same_folder_is_not_replaced(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match="or add --overwrite"),
        atomic_folder(tmp_path / "detector"),
    ):
        exported(tmp_path / "detector", "faster")
    assert (tmp_path / "detector" / RECORD).read_text() == "faster"
    assert [path.name for path in tmp_path.iterdir()] == ["detector"]


def test_a_folder_appears_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "below" / "detector"
    with atomic_folder(target) as temporary:
        (temporary / RECORD).write_text("new")
        assert not target.exists()
    assert (target / RECORD).read_text() == "new"
    with pytest.raises(FileNotFoundError), atomic_folder(target, overwrite=True) as temporary:
        (exported(temporary / "part") / "none").read_text()
    assert (target / RECORD).read_text() == "new"
    with atomic_folder(target, overwrite=True) as temporary:
        (temporary / "other").write_text("newest")
    assert [path.name for path in target.iterdir()] == ["other"]
    assert [path.name for path in target.parent.iterdir()] == ["detector"]


def test_an_earlier_export_comes_back_if_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, rename = exported(tmp_path / "detector"), Path.rename

    def refused(self: Path, new: Path) -> Path:
        if self.name == f".detector.{os.getpid()}.tmp":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        return rename(self, new)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(PermissionError), atomic_folder(target, overwrite=True) as temporary:
        (temporary / RECORD).write_text("new")
    assert (target / RECORD).read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["detector"]


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "detector") as temporary:
        (temporary / RECORD).write_text("new")
        (tmp_path / "detector").mkdir()
    assert (tmp_path / "detector" / RECORD).read_text() == "new"


def test_the_error_of_a_full_disk_names_the_target(tmp_path: Path) -> None:
    target = tmp_path / "detector"
    with pytest.raises(OSError, match="No space left") as caught, atomic_folder(target) as part:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(part / "detector.onnx"))
    assert caught.value.filename == str(target / "detector.onnx")
    with pytest.raises(OSError, match="No space left") as caught, atomic_folder(target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert caught.value.filename == str(target)
    assert list(tmp_path.iterdir()) == []


def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    child = ended_process()
    exported(tmp_path / f".detector.{child}.tmp")
    exported(tmp_path / ".detector.1.tmp")  # of the first process of the system, which runs
    exported(tmp_path / f".another.{child}.tmp")
    with atomic_folder(tmp_path / "detector"):
        pass
    names = {f".another.{child}.tmp", ".detector.1.tmp", "detector"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    child = ended_process()
    exported(tmp_path / f".detector.{child}.old.tmp", "first")
    exported(tmp_path / f".detector.{child}.tmp", "second")
    with pytest.raises(KeyError), atomic_folder(tmp_path / "detector", overwrite=True):
        raise KeyError
    assert (tmp_path / "detector" / RECORD).read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["detector"]
