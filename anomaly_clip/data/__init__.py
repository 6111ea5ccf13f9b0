"""Data sets as Lightning data modules."""

from anomaly_clip.data.dataset import AnomalyData, Sample, SampleDataset, read_image, read_mask
from anomaly_clip.data.demo import Demo
from anomaly_clip.data.folder import ImageFolder
from anomaly_clip.data.industrial import MagneticTile, MVTecAD

__all__ = [
    "AnomalyData",
    "Demo",
    "ImageFolder",
    "MVTecAD",
    "MagneticTile",
    "Sample",
    "SampleDataset",
    "read_image",
    "read_mask",
]
