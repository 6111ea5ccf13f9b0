from __future__ import annotations

import pytest
import torch

from anomaly_clip.methods.evaluated import frozen_dtype


@pytest.mark.parametrize(
    ("precision", "device", "expected"),
    [
        ("32-true", "cuda", None),
        ("bf16-true", "cuda", None),
        ("bf16-mixed", "cuda", torch.bfloat16),
        ("16-mixed", "cuda", torch.float16),
    ],
)
def test_frozen_dtype(precision: str, device: str, expected: torch.dtype | None) -> None:
    assert frozen_dtype(precision, torch.device(device)) == expected


@pytest.mark.parametrize("supported", [True, False])
def test_frozen_dtype_on_a_cpu(supported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    if supported:
        assert frozen_dtype("16-mixed", torch.device("cpu")) == torch.bfloat16
    else:
        with pytest.warns(UserWarning, match="stays in float32"):
            assert frozen_dtype("bf16-mixed", torch.device("cpu")) is None
