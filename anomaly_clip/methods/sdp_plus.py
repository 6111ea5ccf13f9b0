"""SDP+ of CLIP-AD (arXiv 2311.00453): trained linear layers align patches with the prompts.

One linear layer per stage projects the patch tokens of the original path into the text space, where
they are compared with the text vectors. The resulting probabilities are added to the map of SDP.
The layers are trained on the labelled test split of another data set (``data.auxiliary``); the CLIP
stays frozen.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from anomaly_clip.backbones import clip, frozen, surgery
from anomaly_clip.backbones.clip import CLIPBackbone, CLIPSettings, unit
from anomaly_clip.backbones.prompts import PromptEnsemble, RVSSettings
from anomaly_clip.backbones.state_dicts import state_dict_of
from anomaly_clip.backbones.surgery import StageTokens
from anomaly_clip.backbones.weight_files import (
    WeightFileError,
    check_floating,
    listed,
    read_content,
)
from anomaly_clip.backbones.weight_sources import local_file
from anomaly_clip.errors import check_above, check_at_least
from anomaly_clip.files import source_hash, write_bytes
from anomaly_clip.losses import dice_loss, focal_loss
from anomaly_clip.maps import gaussian_blur, image_score, patches_to_map
from anomaly_clip.methods import sdp
from anomaly_clip.methods.sdp import SDP, text_score
from anomaly_clip.metrics.evaluator import EvaluatorSettings
from anomaly_clip.progress import say
from anomaly_clip.records import Batch, Encoder, Scores

if TYPE_CHECKING:
    from anomaly_clip.data.dataset import AnomalyData

__all__ = ["SDPPlus", "read_linear_layers"]

FACTOR = 100.0  # logit scale of the softmax over the two classes
OPTION = "model.linear_layers"
LAYERS_KEY = "linear_layers"  # key of the layers in the authors' files
APRIL_GAN_KEY = "trainable_linearlayer"
LAYER_NAME = re.compile(r"(|.*\.)fc\.\d+\.(?:weight|bias)")
"""Name of a tensor of a layer, after the prefixes of wrappers."""
SIGMA = {"VisA": 2.0}  # sigma of the Gaussian blur, in pixels at image size 240 (published)
DEFAULT_SIGMA = 8.0
LAYERS_SOURCE = "give the linear_layers.pth that a fit of SDPPlus or anomaly_clip export writes"


class SDPPlus(SDP):
    """SDP with trained linear layers (CLIP-AD, arXiv 2311.00453; docs/methods/sdp_plus.md).

    Args:
        backbone: The CLIP model.
        prompts: States and templates of the normal and the abnormal prompts.
        rvs: Reduction of the prompts of a class to one vector. A setting ``auto`` depends on the
            auxiliary data set during training and on the evaluated data set afterwards.
        stages: Stages in use, each given by the number of its last block (1-based); default: all
            four.
        stage_tokens: As for :class:`SDP`.
        sigma: Standard deviation of the Gaussian blur of the map, in pixels; auto: 2 on VisA, 8
            elsewhere (published).
        lr: Learning rate of Adam.
        linear_layers: File of trained layers, with which no fit is needed. In the authors' format,
            its key ``linear_layers`` holds a dictionary of ``fc.{i}.weight`` and ``fc.{i}.bias``;
            other forms: docs/weights.md.
        feature_cache_gb: Maximum size of the cache of frozen image features, in GB (1e9 bytes). The
            cache is filled at the start of ``fit``. 0 turns it off: images are then decoded and
            encoded in every epoch.
        evaluator: Settings of the metrics.
    """

    can_be_fitted: ClassVar[bool] = True
    reads_raw_patches: ClassVar[bool] = True
    inference_arguments: ClassVar[frozenset[str]] = frozenset(
        {"evaluator", "sigma", "feature_cache_gb", "linear_layers"}
    )
    init_only_arguments: ClassVar[frozenset[str]] = frozenset({"linear_layers"})

    def __init__(
        self,
        backbone: CLIPSettings | CLIPBackbone = CLIPSettings(),
        prompts: PromptEnsemble = PromptEnsemble(),
        rvs: RVSSettings = RVSSettings(),
        stages: list[int] | None = None,
        stage_tokens: StageTokens = "official",
        sigma: float | Literal["auto"] = "auto",
        lr: float = 1e-4,
        linear_layers: str | None = None,
        feature_cache_gb: float = 20.0,
        evaluator: EvaluatorSettings = EvaluatorSettings(),
    ) -> None:
        super().__init__(
            backbone,
            prompts,
            rvs,
            stages,
            stage_tokens=stage_tokens,
            sigma=0.0 if sigma == "auto" else sigma,
            evaluator=evaluator,
        )
        check_above("model.lr", lr, 0)
        check_at_least("model.feature_cache_gb", feature_cache_gb, 0)
        self.requested_sigma = sigma
        self.feature_cache_gb = feature_cache_gb
        self.lr = lr
        self.fitted = linear_layers is not None
        width, dim = self.backbone.visual.conv1.out_channels, self.backbone.visual.output_dim
        with torch.random.fork_rng(devices=[]):
            # The initial weights depend on the seed alone, not on earlier random numbers.
            torch.manual_seed(torch.initial_seed())
            self.fc = nn.ModuleList(nn.Linear(width, dim) for _ in self.stages)
        self.save_hyperparameters(
            ignore=["backbone", "prompts", "rvs", "evaluator", "linear_layers"]
        )
        self.save_hyperparameters(
            {
                "backbone": asdict(self.backbone.settings),
                "prompts": asdict(self.prompts),
                "rvs": asdict(self.rvs),
            }
        )
        self._cached: dict[str, Encoder] = {}
        """Encoders of those sets of the fit, ``fit`` and ``validation``, whose features are cached.
        """
        self._external: dict[str, str] | None = None
        if linear_layers is not None:
            self.load_linear_layers(Path(linear_layers))

    @property
    def must_be_fitted(self) -> bool:  # type: ignore[override]
        """True while there are no trained layers."""
        return not self.fitted

    def setup(self, stage: str) -> None:
        """Check that there is a labelled data set to train on; see the base class.

        Raises:
            ValueError: If ``fit`` has no auxiliary data set, or one without masks.
        """
        super().setup(stage)
        if stage == "fit" and (self.data is None or self.data.auxiliary is None):
            raise ValueError(
                "SDPPlus is trained on the labelled test images of another data set, but "
                "data.auxiliary is not set: name one, as in --data.auxiliary VisA "
                "--data.auxiliary.root DIR"
            )
        if stage == "fit" and not self.auxiliary_data.has_masks:
            raise ValueError(
                f"SDPPlus is trained on masks, but data.auxiliary "
                f"{self.auxiliary_data.dataset_name} has none: choose a data set with masks, such "
                f"as VisA or MVTecAD"
            )

    @property
    def auxiliary_data(self) -> AnomalyData:
        """Auxiliary data set that ``fit`` trains on."""
        assert self.data is not None
        assert self.data.auxiliary is not None
        return self.data.auxiliary

    @property
    def external_weights(self) -> dict[str, str] | None:
        """File and sha256 of the layers, if they were read from a file."""
        return self._external

    @property
    def blur(self) -> float:
        """Standard deviation of the Gaussian blur in use, in pixels."""
        if self.requested_sigma == "auto":
            return SIGMA.get(self.dataset_name or "", DEFAULT_SIGMA)
        return self.requested_sigma

    @torch.no_grad()
    def score_with_text(self, images: Tensor, text: Tensor) -> Scores:
        """Score images against the text features of their categories; see :class:`SDP`."""
        return self._score_tokens(self.tokens(images, scoring=True), text)

    @torch.no_grad()
    def score_features(self, features: dict[str, Tensor], categories: list[str]) -> Scores:
        """Score tokens that :meth:`tokens` returned and that were cached in half precision."""
        return self._score_tokens(features, torch.stack([self.text(name) for name in categories]))

    def _score_tokens(self, tokens: dict[str, Tensor], text: Tensor) -> Scores:
        tokens = {key: value.float() for key, value in tokens.items()}
        with self.backbone.out_of_autocast():
            projected = [tokens[f"projected.{stage}"] for stage in self.stages]
            class_token = tokens.get("class_token", projected[-1][:, 0])
            similarity = self.similarity(projected, text)
            size = (self.image_size, self.image_size)
            trained = self.stage_maps([tokens[f"raw.{s}"] for s in self.stages], text, size)
            maps = gaussian_blur(self.upsample(similarity) + trained.sum(dim=0), self.blur)
            r0 = text_score(class_token, text)
            r1 = image_score(maps, "max")
        return Scores(image_score=r0, anomaly_map=maps, score_parts=torch.stack([r0, r1], dim=1))

    @torch.no_grad()
    def tokens(self, images: Tensor, *, scoring: bool) -> dict[str, Tensor]:
        """Return the tokens of the frozen image tower, in the dtype of the tower.

        Args:
            images: uint8 ``(B, 3, H, W)``, or floating point and already normalised.
            scoring: True: return all tokens that scoring needs. False: return only those that a
                training step needs.

        Returns:
            ``raw.{stage}`` ``(B, N, W)`` for each stage: the patches of the original path. For
            scoring also ``projected.{stage}`` ``(B, 1 + N, D)`` and, if ``stages`` omits the last
            stage, ``class_token`` ``(B, D)``.
        """
        with self.backbone.out_of_autocast():
            tokens, class_token = self.encode(images)
        numbered = list(zip(self.stages, tokens, strict=True))
        tokens_by_name = {f"raw.{stage}": token.raw[:, 1:] for stage, token in numbered}
        if scoring:
            tokens_by_name |= {f"projected.{stage}": token.projected for stage, token in numbered}
            if self.stages[-1] != self.backbone.num_layers:
                tokens_by_name["class_token"] = class_token
        return tokens_by_name

    def on_fit_start(self) -> None:
        """Encode all images once with the frozen image tower; see ``feature_cache_gb``.

        Raises:
            ValueError: If the features would exceed ``feature_cache_gb``.
        """
        self._cached = {}
        data = self.data
        if self.feature_cache_gb == 0 or data is None or self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        encoders = {
            name: Encoder(partial(self.tokens, scoring=scoring), self._key(scoring), self.device)
            for name, scoring in (("fit", False), ("validation", True))
        }
        sets = data.cache_features(encoders, self.feature_cache_gb, "model.feature_cache_gb")
        self._cached = {name: encoders[name] for name in sets}

    def _key(self, scoring: bool) -> str:
        backbone = self.backbone
        code = source_hash(clip.__file__, frozen.__file__, surgery.__file__, sdp.__file__, __file__)
        dtype = backbone.visual.conv1.weight.dtype
        pixels = f"{backbone.mean.flatten().tolist()} {backbone.std.flatten().tolist()}"
        options = f"{self.stages} {self.stage_tokens} {scoring}"
        return f"{backbone.identity} {dtype} {pixels} {options} {code} {version('open_clip_torch')}"

    def stage_maps(self, stages: Sequence[Tensor], text: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the probability maps of the abnormal class, ``(stages, B, *size)``.

        As published, logits are upsampled before they become probabilities.

        Args:
            stages: Patches of the original path, ``(B, N, W)`` each.
            text: ``(B, D, 2)``, unit columns: normal, abnormal.
            size: Height and width in pixels.
        """
        # The softmax over two classes is the sigmoid of the difference of their logits.
        direction = (text[..., 1] - text[..., 0]).unsqueeze(-1)
        maps = []
        for layer, tokens in zip(self.fc, stages, strict=True):
            logits = FACTOR * (unit(layer(tokens.float())) @ direction).squeeze(-1)
            maps.append(patches_to_map(logits, size, align_corners=True).sigmoid())
        return torch.stack(maps)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the focal and dice losses, summed over the stages."""
        mask = batch["mask"]
        dataset_name = self.auxiliary_data.dataset_name
        text = torch.stack([self.text(name, dataset_name) for name in batch["category"]])
        if "features" in batch:
            tokens = batch["features"]
        elif "fit" in self._cached:
            tokens = self._halves("fit", batch)
        else:
            tokens = self.tokens(batch["image"], scoring=False)
        raw = [tokens[f"raw.{stage}"] for stage in self.stages]
        with self.backbone.out_of_autocast():
            maps = self.stage_maps(raw, text, (mask.shape[-2], mask.shape[-1]))
            focal = torch.stack([focal_loss(stage_map, mask) for stage_map in maps])
            dice = torch.stack([dice_loss(stage_map, mask) for stage_map in maps])
        loss = focal.sum() + dice.sum()
        metrics = {"train/focal": focal.sum().detach(), "train/dice": dice.sum().detach()}
        count = len(mask)
        self.log_dict(metrics, on_step=False, on_epoch=True, batch_size=count, sync_dist=True)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=count)
        return loss

    def _score(self, batch: Batch) -> Scores:
        fitting = self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        if fitting and "image" in batch and "validation" in self._cached:
            batch = Batch({**batch, "features": self._halves("validation", batch)})
        return super()._score(batch)

    def _halves(self, name: str, batch: Batch) -> dict[str, Tensor]:
        """Encode images whose features are not in the cache, with the values that it would keep."""
        try:
            return self._cached[name].halves(batch["image"])
        except OverflowError as error:
            raise ValueError(
                f"{error}, in the batch that starts with {batch['path'][0]}: set "
                f"model.feature_cache_gb to 0"
            ) from None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam without a schedule, as published."""
        return torch.optim.Adam(self.fc.parameters(), lr=self.lr)

    @property
    def export_name(self) -> str:
        """Name of the exported file."""
        return "linear_layers.pth"

    def export(self, folder: Path) -> Path:
        """Write the layers in the authors' format."""
        file = folder / self.export_name
        state = {f"fc.{key}": value.detach().cpu() for key, value in self.fc.state_dict().items()}
        content = io.BytesIO()
        torch.save({LAYERS_KEY: state}, content)
        write_bytes(file, content.getbuffer())
        return file

    def load_linear_layers(self, file: Path) -> None:
        """Load the layers from a file; see :func:`read_linear_layers`.

        Raises:
            FileNotFoundError: If the file does not exist.
            ValueError: If the file has a different format, or its layers fit a different backbone.
        """
        file = local_file(str(file), OPTION, f"; {LAYERS_SOURCE}")
        state = read_linear_layers(file)
        current_state = {f"fc.{key}": value for key, value in self.fc.state_dict().items()}
        shapes, expected = (
            {k: v.shape for k, v in tensors.items()} for tensors in (state, current_state)
        )
        if shapes != expected:
            given, needed = (_width(tensors) for tensors in (state, current_state))
            odd = sorted(shapes.keys() ^ expected.keys())
            if given == needed:
                given = f"{odd[0]} is {'missing' if odd[0] in expected else 'unexpected'}"
            raise ValueError(
                f"model.linear_layers {file}: {given}, but {self.backbone.settings.name} with "
                f"stages {self.stages} needs {needed}; use the backbone and stages that these "
                f"layers were trained with"
            )
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        self._external = {"file": str(file), "sha256": digest}
        self.fc.load_state_dict({key.removeprefix("fc."): state[key] for key in current_state})


def read_linear_layers(file: Path) -> dict[str, Tensor]:
    """Read layers in the authors' format; see ``linear_layers`` of :class:`SDPPlus`.

    The dictionary of the layers may also be bare, below APRIL-GAN's key or those of
    :func:`~anomaly_clip.backbones.state_dicts.state_dict_of`, and its names may share a prefix.
    Tensors outside the prefix are not used, and named.

    Args:
        file: A file of any form that :mod:`anomaly_clip.backbones.weight_files` reads, or a folder
            with one.

    Returns:
        ``fc.{i}.weight`` ``(D, W)`` and ``fc.{i}.bias`` ``(D,)`` for each layer, in float32.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file has a different format, several sets of layers, or quantised ones.
    """
    path = local_file(str(file), OPTION, f"; {LAYERS_SOURCE}")
    try:
        content = read_content(path).content
    except WeightFileError as error:
        raise ValueError(
            f"{OPTION} {file}: not a file that can be read safely ({error.form}); {error.way_out}, "
            f"or {LAYERS_SOURCE}"
        ) from None
    try:
        state = state_dict_of(content, (LAYERS_KEY, APRIL_GAN_KEY))
        prefix = _layers_prefix(state.tensors)
        layers = {
            key.removeprefix(prefix): value
            for key, value in state.tensors.items()
            if key.startswith(prefix)
        }
        _check_layers(layers)
    except WeightFileError as error:
        raise ValueError(
            f"{OPTION} {file}: expected a dictionary {LAYERS_KEY} with the tensors fc.0.weight, "
            f"fc.0.bias and so on, but {error.form}; {error.way_out}"
        ) from None
    if state.others:
        say(f"{OPTION} {file}: {state.container} is used, {', '.join(state.others)} not")
    if unused := [key for key in state.tensors if not key.startswith(prefix)]:
        say(f"{OPTION} {file}: tensors outside the layers are not used: {listed(unused)}")
    if APRIL_GAN_KEY in f"{state.container}.{prefix}".split("."):
        say(
            f"{OPTION} {file} has the key {APRIL_GAN_KEY} of APRIL-GAN, whose layers are "
            f"trained on the output of each stage: model.stage_tokens clean reads the same"
        )
    return {key: value.float() for key, value in layers.items()}


def _layers_prefix(tensors: Mapping[str, Tensor]) -> str:
    """Return what precedes the names of the layers: empty, or the prefixes of wrappers.

    Raises:
        WeightFileError: If there are no layers, or several sets of them.
    """
    matches = (LAYER_NAME.fullmatch(key) for key in tensors)
    prefixes = list(dict.fromkeys(match[1] for match in matches if match))
    if not prefixes:
        raise WeightFileError(f"it contains {listed(list(tensors))}", LAYERS_SOURCE)
    if len(prefixes) > 1:
        raise WeightFileError(
            f"it contains {len(prefixes)} sets of layers, {' and '.join(map(repr, prefixes[:3]))}",
            f"save one of them under {LAYERS_KEY} and give that file",
        )
    return prefixes[0]


def _check_layers(layers: Mapping[str, Tensor]) -> None:
    """Check names, dimensions and types of layers.

    Raises:
        WeightFileError: If there are other tensors among them, or they are quantised.
    """
    others = [key for key in layers if not LAYER_NAME.fullmatch(key)]
    if others:
        raise WeightFileError(f"it also contains {listed(others)}", LAYERS_SOURCE)
    for key, value in layers.items():
        if value.ndim != (2 if key.endswith("weight") else 1):
            raise WeightFileError(f"{key} has the shape {tuple(value.shape)}", LAYERS_SOURCE)
    check_floating(layers)


def _width(state: dict[str, Tensor]) -> str:
    """Describe layers by their number and widths."""
    weights = [value for key, value in state.items() if key.endswith("weight")]
    if not weights:
        return "no layers"
    rows, columns = weights[0].shape[0], weights[0].shape[-1]
    return f"{len(weights)} layers from {columns} to {rows} channels"
