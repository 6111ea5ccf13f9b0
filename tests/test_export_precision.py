from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from calibrations import PADIM, write_photographs
from numpy.typing import NDArray
from torch import nn

import anomaly_clip.exporting.precision as precision
from anomaly_clip.cli import main
from anomaly_clip.errors import UserError
from anomaly_clip.exporting.precision import check_precision, lower_program, lowered_backbone
from anomaly_clip.exporting.programs import OLDEST_TORCH
from anomaly_clip.runtime.detector import open_session

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("torch", minversion=OLDEST_TORCH)
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

SIDE, WIDTH = 16, 24


class Tower(nn.Module):
    """Two convolutions, and four matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.conv = nn.Conv2d(8, WIDTH, 3)
        self.norm = nn.BatchNorm2d(8)
        self.first, self.second, self.third = (nn.Linear(WIDTH, WIDTH) for _ in range(3))


class Backbone(SimpleNamespace):
    """A backbone that is cast as those of the package are."""

    def cast(self, dtype: torch.dtype) -> None:
        self.tower.to(dtype)


@pytest.fixture(scope="module")
def backbone() -> Any:
    torch.manual_seed(0)
    return Backbone(tower=Tower().eval())


@pytest.fixture
def file(backbone: Any, tmp_path: Path) -> Path:
    """Write a program of the tower, and a product with other weights after it."""
    tower = backbone.tower
    rng = np.random.default_rng(0)
    weights = {
        "method.backbone.stem.weight": tower.stem.weight,
        "method.backbone.conv.weight": tower.conv.weight,
        "method.backbone.first.weight": tower.first.weight,  # transposed by the program
        "val_1": tower.second.weight.T,  # has lost its name
        "method.backbone.third.weight": tower.third.weight,
        "third.bias": tower.third.bias,
    }
    arrays = {name: value.detach().numpy().copy() for name, value in weights.items()}
    arrays["method.head"] = rng.normal(size=(WIDTH, WIDTH)).astype(np.float32)
    arrays["flat"] = np.array([-1, WIDTH], np.int64)
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Div", ["floats", "scale"], ["small"], "div"),
        helper.make_node("Conv", ["small", "method.backbone.stem.weight"], ["a"], "stem"),
        helper.make_node("Relu", ["a"], ["b"], "relu"),
        helper.make_node("Conv", ["b", "method.backbone.conv.weight"], ["c"], "conv"),
        helper.make_node("GlobalAveragePool", ["c"], ["pooled"], "pool"),
        helper.make_node("Reshape", ["pooled", "flat"], ["rows"], "rows"),
        helper.make_node("Transpose", ["method.backbone.first.weight"], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["rows", "turned"], ["d"], "first"),
        helper.make_node("Softmax", ["d"], ["between"], "softmax"),
        helper.make_node("MatMul", ["between", "val_1"], ["e"], "second"),
        helper.make_node(
            "Gemm", ["e", "method.backbone.third.weight", "third.bias"], ["f"], "third", transB=1
        ),
        helper.make_node("MatMul", ["f", "method.head"], ["g"], "head"),
        helper.make_node("ReduceMax", ["g"], ["image_score"], "largest", axes=[1], keepdims=0),
    ]
    arrays["scale"] = np.array(255, np.float32)
    graph = helper.make_graph(
        nodes,
        "tower",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("image_score", TensorProto.FLOAT, ["batch"])],
        [numpy_helper.from_array(values, name) for name, values in arrays.items()],
    )
    opsets = [helper.make_opsetid("", 17)]
    path = tmp_path / "detector.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def images(count: int = 4) -> NDArray[np.uint8]:
    rng = np.random.default_rng(1)
    return rng.integers(0, 256, (count, 3, SIDE, SIDE), dtype=np.uint8)


def nodes_of(file: Path) -> dict[str, str]:
    return {node.name: node.op_type for node in onnx.load(file).graph.node}


def error(expected: NDArray[Any], actual: NDArray[Any]) -> float:
    return float(np.abs(expected - actual).max() / np.abs(expected).max())


def no_images() -> NDArray[np.uint8]:
    raise AssertionError("images are not needed")


def scores(file: Path, runtime: str = "onnxruntime", kind: str = "float32") -> NDArray[Any]:
    return np.asarray(open_session(file, runtime, 1, kind).run(images())["image_score"])


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("int8", "torch_export", "add --format onnx, or choose --precision bf16"),
        ("fp8", "onnx", "--precision"),
    ],
)
def test_precisions_that_do_not_exist(name: str, kind: str, message: str) -> None:
    with pytest.raises((ValueError, UserError), match=message):
        check_precision(name, kind)


@pytest.mark.parametrize("kind", ["onnx", "torch_export"])
def test_precisions_of_both_formats(kind: str) -> None:
    for name in ("float32", "bf16"):
        check_precision(name, kind)


def test_float32_leaves_a_program_as_it_is(file: Path, backbone: Any) -> None:
    before = file.read_bytes()
    assert lower_program(file, backbone, "float32", no_images) is None
    assert file.read_bytes() == before


def test_bf16_halves_the_weights_of_the_backbone_alone(file: Path, backbone: Any) -> None:
    expected = scores(file)
    text = lower_program(file, backbone, "bf16", no_images)
    assert text is not None
    assert text.startswith("5 tensors of its weights are stored in bfloat16")
    model = onnx.load(file)
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    stored = {name for name, kind in kinds.items() if kind == TensorProto.BFLOAT16}
    names = [f"method.backbone.{name}.weight_bf16" for name in ("stem", "conv", "first", "third")]
    assert stored == {*names, "val_1_bf16"}
    assert kinds["method.head"] == kinds["third.bias"] == TensorProto.FLOAT
    actual = scores(file)
    assert 0 < error(expected, actual) < 0.01
    # A second opinion: torch rounds the weights.
    [tensor] = [t for t in model.graph.initializer if t.name == "val_1_bf16"]
    bits = np.frombuffer(tensor.raw_data, np.int16).copy()
    rounded = backbone.tower.second.weight.T.bfloat16()
    assert torch.equal(torch.from_numpy(bits).view(torch.bfloat16).view(rounded.shape), rounded)


def test_openvino_computes_in_bf16_only_if_asked(file: Path, backbone: Any) -> None:
    openvino = pytest.importorskip("openvino")
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this processor has no products of bfloat16")
    expected = scores(file)
    assert error(expected, scores(file, "openvino")) < 1e-5  # not lowered unless asked for
    default = openvino.Core().compile_model(file, "CPU")([images()])[0]
    assert error(expected, default) > 1e-4  # its own choice, which this test guards against
    lower_program(file, backbone, "bf16", no_images)
    rounded = scores(file)
    assert error(rounded, scores(file, "openvino")) < 1e-5
    assert 1e-4 < error(rounded, scores(file, "openvino", "bf16")) < 0.02


def test_int8_quantises_products_of_the_backbone_alone(file: Path, backbone: Any) -> None:
    expected = scores(file)
    calls = []

    def ranges() -> NDArray[np.uint8]:
        calls.append(1)
        return images(6)

    text = lower_program(file, backbone, "int8", ranges)
    assert text == "3 matrix products and 1 convolution are computed in 8-bit integers"
    assert calls == [1]
    kinds = nodes_of(file)
    assert [name for name, kind in kinds.items() if kind == "MatMulNBits"] == [
        *("first", "second", "third")
    ]
    assert kinds["head"] == "MatMul"
    model = onnx.load(file)
    names = {tensor.name for tensor in model.graph.initializer}
    assert {"method.backbone.stem.weight", "method.head"} <= names
    assert not {"method.backbone.conv.weight", "method.backbone.first.weight", "val_1"} & names
    assert error(expected, scores(file)) < 0.05


def test_an_image_does_not_depend_on_its_batch_in_int8(file: Path, backbone: Any) -> None:
    lower_program(file, backbone, "int8", images)
    run = open_session(file, "onnxruntime", 1).run
    bright = images()
    bright[1:] //= 4  # with a range for the whole batch, image 0 would change
    together = run(bright)["image_score"][0]
    assert run(bright[:1])["image_score"][0] == pytest.approx(together, rel=1e-5)


@pytest.mark.parametrize("is_transposed", [False, True])
def test_blocks_hold_the_weights_to_half_a_step(is_transposed: bool) -> None:
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(200, 6)).astype(np.float32)  # (K, N)
    matrix[:130, 2] = 0
    model = helper.make_model(helper.make_graph([], "empty", [], []))
    stored = numpy_helper.from_array(matrix.T.copy() if is_transposed else matrix, "weight")
    [name, scales_name], attributes = precision._pack(model, stored, is_transposed)
    values = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    assert (attributes["K"], attributes["N"], attributes["block_size"]) == (200, 6, 128)
    scales = values[scales_name].reshape(6, 2, 1)
    restored = ((values[name].astype(np.float32) - 128) * scales).reshape(6, -1)[:, :200]
    assert (
        np.abs(restored - matrix.T)
        <= np.repeat(scales, 128, axis=1).reshape(6, -1)[:, :200] / 2 + 1e-7
    ).all()


@pytest.mark.parametrize("name", ["bf16", "int8"])
def test_a_program_without_the_backbone_is_refused(file: Path, name: str) -> None:
    other = Backbone(tower=nn.Linear(3, 3))
    model = onnx.load(file)
    for values in [node.input for node in model.graph.node]:
        for place, value in enumerate(values):
            values[place] = value.replace("method.backbone.", "")
    for tensor in model.graph.initializer:
        tensor.name = tensor.name.replace("method.backbone.", "")
    onnx.save(model, file)
    before = file.read_bytes()
    with pytest.raises(UserError, match="no product with the weights of a frozen backbone"):
        lower_program(file, other, name, no_images)  # type: ignore[arg-type]
    assert file.read_bytes() == before


def test_a_lowered_backbone_is_restored_to_the_bit(backbone: Any) -> None:
    before = {name: value.clone() for name, value in backbone.tower.state_dict().items()}
    with lowered_backbone(backbone, "bf16"):
        assert backbone.tower.first.weight.dtype == torch.bfloat16
        assert backbone.tower.norm.running_mean.dtype == torch.bfloat16
    with lowered_backbone(backbone, "float32"):
        assert backbone.tower.first.weight.dtype == torch.float32
    after = backbone.tower.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(after[name].dtype == value.dtype for name, value in before.items())


def test_int8_is_refused_for_torch_export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", "--config", "sdp", "--data.category", "plank"]
    words += ["--model.backbone.pretrained", "demo", "--folder", str(tmp_path / "out")]
    assert main([*words, "--format", "torch_export", "--precision", "int8"]) == 2
    assert "add --format onnx, or choose --precision bf16" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def run_of_padim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lowered")
    write_photographs(folder / "parts" / "good", 24, seed=0)
    write_photographs(folder / "parts" / "scratch", 4, seed=50)
    words = ["fit", *PADIM, f"--data.root={folder / 'parts'}", "--calibrate=true"]
    assert main([*words, "--calibration.alpha=[0.2]", f"--output.folder={folder / 'run'}"]) == 0
    return folder


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*has random weights.*")
@pytest.mark.parametrize(
    ("name", "kind"), [("bf16", "onnx"), ("int8", "onnx"), ("bf16", "torch_export")]
)
def test_export_in_lower_precision(
    run_of_padim: Path, name: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", str(run_of_padim / "run"), "--format", kind, "--precision", name]
    words += ["--folder", str(tmp_path / "out"), "--images", "3"]
    assert main([*words, "--data.root", str(run_of_padim / "parts")]) == 0
    screen = capsys.readouterr().err
    assert "labelled images of" in screen
    assert f"the precision of the frozen backbone is {name}" in screen
    record = json.loads((tmp_path / "out" / "detector.json").read_text())
    assert record["program"]["precision"] == name
    drift = record["parity"]["drift"]
    assert (drift["images"], drift["anomalous"]) == (28, 4)
    for measured in drift["programs"].values():
        change = measured["image_auroc"] - drift["torch"]["image_auroc"]
        assert measured["image_auroc_drift"] == change
        assert measured["flip_rate"][0] <= measured["flips"] / 28 <= measured["flip_rate"][1]
    bounds = record["parity"]["bounds"]
    for difference in record["parity"]["programs"].values():
        assert 0 < difference["anomaly_map"] < bounds["anomaly_map"]
    if name == "int8":
        assert "24 normal images of" in screen


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*has random weights.*")
def test_without_labelled_images_the_drift_is_not_measured(
    run_of_padim: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", str(run_of_padim / "run"), "--precision", "int8", "--images", "2"]
    assert main([*words, "--folder", str(tmp_path / "out")]) == 0
    screen = capsys.readouterr().err
    assert "AUROC drift not measured: give --data.root, a folder with labelled images" in screen
    assert "32 generated images" in screen
    record = json.loads((tmp_path / "out" / "detector.json").read_text())
    assert record["parity"]["drift"] is None
