from __future__ import annotations

import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import save_picture
from layouts import Maker, head_ct, visa
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import default_collate

from anomaly_clip.data import (
    AnomalyData,
    Demo,
    HeadCT,
    ImageFolder,
    MVTecAD,
    Resize,
    Sample,
    SampleDataset,
    VisA,
)
from anomaly_clip.synthesis import SynthesisSettings


def test_items_make_a_batch(mvtec_root: Path) -> None:
    data = MVTecAD(str(mvtec_root), image_size=16, mask_size=20)
    dataset = data.dataset("test")
    batch = default_collate([dataset[i] for i in range(len(dataset))])
    assert batch["image"].shape == (8, 3, 16, 16)
    assert batch["image"].dtype == torch.uint8
    assert batch["mask"].shape == (8, 20, 20)
    assert batch["mask"].dtype == torch.bool
    assert batch["mask"].flatten(1).any(dim=1).tolist() == batch["label"].tolist()
    assert batch["label"].tolist() == [False, False, True, True] * 2
    assert batch["category"] == ["bottle"] * 4 + ["metal_nut"] * 4
    assert batch["index"].tolist() == list(range(8))
    assert batch["path"][2].endswith("bottle/test/scratch/000.png")


def test_pixel_labels_are_absent_where_there_are_none(tmp_path: Path) -> None:
    sample = Sample(save_picture(tmp_path / "a.png"), "thing", label=True)
    assert "mask" not in SampleDataset([sample], 16, 16, has_masks=False)[0]


def test_a_mask_of_another_size_names_both(tmp_path: Path) -> None:
    image = save_picture(tmp_path / "a.png", size=40)
    mask = save_picture(tmp_path / "a_mask.png", np.zeros((4, 6), dtype=np.uint8))
    with pytest.raises(
        ValueError, match=r"a_mask\.png: the mask is 6 x 4 pixels, its image a\.png is 40"
    ):
        SampleDataset([Sample(image, "thing", True, mask)], 16, 16)[0]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"image_size": 0}, "data.image_size must be 1 or more"),
        ({"mask_size": -1}, "data.mask_size must be 1 or more"),
        ({"mask_threshold": 1.0}, "data.mask_threshold"),
        ({"batch_size": 0}, "data.batch_size"),
        ({"shots": 0}, "data.shots must be 1 or more"),
        ({"fraction": 0.0}, r"data.fraction must be in \(0, 1\]"),
        ({"fraction": 0.5, "shots": 1}, "in place of data.shots"),
        ({"val_share": 1.0}, r"data.val_share must be in \(0, 1\)"),
        ({"seed": -1}, "data.seed must be 0 or more"),
        ({"image_size": 8, "resize": Resize("square_crop", 7)}, "data.resize.size 7: .* 8 or more"),
        ({"image_size": 8, "resize": Resize("shorter_crop")}, "data.resize.size None"),
        ({"image_size": 8, "resize": Resize("square", 9)}, "rule square cuts nothing out"),
    ],
)
def test_options_that_do_not_fit(options: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        MVTecAD("root", **options)


def test_without_a_model_the_image_size_must_be_given(mvtec_root: Path) -> None:
    with pytest.raises(ValueError, match="image_size is not known"):
        MVTecAD(str(mvtec_root)).dataset("test")


def tiny(root: Path, **options: Any) -> MVTecAD:
    return MVTecAD(str(root), image_size=16, num_workers=0, **options)


def paths(data: AnomalyData) -> list[str]:
    """Return what validates."""
    batches: Any = data.val_dataloader()
    return [path for batch in batches for path in batch["path"]]


def test_shots_are_drawn_by_seed_and_category(mvtec_root: Path) -> None:
    for number in range(2, 8):
        save_picture(
            mvtec_root / "bottle" / "train" / "good" / f"{number:03d}.png", size=20 + number
        )
    data = tiny(mvtec_root, shots=2, seed=3)
    chosen = data.shots_of("bottle")
    assert chosen == tiny(mvtec_root, shots=2, seed=3).shots_of("bottle")
    assert chosen == tiny(mvtec_root, shots=2, seed=3, categories=["bottle"]).shots_of("bottle")
    assert {tuple(tiny(mvtec_root, shots=2, seed=s).shots_of("bottle")) for s in range(9)} > {
        tuple(chosen)
    }
    assert data.fit_samples() == chosen + data.shots_of("metal_nut")
    batch = data.references("bottle")
    assert batch["image"].shape == (2, 3, 16, 16)
    assert batch["path"] == [str(s.image) for s in chosen]
    assert not batch["label"].any()


def test_fewer_images_are_always_among_more() -> None:
    def chosen(**options: Any) -> set[Path]:
        data = Demo(categories=["pink pill"], num_train=40, seed=5, **options)
        return {sample.image for sample in data.fit_samples()}

    by_shots = [chosen(shots=shots) for shots in (1, 2, 4, 40)]
    by_share = [chosen(fraction=share) for share in (0.01, 0.05, 0.1, 0.5, 1.0)]
    assert [len(some) for some in by_shots] == [1, 2, 4, 40]
    assert [len(some) for some in by_share] == [1, 2, 4, 20, 40]
    for rows in (by_shots, by_share):
        assert all(few < more for few, more in pairwise(rows))
    assert by_share[:3] == by_shots[:3]
    # What validates is the same for all, and never trained on.
    validated: dict[str, Any] = {
        "val_split": "synthetic",
        "val_share": 0.1,
        "synthesis": SynthesisSettings(),
    }
    by_share = [chosen(fraction=share, **validated) for share in (0.1, 0.5, 1.0)]
    assert [len(some) for some in by_share] == [4, 18, 36]
    assert all(few < more for few, more in pairwise(by_share))
    held = {
        tuple(
            sample.image
            for sample in Demo(
                categories=["pink pill"], num_train=40, seed=5, fraction=share, **validated
            ).validation.normal_parts[1]
        )
        for share in (0.1, 0.5, 1.0)
    }
    assert len(held) == 1
    assert not set(*held) & by_share[-1]
    data = Demo(categories=["pink pill"], num_train=40, seed=5, fraction=0.1)
    assert data.protocol()["fraction"] == 0.1
    assert len(data.fit_samples()) == 4


def test_shots_that_cannot_be_had(mvtec_root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.shots is not given"):
        tiny(mvtec_root).references("bottle")
    with pytest.raises(ValueError, match=r"data\.shots 3: category 'bottle' has 2 normal"):
        tiny(mvtec_root, shots=3).references("bottle")
    with pytest.raises(ValueError, match="HeadCT has no train images"):
        HeadCT(str(head_ct(tmp_path / "ct")), shots=1).references("head ct")


def test_test_images_in_training_are_refused_by_content(mvtec_root: Path) -> None:
    train = mvtec_root / "bottle" / "train" / "good"
    shutil.copy(mvtec_root / "bottle" / "test" / "good" / "000.png", train / "another name.png")
    with pytest.raises(ValueError, match=r"1 test images are among .*good/000\.png = .*another"):
        tiny(mvtec_root).setup("fit")
    allowed = tiny(mvtec_root, allow_overlap=True)
    allowed.setup("fit")
    assert [pair.second.name for pair in allowed.overlap()] == ["000.png"]
    tiny(mvtec_root, categories=["metal_nut"]).setup("fit")
    tiny(mvtec_root).setup("test")


def test_equal_names_are_no_overlap(mvtec_root: Path) -> None:
    assert tiny(mvtec_root).overlap() == []  # train/good/000.png and test/good/000.png


def test_an_auxiliary_set_feeds_fit_and_nothing_else(mvtec_root: Path, tmp_path: Path) -> None:
    other = VisA(str(visa(tmp_path / "visa")), batch_size=3, shuffle=False)
    data = MVTecAD(str(mvtec_root), auxiliary=other, num_workers=0, image_size=16)
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert [int(i) for batch in batches for i in batch["index"]] == list(range(6))
    assert len(batches[0]["path"]) == 3
    seen = [path for batch in batches for path in batch["path"]]
    assert sorted(seen) == sorted(str(s.image) for s in other.samples("test"))
    assert any(batch["mask"].any() for batch in batches)
    assert data.samples("test")[0].category == "bottle"
    assert data.words("pipe_fryum") == "pipe_fryum"
    assert data.protocol()["auxiliary"] == "VisA"
    assert not is_overridden("val_dataloader", data)


def test_a_tenth_of_the_auxiliary_set_validates(mvtec_root: Path, tmp_path: Path) -> None:
    make = Maker(11)
    for number in range(20):
        make.picture(tmp_path / "aux" / "nut" / "test" / "good" / f"{number}.png")
    (tmp_path / "aux" / "nut" / "train").mkdir()

    def data(seed: int = 0) -> MVTecAD:
        aux = MVTecAD(str(tmp_path / "aux"))
        more = {"auxiliary": aux, "val_split": "auxiliary", "seed": seed, "num_workers": 0}
        made = MVTecAD(str(mvtec_root), image_size=16, **more)  # type: ignore[arg-type]
        made.setup("fit")
        return made

    first = data()
    held = paths(first)
    trained = [str(s.image) for s in first.fit_samples()]
    assert len(held) == 2
    everything = MVTecAD(str(tmp_path / "aux")).samples("test")
    assert sorted(held + trained) == sorted(str(s.image) for s in everything)
    assert paths(data()) == held
    assert first.validation_categories() == ["nut"]
    with pytest.raises(ValueError, match=r"data\.val_split auxiliary: name one"):
        MVTecAD(str(mvtec_root), val_split="auxiliary")


def test_the_test_split_validates_if_asked(mvtec_root: Path) -> None:
    data = tiny(mvtec_root, val_split="test")
    data.setup("fit")
    assert paths(data) == [str(s.image) for s in data.samples("test")]
    assert data.protocol()["val_split"] == "test"


def test_training_order_comes_from_seed_and_epoch(mvtec_root: Path) -> None:
    def order(seed: int, epoch: int) -> list[int]:
        data = tiny(mvtec_root, seed=seed, batch_size=1)
        data.setup("fit")
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        return [int(batch["index"]) for batch in loader]

    assert order(1, 2) == order(1, 2)
    assert len({tuple(order(1, epoch)) for epoch in range(9)}) > 1


def test_categories_may_be_seen_equally_often(mvtec_root: Path) -> None:
    for number in range(2, 8):
        save_picture(
            mvtec_root / "bottle" / "train" / "good" / f"{number:03d}.png", size=20 + number
        )
    data = tiny(mvtec_root, balanced=True)
    data.setup("fit")
    seen = [name for batch in data.train_dataloader() for name in batch["category"]]
    assert Counter(seen) == {"bottle": 5, "metal_nut": 5}


def test_resizing_follows_the_rule_for_image_and_mask(mvtec_root: Path) -> None:
    mask_file = mvtec_root / "bottle" / "ground_truth" / "scratch" / "000_mask.png"
    corner = np.zeros((40, 48), np.uint8)
    corner[:3, :3] = 255
    save_picture(mask_file, corner)
    whole = tiny(mvtec_root, mask_size=32).dataset("test")[2]
    assert whole["mask"].any()
    cut = tiny(mvtec_root, mask_size=32, resize=Resize("square_crop", 24)).dataset("test")[2]
    assert cut["image"].shape == (3, 16, 16)
    assert cut["mask"].shape == (32, 32)
    assert not cut["mask"].any()  # the crop removed it,
    assert cut["label"]  # and it stays abnormal


def test_words_for_categories(mvtec_root: Path) -> None:
    data = tiny(mvtec_root, words={"metal_nut": "metal nut"})
    assert [data.words(name) for name in data.categories] == ["bottle", "metal nut"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"shots": 1}, "all that is learnt from"),
        ({"fraction": 0.5}, "data.fraction must be left out"),
        ({"balanced": True, "shuffle": False}, "so data.shuffle must be true"),
    ],
)
def test_options_that_contradict_each_other(
    mvtec_root: Path, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        tiny(mvtec_root, auxiliary=MVTecAD(str(mvtec_root)), **options)


def test_an_auxiliary_set_must_say_what_is_normal(mvtec_root: Path, tmp_path: Path) -> None:
    save_picture(tmp_path / "photos" / "a.png")
    photos = ImageFolder(str(tmp_path / "photos"), "plank")
    with pytest.raises(ValueError, match="nothing says which of its images are normal"):
        tiny(mvtec_root, auxiliary=photos).setup("fit")
    nested = MVTecAD(str(mvtec_root), auxiliary=MVTecAD(str(mvtec_root)))
    with pytest.raises(ValueError, match="it takes no auxiliary of its own"):
        tiny(mvtec_root, auxiliary=nested)


def test_shots_without_training_images_are_refused_before_anything_is_run(tmp_path: Path) -> None:
    data = HeadCT(str(head_ct(tmp_path)), shots=1, image_size=16)
    with pytest.raises(ValueError, match=r"data\.shots 1: HeadCT has no train images"):
        data.setup("test")


def test_the_protocol_tells_what_figures_depend_on(mvtec_root: Path) -> None:
    plain, other = tiny(mvtec_root), tiny(mvtec_root, mask_filter="nearest", mask_threshold=0.0)
    assert plain.protocol() != other.protocol()
    assert plain.protocol()["words"] == {"bottle": "bottle", "metal_nut": "metal_nut"}
