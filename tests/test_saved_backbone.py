"""The backbone of a checkpoint is built as saved, of any kind, with the settings of the user."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import write_mvtec

import anomaly_clip
from anomaly_clip.backbones.clip import CLIPBackbone, CLIPSettings
from anomaly_clip.backbones.cnn import CNNBackbone, CNNSettings
from anomaly_clip.backbones.vit import ViTBackbone
from anomaly_clip.cli import main
from anomaly_clip.commands.saved_backbone import changed_backbone, weights_option
from anomaly_clip.errors import UserError
from anomaly_clip.methods import SDP, MuSc, PaDiM, SubspaceAD

CLIP = {"name": "demo", "pretrained": "demo", "image_size": None}
CNN = {"name": "resnet18", "weights": "random", "layers": None, "mean": None, "std": None}
PATH = Path("a.ckpt")


def content(backbone: Any) -> dict[str, Any]:
    return {"hyper_parameters": {"backbone": backbone}}


@pytest.mark.parametrize(
    ("kind", "saved", "expected"),
    [
        (PaDiM, CLIP, CLIPSettings),
        (SubspaceAD, CLIP, CLIPSettings),
        (SubspaceAD, CNN, CNNSettings),
        (MuSc, CNN, CNNSettings),
        (PaDiM, CNN, None),
        (SDP, CLIP, None),
        (PaDiM, None, None),
    ],
)
def test_another_kind_than_the_default_is_given_as_settings(
    kind: Any, saved: Any, expected: Any
) -> None:
    changed = changed_backbone(kind, content(saved), None, PATH)
    assert list(changed) == ([] if expected is None else ["backbone"])
    assert expected is None or isinstance(changed["backbone"], expected)


def test_settings_of_the_user() -> None:
    changed = changed_backbone(PaDiM, content(CNN), {"weights": "a.pt"}, PATH)
    assert changed == {"backbone": {**CNN, "weights": "a.pt"}}
    clip = changed_backbone(PaDiM, content(CLIP), {"pretrained": "a.pt"}, PATH)["backbone"]
    assert (clip.name, clip.pretrained) == ("demo", "a.pt")
    with pytest.raises(UserError, match=r"backbone pretrainde: no such setting; there are name, p"):
        changed_backbone(PaDiM, content(CLIP), {"pretrainde": "a.pt"}, PATH)
    with pytest.raises(UserError, match=r"a\.ckpt: the backbone .* does not fit SDP \(backbone.no"):
        changed_backbone(SDP, content({"nothing": 1}), None, PATH)
    assert weights_option(content(CLIP)) == "pretrained"
    assert weights_option(content(CNN)) == "weights"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*has random weights")
@pytest.mark.parametrize(
    ("method", "backbone", "kind"),
    [
        ("PaDiM", ["--model.backbone.pretrained", "demo"], CLIPBackbone),
        ("SubspaceAD", ["--model.backbone.pretrained", "demo"], CLIPBackbone),
        ("SubspaceAD", ["--model.backbone.name", "resnet18"], CNNBackbone),
        ("PaDiM", ["--model.backbone.name", "test_vit"], ViTBackbone),
    ],
)
def test_a_fit_is_loaded(method: str, backbone: list[str], kind: Any, tmp_path: Path) -> None:
    root = write_mvtec(tmp_path)
    line = ["fit", "--model", method, *backbone, "--model.image_size", "80"]
    if "demo" not in backbone:
        line += ["--model.backbone.weights", "random"]
    line += ["--model.num_channels", "8"] if method == "PaDiM" else []
    line += ["--data", "MVTecAD", "--data.root", str(root), "--data.categories", "[bottle]"]
    line += ["--data.num_workers", "0", "--trainer.accelerator", "cpu"]
    assert main([*line, "--output.folder", str(tmp_path / "run")]) == 0
    detector = anomaly_clip.load(tmp_path / "run")
    assert isinstance(detector.method.backbone, kind)
    images = sorted((root / "bottle" / "test").glob("*/*"))
    assert len(detector.predict(images)) == len(images)
