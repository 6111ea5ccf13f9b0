"""List the bounds of all results and state whether each is met.

python benchmarks/status.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from common import RESULTS, parser


def lines(folder: Path = RESULTS) -> Iterator[str]:
    """Yield one line per bound of each result, then one with the number of missed bounds."""
    missed: list[str] = []
    count = 0
    for file in sorted(folder.glob("*.json")):
        bounds = json.loads(file.read_text(encoding="utf-8"))["bounds"]
        if not bounds:
            yield f"{file.stem}: no bound"
        for name, bound in bounds.items():
            count += 1
            verdict = {True: "met", False: "MISSED", None: "not measured"}[bound["met"]]
            value = "-" if bound["value"] is None else f"{bound['value']:.4g}"
            yield f"{file.stem}: {name}: {value}, {bound['rule']} {bound['bound']:.4g}: {verdict}"
            if bound["met"] is False:
                missed.append(file.stem)
    names = ", ".join(dict.fromkeys(missed))
    yield f"{len(missed)} of {count} bounds are missed{f': {names}' if names else ''}"


def main() -> int:
    """Print the list and return the exit status."""
    parser(__doc__).parse_args()
    for line in lines():
        sys.stdout.write(f"{line}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
