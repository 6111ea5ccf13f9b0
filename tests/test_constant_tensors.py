from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from anomaly_clip.constant_tensors import cached_tensor, has_values


def counted(maxsize: int) -> tuple[list[int], object]:
    """Return a list that the calls are added to, and a cached function."""
    calls: list[int] = []

    @cached_tensor(maxsize=maxsize)
    def ramp(size: int) -> Tensor:
        """Return a ramp."""
        calls.append(size)
        return torch.arange(size)

    return calls, ramp


def test_a_tensor_is_computed_once_and_the_oldest_is_dropped() -> None:
    calls, ramp = counted(2)
    for size in (1, 2, 1, 3, 2):
        assert ramp(size).tolist() == list(range(size))  # type: ignore[operator]
    assert calls == [1, 2, 3, 2]
    assert ramp.__doc__ == "Return a ramp."


def test_cached_tensors_have_values_on_the_cpu() -> None:
    _, ramp = counted(8)
    with FakeTensorMode():
        assert not has_values(ramp(3))  # type: ignore[operator]
    with torch.device("meta"), torch.inference_mode():
        ramp(4)  # type: ignore[operator]
    for size in (3, 4):
        kept = ramp(size)  # type: ignore[operator]
        assert has_values(kept)
        assert kept.device.type == "cpu"
        assert not kept.is_inference()
        assert kept.tolist() == list(range(size))
