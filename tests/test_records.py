from __future__ import annotations

from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule

import anomaly_clip
from anomaly_clip import methods, records
from anomaly_clip.backbones.clip import CLIPBackbone
from anomaly_clip.backbones.cnn import CNNBackbone, CNNSettings
from anomaly_clip.methods import AnomalyMethod
from anomaly_clip.methods.regad import PixelCNNSettings
from anomaly_clip.records import Draw, HasLoaderNeeds, LoaderNeeds, needs_of, versions

RANDOM = CNNSettings("resnet18", "random")

VIT = {"name": "test_vit", "weights": "random"}

NEEDS: dict[str, tuple[dict[str, Any], LoaderNeeds]] = {
    "APRILGAN": ({}, LoaderNeeds(32, category_names=True, is_fitted=True, shots="references")),
    "AnomalyCLIP": ({}, LoaderNeeds(32, is_fitted=True, shots="none")),
    "AnomalyDINO": ({"image_size": 64}, LoaderNeeds(64, single_pass=True, is_fitted=True)),
    "BatchedAnomalyDINO": ({"image_size": 64}, LoaderNeeds(64, shots="none")),
    "BatchedSubspaceAD": ({"image_size": 64}, LoaderNeeds(64, shots="none")),
    "CLIPADA": ({"feature_layer": 2}, LoaderNeeds(32, is_fitted=True)),
    "Contrastive": ({"windows": {16: 0.7}}, LoaderNeeds(32, whole_epochs=True)),
    "LinearProbe": ({"image_size": 64}, LoaderNeeds(64)),
    "MuSc": ({}, LoaderNeeds(32, shots="none")),
    "PaDiM": ({"image_size": 64}, LoaderNeeds(64, single_pass=True, is_fitted=True)),
    "PatchCore": ({"image_size": 64}, LoaderNeeds(64, single_pass=True, is_fitted=True)),
    "RD4AD": ({"image_size": 64}, LoaderNeeds(64, is_fitted=True)),
    "RegAD": (
        {"image_size": 64, "shots": 3, "rounds": 5},
        LoaderNeeds(64, support_images=3, test_passes=5, is_fitted=True),
    ),
    "SDP": ({}, LoaderNeeds(32, category_names=True, shots="none")),
    "SDPPlus": ({}, LoaderNeeds(32, category_names=True, is_fitted=True, shots="none")),
    "SimpleNet": ({"image_size": 64}, LoaderNeeds(64, is_fitted=True)),
    "SubspaceAD": ({"image_size": 64}, LoaderNeeds(64, single_pass=True, is_fitted=True)),
    "TAB": ({"image_size": 64}, LoaderNeeds(64, full_batches=True)),
    "WinCLIP": ({}, LoaderNeeds(32, category_names=True, shots="references")),
}
"""Options of a small model of each method, and its requirements on the loaders."""


@pytest.fixture(scope="module")
def cnn() -> CNNBackbone:
    layers = ["layer1", "layer2", "layer3"]
    return CNNBackbone.of(CNNSettings("resnet18", "random", layers))


def make(name: str, clip: CLIPBackbone, cnn: CNNBackbone) -> LightningModule:
    backbones: dict[str, Any] = dict.fromkeys(("PaDiM", "PatchCore", "RD4AD", "SimpleNet"), cnn)
    backbones |= dict.fromkeys(("LinearProbe", "TAB"), RANDOM)
    backbones |= {name: VIT for name in NEEDS if name.endswith(("AnomalyDINO", "SubspaceAD"))}
    backbones["RegAD"] = CNNBackbone.of(PixelCNNSettings(weights="random"))
    # A copy, because training a CLIP changes the given network.
    backbone = backbones.get(name) or deepcopy(clip)
    method: LightningModule = getattr(methods, name)(backbone, **NEEDS[name][0])
    return method


def trainer_of(module: object) -> Any:
    return SimpleNamespace(lightning_module=module)


@pytest.mark.parametrize("name", sorted(set(methods.__all__) - {"AnomalyMethod"}))
def test_the_loader_needs_of_each_method(
    name: str, tiny_clip: CLIPBackbone, cnn: CNNBackbone
) -> None:
    method = make(name, tiny_clip, cnn)
    assert isinstance(method, HasLoaderNeeds)
    assert needs_of(trainer_of(method)) == method.loader_needs == NEEDS[name][1]


def test_a_trained_probe_needs_full_batches() -> None:
    probe = methods.LinearProbe(RANDOM, image_size=64, frozen=False)
    assert probe.loader_needs == LoaderNeeds(64, full_batches=True)


def test_a_foreign_module_has_the_default_needs() -> None:
    assert needs_of(None) == needs_of(trainer_of(None)) == LoaderNeeds()
    assert needs_of(trainer_of(LightningModule())) == LoaderNeeds()
    assert LoaderNeeds() == LoaderNeeds(
        image_size=None, single_pass=False, support_images=0, full_batches=False, test_passes=1
    )


def test_a_foreign_module_may_declare_needs() -> None:
    class Foreign(LightningModule):
        loader_needs = LoaderNeeds(48, test_passes=2)

    assert not issubclass(Foreign, AnomalyMethod)
    assert needs_of(trainer_of(Foreign())).image_size == 48


def test_a_draw_is_a_pair_of_epoch_and_index() -> None:
    draw = Draw(3, 7)
    assert (draw.epoch, draw.index) == (3, 7) == tuple(draw)


def test_versions_name_all_packages_that_metrics_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = versions()
    assert list(installed) == ["python", *records.PACKAGES]
    assert torch.__version__.startswith(installed["torch"].partition("+")[0])
    assert installed["anomaly_clip"] == anomaly_clip.__version__
    monkeypatch.setattr(records, "PACKAGES", ("no-such-package-anywhere",))
    assert versions()["no-such-package-anywhere"] == "not installed as a package"
