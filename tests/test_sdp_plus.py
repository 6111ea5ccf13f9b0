from __future__ import annotations

import csv
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    MEAN,
    WORDS,
    Golden,
    Outputs,
    Steps,
    quiet_trainer,
    save_picture,
    sdp_plus_command,
)
from layouts import head_ct, visa
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

from anomaly_clip.backbones.clip import CLIPBackbone, CLIPSettings
from anomaly_clip.backbones.prompts import PromptEnsemble, RVSSettings
from anomaly_clip.cli import main
from anomaly_clip.data import HeadCT, MVTecAD, VisA
from anomaly_clip.files import CACHE_VARIABLE
from anomaly_clip.methods import SDP, SDPPlus, linear_layers
from anomaly_clip.methods.linear_layers import read_linear_layers
from anomaly_clip.metrics import EvaluatorSettings
from anomaly_clip.testing.processes import run_command


@pytest.fixture
def layers(golden: Callable[[str], Golden], tmp_path: Path) -> Path:
    """Return the golden layers as a file in the authors' format."""
    inputs = golden("clip_ad").inputs
    state = {k.removeprefix("linear."): v for k, v in inputs.items() if k.startswith("linear.")}
    torch.save({"linear_layers": state}, tmp_path / "layers.pth")
    return tmp_path / "layers.pth"


def golden_method(arrays: Golden, clip: CLIPBackbone, layers: Path, **options: Any) -> SDPPlus:
    stages, sigma = arrays.meta["features_list"], float(arrays.meta["sigma"])
    return SDPPlus(
        clip,
        rvs=RVSSettings(arrays.meta["train"]["rep_vec"]),
        stages=stages,
        sigma=sigma,
        linear_layers=str(layers),
        feature_cache_gb=0,  # test_feature_cache.py covers half precision
        **options,
    )


@pytest.mark.golden
def test_golden_sdp_plus(
    golden: Callable[[str], Golden], golden_clip: CLIPBackbone, layers: Path
) -> None:
    arrays = golden("clip_ad")
    expected, text = arrays.named("sdp_plus."), arrays.inputs["text_features"]
    image, stages = arrays.inputs["image"], arrays.meta["features_list"]
    method = golden_method(arrays, golden_clip, layers)
    tokens, _ = method.encode(image)
    for layer, stage, token in zip(method.fc, stages, tokens, strict=True):
        linear = layer(token.raw[:, 1:])
        assert_close(linear, expected[f"linear.{stage}"], atol=1e-3, rtol=0)
    maps = method.stage_maps([token.raw[:, 1:] for token in tokens], text, image.shape[-2:])  # type: ignore[arg-type]
    for stage, stage_map in zip(stages, maps, strict=True):
        assert_close(stage_map, expected[f"stage_map.{stage}"], atol=1e-4, rtol=0)
    similarity = method.similarity([token.projected for token in tokens], text)
    assert_close(maps.sum(0) + method.upsample(similarity), expected["map"], atol=2e-4, rtol=0)
    scores = method.score_with_text(image, text)
    assert_close(scores["anomaly_map"], expected["map_smooth"], atol=2e-4, rtol=0)
    assert_close(scores["score_parts"][:, 1], expected["score_map_max"], atol=2e-4, rtol=0)


@pytest.mark.golden
def test_golden_end_to_end(
    golden: Callable[[str], Golden],
    golden_clip: CLIPBackbone,
    layers: Path,
    golden_category: Path,
) -> None:
    arrays = golden("clip_ad")
    expected = arrays.named("e2e.sdp_plus.")
    data = MVTecAD(str(golden_category), batch_size=4, num_workers=0)
    evaluator = EvaluatorSettings(pro_steps=200)
    method, outputs = golden_method(arrays, golden_clip, layers, evaluator=evaluator), Outputs()
    quiet_trainer(callbacks=[outputs]).test(method, data, verbose=False)
    order = [int(sample.image.stem) for sample in data.samples("test")]
    assert_close(outputs["anomaly_map"], expected["map"][order], atol=2e-4, rtol=0)
    parts = outputs["score_parts"]
    assert_close(parts[:, 0], expected["score_text"][order], atol=2e-4, rtol=0)
    assert_close(parts[:, 1], expected["score_map_max"][order], atol=2e-4, rtol=0)
    assert torch.equal(outputs["mask"], expected["gt_px"][order].bool())
    images, results = method.evaluator.images, method.results
    assert images is not None
    assert results is not None
    assert_close(images.score, expected["score"][order].float(), atol=2e-3, rtol=0)
    names = ["pixel_auroc", "pixel_f1_max", "pixel_ap", "pixel_pro"]
    names += ["image_auroc", "image_f1_max", "image_ap"]
    for name, value in zip(names, expected["metrics"].tolist(), strict=True):
        assert results["mean"][name] == pytest.approx(value, abs=1e-3), name


@pytest.fixture
def golden_auxiliary(golden: Callable[[str], Golden], tmp_path: Path) -> Path:
    """Write the golden images as a labelled test split in the same order."""
    arrays, root = golden("clip_ad"), tmp_path / "auxiliary"
    name = arrays.meta["e2e_object"]
    rows = [["object", "split", "label", "image", "mask"]]
    pairs = zip(arrays.inputs["e2e.images"], arrays.inputs["e2e.masks"], strict=True)
    for number, (image, mask) in enumerate(pairs):
        anomalous = bool(arrays.inputs["e2e.labels"][number])
        files = [f"{name}/Data/Images/{number:03d}.png", f"{name}/Data/Masks/{number:03d}.png"]
        save_picture(root / files[0], image.numpy())
        save_picture(root / files[1], mask.numpy().astype(np.uint8))
        label = "anomaly" if anomalous else "normal"
        rows.append([name, "test", label, files[0], files[1] if anomalous else ""])
    (root / "split_csv").mkdir()
    with (root / "split_csv" / "1cls.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return root


@pytest.mark.golden
def test_golden_training(
    golden: Callable[[str], Golden],
    golden_clip: CLIPBackbone,
    layers: Path,
    golden_auxiliary: Path,
    mvtec_root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terms: dict[str, list[float]] = {"focal": [], "dice": []}
    for name, values in terms.items():
        ordinary = getattr(linear_layers, f"{name}_loss")

        def recorded(*parts: Tensor, compute: Any = ordinary, into: list[float] = values) -> Tensor:
            loss = compute(*parts)
            into.append(float(loss.detach()))
            return loss

        monkeypatch.setattr(linear_layers, f"{name}_loss", recorded)
    arrays = golden("clip_ad")
    train = arrays.meta["train"]
    assert train["optimizer"] == "Adam"
    auxiliary = VisA(str(golden_auxiliary), shuffle=False, batch_size=train["batch_size"])
    data = MVTecAD(str(mvtec_root), auxiliary=auxiliary, num_workers=0)
    method, steps = golden_method(arrays, golden_clip, layers, lr=train["lr"]), Steps()
    quiet_trainer(max_epochs=train["epochs"], callbacks=[steps]).fit(method, data)
    total = (arrays.expected["train.focal"] + arrays.expected["train.dice"]).sum(dim=1)
    assert_close(torch.tensor(steps.losses), total.float(), atol=0, rtol=1e-3)
    for name, values in terms.items():
        expected = arrays.expected[f"train.{name}"].float()
        assert_close(torch.tensor(values).view_as(expected), expected, atol=0, rtol=1e-3)
    for epoch, state in enumerate(steps.layers, start=1):
        for key, expected in arrays.named(f"train.epoch_{epoch}.").items():
            difference = (state[key] - expected).abs()
            # Adam's first steps are equally large for all gradients; tiny gradients may flip sign.
            assert (difference > 1e-4).float().mean() <= 1e-3, (epoch, key)


@pytest.fixture
def trained_on(tmp_path: Path) -> VisA:
    return VisA(str(visa(tmp_path / "visa")))


def tiny(backbone: CLIPBackbone, **options: Any) -> SDPPlus:
    return SDPPlus(backbone, WORDS, MEAN, **{"sigma": 2.0, "lr": 1e-2, **options})


def fitted(backbone: CLIPBackbone, root: Path, auxiliary: VisA, **options: Any) -> SDPPlus:
    method = tiny(backbone)
    data = MVTecAD(str(root), auxiliary=auxiliary, num_workers=0, batch_size=3)
    quiet_trainer(max_epochs=2, **options).fit(method, data)
    return method


def test_only_the_layers_are_trained(
    tiny_clip: CLIPBackbone, mvtec_root: Path, trained_on: VisA
) -> None:
    before = {key: value.clone() for key, value in tiny(tiny_clip).state_dict().items()}
    method = fitted(tiny_clip, mvtec_root, trained_on)
    for key, value in method.state_dict().items():
        assert torch.equal(value, before[key]) == (not key.startswith("fc.")), key
    assert [name for name, p in method.named_parameters() if p.requires_grad] == [
        f"fc.{i}.{kind}" for i in range(4) for kind in ("weight", "bias")
    ]


def test_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        layers = torch.nn.ModuleList(torch.nn.Linear(896, 640) for _ in range(4))
    assert sum(p.numel() for p in layers.parameters()) == 2_296_320


def test_exported_layers_give_the_same_maps(
    tiny_clip: CLIPBackbone, mvtec_root: Path, trained_on: VisA, tmp_path: Path
) -> None:
    method = fitted(tiny_clip, mvtec_root, trained_on)
    file = method.export(tmp_path)
    assert set(read_linear_layers(file)) == {
        f"fc.{i}.{kind}" for i in range(4) for kind in ("weight", "bias")
    }
    again = tiny(tiny_clip, linear_layers=str(file))
    assert not again.must_be_fitted
    assert tiny(tiny_clip).must_be_fitted
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    fitted_maps, read_maps = (m.score(images, ["nut"] * 2)["anomaly_map"] for m in (method, again))
    assert torch.equal(fitted_maps, read_maps)


def test_layers_that_do_not_fit(tiny_clip: CLIPBackbone, tmp_path: Path) -> None:
    def saved(name: str, content: object) -> str:
        torch.save(content, tmp_path / name)
        return str(tmp_path / name)

    other = {"fc.0.weight": torch.zeros(640, 896), "fc.0.bias": torch.zeros(640)}
    state = {f"fc.{k}": v for k, v in tiny(tiny_clip).fc.state_dict().items()}
    weights = {key: value for key, value in state.items() if key.endswith("weight")}
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "empty.pth").write_bytes(b"")
    cases: dict[str, str] = {
        saved(
            "other.pth", {"linear_layers": other}
        ): r"1 layers from 896 to 640 .* 4 layers from 24",
        saved("bare.pth", other): r"1 layers from 896 to 640 .* 4 layers from 24",
        saved("list.pth", [1]): "expected a dictionary linear_layers",
        saved("keys.pth", {"linear_layers": {1: torch.zeros(2)}}): "expected a dictionary linear",
        saved("point.pth", {"linear_layers": {"fc.0.weight": torch.tensor(1.0)}}): "expected a dic",
        saved("half.pth", {"linear_layers": weights}): r"fc.0.bias is missing, but",
        str(tmp_path / "empty.pth"): "not a file that can be read safely",
        str(tmp_path / "text.pth"): "not a file that can be read safely",
    }
    for file, message in cases.items():
        with pytest.raises(ValueError, match=message) as error:
            tiny(tiny_clip, linear_layers=file)
        assert file in str(error.value)
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        tiny(tiny_clip, linear_layers="nowhere.pth")


@pytest.mark.parametrize(
    ("key", "prefix"),
    [
        ("linear_layers", "module."),
        ("linear_layers", "_orig_mod."),
        ("linear_layers", "_orig_mod.module."),
        ("trainable_linearlayer", ""),
        ("state_dict", "module."),
        (None, ""),
        (None, "module."),
    ],
)
@pytest.mark.parametrize("name", ["layers.pth", "layers.safetensors"])
def test_forms_of_layers(
    tiny_clip: CLIPBackbone,
    tmp_path: Path,
    key: str | None,
    prefix: str,
    name: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.manual_seed(1)
    method = tiny(tiny_clip)
    state = {f"{prefix}fc.{k}": v.detach() + 1 for k, v in method.fc.state_dict().items()}
    if name.endswith("safetensors"):
        save_file(state, tmp_path / name)
    else:
        torch.save(state if key is None else {"epoch": 3, key: state}, tmp_path / name)
    for place in (tmp_path / name, tmp_path):  # a file, and the folder with it alone
        again = tiny(tiny_clip, linear_layers=str(place)).fc.state_dict()
        assert torch.equal(again["2.weight"], state[f"{prefix}fc.2.weight"])
    of_april_gan = key == "trainable_linearlayer" and name == "layers.pth"
    assert ("of APRIL-GAN" in capsys.readouterr().err) == of_april_gan


def test_fit_needs_a_labelled_set_with_masks(
    tiny_clip: CLIPBackbone, mvtec_root: Path, tmp_path: Path
) -> None:
    trainer = quiet_trainer(max_epochs=1)
    with pytest.raises(ValueError, match="SDPPlus is trained on the labelled test images"):
        trainer.fit(tiny(tiny_clip), MVTecAD(str(mvtec_root), num_workers=0))
    without = HeadCT(str(head_ct(tmp_path / "ct")))
    with pytest.raises(ValueError, match=r"SDPPlus is trained on masks, but .* HeadCT has none"):
        trainer.fit(tiny(tiny_clip), MVTecAD(str(mvtec_root), auxiliary=without, num_workers=0))


def test_sigma_follows_the_tested_data_set(tiny_clip: CLIPBackbone, mvtec_root: Path) -> None:
    class VisAlike(MVTecAD):
        dataset_name = "VisA"

    blurs = []
    for kind in (MVTecAD, VisAlike):
        method = tiny(tiny_clip, sigma="auto")
        quiet_trainer().test(method, kind(str(mvtec_root), num_workers=0), verbose=False)
        blurs.append(method.blur)
    assert blurs == [8.0, 2.0]


def test_prompts_follow_the_auxiliary_data_set(
    tiny_clip: CLIPBackbone, mvtec_root: Path, trained_on: VisA, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, str | None]] = []
    ordinary = SDP.text

    def text(self: SDP, category: str, dataset_name: str | None = None) -> Tensor:
        calls.append((category, dataset_name))
        return ordinary(self, category, dataset_name)

    monkeypatch.setattr(SDP, "text", text)
    method = SDPPlus(tiny_clip, PromptEnsemble(), RVSSettings("dbscan"))
    data = MVTecAD(str(mvtec_root), auxiliary=trained_on, num_workers=0)
    quiet_trainer(max_epochs=1).fit(method, data)
    assert set(calls) == {("candle", "VisA"), ("pipe_fryum", "VisA")}


def test_test_images_in_the_auxiliary_data_set_are_rejected(
    tiny_clip: CLIPBackbone, mvtec_root: Path, tmp_path: Path
) -> None:
    shutil.copytree(mvtec_root, tmp_path / "copy")
    data = MVTecAD(str(mvtec_root), auxiliary=MVTecAD(str(tmp_path / "copy")), num_workers=0)
    with pytest.raises(ValueError, match="8 test images are among the training images"):
        quiet_trainer(max_epochs=1).fit(tiny(tiny_clip), data)


def test_fit_and_then_test_with_the_checkpoint_only(
    tmp_path: Path, mvtec_root: Path, trained_on: VisA, tiny_clip_config: str
) -> None:
    words = sdp_plus_command(mvtec_root, trained_on.root, tiny_clip_config, tmp_path / "runs")
    assert main([*words, "--trainer.max_epochs", "1"]) == 0
    run = tmp_path / "runs" / "SDPPlus" / "1-fit"
    (checkpoint,) = (run / "checkpoints").glob("*.ckpt")
    kept = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert set(kept) == set(read_linear_layers(run / "linear_layers.pth"))
    assert main(["test", "--ckpt_path", str(checkpoint), "--output.root", str(tmp_path / "t")]) == 0
    (metrics,) = (tmp_path / "t").rglob("metrics.json")
    protocol = json.loads(metrics.read_text())["run"]["protocol"]
    assert (protocol["auxiliary"], protocol["overlap"]) == ("VisA", 0)
    # A checkpoint can be tested without its training data.
    shutil.rmtree(trained_on.root)
    assert main(["test", "--ckpt_path", str(checkpoint), "--output.root", str(tmp_path / "u")]) == 0


@pytest.mark.slow
def test_a_checkpoint_of_0_1_keeps_the_activation_of_the_model_name(
    tmp_path: Path,
    mvtec_root: Path,
    trained_on: VisA,
    tiny_clip: CLIPBackbone,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = tiny_clip.settings.name
    torch.save(tiny_clip.model.state_dict(), tmp_path / "clip.pt")
    words = sdp_plus_command(mvtec_root, trained_on.root, name, tmp_path / "runs")
    words += [f"--model.backbone.pretrained={tmp_path / 'clip.pt'}", "--trainer.max_epochs=1"]
    assert main(words) == 0
    (file,) = (tmp_path / "runs").rglob("*.ckpt")
    checkpoint = torch.load(file, weights_only=True)
    for option in ("quick_gelu", "positions"):
        del checkpoint["hyper_parameters"]["backbone"][option]
    torch.save(checkpoint, file)
    # Version 0.1.0 did not read this file.
    (tmp_path / "open_clip_config.json").write_text('{"model_cfg": {"quick_gelu": true}}')
    test = ["test", "--ckpt_path", str(file), f"--output.root={tmp_path / 't'}"]
    assert main(test) == 0
    assert "quick_gelu is false, as in version 0.1.0" in capsys.readouterr().err
    for option, code in (("false", 0), ("true", 2)):
        assert main([*test, "--model.backbone.quick_gelu", option]) == code
    error = capsys.readouterr().err
    assert "weights of the fit, and its backbone.quick_gelu and backbone.positions" in error


@pytest.mark.slow
def test_options_that_a_resumed_fit_and_a_test_may_change(
    tmp_path: Path,
    mvtec_root: Path,
    trained_on: VisA,
    tiny_clip_config: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = sdp_plus_command(mvtec_root, trained_on.root, tiny_clip_config, tmp_path / "runs")
    assert main([*words, "--trainer.max_epochs", "1"]) == 0
    layers = tmp_path / "runs" / "SDPPlus" / "1-fit" / "linear_layers.pth"
    again = [*words, "--model.linear_layers", str(layers), "--trainer.max_epochs", "1"]
    assert main(again) == 0
    layers.unlink()  # the checkpoint contains the fitted layers
    (checkpoint,) = (tmp_path / "runs" / "SDPPlus" / "2-fit" / "checkpoints").glob("*.ckpt")
    test = ["test", "--ckpt_path", str(checkpoint), "--output.root", str(tmp_path / "t")]
    assert main([*test, "--model.sigma", "4"]) == 0
    resumed = [*again, "--ckpt_path", str(checkpoint), "--model.feature_cache_gb", "0"]
    assert main([*resumed, "--trainer.max_epochs", "2"]) == 0
    capsys.readouterr()
    assert main([*resumed, "--model.lr", "0.5"]) == 2
    assert "model.lr is 0.5, but" in capsys.readouterr().err
    (tmp_path / "empty.ckpt").write_bytes(b"")
    assert main(["test", "--ckpt_path", str(tmp_path / "empty.ckpt"), *words[1:]]) == 2
    assert "not a checkpoint that can be read safely" in capsys.readouterr().err


def test_layers_from_a_file_are_recorded(
    tmp_path: Path, mvtec_root: Path, trained_on: VisA, tiny_clip_config: str
) -> None:
    words = sdp_plus_command(mvtec_root, trained_on.root, tiny_clip_config, tmp_path / "runs")
    assert main([*words, "--trainer.max_epochs", "1"]) == 0
    layers = tmp_path / "runs" / "SDPPlus" / "1-fit" / "linear_layers.pth"
    test = sdp_plus_command(mvtec_root, trained_on.root, tiny_clip_config, tmp_path / "t", "test")
    assert main([*test, "--model.linear_layers", str(layers)]) == 0
    (metrics,) = (tmp_path / "t").rglob("metrics.json")
    protocol = json.loads(metrics.read_text())["run"]["protocol"]
    digest = hashlib.sha256(layers.read_bytes()).hexdigest()
    assert protocol["borrowed"] == {"file": str(layers), "sha256": digest}
    assert protocol["fitted"] is True
    assert protocol["auxiliary"] is None
    assert protocol["overlap"] is None


@pytest.mark.filterwarnings("ignore:.*Checkpoint directory.*exists:UserWarning")
def test_a_checkpoint_saved_in_python_loads_on_its_own(
    mvtec_root: Path, trained_on: VisA, tiny_clip_config: str, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    settings = CLIPSettings(tiny_clip_config, "random")
    method = SDPPlus(settings, WORDS, MEAN, sigma=2.0, lr=1e-2)
    data = MVTecAD(str(mvtec_root), auxiliary=trained_on, num_workers=0)
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(method, data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    torch.manual_seed(3)  # random weights depend on the seed
    again = SDPPlus.load_from_checkpoint(tmp_path / "a.ckpt")
    assert (again.prompts, again.rvs) == (method.prompts, method.rvs)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    fitted_maps, loaded_maps = (
        m.score(images, ["nut"] * 2)["anomaly_map"] for m in (method, again)
    )
    assert torch.equal(fitted_maps, loaded_maps)


def test_initial_layers_depend_on_the_seed(tiny_clip: CLIPBackbone) -> None:
    starts = []
    for seed, before in ((0, 0), (0, 5), (1, 0)):
        torch.manual_seed(seed)
        torch.rand(before)
        starts.append(tiny(tiny_clip).fc.state_dict()["0.weight"])
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


def test_validation_uses_the_settings_of_its_own_data_set(
    tiny_clip: CLIPBackbone, mvtec_root: Path, trained_on: VisA, monkeypatch: pytest.MonkeyPatch
) -> None:
    blurs: list[float] = []
    ordinary = SDPPlus._score_against

    def score(self: SDPPlus, tokens: dict[str, Tensor], text: Tensor) -> Any:
        blurs.append(self.blur)
        return ordinary(self, tokens, text)

    monkeypatch.setattr(SDPPlus, "_score_against", score)
    method = tiny(tiny_clip, sigma="auto")
    data = MVTecAD(
        str(mvtec_root),
        auxiliary=trained_on,
        val_split="auxiliary",
        val_share=0.5,
        num_workers=0,
        batch_size=2,
    )
    quiet_trainer(max_epochs=1).fit(method, data)
    assert set(blurs) == {2.0}  # the blur for VisA
    blurs.clear()
    quiet_trainer().test(method, data, verbose=False)
    assert set(blurs) == {8.0}


def test_a_test_needs_fitted_layers(
    tmp_path: Path,
    mvtec_root: Path,
    trained_on: VisA,
    tiny_clip_config: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = sdp_plus_command(
        mvtec_root, trained_on.root, tiny_clip_config, tmp_path / "runs", "test"
    )
    assert main(words) == 2
    assert "SDPPlus must be fitted first" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_train_the_same_layers_as_one(
    tmp_path: Path, mvtec_root: Path, trained_on: VisA, tiny_clip_config: str
) -> None:
    words = sdp_plus_command(mvtec_root, trained_on.root, tiny_clip_config, tmp_path / "runs")
    words += ["--trainer.max_epochs", "2", "--data.auxiliary.shuffle", "false"]
    assert main([*words, "--data.auxiliary.batch_size", "4", "--output.name", "one"]) == 0
    ddp = ["--trainer.strategy", "ddp", "--trainer.devices", "2", "--output.name", "two"]
    cold = {CACHE_VARIABLE: str(tmp_path / "cold")}  # an empty cache for the two processes
    done = run_command([*words, "--data.auxiliary.batch_size", "2", *ddp], 2, cold)
    assert len(list((tmp_path / "cold" / "features").rglob("*.safetensors"))) == 6
    assert done.returncode == 0, done.stderr[-2000:]
    single, double = (
        read_linear_layers(tmp_path / "runs" / name / "1-fit" / "linear_layers.pth")
        for name in ("one", "two")
    )
    for key, value in single.items():
        # Adam's steps are equally large for all gradients; tiny gradients may flip sign.
        assert ((double[key] - value).abs() > 1e-4).float().mean() < 0.01, key
    tested = []
    for name, more in (("a", []), ("b", ddp[:4])):
        layers = tmp_path / "runs" / "one" / "1-fit" / "linear_layers.pth"
        test = sdp_plus_command(
            mvtec_root, trained_on.root, tiny_clip_config, tmp_path / "runs", "test"
        )
        test += ["--model.linear_layers", str(layers), "--output.name", name, *more]
        done = run_command(test, processes=2 if more else 1)
        assert done.returncode == 0, done.stderr[-2000:]
        metrics = tmp_path / "runs" / name / "1-test" / "metrics.json"
        tested.append(json.loads(metrics.read_text())["mean"])
    assert tested[1] == pytest.approx(
        tested[0], abs=1e-3
    )  # batches of other sizes round differently
