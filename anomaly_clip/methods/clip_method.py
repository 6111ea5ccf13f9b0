"""Base class of methods with a CLIP backbone."""

from __future__ import annotations

from abc import ABC

from anomaly_clip.backbones.clip import CLIPBackbone
from anomaly_clip.methods.base import AnomalyMethod

__all__ = ["CLIPMethod"]


class CLIPMethod(AnomalyMethod, ABC):
    """A method whose image size is the input size of its CLIP backbone."""

    backbone: CLIPBackbone

    @property
    def image_size(self) -> int:
        """Side of the square input images of ``score``, in pixels."""
        return self.backbone.image_size
