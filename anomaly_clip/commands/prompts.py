"""``anomaly_clip prompts``: the effect of each prompt of a category, for trying out prompts."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, get_args

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from anomaly_clip.backbones.clip import CLIPBackbone, CLIPSettings, unit
from anomaly_clip.backbones.prompts import (
    Method,
    PromptEnsemble,
    RVSSettings,
    check_prompts,
    embed_prompts,
    representative_vector,
)
from anomaly_clip.commands.parsing import parse_words, verb_parser
from anomaly_clip.data.info import DATASETS, dataset_info
from anomaly_clip.data.transforms import resize_image
from anomaly_clip.errors import check_at_least, suggest
from anomaly_clip.files import write_csv
from anomaly_clip.images import read_image
from anomaly_clip.maps import gaussian_blur
from anomaly_clip.methods.sdp import SDP, text_score
from anomaly_clip.progress import show_table, track
from anomaly_clip.records import DEMO
from anomaly_clip.results.warnings import DEMO_REMARK, RANDOM_WARNING

__all__ = ["PromptEffect", "prompt_effects", "run_prompts"]


SHORT_FORMS = (
    *("--model.backbone.", "--model.prompts.", "--model.rvs."),
    *("--model.sigma", "--data.category"),
)
"""Options of experiments that this verb has without the section; both forms are accepted."""


class PromptEffect(NamedTuple):
    """Effect of one prompt on the scores."""

    abnormal: bool
    sentence: str
    typical: float
    """Cosine similarity to the representative vector of its class."""
    similarity: float | None = None
    """Cosine similarity to the image, if one is given."""
    text_effect: float | None = None
    """Contribution of the prompt to r0, the probability that the image is abnormal."""
    map_effect: float | None = None
    """Contribution of the prompt to r1, the maximum of the image's map."""


def run_prompts(words: Sequence[str]) -> int:
    """Show the prompts of the category given on the command line and return an exit code.

    Raises:
        UserError: If the command line is invalid or the image cannot be read.
    """
    parser = verb_parser(
        "prompts",
        "Show the effect of each prompt of a category: the angle between the normal and the "
        "abnormal prompts, how typical each prompt is and, with an image, how much it adds to "
        "the scores.",
    )
    parser.add_argument(
        "--category", type=str, required=True, help='category name, such as "laser-cut plank"'
    )
    parser.add_argument("--image", type=str, help="image to compare the prompts with")
    parser.add_argument(
        "--data_set",
        type=str,
        help="data set that auto settings depend on, such as VisA",
    )
    parser.add_argument(
        "--sigma",
        type=float,
        default=8.0,
        help="standard deviation of the map's Gaussian blur in pixels, as in SDP",
    )
    parser.add_argument("--top", type=int, default=10, help="number of prompts shown per class")
    parser.add_argument("--file", type=str, help="write all prompts to this .csv file")
    parser.add_class_arguments(CLIPSettings, "backbone")
    parser.add_class_arguments(PromptEnsemble, "prompts")
    parser.add_class_arguments(RVSSettings, "rvs")
    with parse_words(parser, [_short(word) for word in words]) as config:
        check_at_least("--top", config.top, 1)
        if config.data_set is not None and config.data_set not in DATASETS:
            raise ValueError(
                f"--data_set {config.data_set}: unknown, {suggest(config.data_set, DATASETS)}"
            )
        if not config.category.strip():
            raise ValueError(
                f"--category {config.category!r} is empty: give a category name, such as "
                '"laser-cut plank"'
            )
        if config.image is not None and not Path(config.image).is_file():
            raise ValueError(f"--image {config.image}: there is no such file; correct the path")
        settings = parser.instantiate(config)
        image = None if config.image is None else read_image(Path(config.image))
        torch.manual_seed(0)  # random weights, if requested, are the same every time
        sdp = SDP(settings.backbone, settings.prompts, settings.rvs, sigma=config.sigma)
        pixels = None
        if image is not None:
            small = resize_image(image, sdp.image_size).copy()
            pixels = torch.from_numpy(small).permute(2, 0, 1)[None]
        category = dataset_info(config.data_set).words.get(config.category, config.category)
        rows, distances = prompt_effects(sdp, category, pixels, config.data_set)
        if config.file is not None:
            table = ([int(row.abnormal), *row[1:]] for row in rows)
            write_csv(Path(config.file), PromptEffect._fields, table)
    show(rows, distances, sdp.backbone, category, config.top)
    return 0


def _short(word: str) -> str:
    """Return an option of an experiment as this verb has it, such as ``--backbone.name``."""
    name, equals, value = word.partition("=")
    for long in SHORT_FORMS:
        if name == long or (long.endswith(".") and name.startswith(long)):
            return f"--{name.removeprefix('--').partition('.')[2]}{equals}{value}"
    return word


@torch.no_grad()
def prompt_effects(
    sdp: SDP, category: str, pixels: Tensor | None = None, dataset_name: str | None = None
) -> tuple[list[PromptEffect], dict[str, float]]:
    """Compute the effect of each prompt of a category.

    Args:
        sdp: The detector with the prompts.
        category: Category name to insert into the prompts.
        pixels: uint8 ``(1, 3, S, S)``, an image of the category.
        dataset_name: Data set that ``auto`` settings depend on.

    Returns:
        One row per prompt, and for each RVS method the angle in degrees between the two
        representative vectors. The effect of a prompt is the score of all prompts minus the score
        of all others.
    """
    lists = sdp.prompts.for_category(category)
    check_prompts(sdp.backbone, category, *lists)
    embedded = [embed_prompts(sdp.backbone, prompts) for prompts in lists]
    distances = {}
    for method in get_args(Method):
        rvs = sdp.rvs if method == sdp.rvs.method else RVSSettings(method)
        normal, abnormal = (_vector(part, rvs, dataset_name) for part in embedded)
        cosine = float((normal @ abnormal).clamp(-1, 1))
        distances[method] = float(torch.rad2deg(torch.arccos(torch.tensor(cosine))))
    vectors = [representative_vector(part, sdp.rvs, dataset_name) for part in embedded]
    whole = None
    if pixels is not None:
        stages, class_token = sdp.encode(pixels)
        projected = [stage.projected for stage in stages]

        def scores(text: Tensor) -> tuple[float, float]:
            maps = gaussian_blur(sdp.upsample(sdp.similarity(projected, text[None])), sdp.sigma)
            return float(text_score(class_token, text[None])), float(maps.max())

        whole = scores(torch.stack(vectors, dim=1))
    rows = []
    places = [(k, number) for k in (0, 1) for number in range(len(lists[k]))]
    for k, number in track(places, "evaluating prompts"):
        part = embedded[k]
        row = PromptEffect(bool(k), lists[k][number], float(part[number] @ vectors[k]))
        if whole is not None:
            row = row._replace(similarity=float(unit(class_token)[0] @ part[number]))
            if len(part) > 1:
                others = torch.cat([part[:number], part[number + 1 :]])
                changed = list(vectors)
                changed[k] = _vector(others, sdp.rvs, dataset_name)
                without = scores(torch.stack(changed, dim=1))
                row = row._replace(
                    text_effect=whole[0] - without[0], map_effect=whole[1] - without[1]
                )
        rows.append(row)
    return rows, distances


def _vector(rows: Tensor, rvs: RVSSettings, dataset_name: str | None) -> Tensor:
    # The call for the vectors in use, outside this function, already warns of "no cluster".
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return representative_vector(rows, rvs, dataset_name)


def show(
    rows: Sequence[PromptEffect],
    distances: dict[str, float],
    backbone: CLIPBackbone,
    category: str,
    top: int,
) -> None:
    """Print the angle between normal and abnormal prompts, and the most important prompts."""
    console = Console(highlight=False, soft_wrap=True, markup=False)
    counts = [sum(row.abnormal == k for row in rows) for k in (False, True)]
    console.print(f"{category}: {counts[0]} normal prompts, {counts[1]} abnormal prompts")
    angles = ", ".join(f"{name} {angle:.2f}" for name, angle in distances.items())
    console.print(f"angle between the representative vectors in degrees: {angles}")
    with_image = rows[0].similarity is not None
    for abnormal in (False, True):
        class_rows = [row for row in rows if row.abnormal == abnormal]
        key = (lambda row: -abs(row.map_effect or 0)) if with_image else (lambda row: row.typical)
        title = "abnormal" if abnormal else "normal"
        title += ", largest effect on the map first" if with_image else ", least typical first"
        table = Table(box=box.SIMPLE_HEAD, title=Text(title))
        table.add_column("prompt", overflow="fold")
        headings = ["typical", *(["similarity", "on r0", "on r1"] if with_image else [])]
        for heading in headings:
            table.add_column(heading, justify="right", no_wrap=True)
        for row in sorted(class_rows, key=key)[:top]:
            cells = [f"{row.typical:.4f}"]
            if with_image:
                cells.append(f"{row.similarity:.4f}")
                cells += ["–" if v is None else f"{v:+.1e}" for v in row[4:]]
            table.add_row(Text(row.sentence), *cells)
        show_table(table, console)
    if backbone.is_random:
        console.print(RANDOM_WARNING, style="bold red")
    elif backbone.settings.pretrained == DEMO:
        console.print(DEMO_REMARK, style="italic")
