"""Published facts about each data set: counts, category names, mask rules, sources. No code.

The counts are the widely published ones, quoted from memory and not verified on all files (see
``docs/data.md``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from anomaly_clip.images import MAX_PIXELS

__all__ = ["DATASETS", "Counts", "DatasetInfo", "MaskRule", "Split", "dataset_info", "is_own"]

Split = Literal["train", "test"]


class Counts(NamedTuple):
    """Number of images of a category."""

    train: int
    """Normal training images."""
    normal: int
    """Normal test images."""
    anomalous: int
    """Anomalous test images."""


class MaskRule(NamedTuple):
    """Rule for reading mask files."""

    grey: bool = False
    """Keep the grey values of the first channel; otherwise every value above the level is a
    defect."""
    fitted: int = 0
    """Largest difference in size from the image, in pixels, at which a mask is resized to it by
    nearest neighbour; a larger difference is an error."""
    fitted_share: float = 1.0
    """Largest such difference as a fraction of the image's side."""
    level: int = 0
    """Grey level above which a pixel is a defect, 0 to 254; not for masks kept in grey."""
    lenient: bool = False
    """Leave out a mask that is missing, damaged or of the wrong size; otherwise it is an error."""
    max_pixels: int = MAX_PIXELS
    """Largest number of pixels of a mask."""


PLAIN = MaskRule()
OWN_SETS = ("ImageFolder", "MetaJSON")
"""Data sets of which nothing is published."""


@dataclass(frozen=True)
class DatasetInfo:
    """Published facts about one data set.

    Args:
        title: Name in prose.
        url: Address to obtain it from.
        licence: Licence terms, as far as known.
        citation: The paper to cite.
        counts: Number of images, by category.
        total: Number of all images, if the counts by category are unknown.
        words: Names in prompts of the categories that are not words themselves.
        mask: Rule for reading masks.
        duplicates: Number of images of the published archive whose decoded pixels equal those of
            another of its images, as far as known; None: some, of unknown number. So many training
            images in the test split are reported and not refused.
    """

    title: str
    url: str
    licence: str
    citation: str
    counts: Mapping[str, Counts] = field(default_factory=dict)
    words: Mapping[str, str] = field(default_factory=dict)
    total: int | None = None
    mask: MaskRule = PLAIN
    duplicates: int | None = 0


NOT_STATED = "not stated with the files: treat as research use with citation"
RESEARCH = "research and education, with citation; see its page"

DATASETS: dict[str, DatasetInfo] = {
    "MVTecAD": DatasetInfo(
        "MVTec-AD",
        "https://www.mvtec.com/company/research/datasets/mvtec-ad",
        "CC BY-NC-SA 4.0",
        "Bergmann et al., MVTec AD: A Comprehensive Real-World Dataset for Unsupervised Anomaly "
        "Detection, CVPR 2019",
        {
            "bottle": Counts(209, 20, 63),
            "cable": Counts(224, 58, 92),
            "capsule": Counts(219, 23, 109),
            "carpet": Counts(280, 28, 89),
            "grid": Counts(264, 21, 57),
            "hazelnut": Counts(391, 40, 70),
            "leather": Counts(245, 32, 92),
            "metal_nut": Counts(220, 22, 93),
            "pill": Counts(267, 26, 141),
            "screw": Counts(320, 41, 119),
            "tile": Counts(230, 33, 84),
            "toothbrush": Counts(60, 12, 30),
            "transistor": Counts(213, 60, 40),
            "wood": Counts(247, 19, 60),
            "zipper": Counts(240, 32, 119),
        },
    ),
    "MVTecAD2": DatasetInfo(
        "MVTec AD 2",
        "https://www.mvtec.com/company/research/datasets/mvtec-ad-2",
        "CC BY-NC-SA 4.0",
        "Heckler-Kram et al., The MVTec AD 2 Dataset: Advanced Scenarios for Unsupervised Anomaly "
        "Detection, arXiv 2503.21622",
    ),
    "VisA": DatasetInfo(
        "VisA",
        "https://github.com/amazon-science/spot-diff",
        "CC BY 4.0",
        "Zou et al., SPot-the-Difference Self-Supervised Pre-training for Anomaly Detection and "
        "Segmentation, ECCV 2022",
        {
            "candle": Counts(900, 100, 100),
            "capsules": Counts(542, 60, 100),
            "cashew": Counts(450, 50, 100),
            "chewinggum": Counts(453, 50, 100),
            "fryum": Counts(450, 50, 100),
            "macaroni1": Counts(900, 100, 100),
            "macaroni2": Counts(900, 100, 100),
            "pcb1": Counts(904, 100, 100),
            "pcb2": Counts(901, 100, 100),
            "pcb3": Counts(905, 101, 100),
            "pcb4": Counts(904, 101, 100),
            "pipe_fryum": Counts(450, 50, 100),
        },
    ),
    "BTAD": DatasetInfo(
        "BTAD",
        "http://avires.dimi.uniud.it/papers/btad/btad.zip",
        NOT_STATED,
        "Mishra et al., VT-ADL: A Vision Transformer Network for Image Anomaly Detection and "
        "Localization, ISIE 2021",
        {"01": Counts(400, 21, 49), "02": Counts(399, 30, 200), "03": Counts(1000, 400, 41)},
        {"01": "product", "02": "product", "03": "product"},  # our choice, in place of numbers
    ),
    "KSDD2": DatasetInfo(
        "KolektorSDD2",
        "https://www.vicos.si/resources/kolektorsdd2/",
        "CC BY-NC-SA 4.0",
        "Bozic, Tabernik and Skocaj, Mixed supervision for surface-defect detection: from weakly "
        "to fully supervised learning, Computers in Industry 2021",
        {"surface": Counts(2085, 894, 110)},
        mask=MaskRule(fitted=16),
    ),
    "RealIAD": DatasetInfo(
        "Real-IAD",
        "https://realiad4ad.github.io/Real-IAD/",
        "CC BY-NC-SA 4.0",
        "Wang et al., Real-IAD: A Real-World Multi-View Dataset for Benchmarking Versatile "
        "Industrial Anomaly Detection, CVPR 2024",
    ),
    "MagneticTile": DatasetInfo(
        "Magnetic tile surface defects, split by tiles into MVTec-AD's layout",
        "https://github.com/abin24/Magnetic-tile-defect-datasets.",
        NOT_STATED,
        "Huang, Qiu and Yuan, Surface defect saliency of magnetic tile, The Visual Computer 2020",
        {"magnetic_tile": Counts(763, 189, 388)},
        {"magnetic_tile": "magnetic tile"},
    ),
    "ISIC": DatasetInfo(
        "ISIC (ISBI 2016 challenge, part 1, test)",
        "https://challenge.isic-archive.com/data/#2016",
        RESEARCH,
        "Gutman et al., Skin Lesion Analysis toward Melanoma Detection, arXiv 1605.01397",
        {"skin": Counts(0, 0, 379)},
    ),
    "CVCClinicDB": DatasetInfo(
        "CVC-ClinicDB",
        "https://polyp.grand-challenge.org/CVCClinicDB/",
        RESEARCH,
        "Bernal et al., WM-DOVA maps for accurate polyp highlighting in colonoscopy, Computerized "
        "Medical Imaging and Graphics 2015",
        {"colon": Counts(0, 0, 612)},
        mask=MaskRule(grey=True),
    ),
    "HeadCT": DatasetInfo(
        "Head CT - hemorrhage",
        "https://www.kaggle.com/datasets/felipekitamura/head-ct-hemorrhage",
        NOT_STATED,
        "Kitamura, Head CT - hemorrhage, Kaggle 2018",
        {"head ct": Counts(0, 100, 100)},
        duplicates=None,  # one pair was found in half of the files
    ),
    "BrainMRI": DatasetInfo(
        "Brain MRI images for brain tumor detection",
        "https://www.kaggle.com/datasets/navoneel/brain-mri-images-for-brain-tumor-detection",
        NOT_STATED,
        "Chakrabarty, Brain MRI Images for Brain Tumor Detection, Kaggle 2019",
        {"brain ct": Counts(0, 98, 155)},  # sic: the object's name in CLIP-AD's code
        duplicates=25,  # counted on the published files
    ),
    "MixedWM38": DatasetInfo(
        "MixedWM38",
        "https://github.com/Junliangwangdhu/WaferMap",
        NOT_STATED,
        "Wang et al., Deformable Convolutional Networks for Efficient Mixed-type Wafer Defect "
        "Pattern Recognition, IEEE Transactions on Semiconductor Manufacturing 2020",
        total=38_015,
        duplicates=None,  # the split is ours, so equal maps may fall into both parts; not counted
    ),
    "IndustrialFolders": DatasetInfo(
        "Industrial set of TAB (30 classes, 17,393 normal images)",
        "collected from public data sets (MPDD, DAGM, KTH-TIPS2, Kylberg, ELPV and others)",
        "the licence of each source data set",
        "the paper of TAB, and the paper of each source data set",
        {
            "bent metal stripe": Counts(185, 0, 0),
            "board": Counts(40, 0, 0),
            "bolt": Counts(128, 0, 0),
            "bottle": Counts(746, 0, 0),
            "brick tile": Counts(80, 0, 0),
            "capsule": Counts(749, 0, 0),
            "chip": Counts(1211, 0, 0),
            "cork": Counts(216, 0, 0),
            "encapsulates carpet": Counts(728, 0, 0),
            "hazelnut": Counts(50, 0, 0),
            "hazelnut toy": Counts(34, 0, 0),
            "jagged carpet": Counts(80, 0, 0),
            "leather": Counts(600, 0, 0),
            "metal flat": Counts(54, 0, 0),
            "metal ornament": Counts(289, 0, 0),
            "metal pole": Counts(110, 0, 0),
            "metal tube": Counts(122, 0, 0),
            "plaid": Counts(20, 0, 0),
            "rhombus carpet": Counts(80, 0, 0),
            "screw": Counts(59, 0, 0),
            "solar board": Counts(2624, 0, 0),
            "sponge": Counts(40, 0, 0),
            "streak board": Counts(1041, 0, 0),
            "stripe carpet": Counts(336, 0, 0),
            "stripe wood": Counts(1000, 0, 0),
            "tile": Counts(230, 0, 0),
            "toy wheel": Counts(3200, 0, 0),
            "upholstery": Counts(20, 0, 0),
            "washer": Counts(3241, 0, 0),
            "wave carpet": Counts(80, 0, 0),
        },
    ),
    "MetaJSON": DatasetInfo("a data set listed by meta.json", "its source", "its own", "its own"),
    "ImageFolder": DatasetInfo("your own images", "yours", "yours", "none"),
    "Demo": DatasetInfo("generated images", "this package", "Apache-2.0, as the project", "none"),
}  # fmt: skip


def is_own(dataset_name: str | None, find_categories: Callable[[], Iterable[str]]) -> bool:
    """Return whether images are a user's own: of no published data set, or category.

    Args:
        dataset_name: The data set's name.
        find_categories: Function that returns all categories in the data set's folder.
    """
    if dataset_name in OWN_SETS or dataset_name not in DATASETS:
        return True
    published = DATASETS[dataset_name].counts
    return bool(published) and not set(published) & set(find_categories())


def dataset_info(dataset_name: str | None) -> DatasetInfo:
    """Return the published facts about a data set; empty for an unknown one."""
    return DATASETS.get(dataset_name or "", DatasetInfo("", "", "", ""))
