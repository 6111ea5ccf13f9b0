from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import WORDS, Outputs, quiet_trainer

from anomaly_clip.backbones.clip import CLIPBackbone
from anomaly_clip.backbones.prompts import RVSSettings
from anomaly_clip.data import MVTecAD
from anomaly_clip.methods import SDP


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
    with pytest.raises(ValueError, match="SDP: test needs a data module"):
        quiet_trainer().test(tiny(tiny_clip), loader, verbose=False)
