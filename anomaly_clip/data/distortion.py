"""Effect of making images square: the share that a crop shows, and changes of the aspect ratio."""

from __future__ import annotations

from collections.abc import Sequence

from anomaly_clip.data.transforms import Resize

__all__ = ["distortion"]

ROUND = 1.02  # ratio of sides up to which an image counts as square


def distortion(sizes: Sequence[tuple[int, int]], resize: Resize, size: int) -> str | None:
    """Describe what making images square does to them; None for square images that are not cropped.

    Args:
        sizes: Widths and heights of the images, in pixels.
        resize: How images are made square.
        size: Side of the square images, in pixels.
    """
    ratios = [max(w, h) / min(w, h) for w, h in sizes]
    texts = []
    if resize.size is not None and resize.size > 0:
        inner = (size / resize.size) ** 2
        kept = [inner / ratio if resize.rule == "shorter_crop" else inner for ratio in ratios]
        low, high = (round(100 * share) for share in (min(kept), max(kept)))
        if low < 100:
            range_ = f"{low}" if low == high else f"{low} to {high}"
            rule = f"data.resize {resize.rule}, {resize.size} to {size} pixels"
            texts.append(f"the centre crop shows {range_} % of each image ({rule})")
    if resize.rule != "shorter_crop" and max(ratios) > ROUND:
        widest = max(range(len(ratios)), key=ratios.__getitem__)
        width, height = sizes[widest]
        texts.append(
            f"images are made square, which changes their aspect ratio by up to "
            f"{ratios[widest]:.2f} ({width} x {height} pixels)"
        )
    return ", and ".join(texts) or None
