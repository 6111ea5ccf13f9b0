"""Checks that ``__all__`` of every module lists what other modules import from it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "anomaly_clip"
FILES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


@cache
def parsed(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text(encoding="utf-8"))


def exported(module: str) -> list[str] | None:
    """Return the ``__all__`` of a module, or None if it has none."""
    for statement in parsed(module).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__all__":
            assert isinstance(statement.value, ast.List), f"{module}: __all__ is not a plain list"
            return [ast.literal_eval(name) for name in statement.value.elts]
    return None


def imports(module: str) -> Iterator[tuple[str, str]]:
    """Yield ``(source module, name)`` of everything a module imports from the package."""
    for node in ast.walk(parsed(module)):
        if isinstance(node, ast.ImportFrom) and node.module in FILES:
            for name in node.names:
                if f"{node.module}.{name.name}" not in FILES:
                    yield node.module, name.name


def test_dunder_all_lists_what_other_modules_import() -> None:
    lists = {module: exported(module) for module in FILES}
    missing = sorted(
        {
            f"{source}: {name} (imported by {module})"
            for module in FILES
            for source, name in imports(module)
            if source != module and (listed := lists[source]) is not None and name not in listed
        }
    )
    assert not missing, "\n".join(["names that __all__ leaves out:", *missing])


def test_dunder_all_lists_only_existing_names() -> None:
    for module in FILES:
        names = exported(module) or []
        assert len(set(names)) == len(names), f"{module}: __all__ names something twice"
        defined: set[str] = set()
        texts: set[str] = set()
        for node in ast.walk(parsed(module)):
            if isinstance(node, ast.Name):
                defined.add(node.id)
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                defined.add(node.name)
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                defined |= {name.asname or name.name for name in node.names}
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.add(node.value)
        if "__getattr__" in defined:  # lazy imports list names as strings
            defined |= texts
        assert set(names) <= defined, f"{module}: {sorted(set(names) - defined)} do not exist"
