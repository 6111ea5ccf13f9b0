"""From words to two vectors: prompt ensembles and representative vector selection (RVS).

CLIP-AD (arXiv 2311.00453): every state (``damaged {}``) in every template (``a photo of a {}.``)
gives a sentence; the embeddings of a class's sentences are reduced to one representative vector.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from anomaly_clip.backbones.clip import CLIPBackbone, unit
from anomaly_clip.data.facts import facts_of
from anomaly_clip.files import atomic_path, cache_folder
from anomaly_clip.progress import track

__all__ = ["PromptEnsemble", "RVSSettings", "representative_vector", "text_features"]

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

Method = Literal["mean", "dbscan"]


@dataclass(frozen=True)
class PromptEnsemble:
    """The words for normal and abnormal; each holds ``{}`` where the next goes in.

    Args:
        states_normal: What a normal object is called.
        states_abnormal: What an abnormal object is called.
        templates: Sentences around a state.
    """

    states_normal: list[str] = field(default_factory=lambda: list(STATES_NORMAL))
    states_abnormal: list[str] = field(default_factory=lambda: list(STATES_ABNORMAL))
    templates: list[str] = field(default_factory=lambda: list(TEMPLATES))

    def __post_init__(self) -> None:
        for name, words in asdict(self).items():
            if not words:
                raise ValueError(f"prompts.{name} is empty: give at least one line")
            for line in words:
                if line.count("{}") != 1:
                    raise ValueError(f"prompts.{name}: {line!r} needs one {{}} for the word inside")

    def sentences(self, name: str) -> tuple[list[str], list[str]]:
        """Return the normal and the abnormal sentences of an object, state by state.

        Example:
            >>> from anomaly_clip.backbones.prompts import PromptEnsemble
            >>> normal, abnormal = PromptEnsemble().sentences("bottle")
            >>> len(normal), len(abnormal), abnormal[0]
            (198, 220, 'a cropped photo of the damaged bottle.')
        """

        def fill(states: list[str]) -> list[str]:
            inner = [state.replace("{}", name) for state in states]
            return [t.replace("{}", words) for words in inner for t in self.templates]

        return fill(self.states_normal), fill(self.states_abnormal)


@dataclass(frozen=True)
class RVSSettings:
    """How the embeddings of a class's sentences become one vector.

    Args:
        method: mean, or the mean of the largest DBSCAN cluster.
        eps: DBSCAN's radius; auto follows the data set in use: 1.5 on VisA, 0.5 elsewhere.
        min_samples: DBSCAN's core size; auto: 25 on VisA, 15 elsewhere.
    """

    method: Method = "dbscan"
    eps: float | Literal["auto"] = "auto"
    min_samples: int | Literal["auto"] = "auto"

    def resolve(self, dataset_name: str | None) -> RVSSettings:
        """Put the published values of a data set in the place of ``auto``."""
        facts = facts_of(dataset_name)
        return RVSSettings(
            self.method,
            facts.eps if self.eps == "auto" else self.eps,
            facts.min_samples if self.min_samples == "auto" else self.min_samples,
        )


def representative_vector(
    embeddings: Tensor, method: Method = "dbscan", eps: float = 0.5, min_samples: int = 15
) -> Tensor:
    """Reduce unit embeddings ``(M, D)`` of a class to one unit vector ``(D,)``.

    Args:
        embeddings: One row a sentence.
        method: ``mean``: of all rows. ``dbscan``: of the rows of the largest cluster (ties: the
            first), noise left out; without any cluster the mean of all rows, with a warning.
        eps: DBSCAN's radius (Euclidean).
        min_samples: DBSCAN's core size.

    Raises:
        ValueError: If the method is unknown or there is no row.
    """
    if embeddings.ndim != 2 or not len(embeddings):
        raise ValueError(
            f"representative_vector: expected embeddings (M, D) with M > 0, got "
            f"{tuple(embeddings.shape)}"
        )
    rows = embeddings.detach().cpu().double().numpy()
    if method == "mean":
        vector = rows.mean(axis=0)
    elif method == "dbscan":
        vector = _largest_cluster(rows, eps, min_samples).mean(axis=0)
    else:
        raise ValueError(f"rvs.method {method!r} is unknown; known: mean, dbscan")
    return unit(torch.from_numpy(vector)).to(embeddings.device)


def text_features(
    backbone: CLIPBackbone,
    name: str,
    prompts: PromptEnsemble = PromptEnsemble(),
    rvs: RVSSettings = RVSSettings(),
    dataset_name: str | None = None,
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
    """
    normal, abnormal = prompts.sentences(name)
    rvs = rvs.resolve(dataset_name)
    assert rvs.eps != "auto"
    assert rvs.min_samples != "auto"
    file = None
    if not backbone.is_random:
        key = [1, backbone.identity, normal, abnormal, asdict(rvs)]
        digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
        file = cache_folder() / "text" / f"{digest}.safetensors"
        try:
            return load_file(file)["text_features"].to(backbone.mean.device)
        except (OSError, KeyError, SafetensorError):
            pass  # not there yet, or unreadable: made again below
    embeddings = embed_sentences(backbone, [*normal, *abnormal], f"encoding the words for {name}")
    columns = [
        representative_vector(rows, rvs.method, rvs.eps, rvs.min_samples)
        for rows in embeddings.split([len(normal), len(abnormal)])
    ]
    features = torch.stack(columns, dim=1)
    if file is not None:
        try:
            with atomic_path(file) as temporary:
                save_file({"text_features": features.cpu().contiguous()}, temporary)
        except OSError as error:
            warnings.warn(f"text features are not cached in {file.parent}: {error}", stacklevel=2)
    return features


def embed_sentences(
    backbone: CLIPBackbone, sentences: Sequence[str], title: str = "encoding sentences"
) -> Tensor:
    """Return the unit embeddings ``(M, D)`` of sentences, behind a progress bar."""
    batches = [sentences[start : start + 64] for start in range(0, len(sentences), 64)]
    with torch.no_grad():
        return unit(torch.cat([backbone.encode_text(batch) for batch in track(batches, title)]))


def _largest_cluster(
    rows: NDArray[np.float64], eps: float, min_samples: int
) -> NDArray[np.float64]:
    from sklearn.cluster import DBSCAN  # most of a second to import

    labels = DBSCAN(eps=eps, min_samples=min_samples).fit_predict(rows)
    members = labels[labels >= 0]
    if not len(members):
        warnings.warn(
            f"DBSCAN (eps {eps}, min_samples {min_samples}) finds no cluster among {len(rows)} "
            f"sentences: their mean is used",
            stacklevel=3,
        )
        return rows
    return rows[labels == np.bincount(members).argmax()]
