"""Settings of CLIP-ADA: weights of its losses, its optimiser, and the way from logits to scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from anomaly_clip.errors import check_at_least, check_between, check_choice

__all__ = ["POOL", "SIGMA_SIDE", "LossSettings", "MapSettings", "OptimSettings"]

SIGMA_SIDE = 256  # pixels: the side that sigma is given at
POOL = 16  # pixels: of the average before the maximum, as UniAD
IMAGE_SCORES = ("max", "avgpool_max", "topk_mean")


@dataclass(frozen=True)
class LossSettings:
    """Weights of the losses (section 3 of the specification; our choice).

    Args:
        focal: Of the focal loss of a map.
        dice: Of the dice loss of its abnormal class.
        normal_dice: Of the dice loss of its normal class (AnomalyCLIP, for two prompts).
        coarse: Of the coarse map's losses, beside 1 of each fine one's.
        image: Of the image loss.
        class_token: Of the loss of what the class token says, if it is asked.
        gamma: Exponent of the focal loss.
        image_fraction: Share of the patches, the highest, that speak for an image.
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
    """AdamW and its schedule: linear warm-up, then a cosine (section 4; our choice).

    Args:
        lr_prompt: Of the prompt's vectors.
        lr_head: Of projections, shift, beta, gamma and temperature.
        lr_block: Of the blocks that start as copies of CLIP's.
        weight_decay: Of matrices but the prompt.
        betas: Of AdamW.
        warmup_steps: Steps until the rates are reached; a twentieth of the training at most.
        last: What share of the rates is left at the end.
        few_images: Below how many training images
        few_factor: weight_decay is multiplied by this.
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
    """From the logits of patches to map and image score (section 2.6; our choice).

    Args:
        eval_size: Side of the map, in pixels.
        sigma: Gaussian blur, in pixels at a side of 256; it follows eval_size.
        image_score: max: the map's maximum; avgpool_max: after an average over 16 pixels, as UniAD;
            topk_mean: the mean of the highest thousandth.
    """

    eval_size: int = 256
    sigma: float = 4.0
    image_score: Literal["max", "avgpool_max", "topk_mean"] = "max"

    def __post_init__(self) -> None:
        check_choice("model.map.image_score", self.image_score, IMAGE_SCORES)
        check_at_least("model.map.eval_size", self.eval_size, POOL)
        check_at_least("model.map.sigma", self.sigma, 0)
