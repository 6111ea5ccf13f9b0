"""Values, types and docstrings, read from source files; compared with what Python makes of them."""

import ast
from pathlib import Path

import pytest

from anomaly_clip.commands.source_code import (
    UNKNOWN,
    definition,
    entries,
    module_file,
    type_text,
    value_of,
)

FILE = Path("nowhere.py")


def expression(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


@pytest.mark.parametrize(
    "text", ["None", "True", "-1", "1 / 6", "2**16", '"a b"', "[0.3, [1, 2]]", "3 - 1 + 2 * 4"]
)
def test_values_are_those_of_python(text: str) -> None:
    assert value_of(FILE, expression(text)) == eval(text)


@pytest.mark.parametrize("text", ["print()", "unknown", "a.b", "[unknown]", "-unknown", "'a' + 1"])
def test_other_values_are_unknown(text: str) -> None:
    assert value_of(FILE, expression(text)) is UNKNOWN


def test_names_are_followed_through_imports(tmp_path: Path) -> None:
    (tmp_path / "first.py").write_text("from second import SIZE as WIDTH\nA, B = WIDTH, 2\n")
    (tmp_path / "second.py").write_text("SIZE = 7\nimport torch_is_not_imported\n")
    assert value_of(tmp_path / "first.py", expression("(A, B)")) == [7, 2]


def test_imports_in_a_circle_end(tmp_path: Path) -> None:
    (tmp_path / "first.py").write_text("from second import SIZE\n")
    (tmp_path / "second.py").write_text("from first import SIZE\n")
    assert definition(tmp_path / "first.py", "SIZE") is None
    (tmp_path / "third.py").write_text("A = B\nB = A\n")
    assert value_of(tmp_path / "third.py", expression("A")) is UNKNOWN


def test_a_settings_class_is_a_mapping_of_its_arguments(tmp_path: Path) -> None:
    file = tmp_path / "settings.py"
    file.write_text("class S:\n    a: int = 1\n    b: float = 0.5\n")
    assert value_of(file, expression("S(3, b=1.5)")) == {"a": 3, "b": 1.5}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("int | None", "int"),
        ("Optional[Union[int, str]]", "int | str"),
        ("Literal['edge', 'inner'] | None", "{edge, inner}"),
        ("list[str] | Kind", "list[str] | {a, b}"),
        ("'Kind | float'", "{a, b} | float"),
    ],
)
def test_types(text: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "kinds.py").write_text("Kind = Literal['a', 'b']\n")
    assert type_text(tmp_path / "kinds.py", expression(text)) == expected


def test_entries_with_several_paragraphs() -> None:
    doc = "Title.\n\nArgs:\n    a (int): One.\n\n      More.\n\n    b: Two.\n\nReturns:\n    c: no."
    assert entries(doc) == {"a": "One. More.", "b": "Two."}
    assert entries("No arguments.") == {}


def test_files_of_modules(tmp_path: Path) -> None:
    (tmp_path / "my_module.py").write_text("")
    (tmp_path / "json.py").write_text("")
    assert module_file("my_module") is None
    assert module_file("my_module", str(tmp_path)) == tmp_path / "my_module.py"
    library = module_file("json", str(tmp_path))
    assert library is not None
    assert library.parent.name == "json"  # not that of the folder
    assert module_file("no_such.module") is None


def test_a_file_with_a_mistake_has_no_names(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("class A(:\n")
    assert definition(tmp_path / "broken.py", "A") is None
