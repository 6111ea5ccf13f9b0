"""Settings of CLIP-ADA: loss weights, optimiser, anomaly map and image score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from anomaly_clip.errors import check_at_least, check_between, check_choice

__all__ = ["POOL", "SIGMA_SIDE", "LossSettings", "MapSettings", "OptimSettings"]

SIGMA_SIDE = 256  # pixels: map side that sigma refers to
POOL = 16  # pixels: window of the average pooling before the maximum, as in UniAD
IMAGE_SCORES = ("max", "avgpool_max", "topk_mean")


@dataclass(frozen=True)
class LossSettings:
    """Weights of the losses (our choice; docs/methods/clip_ada.md).

    Args:
        focal: Weight of the focal loss of a map.
        dice: Weight of the dice loss of the abnormal class.
        normal_dice: Weight of the dice loss of the normal class (from AnomalyCLIP; for two
            prompts).
        coarse: Weight of the coarse map's losses; the losses of each fine map have weight 1.
        image: Weight of the image loss.
        class_token: Weight of the loss of the class token, if ``model.class_token`` is set.
        gamma: Exponent of the focal loss.
        image_fraction: The image loss averages the highest patch logits; this is their fraction of
            all patches.
    """

    focal: float = 20.0
    dice: float = 1.0
    normal_dice: float = 0.0
    coarse: float = 0.5
    image: float = 0.2
    class_token: float = 1.0
    gamma: float = 2.0
    image_fraction: float = 0.01

    def __post_init__(self) -> None:
        check_between("model.loss.image_fraction", self.image_fraction, 0, 1, open_low=True)
        for name in ("focal", "dice", "normal_dice", "coarse", "image", "class_token", "gamma"):
            check_at_least(f"model.loss.{name}", getattr(self, name), 0)


@dataclass(frozen=True)
class OptimSettings:
    """AdamW and its schedule: linear warm-up, then a cosine (our choice; docs/methods/clip_ada.md).

    Args:
        lr_prompt: Learning rate of the prompt vectors.
        lr_head: Learning rate of projections, shift, beta, gamma and temperature.
        lr_block: Learning rate of the blocks copied from CLIP.
        weight_decay: Weight decay of all matrices except the prompt.
        betas: Betas of AdamW.
        warmup_steps: Number of warm-up steps, limited to a twentieth of the training.
        last: Final learning rates as a fraction of the three rates above.
        few_images: Number of training images below which ``few_factor`` applies.
        few_factor: Factor by which ``weight_decay`` is multiplied for few training images.
    """

    lr_prompt: float = 2e-3
    lr_head: float = 1e-3
    lr_block: float = 1e-4
    weight_decay: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_steps: int = 500
    last: float = 0.01
    few_images: int = 100
    few_factor: float = 10.0


@dataclass(frozen=True)
class MapSettings:
    """Settings of the anomaly map and the image score (our choice; docs/methods/clip_ada.md).

    Args:
        eval_size: Side of the map, in pixels.
        sigma: Standard deviation of the Gaussian blur, in pixels of a map of side 256. For other
            sides it is scaled in proportion to ``eval_size``.
        image_score: max: maximum of the map. avgpool_max: maximum after 16 x 16 average pooling, as
            in UniAD. topk_mean: mean of the highest thousandth of the pixels.
    """

    eval_size: int = 256
    sigma: float = 4.0
    image_score: Literal["max", "avgpool_max", "topk_mean"] = "max"

    def __post_init__(self) -> None:
        check_choice("model.map.image_score", self.image_score, IMAGE_SCORES)
        check_at_least("model.map.eval_size", self.eval_size, POOL)
        check_at_least("model.map.sigma", self.sigma, 0)
