"""Count the error messages that name the value they complain about.

    python tests/error_messages.py                        print the messages without a value
    python tests/error_messages.py --sample 60 --seed 15  print a random sample to judge by eye

A message names a value if it interpolates an expression. Counted are exceptions that are raised, or
returned by a helper to be raised, and calls of the shared checks of ``errors.py``
(``check_at_least`` and its family), which always name the value.
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
ERRORS = ("Error", "GoalMissing", "Refused")
"""Endings of the names of exceptions."""
SHARED_CHECKS = ("check_above", "check_at_least", "check_between", "check_choice")


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
            if isinstance(node, ast.Raise | ast.Return):
                call = node.exc if isinstance(node, ast.Raise) else node.value
            else:
                call = node if isinstance(node, ast.Call) else None
            if not isinstance(call, ast.Call) or not call.args:
                continue
            function, first = ast.unparse(call.func), call.args[0]
            is_check = call is node and function in SHARED_CHECKS and path.name != "errors.py"
            is_error = call is not node and function.endswith(ERRORS)
            if is_error or is_check:
                shown = [ast.unparse(argument) for argument in (call.args if is_check else [first])]
                names_value = is_check or _interpolates(first)
                yield Message(label, call.lineno, function, ", ".join(shown), names_value)


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
