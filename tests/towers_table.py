"""Table of methods and backbones: what runs where, and why not elsewhere.

python tests/towers_table.py    build all pairs, and renew the table in docs/towers.md
"""

from __future__ import annotations

import inspect
import json
import re
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from contract_subjects import cases
from helpers import SMALL_CLIP
from timm_clips import write_config, write_tokenizer

from anomaly_clip import methods
from anomaly_clip.backbones.clip import CLIPSettings
from anomaly_clip.backbones.towers import AnyBackbone, BackboneSettings, tower_of
from anomaly_clip.records import RANDOM
from anomaly_clip.testing.subject import Subject

PAGE = Path(__file__).parent.parent / "docs" / "towers.md"
START = "<!-- table: towers -->"
END = "<!-- end of the table: towers -->"
PLAIN = "plain zero-shot"
ALIASES = ("CLIP-ADA", "contrastive training")
"""Names of methods in messages that are not those of their classes."""


@dataclass(frozen=True)
class Tower:
    """A backbone with random weights, small where there is a small one of its kind.

    Args:
        kind: Heading of its column.
        example: Names of models of this kind.
        settings: Choice of the backbone.
        image_size: Side of the images, in pixels.
        layers: Spatial layers, finest first, of a CNN that has other layers than a ResNet.
    """

    kind: str
    example: str
    settings: BackboneSettings | CLIPSettings
    image_size: int
    layers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """Result of building a method with a backbone.

    Args:
        runs: Whether the method takes the backbone.
        message: The reason why not, or the reason why layers must be named; else empty.
        arguments: Arguments with which the method takes the backbone.
    """

    runs: bool
    message: str
    arguments: Mapping[str, Any]


@cache
def folder() -> Path:
    """Return a temporary folder, which is removed when the program ends."""
    kept.append(tempfile.TemporaryDirectory())
    return Path(kept[-1].name)


kept: list[tempfile.TemporaryDirectory[str]] = []


@cache
def towers() -> dict[str, Tower]:
    """Return one backbone of each kind, by kind."""
    squeezenet = ("features.4", "features.7", "features.10")
    small = folder() / "clip.json"
    small.write_text(json.dumps(SMALL_CLIP), encoding="utf-8")
    siglip = write_config(folder(), "siglip", write_tokenizer(folder() / "tokenizer"))
    clips = {
        "SigLIP": ("`ViT-B-16-SigLIP2`", siglip, 32),
        "MobileCLIP-B": ("`MobileCLIP2-B`", write_config(folder(), "mobileclip_b"), 32),
        "PE-Core": ("`PE-Core-S-16-384`", write_config(folder(), "pe_core"), 32),
        "MobileCLIP-S": ("`MobileCLIP2-S0`", write_config(folder(), "mobileclip_s"), 64),
    }
    listed = [
        Tower("ResNet", "`resnet18`", _weights("resnet18"), 64),
        Tower("other CNN", "`squeezenet1_1`", _weights("squeezenet1_1"), 68, squeezenet),
        Tower("ViT", "`vit_tiny_patch16_224`", _weights("test_vit"), 64),
        Tower("no class token", "`test_vit2`", _weights("test_vit2"), 64),
        Tower(
            "DINOv2",
            "`vit_small_patch14_reg4_dinov2`",
            _weights("vit_small_patch14_reg4_dinov2"),
            56,
        ),
        Tower("DINOv3", "`vit_small_patch16_dinov3`", _weights("vit_small_patch16_dinov3"), 64),
        Tower("CLIP", "`ViT-B-16`, `demo`", CLIPSettings(str(small), RANDOM), 48),
        *(
            Tower(kind, example, CLIPSettings(name, RANDOM), size)
            for kind, (example, name, size) in clips.items()
        ),
    ]
    return {tower.kind: tower for tower in listed}


def _weights(name: str) -> BackboneSettings:
    return BackboneSettings(name, RANDOM)


@cache
def ready(kind: str) -> AnyBackbone:
    """Return the backbone of a kind, which all methods share."""
    tower = towers()[kind]
    return tower_of(tower.settings, tower.layers or None, tower.image_size)


@cache
def rows() -> dict[str, tuple[type[Any], dict[str, Any]]]:
    """Return the class of each method, and small arguments without backbone, layers and size."""
    small = {case.kind: dict(case.arguments) for case in reversed(cases().values())}
    listed: dict[str, tuple[type[Any], dict[str, Any]]] = {}
    for name in methods.__all__:
        kind = getattr(methods, name)
        if kind is methods.AnomalyMethod:
            continue
        if kind is methods.SDP:
            options = {"paths": "original", "feature_surgery": False}
            listed[PLAIN] = kind, {**_general(small[kind]), **options}
        listed[name] = kind, _general(small.get(kind, {}))
    return listed


def _general(arguments: Mapping[str, Any]) -> dict[str, Any]:
    special = {"backbone", "layers", "image_size"}
    return {name: value for name, value in arguments.items() if name not in special}


def build(row: str, kind: str) -> Outcome:
    """Build a method with a backbone, from its settings and, if the method takes one, ready."""
    method, given = rows()[row]
    tower = towers()[kind]
    accepted = inspect.signature(method.__init__).parameters
    arguments = {**given, **({"image_size": tower.image_size} if "image_size" in accepted else {})}
    if isinstance(tower.settings, CLIPSettings) and "image_size" not in accepted:
        assert getattr(ready(kind), "image_size", None) == tower.image_size
    message = ""
    choices: list[dict[str, Any]] = [{}]
    if tower.layers and "layers" in accepted:
        choices += [{"layers": list(tower.layers[-n:])} for n in (2, 3, 1)]
    elif tower.layers and method is methods.LinearProbe:
        pooled = {"name": tower.settings.name, "weights": RANDOM, "layers": ["flatten"]}
        choices += [{"backbone": pooled}]
    for choice in choices:
        options = {**arguments, **choice}
        refusal = _refusal(row, kind, options)
        if refusal is None:
            return Outcome(True, message, options)
        message = message or refusal
    # Its layers are no excuse: the reason is that of the layers that it was built with.
    return Outcome(False, refusal if len(choices) > 1 else message, {})  # type: ignore[arg-type]


def _refusal(row: str, kind: str, options: dict[str, Any]) -> str | None:
    """Return the message with which a method refuses a backbone; None if it takes it."""
    method, _ = rows()[row]
    tower = towers()[kind]
    settings = options.get("backbone", tower.settings)
    given = [settings] if method is methods.TAB or "backbone" in options else [ready(kind)]
    if "layers" not in options and "backbone" not in options and tower.layers:
        given = [settings]  # the ready CNN returns no default layers
    messages = []
    for backbone in given:
        try:
            method(**{**options, "backbone": backbone})
        except ValueError as error:
            messages.append(str(error))
    if not messages:
        return None
    if given != [settings]:
        try:
            method(**{**options, "backbone": settings})
        except ValueError as error:
            messages.append(str(error))
    reasons = {_general_message(message, method, tower) for message in messages}
    assert len(reasons) == 1, f"{row} refuses {kind} in two ways: {reasons}"
    return reasons.pop()


def _general_message(message: str, method: type[Any], tower: Tower) -> str:
    """Return a message without the names of the method and of the backbone."""
    for name in (method.__name__, *ALIASES):
        message = re.sub(rf"\b{name}(?= needs| trains|, such as resnet)", "METHOD", message)
    message = message.replace(tower.settings.name, "NAME")
    return re.sub(r"has no \w+;", "has no LAYER;", message)  # which is a default of the method


@cache
def outcomes() -> dict[tuple[str, str], Outcome]:
    """Return the outcome of each method with each backbone."""
    return {(row, kind): build(row, kind) for row in rows() for kind in towers()}


def subject(row: str, kind: str) -> Subject:
    """Return a method with a backbone, which the commands fit and test on a few images."""
    method, _ = rows()[row]
    arguments = dict(build(row, kind).arguments)
    given = asdict(towers()[kind].settings).items()
    arguments.setdefault("backbone", {name: value for name, value in given if value is not None})
    data = next((dict(case.data) for case in cases().values() if case.kind is method), {})
    return Subject.of(method, arguments, data, {"max_epochs": 1}, 0.05)


def table() -> str:
    """Return the table in Markdown, with the reasons as numbered notes."""
    kinds = list(towers())
    notes: dict[str, int] = {}
    lines = [f"| | {' | '.join(kinds)} |", f"|---|{'---|' * len(kinds)}"]
    order = sorted(
        rows(), key=lambda row: (-sum(outcomes()[row, kind].runs for kind in kinds), row)
    )
    for row in order:
        cells = []
        for kind in kinds:
            outcome = outcomes()[row, kind]
            number = notes.setdefault(outcome.message, len(notes) + 1) if outcome.message else None
            mark = "yes" if outcome.runs else "no"
            cells.append(mark if number is None else f"{mark} ({number})")
        lines.append(f"| {row if row == PLAIN else f'`{row}`'} | {' | '.join(cells)} |")
    examples = "; ".join(f"{tower.kind}: {tower.example}" for tower in towers().values())
    listed = [f"{number}. {_escaped(message)}" for message, number in notes.items()]
    legend = f"{PLAIN}: `SDP` with `paths: original` and `feature_surgery: false`"
    return "\n".join([*lines, "", f"Examples: {examples}; {legend}.", "", *listed])


def _escaped(message: str) -> str:
    return message.replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")


def page(text: str) -> str:
    """Return the page with the table between its marks.

    Args:
        text: The page as it is.
    """
    head, _, rest = text.partition(START)
    _, mark, tail = rest.partition(END)
    return f"{head}{START}\n\n{table()}\n\n{END}{tail if mark else rest}"


def main() -> int:
    """Renew the table of the page."""
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
