"""Time the start-up of the command line: its help, its errors, and the help of ``fit``.

The script prints one JSON line with the processor seconds (user and system time) of each command's
process. Each value is the minimum over several rounds, after a warm-up round; every round runs each
command once. The exit status is 1 if the slowest invocation that runs no verb (no argument,
``--help``, ``--version``, unknown verb) takes more than 0.3 s, or if ``fit --help`` takes over 2 s
longer than ``import lightning``.

    python benchmarks/startup.py --rounds 7
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial

from common import at_most, fastest, parser, report

FRONT_DOOR = 0.3
BEYOND_LIGHTNING = 2.0

COMMANDS = {
    "python": ["-c", "pass"],
    "import_lightning": ["-c", "import lightning.pytorch"],
    "no_word": ["-m", "anomaly_clip"],
    "help": ["-m", "anomaly_clip", "--help"],
    "version": ["-m", "anomaly_clip", "--version"],
    "unknown_verb": ["-m", "anomaly_clip", "tset"],
    "fit_help": ["-m", "anomaly_clip", "fit", "--help"],
}


def main() -> int:
    """Run the benchmark and return its exit status."""
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=7)
    options = arguments.parse_args()
    tasks = {name: partial(start, [sys.executable, *words]) for name, words in COMMANDS.items()}
    best = fastest(options.rounds, tasks, clock=children_seconds)
    front = max(best[name] for name in ("no_word", "help", "version", "unknown_verb"))
    beyond = best["fit_help"] - best["import_lightning"]
    values = {"processor_seconds": {name: round(value, 3) for name, value in best.items()}}
    bounds = {
        "front door": at_most(front, FRONT_DOOR),
        "fit --help beyond import lightning": at_most(beyond, BEYOND_LIGHTNING),
    }
    return report("startup", values, bounds)


def start(command: list[str]) -> None:
    """Run a process to its end and discard its output."""
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)


def children_seconds() -> float:
    """Return the user and system seconds of all finished child processes.

    Other work on the machine hardly affects these times.
    """
    times = os.times()
    return times.children_user + times.children_system


if __name__ == "__main__":
    sys.exit(main())
