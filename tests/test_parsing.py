"""Parsers of the verbs that run no experiment."""

from __future__ import annotations

import pytest

from anomaly_clip.commands.parsing import data_parser, parse_words, verb_parser
from anomaly_clip.data import Demo
from anomaly_clip.errors import UserError


def test_a_data_set_by_its_short_name() -> None:
    parser = data_parser("verb", "Do something.")
    words = ["verb", "--data", "Demo", "--data.num_test", "2"]
    with parse_words(parser, words) as config:
        data = parser.instantiate(config).data
    assert isinstance(data, Demo)
    assert parser.prog == "anomaly_clip verb"


def test_mistakes_are_explained_with_a_suggestion() -> None:
    parser = verb_parser("verb", "Do something.")
    parser.add_argument("--count", type=int)

    def parse(*words: str) -> None:
        with parse_words(parser, ["verb", *words]):
            pass

    with pytest.raises(UserError, match=r"unknown option --cuont: did you mean --count\?"):
        parse("--cuont=3")
    with pytest.raises(UserError, match="count: expected int, got x"):
        parse("--count=x")


def test_value_errors_of_a_verb_become_user_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    # As if the package raised it: errors of other code stay what they are.
    monkeypatch.setattr("anomaly_clip.errors._is_users_file", lambda file: False)

    def run() -> None:
        with parse_words(verb_parser("verb", "Do something."), ["verb"]):
            raise ValueError("--file a.txt: expected a name ending in .png")

    with pytest.raises(UserError, match=r"^--file a.txt: expected"):
        run()
