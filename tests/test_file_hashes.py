from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import pickle
from pathlib import Path

import pytest

from anomaly_clip.data import file_hashes
from anomaly_clip.data.file_hashes import DuplicatePair, FileHashes, duplicates_between


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_file_is_hashed_again_only_if_size_or_time_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    ordinary = file_hashes._sha256

    def counted(path: Path) -> str:
        read.append(path)
        return ordinary(path)

    monkeypatch.setattr(file_hashes, "_sha256", counted)
    file = write(tmp_path / "a", "one")
    expected = hashlib.sha256(b"one").hexdigest()
    assert FileHashes().sha256(file) == FileHashes().sha256(file) == expected
    assert read == [file]
    file.write_text("two")
    os.utime(file, ns=(1, 1))
    assert FileHashes().sha256(file) == hashlib.sha256(b"two").hexdigest()
    assert len(read) == 2


def test_truncated_or_invalid_lines_are_ignored(tmp_path: Path) -> None:
    file, store = write(tmp_path / "a", "one"), tmp_path / "store"
    expected = FileHashes(store).sha256(file)
    line = store.read_text()
    store.write_text(f'nonsense\n[1]\n{line[: len(line) // 2]}\n["x", 1, 2, null]\n')
    assert FileHashes(store).sha256(file) == expected
    assert FileHashes(store).sha256(file) == expected


def test_changed_lines_and_those_of_other_versions_are_ignored(tmp_path: Path) -> None:
    file, store = write(tmp_path / "a", "one"), tmp_path / "store"
    expected = FileHashes(store, version="1").sha256(file)
    key = (str(file), file.stat().st_size, file.stat().st_mtime_ns)
    line = store.read_text()
    other = ("0" if expected[0] != "0" else "1") + expected[1:]
    for content in (line.replace(expected, other), json.dumps([*key, other])):
        store.write_text(content + "\n")
        assert FileHashes(store, version="1").sha256(file) == expected
    store.write_text(line)
    assert FileHashes(store, version="1")._load() == {key: expected}
    assert FileHashes(store, version="2")._load() == {}


def _hash_all(store: Path, files: list[Path]) -> None:
    for file in files:
        FileHashes(store).sha256(file)


def test_several_processes_write_whole_lines(tmp_path: Path) -> None:
    files = [write(tmp_path / f"file-{i}", str(i)) for i in range(40)]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_hash_all, args=(tmp_path / "s", files)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    digests = FileHashes(tmp_path / "s")._load()
    assert {key[0] for key in digests} == {str(f) for f in files}


def test_a_store_that_cannot_be_written_only_costs_time(tmp_path: Path) -> None:
    store = write(tmp_path / "file", "") / "store"
    hashes, file = FileHashes(store), write(tmp_path / "a", "one")
    with pytest.warns(UserWarning, match="cache folder .* cannot be used"):
        assert hashes.sha256(file) == hashlib.sha256(b"one").hexdigest()
    hashes.sha256(write(tmp_path / "b", "two"))  # without a second warning


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: there is no such file"):
        FileHashes().sha256(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="cannot be read"):
        FileHashes().sha256(tmp_path)


def test_pickles_do_not_contain_loaded_digests(tmp_path: Path) -> None:
    hashes = FileHashes()
    hashes.sha256(write(tmp_path / "a", "one"))
    assert pickle.loads(pickle.dumps(hashes))._digests is None


def test_duplicates_are_found_by_content_not_name(tmp_path: Path) -> None:
    ones = [write(tmp_path / "train" / n, t) for n, t in (("a", "same"), ("b", "tame"), ("c", "x"))]
    others = [
        write(tmp_path / "test" / n, t) for n, t in (("a", "lame"), ("z", "same"), ("y", "same"))
    ]
    assert duplicates_between(ones, others) == [
        DuplicatePair(ones[0], others[1]),
        DuplicatePair(ones[0], others[2]),
    ]
    assert duplicates_between([tmp_path / "generated"], others) == []


def test_files_of_other_sizes_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_hashes, "_sha256", None)  # a call would fail
    assert duplicates_between([write(tmp_path / "a", "1")], [write(tmp_path / "b", "22")]) == []
    assert duplicates_between([write(tmp_path / "a", "1")], [write(tmp_path / "b", "22")]) == []


def test_the_first_of_equal_files_is_named(tmp_path: Path) -> None:
    ones = [write(tmp_path / "train" / name, "same") for name in "bac"]
    other = write(tmp_path / "test" / "x", "same")
    assert duplicates_between(ones, [other]) == [DuplicatePair(ones[0], other)]
