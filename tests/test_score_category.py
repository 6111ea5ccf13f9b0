"""Scores of one category as graphs: every method in its settings, constants, methods of others."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import own_methods
import pytest
import torch
from helpers import SMALL_CLIP
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close
from traced_methods import NAME, VARIANTS, build, images_of, small_cnn

from anomaly_clip import maps as maps_module
from anomaly_clip.backbones.clip import CLIPBackbone
from anomaly_clip.errors import UserError
from anomaly_clip.exporting.graph import DetectorGraph, trace
from anomaly_clip.exporting.parity import BOUNDS, check_difference, compare
from anomaly_clip.exporting.programs import check_packages, write_program
from anomaly_clip.maps import gaussian_blur
from anomaly_clip.methods import patchcore, winclip
from anomaly_clip.methods.regad_network import inverted
from anomaly_clip.runtime.detector import open_session
from anomaly_clip.testing import Outcome, check_method

QUICK = ("PaDiM one layer",)
"""Variants that are traced in all test runs. The contract traces each method in one setting."""
SIZES = (1, 3, 8)

Build = Callable[[str], Any]


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("clip") / "clip.json"
    file.write_text(json.dumps(SMALL_CLIP))
    return str(file)


@pytest.fixture(scope="module")
def make(clip_file: str) -> Build:
    """Return a function that builds a variant by its name, always with the same weights."""

    def clip() -> CLIPBackbone:
        return CLIPBackbone(clip_file, "random")

    def make(name: str) -> Any:
        return build(VARIANTS[name], clip, small_cnn)

    return make


def scores_of(method: Any, images: Tensor) -> dict[str, Tensor]:
    """Return the scores that are outputs of a graph."""
    with torch.no_grad():
        scores = method.score(images, [NAME] * len(images))
    return {name: scores[name] for name in BOUNDS if name in scores}


def arrays(scores: dict[str, Tensor]) -> dict[str, Any]:
    return {name: value.numpy() for name, value in scores.items()}


def traced(method: Any) -> tuple[DetectorGraph, Any]:
    """Return the graph of a method that has scored an image, and its program."""
    graph = DetectorGraph(method, NAME)
    with torch.no_grad():
        graph(images_of(method, 1))
    return graph, trace(graph)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in VARIANTS],
)
def test_a_graph_of_any_batch_size_scores_as_the_method_does(make: Build, name: str) -> None:
    method = make(name)
    images = images_of(method, 8)
    expected = scores_of(method, images)
    graph, program = traced(method)
    used = {spec.target for spec in program.graph_signature.input_specs}
    assert program.state_dict.keys() <= used, "such as the weights of a text tower"
    module = program.module()

    def run(batch: Any) -> dict[str, Any]:
        with torch.no_grad():
            return arrays(dict(zip(graph.names, module(torch.from_numpy(batch)), strict=True)))

    check_difference(compare(arrays(expected), run, images.numpy(), SIZES), "the graph")
    again = scores_of(method, images)
    assert all(torch.equal(again[key], value) for key, value in expected.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_onnx_runtime_scores_as_the_method_does(make: Build, name: str, tmp_path: Path) -> None:
    try:
        check_packages()
    except UserError as error:
        pytest.skip(str(error))
    method = make(name)
    images = images_of(method, 8)
    _, program = traced(method)
    file = write_program(program, "onnx", tmp_path, None)
    run = open_session(file, "onnxruntime", 1).run
    difference = compare(arrays(scores_of(method, images)), run, images.numpy(), SIZES)
    check_difference(difference, name)


def test_scores_of_a_category_are_those_of_score(make: Build) -> None:
    for name in (
        "WinCLIP references",
        "APRIL-GAN references",
        "RegAD",
        "CLIP-ADA none",
        "AnomalyCLIP Crane",
    ):
        method = make(name)
        images = images_of(method, 3)
        with torch.no_grad():
            alike = method.score_category(images, NAME)
        for key, value in scores_of(method, images).items():
            assert torch.equal(alike[key], value), (name, key)


@pytest.mark.parametrize(("name", "message"), [("RegAD", "bird"), ("WinCLIP references", "bird")])
def test_a_category_without_references_is_refused(make: Build, name: str, message: str) -> None:
    method = make(name)
    with pytest.raises((ValueError, KeyError), match=message):
        method.score_category(images_of(method, 1), "bird")


# -- constants -------------------------------------------------------------------------------------


class Blurred(nn.Module):
    """Maps, blurred."""

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.sigma = sigma

    def forward(self, maps: Tensor) -> Tensor:
        return gaussian_blur(maps, self.sigma)


class Windows(nn.Module):
    """Scores of windows as a map."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, scores: Tensor) -> Tensor:
        return winclip.harmonic_map(scores, winclip.window_patches(self.side, 2))


def strict(module: nn.Module, example: Tensor) -> None:
    torch.export.export(module, (example,), strict=True)


def not_strict(module: nn.Module, example: Tensor) -> None:
    torch.export.export(module, (example,), strict=False)


def compiled(module: nn.Module, example: Tensor) -> None:
    torch.compile(module, backend="eager")(example)


def faked(module: nn.Module, example: Tensor) -> None:
    with FakeTensorMode() as mode:
        module(mode.from_tensor(example))


def by_default_on_meta(module: nn.Module, example: Tensor) -> None:
    with torch.device("meta"):
        module(example)


def inferred(module: nn.Module, example: Tensor) -> None:
    with torch.inference_mode():
        module(example)


TRACERS = (strict, not_strict, compiled, faked, by_default_on_meta, inferred)


@pytest.mark.parametrize("cold", [True, False], ids=["cold", "warm"])
@pytest.mark.parametrize("tracer", TRACERS, ids=lambda tracer: tracer.__name__)
def test_tracing_leaves_no_tensor_of_a_graph_behind(
    tracer: Callable[[nn.Module, Tensor], None], cold: bool
) -> None:
    number = TRACERS.index(tracer) * 2 + cold
    sigma, side = 1.25 + number / 64, 7 + number  # not used anywhere else
    maps, scores = torch.rand(2, side, side), torch.rand(2, (side - 1) ** 2) + 0.1
    matrix = vars(maps_module._blur_matrix)["__wrapped__"](
        side, sigma, int(4 * sigma + 0.5), "edge", torch.device("cpu"), torch.float64
    )
    expected = matrix.float() @ maps @ matrix.float().T
    for module, example in ((Blurred(sigma), maps), (Windows(side), scores)):
        before = None if cold else module(example)
        tracer(module, example)
        after = module(example)
        assert type(after) is Tensor
        assert after.isfinite().all()
        if isinstance(module, Blurred):
            assert_close(after, expected)
            assert gaussian_blur(example.requires_grad_(), sigma).requires_grad
        if before is not None:
            assert torch.equal(before, after)


@pytest.mark.parametrize(
    "name",
    [
        "SDP cosines",
        pytest.param("WinCLIP scale 1", marks=pytest.mark.slow),
        pytest.param("CLIP-ADA none", marks=pytest.mark.slow),
        pytest.param("AnomalyCLIP layers", marks=pytest.mark.slow),
    ],
)
def test_prompts_encoded_in_a_graph_are_not_kept(make: Build, name: str) -> None:
    method, other = make(name), make(name)
    images = images_of(method, 2)
    expected = scores_of(other, images)
    for number in (True, False):
        method._text = None if name.startswith(("CLIP-ADA", "AnomalyCLIP")) else {}
        graph = DetectorGraph(method, NAME)
        with suppress(
            Exception
        ):  # prompts are tokenized outside graphs: it may fail, as torch does
            torch.export.export(graph, (images,), strict=number)
        for key, value in scores_of(method, images).items():
            assert torch.equal(value, expected[key]), (key, number)


def test_a_graph_has_the_prompt_of_the_last_call(make: Build) -> None:
    method = make("CLIP-ADA none")
    images = images_of(method, 2)
    before = scores_of(method, images)["image_score"]
    with torch.no_grad():
        method.prompt.context.mul_(-3)
    graph, program = traced(method)
    scores = program.module()(images)[graph.names.index("image_score")]
    assert_close(scores, scores_of(method, images)["image_score"])
    assert not torch.allclose(scores, before)


def test_operations_for_graphs_agree_with_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = torch.randn(25, 6)
    matrix = torch.eye(2) + 0.4 * torch.randn(50, 2, 2)
    distances, inverses = patchcore._distances(bank[:4], bank), inverted(matrix)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert_close(patchcore._distances(bank[:4], bank), distances)
    assert_close(inverted(matrix), inverses, rtol=1e-4, atol=1e-5)
    assert_close(matrix @ inverted(matrix), torch.eye(2).expand(50, 2, 2), rtol=0, atol=1e-4)


def test_harmonic_maps_for_graphs_know_the_number_of_patches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for side, scale in ((2, 1), (2, 2), (5, 2), (5, 3), (15, 4)):
        patches = winclip.window_patches(side, scale)
        scores = torch.rand(2, len(patches)) + 0.1
        expected = winclip.harmonic_map(scores, patches)
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            assert torch.equal(winclip.harmonic_map(scores, patches), expected)
        assert expected.shape == (2, side * side)


# -- methods of others -----------------------------------------------------------------------------


def of_clip(kind: type, clip_file: str) -> Any:
    torch.manual_seed(0)
    return kind(CLIPBackbone(clip_file, "random")).eval()


@pytest.mark.parametrize("kind", [own_methods.Brightness, own_methods.Overridden])
def test_a_method_of_somebody_else_is_traced(kind: type, clip_file: str) -> None:
    method = of_clip(kind, clip_file)
    images = images_of(method, 5)
    graph, program = traced(method)
    scores = dict(zip(graph.names, program.module()(images), strict=True))
    for key, value in scores_of(method, images).items():
        assert_close(scores[key], value)


@pytest.mark.parametrize("kind", [own_methods.Branching, own_methods.OneByOne])
def test_a_method_that_cannot_be_traced_is_refused_in_a_sentence(
    kind: type, clip_file: str
) -> None:
    with pytest.raises(UserError, match=f"{kind.__name__} cannot be traced .*score_category"):
        traced(of_clip(kind, clip_file))


def test_decorators_of_the_author_stay(clip_file: str) -> None:
    method = of_clip(own_methods.Decorated, clip_file)
    with torch.enable_grad():
        graph = DetectorGraph(method, NAME)
        graph(images_of(method, 1))
        program = trace(graph)
    assert program.module()(images_of(method, 4))[0].shape == (4,)


def outcome(kind: type, clip_file: str) -> Outcome:
    """Return the outcome of the contract's check of an export."""
    backbone = {"name": clip_file, "pretrained": "random"}
    checks = check_method(kind, arguments={"backbone": backbone})
    return next(check for check in checks if check.name == "detector_is_exported").run()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "status", "message"),
    [
        (own_methods.Brightness, "passed", ""),
        (own_methods.Overridden, "passed", ""),
        (own_methods.Branching, "failed", "cannot be traced"),
        (own_methods.OneByOne, "failed", "cannot be traced"),
        (own_methods.Counting, "failed", "changes image_score by"),
        (own_methods.Remote, "not applicable", "it asks a server for the scores"),
    ],
)
def test_the_contract_tells_what_can_be_exported(
    kind: type, status: str, message: str, clip_file: str
) -> None:
    result = outcome(kind, clip_file)
    assert result.status == status, result.message
    assert message in result.message
