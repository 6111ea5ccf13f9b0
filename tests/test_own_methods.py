"""Messages about mistakes in methods outside the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from own_methods import Bodiless, Faulty, Incomplete, Undeclared
from toy import Toy

from anomaly_clip.cli import main
from anomaly_clip.testing import Check, check_method


def checks(kind: Any, **options: Any) -> dict[str, Check]:
    return {check.name: check for check in check_method(kind, **options)}


@pytest.mark.parametrize(
    "given",
    ["my_module.MyMethod", None, int, lambda: 1],
    ids=["a name", "None", "another class", "a function"],
)
def test_only_methods_are_checked(given: Any) -> None:
    with pytest.raises(ValueError, match="expected a class derived from AnomalyMethod"):
        check_method(given)


def test_an_abstract_method_is_refused() -> None:
    with pytest.raises(ValueError, match="Incomplete does not implement score"):
        check_method(Incomplete)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"arguments": [1]}, "arguments: expected a dictionary"),
        ({"data": "MVTecAD"}, "data: expected a dictionary"),
        ({"trainer": 1}, "trainer: expected a dictionary"),
        ({"expected_failures": ["scores_are_finite"]}, "expected_failures: expected a dictionary"),
        ({"expected_failures": {"scores_are_finite": " "}}, "needs a reason"),
        ({"half_precision_bound": -1}, "half_precision_bound"),
        ({"slow": "yes"}, "slow: expected True, False or None, got 'yes'"),
    ],
    ids=str,
)
def test_odd_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_method(Toy, **options)


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (Bodiless, {}, "TypeError: Bodiless has no backbone: assign one"),
        (Undeclared, {}, "Undeclared does not declare must_be_fitted"),
        (Faulty, {}, "TypeError: unsupported operand"),
        (Faulty, {"number": -1}, "cannot build the method: number is negative"),
        (Faulty, {"size": 1}, "cannot build the method: model.size: Faulty has no such option"),
    ],
)
def test_the_reason_why_a_method_cannot_be_built(
    kind: Any, options: dict[str, Any], words: str
) -> None:
    outcome = checks(kind, arguments=options)["needs_are_declared"].run()
    assert outcome.status == "failed"
    assert words in outcome.message
    assert "Union" not in outcome.message


def test_a_failure_that_several_checks_share_happens_once() -> None:
    listed = checks(Faulty)
    subject = listed["fit_ends_well"].subject
    first = listed["needs_are_declared"].run().error
    built, subject._number = subject._number, 100
    assert listed["hyper_parameters_are_plain"].run().error is first
    assert (built, subject._number) == (1, 100)


def test_the_command_line_tells_what_a_class_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["test", "--model", "own_methods.Incomplete", "--data", "Demo"]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.endswith("own_methods.Incomplete does not implement score: add it to the class")


def test_a_fault_in_a_constructor_keeps_its_traceback(tmp_path: Path, capsys: Any) -> None:
    words = ["test", "--model", "own_methods.Faulty", "--data", "Demo"]
    words += ["--output.root", str(tmp_path)]
    with pytest.raises(TypeError, match="unsupported operand") as raised:
        main(words)
    assert Path(raised.traceback[-1].path).name == "own_methods.py"
    assert main([*words, "--model.number", "-1"]) == 2
    assert capsys.readouterr().err.strip().endswith("anomaly_clip: number is negative")
