"""``--ckpt_path``: folders, complete fits, and other images than those of the fit."""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import save_picture
from layouts import Maker

from anomaly_clip.backbones.clip import CLIPSettings
from anomaly_clip.backbones.learnable_prompt import LearnablePromptSettings
from anomaly_clip.cli import main
from anomaly_clip.commands.checkpoint_option import checkpoint_file, completed, last_of_runs
from anomaly_clip.errors import UserError
from anomaly_clip.methods import CLIPADA, PaDiM, RegAD
from anomaly_clip.methods.regad import PixelCNNSettings

LAST = "checkpoints/last.ckpt"


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def words(root: Path, method: str, *more: str) -> list[str]:
    line = ["--model", method, "--model.backbone.name", "squeezenet1_1", "--model.layers"]
    line += ["[features.4.cat]", "--model.backbone.weights", "random", "--model.image_size", "64"]
    line += ["--data", "MVTecAD", "--data.root", str(root), "--data.categories", "[bottle]"]
    line += ["--data.num_workers", "0", "--trainer.accelerator", "cpu", "--output.page=false"]
    line += ["--model.num_channels=4"] if method == "PaDiM" else []
    return [*line, "--trainer.enable_model_summary=false", *more]


def touch(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()


@pytest.mark.parametrize(
    ("files", "value", "chosen"),
    [
        (["run/checkpoints/last.ckpt", "run/checkpoints/best.ckpt"], "run", f"run/{LAST}"),
        (["run/checkpoints/best.ckpt"], "run", "run/checkpoints/best.ckpt"),
        (["run/checkpoints/last.ckpt"], "run/checkpoints", f"run/{LAST}"),
        (["run/last.ckpt", "run/b.ckpt"], "run/", "run/last.ckpt"),
        (["run/a.ckpt"], "run/a.ckpt", "run/a.ckpt"),
        (["run/finite-step-4.ckpt"], "run/finite-step-4.ckpt", "run/finite-step-4.ckpt"),
        (["run/finite-step-4.ckpt", "run/last.ckpt"], "run", "run/last.ckpt"),
        ([], "no_such", "no_such"),
    ],
)
def test_a_folder_stands_for_a_checkpoint(files: list[str], value: str, chosen: str) -> None:
    touch(*files)
    assert checkpoint_file(value) == chosen


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            ["run/checkpoints/a.ckpt", "run/checkpoints/b.ckpt"],
            "has several checkpoints: name one of checkpoints/a.ckpt, checkpoints/b.ckpt$",
        ),
        (
            [f"run/{name}/checkpoints/last.ckpt" for name in "abcdefg"],
            r"is not the folder of a single fit: name one of a/checkpoints.* and 2 more$",
        ),
        (
            ["run/checkpoints/finite-step-4.ckpt"],
            "is that of a fit that diverged: name one of checkpoints/finite-step-4.ckpt$",
        ),
        (["run/best.ckpt", "run/finite-step-4.ckpt"], "is that of a .* of best.ckpt, finite-step"),
        (["run/metrics.json"], r"has no checkpoint \(it has metrics.json\): give the folder of"),
        (["run/x/y"], r"has no checkpoint \(it has x\)"),
    ],
)
def test_a_folder_without_a_choice(files: list[str], message: str) -> None:
    touch(*files)
    with pytest.raises(UserError, match=f"^--ckpt_path run: the folder {message}"):
        checkpoint_file("run")


@pytest.mark.slow
def test_verbs_take_the_folder_of_a_run(
    mvtec_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *words(mvtec_root, "PaDiM")]) == 0
    assert main(["test", "--ckpt_path", "runs/PaDiM/1-fit", "--output.folder", "tested"]) == 0
    assert f"ckpt_path: runs/PaDiM/1-fit/{LAST}" in Path("tested/config-test.yaml").read_text()
    assert (
        main(["predict", *words(mvtec_root, "PaDiM"), "--ckpt_path=runs/PaDiM/1-fit/checkpoints"])
        == 0
    )
    assert main(["export", "--ckpt_path=runs/PaDiM/1-fit", "--format=torch_export"]) == 0
    assert Path("detector/detector.pt2").is_file()
    assert main(["test", "--ckpt_path", "runs/PaDiM"]) == 2
    assert "runs/PaDiM: the folder is not the folder of a single fit" in capsys.readouterr().err


def test_unfinished_files_are_no_checkpoints() -> None:
    touch("run/checkpoints/.last.0123abcd.tmp.ckpt", "run/checkpoints/a.ckpt")
    assert checkpoint_file("run") == "run/checkpoints/a.ckpt"
    Path("run/checkpoints/a.ckpt").unlink()
    with pytest.raises(UserError, match="has no checkpoint"):
        checkpoint_file("run")


@pytest.mark.parametrize("word", ["best", "hpc", "registry:my_model"])
def test_words_of_one_process(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["test", "--ckpt_path", word]) == 2
    assert main(["export", f"--ckpt_path={word}"]) == 2
    message = f"--ckpt_path {word}: a new command knows no checkpoint of this name: give a file"
    assert capsys.readouterr().err.count(message) == 2
    touch(word)  # a file of this name
    assert checkpoint_file(word) == word


RUNS = [f"runs/{name}/{LAST}" for name in ("a/2-fit", "a/10-fit", "b/1-fit")]


@pytest.mark.parametrize(
    ("verb", "name", "folder", "chosen"),
    [
        ("fit", "a", None, f"runs/a/10-fit/{LAST}"),  # numbers are not sorted as text
        ("test", "b", "null", f"runs/b/1-fit/{LAST}"),
        ("test", None, None, f"runs/a/2-fit/{LAST}"),  # the one written last
        ("fit", "a", "own", f"own/{LAST}"),
        ("test", "a", "own", f"own/{LAST}"),
        ("test", "a", "results", f"runs/a/10-fit/{LAST}"),
    ],
)
def test_last_is_the_newest_run(
    verb: str,
    name: str | None,
    folder: str | None,
    chosen: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    touch(*RUNS, f"own/{LAST}", "results/metrics.json", "runs/a/11-fit/metrics.json")
    touch("runs/a/12-fit/config-fit.yaml", "runs/a/x/checkpoints/last.ckpt")
    for age, file in enumerate(RUNS):
        os.utime(file, (-age, -age))
    assert last_of_runs(verb, "runs", name, folder) == chosen
    printed = " ".join(capsys.readouterr().err.split())
    assert f"--ckpt_path last: {chosen}" in printed
    assert ("(no checkpoint in 12-fit)" in printed) == (chosen == f"runs/a/10-fit/{LAST}")


@pytest.mark.parametrize(
    ("name", "folder", "message"),
    [
        ("c", None, "runs/c has no checkpoint of a fit: fit first"),
        ("c", "own", "own has no checkpoint of a fit"),
        (None, None, "runs has no checkpoint of a fit"),
    ],
)
def test_last_without_a_fit(name: str | None, folder: str | None, message: str) -> None:
    touch("runs/c/1-fit/config-fit.yaml", "runs/c/1-fit/checkpoints/.last.01234567.tmp.ckpt")
    with pytest.raises(UserError, match=f"^--ckpt_path last: {message}"):
        last_of_runs("fit", "runs", name, folder)


def test_last_of_each_is_refused() -> None:
    touch("runs/a/1-fit/checkpoints/last.ckpt", "runs/a/2-fit/bottle/checkpoints/last.ckpt")
    with pytest.raises(
        UserError, match=r"last \(runs/a/2-fit\): the folder is not the folder of a s"
    ):
        last_of_runs("fit", "runs", "a", None)


def test_last_of_a_fit_that_diverged_is_refused() -> None:
    touch(f"runs/a/1-fit/{LAST}", "runs/a/2-fit/checkpoints/finite-step-4.ckpt")
    with pytest.raises(
        UserError, match=r"last \(runs/a/2-fit\): the folder is that of a fit that div"
    ):
        last_of_runs("test", "runs", "a", None)


@pytest.mark.slow
def test_verbs_take_last(mvtec_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit = ["fit", *words(mvtec_root, "SimpleNet"), "--output.name=net"]
    assert main([*fit, "--ckpt_path=last"]) == 2
    assert "--ckpt_path last: runs/net has no checkpoint of a fit" in capsys.readouterr().err
    assert not Path("runs").exists()
    assert main([*fit, "--trainer.max_epochs=1"]) == 0
    assert main([*fit, "--trainer.max_epochs=2", "--ckpt_path=last"]) == 0
    assert torch.load(f"runs/net/2-fit/{LAST}", weights_only=True)["epoch"] == 2
    assert main(["test", "--ckpt_path", "last"]) == 0
    assert (
        f"ckpt_path: runs/net/2-fit/{LAST}" in Path("runs/net/3-test/config-test.yaml").read_text()
    )
    assert main(["predict", "--ckpt_path", "last", "--output.name=net"]) == 0
    assert main(["export", "--ckpt_path", "last", "--format", "torch_export"]) == 0
    printed = " ".join(capsys.readouterr().err.split())
    assert printed.count(f"--ckpt_path last: runs/net/2-fit/{LAST}") == 3
    assert Path("detector/detector.pt2").is_file()


@pytest.mark.parametrize("method", ["PaDiM", "PatchCore"])
def test_a_single_pass_is_not_resumed(
    method: str, mvtec_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit = ["fit", *words(mvtec_root, method)]
    assert main(fit) == 0
    save_picture(mvtec_root / "bottle" / "train" / "good" / "new.png")
    assert main([*fit, "--ckpt_path", f"runs/{method}/1"]) == 2
    path = f"runs/{method}/1-fit/{LAST}"
    message = f"--ckpt_path {path}: {method} is fitted in a single pass, which cannot be"
    assert message in capsys.readouterr().err
    assert not Path(f"runs/{method}/2-fit").exists()


def test_no_fit_resumes_from_weights_alone(
    mvtec_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit = ["fit", *words(mvtec_root, "SimpleNet")]
    callback = [
        "--trainer.callbacks+=ModelCheckpoint",
        "--trainer.callbacks.save_weights_only=true",
    ]
    assert main([*fit, "--trainer.max_epochs=1", *callback]) == 0
    (file,) = set(Path("runs/SimpleNet/1-fit/checkpoints").iterdir()) - {
        Path("runs/SimpleNet/1-fit", LAST)
    }
    assert main([*fit, "--ckpt_path", str(file)]) == 2
    assert f"--ckpt_path {file}: it holds weights only" in capsys.readouterr().err
    assert not Path("runs/SimpleNet/2-fit").exists()


@pytest.mark.slow
def test_a_complete_fit_continues_only_with_more_epochs(
    mvtec_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit = ["fit", *words(mvtec_root, "SimpleNet", "--ckpt_path", "runs/SimpleNet/1-fit")]
    assert main([*fit[:-2], "--trainer.max_epochs=1"]) == 0
    capsys.readouterr()
    message = f"runs/SimpleNet/1-fit/{LAST}: this fit is complete (trainer."
    assert main([*fit, "--trainer.max_epochs=1"]) == 0
    error = " ".join(capsys.readouterr().err.split())
    assert f"{message}max_epochs is 1, and 1 are done), so nothing is trained" in error
    assert main([*fit, "--trainer.max_epochs=-1", "--trainer.max_steps=2"]) == 0
    assert f"{message}max_steps is 2, and 2 are done)" in " ".join(capsys.readouterr().err.split())
    assert main([*fit, "--trainer.max_epochs=2", "--output.folder=more"]) == 0
    error = capsys.readouterr().err
    assert "is complete" not in error
    assert "differ" not in error
    assert torch.load(f"more/{LAST}", weights_only=True)["epoch"] == 2


@pytest.mark.slow
def test_a_complete_fit_is_not_resumed_on_other_images(
    mvtec_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit = ["fit", *words(mvtec_root, "SimpleNet", "--trainer.max_epochs=1")]
    assert main(fit) == 0
    Maker(5).picture(mvtec_root / "bottle" / "train" / "good" / "new.png")
    assert main([*fit, "--ckpt_path", "runs/SimpleNet/1-fit"]) == 2
    error = capsys.readouterr().err
    assert (
        "the fit of the checkpoint is complete (trainer.max_epochs is 1, and 1 are done)" in error
    )
    assert "on other training images: 1 are new and 0 are missing; leave --ckpt_path out" in error
    assert not Path("runs/SimpleNet/2-fit").exists()


@pytest.mark.slow
def test_a_fit_that_resumes_on_other_images_says_so(
    mvtec_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit = ["fit", *words(mvtec_root, "SimpleNet")]
    assert main([*fit, "--trainer.max_epochs=1"]) == 0
    train = mvtec_root / "bottle" / "train" / "good"
    Maker(5).picture(train / "new.png")
    Maker(6).picture(train / "newer.png")
    (train / "000.png").unlink()
    assert main([*fit, "--trainer.max_epochs=2", "--ckpt_path", "runs/SimpleNet/1-fit"]) == 0
    message = "the training images differ from those of the checkpoint: 2 are new and 1 are missing"
    assert message in capsys.readouterr().err
    fitted = torch.load(f"runs/SimpleNet/2-fit/{LAST}", weights_only=True)["fitted_images"]
    assert len(fitted) == 4  # the test must contain none of them


@pytest.mark.slow
def test_another_object_than_that_of_the_fit(
    mvtec_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    padim = words(mvtec_root, "PaDiM")
    assert main(["fit", *padim]) == 0
    for verb in ("test", "predict"):
        line = [verb, *padim, "--ckpt_path", "runs/PaDiM/1-fit"]
        assert main(line) == 0
        assert "was fitted on" not in capsys.readouterr().err
        assert main([*line, "--data.categories", "[metal_nut]"]) == 0
        assert "PaDiM was fitted on bottle, but now scores metal_nut" in capsys.readouterr().err


def test_a_folder_of_another_name(mvtec_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    padim = words(mvtec_root, "PaDiM")
    padim[padim.index("MVTecAD")] = "ImageFolder"
    at = padim.index("--data.categories")
    del padim[at : at + 2]
    padim[padim.index(str(mvtec_root))] = str(mvtec_root / "bottle")
    assert main(["fit", *padim]) == 0
    shutil.copytree(mvtec_root / "metal_nut", "nut")
    assert main(["test", "--ckpt_path", "runs/PaDiM/1-fit", "--data.root", "nut"]) == 0
    assert "PaDiM was fitted on bottle, but now scores nut" in capsys.readouterr().err


@pytest.mark.slow
def test_a_fit_resumes_from_a_checkpoint_alone(
    mvtec_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit = ["fit", *words(mvtec_root, "SimpleNet", "--trainer.max_epochs=1")]
    assert main([*fit, "--output.folder=first"]) == 0
    first = Path(f"first/{LAST}").read_bytes()
    for value in (f"first/{LAST}", "first"):
        capsys.readouterr()
        assert main(["fit", f"--ckpt_path={value}"]) == 0
        error = " ".join(capsys.readouterr().err.split())
        assert "this fit is complete (trainer.max_epochs is 1, and 1 are done)" in error
    more = ["--trainer.max_epochs=2", "--output.folder=more"]
    assert main(["fit", f"--ckpt_path=first/{LAST}", *more]) == 0
    assert torch.load(f"more/{LAST}", weights_only=True)["epoch"] == 2
    assert Path(f"first/{LAST}").read_bytes() == first
    assert main(["fit", "--ckpt_path=no_such.ckpt"]) == 2
    assert "no_such.ckpt: there is no such file" in capsys.readouterr().err


def test_options_that_are_newer_than_a_checkpoint_have_their_defaults() -> None:
    prompt = LearnablePromptSettings(n_ctx=4, suffix="object.")
    old = {key: value for key, value in asdict(prompt).items() if key != "prefix"}
    assert completed(CLIPADA, "prompt", old) == asdict(prompt)
    other = {**asdict(prompt), "prefix": "a photo of a"}
    assert completed(CLIPADA, "prompt", other) == other
    cnn = {"name": "resnet18", "weights": "imagenet", "layers": None}  # without mean and std
    assert completed(RegAD, "backbone", cnn) == asdict(PixelCNNSettings("resnet18", "imagenet"))
    clip = {"name": "demo", "pretrained": "demo", "image_size": 160}  # also CNNs have a name
    assert completed(PaDiM, "backbone", clip) == asdict(CLIPSettings("demo", "demo", 160))
    for name, value in (("tau", 0.07), ("taps", [7]), ("unknown", {"a": 1})):
        assert completed(CLIPADA, name, value) == value


def test_a_model_of_the_user_with_names_for_type_checkers_is_accepted() -> None:
    class Own:
        def __init__(self, prompt: Any) -> None: ...

    Own.__init__.__annotations__["prompt"] = "NoSuchName"
    assert completed(Own, "prompt", {"a": 1}) == {"a": 1}
