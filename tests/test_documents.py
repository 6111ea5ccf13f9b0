from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from anomaly_clip.cli import main
from anomaly_clip.documents import MAX_DEPTH, DocumentError, check_yaml_limits, load_json, load_yaml

BOMB = "\n".join(
    ["a: &a [x, x, x, x, x, x, x, x, x]"]
    + [f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in pairwise("abcdefghi")]
)
MERGED = "a: &a {k: 1}\n" + "\n".join(
    f"{b}: &{b}\n  <<: [{', '.join([f'*{a}'] * 9)}]" for a, b in pairwise("abcdefghi")
)
CASES = {
    BOMB: "aliases repeat more than 100000 values",
    MERGED: "aliases repeat more than 100000 values",
    "a: &a [1, *a]": "the anchor a refers to itself",
    "a: &a {b: {c: *a}}": "the anchor a refers to itself",
    "[" * 200 + "]" * 200: f"nested more than {MAX_DEPTH} levels",
    "- " * 200 + "a": f"nested more than {MAX_DEPTH} levels",
    "{a: " * 20_000 + "b" + "}" * 20_000: f"nested more than {MAX_DEPTH} levels",
    "\n".join(" " * n + "a:" for n in range(200)): f"nested more than {MAX_DEPTH} levels",
}


@pytest.mark.parametrize("text", CASES, ids=[case[:12] for case in CASES])
def test_documents_that_expand_too_far_are_refused(text: str) -> None:
    for function in (check_yaml_limits, load_yaml):
        with pytest.raises(DocumentError, match=CASES[text]):
            function(text)


def test_ordinary_documents_are_loaded() -> None:
    text = "a: &a [1, 2]\nb: *a\nc: {<<: {d: 1}}\ne: [" + ", ".join(["*a"] * 1000) + "]"
    assert load_yaml(text) == yaml.safe_load(text)
    long = "[" + ", ".join(["x"] * 200_000) + "]"  # what is written out has no limit
    check_yaml_limits(long)
    check_yaml_limits("a: [pl\udce4nk]")  # a name of a file that is not UTF-8
    check_yaml_limits("a: [")  # not valid: its loader reports it
    with pytest.raises(yaml.YAMLError):
        load_yaml("a: [")


@pytest.mark.parametrize(
    "text",
    ["!!timestamp x", "!!int x", "!!float x", "!!bool x", "!!timestamp 2020-99-99", "1" * 5000],
)
def test_values_that_do_not_fit_their_tags_are_refused(text: str) -> None:
    with pytest.raises(yaml.YAMLError):
        load_yaml(f"a: {text}")


def test_json_within_limits() -> None:
    assert load_json('{"a": [1, -2, 1.5, null]}') == {"a": [1, -2, 1.5, None]}
    assert load_json("9" * 300) == int("9" * 300)
    assert load_json("[" * MAX_DEPTH + "1" + "]" * MAX_DEPTH)
    for text, message in (
        ("9" * 400, "more than 300 digits"),
        ('{"a": [-' + "9" * 400 + "]}", "more than 300 digits"),
        ("-" + "9" * 5000, "more than 300 digits"),
        ("[" * 150 + "]" * 150, "levels deep"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "levels deep"),
    ):
        with pytest.raises(DocumentError, match=message):
            load_json(text)
    with pytest.raises(json.JSONDecodeError):
        load_json("{")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "aliases repeat more than 100000 values"),
        ("a: &a [*a]", "the anchor a refers to itself"),
        ("model: " + "[" * 500 + "]" * 500, "levels deep"),
        ("seed_everything: !!timestamp x", "a value does not fit its tag"),
        ("seed_everything: " + "9" * 400, "more than 300 digits"),
    ],
)
def test_configurations_end_in_one_sentence(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    assert main(["test", "--config", str(file)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error
    assert len(error) < 600


@pytest.mark.parametrize("text", ["9" * 400, "a: [1, {b: " + "9" * 400 + "}]"])
def test_yaml_integers_are_limited(text: str) -> None:
    with pytest.raises(DocumentError, match="more than 300 digits"):
        load_yaml(text)


@pytest.mark.parametrize("in_file", [False, True])
@pytest.mark.parametrize("name", ["stages", "sigma"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (BOMB, "aliases repeat more than 100000 values"),
        ("[" * 3000 + "]" * 3000, "levels deep"),
        ("9" * 400, "more than 300 digits"),
    ],
    ids=["bomb", "deep", "long"],
)
def test_a_value_is_limited(
    in_file: bool,
    name: str,
    value: str,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["test", "--model", "SDP", f"--model.{name}={value}"]
    if in_file:  # as a text, which the parser of the option loads again
        section = {"class_path": "SDP", "init_args": {name: value}}
        (tmp_path / "a.yaml").write_text(yaml.safe_dump({"model": section}))
        words = ["test", "--config", str(tmp_path / "a.yaml")]
    assert main(words) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error
    assert len(error) < 600
