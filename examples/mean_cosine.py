"""Cosine distance of each patch to the mean normal patch."""

from dataclasses import asdict

import torch
import torch.nn.functional as F
from torch import Tensor

from anomaly_clip.backbones.cnn import CNNBackbone, CNNSettings
from anomaly_clip.maps import gaussian_blur, image_score, patches_to_map
from anomaly_clip.methods.feature_method import FittedMethod
from anomaly_clip.metrics.evaluator import EvaluatorSettings
from anomaly_clip.records import Batch, Scores


class MeanCosine(FittedMethod):
    """One mean direction of the normal patches.

    Args:
        backbone: The CNN.
        image_size: Side of the square images, in pixels.
        layer: The layer whose features are compared.
        sigma: Gaussian blur of the map, in pixels.
        evaluator: Settings of the metrics.
    """

    fitted_buffers = ("mean",)  # saved in checkpoints
    inference_arguments = frozenset({"evaluator", "sigma"})  # may differ from the checkpoint's
    mean: Tensor
    """``(C,)``, of unit length."""

    def __init__(
        self,
        backbone: CNNSettings | CNNBackbone = CNNSettings(),
        image_size: int = 224,
        layer: str = "layer2",
        sigma: float = 4.0,
        evaluator: EvaluatorSettings = EvaluatorSettings(),
    ) -> None:
        super().__init__(backbone, [layer], image_size, evaluator)
        (self.layer,) = self.check_layers([layer])
        self.sigma = sigma
        self.save_hyperparameters(ignore=["backbone", "evaluator"])
        self.save_hyperparameters({"backbone": asdict(self.backbone_settings)})

    def on_fit_start(self) -> None:
        """Start with an empty sum."""
        self.total = torch.zeros(self.backbone.channels[self.layer], device=self.device)

    @torch.no_grad()
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch of normal images."""
        self.total += self.embed(batch["image"]).sum(dim=(0, 1))

    def on_train_epoch_end(self) -> None:
        """Keep the mean direction over all processes."""
        total = self.trainer.strategy.reduce(self.total, reduce_op="sum")
        self.keep(mean=F.normalize(total, dim=0))

    @torch.no_grad()
    def score(self, images: Tensor, categories: list[str]) -> Scores:
        """Score ``(B, 3, H, W)`` images."""
        self.check_fitted()
        # A matrix product would be in 16 bits under mixed precision.
        distances = 1 - (self.embed(images) * self.mean).sum(dim=-1)  # (B, N)
        maps = patches_to_map(distances, (images.shape[-2], images.shape[-1]))
        maps = gaussian_blur(maps, self.sigma)
        return Scores(image_score=image_score(maps, "max"), anomaly_map=maps)

    def embed(self, images: Tensor) -> Tensor:
        """Return unit features of all patches, ``(B, N, C)``."""
        features = self.backbone(images)[self.layer]  # (B, C, h, w)
        return F.normalize(features.flatten(2).mT, dim=-1)
