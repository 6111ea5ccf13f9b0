"""Which recipe makes the defects of a training set, as configurations say it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from anomaly_clip.errors import check_above, check_at_least, check_between
from anomaly_clip.records import Synthetic
from anomaly_clip.synthesis.masks import foreground_of
from anomaly_clip.synthesis.presets import preset
from anomaly_clip.synthesis.recipe import Image, Recipe

__all__ = ["SynthesisSettings", "synthesize"]


@dataclass(frozen=True)
class SynthesisSettings:
    """How normal images become defective ones in training.

    Args:
        recipe: nsa, cutpaste, erasing, perlin; or mixture, of the recipes in ``weights``.
        preset: Published settings: nsa: tab, nsa_mvtec (by class), cutpaste,
            cutpaste_patch, fpi; cutpaste: union,
            tab_cutpaste; erasing: rectangles, tab_mask; perlin: draem, tab_perlin. Default: the
            recipe's first.
        options: Arguments of the recipe that replace those of the preset; of a mixture, those of
            each recipe under its name.
        weights: Of a mixture: how often each recipe is drawn, such as ``{nsa: 0.5, perlin: 0.5}``;
            a preset stands behind a slash: ``{nsa/nsa_mvtec: 1}``.
        mode: pair: each image comes with a defective twin; replace: a share of the images is
            replaced by their defective twins.
        share: Of the images that are replaced.
        foreground: Where defects may be: none: anywhere; auto: on what differs from the border's
            colour (NSA: on objects, as its own object masks do).
        foreground_categories: Which categories have one: objects, not textures; default: all.
        rotated: Share of the images that are turned first, by up to 90 degrees either way, with
            their defects and without (DRAEM: 0.3); not for products whose pose is fixed.
        rotated_categories: Which categories are turned; default: all.
        retries: How often a defect that cannot be seen is drawn again.
    """

    recipe: Literal["nsa", "cutpaste", "erasing", "perlin", "mixture"] = "nsa"
    preset: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, float] | None = None
    mode: Literal["pair", "replace"] = "replace"
    share: float = 0.5
    foreground: Literal["none", "auto"] = "none"
    foreground_categories: list[str] | None = None
    rotated: float = 0.0
    rotated_categories: list[str] | None = None
    retries: int = 10

    def __post_init__(self) -> None:
        if (self.recipe == "mixture") != bool(self.weights):
            raise ValueError(
                f"data.synthesis: recipe {self.recipe} "
                f"{'needs' if self.recipe == 'mixture' else 'takes no'} weights"
            )
        if self.recipe == "mixture" and self.preset:
            raise ValueError(
                "data.synthesis: a mixture names presets behind its recipes, as nsa/tab"
            )
        recipes = {name.partition("/")[0] for name in self.names()}
        odd = sorted(set(self.options) - recipes) if self.recipe == "mixture" else []
        if odd:
            raise ValueError(
                f"data.synthesis.options, {odd[0]}: of a mixture options stand under the name of "
                f"one of its recipes ({', '.join(sorted(recipes))})"
            )
        for name, weight in (self.weights or {}).items():
            check_above(f"data.synthesis.weights, {name}:", weight, 0)
        check_between("data.synthesis.share", self.share, 0, 1)
        check_between("data.synthesis.rotated", self.rotated, 0, 1)
        check_at_least("data.synthesis.retries", self.retries, 0)
        for name in self.names():
            self.build(name, "")  # unknown names and arguments are said before anything is run

    def names(self) -> list[str]:
        """Return the recipes, each with its preset behind a slash if it has one."""
        if self.weights:
            return list(self.weights)
        return [f"{self.recipe}/{self.preset}" if self.preset else self.recipe]

    def build(self, name: str, category: str) -> Recipe:
        """Return one of the recipes for a category."""
        recipe, _, chosen = name.partition("/")
        options = self.options.get(recipe, {}) if self.recipe == "mixture" else self.options
        try:
            return _build(recipe, chosen or None, category, _frozen(options))
        except ValueError as error:
            raise ValueError(f"data.synthesis: {error}") from None


def synthesize(
    settings: SynthesisSettings,
    image: Image,
    category: str,
    rng: np.random.Generator,
    donor: Callable[[], Image],
) -> Synthetic:
    """Make a defect as a configuration says.

    Args:
        settings: Recipe, preset, and the rest.
        image: ``(H, W, 3)``, normal.
        category: What it shows.
        rng: Draws all.
        donor: Returns another normal image of the category, of the same size.

    Returns:
        What the recipe made; if it cannot be seen after all retries, the unchanged image with an
        empty mask, and ``failed`` in its info.
    """
    names = settings.names()
    name = names[0]
    if settings.weights:
        weights = np.array(list(settings.weights.values()))
        name = names[int(rng.choice(len(names), p=weights / weights.sum()))]
    make = settings.build(name, category)
    chosen = settings.foreground_categories
    has_one = settings.foreground == "auto" and (chosen is None or category in chosen)
    foreground = foreground_of(image) if has_one else None
    for _ in range(settings.retries + 1):
        result = make(image, rng, donor, foreground)
        if result.mask.any():
            return result
    nothing = np.zeros(image.shape[:2], bool)
    info = {**result.info, "failed": "no draw can be seen"}
    return Synthetic(image.copy(), nothing, nothing.astype(np.float32), info)


@lru_cache(maxsize=256)
def _build(
    recipe: str, chosen: str | None, category: str, options: tuple[tuple[str, Any], ...]
) -> Recipe:
    return preset(recipe, chosen, category, dict(options))


def _frozen(options: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    def hashable(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return tuple(hashable(element) for element in value)
        return value if value is None or isinstance(value, (int, float, str)) else repr(value)

    return tuple((key, hashable(value)) for key, value in options.items())
