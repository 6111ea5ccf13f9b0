from __future__ import annotations

import colorsys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from anomaly_clip.data import Demo
from anomaly_clip.data.scenes import Scenes, crop_and_turn
from anomaly_clip.demo.canvas import rgb
from anomaly_clip.demo.photographs import CATEGORIES, DEFECTS, draw_pair
from anomaly_clip.demo.surfaces import vary
from anomaly_clip.records import Draw

WORDS = ["oak wood board", "steel washer"]


def scenes(seed: int = 0, held_out: tuple[str, ...] = ("hole",)) -> Scenes:
    return Scenes(WORDS, 40, seed, 64, 48, held_out)


def test_paired_images_differ_by_the_defect_alone() -> None:
    for index in range(12):
        pair = scenes()[Draw(0, index)]
        assert pair["image"].shape == pair["synthetic"].shape == (3, 48, 48)
        assert pair["image"].dtype == torch.uint8
        change = (pair["image"].int() - pair["synthetic"].int()).abs().amax(0)
        mask = pair["synthetic_mask"]
        # Resizing mixes a pixel with its neighbours.
        near = torch.nn.functional.max_pool2d(mask[None].float(), 5, 1, 2)[0] > 0
        assert change[~near].max() <= 25, pair["defect"]
        assert change[mask].float().mean() > 3 * change[~near].float().mean()


def test_a_scene_depends_on_seed_epoch_and_index_alone() -> None:
    first = scenes()[Draw(2, 5)]
    again = scenes()[Draw(2, 5)]
    assert torch.equal(first["image"], again["image"])
    assert torch.equal(first["synthetic_mask"], again["synthetic_mask"])
    for other in (scenes()[Draw(3, 5)], scenes()[Draw(2, 6)], scenes(1)[Draw(2, 5)]):
        assert not torch.equal(first["image"], other["image"])
        assert first["path"] != other["path"]


def test_held_out_defects_are_never_shown() -> None:
    seen = [scenes()[Draw(0, index)] for index in range(40)]
    assert {pair["category"] for pair in seen} == set(WORDS)
    defects = {pair["defect"] for pair in seen}
    assert "hole" not in defects
    assert defects <= set(DEFECTS)
    assert len(defects) >= 5
    with pytest.raises(ValueError, match="leaves 'steel washer' without any defect"):
        Scenes(["steel washer"], 1, 0, 64, 48, DEFECTS)


def test_crops_keep_a_part_of_the_defect_and_are_the_same_for_a_pair() -> None:
    normal, defective = draw_pair("oak", 0, 3, "scratch", 64)
    mask = np.zeros((64, 64), bool)
    mask[2, 60] = True  # in a corner
    with_defect = 0
    for seed in range(30):
        rng = np.random.default_rng(seed)
        image, synthetic, cut = crop_and_turn(normal.image, normal.image, mask, 64, rng)
        assert np.array_equal(image, synthetic)
        with_defect += bool(cut.any())
    assert with_defect >= 25  # a single pixel may vanish when a crop is resized
    rng = np.random.default_rng(1)
    image, _, cut = crop_and_turn(defective.image, normal.image, defective.mask, 32, rng)
    assert image.shape == (32, 32, 3)
    assert cut.shape == (32, 32)
    assert cut.any()


def test_the_data_module_reports_bad_options() -> None:
    data = Demo(categories=WORDS, image_size=48)
    with pytest.raises(ValueError, match=r"data.num_scenes is None"):
        data.scenes()
    with pytest.raises(ValueError, match=r"data.held_out_defects: 'bite' is not a kind of defect"):
        Demo(held_out_defects=["bite"])
    with pytest.raises(ValueError, match=r"data.num_scenes must be 1 or more, got 0"):
        Demo(num_scenes=0)


def test_a_loader_gives_new_scenes_each_epoch() -> None:
    data = Demo(
        categories=WORDS,
        train_categories="others",
        num_scenes=4,
        picture_size=64,
        image_size=48,
        batch_size=2,
        num_workers=0,
    )
    loader = data.train_dataloader()
    epochs = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        batches = list(loader)
        assert [len(batch["image"]) for batch in batches] == [2, 2]
        epochs.append([path for batch in batches for path in batch["path"]])
        assert not set(WORDS) & {name for batch in batches for name in batch["category"]}
    assert not set(epochs[0]) & set(epochs[1])


def test_processes_get_different_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    data = Demo(categories=WORDS, num_scenes=8, picture_size=64, image_size=48, batch_size=2)
    data.num_workers = 0
    seen = []
    for rank in range(2):
        data.trainer = SimpleNamespace(world_size=2, global_rank=rank)  # type: ignore[assignment]
        seen.append({path for batch in data.train_dataloader() for path in batch["path"]})
    assert [len(paths) for paths in seen] == [4, 4]
    assert not seen[0] & seen[1]


def test_training_categories() -> None:
    def names(value: object) -> list[str]:
        return Demo(categories=WORDS, train_categories=value).train_categories

    assert names("same") == WORDS
    assert len(names("others")) == 46
    assert not set(names("others")) & set(WORDS)
    assert names(["oak wood board"]) == ["oak wood board"]
    with pytest.raises(ValueError, match=r"data.train_categories: 'oak' is not in"):
        names(["oak"])
    with pytest.raises(ValueError, match=r"data.train_categories others: none is left"):
        _ = Demo(train_categories="others").train_categories


def test_varied_objects_stay_visible_and_some_have_another_hue() -> None:
    rng, usual = np.random.default_rng(0), CATEGORIES["blue_capsule"]
    looks = [vary(usual, rng) for _ in range(200)]
    hues = []
    for look in looks:
        colours = [rgb(colour).ravel() for colour in (*look.colours, look.ground)]
        assert np.abs(colours[0] - colours[-1]).mean() > 0.1
        assert all(c.min() >= 0 and c.max() <= 0.93 for c in colours)
        assert len(look.colours) == len(usual.colours)
        hues.append(colorsys.rgb_to_hsv(*colours[0])[0])
    usual_hue = colorsys.rgb_to_hsv(*rgb(usual.colours[0]).ravel())[0]
    apart = np.abs((np.array(hues) - usual_hue + 0.5) % 1 - 0.5)
    far = (apart > 0.2).mean()  # 60 % of the looks with a random hue, few others
    assert 0.25 < far < 0.47
