"""The mutants stored as patches apply to the current files, and the tests that they name exist.

``python tests/mutants/run.py`` checks that these tests kill the mutants, which takes minutes.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from mutation import Change, apply, find_tests, restored
from run import FOLDER, as_patch, read_mutant, read_mutants


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.patch")), ids=lambda path: path.stem)
def test_a_mutant_applies(path: Path) -> None:
    mutant = read_mutant(path)
    assert as_patch(mutant).partition("@@ ")[0] == path.read_text().partition("@@ ")[0]
    assert mutant.change.old != mutant.change.new
    assert len(find_tests(mutant.tests)) == len(mutant.tests)


def test_numbers_are_unique() -> None:
    numbers = [mutant.number for mutant in read_mutants()]
    assert len(set(numbers)) == len(numbers) >= 17


def test_a_change_replaces_whole_lines_that_occur_once(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\nx = 12\ny = 3\ny = 3\n")
    change = Change("a.py", "x = 1", "x = 2")
    with restored(tmp_path / "a.py"):
        assert apply(change, tmp_path)
        changed = (tmp_path / "a.py").read_text()
    assert changed == "x = 2\nx = 12\ny = 3\ny = 3\n"
    assert (tmp_path / "a.py").read_text() == "x = 1\nx = 12\ny = 3\ny = 3\n"
    assert not apply(Change("a.py", "x = 2", "x = 3"), tmp_path)  # no such line
    assert not apply(Change("a.py", "y = 3", "y = 4"), tmp_path)  # ambiguous
    assert not apply(Change("b.py", "y = 3", "y = 4"), tmp_path)
