from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import save_picture
from PIL import Image

from anomaly_clip.cli import main
from anomaly_clip.data import ImageFolder
from anomaly_clip.data.dataset import Sample


def listing(root: Path) -> list[Sample]:
    return ImageFolder(str(root), "laser-cut plank", image_size=16).samples("test")


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for number, shape in enumerate([(50, 80, 3), (90, 30, 3), (40, 40, 3)]):
        picture = rng.integers(0, 256, shape, dtype=np.uint8)
        save_picture(tmp_path / "photos" / f"photo {number}.png", picture)
    (tmp_path / "photos" / "notes.txt").write_text("not an image")
    return tmp_path / "photos"


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    root = tmp_path / "labelled"
    for name in ("good/a", "good/b", "cut/a", "burnt/a", "burnt/b"):
        save_picture(root / f"{name}.png")
    return root


def add_masks(root: Path) -> None:
    mask = np.zeros((40, 40), dtype=np.uint8)
    mask[10:20] = 255
    for name in ("cut/a_mask", "burnt/a", "burnt/b_mask"):
        save_picture(root / "ground_truth" / f"{name}.png", mask)


def test_a_plain_folder_has_no_labels(flat: Path) -> None:
    save_picture(flat / "more" / "deep" / "x.jpg")
    (flat / "loop").symlink_to(flat)
    data = ImageFolder(str(flat), "laser-cut plank", image_size=16)
    assert not data.has_labels
    assert not data.has_masks
    samples = data.samples("test")
    assert [s.image.name for s in samples] == ["x.jpg", "photo 0.png", "photo 1.png", "photo 2.png"]
    assert [s.defect for s in samples] == ["more/deep", "", "", ""]
    assert {s.category for s in samples} == {"laser-cut plank"}
    assert "mask" not in data.dataset("test")[0]


def test_folders_are_kinds_of_defects(labelled: Path) -> None:
    samples = listing(labelled)
    assert [(s.defect, s.label) for s in samples] == [
        ("burnt", True),
        ("burnt", True),
        ("cut", True),
        ("good", False),
        ("good", False),
    ]
    assert not any(s.mask for s in samples)


def test_masks_are_paired_by_name(labelled: Path) -> None:
    add_masks(labelled)
    data = ImageFolder(str(labelled), "laser-cut plank", image_size=16)
    assert data.has_masks
    masks = [s.mask and s.mask.name for s in data.samples("test")]
    assert masks == ["a.png", "b_mask.png", "a_mask.png", None, None]
    dataset = data.dataset("test")
    assert [bool(dataset[i]["mask"].any()) for i in range(5)] == [True, True, True, False, False]


def test_unmatched_masks_and_images(labelled: Path) -> None:
    add_masks(labelled)
    spare = save_picture(labelled / "ground_truth" / "cut" / "z_mask.png")
    with pytest.raises(ValueError, match=r"z_mask\.png: a mask without an image"):
        listing(labelled)
    spare.unlink()
    (labelled / "ground_truth" / "burnt" / "a.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"burnt/a\.png: its mask is missing"):
        listing(labelled)


def test_invalid_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no such folder; expected images"):
        listing(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="found nothing"):
        listing(tmp_path / "empty")
    with pytest.raises(ValueError, match="' ' is empty: name the object in the images"):
        ImageFolder(str(tmp_path), " ")


@pytest.fixture
def command(tiny_clip_config: str, tmp_path: Path) -> Callable[..., list[str]]:
    config = tmp_path / "folder.yaml"
    config.write_text(
        f"""
model:
  class_path: SDP
  init_args:
    backbone: {{name: {tiny_clip_config}, pretrained: random}}
    rvs: {{method: mean}}
data:
  class_path: ImageFolder
  init_args: {{num_workers: 0}}
trainer: {{accelerator: cpu}}
output: {{root: {tmp_path / "runs"}}}
"""
    )

    def words(verb: str, root: Path, *more: str) -> list[str]:
        named = ["--data.category", "laser-cut plank", "--data.root", str(root)]
        return [verb, "--config", str(config), *named, *more]

    return words


def test_predict_on_a_plain_folder(
    command: Callable[..., list[str]], flat: Path, tmp_path: Path
) -> None:
    assert main(command("predict", flat, "--output.raw_maps=true")) == 0
    run = tmp_path / "runs" / "folder" / "1"
    lines = (run / "scores.csv").read_text().splitlines()
    assert lines[0] == "path,category,label,image_score,r0,r1,weights"
    assert lines[1].startswith(f"{flat / 'photo 0.png'},laser-cut plank,,0.")
    for number, (height, width) in enumerate([(50, 80), (90, 30), (40, 40)]):
        raw = np.load(run / "raw_maps" / "laser-cut plank" / f"photo {number}.npy")
        assert raw.dtype == np.float16
        assert raw.shape == (32, 32)
        enlarged = max(1.0, 240 / max(height, width))
        with Image.open(run / "maps" / "laser-cut plank" / f"photo {number}.png") as sheet:
            assert sheet.width == 2 * round(width * enlarged) + 4  # at the image's aspect ratio


def test_test_needs_labels(
    command: Callable[..., list[str]],
    flat: Path,
    labelled: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(command("test", flat)) == 2
    assert "has no labels to compute metrics with" in capsys.readouterr().err
    assert main(command("test", labelled)) == 0
    assert "–" in capsys.readouterr().out  # no masks: pixel metrics are missing
    add_masks(labelled)
    assert main(command("test", labelled)) == 0
    assert "–" not in capsys.readouterr().out
