"""Weights of ViTs in the names of timm, transformers and official code give the same tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import vit_forms
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

from anomaly_clip.backbones.vit import ViTBackbone

State = dict[str, Tensor]
V2 = ("vit_form_dinov2", "vit_form_reg4", "vit_form_swiglu")
V3 = ("vit_form_dinov3", "vit_form_dinov3_qkvb", "vit_form_dinov3_plus")


def model_of(name: str) -> Any:
    return vit_forms.randomised(timm.create_model(name, num_classes=0))


def hub(name: str, state: State) -> State:
    return vit_forms.to_hub_dinov3(state) if name in V3 else vit_forms.to_hub_dinov2(state)


LAYOUTS: dict[str, Callable[[str, State], Any]] = {
    "timm": lambda name, state: state,
    "official": hub,
    "transformers 4": lambda name, state: vit_forms.to_transformers(
        hub(name, state), is_v3=name in V3, is_old=True
    ),
    "transformers 5": lambda name, state: vit_forms.to_transformers(
        hub(name, state), is_v3=name in V3, is_old=False
    ),
    "classifier of transformers": lambda name, state: {
        **{
            f"dinov2.{k}": v
            for k, v in vit_forms.to_transformers(
                hub(name, state), is_v3=name in V3, is_old=True
            ).items()
        },
        "classifier.weight": torch.ones(5, 64),
    },
    "teacher of a training": lambda name, state: {
        "student": {f"module.backbone.{k}": torch.zeros_like(v) for k, v in state.items()},
        "teacher": {
            **{f"backbone.{k}": v for k, v in hub(name, state).items()},
            "head.last_layer.weight": torch.ones(3),
        },
        "epoch": 3,
    },
    "blocks in groups": lambda name, state: {
        "teacher": {
            f"backbone.{k.replace('blocks.', 'blocks.0.', 1)}": v
            for k, v in hub(name, state).items()
        }
    },
    "image tower of open_clip": lambda name, state: {
        **{f"visual.trunk.{k}": v for k, v in state.items()},
        "visual.head.proj.weight": torch.ones(2, 2),
        "logit_scale": torch.tensor(1.0),
        "text.token_embedding.weight": torch.ones(4, 4),
    },
    "with heads": lambda name, state: {
        **{f"module.{k}": v for k, v in state.items()},
        "module.head.weight": torch.ones(10, 32),
        "module.head.bias": torch.ones(10),
    },
    "float16": lambda name, state: {k: v.half() for k, v in state.items()},
}


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [*V2, *V3])
def test_each_layout_gives_the_tokens_of_timm(name: str, layout: str, tmp_path: Path) -> None:
    model = model_of(name)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    file = tmp_path / "weights.pth"
    torch.save(LAYOUTS[layout](name, state), file)
    backbone = ViTBackbone(name, str(file))
    side = backbone.image_size
    pixels = torch.randn(2, 3, side, side)
    tolerance = 1e-2 if layout == "float16" else 1e-5
    expected = model.forward_features(pixels)
    assert_close(backbone(pixels)[0].projected, expected, atol=tolerance, rtol=tolerance)
    assert not backbone.is_random
    if layout not in ("float16", "official") and "transformers" not in layout and name in V3:
        assert backbone.identity == ViTBackbone(name, str(file)).identity


@torch.no_grad()
def test_positions_are_interpolated_to_the_image_size(tmp_path: Path) -> None:
    model = model_of("vit_form_reg4")
    save_file(vit_forms.to_hub_dinov2(model.state_dict()), tmp_path / "weights.safetensors")
    larger = ViTBackbone("vit_form_reg4", str(tmp_path / "weights.safetensors"), 84)
    grid = model.pos_embed.unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(grid, (6, 6), mode="bicubic", antialias=True)
    assert_close(larger.model.pos_embed, expected.flatten(2).mT, atol=1e-6, rtol=0)
    model.set_input_size((84, 84))
    pixels = torch.randn(1, 3, 84, 84)
    assert_close(larger(pixels)[0].projected, model.forward_features(pixels), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", ["Dinov2", "Dinov2WithRegisters", "DINOv3ViT"])
def test_hidden_states_of_transformers(kind: str, gated: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    is_v3 = kind == "DINOv3ViT"
    if is_v3:
        name = "vit_form_dinov3_plus" if gated else "vit_form_dinov3_qkvb"
        state = timm.create_model(name, num_classes=0).state_dict()
        width = len(state["blocks.0.mlp.fc1_g.bias" if gated else "blocks.0.mlp.fc1.bias"])
        options: dict[str, Any] = {"image_size": 64, "patch_size": 16, "intermediate_size": width}
        options |= {"use_gated_mlp": gated, "num_register_tokens": 4, "layer_norm_eps": 1e-5}
        options |= {"hidden_act": "silu" if gated else "gelu"}
        options |= {"query_bias": not gated, "value_bias": not gated}
    else:
        if gated and kind == "Dinov2":
            pytest.skip("no small model of timm has this form")
        name = {"Dinov2": "vit_form_dinov2"}.get(
            kind, "vit_form_swiglu" if gated else "vit_form_reg4"
        )
        options = {"image_size": 56, "patch_size": 14, "use_swiglu_ffn": gated}
        options |= {"num_register_tokens": 4} if "Registers" in kind else {}
    config = getattr(transformers, f"{kind}Config")(**sizes, **options)
    model = vit_forms.randomised(getattr(transformers, f"{kind}Model")(config))
    model.save_pretrained(tmp_path)
    backbone = ViTBackbone(name, str(tmp_path))
    pixels = torch.randn(2, 3, backbone.image_size, backbone.image_size)
    output = model(pixels, output_hidden_states=True)
    layers = [1, 2, 3]
    for number, tokens in zip(layers, backbone(pixels, layers), strict=True):
        assert_close(tokens.raw, output.hidden_states[number], atol=2e-5, rtol=2e-5)
    assert_close(tokens.projected, output.last_hidden_state, atol=2e-5, rtol=2e-5)


def changed(**tensors: Tensor | None) -> Callable[[State], State]:
    def change(state: State) -> State:
        merged = {**state, **{k.replace("__", "."): v for k, v in tensors.items()}}
        return {key: value for key, value in merged.items() if value is not None}

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed(norm__weight=None, norm__bias=None), "lacks norm.weight and 1 more"),
        (changed(extra__weight=torch.ones(2)), "has the unexpected key extra.weight"),
        (changed(cls_token=torch.ones(1, 1, 8)), "has a different shape for cls_token"),
        (changed(cls_token=torch.full((1, 1, 32), float("nan"))), "contain NaN or infinite"),
        (changed(cls_token=torch.ones(1, 1, 32, dtype=torch.int8)), "quantised"),
        (changed(cls_token=torch.ones(1, 1, 32).to_sparse()), "sparse"),
        (changed(patch_embed__proj__weight=torch.ones(32, 3, 16, 16)), "patches of 16 pixels"),
        (lambda s: {f"{p}.{k}": v for p in "ab" for k, v in s.items()}, "contains 2 networks"),
        (lambda s: {"a": torch.ones(2)}, "lacks cls_token"),
    ],
)
def test_files_that_do_not_fit(
    change: Callable[[State], State], message: str, tmp_path: Path
) -> None:
    state = timm.create_model("vit_form_dinov2", num_classes=0).state_dict()
    torch.save(change(state), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=message) as error:
        ViTBackbone("vit_form_dinov2", str(tmp_path / "weights.pth"))
    assert "\n" not in str(error.value)
    assert str(tmp_path / "weights.pth") in str(error.value)


@pytest.mark.parametrize(
    ("of_file", "name", "message"),
    [
        ("vit_form_dinov2", "vit_form_reg4", "has no register tokens, but vit_form_reg4 has them"),
        ("vit_form_reg4", "vit_form_dinov2", "has register tokens, but vit_form_dinov2 has none"),
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_with_and_without_registers(
    of_file: str, name: str, message: str, layout: str, tmp_path: Path
) -> None:
    state = LAYOUTS[layout](of_file, model_of(of_file).state_dict())
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=message):
        ViTBackbone(name, str(tmp_path / "weights.pth"))


def test_biases_that_the_model_lacks(tmp_path: Path) -> None:
    with_biases = vit_forms.to_hub_dinov3(model_of("vit_form_dinov3_qkvb").state_dict())
    torch.save(with_biases, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"set backbone.name to vit_form_dinov3_qkvb"):
        ViTBackbone("vit_form_dinov3", str(tmp_path / "weights.pth"))
