"""SimpleNet (arXiv 2303.15140): a discriminator between normal features and noisy copies of them.

Patches of two stages of a frozen CNN are joined into one vector per position. An adaptor fits the
vectors to the target data, and a discriminator learns to distinguish the adapted vectors from
copies with Gaussian noise. No synthetic defects are added to images. Settings are those of the
public code; see docs/methods/simplenet.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomaly_clip.backbones.towers import AnyBackbone, AnySettings, BackboneSettings
from anomaly_clip.errors import check_above, check_at_least
from anomaly_clip.maps import gaussian_blur, patches_to_map
from anomaly_clip.methods.feature_method import Select, TrainedMethod
from anomaly_clip.metrics.evaluator import EvaluatorSettings
from anomaly_clip.records import Batch, Scores

__all__ = ["SimpleNet", "hinge_loss"]

PATCH = 3
"""Side of the square neighbourhood whose features form the vector of a position."""
MARGIN = 0.5
"""Margin of the hinge loss: outputs beyond it do not add to the loss."""


class SimpleNet(TrainedMethod):
    """An adaptor and a discriminator on frozen features (SimpleNet, arXiv 2303.15140).

    Args:
        backbone: A CNN or a ViT or, if ``pretrained`` is given in place of ``weights``, a CLIP
            model.
        image_size: Side of the square input images, in pixels.
        layers: Layers whose patches are joined, finest first: names of a CNN's, or 1-based numbers
            of blocks, of which layer1 to layer4 are the last ones of the four quarters.
        pretrain_dim: Length to which the patch vector of each layer is pooled.
        target_dim: Length of the joined vector. The public code's 1536 was chosen for WRN-50-2; the
            two layers of ResNet-18 have 384 channels together.
        hidden: Width of the discriminator's hidden layer.
        noise: Standard deviation of the Gaussian noise added to the vectors.
        adaptor_lr: Learning rate of the adaptor (AdamW, weight decay 0.01).
        discriminator_lr: Learning rate of the discriminator (Adam, weight decay 1e-5).
        sigma: Standard deviation of the Gaussian blur of the map, in pixels; the image score is
            computed before the blur.
        select: last: test the last epoch; best_test: test the epoch with the best image AUROC on
            the test images and, among equal ones, the best pixel AUROC, as in the public code.
        seed: Seed of the initial weights and of the noise.
        evaluator: Settings of the metrics.
    """

    any_tower: ClassVar[bool] = True
    inference_arguments: ClassVar[frozenset[str]] = frozenset({"evaluator", "sigma"})

    def __init__(
        self,
        backbone: AnySettings | AnyBackbone = BackboneSettings(),
        image_size: int = 288,
        layers: Sequence[int] | Sequence[str] = ("layer2", "layer3"),
        pretrain_dim: int = 1536,
        target_dim: int = 1536,
        hidden: int = 1024,
        noise: float = 0.015,
        adaptor_lr: float = 1e-4,
        discriminator_lr: float = 2e-4,
        sigma: float = 4.0,
        select: Select = "last",
        seed: int = 0,
        evaluator: EvaluatorSettings = EvaluatorSettings(),
    ) -> None:
        super().__init__(backbone, layers, image_size, select, evaluator)
        self.layers = self.check_layers(layers)
        check_at_least("model.pretrain_dim", pretrain_dim, 1)
        check_at_least("model.target_dim", target_dim, 1)
        check_at_least("model.hidden", hidden, 1)
        check_above("model.noise", noise, 0)
        check_above("model.adaptor_lr", adaptor_lr, 0)
        check_above("model.discriminator_lr", discriminator_lr, 0)
        check_at_least("model.sigma", sigma, 0)
        self.pretrain_dim = pretrain_dim
        self.target_dim = target_dim
        self.noise = noise
        self.adaptor_lr = adaptor_lr
        self.discriminator_lr = discriminator_lr
        self.sigma = sigma
        self.seed = seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # independent of random numbers used by the backbone
            self.adaptor = nn.Linear(target_dim, target_dim)
            self.discriminator = nn.Sequential(
                nn.Linear(target_dim, hidden),
                nn.BatchNorm1d(hidden),
                nn.LeakyReLU(0.2),
                nn.Linear(hidden, 1, bias=False),
            )
            for layer in (self.adaptor, self.discriminator[0], self.discriminator[3]):
                nn.init.xavier_normal_(layer.weight)  # type: ignore[arg-type]
        self.automatic_optimization = False  # two optimisers share one loss
        self.save_hyperparameters(ignore=["backbone", "layers", "evaluator"])
        self.save_hyperparameters(self.plain_settings(layers))

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """Return one vector per position of the finest layer, ``(B, N, target_dim)``.

        Pooling over channels and upsampling over positions are both linear, so their order does
        not matter. Here, coarse layers are pooled first, because short vectors are cheaper to
        upsample.
        """
        features = self.backbone.feature_maps(images, self.layers)
        size = features[0].shape[-2:]
        levels = []
        for maps in features:
            maps = maps.to(self.dtype)
            # Each vector is ordered by channel, then by row and column of the neighbourhood.
            patches = F.unfold(maps, PATCH, padding=PATCH // 2).mT  # (B, n, C * 9)
            short = F.adaptive_avg_pool1d(patches, self.pretrain_dim)
            if maps.shape[-2:] != size:
                grid = short.mT.unflatten(2, maps.shape[-2:])  # (B, dim, h, w)
                short = F.interpolate(grid, size, mode="bilinear").flatten(2).mT  # (B, N, dim)
            levels.append(short)
        return F.adaptive_avg_pool1d(torch.cat(levels, dim=2), self.target_dim)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Take an optimisation step on the patches of a batch of normal images."""
        patches = self.embed(batch["image"]).flatten(0, 1)  # (B * N, dim)
        real = self.adaptor(patches)
        noisy = real + self.draw_noise(real, batch_idx)
        # A single pass, so that normal and noisy vectors share the statistics of BatchNorm.
        real_logits, noisy_logits = self.discriminator(torch.cat([real, noisy])).float().chunk(2)
        loss = hinge_loss(real_logits, noisy_logits)
        optimizers: Any = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()
        size = len(batch["image"])
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=size)
        right = (real_logits > MARGIN).float().mean() + (noisy_logits < -MARGIN).float().mean()
        self.log("train/right", right / 2, batch_size=size)

    def draw_noise(self, like: Tensor, batch_idx: int) -> Tensor:
        """Return noise of the shape and on the device of ``like``.

        Its generator is seeded by the model's seed, the epoch, the batch and the process.
        """
        numbers = [self.seed, self.current_epoch, batch_idx, self.global_rank]
        entropy = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
        generator = torch.Generator(like.device).manual_seed(int(entropy[0]) >> 1)
        sampled = torch.randn(like.shape, generator=generator, device=like.device)
        return (self.noise * sampled).to(like.dtype)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Return the optimisers of adaptor and discriminator, with constant learning rates."""
        return [
            torch.optim.AdamW(self.adaptor.parameters(), lr=self.adaptor_lr),
            torch.optim.Adam(
                self.discriminator.parameters(), lr=self.discriminator_lr, weight_decay=1e-5
            ),
        ]

    @torch.no_grad()
    def score(self, images: Tensor, categories: list[str]) -> Scores:
        """Score images ``(B, 3, H, W)`` by the negated output of the discriminator."""
        self.check_trained()
        patches = self.embed(images)
        logits = self.discriminator(self.adaptor(patches.flatten(0, 1))).float()
        anomalous = -logits.view(patches.shape[:2])  # (B, N)
        size = (images.shape[-2], images.shape[-1])
        maps = gaussian_blur(patches_to_map(anomalous, size), self.sigma)
        return Scores(image_score=anomalous.amax(dim=1), anomaly_map=maps)


def hinge_loss(real: Tensor, noisy: Tensor) -> Tensor:
    """Return the sum of the hinge losses of normal and noisy vectors.

    The loss is zero if all normal outputs are above the margin and all noisy outputs are below its
    negative.

    Args:
        real: Discriminator outputs of normal vectors, higher = more normal.
        noisy: Discriminator outputs of the same vectors with noise.
    """
    return F.relu(MARGIN - real).mean() + F.relu(MARGIN + noisy).mean()
