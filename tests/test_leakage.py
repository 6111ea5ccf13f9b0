"""Training images among the test images, also if they were saved again in another format."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import save_picture
from layouts import Maker, mixed_wm38
from PIL import Image

from anomaly_clip.cli import main
from anomaly_clip.data import ImageFolder, MixedWM38, MVTecAD
from anomaly_clip.data.check import check_data
from anomaly_clip.data.file_hashes import equal_images
from anomaly_clip.data.info import DATASETS


def tiny(root: Path, **options: Any) -> MVTecAD:
    return MVTecAD(str(root), image_size=16, num_workers=0, **options)


def save_again(image: Path, target: Path, **options: Any) -> Path:
    with Image.open(image) as opened:
        opened.save(target, **options)
    return target


FORMATS = [("a.png", {"compress_level": 1}), ("a.bmp", {}), ("a.tif", {"compression": "tiff_lzw"})]
FORMATS += [("a.webp", {"lossless": True})]


@pytest.mark.parametrize(("name", "options"), FORMATS)
def test_a_fit_finds_images_that_were_saved_again(
    name: str, options: dict[str, Any], mvtec_root: Path
) -> None:
    folder = mvtec_root / "bottle"
    copy = save_again(folder / "train/good/000.png", folder / "test/good" / name, **options)
    with pytest.raises(ValueError, match=rf"1 test images are among .*{copy} = .*good/000\.png"):
        tiny(mvtec_root).setup("fit")
    tiny(mvtec_root, allow_overlap=True).setup("fit")
    tiny(mvtec_root, categories=["metal_nut"]).setup("fit")


def test_references_are_compared_by_pixels_too(mvtec_root: Path) -> None:
    folder = mvtec_root / "bottle"
    for number in ("000", "001"):
        save_again(folder / f"train/good/{number}.png", folder / f"test/good/x{number}.bmp")
    with pytest.raises(ValueError, match=r"1 test images are among the reference images"):
        tiny(mvtec_root, shots=1).references("bottle")
    with pytest.raises(ValueError, match=r"2 test images are among the reference images"):
        tiny(mvtec_root).references("bottle", count=2)


def test_only_images_of_equal_size_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, decoded = Maker(), []
    sizes = {"a": (24, 20), "b": (20, 24), "c": (24, 21), "d": (24, 20)}
    paths = {name: make.picture(tmp_path / f"{name}.png", size) for name, size in sizes.items()}

    def read(path: Path, max_pixels: int) -> list[np.ndarray]:
        decoded.append(path.stem)
        return [np.asarray(Image.open(path))]

    monkeypatch.setattr("anomaly_clip.data.file_hashes.pixel_bands", read)
    assert equal_images([paths["a"], paths["c"]], [paths["b"], paths["d"]]) == []
    assert sorted(decoded) == ["a", "d"]
    assert equal_images([paths["a"]], [paths["d"]]) == []
    assert len(decoded) == 2  # hashes are cached


def test_an_image_turned_by_its_exif_data_is_equal(tmp_path: Path) -> None:
    image = Maker().picture(tmp_path / "a.png", (24, 20))
    with Image.open(image) as opened:
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by 90 degrees
        opened.rotate(90, expand=True).save(tmp_path / "b.png", exif=exif)
    [pair] = equal_images([image], [tmp_path / "b.png"])
    assert pair == (image, tmp_path / "b.png")


def test_values_of_16_bits_are_compared_as_they_are_stored(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(256, 4096, (20, 24)).astype(np.uint16)
    for name, array in (("a.png", values), ("b.tif", values), ("c.png", values ^ 1)):
        Image.fromarray(array).save(tmp_path / name)
    a, b, c = (tmp_path / name for name in ("a.png", "b.tif", "c.png"))
    assert equal_images([a], [b, c]) == [(a, b)]
    problems = check_data(ImageFolder(str(tmp_path), "part", bit_depth=16)).problems
    assert [(p.kind, p.path) for p in problems] == [("twin", "b.tif")]


def test_unreadable_images_are_compared_by_content(tmp_path: Path) -> None:
    whole = Maker().picture(tmp_path / "a.png")
    for name in ("b", "c"):
        (tmp_path / f"{name}.png").write_bytes(whole.read_bytes()[:300])
    broken = [tmp_path / "b.png", tmp_path / "c.png"]
    assert equal_images([whole, broken[0]], broken[1:]) == [(broken[0], broken[1])]
    assert equal_images([whole], broken) == []


def test_known_duplicates_of_a_published_archive_are_reported(
    mvtec_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = mvtec_root / "bottle"
    save_again(folder / "train/good/000.png", folder / "test/good/x.bmp")
    monkeypatch.setitem(DATASETS, "MVTecAD", replace(DATASETS["MVTecAD"], duplicates=1))
    data = tiny(mvtec_root)
    data.setup("fit")
    assert "1 test image among the training images, as in the published" in data.summary("fit")
    report = tmp_path / "report.json"
    main(["check", "--data=MVTecAD", f"--data.root={mvtec_root}", f"--json={report}"])
    checked = json.loads(report.read_text())
    assert not any(problem["kind"] == "leak" for problem in checked["problems"])
    assert any("1 image equal to others, such as" in remark for remark in checked["remarks"])
    save_again(folder / "train/good/001.png", folder / "test/good/y.bmp")
    with pytest.raises(ValueError, match="2 test images are among"):
        tiny(mvtec_root).setup("fit")  # one more than is known
    shutil.rmtree(mvtec_root / "metal_nut")
    (folder / "test/good/y.bmp").unlink()
    with pytest.raises(ValueError, match="1 test images are among"):
        tiny(mvtec_root).setup("fit")  # a user's own data in the same layout


def test_wafer_maps_of_the_published_file_may_repeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed_wm38(tmp_path)
    data = MixedWM38(str(tmp_path), image_size=52)
    assert data.known_duplicates == 0
    monkeypatch.setitem(DATASETS, "MixedWM38", replace(DATASETS["MixedWM38"], total=20))
    assert data.known_duplicates is None


def test_a_users_copies_may_be_fitted_but_not_tested(tmp_path: Path) -> None:
    make = Maker()
    for name in ("train/good/a", "train/good/b", "test/good/c", "test/cut/d"):
        make.picture(tmp_path / f"{name}.png")
    shutil.copy(tmp_path / "train/good/a.png", tmp_path / "train/good/a (1).png")
    ImageFolder(str(tmp_path), image_size=16).setup("fit")
    save_again(tmp_path / "train/good/b.png", tmp_path / "test/good/b (1).bmp")
    with pytest.raises(ValueError, match="1 test images are among"):
        ImageFolder(str(tmp_path), image_size=16).setup("fit")


@pytest.mark.slow
def test_the_advice_names_the_share_that_is_held_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(3):
        save_picture(tmp_path / "good" / f"{number}.png", size=20 + number)
    save_picture(tmp_path / "cut" / "0.png", size=19)
    data = ImageFolder(str(tmp_path), image_size=16, test_share=0.999)
    with pytest.raises(ValueError, match=r"data\.test_share 0\.999 holds out all 3 normal images"):
        data.setup("fit")
    words = ["fit", "--model=PaDiM", "--model.backbone.weights=random", "--model.image_size=32"]
    words += ["--trainer.accelerator=cpu", f"--output.folder={tmp_path / 'run'}"]
    words += ["--data=ImageFolder", f"--data.root={tmp_path}", "--data.num_workers=0"]
    shares = np.linspace(0.005, 0.995, 199)
    held = [len(ImageFolder(str(tmp_path), test_share=float(share)).held_out) for share in shares]
    share = shares[held.index(2)]
    assert main([*words, f"--data.test_share={share:g}"]) == 2
    expected = f"got 1: add images, or lower data.test_share {share:g}, which holds out 2 normal"
    assert expected in capsys.readouterr().err
