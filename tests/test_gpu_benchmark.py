"""Logic of the GPU benchmark, tested on the CPU at tiny sizes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from anomaly_clip.backbones.clip import CLIPBackbone
from anomaly_clip.methods import SDP, SDPPlus, WinCLIP

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
B_16 = {"tokens": 226, "width": 896, "blocks": 12, "dim": 640, "patch": 16}
L_14 = {"width": 1024, "blocks": 24, "dim": 768, "patch": 14}


@pytest.fixture(scope="module")
def gpu() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield import_module("gpu")


@pytest.fixture(scope="module")
def flops() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield import_module("flops")


@pytest.fixture
def lab(gpu: ModuleType) -> Any:
    return gpu.Lab(gpu.TINY, torch.device("cpu"), ends=time.monotonic() + 600)


@pytest.mark.parametrize(
    ("size", "function", "options", "gigaflop"),
    [
        (B_16, "plain_flop", {}, 54.8),
        (B_16, "sdp_flop", {"whole_last_block": True}, 62.3),
        (B_16, "winclip_flop", {"shared": False}, 673),
        ({"tokens": 577, **L_14}, "plain_flop", {}, 382),
        ({"tokens": 1370, **L_14}, "plain_flop", {}, 1014),
        ({"tokens": 1370, **L_14}, "sdp_flop", {"whole_last_block": True}, 1276),
    ],
)
def test_operations_match_a_count_by_hand(
    flops: ModuleType,
    size: dict[str, int],
    function: str,
    options: dict[str, bool],
    gigaflop: float,
) -> None:
    flop = getattr(flops, function)(flops.Tower(**size), **options)
    assert flop / 1e9 == pytest.approx(gigaflop, rel=0.01)


def counted(task: Callable[[], object]) -> int:
    """Return the operations that torch counts; fused attention is off, as torch cannot count it."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as mode:
            task()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return int(mode.get_total_flops())


def test_operations_match_the_count_of_torch(flops: ModuleType, tiny_clip: CLIPBackbone) -> None:
    tower = flops.tower_of(tiny_clip)
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    sdp, plus, winclip = SDP(tiny_clip), SDPPlus(tiny_clip), WinCLIP(tiny_clip)
    pixels = tiny_clip.prepare(images)
    assert counted(lambda: tiny_clip.visual(pixels)) == flops.plain_flop(tower)
    assert counted(lambda: sdp.encode(images)) == flops.sdp_flop(tower)
    layers = counted(lambda: pass_layers(plus, plus.tokens(images, scoring=True)))
    assert layers == flops.sdp_plus_flop(tower)
    windows = counted(lambda: winclip.embed(images, with_patches=False))
    assert windows == flops.winclip_flop(tower)


def pass_layers(plus: SDPPlus, tokens: dict[str, Tensor]) -> None:
    for layer, stage in zip(plus.fc, plus.stages, strict=True):
        layer(tokens[f"raw.{stage}"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # as the script does
def test_all_sections_run_and_the_file_holds_the_whole_result(
    gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "gpu.json"
    gpu.main(["--tiny", "--out", str(out)])
    written = json.loads(out.read_text())
    assert written == json.loads(capsys.readouterr().out)
    assert [file.name for file in tmp_path.glob("gpu*")] == ["gpu.json"]
    assert written["errors"] == {}
    assert written["left_out"] == []
    assert written["complete"]
    assert written["header"]["command"] == "python benchmarks/gpu.py --tiny"
    assert set(written["header"]) == set(import_module("common").HEADER)
    rows = written["zero_shot_32"]
    keys = {(row["precision"], row["batch"], row["method"]) for row in rows}
    assert len(keys) == len(rows) == 3 * 2 * 4
    for row in rows:
        each = row["seconds_per_image"]
        assert row["images_per_second"] == pytest.approx(1 / each, rel=0.01, abs=0.01)
        assert row["tflop_per_second"] == pytest.approx(
            row["gflop_per_image"] / 1e3 / each, rel=0.5, abs=1e-3
        )
        assert (row["ratio_to_plain"] is None) == (row["method"] == "plain")
    assert all(row["difference_fp32"] == 0 for row in written["equality"])
    assert {row["method"] for row in written["equality"]} == {
        "SDP", "SDPPlus", "WinCLIP", "PaDiM", "PatchCore",
    }  # fmt: skip
    assert all("error" not in row for row in written["training"])
    assert all(row["largest_difference"] <= 1e-12 for row in written["streaming_metrics"])
    drift = written["precision_drift"]
    assert drift["drift"]["pixel_auroc"] == pytest.approx(
        drift["bf16"]["pixel_auroc"] - drift["fp32"]["pixel_auroc"]
    )
    bounds = written["bounds"]
    assert bounds["maps of PaDiM off the CPU's, share of their range"]["met"] is True
    assert bounds["plain encoder over the bf16 peak, 240 px"]["met"] is None


def test_running_out_of_memory_gives_a_row_with_an_error(gpu: ModuleType, lab: Any) -> None:
    def fails() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 TiB.\nMore.")

    row = import_module("gpu_zero_shot").measured_row(lab, fails, "fp32", 8, 1000, None)
    assert row["error"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 TiB."
    assert "seconds_per_image" not in row
    results = {"zero_shot_240": [{"method": "sdp", "model": "x", "side": 1, **row}]}
    bounds = gpu.bounds_of(results, gpu.FULL)
    assert all(bound["met"] is None for bound in bounds.values())


def test_a_row_holds_the_median_time_per_image(gpu: ModuleType, lab: Any) -> None:
    lab.seconds = lambda task: [0.4, 0.2, 9.0]
    lab.peak = {"fp32": 4.0}
    row = import_module("gpu_zero_shot").measured_row(lab, lambda: None, "fp32", 2, int(1e11), 0.1)
    assert row["seconds_per_image"] == 0.2
    assert row["tflop_per_second"] == 0.5
    assert row["share_of_peak"] == 0.125
    assert row["ratio_to_plain"] == 2.0
    assert row["timings"] == 3


def test_bounds_use_large_batches_in_bf16(gpu: ModuleType) -> None:
    def row(method: str, precision: str, batch: int, **values: float) -> dict[str, Any]:
        where = {"method": method, "model": gpu.B_16, "side": 240, "precision": precision}
        return {**where, "batch": batch, "share_of_peak": 0.5, "ratio_to_plain": 1.1, **values}

    rows = [
        row("plain", "bf16", 8, share_of_peak=0.1, seconds_per_image=1.0),
        row("plain", "bf16", 32, share_of_peak=0.45, seconds_per_image=1.0),
        row("plain", "bf16", 128, share_of_peak=0.41, seconds_per_image=3.0),
        row("plain", "fp32", 128, share_of_peak=0.2, seconds_per_image=2.0),
        row("sdp", "bf16", 32, ratio_to_plain=1.3, seconds_per_image=1.0),
        row("sdp", "bf16", 1, ratio_to_plain=2.0, seconds_per_image=1.0),
    ]
    bounds = gpu.bounds_of({"zero_shot_240": rows}, gpu.FULL)
    assert bounds["plain encoder over the bf16 peak, 240 px"]["value"] == 0.41
    assert bounds["plain encoder over the bf16 peak, 240 px"]["met"] is True
    assert bounds["SDP over the plain encoder, 240 px"]["value"] == 1.3
    assert bounds["SDP over the plain encoder, 240 px"]["met"] is False
    assert bounds["bf16 over fp32 seconds, the worst row"]["value"] == 1.5


def test_the_deadline_skips_rows_and_sections_by_name(gpu: ModuleType, tmp_path: Path) -> None:
    ticks = iter(range(1000))
    lab = gpu.Lab(gpu.TINY, torch.device("cpu"), ends=4, clock=lambda: next(ticks))
    content = gpu.run(lab, tmp_path / "gpu.json")
    rows = content["zero_shot_32"]  # two sections read the clock once each, then two rows
    assert [row["method"] for row in rows] == ["plain", "sdp"]
    assert "sdp_plus, demo, 32 px, bf16, batch 1" in content["left_out"]
    assert content["left_out"][-3:] == ["streaming_metrics", "coreset", "training"]
    assert not content["complete"]
    assert json.loads((tmp_path / "gpu.json").read_text()) == content


def test_a_failing_section_is_reported_and_the_others_run(
    gpu: ModuleType, lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(lab: Any) -> None:
        raise ValueError("no such thing")

    monkeypatch.setattr(gpu, "peak", fails)
    content = gpu.run(lab, tmp_path / "gpu.json", ["peak", "coreset"])
    assert content["errors"] == {"peak": "ValueError: no such thing"}
    assert content["coreset"]["same_share_float64"] == 1.0
    assert not content["complete"]


def test_tf32_is_allowed_only_inside_the_context(gpu: ModuleType) -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    with gpu.matrix_precision("tf32"):
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cudnn.allow_tf32
    with gpu.matrix_precision("fp32"):
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cudnn.allow_tf32
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_without_a_device_nothing_is_measured(
    gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu.main(["--out", str(tmp_path / "gpu.json")]) == 0
    assert capsys.readouterr().out == (
        "gpu: no CUDA device is available, so nothing was measured.\n"
    )
    assert list(tmp_path.iterdir()) == []
