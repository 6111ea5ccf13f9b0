from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score

from anomaly_clip.drawing.tsne import TAB_LAYOUT, Embedding, tsne, write_embeddings


def groups(apart: float) -> tuple[np.ndarray, list[str], list[bool]]:
    """Return two classes of features, each with two states at distance ``apart``."""
    rng = np.random.default_rng(0)
    rows, classes, states = [], [], []
    for number, name in enumerate(("nut", "wood")):
        for defective in (False, True):
            centre = np.zeros(8)
            centre[number] = 10
            centre[4 + number] = apart if defective else 0
            rows.append(centre + rng.normal(0, 0.3, (10, 8)))
            classes += [name] * 10
            states += [defective] * 10
    return np.concatenate(rows), classes, states


def test_silhouettes_are_scikit_learns_and_follow_the_distance() -> None:
    features, classes, states = groups(6.0)
    far = tsne("far", features, classes, states)
    assert far.points.shape == (40, 2)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    expected = np.mean(
        [
            silhouette_score(unit[part], states[:20], metric="cosine")
            for part in (slice(20), slice(20, 40))
        ]
    )
    assert far.silhouettes["states"] == pytest.approx(expected)
    assert far.silhouettes["classes"] == pytest.approx(
        silhouette_score(unit, classes, metric="cosine")
    )
    near = tsne("near", *groups(0.0))
    assert (near.silhouettes["states"] or 0) < 0.1 < 0.5 < (far.silhouettes["states"] or 0)
    # The groups are separate in the plot, too.
    assert (
        silhouette_score(far.points, [f"{c}{s}" for c, s in zip(classes, states, strict=True)])
        > 0.5
    )


def test_the_same_seed_gives_the_same_layout() -> None:
    features, classes, states = groups(6.0)
    first, second = (tsne("a", features, classes, states, seed=3) for _ in range(2))
    np.testing.assert_array_equal(first.points, second.points)


def test_the_layout_of_the_paper() -> None:
    features, classes, states = groups(6.0)
    plain = tsne("a", features[:20], classes[:20], states[:20])
    shorter = replace(TAB_LAYOUT, iterations=300)  # the paper's 20,000 would take long
    paper = tsne("a", features[:20], classes[:20], states[:20], layout=shorter)
    assert paper.silhouettes == pytest.approx(plain.silhouettes)
    assert TAB_LAYOUT.iterations == 20_000
    expected = TSNE(
        perplexity=19 / 3,
        learning_rate=100,
        early_exaggeration=12,
        angle=0.3,
        init="random",
        max_iter=300,
        random_state=0,
    ).fit_transform(features[:20])
    np.testing.assert_allclose(paper.points, expected, atol=1e-3)


def test_one_group_has_no_silhouette() -> None:
    features, classes, _ = groups(0.0)
    embedding = tsne("a", features[:20], classes[:20], [False] * 20)
    assert embedding.silhouettes == {"classes": None, "states": None}
    with pytest.raises(ValueError, match="3 features are too few"):
        tsne("a", features[:3], classes[:3], [False] * 3)


def test_two_backbones_side_by_side(tmp_path: Path) -> None:
    points = np.array([[0.0, 0.0], [1.0, 1.0]])
    states = np.array([False, True])
    both = [
        Embedding(name, points, ["nut", "wood"], states, {"classes": 0.25, "states": None})
        for name in ("imagenet", "tab")
    ]
    file = write_embeddings(tmp_path, both)
    with Image.open(file) as image:
        assert image.width == 2 * 480
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 24) or []}
    assert len(colours) > 10
    with (tmp_path / "features.csv").open() as table:
        rows = [tuple(row.values()) for row in csv.DictReader(table)]
    assert rows[0] == ("imagenet", "0.0", "0.0", "nut", "normal")
    assert rows[3] == ("tab", "1.0", "1.0", "wood", "defective")
