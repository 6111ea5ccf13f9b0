"""Settings of ``data.synthesis``, and synthetic defects generated from them."""

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
    """Settings of the synthetic defects in training images.

    Args:
        recipe: nsa, cutpaste, erasing or perlin; mixture: one of the recipes in ``weights`` at
            random.
        preset: Published settings: nsa: tab, nsa_mvtec (per category), cutpaste, cutpaste_patch,
            fpi; cutpaste: union, tab_cutpaste; erasing: rectangles, tab_mask; perlin: draem,
            tab_perlin. Default: the first preset of the recipe.
        options: Arguments of the recipe that override those of the preset; for a mixture, grouped
            by recipe name.
        weights: Relative frequency of each recipe of a mixture, such as
            ``{nsa: 0.5, perlin: 0.5}``; a preset follows a slash: ``{nsa/nsa_mvtec: 1}``.
        mode: pair: each image comes with a defective version; replace: a fraction of the images is
            replaced by defective versions.
        share: Fraction of the images that are replaced.
        foreground: Region in which defects may lie. none: the whole image; auto: the pixels that
            differ from the colour of the image's border (for NSA, these form the object mask).
        foreground_categories: Categories to which ``foreground`` applies, meant for objects rather
            than textures; default: all.
        rotated: Fraction of the images, with or without a defect, that are first rotated by up to
            90 degrees in either direction (DRAEM: 0.3). Unsuitable for products with a fixed pose.
        rotated_categories: Categories to which ``rotated`` applies; default: all.
        retries: Largest number of further attempts if a defect is invisible.
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
            wrong = (
                "needs weights, such as {nsa: 0.5, perlin: 0.5}"
                if self.recipe == "mixture"
                else "takes no weights: choose recipe mixture, or leave weights out"
            )
            raise ValueError(f"data.synthesis: recipe {self.recipe} {wrong}, got {self.weights}")
        if self.recipe == "mixture" and self.preset:
            raise ValueError(
                f"data.synthesis.preset {self.preset}: the presets of a mixture are part of its "
                f"weights, such as {{nsa/{self.preset}: 1}}"
            )
        recipes = {name.partition("/")[0] for name in self.names()}
        odd = sorted(set(self.options) - recipes) if self.recipe == "mixture" else []
        if odd:
            raise ValueError(
                f"data.synthesis.options, {odd[0]}: a mixture groups its options by recipe, under "
                f"{', '.join(sorted(recipes))}"
            )
        for name, weight in (self.weights or {}).items():
            check_above(f"data.synthesis.weights, {name}:", weight, 0)
        check_between("data.synthesis.share", self.share, 0, 1)
        check_between("data.synthesis.rotated", self.rotated, 0, 1)
        check_at_least("data.synthesis.retries", self.retries, 0)
        for name in self.names():
            self.build(name, "")  # reports unknown names and arguments before anything runs

    def names(self) -> list[str]:
        """Return the names of the recipes; a recipe with a preset is named ``recipe/preset``."""
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
    """Generate a defect from a configuration.

    Args:
        settings: Recipe, preset and their options.
        image: ``(H, W, 3)``, normal.
        category: Category of the image.
        rng: Source of all random numbers.
        donor: Function that returns another normal image of the same category and size.

    Returns:
        The result of the recipe; if the defect is invisible after all retries, the unchanged image
        with an empty mask and ``failed`` in its info.
    """
    names = settings.names()
    name = names[0]
    if settings.weights:
        weights = np.array(list(settings.weights.values()))
        name = names[int(rng.choice(len(names), p=weights / weights.sum()))]
    make = settings.build(name, category)
    chosen = settings.foreground_categories
    on_object = settings.foreground == "auto" and (chosen is None or category in chosen)
    foreground = foreground_of(image) if on_object else None
    for _ in range(settings.retries + 1):
        result = make(image, rng, donor, foreground)
        if result.mask.any():
            return result
    nothing = np.zeros(image.shape[:2], bool)
    info = {**result.info, "failed": "no visible defect in any try"}
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
