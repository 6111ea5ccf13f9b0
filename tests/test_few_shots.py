from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import save_picture
from layouts import head_ct

from anomaly_clip.data import (
    Demo,
    HeadCT,
    MVTecAD,
)
from anomaly_clip.data.few_shots import FewShots
from anomaly_clip.data.samples import Sample
from anomaly_clip.synthesis import SynthesisSettings


def tiny(root: Path, **options: Any) -> MVTecAD:
    return MVTecAD(str(root), image_size=16, num_workers=0, **options)


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


def test_smaller_samples_are_nested() -> None:
    def chosen(**options: Any) -> set[Path]:
        data = Demo(categories=["pink pill"], num_train=40, seed=5, **options)
        return {sample.image for sample in data.fit_samples()}

    by_shots = [chosen(shots=shots) for shots in (1, 2, 4, 40)]
    by_share = [chosen(fraction=share) for share in (0.01, 0.05, 0.1, 0.5, 1.0)]
    assert [len(images) for images in by_shots] == [1, 2, 4, 40]
    assert [len(images) for images in by_share] == [1, 2, 4, 20, 40]
    for rows in (by_shots, by_share):
        assert all(few < more for few, more in pairwise(rows))
    assert by_share[:3] == by_shots[:3]
    # The held-out images are the same for every fraction and are never trained on.
    with_validation: dict[str, Any] = {
        "val_split": "synthetic",
        "val_share": 0.1,
        "synthesis": SynthesisSettings(),
    }
    by_share = [chosen(fraction=share, **with_validation) for share in (0.1, 0.5, 1.0)]
    assert [len(images) for images in by_share] == [4, 18, 36]
    assert all(few < more for few, more in pairwise(by_share))
    held = {
        tuple(
            sample.image
            for sample in Demo(
                categories=["pink pill"], num_train=40, seed=5, fraction=share, **with_validation
            ).validation.normal_parts[1]
        )
        for share in (0.1, 0.5, 1.0)
    }
    assert len(held) == 1
    assert not set(*held) & by_share[-1]
    data = Demo(categories=["pink pill"], num_train=40, seed=5, fraction=0.1)
    assert data.protocol()["fraction"] == 0.1
    assert len(data.fit_samples()) == 4


def test_impossible_shots(mvtec_root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.shots is None: set the number"):
        tiny(mvtec_root).references("bottle")
    with pytest.raises(ValueError, match=r"data\.shots 3: category 'bottle' has 2 normal"):
        tiny(mvtec_root, shots=3).references("bottle")
    with pytest.raises(ValueError, match="HeadCT has no train images"):
        HeadCT(str(head_ct(tmp_path / "ct")), shots=1).references("head ct")


def test_shots_without_training_images_are_refused_before_anything_is_run(tmp_path: Path) -> None:
    data = HeadCT(str(head_ct(tmp_path)), shots=1, image_size=16)
    with pytest.raises(ValueError, match=r"data\.shots 1: HeadCT has no train images"):
        data.setup("test")


def stub(count: int, **options: Any) -> Any:
    """Return a stand-in for a data module: one category, ``count`` normal training images."""
    normal = [Sample(Path(f"{number}.png"), "a", False) for number in range(count)]
    parts = (normal[: count // 2], normal[count // 2 :])
    return SimpleNamespace(
        **{
            "splits": ("train", "test"),
            "dataset_name": "Made",
            "root": Path("here"),
            "seed": 3,
            "listing": SimpleNamespace(normal=lambda category: normal),
            "validation": SimpleNamespace(
                is_synthetic=False, normal_parts=parts, held_normal={*parts[1]}
            ),
            "unreadable": SimpleNamespace(readable=list, is_readable=lambda sample: True),
            **options,
        }
    )


@pytest.mark.parametrize(
    ("fraction", "count", "expected"),
    [
        (0.01, 40, 1),  # at least one
        (0.5, 5, 2),  # 2.5 is rounded to the even number
        (0.5, 7, 4),
        (0.34, 5, 2),  # 1.7 is nearer to 2
        (0.33, 4, 1),
        (1.0, 5, 5),
    ],
)
def test_a_fraction_is_rounded_to_the_nearest(fraction: float, count: int, expected: int) -> None:
    assert len(FewShots(stub(count), None, fraction).of("a")) == expected


def test_a_fraction_excludes_held_out_images() -> None:
    data = stub(9)
    data.validation.is_synthetic = True
    few = FewShots(data, None, 0.5)
    assert set(few.of("a")) < set(data.validation.normal_parts[0])  # 4 of 9 images
    assert len(few.of("a")) == 2
    with pytest.raises(ValueError, match=r"data\.shots 5: category 'a' has 4 normal"):
        FewShots(data, 5, None).of("a")


def test_without_a_limit_nothing_is_sampled() -> None:
    everything = FewShots(stub(4), None, None)
    assert not everything.is_limited
    assert FewShots(stub(4), 4, None).is_limited
    assert FewShots(stub(4), None, 1.0).is_limited
    everything.check()
    with pytest.raises(ValueError, match=r"data\.shots is None: set the number"):
        everything.of("a")


def test_references_do_not_depend_on_the_limit() -> None:
    few = FewShots(stub(6), 1, None)
    drawn = few.drawn("a", 3, seed=5)
    assert len(set(drawn)) == 3
    assert drawn == few.drawn("a", 3, seed=5)
    assert set(drawn) < set(few.drawn("a", 4, seed=5))
    assert len({tuple(few.drawn("a", 3, seed)) for seed in range(9)}) > 1
    with pytest.raises(ValueError, match=r"model\.shots 7: category 'a' has 6 normal .* in here"):
        few.drawn("a", 7, seed=5)
    without = FewShots(stub(6, splits=("test",)), None, None)
    with pytest.raises(ValueError, match="Made has no train images to use as references"):
        without.drawn("a", 1, seed=5)


@pytest.mark.parametrize(("shots", "fraction"), [(2, None), (None, 0.5)])
def test_a_limit_needs_a_training_split(shots: int | None, fraction: float | None) -> None:
    few = FewShots(stub(6, splits=("test",)), shots, fraction)
    with pytest.raises(ValueError, match=r"Made has no train images to sample from"):
        few.check()
    with pytest.raises(ValueError, match="Made has no train images to sample shots from"):
        few.of("a")
