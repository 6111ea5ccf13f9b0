"""Data sets as Lightning data modules."""

from typing import TYPE_CHECKING

from anomaly_clip.lazy_names import lazy_names

if TYPE_CHECKING:
    from anomaly_clip.data.dataset import AnomalyData, Sample, SampleDataset, read_image, read_mask
    from anomaly_clip.data.demo import Demo
    from anomaly_clip.data.folder import ImageFolder
    from anomaly_clip.data.folder_writer import write_images
    from anomaly_clip.data.industrial import (
        BTAD,
        KSDD2,
        IndustrialFolders,
        MagneticTile,
        MVTecAD,
        VisA,
    )
    from anomaly_clip.data.json_sets import MetaJSON, RealIAD
    from anomaly_clip.data.medical import ISIC, BrainMRI, CVCClinicDB, HeadCT
    from anomaly_clip.data.mvtec_ad_2 import MVTecAD2
    from anomaly_clip.data.transforms import Resize
    from anomaly_clip.data.wafer import MixedWM38

__all__ = [
    "BTAD",
    "ISIC",
    "KSDD2",
    "AnomalyData",
    "BrainMRI",
    "CVCClinicDB",
    "Demo",
    "HeadCT",
    "ImageFolder",
    "IndustrialFolders",
    "MVTecAD",
    "MVTecAD2",
    "MagneticTile",
    "MetaJSON",
    "MixedWM38",
    "RealIAD",
    "Resize",
    "Sample",
    "SampleDataset",
    "VisA",
    "read_image",
    "read_mask",
    "write_images",
]

_MODULES = {
    "dataset": ("AnomalyData", "Sample", "SampleDataset", "read_image", "read_mask"),
    "demo": ("Demo",),
    "folder": ("ImageFolder",),
    "folder_writer": ("write_images",),
    "industrial": ("BTAD", "KSDD2", "IndustrialFolders", "MagneticTile", "MVTecAD", "VisA"),
    "json_sets": ("MetaJSON", "RealIAD"),
    "medical": ("ISIC", "BrainMRI", "CVCClinicDB", "HeadCT"),
    "mvtec_ad_2": ("MVTecAD2",),
    "transforms": ("Resize",),
    "wafer": ("MixedWM38",),
}

if not TYPE_CHECKING:  # type checkers know the names from the imports above
    __getattr__, __dir__ = lazy_names(__name__, _MODULES)
