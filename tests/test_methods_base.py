from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import WORDS, Outputs, quiet_trainer, save_picture
from toy import Toy

from anomaly_clip.backbones.clip import CLIPBackbone
from anomaly_clip.backbones.prompts import RVSSettings
from anomaly_clip.data import Demo, ImageFolder, MVTecAD
from anomaly_clip.methods import SDP, AnomalyMethod, SDPPlus, base
from anomaly_clip.metrics import EvaluatorSettings
from anomaly_clip.records import Batch, Scores


def tiny(backbone: CLIPBackbone, **options: Any) -> SDP:
    options = {"prompts": WORDS, "rvs": RVSSettings("mean"), "sigma": 2.0, **options}
    return SDP(backbone, **options)


def test_maps_take_the_size_of_the_masks(tiny_clip: CLIPBackbone, mvtec_root: Path) -> None:
    outputs = Outputs()
    data = MVTecAD(str(mvtec_root), mask_size=50, num_workers=0)
    quiet_trainer(callbacks=[outputs]).test(tiny(tiny_clip), data, verbose=False)
    assert outputs["anomaly_map"].shape == outputs["mask"].shape == (8, 50, 50)


def test_testing_needs_a_data_module(tiny_clip: CLIPBackbone) -> None:
    images: Any = [0]
    loader = torch.utils.data.DataLoader(images)
    with pytest.raises(ValueError, match="SDP: test requires a data module"):
        quiet_trainer().test(tiny(tiny_clip), loader, verbose=False)


def batch_of(*labels: bool) -> Batch:
    count = len(labels)
    return Batch(
        image=torch.zeros(count, 3, 32, 32, dtype=torch.uint8),
        label=torch.tensor(labels),
        category=["a", "b", "a"][:count],
        path=[f"{number}.png" for number in range(count)],
        index=torch.arange(count) + 5,
    )


def test_a_row_of_an_image_has_its_score_and_the_named_parts(tiny_clip: CLIPBackbone) -> None:
    scores = Scores(image_score=torch.tensor([0.5, 2.0]))
    rows = Toy(tiny_clip).image_rows(scores, batch_of(False, True))
    assert rows == [
        {"path": "0.png", "category": "a", "label": 0, "image_score": 0.5},
        {"path": "1.png", "category": "b", "label": 1, "image_score": 2.0},
    ]
    scores["score_parts"] = torch.tensor([[0.25, 0.75], [1.0, 3.0]])
    rows = tiny(tiny_clip).image_rows(scores, batch_of(False, True))
    assert [(row["r0"], row["r1"]) for row in rows] == [(0.25, 0.75), (1.0, 3.0)]


def test_rows_of_unlabelled_data_have_no_label(tiny_clip: CLIPBackbone, tmp_path: Path) -> None:
    save_picture(tmp_path / "1.png")
    method = Toy(tiny_clip)
    method._trainer = SimpleNamespace(datamodule=ImageFolder(str(tmp_path), "a"))  # type: ignore[assignment]
    [row] = method.image_rows(Scores(image_score=torch.zeros(1)), batch_of(False))
    assert row["label"] is None


def test_the_protocol_of_an_evaluation(tiny_clip: CLIPBackbone, tmp_path: Path) -> None:
    settings = EvaluatorSettings(pro_steps=50, fpr_limit=0.2)
    assert Toy(tiny_clip, evaluator=settings).evaluation_protocol() == {
        "fitted": True,
        "borrowed": None,
        "pixels": "in histograms of 2^15 bins",
        "pro_steps": 50,
        "fpr_limit": 0.2,
    }
    assert Toy(tiny_clip, evaluator=settings).evaluation_note == "; PRO in 50 steps"
    assert Toy(tiny_clip).evaluation_note == "; PRO over all thresholds"
    assert tiny(tiny_clip).evaluation_protocol()["fitted"] is False
    # If the layers come from a file, the data set that they were trained on is unknown.
    layers = SDPPlus(tiny_clip).export(tmp_path)
    borrowed = SDPPlus(tiny_clip, linear_layers=str(layers)).evaluation_protocol()
    assert (borrowed["fitted"], borrowed["auxiliary"], borrowed["overlap"]) == (True, None, None)
    assert borrowed["borrowed"]["file"] == str(layers)


def test_final_scores_are_those_of_the_whole_set(
    tiny_clip: CLIPBackbone, mvtec_root: Path, tmp_path: Path
) -> None:
    method: AnomalyMethod = Toy(tiny_clip)
    outputs = Outputs()
    data = MVTecAD(str(mvtec_root), num_workers=0, batch_size=3)
    quiet_trainer(callbacks=[outputs]).test(method, data, verbose=False)
    scores = outputs["image_score"].tolist()
    assert method.final_scores() == {row: pytest.approx(score) for row, score in enumerate(scores)}
    method.write_extras(tmp_path)
    assert [path.name for path in tmp_path.glob("*.json")] == ["curves.json"]


def test_a_checkpoint_omits_the_backbone_and_checks_it(tiny_clip: CLIPBackbone) -> None:
    method = Toy(tiny_clip)
    checkpoint: dict[str, Any] = {"state_dict": method.state_dict()}
    assert len(checkpoint["state_dict"]) > 1
    method.on_save_checkpoint(checkpoint)
    assert list(checkpoint["state_dict"]) == ["offset"]
    assert checkpoint["backbone"]["sha256"] == tiny_clip.identity
    method.on_load_checkpoint(checkpoint)
    method.load_state_dict(checkpoint["state_dict"], strict=True)
    checkpoint["backbone"]["sha256"] = "other"
    with pytest.raises(
        ValueError, match=r"sha256 other.*, but the current backbone is .*: use the backbone"
    ):
        method.on_load_checkpoint(checkpoint)


@pytest.mark.parametrize("stage", ["validate", "test", "predict", "fit"])
def test_a_transductive_method_may_see_all_images_first(
    stage: str, tiny_clip: CLIPBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It sees the batches of the evaluation that follows; by default, none is loaded for it."""
    seen: list[int] = []

    class Watching(Toy):
        transductive = True

        def observe(self, batches: Iterable[Batch]) -> None:
            seen.extend(index for batch in batches for index in batch["index"].tolist())

    data = Demo(
        categories=["steel nut"],
        num_test=4,
        num_train=2,
        picture_size=64,
        image_size=tiny_clip.image_size,
        batch_size=3,
        num_workers=0,
        val_split="test" if stage in ("fit", "validate") else "none",
    )
    limits: Any = {"limit_val_batches": 1} if stage == "validate" else {"max_epochs": 1}
    trainer = quiet_trainer(num_sanity_val_steps=0, **limits)
    getattr(trainer, stage)(Watching(tiny_clip), datamodule=data)
    assert Watching(tiny_clip).recorded_protocol() == {"transductive": True}  # marks its tables
    assert "transductive" not in Toy(tiny_clip).recorded_protocol()
    assert seen == ([0, 1, 2] if stage == "validate" else [0, 1, 2, 3])
    monkeypatch.setattr(Watching, "observe", AnomalyMethod.observe)
    monkeypatch.setattr(base, "islice", None)  # loads batches
    if stage == "test":
        trainer.test(Watching(tiny_clip), datamodule=data)


def test_a_method_without_cached_features_raises(tiny_clip: CLIPBackbone) -> None:
    with pytest.raises(NotImplementedError, match="Toy has no cached features to score"):
        Toy(tiny_clip).score_features({}, ["a"])
    assert Toy(tiny_clip).configure_callbacks() == []
    assert Toy(tiny_clip).words("metal_nut") == "metal_nut"
    assert Toy(tiny_clip).dataset_name is None
