"""Options of classes, read from source files without importing them.

Importing torch and Lightning takes seconds; ``--help`` and the completion of a shell need only
names, types, defaults and docstrings. Nothing is executed, so a class may be of any module.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from anomaly_clip.commands.source_code import (
    UNKNOWN,
    alternatives,
    definition,
    entries,
    module_file,
    type_text,
    value_of,
)

__all__ = ["ClassSource", "SourceOption", "find_class", "public_classes", "split_text"]

DEEPEST = 20
"""Number of base classes that are followed."""
EXPERIMENTS = frozenset(("LightningModule", "LightningDataModule"))
"""Base classes of all methods and data sets."""


TITLES = {"BackboneSettings": "CNN or ViT"}
"""Kinds that the classes of several settings stand for, other than their names."""


@dataclass(frozen=True)
class SourceOption:
    """One option of a class.

    Args:
        name: Name of the argument.
        type: Its type as text, such as ``float`` or ``{edge, inner}``.
        default: Its default; ``UNKNOWN`` if the argument has none, or it is not a plain value.
        help: Its entry in the docstring.
        settings: The options of a settings class, if the argument is one.
    """

    name: str
    type: str = ""
    default: Any = UNKNOWN
    help: str = ""
    settings: tuple[SourceOption, ...] = ()

    @property
    def is_known(self) -> bool:
        """True if the default is a plain value."""
        return self.default is not UNKNOWN


@dataclass(frozen=True)
class ClassSource:
    """Source of a class: its definition and the file around it."""

    file: Path
    node: ast.ClassDef

    @property
    def name(self) -> str:
        """Name of the class."""
        return self.node.name

    @property
    def doc(self) -> str:
        """Docstring of the class."""
        return ast.get_docstring(self.node) or ""

    @property
    def is_experiment(self) -> bool:
        """True if the class is a method or a data set that can be named on the command line."""
        return not self._is_abstract() and not EXPERIMENTS.isdisjoint(self._ancestors())

    def _ancestors(self, depth: int = 0) -> set[str]:
        bases = self._bases() if depth < DEEPEST else []
        names = {ast.unparse(base) for base in self.node.bases}
        return names.union(*(base._ancestors(depth + 1) for base in bases))

    def _is_abstract(self) -> bool:
        """Return whether a subclass has to define some names."""
        abstract: dict[str, bool] = {}
        for source in self._resolution_order():
            for name, value in source._names().items():
                abstract.setdefault(name, value)
        return any(abstract.values())

    def _resolution_order(self, depth: int = 0) -> list[ClassSource]:
        """Return the class and its ancestors as Python searches them; common ones come last."""
        bases = self._bases() if depth < DEEPEST else []
        order = [self, *(source for base in bases for source in base._resolution_order(depth + 1))]
        return list(dict.fromkeys(reversed(order)))[::-1]

    def _names(self) -> dict[str, bool]:
        """Return the names that the body of the class defines: True for abstract ones."""
        functions = [node for node in self.node.body if isinstance(node, ast.FunctionDef)]
        fields = (node.target for node in self.node.body if isinstance(node, ast.AnnAssign))
        names = {ast.unparse(target): False for target in fields}
        names |= {name: False for node in self.node.body for name in _attributes(node)}
        return names | {f.name: any(map(_is_abstract, f.decorator_list)) for f in functions}

    @property
    def summary(self) -> str:
        """First sentence of the docstring, up to the first colon."""
        first = " ".join(self.doc.partition("\n\n")[0].split())
        return split_text(first)[0].rstrip(".") if first else ""

    def options(self, depth: int = 0) -> list[SourceOption]:
        """Return the options of the constructor, with those of base classes that it passes on."""
        if _is_dataclass(self.node):
            return self._fields()
        init = next((f for f in self.node.body if _is_init(f)), None)
        if depth > DEEPEST:
            return []
        if init is None:
            return [option for base in self._bases()[:1] for option in base.options(depth + 1)]
        assert isinstance(init, ast.FunctionDef)
        options = list(self._arguments(init))
        if init.args.kwarg is not None:
            inherited = {o.name: o for base in self._bases()[:1] for o in base.options(depth + 1)}
            options = [
                replace(o, help=o.help or inherited[o.name].help) if o.name in inherited else o
                for o in options
            ]
            refused = {option.name for option in options} | _passed_on(init)
            options += [o for name, o in inherited.items() if name not in refused]
        return options

    def arguments(self, function: str) -> list[SourceOption]:
        """Return the arguments of a method of the class, such as ``fit``."""
        nodes = (f for f in self.node.body if isinstance(f, ast.FunctionDef) and f.name == function)
        return [option for node in nodes for option in self._arguments(node)]

    def _bases(self) -> list[ClassSource]:
        names = (ast.unparse(base).partition("[")[0] for base in self.node.bases)
        bases = (_find(self.file, name.rpartition(".")[2]) for name in names)
        return [base for base in bases if base is not None]

    def _arguments(self, function: ast.FunctionDef) -> Iterator[SourceOption]:
        inputs = function.args
        plain = [*inputs.posonlyargs, *inputs.args]
        missing = [None] * (len(plain) - len(inputs.defaults))
        pairs = [
            *zip(plain, [*missing, *inputs.defaults], strict=True),
            *zip(inputs.kwonlyargs, inputs.kw_defaults, strict=True),
        ]
        texts = entries(self.doc) | entries(ast.get_docstring(function) or "")
        for argument, default in pairs:
            if argument.arg != "self":
                help_text = texts.get(argument.arg, "")
                yield self._option(argument.arg, argument.annotation, default, help_text)

    def _fields(self) -> list[SourceOption]:
        texts = entries(self.doc)
        inherited = {o.name: o for base in self._bases() for o in base.options()}
        for field in self.node.body:
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                name, kind = field.target.id, field.annotation
                if "ClassVar" in ast.unparse(kind) or name.startswith("_"):
                    continue
                inherited[name] = self._option(name, kind, field.value, texts.get(name, ""))
        return [replace(o, help=texts.get(o.name, o.help)) for o in inherited.values()]

    def _option(
        self, name: str, kind: ast.expr | None, default: ast.expr | None, help_text: str
    ) -> SourceOption:
        value = UNKNOWN if default is None else value_of(self.file, default)
        settings = None if kind is None else self._settings(kind)
        text = "" if kind is None else type_text(self.file, kind)
        if not settings:
            return SourceOption(name, text, value, help_text)
        given = value if isinstance(value, Mapping) else {}
        chosen = default.func if isinstance(default, ast.Call) else None
        defaults = {} if chosen is None else self._defaults(chosen)
        parts = tuple(
            replace(
                option, default=given.get(option.name, defaults.get(option.name, option.default))
            )
            for option in _of_all(settings)
        )
        return SourceOption(name, "settings", value, help_text or settings[0].summary, parts)

    def _defaults(self, settings: ast.expr) -> dict[str, Any]:
        """Return the default values of a settings class by option."""
        sources = _settings_in(self.file, settings)
        return {option.name: option.default for source in sources for option in source.options()}

    def _settings(self, kind: ast.expr) -> list[ClassSource]:
        """Return the settings classes among the alternatives of a type.

        Of classes with the same options, such as those of one kind of backbone, the first counts.
        """
        chosen: list[ClassSource] = []
        names: set[str] = set()
        for source in _settings_in(self.file, kind):
            options = {option.name for option in source.options()}
            if not options <= names:
                chosen.append(source)
                names |= options
        return chosen


def _settings_in(file: Path, kind: ast.expr, depth: int = 0) -> Iterator[ClassSource]:
    for part in alternatives(kind):
        place = definition(file, part.id) if isinstance(part, ast.Name) else None
        if place is None:
            continue
        if isinstance(place[1], ast.ClassDef):
            if _is_dataclass(place[1]):
                yield ClassSource(place[0], place[1])
        elif isinstance(place[1], ast.expr) and depth < DEEPEST:  # an alias
            yield from _settings_in(place[0], place[1], depth + 1)


def find_class(name: str, modules: Sequence[str] = (), folder: str = "") -> ClassSource | None:
    """Return the source of a class; None if it is not found.

    Args:
        name: A dotted name, or the name of a class of ``modules``.
        modules: Modules of classes without a dotted name.
        folder: Folder that is searched after the installed modules.
    """
    module, _, last = name.rpartition(".")
    for place in (module,) if module else modules:
        file = module_file(place, folder)
        source = None if file is None else _find(file, last, folder)
        if source is not None:
            return source
    return None


@cache
def public_classes(module: str) -> list[ClassSource]:
    """Return the methods or data sets in ``__all__`` of a module, by name."""
    file = module_file(module)
    names = [] if file is None else value_of(file, ast.Name("__all__"))
    sources = (find_class(name, [module]) for name in names)
    chosen = (source for source in sources if source is not None and source.is_experiment)
    return sorted(chosen, key=lambda source: source.name.lower())


def split_text(text: str) -> list[str]:
    """Split a text after its full stops, and remove these.

    Example:
        >>> from anomaly_clip.commands.source_options import split_text
        >>> split_text("Side, e.g. in pixels. Or null.")
        ['Side, e.g. in pixels', 'Or null']
    """
    return re.split(r"(?<![.\s])\.\s+(?=[A-Z0-9`\"(])", text.strip().removesuffix("."))


def _find(file: Path, name: str, folder: str = "") -> ClassSource | None:
    place = definition(file, name, folder)
    if place is None or not isinstance(place[1], ast.ClassDef):
        return None
    return ClassSource(place[0], place[1])


def _of_all(settings: Sequence[ClassSource]) -> list[SourceOption]:
    """Return the options of settings classes; of several, the help names the class of each text."""
    if len(settings) == 1:
        return settings[0].options()
    options: dict[str, SourceOption] = {}
    for source in settings:
        title = TITLES.get(source.name, source.name.removesuffix("Settings"))
        for option in source.options():
            text = f"{title}: {option.help}"
            if option.name in options:
                first = options[option.name]
                options[option.name] = replace(first, help=f"{first.help} {text}")
            else:
                options[option.name] = replace(option, help=text)
    return list(options.values())


def _is_dataclass(node: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)


def _is_abstract(decorator: ast.expr) -> bool:
    return ast.unparse(decorator).rpartition(".")[2] == "abstractmethod"


def _attributes(node: ast.stmt) -> Iterator[str]:
    """Yield the names that a statement in the body of a class assigns to."""
    for target in node.targets if isinstance(node, ast.Assign) else ():
        if isinstance(target, ast.Name):
            yield target.id


def _is_init(node: ast.stmt) -> bool:
    return isinstance(node, ast.FunctionDef) and node.name == "__init__"


def _passed_on(init: ast.FunctionDef) -> set[str]:
    """Return the arguments of a base class that a constructor sets itself."""
    calls = (node for node in ast.walk(init) if isinstance(node, ast.Call))
    bases = (call for call in calls if ast.unparse(call.func) == "super().__init__")
    return {keyword.arg for call in bases for keyword in call.keywords if keyword.arg}
