"""Forms of weights files that CNN backbones take or refuse."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet18, swin_t
from weight_forms import prefixed, state_of

from anomaly_clip.backbones.cnn import CNNBackbone, load_network
from anomaly_clip.cli import main

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    torch.manual_seed(0)
    return state_of(resnet18(weights=None))


def moco(state: State) -> State:
    second = {key: value + 1 for key, value in state.items()}
    second = prefixed(second, "module.encoder_k.")
    queue = {"module.queue": torch.zeros(2, 2), "module.queue_ptr": torch.zeros(1)}
    return {
        **prefixed(state, "module.encoder_q."),
        **prefixed(second, "module.encoder_k."),
        **queue,
    }


def tab(state: State) -> State:
    heads = {"logit_scale": torch.tensor(1.0), "normal_head.weight": torch.zeros(2, 2)}
    return {**prefixed(state, "backbone."), **heads}


FORMS: dict[str, Callable[[State], Any]] = {
    "torch.compile": lambda s: prefixed(s, "_orig_mod."),
    "two wrappers": lambda s: prefixed(s, "module._orig_mod.model."),
    "the query encoder alone": lambda s: prefixed(s, "module.encoder_q."),
    "MoCo": lambda s: {"state_dict": moco(s), "epoch": 200},
    "TAB's whole model": tab,
    "TAB's whole model in a checkpoint": lambda s: {"state_dict": prefixed(tab(s), "model.")},
    "model": lambda s: {"model": s},
    "an unknown key": lambda s: {"my_resnet": s},
    "exponential average": lambda s: {"model_ema": {"module": s}},
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_that_are_taken(state: State, tmp_path: Path, form: str) -> None:
    torch.save(FORMS[form](state), tmp_path / "weights")
    backbone = CNNBackbone(weights=str(tmp_path / "weights"), layers=["layer1"])
    network = backbone.network.state_dict()
    assert torch.equal(network["layer1.1.conv2.weight"], state["layer1.1.conv2.weight"])


def test_what_is_not_used_is_named(
    state: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": state, "ema": state}, tmp_path / "two.pt")
    torch.save(tab(state), tmp_path / "tab.pt")
    for name, line in (
        ("two.pt", "two.pt: state_dict is used, ema not"),
        ("tab.pt", "tab.pt: backbone is used, 2 other tensors are not"),
    ):
        CNNBackbone(weights=str(tmp_path / name), layers=["layer1"])
        assert capsys.readouterr().err.strip().endswith(line)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (nn.Linear(1, 1), "it is a whole pickled model: it holds Python objects besides tensors"),
        ({"a": {"x": torch.zeros(1)}, "b": {"x": torch.zeros(1)}}, "several state dicts: a, b"),
        ([torch.zeros(1)], "it contains no weights: a list"),
    ],
)
def test_forms_that_are_refused(
    content: object, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=message):
        CNNBackbone(weights=str(tmp_path / "a.pt"))
    words = ["test", "--config", "padim", f"--model.backbone.weights={tmp_path / 'a.pt'}"]
    assert main([*words, f"--data.root={tmp_path}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert "\x1b" not in line
    assert "weights_only" not in line


def test_two_networks_are_refused(state: State, tmp_path: Path) -> None:
    two = {**prefixed(state, "student.net."), **prefixed(state, "teacher.net.")}
    torch.save(two, tmp_path / "two.pt")
    with pytest.raises(ValueError, match=r"2 networks, below student.net. and teacher.net.; save"):
        CNNBackbone(weights=str(tmp_path / "two.pt"))


@pytest.mark.parametrize(
    ("key", "change", "dtype"),
    [
        ("conv1.weight", lambda v: v.to(torch.int8), "torch.int8"),
        ("layer4.1.bn2.running_var", lambda v: v.long(), "torch.int64"),
        ("layer1.0.conv1.weight", lambda v: v.to(torch.float8_e5m2), "torch.float8_e5m2"),
    ],
)
def test_quantised_weights_are_refused(
    state: State,
    tmp_path: Path,
    key: str,
    change: Callable[[Tensor], Tensor],
    dtype: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "a.pt"
    torch.save({**state, key: change(state[key])}, file)
    message = f"backbone.weights {file}: its tensors are quantised ({key} is {dtype}); give weights"
    with pytest.raises(ValueError, match=re.escape(message)):
        CNNBackbone(weights=str(file))
    words = ["test", "--config", "padim", f"--model.backbone.weights={file}"]
    assert main([*words, f"--data.root={tmp_path}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_counters_and_classifiers_may_have_any_type(state: State, tmp_path: Path) -> None:
    other = {
        "bn1.num_batches_tracked": torch.tensor(3.0),
        "fc.weight": state["fc.weight"].to(torch.int8),
    }
    torch.save({**{k: v.half() for k, v in state.items()}, **other}, tmp_path / "a.pt")
    network = CNNBackbone(weights=str(tmp_path / "a.pt"), layers=["layer1"]).network.state_dict()
    assert torch.equal(network["conv1.weight"], state["conv1.weight"].half().float())


def test_indices_of_a_model_are_no_weights(tmp_path: Path) -> None:
    model = swin_t(weights=None)
    assert any(v.dtype == torch.long for v in model.state_dict().values())
    torch.save(model.state_dict(), tmp_path / "swin.pt")
    loaded = load_network("swin_t", str(tmp_path / "swin.pt")).state_dict()
    key = "features.1.0.attn.relative_position_bias_table"
    assert torch.equal(loaded[key], model.state_dict()[key])


def test_folders_and_addresses(state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "resnet.pth")
    CNNBackbone(weights=str(tmp_path), layers=["layer1"])
    with pytest.raises(ValueError, match=r"backbone.weights https://a/b.pth is an address, not"):
        CNNBackbone(weights="https://a/b.pth")
    with pytest.raises(FileNotFoundError, match="existing weights file, 'imagenet' or 'random'"):
        CNNBackbone(weights="b.pth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.half() * float("inf"), "contain NaN or infinite values (conv1.weight"),
        (lambda v: v * float("nan"), "contain NaN or infinite values (conv1.weight"),
        (lambda v: v.to_sparse(), "are sparse (conv1.weight is torch.sparse_coo)"),
        (lambda v: v.to("meta"), "have no values (conv1.weight"),
    ],
)
def test_tensors_without_usable_values_are_refused(
    state: State, tmp_path: Path, change: Callable[[Tensor], Tensor], message: str
) -> None:
    torch.save({**state, "conv1.weight": change(state["conv1.weight"])}, tmp_path / "cnn.pt")
    message = f"backbone.weights {tmp_path / 'cnn.pt'}: its tensors {message}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        load_network("resnet18", str(tmp_path / "cnn.pt"))


@pytest.mark.parametrize("kind", ["sparse", "long name"])
def test_other_exceptions_are_one_sentence(state: State, tmp_path: Path, kind: str) -> None:
    file = tmp_path / ("cnn.pt" if kind == "sparse" else f"{'a' * 300}.pt")
    if kind == "sparse":
        counter = torch.ones(()).to_sparse()
        torch.save({**state, "bn1.num_batches_tracked": counter}, file)
    with pytest.raises(ValueError, match=rf"^backbone\.weights {file}.*\(.*\); give .*$"):
        load_network("resnet18", str(file))
