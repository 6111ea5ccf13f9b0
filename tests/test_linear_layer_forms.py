"""Forms of files with linear layers that SDP+ and APRIL-GAN take or refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Golden, sdp_plus_command
from torch import Tensor
from weight_forms import prefixed

from anomaly_clip.backbones.clip import CLIPBackbone
from anomaly_clip.cli import main
from anomaly_clip.methods import APRILGAN, SDPPlus
from anomaly_clip.methods.linear_layers import (
    APRIL_GAN_KEY,
    LAYERS_KEY,
    read_linear_layers,
    stage_maps,
    write_linear_layers,
)

State = dict[str, Tensor]


@pytest.fixture
def state() -> State:
    """Return layers of the width of the tiny CLIP."""
    torch.manual_seed(1)
    shapes = {"weight": (12, 24), "bias": (12,)}
    return {f"fc.{i}.{kind}": torch.randn(s) for i in range(4) for kind, s in shapes.items()}


class Holder(torch.nn.Module):
    """A module with layers, to be saved as a TorchScript archive."""

    def __init__(self, state: State) -> None:
        super().__init__()
        self.fc = torch.nn.ModuleList(torch.nn.Linear(24, 12) for _ in range(4))
        self.load_state_dict(state)

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.stack([layer(tokens) for layer in self.fc])


FORMS: dict[str, Callable[[State], Any]] = {
    "the authors' key": lambda s: {"linear_layers": s},
    "APRIL-GAN's key": lambda s: {"trainable_linearlayer": s},
    "a state dict": lambda s: s,
    "a state dict beside an epoch": lambda s: {**s, "epoch": 3},
    "state_dict": lambda s: {"state_dict": s, "epoch": 3},
    "model_state_dict": lambda s: {"model_state_dict": s},
    "net": lambda s: {"net": s, "acc": 0.5},
    "an unknown key": lambda s: {"my_layers": s, "epoch": 3},
    "two levels": lambda s: {"model": {"state_dict": s}},
    "the authors' key in a model": lambda s: {"model": {"linear_layers": s}},
    "the authors' key in a network": lambda s: {"my_net": {"linear_layers": s}},
    "exponential average": lambda s: {"model_ema": {"module": s}},
    "optimiser": lambda s: {"net": s, "optimizer": {"state": {0: {"step": torch.ones(1)}}}},
    "DataParallel": lambda s: {"linear_layers": prefixed(s, "module.")},
    "torch.compile": lambda s: prefixed(s, "_orig_mod."),
    "Lightning": lambda s: {"state_dict": prefixed(s, "model."), "epoch": 1},
    "three wrappers": lambda s: prefixed(s, "module._orig_mod.model."),
    "another prefix": lambda s: prefixed(s, "decoder.adapters."),
    "half precision": lambda s: {k: v.half() for k, v in s.items()},
    "bfloat16": lambda s: {k: v.bfloat16() for k, v in s.items()},
}


METHODS: dict[str, type[SDPPlus | APRILGAN]] = {LAYERS_KEY: SDPPlus, APRIL_GAN_KEY: APRILGAN}
"""Methods by the keys of their files."""


@pytest.mark.parametrize("key", METHODS)
@pytest.mark.parametrize("form", FORMS)
def test_forms_that_are_taken(
    state: State, tmp_path: Path, form: str, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(FORMS[form](state), tmp_path / "layers")
    layers = read_linear_layers(tmp_path / "layers", key)
    assert list(layers) == list(state)
    tolerance = {"half precision": 2e-3, "bfloat16": 2e-2}.get(form, 0)
    for name, value in state.items():
        torch.testing.assert_close(layers[name], value, atol=tolerance, rtol=0)
    other = form == "APRIL-GAN's key"
    if key == APRIL_GAN_KEY:
        other = form.startswith("the authors' key") or form == "DataParallel"
    lines = capsys.readouterr().err.splitlines()
    names = {LAYERS_KEY: "of APRIL-GAN", APRIL_GAN_KEY: "of CLIP-AD"}
    assert [names[key] in line for line in lines] == [True] * other


@pytest.mark.parametrize(("key", "kind"), METHODS.items())
def test_methods_take_files_of_both_keys(
    tiny_clip: CLIPBackbone,
    state: State,
    tmp_path: Path,
    key: str,
    kind: type[SDPPlus | APRILGAN],
    capsys: pytest.CaptureFixture[str],
) -> None:
    for written in METHODS:
        torch.save({written: state}, tmp_path / "layers.pth")
        method = kind(tiny_clip, linear_layers=str(tmp_path / "layers.pth"))
        assert torch.equal(method.fc.state_dict()["3.bias"], state["fc.3.bias"])
        assert not method.must_be_fitted
        assert ("has the key" in capsys.readouterr().err) == (written != key)
        exported = torch.load(method.export(tmp_path), weights_only=True)
        assert list(exported) == [key]
        assert exported[key].keys() == state.keys()
    options: dict[str, Any] = {"stages" if kind is SDPPlus else "layers": [1, 4]}
    with pytest.raises(ValueError, match=r"4 layers from 24 to 12 channels, but .* needs 2 layers"):
        kind(tiny_clip, linear_layers=str(tmp_path / "layers.pth"), **options)


@pytest.mark.golden
def test_the_golden_file_is_written_again(golden: Callable[[str], Golden], tmp_path: Path) -> None:
    arrays = golden("april_gan")
    config, weights = (
        str(arrays.folder / name) for name in ("model_config.json", "state_dict.safetensors")
    )
    tower = CLIPBackbone(config, weights, arrays.meta["image_size"])
    file, layers = arrays.folder / "linear.pth", arrays.meta["layers"]
    method = APRILGAN(tower, layers=layers, linear_layers=str(file))
    before, after = (
        torch.load(path, weights_only=True) for path in (file, method.export(tmp_path))
    )
    assert before.keys() == after.keys() == {APRIL_GAN_KEY}
    for name, value in before[APRIL_GAN_KEY].items():
        written = after[APRIL_GAN_KEY][name]
        assert written.dtype == value.dtype
        assert torch.equal(written, value)
    assert list(before[APRIL_GAN_KEY]) == list(after[APRIL_GAN_KEY])
    assert method.external_weights is not None
    assert method.external_weights["file"] == str(file)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_an_archive_is_taken(tiny_clip: CLIPBackbone, state: State, tmp_path: Path) -> None:
    torch.jit.trace(Holder(state), torch.zeros(1, 24)).save(str(tmp_path / "layers.pt"))
    method = SDPPlus(tiny_clip, linear_layers=str(tmp_path / "layers.pt"))
    assert torch.equal(method.fc.state_dict()["3.bias"], state["fc.3.bias"])


def test_what_is_not_used_is_named(
    state: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = {key: value + 1 for key, value in state.items()}
    scale = {"logit_scale": torch.ones(1)}
    for content, line in (
        ({"linear_layers": state, "model": other}, "linear_layers is used, model not"),
        (
            {"model": {"x": scale, "state_dict": state}},
            "model.state_dict is used, model.x not",
        ),
        (
            {"state_dict": {**prefixed(state, "model."), **scale}},
            "tensors outside the layers are not used: logit_scale",
        ),
    ):
        torch.save(content, tmp_path / "a.pth")
        layers = read_linear_layers(tmp_path / "a.pth")
        assert torch.equal(layers["fc.3.bias"], state["fc.3.bias"])
        assert capsys.readouterr().err.strip().endswith(f"a.pth: {line}")
    torch.save(prefixed(state, "trainable_linearlayer."), tmp_path / "a.pth")
    read_linear_layers(tmp_path / "a.pth")
    assert "of APRIL-GAN" in capsys.readouterr().err
    other = {name: value + 1 for name, value in state.items()}
    torch.save({LAYERS_KEY: state, APRIL_GAN_KEY: other}, tmp_path / "a.pth")
    for key, expected in ((LAYERS_KEY, state), (APRIL_GAN_KEY, other)):
        layers = read_linear_layers(tmp_path / "a.pth", key)
        assert torch.equal(layers["fc.3.bias"], expected["fc.3.bias"])
        line = capsys.readouterr().err
        assert f"{key} is used" in line
        assert "whose layers are trained on" not in line


INT8 = r"its tensors are quantised \(fc.0.weight is torch.int8\); give weights in float32, float16"
REFUSED: dict[str, tuple[Callable[[State], Any], str]] = {
    "integers": (lambda s: {k: v.to(torch.int8) for k, v in s.items()}, INT8),
    "one integer tensor": (
        lambda s: {"linear_layers": {**s, "fc.2.bias": torch.zeros(12, dtype=torch.long)}},
        r"quantised \(fc.2.bias is torch.int64\)",
    ),
    "8 bits": (
        lambda s: {k: v.to(torch.float8_e4m3fn) for k, v in s.items()},
        r"quantised \(fc.0.weight is torch.float8_e4m3fn\)",
    ),
    "NaN": (
        lambda s: {**s, "fc.1.bias": s["fc.1.bias"] * float("nan")},
        r"contain NaN or infinite values \(fc.1.bias",
    ),
    "sparse": (
        lambda s: {**s, "fc.1.bias": s["fc.1.bias"].to_sparse()},
        r"its tensors are sparse \(fc.1.bias",
    ),
    "two sets": (
        lambda s: {**prefixed(s, "student."), **prefixed(s, "teacher.")},
        r"2 sets of layers, 'student.' and 'teacher.'; save one of them under ",
    ),
    "two state dicts": (lambda s: {"a": s, "b": s}, "several state dicts: a, b; save the one"),
    "other tensors": (lambda s: {**s, "head.weight": s["fc.0.bias"]}, "also contains head.weight"),
    "a ResNet": (
        lambda _: {"conv1.weight": torch.zeros(1), "fc.weight": torch.zeros(1)},
        "but it contains conv1.weight, fc.weight; give the linear_layers.pth",
    ),
    "a number": (lambda s: {**s, "fc.1.bias": torch.tensor(1.0)}, r"fc.1.bias has the shape \(\)"),
    "no tensors": (lambda _: {"epoch": 1}, "no weights: a dictionary with the keys epoch"),
}


@pytest.mark.parametrize("key", METHODS)
@pytest.mark.parametrize("form", REFUSED)
def test_forms_that_are_refused(state: State, tmp_path: Path, form: str, key: str) -> None:
    content, message = REFUSED[form]
    torch.save(content(state), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=message) as error:
        read_linear_layers(tmp_path / "a.pth", key)
    beginning = f"model.linear_layers {tmp_path / 'a.pth'}: expected a dictionary {key} with"
    assert str(error.value).startswith(beginning)


def test_the_command_line_says_so_in_one_line(
    state: State,
    tiny_clip_config: str,
    mvtec_root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.save({k: v.to(torch.int8) for k, v in state.items()}, tmp_path / "a.pth")
    words = sdp_plus_command(mvtec_root, mvtec_root, tiny_clip_config, tmp_path / "runs", "test")
    assert main([*words, "--model.linear_layers", str(tmp_path / "a.pth")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "its tensors are quantised (fc.0.weight is torch.int8)" in line
    assert not (tmp_path / "runs").exists()


def test_layers_cast_by_a_fit_in_half_precision_score_and_are_written_in_float32(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    layers = torch.nn.ModuleList([torch.nn.Linear(24, 12)])
    tokens, text = (
        torch.randn(2, 4, 24),
        torch.nn.functional.normalize(torch.randn(2, 12, 2), dim=1),
    )
    expected = stage_maps(layers, [tokens], text, (8, 8))
    layers.bfloat16()  # as Lightning does with the precision bf16-true
    maps = stage_maps(layers, [tokens], text, (8, 8))
    assert maps.dtype == torch.float32
    torch.testing.assert_close(maps, expected, atol=0.1, rtol=0)
    write_linear_layers(layers, tmp_path / "a.pth", LAYERS_KEY)
    written = read_linear_layers(tmp_path / "a.pth")
    assert torch.equal(written["fc.0.weight"], layers.state_dict()["0.weight"].float())
    saved = torch.load(tmp_path / "a.pth", weights_only=True)[LAYERS_KEY]
    assert {value.dtype for value in saved.values()} == {torch.float32}
