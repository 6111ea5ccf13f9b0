"""MuSc with a trainer from Python: data modules, and loaders in any order."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, Subset

from anomaly_clip.backbones.cnn import CNNSettings
from anomaly_clip.data import Demo
from anomaly_clip.methods import MuSc

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def method() -> MuSc:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = CNNSettings("mobilenet_v3_small", "random")
        return MuSc(settings, ["features.1", "features.2"], r_list=[1], image_size=64)


@pytest.fixture
def data() -> Demo:
    return Demo(
        categories=["steel nut", "red capsule"],
        image_size=64,
        picture_size=64,
        num_test=4,
        num_workers=0,
        batch_size=3,
    )


def trainer() -> Trainer:
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )


def shuffled(data: Demo) -> DataLoader[Any]:
    dataset = data.dataset("test")
    order = list(range(len(dataset)))
    random.Random(0).shuffle(order)
    return DataLoader(Subset(dataset, order), batch_size=3)


def test_a_loader_may_mix_categories(method: MuSc, data: Demo) -> None:
    """Scores by index are those of the data module, whose batches are in the listing's order."""
    listed: Any = trainer().predict(method, data)
    expected = torch.cat([scores["image_score"] for scores in listed])
    loader = shuffled(data)
    mixed: Any = trainer().predict(method, loader)
    index = torch.cat([batch["index"] for batch in loader])
    actual = torch.cat([scores["image_score"] for scores in mixed])
    assert index.tolist() != sorted(index.tolist())
    assert len(set(expected.tolist())) > 4
    torch.testing.assert_close(actual, expected[index], atol=1e-5, rtol=0)


def test_a_data_module_lists_categories_one_after_the_other(method: MuSc, data: Demo) -> None:
    """A loader in another order would be scored in parts, which changes the scores."""
    same = trainer()
    same.predict(method, data)
    with pytest.raises(ValueError, match="follow those of another category: give MuSc the images"):
        same.predict(method, shuffled(data))


def test_a_test_of_a_sequence_keeps_no_features(data: Demo) -> None:
    """A category is scored once; the features of all would fill the memory."""
    torch.manual_seed(0)
    settings = CNNSettings("mobilenet_v3_small", "random")
    online = MuSc(settings, ["features.1"], r_list=[1], image_size=64, scoring="online")
    trainer().test(online, data, verbose=False)
    assert len(online._scored) == len(data.dataset("test"))
    assert online._seen == {}
