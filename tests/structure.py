"""Measures of the house: import closures, floors, sizes of files and functions, tests per module.

    python tests/structure.py            print the measures
    python tests/structure.py --closure methods.sdp    list the files behind a module

Everything is read from the source text; nothing of the package is imported. Imports inside
functions count, those under ``TYPE_CHECKING`` do not. An import from a package's ``__init__`` that
only re-exports is followed to the module that defines the name.
"""

from __future__ import annotations

import argparse
import ast
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "anomaly_clip"

GROUND = (
    *("records", "maps", "losses", "errors", "progress", "files", "images", "schedules"),
    "callbacks",
)
"""Modules that everybody may import, and that import nothing of the package but each other."""

ROOMS = {
    "commands": ("recording", "report", "results", "drawing", "methods", "data"),
    "recording": ("report", "results", "drawing", "methods", "data"),
    "report": ("results", "drawing"),
    "results": (),
    "drawing": (),
    "methods": ("synthesis", "backbones", "metrics", "demo"),
    "data": ("synthesis", "demo"),
    "synthesis": ("demo",),
    "backbones": (),
    "metrics": (),
    "demo": (),
}
"""The rooms that a room may import from, beside itself and the ground floor."""

ALSO = {
    "commands": ("backbones", "metrics", "synthesis", "demo"),
    "recording": ("metrics",),
    "report": ("metrics",),
    "results": ("metrics",),
}
"""Names and pure functions that are read across floors: figures of a table, names of metrics."""

TOP = ("cli", "__main__", "__init__")
"""Modules above all rooms."""

PUBLISHED = {"report": ("data.info",), "results": ("data.info",)}
"""Single modules that a room reads beside: published counts and names, without any code."""


@dataclass(frozen=True)
class Function:
    """One function and its length in lines, docstring included."""

    module: str
    name: str
    lines: int


@dataclass
class House:
    """The package's modules, as their source says."""

    root: Path = ROOT
    modules: dict[str, ast.Module] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for path in sorted((self.root / PACKAGE).rglob("*.py")):
            parts = path.relative_to(self.root / PACKAGE).with_suffix("").parts
            name = ".".join(parts)
            source = path.read_text(encoding="utf-8")
            self.modules[name] = ast.parse(source)
            self.lines[name] = len(source.splitlines())

    @cached_property
    def imports(self) -> dict[str, set[str]]:
        """The modules of the package that each module imports, re-exports followed."""
        return {name: set(self._imported(tree)) for name, tree in self.modules.items()}

    def _imported(self, tree: ast.Module) -> Iterator[str]:
        for node in _runtime_nodes(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.split(".")[0] == PACKAGE:
                        yield from self._module(alias.name.removeprefix(PACKAGE).lstrip("."))
            elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                if node.module.split(".")[0] != PACKAGE:
                    continue
                base = node.module.removeprefix(PACKAGE).lstrip(".")
                for alias in node.names:
                    yield from self._name(base, alias.name)

    def _module(self, name: str) -> Iterator[str]:
        if name in self.modules:
            yield name
        package = f"{name}.__init__" if name else "__init__"
        if package in self.modules:
            yield package

    def _name(self, base: str, name: str) -> Iterator[str]:
        """Yield the module that ``from base import name`` needs."""
        inner = f"{base}.{name}" if base else name
        if inner in self.modules or f"{inner}.__init__" in self.modules:
            yield from self._module(inner)
            return
        package = f"{base}.__init__" if base else "__init__"
        if package in self.modules:
            for node in self.modules[package].body:
                if isinstance(node, ast.ImportFrom) and node.module and _binds(node, name):
                    source = node.module.removeprefix(PACKAGE).lstrip(".")
                    yield from self._name(source, name)
                    return
        yield from self._module(base)

    def closure(self, module: str) -> set[str]:
        """Return the modules that an import of ``module`` needs, itself left out."""
        seen: set[str] = set()
        ahead = [module]
        while ahead:
            for name in self.imports[ahead.pop()]:
                if name not in seen and not name.endswith("__init__"):
                    seen.add(name)
                    ahead.append(name)
        return seen - {module}

    def against_floors(self) -> list[str]:
        """Return the imports that ``ROOMS`` does not allow, as ``module -> module``."""
        return sorted(
            f"{name} -> {other}"
            for name, others in self.imports.items()
            for other in others
            if not _allowed(name, other)
        )

    def functions(self) -> list[Function]:
        """Return all functions and methods."""
        return [
            Function(name, node.name, (node.end_lineno or 0) - node.lineno + 1)
            for name, tree in self.modules.items()
            for node in ast.walk(tree)
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        ]

    def tested(self) -> dict[str, bool]:
        """Return whether a module has a test of its name that uses a public name of it."""
        return {
            name: self._is_tested(name)
            for name, tree in self.modules.items()
            if not name.endswith(("__init__", "__main__")) and _public(tree)
        }

    def _is_tested(self, name: str) -> bool:
        room, _, stem = name.rpartition(".")
        tests = self.root / "tests"
        files = (tests / f"test_{stem}.py", tests / f"test_{room}_{stem}.py")
        public = set(_public(self.modules[name]))
        return any(
            self._calls(ast.parse(file.read_text(encoding="utf-8")), name, public)
            for file in files
            if file.is_file()
        )

    def _calls(self, test: ast.Module, name: str, public: set[str]) -> bool:
        """Return whether a test calls what a module defines, under any name it is imported by."""
        names, modules = set(), set()
        for node in ast.walk(test):
            if isinstance(node, ast.ImportFrom) and node.module:
                base = node.module.removeprefix(PACKAGE).lstrip(".")
                for alias in node.names:
                    bound = alias.asname or alias.name
                    if alias.name in public and name in self._name(base, alias.name):
                        names.add(bound)
                    elif f"{base}.{alias.name}".lstrip(".") == name:
                        modules.add(bound)
        for node in ast.walk(test):
            if isinstance(node, ast.Call):
                called: ast.expr = node.func
                while isinstance(called, ast.Attribute):
                    value = called.value
                    if isinstance(value, ast.Name) and value.id in modules:
                        return called.attr in public
                    called = value
                    if isinstance(called, ast.Call):
                        called = called.func
                if isinstance(called, ast.Name) and called.id in names:
                    return True
        return False


def _binds(node: ast.ImportFrom, name: str) -> bool:
    return name in {alias.asname or alias.name for alias in node.names}


def _runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield all nodes but those under ``if TYPE_CHECKING``."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _runtime_nodes(node)


def _public(tree: ast.Module) -> list[str]:
    """Return the public functions, classes and constants that a module defines."""
    names: list[str] = []
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.append(node.target.id)
    return [name for name in names if not name.startswith("_")]


def _room(name: str) -> str:
    return name.split(".")[0]


def _allowed(name: str, other: str) -> bool:
    here, there = _room(name), _room(other)
    if here in TOP or here == there or there in GROUND or other == "__init__":
        return True
    if here in GROUND:
        return False
    if other in PUBLISHED.get(here, ()):
        return True
    return there in (*ROOMS.get(here, ()), *ALSO.get(here, ()))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the house.")
    parser.add_argument("--closure", metavar="MODULE", help="list the files behind a module")
    asked = parser.parse_args()
    house = House()
    if asked.closure:
        print("\n".join(sorted(house.closure(asked.closure))))
        return
    modules = {n: k for n, k in house.lines.items() if not n.endswith("__init__")}
    functions = sorted(one.lines for one in house.functions())
    tested = house.tested()
    print(f"modules {len(modules)}, lines {sum(house.lines.values())}")
    print(f"file: median {statistics.median(modules.values()):.0f}, max {max(modules.values())}")
    print(
        f"function: median {statistics.median(functions):.0f}, "
        f"p90 {functions[int(0.9 * len(functions))]}, max {functions[-1]}"
    )
    for method in ("sdp", "padim", "clip_ada", "sdp_plus"):
        print(f"closure of {method}: {len(house.closure(f'methods.{method}'))}")
    print(f"imports against the floors: {house.against_floors() or 'none'}")
    share = sum(tested.values()) / len(tested)
    print(f"modules with a test of their name: {share:.0%} ({sum(tested.values())})")
    print(f"  without: {', '.join(name for name, has in tested.items() if not has)}")


if __name__ == "__main__":
    main()
