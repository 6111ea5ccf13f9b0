"""What methods on a CLIP share."""

from __future__ import annotations

from abc import ABC

from anomaly_clip.backbones.clip import CLIPBackbone
from anomaly_clip.methods.base import AnomalyMethod

__all__ = ["CLIPMethod"]


class CLIPMethod(AnomalyMethod, ABC):
    """A method whose images have the size that its CLIP takes."""

    backbone: CLIPBackbone

    @property
    def image_size(self) -> int:
        """Side of the square images that ``score`` takes, in pixels."""
        return self.backbone.image_size
