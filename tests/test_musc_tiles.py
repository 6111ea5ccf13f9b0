"""Halves, draws and metrics of the benchmark of MuSc on magnetic tiles, and its stored result."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

from anomaly_clip.data.samples import Sample
from anomaly_clip.methods.mutual_scoring import mean_of_nearest, mutual_scores, table_of_pairs

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def tiles() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield import_module("musc_tiles")


def sample(kind: str, number: int) -> Sample:
    return Sample(Path("tile/test") / kind / f"exp1_num_{number}.jpg", "tile", kind != "good")


def test_halves_share_no_tile_and_deal_out_each_kind(tiles: ModuleType) -> None:
    starts = range(0, 40_000, 2_000)  # 20 tiles of 3 images, half of them with a crack
    samples = [
        sample("crack" if start % 4_000 else "good", start + 400 * place)
        for start in starts
        for place in range(3)
    ]
    first, second = tiles.halves(list(reversed(samples)))
    assert sorted(map(str, [s.image for s in first + second])) == sorted(
        str(s.image) for s in samples
    )
    tile_of = [{tiles.number(s) // 2_000 for s in half} for half in (first, second)]
    assert tile_of[0].isdisjoint(tile_of[1])
    for half in (first, second):
        assert half == sorted(half, key=tiles.by_path)
        assert sum(tiles.kind(s) == "crack" for s in half) == 15
    assert tiles.halves(samples) == (first, second)


def test_a_gap_starts_a_new_tile(tiles: ModuleType) -> None:
    samples = [sample("good", number) for number in (1_001, 0, 500, 2_000)]
    groups = [[tiles.number(s) for s in group] for group in tiles.tile_groups(samples)]
    assert groups == [[0, 500], [1_001], [2_000]]


@pytest.mark.parametrize(("share", "count"), [(0.05, 5), (0.2, 20), (0.67, 67)])
def test_a_draw_has_its_share_of_anomalous_images(
    tiles: ModuleType, share: float, count: int
) -> None:
    label = torch.arange(300) % 3 > 0
    rows = tiles.drawn(label, share, 1)
    assert rows.unique().tolist() == rows.tolist()
    assert (len(rows), int(label[rows].sum())) == (100, count)
    assert tiles.drawn(label, share, 1).equal(rows)
    assert not tiles.drawn(label, share, 2).equal(rows)


def test_a_part_of_the_table_scores_as_these_images_alone(tiles: ModuleType) -> None:
    generator = torch.Generator().manual_seed(3)
    features = torch.nn.functional.normalize(torch.randn(9, 4, 5, generator=generator), dim=-1)
    rows = torch.tensor([0, 2, 3, 7, 8])
    part = table_of_pairs(features)[rows][:, :, rows]
    expected = mutual_scores(features[rows], (0, 0.5))
    torch.testing.assert_close(mean_of_nearest(part, (0, 0.5), 4), expected)


def test_each_kind_is_compared_with_all_normal_images(tiles: ModuleType) -> None:
    kinds = ["good", "good", "crack", "fray"]
    scores = torch.tensor([0.1, 0.3, 0.2, 0.9])
    masks = torch.zeros(4, 2, 2, dtype=torch.bool)
    masks[2, 0, 0] = masks[3, 1, 1] = True
    maps = torch.zeros(4, 2, 2)
    maps[3, 1, 1] = 1.0
    values = tiles.metrics_by_kind(scores, kinds, maps, masks)
    assert {name: value["image_auroc"] for name, value in values.items()} == {
        "all": 0.75,
        "crack": 0.5,
        "fray": 1.0,
    }
    assert values["fray"]["pixel_auroc"] == 1.0
    assert values["crack"]["pixel_auroc"] == 0.5  # all pixels tie
    assert tiles.metrics_by_kind(scores, ["good", "good", "defect", "defect"]) == {
        "all": {"image_auroc": 0.75}
    }


def test_a_summary_has_mean_and_range(tiles: ModuleType) -> None:
    rows = [{"image_auroc": 0.5, "pixel_pro": 0.1}, {"image_auroc": 0.75, "pixel_pro": 0.3}]
    assert tiles.summary(rows)["image_auroc"] == {"mean": 0.625, "lowest": 0.5, "highest": 0.75}
    assert tiles.summary(rows)["pixel_pro"]["mean"] == 0.2


def test_a_kept_result_is_not_measured_again(tiles: ModuleType, tmp_path: Path) -> None:
    assert tiles.kept(tmp_path, "MuSc, random 1", lambda: {"all": {"x": 1}}) == {"all": {"x": 1}}
    assert tiles.kept(tmp_path, "MuSc, random 1", lambda: {}) == {"all": {"x": 1}}
    assert [file.name for file in tmp_path.iterdir()] == ["musc_random_1.json"]
    assert tiles.kept(None, "MuSc, random 1", lambda: {"all": {}}) == {"all": {}}


def test_the_page_has_the_stored_results(tiles: ModuleType) -> None:
    result = json.loads((BENCHMARKS / "results/musc_tiles.json").read_text(encoding="utf-8"))
    best = result["search"]["best"][0]
    chosen = json.loads(json.dumps(asdict(tiles.CHOSEN)))
    assert chosen == result["chosen"] == {name: best[name] for name in chosen}
    page = (BENCHMARKS.parent / "docs/methods/musc.md").read_text(encoding="utf-8")
    runs = result["runs"]
    seeds = [run for name, run in runs.items() if "random" in name]
    assert len(seeds) == 3
    for title, rows in {
        "MuSc, chosen setting": [runs["MuSc, ImageNet"]],
        "MuSc, published scoring": [runs["MuSc, ImageNet, published scoring"]],
        "MuSc, random weights, chosen setting, mean of 3 seeds": seeds,
        "MuSc, demo CLIP, chosen scoring": [runs["MuSc, demo CLIP"]],
        "SDP, demo CLIP": [runs["SDP, demo CLIP"]],
        "PatchCore, 150 normal images": [runs["PatchCore, ImageNet"]],
    }.items():
        cells = [
            " / ".join(
                f"{100 * sum(row[kind][metric] for row in rows) / len(rows):.1f}"
                for metric in tiles.METRICS
            )
            for kind in rows[0]
            if kind != "seconds"
        ]
        assert f"| {title} | {' | '.join(cells)} |" in page
    for share, values in result["shares"].items():
        cells = [
            "{mean:.1f} ({lowest:.1f} to {highest:.1f})".format(
                **{name: 100 * value for name, value in values[metric].items()}
            )
            for metric in tiles.METRICS
        ]
        assert f"| {share.replace('%', ' %')} | {' | '.join(cells)} |" in page
