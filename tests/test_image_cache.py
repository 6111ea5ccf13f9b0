from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import save_picture
from torch.utils.data import DataLoader

from anomaly_clip.data import MVTecAD, Resize
from anomaly_clip.data import samples as samples_module
from anomaly_clip.data.image_cache import ImageCache
from anomaly_clip.files import cache_folder


def items(data: MVTecAD, workers: int = 0) -> list[dict[str, torch.Tensor]]:
    loader = DataLoader(data.dataset("test"), batch_size=3, num_workers=workers)
    return [{k: batch[k] for k in ("image", "mask", "index")} for batch in loader]


def same(first: list[dict[str, torch.Tensor]], second: list[dict[str, torch.Tensor]]) -> bool:
    pairs = zip(first, second, strict=True)
    return all(torch.equal(a[key], b[key]) for a, b in pairs for key in a)


def options(**more: object) -> dict[str, object]:
    return {"image_size": 24, "mask_size": 20, **more}


@pytest.mark.parametrize("workers", [0, 2])
def test_cached_images_equal_uncached_ones(
    mvtec_root: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = items(MVTecAD(str(mvtec_root), **options()))  # type: ignore[arg-type]
    cached = MVTecAD(str(mvtec_root), cache=True, **options())  # type: ignore[arg-type]
    assert same(items(cached, workers), plain)
    monkeypatch.setattr(samples_module, "open_image", None)  # decoding would fail
    assert same(items(cached, workers), plain)


def test_size_rule_and_content_are_part_of_the_cache_key(mvtec_root: Path) -> None:
    for more in (
        {},
        {"image_size": 16},
        {"resize": Resize("square_crop", 30, "lanczos")},
        {"mask_filter": "nearest"},
        {"mask_threshold": 0.0},
    ):
        choice = options(**more)
        plain = items(MVTecAD(str(mvtec_root), **choice))  # type: ignore[arg-type]
        for _ in range(2):
            data = MVTecAD(str(mvtec_root), cache=True, **choice)  # type: ignore[arg-type]
            assert same(items(data), plain), more
    changed = mvtec_root / "bottle" / "test" / "good" / "000.png"
    save_picture(changed, np.full((40, 48, 3), 7, np.uint8))
    first = MVTecAD(str(mvtec_root), cache=True, **options()).dataset("test")[0]  # type: ignore[arg-type]
    assert (first["image"] == 7).all()


def test_damaged_files_are_recomputed(mvtec_root: Path) -> None:
    data = MVTecAD(str(mvtec_root), cache=True, **options())  # type: ignore[arg-type]
    plain = items(data)
    files = sorted((cache_folder() / "pictures").rglob("*.npy"))
    assert len(files) == 8 + 4
    for number, file in enumerate(files):
        content = file.read_bytes()
        flipped = bytearray(content)
        flipped[-50] ^= 1
        damaged = [b"", content[: len(content) // 2], b"x" * 90, bytes(flipped)]
        file.write_bytes(damaged[number % 4])
    file = files[-1]
    file.unlink()
    file.mkdir()
    again = MVTecAD(str(mvtec_root), cache=True, **options())  # type: ignore[arg-type]
    assert same(items(again), plain)
    assert all(np.load(file).dtype == np.uint8 for file in files)


def test_arrays_of_another_image_or_shape_are_not_used(tmp_path: Path) -> None:
    cache, pictures = ImageCache(), [save_picture(tmp_path / f"{name}.png") for name in "ab"]
    save_picture(pictures[1], np.full((40, 48, 3), 7, np.uint8))
    for value, picture in enumerate(pictures):
        cache.store([picture], "v", np.full((2, 2), value, np.uint8))
    first, second = (cache._file(cache._key([picture], "v")) for picture in pictures)
    assert cache.load(pictures[:1], "v", (2, 2)) is not None
    assert cache.load(pictures[:1], "v", (2, 3)) is None
    second.write_bytes(first.read_bytes())
    assert cache.load(pictures[1:], "v", (2, 2)) is None


def test_an_unwritable_cache_warns_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = ImageCache(folder=tmp_path / "file" / "below")
    picture = save_picture(tmp_path / "a.png")
    with pytest.warns(UserWarning, match="cache folder .* cannot be used"):
        cache.store([picture], "v", np.zeros((2, 2), np.uint8))
    cache.store([picture], "v", np.zeros((2, 2), np.uint8))
    assert cache.load([picture], "v", (2, 2)) is None


def test_a_cached_mask_is_only_valid_for_its_own_image(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, shape in (("a", (20, 24)), ("b", (20, 48))):
        picture = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
        save_picture(tmp_path / "nut" / "test" / "cut" / f"{name}.png", picture)
        mask = np.full(shape, 255, np.uint8)
        save_picture(tmp_path / "nut" / "ground_truth" / "cut" / f"{name}_mask.png", mask)
    items(MVTecAD(str(tmp_path), cache=True, **options()))  # type: ignore[arg-type]
    masks = tmp_path / "nut" / "ground_truth" / "cut"
    (masks / "b_mask.png").write_bytes((masks / "a_mask.png").read_bytes())
    with pytest.raises(ValueError, match=r"the mask is 24 x 20 pixels, but its image b\.png is 48"):
        items(MVTecAD(str(tmp_path), cache=True, **options()))  # type: ignore[arg-type]
