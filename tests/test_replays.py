"""Recordings of frozen backbones; no CUDA device is needed, as the recording is replaced."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from anomaly_clip.backbones import replays as module
from anomaly_clip.backbones.clip import CLIPBackbone
from anomaly_clip.backbones.cnn import CNNBackbone
from anomaly_clip.backbones.replays import MOST_KEPT, MOST_PIXELS, Replays, may_replay
from anomaly_clip.backbones.surgery import encode_dual_path
from anomaly_clip.methods import WinCLIP


class Recorder:
    """A stand-in for CUDA graphs that counts recordings and replays, and computes anew."""

    def __init__(self) -> None:
        self.recordings = self.replays = 0

    def __call__(self, function: Callable[[Tensor], Any], images: Tensor, pool: Any) -> Any:
        self.recordings += 1

        def run(given: Tensor) -> Any:
            assert given.shape == images.shape
            self.replays += 1
            return function(given)

        return run, "pool"


@pytest.fixture(autouse=True)
def _any_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Record on the CPU, too."""
    monkeypatch.setattr(module, "may_replay", lambda images, passes: not torch.is_grad_enabled())
    with torch.no_grad():
        yield


def double(images: Tensor) -> Tensor:
    return 2 * images


def test_recorded_at_the_second_call() -> None:
    recorder = Recorder()
    replays = Replays(recorder)
    for number in range(4):
        images = torch.full((2, 3, 4, 4), float(number))
        assert torch.equal(replays(double, "double", images), 2 * images)
        assert (recorder.recordings, recorder.replays) == (int(number > 0), number)
    with torch.enable_grad():
        replays(double, "double", images)
    assert recorder.replays == 3


def test_a_recording_is_of_one_function_shape_and_setting_of_torch() -> None:
    recorder = Recorder()
    replays = Replays(recorder)
    images = torch.rand(1, 3, 4, 4)
    for key, given in (("double", images), ("other", images), ("double", images[..., :2])):
        for _ in range(2):
            replays(double, key, given)
    assert recorder.recordings == 3
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        replays(double, "double", images)
    finally:
        torch.set_float32_matmul_precision(before)
    assert recorder.recordings == recorder.replays == 3  # once under the other setting: not yet
    replays.clear()
    replays(double, "double", images)
    assert recorder.replays == 3


def test_recordings_can_be_turned_off() -> None:
    recorder = Recorder()
    replays = Replays(recorder)
    replays.enabled = False
    images = torch.rand(1, 3, 4, 4)
    for _ in range(3):
        assert torch.equal(replays(double, "double", images), 2 * images)
    assert recorder.recordings == 0


def test_a_recording_is_of_the_tensors_that_it_reads() -> None:
    recorder = Recorder()
    replays = Replays(recorder)
    images, first, second = torch.rand(1, 3, 4, 4), torch.ones(1), torch.zeros(1)
    for given in (first, first, second, second):
        replays(double, "double", images, 1.0, [given])
    assert recorder.recordings == 2


def test_addresses_are_not_read_where_nothing_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "may_replay", lambda images, passes: False)
    images = torch.rand(1, 3, 4, 4)
    fake = FakeTensorMode().from_tensor(images)  # has no address, as in a graph that is traced
    assert torch.equal(Replays(Recorder())(double, "double", images, 1.0, [fake]), 2 * images)


def test_few_recordings_are_kept() -> None:
    recorder = Recorder()
    replays = Replays(recorder)
    images = torch.rand(1, 3, 4, 4)
    for key in [*range(MOST_KEPT + 1)] * 2:  # each is dropped before it comes again
        replays(double, key, images)
    assert recorder.recordings == 0
    for _ in range(3):
        replays(double, MOST_KEPT, images)
    assert (recorder.recordings, recorder.replays) == (1, 3)


def test_a_function_that_cannot_be_recorded_runs_as_it_is(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(function: Any, images: Tensor, pool: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore lines")

    replays = Replays(refuse)
    images = torch.rand(1, 3, 4, 4)
    for _ in range(4):
        assert torch.equal(replays(double, "double", images), 2 * images)
    assert not replays.enabled
    message = capsys.readouterr().err
    assert message.count("cannot be recorded as a CUDA graph") == 1
    assert "more lines" not in message


def test_threads_replay_one_after_the_other() -> None:
    entered: list[int] = []
    others: list[threading.Thread] = []

    def record(function: Any, images: Tensor, pool: Any) -> Any:
        def run(given: Tensor) -> Tensor:
            entered.append(threading.get_ident())
            if not others:
                others.append(threading.Thread(target=call))
                others[0].start()
                others[0].join(timeout=0.05)
                assert others[0].is_alive(), "another thread ran at the same time"
                assert len(entered) == 1
            return double(given)

        return run, None

    replays = Replays(record)
    images = torch.rand(1, 3, 4, 4)

    def call() -> None:
        with torch.no_grad():
            replays(double, "double", images)

    for _ in range(2):
        call()
    others[0].join()
    assert len(entered) == 2


def test_copies_have_no_recordings() -> None:
    recorder = Recorder()
    replays = Replays(recorder)
    images = torch.rand(1, 3, 4, 4)
    for _ in range(2):
        replays(double, "double", images)
    copied = copy.deepcopy(replays)
    copied(double, "double", images)
    assert recorder.replays == 1
    loaded = pickle.loads(pickle.dumps(replays))
    assert torch.equal(loaded(double, "double", images), 2 * images)
    assert recorder.replays == 1


def test_nothing_is_recorded_on_a_cpu_or_of_many_images() -> None:
    assert not may_replay(torch.zeros(1, 3, 4, 4))
    meta = torch.zeros(1, 3, 4, 4, device="meta")
    assert not may_replay(meta)
    assert MOST_PIXELS >= 32 * 240**2


def test_backbones_drop_recordings_when_weights_change() -> None:
    recorder = Recorder()
    backbone = CNNBackbone("squeezenet1_1", "random", ["features.1"])
    backbone.replays = Replays(recorder)
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    results = [backbone(images) for _ in range(3)]
    assert (recorder.recordings, recorder.replays) == (1, 2)
    for name, value in results[0].items():
        assert torch.equal(value, results[2][name])
    backbone.to(torch.float64)
    backbone(images)
    assert recorder.replays == 2
    backbone.cast(torch.float32)
    backbone(images)
    assert recorder.replays == 2


def test_loaded_weights_drop_recordings() -> None:
    recorder = Recorder()
    backbone = CNNBackbone("squeezenet1_1", "random", ["features.1"])
    backbone.replays = Replays(recorder)
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    for _ in range(2):
        backbone(images)
    assert recorder.replays == 1
    backbone.load_state_dict(backbone.state_dict(), assign=True)
    backbone(images)
    assert recorder.replays == 1


def test_precisions_set_by_backend_are_read() -> None:
    """torch refuses its older getters once precisions are set by backend."""
    code = (
        "import torch\n"
        "from anomaly_clip.backbones.replays import _state_of_torch\n"
        "before = _state_of_torch()\n"
        "if hasattr(torch.backends.cuda.matmul, 'fp32_precision'):\n"
        "    torch.backends.cuda.matmul.fp32_precision = 'tf32'\n"
        "    torch.backends.cudnn.conv.fp32_precision = 'ieee'\n"
        "else:\n"
        "    torch.set_float32_matmul_precision('high')\n"
        "assert _state_of_torch() != before\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_backbone_with_recordings_is_freed_at_once() -> None:
    backbone = CNNBackbone("squeezenet1_1", "random", ["features.1"])
    backbone.replays = Replays(lambda function, images, pool: (lambda given: {}, None))
    images = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    for _ in range(3):
        backbone(images)
    left = weakref.ref(backbone.replays)
    del backbone
    assert left() is None


def test_settings_of_a_path_are_in_its_key(tiny_clip: CLIPBackbone) -> None:
    recorder = Recorder()
    tiny_clip.replays = Replays(recorder)
    side = tiny_clip.image_size
    images = torch.randint(0, 256, (1, 3, side, side), dtype=torch.uint8)
    for _ in range(3):
        official = encode_dual_path(tiny_clip, images)
        clean = encode_dual_path(tiny_clip, images, stage_tokens="clean")
    assert recorder.recordings == 2
    assert not torch.equal(official[0].raw, clean[0].raw)
    winclip = WinCLIP(tiny_clip)
    embeddings = [winclip.embed(images) for _ in range(2)]
    assert recorder.recordings == 3
    assert torch.equal(embeddings[0].image, embeddings[1].image)
    winclip.embed(images, with_patches=False)
    assert recorder.recordings == 3
