"""RegAD (arXiv 2207.07361): few-shot detection by image registration, trained on other categories.

After each stage of a ResNet, a spatial transformer rotates and scales the feature maps. On all
categories except the tested one, the network is trained to align the features of two images of the
same category. A few normal images of the tested category are then enough to detect anomalies: they
are augmented, and a Gaussian is fitted at every position. Settings and conventions are those of the
public code; see docs/methods/regad.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from lightning.pytorch.trainer.states import RunningStage
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from anomaly_clip.backbones.cnn import CNNBackbone, CNNSettings
from anomaly_clip.errors import check_above, check_at_least, check_between, check_choice
from anomaly_clip.maps import gaussian_blur, image_score, patches_to_map
from anomaly_clip.methods.feature_method import Select, TrainedMethod
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
from anomaly_clip.metric_values import METRICS, PIXEL_METRICS, MetricValues, Results, with_means
from anomaly_clip.metrics.evaluator import EvaluatorSettings
from anomaly_clip.progress import say, track
from anomaly_clip.records import Batch, LoaderNeeds, Scores
from anomaly_clip.schedules import half_cosine, total_epochs

if TYPE_CHECKING:
    from anomaly_clip.data.dataset import AnomalyData

__all__ = ["PixelCNNSettings", "RegAD", "averaged"]

AT_ONCE = 32
"""Augmented images per forward pass."""


@dataclass(frozen=True)
class PixelCNNSettings(CNNSettings):
    """CNN settings that leave pixels in [0, 1] unnormalised by default.

    Args:
        name: A torchvision ResNet.
        weights: imagenet, a file, or the word random.
        layers: Set by RegAD; leave this option out.
        mean: Pixel mean.
        std: Pixel standard deviation.
    """

    # A default instance of CNNSettings would not do: a configuration that only sets the weights
    # would replace it, and so lose its mean and std.
    mean: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    std: list[float] = field(default_factory=lambda: [1.0, 1.0, 1.0])


class RegAD(TrainedMethod):
    """Registration across categories, with Gaussians of a few normal images (arXiv 2207.07361).

    One model is tested on one category and trained on others (``data.train_categories: others``).
    A test consists of several rounds. Each round samples its own set of reference images, with the
    number of the round as seed, and scores all test images. Metrics are means over the rounds. The
    stored maps and scores are those of the first round; validation and ``predict`` only run that
    round.

    Args:
        backbone: The ResNet to train, and its initial weights.
        image_size: Side of the square input images, in pixels; a multiple of 32.
        shots: Number of reference images of a category. In training, each image is compared with
            this number of support images of its category.
        rounds: Number of rounds of a test, each with another set of reference images.
        regularization: Value added to the diagonal of every covariance.
        sigma: Standard deviation of the Gaussian blur of the map, in pixels.
        lr: Learning rate of SGD; it follows half a cosine down to 0 in the last epoch.
        momentum: Momentum of SGD.
        select: last: test the last epoch; best_test: test the epoch with the largest sum of image
            and pixel AUROC on the test images, as in the public code.
        seed: Seed of the initial weights of all parts except the ResNet.
        evaluator: Settings of the metrics.
        candidates: Networks from which ``best_test`` selects. after_epoch: the one after each
            epoch. before_epoch: the one before each epoch, as in the public code, so with the
            untrained network and without the one after the last epoch.
    """

    trains_resnet: ClassVar[bool] = True
    backbone: CNNBackbone
    metric_arguments: ClassVar[frozenset[str]] = frozenset({"evaluator", "rounds"})
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
        candidates: Literal["after_epoch", "before_epoch"] = "after_epoch",
    ) -> None:
        super().__init__(backbone, STAGES, image_size, select, evaluator)
        check_choice("model.candidates", candidates, ("after_epoch", "before_epoch"))
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
        self.candidates = candidates
        width = self.backbone.channels[STAGES[-1]]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # independent of random numbers used by the backbone
            self.network = RegistrationNetwork(self.backbone, image_size)
            self.encoder = encoder(width)
            self.predictor = predictor(width)
        self.trained_on: dict[str, Any] = {}
        """Data set and categories used for training."""
        self._gaussians: dict[str, FewSampleGaussians] = {}
        self._round = 0
        self._by_round: list[MetricValues] = []
        self.save_hyperparameters(ignore=["backbone", "evaluator"])
        self.save_hyperparameters({"backbone": asdict(self.backbone_settings)})

    # -- data requirements -----------------------------------------------------------------------

    @property
    def loader_needs(self) -> LoaderNeeds:
        """Loader requirements: support images in training, and one test pass per round."""
        needs = super().loader_needs
        return replace(needs, support_images=self.shots, test_passes=self.rounds)

    def setup(self, stage: str) -> None:
        """Check the data, and create one evaluator per round; see the base class.

        Raises:
            ValueError: If the tested category is also a training category, the data has options
                that RegAD does not support, or there are fewer reference images than requested.
        """
        super().setup(stage)
        data = self.data
        if data is None:
            return
        if data.has_shots:
            raise ValueError(
                f"RegAD trains on all normal images of the other categories, and model.shots "
                f"({self.shots}) sets the number of reference images of the tested category: leave "
                f"out data.shots and data.fraction"
            )
        if stage == "fit":
            self._check_training(data)
            self.trained_on = {"data": data.dataset_name, "categories": data.train_categories}
            if self.select == "best_test" and self.candidates == "before_epoch":
                self.trainer.num_sanity_val_steps = math.inf  # validates the untrained network
        self._check_tested(data)
        for category in data.categories:
            data.drawn_of(category, self.shots, seed=0)
        passes = self.rounds if stage == "test" else 1
        others = [self.new_evaluator(data.categories) for _ in range(passes - 1)]
        self.evaluators = nn.ModuleList([self.evaluator, *others])

    def _check_one_category(self, data: AnomalyData, stage: str) -> None:
        super()._check_one_category(data, "test")  # training always uses several categories

    def _check_tested(self, data: AnomalyData) -> None:
        trained = self.trained_on.get("categories", [])
        both = [name for name in data.categories if name in trained]
        if both and self.trained_on["data"] == data.dataset_name:
            raise ValueError(
                f"RegAD must be tested on a category that it was not trained on, got {both[0]!r} "
                f"of {data.dataset_name}: test another category, or fit again without it"
            )

    def _check_training(self, data: AnomalyData) -> None:
        both = [name for name in data.train_categories if name in data.categories]
        if both:
            raise ValueError(
                f"RegAD must be trained on categories other than the tested one, got {both[0]!r} "
                f"for both training and testing: set data.train_categories to others"
            )
        if data.validation.holds_out:
            raise ValueError(
                f"RegAD needs normal reference images for the validation categories, which "
                f"data.val_split {data.val_split} does not provide: set data.val_split to none or "
                f"test"
            )
        if data.synthesis is not None:
            raise ValueError(
                f"RegAD trains on normal images only, got data.synthesis.recipe "
                f"{data.synthesis.recipe}: leave out data.synthesis"
            )
        if data.balanced:
            raise ValueError(
                f"data.balanced must be false for RegAD, whose batches hold one category each and "
                f"whose epochs hold every image once, got {str(data.balanced).lower()}: leave out "
                f"data.balanced"
            )

    # -- training --------------------------------------------------------------------------------

    def pixels(self, images: Tensor) -> Tensor:
        """Normalise uint8 images; floating-point ones are taken as already normalised."""
        if images.is_floating_point():
            return images
        backbone = self.backbone
        return ((images.float() / 255 - backbone.mean) / backbone.std).to(self.dtype)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch of one category, in which each image has support images.

        Raises:
            ValueError: If there are no support images.
        """
        if "support" not in batch:
            raise ValueError(
                f"RegAD trains on batches with support images, got a batch of "
                f"{', '.join(batch)}: pass a data module of anomaly_clip.data as datamodule="
            )
        query = self.network(self.pixels(batch["image"]))
        supports = self.network(self.pixels(batch["support"].flatten(0, 1)))  # (B * k, C, h, w)
        support = supports.unflatten(0, (len(query), -1)).mean(dim=1)  # (B, C, h, w)
        loss = self.loss_map(query, support).mean()
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(query))
        return loss

    def loss_map(self, query: Tensor, support: Tensor) -> Tensor:
        """Return the registration loss at every position, ``(B, h, w)`` in [-1, 1].

        Args:
            query: Features of images, ``(B, C, h, w)``.
            support: Mean features of the support images of each image, of the same shape.
        """
        query_code, support_code = self.encoder(query), self.encoder(support)
        forward = negative_cosine(self.predictor(query_code), support_code)
        backward = negative_cosine(self.predictor(support_code), query_code)
        return (forward + backward) / 2

    def configure_optimizers(self) -> Any:
        """Return SGD and its schedule; all parts share one optimiser, as their settings are equal.

        Raises:
            ValueError: If the number of epochs is unknown.
        """
        epochs = total_epochs(self)
        if epochs == 1:
            say(
                "RegAD's learning rate is 0 in the last epoch, so a single epoch learns nothing: "
                "raise trainer.max_epochs"
            )
        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, self.lr, momentum=self.momentum)

        def rate(done: int) -> float:  # the public code counts epochs from 1
            return half_cosine(math.pi * min(done + 1, epochs) / epochs)

        return {"optimizer": optimizer, "lr_scheduler": LambdaLR(optimizer, rate)}

    def merit(self, results: Results) -> float | None:
        """Return the sum of image and pixel AUROC.

        An undefined AUROC is left out of the sum. If both are undefined, the result is None.
        """
        values = [results["mean"][name] for name in ("image_auroc", "pixel_auroc")]
        defined = [value for value in values if value is not None]
        return sum(defined) if defined else None

    def tie_breaker(self, results: Results) -> float | None:
        """Return None: the first of epochs with equal sums is selected, as in the public code."""
        return None

    @property
    def is_candidate(self) -> bool:
        """True if the network that is being validated may be selected; see ``candidates``."""
        if self.candidates == "after_epoch":
            return super().is_candidate
        if self.trainer.state.stage == RunningStage.SANITY_CHECKING:
            return True  # before the first epoch
        return super().is_candidate and self.current_epoch + 1 < total_epochs(self)

    # -- references ------------------------------------------------------------------------------

    def prepare(self, categories: list[str]) -> None:
        """Fit the Gaussians of each category to its first set of reference images."""
        self._round = 0
        self._gaussians.clear()
        self.reference_paths.clear()
        assert self.data is not None
        for category in categories:
            self.take_references(self.data, category)

    def on_validation_end(self) -> None:
        """Drop the Gaussians of the reference images, as further training changes the features."""
        self._gaussians.clear()

    def take_references(self, data: AnomalyData, category: str, number: int = 0) -> None:
        """Fit the Gaussians of a category to reference images sampled with ``number`` as seed."""
        self.check_trained()
        references = data.references(category, self.shots, seed=number)
        self.reference_paths.setdefault(category, []).extend(references["path"])
        self.remember(references["image"].to(self.device), category)

    @torch.no_grad()
    def remember(self, images: Tensor, category: str) -> None:
        """Fit the Gaussians of a category to reference images, replacing earlier ones.

        Args:
            images: uint8 ``(k, 3, H, W)``, or floating-point and already normalised.
            category: Category of the images.
        """
        # Grey versions are computed from pixels in [0, 1], before the normalisation.
        augmented = augment(images if images.is_floating_point() else images.float() / 255)
        if not images.is_floating_point():
            augmented = (augmented - self.backbone.mean) / self.backbone.std
        with self.backbone.out_of_autocast():  # Gaussians stay in float32
            split = augmented.to(self.dtype).split(AT_ONCE)
            parts = [self.network.stages(part) for part in track(split, "encoding references")]
            stages = [torch.cat(stage) for stage in zip(*parts, strict=True)]
            self._gaussians[category] = few_sample_gaussians(
                lambda positions: joined_features(stages, positions),
                stages[0].shape[-1] ** 2,
                self.regularization,
            )

    # -- scoring ---------------------------------------------------------------------------------

    @torch.no_grad()
    def score(self, images: Tensor, categories: list[str]) -> Scores:
        """Score images ``(B, 3, H, W)`` by the distance of each position from its Gaussian.

        Raises:
            ValueError: If there are no reference images of a category.
        """
        self.check_trained()
        unknown = [name for name in categories if name not in self._gaussians]
        if unknown:
            raise ValueError(
                f"RegAD has no reference images of {unknown[0]!r}: add some with take_references "
                f"or remember"
            )
        with self.backbone.out_of_autocast():  # distances stay in float32
            features = joined_features(self.network.stages(self.pixels(images)))
            distances = torch.zeros(features.shape[:2], device=features.device)
            for name in dict.fromkeys(categories):
                members = torch.tensor([c == name for c in categories], device=features.device)
                scores = self._gaussians[name].distances(features[members])
                distances = distances.to(scores.dtype).index_put((members,), scores)
            return self._scores(distances, images)

    @torch.no_grad()
    def score_category(self, images: Tensor, category: str) -> Scores:
        """Score images of one category; see the base class."""
        if not torch.compiler.is_compiling():
            return super().score_category(images, category)
        with self.backbone.out_of_autocast():  # distances stay in float32
            features = joined_features(self.network.stages(self.pixels(images)))
            return self._scores(self._gaussians[category].distances(features), images)

    def _scores(self, distances: Tensor, images: Tensor) -> Scores:
        maps = patches_to_map(distances, (images.shape[-2], images.shape[-1]))
        maps = gaussian_blur(maps, self.sigma)
        return Scores(image_score=image_score(maps, "max"), anomaly_map=maps)

    def on_test_batch_start(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Load the next set of reference images when a round begins."""
        if dataloader_idx != self._round:
            self._round = dataloader_idx
            assert self.data is not None
            for category in self.evaluator.categories:
                self.take_references(self.data, category, dataloader_idx)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Scores:
        """Score a batch and pass it to the evaluator of its round."""
        scores = self._score(batch)
        self.evaluators[dataloader_idx].update(scores, batch)  # type: ignore[operator]
        return scores

    def on_test_epoch_end(self) -> None:
        """Compute the metrics of all rounds; log their means as ``test/...``."""
        rounds = track(self.evaluators, "metrics of each round")
        by_round = [evaluator.compute() for evaluator in rounds]  # type: ignore[operator]
        for evaluator in self.evaluators:
            evaluator.reset()  # type: ignore[operator]
        self._by_round = [results["mean"] for results in by_round]
        self.results = averaged(by_round)
        self.log_metrics("test", self.results["mean"])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the training categories; see the base class."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["trained_on"] = self.trained_on

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the training categories; see the base class.

        Raises:
            ValueError: If a training category is to be tested.
        """
        super().on_load_checkpoint(checkpoint)
        self.trained_on = checkpoint["trained_on"]
        if self.data is not None:
            self._check_tested(self.data)

    def protocol(self) -> dict[str, Any]:
        """Add the rounds and the spread of their metrics; see the base class."""
        return {
            **super().protocol(),
            "shots": self.shots,
            "trained_on": self.trained_on.get("categories"),
            "rounds": self.rounds,
            "spread": spread(self._by_round),
            "by_round": self._by_round,
            **({"candidates": self.candidates} if self.select == "best_test" else {}),
        }


def averaged(rounds: Sequence[Results]) -> Results:
    """Return the mean metrics of several evaluations; a metric undefined in any of them is None.

    The bounds of a mean are the means of the bounds.
    """
    if len(rounds) == 1:
        return rounds[0]
    categories = {
        category: {
            name: _of_all([results["categories"][category][name] for results in rounds], fmean)
            for name in METRICS
        }
        for category in rounds[0]["categories"]
    }
    intervals: dict[str, dict[str, tuple[float, float]]] = {}
    for category, means in categories.items():
        bounds = {
            name: mean_of_bounds(rounds, category, name)
            for name in PIXEL_METRICS
            if means[name] is not None
            and any(name in results["intervals"].get(category, {}) for results in rounds)
        }
        intervals |= {category: bounds} if bounds else {}
    return with_means(categories, intervals)


def mean_of_bounds(rounds: Sequence[Results], category: str, name: str) -> tuple[float, float]:
    """Return the bounds of the mean of a metric over evaluations; exact values have no width."""
    ends: list[tuple[float, float]] = []
    for results in rounds:
        value = results["categories"][category][name]
        assert value is not None
        ends.append(results["intervals"].get(category, {}).get(name, (value, value)))
    low, high = (fmean(column) for column in zip(*ends, strict=True))
    return low, high


def spread(rounds: Sequence[MetricValues]) -> MetricValues:
    """Return the standard deviation of each metric over the evaluations, None for a single one."""
    if len(rounds) < 2:
        return dict.fromkeys(METRICS)
    return {name: _of_all([metrics[name] for metrics in rounds], stdev) for name in METRICS}


def _of_all(
    values: Sequence[float | None], function: Callable[[list[float]], float]
) -> float | None:
    """Return the function of the values if all are defined, None otherwise."""
    defined = [value for value in values if value is not None]
    return function(defined) if len(defined) == len(values) else None
