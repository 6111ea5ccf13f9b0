"""Check the project's English: docstrings, comments, messages, documentation, names of locals.

    python tests/prose.py              check every tracked file; exit code 1 if anything is found
    python tests/prose.py PATH ...     check these files and folders only

Four rules, each with its reason:

- The first line of a docstring is a noun phrase or an imperative. "What the line begins with" makes
  a reader search for the verb; "Prefix of the line" does not.
- Prose uses the field's word: metrics rather than figures, images rather than pictures, prompts
  rather than sentences. Readers grep for the word they know. ``WORDS`` lists what to write instead.
- A local name says what it holds. ``found`` and ``one`` hold anything.
- No text keeps the markers of an unfinished merge: a page renders with them, and nothing fails.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent

HEADLESS = re.compile(r"\s*(?:What|Which|How|Whose|Whether|Where|When)\b")

WORDS = {
    # "Figure 5" of a paper and the HTML element are figures; a metric is not.
    r"(?<!<)(?<!</)figures?\b(?! \d)": "metrics, values, results; plot or chart where it is one",
    r"pictures?": "images; photographs where they are photographs",
    r"beside": "next to, alongside, compared with, in addition to",
    r"go(?:es|ing)? on(?! to\b)": "continues, resumes",
    r"sentences": "prompts; messages",
    r"specifications?": "the page in docs/methods/, or the paper with its section",
    r"made by code": "generated",
    r"is said (?:of|instead|where|when)": "text, message, label",
}
"""Regular expressions of words to avoid in prose, and what to write instead."""

CONFLICT = re.compile(r"^(?:<{7}|>{7}|={7}$)", re.MULTILINE)
"""Lines that git writes where two branches differ."""

CODE = re.compile(r"`+[^`\n]+`+|--[a-z_.]+|^ *(?:>>>|\.\.\.) .*$", re.MULTILINE)
"""Names in back quotes, command-line options and doctests, which are not checked."""

PATTERN = re.compile("|".join(rf"(?P<w{i}>\b{word}\b)" for i, word in enumerate(WORDS)), re.I)

VAGUE = frozenset({"asked", "found", "known", "made", "one", "own", "said", "told", "wanted"})
"""Names that say nothing about their content."""

TEXT_SUFFIXES = {".md", ".yaml", ".yml", ".toml", ".jinja", ".js", ".css"}
TEXT_NAMES = {"Makefile", "run"}
SKIPPED = ("tests/prose.py", "tests/test_prose.py", "LICENSE")
"""Files that are not checked: the rules and their tests contain the words."""


class Finding(NamedTuple):
    """One place to reword."""

    path: Path
    line: int
    message: str

    def __str__(self) -> str:
        path = self.path.relative_to(ROOT) if self.path.is_relative_to(ROOT) else self.path
        return f"{path}:{self.line}: {self.message}"


def docstrings(tree: ast.AST) -> Iterator[ast.Constant]:
    """Yield all docstrings, those of attributes included."""
    for node in ast.walk(tree):
        for _, body in ast.iter_fields(node):
            if not isinstance(body, list):
                continue
            for statement in body:
                if (
                    isinstance(statement, ast.Expr)
                    and isinstance(statement.value, ast.Constant)
                    and isinstance(statement.value.value, str)
                ):
                    yield statement.value


def words_in(text: str) -> Iterator[tuple[int, str]]:
    """Yield ``(line offset, message)`` of every word to avoid in a text.

    >>> list(words_in("Two lines,\\nand a picture beside them."))[0]
    (1, "'picture': write images; photographs where they are photographs")
    """
    for match in PATTERN.finditer(text):
        advice = list(WORDS.values())[int((match.lastgroup or "w0")[1:])]
        yield text.count("\n", 0, match.start()), f"{match[0]!r}: write {advice}"


def without_code(text: str) -> str:
    """Replace the code in a text by spaces, so that line numbers stay."""
    return CODE.sub(lambda match: " " * len(match[0]), text)


def check_python(path: Path, source: str) -> Iterator[Finding]:
    """Check docstrings, comments, messages and local names of a module."""
    tree = ast.parse(source)
    heads = {id(node) for node in docstrings(tree)}
    keys = {id(node) for node in _keys(tree)}
    pieces = {id(p) for n in ast.walk(tree) if isinstance(n, ast.JoinedStr) for p in n.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [p.value if isinstance(p, ast.Constant) else "{}" for p in node.values]
            whole = "".join(map(str, parts))
            if " " in whole.strip():
                for offset, message in words_in(whole):
                    yield Finding(path, node.lineno + offset, message)
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) in pieces:
                continue
            if id(node) in heads and HEADLESS.match(node.value):
                first = node.value.strip().splitlines()[0]
                yield Finding(path, node.lineno, f"begin with a noun or an imperative: {first!r}")
            if id(node) not in keys and (id(node) in heads or " " in node.value.strip()):
                for offset, message in words_in(without_code(node.value)):
                    yield Finding(path, node.lineno + offset, message)
        name = _stored_name(node)
        if name in VAGUE:
            line = getattr(node, "lineno", 1)
            yield Finding(path, line, f"the name {name!r} does not say what it holds")
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            for _, message in words_in(token.string):
                yield Finding(path, token.start[0], message)


def _keys(tree: ast.AST) -> Iterator[ast.expr]:
    """Yield the keys of dictionaries; they are not checked, because files contain them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            yield from (key for key in node.keys if key is not None)
        elif isinstance(node, ast.Subscript):
            yield node.slice


def _stored_name(node: ast.AST) -> str | None:
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return node.id
    if isinstance(node, ast.arg):
        return node.arg
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return node.name
    return None


def check_text(path: Path, source: str) -> Iterator[Finding]:
    """Check a text file: words except in code, and the markers of a merge everywhere."""
    for match in CONFLICT.finditer(source):
        line = 1 + source.count("\n", 0, match.start())
        yield Finding(path, line, f"{match[0]!r} marks a conflict of a merge: resolve it")
    for offset, message in words_in(without_code(source)):
        yield Finding(path, 1 + offset, message)


def check(paths: Iterable[Path]) -> list[Finding]:
    """Check files with the rules of their type; files of other types are skipped."""
    findings: list[Finding] = []
    for path in sorted(paths):
        if path.is_relative_to(ROOT) and str(path.relative_to(ROOT)) in SKIPPED:
            continue
        if path.suffix == ".py":
            findings += check_python(path, path.read_text(encoding="utf-8"))
        elif path.suffix in TEXT_SUFFIXES or path.name in TEXT_NAMES:
            findings += check_text(path, path.read_text(encoding="utf-8"))
    return sorted(set(findings))


def tracked() -> list[Path]:
    """Return the files of the project that git tracks or would add."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return [ROOT / line for line in listing.splitlines() if (ROOT / line).is_file()]


def main(arguments: list[str] | None = None) -> int:
    """Print the findings and return 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "paths", nargs="*", type=Path, help="files or folders; default: all tracked"
    )
    roots = [path.resolve() for path in parser.parse_args(arguments).paths]
    files = [
        path
        for path in tracked()
        if not roots or any(path == root or path.is_relative_to(root) for root in roots)
    ]
    findings = check(files)
    for finding in findings:
        print(finding)
    print(f"{len(findings)} places to reword in {len(files)} files", file=sys.stderr)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
