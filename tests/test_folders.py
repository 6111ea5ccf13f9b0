"""Folders: what is passed over, what is no regular file, and links."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from anomaly_clip.folders import FolderTree, find_inner, image_files, images_in, scan, subfolders


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


SYSTEM = ("@eaDir", "$RECYCLE.BIN", ".Trash", "__MACOSX", "__pycache__", ".git")


@pytest.mark.parametrize("name", SYSTEM)
def test_names_of_systems_are_passed_over(tmp_path: Path, name: str) -> None:
    touch(tmp_path, "a/1.png", f"{name}/2.png", f"a/{name}/3.png", f"{name}.png", "Thumbs.db")
    assert subfolders(tmp_path) == [tmp_path / "a"]
    assert list(image_files(tmp_path)) == [tmp_path / "a" / "1.png"]
    recorded = scan(tmp_path).passed_over
    assert len(recorded) == (0 if name.startswith(".") else 2)  # hidden files are not recorded


def test_only_regular_files_are_images(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "folder.png/b.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to("a.png")
    (tmp_path / "dead.png").symlink_to("nowhere.png")
    (tmp_path / "self.png").symlink_to("self.png")
    (tmp_path / "dead").symlink_to("nowhere")
    content = scan(tmp_path)
    assert [p.name for p in content.images] == ["a.png", "link.png"]
    assert [p.name for p in content.folders] == ["folder.png"]
    assert [p.name for p in content.irregular] == ["pipe.png"]
    # Listed, so that they are reported as missing.
    assert [p.name for p in content.missing] == ["dead.png", "self.png"]
    assert [p.name for p in images_in(tmp_path)] == ["a.png", "dead.png", "link.png", "self.png"]


def test_each_folder_is_listed_once(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    touch(tmp_path, "photos/a/1.png", "photos/z/2.png", "elsewhere/deep/3.png", "other/4.png")
    for link, target in {
        "photos/a/loop": "..",
        "photos/a/to z": "../z",  # z itself comes first
        "photos/ext": "../elsewhere",
        "photos/ext 2": "../elsewhere/deep",
        "elsewhere/up": "..",  # would lead to other/ and to the root itself
    }.items():
        (tmp_path / link).symlink_to(target)
    tree = FolderTree(root)
    listed = tree.below([root])[root]
    names = [folder.relative_to(root).as_posix() for folder in listed]
    assert names == [".", "a", "ext", "ext/deep", "z"]
    assert sorted(f.name for f in tree.repeated) == ["ext 2", "loop", "to z", "up"]
    (tmp_path / "by link").symlink_to("photos")
    assert len(FolderTree(tmp_path / "by link").below([tmp_path / "by link"])) == 1
    assert len(list(image_files(tmp_path / "by link"))) == 3


def test_folders_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a/1.png", "lost+found/2.png")
    access = os.access
    monkeypatch.setattr(os, "access", lambda p, mode: "lost" not in str(p) and access(p, mode))
    tree = FolderTree(tmp_path)
    assert tree.below([tmp_path])[tmp_path] == [tmp_path, tmp_path / "a"]
    assert tree.closed == [tmp_path / "lost+found"]


def test_names_are_found_in_another_normal_form(tmp_path: Path) -> None:
    touch(tmp_path, "e\N{COMBINING ACUTE ACCENT}/x/1.png")
    assert find_inner(tmp_path, "\N{LATIN SMALL LETTER E WITH ACUTE}", "x").is_dir()
    assert find_inner(tmp_path, "b", "x") == tmp_path / "b" / "x"
