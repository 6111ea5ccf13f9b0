"""The check of the project's English reports the words that it lists, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from prose import check, check_python, check_text, main

HERE = Path("module.py")


def messages(source: str) -> list[str]:
    return [f"{finding.line}: {finding.message}" for finding in check_python(HERE, source)]


@pytest.mark.parametrize("word", ["What", "Which", "How", "Whose", "Whether", "Where", "When"])
def test_a_headless_first_line_is_reported(word: str) -> None:
    reported = messages(f'class A:\n    x: int\n    """{word} it is."""\n')
    assert reported == [f"3: begin with a noun or an imperative: '{word} it is.'"]


def test_other_beginnings_pass() -> None:
    assert messages('"""Howard\'s method, and what it is for."""\n') == []
    assert messages('text = "What is the size?"\n') == []  # a message is no docstring


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ('"""A title.\n\nThe figures of a run.\n"""\n', 3),
        ("x = 1\n# two pictures\n", 2),
        ('raise ValueError("it stands beside the file")\n', 1),
        ('f"{x} of the sentences"\n', 1),
        ('f"{number} pictures"\n', 1),
    ],
)
def test_words_to_avoid_are_reported_with_their_line(source: str, line: int) -> None:
    (message,) = messages(source)
    assert message.startswith(f"{line}: ")


def test_keys_names_and_figures_of_papers_pass() -> None:
    assert messages('x = {"in two sentences": 1}["all figures"]\n') == []
    assert messages('data["figures"] = pictures("beside")  # Figure 5 of the paper\n') == []


@pytest.mark.parametrize("source", ["found = 1\n", "def f(one): ...\n", "for known in x: ...\n"])
def test_names_that_say_nothing_are_reported(source: str) -> None:
    (message,) = messages(source)
    assert "does not say what it holds" in message


def test_code_in_texts_passes() -> None:
    assert messages('"""Return ``pictures``.\n\n>>> figures()\n"""\n') == []
    (finding,) = check_text(Path("a.md"), "Use `figures` here.\nIt goes on.\n")
    assert finding.line == 2


def test_markers_of_a_merge_are_reported_in_code_blocks_too() -> None:
    page = "```\n<<<<<<< HEAD\nrun a\n=======\nrun b\n>>>>>>> main\n```\n\n========\n"
    findings = check_text(Path("a.md"), page)
    assert [finding.line for finding in findings] == [2, 4, 6]
    assert all("resolve it" in finding.message for finding in findings)


def test_exit_code_and_paths(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prose.ROOT", tmp_path)
    page = tmp_path / "a.md"
    page.write_text("one picture")
    other = tmp_path / "a.json"
    other.write_text("one picture")
    monkeypatch.setattr("prose.tracked", lambda: [page, other])
    assert [finding.path for finding in check([page, other])] == [page]
    assert main([]) == 1
    assert capsys.readouterr().out.startswith("a.md:1: 'picture'")
    page.write_text("an image")
    assert main([str(tmp_path)]) == 0


@pytest.mark.slow
def test_the_project_passes() -> None:
    assert main([]) == 0
