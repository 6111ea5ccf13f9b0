"""Prompt ensembles and representative vector selection (RVS): from a category name to two vectors.

By default, the prompts are those of CLIP-AD (arXiv 2311.00453): every state (``damaged {}``) in
every template (``a photo of a {}.``). There are two classes of prompts, normal and abnormal. The
embeddings of each class are reduced to one representative vector.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from anomaly_clip.backbones.clip import CLIPBackbone, unit
from anomaly_clip.backbones.tokenizers import CLIPTokenizer
from anomaly_clip.cache_files import read_cached, warn_of_cache, write_cached
from anomaly_clip.errors import check_above, check_at_least
from anomaly_clip.files import cache_folder
from anomaly_clip.progress import track

__all__ = [
    "STATES_WINCLIP",
    "Method",
    "PromptEnsemble",
    "RVSSettings",
    "check_prompts",
    "embed_prompts",
    "representative_vector",
    "text_features",
]

# The lists and their order are those of CLIP-AD's official code.
STATES_NORMAL = (
    "flawless {}",
    "perfect {}",
    "unblemished {}",
    "{} without flaw",
    "{} without defect",
    "{} without damage",
    "{} without scratch",
    "{} without crack",
    "{} without contamination",
)
STATES_ABNORMAL = (
    "damaged {}",
    "imperfect {}",
    "blemished {}",
    "broken {}",
    "{} with flaw",
    "{} with defect",
    "{} with damage",
    "{} with scratch",
    "{} with crack",
    "{} with contamination",
)
STATES_WINCLIP = (
    "{}",
    "flawless {}",
    "perfect {}",
    "unblemished {}",
    "{} without flaw",
    "{} without defect",
    "{} without damage",
)
"""States of a normal object of WinCLIP, which APRIL-GAN shares."""
TEMPLATES = (
    "a cropped photo of the {}.",
    "a cropped photo of a {}.",
    "a close-up photo of a {}.",
    "a close-up photo of the {}.",
    "a bright photo of a {}.",
    "a bright photo of the {}.",
    "a dark photo of the {}.",
    "a dark photo of a {}.",
    "a jpeg corrupted photo of a {}.",
    "a jpeg corrupted photo of the {}.",
    "a blurry photo of the {}.",
    "a blurry photo of a {}.",
    "a photo of the {}.",
    "a photo of a {}.",
    "a photo of a large {}.",
    "a photo of the small {}.",
    "a photo of the large {}.",
    "a photo of a small {}.",
    "a photo of the {} for visual inspection.",
    "a photo of a {} for visual inspection.",
    "a photo of the {} for anomaly detection.",
    "a photo of a {} for anomaly detection.",
)

# APRIL-GAN (arXiv 2305.17382), in the order of its official code.
TEMPLATES_APRIL_GAN = (
    "a bad photo of a {}.",
    "a low resolution photo of the {}.",
    "a bad photo of the {}.",
    "a cropped photo of the {}.",
    "a bright photo of a {}.",
    "a dark photo of the {}.",
    "a photo of my {}.",
    "a photo of the cool {}.",
    "a close-up photo of a {}.",
    "a black and white photo of the {}.",
    "a bright photo of the {}.",
    "a cropped photo of a {}.",
    "a jpeg corrupted photo of a {}.",
    "a blurry photo of the {}.",
    "a photo of the {}.",
    "a good photo of the {}.",
    "a photo of one {}.",
    "a close-up photo of the {}.",
    "a photo of a {}.",
    "a low resolution photo of a {}.",
    "a photo of a large {}.",
    "a blurry photo of a {}.",
    "a jpeg corrupted photo of the {}.",
    "a good photo of a {}.",
    "a photo of the small {}.",
    "a photo of the large {}.",
    "a black and white photo of a {}.",
    "a dark photo of a {}.",
    "a photo of a cool {}.",
    "a photo of a small {}.",
    "there is a {} in the scene.",
    "there is the {} in the scene.",
    "this is a {} in the scene.",
    "this is the {} in the scene.",
    "this is one {} in the scene.",
)

# WinCLIP's re-implementations have 21 templates: two of the 22 are missing, one appears twice.
_LEFT_OUT = ("a cropped photo of a {}.", "a jpeg corrupted photo of a {}.")
TEMPLATE_SETS: dict[str, tuple[str, ...]] = {
    "full": TEMPLATES,
    "reimpl": (
        *(line for line in TEMPLATES if line not in _LEFT_OUT),
        "a jpeg corrupted photo of the {}.",
    ),
    "april_gan": TEMPLATES_APRIL_GAN,
}

Method = Literal["mean", "pca", "kde", "dbscan", "mean_shift"]

DBSCAN_EPS, DBSCAN_MIN_SAMPLES = 0.5, 15
"""Published radius and minimum number of samples of a core point."""
DBSCAN_OF_DATASET = {"VisA": (1.5, 25)}
"""Published radius and minimum number of samples for data sets with values of their own."""
BANDWIDTHS = {"kde": 0.3, "mean_shift": 2.0}
"""Published bandwidths. A bandwidth of 2 puts unit vectors, at most 2 apart, into one cluster."""


@dataclass(frozen=True)
class PromptEnsemble:
    """States and templates of the prompts.

    The category name replaces ``{}`` in a state, and the state replaces ``{}`` in a template.

    Args:
        states_normal: Descriptions of a normal object.
        states_abnormal: Descriptions of an abnormal object.
        templates: Prompt templates around a state, or the name of a published list: full (of
            CLIP-AD), reimpl (of WinCLIP's re-implementations) or april_gan (of APRIL-GAN).
    """

    states_normal: list[str] = field(default_factory=lambda: list(STATES_NORMAL))
    states_abnormal: list[str] = field(default_factory=lambda: list(STATES_ABNORMAL))
    templates: list[str] | Literal["full", "reimpl", "april_gan"] = "full"

    def __post_init__(self) -> None:
        for name, lines in self.as_lists().items():
            if not lines:
                raise ValueError(
                    f"prompts.{name} is empty; give at least one line (--model.prompts.{name}, or "
                    f"--prompts.{name} of anomaly_clip prompts)"
                )
            for line in lines:
                if line.count("{}") != 1:
                    raise ValueError(
                        f"prompts.{name}: {line!r} needs one {{}} as placeholder; correct the line "
                        f"(--model.prompts.{name}, or --prompts.{name} of anomaly_clip prompts)"
                    )

    def as_lists(self) -> dict[str, list[str]]:
        """Return the lines of each field; a published list of templates replaces its name."""
        templates = self.templates
        return {
            "states_normal": self.states_normal,
            "states_abnormal": self.states_abnormal,
            "templates": list(TEMPLATE_SETS[templates])
            if isinstance(templates, str)
            else templates,
        }

    def for_category(self, name: str) -> tuple[list[str], list[str]]:
        """Return the normal and the abnormal prompts for a category name, ordered by state.

        Example:
            >>> from anomaly_clip.backbones.prompts import PromptEnsemble
            >>> normal, abnormal = PromptEnsemble().for_category("bottle")
            >>> len(normal), len(abnormal), abnormal[0]
            (198, 220, 'a cropped photo of the damaged bottle.')
        """
        templates = self.as_lists()["templates"]

        def fill(states: list[str]) -> list[str]:
            inner = [state.replace("{}", name) for state in states]
            return [t.replace("{}", state) for state in inner for t in templates]

        return fill(self.states_normal), fill(self.states_abnormal)


@dataclass(frozen=True)
class RVSSettings:
    """Representative vector selection: reduction of prompt embeddings to one vector.

    Args:
        method: mean; pca: the first principal component, with the prompts as variables; kde: the
            mean, weighted by a kernel density estimate; dbscan, mean_shift: the mean of the
            largest cluster.
        eps: Radius of DBSCAN; auto depends on the data set: 1.5 on VisA, 0.5 elsewhere.
        min_samples: Minimum samples of a DBSCAN core point; auto: 25 on VisA, 15 elsewhere.
        bandwidth: Bandwidth of kde (auto: 0.3) and mean_shift (auto: 2).
    """

    method: Method = "dbscan"
    eps: float | Literal["auto"] = "auto"
    min_samples: int | Literal["auto"] = "auto"
    bandwidth: float | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        if self.eps != "auto":
            check_above("rvs.eps", self.eps, 0)
        if self.min_samples != "auto":
            check_at_least("rvs.min_samples", self.min_samples, 1)
        if self.bandwidth != "auto":
            check_above("rvs.bandwidth", self.bandwidth, 0)

    def resolve(self, dataset_name: str | None) -> RVSSettings:
        """Replace ``auto`` by the published values for a data set."""
        eps, min_samples = DBSCAN_OF_DATASET.get(
            dataset_name or "", (DBSCAN_EPS, DBSCAN_MIN_SAMPLES)
        )
        return RVSSettings(
            self.method,
            eps if self.eps == "auto" else self.eps,
            min_samples if self.min_samples == "auto" else self.min_samples,
            BANDWIDTHS.get(self.method, "auto") if self.bandwidth == "auto" else self.bandwidth,
        )


def check_prompts(
    backbone: CLIPBackbone, name: str, normal: Sequence[str], abnormal: Sequence[str]
) -> None:
    """Warn of prompts that are longer than the text tower allows and lose their ends.

    Args:
        backbone: CLIP whose text tower encodes the prompts.
        name: The category name in the prompts.
        normal: Normal prompts.
        abnormal: Abnormal prompts.

    Raises:
        ValueError: If a normal prompt without its end equals an abnormal one.
    """
    cut = [[text for text in side if backbone.is_cut(text)] for side in (normal, abnormal)]
    count = sum(map(len, cut))
    if not count:
        return
    start = (
        f"prompts with the name {name!r}: {count} of {len(normal) + len(abnormal)} have more than "
        f"the {backbone.context_length} tokens of CLIP"
    )
    way_out = "give a shorter name with data.category or data.words"
    first, second = (set(map(tuple, backbone.tokenize(side).tolist())) for side in cut)
    if both := first & second:
        raise ValueError(
            f"{start}; without their ends, {len(both)} normal prompts equal abnormal ones: "
            f"{way_out}"
        )
    example = (cut[0] or cut[1])[0]
    warnings.warn(
        f"{start} and lose their ends, such as {example!r}, which loses "
        f"{backbone.lost_end(example)!r}: {way_out}",
        stacklevel=2,
    )


def representative_vector(
    embeddings: Tensor, rvs: RVSSettings = RVSSettings(), dataset_name: str | None = None
) -> Tensor:
    """Reduce the prompt embeddings ``(M, D)`` of a class to one unit vector ``(D,)``.

    All reductions are computed in float64. ``docs/howto/prompts.md`` describes them.

    Args:
        embeddings: One row per prompt.
        rvs: Reduction method. Clusters exclude noise; of equally large clusters, the first is used.
            If there is no cluster, the mean of all embeddings is used, with a warning.
        dataset_name: Data set that ``auto`` settings depend on.

    Raises:
        ValueError: If there are no embeddings, or their shape is not ``(M, D)``.
    """
    if embeddings.ndim != 2 or not len(embeddings):
        raise ValueError(
            f"representative_vector: expected embeddings (M, D) with M > 0, got "
            f"{tuple(embeddings.shape)}"
        )
    rows = embeddings.detach().cpu().double().numpy()
    vector = _REDUCTIONS[rvs.method](rows, rvs.resolve(dataset_name))
    return unit(torch.from_numpy(vector)).to(embeddings.device)


def text_features(
    backbone: CLIPBackbone,
    name: str,
    prompts: PromptEnsemble = PromptEnsemble(),
    rvs: RVSSettings = RVSSettings(),
    dataset_name: str | None = None,
    *,
    unit_rows: bool = True,
) -> Tensor:
    """Return the text features ``(D, 2)`` of a category: unit columns, normal first.

    Unless the weights are random, the cache folder stores the features under a hash of weights,
    prompts and settings.

    Args:
        backbone: CLIP whose text tower encodes the prompts.
        name: Category name, inserted into every prompt.
        prompts: States and templates; default: the published ones.
        rvs: Reduction to one vector; default: DBSCAN.
        dataset_name: Data set that ``auto`` RVS settings depend on.
        unit_rows: True scales embeddings to unit length before the reduction, as CLIP-AD does.
            False leaves their lengths unchanged, as WinCLIP does.

    Raises:
        ValueError: If the name is so long that a normal prompt without its end equals an abnormal
            one; see :func:`check_prompts`.
    """
    normal, abnormal = prompts.for_category(name)
    check_prompts(backbone, name, normal, abnormal)
    rvs = rvs.resolve(dataset_name)
    file = None
    if not backbone.is_random:
        values = [2, backbone.identity, normal, abnormal, asdict(rvs), unit_rows]
        if not isinstance(backbone.tokenizer, CLIPTokenizer):  # its files are not in the identity
            values.append(backbone.tokenize([*normal, *abnormal]).tolist())
        key = json.dumps(values)
        digest = hashlib.sha256(key.encode()).hexdigest()
        file = cache_folder() / "text" / f"{digest}.safetensors"
        cached = _cached_features(file, key, backbone.embed_dim)
        if cached is not None:
            return cached.to(backbone.mean.device)
    title = f"encoding the prompts for {name}"
    embeddings = embed_prompts(backbone, [*normal, *abnormal], title, unit_rows=unit_rows)
    parts = embeddings.split([len(normal), len(abnormal)])
    columns = [representative_vector(rows, rvs) for rows in parts]
    features = torch.stack(columns, dim=1)  # (D, 2)
    if file is not None:
        try:
            write_cached(file, key, save({"text_features": features.cpu().contiguous()}))
        except OSError as error:
            warn_of_cache(file.parent, error)
    return features


def _cached_features(file: Path, key: str, width: int) -> Tensor | None:
    """Return cached text features ``(D, 2)``; None if they are missing, damaged or others."""
    content = read_cached(file, key)
    if content is None:
        return None
    try:
        features = load(content).get("text_features")
    except SafetensorError:
        return None
    if features is None or features.shape != (width, 2) or not features.isfinite().all():
        return None
    return features


def embed_prompts(
    backbone: CLIPBackbone,
    texts: Sequence[str],
    title: str = "encoding prompts",
    *,
    unit_rows: bool = True,
) -> Tensor:
    """Return the embeddings ``(M, D)`` of prompts, by default of unit length; show progress."""
    batches = [texts[start : start + 64] for start in range(0, len(texts), 64)]
    with torch.no_grad():
        rows = torch.cat([backbone.encode_text(batch) for batch in track(batches, title)])
    return unit(rows) if unit_rows else rows


Rows = NDArray[np.float64]


# scikit-learn takes most of a second to import, so it is imported in the functions that use it.
def _mean(rows: Rows, rvs: RVSSettings) -> Rows:
    return rows.mean(axis=0)


def _pca(rows: Rows, rvs: RVSSettings) -> Rows:
    """Use dimensions as samples and prompts as variables, as the published code does."""
    from sklearn.decomposition import PCA

    component = PCA(1, svd_solver="full").fit_transform(rows.T)[:, 0]
    return component if component @ rows.mean(axis=0) >= 0 else -component


def _kde(rows: Rows, rvs: RVSSettings) -> Rows:
    from scipy.special import softmax
    from sklearn.neighbors import KernelDensity

    density = KernelDensity(bandwidth=rvs.bandwidth).fit(rows)
    # The softmax of log densities cancels their common factor, which can be huge.
    return np.asarray(softmax(density.score_samples(rows)) @ rows)


def _dbscan(rows: Rows, rvs: RVSSettings) -> Rows:
    from sklearn.cluster import DBSCAN

    labels = DBSCAN(eps=rvs.eps, min_samples=rvs.min_samples).fit_predict(rows)
    if not (labels >= 0).any():
        warnings.warn(
            f"DBSCAN (eps {rvs.eps}, min_samples {rvs.min_samples}) finds no cluster among "
            f"{len(rows)} prompts; their mean is used",
            stacklevel=3,
        )
        return rows.mean(axis=0)
    return _mean_of_largest(rows, labels)


def _mean_shift(rows: Rows, rvs: RVSSettings) -> Rows:
    from sklearn.cluster import MeanShift

    return _mean_of_largest(rows, MeanShift(bandwidth=rvs.bandwidth).fit_predict(rows))


def _mean_of_largest(rows: Rows, labels: NDArray[np.int64]) -> Rows:
    """Return the mean of the largest cluster (the first of ties); negative labels are noise."""
    return rows[labels == np.bincount(labels[labels >= 0]).argmax()].mean(axis=0)


_REDUCTIONS: dict[Method, Callable[[Rows, RVSSettings], Rows]] = {
    "mean": _mean,
    "pca": _pca,
    "kde": _kde,
    "dbscan": _dbscan,
    "mean_shift": _mean_shift,
}
