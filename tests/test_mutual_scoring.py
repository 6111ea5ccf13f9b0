from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import Golden
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from torch import Tensor
from torch.testing import assert_close

from anomaly_clip.backbones.clip import unit
from anomaly_clip.methods import mutual_scoring
from anomaly_clip.methods.mutual_scoring import (
    aggregate,
    bounds,
    check_interval,
    check_k_list,
    mean_of_nearest,
    mutual_scores,
    rescore,
    rescore_in_sequence,
    sequential_scores,
    table_of_pairs,
    table_of_rows,
    window,
)

FORMS: list[dict[str, Any]] = [{}, {"room": 0}, {"room": 1 << 12}]
"""All pairs at once, one row after the other, and blocks of rows."""


def close(actual: Tensor, expected: Tensor, atol: float) -> None:
    assert_close(actual.double(), expected.double(), atol=atol, rtol=0)


def random_features(n: int = 7, patches: int = 5, channels: int = 4, seed: int = 0) -> Tensor:
    return unit(torch.randn(n, patches, channels, generator=torch.Generator().manual_seed(seed)))


def plain_scores(features: Tensor, interval: Sequence[float]) -> Tensor:
    """Return mutual scores in float64 as the paper states them, image by image."""
    arrays = features.double().numpy()
    scores = []
    for i, image in enumerate(arrays):
        others = [j for j in range(len(arrays)) if j != i]
        distances = np.stack([cdist(image, arrays[j]).min(axis=1) for j in others])  # (n - 1, N)
        low, high = bounds(interval, len(others))
        scores.append(np.sort(distances, axis=0)[low:high].mean(axis=0))
    return torch.from_numpy(np.stack(scores))


# -- official arrays -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def arrays(golden: Callable[[str], Golden]) -> Golden:
    return golden("musc")


def grids_of(arrays: Golden, layer: int) -> Tensor:
    """Return the tokens of a layer without the class token, ``(n, C, g, g)``."""
    tokens = arrays.inputs[f"tokens.{layer}"][:, 1:]
    side = math.isqrt(tokens.shape[1])
    return tokens.mT.unflatten(2, (side, side))


def num_layers(arrays: Golden) -> int:
    return sum(name.startswith("tokens.") for name in arrays.inputs)


def special(arrays: Golden) -> tuple[int, Tensor]:
    """Return the neighbourhood of all arrays without one in their name, and its features."""
    expected = arrays.expected["msm.slow"]
    sides = {3, *arrays.meta["r_list"]}
    features = {r: aggregate(grids_of(arrays, 0), r) for r in sides}
    apart = {r: float((mutual_scores(f) - expected).abs().max()) for r, f in features.items()}
    r = min(sides, key=lambda side: apart[side])
    return r, features[r]


@pytest.mark.golden
def test_golden_neighbourhoods(arrays: Golden) -> None:
    named = arrays.named("lnamd.r")
    assert {int(r) for r in named} == set(arrays.meta["r_list"])
    for r, expected in named.items():  # (n, N, layers, C), not yet divided by their length
        assert expected.shape[2] == num_layers(arrays)
        for layer in range(expected.shape[2]):
            lengths = expected[:, :, layer].norm(dim=-1, keepdim=True)
            ours = aggregate(grids_of(arrays, layer), int(r)) * lengths
            close(ours, expected[:, :, layer], 1e-5)


@pytest.mark.golden
@pytest.mark.parametrize("form", FORMS)
def test_golden_mutual_scores(arrays: Golden, form: dict[str, Any]) -> None:
    named = arrays.named("msm.r")
    assert len(named) == num_layers(arrays) * len(arrays.meta["r_list"])
    for name, expected in named.items():
        r, layer = map(int, name.split("."))
        features = aggregate(grids_of(arrays, layer), r)
        close(mutual_scores(features, arrays.meta["interval"], **form), expected, 1e-4)


@pytest.mark.golden
@pytest.mark.parametrize("form", FORMS)
def test_golden_intervals(arrays: Golden, form: dict[str, Any]) -> None:
    _, features = special(arrays)
    for low, high in arrays.meta["intervals"]:
        expected = arrays.expected[f"msm.interval.{low}_{high}"]
        close(mutual_scores(features, [low, high], **form), expected, 1e-4)
    assert len(arrays.meta["intervals"]) == len(arrays.named("msm.interval."))
    slow = arrays.expected["msm.slow"]
    close(mutual_scores(features, arrays.meta["interval"], **form), slow, 1e-4)


@pytest.mark.golden
@pytest.mark.parametrize("form", FORMS)
def test_golden_few_images(arrays: Golden, form: dict[str, Any]) -> None:
    _, features = special(arrays)
    for number, expected in arrays.named("msm.first_").items():
        n = int(number)
        ours = mutual_scores(features[:n], arrays.meta["interval"], **form)
        if expected.isnan().all():
            distances = torch.cdist(features[:n, None], features[None, :n]).amin(dim=3)  # (n, n, N)
            distances[range(n), range(n)] = torch.inf
            rank = int(min(arrays.meta["interval"]) * (n - 1))
            close(ours, distances.sort(dim=1).values[:, rank], 1e-4)
        else:
            close(ours, expected, 1e-4)


@pytest.mark.golden
@pytest.mark.parametrize("form", FORMS)
def test_golden_twins(arrays: Golden, form: dict[str, Any]) -> None:
    r, _ = special(arrays)
    grids = grids_of(arrays, 0).clone()
    grids[1] = grids[0]
    ours = mutual_scores(aggregate(grids, r), arrays.meta["interval"], **form)
    close(ours, arrays.expected["msm.twins"], 1e-3)


@pytest.mark.golden
def test_golden_image_scores(arrays: Golden) -> None:
    raw, vectors = arrays.inputs["rscin.scores"], arrays.inputs["rscin.class_tokens"]
    assert len(arrays.named("rscin.k_")) == len(arrays.meta["k_lists"])
    for k_list in arrays.meta["k_lists"]:
        expected = arrays.expected[f"rscin.k_{'_'.join(map(str, k_list))}"]
        given_list = list(k_list)
        close(rescore(raw, vectors, given_list), expected, 1e-5)
        assert given_list == k_list
    for name, expected in arrays.named("rscin.mobile_").items():
        k_list = [*map(int, name.split("_")), 1]  # the official function adds 1
        close(rescore(raw, vectors, k_list), expected, 1e-5)


# -- neighbourhoods --------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [1, 3, 5, 7])
def test_neighbourhoods_by_hand(r: int) -> None:
    torch.manual_seed(0)
    grids = 3 + 2 * torch.randn(2, 3, 5, 4, dtype=torch.float64)
    expected = torch.zeros(2, 20, 3, dtype=torch.float64)
    for number, grid in enumerate(grids.numpy()):
        standard = (grid - grid.mean()) / np.sqrt(grid.var() + 1e-5)
        padded = np.pad(standard, ((0, 0), (r // 2, r // 2), (r // 2, r // 2)))
        for row in range(5):
            for column in range(4):
                total = padded[:, row : row + r, column : column + r].sum(axis=(1, 2)) / r**2
                patch = torch.from_numpy(total / np.linalg.norm(total))
                expected[number, 4 * row + column] = patch
    close(aggregate(grids, r), expected, 1e-5)
    close(aggregate(100 * grids - 7, r), expected, 1e-5)  # an image's scale and mean do not matter


@pytest.mark.parametrize("r", [0, 2, -1, -3, 4])
def test_a_neighbourhood_without_a_centre_is_refused(r: int) -> None:
    with pytest.raises(ValueError, match=rf"model.r_list: a neighbourhood of {r} .* odd numbers"):
        aggregate(torch.zeros(2, 3, 4, 4), r)


def test_half_precision_is_computed_in_float32() -> None:
    torch.manual_seed(0)
    grids = torch.randn(3, 8, 4, 4)
    features = aggregate(grids.half(), 3)
    assert features.dtype == torch.float32
    close(features, aggregate(grids, 3), 2e-3)
    with torch.autocast("cpu", torch.bfloat16):
        close(aggregate(grids, 3), aggregate(grids, 3).float(), 0)


def test_a_constant_image_has_finite_features() -> None:
    assert aggregate(torch.full((1, 3, 4, 4), 7.0), 3).isfinite().all()


# -- mutual scores ---------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6, 11])
@pytest.mark.parametrize("interval", [[0, 0.3], [0.2, 0.8], [0, 1], [1, 3], [0, 1.0], [0, 99]])
@pytest.mark.parametrize("form", FORMS)
def test_scores_equal_the_plain_form(n: int, interval: list[float], form: dict[str, Any]) -> None:
    features = random_features(n)
    close(mutual_scores(features, interval, **form), plain_scores(features, interval), 1e-5)


@pytest.mark.parametrize("at_once", [1, 3, 5, 12, 10**6])
def test_blocks_do_not_matter(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    features = random_features(8)
    expected = table_of_pairs(features)
    monkeypatch.setattr(mutual_scoring, "PATCHES_AT_ONCE", {"cpu": at_once, "else": at_once})
    close(table_of_pairs(features), expected, 1e-6)
    close(table_of_rows(features, range(8)), expected, 1e-6)
    close(table_of_rows(features, [1, 4, 6], slice(2, 7)), expected[[1, 4, 6], :, 2:7], 1e-6)
    off_diagonal = ~torch.eye(8, dtype=torch.bool)
    assert expected.mT[~off_diagonal].isneginf().all()
    assert expected.mT[off_diagonal].isfinite().all()


def test_some_rows_are_those_of_all() -> None:
    features = random_features(9)
    expected = mutual_scores(features)
    for rows in ([0], [8], [1, 4, 5], range(9), []):
        for form in FORMS:
            ours = mutual_scores(features, rows=rows, **form)
            assert ours.shape == (len(rows), 5)
            close(ours, expected[list(rows)], 1e-6)


def test_two_images_by_hand() -> None:
    first, second = torch.eye(2), torch.tensor([[0.6, 0.8], [-1.0, 0.0]])
    expected = [[math.sqrt(2 - 1.2), math.sqrt(2 - 1.6)], [math.sqrt(2 - 1.6), math.sqrt(2)]]
    close(mutual_scores(torch.stack([first, second])), torch.tensor(expected), 1e-6)


@given(st.integers(0, 1000), st.integers(2, 7), st.sampled_from([[0, 0.3], [0.2, 0.8], [1, 4]]))
def test_permuted_images_have_permuted_scores(seed: int, n: int, interval: list[float]) -> None:
    features = random_features(n, patches=3, seed=seed)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    scores = mutual_scores(features, interval)
    close(mutual_scores(features[order], interval), scores[order], 1e-6)
    assert scores.isfinite().all()
    assert scores.min() >= 0
    assert scores.max() <= 2


@pytest.mark.parametrize("form", FORMS)
def test_twins_are_at_no_distance(form: dict[str, Any]) -> None:
    features = random_features(9)
    features[3] = features[0]
    scores = mutual_scores(features, [0, 1], **form)
    assert scores[[0, 3]].max() <= 1e-3
    assert scores[[1, 2, 4, 5, 6, 7, 8]].min() > 1e-2
    all_equal = features[:1].expand(6, -1, -1)
    assert mutual_scores(all_equal, [0, 1.0], **form).max() <= 1e-3


def test_half_precision_inputs_stay_close() -> None:
    features = random_features(9, channels=32)
    close(mutual_scores(features.half().float()), mutual_scores(features), 1e-3)


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("rows", [None, [0]])
def test_one_image_cannot_be_compared(n: int, rows: list[int] | None) -> None:
    with pytest.raises(ValueError, match=rf"but got {n}: give at least 2"):
        mutual_scores(torch.zeros(n, 4, 3), rows=rows)


def test_the_table_of_all_pairs_is_used_if_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    features = random_features(6)
    size = 6 * 5 * 6 * 4  # n * N * n values
    used: list[int] = []

    def spy(features: Tensor, rows: Tensor, **options: Any) -> Tensor:
        used.append(len(rows))
        return table_of_rows(features, rows, **options)

    monkeypatch.setattr(mutual_scoring, "table_of_rows", spy)
    for room, blocks in ((size, []), (size - 1, [5, 1]), (size // 2, [3, 3]), (0, 6 * [1])):
        used.clear()
        mutual_scores(features, room=room)
        assert used == blocks
    used.clear()
    monkeypatch.setattr(mutual_scoring, "available_memory", lambda device: 5 * size)
    mutual_scores(features)
    assert used == []
    monkeypatch.setattr(mutual_scoring, "available_memory", lambda device: 5 * size - 5)
    mutual_scores(features)
    assert used == [5, 1]
    monkeypatch.setattr(mutual_scoring, "available_memory", lambda device: None)
    used.clear()
    mutual_scores(features)
    assert used == []


@pytest.mark.parametrize("form", [*FORMS, {"rows": [0, 2, 3, 5, 6]}])
def test_progress_counts_each_image_once(form: dict[str, Any]) -> None:
    calls: list[None] = []
    mutual_scores(random_features(7), advance=lambda: calls.append(None), **form)
    assert len(calls) == len(form.get("rows", range(7)))


# -- intervals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("interval", "m", "expected"),
    [
        ([0, 0.3], 10, (0, 3)),
        ([0.3, 0], 10, (0, 3)),
        ([0, 0.3], 3, (0, 1)),  # NaN in the published code
        ([0, 0.3], 1, (0, 1)),
        ([0.8, 0.2], 5, (1, 4)),
        ([0, 1], 7, (0, 1)),
        ([0, 1.0], 7, (0, 7)),
        ([1.0, 1], 7, (1, 7)),
        ([0.999, 1.0], 7, (6, 7)),
        ([0, 99], 7, (0, 7)),
        ([50, 99], 7, (6, 7)),
        ([3, 4], 7, (3, 4)),
        ([2.0, 4.0], 7, (2, 4)),
    ],
)
def test_ranks_of_intervals(interval: list[float], m: int, expected: tuple[int, int]) -> None:
    check_interval(interval)
    assert bounds(interval, m) == expected


def test_thirty_percent_is_rounded_down() -> None:
    assert all(bounds([0, 0.3], m)[1] == max(1, 3 * m // 10) for m in range(1, 2000))


@given(
    st.tuples(
        st.one_of(st.floats(0, 1), st.integers(0, 30)),
        st.one_of(st.floats(0, 1), st.integers(0, 30)),
    ),
    st.integers(1, 40),
)
def test_an_interval_always_has_a_value(interval: tuple[float, float], m: int) -> None:
    low, high = bounds(interval, m)
    assert 0 <= low < high <= m


@pytest.mark.parametrize(
    ("interval", "message"),
    [
        ([0.3], "give two values"),
        ([0, 0.3, 0.5], "give two values"),
        ([0.3, 0.3], "is empty"),
        ([-0.1, 0.3], "-0.1"),
        ([0, math.nan], "nan"),
        ([0, 1.5], "neither a share"),
        ([0, math.inf], "inf"),
    ],
)
def test_wrong_intervals(interval: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_interval(interval)


def test_the_mean_is_of_the_nearest() -> None:
    cosines = torch.tensor([[-torch.inf, 0.5, 0.0, 1.0, -1.0]])
    distances = [0.0, 1.0, math.sqrt(2), 2.0]
    for low, high in ((0, 1), (1, 3), (0, 4), (3, 4)):
        expected = torch.tensor([np.mean(distances[low:high])])
        close(mean_of_nearest(cosines, [low, high], 4), expected, 1e-6)
    above = torch.tensor([[1 + 1e-6]])  # rounding must not give NaN
    assert mean_of_nearest(above, [0, 1], 1) == 0


# -- image scores ----------------------------------------------------------------------------------


def plain_rescore(raw: Tensor, vectors: Tensor, k_list: Sequence[int]) -> Tensor:
    """Return image scores as the paper states them, with a matrix of weights."""
    x = (raw - raw.min()) / (raw.max() - raw.min())
    cosines = vectors @ vectors.T
    means = []
    for k in k_list:
        weights = torch.zeros_like(cosines)
        for row, values in enumerate(cosines):
            chosen = values.argsort(descending=True)[:k]
            weights[row, chosen] = values[chosen]
        means.append(weights @ x / weights.sum(dim=1))
    return torch.stack(means).mean(dim=0)


@pytest.mark.parametrize("k_list", [[1], [1, 2, 3], [2, 5], [1, 8, 9], [6, 100]])
def test_image_scores_equal_the_plain_form(k_list: list[int]) -> None:
    torch.manual_seed(0)
    raw, vectors = torch.rand(6), unit(torch.rand(6, 5))
    close(rescore(raw, vectors, k_list), plain_rescore(raw, vectors, k_list), 1e-6)


def test_image_scores_are_scaled_or_left_alone() -> None:
    torch.manual_seed(0)
    raw, vectors = torch.rand(6), unit(torch.rand(6, 5))
    assert torch.equal(rescore(raw, vectors, [0]), raw)
    assert torch.equal(rescore(raw, vectors, [1, 0, 3]), raw)
    scaled = (raw - raw.min()) / (raw.max() - raw.min())
    close(rescore(raw, vectors, [1]), scaled, 1e-6)


def test_equal_image_scores_are_zeros() -> None:
    scores = rescore(torch.full((4,), 0.7), unit(torch.rand(4, 3)), [1, 2])
    assert torch.equal(scores, torch.zeros(4))


def test_image_scores_stay_finite_with_negative_similarities() -> None:
    torch.manual_seed(0)
    for _ in range(20):
        raw, vectors = torch.rand(5), unit(torch.randn(5, 2))
        assert rescore(raw, vectors, [1, 4, 5]).isfinite().all()


@pytest.mark.parametrize("k_list", [[], [-1], [1, -2]])
def test_wrong_numbers_of_images(k_list: list[int]) -> None:
    with pytest.raises(ValueError, match=r"model.k_list .* numbers of images from 1"):
        check_k_list(k_list)


# -- sequences -------------------------------------------------------------------------------------


def test_windows_by_hand() -> None:
    expected = [(0, 3), (0, 3), (0, 3), (0, 3), (0, 4), (1, 5), (2, 6)]
    for position, (first, stop) in enumerate(expected):
        assert window(position, start=3, memory=4) == slice(first, stop)
    assert window(3, start=3, memory=2) == slice(1, 3)  # the memory may be shorter than the start
    assert window(2, start=3, memory=2) == slice(0, 3)
    assert window(5, start=0, memory=2) == slice(3, 5)


@pytest.mark.parametrize(("start", "memory"), [(3, 4), (2, 1), (4, 2), (9, 1), (2, 100), (9, 100)])
@pytest.mark.parametrize("interval", [[0, 0.3], [0.2, 0.8], [1, 3], [0, 1.0]])
def test_a_sequence_equals_a_plain_loop(start: int, memory: int, interval: list[float]) -> None:
    features = random_features(9)
    expected = []
    for i in range(9):
        first, stop = (0, start) if i < start else (max(0, i - memory), i)
        others = [j for j in range(first, stop) if j != i]
        together = torch.cat([features[i : i + 1], features[others]])
        table = torch.stack([torch.cdist(together[0], image).amin(dim=1) for image in together[1:]])
        low, high = bounds(interval, len(others))
        expected.append(table.sort(dim=0).values[low:high].mean(dim=0))
    ours = sequential_scores(features, interval, start, memory, range(9))
    close(ours, torch.stack(expected), 1e-5)
    some = sequential_scores(features, interval, start, memory, [8, 1, 4])
    close(some, torch.stack(expected)[[8, 1, 4]], 1e-5)


def test_a_sequence_within_its_start_equals_a_batch() -> None:
    features = random_features(8)
    ours = sequential_scores(features, [0, 0.3], 8, 100, range(8))
    close(ours, mutual_scores(features, [0, 0.3]), 1e-6)


def test_later_images_do_not_matter_in_a_sequence() -> None:
    features = random_features(9)
    before = sequential_scores(features[:6], [0, 0.5], 3, 4, range(6))
    after = sequential_scores(features, [0, 0.5], 3, 4, range(6))
    close(after, before, 1e-6)


@pytest.mark.parametrize(("start", "memory"), [(3, 4), (2, 2), (7, 1), (2, 100)])
@pytest.mark.parametrize("k_list", [[1], [1, 2, 3], [4, 50]])
def test_image_scores_of_a_sequence(start: int, memory: int, k_list: list[int]) -> None:
    torch.manual_seed(0)
    raw, vectors = torch.rand(7), unit(torch.rand(7, 4))
    expected = []
    for i in range(7):
        rows = [*range(start)] if i < start else [*range(max(0, i - memory), i), i]
        means = []
        for k in k_list:
            nearest = sorted(rows, key=lambda j: -float(vectors[i] @ vectors[j]))[:k]
            weights = [float(vectors[i] @ vectors[j]) for j in nearest]
            means.append(np.average([float(raw[j]) for j in nearest], weights=weights))
        expected.append(np.mean(means))
    ours = rescore_in_sequence(raw, vectors, k_list, start, memory, range(7))
    close(ours, torch.tensor(expected), 1e-5)
    some = rescore_in_sequence(raw, vectors, k_list, start, memory, [6, 0])
    close(some, torch.tensor(expected)[[6, 0]], 1e-5)


def test_one_neighbour_leaves_a_sequence_as_it_is() -> None:
    raw, vectors = torch.rand(7), F.normalize(torch.rand(7, 4), dim=1)
    for k_list in ([1], [0]):
        close(rescore_in_sequence(raw, vectors, k_list, 3, 4, range(7)), raw, 1e-6)
