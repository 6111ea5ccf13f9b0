from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import save_picture
from layouts import visa
from lightning.pytorch.utilities.model_helpers import is_overridden

from anomaly_clip.data import (
    ImageFolder,
    MVTecAD,
    VisA,
)
from anomaly_clip.data.auxiliary import check_auxiliary, share_image_size


def tiny(root: Path, **options: Any) -> MVTecAD:
    return MVTecAD(str(root), image_size=16, num_workers=0, **options)


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


def stub(**options: Any) -> Any:
    """Return what is read of a data set and of its auxiliary one."""
    defaults = {"root": "there", "has_labels": True, "splits": ("train", "test")}
    defaults |= {"auxiliary": None, "has_shots": False, "synthesis": None, "image_size": None}
    return SimpleNamespace(**{**defaults, **options})


def test_without_an_auxiliary_set_nothing_is_checked() -> None:
    data = stub(has_shots=True, synthesis="any", image_size=8)
    check_auxiliary(data)
    share_image_size(data)
    assert data.image_size == 8


def test_synthetic_defects_have_nothing_to_be_made_on() -> None:
    check_auxiliary(stub(auxiliary=stub()))
    with pytest.raises(ValueError, match=r"data\.synthesis makes defects on normal training"):
        check_auxiliary(stub(auxiliary=stub(), synthesis="any"))


def test_images_are_of_one_size() -> None:
    data = stub(auxiliary=stub(), image_size=32)
    share_image_size(data)
    assert data.auxiliary.image_size == 32
    share_image_size(data)  # of the next stage
    with pytest.raises(ValueError, match=r"data\.auxiliary\.image_size 16 is not 32"):
        share_image_size(stub(auxiliary=stub(image_size=16), image_size=32))


def test_an_auxiliary_set_without_test_images_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.auxiliary there: nothing says which"):
        share_image_size(stub(auxiliary=stub(splits=("train",)), image_size=32))
