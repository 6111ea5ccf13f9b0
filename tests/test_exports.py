"""``__all__`` of a module is true: whatever another module takes from it is in there."""

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
    """Return a module's ``__all__``, None without one."""
    for statement in parsed(module).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__all__":
            assert isinstance(statement.value, ast.List), f"{module}: __all__ is no plain list"
            return [ast.literal_eval(name) for name in statement.value.elts]
    return None


def imports(module: str) -> Iterator[tuple[str, str]]:
    """Yield which names a module takes from which other modules of the package."""
    for node in ast.walk(parsed(module)):
        if isinstance(node, ast.ImportFrom) and node.module in FILES:
            for name in node.names:
                if f"{node.module}.{name.name}" not in FILES:
                    yield node.module, name.name


def test_all_names_what_others_import() -> None:
    lists = {module: exported(module) for module in FILES}
    missing = sorted(
        {
            f"{source}: {name} (imported by {module})"
            for module in FILES
            for source, name in imports(module)
            if source != module and (known := lists[source]) is not None and name not in known
        }
    )
    assert not missing, "\n".join(["names that __all__ leaves out:", *missing])


def test_all_names_what_is_there() -> None:
    for module in FILES:
        names = exported(module) or []
        assert len(set(names)) == len(names), f"{module}: __all__ names something twice"
        known: set[str] = set()
        texts: set[str] = set()
        for node in ast.walk(parsed(module)):
            if isinstance(node, ast.Name):
                known.add(node.id)
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                known.add(node.name)
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                known |= {name.asname or name.name for name in node.names}
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.add(node.value)
        if "__getattr__" in known:  # imported when asked for, from a table
            known |= texts
        assert set(names) <= known, f"{module}: {sorted(set(names) - known)} are not there"
