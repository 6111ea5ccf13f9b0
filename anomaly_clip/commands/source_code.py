"""Names, values and types in source files, read without importing the files.

``--help`` and the completion of a shell read the classes of this package, of Lightning and of a
user's own modules in this way, as imports take seconds and run code.
"""

from __future__ import annotations

import ast
import importlib.util
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

__all__ = [
    "UNKNOWN",
    "Place",
    "alternatives",
    "definition",
    "entries",
    "module_file",
    "type_text",
    "value_of",
]

PACKAGE = Path(__file__).resolve().parent.parent
UNKNOWN = object()
"""Value that cannot be determined without running code."""
DEEPEST = 20
"""Number of imports that are followed from one name."""
OPERATORS: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}
Place = tuple[Path, ast.ClassDef | ast.expr]
"""Definition of a name: the file, and the class or the value assigned to the name."""


@cache
def _tree(file: Path) -> ast.Module:
    try:
        return ast.parse(file.read_bytes())
    except (OSError, ValueError, SyntaxError, RecursionError):
        return ast.Module([], [])


@cache
def _definitions(file: Path) -> dict[str, ast.ClassDef | ast.expr]:
    """Return the classes and the assigned values of a file by name."""
    named: dict[str, ast.ClassDef | ast.expr] = {}
    for node in _tree(file).body:
        if isinstance(node, ast.ClassDef):
            named[node.name] = node
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                named.update(_assigned(target, node.value))
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            named.update(_assigned(node.target, node.value))
    return named


def _assigned(target: ast.expr, value: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    if isinstance(target, ast.Name):
        yield target.id, value
    elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        for part, item in zip(target.elts, value.elts, strict=False):
            yield from _assigned(part, item)


@cache
def _imports(file: Path) -> dict[str, tuple[str, str]]:
    """Return the names that a file imports: module and name in it."""
    body = _tree(file).body
    for_checkers = [node for block in body if isinstance(block, ast.If) for node in block.body]
    nodes = (node for node in [*body, *for_checkers] if isinstance(node, ast.ImportFrom))
    return {
        alias.asname or alias.name: (_absolute(file, node), alias.name)
        for node in nodes
        for alias in node.names
    }


def _absolute(file: Path, node: ast.ImportFrom) -> str:
    """Return the module of an import; of a relative one, its path without the suffix."""
    if not node.level:
        return node.module or ""
    folder = file.parents[node.level - 1]
    return str(folder.joinpath(*(node.module or "").split(".")))


def module_file(module: str, folder: str = "") -> Path | None:
    """Return the file of a module; None if it is not found.

    Args:
        module: The dotted name of a module, or its path without the suffix.
        folder: Folder that is searched after the installed modules.
    """
    if Path(module).is_absolute():
        return _file_at(Path(module))
    top, *rest = module.split(".")
    if top == PACKAGE.name:
        return _file_at(PACKAGE.joinpath(*rest))
    try:
        spec = importlib.util.find_spec(top)  # imports nothing, as it has no parent
        spec = spec or (PathFinder.find_spec(top, [folder]) if folder else None)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    if not rest:
        return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None
    places = (_file_at(Path(p, *rest)) for p in spec.submodule_search_locations or ())
    return next((place for place in places if place is not None), None)


def _file_at(path: Path) -> Path | None:
    for file in (path.with_name(f"{path.name}.py"), path / "__init__.py"):
        if file.is_file():
            return file
    return None


def definition(file: Path, name: str, folder: str = "", depth: int = 0) -> Place | None:
    """Return the definition of a name that a file has or imports; None if it is not found."""
    nodes = _definitions(file)
    if name in nodes:
        return file, nodes[name]
    if name not in _imports(file) or depth > DEEPEST:
        return None
    module, original = _imports(file)[name]
    source = module_file(module, folder or str(file.parent))
    return None if source is None else definition(source, original, folder, depth + 1)


def value_of(file: Path, node: ast.expr, depth: int = 0) -> Any:
    """Return the value of an expression of constants; ``UNKNOWN`` for any other.

    An instance of a settings class becomes a mapping of its arguments.

    Example:
        >>> import ast
        >>> from pathlib import Path
        >>> from anomaly_clip.commands.source_code import value_of
        >>> value_of(Path("any.py"), ast.parse("(0.3, 1 / 4)", mode="eval").body)
        [0.3, 0.25]
    """
    if depth > DEEPEST:
        return UNKNOWN
    deeper = depth + 1
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Tuple | ast.List):
        values = [value_of(file, item, deeper) for item in node.elts]
        return UNKNOWN if UNKNOWN in values else values
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = value_of(file, node.operand, deeper)
        return -value if isinstance(value, int | float) else UNKNOWN
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        sides = [value_of(file, side, deeper) for side in (node.left, node.right)]
        is_number = all(isinstance(side, int | float) for side in sides)
        return OPERATORS[type(node.op)](*sides) if is_number else UNKNOWN
    if isinstance(node, ast.Name):
        place = definition(file, node.id)
        if place is None or isinstance(place[1], ast.ClassDef):
            return UNKNOWN
        return value_of(place[0], place[1], deeper)
    return _value_of_call(file, node, deeper) if isinstance(node, ast.Call) else UNKNOWN


def _value_of_call(file: Path, node: ast.Call, depth: int) -> Any:
    """Return the value of ``list(X)``, ``field(default_factory=...)`` or of a settings class."""
    function = ast.unparse(node.func)
    if function in ("list", "tuple") and len(node.args) == 1:
        return value_of(file, node.args[0], depth)
    given = {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
    if function == "field":
        factory = given.get("default_factory")
        if isinstance(factory, ast.Lambda):
            return value_of(file, factory.body, depth)
        if factory is not None:
            return {"list": [], "dict": {}}.get(ast.unparse(factory), UNKNOWN)
        return value_of(file, given["default"], depth) if "default" in given else UNKNOWN
    place = definition(file, function)
    if place is None or not isinstance(place[1], ast.ClassDef):
        return UNKNOWN
    names = [
        field.target.id
        for field in place[1].body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
    ]
    arguments = {**dict(zip(names, node.args, strict=False)), **given}
    return {name: value_of(file, value, depth) for name, value in arguments.items()}


def alternatives(kind: ast.expr) -> list[ast.expr]:
    """Return the alternatives of a union of types."""
    if isinstance(kind, ast.BinOp) and isinstance(kind.op, ast.BitOr):
        return [*alternatives(kind.left), *alternatives(kind.right)]
    if isinstance(kind, ast.Subscript) and ast.unparse(kind.value) in ("Union", "Optional"):
        is_many = isinstance(kind.slice, ast.Tuple)
        parts = kind.slice.elts if is_many else [kind.slice]  # type: ignore[attr-defined]
        return [nested for part in parts for nested in alternatives(part)]
    if isinstance(kind, ast.Constant) and isinstance(kind.value, str):  # a type in quotes
        return alternatives(ast.parse(kind.value, mode="eval").body)
    return [kind]


def type_text(file: Path, kind: ast.expr) -> str:
    """Return a type as text, without null: ``float``, or ``edge, inner`` for a choice."""
    texts = (_part_text(file, part) for part in alternatives(kind))
    return " | ".join(dict.fromkeys(text for text in texts if text))


def _part_text(file: Path, part: ast.expr, depth: int = 0) -> str:
    if isinstance(part, ast.Constant) and part.value is None:
        return ""
    if isinstance(part, ast.Name) and depth < DEEPEST:
        place = definition(file, part.id)
        if place is not None and isinstance(place[1], ast.expr):  # an alias
            parts = alternatives(place[1])
            texts = (_part_text(place[0], other, depth + 1) for other in parts)
            return " | ".join(text for text in texts if text)
    if isinstance(part, ast.Subscript) and ast.unparse(part.value) == "Literal":
        items = part.slice.elts if isinstance(part.slice, ast.Tuple) else [part.slice]
        choices = (value_of(file, item) for item in items)
        listed = ", ".join(str(choice) for choice in choices if choice is not None)
        return f"{{{listed}}}"
    return ast.unparse(part)


def entries(doc: str) -> dict[str, str]:
    r"""Return the entries of the section ``Args`` of a docstring by name.

    Example:
        >>> from anomaly_clip.commands.source_code import entries
        >>> entries("Do it.\n\nArgs:\n    a: One\n        line.\n    b: Two.\n")
        {'a': 'One line.', 'b': 'Two.'}
    """
    match = re.search(r"^Args:\n((?:[ \t]+\S.*\n?|\s*\n)*)", doc, re.MULTILINE)
    texts: dict[str, str] = {}
    name = None
    for line in match[1].splitlines() if match else ():
        start = re.match(r"^    (\w+)(?: \([^)]*\))?: ?(.*)", line)
        if start:
            name = start[1]
            texts[name] = start[2].strip()
        elif name is not None and line.strip():
            texts[name] = f"{texts[name]} {line.strip()}".strip()
    return texts
