"""Count the error messages that name the value they complain about.

    python tests/error_messages.py                        print the messages without a value
    python tests/error_messages.py --sample 60 --seed 15  print a random sample to judge by eye

Both also print the share of messages that name a value. A message names a value if it interpolates
an expression. The shared checks (``check_at_least`` and its family in ``errors.py``) always name
the value; their calls are counted as well, because they are the usual way to raise an error.
"""

from __future__ import annotations

import argparse
import ast
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "anomaly_clip"


class Message(NamedTuple):
    """A place in the source that raises an error."""

    path: str
    line: int
    error: str
    text: str
    names_value: bool


def messages(root: Path = PACKAGE) -> Iterator[Message]:
    """Yield the error messages of all modules, in order of file and line."""
    for path in sorted(root.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        label = str(path.relative_to(root.parent))
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                error, argument = ast.unparse(node.exc.func), node.exc.args[0]
                text = ast.unparse(argument)
                yield Message(label, node.lineno, error, text, _interpolates(argument))
            elif isinstance(node, ast.Call) and path.name != "errors.py":
                function = ast.unparse(node.func)
                if function.startswith("check_") and node.args:
                    text = ", ".join(ast.unparse(argument) for argument in node.args)
                    yield Message(label, node.lineno, function, text, True)


def _interpolates(argument: ast.expr) -> bool:
    """Return whether a message contains more than literal text."""
    if isinstance(argument, ast.Constant):
        return False
    if isinstance(argument, ast.BinOp):  # pieces joined by +
        return _interpolates(argument.left) or _interpolates(argument.right)
    if isinstance(argument, ast.JoinedStr):
        return any(isinstance(part, ast.FormattedValue) for part in argument.values)
    return True


def main(arguments: list[str] | None = None) -> int:
    """Print a sample of the messages or those without a value, then the share with a value."""
    parser = argparse.ArgumentParser(description="Count the error messages that name the value.")
    parser.add_argument("--sample", type=int, help="number of messages to print, chosen at random")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample (default: 0)")
    options = parser.parse_args(arguments)
    every = list(messages())
    if options.sample:
        shown = sorted(random.Random(options.seed).sample(every, options.sample))
    else:
        shown = [message for message in every if not message.names_value]
    for message in shown:
        print(f"{message.path}:{message.line}: {message.error}: {message.text}")
    named = sum(message.names_value for message in every)
    print(f"{named} of {len(every)} ({named / len(every):.1%}) name the value")
    return 0


if __name__ == "__main__":
    sys.exit(main())
