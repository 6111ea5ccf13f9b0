"""RegAD (arXiv 2207.07361): learn to register images of other products, then look at a new one.

A ResNet whose stages each turn and scale what they see is trained so that two images of the same
category look alike after it, on all categories but the one to be tested. Of that one a few normal
images are enough: they are augmented, and at every position a Gaussian says how they look. Settings
and conventions are those of the public code (section 4 of the specification).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from anomaly_clip.backbones.cnn import CNNBackbone, CNNSettings
from anomaly_clip.errors import check_above, check_at_least, check_between
from anomaly_clip.maps import gaussian_blur, image_score, patches_to_map
from anomaly_clip.methods.cnn_method import Select, TrainedMethod
from anomaly_clip.methods.gaussians import FewSampleGaussians, few_sample_gaussians
from anomaly_clip.methods.regad_network import (
    STAGES,
    RegistrationNetwork,
    augment,
    encoder,
    joined_features,
    negative_cosine,
    predictor,
)
from anomaly_clip.metrics.evaluator import (
    FIGURES,
    Evaluator,
    EvaluatorSettings,
    Figures,
    Results,
    with_means,
)
from anomaly_clip.progress import say, track
from anomaly_clip.records import Batch, LoaderNeeds, Scores
from anomaly_clip.schedules import half_cosine, total_epochs

if TYPE_CHECKING:
    from anomaly_clip.data.dataset import AnomalyData

__all__ = ["PixelCNNSettings", "RegAD", "averaged"]

AT_ONCE = 32
"""Augmented images that go through the network together."""


@dataclass(frozen=True)
class PixelCNNSettings(CNNSettings):
    """Which CNN, as for the other detectors, but one that sees pixels in [0, 1] as they are.

    Args:
        name: A torchvision ResNet.
        weights: imagenet, a file, or the word random.
        layers: Leave it out.
        mean: Pixel mean.
        std: Pixel standard deviation.
    """

    # A type of its own: a default instance would lose its values to a file that names weights only.
    mean: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    std: list[float] = field(default_factory=lambda: [1.0, 1.0, 1.0])


class RegAD(TrainedMethod):
    """Registration across categories, Gaussians of a few normal images (RegAD, section 4).

    One model is tested on one category and trained on others (``data.train_categories: others``).
    The test goes through the images once for every set of references, its seed being its number;
    figures are means over these rounds. Maps and scores that are kept are those of the first, which
    validation and predict use alone.

    Args:
        backbone: The ResNet that training starts from, and where its weights come from.
        image_size: Side of its images, in pixels; a multiple of 32.
        shots: How many references a category has; as many images of its category support each one
            in training.
        rounds: How many sets of references are tested.
        regularization: Added to the diagonal of every covariance.
        sigma: Gaussian blur of the map, in pixels.
        lr: Learning rate (SGD); it follows half a cosine down to 0 in the last epoch.
        momentum: Of SGD.
        select: last: the last epoch is tested; best_test: the one whose image and pixel AUROC on
            the test images have the largest sum, as in the public code.
        seed: Draws the weights of what is trained beside the ResNet.
        evaluator: How figures are computed.
    """

    inference_arguments: ClassVar[frozenset[str]] = frozenset(
        {"evaluator", "sigma", "rounds", "regularization"}
    )

    def __init__(
        self,
        backbone: PixelCNNSettings | CNNBackbone = PixelCNNSettings(),
        image_size: int = 224,
        shots: int = 4,
        rounds: int = 10,
        regularization: float = 0.01,
        sigma: float = 4.0,
        lr: float = 1e-4,
        momentum: float = 0.9,
        select: Select = "last",
        seed: int = 0,
        evaluator: EvaluatorSettings = EvaluatorSettings(),
    ) -> None:
        super().__init__(backbone, STAGES, image_size, select, evaluator)
        self.check_layers(STAGES)
        if image_size < 64 or image_size % 32:
            raise ValueError(
                f"model.image_size must be a multiple of 32, 64 or more, got {image_size}"
            )
        check_at_least("model.shots", shots, 1)
        check_at_least("model.rounds", rounds, 1)
        check_above("model.regularization", regularization, 0)
        check_above("model.lr", lr, 0)
        check_at_least("model.sigma", sigma, 0)
        check_between("model.momentum", momentum, 0, 1, open_high=True)
        self.shots = shots
        self.rounds = rounds
        self.regularization = regularization
        self.sigma = sigma
        self.lr = lr
        self.momentum = momentum
        width = self.backbone.channels[STAGES[-1]]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # alone decides, not what was drawn for the backbone
            self.network = RegistrationNetwork(self.backbone, image_size)
            self.encoder = encoder(width)
            self.predictor = predictor(width)
        self.trained_on: dict[str, Any] = {}
        """The data set, and its categories, that the training saw."""
        self._gaussians: dict[str, FewSampleGaussians] = {}
        self._round = 0
        self._by_round: list[Figures] = []
        self.save_hyperparameters(ignore=["backbone", "evaluator"])
        self.save_hyperparameters({"backbone": asdict(self.asked_backbone)})

    # -- what it needs of the data ---------------------------------------------------------------

    @property
    def loader_needs(self) -> LoaderNeeds:
        """Needs of the loaders: support in training, a test pass per round."""
        return LoaderNeeds(self.image_size, support_images=self.shots, test_passes=self.rounds)

    def setup(self, stage: str) -> None:
        """Check that one category is tested and others are trained on; see the base.

        Raises:
            ValueError: If it is not so, or there are fewer references than asked for.
        """
        super().setup(stage)
        data = self.data
        if data is None:
            return
        if data.has_shots:
            raise ValueError(
                "RegAD trains on all normal images of other categories, and model.shots says how "
                "many there are of the one tested: leave out data.shots and data.fraction"
            )
        if stage == "fit":
            self._check_training(data)
            self.trained_on = {"data": data.dataset_name, "categories": data.train_categories}
        self._check_tested(data)
        for category in data.categories:
            data.drawn_of(category, self.shots, seed=0)
        passes = self.rounds if stage == "test" else 1
        others = [Evaluator(data.categories, self.evaluator_settings) for _ in range(passes - 1)]
        self.evaluators = nn.ModuleList([self.evaluator, *others])

    def _check_one_category(self, data: AnomalyData, stage: str) -> None:
        super()._check_one_category(data, "test")  # what is trained on are always several

    def _check_tested(self, data: AnomalyData) -> None:
        trained = self.trained_on.get("categories", [])
        both = [name for name in data.categories if name in trained]
        if both and self.trained_on["data"] == data.dataset_name:
            raise ValueError(
                f"RegAD is never tested on what it was trained on, and {both[0]!r} of "
                f"{data.dataset_name} was: test another category, or fit again without it"
            )

    def _check_training(self, data: AnomalyData) -> None:
        both = [name for name in data.train_categories if name in data.categories]
        if both:
            raise ValueError(
                f"RegAD never trains on what it is tested on, and {both[0]!r} is among both: set "
                f"data.train_categories to others"
            )
        if data.validation.holds_out:
            raise ValueError(
                f"RegAD needs references of what validates, which data.val_split {data.val_split} "
                f"has not: set it to none or test"
            )
        if data.synthesis is not None:
            raise ValueError("RegAD trains on normal images alone: leave out data.synthesis")
        if data.balanced:
            raise ValueError(
                "RegAD's batches are of one category each, all images once: leave out data.balanced"
            )

    # -- training --------------------------------------------------------------------------------

    def pixels(self, images: Tensor) -> Tensor:
        """Return uint8 images normalised; floating ones are taken as normalised already."""
        if images.is_floating_point():
            return images
        backbone = self.backbone
        return ((images.float() / 255 - backbone.mean) / backbone.std).to(self.dtype)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch of one category, each image with its support.

        Raises:
            ValueError: If there is no support.
        """
        if "support" not in batch:
            raise ValueError(
                "RegAD trains on batches with support: fit it with a data module of "
                "anomaly_clip.data (datamodule=)"
            )
        query = self.network(self.pixels(batch["image"]))
        several = self.network(self.pixels(batch["support"].flatten(0, 1)))  # (B * k, C, h, w)
        support = several.unflatten(0, (len(query), -1)).mean(dim=1)  # (B, C, h, w)
        loss = self.loss_map(query, support).mean()
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(query))
        return loss

    def loss_map(self, query: Tensor, support: Tensor) -> Tensor:
        """Return how far features are from registered, ``(B, h, w)`` in [-1, 1].

        Args:
            query: What the network says of images, ``(B, C, h, w)``.
            support: The mean of what it says of others of their category, the same shape.
        """
        query_code, support_code = self.encoder(query), self.encoder(support)
        forward = negative_cosine(self.predictor(query_code), support_code)
        backward = negative_cosine(self.predictor(support_code), query_code)
        return (forward + backward) / 2

    def configure_optimizers(self) -> Any:
        """Return SGD, its rate following the epochs: one for all parts, as their settings agree.

        Raises:
            ValueError: If the number of epochs is not known.
        """
        epochs = total_epochs(self)
        if epochs == 1:
            say("RegAD's rate is 0 in the last epoch, so one learns nothing: take more epochs")
        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, self.lr, momentum=self.momentum)

        def rate(done: int) -> float:  # the public code counts epochs from 1
            return half_cosine(math.pi * min(done + 1, epochs) / epochs)

        return {"optimizer": optimizer, "lr_scheduler": LambdaLR(optimizer, rate)}

    def merit(self, results: Results) -> float | None:
        """Return the sum of image and pixel AUROC, as far as they are defined."""
        values = [results["mean"][name] for name in ("image_auroc", "pixel_auroc")]
        defined = [value for value in values if value is not None]
        return sum(defined) if defined else None

    # -- references ------------------------------------------------------------------------------

    def prepare(self, categories: list[str]) -> None:
        """Look at the first set of references of each category."""
        self._round = 0
        self._gaussians.clear()
        self.reference_paths.clear()
        assert self.data is not None
        for category in categories:
            self.take_references(self.data, category)

    def on_validation_end(self) -> None:
        """Forget the references: training goes on, and they will look otherwise."""
        self._gaussians.clear()

    def take_references(self, data: AnomalyData, category: str, number: int = 0) -> None:
        """Look at one of the sets of references of a category; its seed is its number."""
        self.check_trained()
        references = data.references(category, self.shots, seed=number)
        self.reference_paths.setdefault(category, []).extend(references["path"])
        self.remember(references["image"].to(self.device), category)

    @torch.no_grad()
    def remember(self, images: Tensor, category: str) -> None:
        """Keep how references look, in the place of those that were known of the category.

        Args:
            images: uint8 ``(k, 3, H, W)``, or floating and normalised already.
            category: What they show.
        """
        # Colours are taken out of pixels in [0, 1], before these are normalised.
        several = augment(images if images.is_floating_point() else images.float() / 255)
        if not images.is_floating_point():
            several = (several - self.backbone.mean) / self.backbone.std
        with self.backbone.out_of_autocast():  # Gaussians stay in float32
            split = several.to(self.dtype).split(AT_ONCE)
            parts = [self.network.stages(part) for part in track(split, "looking at references")]
            stages = [torch.cat(stage) for stage in zip(*parts, strict=True)]
            self._gaussians[category] = few_sample_gaussians(
                lambda positions: joined_features(stages, positions),
                stages[0].shape[-1] ** 2,
                self.regularization,
            )

    # -- scoring ---------------------------------------------------------------------------------

    @torch.no_grad()
    def score(self, images: Tensor, categories: list[str]) -> Scores:
        """Score images ``(B, 3, H, W)``: the distance of each position from its Gaussian.

        Raises:
            ValueError: If nothing is known of a category.
        """
        self.check_trained()
        unknown = [name for name in categories if name not in self._gaussians]
        if unknown:
            raise ValueError(
                f"RegAD knows no references of {unknown[0]!r}: give some with take_references or "
                f"remember"
            )
        with self.backbone.out_of_autocast():  # distances stay in float32
            features = joined_features(self.network.stages(self.pixels(images)))
            distances = torch.zeros(features.shape[:2], device=features.device)
            for name in dict.fromkeys(categories):
                members = torch.tensor(
                    [category == name for category in categories], device=features.device
                )
                scores = self._gaussians[name].distances(features[members])
                distances = distances.to(scores.dtype).index_put((members,), scores)
            maps = patches_to_map(distances, (images.shape[-2], images.shape[-1]))
            maps = gaussian_blur(maps, self.sigma)
        return Scores(image_score=image_score(maps, "max"), anomaly_map=maps)

    def on_test_batch_start(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Look at the next set of references when a pass begins."""
        if dataloader_idx != self._round:
            self._round = dataloader_idx
            assert self.data is not None
            for category in self.evaluator.categories:
                self.take_references(self.data, category, dataloader_idx)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Scores:
        """Score a batch and hand it to the evaluator of its pass."""
        scores = self._score(batch)
        self.evaluators[dataloader_idx].update(scores, batch)  # type: ignore[operator]
        return scores

    def on_test_epoch_end(self) -> None:
        """Compute the figures of all rounds; log their means as ``test/...``."""
        rounds = track(self.evaluators, "figures of each round")
        by_round = [evaluator.compute() for evaluator in rounds]  # type: ignore[operator]
        for evaluator in self.evaluators:
            evaluator.reset()  # type: ignore[operator]
        self._by_round = [results["mean"] for results in by_round]
        self.results = averaged(by_round)
        self.log_metrics("test", self.results["mean"])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what was trained on; see the base."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["trained_on"] = self.trained_on

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Know what was trained on; see the base.

        Raises:
            ValueError: If it is tested now.
        """
        super().on_load_checkpoint(checkpoint)
        self.trained_on = checkpoint["trained_on"]
        if self.data is not None:
            self._check_tested(self.data)

    def protocol(self) -> dict[str, Any]:
        """Add the rounds and how far apart their figures are; see the base."""
        return {
            **super().protocol(),
            "shots": self.shots,
            "trained_on": self.trained_on.get("categories"),
            "rounds": self.rounds,
            "spread": spread(self._by_round),
            "by_round": self._by_round,
        }


def averaged(rounds: Sequence[Results]) -> Results:
    """Return the means of the figures of several evaluations; what one lacks has none.

    The bounds of pixel figures are of one evaluation, and are left out if there are several.
    """
    if len(rounds) == 1:
        return rounds[0]
    categories = {
        category: {
            name: _of_all([results["categories"][category][name] for results in rounds], fmean)
            for name in FIGURES
        }
        for category in rounds[0]["categories"]
    }
    return with_means(categories, {})


def spread(rounds: Sequence[Figures]) -> Figures:
    """Return the standard deviation of each figure over several evaluations, None of one."""
    if len(rounds) < 2:
        return dict.fromkeys(FIGURES)
    return {name: _of_all([metrics[name] for metrics in rounds], stdev) for name in FIGURES}


def _of_all(
    values: Sequence[float | None], function: Callable[[list[float]], float]
) -> float | None:
    """Return a function of values that are all defined, None otherwise."""
    defined = [value for value in values if value is not None]
    return function(defined) if len(defined) == len(values) else None
