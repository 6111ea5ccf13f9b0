"""The contract: every method of the package passes every check, or the reason why not is known."""

from __future__ import annotations

import pytest
from contract_subjects import checks

from anomaly_clip.testing import Check


def params(slow: bool) -> list[object]:
    return [
        pytest.param(check, id=f"{name}-{check}")
        for name, each in checks(slow).items()
        for check in each
    ]


@pytest.mark.parametrize("check", params(slow=False))
def test_contract(check: Check) -> None:
    check()


@pytest.mark.slow
@pytest.mark.parametrize("check", params(slow=True))
def test_contract_with_processes(check: Check) -> None:
    check()
