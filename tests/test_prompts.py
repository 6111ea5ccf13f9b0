from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Golden
from safetensors.torch import save, save_file
from torch.testing import assert_close

from anomaly_clip.backbones.clip import CLIPBackbone
from anomaly_clip.backbones.prompts import (
    PromptEnsemble,
    RVSSettings,
    embed_prompts,
    representative_vector,
    text_features,
)
from anomaly_clip.cache_files import write_cached

SHORT = PromptEnsemble(["{}", "perfect {}"], ["broken {}"], ["a photo of a {}.", "the {}."])
MEAN = RVSSettings("mean")
RVS = ("mean", "pca", "kde", "dbscan", "dbscan_visa", "mean_shift")


def settings(name: str) -> tuple[RVSSettings, str | None]:
    """Return the RVS settings and the data set name of a golden variant."""
    if name == "dbscan_visa":
        return RVSSettings("dbscan"), "VisA"
    return RVSSettings(name), None  # type: ignore[arg-type]


@pytest.mark.golden
def test_golden_tokens(golden: Callable[[str], Golden], golden_clip: CLIPBackbone) -> None:
    arrays = golden("clip_ad")
    for prompts, kind in zip(
        PromptEnsemble().for_category(arrays.meta["objects"][0]),
        ("normal", "abnormal"),
        strict=True,
    ):
        expected = arrays.expected[f"text.tokens.{kind}"].long()
        ids = golden_clip.tokenize(prompts)
        assert torch.equal(ids[:, : expected.shape[1]], expected)
        assert not ids[:, expected.shape[1] :].any()


@pytest.mark.golden
@pytest.mark.parametrize("name", ["mean", "pca", "kde", "mean_shift", "dbscan_visa"])
def test_golden_text_features(
    golden: Callable[[str], Golden], golden_clip: CLIPBackbone, name: str
) -> None:
    rvs, dataset = settings(name)
    for category, expected in golden("clip_ad").named(f"text.{name}.").items():
        features = text_features(golden_clip, category, rvs=rvs, dataset_name=dataset)
        assert_close(features, expected, atol=1e-4, rtol=0)


@pytest.mark.golden
@pytest.mark.parametrize("name", RVS)
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("fp16", 1e-3)])
def test_golden_representative_vectors(
    golden: Callable[[str], Golden], name: str, precision: str, tolerance: float
) -> None:
    arrays = golden("clip_ad")
    for column, kind in enumerate(("normal", "abnormal")):
        vector = representative_vector(arrays.inputs[f"rvs.{kind}"], *settings(name))
        expected = arrays.expected[f"rvs.{precision}.{name}"][:, column].float()
        assert_close(vector, expected, atol=tolerance, rtol=0)


def test_published_numbers_of_prompts() -> None:
    normal, abnormal = PromptEnsemble().for_category("pipe_fryum")
    assert (len(normal), len(abnormal)) == (9 * 22, 10 * 22)
    assert normal[22] == "a cropped photo of the perfect pipe_fryum."
    assert len(set(normal)) == len(normal)


def test_prompts_are_ordered_by_state_then_template() -> None:
    assert SHORT.for_category("nut")[0] == [
        "a photo of a nut.",
        "the nut.",
        "a photo of a perfect nut.",
        "the perfect nut.",
    ]


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"states_normal": []}, "states_normal is empty"),
        ({"templates": ["a photo."]}, "'a photo.' needs one {}"),
        ({"states_abnormal": ["{} {}"]}, "'{} {}' needs one {}"),
    ],
)
def test_bad_states_and_templates(lists: dict[str, list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PromptEnsemble(**lists)


def clusters(*sizes: int) -> torch.Tensor:
    """Return tight groups of unit vectors around random directions."""
    rng = np.random.default_rng(0)
    centres = np.repeat(rng.normal(size=(len(sizes), 64)), sizes, axis=0)
    rows = torch.from_numpy(centres + 0.01 * rng.normal(size=centres.shape))
    return torch.nn.functional.normalize(rows, dim=-1)


def test_other_braces_are_plain_text() -> None:
    prompts = PromptEnsemble(["{}"], ["bad {}"], ["a {x} {}."])
    assert prompts.for_category("nut {1}") == (["a {x} nut {1}."], ["a {x} bad nut {1}."])


def test_dbscan_takes_the_largest_cluster() -> None:
    rows = clusters(16, 40, 20, 3)
    expected = torch.nn.functional.normalize(rows[16:56].mean(0), dim=-1).float()
    assert_close(representative_vector(rows), expected)


def test_dbscan_takes_the_first_of_equal_clusters() -> None:
    rows = clusters(20, 20)
    expected = torch.nn.functional.normalize(rows[:20].mean(0), dim=-1).float()
    assert_close(representative_vector(rows), expected)


def test_dbscan_without_a_cluster_falls_back_to_the_mean() -> None:
    rows = clusters(3, 3)
    with pytest.warns(UserWarning, match="finds no cluster among 6 prompts"):
        vector = representative_vector(rows)
    assert_close(vector, representative_vector(rows, MEAN))


def test_auto_settings_follow_the_data_set_and_explicit_ones_stay() -> None:
    assert RVSSettings().resolve("VisA") == RVSSettings("dbscan", 1.5, 25)
    assert RVSSettings().resolve("MVTecAD") == RVSSettings("dbscan", 0.5, 15)
    assert RVSSettings("dbscan", 0.7).resolve("VisA") == RVSSettings("dbscan", 0.7, 25)
    assert RVSSettings("kde").resolve(None).bandwidth == 0.3
    assert RVSSettings("mean_shift", bandwidth=0.4).resolve(None).bandwidth == 0.4


def test_pca_follows_the_definition_by_hand() -> None:
    rows = clusters(9, 4)
    x = rows.double().T.numpy()
    x = x - x.mean(axis=0)
    values, vectors = np.linalg.eigh(x.T @ x)
    vector = x @ vectors[:, values.argmax()]
    vector = vector / np.linalg.norm(vector) * np.sign(vector @ rows.double().numpy().mean(axis=0))
    ours = representative_vector(rows, RVSSettings("pca"))
    assert_close(ours, torch.from_numpy(vector).float(), atol=1e-6, rtol=0)


def test_kde_weighs_by_density_and_does_not_overflow() -> None:
    rows = torch.nn.functional.normalize(
        torch.randn(30, 640, generator=torch.manual_seed(0)), dim=1
    )
    distances = torch.cdist(rows, rows).double()
    density = (-(distances**2) / (2 * 0.3**2)).exp().sum(dim=1)
    expected = torch.nn.functional.normalize(density @ rows.double(), dim=0).float()
    ours = representative_vector(rows, RVSSettings("kde"))
    assert_close(ours, expected, atol=1e-6, rtol=0)


def test_mean_shift_takes_the_largest_cluster() -> None:
    rows = clusters(5, 30, 9)
    expected = torch.nn.functional.normalize(rows[5:35].mean(0), dim=-1).float()
    assert_close(representative_vector(rows, RVSSettings("mean_shift", bandwidth=0.5)), expected)
    # The published bandwidth gives one cluster.
    everything = representative_vector(rows, RVSSettings("mean_shift"))
    assert_close(everything, representative_vector(rows, MEAN))


def test_bad_settings_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"rvs\.eps must be above 0"):
        RVSSettings(eps=0)
    with pytest.raises(ValueError, match=r"rvs\.bandwidth must be above 0"):
        RVSSettings("kde", bandwidth=-1)
    with pytest.raises(ValueError, match=r"rvs\.min_samples must be 1"):
        RVSSettings(min_samples=0)
    with pytest.raises(ValueError, match="M > 0"):
        representative_vector(torch.zeros(0, 3))


def test_text_features_are_unit_columns_normal_first(tiny_clip: CLIPBackbone) -> None:
    features = text_features(tiny_clip, "nut", SHORT, MEAN)
    assert features.shape == (12, 2)
    assert_close(features.norm(dim=0), torch.ones(2))
    expected = embed_prompts(tiny_clip, SHORT.for_category("nut")[0]).mean(0)
    assert_close(features[:, 0], torch.nn.functional.normalize(expected, dim=0))


def cached(cache: Path) -> list[Path]:
    return sorted((cache / "text").glob("*")) if (cache / "text").is_dir() else []


def trained(tiny_clip: CLIPBackbone, config: str, folder: Path) -> CLIPBackbone:
    """Return the tiny CLIP loaded from a file, so that its weights do not count as random."""
    state = {k: v.contiguous() for k, v in tiny_clip.model.state_dict().items()}
    save_file(state, folder / "trained.safetensors")
    return CLIPBackbone(config, str(folder / "trained.safetensors"))


def test_features_are_cached_by_weights_prompts_and_settings(
    tiny_clip: CLIPBackbone, tiny_clip_config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = trained(tiny_clip, tiny_clip_config, tmp_path)
    first = text_features(backbone, "nut", SHORT, MEAN)
    assert len(cached(tmp_path / "cache")) == 1
    with monkeypatch.context() as patch:
        patch.setattr(CLIPBackbone, "encode_text", None)  # a second call must not encode
        assert torch.equal(text_features(backbone, "nut", SHORT, MEAN), first)
    text_features(backbone, "bolt", SHORT, MEAN)
    other = PromptEnsemble(["{}"], ["broken {}"], ["the {}."])
    text_features(backbone, "nut", other, MEAN)
    with pytest.warns(UserWarning, match="no cluster"):
        text_features(backbone, "nut", SHORT, RVSSettings())
    assert len(cached(tmp_path / "cache")) == 4


def test_a_damaged_cache_file_is_replaced(
    tiny_clip: CLIPBackbone, tiny_clip_config: str, tmp_path: Path
) -> None:
    backbone = trained(tiny_clip, tiny_clip_config, tmp_path)
    first = text_features(backbone, "nut", SHORT, MEAN)
    (file,) = cached(tmp_path / "cache")
    file.write_bytes(file.read_bytes()[:20])
    assert torch.equal(text_features(backbone, "nut", SHORT, MEAN), first)
    assert len(file.read_bytes()) > 20


def test_cached_features_of_other_prompts_or_shapes_are_not_used(
    tiny_clip: CLIPBackbone, tiny_clip_config: str, tmp_path: Path
) -> None:
    backbone = trained(tiny_clip, tiny_clip_config, tmp_path)
    first = text_features(backbone, "nut", SHORT, MEAN)
    (file,) = cached(tmp_path / "cache")
    whole = file.read_bytes()
    swapped = PromptEnsemble(SHORT.states_abnormal, SHORT.states_normal, SHORT.templates)
    text_features(backbone, "nut", swapped, MEAN)
    (other,) = (f for f in cached(tmp_path / "cache") if f != file)
    flipped = bytearray(whole)
    flipped[len(flipped) // 2] ^= 4
    unsigned = save({"text_features": first.flip(1).contiguous()})  # as version 0.1.0 wrote it
    for content in (other.read_bytes(), bytes(flipped), unsigned, whole + b" "):
        file.write_bytes(content)
        assert torch.equal(text_features(backbone, "nut", SHORT, MEAN), first)
        assert file.read_bytes() == whole
    key = json.dumps([2, backbone.identity, *SHORT.for_category("nut"), asdict(MEAN), True])
    for tensors in ({"text_features": torch.ones(3, 2)}, {"other": first}):
        write_cached(file, key, save(tensors))
        assert torch.equal(text_features(backbone, "nut", SHORT, MEAN), first)
    file.unlink()
    file.mkdir()
    assert torch.equal(text_features(backbone, "nut", SHORT, MEAN), first)
    assert file.read_bytes() == whole


def test_an_unwritable_cache_is_a_warning(
    tiny_clip: CLIPBackbone,
    tiny_clip_config: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backbone = trained(tiny_clip, tiny_clip_config, tmp_path)
    (tmp_path / "cache").write_text("a file in place of the folder")
    with pytest.warns(UserWarning, match="cache folder .* cannot be used"):
        text_features(backbone, "nut", SHORT, MEAN)


def test_random_weights_are_never_cached(tiny_clip: CLIPBackbone, tmp_path: Path) -> None:
    text_features(tiny_clip, "nut", SHORT, MEAN)
    assert not cached(tmp_path / "cache")


@pytest.mark.parametrize("sign", [1, -1])
def test_the_first_component_points_towards_the_prompts(
    sign: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sign is fixed for either direction that scikit-learn may return."""
    from sklearn.decomposition import PCA

    rows = clusters(9, 4)
    plain = PCA(1, svd_solver="full").fit_transform(rows.double().T.numpy())
    monkeypatch.setattr(PCA, "fit_transform", lambda *_: sign * plain)
    vector = representative_vector(rows, RVSSettings("pca"))
    assert float(vector.double() @ rows.double().mean(dim=0)) > 0
    cosine = float(vector.double() @ torch.from_numpy(plain[:, 0])) / np.linalg.norm(plain)
    assert abs(cosine) == pytest.approx(1, abs=1e-5)
