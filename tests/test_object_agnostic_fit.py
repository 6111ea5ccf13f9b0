"""Invariants, fits and commands of AnomalyCLIP."""

from __future__ import annotations

import json
import re
import sys
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrations import write_photographs
from helpers import quiet_trainer
from layouts import head_ct, visa
from object_agnostic_methods import command, write_config
from torch import Tensor
from torch.testing import assert_close

import anomaly_clip
from anomaly_clip.backbones import clip_towers
from anomaly_clip.backbones.clip import CLIPBackbone, CLIPSettings, unit
from anomaly_clip.backbones.deep_prompts import DeepPromptsSettings
from anomaly_clip.backbones.surgery import dense_path, encode_layers
from anomaly_clip.cli import main
from anomaly_clip.data import Demo, HeadCT, MVTecAD, VisA
from anomaly_clip.files import CACHE_VARIABLE
from anomaly_clip.methods import APRILGAN, SDP, AnomalyCLIP, SDPPlus, auxiliary_training
from anomaly_clip.methods.object_agnostic import pooled
from anomaly_clip.methods.prompt_files import PROMPTS_KEY
from anomaly_clip.testing.processes import run_command

NAMES = ["nut"] * 2


@pytest.fixture(scope="module")
def clip_config(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_config(tmp_path_factory.mktemp("clip") / "deep.json")


@pytest.fixture(scope="module")
def clip(clip_config: str) -> CLIPBackbone:
    torch.manual_seed(0)
    return CLIPBackbone(clip_config, "random")


@pytest.fixture
def trained_on(tmp_path: Path) -> VisA:
    return VisA(str(visa(tmp_path / "visa")), batch_size=2)


def images(count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)


def tiny(backbone: CLIPBackbone, **options: Any) -> AnomalyCLIP:
    return AnomalyCLIP(backbone, **{"sigma": 2.0, "lr": 1e-2, **options})


def fitted(backbone: CLIPBackbone, root: Path, auxiliary: VisA, **options: Any) -> AnomalyCLIP:
    method = tiny(backbone, **options)
    data = MVTecAD(str(root), auxiliary=auxiliary, num_workers=0)
    quiet_trainer(max_epochs=2).fit(method, data)
    return method.eval()


# -- towers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_the_dense_path_of_one_layer_is_that_of_value_attention(
    clip: CLIPBackbone, blocks: int
) -> None:
    last = clip.num_layers
    with torch.no_grad():
        paths = list(dense_path(clip, images(), blocks))
        [expected] = encode_layers(clip, images(), [last], blocks)
        ordinary = encode_layers(clip, images(), list(range(1, last + 1)))
    assert_close(paths[-1][1][:, 1:], expected[:, 1:], atol=1e-5, rtol=0)
    assert_close(paths[-1][0], expected[:, :1], atol=1e-5, rtol=0)
    for number, (original, dense) in enumerate(paths[:-1], start=1):
        assert_close(original, ordinary[number - 1], atol=1e-5, rtol=0)
        assert torch.equal(original, dense) == (number <= last - blocks)


def test_layers_before_the_first_dense_block_are_ordinary_ones(clip: CLIPBackbone) -> None:
    method = tiny(clip, layers=[1, 2, 3, 4], dense_blocks=2)
    for crane in ("anomalyclip", "crane"):
        method.inference = crane
        tokens = method.tokens(images(), scoring=True)
        ordinary = clip(images(), [1, 2, 3, 4])
        for layer, expected in enumerate(ordinary, start=1):
            same = torch.allclose(tokens[f"patches.{layer}"], expected.projected[:, 1:], atol=1e-5)
            assert same == (layer <= 2), (crane, layer)
        image = ordinary[-1].projected[:, 0]
        assert torch.allclose(tokens["image"], image, atol=1e-5) == (crane == "crane")


def test_training_uses_the_tokens_of_anomalyclip_whatever_scores(clip: CLIPBackbone) -> None:
    method, crane = tiny(clip), tiny(clip, inference="crane")
    expected = method.tokens(images(), scoring=True)
    for name, value in crane.tokens(images(), scoring=False).items():
        assert torch.equal(value, expected[name])
    assert method._key(scoring=True) != crane._key(scoring=True)


@pytest.mark.parametrize(("layers", "expected"), [(4, 3), (8, 6), (12, 10), (24, 19), (1, 1)])
def test_the_share_of_dense_blocks_is_the_published_one(
    clip: CLIPBackbone, layers: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = tiny(clip)
    assert method.dense_blocks == 3
    monkeypatch.setattr(CLIPBackbone, "num_layers", layers)
    assert method._check_dense_blocks(None) == expected
    assert method._check_dense_blocks(layers) == layers


@pytest.mark.parametrize("blocks", [0, -1, 5])
def test_dense_blocks_have_limits(clip: CLIPBackbone, blocks: int) -> None:
    with pytest.raises(ValueError, match=rf"model.dense_blocks {blocks}: expected 1 to 4, the num"):
        tiny(clip, dense_blocks=blocks)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("inference", "sdp", "model.inference"),
        ("temperature", 0.0, "model.temperature"),
        ("sigma", -1.0, "model.sigma"),
        ("lr", 0.0, "model.lr"),
        ("local_weight", -0.1, "model.local_weight"),
        ("feature_cache_gb", -1.0, "model.feature_cache_gb"),
        ("layers", [5], "layer"),
        ("prompt", {"n_ctx": 0}, "model.prompt.n_ctx"),
        ("prompt", {"depth": 0}, "model.prompt.depth"),
        ("prompt", {"depth": 4}, "model.prompt.depth 4 is above 3, the number of blocks"),
        ("prompt", {"n_ctx": 3}, "model.prompt.deep_ctx 4 is above model.prompt.n_ctx 3"),
        ("prompt", {"n_ctx": 73}, "model.prompt.n_ctx 73 is above 72"),
        ("prompt", {"init_std": -1.0}, "model.prompt.init_std"),
    ],
)
def test_options_have_limits(clip: CLIPBackbone, option: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(clip, **{option: value})


# -- texts and scores ------------------------------------------------------------------------------


def test_texts_are_kept_until_the_prompts_change(clip: CLIPBackbone) -> None:
    method = tiny(clip)
    before = method.text()
    assert method.text() is before
    with torch.no_grad():
        method.prompts.deep[0].mul_(3)  # in place, as an optimiser does
    after = method.text()
    assert not torch.equal(after, before)
    assert_close(after, method.prompts(clip).detach().T)
    method.load_state_dict(tiny(clip).state_dict())
    assert torch.equal(method.text(), before)
    copy = deepcopy(method)
    with torch.no_grad():
        for rows, version in zip(copy.prompts.parameters(), method._text[0], strict=True):  # type: ignore[index]
            while rows._version < version[1]:
                rows.mul_(1.5)
    assert not torch.equal(copy.text(), before)
    assert torch.equal(method.text(), before)
    with torch.no_grad():
        for rows in method.prompts.parameters():
            rows.data = 2 * rows.data  # as weight averaging may do
    method.prepare([])
    assert not torch.equal(method.text(), before)


def test_prompts_score_in_other_types_and_inference_mode(clip_config: str, tmp_path: Path) -> None:
    settings = CLIPSettings(clip_config, "random")
    torch.manual_seed(0)
    expected = AnomalyCLIP(settings).text()
    for dtype in (torch.bfloat16, torch.float64):
        torch.manual_seed(0)
        method = AnomalyCLIP(settings, prompt=DeepPromptsSettings(round_deep=True)).to(dtype)
        assert_close(method.text(), expected, atol=0.05, rtol=0)
        content = torch.load(method.export(tmp_path), weights_only=True)[PROMPTS_KEY]
        types = {value.dtype for name, value in content.items() if "tokenized" not in name}
        assert types == {torch.float32}
    with torch.inference_mode():
        torch.manual_seed(0)
        method = AnomalyCLIP(settings)
        assert_close(method.text(), expected)
        assert method.text() is method.text()


def test_the_cache_of_features_depends_on_the_code_of_the_tokens(
    clip: CLIPBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auxiliary_training, "source_hash", lambda *files: " ".join(files))
    for kind in (AnomalyCLIP, APRILGAN, SDPPlus):
        key = kind(clip)._key(scoring=False)
        assert str(sys.modules[kind.__module__].__file__) in key
        assert str(clip_towers.__file__) in key
        assert f"'{version('timm')}'" in key


def test_deep_prompts_and_both_contexts_act(clip: CLIPBackbone) -> None:
    method = tiny(clip, prompt={"depth": 3})
    text = method.prompts(clip)
    gradients = torch.autograd.grad(
        (text[1] - text[0]).square().sum(), [*method.prompts.parameters()]
    )
    first, *deep = gradients
    assert all(rows.abs().max() > 0 for rows in (first[0], first[1], *deep))
    assert len(deep) == 2
    assert_close(text.norm(dim=-1), torch.ones(2))


def test_initial_prompts_depend_on_the_seed_alone(clip: CLIPBackbone) -> None:
    starts = []
    for seed, before in ((0, 0), (0, 5), (1, 0)):
        torch.manual_seed(seed)
        torch.rand(before)
        state = torch.get_rng_state()
        starts.append([rows.detach() for rows in tiny(clip).prompts.parameters()])
        assert torch.equal(torch.get_rng_state(), state)
    for first, again, other in zip(*starts, strict=True):
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
    spread = torch.cat([rows.flatten() for rows in starts[0]]).std()
    assert float(spread) == pytest.approx(0.02, rel=0.1)


def test_scores_of_several_layers_by_hand(clip: CLIPBackbone) -> None:
    method = tiny(clip, layers=[2, 4], sigma=0.0, temperature=0.5)
    tokens, text = method.tokens(images(), scoring=True), method.text()
    single = []
    for layer in (2, 4):
        cosines = unit(tokens[f"patches.{layer}"]) @ text
        odds = ((cosines[..., 1] - cosines[..., 0]) / 0.5).sigmoid().view(2, 1, 4, 4)
        single.append(torch.nn.functional.interpolate(odds, (32, 32), mode="bilinear")[:, 0])
    assert_close(method.score(images(), NAMES)["anomaly_map"], single[0] + single[1])
    cosines = unit(tokens["image"]) @ text
    expected = ((cosines[:, 1] - cosines[:, 0]) / 0.5).sigmoid()
    assert_close(method.score(images(), NAMES)["image_score"], expected)


def test_abnormal_patches_join_the_image_vector() -> None:
    image, patches = torch.tensor([[1.0, 0.0]]), torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
    joined = pooled(image, patches, torch.tensor([[0.5, 0.0]]))
    assert_close(joined, torch.tensor([[0.5**0.5, 0.5**0.5]]))
    assert_close(pooled(image, patches, torch.tensor([[0.0, 0.5]])), image)


@pytest.mark.parametrize(("weight", "factor"), [("auto", 2.0), (4.0, 4.0), (0.0, 0.0)])
def test_the_weight_of_the_maps_is_shared_by_the_layers(
    clip: CLIPBackbone, weight: Any, factor: float
) -> None:
    method = tiny(clip, layers=[2, 4], local_weight=weight)
    unweighted = tiny(clip, layers=[2, 4], local_weight=1.0)
    mask = torch.zeros(2, 32, 32, dtype=torch.bool)
    mask[1, 4:9, 3:20] = True
    batch: Any = {"mask": mask, "label": torch.tensor([False, True])}
    tokens = method.tokens(images(), scoring=False)
    terms, plain = method.losses(tokens, batch), unweighted.losses(tokens, batch)
    for name in ("focal", "dice_abnormal", "dice_normal"):
        assert_close(terms[name], factor * plain[name])
    assert_close(terms["image"], plain["image"])


def test_a_batch_of_one_image_can_be_trained_on(clip: CLIPBackbone) -> None:
    method = tiny(clip)
    batch: Any = {"mask": torch.zeros(1, 32, 32, dtype=torch.bool), "label": torch.tensor([False])}
    terms = method.losses(method.tokens(images(1), scoring=False), batch)
    total = torch.stack(list(terms.values())).sum()
    total.backward()
    assert total.isfinite()
    assert method.prompts.shallow.context.grad is not None


# -- fits ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_only_the_prompts_are_trained_and_the_seed_decides(
    clip: CLIPBackbone, mvtec_root: Path, trained_on: VisA
) -> None:
    methods = []
    for _ in range(2):
        torch.manual_seed(3)
        before = {key: value.clone() for key, value in tiny(clip).state_dict().items()}
        methods.append(fitted(clip, mvtec_root, trained_on))
    for key, value in methods[0].state_dict().items():
        assert torch.equal(value, before[key]) == (not key.startswith("prompts.")), key
        assert torch.equal(value, methods[1].state_dict()[key]), key
    assert all(not rows.requires_grad for rows in clip.parameters())
    text = methods[0].text()
    optimizer: Any = methods[0].configure_optimizers()
    methods[0].prompts(clip)[1].sum().backward()
    optimizer.step()
    assert not torch.equal(methods[0].text(), text)


@pytest.mark.slow
def test_the_cache_of_features_changes_little(
    clip: CLIPBackbone,
    mvtec_root: Path,
    trained_on: VisA,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    results = []
    for size in (0.0, 1.0, 1.0):
        torch.manual_seed(3)
        method = fitted(clip, mvtec_root, trained_on, feature_cache_gb=size, inference="crane")
        results.append([rows.detach() for rows in method.prompts.parameters()])
    for without, with_cache, again in zip(*results, strict=True):
        # Adam's first steps are equally large for all gradients; tiny gradients may flip sign.
        assert ((without - with_cache).abs() > 2e-3).float().mean() < 0.05
        assert torch.equal(with_cache, again)


@pytest.mark.slow
def test_a_fit_needs_an_auxiliary_set_with_masks(
    clip: CLIPBackbone, mvtec_root: Path, tmp_path: Path
) -> None:
    data = MVTecAD(str(mvtec_root), num_workers=0)
    with pytest.raises(
        ValueError, match="AnomalyCLIP is trained on the labelled test images of an"
    ):
        quiet_trainer(max_epochs=1).fit(tiny(clip), data)
    data = MVTecAD(str(mvtec_root), auxiliary=HeadCT(str(head_ct(tmp_path / "h"))), num_workers=0)
    with pytest.raises(
        ValueError, match=r"AnomalyCLIP is trained on masks, but data\.auxiliary Head"
    ):
        quiet_trainer(max_epochs=1).fit(tiny(clip), data)
    normal = Demo(num_test=1, categories=["brown leather"], picture_size=64)
    data = MVTecAD(str(mvtec_root), auxiliary=normal, num_workers=0)
    with pytest.raises(ValueError, match=r"none of those of data\.auxiliary Demo is anomalous"):
        quiet_trainer(max_epochs=1).fit(tiny(clip), data)


@pytest.mark.slow
def test_a_fit_its_files_and_what_a_test_may_change(
    tmp_path: Path,
    mvtec_root: Path,
    trained_on: VisA,
    clip_config: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = command(mvtec_root, trained_on.root, clip_config, tmp_path / "runs")
    assert main([*words, "--trainer.max_epochs", "1"]) == 0
    run = tmp_path / "runs" / "AnomalyCLIP" / "1-fit"
    [checkpoint] = (run / "checkpoints").glob("*.ckpt")
    kept = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert {name.split(".")[0] for name in kept} == {"prompts"}
    capsys.readouterr()

    def metrics(*more: str) -> dict[str, Any]:
        folder = tmp_path / f"t{len(list(tmp_path.iterdir()))}"
        assert main([*more, f"--output.root={folder}"]) == 0, capsys.readouterr().err
        [file] = folder.rglob("metrics.json")
        content: dict[str, Any] = json.loads(file.read_text())
        return content

    # A checkpoint and its exported prompts score alike, with both inferences.
    by_file = command(mvtec_root, trained_on.root, clip_config, tmp_path / "unused", "test")
    for projections in (True, False):
        folder = tmp_path / f"exported-{projections}"
        more = ["--projections"] if projections else []
        assert main(["export", "--ckpt_path", str(run), "--folder", str(folder), *more]) == 0
        assert capsys.readouterr().out == f"{folder / 'prompts.pth'}\n"
        names = set(torch.load(folder / "prompts.pth", weights_only=True)[PROMPTS_KEY])
        assert any("projections" in name for name in names) == projections
        for inference in () if projections else ("anomalyclip", "crane"):
            more = ["--model.inference", inference]
            of_checkpoint = metrics("test", "--ckpt_path", str(checkpoint), *more)
            file = str(folder / "prompts.pth")
            of_file = metrics(*by_file, "--model.prompts_file", file, *more)
            assert of_file["mean"] == of_checkpoint["mean"]
            assert of_file["run"]["protocol"]["borrowed"]["file"] == file
            assert of_checkpoint["run"]["protocol"]["auxiliary"] == "VisA"
            written = of_checkpoint["run"]["protocol"].get("inference")
            assert written == ("crane" if inference == "crane" else None)
        capsys.readouterr()
    assert (run / "prompts.pth").read_bytes() == (folder / "prompts.pth").read_bytes()
    capsys.readouterr()
    # A checkpoint has the prompts: a file given with it is not used, as a message says.
    metrics("test", "--ckpt_path", str(checkpoint), "--model.prompts_file", file)
    message = f"model.prompts_file {file} is not used: --ckpt_path {checkpoint} has trained"
    assert message in capsys.readouterr().err
    # A resumed fit may change what affects no weight.
    resumed = [*words, f"--ckpt_path={checkpoint}", "--trainer.max_epochs", "2"]
    assert main([*resumed, "--model.inference", "crane", "--model.feature_cache_gb", "0"]) == 0
    capsys.readouterr()
    for option, value in (("lr", "0.5"), ("temperature", "0.5"), ("local_weight", "1")):
        assert main([*resumed, f"--model.{option}", value]) == 2
        assert f"model.{option} is {value}" in capsys.readouterr().err
    for option, value in (("dense_blocks", "1"), ("layers", "[3]"), ("prompt.n_ctx", "9")):
        test = ["test", f"--ckpt_path={checkpoint}", f"--output.root={tmp_path / 'no'}"]
        assert main([*test, f"--model.{option}", value]) == 2, option
        assert f"model.{option.split('.')[0]}" in capsys.readouterr().err
    assert main(["test", *by_file[1:]]) == 2
    assert "AnomalyCLIP must be fitted first" in capsys.readouterr().err


@pytest.mark.slow
def test_a_fit_that_starts_with_prompts_of_other_sizes_can_be_tested(
    tmp_path: Path, mvtec_root: Path, trained_on: VisA, clip_config: str
) -> None:
    words = command(mvtec_root, trained_on.root, clip_config, tmp_path / "runs")
    assert main([*words, "--trainer.max_epochs", "1", "--model.prompt.n_ctx", "6"]) == 0
    first = tmp_path / "runs" / "AnomalyCLIP" / "1-fit"
    file = str(first / "prompts.pth")
    assert main([*words, "--trainer.max_epochs", "1", "--model.prompts_file", file]) == 0
    second = first.parent / "2-fit"
    assert main(["test", "--ckpt_path", str(second), f"--output.root={tmp_path / 't'}"]) == 0
    resumed = [*words, "--ckpt_path", str(second), "--trainer.max_epochs", "2"]
    assert main(resumed) == 0
    [checkpoint] = (second / "checkpoints").glob("*.ckpt")
    loaded = AnomalyCLIP.load_from_checkpoint(checkpoint, map_location="cpu")
    assert loaded.prompts.shallow.context.shape[1] == 6
    assert loaded.text().shape[1] == 2
    metrics = json.loads((tmp_path / "t" / "AnomalyCLIP" / "1-test" / "metrics.json").read_text())
    protocol = metrics["run"]["protocol"]
    assert protocol["started_from"]["file"] == file
    assert protocol["overlap"] is None  # what the file was trained on is unknown


@pytest.mark.slow
def test_two_processes_train_the_same_prompts_as_one(
    tmp_path: Path, mvtec_root: Path, trained_on: VisA, clip_config: str
) -> None:
    words = command(mvtec_root, trained_on.root, clip_config, tmp_path / "runs")
    words += ["--trainer.max_epochs", "2", "--data.auxiliary.shuffle", "false"]
    # The losses are means over images.
    assert main([*words, "--data.auxiliary.batch_size", "4", "--output.name", "one"]) == 0
    ddp = ["--trainer.strategy", "ddp", "--trainer.devices", "2", "--output.name", "two"]
    done = run_command([*words, "--data.auxiliary.batch_size", "2", *ddp], 2)
    assert done.returncode == 0, done.stderr[-2000:]
    single, double = (
        torch.load(tmp_path / "runs" / name / "1-fit" / "prompts.pth", weights_only=True)
        for name in ("one", "two")
    )
    for key, value in single[PROMPTS_KEY].items():
        if "ctx" in key or "compound" in key:
            off = ((double[PROMPTS_KEY][key] - value).abs() > 1e-3).float().mean()
            assert off < 0.05, key
        else:
            assert torch.equal(double[PROMPTS_KEY][key], value), key


@pytest.mark.slow
def test_projections_are_for_prompts_only(
    tmp_path: Path, mvtec_root: Path, tiny_clip_config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = CLIPSettings(tiny_clip_config, "random")
    trainer = quiet_trainer()
    for name, method, more, message in (
        ("sdp", SDP(settings), [], "not for --ckpt_path .*sdp.ckpt of SDP: leave it out"),
        (
            "ours",
            AnomalyCLIP(settings),
            ["--format", "onnx"],
            "but --format onnx writes a detector",
        ),
    ):
        trainer.strategy.connect(method)
        trainer.save_checkpoint(tmp_path / f"{name}.ckpt")
        kind = {"class_path": f"anomaly_clip.methods.{type(method).__name__}"}
        (tmp_path / "config-fit.yaml").write_text(json.dumps({"model": kind}))
        words = ["export", "--ckpt_path", str(tmp_path / f"{name}.ckpt"), "--projections", *more]
        assert main(words) == 2
        assert re.search(message, capsys.readouterr().err)
    assert main(["export", "--config", "sdp", "--projections"]) == 2
    assert "is for the prompts of AnomalyCLIP, not for a detector" in capsys.readouterr().err


# -- Python ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_fit_from_python_gives_a_detector(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = write_photographs(tmp_path / "parts" / "good", 12, seed=0)
    small: dict[str, Any] = {
        "data.auxiliary.num_test": 2,
        "data.auxiliary.categories": ["steel nut", "white pill"],
        "data.val_split": "none",
        "trainer.max_epochs": 1,
    }
    detector = anomaly_clip.fit(
        "anomalyclip_demo", good.parent, folder=tmp_path / "run", alpha=0.2, **small
    )
    image = good / "3.png"
    prediction = detector.predict(image)
    assert prediction.decision in ("normal", "anomalous")
    file = str(tmp_path / "run" / "prompts.pth")
    backbone = CLIPSettings("demo", "demo", 160, positions="bilinear")
    method = AnomalyCLIP(backbone, prompts_file=file, sigma=1.2)
    others = (
        anomaly_clip.load(tmp_path / "run"),
        anomaly_clip.load(method, category="part"),
        anomaly_clip.load("anomalyclip_demo", model={"prompts_file": file}),
    )
    for other in others:
        again = other.predict(image)
        assert again.score == pytest.approx(prediction.score, abs=1e-6)
    crane = anomaly_clip.load(
        "anomalyclip_demo", model={"prompts_file": file, "inference": "crane"}
    )
    assert crane.predict(image).score != pytest.approx(prediction.score, abs=1e-6)
    words = ["predict", f"--ckpt_path={tmp_path / 'run'}", "--data=ImageFolder"]
    words += [f"--data.root={good}", f"--output.folder={tmp_path / 'p'}", "--model.inference=crane"]
    capsys.readouterr()
    assert main(words) == 2  # the calibration is that of other scores
    assert "model.inference is crane, but" in capsys.readouterr().err
    with pytest.raises(ValueError, match="AnomalyCLIP must be fitted first"):
        anomaly_clip.load("anomalyclip_demo")
