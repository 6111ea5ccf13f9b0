"""AnomalyCLIP (arXiv 2310.18961): object-agnostic prompts, and inference of Crane with them.

Two prompts say "object" and "damaged object" behind learnable vectors, which are trained on the
labelled test split of another data set (``data.auxiliary``); the CLIP stays frozen. One pair of
prompts serves all categories. Patches come from a second path through the last blocks with
value-value attention (DPAM). Crane (Salehi et al.) scores the same prompts in another way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from anomaly_clip.backbones.clip import CLIPBackbone, CLIPSettings, unit
from anomaly_clip.backbones.deep_prompts import DeepPrompts, DeepPromptsSettings
from anomaly_clip.backbones.surgery import dense_path
from anomaly_clip.constant_tensors import has_values
from anomaly_clip.errors import check_above, check_at_least, check_choice
from anomaly_clip.losses import dice_loss, focal_loss
from anomaly_clip.maps import gaussian_blur, patches_to_map
from anomaly_clip.methods.auxiliary_training import AuxiliaryTraining
from anomaly_clip.methods.prompt_files import read_prompts, write_prompts
from anomaly_clip.metrics.evaluator import EvaluatorSettings
from anomaly_clip.records import Batch, Scores

__all__ = ["AnomalyCLIP"]

DENSE_BLOCKS, PUBLISHED_BLOCKS = 19, 24  # of ViT-L-14-336
LOCAL_WEIGHT = 4.0  # of the loss of maps, for one layer
BETAS = (0.5, 0.999)  # of Adam


class AnomalyCLIP(AuxiliaryTraining):
    """AnomalyCLIP with object-agnostic prompts (arXiv 2310.18961; docs/methods/anomalyclip.md).

    Args:
        backbone: The CLIP model. The configurations have the published one, ViT-L-14-336-quickgelu
            of OpenAI at 518 pixels.
        prompt: Sizes and initialisation of the learnable prompts.
        layers: Layers whose maps are added, 1-based; default: the last one (published).
        dense_blocks: Number of last blocks with a second path of value-value attention; default: 19
            of 24 blocks (published), and the same share of others.
        inference: anomalyclip, or crane: the inference of Crane without DINO, with prompts of
            either. Attention of queries, keys and values with themselves is summed, maps are
            averaged over layers, and the image vector is joined by the abnormal patches. A fit
            always trains as AnomalyCLIP does.
        temperature: Temperature of the softmax over the two classes.
        sigma: Standard deviation of the Gaussian blur of the map, in pixels.
        lr: Learning rate of Adam.
        local_weight: Weight of the loss of the maps relative to that of the images; auto: 4 divided
            by the number of layers.
        prompts_file: File of trained prompts, with which no fit is needed: one of AnomalyCLIP's or
            Crane's authors, or one that a fit or export has written. The numbers of vectors are
            those of the file.
        feature_cache_gb: Maximum size of the cache of frozen image features, in GB (1e9 bytes). The
            cache is filled at the start of ``fit``. 0 turns it off: images are then decoded and
            encoded in every epoch.
        evaluator: Settings of the metrics.
    """

    inference_arguments: ClassVar[frozenset[str]] = frozenset(
        {"evaluator", "sigma", "inference", "feature_cache_gb", "prompts_file"}
    )
    init_only_arguments: ClassVar[frozenset[str]] = frozenset({"prompts_file"})

    def __init__(
        self,
        backbone: CLIPSettings | CLIPBackbone = CLIPSettings(positions="bilinear"),
        prompt: DeepPromptsSettings = DeepPromptsSettings(),
        layers: list[int] | None = None,
        dense_blocks: int | None = None,
        inference: Literal["anomalyclip", "crane"] = "anomalyclip",
        temperature: float = 0.07,
        sigma: float = 4.0,
        lr: float = 1e-3,
        local_weight: float | Literal["auto"] = "auto",
        prompts_file: str | None = None,
        feature_cache_gb: float = 20.0,
        evaluator: EvaluatorSettings = EvaluatorSettings(),
    ) -> None:
        super().__init__(evaluator)
        self.backbone = CLIPBackbone.of(backbone)
        self.backbone.check_learnable_text("AnomalyCLIP")
        self.set_training(lr, feature_cache_gb)
        check_choice("model.inference", inference, ("anomalyclip", "crane"))
        check_above("model.temperature", temperature, 0)
        check_at_least("model.sigma", sigma, 0)
        if local_weight != "auto":
            check_at_least("model.local_weight", local_weight, 0)
        self.layers = self.backbone.check_layers(layers)
        self.dense_blocks = self._check_dense_blocks(dense_blocks)
        self.inference = inference
        self.temperature = temperature
        self.sigma = sigma
        self.local_weight = local_weight
        settings = given = DeepPromptsSettings.of(prompt)
        vectors = None if prompts_file is None else read_prompts(prompts_file, self.backbone)
        if vectors is not None:
            settings = _sizes_of_file(settings, vectors.context, vectors.deep, str(prompts_file))
        self.prompts = DeepPrompts(self.backbone, settings, torch.initial_seed())
        if vectors is not None:
            self.prompts.load(vectors.context, vectors.deep)
            self._external = vectors.record
            self.fitted = True
        self._text: tuple[tuple[tuple[int, int], ...], Tensor] | None = None
        """Object and version of each vector, and the text features of these versions."""
        saved = {"backbone": asdict(self.backbone.settings), "prompt": asdict(given)}
        self.save_hyperparameters(ignore=[*saved, "evaluator", "prompts_file"])
        self.save_hyperparameters(saved)

    def _check_dense_blocks(self, blocks: int | None) -> int:
        total = self.backbone.num_layers
        blocks = (
            max(1, round(DENSE_BLOCKS * total / PUBLISHED_BLOCKS)) if blocks is None else blocks
        )
        if not 1 <= blocks <= total:
            raise ValueError(
                f"model.dense_blocks {blocks}: expected 1 to {total}, the number of blocks in the "
                f"image tower of {self.backbone.settings.name}"
            )
        return blocks

    @property
    def is_crane(self) -> bool:
        """True if images are scored as by Crane."""
        return self.inference == "crane"

    # -- texts -----------------------------------------------------------------------------------

    def text(self) -> Tensor:
        """Return the text features ``(D, 2)``: normal, abnormal; computed anew after a change."""
        versions = tuple(
            # Vectors that were made in inference mode have no version, and cannot be trained.
            (id(rows), 0 if rows.is_inference() else rows._version)
            for rows in self.prompts.parameters()
        )
        if self._text is None or self._text[0] != versions:
            with torch.no_grad():
                text = self.prompts(self.backbone).T
            if not has_values(text):  # in a graph that is being traced
                return text
            self._text = versions, text
        return self._text[1].to(self.device)

    def prepare(self, categories: list[str]) -> None:
        """Encode the prompts, as weight averaging may have replaced their vectors."""
        self._text = None
        self.text()

    # -- scoring ---------------------------------------------------------------------------------

    def score(self, images: Tensor, categories: list[str]) -> Scores:
        """Score images ``(B, 3, H, W)``; the categories are not used."""
        with torch.no_grad():
            return self.score_tokens(self.tokens(images, scoring=True), categories)

    @torch.no_grad()
    def score_category(self, images: Tensor, category: str) -> Scores:
        """Score images of one category; see the base class."""
        if not torch.compiler.is_compiling():
            return super().score_category(images, category)
        # A graph contains the text features as constants: it can neither encode nor compare them.
        text = self.text() if self._text is None else self._text[1].to(self.device)
        return self.score_with_text(self.tokens(images, scoring=True), text)

    @torch.no_grad()
    def tokens(self, images: Tensor, *, scoring: bool) -> dict[str, Tensor]:
        """Return projected patches and the image vector, not normalised; see the base class.

        Returns:
            ``patches.{layer}`` ``(B, N, D)`` for each layer, and ``image`` ``(B, D)``.
        """
        backbone = self.backbone
        crane = self.is_crane and scoring
        first = backbone.num_layers - self.dense_blocks + 1

        def encode(images: Tensor) -> dict[str, Tensor]:
            tokens: dict[str, Tensor] = {}
            with backbone.out_of_autocast():
                attention: Any = "qq+kk+vv" if crane else "vv"
                original = None
                for number, paths in enumerate(
                    dense_path(backbone, images, self.dense_blocks, attention), start=1
                ):
                    original, dense = paths
                    if number in self.layers:
                        path = dense if number >= first else original
                        tokens[f"patches.{number}"] = backbone.project(path[:, 1:])
                assert original is not None
                image = original[:, 0]
                tokens["image"] = backbone.project(image) if crane else image @ backbone.visual.proj
            return tokens

        key = "dense path", tuple(self.layers), self.dense_blocks, crane
        return backbone.replayed(encode, key, images)

    def score_tokens(self, tokens: dict[str, Tensor], categories: list[str]) -> Scores:
        """Score tokens of :meth:`tokens`; the categories are not used.

        Returns:
            The blurred map, in 0 to the number of layers, and the image score.
        """
        return self.score_with_text(tokens, self.text())

    def score_with_text(self, tokens: dict[str, Tensor], text: Tensor) -> Scores:
        """Score tokens against text features ``(D, 2)``; see :meth:`score_tokens`."""
        with self.backbone.out_of_autocast():
            patches = torch.stack([unit(tokens[f"patches.{layer}"]) for layer in self.layers])
            image = unit(tokens["image"])
            maps = self.layer_maps(patches, text, (self.image_size, self.image_size))
            if self.is_crane:
                mean = patches.mean(dim=0)
                image = pooled(image, mean, self.probability(mean, text))
                total = maps.mean(dim=0)
            else:
                total = maps.sum(dim=0)
            return Scores(
                image_score=self.probability(image, text),
                anomaly_map=gaussian_blur(total, self.sigma),
            )

    def probability(self, vectors: Tensor, text: Tensor) -> Tensor:
        """Return the probability ``(...)`` that unit vectors ``(..., D)`` are abnormal."""
        return (vectors @ text / self.temperature).softmax(dim=-1)[..., 1]

    def layer_maps(self, patches: Tensor, text: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the probability maps of the abnormal class, ``(layers, B, *size)``.

        Unlike in CLIP-AD, probabilities are upsampled, not logits.

        Args:
            patches: Unit vectors ``(layers, B, N, D)``.
            text: ``(D, 2)``, unit columns: normal, abnormal.
            size: Height and width in pixels.
        """
        probability = self.probability(patches, text)
        return torch.stack([patches_to_map(layer, size) for layer in probability])

    # -- training --------------------------------------------------------------------------------

    def token_options(self, scoring: bool) -> str:
        """Return the options that the tokens depend on."""
        return f"{self.layers} {self.dense_blocks} {self.is_crane and scoring}"

    def losses(self, tokens: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Return the focal and dice losses of the maps, and the cross-entropy of the images."""
        mask = batch["mask"]
        text = self.prompts(self.backbone).T
        patches = torch.stack([unit(tokens[f"patches.{layer}"]) for layer in self.layers])
        maps = self.layer_maps(patches, text, (mask.shape[-2], mask.shape[-1]))
        weight = LOCAL_WEIGHT / len(maps) if self.local_weight == "auto" else self.local_weight
        logits = unit(tokens["image"]) @ text / self.temperature
        return {
            "focal": weight * torch.stack([focal_loss(part, mask) for part in maps]).sum(),
            "dice_abnormal": weight * torch.stack([dice_loss(part, mask) for part in maps]).sum(),
            "dice_normal": weight
            * torch.stack([dice_loss(1 - part, ~mask.bool()) for part in maps]).sum(),
            "image": F.cross_entropy(logits, batch["label"].long()),
        }

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam without a schedule, as published."""
        return torch.optim.Adam(self.prompts.parameters(), lr=self.lr, betas=BETAS)

    # -- records ---------------------------------------------------------------------------------

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the sizes of the prompts: a fit may have started with those of a file."""
        super().on_load_checkpoint(checkpoint)
        state = checkpoint["state_dict"]
        context = state.get("prompts.shallow.context")
        deep = [rows for name, rows in state.items() if name.startswith("prompts.deep.")]
        if context is None or any(rows.ndim < 2 for rows in (context, *deep)):
            return  # damaged: reported when the tensors are loaded
        settings = self.prompts.settings
        sizes = _sizes(settings, context, deep)
        current = _sizes(settings, self.prompts.shallow.context, list(self.prompts.deep))
        if sizes != current:
            self.prompts = DeepPrompts(self.backbone, replace(settings, **sizes), 0)
            self._text = None

    def protocol(self) -> dict[str, Any]:
        """Return the inference if it is Crane's; see the base class."""
        return {"inference": "crane"} if self.is_crane else {}

    # -- files -----------------------------------------------------------------------------------

    @property
    def export_name(self) -> str:
        """Name of the exported file."""
        return "prompts.pth"

    def export(self, folder: Path, projections: bool = False) -> Path:
        """Write the prompts; see :func:`.write_prompts`.

        Args:
            folder: Folder of the file.
            projections: Add the unused layers of AnomalyCLIP's files, which Crane's files lack.
        """
        file = folder / self.export_name
        write_prompts(self.prompts, self.backbone, file, projections)
        return file


def pooled(image: Tensor, patches: Tensor, weights: Tensor) -> Tensor:
    """Return image vectors joined by their abnormal patches (score-base pooling of Crane).

    Args:
        image: Unit vectors ``(B, D)``.
        patches: ``(B, N, D)``, unit vectors, averaged over layers.
        weights: Abnormal probability ``(B, N)`` of each patch.

    Returns:
        Unit vectors ``(B, D)``.
    """
    abnormal = unit((weights.unsqueeze(-1) * patches).sum(dim=1))
    return unit(0.5 * abnormal + 0.5 * image)


def _sizes_of_file(
    settings: DeepPromptsSettings, context: Tensor, deep: list[Tensor], file: str
) -> DeepPromptsSettings:
    """Return settings with the sizes of a file.

    Raises:
        ValueError: If other sizes than the default ones were asked for.
    """
    default = DeepPromptsSettings()
    sizes = _sizes(settings, context, deep)
    for name, value in sizes.items():
        given = getattr(settings, name)
        if given not in (value, getattr(default, name)):
            raise ValueError(
                f"model.prompt.{name} is {given}, but the prompts of model.prompts_file {file} "
                f"have {value}: leave model.prompt.{name} out"
            )
    return replace(settings, **sizes)


def _sizes(
    settings: DeepPromptsSettings, context: Tensor, deep: Sequence[Tensor]
) -> dict[str, Any]:
    """Return the settings that the shapes of vectors determine."""
    vectors = context.shape[1]
    deep_ctx = len(deep[0]) if deep else min(settings.deep_ctx, vectors)
    return {"n_ctx": vectors, "depth": len(deep) + 1, "deep_ctx": deep_ctx}
