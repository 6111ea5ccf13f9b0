"""Methods with mistakes, as somebody outside the package may write them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, ClassVar

import torch
from toy import Toy

from anomaly_clip.backbones.clip import CLIPBackbone, CLIPSettings
from anomaly_clip.methods import AnomalyMethod
from anomaly_clip.records import Scores


class Undeclared(AnomalyMethod):
    """A method that does not tell whether it is fitted."""

    @property
    def image_size(self) -> int:
        """Side of the images."""
        return 32

    def score(self, images: torch.Tensor, categories: list[str]) -> Scores:
        """Score by brightness."""
        maps = images.float().mean(dim=1)
        return Scores(image_score=maps.amax(dim=(1, 2)), anomaly_map=maps)


class Bodiless(Undeclared):
    """A method without a backbone."""

    must_be_fitted = False
    can_be_fitted = False


class Incomplete(AnomalyMethod):
    """A method that does not implement ``score``."""

    @property
    def image_size(self) -> int:
        """Side of the images."""
        return 32


class Faulty(Toy):
    """A method with a fault in its constructor."""

    def __init__(self, number: int = 1) -> None:
        if number < 0:
            raise ValueError("number is negative")
        _: Any = number + "a"  # type: ignore[operator]


class Brightness(AnomalyMethod):
    """A method that scores brightness, by the number of letters of the category."""

    must_be_fitted: ClassVar[bool] = False
    can_be_fitted: ClassVar[bool] = False
    backbone: CLIPBackbone

    def __init__(self, backbone: CLIPSettings | CLIPBackbone = CLIPSettings()) -> None:
        super().__init__()
        self.backbone = CLIPBackbone.of(backbone)
        self.save_hyperparameters({"backbone": asdict(self.backbone.settings)})

    @property
    def image_size(self) -> int:
        """Side of the images."""
        return self.backbone.image_size

    def score(self, images: torch.Tensor, categories: list[str]) -> Scores:
        """Score by brightness."""
        letters = torch.tensor([float(len(name)) for name in categories])
        maps = images.float().mean(dim=1) * letters[:, None, None]  # broadcasts
        return self.scores(maps, categories)

    def scores(self, maps: torch.Tensor, categories: list[str]) -> Scores:
        """Return scores of maps."""
        return Scores(image_score=maps.amax(dim=(1, 2)), anomaly_map=maps)


class Branching(Brightness):
    """A method whose operations depend on values."""

    def scores(self, maps: torch.Tensor, categories: list[str]) -> Scores:
        """Return scores of maps, halved if they are high."""
        maps = maps / 2 if maps.max() > 100 else maps
        return super().scores(maps, categories)


class Counting(Brightness):
    """A method that counts the categories, of which a graph has one."""

    def scores(self, maps: torch.Tensor, categories: list[str]) -> Scores:
        """Return scores of maps, divided by the number of images."""
        return super().scores(maps / len(categories), categories)


class OneByOne(Brightness):
    """A method that goes through images and categories one by one."""

    def scores(self, maps: torch.Tensor, categories: list[str]) -> Scores:
        """Return scores of each map."""
        rows = [image * len(name) for image, name in zip(maps, categories, strict=False)]
        return super().scores(torch.stack(rows), categories)


class Overridden(OneByOne):
    """The same method, with a graph of its own."""

    def score_category(self, images: torch.Tensor, category: str) -> Scores:
        """Score images of one category."""
        if not torch.compiler.is_compiling():
            return super().score_category(images, category)
        maps = images.float().mean(dim=1) * len(category) ** 2
        return Scores(image_score=maps.amax(dim=(1, 2)), anomaly_map=maps)


class Remote(Brightness):
    """A method of which there is no program."""

    not_exportable: ClassVar[str | None] = "asks a server for the scores"


class Decorated(Brightness):
    """A method whose score has a decorator of its author."""

    @torch.no_grad()
    def score(self, images: torch.Tensor, categories: list[str]) -> Scores:
        """Score by brightness."""
        assert not torch.is_grad_enabled()
        return super().score(images, categories)
