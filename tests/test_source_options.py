"""Options read from source files, compared with those of the parser that imports the classes."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import ArgumentParser
from lightning.pytorch import Trainer

from anomaly_clip import data, methods
from anomaly_clip.backbones.clip import CLIPSettings
from anomaly_clip.backbones.towers import BackboneSettings
from anomaly_clip.commands.source_code import UNKNOWN
from anomaly_clip.commands.source_options import SourceOption, find_class, public_classes
from anomaly_clip.decisions.settings import CalibrationSettings
from anomaly_clip.recording.writer import RunWriter

METHODS = [source.name for source in public_classes("anomaly_clip.methods")]
DATA_SETS = [source.name for source in public_classes("anomaly_clip.data")]
CHEAP = {"PatchCore", "SDP", "Demo", "BTAD"}
"""Classes that are compared in every run of the tests."""
CLASSES = [
    *(getattr(methods, name) for name in METHODS),
    *(getattr(data, name) for name in DATA_SETS),
    *(Trainer, RunWriter, CalibrationSettings),
]


def plain(value: Any) -> Any:
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def differences(name: str, option: SourceOption, expected: Any) -> Iterator[str]:
    if option.settings and isinstance(expected, dict):
        expected = expected.get("init_args", expected)
        assert {part.name for part in option.settings} == set(expected), name
        for part in option.settings:
            yield from differences(f"{name}.{part.name}", part, expected[part.name])
    elif option.default is UNKNOWN:
        if expected is not None:
            yield f"{name} is unknown, not {expected}"
    elif not option.settings and option.default != plain(expected):
        yield f"{name} is {option.default}, not {expected}"
    if not option.help:
        yield f"{name} has no text"


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[] if kind.__name__ in CHEAP else [pytest.mark.slow])
        for kind in CLASSES
    ],
    ids=lambda kind: kind.__name__,
)
def test_options_and_defaults_are_those_of_the_parser(kind: type) -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(kind, "x")
    expected = parser.get_defaults().as_dict()["x"]
    if getattr(kind, "any_tower", kind is methods.MuSc):  # the parser has those of the default only
        given = expected["backbone"].get("init_args", expected["backbone"])
        expected["backbone"] = {**asdict(CLIPSettings()), **asdict(BackboneSettings()), **given}
    source = find_class(f"{kind.__module__}.{kind.__name__}")
    assert source is not None
    options = {option.name: option for option in source.options()}
    assert set(options) == set(expected)
    assert not [d for name in options for d in differences(name, options[name], expected[name])]


def test_abstract_classes_and_helpers_are_no_choices() -> None:
    assert set(METHODS) == set(methods.__all__) - {"AnomalyMethod"}
    others = {"AnomalyData", "Resize", "Sample", "SampleDataset"}
    others |= {"read_image", "read_mask", "write_images"}
    assert set(DATA_SETS) == set(data.__all__) - others


@pytest.mark.parametrize(
    ("bases", "is_choice"),
    [  # as in Python, the first class that has the name decides
        ("Trained, Scoring", False),
        ("Scoring, Trained", True),
        ("Trained", False),
        ("Scoring", True),
        ("Method, Scoring", True),
    ],
)
def test_a_name_that_one_of_several_bases_defines(
    tmp_path: Path, bases: str, is_choice: bool
) -> None:
    (tmp_path / "my_module.py").write_text(f"""from abc import abstractmethod
from anomaly_clip.methods.base import AnomalyMethod
class Trained(AnomalyMethod):
    @abstractmethod
    def losses(self): ...
class Scoring(AnomalyMethod):
    image_size = 32
    def score(self, images, categories): ...
    def losses(self): ...
class Method(AnomalyMethod): ...
class Mine({bases}): ...
""")
    source = find_class("my_module.Mine", folder=str(tmp_path))
    assert source is not None
    assert source.is_experiment is is_choice


def test_a_class_of_the_working_folder(tmp_path: Path) -> None:
    (tmp_path / "my_module.py").write_text(
        '''from anomaly_clip.methods.feature_method import FittedMethod
raise SystemExit("imported")
class Mine(FittedMethod):
    """A method. With more.

    Args:
        sigma: Blur.
    """
    image_size = 32
    def __init__(self, sigma: float = 2.0, **shared):
        super().__init__(image_size=32, **shared)
    def score(self, images, categories): ...
'''
    )
    source = find_class("my_module.Mine", folder=str(tmp_path))
    assert source is not None
    assert source.summary == "A method"
    names = [option.name for option in source.options()]
    assert names[0] == "sigma"
    assert {"backbone", "layers", "evaluator"} <= set(names)
    assert "image_size" not in names  # passed on by the constructor
    assert find_class("my_module.Other", folder=str(tmp_path)) is None


def test_an_option_with_two_kinds_of_settings() -> None:
    """The backbone of MuSc is a CLIP, a CNN or a ViT; each text names the kind that it is for."""
    source = find_class("anomaly_clip.methods.musc.MuSc")
    assert source is not None
    backbone = next(option for option in source.options() if option.name == "backbone")
    texts = {option.name: option.help for option in backbone.settings}
    assert texts["name"].startswith("CNN or ViT: A torchvision CNN")
    assert "CLIP: An open_clip model name" in texts["name"]
    assert texts["pretrained"].startswith("CLIP: ")
    assert texts["weights"].startswith("CNN or ViT: ")
    defaults = {option.name: option.default for option in backbone.settings}
    assert defaults["name"] == CLIPSettings.name  # of the default, not of the first kind
