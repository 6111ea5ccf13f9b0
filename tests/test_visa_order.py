"""The order of VisA's split file: kept by the listing, without effect on random choices."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import save_picture
from layouts import blob

from anomaly_clip.cli import main
from anomaly_clip.data import AnomalyData, MVTecAD, VisA
from anomaly_clip.synthesis import SynthesisSettings

COLUMNS = ["object", "split", "label", "image", "mask"]
CATEGORIES = ("candle", "pipe_fryum")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the images of two categories: 9 normal and 3 anomalous ones each."""
    root, rng = tmp_path_factory.mktemp("visa"), np.random.default_rng(0)
    for category in CATEGORIES:
        for number in range(12):
            kind, name = ("Normal", number) if number < 9 else ("Anomaly", number - 9)
            pixels = rng.integers(0, 256, (20, 20, 3)).astype(np.uint8)
            save_picture(root / category / f"Data/Images/{kind}/{name:04d}.png", pixels)
        for number in range(3):
            mask = root / category / f"Data/Masks/Anomaly/{number:04d}.png"
            save_picture(mask, blob((20, 20)))
    (root / "split_csv").mkdir()
    return root


def write_split(root: Path, seed: int | None) -> list[list[str]]:
    """Write the split file as the published one, and return its rows.

    In each category, the normal images come first, then the anomalous ones, both in a drawn order;
    without a seed, all rows are sorted by path.
    """
    rows = []
    for category in CATEGORIES:
        inner = f"{category}/Data"
        normal = [
            [category, "test" if number % 3 == 0 else "train", "normal", image, ""]
            for number in range(9)
            for image in [f"{inner}/Images/Normal/{number:04d}.png"]
        ]
        anomalous = [
            [category, "test", "anomaly", f"{inner}/Images/Anomaly/{number:04d}.png", mask]
            for number in range(3)
            for mask in [f"{inner}/Masks/Anomaly/{number:04d}.png"]
        ]
        for part in (normal, anomalous):
            if seed is not None:
                np.random.default_rng(seed).shuffle(part)
            rows += part
    rows = sorted(rows, key=lambda row: row[3]) if seed is None else rows
    with (root / "split_csv" / "1cls.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    return rows


def paths(data: AnomalyData, split: str) -> list[str]:
    return [str(s.image.relative_to(data.root)) for s in data.samples(split)]  # type: ignore[arg-type]


def official_list(rows: list[list[str]], split: str) -> list[str]:
    """Return the images in the order of the ``meta.json`` that the official code writes."""
    listed = []
    for category in CATEGORIES:
        for row in [row for row in rows if row[1] == split]:
            if row[0] == category:
                listed.append(row[3])
    return listed


@pytest.mark.parametrize("seed", [1, 2])
def test_the_listing_follows_the_split_file(images: Path, seed: int) -> None:
    rows = write_split(images, seed)
    data = VisA(str(images))
    for split in ("train", "test"):
        assert paths(data, split) == official_list(rows, split)
        assert paths(data, split) != sorted(paths(data, split))
    labels = [s.label for s in data.samples("test")]
    assert labels == [*[False] * 3, *[True] * 3] * 2
    turned = VisA(str(images), categories=list(CATEGORIES[::-1]))
    assert paths(turned, "test")[:6] == official_list(rows, "test")[6:]


@pytest.mark.parametrize("val_split", ["none", "auxiliary"])
def test_unshuffled_training_of_sdp_plus_has_the_published_order(
    images: Path, mvtec_root: Path, val_split: Any
) -> None:
    rows = write_split(images, 1)
    other = VisA(str(images), batch_size=2, shuffle=False)
    options: dict[str, Any] = {"num_workers": 0, "image_size": 16, "val_share": 0.3}
    data = MVTecAD(str(mvtec_root), auxiliary=other, val_split=val_split, **options)
    data.setup("fit")
    seen = [path for batch in data.train_dataloader() for path in batch["path"]]
    held = [] if val_split == "none" else [str(s.image) for s in data.validation.auxiliary_parts[1]]
    published = [str(images / image) for image in official_list(rows, "test")]
    assert seen == [image for image in published if image not in held]
    assert len(held) == (0 if val_split == "none" else 4)


def test_scores_are_written_in_that_order(
    images: Path, tiny_clip_config: str, tmp_path: Path
) -> None:
    rows = write_split(images, 1)
    test = ["test", "--model=WinCLIP", f"--model.backbone.name={tiny_clip_config}"]
    test += ["--model.backbone.pretrained=random", "--data=VisA", f"--data.root={images}"]
    test += ["--data.num_workers=0", "--trainer.accelerator=cpu", "--output.page=false"]
    assert main([*test, f"--output.folder={tmp_path / 'test'}"]) == 0
    with (tmp_path / "test" / "scores.csv").open() as file:
        listed = [str(Path(row["path"]).relative_to(images)) for row in csv.DictReader(file)]
    assert listed == official_list(rows, "test")


def random_choices(root: Path, mvtec: Path) -> dict[str, Any]:
    """Return all random choices among VisA's images, by kind."""
    shared: dict[str, Any] = {"num_workers": 0, "image_size": 16}
    few = VisA(str(root), shots=3, seed=4, **shared)
    synthetic = VisA(
        str(root), val_split="synthetic", val_share=0.4, synthesis=SynthesisSettings(), **shared
    )
    auxiliary = VisA(str(root), **shared)
    data = MVTecAD(str(mvtec), auxiliary=auxiliary, val_split="auxiliary", val_share=0.4, **shared)
    loaders: dict[str, AnomalyData] = {"few": few, "synthetic": synthetic, "auxiliary": data}
    loaders["shuffled"] = VisA(str(root), **shared)
    loaders["balanced"] = VisA(str(root), balanced=True, **shared)
    validation = synthetic.validation_dataset()
    assert validation is not None
    return {
        "references": [list(few.references(name)["path"]) for name in CATEGORIES],
        "drawn": [[s.image for s in few.drawn_of(name, 2, seed=7)] for name in CATEGORIES],
        "held": sorted(s.image for s in data.validation.auxiliary_parts[1]),
        "fit": {
            name: [path for batch in part.train_dataloader() for path in batch["path"]]
            for name, part in loaders.items()
        },
        "defects": [int(validation[row]["image"].sum()) for row in range(len(validation))],
    }


def test_random_choices_do_not_depend_on_the_order_of_the_file(
    images: Path, mvtec_root: Path
) -> None:
    """They are those of a sorted listing, as in version 0.1.0."""
    write_split(images, None)
    before = random_choices(images, mvtec_root)
    assert paths(VisA(str(images)), "test") == sorted(paths(VisA(str(images)), "test"))
    for seed in (1, 2):
        write_split(images, seed)
        assert random_choices(images, mvtec_root) == before
