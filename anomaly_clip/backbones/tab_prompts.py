"""Prompts with which TAB aligns images: industrial association (IDPA) and the ablation variants.

TAB (arXiv 2312.09480), see ``docs/howto/prompts.md``. The lists, their order and their spelling are
those of the authors' public code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from anomaly_clip.backbones.clip import unit

__all__ = ["PROMPT_SETS", "TABPrompts", "TextMatrices", "text_matrices"]

PromptSet = Literal[
    "one_class", "two_class", "state_ensemble", "clip_template", "idpa", "first_release"
]


class Words(NamedTuple):
    """States and templates, each with the placeholder ``{}``."""

    normal: tuple[str, ...]
    abnormal: tuple[str, ...]
    templates: tuple[str, ...] = ("{}",)


_STATES_NORMAL = (
    "good {}",
    "normal {}",
    "perfect {}",
    "unblemished {}",
    "{} without flaw",
    "{} without defect",
    "{} without damaged",
)
_STATES_ABNORMAL = (
    "not good {}",
    "abnormal {}",
    "imperfect {}",
    "blemished {}",
    "{} with flaw",
    "{} with defect",
    "{} with damage",
)
_INDUSTRIAL = (
    "a photo of a {}.",
    "a photo of the {}.",
    "a photo of a rotated {}.",
    "a photo of the rotated {}.",
    "a cropped photo of a {}.",
    "a cropped photo of the {}.",
    "a manufacturing photo of a {}.",
    "a manufacturing photo of the {}.",
    "an industrial photo of a {}.",
    "an industrial photo of the {}.",
    "a close-up photo of a {}.",
    "a close-up photo of the {}.",
    "a close-up industrial image of a {}",
    "a close-up industrial image of the {}",
    "a bright industrial image of a {}",
    "a bright industrial image of the {}",
    "a dark industrial image of the {}",
    "a dark industrial image of a {}",
    "a jpeg corrupted industrial image of a {}",
    "a jpeg corrupted industrial image of the {}",
    "a blurry industrial image of the {}",
    "a blurry industrial image of a {}",
    "an industrial image of a {}",
    "an industrial image of the {}",
    "an industrial image of a small {}",
    "an industrial image of the small {}",
    "an industrial image of a large {}",
    "an industrial image of the large {}",
    "an industrial image of the {} for visual inspection",
    "an industrial image of a {} for visual inspection",
    "an industrial image of the {} for anomaly detection",
    "an industrial image of a {} for anomaly detection",
)
_CLIP = (
    "a photo of a {}.",
    "a photo of the {}.",
    "a photo of a rotated {}.",
    "a photo of the rotated {}.",
    "a rotated photo of a {}.",
    "a rotated photo of the {}.",
    "a flipped photo of a {}.",
    "a flipped photo of the {}.",
    "a cropped photo of a {}.",
    "a cropped photo of the {}.",
    "a close-up photo of a {}.",
    "a close-up photo of the {}.",
    "a bad photo of a {}.",
    "a low resolution photo of the {}.",
    "a bad photo of the {}.",
    "a bright photo of a {}.",
    "a dark photo of the {}.",
    "a photo of my {}.",
    "a black and white photo of the {}.",
    "a bright photo of the {}.",
    "a jpeg corrupted photo of a {}.",
    "a blurry photo of the {}.",
    "a photo of the {}.",  # repeated, which doubles its weight
    "a good photo of the {}.",
    "a photo of one {}.",
    "a black and white photo of a {}.",
    "a dark photo of a {}.",
    "a photo of a cool {}.",
    "a photo of the cool {}.",
    "a photo of a small {}.",
    "a photo of the small {}.",
    "a photo of a big {}.",
    "a photo of the big {}.",
    "there is a {} in the scene.",
    "there is the {} in the scene.",
    "this is a {} in the scene.",
    "this is the {} in the scene.",
    "this is one {} in the scene.",
)
_FIRST_NORMAL = (
    "flawless {}",
    "perfect {}",
    "unblemished {}",
    "{} without flaw",
    "{} without defect",
    "{} without damaged",
)
_FIRST_ABNORMAL = (
    "damaged {}",
    "broken {}",
    "{} with flaw",
    "{} with defect",
    "{} with distortion",
    "{} with broken parts",
)
_SIDES = ("left", "right", "top", "bottom", "center", "corner")
POSITIONS = tuple(f"{{}} which defect is on the {side} of it" for side in _SIDES)

PROMPT_SETS: dict[PromptSet, Words] = {
    "one_class": Words(("normal {}.",), ()),
    "two_class": Words(("normal {}.",), ("defect {}.",)),
    "state_ensemble": Words(_STATES_NORMAL, _STATES_ABNORMAL),
    "clip_template": Words(_STATES_NORMAL, _STATES_ABNORMAL, _CLIP),
    "idpa": Words(_STATES_NORMAL, _STATES_ABNORMAL, _INDUSTRIAL),
    "first_release": Words(_FIRST_NORMAL, _FIRST_ABNORMAL, _CLIP),
}
"""Rows of Table 8 of the paper (one_class to idpa), and the lists of the code's first release."""


@dataclass(frozen=True)
class TABPrompts:
    """Prompts of a class, and the reduction of their embeddings to one vector.

    Args:
        preset: Published lists of states and templates: idpa (the method); one_class, two_class,
            state_ensemble or clip_template (ablations in Table 8; one_class has no abnormal
            prompts); first_release (first release of the authors' code).
        positions: Add the position of the defect to abnormal prompts (exploratory in the authors'
            code).
        normalize_sentences: Scale the embedding of each prompt to unit length before averaging.
        names: space: underscores in class names become spaces; keep: names are unchanged, as in
            the authors' code.
        text_layout: transpose: the layout of the paper; official_reshape: the result of a bug in
            the authors' code, which scrambles classes and channels. The published weights were
            probably trained with this bug.
        centered: Mean that is subtracted from the text features. no: none; all: one mean over all
            classes and both states; sides: for each state, the mean over all classes. This is our
            addition, in neither the paper nor the authors' code, for text towers whose embeddings
            are too similar to tell classes apart.
    """

    preset: PromptSet = "idpa"
    positions: bool = False
    normalize_sentences: bool = True
    names: Literal["space", "keep"] = "space"
    text_layout: Literal["transpose", "official_reshape"] = "transpose"
    centered: Literal["no", "sides", "all"] = "no"

    def for_category(self, name: str) -> tuple[list[str], list[str]]:
        """Return the normal and the abnormal prompts of a class, ordered by state.

        Example:
            >>> from anomaly_clip.backbones.tab_prompts import TABPrompts
            >>> normal, abnormal = TABPrompts().for_category("metal_nut")
            >>> len(normal), len(abnormal), abnormal[0]
            (224, 224, 'a photo of a not good metal nut.')
        """
        words = PROMPT_SETS[self.preset]
        if self.names == "space":
            name = name.replace("_", " ")
        normal = [state.replace("{}", name) for state in words.normal]
        abnormal = [state.replace("{}", name) for state in words.abnormal]
        if self.positions:
            abnormal = [place.replace("{}", state) for state in abnormal for place in POSITIONS]

        def fill(states: list[str]) -> list[str]:
            return [t.replace("{}", state) for state in states for t in words.templates]

        return fill(normal), fill(abnormal)


class TextMatrices(NamedTuple):
    """Text features, one row per class."""

    normal: Tensor
    """``(K, D)``."""
    abnormal: Tensor | None
    """``(K, D)``; None if there are no abnormal prompts."""


def text_matrices(
    encode: Callable[[Sequence[str]], Tensor], names: Sequence[str], prompts: TABPrompts
) -> TextMatrices:
    """Return the text features that images are aligned with, one row per class.

    Args:
        encode: Function that returns the embeddings ``(M, D)`` of prompts, not normalised.
        names: Names of the classes.
        prompts: Settings of the prompts.
    """

    def vector(texts: list[str]) -> Tensor:
        rows = encode(texts).float()
        if prompts.normalize_sentences:
            rows = unit(rows)
        return unit(rows.mean(dim=0))

    def scrambled(rows: Tensor) -> Tensor:
        return rows.T.reshape(rows.shape) if prompts.text_layout == "official_reshape" else rows

    both = [prompts.for_category(name) for name in names]
    sides = [
        torch.stack([vector(texts) for texts in side])
        for side in zip(*both, strict=True)
        if all(side)
    ]
    if prompts.centered != "no":
        means = [rows.mean(dim=0) for rows in sides]
        if prompts.centered == "all":
            means = [torch.stack(means).mean(dim=0)] * len(sides)
        sides = [unit(rows - mean) for rows, mean in zip(sides, means, strict=True)]
    return TextMatrices(*(scrambled(rows) for rows in sides), *[None] * (2 - len(sides)))
