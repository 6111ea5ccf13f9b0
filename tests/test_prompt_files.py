"""Forms of files with prompts that AnomalyCLIP takes, refuses and writes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Golden
from object_agnostic_methods import command, golden_method, golden_tower, write_config
from safetensors.torch import save_file
from torch import Tensor
from weight_forms import prefixed

from anomaly_clip.backbones.clip import CLIPBackbone
from anomaly_clip.backbones.deep_prompts import DeepPromptsSettings
from anomaly_clip.cli import main
from anomaly_clip.methods import AnomalyCLIP
from anomaly_clip.methods.prompt_files import PROMPTS_KEY, read_prompts, write_prompts

State = dict[str, Tensor]
Arrays = Callable[[str], Golden]


@pytest.fixture(scope="module")
def clip_config(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_config(tmp_path_factory.mktemp("clip") / "deep.json")


@pytest.fixture(scope="module")
def clip(clip_config: str) -> CLIPBackbone:
    torch.manual_seed(0)
    return CLIPBackbone(clip_config, "random")


@pytest.fixture(scope="module")
def written(clip: CLIPBackbone, tmp_path_factory: pytest.TempPathFactory) -> State:
    """Return the tensors of a file for ``clip``, with all of its layers."""
    torch.manual_seed(1)
    method = AnomalyCLIP(clip, prompt=DeepPromptsSettings(3, 3, 2))
    file = tmp_path_factory.mktemp("prompts") / "prompts.pth"
    write_prompts(method.prompts, clip, file, projections=True)
    state: State = torch.load(file, weights_only=True)[PROMPTS_KEY]
    return state


@pytest.mark.golden
@pytest.mark.parametrize(
    ("file", "projections"),
    [("checkpoint.pth", True), ("checkpoint_without_projections.pth", False)],
)
def test_golden_files_come_back_as_they_were(
    golden: Arrays, file: str, projections: bool, tmp_path: Path
) -> None:
    arrays = golden("anomalyclip")
    method = golden_method(arrays, golden_tower(arrays), prompts_file=str(arrays.folder / file))
    assert method.prompts.settings.n_ctx == arrays.meta["n_ctx"]
    assert method.prompts.settings.depth == arrays.meta["depth"]
    assert method.prompts.settings.deep_ctx == arrays.meta["t_n_ctx"]
    write_prompts(method.prompts, method.backbone, tmp_path / "a.pth", projections)
    before, after = (
        torch.load(path, weights_only=True) for path in (arrays.folder / file, tmp_path / "a.pth")
    )
    assert list(before) == list(after) == [PROMPTS_KEY]
    assert before[PROMPTS_KEY].keys() == after[PROMPTS_KEY].keys()  # the strict loaders take it
    for key, value in before[PROMPTS_KEY].items():
        again = after[PROMPTS_KEY][key]
        assert (again.dtype, again.shape) == (value.dtype, value.shape), key
        assert "projections" in key or torch.equal(again, value), key


FORMS: dict[str, Callable[[State], Any]] = {
    "the authors' key": lambda s: {PROMPTS_KEY: s},
    "a state dict": lambda s: s,
    "without projections": lambda s: {k: v for k, v in s.items() if "projections" not in k},
    "a state dict and an epoch": lambda s: {**s, "epoch": 3},
    "state_dict": lambda s: {"state_dict": s, "epoch": 3},
    "an unknown key": lambda s: {"my_prompts": s},
    "two levels": lambda s: {"model": {PROMPTS_KEY: s}},
    "optimiser": lambda s: {PROMPTS_KEY: s, "optimizer": {"state": {0: {"step": torch.ones(1)}}}},
    "DataParallel": lambda s: {PROMPTS_KEY: prefixed(s, "module.")},
    "torch.compile": lambda s: prefixed(s, "_orig_mod."),
    "Lightning": lambda s: {"state_dict": prefixed(s, "model.prompt_learner.")},
    "half precision": lambda s: {k: v.half() for k, v in s.items()},
    "bfloat16": lambda s: {PROMPTS_KEY: {k: v.bfloat16() for k, v in s.items()}},
    "float64": lambda s: {k: v.double() if v.is_floating_point() else v for k, v in s.items()},
    "int64 ids": lambda s: {k: v.long() if "tokenized" in k else v for k, v in s.items()},
    "flat shapes": lambda s: {k: v.flatten() if "token" in k else v for k, v in s.items()},
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_that_are_taken(
    clip: CLIPBackbone, written: State, form: str, tmp_path: Path
) -> None:
    torch.save(FORMS[form](written), tmp_path / "prompts")
    context, deep, record = read_prompts(str(tmp_path / "prompts"), clip)
    tolerance = {"half precision": 2e-3, "bfloat16": 2e-2}.get(form, 0)
    expected = torch.cat([written["ctx_pos"][0], written["ctx_neg"][0]])
    torch.testing.assert_close(context, expected, atol=tolerance, rtol=0)
    assert len(deep) == 2
    for number, vectors in enumerate(deep):
        expected = written[f"compound_prompts_text.{number}"]
        torch.testing.assert_close(vectors, expected, atol=tolerance, rtol=0)
    digest = hashlib.sha256((tmp_path / "prompts").read_bytes()).hexdigest()
    assert record == {"file": str(tmp_path / "prompts"), "sha256": digest}


def test_safetensors_and_folders_are_taken(
    clip: CLIPBackbone, written: State, tmp_path: Path
) -> None:
    save_file(prefixed(written, "prompt_learner."), tmp_path / "a.safetensors")
    for place in (tmp_path / "a.safetensors", tmp_path):
        method = AnomalyCLIP(clip, prompts_file=str(place))
        assert torch.equal(method.prompts.deep[1], written["compound_prompts_text.1"])
        assert torch.equal(method.prompts.shallow.context[1], written["ctx_neg"][0, 0])
        assert method.external_weights is not None
        assert method.external_weights["file"] == str(tmp_path / "a.safetensors")
        assert not method.must_be_fitted


def test_what_is_not_used_is_named(
    clip: CLIPBackbone, written: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scale = {"logit_scale": torch.ones(1)}
    for content, line in (
        ({PROMPTS_KEY: written, "model": scale}, "prompt_learner is used, model not"),
        (
            {**prefixed(written, "prompt_learner."), **scale},
            "tensors outside the prompts are not used: logit_scale",
        ),
    ):
        torch.save(content, tmp_path / "a.pth")
        read_prompts(str(tmp_path / "a.pth"), clip)
        assert capsys.readouterr().err.strip().endswith(f"a.pth: {line}")


def test_prompts_without_deep_ones_are_taken(clip: CLIPBackbone, tmp_path: Path) -> None:
    method = AnomalyCLIP(clip, prompt=DeepPromptsSettings(2, 1, 1))
    write_prompts(method.prompts, clip, tmp_path / "a.pth")
    again = AnomalyCLIP(clip, prompts_file=str(tmp_path / "a.pth"))
    assert len(again.prompts.deep) == 0
    assert torch.equal(again.text(), method.text())


def test_prompts_cast_by_a_fit_in_half_precision_are_written_in_float32(
    clip: CLIPBackbone, tmp_path: Path
) -> None:
    method = AnomalyCLIP(clip)
    method.prompts.bfloat16()  # as Lightning does with the precision bf16-true
    write_prompts(method.prompts, clip, tmp_path / "a.pth")
    state = torch.load(tmp_path / "a.pth", weights_only=True)[PROMPTS_KEY]
    assert {v.dtype for v in state.values()} == {torch.float32, torch.int32}
    again = read_prompts(str(tmp_path / "a.pth"), clip)
    assert torch.equal(again.context, method.prompts.shallow.context.float())


def without(state: State, key: str) -> State:
    return {name: value for name, value in state.items() if name != key}


def changed(state: State, key: str, change: Callable[[Tensor], Tensor]) -> State:
    return {**state, key: change(state[key])}


REFUSED: dict[str, tuple[Callable[[State], Any], str]] = {
    "without a prompt": (lambda s: without(s, "ctx_neg"), "ctx_neg is missing from ctx_pos, "),
    "without ids": (
        lambda s: without(s, "tokenized_prompts_pos"),
        "but tokenized_prompts_pos is missing from ctx_pos",
    ),
    "a gap": (
        lambda s: without(s, "compound_prompts_text.0"),
        r"compound_prompts_text\.0 is missing from",
    ),
    "another tensor": (lambda s: {**s, "visual.v": s["ctx_pos"]}, "it also contains visual.v"),
    "integers": (
        lambda s: changed(s, "ctx_pos", lambda v: v.to(torch.int8)),
        r"its tensors are quantised \(ctx_pos is torch.int8\); give weights in float32",
    ),
    "8 bits": (
        lambda s: {k: v.to(torch.float8_e4m3fn) for k, v in s.items()},
        r"quantised \(ctx_pos is torch.float8_e4m3fn\)",
    ),
    "NaN": (
        lambda s: changed(s, "compound_prompts_text.1", lambda v: v * float("nan")),
        r"contain NaN or infinite values \(compound_prompts_text.1",
    ),
    "sparse ids": (
        lambda s: changed(s, "tokenized_prompts_pos", lambda v: v.to_sparse()),
        "tokenized_prompts_pos has no plain values",
    ),
    "three axes": (
        lambda s: changed(s, "ctx_pos", lambda v: v[0]),
        r"ctx_pos and ctx_neg have the shapes \(1, 3, 8\) and \(1, 1, 3, 8\)",
    ),
    "no vectors": (
        lambda s: {**s, **{f"ctx_{c}": s[f"ctx_{c}"][:, :, :0] for c in ("pos", "neg")}},
        "ctx_pos has the shape .*, no vectors",
    ),
    "too many deep vectors": (
        lambda s: changed(s, "compound_prompts_text.0", lambda v: v.repeat(2, 1)),
        r"compound_prompts_text.0 has the shape \(4, 8\), with ctx_pos \(1, 1, 3, 8\)",
    ),
    "two pairs": (
        lambda s: {**prefixed(s, "student."), **prefixed(s, "teacher.")},
        "2 pairs of prompts, 'student.' and 'teacher.'; save one of them under prompt_learner",
    ),
    "linear layers": (
        lambda s: {"linear_layers": {"fc.0.weight": s["ctx_pos"][0, 0], "fc.0.bias": s["ctx_pos"]}},
        "it contains the linear layers of SDPPlus or APRILGAN .*; give it as model.linear_layers",
    ),
    "a ResNet": (lambda _: {"conv1.weight": torch.zeros(1)}, "ctx_pos is missing from conv1"),
    "no tensors": (lambda _: {"epoch": 1}, "no weights: a dictionary with the keys epoch"),
}  # fmt: skip


@pytest.mark.parametrize("form", REFUSED)
def test_forms_that_are_refused(
    clip: CLIPBackbone, written: State, form: str, tmp_path: Path
) -> None:
    content, message = REFUSED[form]
    torch.save(content(written), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=message) as error:
        read_prompts(str(tmp_path / "a.pth"), clip)
    assert str(error.value).startswith(
        f"model.prompts_file {tmp_path / 'a.pth'}: expected a dictionary prompt_learner"
    )


OTHERS: dict[str, tuple[Callable[[State], State], str]] = {
    "other embeddings": (
        lambda s: changed(s, "token_suffix_neg", lambda v: v + 0.01),
        r"were trained on another CLIP than .*deep.json with weights random \(token_suffix_neg",
    ),
    "another number of them": (
        lambda s: changed(s, "token_prefix_pos", lambda v: v.repeat(1, 1, 2, 1)),
        r"were trained on another CLIP than .* \(token_prefix_pos differs",
    ),
    "other words": (
        lambda s: changed(s, "tokenized_prompts_neg", lambda v: v.roll(1)),
        "tokenized_prompts_neg are not the tokens of 3 vectors and 'damaged object.' in",
    ),
    "fewer ids": (
        lambda s: changed(s, "tokenized_prompts_pos", lambda v: v[..., :-1]),
        "tokenized_prompts_pos are not the tokens",
    ),
    "another width": (
        lambda s: {k: v[..., :6] if "token" not in k else v for k, v in s.items()},
        "its vectors have 6 channels, but the text tower of .* has 8; use the CLIP",
    ),
    "more blocks": (
        lambda s: {**s, "compound_prompts_text.2": s["compound_prompts_text.1"]},
        "its vectors are for 4 blocks, but the text tower of .* has 3; use the CLIP",
    ),
    "more vectors": (
        lambda s: {**s, **{f"ctx_{c}": s[f"ctx_{c}"].repeat(1, 1, 25, 1) for c in ("pos", "neg")}},
        "it has 75 vectors for each prompt, but the text tower of .* has room for 72; use the CLIP",
    ),
}


@pytest.mark.parametrize("form", OTHERS)
def test_prompts_of_another_clip_are_refused(
    clip: CLIPBackbone, written: State, form: str, tmp_path: Path
) -> None:
    content, message = OTHERS[form]
    torch.save({PROMPTS_KEY: content(written)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=message) as error:
        read_prompts(str(tmp_path / "a.pth"), clip)
    assert str(error.value).startswith(f"model.prompts_file {tmp_path / 'a.pth'}: ")


def test_the_seed_of_random_weights_is_part_of_the_clip(
    clip_config: str, written: State, tmp_path: Path
) -> None:
    torch.save({PROMPTS_KEY: written}, tmp_path / "a.pth")
    torch.manual_seed(1)
    with pytest.raises(ValueError, match="trained on another CLIP"):
        AnomalyCLIP(CLIPBackbone(clip_config, "random"), prompts_file=str(tmp_path / "a.pth"))


@pytest.mark.parametrize(
    ("option", "value", "file_value"), [("n_ctx", 5, 3), ("depth", 2, 3), ("deep_ctx", 1, 2)]
)
def test_sizes_other_than_those_of_the_file_are_refused(
    clip: CLIPBackbone, written: State, option: str, value: int, file_value: int, tmp_path: Path
) -> None:
    torch.save({PROMPTS_KEY: written}, tmp_path / "a.pth")
    file = str(tmp_path / "a.pth")
    given: dict[str, Any] = {option: value}
    message = f"model.prompt.{option} is {value}, but the prompts of .* have {file_value}: leave"
    with pytest.raises(ValueError, match=message):
        AnomalyCLIP(clip, prompt=replace(DeepPromptsSettings(), **given), prompts_file=file)
    sizes = DeepPromptsSettings(3, 3, 2)
    assert AnomalyCLIP(clip, prompt=sizes, prompts_file=file).prompts.settings == sizes


@pytest.mark.slow
def test_mistakes_at_the_command_line_are_one_line(
    written: State,
    clip_config: str,
    mvtec_root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.save(without(written, "ctx_neg"), tmp_path / "a.pth")
    (tmp_path / "text.pth").write_text("no prompts")
    (tmp_path / "empty").mkdir()
    words = command(mvtec_root, mvtec_root, clip_config, tmp_path / "runs", "test")
    for name, message in (
        ("none.pth", "none.pth: there is no such file; give an existing weights file; give a file"),
        ("a.pth", "but ctx_neg is missing from ctx_pos"),
        ("text.pth", "it is a text file"),
        ("empty", "is a folder with no weights file"),
    ):
        assert main([*words, "--model.prompts_file", str(tmp_path / name)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    assert not (tmp_path / "runs").exists()
