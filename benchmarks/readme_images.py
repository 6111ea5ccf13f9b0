"""Draw the images of README.md from a run of the demo.

    anomaly_clip test --config demo --output.raw_maps true --output.folder runs/readme
    python benchmarks/readme_images.py runs/readme

``detections.webp`` shows generated photographs, and below each the heat map on the photograph with
the outline of its mask and a legend. Of each category, the script takes the first of the run's
typical true positives, so that no image is chosen by hand. All text is drawn on a dark ground,
which suits both themes. ``page.webp`` is the beginning of the run's page and its images, without
the sections between; it needs Chromium.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from anomaly_clip.data import Demo
from anomaly_clip.drawing.draw import font
from anomaly_clip.drawing.overlay import blend
from anomaly_clip.drawing.panels import heat_map
from anomaly_clip.results.map_store import image_names

CATEGORIES = ("black leather", "brushed copper plate", "red striped cloth", "brass washer")
SIDE, GAP, TEXT = 256, 6, 30
"""Side of a photograph, gap, and size of the text, in pixels."""
GROUND, INK = (24, 26, 31), (235, 237, 241)
PAGE_SIZE = (1200, 1000)
QUALITY = 84


def main(words: list[str] | None = None) -> int:
    """Write the images; return the exit code."""
    parser = argparse.ArgumentParser(description="Draw the images of README.md.")
    parser.add_argument("run", type=Path, help="folder of a test of the demo, with raw_maps/")
    parser.add_argument("--folder", type=Path, default=Path(".github/images"), help="destination")
    options = parser.parse_args(words)
    options.folder.mkdir(parents=True, exist_ok=True)
    sheet = draw_detections(options.run)
    sheet.save(options.folder / "detections.webp", quality=QUALITY, method=6)
    program = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    if program is None:
        print("no Chromium: page.webp is left as it is")
        return 0
    photograph_page(program, options.run / "report.html", options.folder / "page.webp")
    return 0


def draw_detections(run: Path) -> Image.Image:
    """Return two rows of images, photographs and overlays, above a legend."""
    columns = [draw_column(run, name) for name in CATEGORIES]
    legend = draw_legend(len(columns) * (SIDE + GAP) + GAP)
    height = 2 * (SIDE + GAP) + GAP
    sheet = Image.new("RGB", (legend.width, height + legend.height), GROUND)
    for number, panels in enumerate(columns):
        for row, panel in enumerate(panels):
            left, top = (GAP + place * (SIDE + GAP) for place in (number, row))
            sheet.paste(Image.fromarray(panel), (left, top))
    sheet.paste(legend, (0, height))
    return sheet


def draw_column(run: Path, category: str) -> list[NDArray[np.uint8]]:
    """Return the photograph and the overlay of a typical true positive of a category."""
    listed = json.loads((run / "gallery" / "gallery.json").read_text(encoding="utf-8"))
    entry: dict[str, Any] = next(
        entry
        for entry in listed["pictures"]
        if entry["category"] == category and entry["kind"] == "hit"
    )
    config = yaml.safe_load((run / "config-test.yaml").read_text(encoding="utf-8"))
    given = config["data"]["init_args"]
    data = Demo(**{key: given[key] for key in ("categories", "num_test", "seed", "picture_size")})
    samples = data.samples("test")
    image, mask = data.reader()(samples[image_names(samples).index(entry["name"])])
    assert mask is not None
    size = (SIDE, SIDE)
    photograph = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))
    grey = Image.fromarray(np.asarray(mask, bool).astype(np.uint8) * 255)
    inside = np.asarray(grey.resize(size, Image.Resampling.BILINEAR)) > 127
    values = np.load(run / "raw_maps" / f"{entry['name']}.npy").astype(np.float32)
    low, high = entry["scale"]
    return [photograph, blend(photograph, values, (low, high), inside)]


def draw_legend(width: int) -> Image.Image:
    """Return the legend: colour scale of the heat map, outline of the mask."""
    legend = Image.new("RGB", (width, TEXT + 26), GROUND)
    draw = ImageDraw.Draw(legend)
    bar = heat_map(np.linspace(0, 1, 150)[None].repeat(20, axis=0), 0.0, 1.0)
    top = 12
    legend.paste(Image.fromarray(bar), (GAP + 4, top + 6))
    draw.text((GAP + 166, top - 3), "anomaly map, low to high", INK, font(TEXT))
    left = GAP + 590
    draw.line([(left, top + 16), (left + 60, top + 16)], (255, 255, 255), 5)
    draw.text((left + 72, top - 3), "true outline (generated)", INK, font(TEXT))
    return legend


def photograph_page(program: str, page: Path, target: Path) -> None:
    """Write the beginning of a page and its images, without the sections between."""
    with tempfile.TemporaryDirectory() as folder:
        file, shortened = Path(folder, "page.png"), Path(folder, "page.html")
        html = page.read_text(encoding="utf-8").replace(' loading="lazy"', "")
        hidden = "#metrics, #kinds, #scores, #curves { display: none; }"
        shortened.write_text(html.replace("</head>", f"<style>{hidden}</style></head>", 1), "utf-8")
        size = ",".join(map(str, PAGE_SIZE))
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        options += [f"--window-size={size}", f"--screenshot={file}"]
        subprocess.run(
            [program, *options, shortened.as_uri()],
            check=True,
            capture_output=True,
        )
        with Image.open(file) as shown:
            shown.convert("RGB").save(target, quality=QUALITY, method=6)


if __name__ == "__main__":
    raise SystemExit(main())
