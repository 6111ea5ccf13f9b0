from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file

from anomaly_clip.backbones.clip import CLIPBackbone, Window
from anomaly_clip.backbones.prompts import PromptEnsemble
from anomaly_clip.cli import main
from anomaly_clip.demo.photographs import CATEGORIES, DEFECTS
from anomaly_clip.methods import SDP, Contrastive
from anomaly_clip.methods.contrastive import (
    PartEmbedding,
    multi_positive,
    patch_loss,
    scale_values,
    separation,
    twin_loss,
)
from anomaly_clip.methods.contrastive_captions import Captions, Picture
from anomaly_clip.records import Batch

TINY = {
    "embed_dim": 16,
    "vision_cfg": {
        "image_size": 48,
        "patch_size": 8,
        "layers": 4,
        "width": 24,
        "head_width": 12,
    },
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(TINY))
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


def test_with_one_positive_each_the_loss_is_clips() -> None:
    logits = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    wanted = torch.arange(5)
    clip = (F.cross_entropy(logits, wanted) + F.cross_entropy(logits.T, wanted)) / 2
    ours = multi_positive(logits, torch.eye(5, dtype=torch.bool))
    torch.testing.assert_close(ours, clip)


def test_two_equal_sentences_are_no_mistake() -> None:
    fits = torch.tensor([[True, True, False], [True, True, False], [False, False, True]])
    right = torch.where(fits, 20.0, -20.0)
    assert multi_positive(right, fits).item() == pytest.approx(2 / 3 * np.log(2), abs=1e-4)


def test_patches_that_are_hardly_covered_do_not_count() -> None:
    logits = torch.tensor([[0.0, 9.0, 0.0]])
    wanted = torch.tensor([[0.0, -1.0, 1.0]])
    assert patch_loss(logits, wanted).item() == pytest.approx(np.log(2))
    # A patch on a defect weighs four times as much.
    sure = patch_loss(torch.tensor([[-50.0, 0.0, 0.0]]), wanted)
    assert sure.item() == pytest.approx(0.8 * np.log(2))


def test_twins_are_compared_where_the_defect_is() -> None:
    wanted = torch.tensor([[0.0, 0.0, 0.0], [0.0, -1.0, 1.0]])
    logits = torch.tensor([[5.0, -3.0, 2.0], [-5.0, 3.0, 3.5]])
    expected = np.log1p(np.exp(2.0 - 3.5))
    assert twin_loss(logits, wanted).item() == pytest.approx(expected)
    # How likely defects are at a place, which both twins share, does not matter.
    assert twin_loss(logits + 7, wanted).item() == pytest.approx(expected, rel=1e-5)
    assert twin_loss(logits, torch.zeros_like(wanted)).item() == 0


def test_separation_is_the_squared_effect_whatever_the_scale() -> None:
    rng = np.random.default_rng(0)
    normal, defective = rng.normal(0, 2, (500, 3)), rng.normal(1, 2, (500, 3))
    by_hand = np.mean(
        (defective.mean(0) - normal.mean(0)) ** 2
        / np.concatenate([normal, defective]).var(0, ddof=1)
    )
    one, other = torch.from_numpy(normal), torch.from_numpy(defective)
    assert separation(one, other).item() == pytest.approx(by_hand, rel=1e-4)
    assert separation(10 * one, 10 * other).item() == pytest.approx(by_hand, rel=1e-4)
    assert separation(one, one).item() == 0


def test_sentences_claim_only_what_is_true() -> None:
    prompts = PromptEnsemble()
    captions = Captions(prompts, ["cat", "river", "blue"])
    rng = np.random.default_rng(0)
    normal = Picture("oak wood board", None, "dark")
    scratched = Picture("oak wood board", "scratch", None)
    for _ in range(200):
        one, other = captions.draw(normal, rng), captions.draw(scratched, rng)
        assert one.fits(normal)
        assert other.fits(scratched)
        assert not one.fits(scratched)
        assert not other.fits(normal)
        assert ("oak wood board" in one.sentence) == (one.category is not None)
        assert ("scratch" in other.sentence) == (other.defect is not None)
        assert ("dark photo" in one.sentence) == (one.tone is not None)
        assert not any(tone in other.sentence for tone in ("dark", "bright", "blurry"))
    drawn = [captions.draw(scratched, rng) for _ in range(400)]
    assert 0.4 < np.mean([caption.category is not None for caption in drawn]) < 0.6
    assert 0.2 < np.mean([any(w in c.sentence for w in captions.vocabulary) for c in drawn]) < 0.4


def test_a_sentence_fits_other_pictures_by_state_noun_and_kind() -> None:
    captions = Captions(PromptEnsemble(), ["cat"])
    rng = np.random.default_rng(3)
    drawn = [captions.draw(Picture("oak wood board", "crack", None), rng) for _ in range(200)]
    kind = next(c for c in drawn if c.defect and c.category is None)
    assert kind.fits(Picture("steel nut", "crack", "dark"))
    assert not kind.fits(Picture("steel nut", "scratch", None))
    noun = next(c for c in drawn if c.category and c.defect is None)
    assert noun.fits(Picture("oak wood board", "stain", None))
    assert not noun.fits(Picture("steel nut", "crack", None))


def test_every_general_state_names_no_kind() -> None:
    general = Captions(PromptEnsemble(), ["cat"]).general
    assert len(general) == 7
    assert not any(defect in state for state in general for defect in DEFECTS)


def test_scaling_the_values_leaves_clips_output(tiny: Path) -> None:
    torch.manual_seed(0)
    backbone = CLIPBackbone(str(tiny), "random")
    images = scenes()["image"]
    with torch.no_grad():
        before = backbone(images)[0].projected
        scale_values(backbone, 2.0)
        after = backbone(images)[0].projected
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)


def test_a_window_takes_the_positions_of_its_place(tiny: Path) -> None:
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


def test_windows_hold_a_piece_of_the_defect_and_strengthen_it(tiny: Path) -> None:
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


def test_what_patches_are_to_say(tiny: Path) -> None:
    masks = torch.zeros(1, 48, 48, dtype=torch.bool)
    masks[0, 0:8, 8:16] = True  # all of patch 1
    masks[0, 8, 0:2] = True  # 2 of 64 pixels of patch 6: too few to say
    wanted = module(tiny).wanted(masks)
    assert wanted.shape == (2, 36)
    assert not wanted[0].any()
    assert wanted[1].nonzero().flatten().tolist() == [1, 6]
    assert wanted[1, 1] == 1
    assert wanted[1, 6] == -1


@pytest.mark.parametrize("done", [0.0, 0.5, 1.0])
def test_gradients_reach_all_that_is_trained(tiny: Path, done: float) -> None:
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


def test_the_fused_map_is_sdps(tiny: Path) -> None:
    learner = module(tiny)
    batch = scenes()
    rng = np.random.default_rng(5)
    learner.relight = lambda images, rng: (images, [None] * len(images))  # type: ignore[method-assign]
    _, seen = learner.losses(batch, rng, done=1.0)
    rng = np.random.default_rng(5)
    learner.windows(batch, rng, done=1.0)
    captions = [
        learner.captions.draw(Picture(category, kind, None), rng)
        for category, defect in zip(batch["category"], batch["defect"], strict=True)
        for kind in (None, defect)
    ]
    with torch.no_grad():
        words = F.normalize(learner.backbone.encode_text([c.sentence for c in captions]), dim=-1)
        text = F.normalize(torch.stack([words[0::2].mean(0), words[1::2].mean(0)]), dim=-1).T
        sdp = SDP(learner.backbone)
        stages, classes = sdp.encode(batch["synthetic"])
        length = (text[:, 1] - text[:, 0]).norm()
        # SDP weighs the words by the class token's cosines; a longer text changes these weights.
        wanted = sdp.similarity([s.projected for s in stages], (text / length).expand(3, -1, -1))
        state = 100 * F.normalize(classes, dim=-1) @ (text[:, 1] - text[:, 0])
    torch.testing.assert_close(seen.fused[1::2], wanted[:, 1:], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(seen.state[1::2], state, atol=1e-3, rtol=1e-3)


def test_the_rows_in_use_learn_and_all_others_stay() -> None:
    plain = torch.nn.Embedding(9, 4)
    part = PartEmbedding(torch.nn.Embedding.from_pretrained(plain.weight), torch.tensor([[7, 2]]))
    ids = torch.tensor([[0, 2, 7, 7], [8, 2, 1, 0]])
    weights = torch.arange(4.0).expand(2, 4, 4)
    for embedding in (plain, part):
        assert torch.equal(embedding(ids), plain.weight[ids])
        (embedding(ids) * weights).sum().backward()
    assert plain.weight.grad is not None
    torch.testing.assert_close(part.rows.grad, plain.weight.grad[[2, 7]])
    assert part.weight.grad is None
    assert torch.equal(part.merged(), plain.weight)
    with torch.no_grad():
        part.rows.add_(1)
    changed = (part.merged() != plain.weight).any(dim=1)
    assert changed.nonzero().flatten().tolist() == [2, 7]


def test_every_word_but_random_nouns_learns(tiny: Path) -> None:
    """Words of states, templates and categories; those of defects held out are never said."""
    method = Contrastive({"name": str(tiny), "pretrained": "random"})  # type: ignore[arg-type]
    embedding = method.backbone.model.token_embedding
    assert isinstance(embedding, PartEmbedding)
    rng = np.random.default_rng(0)
    method.captions.vocabulary = ["object"]  # no random nouns
    for category in (one.words for one in CATEGORIES.values()):
        for defect in (None, "scratch"):
            said = method.captions.draw(Picture(category, defect, "dark"), rng).sentence
            ids = method.backbone.tokenize([said])
            assert (embedding.places[ids] >= 0).all(), said
    assert len(embedding.tokens) < 400


def test_mixed_precision_finds_the_same_way(tiny: Path) -> None:
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
    one, other = gradients
    assert not torch.equal(one, other)
    assert torch.cosine_similarity(one, other, dim=0) > 0.999


def words_of_a_run(tiny: Path, root: Path, *more: str) -> list[str]:
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


@pytest.mark.filterwarnings("ignore:.*Checkpoint directory.*exists:UserWarning")
def test_fit_exports_weights_and_goes_on_where_it_stopped(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fit in one piece and one that is resumed after an epoch end in the same weights."""
    root = tmp_path / "runs"
    assert main(words_of_a_run(tiny, root, "--trainer.max_epochs", "2")) == 0
    whole = root / "tiny" / "1"
    assert f"weights: {whole / 'clip.safetensors'}" in " ".join(capsys.readouterr().err.split())
    # The schedule knows the whole length, so the first piece is cut by stopping, not by budget.
    first = ["--trainer.max_epochs", "2", "--trainer.callbacks+", "toy.StopAfterOneEpoch"]
    assert main(words_of_a_run(tiny, root, *first)) == 0
    checkpoint = next((root / "tiny" / "2" / "checkpoints").glob("*.ckpt"))
    resumed = ["--trainer.max_epochs", "2", "--ckpt_path", str(checkpoint)]
    assert main(words_of_a_run(tiny, root, *resumed)) == 0
    ours, theirs = (load_file(root / "tiny" / number / "clip.safetensors") for number in ("1", "3"))
    assert all(value.dtype == torch.float16 for value in ours.values())
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    with safe_open(whole / "clip.safetensors", "pt") as file:
        record = json.loads(file.metadata()["trained_on"])
    assert record["categories"] == ["steel washer", "blue denim cloth"]
    assert record["pictures"] == 24
    stopped = load_file(root / "tiny" / "2" / "clip.safetensors")
    assert not torch.equal(ours["visual.proj"], stopped["visual.proj"])
    backbone = CLIPBackbone(str(tiny), str(whole / "clip.safetensors"))
    assert torch.equal(backbone.visual.proj, ours["visual.proj"].float())


def test_a_checkpoint_is_gone_on_with_as_it_was(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "runs"
    every = {
        "class_path": "ModelCheckpoint",
        "init_args": {"every_n_train_steps": 2, "save_top_k": -1},
    }
    more = ["--trainer.max_epochs", "2", "--trainer.callbacks+", json.dumps(every)]
    assert main(words_of_a_run(tiny, root, *more)) == 0
    [inside] = (root / "tiny" / "1" / "checkpoints").glob("*step=4.ckpt")
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**TINY, "embed_dim": 8}))
    for change, sentence in (
        (["--model.lr", "0.5"], "model.lr is 0.5, but"),
        (["--model.prompts.templates", '["a photo of {}."]'], "model.prompts is"),
        (["--model.backbone.name", str(other)], "the checkpoint is of another architecture"),
        ([], "the checkpoint is from the middle of an epoch"),
    ):
        words = words_of_a_run(tiny, root, "--trainer.max_epochs", "3", *change)
        assert main([*words, "--ckpt_path", str(inside)]) == 2
        assert sentence in capsys.readouterr().err


def test_two_processes_share_the_scenes(tiny: Path, tmp_path: Path) -> None:
    more = ["--trainer.max_epochs", "1", "--trainer.strategy", "ddp", "--trainer.devices", "2"]
    more += ["--trainer.precision", "bf16-mixed"]
    python = [sys.executable, "-m", "anomaly_clip", *words_of_a_run(tiny, tmp_path, *more)]
    done = subprocess.run(python, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [path.name for path in (tmp_path / "tiny").iterdir()] == ["1"]
    run = tmp_path / "tiny" / "1"
    [checkpoint] = (run / "checkpoints").glob("*.ckpt")
    # Six scenes, two processes with two a step.
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 1
    weights = load_file(run / "clip.safetensors")
    assert all(value.isfinite().all() for value in weights.values())


def test_mistakes(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "runs"
    epochs = ["--trainer.max_epochs", "1"]
    for more, sentence in (
        (
            ["--model.windows", "{30: 0.5}"],
            "model.windows, 30: expected a multiple of the patch size 8",
        ),
        (["--data.num_scenes", "null"], "Contrastive learns from scenes without and with"),
        (["--data.num_scenes", "1"], "data.num_scenes 1 is less than a batch of data.batch_size 2"),
        (["--trainer.max_epochs", "-1"], "give trainer.max_epochs"),
        (["--model.logit_scale", "0"], "model.logit_scale must be 0.001 or more, got 0"),
        (["--model.seed", "-1"], "model.seed must be 0 or more"),
        (
            ["--model.prompts.templates", '["a dark photo of {}."]'],
            "prompts.templates: none is without",
        ),
        (
            ["--model.prompts.states_abnormal", '["{} with crack"]'],
            "prompts.states_abnormal: every",
        ),
        (["--ckpt_path", "none.ckpt"], "--ckpt_path none.ckpt: there is no such file"),
    ):
        assert main(words_of_a_run(tiny, root, *epochs, *more)) == 2
        assert sentence in capsys.readouterr().err
    assert not list(root.glob("tiny/*"))
    tested = ["test", *words_of_a_run(tiny, root)[1:]]
    assert main(tested) == 2
    assert "Contrastive scores no images: use fit" in capsys.readouterr().err


def test_one_category_of_every_larger_family_is_held_out_its_relatives_are_not() -> None:
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


def test_separation_measures_the_variance_inside_of_a_picture() -> None:
    rng = np.random.default_rng(0)
    normal, defective = rng.normal(0, 2, (5, 3)), rng.normal(1, 2, (5, 3))
    spread = rng.normal(0, 1, (5, 16, 3)) + rng.normal(0, 9, (5, 1, 3))  # pictures differ, too
    inside = np.concatenate([one - one.mean(axis=0) for one in spread])
    difference = defective.mean(axis=0) - normal.mean(axis=0)
    by_hand = np.mean(difference**2 / inside.var(axis=0, ddof=1))
    found = separation(*(torch.from_numpy(one) for one in (normal, defective, spread)))
    assert found.item() == pytest.approx(by_hand, rel=1e-4)
