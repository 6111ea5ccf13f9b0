from __future__ import annotations

from contextlib import nullcontext
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
from anomaly_clip.data.auxiliary import check_auxiliary, check_shots, take_image_size
from anomaly_clip.data.transforms import Resize
from anomaly_clip.methods import (
    APRILGAN,
    SDP,
    AnomalyCLIP,
    BatchedAnomalyDINO,
    BatchedSubspaceAD,
    MuSc,
    PaDiM,
    SDPPlus,
    WinCLIP,
)
from anomaly_clip.methods.evaluated import EvaluatedModule
from anomaly_clip.records import LoaderNeeds
from anomaly_clip.synthesis import SynthesisSettings


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
    ("options", "message"),
    [
        ({"balanced": True, "shuffle": False}, "set data.shuffle False to true"),
    ],
)
def test_options_that_contradict_each_other(
    mvtec_root: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(mvtec_root, auxiliary=MVTecAD(str(mvtec_root)), **options)


def test_an_auxiliary_set_must_be_labelled(mvtec_root: Path, tmp_path: Path) -> None:
    save_picture(tmp_path / "photos" / "a.png")
    photos = ImageFolder(str(tmp_path / "photos"), "plank")
    with pytest.raises(ValueError, match=r"photos has no labelled test images to train on"):
        tiny(mvtec_root, auxiliary=photos).setup("fit")
    nested = MVTecAD(str(mvtec_root), auxiliary=MVTecAD(str(mvtec_root)))
    with pytest.raises(ValueError, match=r"leave out data\.auxiliary\.auxiliary"):
        tiny(mvtec_root, auxiliary=nested)


@pytest.mark.parametrize(
    ("use", "options", "message"),
    [
        ("none", {"shots": 2}, r"data\.shots 2 has no effect: .* choose a method that does, such"),
        ("none", {"fraction": 0.5}, r"data\.fraction 0\.5 has no effect"),
        (
            "fit",
            {"shots": 2, "auxiliary": True},
            r"2 has no effect: data\.auxiliary .* is the only",
        ),
        ("fit", {"shots": 2}, None),
        ("references", {"shots": 2, "auxiliary": True}, None),
        ("none", {"auxiliary": True}, None),
    ],
)
def test_shots_must_have_an_effect(
    mvtec_root: Path, use: Any, options: dict[str, Any], message: str | None
) -> None:
    if "auxiliary" in options:
        options = {**options, "auxiliary": MVTecAD(str(mvtec_root))}
    data = tiny(mvtec_root, **options)
    module = SimpleNamespace(loader_needs=LoaderNeeds(shots=use))
    data.trainer = SimpleNamespace(lightning_module=module)  # type: ignore[assignment]
    with nullcontext() if message is None else pytest.raises(ValueError, match=message):
        check_shots(data)


def test_how_methods_use_shots() -> None:
    kinds: dict[str, list[type[EvaluatedModule]]] = {
        "fit": [PaDiM],
        "references": [APRILGAN, WinCLIP],
        "none": [AnomalyCLIP, BatchedAnomalyDINO, BatchedSubspaceAD, MuSc, SDP, SDPPlus],
    }
    for use, methods in kinds.items():
        assert {method.use_of_shots for method in methods} == {use}


def stub(**options: Any) -> Any:
    """Return the attributes of a data module that the checks read."""
    defaults = {"root": "there", "has_labels": True, "splits": ("train", "test")}
    defaults |= {
        "auxiliary": None,
        "augmentation": None,
        "has_shots": False,
        "synthesis": None,
        "image_size": None,
        "resize": Resize(),
    }
    return SimpleNamespace(**{**defaults, **options})


def test_without_an_auxiliary_set_nothing_is_checked() -> None:
    data = stub(has_shots=True, synthesis=SynthesisSettings(), image_size=8)
    check_auxiliary(data)
    take_image_size(data, None)
    assert data.image_size == 8


def test_an_auxiliary_set_excludes_synthetic_defects() -> None:
    check_auxiliary(stub(auxiliary=stub()))
    with pytest.raises(ValueError, match=r"data\.synthesis \(nsa\) needs normal training images"):
        check_auxiliary(stub(auxiliary=stub(), synthesis=SynthesisSettings()))


def test_both_data_sets_share_one_image_size() -> None:
    data = stub(auxiliary=stub(), image_size=32)
    take_image_size(data, None)
    assert data.auxiliary.image_size == 32
    take_image_size(data, None)  # called again for the next stage
    with pytest.raises(ValueError, match=r"image_size 16 must equal data\.image_size 32"):
        take_image_size(stub(auxiliary=stub(image_size=16), image_size=32), None)


def test_an_auxiliary_set_without_test_images_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.auxiliary there has no labelled test images"):
        take_image_size(stub(auxiliary=stub(splits=("train",)), image_size=32), None)
