from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from layouts import mixed_wm38

from anomaly_clip.data import MixedWM38
from anomaly_clip.data.wafer import WaferMaps, read_wafers
from anomaly_clip.files import cache_folder


def test_classes_are_sorted_label_vectors_and_occur_in_both_parts(tmp_path: Path) -> None:
    data = MixedWM38(str(mixed_wm38(tmp_path)), image_size=52)
    assert data.target_names == ["good", "Edge-Ring", "Center", "Center+Edge-Ring"]
    train, test = data.samples("train"), data.samples("test")
    assert (len(train), len(test)) == (16, 4)
    assert not {s.image for s in train} & {s.image for s in test}
    assert sorted(s.defect for s in test) == sorted(data.target_names)
    for sample in train:
        assert sample.target is not None
        assert sum(sample.target) == 1
        assert data.target_names[sample.target.index(True)] == sample.defect
        assert sample.label == (sample.defect != "good")


def test_the_split_matches_the_published_script(tmp_path: Path) -> None:
    from sklearn.model_selection import train_test_split

    data = MixedWM38(str(mixed_wm38(tmp_path, copies=10)))
    _, expected = train_test_split(
        np.arange(40), test_size=0.2, random_state=10, stratify=np.repeat([0, 2, 1, 3], 10)
    )
    assert [int(s.image.name) for s in data.samples("test")] == sorted(expected)
    other = MixedWM38(str(tmp_path), split_seed=11)
    assert [s.image for s in other.samples("test")] != [s.image for s in data.samples("test")]


def test_several_patterns_as_targets(tmp_path: Path) -> None:
    data = MixedWM38(str(mixed_wm38(tmp_path)), targets="multi", image_size=52)
    both = next(s for s in data.samples("test") if s.defect == "Center+Edge-Ring")
    assert both.target == (True, False, False, True, False, False, False, False)
    item = data.dataset("test")[data.samples("test").index(both)]
    assert item["target"].tolist() == list(both.target)
    assert item["target"].dtype == torch.bool


def test_levels_become_greys_and_are_resized_nearest(tmp_path: Path) -> None:
    data = MixedWM38(str(mixed_wm38(tmp_path)), image_size=104)
    maps = np.load(tmp_path / "MixedWM38.npz")["arr_0"]
    for split in ("train", "test"):
        for row, sample in enumerate(data.samples(split)):
            image = data.dataset(split)[row]["image"]
            levels = np.minimum(maps[int(sample.image.name)], 2)  # a stray level 3 counts as a fail
            expected = np.repeat(np.repeat(levels * 127, 2, axis=0), 2, axis=1)
            assert np.array_equal(image.numpy(), np.broadcast_to(expected, (3, 104, 104)))


def test_maps_are_read_from_the_cache_and_without_a_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed_wm38(tmp_path / "data")
    first = MixedWM38(str(tmp_path / "data"), image_size=52).dataset("test")[0]["image"]
    monkeypatch.setattr("anomaly_clip.data.wafer.read_wafers", None)  # a call would fail
    again = MixedWM38(str(tmp_path / "data"), image_size=52).dataset("test")[0]["image"]
    assert torch.equal(first, again)
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ANOMALY_CLIP_CACHE", str(tmp_path / "file"))  # a file, not a folder
    with pytest.warns(UserWarning, match="cache folder .* cannot be used"):
        alone = MixedWM38(str(tmp_path / "data"), image_size=52).dataset("test")[0]["image"]
    assert torch.equal(first, alone)


def test_changed_cached_maps_are_converted_again(tmp_path: Path) -> None:
    file = mixed_wm38(tmp_path / "data") / "MixedWM38.npz"
    maps = np.array(WaferMaps(file).maps)
    (cached,) = (cache_folder() / "wafers").glob("*-maps.npy")
    content = bytearray(cached.read_bytes())
    content[2000] ^= 1
    cached.write_bytes(content)
    assert np.array_equal(WaferMaps(file).maps, maps)
    assert cached.read_bytes() != content


def header(shape: tuple[int, ...]) -> bytes:
    content = io.BytesIO()
    parts = {"descr": "<i8", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(content, parts)
    return content.getvalue()


def changed_member(near: Path, name: str, content: bytes) -> Path:
    """Write an archive with one member replaced."""
    arrays = {"arr_0": np.zeros((3, 52, 52), int), "arr_1": np.zeros((3, 8), int)}
    file = near.with_name(f"{abs(hash((name, content)))}.npz")
    with zipfile.ZipFile(file, "w") as archive:
        for key, array in arrays.items():
            plain = io.BytesIO()
            np.save(plain, array)
            if name.removesuffix(".npy") != key:
                archive.writestr(f"{key}.npy", plain.getvalue())
        archive.writestr(name, content)
    return file


def test_arrays_of_any_order_and_width_are_read(tmp_path: Path) -> None:
    maps = np.random.default_rng(0).integers(0, 4, (5, 6, 7))
    targets = np.eye(5, 8)
    for arrays in (
        (maps, targets),
        (np.asfortranarray(maps).astype(np.int16), targets.astype(bool)),
        (maps.astype(">u4"), targets.astype(np.float32)),
    ):
        np.savez_compressed(tmp_path / "a.npz", *arrays)
        levels, patterns = read_wafers(tmp_path / "a.npz")
        assert np.array_equal(levels, np.minimum(maps, 2))
        assert np.array_equal(patterns, targets)
        assert (levels.dtype, patterns.dtype) == (np.uint8, np.uint8)
    np.savez(tmp_path / "a.npz", maps, targets / 2)
    with pytest.raises(ValueError, match="of 0 and 1"):
        read_wafers(tmp_path / "a.npz")


def test_invalid_files(tmp_path: Path) -> None:
    def saved(name: str, *arrays: object, **named: object) -> Path:
        np.savez(tmp_path / name, *arrays, **named)  # type: ignore[arg-type]
        return tmp_path / name

    maps, targets = np.zeros((3, 52, 52), int), np.zeros((3, 8), int)
    damaged = saved("damaged.npz", maps, targets)
    damaged.write_bytes(damaged.read_bytes()[:200])
    (tmp_path / "empty.npz").write_bytes(b"")
    cases = {
        saved("pickled.npz", np.array([{"a": 1}], dtype=object), targets): "Python objects",
        saved("names.npz", maps=maps): r"expected arrays arr_0 .*; found maps",
        saved("short.npz", maps, targets[:2]): r"targets \(n, 8\)",
        saved("levels.npz", maps + 9, targets): "integers 0 to 2",
        saved("floats.npz", maps * 1.0, targets): "float64",
        saved("numbers.npz", maps, targets + 2): "of 0 and 1",
        damaged: "damaged",
        tmp_path / "empty.npz": "damaged|empty|No data",
    }
    cases |= {
        changed_member(damaged, "arr_1.npy", b"no array"): "damaged",
        changed_member(damaged, "arr_0", b"no array"): "expected arrays|damaged",
        changed_member(damaged, "arr_0.npy", header((10**9, 52, 52))): "another size than the",
        changed_member(damaged, "arr_0.npy", header((-1, 52, 52))): "damaged",
    }
    for file, message in cases.items():
        with pytest.raises(ValueError, match=message) as error:
            read_wafers(file)
        assert str(file) in str(error.value)
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        read_wafers(tmp_path / "nowhere.npz")


def test_wrong_roots_and_too_few_maps(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected MixedWM38\.npz"):
        _ = MixedWM38(str(tmp_path)).categories
    mixed_wm38(tmp_path / "few", copies=1)
    with pytest.raises(ValueError, match="both parts contain every class"):
        MixedWM38(str(tmp_path / "few")).samples("test")
    for name in ("a.npz", "b.npz"):
        np.savez(tmp_path / name, np.zeros(1))
    with pytest.raises(FileNotFoundError, match=r"alone, not 2 \.npz files"):
        _ = MixedWM38(str(tmp_path)).categories
    with pytest.raises(ValueError, match=r"data\.test_share"):
        MixedWM38(str(tmp_path), test_share=1.0)


def test_equal_maps_in_both_parts_are_refused(tmp_path: Path) -> None:
    targets = np.zeros((20, 8), int)
    targets[10:, 0] = 1
    maps = np.zeros((20, 52, 52), int)
    maps[10:, 5] = 2
    np.savez(tmp_path / "MixedWM38.npz", maps, targets)
    with pytest.raises(ValueError, match="4 test images are among the training images"):
        MixedWM38(str(tmp_path), image_size=52).setup("fit")
    MixedWM38(str(tmp_path), image_size=52, allow_overlap=True).setup("fit")


def test_damaged_files_are_named_whatever_the_damage(tmp_path: Path) -> None:
    file = tmp_path / "MixedWM38.npz"
    rng = np.random.default_rng(0)
    np.savez_compressed(file, rng.integers(0, 3, (9, 52, 52)), np.zeros((9, 8), int))
    whole = file.read_bytes()
    refused: list[str] = []
    for _ in range(60):
        broken = bytearray(whole)
        for place in rng.integers(0, len(whole), 3):
            broken[place] ^= int(rng.integers(1, 256))
        file.write_bytes(bytes(broken))
        try:
            read_wafers(file)
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) > 30
    assert all(message.startswith(str(file)) for message in refused)
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "one.npy").rename(file)
    with pytest.raises(ValueError, match=r"not an \.npz file"):
        read_wafers(file)
