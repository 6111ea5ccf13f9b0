"""Sample random mutants of the code that sums, limits, logs and caches, and check that tests fail.

    python tests/mutants/sample.py                  the 40 mutants of seed 14
    python tests/mutants/sample.py --list           list them, run nothing
    python tests/mutants/sample.py --number 7       mutant 7 only
    python tests/mutants/sample.py --seed 3 --count 10

``results.md`` contains the printed table of the last run.

Each mutant changes one expression. It negates a comparison or moves its bound, swaps ``and`` with
``or``, ``round`` with ``int`` or ``min`` with ``max``, replaces a sum by its last element, inverts
a condition, and so on. Messages, type hints and assertions are not changed. The tests of a mutant
are those named after its module, and those listed in ``MODULES``.
"""

from __future__ import annotations

import argparse
import ast
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from mutation import ROOT, copied_repository, restored, run_tests

PACKAGE = "anomaly_clip"
MODULES = {
    "callbacks.py": ("callbacks", "progress"),
    "commands/batch.py": ("batch", "each", "sweep"),
    "commands/compare.py": ("compare",),
    "commands/each.py": ("each",),
    "commands/sweep.py": ("sweep",),
    "commands/sweep_record.py": ("sweep",),
    "data/check.py": ("check",),
    "data/check_files.py": ("check",),
    "data/feature_cache.py": ("feature_cache",),
    "data/few_shots.py": ("few_shots", "dataset"),
    "data/file_hashes.py": ("file_hashes",),
    "data/image_cache.py": ("image_cache",),
    "data/samplers.py": ("samplers", "dataset", "regad"),
    "data/validation.py": ("validation", "dataset", "synthetic"),
    "files.py": ("files",),
    "methods/coreset.py": ("coreset", "patchcore"),
    "methods/gaussians.py": ("gaussians", "padim", "regad"),
    "methods/patchcore.py": ("patchcore",),
    "metrics/bins.py": ("bins", "pixel"),
    "metrics/classification.py": ("classification", "linear_probe"),
    "metrics/evaluator.py": ("evaluator", "curves"),
    "metrics/pixel.py": ("pixel", "evaluator"),
    "metrics/ranking.py": ("ranking", "pixel"),
    "metrics/windows.py": ("windows", "pixel"),
    "progress.py": ("progress",),
    "recording/gallery.py": ("gallery", "page"),
    "recording/image_records.py": ("image_records", "experiment"),
    "recording/map_images.py": ("map_images", "experiment"),
    "recording/validation_images.py": ("validation_images",),
    "recording/wandb_log.py": ("wandb_log",),
    "recording/writer.py": ("writer", "experiment", "linear_probe", "tab"),
    "results/*.py": (
        *("results", "page", "comparison", "selection", "run_files", "finished_run"),
        *("metrics_file", "run_reader", "map_store", "warnings", "each"),
    ),
}
"""Modules to mutate, with the names of their tests: all existing ``tests/test_NAME*.py``."""

COMPARISONS: dict[type[ast.cmpop], str] = {
    ast.Lt: "<=",
    ast.LtE: "<",
    ast.Gt: ">=",
    ast.GtE: ">",
    ast.Eq: "!=",
    ast.NotEq: "==",
    ast.Is: "is not",
    ast.IsNot: "is",
    ast.In: "not in",
    ast.NotIn: "in",
}
SIGNS: dict[type[ast.operator], str] = {
    ast.Add: "-",
    ast.Sub: "+",
    ast.Mult: "/",
    ast.Div: "*",
    ast.FloorDiv: "%",
}
CALLS = {
    "min": "max",
    "max": "min",
    "any": "all",
    "all": "any",
    "round": "int",
    "sorted": "list",
    "reversed": "iter",
    "amax": "amin",
    "argmax": "argmin",
    "ceil": "floor",
    "mean": "sum",
    "cumsum": "clone",
}
PATHS = re.compile(r"folder|root|path|parent|nowhere|own\b", re.IGNORECASE)
"""Names of paths, where ``/`` is no division."""
TEXT = (ast.JoinedStr, ast.Raise, ast.Assert, ast.Import, ast.ImportFrom)
"""Nodes that are not mutated."""


class Mutant(NamedTuple):
    """One expression of a file and its replacement."""

    file: str
    line: int
    start: int
    end: int
    """Offsets in the file's text."""
    old: str
    new: str

    @property
    def title(self) -> str:
        """Old and new code on one line."""
        old, new = (" ".join(text.split()) for text in (self.old, self.new))
        return f"{old}  ->  {new}".replace("|", "\\|")  # escaped for the Markdown table


class Finder(ast.NodeVisitor):
    """Collect the mutants of a file."""

    def __init__(self, file: str, text: str) -> None:
        self.file = file
        self.text = text
        self.mutants: list[Mutant] = []
        lines = text.encode().split(b"\n")
        self._starts = [0]
        for line in lines:
            self._starts.append(self._starts[-1] + len(line) + 1)
        self.visit(ast.parse(text))

    def _at(self, line: int, column: int) -> int:
        """Return the offset in characters of a position whose column is in bytes, as in ast."""
        return len(self.text.encode()[: self._starts[line - 1] + column].decode())

    def _source(self, node: ast.expr | ast.stmt) -> str:
        return ast.get_source_segment(self.text, node) or ""

    def _add(self, node: ast.expr | ast.stmt, new: str) -> None:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        start = self._at(node.lineno, node.col_offset)
        end = self._at(node.end_lineno, node.end_col_offset)
        old = self.text[start:end]
        self.mutants.append(Mutant(self.file, node.lineno, start, end, old, new))

    def visit(self, node: ast.AST) -> None:
        """Visit the nodes that compute."""
        if isinstance(node, TEXT):
            return
        super().visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        """Skip decorators and type hints."""
        for default in [*node.args.defaults, *node.args.kw_defaults]:
            if default is not None:
                self.visit(default)
        for statement in node.body:
            self.visit(statement)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        """Skip base classes."""
        for statement in node.body:
            self.visit(statement)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        """Skip the type hint."""
        if node.value is not None:
            self.visit(node.value)

    def visit_Compare(self, node: ast.Compare) -> None:
        """Negate a comparison, or move its bound."""
        self.generic_visit(node)
        if len(node.ops) == 1:
            left, right = self._source(node.left), self._source(node.comparators[0])
            if isinstance(node.left, ast.NamedExpr):
                left = f"({left})"
            self._add(node, f"{left} {COMPARISONS[type(node.ops[0])]} {right}")

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        """Swap ``and`` with ``or``."""
        self.generic_visit(node)
        word = " or " if isinstance(node.op, ast.And) else " and "
        self._add(node, f"({word.join(f'({self._source(value)})' for value in node.values)})")

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        """Drop a ``not`` or a sign."""
        self.generic_visit(node)
        if isinstance(node.op, (ast.Not, ast.USub, ast.Invert)):
            self._add(node, f"({self._source(node.operand)})")

    def visit_BinOp(self, node: ast.BinOp) -> None:
        """Swap arithmetic operators, if the operands may be numbers."""
        self.generic_visit(node)
        texts = (ast.List, ast.ListComp, ast.JoinedStr, ast.Tuple)
        sides = (node.left, node.right)
        if isinstance(node.op, ast.Div) and PATHS.search(self._source(node.left)):
            return
        if type(node.op) in SIGNS and not any(
            isinstance(side, texts)
            or (isinstance(side, ast.Constant) and isinstance(side.value, str))
            for side in sides
        ):
            left, right = map(self._source, sides)
            self._add(node, f"({left}) {SIGNS[type(node.op)]} ({right})")

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        """Keep only the last value; for ``|=`` also let the first value win."""
        self.generic_visit(node)
        target, value = self._source(node.target), self._source(node.value)
        self._add(node, f"{target} = {value}")
        if isinstance(node.op, ast.BitOr) and "seen" not in target:  # sets have no order
            self._add(node, f"{target} = ({value}) | {target}")

    def visit_Call(self, node: ast.Call) -> None:
        """Swap functions; replace a sum by its last element."""
        self.generic_visit(node)
        name = node.func
        if isinstance(name, ast.Name) and name.id == "sum" and len(node.args) == 1:
            inner = self._source(node.args[0])
            inner = inner[1:-1] if isinstance(node.args[0], ast.GeneratorExp) else f"*{inner}"
            self._add(node, f"[{inner}][-1]")
        elif isinstance(name, ast.Name) and name.id in CALLS:
            keywords = {word.arg for word in node.keywords}
            if name.id != "sorted" or not keywords:
                self._add(name, CALLS[name.id])
        elif isinstance(name, ast.Attribute) and name.attr in CALLS:
            self._add(name, f"{self._source(name.value)}.{CALLS[name.attr]}")

    def visit_keyword(self, node: ast.keyword) -> None:
        """Skip ``strict`` of zip, which has an effect only if the code is wrong."""
        if node.arg != "strict":
            self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        """Swap the first element with the last."""
        self.generic_visit(node)
        ends = {"0": "-1", "-1": "0"}
        inner = self._source(node.slice)
        if inner in ends and isinstance(node.ctx, ast.Load):
            self._add(node, f"{self._source(node.value)}[{ends[inner]}]")

    def visit_Constant(self, node: ast.Constant) -> None:
        """Change a number by one or by a tenth; negate a boolean."""
        if isinstance(node.value, bool):
            self._add(node, str(not node.value))
        elif isinstance(node.value, int):
            self._add(node, str(node.value + 1))
        elif isinstance(node.value, float):
            self._add(node, repr(node.value * 1.1 if node.value else 1.0))

    def visit_Continue(self, node: ast.Continue) -> None:
        """Replace ``continue`` by ``break``."""
        self._add(node, "break")

    def visit_IfExp(self, node: ast.IfExp) -> None:
        """Swap the two values."""
        self.generic_visit(node)
        first, test, second = map(self._source, (node.body, node.test, node.orelse))
        self._add(node, f"({second} if {test} else {first})")


def modules() -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the files to mutate, with the names of their tests.

    Raises:
        FileNotFoundError: If a module was renamed.
    """
    for pattern, names in MODULES.items():
        files = sorted((ROOT / PACKAGE).glob(pattern))
        if not files:
            raise FileNotFoundError(f"{PACKAGE}/{pattern}: no such module: correct MODULES")
        for file in files:
            if file.name != "__init__.py":
                yield file.relative_to(ROOT).as_posix(), (file.stem, *names)


def tests_of(names: tuple[str, ...], file: str) -> list[str]:
    """Return the existing test files, and the module itself for its doctests."""
    paths = [path for name in names for path in sorted((ROOT / "tests").glob(f"test_{name}*.py"))]
    return [*dict.fromkeys(f"tests/{path.name}" for path in paths), file]


def sample_mutants(count: int, seed: int) -> list[tuple[Mutant, list[str]]]:
    """Sample mutants at random and return them with their tests, in the order of their files."""
    every = [
        (mutant, tests_of(names, file))
        for file, names in modules()
        for mutant in Finder(file, (ROOT / file).read_text(encoding="utf-8")).mutants
    ]
    places = sorted(random.Random(seed).sample(range(len(every)), count))
    return [every[place] for place in places]


def main() -> int:
    """Run the mutants, print a table and return 0."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=14)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--list", action="store_true", help="list the mutants, run nothing")
    parser.add_argument("--number", type=int, action="append", help="mutant of the list, from 1")
    parser.add_argument("--seconds", type=float, default=120, help="time limit of each mutant")
    options = parser.parse_args()
    counts: Counter[str] = Counter()
    print("| # | outcome | place | change | seconds |\n|--:|---|---|---|--:|")
    with copied_repository() as folder:
        mutants = sample_mutants(options.count, options.seed)
        for number, (mutant, tests) in enumerate(mutants, start=1):
            if options.number and number not in options.number:
                continue
            path = folder / mutant.file
            began, outcome = time.monotonic(), "listed"
            if not options.list:
                with restored(path):
                    text = path.read_text(encoding="utf-8")
                    changed = text[: mutant.start] + mutant.new + text[mutant.end :]
                    path.write_text(changed, encoding="utf-8")
                    outcome = run_tests(tests, folder, options.seconds)
            counts[outcome] += 1
            place = f"{mutant.file.removeprefix(f'{PACKAGE}/')}:{mutant.line}"
            seconds = f"{time.monotonic() - began:.0f}"
            print(f"| {number} | {outcome} | {place} | `{mutant.title}` | {seconds} |", flush=True)
    print(", ".join(f"{outcome} {count}" for outcome, count in counts.items()), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
