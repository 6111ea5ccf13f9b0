"""From words to two vectors: prompt ensembles and representative vector selection (RVS).

CLIP-AD (arXiv 2311.00453): every state (``damaged {}``) in every template (``a photo of a {}.``)
gives a sentence; the embeddings of a class's sentences are reduced to one representative vector.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from anomaly_clip.backbones.clip import CLIPBackbone, unit
from anomaly_clip.errors import check_above, check_at_least
from anomaly_clip.files import atomic_path, cache_folder
from anomaly_clip.progress import track

__all__ = [
    "Method",
    "PromptEnsemble",
    "RVSSettings",
    "embed_sentences",
    "representative_vector",
    "text_features",
]

# The published lists, in the published order (specification, section 3.1).
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

# The 21 lines of WinCLIP's re-implementations: two are missing, one is there twice.
_LEFT_OUT = ("a cropped photo of a {}.", "a jpeg corrupted photo of a {}.")
TEMPLATE_SETS: dict[str, tuple[str, ...]] = {
    "full": TEMPLATES,
    "reimpl": (
        *(line for line in TEMPLATES if line not in _LEFT_OUT),
        "a jpeg corrupted photo of the {}.",
    ),
}

Method = Literal["mean", "pca", "kde", "dbscan", "mean_shift"]

DBSCAN_EPS, DBSCAN_MIN_SAMPLES = 0.5, 15
"""Published radius and core size."""
DBSCAN_OF_DATASET = {"VisA": (1.5, 25)}
"""The same by data set, where others are published."""
BANDWIDTHS = {"kde": 0.3, "mean_shift": 2.0}
"""Published; a bandwidth of 2 makes one cluster of unit vectors, which are at most 2 apart."""


@dataclass(frozen=True)
class PromptEnsemble:
    """The words for normal and abnormal; each holds ``{}`` where the next goes in.

    Args:
        states_normal: What a normal object is called.
        states_abnormal: What an abnormal object is called.
        templates: Sentences around a state, or the name of a published list: full, or reimpl (as
            in WinCLIP's re-implementations).
    """

    states_normal: list[str] = field(default_factory=lambda: list(STATES_NORMAL))
    states_abnormal: list[str] = field(default_factory=lambda: list(STATES_ABNORMAL))
    templates: list[str] | Literal["full", "reimpl"] = "full"

    def __post_init__(self) -> None:
        for name, words in self.as_lists().items():
            if not words:
                raise ValueError(f"prompts.{name} is empty: give at least one line")
            for line in words:
                if line.count("{}") != 1:
                    raise ValueError(f"prompts.{name}: {line!r} needs one {{}} for the word inside")

    def as_lists(self) -> dict[str, list[str]]:
        """Return all lines, those of a published list, too."""
        templates = self.templates
        return {
            "states_normal": self.states_normal,
            "states_abnormal": self.states_abnormal,
            "templates": list(TEMPLATE_SETS[templates])
            if isinstance(templates, str)
            else templates,
        }

    def sentences(self, name: str) -> tuple[list[str], list[str]]:
        """Return the normal and the abnormal sentences of an object, state by state.

        Example:
            >>> from anomaly_clip.backbones.prompts import PromptEnsemble
            >>> normal, abnormal = PromptEnsemble().sentences("bottle")
            >>> len(normal), len(abnormal), abnormal[0]
            (198, 220, 'a cropped photo of the damaged bottle.')
        """
        templates = self.as_lists()["templates"]

        def fill(states: list[str]) -> list[str]:
            inner = [state.replace("{}", name) for state in states]
            return [t.replace("{}", words) for words in inner for t in templates]

        return fill(self.states_normal), fill(self.states_abnormal)


@dataclass(frozen=True)
class RVSSettings:
    """How the embeddings of a class's sentences become one vector.

    Args:
        method: mean; pca: their first principal component, the sentences being the variables; kde:
            their mean, weighted by how dense it is around them; dbscan, mean_shift: the mean of the
            largest cluster.
        eps: DBSCAN's radius; auto follows the data set in use: 1.5 on VisA, 0.5 elsewhere.
        min_samples: DBSCAN's core size; auto: 25 on VisA, 15 elsewhere.
        bandwidth: Of kde (auto: 0.3) and mean_shift (auto: 2).
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
        """Put the published values of a data set in the place of ``auto``."""
        eps, min_samples = DBSCAN_OF_DATASET.get(
            dataset_name or "", (DBSCAN_EPS, DBSCAN_MIN_SAMPLES)
        )
        return RVSSettings(
            self.method,
            eps if self.eps == "auto" else self.eps,
            min_samples if self.min_samples == "auto" else self.min_samples,
            BANDWIDTHS.get(self.method, "auto") if self.bandwidth == "auto" else self.bandwidth,
        )


def representative_vector(
    embeddings: Tensor, rvs: RVSSettings = RVSSettings(), dataset_name: str | None = None
) -> Tensor:
    """Reduce unit embeddings ``(M, D)`` of a class to one unit vector ``(D,)``.

    Specification of CLIP-AD, section 3.3; solved in float64.

    Args:
        embeddings: One row a sentence.
        rvs: How. Of the largest cluster, ties go to the first, noise is left out; without any
            cluster the mean of all rows is taken, with a warning.
        dataset_name: The data set in use, on which ``auto`` settings depend.

    Raises:
        ValueError: If there is no row.
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
    """Return an object's text features ``(D, 2)``: unit columns, normal and abnormal.

    They are kept in the cache folder, keyed by weights, sentences and RVS settings; those of random
    weights are not kept.

    Args:
        backbone: The CLIP whose text tower encodes.
        name: The object's words, put into every sentence.
        prompts: States and templates; default: the published ones.
        rvs: How to reduce; default: DBSCAN.
        dataset_name: The data set in use, on which ``auto`` RVS settings depend.
        unit_rows: Whether sentences count by the direction of their embeddings alone (CLIP-AD), or
            by their length, too (WinCLIP).
    """
    normal, abnormal = prompts.sentences(name)
    rvs = rvs.resolve(dataset_name)
    file = None
    if not backbone.is_random:
        key = [2, backbone.identity, normal, abnormal, asdict(rvs), unit_rows]
        digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
        file = cache_folder() / "text" / f"{digest}.safetensors"
        try:
            return load_file(file)["text_features"].to(backbone.mean.device)
        except (OSError, KeyError, SafetensorError):
            pass  # not there yet, or unreadable: made again below
    title = f"encoding the words for {name}"
    embeddings = embed_sentences(backbone, [*normal, *abnormal], title, unit_rows=unit_rows)
    parts = embeddings.split([len(normal), len(abnormal)])
    columns = [representative_vector(rows, rvs) for rows in parts]
    features = torch.stack(columns, dim=1)  # (D, 2)
    if file is not None:
        try:
            with atomic_path(file) as temporary:
                save_file({"text_features": features.cpu().contiguous()}, temporary)
        except OSError as error:
            warnings.warn(f"text features are not cached in {file.parent}: {error}", stacklevel=2)
    return features


def embed_sentences(
    backbone: CLIPBackbone,
    sentences: Sequence[str],
    title: str = "encoding sentences",
    *,
    unit_rows: bool = True,
) -> Tensor:
    """Return the embeddings ``(M, D)`` of sentences, unit ones if asked, behind a progress bar."""
    batches = [sentences[start : start + 64] for start in range(0, len(sentences), 64)]
    with torch.no_grad():
        rows = torch.cat([backbone.encode_text(batch) for batch in track(batches, title)])
    return unit(rows) if unit_rows else rows


Rows = NDArray[np.float64]


# scikit-learn takes most of a second to import, so the functions that use it do.
def _mean(rows: Rows, rvs: RVSSettings) -> Rows:
    return rows.mean(axis=0)


def _pca(rows: Rows, rvs: RVSSettings) -> Rows:
    """Take coordinates as samples and sentences as variables, as the published code does."""
    from sklearn.decomposition import PCA

    component = PCA(1, svd_solver="full").fit_transform(rows.T)[:, 0]
    return component if component @ rows.mean(axis=0) >= 0 else -component


def _kde(rows: Rows, rvs: RVSSettings) -> Rows:
    from scipy.special import softmax
    from sklearn.neighbors import KernelDensity

    density = KernelDensity(bandwidth=rvs.bandwidth).fit(rows)
    # Normalised densities: their common factor, which can be huge, cancels.
    return np.asarray(softmax(density.score_samples(rows)) @ rows)


def _dbscan(rows: Rows, rvs: RVSSettings) -> Rows:
    from sklearn.cluster import DBSCAN

    labels = DBSCAN(eps=rvs.eps, min_samples=rvs.min_samples).fit_predict(rows)
    if not (labels >= 0).any():
        warnings.warn(
            f"DBSCAN (eps {rvs.eps}, min_samples {rvs.min_samples}) finds no cluster among "
            f"{len(rows)} sentences: their mean is used",
            stacklevel=3,
        )
        return rows.mean(axis=0)
    return _mean_of_largest(rows, labels)


def _mean_shift(rows: Rows, rvs: RVSSettings) -> Rows:
    from sklearn.cluster import MeanShift

    return _mean_of_largest(rows, MeanShift(bandwidth=rvs.bandwidth).fit_predict(rows))


def _mean_of_largest(rows: Rows, labels: NDArray[np.int64]) -> Rows:
    """Return the mean of the largest cluster, the first of equal ones; below zero is noise."""
    return rows[labels == np.bincount(labels[labels >= 0]).argmax()].mean(axis=0)


_REDUCTIONS: dict[Method, Callable[[Rows, RVSSettings], Rows]] = {
    "mean": _mean,
    "pca": _pca,
    "kde": _kde,
    "dbscan": _dbscan,
    "mean_shift": _mean_shift,
}
