"""Captions of generated images, with the claims that decide which images they match."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from anomaly_clip.backbones.prompts import PromptEnsemble
from anomaly_clip.demo.photographs import DEFECTS, NAME_OF_WORDS

__all__ = ["Caption", "Captions", "ImageLabels"]

PLAIN_NOUNS = ("object", "surface", "product", "part", "material", "item")
TONES = ("bright", "dark", "blurry")  # as in the template "a dark photo of a {}."


class ImageLabels(NamedTuple):
    """Labels of an image."""

    category: str
    defect: str | None  # None: normal
    tone: str | None  # one of TONES, or None


class Caption(NamedTuple):
    """A caption and its claims about an image; None stands for no claim."""

    text: str
    abnormal: bool
    category: str | None
    defect: str | None
    tone: str | None

    def fits(self, image: ImageLabels) -> bool:
        """Return whether all claims are true of an image."""
        return (
            self.abnormal == (image.defect is not None)
            and self.category in (None, image.category)
            and self.defect in (None, image.defect)
            and self.tone in (None, image.tone)
        )


class Captions:
    """Random captions that match images.

    In three captions of ten, the noun consists of one or two random words of the vocabulary, so
    that the name of an unknown object does not change the meaning of its state. Words that occur
    in states or tones are never drawn.

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
            raise ValueError(
                f"model.prompts.templates {prompts.templates}: every template has one of the words "
                f"{', '.join(TONES)}; add a template without these words"
            )
        if not self.general:
            raise ValueError(
                f"model.prompts.states_abnormal {list(prompts.states_abnormal)}: every state names "
                f"a kind of defect; add a state that does not, such as 'damaged {{}}'"
            )

    def draw(self, image: ImageLabels, rng: np.random.Generator) -> Caption:
        """Return a random caption that matches an image."""
        noun, category = self._noun(image.category, rng)
        state, defect = self._state(image.defect, rng)
        tone = image.tone if rng.random() < 0.7 else None
        templates = self.templates[tone] or self.templates[None]
        words = state.replace("{}", noun)
        text = templates[rng.integers(len(templates))].replace("{}", words)
        return Caption(text, image.defect is not None, category, defect, tone)

    def same(self, category: str, count: int, rng: np.random.Generator) -> list[str]:
        """Return random normal prompts of any tone, all with the same noun."""
        noun, _ = self._noun(category, rng)
        normal, _ = self.prompts.for_category(noun)
        return [normal[number] for number in rng.integers(len(normal), size=count)]

    def lasting(self) -> list[str]:
        """Return texts that together contain every caption word except those of random nouns."""
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
        with_defect = [state for state in self.prompts.states_abnormal if defect in state]
        if with_defect and rng.random() < 0.5:
            return with_defect[rng.integers(len(with_defect))], defect
        return self.general[rng.integers(len(self.general))], None

    @cached_property
    def general(self) -> list[str]:
        """Abnormal states that name no kind of defect."""
        states = self.prompts.states_abnormal
        return [state for state in states if not any(defect in state for defect in DEFECTS)]
