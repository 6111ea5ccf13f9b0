from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import SMALL_CLIP
from safetensors import safe_open
from safetensors.torch import load_file

from anomaly_clip.backbones.clip import CLIPBackbone, Window
from anomaly_clip.cli import main
from anomaly_clip.demo.photographs import CATEGORIES, DEFECTS
from anomaly_clip.methods import SDP, Contrastive
from anomaly_clip.methods.contrastive_captions import ImageLabels
from anomaly_clip.methods.contrastive_network import PartEmbedding
from anomaly_clip.records import Batch
from anomaly_clip.testing.processes import run_command


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(SMALL_CLIP))
    return path


def scenes(n: int = 3, size: int = 48) -> Batch:
    generator = torch.Generator().manual_seed(1)
    image = torch.randint(0, 256, (n, 3, size, size), generator=generator, dtype=torch.uint8)
    mask = torch.zeros(n, size, size, dtype=torch.bool)
    mask[:, 10:20, 30:44] = True
    synthetic = torch.where(mask[:, None], 255 - image, image)
    return Batch(
        image=image,
        synthetic=synthetic,
        synthetic_mask=mask,
        label=torch.zeros(n, dtype=torch.bool),
        category=["oak wood board", "steel washer", "blue denim cloth"][:n],
        path=[""] * n,
        index=torch.arange(n),
        defect=["scratch", "stain", "hole"][:n],
    )


def test_a_window_uses_its_own_positional_embeddings(tiny: Path) -> None:
    torch.manual_seed(0)
    backbone = CLIPBackbone(str(tiny), "random")
    images = scenes()["image"]
    with torch.no_grad():
        whole = backbone.embed(images)[:, 1:].unflatten(1, (6, 6))
        part = backbone.embed(images[:, :, 8:40, 16:48], Window(1, 2, 4))
    torch.testing.assert_close(part[:, 1:].unflatten(1, (4, 4)), whole[:, 1:5, 2:6])
    with pytest.raises(ValueError, match=r"expected images \(B, 3, 32, 32\)"):
        backbone.embed(images, Window(0, 0, 4))


def module(tiny: Path, **options: Any) -> Contrastive:
    torch.manual_seed(0)
    backbone = CLIPBackbone(str(tiny), "random")
    return Contrastive(backbone, windows={32: 0.7}, **options)


def test_windows_contain_part_of_the_defect_and_strengthen_it(tiny: Path) -> None:
    learner, batch = module(tiny), scenes()
    for seed in range(10):
        rng = np.random.default_rng(seed)
        images, masks, window = learner.windows(batch, rng, done=0.1)
        assert images.shape == (3, 2, 3, 32, 32)
        assert masks.flatten(1).any(1).all()
        assert window is not None
        assert window.side == 4
        same = (images[:, 0] == images[:, 1]).all(1)
        assert same[~masks].all()
    rng = np.random.default_rng(0)
    images, masks, window = learner.windows(batch, rng, done=0.9)
    assert window is None
    assert torch.equal(images[:, 1] * 255, batch["synthetic"].float())
    assert torch.equal(masks, batch["synthetic_mask"])


def test_patch_targets(tiny: Path) -> None:
    masks = torch.zeros(1, 48, 48, dtype=torch.bool)
    masks[0, 0:8, 8:16] = True  # all of patch 1
    masks[0, 8, 0:2] = True  # 2 of 64 pixels of patch 6: ignored
    targets = module(tiny).patch_targets(masks)
    assert targets.shape == (2, 36)
    assert not targets[0].any()
    assert targets[1].nonzero().flatten().tolist() == [1, 6]
    assert targets[1, 1] == 1
    assert targets[1, 6] == -1


@pytest.mark.parametrize("done", [0.0, 0.5, 1.0])
def test_gradients_reach_all_trained_parameters(tiny: Path, done: float) -> None:
    learner = module(tiny)
    losses, seen = learner.losses(scenes(), np.random.default_rng(0), done)
    assert set(losses) == {"contrast", "state", "order", "local", "local_order"} | (
        {"indifference"} if done >= 0.3 else set()
    )
    assert seen.state.shape == (6,)
    torch.stack(list(losses.values())).sum().backward()
    without = [n for n, p in learner.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    assert not learner.backbone.model.logit_scale.requires_grad


def test_the_fused_map_equals_that_of_sdp(tiny: Path) -> None:
    learner = module(tiny)
    batch = scenes()
    rng = np.random.default_rng(5)
    learner.relight = lambda images, rng: (images, [None] * len(images))  # type: ignore[method-assign]
    _, seen = learner.losses(batch, rng, done=1.0)
    rng = np.random.default_rng(5)
    learner.windows(batch, rng, done=1.0)
    captions = [
        learner.captions.draw(ImageLabels(category, kind, None), rng)
        for category, defect in zip(batch["category"], batch["defect"], strict=True)
        for kind in (None, defect)
    ]
    with torch.no_grad():
        words = F.normalize(learner.backbone.encode_text([c.text for c in captions]), dim=-1)
        text = F.normalize(torch.stack([words[0::2].mean(0), words[1::2].mean(0)]), dim=-1).T
        sdp = SDP(learner.backbone)
        stages, classes = sdp.encode(batch["synthetic"])
        length = (text[:, 1] - text[:, 0]).norm()
        # Contrastive scales the texts so that their difference has unit length. This changes the
        # weights that SDP derives from the class token, so the same scale is used here.
        targets = sdp.similarity([s.projected for s in stages], (text / length).expand(3, -1, -1))
        state = 100 * F.normalize(classes, dim=-1) @ (text[:, 1] - text[:, 0])
    torch.testing.assert_close(seen.fused[1::2], targets[:, 1:], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(seen.state[1::2], state, atol=1e-3, rtol=1e-3)


def test_every_word_except_random_nouns_is_trained(tiny: Path) -> None:
    """Covers words of states, templates and categories; captions name no held-out defect."""
    method = Contrastive({"name": str(tiny), "pretrained": "random"})  # type: ignore[arg-type]
    embedding = method.backbone.model.token_embedding
    assert isinstance(embedding, PartEmbedding)
    rng = np.random.default_rng(0)
    method.captions.vocabulary = ["object"]  # no random nouns
    for category in (kind.words for kind in CATEGORIES.values()):
        for defect in (None, "scratch"):
            caption = method.captions.draw(ImageLabels(category, defect, "dark"), rng).text
            ids = method.backbone.tokenize([caption])
            assert (embedding.places[ids] >= 0).all(), caption
    assert len(embedding.tokens) < 400


def test_mixed_precision_has_nearly_the_same_gradients(tiny: Path) -> None:
    torch.manual_seed(0)
    method = Contrastive({"name": str(tiny), "pretrained": "random"})  # type: ignore[arg-type]
    gradients = []
    for mixed in (None, torch.bfloat16):
        losses, _ = method.losses(scenes(), np.random.default_rng(0), 0.5, mixed)
        method.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        trained = [p.grad for p in method.parameters() if p.grad is not None]
        gradients.append(torch.cat([g.flatten() for g in trained]))
    assert all(g.dtype == torch.float32 for g in gradients)
    full, half = gradients
    assert not torch.equal(full, half)
    assert torch.cosine_similarity(full, half, dim=0) > 0.999


def run_command_line(tiny: Path, root: Path, *more: str) -> list[str]:
    return [
        "fit", "--model", "Contrastive", "--model.backbone.name", str(tiny),
        "--model.backbone.pretrained", "random", "--model.windows", "{32: 0.7}",
        "--model.lr", "0.01",
        "--data", "Demo", "--data.categories", "[oak wood board]",
        "--data.train_categories", "[steel washer, blue denim cloth]",
        "--data.num_scenes", "6", "--data.picture_size", "64", "--data.batch_size", "2",
        "--data.num_workers", "0", "--output.root", str(root), "--output.name", "tiny",
        "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false",
        "--trainer.enable_model_summary", "false", "--trainer.log_every_n_steps", "1", *more,
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*Checkpoint directory.*exists:UserWarning")
def test_fit_exports_weights_and_resumes_where_it_stopped(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fit resumed after its first epoch has the same final weights as an uninterrupted fit."""
    root = tmp_path / "runs"
    assert main(run_command_line(tiny, root, "--trainer.max_epochs", "2")) == 0
    whole = root / "tiny" / "1-fit"
    assert f"weights: {whole / 'clip.safetensors'}" in " ".join(capsys.readouterr().err.split())
    # The schedule depends on trainer.max_epochs, so that stays 2 and a callback stops the fit.
    first = ["--trainer.max_epochs", "2", "--trainer.callbacks+", "toy.StopAfterOneEpoch"]
    assert main(run_command_line(tiny, root, *first)) == 0
    checkpoint = next((root / "tiny" / "2-fit" / "checkpoints").glob("*.ckpt"))
    resumed = ["--trainer.max_epochs", "2", "--ckpt_path", str(checkpoint)]
    assert main(run_command_line(tiny, root, *resumed)) == 0
    ours, theirs = (
        load_file(root / "tiny" / f"{number}-fit" / "clip.safetensors") for number in ("1", "3")
    )
    assert all(value.dtype == torch.float16 for value in ours.values())
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    with safe_open(whole / "clip.safetensors", "pt") as file:
        record = json.loads(file.metadata()["trained_on"])
    assert record["categories"] == ["steel washer", "blue denim cloth"]
    assert record["pictures"] == 24
    stopped = load_file(root / "tiny" / "2-fit" / "clip.safetensors")
    assert not torch.equal(ours["visual.proj"], stopped["visual.proj"])
    backbone = CLIPBackbone(str(tiny), str(whole / "clip.safetensors"))
    assert torch.equal(backbone.visual.proj, ours["visual.proj"].float())


@pytest.mark.slow
def test_resuming_checks_the_checkpoint(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "runs"
    every = {
        "class_path": "ModelCheckpoint",
        "init_args": {"every_n_train_steps": 2, "save_top_k": -1},
    }
    more = ["--trainer.max_epochs", "2", "--trainer.callbacks+", json.dumps(every)]
    assert main(run_command_line(tiny, root, *more)) == 0
    [inside] = (root / "tiny" / "1-fit" / "checkpoints").glob("*step=4.ckpt")
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**SMALL_CLIP, "embed_dim": 8}))
    for change, message in (
        (["--model.lr", "0.5"], "model.lr is 0.5, but"),
        (["--model.prompts.templates", '["a photo of {}."]'], "model.prompts is"),
        (["--model.backbone.name", str(other)], "model.backbone is {'name': "),
        ([], "the checkpoint was saved in the middle of an epoch, after batch 1"),
    ):
        words = run_command_line(tiny, root, "--trainer.max_epochs", "3", *change)
        assert main([*words, "--ckpt_path", str(inside)]) == 2
        assert message in capsys.readouterr().err


def test_two_processes_share_the_scenes(tiny: Path, tmp_path: Path) -> None:
    more = ["--trainer.max_epochs", "1", "--trainer.strategy", "ddp", "--trainer.devices", "2"]
    more += ["--trainer.precision", "bf16-mixed"]
    done = run_command(run_command_line(tiny, tmp_path, *more), processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [path.name for path in (tmp_path / "tiny").iterdir()] == ["1-fit"]
    run = tmp_path / "tiny" / "1-fit"
    [checkpoint] = (run / "checkpoints").glob("*.ckpt")
    # Six scenes are one full step: each of the two processes uses two scenes per step.
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 1
    weights = load_file(run / "clip.safetensors")
    assert all(value.isfinite().all() for value in weights.values())


def test_invalid_options_are_rejected(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "runs"
    epochs = ["--trainer.max_epochs", "1"]
    for more, message in (
        (
            ["--model.windows", "{30: 0.5}"],
            "model.windows 30: expected sides that are multiples of the patch size 8",
        ),
        (["--data.num_scenes", "null"], "data.num_scenes of Demo is not set: set --data"),
        (["--data.num_scenes", "1"], "data.num_scenes 1 is less than a batch of data.batch_size 2"),
        (["--trainer.max_epochs", "-1"], "set trainer.max_epochs to 1 or more, or set"),
        (["--model.logit_scale", "0"], "model.logit_scale must be 0.001 or more, got 0"),
        (["--model.seed", "-1"], "model.seed must be 0 or more"),
        (
            ["--model.prompts.templates", '["a dark photo of {}."]'],
            "prompts.templates ['a dark photo of {}.']: every template has",
        ),
        (
            ["--model.prompts.states_abnormal", '["{} with crack"]'],
            "prompts.states_abnormal ['{} with crack']: every",
        ),
        (["--ckpt_path", "none.ckpt"], "--ckpt_path none.ckpt: there is no such file"),
    ):
        assert main(run_command_line(tiny, root, *epochs, *more)) == 2
        assert message in capsys.readouterr().err
    assert not list(root.glob("tiny/*"))
    tested = ["test", *run_command_line(tiny, root)[1:]]
    assert main(tested) == 2
    assert "Contrastive scores no images: use fit" in capsys.readouterr().err


def test_one_category_of_every_larger_family_is_held_out() -> None:
    import yaml

    config = yaml.safe_load(Path("configs/demo_clip.yaml").read_text())["data"]["init_args"]
    held_out = set(config["categories"])
    families: dict[str, list[str]] = {}
    for category in CATEGORIES.values():
        families.setdefault(category.family, []).append(category.words)
    assert held_out == {words[1] for words in families.values() if len(words) > 2}
    assert config["train_categories"] == "others"
    assert len(held_out) >= 6
    assert set(config["held_out_defects"]) <= set(DEFECTS)
    assert config["held_out_defects"]
