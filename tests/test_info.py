"""Published counts, compared with the totals that papers and pages of the data sets state."""

from __future__ import annotations

import pytest

from anomaly_clip.data.info import DATASETS, MaskRule, dataset_info


@pytest.mark.parametrize(
    ("name", "categories", "train", "normal", "anomalous"),
    [
        ("MVTecAD", 15, 3629, 467, 1258),  # 5354 images
        ("VisA", 12, 8659, 962, 1200),  # 10821 images, 9621 of them normal
        ("BTAD", 3, 1799, 451, 290),  # 2540 images
        ("KSDD2", 1, 2085, 894, 110),  # of 3335; the other 246 are defective training images
        ("ISIC", 1, 0, 0, 379),
        ("CVCClinicDB", 1, 0, 0, 612),
        ("HeadCT", 1, 0, 100, 100),
        ("BrainMRI", 1, 0, 98, 155),  # 253 images
        ("IndustrialFolders", 30, 17393, 0, 0),
    ],
)
def test_counts_add_up_to_the_published_totals(
    name: str, categories: int, train: int, normal: int, anomalous: int
) -> None:
    counts = dataset_info(name).counts
    assert len(counts) == categories
    totals = tuple(sum(column) for column in zip(*counts.values(), strict=True))
    assert totals == (train, normal, anomalous)


def test_categories_and_words_belong_together() -> None:
    for info in DATASETS.values():
        assert set(info.words) <= set(info.counts)
        assert all((info.title, info.url, info.licence, info.citation))
    assert DATASETS["MixedWM38"].total == 38_015


def test_mask_rules() -> None:
    rules = {name: info.mask for name, info in DATASETS.items() if info.mask != MaskRule()}
    assert rules == {"KSDD2": MaskRule(False, 16), "CVCClinicDB": MaskRule(True, 0)}


@pytest.mark.parametrize("name", [None, "", "Unheard"])
def test_unknown_data_sets_have_no_published_facts(name: str | None) -> None:
    info = dataset_info(name)
    assert (info.title, info.counts, info.words, info.total) == ("", {}, {}, None)
