"""Checks of the classes of a linear probe."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anomaly_clip.metrics.classification import Targets

if TYPE_CHECKING:
    from anomaly_clip.data.dataset import AnomalyData
    from anomaly_clip.data.samples import Sample

__all__ = ["check_same", "check_shown"]


def check_same(
    fitted: tuple[Targets, list[str]], current: tuple[Targets, list[str]], source: str
) -> None:
    """Check that the current classes are those that a probe was fitted with.

    Raises:
        ValueError: If the current classes differ from the fitted ones.
    """
    (kind, names), (current_kind, current_names) = fitted, current
    if kind != current_kind:
        raise ValueError(
            f"the probe was fitted with data.targets {kind} ({len(names)} classes), but {source} "
            f"is read with data.targets {current_kind} ({len(current_names)} classes): set "
            f"data.targets to {kind}, or fit again"
        )
    if names != current_names:
        odd = sorted(set(names) ^ set(current_names))
        difference = f"{odd[0]} is in only one of the sets" if odd else "only their order differs"
        raise ValueError(
            f"the {len(names)} classes that the probe was fitted with and the {len(current_names)} "
            f"classes of {source} are not the same: {difference}; use data with the same classes, "
            f"or fit again"
        )


def check_shown(data: AnomalyData, names: list[str], split: str, samples: list[Sample]) -> None:
    """Check that a split has images of all classes.

    Args:
        data: The data module, named in the error message.
        names: Names of the classes, in the order of a sample's ``target``.
        split: training or test.
        samples: The samples of the split.

    Raises:
        ValueError: If a class is missing.
    """
    present = {column for s in samples for column, is_on in enumerate(s.target or ()) if is_on}
    missing = [name for column, name in enumerate(names) if column not in present]
    if missing:
        way_out = "raise data.test_share, or try another data.split_seed"
        if split == "training":
            way_out = "try another data.split_seed"
        if split == "training" and data.has_shots:
            way_out = "leave out data.shots and data.fraction, which keep normal maps only"
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise ValueError(
            f"data.root {data.root}: class {missing[0]}{more} has no {split} map: {way_out}"
        )
