from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from layouts import Maker

from anomaly_clip.data import (
    AnomalyData,
    MVTecAD,
)


def tiny(root: Path, **options: Any) -> MVTecAD:
    return MVTecAD(str(root), image_size=16, num_workers=0, **options)


def paths(data: AnomalyData) -> list[str]:
    """Return what validates."""
    batches: Any = data.val_dataloader()
    return [path for batch in batches for path in batch["path"]]


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
