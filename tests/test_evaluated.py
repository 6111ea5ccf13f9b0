from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule

from anomaly_clip import methods
from anomaly_clip.data import MVTecAD
from anomaly_clip.methods.evaluated import (
    EvaluatedModule,
    Exporter,
    FeatureSource,
    check_backbone,
    data_module,
    frozen_dtype,
    without_backbone,
)
from anomaly_clip.records import LoaderNeeds, WeightsRecord


@pytest.mark.parametrize(
    ("precision", "device", "expected"),
    [
        ("32-true", "cuda", None),
        ("bf16-true", "cuda", None),
        ("bf16-mixed", "cuda", torch.bfloat16),
        ("16-mixed", "cuda", torch.float16),
    ],
)
def test_frozen_dtype(precision: str, device: str, expected: torch.dtype | None) -> None:
    assert frozen_dtype(precision, torch.device(device)) == expected


@pytest.mark.parametrize("supported", [True, False])
def test_frozen_dtype_on_a_cpu(supported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    if supported:
        assert frozen_dtype("16-mixed", torch.device("cpu")) == torch.bfloat16
    else:
        with pytest.warns(UserWarning, match="stays in float32"):
            assert frozen_dtype("bf16-mixed", torch.device("cpu")) is None


class Plain(EvaluatedModule):
    """The smallest module that a run can test."""

    must_be_fitted = False
    can_be_fitted = False
    is_detector = False

    def __init__(self, pretrained: str = "openai") -> None:
        super().__init__()
        self.pretrained = pretrained
        self.logged: dict[str, Any] = {}

    @property
    def weights(self) -> WeightsRecord:
        random = self.pretrained == "random"
        return WeightsRecord(
            backbone="RN50", pretrained=self.pretrained, random=random, sha256=None
        )

    @property
    def loader_needs(self) -> LoaderNeeds:
        return LoaderNeeds()

    def image_rows(self, outputs: Any, batch: Any) -> list[dict[str, Any]]:
        return []

    def log_dict(self, dictionary: Any, **options: Any) -> None:  # type: ignore[override]
        self.logged = dict(dictionary)


def test_defaults_of_an_evaluated_module(tmp_path: Path) -> None:
    module = Plain()
    module.write_extras(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert (module.final_scores(), module.protocol(), module.confusion) == ({}, {}, None)
    assert module.evaluation_protocol() == {"fitted": True}
    assert (module.evaluation_note, module.results, module.reference_paths) == ("", None, {})
    assert not isinstance(module, (Exporter, FeatureSource))


@pytest.mark.parametrize(
    ("pretrained", "more"), [("openai", {}), ("random", {"val/random_weights": 1.0})]
)
def test_defined_metrics_are_logged_and_random_weights_are_marked(
    pretrained: str, more: dict[str, float]
) -> None:
    module = Plain(pretrained)
    module.log_metrics("val", {"image_ap": 0.25, "pixel_ap": None, "pixel_pro": 0.0})
    assert module.logged == {"val/image_ap": 0.25, "val/pixel_pro": 0.0, **more}


def test_a_data_module_is_identified_by_its_methods(mvtec_root: Path) -> None:
    module = Plain()
    assert module.data is None  # there is no trainer
    ours: Any = MVTecAD(str(mvtec_root))
    for data, expected in ((None, None), (LightningDataModule(), None), (ours, ours)):
        module._trainer = SimpleNamespace(datamodule=data)  # type: ignore[assignment]
        assert data_module(module) is expected
        assert module.data is expected


def test_a_state_omits_the_frozen_backbone() -> None:
    zeros, ones = torch.zeros(1), torch.ones(1)
    state = {"backbone.a": zeros, "head.backbone.a": ones, "backbones": zeros, "backbone.b.c": ones}
    assert without_backbone(state) == {"head.backbone.a": ones, "backbones": zeros}


def test_another_backbone_is_named() -> None:
    saved = {"backbone": "ViT-L-14", "pretrained": "openai"}
    check_backbone(saved, "abc", Plain().weights, "abc")
    with pytest.raises(ValueError, match=r"ViT-L-14 \(weights openai, .* RN50 \(weights random"):
        check_backbone(saved, "abc", Plain("random").weights, "xyz")
    with pytest.raises(ValueError, match=r"with None \(weights None, .* RN50 \(weights openai"):
        check_backbone({}, None, Plain().weights, "xyz")


MAY_DIFFER = {
    "APRILGAN": {"evaluator", "feature_cache_gb", "linear_layers", "memory_layers"},
    "AnomalyCLIP": {"evaluator", "feature_cache_gb", "inference", "prompts_file", "sigma"},
    "AnomalyDINO": {
        "evaluator",
        "mask_shape",
        "mask_threshold",
        "masks",
        "num_neighbours",
        "sigma",
    },
    "BatchedAnomalyDINO": {"evaluator"},
    "BatchedSubspaceAD": {"evaluator"},
    "CLIPADA": {"evaluator", "loss", "map"},
    "LinearProbe": {"cache_features"},
    "MuSc": {"evaluator"},
    "PaDiM": {"blur_border", "evaluator", "sigma"},
    "PatchCore": {"blur_border", "evaluator", "num_neighbours", "sigma", "upsampling"},
    "RD4AD": {"amap_mode", "evaluator", "sigma"},
    "RegAD": {"evaluator", "regularization", "rounds", "sigma"},
    "SDP": {"evaluator"},
    "SDPPlus": {"evaluator", "feature_cache_gb", "linear_layers", "sigma"},
    "SimpleNet": {"evaluator", "sigma"},
    "SubspaceAD": {"distance", "evaluator"},
    "WinCLIP": {"evaluator"},
}
"""Arguments that affect no weight and may therefore differ between fit and test."""


@pytest.mark.parametrize("name", sorted(set(methods.__all__) - {"AnomalyMethod"}))
def test_arguments_that_affect_no_weight(name: str) -> None:
    kind = getattr(methods, name)
    if not issubclass(kind, EvaluatedModule):
        assert name not in MAY_DIFFER
        return
    assert set(kind.inference_arguments) == MAY_DIFFER[name]
    arguments = set(inspect.signature(kind.__init__).parameters)
    assert kind.inference_arguments | kind.init_only_arguments <= arguments
    files = {"APRILGAN": "linear_layers", "AnomalyCLIP": "prompts_file", "SDPPlus": "linear_layers"}
    assert kind.init_only_arguments == ({files[name]} if name in files else set())
