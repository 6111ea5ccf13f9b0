"""Measures of the package: import closures, layers, sizes of files and functions, tested modules.

    python tests/structure.py            print the measures
    python tests/structure.py --closure methods.sdp    list the modules that a module needs

All measures come from the source text; nothing of the package is imported. Imports inside functions
count, those under ``TYPE_CHECKING`` do not. If an ``__init__`` re-exports a name, an import of the
name counts as an import of the module that defines it.
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

BASE = (
    *("records", "maps", "losses", "errors", "progress", "files", "images", "image_formats"),
    *("cache_files", "documents", "exhaustion", "folders", "masks", "memory"),
    "schedules",
    "callbacks",
    *("constant_tensors", "lazy_names", "metric_values"),
)
"""Base modules: every module may import them; within the package they import only each other."""

LAYERS = {
    "runtime": (),
    "exporting": ("commands", "methods", "data", "decisions", "runtime"),
    "testing": ("exporting", "commands", "methods", "data", "runtime"),
    "commands": (
        *("exporting", "recording", "reporting", "results", "drawing"),
        *("methods", "data", "decisions", "runtime"),
    ),
    "recording": ("reporting", "results", "drawing", "methods", "data", "decisions"),
    "reporting": ("results", "drawing"),
    "results": (),
    "drawing": (),
    "decisions": (),
    "methods": ("synthesis", "backbones", "metrics", "demo"),
    "data": ("synthesis", "demo", "runtime"),
    "synthesis": ("demo",),
    "backbones": (),
    "metrics": (),
    "demo": (),
}
"""Subpackages that a subpackage may import from, besides itself and the base modules."""

ACROSS_LAYERS = {
    "testing": ("backbones", "metrics", "demo"),
    "commands": ("backbones", "metrics", "synthesis", "demo"),
    "recording": ("metrics",),
    "exporting": ("metrics", "demo"),
    "reporting": ("metrics",),
}
"""Further subpackages to import only names and pure functions from, such as metric names."""

TOP = (
    *("cli", "__main__", "__init__"),
    *("detector", "fitting", "loading", "prediction", "sources"),
    *("image_inputs", "preprocessing", "python_calls"),
)
"""Modules above all subpackages: the command line, and detectors from Python."""

PUBLISHED = {
    "reporting": ("data.info",),
    "results": ("data.info",),
    "testing": ("cli", "detector"),
    "commands": ("detector", "loading"),
    "exporting": ("detector", "loading", "image_inputs", "preprocessing"),
}
"""Single modules that a subpackage may also import: published counts and names; the command line,
which the contract of a method runs; and detectors, as Python loads them."""


@dataclass(frozen=True)
class Function:
    """One function and its length in lines, docstring included."""

    module: str
    name: str
    lines: int


@dataclass
class PackageStructure:
    """The package's modules, parsed from their source."""

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
        """Modules of the package that each module imports; re-exports count as their source."""
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
            for node in _with_lazy_imports(self.modules[package]):
                if isinstance(node, ast.ImportFrom) and node.module and _binds(node, name):
                    source = node.module.removeprefix(PACKAGE).lstrip(".")
                    yield from self._name(source, name)
                    return
        yield from self._module(base)

    def closure(self, module: str) -> set[str]:
        """Return the modules that an import of ``module`` needs, without ``module`` itself."""
        seen: set[str] = set()
        pending = [module]
        while pending:
            for name in self.imports[pending.pop()]:
                if name not in seen and not name.endswith("__init__"):
                    seen.add(name)
                    pending.append(name)
        return seen - {module}

    def forbidden_imports(self) -> list[str]:
        """Return the imports that the layers do not allow, as ``module -> module``."""
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
        """Return, for each module, whether its own test file calls one of its public names."""
        return {
            name: self._is_tested(name)
            for name, tree in self.modules.items()
            if not name.endswith(("__init__", "__main__")) and _public(tree)
        }

    def _is_tested(self, name: str) -> bool:
        package, _, stem = name.rpartition(".")
        tests = self.root / "tests"
        files = (tests / f"test_{stem}.py", tests / f"test_{package}_{stem}.py")
        public = set(_public(self.modules[name]))
        return any(
            self._calls(ast.parse(file.read_text(encoding="utf-8")), name, public)
            for file in files
            if file.is_file()
        )

    def _calls(self, test: ast.Module, name: str, public: set[str]) -> bool:
        """Return whether a test calls a name that a module defines, also under an alias."""
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


def _with_lazy_imports(tree: ast.Module) -> Iterator[ast.stmt]:
    """Yield the statements of a package, with the imports of its lazy names."""
    for node in tree.body:
        yield from node.body if isinstance(node, ast.If) else [node]


def _binds(node: ast.ImportFrom, name: str) -> bool:
    return name in {alias.asname or alias.name for alias in node.names}


def _runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield all nodes except those under ``if TYPE_CHECKING``."""
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


def _subpackage(name: str) -> str:
    return name.split(".")[0]


def _allowed(name: str, other: str) -> bool:
    here, there = _subpackage(name), _subpackage(other)
    if here in TOP or here == there or there in BASE or other == "__init__":
        return True
    if here in BASE:
        return False
    if other in PUBLISHED.get(here, ()):
        return True
    return there in (*LAYERS.get(here, ()), *ACROSS_LAYERS.get(here, ()))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the package.")
    parser.add_argument("--closure", metavar="MODULE", help="list the modules that MODULE needs")
    options = parser.parse_args()
    package = PackageStructure()
    if options.closure:
        print("\n".join(sorted(package.closure(options.closure))))
        return
    modules = {n: k for n, k in package.lines.items() if not n.endswith("__init__")}
    functions = sorted(function.lines for function in package.functions())
    tested = package.tested()
    print(f"modules {len(modules)}, lines {sum(package.lines.values())}")
    print(f"file: median {statistics.median(modules.values()):.0f}, max {max(modules.values())}")
    print(
        f"function: median {statistics.median(functions):.0f}, "
        f"p90 {functions[int(0.9 * len(functions))]}, max {functions[-1]}"
    )
    for method in ("sdp", "padim", "clip_ada", "sdp_plus", "object_agnostic", "april_gan"):
        print(f"closure of {method}: {len(package.closure(f'methods.{method}'))}")
    print(f"forbidden imports: {package.forbidden_imports() or 'none'}")
    share = sum(tested.values()) / len(tested)
    print(f"modules with a test file of their name: {share:.0%} ({sum(tested.values())})")
    print(f"  without: {', '.join(name for name, has in tested.items() if not has)}")


if __name__ == "__main__":
    main()
