"""WinCLIP (arXiv 2303.14814): zero-shot CLIP scores of image windows, and few-shot WinCLIP+.

The image tower encodes the whole image and, separately, every window of 2 x 2 and 3 x 3 patches.
The abnormal probabilities of the windows form the map. If a few normal reference images are given,
the distance from the nearest reference embedding is added. There is no official code. Where public
re-implementations differ, docs/methods/winclip.md states which one is followed and why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from anomaly_clip.backbones.clip import CLIPBackbone, CLIPSettings, unit
from anomaly_clip.backbones.prompts import STATES_WINCLIP, PromptEnsemble, RVSSettings
from anomaly_clip.constant_tensors import cached_tensor, has_values
from anomaly_clip.errors import check_above
from anomaly_clip.maps import patches_to_map
from anomaly_clip.methods.prompted_method import ReferenceMethod
from anomaly_clip.metrics.evaluator import EvaluatorSettings
from anomaly_clip.records import Scores

__all__ = ["Embeddings", "WinCLIP", "association", "harmonic_map", "window_patches"]

STATES_ABNORMAL = ("damaged {}", "{} with flaw", "{} with defect", "{} with damage")
PROMPTS = PromptEnsemble(list(STATES_WINCLIP), list(STATES_ABNORMAL))
TOKENS_AT_ONCE = {"cpu": 1024, "else": 65536}
"""Maximum number of window tokens per pass, so that activations stay in the processor's cache."""


class Embeddings(NamedTuple):
    """Embeddings of images, their patches and their windows."""

    image: Tensor
    """``(B, D)``, the whole image."""
    patches: Tensor | None
    """``(B, N, W)``, not projected; None if not requested."""
    windows: tuple[Tensor, ...]
    """``(B, windows, D)`` per scale, in row-major order of the upper left corners."""


class WinCLIP(ReferenceMethod[Embeddings]):
    """Zero-shot WinCLIP, or WinCLIP+ with ``data.shots`` reference images per category.

    Args:
        backbone: The CLIP model.
        prompts: States and templates of the normal and the abnormal prompts. Template set full has
            the 22 templates of the paper, reimpl the 21 of the re-implementations.
        scales: Sides of the windows, in patches; default: 2 and 3.
        temperature: Temperature of the softmax over the two classes.
        evaluator: Settings of the metrics.
        patch_norm: Compare patches with those of the references after CLIP's last LayerNorm, as
            anomalib does; false: before it, as Accurate-WinCLIP does. Affects maps and image scores
            with references.
    """

    unit_prompts: ClassVar[bool] = False  # unlike in CLIP-AD
    must_be_fitted: ClassVar[bool] = False
    can_be_fitted: ClassVar[bool] = False

    def __init__(
        self,
        backbone: CLIPSettings | CLIPBackbone = CLIPSettings(),
        prompts: PromptEnsemble = PROMPTS,
        scales: list[int] | None = None,
        temperature: float = 0.07,
        evaluator: EvaluatorSettings = EvaluatorSettings(),
        patch_norm: bool = True,
    ) -> None:
        super().__init__(prompts, RVSSettings("mean"), evaluator)
        self.backbone = CLIPBackbone.of(backbone)
        self.patch_norm = patch_norm
        self.scales = [2, 3] if scales is None else list(scales)
        self.temperature = temperature
        check_above("model.temperature", temperature, 0)
        _ = self.backbone.blocks  # refuses towers whose windows cannot be isolated
        side = self.side
        if not self.scales or min(self.scales) < 1 or max(self.scales) > side:
            raise ValueError(
                f"model.scales {self.scales}: expected window sides from 1 to {side} patches "
                f"(an image has {side} x {side}); default: [2, 3]"
            )
        settings: dict[str, Any] = {"backbone": self.backbone.settings, "prompts": self.prompts}
        self.save_hyperparameters(ignore=[*settings, "evaluator"], logger=False)
        self.save_hyperparameters({k: asdict(v) for k, v in settings.items()}, logger=False)

    def protocol(self) -> dict[str, Any]:
        """Return, with references, which patches were compared with theirs; see the base class."""
        return {"patch_norm": self.patch_norm} if self._memory else {}

    @torch.no_grad()
    def score_with_text(
        self,
        images: Tensor,
        text: Tensor,
        memory: Sequence[Embeddings] | None = None,
    ) -> Scores:
        """Score images against text features and references; see the base class."""
        with self.backbone.out_of_autocast():
            embeddings = self.embed(images, with_patches=memory is not None)
            image_score = self.abnormal(embeddings.image.unsqueeze(1), text).squeeze(1)
            grid = self.zero_shot_grid(embeddings, text, image_score)
            if memory is not None:
                near = self.association_grid(embeddings, memory)
                image_score = 0.5 * (image_score + near.amax(dim=1))
                grid = 0.5 * (grid + near)
            size = (self.image_size, self.image_size)
            return Scores(image_score=image_score, anomaly_map=patches_to_map(grid, size))

    @property
    def side(self) -> int:
        """Number of patches along a side of the image."""
        return self.backbone.grid_size[0]

    def embed(self, images: Tensor, with_patches: bool = True) -> Embeddings:
        """Encode whole images and all their windows.

        Args:
            images: uint8 ``(B, 3, H, W)``, or floating point and already normalised.
            with_patches: True: also return the patches of the whole images. False: encode the whole
                image as if it were one more window.
        """
        backbone, side = self.backbone, self.side
        scales = self.scales if with_patches else [side, *self.scales]
        members = [window_patches(side, scale, images.device) for scale in scales]

        def encode(images: Tensor) -> Embeddings:
            tokens = backbone.embed(images)
            windows = embed_windows(backbone, tokens, members)
            if not with_patches:
                return Embeddings(windows[0][:, 0], None, tuple(windows[1:]))
            for block in backbone.blocks:
                tokens = block(tokens)
            patches = backbone.normed(tokens) if self.patch_norm else tokens
            patches = patches[:, backbone.num_prefix_tokens :]  # (B, N, W)
            return Embeddings(backbone.pool(tokens).float(), patches.float(), tuple(windows))

        key = "windows", *scales, with_patches, self.patch_norm
        passes = with_patches + sum(windows.numel() for windows in members) / side**2
        return backbone.replayed(encode, key, images, passes, members)

    @torch.no_grad()
    def remember(self, images: Tensor) -> Embeddings:
        """Return the embeddings of the reference images ``(k, 3, H, W)`` of a category.

        Patches and windows have unit length; those of all images are concatenated.
        """
        with self.backbone.out_of_autocast():
            embeddings = self.embed(images)
        assert embeddings.patches is not None
        patches, windows = unit(embeddings.patches), [unit(part) for part in embeddings.windows]
        return Embeddings(
            embeddings.image, patches.flatten(0, 1), tuple(part.flatten(0, 1) for part in windows)
        )

    def abnormal(self, embeddings: Tensor, text: Tensor) -> Tensor:
        """Return the probability ``(B, n)`` that embeddings ``(B, n, D)`` are abnormal."""
        return (unit(embeddings) @ text / self.temperature).softmax(dim=-1)[..., 1]

    def zero_shot_grid(self, images: Embeddings, text: Tensor, image_score: Tensor) -> Tensor:
        """Return M0 ``(B, N)``: the harmonic mean of the image score and the maps of all scales."""
        inverse = 1 / image_score.unsqueeze(1)  # (B, 1)
        for scale, embeddings in zip(self.scales, images.windows, strict=True):
            scores = self.abnormal(embeddings, text)
            patches = window_patches(self.side, scale, scores.device)
            inverse = inverse + 1 / harmonic_map(scores, patches, self.side**2)
        return (len(self.scales) + 1) / inverse

    def association_grid(self, images: Embeddings, memory: Sequence[Embeddings]) -> Tensor:
        """Return M_ref ``(B, N)``: mean distance of patches and windows from the references."""
        total = _nearest(images, memory, lambda embeddings: embeddings.patches)
        for number, scale in enumerate(self.scales):
            scores = _nearest(images, memory, lambda embeddings: embeddings.windows[number])  # noqa: B023 - called at once
            patches = window_patches(self.side, scale, scores.device)
            total = total + harmonic_map(scores, patches, self.side**2)
        return total / (len(self.scales) + 1)


@cached_tensor(maxsize=16)
def window_patches(side: int, scale: int, device: torch.device | None = None) -> Tensor:
    """Return the patch indices of each window, int64 ``(windows, scale * scale)``.

    There is a window of ``scale`` x ``scale`` patches at every position of the grid, in row-major
    order of the upper left corners. Patches are numbered row by row, without the class token.

    Args:
        side: Number of patches along a side of the image.
        scale: Number of patches along a side of a window.
        device: Device of the result; default: the CPU.

    Example:
        >>> from anomaly_clip.methods.winclip import window_patches
        >>> window_patches(3, 2)[1].tolist()
        [1, 2, 4, 5]
    """
    grid = torch.arange(side * side).reshape(side, side)  # (side, side)
    windows = grid.unfold(0, scale, 1).unfold(1, scale, 1).reshape(-1, scale * scale)
    return windows if device is None else windows.to(device)


def embed_windows(
    backbone: CLIPBackbone, tokens: Tensor, windows: Sequence[Tensor]
) -> list[Tensor]:
    """Return the embeddings of isolated windows, ``(B, windows, D)`` for each scale.

    Queries, keys and values of the first block do not depend on the window, so they are computed
    once. The last block only computes the class token, if the image embedding is made from it
    alone. Otherwise, the head reads all tokens of the window.

    Args:
        backbone: The frozen CLIP.
        tokens: Input of the first block, ``(B, P + N, W)``.
        windows: For each scale, the patch indices of its windows; see :func:`window_patches`.
    """
    prefix = backbone.num_prefix_tokens
    mixed = backbone.blocks[0].joint(tokens)
    max_tokens = TOKENS_AT_ONCE["cpu" if tokens.device.type == "cpu" else "else"]
    # The number of images is unknown while a graph is traced.
    num_images = 1 if torch.compiler.is_compiling() else len(tokens)
    embeddings = []
    for patches in windows:
        patches = patches.to(tokens.device)
        first = torch.arange(prefix, device=tokens.device).expand(len(patches), -1)
        members = torch.cat([first, patches + prefix], dim=1)  # (windows, P + k * k)
        per_pass = max(1, max_tokens // (num_images * members.shape[1]))
        parts = [_embed_part(backbone, tokens, mixed, part) for part in members.split(per_pass)]
        embeddings.append(torch.cat(parts, dim=1))
    return embeddings


def _embed_part(backbone: CLIPBackbone, tokens: Tensor, mixed: Tensor, members: Tensor) -> Tensor:
    """Embed some of the windows; ``mixed`` holds queries, keys and values of the first block."""
    blocks, head_rows = backbone.blocks, 1 if backbone.pools_class_token else members.shape[1]
    x = tokens[:, members].flatten(0, 1)  # (B * windows, P + k * k, W)
    mixed = mixed[:, members].flatten(0, 1)  # (B * windows, P + k * k, 3 * W)
    width = x.shape[-1]
    for number, block in enumerate(blocks):
        rows = x.shape[1]
        if number == 0:
            parts = mixed.split(width, dim=-1)
        elif number + 1 < len(blocks):
            parts = block.joint(x).split(width, dim=-1)
        else:  # the last block only has to return the tokens that the head reads
            rows = head_rows
            parts = block.first_joint(x, rows)
        q, k, v = (block.per_head(part) for part in parts)
        attended = F.scaled_dot_product_attention(q, k, v)  # (.., heads, rows, d)
        x = x[:, :rows] + block.attention_output(attended)
        x += block.mlp_output(x)
    return backbone.pool(x).unflatten(0, (len(tokens), -1)).float()


def harmonic_map(scores: Tensor, patches: Tensor, num_patches: int | None = None) -> Tensor:
    """Return the harmonic mean ``(B, N)`` of the scores of all windows that cover each patch.

    Args:
        scores: ``(B, windows)``, at least 0; a patch covered by a window with score 0 gets 0.
        patches: Patch indices of the windows; see :func:`window_patches`.
        num_patches: ``N``; default: as the indices tell, for which the CPU waits for a GPU.
    """
    if num_patches is None:
        if torch.compiler.is_compiling() or not has_values(patches):
            num_patches = (math.isqrt(patches.shape[0]) + math.isqrt(patches.shape[1]) - 1) ** 2
        else:
            num_patches = int(patches.max()) + 1
    index = patches.to(scores.device).flatten()  # (windows * k * k,)
    inverse = (1 / scores).repeat_interleave(patches.shape[1], dim=1)  # (B, windows * k * k)
    total = scores.new_zeros(len(scores), num_patches).index_add(1, index, inverse)
    ones = scores.new_ones(len(index))
    return scores.new_zeros(num_patches).index_add(0, index, ones) / total


def association(embeddings: Tensor, memory: Tensor) -> Tensor:
    """Return the distance ``(..., n)`` in [0, 1] from each embedding to its nearest in memory.

    Args:
        embeddings: ``(..., n, D)``, of any norm.
        memory: ``(m, D)``, unit rows.
    """
    return 0.5 * (1 - (unit(embeddings) @ memory.T).amax(dim=-1))


def _nearest(
    images: Embeddings,
    memory: Sequence[Embeddings],
    part: Callable[[Embeddings], Tensor | None],
) -> Tensor:
    """Return :func:`association` of each image with its own references, ``(B, n)``.

    Args:
        images: Embeddings of all images.
        memory: References of each image, or a single element for all images.
        part: Function that selects the patches, or the windows of a scale.
    """
    embeddings: Any = part(images)  # (B, n, D)
    if len(memory) == 1:
        references: Any = part(memory[0])
        return association(embeddings, references).clamp(min=0)
    pairs: Any = zip(embeddings, map(part, memory), strict=True)
    return torch.stack([association(rows, references) for rows, references in pairs]).clamp(min=0)
