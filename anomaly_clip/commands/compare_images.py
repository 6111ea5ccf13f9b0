"""Images of ``compare``: maps of all backbones side by side, and t-SNE plots of their features.

Each category gets one sheet of test images with the map of each backbone and the ground truth
(Figure 6 of the TAB paper).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from lightning.pytorch.cli import LightningArgumentParser
from numpy.typing import NDArray
from PIL import Image

from anomaly_clip.backbones.clip import CLIPBackbone
from anomaly_clip.backbones.cnn import CNNBackbone, CNNSettings
from anomaly_clip.backbones.towers import settings_of, tower_of
from anomaly_clip.backbones.vit import ViTBackbone
from anomaly_clip.commands.checkpoint_content import read_checkpoint
from anomaly_clip.commands.experiment import class_of_checkpoint
from anomaly_clip.commands.saved_backbone import changed_backbone
from anomaly_clip.data.dataset import AnomalyData
from anomaly_clip.drawing.draw import save_drawing
from anomaly_clip.drawing.panels import draw_panels, stack_sheets
from anomaly_clip.drawing.tsne import MIN_SAMPLES, TAB_LAYOUT, Embedding, tsne, write_embeddings
from anomaly_clip.files import atomic_path, safe_name, write_json
from anomaly_clip.images import evenly_spaced
from anomaly_clip.maps import resize_maps
from anomaly_clip.methods.base import AnomalyMethod
from anomaly_clip.methods.evaluated import EvaluatedModule
from anomaly_clip.methods.feature_method import FeatureMethod
from anomaly_clip.methods.linear_probe import LinearProbe
from anomaly_clip.methods.musc import CNN_SIZE, MuSc
from anomaly_clip.metric_values import mean_defined
from anomaly_clip.progress import say, track
from anomaly_clip.results.warnings import RANDOM_WARNING

__all__ = ["check_layer", "draw_embeddings", "draw_maps"]

MAX_EMBEDDED = 2000
"""Maximum number of test images per category in a t-SNE plot."""
BATCH_SIZE = 16
POOLED = "pooled"


def check_layer(method: EvaluatedModule, layer: str) -> None:
    """Check that the backbone of a method on features has a layer for t-SNE plots.

    Raises:
        ValueError: If it has none of this name.
    """
    if isinstance(method, LinearProbe) or (
        isinstance(method, FeatureMethod) and isinstance(method.backbone, CNNBackbone)
    ):
        settings = method.backbone_settings
        assert isinstance(settings, CNNSettings)
        CNNBackbone(settings.name, settings.weights, [layer])
    elif isinstance(method, (FeatureMethod, MuSc)) and not isinstance(method.backbone, CNNBackbone):
        _block(method.backbone, layer)


def _block(tower: CLIPBackbone | ViTBackbone, layer: str) -> int | None:
    """Return the number of a transformer's block; None for the pooled features.

    Raises:
        ValueError: If there is no such block.
    """
    if layer == POOLED:
        return None
    quarters = {f"layer{q}": max(1, tower.num_layers * q // 4) for q in (1, 2, 3, 4)}
    number = quarters.get(layer) or (int(layer) if layer.isdecimal() else 0)
    if not 1 <= number <= tower.num_layers:
        raise ValueError(
            f"--embedding {layer}: {tower.settings.name} is a transformer, so give pooled, layer1 "
            f"to layer4 (the ends of its quarters), or the number of a block, 1 to "
            f"{tower.num_layers}"
        )
    return number


def draw_maps(folder: Path, labels: Sequence[str], category: str, count: int) -> None:
    """Draw anomalous images of a category, each next to the map of every backbone and the mask.

    Args:
        folder: Folder of the comparison.
        labels: Names of the backbones, which are also the names of their run folders.
        category: A category that was tested in all runs.
        count: Number of images to draw; 0 for none.
    """
    runs = [folder / label / safe_name(category) for label in labels]
    checkpoints = [run / "checkpoints" / "last.ckpt" for run in runs]
    if not issubclass(class_of_checkpoint(checkpoints[0]), AnomalyMethod):
        return  # the method produces no maps
    config = yaml.safe_load((runs[0] / "config-test.yaml").read_text(encoding="utf-8"))
    data = _build_data(config["data"])
    methods = [_load_method(checkpoint) for checkpoint in checkpoints]
    size = data.image_size = methods[0].image_size
    samples = data.samples("test")
    anomalous = [row for row, sample in enumerate(samples) if sample.label]
    if not anomalous or count < 1:
        return
    rows = [anomalous[place] for place in evenly_spaced(count, len(anomalous))]
    dataset = data.dataset("test")
    items = [dataset[row] for row in rows]
    maps = []
    for method in methods:
        data.image_size = method.image_size  # backbones may differ in it
        resized = data.dataset("test")
        images = torch.stack([resized[row]["image"] for row in rows])
        method.take_references(data, category)
        with torch.no_grad():
            scores = method.score(images, [category] * len(images))
        if "anomaly_map" not in scores:
            return
        maps.append(_scaled(resize_maps(scores["anomaly_map"], (size, size)).numpy()))
    random = [x for x, method in zip(labels, methods, strict=True) if method.weights["random"]]
    warning = f"{', '.join(random)}: {RANDOM_WARNING}" if random else None
    sheets = [
        draw_panels(
            item["image"].permute(1, 2, 0).numpy(),
            maps[-1][number],
            item["mask"].numpy() if "mask" in item else None,
            (0.0, 1.0),
            f"{samples[row].defect}; maps by backbone, each on its own scale",
            warning,
            {
                label: label_maps[number]
                for label, label_maps in zip(labels[:-1], maps, strict=False)
            },
            labels[-1],
        )
        for number, (row, item) in enumerate(zip(rows, items, strict=True))
    ]
    with atomic_path(folder / "pictures" / f"{safe_name(category)}.png") as temporary:
        save_drawing(Image.fromarray(stack_sheets(sheets)), temporary)


def draw_embeddings(
    folder: Path, labels: Sequence[str], categories: Sequence[str], layer: str
) -> None:
    """Plot a t-SNE of each category's test features; write the silhouette scores.

    Args:
        folder: Folder of the comparison.
        labels: Names of the backbones, which are also the names of their run folders.
        categories: Categories that were tested in all runs.
        layer: Layer of the backbone, such as layer3 or pooled.
    """
    silhouettes: dict[str, dict[str, float | None]] = {}
    for category in track(categories, "t-SNE"):
        name = safe_name(category)
        by_label = [_embed_run(folder / label / name, label, layer) for label in labels]
        embeddings = [embedding for embedding in by_label if embedding is not None]
        if len(embeddings) < len(by_label):
            say(f"{category}: fewer than {MIN_SAMPLES} test images, too few for t-SNE")
            continue
        write_embeddings(folder / "embeddings", embeddings, name)
        silhouettes[category] = {e.name: e.silhouettes["states"] for e in embeddings}
    write_json(folder / "silhouettes.json", {"layer": layer, "states": silhouettes})
    for label in labels:
        mean = mean_defined(by_label[label] for by_label in silhouettes.values())
        if mean is not None:
            say(f"{label}: silhouette of normal and defective images in {layer}: {mean:.3f}")


def _embed_run(run: Path, label: str, layer: str) -> Embedding | None:
    """Embed the test images of a run with its backbone; return None if there are too few."""
    config = yaml.safe_load((run / "config-test.yaml").read_text(encoding="utf-8"))
    data = _build_data(config["data"])
    arguments = config["model"]["init_args"]
    encode, data.image_size = _encoder(arguments["backbone"], layer, arguments.get("image_size"))
    samples, dataset = data.samples("test"), data.dataset("test")
    if len(samples) < MIN_SAMPLES:
        return None
    rows = evenly_spaced(MAX_EMBEDDED, len(samples))
    parts = []
    for batch in track(np.array_split(rows, -(-len(rows) // BATCH_SIZE)), "encoding"):
        images = torch.stack([dataset[row]["image"] for row in batch.tolist()])
        with torch.no_grad():
            parts.append(encode(images).flatten(1).float().numpy())  # (B, C * h * w), or (B, C)
    states = [samples[row].label for row in rows]
    categories = [samples[row].category for row in rows]
    part = f" of {len(samples):,}, evenly spaced" if len(samples) > len(rows) else ""
    say(f"{label}: t-SNE of {len(rows):,} test images{part}")
    return tsne(label, np.concatenate(parts), categories, states, layout=TAB_LAYOUT)


def _encoder(
    backbone: dict[str, Any], layer: str, image_size: int | None
) -> tuple[Callable[[torch.Tensor], torch.Tensor], int]:
    """Return a function from images to the features of a layer, and the size of the images."""
    settings = settings_of(backbone)
    if isinstance(settings, CNNSettings):
        network = CNNBackbone.of(replace(settings, layers=[layer]))
        return lambda images: network(images)[layer], image_size or CNN_SIZE
    tower = tower_of(settings, image_size=image_size)
    assert not isinstance(tower, CNNBackbone)
    block = _block(tower, layer)
    if block is None:
        return lambda images: tower.image_vectors(tower(images)[-1]), tower.image_size
    return lambda images: tower.feature_maps(images, [block])[0], tower.image_size


def _build_data(section: dict[str, Any]) -> AnomalyData:
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(AnomalyData, "data", subclass_mode=True)
    data: AnomalyData = parser.instantiate(parser.parse_object({"data": section})).data
    return data


def _load_method(checkpoint: Path) -> AnomalyMethod:
    kind: Any = class_of_checkpoint(checkpoint)
    backbone = changed_backbone(kind, read_checkpoint(checkpoint), None, checkpoint)
    method = kind.load_from_checkpoint(checkpoint, map_location="cpu", **backbone)
    assert isinstance(method, AnomalyMethod)
    return method.eval()


def _scaled(maps: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scale all maps of a method to [0, 1] with a common minimum and maximum."""
    low, high = maps.min(), maps.max()
    scaled: NDArray[np.float32] = (maps - low) / (high - low if high > low else 1.0)
    return scaled
