from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import write_mvtec
from layouts import Maker
from torch.utils.data import DataLoader

from anomaly_clip.cli import main
from anomaly_clip.data import Demo, MVTecAD
from anomaly_clip.data.augment import Augmentation
from anomaly_clip.data.samplers import EpochSampler
from anomaly_clip.data.samples import SampleDataset
from anomaly_clip.records import Draw
from anomaly_clip.synthesis.synthesizer import SynthesisSettings

FLIP = {"class_path": "HorizontalFlip", "init_args": {"p": 1.0}}
MAYBE = {"class_path": "albumentations.HorizontalFlip", "init_args": {"p": 0.5}}
NOISE = {"class_path": "GaussNoise", "init_args": {"p": 1.0}}
ONE_OF = {"class_path": "OneOf", "init_args": {"transforms": [FLIP, NOISE], "p": 1.0}}


def image_and_mask(side: int = 12) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (24, 24, 3), dtype=np.uint8), rng.random((side, side)) > 0.7


@pytest.mark.parametrize("side", [24, 12, 48])
def test_image_and_mask_are_transformed_alike(side: int) -> None:
    image, mask = image_and_mask(side)
    flipped, flipped_mask = Augmentation([FLIP])(image, mask, 0, 0)
    np.testing.assert_array_equal(flipped, image[:, ::-1])
    assert flipped_mask is not None
    assert flipped_mask.dtype == np.bool_
    if side <= 24:  # the mask is transformed at the size of the image
        np.testing.assert_array_equal(flipped_mask, mask[:, ::-1])
    assert flipped_mask.shape == mask.shape


def test_augmentations_depend_on_seed_epoch_and_row_alone() -> None:
    image, _ = image_and_mask()

    def noisy(seed: int, epoch: int, row: int) -> bytes:
        return Augmentation([NOISE, ONE_OF], seed)(image, None, epoch, row)[0].tobytes()

    versions = {noisy(*key) for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))}
    assert len(versions) == 4
    assert noisy(0, 0, 0) in versions
    used = Augmentation([NOISE, ONE_OF])
    for row in range(3):  # earlier calls leave no trace
        used(image, None, 5, row)
    assert used(image, None, 0, 0)[0].tobytes() == noisy(0, 0, 0)
    copied = pickle.loads(pickle.dumps(used))
    assert copied(image, None, 0, 0)[0].tobytes() == noisy(0, 0, 0)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"class_path": "HorizontalFlop"}, "did you mean HorizontalFlip"),
        ({"class_path": "os.path.join"}, "no transform os.path.join"),
        ({"class_path": "no.such.Thing"}, "no transform no.such.Thing"),
        ({"class_path": "HorizontalFlip", "init_args": {"q": 1}}, "'q' are not valid"),
        ({"class_path": "HorizontalFlip", "init_args": {"p": 3}}, "less than or equal to 1"),
        ({"class_path": "HorizontalFlip", "init_args": [1]}, "expected transforms such as"),
        ({"name": "HorizontalFlip"}, "expected transforms such as"),
        ("HorizontalFlip", "expected transforms such as"),
        (
            {"class_path": "OneOf", "init_args": {"transforms": [{"class_path": "VerticalFlop"}]}},
            "no transform VerticalFlop",
        ),
    ],
)
def test_mistakes_are_named(entry: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augmentation([entry])


def test_transforms_that_cannot_be_applied_are_named() -> None:
    crop = {"class_path": "RandomCrop", "init_args": {"height": 500, "width": 500}}
    with pytest.raises(ValueError, match=r"cannot be applied to an image of 24 x 24 pixels \("):
        Augmentation([crop])(image_and_mask()[0], None, 0, 0)
    with pytest.raises(ValueError, match="expected a list of transforms, got"):
        Augmentation([{"class_path": "OneOf", "init_args": {"transforms": 5}}])


@pytest.mark.parametrize("name", ["Resize", "ToFloat"])
def test_another_size_or_type_is_refused(name: str) -> None:
    arguments = {"height": 8, "width": 8} if name == "Resize" else {}
    augmentation = Augmentation([{"class_path": name, "init_args": arguments}])
    with pytest.raises(ValueError, match=r"turn uint8 \(24, 24, 3\) into .*: leave out"):
        augmentation(image_and_mask()[0], None, 0, 0)


def training_images(data: MVTecAD, workers: int, epoch: int) -> list[torch.Tensor]:
    """Return the augmented images of an epoch in the order of their rows."""
    dataset = data.fit_dataset()
    sampler = EpochSampler(dataset, seed=0)
    sampler.set_epoch(epoch)
    loader = DataLoader(dataset, batch_size=2, sampler=sampler, num_workers=workers)
    rows = [
        (int(row), image)
        for batch in loader
        for row, image in zip(batch["index"], batch["image"], strict=True)
    ]
    return [image for _, image in sorted(rows, key=lambda pair: pair[0])]


def test_the_number_of_workers_changes_nothing(mvtec_root: Path) -> None:
    data = MVTecAD(str(mvtec_root), image_size=32, augment=[MAYBE, NOISE])
    first, second = training_images(data, 0, 1), training_images(data, 2, 1)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    plain = data.as_tensors(data.fit_samples())
    assert not any(torch.equal(plain[row]["image"], image) for row, image in enumerate(first))


def test_only_training_images_are_augmented(mvtec_root: Path) -> None:
    data = MVTecAD(str(mvtec_root), image_size=32, augment=[FLIP], val_split="test")
    plain = MVTecAD(str(mvtec_root), image_size=32)
    fitted = data.fit_dataset()
    assert isinstance(fitted, SampleDataset)
    assert torch.equal(fitted[0]["image"], plain.dataset("train")[0]["image"].flip(-1))
    for dataset in (data.validation_dataset(), data.dataset("test")):
        assert isinstance(dataset, SampleDataset)
        assert torch.equal(dataset[0]["image"], plain.dataset("test")[0]["image"])
    assert set(data.unchanging_datasets()) == {
        "validation"
    }  # features of the others would be stale
    assert set(plain.unchanging_datasets()) == {"fit"}
    assert data.protocol()["augment"] == [FLIP]
    assert "augment" not in plain.protocol()


def test_defects_are_made_on_augmented_images(mvtec_root: Path) -> None:
    settings = SynthesisSettings("perlin", mode="pair")
    data = MVTecAD(str(mvtec_root), image_size=32, augment=[MAYBE], synthesis=settings)
    plain = MVTecAD(str(mvtec_root), image_size=32, synthesis=settings)
    dataset, normal = data.fit_dataset(), plain.fit_dataset()
    flips = 0
    for epoch in range(6):
        item, unflipped = dataset[Draw(epoch, 0)], normal[Draw(epoch, 0)]["image"]
        outside = ~item["synthetic_mask"].expand(3, -1, -1)
        assert torch.equal(item["synthetic"][outside], item["image"][outside])
        assert torch.equal(item["image"], unflipped) or torch.equal(
            item["image"], unflipped.flip(-1)
        )
        flips += not torch.equal(item["image"], unflipped)
    assert 0 < flips < 6


def test_scenes_are_not_augmented() -> None:
    with pytest.raises(ValueError, match=r"data.num_scenes 4 .* leave data.augment out"):
        Demo(num_scenes=4, augment=[FLIP])


@pytest.mark.slow
def test_from_the_command_line(
    mvtec_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The saved configuration repeats the fit; other augmentations give another model."""
    monkeypatch.chdir(tmp_path)
    fit = ["fit", "--model=PaDiM", "--model.backbone.weights=random", "--model.image_size=32"]
    fit += ["--data=MVTecAD", f"--data.root={mvtec_root}", "--data.categories=[bottle]"]
    fit += ["--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--data.num_workers=0"]
    assert main([*fit, f"--data.augment={json.dumps([ONE_OF])}"]) == 0
    assert main(["fit", "--config=runs/PaDiM/1-fit/config-fit.yaml", "--output.folder=again"]) == 0
    assert main([*fit, "--output.folder=plain"]) == 0
    folders = ("runs/PaDiM/1-fit", "again", "plain")
    first, again, plain = (
        torch.load(Path(folder, "checkpoints", "last.ckpt"), weights_only=True)["state_dict"][
            "mean"
        ]
        for folder in folders
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, plain)


def test_preview_shows_augmented_versions(tmp_path: Path) -> None:
    make = Maker()
    make.picture(tmp_path / "thing" / "train" / "good" / "0.png")
    make.picture(tmp_path / "thing" / "test" / "good" / "0.png")
    file = tmp_path / "sheet.png"
    options = ["--data=MVTecAD", f"--data.root={tmp_path}", f"--data.augment={json.dumps([FLIP])}"]
    assert main(["preview", *options, f"--file={file}"]) == 0
    assert file.stat().st_size > 0


@pytest.mark.slow
def test_the_library_is_imported_only_when_needed(tmp_path: Path) -> None:
    """Neither the data modules nor a data module without augmentation import albumentations."""
    root = write_mvtec(tmp_path)
    code = (
        "import sys; from anomaly_clip.data import MVTecAD\n"
        f"MVTecAD({str(root)!r}, image_size=32).dataset('train')[0]\n"
        "assert 'albumentations' not in sys.modules\n"
        "MVTecAD('.', augment=[{'class_path': 'Blur'}])\n"
        "import os; assert os.environ['NO_ALBUMENTATIONS_UPDATE'] == '1'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_augmentation_of_the_auxiliary_set_is_refused(mvtec_root: Path) -> None:
    auxiliary = MVTecAD(str(mvtec_root), augment=[FLIP])
    with pytest.raises(ValueError, match=r"data.auxiliary.augment .* set data.augment"):
        MVTecAD(str(mvtec_root), auxiliary=auxiliary)


def test_the_library_is_told_not_to_look_for_a_newer_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The variable is set before the import, which would otherwise ask the package index."""
    seen: list[str | None] = []

    class Finder:
        @staticmethod
        def find_spec(name: str, *_: object) -> None:
            if name == "albumentations":
                seen.append(os.environ.get("NO_ALBUMENTATIONS_UPDATE"))
                raise ImportError(name)

    monkeypatch.setenv("NO_ALBUMENTATIONS_UPDATE", "")  # restores it after the test
    monkeypatch.delenv("NO_ALBUMENTATIONS_UPDATE")
    monkeypatch.delitem(sys.modules, "albumentations", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    with pytest.raises(ImportError):
        Augmentation([FLIP])
    assert seen == ["1"]
