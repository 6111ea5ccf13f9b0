"""Photographs sorted into ok/ and ng/, one folder per product."""

from collections.abc import Iterator

from anomaly_clip.data import AnomalyData, Sample
from anomaly_clip.data.layout import images_in, subfolders


class MyFactory(AnomalyData):
    """``root/<product>/{train,test}/{ok,ng}/*.jpg``, without masks."""

    dataset_name = "MyFactory"

    def find_categories(self) -> list[str]:
        """Return the product folders."""
        return [folder.name for folder in subfolders(self.root)]

    def list_samples(self, category: str, split: str) -> Iterator[Sample]:
        """Yield the images of a product, sorted by path."""
        for name in ("ok", "ng"):
            for image in images_in(self.root / category / split / name):
                defect = "good" if name == "ok" else name
                yield Sample(image, category, label=name == "ng", defect=defect)
