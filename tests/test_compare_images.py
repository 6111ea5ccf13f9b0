"""Images of ``compare``: methods without maps, and categories too small for t-SNE."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from anomaly_clip.commands import compare_images
from anomaly_clip.commands.compare_images import draw_embeddings, draw_maps
from anomaly_clip.drawing.tsne import Embedding
from anomaly_clip.methods import TAB


def test_a_method_without_maps_has_no_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_images, "class_of_checkpoint", lambda _: TAB)
    draw_maps(tmp_path, ["imagenet", "tab"], "nut", 4)
    assert not list(tmp_path.iterdir())


def test_silhouettes_are_means_of_the_categories_that_have_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    states = {"a": 0.25, "b": None, "c": 0.75, "few": None}

    def embed(run: Path, label: str, layer: str) -> Embedding | None:
        if run.name == "few":
            return None
        silhouettes = {"classes": None, "states": states[run.name]}
        return Embedding(label, None, [], None, silhouettes)  # type: ignore[arg-type]

    monkeypatch.setattr(compare_images, "_embed_run", embed)
    monkeypatch.setattr(compare_images, "write_embeddings", lambda *_: None)
    draw_embeddings(tmp_path, ["imagenet"], list(states), "layer3")
    err = capsys.readouterr().err
    assert "imagenet: silhouette of normal and defective images in layer3: 0.500" in err
    assert "few: fewer than 4 test images, too few for t-SNE" in err
    written = json.loads((tmp_path / "silhouettes.json").read_text())
    assert written["states"] == {
        "a": {"imagenet": 0.25},
        "b": {"imagenet": None},
        "c": {"imagenet": 0.75},
    }
