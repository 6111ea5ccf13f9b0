from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import quiet_trainer
from regad_runs import ONE, one_thread, pixel_cnn, three_categories, trained_regad, words

from anomaly_clip.backbones.cnn import CNNBackbone
from anomaly_clip.cli import main
from anomaly_clip.data import ImageFolder, MVTecAD
from anomaly_clip.methods import RegAD


@pytest.fixture
def three(mvtec_root: Path) -> Path:
    return three_categories(mvtec_root)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def backbone() -> CNNBackbone:
    return pixel_cnn()


@pytest.fixture(scope="module")
def method(backbone: CNNBackbone) -> RegAD:
    return trained_regad(backbone)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--data.train_categories", "same", *ONE), "set data.train_categories to others"),
        (("--data.train_categories", "[bottle, cable]", *ONE), "got 'bottle' for both"),
        ((), "none is left, because data.categories lists all"),
        (("--data.categories", "[bottle, cable]"), "RegAD is one model per category"),
        ((*ONE, "--model.shots", "9"), "category 'bottle' has 4 normal training images"),
        ((*ONE, "--data.shots", "2"), "leave out data.shots and data.fraction"),
        ((*ONE, "--data.fraction", "0.5"), "leave out data.shots and data.fraction"),
        ((*ONE, "--data.balanced", "true"), "data.balanced must be false for RegAD"),
        ((*ONE, "--data.image_size", "32"), "data.image_size 32 differs from the model's"),
        ((*ONE, "--model.image_size", "80"), "must be a multiple of 32, 64 or more, got 80"),
        ((*ONE, "--model.image_size", "32"), "must be a multiple of 32, 64 or more, got 32"),
        ((*ONE, "--model.image_size", "8"), "model.image_size must be 32 or more"),
        ((*ONE, "--model.shots", "0"), "model.shots must be 1 or more, got 0"),
        ((*ONE, "--model.rounds", "0"), "model.rounds must be 1 or more, got 0"),
        ((*ONE, "--model.lr", "0"), "model.lr must be above 0"),
        ((*ONE, "--model.momentum", "1"), r"model.momentum must be in \[0, 1\)"),
        ((*ONE, "--model.sigma", "-1"), "model.sigma must be 0 or more"),
        ((*ONE, "--model.regularization", "0"), "model.regularization must be above 0"),
        ((*ONE, "--model.backbone.name", "squeezenet1_1"), "must be a ResNet for RegAD"),
        ((*ONE, "--model.backbone.layers", "[layer4]"), "must name spatial layers of the backbone"),
        ((*ONE, "--model.select", "best_test"), "set data.val_split to test"),
        ((*ONE, "--data.synthesis.recipe", "perlin"), "on normal images only: leave out data.syn"),
        ((*ONE, "--trainer.max_epochs", "-1"), "set trainer.max_epochs to 1 or more"),
        (
            (*ONE, "--data.val_split", "synthetic", "--data.synthesis.recipe", "perlin",
             "--data.synthesis.share", "0", "--data.val_share", "0.5"),
            "set data.val_split to none or test",
        ),
    ],
)  # fmt: skip
def test_unsupported_options_are_refused(
    three: Path,
    tmp_path: Path,
    more: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(words("fit", three, tmp_path / "runs", *more)) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not list((tmp_path / "runs").glob("*/*"))


def test_small_data_sets_are_refused(
    three: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("0", "1", "2"):
        (three / "cable" / "train" / "good" / f"{name}.png").unlink()
    assert main(words("fit", three, tmp_path / "runs", *ONE)) == 2
    assert "category 'cable' has 1 normal training image" in capsys.readouterr().err
    for name in ("cable", "metal_nut"):
        (three / name).rename(tmp_path / name)
    assert main(words("fit", three, tmp_path / "runs", *ONE)) == 2
    message = capsys.readouterr().err
    assert "none is left" in message
    assert "add others to" in message
    assert not list((tmp_path / "runs").glob("*/*"))


def test_nothing_is_tested_before_a_fit(
    three: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], backbone: CNNBackbone
) -> None:
    assert main(words("test", three, tmp_path, *ONE)) == 2
    assert "RegAD must be fitted first" in capsys.readouterr().err
    data = MVTecAD(str(three), categories=["bottle"], num_workers=0)
    with pytest.raises(ValueError, match="RegAD must be fitted first"):
        quiet_trainer().test(RegAD(backbone, image_size=64), data, verbose=False)


def test_references_are_not_among_the_test_images(three: Path, method: RegAD) -> None:
    for number in range(4):
        [*_, train] = sorted((three / "cable" / "train" / "good").iterdir())
        train.rename(three / "cable" / "test" / "good" / f"9{number}.png")
        copy = three / "cable" / "train" / "good" / f"a{number}.png"
        copy.write_bytes((three / "cable" / "test" / "good" / f"9{number}.png").read_bytes())
    data = MVTecAD(str(three), categories=["cable"], image_size=64, num_workers=0)
    with pytest.raises(ValueError, match="are among the reference images, such as"):
        method.take_references(data, "cable")
    folder = ImageFolder(str(three / "cable" / "test" / "good"), "cable", image_size=64)
    with pytest.raises(ValueError, match="has no train images to use as references"):
        folder.references("x", 2)


def test_batches_without_support_are_refused(method: RegAD) -> None:
    batch: Any = {"image": torch.zeros(2, 3, 64, 64, dtype=torch.uint8), "category": ["a", "a"]}
    with pytest.raises(ValueError, match="with support images, got a batch of image, category"):
        method.training_step(batch, 0)


@pytest.mark.slow
def test_a_training_category_is_not_tested(
    three: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words("fit", three, tmp_path / "f", *ONE)) == 0
    [checkpoint] = (tmp_path / "f").glob("RegAD/1-fit/checkpoints/last.ckpt")
    trained = torch.load(checkpoint, weights_only=True)["trained_on"]["categories"]
    assert "bottle" not in trained
    line = ["test", "--ckpt_path", str(checkpoint), "--output.root", str(tmp_path / "t")]
    capsys.readouterr()
    assert main([*line, "--data.categories", f"[{trained[0]}]"]) == 2
    assert f"RegAD must be tested on a category that it was not trained on, got {trained[0]!r}" in (
        capsys.readouterr().err
    )
    assert not list((tmp_path / "t").rglob("metrics.json"))


def test_a_diverged_training_ends_in_an_error_message(
    three: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words("fit", three, tmp_path, *ONE, "--model.lr", "1e30")) == 2
    assert "RegAD diverged" in capsys.readouterr().err
