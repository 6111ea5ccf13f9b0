"""Synthetic defects on arrays: call a recipe with a normal image and a random generator.

Example:
    >>> import numpy as np
    >>> from anomaly_clip.synthesis import preset
    >>> noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    >>> result = preset("cutpaste")(noise, np.random.default_rng(1))
    >>> result.image.shape, result.mask.dtype.name
    ((64, 64, 3), 'bool')
"""

from __future__ import annotations

from anomaly_clip.synthesis.cutpaste import CutPaste
from anomaly_clip.synthesis.erasing import Erasing
from anomaly_clip.synthesis.nsa import NSA
from anomaly_clip.synthesis.perlin import Perlin
from anomaly_clip.synthesis.presets import PRESETS, preset
from anomaly_clip.synthesis.synthesizer import SynthesisSettings, synthesize

__all__ = [
    "NSA",
    "PRESETS",
    "CutPaste",
    "Erasing",
    "Perlin",
    "SynthesisSettings",
    "preset",
    "synthesize",
]
