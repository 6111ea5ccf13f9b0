"""Time the end of a test of 1,725 images, after its last image, and print one JSON line.

    python benchmarks/report_page.py

The bundled demo CLIP scores generated images of 64 pixels: 15 categories with 115 test images each,
in total as many as MVTec-AD has. The benchmark measures how long the whole end of the test takes
(scores, metrics, gallery and page), how long regenerating the page from the run's folder takes, and
the size of the page. The exit status is 1 if a limit is exceeded.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import at_most, parser, report

from anomaly_clip.cli import main as anomaly_clip
from anomaly_clip.data import Demo
from anomaly_clip.recording.writer import RunWriter
from anomaly_clip.reporting.page import PAGE, write_page

CATEGORIES, IMAGES = 15, 115
LIMITS = {"end_of_test_s": 20.0, "page_again_s": 20.0, "page_mb": 20.0}


def run(folder: Path) -> dict[str, float]:
    """Run a test that writes to a folder; return the seconds that its end takes."""
    end = RunWriter.on_test_end
    taken: dict[str, float] = {}

    def timed(*arguments: Any) -> None:
        start = time.perf_counter()
        end(*arguments)
        taken["end_of_test_s"] = time.perf_counter() - start

    names = json.dumps(Demo().categories[:CATEGORIES])
    words = [
        "test",
        "--model=SDP",
        "--model.backbone.name=demo",
        "--model.backbone.pretrained=demo",
    ]
    words += ["--model.backbone.image_size=64", "--data=Demo", f"--data.categories={names}"]
    words += [f"--data.num_test={IMAGES}", "--data.picture_size=64", "--data.batch_size=64"]
    words += [f"--output.folder={folder}", "--trainer.enable_progress_bar=false"]
    RunWriter.on_test_end = timed  # type: ignore[method-assign, assignment]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            if anomaly_clip(words) != 0:
                raise SystemExit(1)
    finally:
        RunWriter.on_test_end = end  # type: ignore[method-assign]
    return taken


def measure() -> dict[str, float]:
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root, "run")
        values = run(folder)
        start = time.perf_counter()
        write_page(folder)
        values["page_again_s"] = time.perf_counter() - start
        values["page_mb"] = (folder / PAGE).stat().st_size / 1e6
        values["pictures"] = len(list((folder / "gallery").rglob("*.webp")))
        lines = (folder / "scores.csv").read_text(encoding="utf-8").count("\n") - 1
    values["images"] = lines
    return {name: round(value, 2) for name, value in values.items()}


def main() -> int:
    """Run the benchmark and return its exit status."""
    parser(__doc__).parse_args()
    measured = measure()
    bounds = {name: at_most(measured[name], limit) for name, limit in LIMITS.items()}
    return report("report_page", measured, bounds)


if __name__ == "__main__":
    sys.exit(main())
