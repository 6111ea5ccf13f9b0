"""Captions of made-up photographs, with the claims that decide which images they fit."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from anomaly_clip.backbones.prompts import PromptEnsemble
from anomaly_clip.demo.photographs import DEFECTS, NAME_OF_WORDS

__all__ = ["Caption", "Captions", "ImageLabels"]

PLAIN_NOUNS = ("object", "surface", "product", "part", "material", "item")
TONES = ("bright", "dark", "blurry")  # of templates: "a dark photo of a {}."


class ImageLabels(NamedTuple):
    """Labels of an image."""

    category: str
    defect: str | None  # None: normal
    tone: str | None  # one of TONES, if it has one


class Caption(NamedTuple):
    """A sentence and what it claims; None claims nothing."""

    sentence: str
    abnormal: bool
    category: str | None
    defect: str | None
    tone: str | None

    def fits(self, picture: ImageLabels) -> bool:
        """Whether all that is claimed is true."""
        return (
            self.abnormal == (picture.defect is not None)
            and self.category in (None, picture.category)
            and self.defect in (None, picture.defect)
            and self.tone in (None, picture.tone)
        )


class Captions:
    """Draws sentences that fit pictures.

    Three of ten nouns are one or two words of the vocabulary, whatever they mean: the word for an
    unknown object must not change what is said of it. Words of the states are none of them.

    Args:
        prompts: States and templates.
        vocabulary: Words for random nouns.
    """

    def __init__(self, prompts: PromptEnsemble, vocabulary: Sequence[str]) -> None:
        self.prompts = prompts
        states = " ".join((*prompts.states_normal, *prompts.states_abnormal, *DEFECTS)).split()
        self.vocabulary = [word for word in vocabulary if word not in (*states, *TONES)]
        self.templates: dict[str | None, list[str]] = {tone: [] for tone in (*TONES, None)}
        for template in prompts.as_lists()["templates"]:
            tones = [tone for tone in TONES if tone in template]
            self.templates[tones[0] if tones else None].append(template)
        if not self.templates[None]:
            raise ValueError(f"prompts.templates: none is without one of {', '.join(TONES)}")
        if not self.general:
            raise ValueError("prompts.states_abnormal: every one names a kind of defect")

    def draw(self, picture: ImageLabels, rng: np.random.Generator) -> Caption:
        """Draw a sentence that fits a picture."""
        noun, category = self._noun(picture.category, rng)
        state, defect = self._state(picture.defect, rng)
        tone = picture.tone if rng.random() < 0.7 else None
        templates = self.templates[tone] or self.templates[None]
        words = state.replace("{}", noun)
        sentence = templates[rng.integers(len(templates))].replace("{}", words)
        return Caption(sentence, picture.defect is not None, category, defect, tone)

    def same(self, category: str, count: int, rng: np.random.Generator) -> list[str]:
        """Draw sentences for normal, of any tone, about one noun."""
        noun, _ = self._noun(category, rng)
        normal, _ = self.prompts.sentences(noun)
        return [normal[number] for number in rng.integers(len(normal), size=count)]

    def lasting(self) -> list[str]:
        """Return lines that hold, together, every word but those of random nouns."""
        lines = [line for lines in self.prompts.as_lists().values() for line in lines]
        return [
            *(line.replace("{}", PLAIN_NOUNS[0]) for line in lines),
            *PLAIN_NOUNS,
            *NAME_OF_WORDS,
        ]

    def _noun(self, category: str, rng: np.random.Generator) -> tuple[str, str | None]:
        kind = rng.random()
        if kind < 0.5:
            return category, category
        if kind < 0.7:
            return PLAIN_NOUNS[rng.integers(len(PLAIN_NOUNS))], None
        chosen = rng.integers(len(self.vocabulary), size=rng.integers(1, 3))
        return " ".join(self.vocabulary[number] for number in chosen), None

    def _state(self, defect: str | None, rng: np.random.Generator) -> tuple[str, str | None]:
        if defect is None:
            normal = self.prompts.states_normal
            return normal[rng.integers(len(normal))], None
        of_kind = [state for state in self.prompts.states_abnormal if defect in state]
        if of_kind and rng.random() < 0.5:
            return of_kind[rng.integers(len(of_kind))], defect
        return self.general[rng.integers(len(self.general))], None

    @cached_property
    def general(self) -> list[str]:
        """The abnormal states that name no kind of defect."""
        states = self.prompts.states_abnormal
        return [state for state in states if not any(defect in state for defect in DEFECTS)]
