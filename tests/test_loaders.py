from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from helpers import save_picture

from anomaly_clip.data import (
    MVTecAD,
)


def tiny(root: Path, **options: Any) -> MVTecAD:
    return MVTecAD(str(root), image_size=16, num_workers=0, **options)


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
