"""Published settings of the recipes.

``nsa_mvtec`` holds the settings of the NSA authors' code (arXiv 2109.15222) for each category of
MVTec-AD. Presets that begin with ``tab`` are those of TAB (arXiv 2312.09480, ablation in Table 6);
``draem`` is DRAEM's Perlin (arXiv 2108.07610). docs/synthesis.md describes all presets.

The presets differ from the originals in four ways. Textures are pieces of the image itself unless a
folder is given (originally DTD). There are ten augmentations of textures (TAB: eleven). The masks
of CutPaste and erasing leave out invisible changes. Crops, rotations and flips before the defect
are not reproduced.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anomaly_clip.synthesis.cutpaste import CutPaste
from anomaly_clip.synthesis.erasing import Erasing
from anomaly_clip.synthesis.nsa import NSA
from anomaly_clip.synthesis.perlin import Perlin
from anomaly_clip.synthesis.recipe import Recipe

__all__ = ["NSA_CLASSES", "PRESETS", "preset"]

_WHOLE = (0.03, 0.40)
_BRIGHT, _DARK = ((200.0, 60.0),), ((20.0, 20.0),)  # background: brightness and tolerance
_OBJECT, _TEXTURE = (0.7, 1.3), (0.5, 2.0)  # scale factors of patches


def _class(
    bounds: tuple[tuple[float, float], tuple[float, float]],
    num_patches: int,
    logistic: tuple[float, float],
    background: tuple[tuple[float, float], ...] = (),
    least_object: float = 0.25,
    resize: tuple[float, float] = _OBJECT,
) -> dict[str, Any]:
    return {
        "bounds": bounds,
        "num_patches": num_patches,
        "logistic": logistic,
        "background": background,
        "least_object": least_object,
        "resize": resize,
    }


_TEXTURES = _class((_WHOLE, _WHOLE), 4, (1 / 3, 7), resize=_TEXTURE)

NSA_CLASSES: dict[str, dict[str, Any]] = {
    "bottle": _class((_WHOLE, _WHOLE), 3, (1 / 12, 24), _BRIGHT, 0.7),
    "cable": _class(((0.05, 0.40), (0.05, 0.40)), 3, (1 / 12, 24)),
    "capsule": _class(((0.03, 0.15), _WHOLE), 3, (1 / 2, 4), _BRIGHT, 0.7),
    "hazelnut": _class(((0.03, 0.35), (0.03, 0.35)), 3, (1 / 12, 24), _DARK, 0.7),
    "metal_nut": _class((_WHOLE, _WHOLE), 3, (1 / 3, 7), _DARK, 0.5),
    "pill": _class(((0.03, 0.20), _WHOLE), 3, (1 / 3, 7), _DARK, 0.7),
    "screw": _class(((0.03, 0.12), (0.03, 0.12)), 4, (1, 3), _BRIGHT, 0.5),
    "toothbrush": _class((_WHOLE, (0.03, 0.20)), 3, (1 / 6, 15), _DARK, 0.25),
    "transistor": _class((_WHOLE, _WHOLE), 3, (1 / 6, 15)),
    "zipper": _class((_WHOLE, (0.03, 0.20)), 4, (1 / 6, 15), _BRIGHT, 0.7),
    "carpet": _TEXTURES,
    "grid": _TEXTURES,
    "leather": _TEXTURES,
    "tile": _TEXTURES,
    "wood": {**_TEXTURES, "logistic": (1 / 6, 15)},
}
"""Settings of the NSA authors per category of MVTec-AD; ``bounds`` has height before width."""

NSA_TAB = {
    "bounds": ((0.05, 0.20), (0.05, 0.20)),
    "gamma": (2.0, 0.07, 0.05),
    "num_patches": 1,
    "resize": (0.7, 1.3),
    "mode": "mix",
    "logistic": (1 / 6, 20.0),
}

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "nsa": {
        "tab": NSA_TAB,
        "nsa_mvtec": {},  # NSA_CLASSES by category; NSA_TAB for all others
        "cutpaste": {"mode": "swap", "same": True, "resize": None, "label": "binary"},
        "cutpaste_patch": {
            "mode": "swap",
            "same": True,
            "resize": None,
            "label": "binary",
            "area": (0.02, 0.15),
            "num_patches": 1,
        },
        "fpi": {"mode": "uniform", "shift": False, "resize": None, "label": "continuous"},
    },
    "cutpaste": {
        "union": {},
        "tab_cutpaste": {"kind": "patch", "area": (0.02, 0.09), "aspect": (0.2, 5.0)},
    },
    "erasing": {
        "rectangles": {},
        "tab_mask": {"kind": "cells", "grid": 14, "groups": 52, "fill": "black"},
    },
    "perlin": {
        "draem": {},
        "tab_perlin": {"threshold": 0.65, "num_changes": 5},
    },
}
"""Arguments by recipe and preset; the first preset of a recipe is its default."""

RECIPES: Mapping[str, type[Recipe]] = {
    "nsa": NSA,
    "cutpaste": CutPaste,
    "erasing": Erasing,
    "perlin": Perlin,
}


def preset(
    recipe: str, name: str | None = None, category: str = "", options: Mapping[str, Any] = {}
) -> Recipe:
    """Return a recipe with published settings.

    Args:
        recipe: nsa, cutpaste, erasing or perlin.
        name: Name of the preset. Default: the first preset of the recipe.
        category: Category of the images; ``nsa_mvtec`` depends on it.
        options: Arguments of the recipe that override those of the preset.

    Raises:
        ValueError: If recipe, preset or option is unknown; the message lists the known ones.

    Example:
        >>> from anomaly_clip.synthesis.presets import preset
        >>> preset("nsa", "nsa_mvtec", "screw").num_patches
        4
    """
    if recipe not in RECIPES:
        raise ValueError(f"recipe {recipe}: unknown (choose one of {', '.join(RECIPES)})")
    presets = PRESETS[recipe]
    name = name or next(iter(presets))
    if name not in presets:
        raise ValueError(
            f"preset {name}: unknown for {recipe} (choose one of {', '.join(presets)})"
        )
    arguments = dict(presets[name])
    if name == "nsa_mvtec":
        arguments = dict(NSA_CLASSES.get(category, NSA_TAB))
    kind = RECIPES[recipe]
    unknown = sorted(set(options) - set(kind.__dataclass_fields__))
    if unknown:
        raise ValueError(
            f"options: {recipe} has no {unknown[0]} (choose from "
            f"{', '.join(kind.__dataclass_fields__)})"
        )
    return kind(**{**arguments, **options})
