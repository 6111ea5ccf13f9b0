"""Time the answers that need no work: the front door, and the options of a verb.

Prints one JSON line: processor seconds (user and system, of the process alone) of each command, the
minimum of interleaved rounds after one round that fills the caches. Exit status 1 if the front door
needs more than 0.3 s, or ``fit --help`` more than ``import lightning`` plus 2 s.

    python benchmarks/startup.py --rounds 7
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys

from anomaly_clip.records import versions

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
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    best = dict.fromkeys(COMMANDS, float("inf"))
    for number in range(options.rounds + 1):
        for name, words in COMMANDS.items():
            seconds = processor_seconds([sys.executable, *words])
            if number:
                best[name] = min(best[name], seconds)
    front = max(best[name] for name in ("no_word", "help", "version", "unknown_verb"))
    beyond = best["fit_help"] - best["import_lightning"]
    met = front <= FRONT_DOOR and beyond <= BEYOND_LIGHTNING
    report = {
        "benchmark": "startup",
        "command": shlex.join(["python", *sys.argv]),
        "processor_seconds": {name: round(value, 3) for name, value in best.items()},
        "front_door": round(front, 3),
        "front_door_target": FRONT_DOOR,
        "fit_help_beyond_lightning": round(beyond, 3),
        "fit_help_target": BEYOND_LIGHTNING,
        "met": met,
        "python": platform.python_version(),
        "lightning": versions()["lightning"],
    }
    print(json.dumps(report))
    return 0 if met else 1


def processor_seconds(command: list[str]) -> float:
    """Return user and system seconds of a process, which a busy machine hardly changes."""
    before = os.times()
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    after = os.times()
    return (after.children_user - before.children_user) + (
        after.children_system - before.children_system
    )


if __name__ == "__main__":
    sys.exit(main())
