"""``anomaly_clip compare``: one method with the weights of several backbones, side by side.

It is the comparison of TAB's paper: a detector on a backbone from ImageNet and on one that followed
the texts. Every backbone is a run of ``each``; then there is one table with differences, and for
every category a picture of some images, their maps by each backbone and the truth (its Figure 6).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from lightning.pytorch.cli import LightningArgumentParser
from numpy.typing import NDArray
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from anomaly_clip.backbones.cnn import CNNBackbone
from anomaly_clip.commands.batch import Plan
from anomaly_clip.commands.each import run_each
from anomaly_clip.commands.experiment import arrange, class_of_checkpoint, known_options, quieten
from anomaly_clip.data.dataset import AnomalyData
from anomaly_clip.drawing.panels import draw_panels, stack_sheets
from anomaly_clip.drawing.tsne import LEAST, PAPER, Embedding, embed, write_embeddings
from anomaly_clip.errors import UserError, translated
from anomaly_clip.files import atomic_path, safe_name, write_csv, write_json
from anomaly_clip.methods.base import AnomalyMethod
from anomaly_clip.methods.cnn_method import CNNMethod
from anomaly_clip.methods.linear_probe import LinearProbe
from anomaly_clip.metrics.classification import CLASS_FIGURES
from anomaly_clip.progress import say, track
from anomaly_clip.report.metrics_table import HEADINGS, RANDOM_WARNING, percent, selection_warning
from anomaly_clip.results.folder import create_run_folder

__all__ = ["run_compare"]

SHOWN = ("image_auroc", "pixel_auroc", *CLASS_FIGURES)
"""Figures of the printed table, those of the paper, if there are any; the files have all."""

OPTIONS = "compare.json"
"""What was compared how."""
EMBEDDED, EMBED_BATCH = 2000, 16
"""Test images of a category whose features are drawn at most, and looked at together."""

Metrics = dict[str, Any]


def run_compare(words: Sequence[str]) -> int:
    """Run a method with each backbone and return an exit code: 1 if a category failed.

    Raises:
        UserError: What is wrong, and the way out.
    """
    parser = argparse.ArgumentParser(
        prog="anomaly_clip compare",
        usage="anomaly_clip compare --weights FIRST SECOND [...] --config FILE [options of each]",
        description="Fit and test a detector with the weights of several backbones: files, or the "
        "words imagenet and random. Differences are to the first.",
        allow_abbrev=False,
    )
    parser.add_argument("--weights", nargs="+", required=True, help="two or more")
    parser.add_argument("--folder", type=Path, help="where to; one that exists is gone on with")
    parser.add_argument("--pictures", type=int, default=4, help="images a category that are drawn")
    parser.add_argument(
        "--embedding",
        metavar="LAYER",
        help="also draw the test images' features of a layer by t-SNE, as layer3 or pooled",
    )
    asked, rest = parser.parse_known_args(list(words[1:]))
    labels = [Path(weights).stem for weights in asked.weights]
    if len(labels) < 2:
        raise UserError("compare --weights: give two or more, as imagenet tab_resnet18.safetensors")
    if len(set(labels)) < len(labels):
        raise UserError(f"compare --weights: two are called {_twice(labels)}: rename one file")
    folder = asked.folder or create_run_folder(Path("runs"), "compare")
    known = _known(folder, dict(zip(labels, asked.weights, strict=True)), rest)
    try:
        for label, weights in zip(labels, asked.weights, strict=True):
            if not (folder / label / "config-each.yaml").is_file():
                _check(label, weights, rest, folder, asked.embedding)
    except Exception:
        with contextlib.suppress(OSError):  # it does not exist, or holds results
            folder.rmdir()
        raise
    write_json(folder / OPTIONS, known)
    code = 0
    for label, weights in zip(labels, asked.weights, strict=True):
        own = folder / label
        line = ["--resume", str(own)] if (own / "config-each.yaml").is_file() else [
            *rest, "--model.backbone.weights", weights, "--output.folder", str(own)
        ]  # fmt: skip
        say(f"compare {label}")
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                code = max(code, run_each(["each", *line]))
        except UserError:
            with contextlib.suppress(OSError):  # it does not exist, or holds results
                folder.rmdir()
            raise
    found = {label: _metrics(folder / label) for label in labels}
    common = [name for name in found[labels[0]]["categories"] if _everywhere(found, name)]
    if not common:
        raise UserError(f"{folder}: no category was finished with all weights")
    _write(folder, found, common)
    table, console = _table(found, common), Console()
    if not console.is_terminal:  # a file's lines are as long as they must be
        console.width = max(console.width, console.measure(table).maximum)
    console.print(table)
    with translated():
        for category in track(common, "drawing pictures"):
            _draw(folder, labels, category, asked.pictures)
        if asked.embedding:
            _embed(folder, labels, common, asked.embedding)
    say(f"results: {folder}")
    return code


def _known(folder: Path, weights: dict[str, str], rest: Sequence[str]) -> dict[str, Any]:
    """Return what is compared how, beside what the folder holds already.

    Raises:
        UserError: If that was compared otherwise.
    """
    full = {
        label: str(Path(file).resolve()) if Path(file).is_file() else file
        for label, file in weights.items()
    }
    if not (folder / OPTIONS).is_file():
        return {"weights": full, "options": list(rest)}
    before = json.loads((folder / OPTIONS).read_text(encoding="utf-8"))
    other = [label for label, file in full.items() if before["weights"].get(label, file) != file]
    if other or before["options"] != list(rest):
        what = f"{other[0]} was {before['weights'][other[0]]}" if other else "options were others"
        raise UserError(f"--folder {folder} holds another comparison ({what}): give another folder")
    return {"weights": {**before["weights"], **full}, "options": list(rest)}


def _check(label: str, weights: str, rest: Sequence[str], folder: Path, layer: str | None) -> None:
    """Build what will be run, before hours are spent on what comes first.

    Raises:
        UserError: If it cannot be built.
    """
    own = ["--model.backbone.weights", weights, "--output.folder", str(folder / label)]
    quieten()
    with translated(known_options):
        plan = Plan(args=arrange(["fit", *rest, *own]))
        plan.writer.abandon()
        _ = plan.datamodule.categories
        method = plan.model
        backbone = method.asked_backbone if isinstance(method, (CNNMethod, LinearProbe)) else None
        if layer and backbone is not None:
            CNNBackbone(backbone.name, backbone.weights, [layer])


def _twice(names: Sequence[str]) -> str:
    return next(name for name in names if names.count(name) > 1)


def _metrics(folder: Path) -> Metrics:
    file = folder / "metrics.json"
    if not file.is_file():
        raise UserError(f"{folder}: nothing could be tested there")
    metrics: Metrics = json.loads(file.read_text(encoding="utf-8"))
    return metrics


def _everywhere(found: dict[str, Metrics], category: str) -> bool:
    return all(category in metrics["categories"] for metrics in found.values())


def _figures(found: dict[str, Metrics]) -> list[str]:
    """Return which figures there are."""
    return list(next(iter(found.values()))["mean"])


def _rows(found: dict[str, Metrics], common: Sequence[str]) -> dict[str, dict[str, Metrics]]:
    """Return figures by category, and of their mean, and label; the mean is over ``common``."""
    rows: dict[str, dict[str, Metrics]] = {
        name: {label: metrics["categories"][name] for label, metrics in found.items()}
        for name in common
    }
    rows["mean"] = {label: {} for label in found}
    for label in found:
        for figure in _figures(found):
            values = [rows[name][label][figure] for name in common]
            known = [value for value in values if value is not None]
            rows["mean"][label][figure] = sum(known) / len(known) if known else None
    return rows


def _write(folder: Path, found: dict[str, Metrics], common: Sequence[str]) -> None:
    """Write all figures: one line a category and backbone, and all as JSON."""
    rows, names = _rows(found, common), _figures(found)
    lines = (
        [name, label, *(figures[figure] for figure in names)]
        for name, by_label in rows.items()
        for label, figures in by_label.items()
    )
    write_csv(folder / "comparison.csv", ["category", "weights", *names], lines)
    runs = {label: metrics["run"] for label, metrics in found.items()}
    write_json(folder / "comparison.json", {"figures": rows, "runs": runs})


def _table(found: dict[str, Metrics], common: Sequence[str]) -> Table:
    labels = list(found)
    run = found[labels[0]]["run"]
    random = [label for label in labels if found[label]["run"]["weights"]["random"]]
    title = [f"{run['method']} on {run['protocol']['data']}, percent"]
    selected = selection_warning(run["protocol"])
    if selected is not None:
        title.append(selected)
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=0,  # columns are many, and the box sets them apart
        title=Text("\n".join(title)),
        title_style="bold",
        caption=f"{', '.join(random)}: {RANDOM_WARNING}" if random else None,
    )
    table.add_column("category", overflow="fold")
    shown = [figure for figure in SHOWN if figure in _figures(found)]
    for figure in shown:
        heading = HEADINGS.get(figure, figure)
        for label in labels:
            table.add_column(f"{heading}\n{label}", justify="right", overflow="fold")
            if label != labels[0]:
                table.add_column("+/-", justify="right", no_wrap=True)
    for name, by_label in _rows(found, common).items():
        cells: list[str] = []
        for figure in shown:
            first = by_label[labels[0]][figure]
            for label in labels:
                value = by_label[label][figure]
                cells += percent([value])
                if label != labels[0]:
                    known = value is not None and first is not None
                    cells.append(f"{100 * (value - first):+.1f}" if known else "–")
        if name == "mean":
            table.add_section()
        table.add_row(Text(name), *cells, style="bold" if name == "mean" else None)
    return table


def _draw(folder: Path, labels: Sequence[str], category: str, count: int) -> None:
    """Draw some anomalous images of a category: image, a map each, truth."""
    own = safe_name(category)
    runs = [folder / label / own for label in labels]
    if not issubclass(class_of_checkpoint(runs[0] / "checkpoints" / "last.ckpt"), AnomalyMethod):
        return  # there are no maps
    config = yaml.safe_load((runs[0] / "config-test.yaml").read_text(encoding="utf-8"))
    data = _data(config["data"])
    methods = [_method(run / "checkpoints" / "last.ckpt") for run in runs]
    data.image_size = methods[0].image_size
    samples = data.samples("test")
    anomalous = [row for row, sample in enumerate(samples) if sample.label]
    if not anomalous or count < 1:
        return
    places = np.linspace(0, len(anomalous) - 1, min(count, len(anomalous))).round().astype(int)
    chosen = [anomalous[place] for place in places]
    dataset = data.dataset("test")
    items = [dataset[row] for row in chosen]
    images = torch.stack([item["image"] for item in items])
    random = [one for one, method in zip(labels, methods, strict=True) if method.weights["random"]]
    maps = []
    for method in methods:
        method.take_references(data, category)
        with torch.no_grad():
            scores = method.score(images, [category] * len(images))
        if "anomaly_map" not in scores:
            return
        maps.append(_scaled(scores["anomaly_map"].numpy()))
    sheets = [
        draw_panels(
            item["image"].permute(1, 2, 0).numpy(),
            maps[-1][number],
            item["mask"].numpy() if "mask" in item else None,
            (0.0, 1.0),
            f"{samples[chosen[number]].defect}; maps by backbone, each on its own scale",
            f"{', '.join(random)}: {RANDOM_WARNING}" if random else None,
            {label: maps[at][number] for at, label in enumerate(labels[:-1])},
            labels[-1],
        )
        for number, item in enumerate(items)
    ]
    with atomic_path(folder / "pictures" / f"{own}.png") as temporary:
        Image.fromarray(stack_sheets(sheets)).save(temporary)


def _embed(folder: Path, labels: Sequence[str], categories: Sequence[str], layer: str) -> None:
    """Draw where each backbone has the test images of each category; write their silhouettes."""
    silhouettes: dict[str, dict[str, float | None]] = {}
    for category in track(categories, "t-SNE"):
        own = safe_name(category)
        made = [_embedding(folder / label / own, label, layer) for label in labels]
        found = [one for one in made if one is not None]
        if len(found) < len(made):
            say(f"{category}: fewer than {LEAST} test images, too few for t-SNE")
            continue
        write_embeddings(folder / "embeddings", found, own)
        silhouettes[category] = {one.name: one.silhouettes["states"] for one in found}
    write_json(folder / "silhouettes.json", {"layer": layer, "states": silhouettes})
    for label in labels:
        known = [value for row in silhouettes.values() if (value := row[label]) is not None]
        if known:
            say(f"{label}: silhouette of normal and defective in {layer} {np.mean(known):.3f}")


def _embedding(run: Path, label: str, layer: str) -> Embedding | None:
    """Look at the test images of a run with its backbone alone; None if they are too few."""
    config = yaml.safe_load((run / "config-test.yaml").read_text(encoding="utf-8"))
    backbone = config["model"]["init_args"]["backbone"]
    statistics = {name: backbone[name] for name in ("mean", "std") if name in backbone}
    network = CNNBackbone(backbone["name"], backbone["weights"], [layer], **statistics)
    data = _data(config["data"])
    data.image_size = config["model"]["init_args"]["image_size"]
    samples, dataset = data.samples("test"), data.dataset("test")
    if len(samples) < LEAST:
        return None
    rows = np.linspace(0, len(samples) - 1, min(len(samples), EMBEDDED)).round().astype(int)
    parts = []
    for chosen in track(np.array_split(rows, -(-len(rows) // EMBED_BATCH)), "encoding"):
        images = torch.stack([dataset[row]["image"] for row in chosen.tolist()])
        with torch.no_grad():
            parts.append(network(images)[layer].flatten(1).numpy())
    states = [samples[row].label for row in rows]
    shown = [samples[row].category for row in rows]
    some = f" of the {len(samples):,}, evenly chosen" if len(samples) > len(rows) else ""
    say(f"{label}: t-SNE of {len(rows):,} test images{some}")
    return embed(label, np.concatenate(parts), shown, states, layout=PAPER)


def _data(section: dict[str, Any]) -> AnomalyData:
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(AnomalyData, "data", subclass_mode=True)
    data: AnomalyData = parser.instantiate(parser.parse_object({"data": section})).data
    return data


def _method(checkpoint: Path) -> AnomalyMethod:
    method: Any = class_of_checkpoint(checkpoint).load_from_checkpoint(
        checkpoint, map_location="cpu"
    )
    assert isinstance(method, AnomalyMethod)
    return method.eval()


def _scaled(maps: NDArray[np.float32]) -> NDArray[np.float32]:
    """Bring the maps of a method to [0, 1] together."""
    low, high = maps.min(), maps.max()
    scaled: NDArray[np.float32] = (maps - low) / (high - low if high > low else 1.0)
    return scaled
