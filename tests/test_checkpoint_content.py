from __future__ import annotations

import sys
import sysconfig
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import sdp_plus_command, write_mvtec
from layouts import visa
from lightning.pytorch.demos.boring_classes import BoringModel

from anomaly_clip.cli import main
from anomaly_clip.commands.checkpoint_content import damage_explained, method_class, read_checkpoint
from anomaly_clip.errors import UserError
from anomaly_clip.methods import SDPPlus

GOOD: dict[str, Any] = {
    "state_dict": {"a": torch.zeros(2000)},
    "hyper_parameters": {"_class_path": "anomaly_clip.methods.SDPPlus"},
    "epoch": 1,
    "global_step": 2,
    "pytorch-lightning_version": "2.6.4",
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state_dict": [1]}, "state_dict is not a mapping, but list"),
        ({"state_dict": {1: torch.zeros(1)}}, "it has the name 1, not a text"),
        ({"hyper_parameters": ["a"]}, "hyper_parameters is not a mapping, but list"),
        ({"hyper_parameters": {"_class_path": 7}}, "_class_path is not a text, but int"),
        ({"hyper_parameters": {3: 7}}, "it has the name 3, not a text"),
        ({"epoch": "one"}, "epoch is not a number, but str"),
        ({"global_step": None}, "global_step is not a number, but NoneType"),
        ({"pytorch-lightning_version": 2}, "pytorch-lightning_version is not a text, but int"),
        ({"loops": []}, "loops is not a mapping, but list"),
        ({"backbone": None}, "backbone is not a mapping, but NoneType"),
        ({"fitted_images": 7}, "fitted_images is not a list, but int"),
        ({"loops": {"fit_loop": 7}}, "fit_loop in loops is not a mapping, but int"),
        (
            {"loops": {"fit_loop": {"epoch_progress": 7}}},
            "epoch_progress in loops is not a mapping, but int",
        ),
        ({"callbacks": 1}, "callbacks is not a mapping, but int"),
        ({"optimizer_states": {}}, "optimizer_states is not a list, but dict"),
    ],
)
def test_malformed_checkpoints(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    torch.save({**GOOD, **change}, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=f"a.ckpt: a damaged checkpoint, as {message}: give one"):
        read_checkpoint(tmp_path / "a.ckpt")


def load_as_lightning(function: Callable[[], object]) -> None:
    """Call a function from a file named as the one in which Lightning loads checkpoints."""
    file = Path(sysconfig.get_paths()["purelib"], "lightning", "checkpoint_connector.py")
    space: dict[str, Any] = {}
    exec(compile("def load(function): function()", str(file), "exec"), space)
    space["load"](function)


def test_a_checkpoint_that_does_not_fit_a_model_of_ones_own() -> None:
    model = BoringModel()
    with (
        pytest.raises(UserError, match=r'fit BoringModel, .*\(RuntimeError: Missing key.*"layer\.'),
        damage_explained("a.ckpt", model),
    ):
        load_as_lightning(partial(model.load_state_dict, {}))
    with pytest.raises(ZeroDivisionError), damage_explained("a.ckpt", model):
        load_as_lightning(lambda: 1 / 0)
    with pytest.raises(KeyError), damage_explained("a.ckpt", model):  # raised in this file
        load_as_lightning(lambda: model.hparams["a"])


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    file = tmp_path / "a.ckpt"
    torch.save(GOOD, file)
    assert read_checkpoint(file)["epoch"] == 1
    whole = file.read_bytes()
    for content, message in (
        (b"", "it is empty"),
        (whole[: len(whole) // 2], "truncated"),
        (whole.replace(b"\0" * 64, b"\0" * 63 + b"\1", 1), "does not fit its checksum"),
        (b"<html>", "a web page"),
    ):
        file.write_bytes(content)
        with pytest.raises(UserError, match=f"can be read safely .*{message}.*give one that fit"):
            read_checkpoint(file)
    values: list[Any] = [[1], {"state": {}}, torch.zeros(2)]
    for value in values:
        torch.save(value, file)
        with pytest.raises(UserError, match="not a checkpoint of a fit, as it has no state_dict"):
            read_checkpoint(file)


DEMO = ["--model.backbone.pretrained", "demo", "--data", "Demo", "--model.linear_layers"]


class Evil:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return Path.touch, (Path("/tmp/never-made-by-a-checkpoint"),)  # type: ignore[return-value]


def test_a_pickle_is_refused_without_advice_to_run_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "evil.ckpt"
    torch.save({**GOOD, "more": Evil()}, file)
    for words in (
        ["export", "--ckpt_path", str(file)],
        ["test", "--config", "sdp_plus_visa_to_mvtec", "--ckpt_path", str(file)],
        ["test", "--model", "SDPPlus", "--model.backbone.name", "demo", *DEMO, str(file)],
        ["fit", "--model", "PatchCore", "--data", "Demo", "--model.backbone.weights", str(file)],
    ):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert "weights_only" not in error
        assert "could run code, and is rejected" in error
    assert not Path("/tmp/never-made-by-a-checkpoint").exists()


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.zeros(25_000_000)}}, tmp_path / "plain.ckpt")
    with (
        zipfile.ZipFile(tmp_path / "plain.ckpt") as plain,
        zipfile.ZipFile(tmp_path / "bomb.ckpt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for entry in plain.infolist():
            bomb.writestr(entry.filename, plain.read(entry))
    (tmp_path / "plain.ckpt").unlink()
    with pytest.raises(UserError, match=r"compressed archive of 0\.1 MB that unpacks to 100 MB"):
        read_checkpoint(tmp_path / "bomb.ckpt")


def test_classes_are_of_this_package_or_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.ckpt"
    assert method_class("anomaly_clip.methods.SDPPlus", path, "its class") is SDPPlus
    (tmp_path / "evilmod.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    for name, message in (
        ("evilmod.Model", "outside this package, and a name in a file imports no code"),
        ("evilmod", "outside this package"),
        ("", "outside this package"),
        (None, "outside this package"),
        ("os.system", "which is no method"),
        ("subprocess.Popen", "which is no method"),
        ("anomaly_clip.methods.Nothing", "which this version does not have"),
        ("anomaly_clip.nothing.Nothing", "which this version does not have"),
        ("anomaly_clip..Nothing", "which this version does not have"),
        ("anomaly_clip.cli.main", "which is no method"),
        ("anomaly_clip_evil.Model", "outside this package"),
    ):
        with pytest.raises(UserError, match=message):
            method_class(name, path, "its class")
    assert "evilmod" not in sys.modules


@pytest.fixture(scope="module")
def fit(tmp_path_factory: pytest.TempPathFactory, tiny_clip_config: str) -> Path:
    """Return the folder of a fit of SDP+."""
    root = tmp_path_factory.mktemp("fit")
    mvtec, auxiliary = write_mvtec(root / "mvtec"), visa(root / "visa")
    words = sdp_plus_command(mvtec, auxiliary, tiny_clip_config, root / "runs")
    assert main([*words, "--trainer.max_epochs=1", "--model.feature_cache_gb=0"]) == 0
    return root / "runs" / "SDPPlus" / "1-fit"


@pytest.mark.slow
def test_a_checkpoint_that_does_not_fit_is_one_sentence(
    fit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = torch.load(fit / "checkpoints" / "last.ckpt", weights_only=True)
    (tmp_path / "config-fit.yaml").write_text((fit / "config-fit.yaml").read_text())
    words = ["--ckpt_path", str(tmp_path / "a.ckpt")]
    keys = [key for key in saved["state_dict"] if key.startswith("fc.")]
    lacking = {k: v for k, v in saved["state_dict"].items() if k != keys[0]}
    for change in (
        {"state_dict": lacking},
        {"state_dict": {**saved["state_dict"], keys[0]: torch.zeros(1)}},
        {"state_dict": {**saved["state_dict"], keys[0]: "text"}},
        {"hyper_parameters": {**saved["hyper_parameters"], "backbone": {"nothing": 1}}},
    ):
        torch.save({**saved, **change}, tmp_path / "a.ckpt")
        assert main(["test", *words]) == 2, change.keys()
        error = capsys.readouterr().err.splitlines()[-1]
        assert "a.ckpt" in error
        assert "Traceback" not in error
    assert main(["export", *words, "--folder", str(tmp_path)]) == 2
    assert "a.ckpt" in capsys.readouterr().err


def test_a_configuration_next_to_a_checkpoint_names_no_foreign_code(
    fit: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = yaml.safe_load((fit / "config-fit.yaml").read_text())
    checkpoint = tmp_path / "last.ckpt"
    checkpoint.write_bytes((fit / "checkpoints" / "last.ckpt").read_bytes())
    (tmp_path / "evilmod2.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)

    def test(**trainer: Any) -> str:
        changed = {**config, "trainer": {**config["trainer"], **trainer}}
        (tmp_path / "config-fit.yaml").write_text(yaml.safe_dump(changed))
        assert main(["test", "--ckpt_path", str(checkpoint)]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    callback = "lightning.pytorch.callbacks.LambdaCallback"
    for name in ("os.abort", "subprocess.Popen", "evilmod2.function"):
        section = {"class_path": callback, "init_args": {"on_test_start": name}}
        error = test(callbacks=[section])
        assert f"names code outside this package ({name})" in error
        assert f"if you trust it, name it with --config {tmp_path / 'config-fit.yaml'}" in error
    for part in (
        {"logger": [{"class_path": "evilmod2.Logger"}]},
        {"strategy": "evilmod2.Strategy"},
    ):
        assert "names code outside this package (evilmod2." in test(**part)
    error = test(logger="{class_path: evilmod2.Logger}")
    assert "trainer.logger is a text or a file that may name classes" in error
    assert "evilmod2" not in sys.modules


def test_the_configuration_next_to_a_checkpoint_may_name_lightnings_classes(
    fit: Path, tmp_path: Path
) -> None:
    config = yaml.safe_load((fit / "config-fit.yaml").read_text())
    section = {"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"}
    config["trainer"]["callbacks"] = [section]
    config["trainer"]["limit_test_batches"] = 1
    (tmp_path / "config-fit.yaml").write_text(yaml.safe_dump(config))
    checkpoint = tmp_path / "last.ckpt"
    checkpoint.write_bytes((fit / "checkpoints" / "last.ckpt").read_bytes())
    assert main(["test", "--ckpt_path", str(checkpoint)]) == 0
