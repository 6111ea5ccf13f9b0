"""MuSc on a sequence of images: what is kept between calls, and equality with a plain form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

from anomaly_clip import load
from anomaly_clip.backbones.clip import CLIPBackbone
from anomaly_clip.detector import Detector
from anomaly_clip.methods import MuSc, musc, mutual_scoring
from anomaly_clip.methods.mutual_scoring import (
    RecentImages,
    largest_cosines,
    mean_of_nearest,
    sequential_scores,
    table_of_pairs,
    window,
)


def units(n: int, seed: int = 0) -> Tensor:
    """Return unit features ``(n, 6, 5)``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(n, 6, 5, generator=generator), dim=-1)


# -- pure functions --------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [1, 4, 16, 20, 40])
def test_the_last_images_are_kept(memory: int) -> None:
    recent = RecentImages(memory)
    features = units(45)
    for number, image in enumerate(features, 1):
        recent.add(image)
        last = features[max(0, number - memory) : number]
        kept = recent.features
        assert kept.shape == last.shape
        order = kept[:, 0, 0].argsort()
        assert kept[order].equal(last[last[:, 0, 0].argsort()])


@pytest.mark.parametrize("patches_at_once", [1, 13, 1000])
def test_largest_cosines_in_blocks(patches_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(mutual_scoring.PATCHES_AT_ONCE, "cpu", patches_at_once)
    few, many = units(2), units(7, seed=1)
    expected = torch.einsum("apc,mqc->apmq", few, many).amax(dim=3)
    assert_close(largest_cosines(few, many), expected)


@pytest.mark.parametrize(("start", "memory"), [(2, 3), (4, 3), (5, 100), (3, 6)])
@pytest.mark.parametrize("calls", [[9], [5, 4], [5, 1, 1, 1, 1]])
def test_several_calls_give_the_scores_of_one(start: int, memory: int, calls: list[int]) -> None:
    features = units(9)
    table = table_of_pairs(features)
    recent = RecentImages(memory)
    scores, first = [], start
    for part in features.split(calls):
        scores.append(
            sequential_scores(part, [0, 0.5], first, memory, range(len(part)), recent=recent)
        )
        first = 0
    for position, actual in enumerate(torch.cat(scores)):
        others = window(position, start, memory)
        row = table[position, :, others]
        expected = mean_of_nearest(row, [0, 0.5], int(row[0].isfinite().sum()))
        assert_close(actual, expected)


# -- a detector ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(tiny_clip: CLIPBackbone) -> list[Image.Image]:
    generator = np.random.default_rng(0)
    shape = (tiny_clip.image_size, tiny_clip.image_size, 3)
    return [Image.fromarray(generator.integers(0, 256, shape, np.uint8)) for _ in range(9)]


def detector_of(backbone: CLIPBackbone) -> Detector:
    return load(MuSc(backbone, [1, 2], memory=4, start=3, scoring="online"), device="cpu")


def maps_and_scores(
    detector: Detector, images: list[Image.Image], calls: list[int]
) -> list[tuple[Tensor, float]]:
    """Return the results of consecutive calls."""
    results = []
    for size in calls:
        part, images = images[:size], images[size:]
        results += [(torch.from_numpy(p.map), p.score) for p in detector.predict(part)]
    return results


@pytest.mark.filterwarnings("ignore:this MuSc has random weights")
@pytest.mark.parametrize("room", [0, 1 << 40])
@pytest.mark.parametrize("calls", [[9], [3, 1, 1, 1, 1, 1, 1], [5, 4], [4, 5]])
def test_a_detector_keeps_the_order_of_its_images(
    tiny_clip: CLIPBackbone,
    images: list[Image.Image],
    calls: list[int],
    room: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(musc, "room_on", lambda device: room)
    detector = detector_of(tiny_clip)
    method = detector.method
    assert isinstance(method, MuSc)
    actual = maps_and_scores(detector, images, calls)
    tensors = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]
    expected = method.score(torch.stack(tensors), ["tile"] * 9)
    for place, (anomaly_map, score) in enumerate(actual):
        assert_close(anomaly_map, expected["anomaly_map"][place], atol=1e-5, rtol=0)
        assert score == pytest.approx(float(expected["image_score"][place]), abs=1e-5)
    [seen] = method._seen.values()
    assert len(seen.raw) == len(seen.images) == 4
    for tensor in seen.images.tensors.values():  # no view, which would keep all images
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
    names = {"image", "image_rest"}
    if room:
        assert set(seen.images.tensors) == names  # the others are kept in aggregated form only
        assert {len(recent.features) for recent in (seen.recent or {}).values()} == {4}
    else:
        assert seen.recent is None
        assert set(seen.images.tensors) == {*names, "1", "2"}


@pytest.mark.filterwarnings("ignore:this MuSc has random weights")
def test_a_call_that_fails_midway_ends_the_sequence(
    tiny_clip: CLIPBackbone, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some layers would have one image more than others, and later scores would be wrong."""
    detector = detector_of(tiny_clip)
    first = [p.score for p in detector.predict(images[:4])]
    scored: list[int] = []

    def fail(*arguments: object, **options: object) -> Tensor:
        scored.append(len(scored))
        if len(scored) == 3:
            raise MemoryError
        return sequential_scores(*arguments, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(musc, "sequential_scores", fail)
        with pytest.raises(MemoryError):
            detector.predict(images[4:5])
    with pytest.raises(ValueError, match="give at least 2"):
        detector.predict(images[4])
    assert [p.score for p in detector.predict(images[:4])] == pytest.approx(first, abs=1e-6)
