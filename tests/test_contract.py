"""The contract: every method of the package passes every check, or the reason why not is known.

The outcomes are those of the table in ``docs/contract.md``.
"""

from __future__ import annotations

from functools import cache

import pytest
from contract_subjects import PAGE, bounds, cases, checks, promise

from anomaly_clip.testing import Check
from anomaly_clip.testing.contract import MARKS


@cache
def cells() -> dict[tuple[str, str], str]:
    """Return the cells of the table by method and check."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in PAGE.read_text(encoding="utf-8").splitlines()
        if line.startswith("|")
    ]
    start = rows.index(["check", *cases()])
    _, *names = rows[start]
    return {
        (name, row[0].strip("`")): cell
        for row in rows[start + 2 :]
        for name, cell in zip(names, row[1:], strict=True)
    }


def params(slow: bool) -> list[object]:
    return [
        pytest.param(name, check, id=f"{name}-{check}")
        for name, listed in checks(slow).items()
        for check in listed
    ]


def check_outcome(name: str, check: Check) -> None:
    outcome = check.run()
    if outcome.status in ("failed", "unexpected pass"):
        raise outcome.error or AssertionError(outcome.message)
    assert cells()[name, check.name] == MARKS[outcome.status], "renew the table of docs/contract.md"


@pytest.mark.parametrize(("name", "check"), params(slow=False))
def test_contract(name: str, check: Check) -> None:
    check_outcome(name, check)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "check"), params(slow=True))
def test_contract_with_processes(name: str, check: Check) -> None:
    check_outcome(name, check)


def test_the_page_lists_each_check_with_its_promise() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for listed in (*checks(slow=False).values(), *checks(slow=True).values()):
        for check in listed:
            assert promise(check) in text
    assert bounds() in text
    assert len({name for _, name in cells()}) >= 50


def test_reasons_of_exceptions_are_on_the_page() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name, case in cases().items():
        for check, why in case.expected_failures.items():
            assert f"- {name}, `{check}`: {why}" in text
