"""Data sets as Lightning data modules."""

import cv2

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

# Data loaders fork their workers, and OpenCV's threads do not survive a fork: a worker that used
# these threads would hang.
cv2.setNumThreads(0)
