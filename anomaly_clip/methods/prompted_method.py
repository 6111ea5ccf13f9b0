"""Base classes of methods that compare images with the text features of their category."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from anomaly_clip.backbones.prompts import PromptEnsemble, RVSSettings, text_features
from anomaly_clip.constant_tensors import has_values
from anomaly_clip.methods.clip_method import CLIPMethod
from anomaly_clip.metrics.evaluator import EvaluatorSettings
from anomaly_clip.progress import track
from anomaly_clip.records import Scores, UseOfShots

__all__ = ["PromptedMethod", "ReferenceMethod"]

Memory = TypeVar("Memory")


class PromptedMethod(CLIPMethod, ABC):
    """A method whose normal and abnormal prompts contain the name of the category.

    Args:
        prompts: States and templates of the normal and the abnormal prompts; checkpoints store
            them as plain dictionaries.
        rvs: Reduction of the prompts of a class to one vector.
        evaluator: Settings of the metrics.
    """

    uses_category_names: ClassVar[bool] = True
    unit_prompts: ClassVar[bool] = True
    """True if the embeddings of prompts are scaled to unit length before they are averaged."""

    def __init__(
        self,
        prompts: PromptEnsemble | dict[str, Any],
        rvs: RVSSettings | dict[str, Any],
        evaluator: EvaluatorSettings,
    ) -> None:
        super().__init__(evaluator)
        self.prompts = PromptEnsemble(**prompts) if isinstance(prompts, dict) else prompts
        self.rvs = RVSSettings(**rvs) if isinstance(rvs, dict) else rvs
        self._text: dict[tuple[str, RVSSettings], Tensor] = {}
        self._category_text: dict[str, Tensor] = {}

    def prepare(self, categories: list[str]) -> None:
        """Encode the prompts of all categories."""
        for name in categories:
            self.text(name)

    def text(self, category: str, dataset_name: str | None = None) -> Tensor:
        """Return the text features ``(D, 2)`` of a category: normal, abnormal. They are cached.

        Args:
            category: A category of the data set in use.
            dataset_name: Data set that determines ``auto`` settings; default: the evaluated one.
        """
        name, rvs = self.words(category), self.rvs.resolve(dataset_name or self.dataset_name)
        key = name, rvs
        if key not in self._text:
            text = text_features(
                self.backbone, name, self.prompts, rvs, unit_rows=self.unit_prompts
            )
            if not has_values(text):  # in a graph that is being traced
                return text
            self._text[key] = text
        return self._text[key].to(self.device)

    def texts(self, categories: Sequence[str]) -> Tensor:
        """Return the text features ``(B, D, 2)`` of the category of each image."""
        return torch.stack([self.text(name) for name in categories])

    def score(self, images: Tensor, categories: list[str]) -> Scores:
        """Score images ``(B, 3, H, W)`` of given categories; see :meth:`score_with_text`."""
        return self.score_with_text(images, self.texts(categories))

    def score_category(self, images: Tensor, category: str) -> Scores:
        """Score images of one category; see the base class."""
        if not torch.compiler.is_compiling():
            # A graph cannot ask the data module for the name of the category in prompts.
            self._category_text[category] = self.text(category)
            return super().score_category(images, category)
        return self.score_with_text(images, self._category_text[category].unsqueeze(0))

    @abstractmethod
    def score_with_text(self, images: Tensor, text: Tensor) -> Scores:
        """Score images against the text features of their categories.

        Args:
            images: uint8 ``(B, 3, H, W)``, or floating point and already normalised.
            text: ``(B, D, 2)``, or ``(1, D, 2)`` for all images; unit columns: normal, abnormal.
        """


class ReferenceMethod(PromptedMethod, ABC, Generic[Memory]):
    """A method that also compares images with ``data.shots`` normal reference images, if any.

    Args:
        prompts: See :class:`PromptedMethod`.
        rvs: See :class:`PromptedMethod`.
        evaluator: Settings of the metrics.
    """

    use_of_shots: ClassVar[UseOfShots] = "references"

    def __init__(
        self,
        prompts: PromptEnsemble | dict[str, Any],
        rvs: RVSSettings | dict[str, Any],
        evaluator: EvaluatorSettings,
    ) -> None:
        super().__init__(prompts, rvs, evaluator)
        self._memory: dict[str, Memory] = {}
        """Results of :meth:`remember` by category."""

    def prepare(self, categories: list[str]) -> None:
        """Encode the prompts and, with ``data.shots``, the reference images of all categories.

        Validation images of an auxiliary data set are not compared with references.
        """
        super().prepare(categories)
        self._memory.clear()
        self.reference_paths.clear()
        data = self.data
        if data is None or not data.has_shots or self.evaluated_data is not data:
            return
        for name in track(categories, "encoding references"):
            references = data.references(name)
            self.reference_paths[name] = list(references["path"])
            self._memory[name] = self.remember(references["image"].to(self.device))

    @property
    def has_references(self) -> bool:
        """True if images are compared with references, or will be once these are encoded."""
        data = self.data
        expected = data is not None and data.has_shots and self.evaluated_data is data
        return bool(self._memory) or expected

    @abstractmethod
    def remember(self, images: Tensor) -> Memory:
        """Return the features of the reference images ``(k, 3, H, W)`` of a category."""

    def score(self, images: Tensor, categories: list[str]) -> Scores:
        """Score images ``(B, 3, H, W)`` of given categories; see :meth:`score_with_text`."""
        memory = [self._memory[name] for name in categories] if self._memory else None
        return self.score_with_text(images, self.texts(categories), memory)

    def score_category(self, images: Tensor, category: str) -> Scores:
        """Score images of one category; see the base class."""
        if not torch.compiler.is_compiling():
            return super().score_category(images, category)
        text = self._category_text[category].unsqueeze(0)
        memory = [self._memory[category]] if self._memory else None
        return self.score_with_text(images, text, memory)

    @abstractmethod
    def score_with_text(
        self, images: Tensor, text: Tensor, memory: Sequence[Memory] | None = None
    ) -> Scores:
        """Score images against the text features of their categories and against references.

        Args:
            images: uint8 ``(B, 3, H, W)``, or floating point and already normalised.
            text: ``(B, D, 2)``, or ``(1, D, 2)`` for all images; unit columns: normal, abnormal.
            memory: For each image, or one for all images, the :meth:`remember` result of its
                category; None: without references.
        """
