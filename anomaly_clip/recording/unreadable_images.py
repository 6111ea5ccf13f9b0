"""Images that a run could not read: their rows in ``scores.csv``, and the last line of the run."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count, islice
from typing import Any

from anomaly_clip.progress import number_of
from anomaly_clip.records import UnreadableImage
from anomaly_clip.results.folder import ERROR_COLUMN
from anomaly_clip.results.map_store import Rows

__all__ = ["closing_line", "fitted_without", "none_readable", "not_drawn", "score_table"]


def score_table(
    rows: Rows, unreadable: Sequence[UnreadableImage], are_listed: bool, weights: str
) -> tuple[list[str], list[list[Any]]]:
    """Return the header and the rows of ``scores.csv``, in the order of the listing.

    Args:
        rows: Rows of the images that were scored, by index.
        unreadable: The images that could not be read, with a row of their own and a reason; without
            any, there is no column ``error``.
        are_listed: Whether the unreadable images are counted by the indices of ``rows``.
        weights: Value of the column ``weights``.
    """
    columns = [*next(iter(rows.values()))] if rows else ["path"]
    if not unreadable:
        return [*columns, "weights"], [[*row.values(), weights] for row in rows.values()]
    missing = set() if are_listed else {image.index for image in unreadable}
    places = (place for place in count() if place not in missing)
    places_by_index = list(islice(places, max(rows, default=-1) + 1))
    table = {places_by_index[index]: [*row.values(), weights, None] for index, row in rows.items()}
    for image in unreadable:
        cells = {"path": image.path, "category": image.category}
        named = [cells.get(column) for column in columns]
        table[image.index] = [*named, weights, image.reason]
    return [*columns, "weights", ERROR_COLUMN], [table[place] for place in sorted(table)]


def closing_line(num_scored: int, num_listed: int, unreadable: Sequence[UnreadableImage]) -> str:
    """Return the last line of a run that could not read some images."""
    return (
        f"{num_scored} of {number_of(num_listed, 'image')} scored; {len(unreadable)} could not be "
        f"read (listed in scores.csv){_example(unreadable)}"
    )


def fitted_without(unreadable: Sequence[UnreadableImage]) -> str:
    """Return the last line of a fit that left out images."""
    return (
        f"fitted without {number_of(len(unreadable), 'image')} that could not be read "
        f"(data.unreadable skip){_example(unreadable)}"
    )


def not_drawn(images: Sequence[UnreadableImage]) -> str:
    """Return the message about images that could be read to be scored, but not to be drawn."""
    number = number_of(len(images), "scored image")
    return f"{number} could not be read again to be drawn{_example(images)}"


def none_readable(unreadable: Sequence[UnreadableImage]) -> ValueError:
    """Return the error for a predict that could read no image at all."""
    first = unreadable[0]
    if len(unreadable) == 1:
        return ValueError(f"{first.path}: {first.reason}")
    return ValueError(
        f"none of {len(unreadable)} images can be read, such as {first.path}: {first.reason}"
    )


def _example(unreadable: Sequence[UnreadableImage]) -> str:
    first = unreadable[0]
    such_as = ":" if len(unreadable) == 1 else ", such as"
    return f"{such_as} {first.path}: {first.reason}"
