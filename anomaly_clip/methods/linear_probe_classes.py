"""Checks of the classes that a linear probe tells apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anomaly_clip.metrics.classification import Targets

if TYPE_CHECKING:
    from anomaly_clip.data.dataset import AnomalyData
    from anomaly_clip.data.samples import Sample

__all__ = ["check_same", "check_shown"]


def check_same(
    fitted: tuple[Targets, list[str]], current: tuple[Targets, list[str]], whose: str
) -> None:
    """Check that a probe meets the classes that it was fitted with.

    Raises:
        ValueError: If they are others.
    """
    (kind, names), (current_kind, current_names) = fitted, current
    if kind != current_kind:
        raise ValueError(
            f"the probe was fitted with data.targets {kind} ({len(names)} classes), and {whose} is "
            f"read with data.targets {current_kind} ({len(current_names)}): set it to {kind}, or "
            f"fit again"
        )
    if names != current_names:
        odd = sorted(set(names) ^ set(current_names))
        raise ValueError(
            f"the probe was fitted with {len(names)} classes, and {whose} has "
            f"{len(current_names)}: only one of them knows {odd[0]}"
        )


def check_shown(data: AnomalyData, names: list[str], split: str, samples: list[Sample]) -> None:
    """Check that a split shows all classes.

    Args:
        data: The data module, for the way out.
        names: The classes, in the order of a sample's ``target``.
        split: training or test.
        samples: The split.

    Raises:
        ValueError: If it does not.
    """
    present = {column for s in samples for column, is_on in enumerate(s.target or ()) if is_on}
    missing = [name for column, name in enumerate(names) if column not in present]
    if missing:
        way = "raise data.test_share, or draw another data.split_seed"
        if split == "training":
            way = "draw another data.split_seed"
        if split == "training" and data.has_shots:
            way = "leave out data.shots and data.fraction, which take normal maps alone"
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise ValueError(
            f"data.root {data.root}: class {missing[0]}{more} has no {split} map: {way}"
        )
