"""Images that a run could not read: their rows in ``scores.csv``, their number, its last line."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count, islice
from typing import Any

from anomaly_clip.data.dataset import AnomalyData
from anomaly_clip.methods.evaluated import EvaluatedModule
from anomaly_clip.progress import number_of, say
from anomaly_clip.records import UnreadableImage
from anomaly_clip.results.folder import ERROR_COLUMN
from anomaly_clip.results.map_store import Rows

__all__ = ["UnreadableImages", "score_table"]


class UnreadableImages:
    """The images that a run could not read; its first process knows all of them.

    Attributes:
        images: Images that were not scored, or not trained on.
        references: Reference images that others replace.
        not_drawn: Images that were scored, but that this process could not read again.
    """

    def __init__(self) -> None:
        self.images: list[UnreadableImage] = []
        self.references: list[UnreadableImage] = []
        self.not_drawn: list[UnreadableImage] = []
        self._are_listed = False

    @property
    def exist(self) -> bool:
        """True if there are any."""
        return bool(self.images or self.references or self.not_drawn)

    def take_fit(self, data: AnomalyData) -> None:
        """Take and report the images that a fit left out."""
        self.images = data.unreadable.of_fit()
        if self.images:
            number = number_of(len(self.images), "image")
            text = f"fitted without {number} that could not be read (data.unreadable skip)"
            _warn(text, self.images)

    def take_test(self, data: AnomalyData, method: EvaluatedModule) -> None:
        """Take the images that a test left out."""
        self.images = data.unreadable.of_test()
        self._take_references(data, method)

    def take_predict(
        self, data: AnomalyData, method: EvaluatedModule, images: Sequence[UnreadableImage]
    ) -> None:
        """Take the images that predict could not read; the listing contains them."""
        self.images, self._are_listed = list(images), True
        self._take_references(data, method)

    def _take_references(self, data: AnomalyData, method: EvaluatedModule) -> None:
        if method.reference_paths:
            self.references = data.unreadable.of_references()

    def counts(self) -> dict[str, int]:
        """Return the numbers above zero, for the protocol."""
        numbers = {
            "unreadable_images": len(self.images),
            "unreadable_references": len(self.references),
        }
        return {name: number for name, number in numbers.items() if number}

    def table(self, rows: Rows, weights: str) -> tuple[list[str], list[list[Any]]]:
        """Return header and rows of ``scores.csv``; see :func:`score_table`."""
        return score_table(rows, self.images, self._are_listed, weights)

    def lose(self, images: Sequence[UnreadableImage]) -> None:
        """Take and report images that were scored, but could not be read again to be drawn."""
        self.not_drawn = list({image.index: image for image in images}.values())
        if images:
            number = number_of(len(self.not_drawn), "scored image")
            _warn(f"{number} could not be read again to be drawn", self.not_drawn)

    def close(self, num_scored: int, num_listed: int) -> None:
        """Report what could not be read in the last lines of a test or of predict."""
        if self.references:
            number = number_of(len(self.references), "reference image")
            _warn(f"{number} could not be read, and others were used", self.references)
        if self.images:
            scored = f"{num_scored} of {number_of(num_listed, 'image')} scored"
            unread = f"{len(self.images)} could not be read (listed in scores.csv)"
            _warn(f"{scored}; {unread}", self.images)

    def none_readable(self) -> ValueError:
        """Return the error for a predict that could read no image at all."""
        first = self.images[0]
        if len(self.images) == 1:
            return ValueError(f"{first.path}: {first.reason}")
        return ValueError(
            f"none of {len(self.images)} images can be read, such as {first.path}: {first.reason}"
        )


def score_table(
    rows: Rows, unreadable: Sequence[UnreadableImage], are_listed: bool, weights: str
) -> tuple[list[str], list[list[Any]]]:
    """Return header and rows of ``scores.csv``, in the order of the listing.

    Args:
        rows: Rows of the images that were scored, by index.
        unreadable: The images that could not be read, with a row of their own and a reason; without
            any, there is no column ``error``.
        are_listed: Whether the unreadable images are counted by the indices of ``rows``.
        weights: Value of the column ``weights``.
    """
    columns = [*next(iter(rows.values()))] if rows else ["path"]
    if not unreadable:
        header = [*columns, "weights"] if rows else columns
        return header, [[*row.values(), weights] for row in rows.values()]
    missing = set() if are_listed else {image.index for image in unreadable}
    places = (place for place in count() if place not in missing)
    places_by_index = list(islice(places, max(rows, default=-1) + 1))
    table = {places_by_index[index]: [*row.values(), weights, None] for index, row in rows.items()}
    for image in unreadable:
        cells = {"path": image.path, "category": image.category}
        named = [cells.get(column) for column in columns]
        table[image.index] = [*named, weights, image.reason]
    return [*columns, "weights", ERROR_COLUMN], [table[place] for place in sorted(table)]


def _warn(text: str, images: Sequence[UnreadableImage]) -> None:
    """Print a message, with one of the images that it is about."""
    such_as = ":" if len(images) == 1 else ", such as"
    say(f"{text}{such_as} {images[0].path}: {images[0].reason}", style="bold red")
