from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from anomaly_clip.cli import main
from anomaly_clip.data import Demo, MVTecAD
from anomaly_clip.data.samplers import EpochSampler
from anomaly_clip.data.synthetic import SyntheticDataset, SyntheticPairs
from anomaly_clip.records import Draw
from anomaly_clip.synthesis import SynthesisSettings, synthesize

CUTPASTE = SynthesisSettings("cutpaste", options={"kind": "patch"})
OPTIONS: dict[str, Any] = {
    "categories": ["oak wood board", "steel nut"],
    "num_train": 12,
    "num_test": 4,
    "picture_size": 64,
    "image_size": 64,
}


def demo(synthesis: SynthesisSettings = CUTPASTE, **more: Any) -> Demo:
    return Demo(synthesis=synthesis, **{**OPTIONS, **more})


def epoch_of(data: Demo, workers: int, epoch: int) -> dict[int, dict[str, Any]]:
    dataset = data.fit_dataset()
    sampler = EpochSampler(dataset, 0)
    sampler.set_epoch(epoch)
    loader = DataLoader(dataset, batch_size=5, sampler=sampler, num_workers=workers)
    rows: dict[int, dict[str, Any]] = {}
    for batch in loader:
        for place, row in enumerate(batch["index"].tolist()):
            rows[row] = {key: value[place] for key, value in batch.items()}
    return rows


def same(first: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(
        torch.equal(value, other[key]) if isinstance(value, Tensor) else value == other[key]
        for key, value in first.items()
    )


@pytest.mark.parametrize("recipe", ["nsa", "cutpaste", "erasing", "perlin"])
@pytest.mark.parametrize("mode", ["pair", "replace"])
def test_defects_depend_only_on_seed_epoch_and_row(recipe: Any, mode: Any) -> None:
    settings = SynthesisSettings(recipe, mode=mode)
    alone, several = (epoch_of(demo(settings), workers, 3) for workers in (0, 2))
    assert sorted(alone) == sorted(several) == list(range(24))
    assert all(same(alone[row], several[row]) for row in alone)
    key = "synthetic" if mode == "pair" else "image"
    later = epoch_of(demo(settings), 0, 4)
    other = epoch_of(demo(settings, seed=1), 0, 3)
    for changed in (later, other):
        assert sum(not torch.equal(alone[row][key], changed[row][key]) for row in alone) > 12


def test_some_images_are_rotated_first() -> None:
    def images(**options: Any) -> Tensor:
        settings = SynthesisSettings("cutpaste", share=0.0, **options)
        dataset = demo(settings).fit_dataset()
        return torch.stack([dataset[row]["image"] for row in range(24)])

    plain, some, wood = (
        images(),
        images(rotated=0.5),
        images(rotated=1.0, rotated_categories=["oak wood board"]),
    )
    changed = (plain != some).flatten(1).any(1)
    assert 4 < int(changed.sum()) < 20
    assert torch.equal(images(rotated=0.5), some)
    assert (plain != wood).flatten(1).any(1).tolist() == [True] * 12 + [False] * 12
    # A rotation keeps the mean colour of an image.
    assert (wood.float().mean((2, 3)) - plain.float().mean((2, 3))).abs().max() < 12
    with pytest.raises(ValueError, match=r"data\.synthesis\.rotated must be in \[0, 1\], got 2"):
        SynthesisSettings(rotated=2)


def test_pairs_keep_the_image() -> None:
    plain = Demo(**OPTIONS).fit_dataset()
    pairs = demo(SynthesisSettings("cutpaste", mode="pair")).fit_dataset()
    assert isinstance(pairs, SyntheticDataset)
    seen = 0
    for row in range(len(pairs)):
        item, normal = pairs[row], plain[row]
        assert torch.equal(item["image"], normal["image"])
        assert not item["label"]
        assert not item["mask"].any()
        change = (item["synthetic"] != item["image"]).any(dim=0)
        assert item["synthetic_mask"].dtype == torch.bool
        assert item["defect"] == ("cutpaste" if item["synthetic_mask"].any() else "good")
        assert bool(change.any()) == bool(item["synthetic_mask"].any())
        seen += bool(change.any())
    assert seen > 20


def test_a_fraction_of_the_images_is_replaced() -> None:
    plain = Demo(**OPTIONS).fit_dataset()
    for share in (0.0, 0.4, 1.0):
        settings = SynthesisSettings("erasing", share=share)
        dataset = demo(settings, num_train=50, mask_size=32).fit_dataset()
        labels = []
        for row in range(len(dataset)):
            item = dataset[row]
            assert item["mask"].shape == (64, 64)  # the image size, whatever the mask size
            assert not item["mask"].any() or item["label"]
            if row < 12 and not item["label"]:
                assert torch.equal(item["image"], plain[row]["image"])
            labels.append(item["label"])
        assert np.mean(labels) == pytest.approx(share, abs=0.15)


def test_donors_are_other_images_of_the_category() -> None:
    """Patches without blending show the single grey level of another image of the category."""
    settings = SynthesisSettings(
        "nsa", "tab", {"mode": "swap", "label": "binary"}, mode="pair", retries=0
    )
    data = demo(settings)
    dataset = data.fit_dataset()
    assert isinstance(dataset, SyntheticDataset)
    greys = torch.arange(24) * 9
    kept = dataset.images

    class Flat:
        samples, mask_size = kept.samples, kept.mask_size

        def __getitem__(self, draw: Draw) -> dict[str, Any]:
            row = draw.index
            image = torch.full((3, 64, 64), int(greys[row]), dtype=torch.uint8)
            return {"image": image, "label": False, "category": "", "path": "", "index": row}

    dataset.images = dataset.defects.images = dataset.defects.donors = Flat()  # type: ignore[assignment]
    for row in range(24):
        item = dataset[row]
        values = set(item["synthetic"][:, item["synthetic_mask"]].unique().tolist())
        of_category = set(greys[:12].tolist()) if row < 12 else set(greys[12:].tolist())
        assert values <= of_category - {int(greys[row])}


def test_synthetic_validation() -> None:
    data = demo(val_split="synthetic", num_train=20)
    held = data.validation_dataset()
    assert isinstance(held, SyntheticPairs)
    assert len(held) == 2 * 4  # a tenth of each category, with and without a defect
    trained = {sample.image for sample in data.fit_samples()}
    assert len(trained) == 36
    assert not trained & {sample.image for sample in held.images.samples}
    assert data.validation_categories() == data.categories
    for index in range(len(held)):
        item, again = held[index], held[index]
        assert torch.equal(item["image"], again["image"])
        assert item["index"] == index
        if index % 2 == 0:
            assert not item["label"]
        else:
            assert item["label"] == bool(item["mask"].any())
    assert sum(held[index]["label"] for index in range(len(held))) == 4
    assert data.protocol()["synthesis"]["recipe"] == "cutpaste"  # type: ignore[index]


def test_validation_takes_patches_from_training_images() -> None:
    """The one held-out image per category is not its own donor."""
    settings = SynthesisSettings("nsa", "tab", {"mode": "swap", "label": "binary"}, retries=0)
    held = demo(settings, val_split="synthetic", num_train=12).validation_dataset()
    assert isinstance(held, SyntheticPairs)
    assert len(held.images) == 2
    assert len(held.defects.donor_rows["steel nut"]) == 11
    plain, changed = held[0]["image"], held[1]["image"]
    assert (plain != changed).any()


def test_scenes_cannot_be_combined_with_synthesis() -> None:
    with pytest.raises(ValueError, match=r"leave data\.synthesis \(cutpaste\) out"):
        demo(num_scenes=4)


def test_an_invisible_defect_leaves_the_image_unchanged() -> None:
    flat = np.full((64, 64, 3), 90, np.uint8)
    settings = SynthesisSettings("nsa", retries=2)
    synthetic = synthesize(settings, flat, "nut", np.random.default_rng(0), lambda: flat)
    assert np.array_equal(synthetic.image, flat)
    assert not synthetic.mask.any()
    assert synthetic.info["failed"]


def test_a_mixture_draws_by_weight() -> None:
    settings = SynthesisSettings("mixture", weights={"erasing": 3, "cutpaste/tab_cutpaste": 1})
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    drawn = [
        synthesize(settings, image, "", np.random.default_rng(s), lambda: image).info["recipe"]
        for s in range(200)
    ]
    assert drawn.count("erasing") / 200 == pytest.approx(0.75, abs=0.1)
    assert set(drawn) == {"erasing", "cutpaste"}


def test_mistakes(mvtec_root: Path) -> None:
    cases: list[tuple[Any, str]] = [
        (lambda: SynthesisSettings("mixture"), "recipe mixture needs weights"),
        (lambda: SynthesisSettings("nsa", weights={"nsa": 1}), "recipe nsa takes no weights"),
        (lambda: SynthesisSettings("nsa", "draem"), "preset draem: unknown for nsa"),
        (lambda: SynthesisSettings("nsa", options={"colour": 1}), "nsa has no colour"),
        (lambda: SynthesisSettings("mixture", weights={"paint": 1}), "recipe paint: unknown"),
        (lambda: SynthesisSettings("mixture", weights={"nsa": 0}), "must be above 0"),
        (lambda: SynthesisSettings("nsa", share=2), "share must be in"),
        (
            lambda: SynthesisSettings("mixture", weights={"nsa": 1}, options={"jitter": 1}),
            "options, jitter: a mixture groups its options by recipe, under nsa",
        ),
        (lambda: demo(val_split="synthetic", num_train=3).fit_samples(), "too few to hold"),
        (lambda: Demo(val_split="synthetic"), "needs synthetic defects"),
        (
            lambda: MVTecAD(
                str(mvtec_root), synthesis=CUTPASTE, auxiliary=MVTecAD(str(mvtec_root))
            ),
            "leave out one of these options",
        ),
    ]
    for make, message in cases:
        with pytest.raises(ValueError, match=message):
            make()


@pytest.mark.parametrize("recipe", ["nsa", "cutpaste", "erasing", "perlin"])
def test_preview_of_defects(tmp_path: Path, mvtec_root: Path, recipe: str) -> None:
    sheet = tmp_path / "sheet.png"
    words = ["preview", "--data", "MVTecAD", "--data.root", str(mvtec_root), "--count", "3"]
    words += ["--data.synthesis.recipe", recipe, "--file", str(sheet)]
    assert main(words) == 0
    with Image.open(sheet) as picture:
        assert picture.width >= 4 * 160
        assert len(picture.getcolors(1 << 20) or []) > 50


def test_preview_of_an_unknown_preset(
    tmp_path: Path, mvtec_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["preview", "--data", "MVTecAD", "--data.root", str(mvtec_root)]
    words += ["--data.synthesis.recipe", "nsa", "--data.synthesis.preset", "draem"]
    assert main([*words, "--file", str(tmp_path / "a.png")]) == 2
    assert "preset draem: unknown for nsa" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.png"))
