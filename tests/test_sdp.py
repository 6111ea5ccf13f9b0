from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import WORDS, Golden, Outputs, quiet_trainer
from torch import Tensor
from torch.testing import assert_close

from anomaly_clip.backbones.clip import CLIPBackbone
from anomaly_clip.backbones.prompts import PromptEnsemble, RVSSettings
from anomaly_clip.backbones.surgery import StageTokens
from anomaly_clip.data import MVTecAD
from anomaly_clip.methods import SDP
from anomaly_clip.methods.sdp import feature_surgery, text_score
from anomaly_clip.metrics import EvaluatorSettings


def tiny(backbone: CLIPBackbone, **options: Any) -> SDP:
    options = {"prompts": WORDS, "rvs": RVSSettings("mean"), "sigma": 2.0, **options}
    return SDP(backbone, **options)


@pytest.mark.golden
@pytest.mark.parametrize(("kind", "prefix"), [("official", "sdp."), ("clean", "sdp_clean.")])
def test_golden_sdp(
    golden: Callable[[str], Golden], golden_clip: CLIPBackbone, kind: StageTokens, prefix: str
) -> None:
    arrays = golden("clip_ad")
    expected, text = arrays.named(prefix), arrays.inputs["text_features"]
    stages = arrays.meta["features_list"]
    sdp = SDP(golden_clip, stages=stages, stage_tokens=kind, sigma=arrays.meta["sigma"])
    tokens, _ = sdp.encode(arrays.inputs["image"])
    for stage, token in zip(stages, tokens, strict=True):
        abnormal = feature_surgery(token.projected, text)
        both = torch.stack([-abnormal, abnormal], dim=-1)
        assert_close(both, expected[f"stage_similarity.{stage}"], atol=1e-5, rtol=0)
    similarity = sdp.similarity([token.projected for token in tokens], text)
    assert_close(similarity, expected["similarity"][..., 1], atol=1e-5, rtol=0)
    assert_close(sdp.upsample(similarity), expected["map"], atol=1e-5, rtol=0)
    scores = sdp.score_with_text(arrays.inputs["image"], text)
    assert_close(scores["anomaly_map"], expected["map_smooth"], atol=1e-5, rtol=0)
    parts = torch.stack([expected["score_text"], expected["score_map_max"]], dim=1)
    assert_close(scores["score_parts"], parts, atol=1e-5, rtol=0)
    assert_close(scores["image_score"], expected["score_text"], atol=1e-5, rtol=0)


@pytest.mark.golden
def test_golden_preprocessing(
    golden: Callable[[str], Golden], golden_clip: CLIPBackbone, golden_category: Path
) -> None:
    arrays = golden("clip_ad")
    expected = arrays.expected["e2e.preprocessed"]
    dataset = MVTecAD(str(golden_category), image_size=arrays.meta["image_size"]).dataset("test")
    by_number = {int(Path(item["path"]).stem): item["image"] for item in _items(dataset)}
    images = torch.stack([by_number[number] for number in range(len(expected))])
    assert_close(golden_clip.prepare(images), expected, atol=1e-5, rtol=0)


@pytest.mark.golden
def test_golden_end_to_end(
    golden: Callable[[str], Golden], golden_clip: CLIPBackbone, golden_category: Path
) -> None:
    arrays = golden("clip_ad")
    expected = arrays.named("e2e.sdp.")
    data = MVTecAD(str(golden_category), batch_size=4, num_workers=0)
    sdp = SDP(
        golden_clip,
        rvs=RVSSettings(arrays.meta["train"]["rep_vec"]),
        stages=arrays.meta["features_list"],
        sigma=arrays.meta["sigma"],
        evaluator=EvaluatorSettings(pro_steps=200),
    )
    outputs = Outputs()
    quiet_trainer(callbacks=[outputs]).test(sdp, data, verbose=False)
    # Sort the golden images like our listing, by the number in the file name.
    order = [int(sample.image.stem) for sample in data.samples("test")]
    assert_close(outputs["anomaly_map"], expected["map"][order], atol=2e-5, rtol=0)
    assert torch.equal(outputs["mask"], expected["gt_px"][order].bool())
    parts = torch.stack([expected["score_text"], expected["score_map_max"]], dim=1)[order]
    assert_close(outputs["score_parts"], parts.float(), atol=2e-5, rtol=0)
    images, results = sdp.evaluator.images, sdp.results
    assert images is not None
    assert results is not None
    assert_close(images.score, expected["score"][order].float(), atol=2e-3, rtol=0)
    names = ["pixel_auroc", "pixel_f1_max", "pixel_ap", "pixel_pro"]
    names += ["image_auroc", "image_f1_max", "image_ap"]
    for name, value in zip(names, expected["metrics"].tolist(), strict=True):
        assert results["mean"][name] == pytest.approx(value, abs=1e-3), name


def _items(dataset: Any) -> list[Any]:
    return [dataset[i] for i in range(len(dataset))]


def literal_surgery(tokens: Tensor, text: Tensor) -> Tensor:
    """Return the published product over channels, for any number of classes."""
    features = torch.nn.functional.normalize(tokens, dim=-1)  # (B, L, D)
    weights = (features[:, :1] @ text).softmax(dim=-1)[:, 0]
    weights = weights / weights.mean(dim=-1, keepdim=True)
    products = features[..., None, :] * text.mT[:, None]  # (B, L, 2, D)
    products = products * weights[:, None, :, None]
    products = products - products.mean(dim=2, keepdim=True)
    return products.sum(dim=-1)


def test_the_closed_form_is_the_published_product() -> None:
    torch.manual_seed(0)
    tokens, text = torch.randn(3, 10, 16), torch.randn(3, 16, 2)
    text = torch.nn.functional.normalize(text, dim=1)
    expected = literal_surgery(tokens, text)
    ours = feature_surgery(tokens, text)
    assert_close(ours, expected[..., 1], atol=1e-6, rtol=1e-5)
    assert_close(-ours, expected[..., 0], atol=1e-6, rtol=1e-5)


def test_swapping_the_text_vectors_changes_the_sign() -> None:
    tokens, text = torch.randn(2, 5, 8), torch.nn.functional.normalize(torch.randn(2, 8, 2), dim=1)
    assert_close(feature_surgery(tokens, text.flip(-1)), -feature_surgery(tokens, text))


def test_text_score_by_hand() -> None:
    text = torch.eye(2)[None]  # normal = x, abnormal = y
    assert text_score(torch.tensor([[3.0, 3.0]]), text).item() == pytest.approx(0.5)
    expected = 1 / (1 + np.exp(100 * (0.8 - 0.6)))
    assert text_score(torch.tensor([[4.0, 3.0]]), text).item() == pytest.approx(expected, rel=1e-3)


def test_images_of_a_batch_do_not_affect_each_other(tiny_clip: CLIPBackbone) -> None:
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    names = ["nut", "bolt", "nut"]
    sdp = tiny(tiny_clip)
    together = sdp.score(images, names)
    for i in range(3):
        alone = sdp.score(images[i : i + 1], names[i : i + 1])
        assert_close(together["anomaly_map"][i : i + 1], alone["anomaly_map"], atol=1e-6, rtol=0)
        assert_close(together["image_score"][i : i + 1], alone["image_score"])


def test_the_original_path_is_clips_own_map(tiny_clip: CLIPBackbone) -> None:
    images = torch.randn(2, 3, 32, 32)
    sdp = tiny(tiny_clip, paths="original", stages=[2, 4])
    tokens, class_token = sdp.encode(images)
    for ours, theirs in zip(tokens, tiny_clip(images, [2, 4]), strict=True):
        assert torch.equal(ours.projected, theirs.projected)
    assert_close(class_token, tiny_clip.model.encode_image(images))


def test_the_text_score_uses_the_last_block_for_any_stages(
    tiny_clip: CLIPBackbone,
) -> None:
    images = torch.randn(2, 3, 32, 32)
    whole, part = (tiny(tiny_clip, stages=s).score(images, ["nut"] * 2) for s in (None, [1, 2]))
    assert torch.equal(whole["image_score"], part["image_score"])
    assert not torch.allclose(whole["anomaly_map"], part["anomaly_map"])


def test_without_feature_surgery_the_score_is_the_cosine_with_the_abnormal_text(
    tiny_clip: CLIPBackbone,
) -> None:
    images, text = (
        torch.randn(1, 3, 32, 32),
        torch.nn.functional.normalize(torch.randn(1, 12, 2), dim=1),
    )
    sdp = tiny(tiny_clip, feature_surgery=False, stages=[4], sigma=0.0)
    tokens, _ = sdp.encode(images)
    expected = torch.cosine_similarity(tokens[0].projected, text[:, None, :, 1], dim=-1)
    assert_close(sdp.similarity([tokens[0].projected], text), expected)


def test_mixed_precision_stays_near(tiny_clip_config: str, mvtec_root: Path) -> None:
    maps = []
    for precision in ("32-true", "bf16-mixed"):
        torch.manual_seed(0)
        sdp, outputs = tiny(CLIPBackbone(tiny_clip_config, "random")), Outputs()
        data = MVTecAD(str(mvtec_root), num_workers=0)
        quiet_trainer(callbacks=[outputs], precision=precision).test(sdp, data, verbose=False)
        maps.append(outputs["anomaly_map"])
    assert maps[1].dtype == torch.float32
    correlation = np.corrcoef(maps[0].flatten(), maps[1].flatten())[0, 1]
    assert correlation > 0.99
    assert not torch.equal(maps[0], maps[1])


def test_auto_settings_depend_on_the_data_set(tiny_clip: CLIPBackbone, mvtec_root: Path) -> None:
    class VisAlike(MVTecAD):
        dataset_name = "VisA"

    sdp = tiny(tiny_clip, rvs=RVSSettings("dbscan"), prompts=PromptEnsemble())
    quiet_trainer().test(sdp, VisAlike(str(mvtec_root), num_workers=0), verbose=False)
    by_name = sdp.text("bottle")
    sdp = tiny(tiny_clip, rvs=RVSSettings("dbscan", 1.5, 25), prompts=PromptEnsemble())
    assert_close(by_name, sdp.text("bottle"))


def test_text_features_follow_the_data_set_in_use(
    tiny_clip: CLIPBackbone, mvtec_root: Path
) -> None:
    """Text features cached with the settings of another data set are not reused."""

    class VisAlike(MVTecAD):
        dataset_name = "VisA"

    sdp = tiny(tiny_clip, rvs=RVSSettings("dbscan"), prompts=PromptEnsemble())
    elsewhere = sdp.text("bottle")
    quiet_trainer().test(sdp, VisAlike(str(mvtec_root), num_workers=0), verbose=False)
    on_visa = tiny(tiny_clip, rvs=RVSSettings("dbscan", 1.5, 25), prompts=PromptEnsemble())
    assert_close(sdp.text("bottle"), on_visa.text("bottle"))
    assert not torch.allclose(elsewhere, on_visa.text("bottle"), atol=1e-3)


def test_no_parameter_is_trainable(tiny_clip: CLIPBackbone) -> None:
    assert not any(p.requires_grad for p in tiny(tiny_clip).parameters())


def test_an_image_size_other_than_the_models_is_rejected(
    tiny_clip: CLIPBackbone, mvtec_root: Path
) -> None:
    data = MVTecAD(str(mvtec_root), image_size=48, num_workers=0)
    with pytest.raises(ValueError, match=r"data.image_size 48 differs from the model's \(32\)"):
        quiet_trainer().test(tiny(tiny_clip), data, verbose=False)
