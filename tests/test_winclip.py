from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import Golden, quiet_trainer
from torch import Tensor
from torch.testing import assert_close

from anomaly_clip.backbones.clip import CLIPBackbone
from anomaly_clip.backbones.prompts import PromptEnsemble, embed_prompts
from anomaly_clip.cli import main
from anomaly_clip.data import MVTecAD
from anomaly_clip.methods import WinCLIP, winclip
from anomaly_clip.methods.winclip import (
    PROMPTS,
    association,
    embed_windows,
    harmonic_map,
    window_patches,
)
from anomaly_clip.testing.processes import run_command

REIMPL = PromptEnsemble(PROMPTS.states_normal, PROMPTS.states_abnormal, "reimpl")
WORDS = PromptEnsemble(["{}"], ["bad {}"], ["a {}."])


def close(ours: Tensor, expected: Tensor) -> None:
    assert_close(ours, expected.reshape(ours.shape), atol=1e-4, rtol=0)


@pytest.mark.golden
def test_golden_text(golden: Callable[[str], Golden], golden_clip: CLIPBackbone) -> None:
    arrays = golden("winclip")
    name = arrays.meta["object"]
    means = torch.stack(
        [
            embed_prompts(golden_clip, words, unit_rows=False).mean(dim=0)
            for words in REIMPL.for_category(name)
        ]
    )
    close(means, arrays.expected["text_embeddings"])
    ours = WinCLIP(golden_clip, REIMPL).text(name)
    assert_close(ours, torch.nn.functional.normalize(means, dim=1).T, atol=1e-6, rtol=0)


@pytest.mark.golden
def test_golden_winclip(golden: Callable[[str], Golden], golden_clip: CLIPBackbone) -> None:
    arrays = golden("winclip")
    expected, meta = arrays.expected, arrays.meta
    image = arrays.inputs["image"]
    method = WinCLIP(golden_clip, REIMPL, meta["scales"], meta["temperature"])
    text = method.text(meta["object"]).expand(len(image), -1, -1)
    embeddings = method.embed(image)
    assert embeddings.patches is not None
    close(embeddings.image, expected["image_embeddings"])
    close(embeddings.patches, expected["patch_embeddings"])
    side = golden_clip.image_size // golden_clip.patch_size
    for scale, windows in zip(meta["scales"], embeddings.windows, strict=True):
        patches = window_patches(side, scale)
        assert torch.equal(patches.T, expected[f"masks.{scale}"].long())
        close(windows, expected[f"window_embeddings.{scale}"])
        scores = method.abnormal(windows, text)
        close(scores, expected[f"zero_shot.window_scores.{scale}"])
        close(harmonic_map(scores, patches), expected[f"zero_shot.scale_map.{scale}"])
    zero = method.score_with_text(image, text)
    close(
        method.zero_shot_grid(embeddings, text, zero["image_score"]),
        expected["zero_shot.image_score_grid"],
    )
    close(zero["anomaly_map"], expected["zero_shot.map"])
    close(zero["image_score"], expected["zero_shot.image_score"])


@pytest.mark.golden
def test_golden_few_shot(golden: Callable[[str], Golden], golden_clip: CLIPBackbone) -> None:
    arrays = golden("winclip")
    meta, image = arrays.meta, arrays.inputs["image"]
    method = WinCLIP(golden_clip, REIMPL, meta["scales"], meta["temperature"])
    text = method.text(meta["object"]).expand(len(image), -1, -1)
    embeddings = method.embed(image)
    assert embeddings.patches is not None
    side = golden_clip.image_size // golden_clip.patch_size
    for shots in meta["shots"]:
        expected = arrays.named(f"few_shot_{shots}.")
        memory = method.remember(arrays.inputs["reference_images"][:shots])
        assert memory.patches is not None
        near = torch.stack([association(rows, memory.patches) for rows in embeddings.patches])
        close(near, expected["patch_map"])
        for number, scale in enumerate(meta["scales"]):
            references = memory.windows[number]
            scores = torch.stack(
                [association(rows, references) for rows in embeddings.windows[number]]
            )
            close(scores, expected[f"window_scores.{scale}"])
            close(harmonic_map(scores, window_patches(side, scale)), expected[f"scale_map.{scale}"])
        close(
            method.association_grid(embeddings, [memory] * len(image)), expected["association_grid"]
        )
        few = method.score_with_text(image, text, [memory] * len(image))
        close(few["anomaly_map"], expected["map"])
        close(few["image_score"], expected["image_score"])


def raw_tokens(clip: CLIPBackbone, image: Tensor) -> Tensor:
    """Return the output of CLIP's last block, ``(B, 1 + N, W)``, without its last LayerNorm."""
    kept: list[Tensor] = []
    handle = clip.visual.transformer.register_forward_hook(lambda *args: kept.append(args[-1]))
    try:
        clip.model.encode_image(image)
    finally:
        handle.remove()
    return kept[0]


def zq_few_shot(memory: Tensor, tokens: Tensor) -> Tensor:
    """Return the distances ``(B, L)`` by the formula of Accurate-WinCLIP's code.

    Args:
        memory: ``(M, D)``, of all references.
        tokens: ``(B, L, D)``.
    """
    retrieved = memory.T.expand(len(tokens), -1, -1)  # (B, D, M)
    cosines = torch.bmm(
        torch.nn.functional.normalize(tokens, dim=-1),
        torch.nn.functional.normalize(retrieved, dim=1),
    )
    return 0.5 * torch.min(1.0 - cosines, dim=-1)[0]


def zq_harmonic(scores: Tensor, windows: Tensor, side: int) -> Tensor:
    """Return ``(B, side * side)``; ``windows`` holds patch numbers from 1, one row per window."""
    scores = scores.double()
    out = torch.zeros(len(scores), side * side, dtype=torch.float64)
    for patch in range(side * side):
        members = [bool((window == patch + 1).any()) for window in windows]
        out[:, patch] = sum(members) / (1.0 / scores[:, members]).sum(dim=-1)
    return out


@pytest.mark.golden
@pytest.mark.parametrize("shots", [1, 2])
def test_without_patch_norm_the_maps_are_those_of_accurate_winclip(
    golden: Callable[[str], Golden], golden_clip: CLIPBackbone, shots: int
) -> None:
    """Accurate-WinCLIP compares patches before the last LayerNorm, and adds the maps."""
    arrays = golden("winclip")
    meta, image = arrays.meta, arrays.inputs["image"]
    references = arrays.inputs["reference_images"][:shots]
    method = WinCLIP(golden_clip, REIMPL, meta["scales"], meta["temperature"], patch_norm=False)
    normed = WinCLIP(golden_clip, REIMPL, meta["scales"], meta["temperature"])
    text = method.text(meta["object"]).expand(len(image), -1, -1)
    ours = method.score_with_text(image, text, [method.remember(references)] * len(image))
    other = normed.score_with_text(image, text, [normed.remember(references)] * len(image))
    side = golden_clip.image_size // golden_clip.patch_size
    with torch.no_grad():
        memory = raw_tokens(golden_clip, references)[:, 1:].flatten(0, 1)
        near = zq_few_shot(memory, raw_tokens(golden_clip, image)[:, 1:]).double()
        embeddings = normed.embed(image)
        remembered = normed.embed(references)
        for number, scale in enumerate(meta["scales"]):
            scores = zq_few_shot(
                remembered.windows[number].flatten(0, 1), embeddings.windows[number]
            )
            near += zq_harmonic(scores, window_patches(side, scale) + 1, side)
        few_shot = torch.nan_to_num(near / 3.0, nan=0.0, posinf=0.0, neginf=0.0)  # (B, N)
        zero = normed.score_with_text(image, text)
        grid = normed.zero_shot_grid(embeddings, text, zero["image_score"])
        expected = torch.nn.functional.interpolate(
            (grid + few_shot).reshape(len(image), 1, side, side),
            size=golden_clip.image_size,
            mode="bilinear",
            align_corners=False,
        )[:, 0]
    assert_close(2 * ours["anomaly_map"].double(), expected.double(), atol=1e-5, rtol=0)
    image_score = (zero["image_score"] + few_shot.max(dim=1).values) / 2
    assert_close(ours["image_score"].double(), image_score.double(), atol=1e-5, rtol=0)
    assert (ours["anomaly_map"] - other["anomaly_map"]).abs().max() > 1e-3


def test_patch_norm_affects_nothing_without_references(tiny_clip: CLIPBackbone) -> None:
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    maps = [
        WinCLIP(tiny_clip, WORDS, patch_norm=norm).score(images, ["nut", "bolt"])["anomaly_map"]
        for norm in (True, False)
    ]
    assert torch.equal(*maps)


def test_the_published_lists() -> None:
    normal, abnormal = PROMPTS.for_category("nut")
    assert (len(normal), len(abnormal)) == (7 * 22, 4 * 22)
    lines = REIMPL.as_lists()["templates"]
    assert len(lines) == 21
    assert lines.count("a jpeg corrupted photo of the {}.") == 2
    assert "a cropped photo of a {}." not in lines


@pytest.mark.parametrize("at_once", [1, 40, 10_000])
def test_windows_equal_the_plain_image_tower(
    tiny_clip: CLIPBackbone, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Window embeddings equal those of the plain tower, for any number of tokens per pass."""
    monkeypatch.setitem(winclip.TOKENS_AT_ONCE, "cpu", at_once)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    tokens = tiny_clip.embed(images)
    patches = window_patches(4, 2)
    [ours] = embed_windows(tiny_clip, tokens, [patches])
    for number, members in enumerate(patches):
        x = torch.cat([tokens[:, :1], tokens[:, members + 1]], dim=1)
        for block in tiny_clip.visual.transformer.resblocks:
            x = block(x)
        assert_close(ours[:, number], tiny_clip.project(x)[:, 0], atol=1e-5, rtol=1e-4)


def test_every_test_replaces_the_references(tiny_clip: CLIPBackbone, mvtec_root: Path) -> None:
    method = WinCLIP(tiny_clip, PromptEnsemble(["{}"], ["bad {}"], ["a {}."]), scales=[2])
    tests = []
    for shots in (None, 1, None):
        data = MVTecAD(str(mvtec_root), shots=shots, num_workers=0)
        quiet_trainer().test(method, data, verbose=False)
        tests.append((bool(method.reference_paths), method.results))
    assert [has_references for has_references, _ in tests] == [False, True, False]
    assert tests[0][1] == tests[2][1]


def test_harmonic_means_by_hand() -> None:
    patches = window_patches(2, 1)
    scores = torch.tensor([[0.1, 0.2, 0.4, 0.8]])
    assert_close(harmonic_map(scores, patches), scores)
    # Three patches in a row, two windows of two patches: both windows cover the middle patch.
    rows = torch.tensor([[0, 1], [1, 2]])
    assert_close(
        harmonic_map(torch.tensor([[0.5, 0.25]]), rows),
        torch.tensor([[0.5, 2 / (1 / 0.5 + 1 / 0.25), 0.25]]),
    )
    assert harmonic_map(torch.tensor([[0.0, 0.25]]), rows).tolist() == [[0.0, 0.0, 0.25]]


def test_a_reference_has_distance_zero_from_itself(tiny_clip: CLIPBackbone) -> None:
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    method = WinCLIP(tiny_clip, WORDS)
    memory = method.remember(images)
    near = method.association_grid(method.embed(images), [memory] * 2)
    assert near.abs().max() < 1e-5
    other = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    far = method.association_grid(method.embed(other), [memory] * 2)
    assert far.min() >= 0
    assert far.max() > 1e-3


def test_images_of_a_batch_do_not_affect_each_other(tiny_clip: CLIPBackbone) -> None:
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    method = WinCLIP(tiny_clip, WORDS)
    together = method.score(images, ["nut", "bolt", "nut"])
    alone = method.score(images[1:2], ["bolt"])
    assert_close(together["anomaly_map"][1:2], alone["anomaly_map"], atol=1e-6, rtol=0)
    assert_close(together["image_score"][1:2], alone["image_score"], atol=1e-6, rtol=0)


def test_few_shot_uses_the_references_of_the_data_set(
    tiny_clip: CLIPBackbone, mvtec_root: Path
) -> None:
    zero, few = WinCLIP(tiny_clip, WORDS), WinCLIP(tiny_clip, WORDS)
    quiet_trainer().test(zero, MVTecAD(str(mvtec_root), num_workers=0), verbose=False)
    data = MVTecAD(str(mvtec_root), shots=1, seed=4, num_workers=0)
    quiet_trainer().test(few, data, verbose=False)
    assert zero.reference_paths == {}
    assert few.reference_paths == {
        name: [str(s.image) for s in data.shots_of(name)] for name in ("bottle", "metal_nut")
    }
    zero_images, few_images = zero.evaluator.images, few.evaluator.images
    assert zero_images is not None
    assert few_images is not None
    assert not torch.allclose(zero_images.score, few_images.score)


def test_the_command_writes_the_references(
    tmp_path: Path, mvtec_root: Path, tiny_clip_config: str
) -> None:
    words = ["test", "--model", "WinCLIP", "--model.backbone.name", tiny_clip_config]
    words += ["--model.backbone.pretrained", "random", "--data", "MVTecAD"]
    words += ["--data.root", str(mvtec_root), "--data.num_workers", "0"]
    words += ["--output.root", str(tmp_path), "--trainer.accelerator", "cpu"]
    assert main([*words, "--data.shots", "2", "--model.patch_norm", "false"]) == 0
    run = tmp_path / "WinCLIP" / "1-test"
    assert "patch_norm: false" in (run / "config-test.yaml").read_text()
    written = json.loads((run / "references.json").read_text())
    assert [len(paths) for paths in written.values()] == [2, 2]
    assert all("train/good" in path for paths in written.values() for path in paths)
    protocol = json.loads((run / "metrics.json").read_text())["run"]["protocol"]
    assert (protocol["shots"], protocol["patch_norm"]) == (2, False)
    assert main(words) == 0
    assert not (tmp_path / "WinCLIP" / "2-test" / "references.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scales": [0]}, r"model\.scales \[0\]: expected window sides from 1 to 4 patches"),
        ({"scales": [2, 5]}, r"model\.scales \[2, 5\]"),
        ({"scales": []}, r"model\.scales \[\]"),
        ({"temperature": 0.0}, r"model\.temperature must be above 0"),
    ],
)
def test_invalid_options_are_rejected(
    tiny_clip: CLIPBackbone, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        WinCLIP(tiny_clip, WORDS, **options)  # type: ignore[arg-type]


def test_more_shots_than_images(tiny_clip: CLIPBackbone, mvtec_root: Path) -> None:
    data = MVTecAD(str(mvtec_root), shots=3, num_workers=0)
    with pytest.raises(ValueError, match="category 'bottle' has 2 normal training images"):
        quiet_trainer().test(WinCLIP(tiny_clip, WORDS), data, verbose=False)


def test_two_processes_find_the_same_results_as_one(
    tmp_path: Path, mvtec_root: Path, tiny_clip_config: str
) -> None:
    words = ["test", "--model", "WinCLIP", "--model.backbone.name", tiny_clip_config]
    words += ["--model.backbone.pretrained", "random", "--data", "MVTecAD", "--data.shots", "1"]
    words += ["--data.root", str(mvtec_root), "--data.num_workers", "0"]
    words += ["--output.root", str(tmp_path), "--trainer.accelerator", "cpu"]
    assert main([*words, "--output.name", "one"]) == 0
    ddp = ["--trainer.strategy", "ddp", "--trainer.devices", "2", "--output.name", "two"]
    done = run_command([*words, *ddp], processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    single, double = (tmp_path / name / "1-test" for name in ("one", "two"))
    metrics = [json.loads((run / "metrics.json").read_text())["mean"] for run in (single, double)]
    # Batches of other sizes round differently.
    assert metrics[1] == pytest.approx(metrics[0], abs=1e-3)
    references = [(run / "references.json").read_text() for run in (single, double)]
    assert references[0] == references[1]
