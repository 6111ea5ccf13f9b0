"""All methods of the package in small, for the contract that each of them passes.

python tests/contract_subjects.py    run all checks, and renew the tables in docs/contract.md
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from helpers import SMALL_CLIP
from lightning.pytorch import LightningModule
from probe_runs import wafers

from anomaly_clip import methods
from anomaly_clip.testing import Check, Outcome, check_method, contract_table, run_checks

PAGE = Path(__file__).parent.parent / "docs" / "contract.md"
START = "<!-- Below: python tests/contract_subjects.py -->"
MIDDLE = """\
\\* starts processes of its own or runs several commands; `make contract` runs these, and all
checks of WinCLIP+, MuSc with a CNN, MuSc online, APRIL-GAN 2-shot, and PaDiM and PatchCore with a
ViT. `make test` runs all others.

## All methods

Empty: the check does not apply, such as a fit for a zero-shot method."""

SETTINGS = {"prompts": {"templates": ["a {}.", "the {}."]}}
MOBILENET = {"name": "mobilenet_v3_small", "weights": "random"}
VIT = {"name": "test_vit", "weights": "random"}
RESNET = {"name": "resnet18", "weights": "random"}
SMALL = {"backbone": MOBILENET, "image_size": 64, "sigma": 2.0}
SMALL_VIT = {**SMALL, "backbone": VIT}
CNN = {"backbone": MOBILENET, "image_size": 64}
LAYERS = ["features.0", "features.1", "features.2"]
SCENES = {"num_scenes": 4, "picture_size": 64, "batch_size": 2, "num_workers": 0}


@dataclass(frozen=True)
class Case:
    """A method with small settings and what it is known not to pass.

    Args:
        kind: The method.
        arguments: Arguments of its constructor.
        data: Options of the data module.
        expected_failures: Checks that it does not pass, with the reason.
        half_precision_bound: Largest difference of scores in half precision.
        is_variant: True for further settings of a method, whose checks are all slow.
    """

    kind: type[LightningModule]
    arguments: Mapping[str, Any]
    data: Mapping[str, Any] = field(default_factory=dict)
    expected_failures: Mapping[str, str] = field(default_factory=dict)
    half_precision_bound: float = 0.05
    is_variant: bool = False


def cases() -> dict[str, Case]:
    """Return the cases by name; one class may have several."""
    clip = {"backbone": {"name": _clip(), "pretrained": "random"}}
    return {
        "SDP": Case(methods.SDP, {**clip, **SETTINGS, "rvs": {"method": "mean"}}),
        "WinCLIP": Case(methods.WinCLIP, {**clip, **SETTINGS}),
        "WinCLIP+": Case(methods.WinCLIP, {**clip, **SETTINGS}, {"shots": 2}, is_variant=True),
        "MuSc": Case(methods.MuSc, {**clip, "layers": [2, 4], "r_list": [1, 3]}),
        "MuSc with a CNN": Case(
            methods.MuSc,
            {**CNN, "layers": LAYERS[1:], "k_list": [1, 2]},
            half_precision_bound=0.2,
            is_variant=True,
        ),
        "MuSc online": Case(
            methods.MuSc,
            {**clip, "scoring": "online", "start": 2, "memory": 3},
            expected_failures={
                "order_does_not_matter": "an image is compared with those before it"
            },
            is_variant=True,
        ),
        "SDP+": Case(
            methods.SDPPlus,
            {**clip, **SETTINGS, "rvs": {"method": "mean"}, "lr": 0.01},
            _auxiliary(),
        ),
        "APRIL-GAN": Case(
            methods.APRILGAN,
            {**clip, **SETTINGS, "lr": 0.01},
            _auxiliary(),
            half_precision_bound=0.1,
        ),
        "APRIL-GAN 2-shot": Case(
            methods.APRILGAN,
            {**clip, **SETTINGS, "lr": 0.01},
            {**_auxiliary(), "shots": 2},
            half_precision_bound=0.1,
            is_variant=True,
        ),
        "AnomalyCLIP": Case(
            methods.AnomalyCLIP,
            {**clip, "lr": 0.01, "layers": [2, 4]},
            _auxiliary(),
            half_precision_bound=0.25,
        ),
        "CLIP-ADA": Case(
            methods.CLIPADA,
            {**clip, "feature_layer": 3, "map": {"eval_size": 48, "sigma": 2.0}},
            {"synthesis": {"recipe": "perlin"}},
        ),
        "PaDiM": Case(methods.PaDiM, {**SMALL, "layers": LAYERS[1:], "num_channels": 16}),
        "PatchCore": Case(
            methods.PatchCore, {**SMALL, "layers": LAYERS[1:]}, half_precision_bound=0.15
        ),
        "SubspaceAD": Case(methods.SubspaceAD, {"backbone": VIT, "image_size": 64, "rotations": 2}),
        "AnomalyDINO": Case(methods.AnomalyDINO, {**SMALL_VIT, "rotations": "on"}),
        "BatchedSubspaceAD": Case(
            methods.BatchedSubspaceAD,
            {"backbone": VIT, "image_size": 64, "explained": 0.8},
            half_precision_bound=0.1,
        ),
        "BatchedAnomalyDINO": Case(
            methods.BatchedAnomalyDINO, {**SMALL_VIT, "masks": "on", "mask_threshold": 1.0}
        ),
        "PaDiM with a ViT": Case(
            methods.PaDiM, {**SMALL_VIT, "layers": [2, 4, 6], "num_channels": 16}, is_variant=True
        ),
        "PatchCore with a ViT": Case(
            methods.PatchCore, {**SMALL_VIT, "layers": [3, 5]}, is_variant=True
        ),
        "RD4AD": Case(methods.RD4AD, {**SMALL, "layers": LAYERS}),
        "SimpleNet": Case(
            methods.SimpleNet,
            {**SMALL, "layers": LAYERS[1:], "pretrain_dim": 16, "target_dim": 16, "hidden": 8},
            half_precision_bound=0.3,
        ),
        "RegAD": Case(
            methods.RegAD,
            {**SMALL, "backbone": RESNET, "shots": 2, "rounds": 1},
            {"train_categories": "others"},
        ),
        "linear probe": Case(
            methods.LinearProbe,
            {"backbone": RESNET, "image_size": 32},
            {"class_path": "MixedWM38", "init_args": {"root": _wafers(), "batch_size": 8}},
        ),
        "TAB": Case(
            methods.TAB,
            {"backbone": RESNET, "text": clip["backbone"], "image_size": 64},
            {"synthesis": {"recipe": "nsa", "mode": "pair"}},
        ),
        "contrastive": Case(
            methods.Contrastive,
            {**clip, **SETTINGS},
            {"class_path": "Demo", "init_args": SCENES},
        ),
    }


def checks(slow: bool) -> dict[str, list[Check]]:
    """Return the checks of all methods.

    Args:
        slow: True: checks of ``make contract``. False: those of ``make test``.
    """
    return {
        name: []
        if case.is_variant and not slow
        else check_method(
            case.kind,
            arguments=case.arguments,
            data=case.data,
            expected_failures=case.expected_failures,
            half_precision_bound=case.half_precision_bound,
            slow=None if case.is_variant else slow,
        )
        for name, case in cases().items()
    }


def _auxiliary() -> dict[str, Any]:
    return {"auxiliary": {"class_path": "Demo", "init_args": _demo(batch_size=2)}}


def _demo(**options: Any) -> dict[str, Any]:
    return {
        "num_train": 2,
        "num_test": 4,
        "picture_size": 64,
        "categories": ["oak wood board"],
        **options,
    }


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


@cache
def _clip() -> str:
    file = Path(_folder().name) / "clip.json"
    file.write_text(json.dumps(SMALL_CLIP), encoding="utf-8")
    return str(file)


@cache
def _wafers() -> str:
    return str(wafers(Path(_folder().name) / "wafers", copies=6))


def page(outcomes: Mapping[str, list[Outcome]]) -> str:
    """Return ``docs/contract.md`` with the outcomes of all checks."""
    text = PAGE.read_text(encoding="utf-8")
    head = text[: text.index(START) + len(START)]
    listed = [outcome.check for outcome in next(iter(outcomes.values()))]
    promises = [promise(check) for check in listed]
    parts = [head, "", "| check | promise |", "|---|---|", *promises, "", MIDDLE, bounds(), ""]
    return "\n".join([*parts, contract_table(outcomes), ""])


def promise(check: Check) -> str:
    """Return the row of a check in the table of promises."""
    text = check.description.replace("``", "`")
    return f"| `{check}` | {text}{' *' if check.slow else ''} |"


def bounds() -> str:
    """Return the bounds of half precision that are not the default."""
    default = Case.half_precision_bound
    wider = [
        f"{100 * case.half_precision_bound:.0f} % for {name}"
        for name, case in cases().items()
        if case.half_precision_bound != default
    ]
    return (
        f"Half precision: {100 * default:.0f} % of the range of the scores; {', '.join(wider)}, "
        f"whose scores of these images hardly differ with untrained weights."
    )


def main() -> int:
    """Run all checks of all methods, renew the page and return 1 if a check fails."""
    both = (checks(slow=False), checks(slow=True))
    outcomes = {name: run_checks([c for part in both for c in part[name]]) for name in both[0]}
    PAGE.write_text(page(outcomes), encoding="utf-8")
    bad = [
        f"{name}: {outcome.check}: {outcome.message}"
        for name, column in outcomes.items()
        for outcome in column
        if outcome.status in ("failed", "unexpected pass")
    ]
    print("\n".join(bad) or f"{PAGE}: all checks pass")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
