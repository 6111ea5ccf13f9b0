from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from helpers import save_picture
from layouts import head_ct

from anomaly_clip.data import (
    Demo,
    HeadCT,
    MVTecAD,
)
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


def test_shots_without_training_images_are_refused_before_anything_is_run(tmp_path: Path) -> None:
    data = HeadCT(str(head_ct(tmp_path)), shots=1, image_size=16)
    with pytest.raises(ValueError, match=r"data\.shots 1: HeadCT has no train images"):
        data.setup("test")
