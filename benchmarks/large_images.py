"""Measure the memory that ``predict`` needs for large images, beyond that for one of 1 Mpx.

Each image is a photograph of its own folder, scored by SDP with the demo CLIP in a process of its
own, with drawings and without raw maps. The memory is the highest resident size of the process or
of its data loader worker, whichever grows more. The exit status is 1 if it grows by more than 12
bytes per pixel.

    python benchmarks/large_images.py --sides 9000 13000
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from common import at_most, parser, report
from PIL import Image

BYTES_PER_PIXEL = 12
SMALL = 1000  # side in pixels of the image that others are compared with
PREDICT = """
import resource, sys
from anomaly_clip.cli import main

code = main(sys.argv[1:])
who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
print("memory", code, *(resource.getrusage(part).ru_maxrss for part in who))
"""

SAVES = {
    "png": lambda image, path: image.save(path, compress_level=1),
    "jpg": lambda image, path: image.save(path),
    "turned": lambda image, path: image.save(path.with_suffix(".jpg"), exif=turned()),
    "grey16": lambda image, path: Image.fromarray(
        np.asarray(image.convert("L")).astype(np.uint16) * 16
    ).save(path.with_suffix(".png"), compress_level=1),
}
"""Functions that save the image: 24 bits, JPEG, a JPEG that EXIF turns by 90 degrees, 12 bits in 16."""


def main() -> int:
    """Run the benchmark and return its exit status."""
    arguments = parser(__doc__)
    arguments.add_argument("--sides", type=int, nargs="+", default=[9000, 13000])
    arguments.add_argument("--formats", nargs="+", default=list(SAVES))
    options = arguments.parse_args()
    growth: dict[str, dict[str, float]] = {}
    for name in options.formats:
        small = memory(name, SMALL)
        for side in options.sides:
            pixels = side**2 - SMALL**2
            grown = max(b - a for a, b in zip(small, memory(name, side), strict=True))
            growth.setdefault(name, {})[f"{side**2 / 1e6:.0f} Mpx"] = round(grown / pixels, 2)
    bounds = {
        f"bytes per pixel, {name}": at_most(max(values.values()), BYTES_PER_PIXEL)
        for name, values in growth.items()
    }
    return report("large_images", {"bytes_per_pixel": growth}, bounds)


def memory(name: str, side: int) -> list[int]:
    """Return the highest resident sizes of predict and of its workers, in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder, "photos")
        photos.mkdir()
        rng = np.random.default_rng(0)
        coarse = rng.integers(0, 256, (side // 50 + 1, side // 50 + 1, 3), dtype=np.uint8)
        SAVES[name](Image.fromarray(coarse).resize((side, side)), photos / f"a.{name}")
        words = ["predict", "--config=own_images", f"--data.root={photos}", "--data.category=plate"]
        words += ["--model.backbone.pretrained=demo", f"--output.folder={folder}/run"]
        command = [sys.executable, "-c", PREDICT, *words]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = [line for line in run.stdout.splitlines() if line.startswith("memory ")]
        if not lines or lines[0].split()[1] != "0":
            raise SystemExit(f"predict failed: {run.stderr[-500:]}")
        return [int(size) * 1024 for size in lines[0].split()[2:]]


def turned() -> Image.Exif:
    """Return EXIF data of a camera that was held upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


if __name__ == "__main__":
    sys.exit(main())
