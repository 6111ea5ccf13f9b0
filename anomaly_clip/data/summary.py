"""Start line of a stage: number, labels and categories of its images, and what is not used."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from anomaly_clip.progress import number_of

if TYPE_CHECKING:
    from anomaly_clip.data.dataset import AnomalyData

__all__ = ["left_out_remark", "start_line"]


def start_line(data: AnomalyData, stage: str) -> str:
    """Describe the images of a stage in one line, and what of them is not used.

    Args:
        data: The data module.
        stage: fit, validate, test or predict.
    """
    source = data if stage != "fit" or data.auxiliary is None else data.auxiliary
    samples = data.fit_samples() if stage == "fit" else data.samples("test")
    labels = f"{sum(s.label for s in samples)} anomalous" if source.has_labels else "no labels"
    number = len({s.category for s in samples})
    copies = source.listing.copies("train" if stage == "fit" and source is data else "test")
    left_out = {
        "copy": [sample.image for sample in copies],
        **source.left_out(stage if source is data else "test"),
    }
    remarks = [
        f"{number_of(len(samples), 'image')} ({labels}) in {number} "
        f"{'category' if number == 1 else 'categories'}"
        f"{'' if source is data else f' of {source.dataset_name} {source.root}'}"
        f"{data.unreadable.summary(stage)}"
        f"{data.calibration.summary() if stage == 'fit' else ''}",
        *(left_out_remark(source.root, kind, images) for kind, images in left_out.items()),
    ]
    if stage == "fit" and data.leakage.num_published:
        remarks.append(
            f"{number_of(data.leakage.num_published, 'test image')} among the training images, "
            f"as in the published archive"
        )
    return "; ".join(filter(None, [*remarks, *source.reading.remarks]))


def left_out_remark(root: Path, kind: str, images: Sequence[Path]) -> str:
    """Return a sentence on images that are not used; empty without any.

    Example:
        >>> from pathlib import Path
        >>> from anomaly_clip.data.summary import left_out_remark
        >>> left_out_remark(Path("a"), "copy", [Path("a/b (1).png")])
        '1 copy is not used: b (1).png'
        >>> left_out_remark(Path("a"), "copy", [Path("a/b (1).png"), Path("a/b (2).png")])
        '2 copies are not used, such as b (1).png'
    """
    if not images:
        return ""
    example = images[0].relative_to(root).as_posix() if root in images[0].parents else images[0]
    if len(images) == 1:
        return f"1 {kind} is not used: {example}"
    noun = re.split(" (?:of|in) ", kind)[0]
    plural = f"{noun.removesuffix('y')}ies" if noun.endswith("y") else f"{noun}s"
    return f"{len(images)} {plural}{kind[len(noun) :]} are not used, such as {example}"
