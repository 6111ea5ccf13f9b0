"""Vision transformers of timm: tokens and feature maps are timm's, for every kind of tower."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN
from torch import Tensor, nn
from torch.testing import assert_close

from anomaly_clip.backbones.vit import ViTBackbone, ViTSettings, is_vit

SLOW = pytest.mark.slow
TOWERS = [  # (name, image size)
    ("test_vit", None),  # class token
    ("test_vit2", 96),  # average pooling, norm after it
    ("test_vit3", 64),  # registers
    ("test_vit4", 64),
    *(
        pytest.param(name, size, marks=SLOW)
        for name, size in (
            ("vit_small_patch14_dinov2", 56),  # patches of 14, LayerScale
            ("vit_small_patch14_reg4_dinov2", 56),  # registers without positions
            ("vit_small_patch16_dinov3_qkvb", 64),  # rotary positions
            ("vit_small_plus_patch16_dinov3", 64),  # SwiGLU
            ("vit_small_patch16_rope_mixed_224", 64),  # learned rotary positions
            ("vit_small_patch16_rope_ape_224", 64),
            ("eva02_tiny_patch14_224", 56),
            ("vit_pe_spatial_tiny_patch16_512", 64),
            ("vit_pe_core_tiny_patch16_384", 64),  # attention pooling
            ("vit_base_patch16_siglip_224", 64),
            ("beit_base_patch16_224", 64),
            ("deit_tiny_distilled_patch16_224", 64),  # two prefix tokens
            ("deit3_small_patch16_224", 64),
            ("vit_relpos_small_patch16_224", 64),  # no class token, relative positions
            ("vit_srelpos_small_patch16_224", 64),
            ("flexivit_small", 64),
            ("vit_small_patch16_36x1_224", 64),
            ("vit_small_patch16_18x2_224", 64),  # parallel blocks
            ("vit_tiny_r_s16_p8_224", 64),  # ResNet stem, stride 32
            ("vit_base_mci_224", 64),  # convolutional stem, patches of 1
            ("vitamin_small_224", 64),
        )
    ),
]
NOT_PLAIN = [
    "test_resnet",
    "xcit_nano_12_p16_224",
    "pit_ti_224",
    *(
        pytest.param(name, marks=SLOW)
        for name in (
            *("swin_tiny_patch4_window7_224", "mvitv2_tiny", "convnext_atto", "resnet18d"),
            *("naflexvit_base_patch16_gap", "samvit_base_patch16_224", "cait_xxs24_224"),
            *("hiera_tiny_224", "levit_128s", "volo_d1_224", "mixer_s32_224", "tnt_s_patch16_224"),
        )
    ),
]


def varied(backbone: ViTBackbone) -> ViTBackbone:
    """Give every parameter random values, as some are initialised with zeros."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in backbone.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return backbone


def photographs(backbone: ViTBackbone, number: int = 2) -> Tensor:
    torch.manual_seed(1)
    side = backbone.image_size
    return torch.randint(0, 256, (number, 3, side, side), dtype=torch.uint8)


@pytest.fixture(scope="module")
def tiny() -> ViTBackbone:
    return varied(ViTBackbone("test_vit3", "random", 64))


RELPOS = "test_vit_relpos"
needs_relpos = pytest.mark.skipif(not timm.is_model(RELPOS), reason="timm lacks the small model")


@torch.no_grad()
@pytest.mark.parametrize(("name", "size"), TOWERS)
def test_tokens_and_feature_maps_are_those_of_timm(name: str, size: int | None) -> None:
    backbone = varied(ViTBackbone(name, "random", size))
    model: Any = backbone.model
    images = photographs(backbone)
    pixels = backbone.normalise(images)
    layers = [1, backbone.num_layers - 1, backbone.num_layers]
    tokens = backbone(images, layers)
    for norm in (False, True):
        final, expected = model.forward_intermediates(
            pixels,
            indices=[n - 1 for n in layers],
            return_prefix_tokens=backbone.num_prefix_tokens > 0,
            norm=norm,
        )
        expected = [pair if isinstance(pair, tuple) else (pair, None) for pair in expected]
        maps = backbone.feature_maps(images, layers, norm=norm)
        is_last_norm = isinstance(model.norm, nn.Identity)  # timm has none to apply
        for given, feature_map, (patches, prefix) in zip(tokens, maps, expected, strict=True):
            if norm and is_last_norm:
                continue
            assert_close(feature_map, patches, atol=1e-5, rtol=1e-5)
            whole = given.projected if norm else given.raw
            places = backbone.num_prefix_tokens
            assert_close(whole[:, places:].mT.unflatten(2, backbone.grid_size), patches)
            if places:
                assert_close(whole[:, :places], prefix, atol=1e-5, rtol=1e-5)
    assert_close(model.forward_features(pixels), final, atol=1e-5, rtol=1e-5)
    if not isinstance(model.norm, nn.Identity):
        assert_close(tokens[-1].projected, final, atol=1e-5, rtol=1e-5)
    rows, columns = backbone.grid_size
    assert rows * backbone.strides[1] == columns * backbone.strides[1] == backbone.image_size
    assert {tuple(part.shape) for part in maps} == {(2, backbone.channels[1], rows, columns)}


@torch.no_grad()
@pytest.mark.parametrize("name", ["test_vit2", "test_vit3"])
def test_a_changed_patch_stays_where_it_was(name: str) -> None:
    backbone = varied(ViTBackbone(name, "random", 96))
    images = photographs(backbone, 1)
    changed = images.clone()
    changed[:, :, 16:32, 64:80] = 255 - changed[:, :, 16:32, 64:80]  # row 1, column 4 of 6 x 6
    before, after = (backbone.feature_maps(part, [1])[0] for part in (images, changed))
    difference = (before - after).norm(dim=1)[0]  # (6, 6)
    assert divmod(int(difference.argmax()), 6) == (1, 4)


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_other_models_of_timm_are_refused_in_one_sentence(name: str) -> None:
    with pytest.raises(ValueError, match="do not return one token per patch") as error:
        ViTBackbone(name, "random", 224)
    assert "use a plain ViT" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "size", "near"),
    [("test_vit", 100, "use 96 or 112"), ("test_vit2", 8, "use 16")],
)
def test_an_image_size_between_multiples_of_the_patch_size(name: str, size: int, near: str) -> None:
    with pytest.raises(ValueError, match=rf"^model.image_size {size} is not a multiple .*{near}$"):
        ViTBackbone(name, "random", size)


@torch.no_grad()
def test_an_image_size_of_its_own(tiny: ViTBackbone) -> None:
    assert ViTBackbone("test_vit3", "random").image_size == 160
    wide = ViTBackbone("test_vit3", "random", (32, 64))
    maps = wide.feature_maps(torch.zeros(1, 3, 32, 64, dtype=torch.uint8), [1])
    assert maps[0].shape[2:] == wide.grid_size == (2, 4)
    with pytest.raises(ValueError, match=r"expected images \(B, 3, 64, 64\)"):
        tiny(torch.zeros(1, 3, 32, 64, dtype=torch.uint8))


@pytest.mark.parametrize("layers", [[], [0], [2, 1], [1, 1], [99], ["layer5"], [-1]])
def test_layers_that_do_not_exist(tiny: ViTBackbone, layers: list[Any]) -> None:
    with pytest.raises(ValueError, match="ascending numbers from 1 to 9"):
        tiny.check_layers(layers)


@torch.no_grad()
def test_vectors_of_images_are_class_tokens_or_means(tiny: ViTBackbone) -> None:
    tokens = tiny(photographs(tiny))[0]
    places = tiny.num_prefix_tokens
    with_class = tiny.model.cls_token is not None
    expected = tokens.projected[:, 0] if with_class else tokens.projected[:, places:].mean(1)
    assert_close(tiny.image_vectors(tokens), expected)


@needs_relpos
@torch.no_grad()
def test_vectors_of_images_without_a_class_token() -> None:
    other = ViTBackbone(RELPOS, "random", 64)
    assert other.model.cls_token is None
    tokens = other(photographs(other))[0]
    assert_close(other.image_vectors(tokens), tokens.projected.mean(1))


def test_the_backbone_is_frozen_and_untrained_weights_depend_on_the_seed(tiny: ViTBackbone) -> None:
    tiny.train()
    assert not any(module.training for module in tiny.modules())
    assert not any(parameter.requires_grad for parameter in tiny.parameters())
    torch.manual_seed(3)
    first = ViTBackbone("test_vit", "random")
    after = torch.rand(1)
    torch.manual_seed(3)
    assert_close(torch.rand(1), after)  # no random number is used up
    torch.manual_seed(3)
    assert ViTBackbone("test_vit", "random").identity == first.identity
    assert first.weights["sha256"] is None
    assert first.is_random
    assert copy.deepcopy(first).identity == first.identity


@SLOW
def test_normalisation_is_that_of_the_tag() -> None:
    inception = ViTBackbone("vit_tiny_patch16_224", "random", 32)
    assert inception.mean.flatten().tolist() == [0.5, 0.5, 0.5]
    dino = ViTBackbone("vit_small_patch16_224.dino", "random", 32)
    assert dino.mean.flatten().tolist() == pytest.approx(IMAGENET_DEFAULT_MEAN)
    assert ViTBackbone.of(dino.settings, 32).mean.equal(dino.mean)  # not that of the default tag
    given = ViTBackbone("test_vit", "random", mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
    assert_close(given.mean.flatten(), torch.tensor([0.1, 0.2, 0.3]))
    assert given.settings == ViTSettings("test_vit", "random", [0.1, 0.2, 0.3], [0.4, 0.5, 0.6])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name", ["test_vit3", pytest.param("vit_small_patch16_dinov3_qkvb", marks=SLOW)]
)
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    backbone = ViTBackbone(name, "random", 64)
    images = photographs(backbone)
    exact = backbone.feature_maps(images, [backbone.num_layers], norm=True)[0]
    identity = backbone.identity
    backbone.cast(dtype)
    rounded = backbone.feature_maps(images, [backbone.num_layers], norm=True)[0]
    assert rounded.dtype == dtype
    assert backbone.identity == identity
    cosine = torch.cosine_similarity(rounded.float(), exact, dim=1)
    assert float(cosine.min()) > 0.999
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert backbone.feature_maps(images, [1])[0].dtype == dtype


class _Maps(nn.Module):
    def __init__(self, backbone: ViTBackbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone.feature_maps(images, [self.backbone.num_layers], norm=True)[0]


@SLOW
@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["test_vit3", "vit_relpos_small_patch16_224", "vit_small_patch16_dinov3"]
)
def test_export_with_any_number_of_images(name: str, tmp_path: Any) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    module = _Maps(varied(ViTBackbone(name, "random", 64))).eval()
    images = photographs(module.backbone, 3)
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = {"images": {0: batch}}
    program = torch.export.export(module, (images,), dynamic_shapes=shapes)
    assert_close(program.module()(images[:2]), module(images[:2]), atol=1e-5, rtol=1e-4)
    file = tmp_path / "vit.onnx"
    onnx = torch.onnx.export(module, (images,), dynamo=True, dynamic_shapes=shapes, verbose=False)
    assert onnx is not None
    onnx.save(str(file))
    session = onnxruntime.InferenceSession(str(file))
    given = session.run(None, {session.get_inputs()[0].name: images[:1].numpy()})[0]
    assert_close(torch.from_numpy(given), module(images[:1]), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("name", "expected"), [("vit_small_patch14_dinov2.lvd142m", True)])
def test_names_of_timm(name: str, expected: bool) -> None:
    assert is_vit(name) is expected
    assert not is_vit("ViT-B-16")


@SLOW
@pytest.mark.parametrize("code", ["", "from anomaly_clip import fit, load"])
def test_neither_help_nor_a_cnn_imports_timm(code: str) -> None:
    program = f"""{code}
import sys
from anomaly_clip.__main__ import main
try:
    main(["fit", "--help"])
except SystemExit:
    pass
from anomaly_clip.backbones.towers import tower_of
tower_of({{"name": "resnet18", "weights": "random"}}, ["layer1"])
assert "timm" not in sys.modules, "timm is imported"
assert "open_clip" not in sys.modules, "open_clip is imported"
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-600:]
