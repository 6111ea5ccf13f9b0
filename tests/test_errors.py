"""Exceptions as one sentence for the user."""

from __future__ import annotations

import pytest
from jsonargparse import ArgumentError
from lightning.fabric.utilities.exceptions import MisconfigurationException

from anomaly_clip.errors import (
    UserError,
    check_choice,
    explain,
    reason,
    suggest,
    user_errors,
)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a\n  wrong value"),
        OSError("a wrong value"),
        MisconfigurationException("a wrong value"),
        ModuleNotFoundError("a wrong value"),
    ],
)
def test_mistakes_of_a_user_become_one_sentence(error: Exception) -> None:
    def fail() -> None:
        with user_errors():
            raise error

    with pytest.raises(UserError, match=r"^a wrong value$"):
        fail()


def test_our_own_bugs_stay_what_they_are() -> None:
    def fail() -> None:
        with user_errors():
            raise KeyError("a bug")

    with pytest.raises(KeyError):
        fail()


def test_the_options_are_read_only_for_a_suggestion() -> None:
    def options() -> list[str]:
        asked.append(1)
        return ["--count"]

    asked: list[int] = []
    with user_errors(options):
        pass
    assert not asked

    def fail() -> None:
        with user_errors(options):
            raise ArgumentError(None, "unrecognized arguments: --cuont=3")

    with pytest.raises(UserError, match=r"^unknown option --cuont: did you mean --count\?$"):
        fail()


def test_the_error_that_this_package_raised_is_explained() -> None:
    def wrapped() -> None:
        try:
            check_choice("--rule", "squre", ["square", "short"])
        except ValueError as error:
            raise RuntimeError("in a library") from error

    with pytest.raises(RuntimeError) as caught:
        wrapped()
    assert explain(caught.value) == "--rule must be one of square, short, got squre"


def test_of_a_process_that_loads_data_the_last_line_counts() -> None:
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
