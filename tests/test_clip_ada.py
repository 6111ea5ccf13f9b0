from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import quiet_trainer, save_picture
from PIL import Image
from scipy.ndimage import uniform_filter
from torch import Tensor
from torch.testing import assert_close
from torchvision.ops import sigmoid_focal_loss

from anomaly_clip.backbones.clip import CLIPBackbone, CLIPSettings, unit
from anomaly_clip.backbones.learnable_prompt import LearnablePromptSettings
from anomaly_clip.backbones.surgery import encode_layers
from anomaly_clip.cli import main
from anomaly_clip.data import MVTecAD
from anomaly_clip.losses import batch_dice_loss
from anomaly_clip.methods import CLIPADA
from anomaly_clip.methods.clip_ada import LossSettings, MapSettings, OptimSettings, PatchLogits
from anomaly_clip.methods.clip_ada_refinement import RefinementSettings
from anomaly_clip.synthesis import SynthesisSettings
from anomaly_clip.testing.processes import run_command

PERLIN = SynthesisSettings("perlin", share=0.5)


def tiny(clip: CLIPBackbone, **options: Any) -> CLIPADA:
    return CLIPADA(clip, **{"feature_layer": 2, **options})


def noise(count: int, side: int = 32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side, side), generator=generator).byte()


@pytest.fixture(scope="module")
def base() -> CLIPADA:
    """Return the method on a random ViT-B/16 at 224 pixels."""
    torch.manual_seed(0)
    return CLIPADA(CLIPSettings("ViT-B-16-quickgelu", "random", 224))


def test_trained_parameters_and_their_number(base: CLIPADA) -> None:
    trained = {name: p.numel() for name, p in base.named_parameters() if p.requires_grad}
    assert sum(trained.values()) == 7_884_289
    assert trained["prompt.context"] == 8192
    head = sum(count for name, count in trained.items() if name.startswith("heads."))
    refinement = sum(count for name, count in trained.items() if name.startswith("refinement."))
    assert (head, refinement) == (393_728, 7_482_369)
    direction = base.direction()
    assert direction.norm().item() == pytest.approx(1, abs=1e-5)
    encoded = base.encode(noise(2, 224), direction)
    assert encoded.coarse.shape == encoded.fine[0].shape == (2, 196)
    (tokens,) = encode_layers(base.backbone, noise(2, 224), [7])
    assert tokens.shape == (2, 197, 768)


def test_gradients_reach_exactly_the_trained_parameters(base: CLIPADA) -> None:
    base.train()
    assert not any(module.training for module in base.backbone.modules())
    mask = torch.zeros(2, 224, 224, dtype=torch.bool)
    mask[0, 50:90, 50:90] = True
    terms = base.losses(base.encode(noise(2, 224), base.direction()), mask, torch.tensor([1, 0]))
    torch.stack(list(terms.values())).sum().backward()
    reached = {name for name, p in base.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {name for name, p in base.named_parameters() if p.requires_grad}
    assert not any(name.startswith("backbone.") for name in reached)


def test_logits_are_cosines_divided_by_the_temperature(tiny_clip: CLIPBackbone) -> None:
    method = tiny(tiny_clip, taps=[1, 2], tau=0.1)
    images = noise(2)
    text = method.direction()
    encoded = method.encode(images, text)
    by_hand = [
        unit(head.linear(F.layer_norm(tokens[:, 1:], (24,)))) @ text / 0.1  # type: ignore[operator]
        for head, tokens in zip(method.heads, encode_layers(tiny_clip, images, [1, 2]), strict=True)
    ]
    assert_close(encoded.coarse, (by_hand[0] + by_hand[1]) / 2, atol=1e-5, rtol=0)
    assert_close(method.fused(encoded), (encoded.coarse + encoded.fine[0]) / 2)
    literal = tiny(tiny_clip, refine=RefinementSettings(fuse="fine"))
    encoded = literal.encode(images, text)
    assert_close(literal.fused(encoded), encoded.fine[0])


def test_with_two_prompts_the_sigmoid_equals_the_softmax(tiny_clip: CLIPBackbone) -> None:
    method = tiny(tiny_clip, prompt=LearnablePromptSettings(n_prompts=2))
    images = noise(1)
    text = method.prompt(tiny_clip)
    (tokens,) = encode_layers(tiny_clip, images, [2])
    features = method.heads[0](tokens[:, 1:])
    softmax = (features @ text.T / 0.07).softmax(-1)[..., 1]
    encoded = method.encode(images, method.direction())
    assert_close(encoded.coarse.sigmoid(), softmax, atol=1e-5, rtol=0)


def test_each_step_is_guided_by_the_previous_one(tiny_clip: CLIPBackbone) -> None:
    method = tiny(tiny_clip, refine=RefinementSettings(steps=2))
    images = noise(1)
    text = method.direction()
    encoded = method.encode(images, text)
    assert len(encoded.fine) == 2
    (tokens,) = encode_layers(tiny_clip, images, [2])
    assert method.refinement is not None
    second = method.refinement(tiny_clip, tokens, encoded.fine[0].sigmoid())
    assert_close(encoded.fine[1], method.logits(second, text), atol=1e-5, rtol=0)
    without = tiny(tiny_clip, refine=RefinementSettings("none"))
    encoded = without.encode(images, text)
    assert encoded.fine == []
    assert_close(without.fused(encoded), encoded.coarse)


def test_the_loss_of_right_and_wrong_maps(tiny_clip: CLIPBackbone) -> None:
    method = tiny(tiny_clip)
    mask = torch.zeros(2, 32, 32, dtype=torch.bool)
    mask[0, :16] = True
    right = torch.where(F.avg_pool2d(mask[:, None].float(), 8).flatten(1) > 0.5, 20.0, -20.0)
    # The defect ends at a patch edge. There, interpolated logits are near 0 and cost a little.
    nothing = torch.zeros_like(mask)
    assert method.segmentation_loss(torch.full((2, 16), -20.0), nothing).item() < 1e-3
    full = torch.ones_like(mask)
    assert method.segmentation_loss(torch.full((2, 16), 20.0), full).item() < 1e-3
    assert method.segmentation_loss(torch.full((2, 16), -20.0), full).item() > 20
    assert method.segmentation_loss(right, mask) < 0.02 * method.segmentation_loss(-right, mask)


def test_the_terms_of_the_loss(tiny_clip: CLIPBackbone) -> None:
    settings = LossSettings(focal=3, dice=2, normal_dice=1, coarse=0.25, image=0.5)
    method = tiny(tiny_clip, loss=settings)
    generator = torch.Generator().manual_seed(0)
    coarse, fine = (torch.randn(2, 16, generator=generator) for _ in range(2))
    encoded = PatchLogits(coarse, [fine], torch.empty(0))
    mask = torch.rand(2, 4, 4, generator=generator) > 0.7
    label = torch.tensor([True, False])

    def by_hand(logits: Tensor) -> float:
        logits = logits.view(2, 4, 4)
        probability = logits.sigmoid()
        focal = sigmoid_focal_loss(logits, mask.float(), alpha=-1, reduction="mean")
        dice = batch_dice_loss(probability, mask) * 2 + batch_dice_loss(1 - probability, ~mask)
        return float(3 * focal + dice)

    terms = method.losses(encoded, mask, label)
    assert float(terms["coarse"]) == pytest.approx(0.25 * by_hand(encoded.coarse), rel=1e-5)
    assert float(terms["fine"]) == pytest.approx(by_hand(encoded.fine[0]), rel=1e-5)
    highest = encoded.fine[0].max(dim=1).values  # a hundredth of 16 patches, at least one
    image = F.binary_cross_entropy_with_logits(highest, label.float())
    assert float(terms["image"]) == pytest.approx(0.5 * float(image), rel=1e-5)
    # Without refinement the coarse map has weight 1.
    terms = method.losses(encoded._replace(fine=[]), mask, label)
    assert float(terms["coarse"]) == pytest.approx(by_hand(encoded.coarse), rel=1e-5)
    assert set(terms) == {"coarse", "image"}


def test_maps_and_scores(tiny_clip: CLIPBackbone) -> None:
    method = tiny(tiny_clip, map=MapSettings(eval_size=64, sigma=8.0)).eval()
    images = noise(4)
    scores = method.score(images, ["a"] * 4)
    maps = scores["anomaly_map"]
    assert maps.shape == (4, 64, 64)
    assert 0 <= float(maps.min()) <= float(maps.max()) <= 1
    assert_close(scores["image_score"], maps.flatten(1).amax(1))
    for row in range(4):
        alone = method.score(images[row : row + 1], ["b"])  # the category does not matter
        assert_close(alone["anomaly_map"][0], maps[row], atol=1e-4, rtol=0)
    with torch.no_grad():
        encoded = method.encode(images, method.direction())
    assert set(scores["stage_maps"]) == {"coarse", "fine"}
    grid = encoded.coarse.view(4, 1, 4, 4)
    coarse = F.interpolate(grid, (32, 32), mode="bilinear", align_corners=False).sigmoid()
    coarse = F.interpolate(coarse, (64, 64), mode="bilinear", align_corners=False)[:, 0]
    assert_close(scores["stage_maps"]["coarse"], coarse, atol=1e-6, rtol=0)


def test_rules_of_the_image_score(tiny_clip: CLIPBackbone) -> None:
    images = noise(2)
    scores = {}
    for rule in ("max", "avgpool_max", "topk_mean"):
        settings = MapSettings(eval_size=64, image_score=rule)
        outputs = tiny(tiny_clip, map=settings).score(images, ["a"] * 2)
        scores[rule] = outputs["image_score"].double().numpy()
    maps = outputs["anomaly_map"].double().numpy()
    for row, anomaly_map in enumerate(maps):
        pooled = uniform_filter(anomaly_map, 16, origin=-8)[:49, :49]  # windows inside the map
        assert scores["max"][row] == pytest.approx(anomaly_map.max(), abs=1e-5)
        assert scores["avgpool_max"][row] == pytest.approx(pooled.max(), abs=1e-5)
        highest = np.sort(anomaly_map.ravel())[-round(0.001 * 64 * 64) :]
        assert scores["topk_mean"][row] == pytest.approx(highest.mean(), abs=1e-5)


def test_the_prompt_is_encoded_again_after_a_change(tiny_clip: CLIPBackbone) -> None:
    method = tiny(tiny_clip)
    before = method.score(noise(1), ["a"])["anomaly_map"]
    with torch.no_grad():
        method.prompt.context.mul_(-30)
    after = method.score(noise(1), ["a"])["anomaly_map"]
    assert not torch.allclose(before, after, atol=1e-3)


def test_fifty_steps_on_one_batch_lower_the_loss(tmp_path: Path) -> None:
    config = {
        "embed_dim": 32,
        "vision_cfg": {
            "image_size": 64,
            "layers": 4,
            "width": 64,
            "head_width": 32,
            "patch_size": 16,
        },
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 49408,
            "width": 32,
            "heads": 2,
            "layers": 1,
        },
    }
    (tmp_path / "clip.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    method = CLIPADA(CLIPSettings(str(tmp_path / "clip.json"), "random"), feature_layer=2)
    rng = np.random.default_rng(0)
    texture = np.kron(rng.integers(60, 200, (4, 3, 16, 16)), np.ones((4, 4))).astype(np.uint8)
    synthetic = [
        PERLIN.build("perlin", "")(image.transpose(1, 2, 0), rng, None, None) for image in texture
    ]
    images = torch.from_numpy(np.stack([item.image.transpose(2, 0, 1) for item in synthetic]))
    mask = torch.from_numpy(np.stack([item.mask for item in synthetic]))
    label = mask.flatten(1).any(1)
    assert label.any()
    optimizer = torch.optim.AdamW(list(method.parameter_groups(1e-4)), lr=1e-3)
    totals = []
    for _ in range(50):
        terms = method.losses(method.encode(images, method.direction()), mask, label)
        total = torch.stack(list(terms.values())).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(float(total.detach()))
    assert totals[-1] < 0.7 * totals[0]


@pytest.fixture
def learnable(mvtec_root: Path) -> Path:
    """Return an MVTec-AD folder with six textured training images per category."""
    rng = np.random.default_rng(0)
    for category in sorted(path for path in mvtec_root.iterdir() if path.is_dir()):
        for number in range(6):
            cells = rng.integers(60, 200, (10, 10, 3))
            array = np.kron(cells, np.ones((4, 4, 1))).astype(np.uint8)
            save_picture(category / "train" / "good" / f"{100 + number}.png", array)
    return mvtec_root


def data_of(root: Path, **options: Any) -> MVTecAD:
    return MVTecAD(str(root), **{"synthesis": PERLIN, "num_workers": 0, "batch_size": 4, **options})


def test_the_rate_warms_up_and_falls_to_a_hundredth(
    tiny_clip: CLIPBackbone, learnable: Path
) -> None:
    method = tiny(tiny_clip, optim=OptimSettings(warmup_steps=2))
    trainer = quiet_trainer(max_steps=40, max_epochs=-1)
    rates: list[float] = []
    method.on_train_batch_end = lambda *_: rates.append(  # type: ignore[method-assign]
        trainer.optimizers[0].param_groups[0]["lr"]
    )
    trainer.fit(method, data_of(learnable))
    assert len(rates) == 40
    highest = max(rates)
    assert highest == pytest.approx(2e-3)
    assert rates[0] == pytest.approx(2e-3)  # rate of step 2, the last of the warm-up
    assert rates[-1] == pytest.approx(2e-5, rel=0.01)
    assert rates[20] == pytest.approx(
        2e-3 * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * 19 / 38)))
    )
    # Fewer than a hundred images: ten times the weight decay.
    assert trainer.optimizers[0].param_groups[1]["weight_decay"] == pytest.approx(1e-3)


def test_the_schedule_needs_a_number_of_steps(tiny_clip: CLIPBackbone, learnable: Path) -> None:
    with pytest.raises(ValueError, match="1 or more, or set"):
        quiet_trainer(max_epochs=-1).fit(tiny(tiny_clip), data_of(learnable))


@pytest.mark.parametrize(
    "synthesis", [None, SynthesisSettings("perlin", mode="pair"), SynthesisSettings(share=0.0)]
)
def test_fit_needs_synthetic_defects(
    tiny_clip: CLIPBackbone, learnable: Path, synthesis: SynthesisSettings | None
) -> None:
    given = f"has mode {synthesis.mode} and share" if synthesis else "is not set"
    message = f"CLIPADA is trained on synthetic defects, but data.synthesis {given}"
    with pytest.raises(ValueError, match=message):
        quiet_trainer(max_epochs=1).fit(tiny(tiny_clip), data_of(learnable, synthesis=synthesis))


def words(verb: str, root: Path, clip: str, runs: Path) -> list[str]:
    command = [verb, "--model", "CLIPADA", "--model.backbone.name", clip]
    command += ["--model.backbone.pretrained", "random", "--model.backbone.image_size", "32"]
    command += ["--model.feature_layer", "2", "--model.map.eval_size", "32"]
    command += ["--data", "MVTecAD", "--data.root", str(root), "--data.num_workers", "0"]
    command += ["--data.batch_size", "4", "--data.synthesis.recipe", "perlin"]
    command += ["--data.val_split", "synthetic", "--data.val_share", "0.3"]
    command += ["--trainer.accelerator", "cpu", "--trainer.log_every_n_steps", "1"]
    return [*command, "--trainer.max_epochs", "2", "--output.root", str(runs)]


@pytest.mark.slow
def test_fit_test_and_predict(
    learnable: Path, tiny_clip_config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words("fit", learnable, tiny_clip_config, tmp_path / "runs")) == 0
    run = tmp_path / "runs" / "CLIPADA" / "1-fit"
    [checkpoint] = (run / "checkpoints").iterdir()
    assert checkpoint.name == "last.ckpt"
    kept = torch.load(checkpoint, weights_only=True)
    assert not any(key.startswith("backbone.") for key in kept["state_dict"])
    sizes = [p.numel() for p in kept["state_dict"].values()]
    assert sum(sizes) < 10_000  # the tiny CLIP alone has 400,000
    with (run / "logs" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    logged = {name for row in rows for name, value in row.items() if value}
    steps = ["loss", "coarse", "fine", "image", "coarse_on", "coarse_off", "fine_on", "fine_off"]
    steps += ["beta", "shift", "prompt_drift", "prompt_cosine_on", "lr_head"]
    assert logged >= {f"train/{name}" for name in steps}
    assert logged >= {"val/image_auroc", "val/pixel_ap"}
    sheets = sorted((run / "validation").iterdir())
    assert len(sheets) == 2  # one per epoch, none from the sanity check
    with Image.open(sheets[0]) as sheet:
        assert sheet.width == 5 * 240 + 4 * 4  # image, coarse, fine, map, mask
    tested = ["test", "--ckpt_path", str(checkpoint), "--output.root", str(tmp_path / "t")]
    assert main(tested) == 0
    assert (
        json.loads((tmp_path / "t/CLIPADA/1-test/metrics.json").read_text())["run"]["method"]
        == "CLIPADA"
    )
    predicted = ["predict", "--ckpt_path", str(checkpoint), "--output.stages", "true"]
    assert main([*predicted, "--output.root", str(tmp_path / "p")]) == 0
    with Image.open(next((tmp_path / "p").rglob("maps/**/*.png"))) as sheet:
        assert sheet.width > 4 * 240  # image, coarse, fine, map, and perhaps a mask
    capsys.readouterr()
    assert main(words("test", learnable, tiny_clip_config, tmp_path / "u")) == 2
    assert "CLIPADA must be fitted first" in capsys.readouterr().err


def test_a_checkpoint_gives_the_same_maps_on_another_copy(
    tiny_clip: CLIPBackbone, learnable: Path, tmp_path: Path
) -> None:
    state = tmp_path / "clip.pt"
    torch.save(tiny_clip.model.state_dict(), state)
    backbone = CLIPBackbone(tiny_clip.settings.name, str(state))
    method = tiny(backbone, refine=RefinementSettings(steps=2), taps=[1, 2])
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(method, data_of(learnable))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = CLIPADA.load_from_checkpoint(tmp_path / "a.ckpt")
    images = noise(2)
    fitted, loaded = (m.eval().score(images, ["a"] * 2) for m in (method, again))
    assert_close(fitted["anomaly_map"], loaded["anomaly_map"], atol=0, rtol=0)
    with torch.no_grad():
        backbone.visual.conv1.weight[0] += 1
    torch.save(backbone.model.state_dict(), state)
    with pytest.raises(ValueError, match="use the backbone and weights of the fit"):
        CLIPADA.load_from_checkpoint(tmp_path / "a.ckpt")


@pytest.mark.slow
def test_words_around_the_vectors_are_kept_with_the_checkpoint(
    learnable: Path, tiny_clip_config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = ["--model.prompt.prefix", "a photo of a", "--model.prompt.n_ctx", "2"]
    line = [*words("fit", learnable, tiny_clip_config, tmp_path / "f"), *fixed]
    assert main([*line, "--model.prompt.suffix", "object."]) == 0
    [checkpoint] = (tmp_path / "f").rglob("last.ckpt")
    saved = torch.load(checkpoint, weights_only=True)["hyper_parameters"]["prompt"]
    assert (saved["prefix"], saved["suffix"]) == ("a photo of a", "object.")
    test = ["test", "--ckpt_path", str(checkpoint), "--output.root", str(tmp_path / "t")]
    assert main(test) == 0
    capsys.readouterr()
    assert main([*test, "--model.prompt.prefix", "a"]) == 2
    assert "leave the option out, or fit again" in capsys.readouterr().err
    assert main([*line, "--model.prompt.n_ctx", "72"]) == 2
    assert "72 vectors and 4 tokens of prefix and suffix do not fit" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("when", "name"),
    [
        ({"save_on_train_epoch_end": True}, "epoch=0-*.ckpt"),
        ({"every_n_train_steps": 1}, "epoch=1-step=4.ckpt"),
    ],
    ids=["between epochs", "in the middle of an epoch"],
)
def test_a_resumed_fit_equals_an_uninterrupted_one(
    learnable: Path,
    tiny_clip_config: str,
    tmp_path: Path,
    when: dict[str, Any],
    name: str,
    workers: int,
) -> None:
    every = {"class_path": "ModelCheckpoint", "init_args": {"save_top_k": -1, **when}}
    line = [*words("fit", learnable, tiny_clip_config, tmp_path), "--seed_everything", "3"]
    line += ["--trainer.callbacks+", json.dumps(every), "--data.num_workers", str(workers)]
    assert main(line) == 0
    first = tmp_path / "CLIPADA" / "1-fit" / "checkpoints"
    [between] = first.glob(name)
    assert main([*line, "--ckpt_path", str(between)]) == 0
    states = [
        torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]
        for folder in (first, tmp_path / "CLIPADA" / "2-fit" / "checkpoints")
    ]
    assert_close(states[0], states[1], atol=0, rtol=0)


def test_half_precision_stays_close(tiny_clip_config: str, learnable: Path) -> None:
    losses: dict[str, list[float]] = {}
    maps: dict[str, Tensor] = {}
    for precision in ("32-true", "bf16-mixed"):
        torch.manual_seed(1)
        method = CLIPADA(CLIPSettings(tiny_clip_config, "random"), feature_layer=2)
        seen = losses.setdefault(precision, [])

        def note(outputs: dict[str, Tensor], *_: object, seen: list[float] = seen) -> None:
            seen.append(float(outputs["loss"]))

        method.on_train_batch_end = note  # type: ignore[method-assign,assignment]
        trainer = quiet_trainer(max_steps=20, max_epochs=-1, precision=precision)
        trainer.fit(method, data_of(learnable))
        maps[precision] = method.eval().score(noise(2), ["a"] * 2)["anomaly_map"]
    full, half = (np.array(losses[precision]) for precision in ("32-true", "bf16-mixed"))
    assert len(full) == 20
    assert not np.array_equal(full, half)
    np.testing.assert_allclose(half, full, rtol=0.05)
    assert_close(maps["bf16-mixed"], maps["32-true"], atol=0.05, rtol=0)


@pytest.mark.slow
def test_two_processes_learn_together(
    learnable: Path, tiny_clip_config: str, tmp_path: Path
) -> None:
    line = words("fit", learnable, tiny_clip_config, tmp_path)
    ddp = ["--trainer.strategy", "ddp", "--trainer.devices", "2"]
    compared = {"class_path": "ddp_checks.Compared", "init_args": {"file": str(tmp_path / "c")}}
    ddp += ["--trainer.callbacks+", json.dumps(compared)]
    done = run_command([*line, *ddp], processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    comparison = json.loads((tmp_path / "c").read_text())
    assert comparison["equal"]
    first, second = comparison["rows"]  # samples of two epochs, by process
    half = len(first) // 2
    for epoch in (slice(None, half), slice(half, None)):
        assert not set(first[epoch]) & set(second[epoch])
    assert set(first[:half]) | set(second[:half]) == set(first[half:]) | set(second[half:])
    assert [path.name for path in (tmp_path / "CLIPADA").iterdir()] == ["1-fit"]
    checkpoint = tmp_path / "CLIPADA" / "1-fit" / "checkpoints" / "last.ckpt"
    kept = torch.load(checkpoint, weights_only=True)
    assert all(value.isfinite().all() for value in kept["state_dict"].values())
    single = ["--trainer.strategy", "auto", "--trainer.devices", "1"]
    tested = ["test", "--ckpt_path", str(checkpoint), *single, "--output.root", str(tmp_path / "t")]
    assert main(tested) == 0


def test_diagnostics_of_the_maps(tiny_clip: CLIPBackbone) -> None:
    """Partly covered patches count as on the defect, weighted by coverage, and not as off it."""
    method = tiny(tiny_clip)
    generator = torch.Generator().manual_seed(0)
    coarse, fine = (torch.randn(2, 16, generator=generator) for _ in range(2))
    features = unit(torch.randn(2, 16, 12, generator=generator))
    direction = 3 * torch.randn(12, generator=generator)
    mask = torch.zeros(2, 32, 32, dtype=torch.bool)
    mask[0, 8:20, 8:16] = True  # a patch of 8 x 8 pixels, and half of the one below
    values = method.diagnostics(PatchLogits(coarse, [fine], features), mask, direction)
    parts = {5: 2 / 3, 9: 1 / 3}
    for name, logits in (("coarse", coarse), ("fine", fine)):
        probability = 1 / (1 + np.exp(-logits.numpy()))
        on = sum(part * probability[0, patch] for patch, part in parts.items())
        off = [v for patch, v in np.ndenumerate(probability) if patch not in {(0, 5), (0, 9)}]
        assert values[f"train/{name}_on"] == pytest.approx(on, rel=1e-5)
        assert values[f"train/{name}_off"] == pytest.approx(np.mean(off), rel=1e-5)
    now = (direction / direction.norm()).numpy()
    cosine = sum(part * features[0, patch].numpy() @ now for patch, part in parts.items())
    assert values["train/prompt_cosine_on"] == pytest.approx(cosine, abs=1e-5)
    drift = 1 - now @ method.start.numpy()
    assert values["train/prompt_drift"] == pytest.approx(drift, abs=1e-5)
    # In images without a defect, all patches count as off the defect.
    none = method.diagnostics(
        PatchLogits(coarse, [fine], features), torch.zeros_like(mask), direction
    )
    assert none["train/coarse_off"] == pytest.approx(float(coarse.sigmoid().mean()), rel=1e-5)
    assert not any(name.endswith("_on") for name in none)
    full = method.diagnostics(PatchLogits(coarse, [], features), torch.ones_like(mask), direction)
    assert full["train/coarse_on"] == pytest.approx(float(coarse.sigmoid().mean()), rel=1e-5)
    assert not any(name.endswith("_off") for name in full)
