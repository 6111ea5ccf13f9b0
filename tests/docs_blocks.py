"""Fenced blocks of the documentation, with the comments that steer their tests.

    python tests/docs_blocks.py    print, by page, how many blocks run, and why the others do not

An HTML comment steers the block below it. Nobody who reads the rendered page sees it:

    <!-- run: photos, new_photos -->      put folders of docs_fixtures.py into the page's
    <!-- first: anomaly_clip fit ... -->  run a command that the reader has run on another page
    <!-- not run: needs a network -->     skip the block; the reasons are those of ``REASONS``
    <!-- exits: 0, 3 -->                  exit codes of the commands; default: 0
    <!-- output -->                       the block is the output of the commands above it
    <!-- file: my_method.py -->           write the block to this file

A block without a comment is run. A Python, YAML or JSON block whose first line is only the name of
a file, as in ``# my_method.py``, is written to this file. Blocks in the language ``text`` are
diagrams, formulas and listings; they contain no commands.
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections import Counter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
REASONS = (
    "needs MVTec-AD",
    "needs VisA",
    "needs another data set",
    "needs a GPU",
    "needs a cluster",
    "needs a network",
    "needs a foreign program",
    "takes hours",
    "runs until it is stopped",
    "is a fragment",
)
"""All reasons for which a block may stay untested."""

SHELLS = ("", "console", "sh", "bash", "shell")
PROGRAMS = frozenset(
    [
        "anomaly_clip",
        "python",
        "pytest",
        "cat",
        "head",
        "tail",
        "ls",
        "mkdir",
        "cp",
        "mv",
        "rm",
        "cd",
        "export",
        "echo",
    ]
)
"""Programs that a line of a block may begin with, apart from those of blocks that are not run."""
KNOWN = PROGRAMS | frozenset(
    [
        "pip",
        "make",
        "uv",
        "wandb",
        "curl",
        "docker",
        "uvicorn",
        "torchrun",
        "sbatch",
        "srun",
        "git",
        "gh",
        "chromium",
        "ssh",
        "source",
        "pre-commit",
    ]
)

SILENT = ("setup", "first")
"""Languages of comments that put something into the page's folder."""
FENCE = re.compile(r"^( *)```([\w-]*)[^\n]*\n(.*?)^\1```[ ]*$", re.MULTILINE | re.DOTALL)
COMMENT = re.compile(r"<!--\s*(run|first|not run|exits|output|file)\b:?\s*(.*?)\s*-->")
NAMED = re.compile(r"# ([\w./-]+\.(?:py|ya?ml|json|toml))\n")


class Block(NamedTuple):
    """A fenced block, or a comment: one that asks for folders (language ``setup``) or a command."""

    page: Path
    line: int
    """Number of the line of the fence, counted from 1."""
    language: str
    text: str
    steering: dict[str, str]
    """Values of the comments above the block, by keyword."""

    @property
    def place(self) -> str:
        """Page and line, as editors read them."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def file(self) -> str | None:
        """Name of the file that the block is written to."""
        if "file" in self.steering:
            return self.steering["file"]
        match = NAMED.match(self.text)
        return match[1] if match and self.language not in SHELLS else None

    @property
    def lines(self) -> list[str]:
        """Commands of the block, with continued lines joined."""
        text = self.text.replace("\\\n", " ")
        lines = [line.strip() for line in text.splitlines()]
        prompts = [line[2:] for line in lines if line.startswith("$ ")]
        if prompts:
            return prompts
        return [line for line in lines if line and not line.startswith("#")]

    @property
    def has_commands(self) -> bool:
        """True if the block is one of commands, by its language and the program of a line."""
        return self.language in SHELLS and any(program_of(line) in KNOWN for line in self.lines)


def program_of(line: str) -> str:
    """Return the program that a line of a shell calls.

    Example:
        >>> program_of("PYTHONPATH=. anomaly_clip check --data my_factory.MyFactory")
        'anomaly_clip'
    """
    words = line.split()
    while words and re.match(r"[A-Z_]+=", words[0]):
        words.pop(0)
    return words[0] if words else ""


def blocks_of(page: Path) -> list[Block]:
    """Return the blocks of a page in their order, and its requests for folders."""
    text = page.read_text(encoding="utf-8")
    fences = [(match.start(), match.end(), match) for match in FENCE.finditer(text)]
    blocks: list[Block] = []
    steering: dict[str, str] = {}
    end = 0
    for start, stop, match in [*fences, (len(text), len(text), None)]:
        for comment in COMMENT.finditer(text, end, start):
            line = text.count("\n", 0, comment.start()) + 1
            if comment[1] in ("run", "first"):
                language = "setup" if comment[1] == "run" else "first"
                blocks.append(Block(page, line, language, comment[2], {}))
            elif match is None or (
                text[comment.end() : start].strip() and not _steers(text, comment.end(), start)
            ):
                raise ValueError(
                    f"{page.relative_to(ROOT)}:{line}: no block follows the comment {comment[0]}"
                )
            else:
                steering[comment[1]] = comment[2]
        if match is not None:
            line = text.count("\n", 0, start) + 1
            content = textwrap.dedent(match[3])
            blocks.append(Block(page, line, match[2], content, steering))
            steering = {}
        end = stop
    return blocks


def _steers(text: str, start: int, end: int) -> bool:
    """Return whether only comments stand between a comment and its block."""
    return not COMMENT.sub("", text[start:end]).strip()


def complaint(block: Block) -> str | None:
    """Return why a block can neither be run nor be skipped; None if all is well."""
    reason = block.steering.get("not run")
    if block.language in SILENT:
        return None
    if reason is not None:
        if reason in REASONS:
            return None
        return f"the reason {reason!r} is not one of {', '.join(REASONS)}"
    if "output" in block.steering or block.file:
        return None
    if block.language in ("text", "markdown", "dockerfile", "toml", "ini"):
        bad = [line for line in block.lines if program_of(line) in PROGRAMS - {"python"}]
        return f"{block.language} with a command: {bad[0]}" if bad else None
    if block.language in ("python", "yaml", "json"):
        return None
    if block.language not in SHELLS:
        return f"the language {block.language} is not tested: add <!-- not run: REASON -->"
    if not block.has_commands:
        return "no command: give the language text, or <!-- output --> if a command prints it"
    unknown = [line for line in block.lines if program_of(line) not in PROGRAMS]
    if unknown and "$ " not in block.text:
        return f"no program that tests may run: {unknown[0]}"
    return None


def pages() -> list[Path]:
    """Return the pages whose blocks are tested."""
    generated = ROOT / "docs" / "options"
    found_pages = [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
        *(page for page in (ROOT / "docs").rglob("*.md") if generated not in page.parents),
        *(ROOT / "examples").rglob("*.md"),
    ]
    return sorted(page for page in found_pages if FENCE.search(page.read_text(encoding="utf-8")))


def counts(blocks: list[Block]) -> Counter[str]:
    """Return how many blocks run, and how many do not, by reason."""
    return Counter(
        block.steering.get("not run") or ("text" if block.language == "text" else "run")
        for block in blocks
        if block.language not in SILENT
    )


def main() -> int:
    """Print the counts of each page and their sum."""
    total: Counter[str] = Counter()
    for page in pages():
        total += (number := counts(blocks_of(page)))
        print(f"{page.relative_to(ROOT)}: " + ", ".join(f"{n} {k}" for k, n in number.items()))
    print("all: " + ", ".join(f"{n} {k}" for k, n in total.most_common()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
