"""Checks of options, and their messages."""

from __future__ import annotations

import errno
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import ArgumentError
from lightning.fabric.utilities.exceptions import MisconfigurationException

import anomaly_clip
from anomaly_clip.errors import (
    UserError,
    check_above,
    check_at_least,
    check_between,
    check_choice,
    explain,
    reason,
    suggest,
    user_errors,
)
from anomaly_clip.synthesis.synthesizer import SynthesisSettings


@pytest.mark.parametrize("value", [0, 0.0, 1e-9, 3, math.inf])
def test_at_least_takes_the_bound_and_more(value: float) -> None:
    check_at_least("model.sigma", value, 0)


@pytest.mark.parametrize(
    ("value", "got"), [(-1, "-1"), (-1e-9, "-1e-09"), (math.nan, "nan"), (-math.inf, "-inf")]
)
def test_at_least_names_option_bound_and_value(value: float, got: str) -> None:
    with pytest.raises(ValueError, match=rf"^model\.sigma must be 0 or more, got {got}$"):
        check_at_least("model.sigma", value, 0)


def test_above_leaves_the_bound_out() -> None:
    check_above("model.lr", 1e-12, 0)
    for value in (0, -1.0, math.nan):
        with pytest.raises(ValueError, match=rf"^model\.lr must be above 0, got {value}$"):
            check_above("model.lr", value, 0)


@pytest.mark.parametrize(
    ("open_low", "open_high", "allowed", "interval"),
    [
        (False, False, {0, 0.5, 1}, r"\[0, 1\]"),
        (True, False, {0.5, 1}, r"\(0, 1\]"),
        (False, True, {0, 0.5}, r"\[0, 1\)"),
        (True, True, {0.5}, r"\(0, 1\)"),
    ],
)
def test_between_with_open_and_closed_ends(
    open_low: bool, open_high: bool, allowed: set[float], interval: str
) -> None:
    for value in (-0.1, 0, 0.5, 1, 1.1, math.nan):
        if value in allowed:
            check_between("x", value, 0, 1, open_low=open_low, open_high=open_high)
            continue
        with pytest.raises(ValueError, match=rf"^x must be in {interval}, got {value}$"):
            check_between("x", value, 0, 1, open_low=open_low, open_high=open_high)


def test_choice_lists_the_alternatives() -> None:
    check_choice("model.dense", "vv", ("block", "vv"))
    with pytest.raises(ValueError, match=r"^model\.dense must be one of block, vv, got vvv$"):
        check_choice("model.dense", "vvv", ("block", "vv"))


def test_suggestions_are_near_or_few() -> None:
    assert suggest("sigme", ["sigma", "steps"]) == "did you mean sigma?"
    assert suggest("zzz", ["b", "a"]) == "known: a, b"
    assert suggest("zzz", [f"word{number}" for number in range(30)]) == ""


def test_a_message_becomes_one_line() -> None:
    assert explain(ValueError("two\n  lines")) == "two lines"
    assert reason(ValueError("two\n  lines")) == "two"
    assert reason(ValueError()) == "ValueError"


def test_checks_do_not_load_the_command_line() -> None:
    code = "import sys, anomaly_clip.errors; print('lightning' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300
    )
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a\n  wrong value"),
        OSError("a wrong value"),
        MisconfigurationException("a wrong value"),
        ModuleNotFoundError("a wrong value"),
    ],
)
def test_mistakes_of_a_user_become_one_line(error: Exception) -> None:
    def fail() -> None:
        with user_errors():
            raise error

    with pytest.raises(UserError, match=r"^a wrong value$"):
        fail()


def test_bugs_do_not_become_user_errors() -> None:
    def fail() -> None:
        with user_errors():
            raise KeyError("a bug")

    with pytest.raises(KeyError):
        fail()


def test_options_are_only_listed_if_a_suggestion_is_needed() -> None:
    def options() -> list[str]:
        calls.append(1)
        return ["--count"]

    calls: list[int] = []
    with user_errors(options):
        pass
    assert not calls

    def fail() -> None:
        with user_errors(options):
            raise ArgumentError(None, "unrecognized arguments: --cuont=3")

    with pytest.raises(UserError, match=r"^unknown option --cuont: did you mean --count\?$"):
        fail()


def test_the_error_that_this_package_raised_is_explained() -> None:
    def wrapped() -> None:
        try:
            check_choice("--rule", "triangle", ["square", "short"])
        except ValueError as error:
            raise RuntimeError("in a library") from error

    with pytest.raises(RuntimeError) as caught:
        wrapped()
    assert explain(caught.value) == "--rule must be one of square, short, got triangle"


def test_an_error_in_a_data_loader_worker_is_explained_by_its_last_line() -> None:
    text = (
        "Caught ValueError in worker.\nOriginal Traceback:\n  File x\nValueError: no image: a.png"
    )
    assert explain(RuntimeError(text)) == "no image: a.png"


@pytest.mark.parametrize(
    ("word", "choices", "hint"),
    [
        ("Demoo", ["Demo", "VisA"], "did you mean Demo?"),
        ("xyz", ["b", "a"], "known: a, b"),
        ("xyz", [f"option {n}" for n in range(21)], ""),
        ("xyz", [], ""),
    ],
)
def test_suggestions(word: str, choices: list[str], hint: str) -> None:
    assert suggest(word, choices) == hint


def test_the_first_line_is_the_reason() -> None:
    assert reason(ValueError("first\nsecond")) == "first"
    assert reason(KeyboardInterrupt()) == "KeyboardInterrupt"


def test_an_error_raised_from_none_replaces_its_cause() -> None:
    with pytest.raises(ValueError, match="grid") as caught:
        SynthesisSettings("erasing", options={"grid": 0})
    assert explain(caught.value) == "data.synthesis: grid must be 1 or more, got 0"


def test_of_a_longer_reason_the_first_sentence_is_shown() -> None:
    assert reason(ValueError("no weights. To load them, trust the file.")) == "no weights"
    assert reason(ValueError("a file.pt is too large\nsecond line")) == "a file.pt is too large"
    assert reason(ValueError()) == "ValueError"


def test_names_that_no_disk_takes(tmp_path: Path) -> None:
    for name, message in (
        ("x" * 300, "a name of 300 characters is too long"),
        ("a\0b", "null char"),
    ):
        with pytest.raises(UserError, match=message), user_errors():
            (tmp_path / name).write_text("")


OWN_CODE = """
class Mine:
    def __init__(self, tau=1):
        if tau < 0:
            raise ValueError("tau is negative")
        if tau > 1:
            int("x")

    def score(self, kind):
        if kind == "unpack":
            a, b = [1, 2, 3]
        if kind == "open":
            open("no/such/file")
        if kind == "ours":
            check_at_least("model.tau", -1, 0)
        if kind == "full":
            raise OSError(errno.ENOSPC, "No space left on device")
        raise ValueError("mine")
"""


@pytest.fixture(scope="module")
def own_class(tmp_path_factory: pytest.TempPathFactory) -> type:
    file = tmp_path_factory.mktemp("own") / "own.py"
    file.write_text(OWN_CODE)
    names: dict[str, Any] = {"errno": errno, "check_at_least": check_at_least}
    exec(compile(OWN_CODE, file, "exec"), names)
    kind: type = names["Mine"]
    return kind


@pytest.mark.parametrize(
    ("kind", "error"), [("unpack", ValueError), ("open", FileNotFoundError), ("any", ValueError)]
)
def test_errors_of_a_users_own_code_keep_their_traceback(
    kind: str, error: type[Exception], own_class: type[Any]
) -> None:
    with pytest.raises(error), user_errors():
        own_class().score(kind)


def raised_in(file: str) -> None:
    with user_errors():
        exec(compile("int('x')", file, "exec"))


@pytest.mark.parametrize(
    "folder", ["/home/me/.local/lib/python3.11/site-packages", "/usr/lib/python3/dist-packages"]
)
def test_libraries_outside_this_environment_are_no_code_of_the_user(folder: str) -> None:
    with pytest.raises(UserError, match="invalid literal"):
        raised_in(f"{folder}/jsonargparse/_core.py")


def test_a_folder_next_to_the_package_with_a_longer_name_is_the_users() -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        raised_in(f"{Path(anomaly_clip.__file__).parent}_plugins/mine.py")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda kind: kind().score("ours"), "model.tau must be 0 or more"),  # of this package
        (lambda kind: kind().score("full"), "free space there"),
        (lambda kind: kind(tau=-1), "tau is negative"),  # a check of an option
    ],
)
def test_mistakes_that_own_code_finds_become_one_line(
    call: Callable[[type[Any]], object], message: str, own_class: type[Any]
) -> None:
    with pytest.raises(UserError, match=message), user_errors():
        call(own_class)


def test_a_wrong_conversion_in_a_constructor_is_no_check(own_class: type[Any]) -> None:
    with pytest.raises(ValueError, match="invalid literal"), user_errors():
        own_class(tau=2)


def test_an_error_in_a_worker_that_reads_own_data_keeps_its_text() -> None:
    text = 'Caught ValueError in worker.\nOriginal Traceback:\n  File "{}", line 1\nValueError: x'
    with pytest.raises(ValueError, match="Original Traceback"), user_errors():
        raise ValueError(text.format("/home/user/my_data.py"))
    with pytest.raises(UserError, match=r"^x$"), user_errors():
        raise ValueError(text.format(Path(anomaly_clip.__file__).parent / "images.py"))
