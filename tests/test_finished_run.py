"""Means of a finished run, and the warnings next to its metrics."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from anomaly_clip.data.info import DATASETS
from anomaly_clip.results.finished_run import FinishedRun, printable

RUN = FinishedRun(
    folder=Path("runs/padim/1"),
    method="PaDiM",
    data="Demo",
    backbone="resnet18",
    pretrained="imagenet",
    random=False,
    categories={"a": {"image_auroc": 0.5, "pixel_ap": None}, "b": {"image_auroc": 0.75}},
    protocol={"data": "Demo"},
)


def test_a_mean_requires_all_categories() -> None:
    assert RUN.mean("image_auroc", ["a", "b"]) == (0.625, 2)
    assert RUN.mean("image_auroc", ["a", "b", "c"]) == (None, 2)
    assert RUN.mean("pixel_ap", ["a"]) == (None, 0)
    assert RUN.metrics == ["image_auroc", "pixel_ap"]


def test_a_run_of_published_categories_is_expected_to_have_them_all() -> None:
    categories = {name: {"image_auroc": 0.5} for name in ("bottle", "screw")}
    run = replace(RUN, data="MVTecAD", categories=categories, failed=("wood",))
    assert run.expected == set(DATASETS["MVTecAD"].counts)
    mixed = replace(run, failed=("mug",))
    assert mixed.expected == {"bottle", "screw", "mug"}


@pytest.mark.parametrize(
    ("changes", "tags"),
    [
        ({}, []),
        ({"random": True}, ["random"]),
        ({"pretrained": "demo"}, ["demo"]),
        ({"provenance": {"text": {"pretrained": "random"}}}, ["random text"]),
        ({"provenance": {"backbone": {"weights": "random"}}}, ["random init"]),
        ({"protocol": {"complete": False, "overlap": 2}}, ["partial", "overlap"]),
        ({"protocol": {"select": "best_test"}}, ["best_test"]),
    ],
)
def test_warnings_by_weights_and_protocol(changes: dict[str, object], tags: list[str]) -> None:
    run = replace(RUN, **changes)  # type: ignore[arg-type]
    assert [tag.short for tag in run.tags] == tags
    assert all(tag.comparable == (tag.short == "best_test") for tag in run.tags)
    assert run.is_stand_in == (tags in (["random"], ["demo"]))


def test_the_warning_of_a_partial_run_counts_its_images() -> None:
    protocol = {"complete": False, "images": {"a": 1000, "b": 234}, "listed": 5000}
    (tag,) = replace(RUN, protocol=protocol).tags
    assert tag.long == "PARTIAL: 1,234 of 5,000 images were scored"


def test_repetitions_of_a_run_differ_only_in_their_seeds() -> None:
    first, second = (
        replace(RUN, seed=n, config={"model": {"init_args": {"seed": n, "sigma": 4}}})
        for n in (0, 1)
    )
    assert first.settings == second.settings
    assert first.seeds != second.seeds
    other = replace(RUN, config={"model": {"init_args": {"seed": 0, "sigma": 8}}})
    assert other.settings != first.settings


def test_control_characters_are_not_printed() -> None:
    assert printable("a\x1b[31m\n") == "a\ufffd[31m\ufffd"
    assert "\x1b" not in replace(RUN, folder=Path("a\x1b"), method="b\x1b").description
