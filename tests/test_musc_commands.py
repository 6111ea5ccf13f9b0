"""MuSc on the command line, in several processes, and as a detector from Python."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers import SMALL_CLIP, quiet_trainer
from PIL import Image

from anomaly_clip import load
from anomaly_clip.backbones.clip import CLIPSettings
from anomaly_clip.cli import main
from anomaly_clip.data import MVTecAD
from anomaly_clip.methods import MuSc, musc_encoder
from anomaly_clip.testing.images import NAMES, write_images
from anomaly_clip.testing.processes import run_command
from anomaly_clip.testing.run_files import image_scores, read_scores

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*has random weights.*")]

COUNT = 4
"""Normal, and defective, test images of each category."""
CNN = ["--model.backbone.name=mobilenet_v3_small", "--model.backbone.weights=random"]
CNN += ["--model.image_size=64", "--model.layers=[features.1,features.2]"]
ONLINE = ["--model.scoring=online", "--model.start=3", "--model.memory=4"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write two categories with eight test images each."""
    return write_images(tmp_path_factory.mktemp("data") / "images", num_train=1, num_test=COUNT)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the options of a small CLIP."""
    file = tmp_path_factory.mktemp("model") / "clip.json"
    file.write_text(json.dumps(SMALL_CLIP))
    return [f"--model.backbone.name={file}", "--model.backbone.pretrained=random"]


def line(verb: str, root: Path, folder: Path, *more: str) -> list[str]:
    words = [verb, "--model=MuSc", "--data=MVTecAD", f"--data.root={root}", "--data.num_workers=0"]
    words += ["--data.batch_size=3", "--trainer.accelerator=cpu", "--output.page=false"]
    return [*words, f"--output.folder={folder}", *more]


def run(words: Sequence[str]) -> Path:
    """Run a command and return the folder of its run."""
    assert main(list(words)) == 0
    [option] = (word for word in words if word.startswith("--output.folder="))
    return Path(option.partition("=")[2])


def refused(words: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that is refused, and return its only sentence."""
    capsys.readouterr()
    assert main(list(words)) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err.strip().splitlines()[-1]


def metrics(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return content


def by_name(folder: Path) -> dict[str, float]:
    """Return the scores of all images that could be read."""
    rows = [row for row in read_scores(folder) if row["image_score"]]
    return {"/".join(Path(row["path"]).parts[-4:]): float(row["image_score"]) for row in rows}


def folder_of(root: Path, to: Path, count: int) -> Path:
    """Copy the first test images of a category into a flat folder."""
    to.mkdir()
    files = sorted((root / NAMES[0] / "test").glob("*/*.png"))
    for number, file in enumerate(files[:count]):
        shutil.copy(file, to / f"{number}.png")
    return to


def predict(images: Path, folder: Path, *more: str) -> list[str]:
    words = ["predict", "--model=MuSc", "--data=ImageFolder", f"--data.root={images}"]
    words += ["--data.num_workers=0", "--trainer.accelerator=cpu", "--output.page=false"]
    return [*words, f"--output.folder={folder}", *more]


# -- test and validate -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["clip", "cnn"])
def test_the_protocol_is_recorded(root: Path, clip: list[str], kind: str, tmp_path: Path) -> None:
    model = clip if kind == "clip" else CNN
    content = metrics(run(line("test", root, tmp_path / "run", *model, "--model.r_list=[1,3]")))
    protocol = content["run"]["protocol"]
    assert protocol["transductive"] is True
    assert protocol["scoring"] == "batch"
    assert protocol["r_list"] == [1, 3]
    assert protocol["interval"] == [0, 0.3]
    assert protocol["k_list"] == [1, 2, 3]
    assert protocol["grid"] is None
    assert protocol["images"] == dict.fromkeys(NAMES, 2 * COUNT)
    assert protocol["layers"] == ([1, 2, 3, 4] if kind == "clip" else ["features.1", "features.2"])
    assert protocol["fitted"] is False
    assert "memory" not in protocol
    assert content["run"]["weights"]["random"] is True
    assert all(value is not None for value in content["mean"].values())


def test_the_protocol_of_a_sequence(root: Path, clip: list[str], tmp_path: Path) -> None:
    more = [*clip, *ONLINE, "--model.order_seed=5"]
    protocol = metrics(run(line("test", root, tmp_path / "run", *more)))["run"]["protocol"]
    assert protocol["scoring"] == "online"
    assert (protocol["memory"], protocol["start"], protocol["order_seed"]) == (4, 3, 5)
    other = run(line("test", root, tmp_path / "other", *clip, *ONLINE))
    assert by_name(other) != by_name(tmp_path / "run")  # another order


@pytest.mark.parametrize("more", [[], ONLINE])
def test_categories_are_scored_apart(
    root: Path, clip: list[str], more: list[str], tmp_path: Path
) -> None:
    together = by_name(run(line("test", root, tmp_path / "all", *clip, *more)))
    apart: dict[str, float] = {}
    for name in NAMES:
        options = [*clip, *more, f"--data.categories=[{name}]"]
        apart |= by_name(run(line("test", root, tmp_path / name, *options)))
    assert together == pytest.approx(apart, abs=1e-6)
    assert len(together) == 4 * COUNT


def test_a_limit_leaves_the_first_images(root: Path, clip: list[str], tmp_path: Path) -> None:
    options = [*clip, "--data.batch_size=2", "--trainer.limit_test_batches=1"]
    options += [f"--data.categories=[{NAMES[0]}]"]
    folder = run(line("test", root, tmp_path / "run", *options))
    assert len(read_scores(folder)) == 2
    assert metrics(folder)["run"]["protocol"]["images"] == {NAMES[0]: 2}


def test_a_limit_of_one_image_is_refused(
    root: Path, clip: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*clip, "--data.batch_size=1", "--trainer.limit_test_batches=1"]
    sentence = refused(line("test", root, tmp_path / "run", *options), capsys)
    assert "compares the images of a category with each other" in sentence
    assert "has 1: give at least 2" in sentence


def test_validate_scores_as_test(root: Path, clip: list[str], tmp_path: Path) -> None:
    words = line("validate", root, tmp_path / "validate", *clip, "--data.val_split=test")
    assert main(words) == 0
    name = clip[0].partition("=")[2]
    method = MuSc(CLIPSettings(name, "random"))
    data = MVTecAD(str(root), num_workers=0, val_split="test", batch_size=3)
    results = []
    for verb in ("validate", "test"):
        getattr(quiet_trainer(), verb)(method, data, verbose=False)
        assert method.results is not None
        results.append(method.results["mean"])
    assert results[0] == results[1]


def test_intervals_keep_their_type(clip: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for text, expected in (("[0, 1.0]", [0, 1.0]), ("[0, 1]", [0, 1]), ("[0.2, 7]", [0.2, 7])):
        words = ["test", "--model=MuSc", *clip, f"--model.interval={text}", "--data=MVTecAD"]
        capsys.readouterr()
        assert main([*words, "--data.root=nowhere", "--print_config"]) == 0
        interval = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["interval"]
        assert interval == expected
        assert [type(bound) for bound in interval] == [type(bound) for bound in expected]


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--model.r_list=[1,2]", "a neighbourhood of 2 patches"),
        ("--model.interval=[0.3,0.3]", "is empty"),
        ("--model.layers=[5]", "number of blocks"),
        ("--model.k_list=[]", "model.k_list"),
        ("--model.start=1", "model.start"),
        ("--model.memory=0", "model.memory"),
        ("--model.grid=0", "model.grid"),
        ("--model.image_size=65", "image_size 65"),
        ("--model.r_list=[]", "model.r_list"),
        ("--model.backbone.name=resnet18", "backbone.name resnet18 is a CNN"),
        (
            "--model.backbone.weights=random",
            "backbone.pretrained does not go with name and weights",
        ),
        ("--output.masks=true", "output.masks needs a threshold, but MuSc scores images by each"),
        ("--output.fdr=0.1", "output.fdr needs a threshold"),
    ],
)
def test_wrong_settings_are_refused(
    root: Path,
    clip: list[str],
    option: str,
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert words in refused(line("test", root, tmp_path / "run", *clip, option), capsys)
    assert not (tmp_path / "run").exists()


def test_a_file_with_options_of_both_kinds_of_backbone(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backbone = {"name": "resnet18", "weights": "random", "image_size": 64}
    model = {"class_path": "MuSc", "init_args": {"backbone": backbone}}
    (tmp_path / "both.yaml").write_text(yaml.safe_dump({"model": model}))
    words = line("test", root, tmp_path / "run")
    words = [word for word in words if not word.startswith("--model")]
    sentence = refused([*words, f"--config={tmp_path / 'both.yaml'}"], capsys)
    assert "model.backbone: image_size and weights do not go together" in sentence


@pytest.mark.parametrize("verb", ["fit", "calibrate", "export"])
def test_what_needs_a_fit_or_one_image_is_refused(
    root: Path, clip: list[str], verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = line(verb, root, tmp_path / "run", *clip)
    if verb == "export":
        run(line("test", root, tmp_path / "tested", *clip))
        words = ["export", str(tmp_path / "tested"), "--folder", str(tmp_path / "run")]
    sentence = refused(words, capsys)
    assert "MuSc" in sentence
    assert not (tmp_path / "run").exists()


# -- predict ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [[], ONLINE])
@pytest.mark.parametrize("kind", ["clip", "cnn"])
def test_a_detector_scores_as_predict(
    root: Path, clip: list[str], kind: str, more: list[str], tmp_path: Path
) -> None:
    model = clip if kind == "clip" else CNN
    images = folder_of(root, tmp_path / "new", 7)
    folder = run(predict(images, tmp_path / "run", *model, *more))
    detector = load(folder, device="cpu")
    predictions = detector.predict(images)
    assert [p.score for p in predictions] == pytest.approx(list(image_scores(folder)), abs=1e-5)
    paths = [str(path) for path in sorted(images.iterdir())]
    if not more:
        assert [p.score for p in detector.predict(paths[::-1], batch_size=2)] == pytest.approx(
            [p.score for p in predictions[::-1]], abs=1e-5
        )
        arrays = [np.array(Image.open(path)) for path in paths]
        again = [p.score for p in detector.predict(arrays)]
        assert again == pytest.approx([p.score for p in predictions], abs=1e-5)


def test_one_image_is_refused(
    root: Path, clip: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = folder_of(root, tmp_path / "one", 1)
    sentence = refused(predict(images, tmp_path / "run", *clip), capsys)
    assert "has 1: give at least 2, better 20, images of the same thing" in sentence
    folder = run(predict(folder_of(root, tmp_path / "two", 2), tmp_path / "run2", *clip))
    detector = load(folder, device="cpu")
    [file] = images.iterdir()
    for image in (file, Image.open(file), [file], images):
        with pytest.raises(ValueError, match="has 1: give at least 2"):
            detector.predict(image)
    assert len(detector.predict([file, file])) == 2  # and the detector still works


def test_an_unreadable_image_does_not_matter(root: Path, clip: list[str], tmp_path: Path) -> None:
    images = folder_of(root, tmp_path / "new", 5)
    whole = by_name(run(predict(images, tmp_path / "whole", *clip)))
    (images / "2a.png").write_bytes(b"\x89PNG\r\n\x1a\n123")
    for size in (1, 4):
        words = predict(images, tmp_path / f"run{size}", *clip, f"--data.batch_size={size}")
        assert main(words) == 1  # an image could not be read
        scores = by_name(tmp_path / f"run{size}")
        assert scores == pytest.approx(whole, abs=1e-6)
    detector = load(tmp_path / "whole", device="cpu")
    predictions = detector.predict(images)
    assert [p.error is None for p in predictions] == [True, True, True, False, True, True]
    scored = [p.score for p in predictions if p.error is None]
    assert scored == pytest.approx(list(whole.values()), abs=1e-5)


def test_several_threads_score_as_one(root: Path, clip: list[str], tmp_path: Path) -> None:
    images = folder_of(root, tmp_path / "new", 6)
    detector = load(run(predict(images, tmp_path / "run", *clip)), device="cpu")
    paths = sorted(images.iterdir())
    groups = [paths, paths[:3], paths[3:], paths[1:5]] * 2
    expected = [[p.score for p in detector.predict(group)] for group in groups]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(detector.predict, groups))
    for result, scores in zip(results, expected, strict=True):
        assert [p.score for p in result] == pytest.approx(scores, abs=1e-6)


def test_a_detector_goes_on_with_its_sequence(root: Path, clip: list[str], tmp_path: Path) -> None:
    images = folder_of(root, tmp_path / "new", 8)
    folder = run(predict(images, tmp_path / "run", *clip, *ONLINE))
    expected = list(image_scores(folder))
    paths = sorted(images.iterdir())
    detector = load(folder, device="cpu")
    scores = [p.score for p in detector.predict(paths[:4])]
    scores += [p.score for p in detector.predict(paths[4:6])]
    scores += [detector.predict(path).score for path in paths[6:]]
    assert scores == pytest.approx(expected, abs=1e-5)


# -- feature cache ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["clip", "cnn"])
def test_cached_features_are_not_encoded_again(
    root: Path, clip: list[str], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = clip if kind == "clip" else CNN
    plain = run(line("test", root, tmp_path / "plain", *model))
    cached = [*model, "--model.feature_cache_gb=1", "--seed_everything=0"]
    first = run(line("test", root, tmp_path / "first", *cached))
    assert by_name(first) == pytest.approx(by_name(plain), abs=1e-5)
    monkeypatch.setattr(musc_encoder, "encode", lambda *_: pytest.fail("an image is encoded"))
    second = run(line("test", root, tmp_path / "second", *cached))
    assert by_name(second) == by_name(first)
    assert metrics(second)["mean"] == metrics(first)["mean"]
    other = [*cached, "--model.r_list=[1]", "--model.interval=[0,0.5]", *ONLINE]
    assert by_name(run(line("test", root, tmp_path / "other", *other))) != by_name(first)


def test_a_cache_that_is_too_small_is_refused(
    root: Path, clip: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = line("test", root, tmp_path / "run", *clip, "--model.feature_cache_gb=1e-5")
    assert "model.feature_cache_gb" in refused(words, capsys)


# -- several processes -----------------------------------------------------------------------------


@pytest.mark.parametrize("more", [[], ONLINE, ["--model.feature_cache_gb=1"]])
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_score_as_one(
    root: Path, clip: list[str], more: list[str], processes: int, tmp_path: Path
) -> None:
    data = tmp_path / "data"  # of the third category, a process has no image
    shutil.copytree(root, data)
    third = data / "zinc" / "test" / "good"
    third.mkdir(parents=True)
    shutil.copytree(root / NAMES[0] / "train", data / "zinc" / "train")
    for file in sorted((root / NAMES[0] / "test" / "good").iterdir())[:2]:
        shutil.copy(file, third)
    alone = run(line("test", data, tmp_path / "alone", *clip, *more))
    words = line("test", data, tmp_path / "several", *clip, *more)
    devices = ["--trainer.strategy=ddp", f"--trainer.devices={processes}"]
    done = run_command([*words, *devices], processes)
    assert done.returncode == 0, done.stderr[-2000:]
    assert by_name(tmp_path / "several") == pytest.approx(by_name(alone), abs=1e-6)
    first, second = (metrics(folder) for folder in (alone, tmp_path / "several"))
    assert second["mean"] == pytest.approx(first["mean"], abs=1e-6)
    assert second["run"]["protocol"]["images"] == first["run"]["protocol"]["images"]


def test_processes_predict_as_one(root: Path, clip: list[str], tmp_path: Path) -> None:
    images = folder_of(root, tmp_path / "new", 7)
    alone = run(predict(images, tmp_path / "alone", *clip))
    words = predict(images, tmp_path / "several", *clip, "--trainer.strategy=ddp")
    done = run_command([*words, "--trainer.devices=2"], 2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert by_name(tmp_path / "several") == pytest.approx(by_name(alone), abs=1e-6)


def test_one_image_is_refused_by_all_processes(root: Path, clip: list[str], tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(root, data)
    files = sorted((data / NAMES[1] / "test").glob("*/*.png"), reverse=True)  # a normal one last
    files = [*files[-1:], *files[:-1]]
    for file in files[1:]:
        file.unlink()
    shutil.rmtree(data / NAMES[1] / "ground_truth")
    words = line("test", data, tmp_path / "run", *clip, "--trainer.strategy=ddp")
    done = run_command([*words, "--trainer.devices=2"], 2)
    assert done.returncode == 2, done.stderr[-2000:]
    assert f"{NAMES[1]} has 1: give at least 2" in done.stderr
    assert "Traceback" not in done.stderr
