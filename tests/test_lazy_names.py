"""Names of the package: found at their first use, complete, and known to type checkers."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from lightning.pytorch import LightningDataModule

import anomaly_clip
from anomaly_clip import data, files, methods
from anomaly_clip.lazy_names import lazy_names


def test_the_import_loads_no_other_module() -> None:
    code = (
        "import sys, anomaly_clip\n"
        "assert 'load' in dir(anomaly_clip) and 'SDP' in dir(anomaly_clip)\n"
        "heavy = {'torch', 'numpy', 'PIL', 'lightning'} & set(sys.modules)\n"
        "own = [name for name in sys.modules if name.startswith('anomaly_clip.')]\n"
        "print(sorted(heavy), own)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split("\n")[0] == "[] []"


@pytest.mark.parametrize("name", anomaly_clip.__all__)
def test_every_name_exists(name: str) -> None:
    assert name in dir(anomaly_clip)
    value: Any = getattr(anomaly_clip, name)
    if inspect.isclass(value):
        assert value.__name__ == name


def test_all_methods_and_data_sets_are_there() -> None:
    sets = [name for name in data.__all__ if _is_data_module(getattr(data, name))]
    assert {*methods.__all__, *sets, "Resize"} <= set(anomaly_clip.__all__)
    assert anomaly_clip.SDP is methods.SDP
    assert anomaly_clip.ImageFolder is data.ImageFolder


def _is_data_module(value: Any) -> bool:
    return inspect.isclass(value) and issubclass(value, LightningDataModule)


@pytest.mark.parametrize("package", [anomaly_clip, data, methods])
def test_type_checkers_see_the_same_names(package: ModuleType) -> None:
    """They read the imports under TYPE_CHECKING, and refuse other names."""
    source = Path(str(package.__file__)).read_text(encoding="utf-8")
    [block] = [
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    imported = [
        alias.name
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]
    assert sorted(imported) == sorted(set(package.__all__) - {"__version__"})
    assert set(package.__all__) <= set(dir(package))


def test_lazy_names_come_from_their_modules() -> None:
    find, names = lazy_names("anomaly_clip", {"files": ["printable"], "errors": ["suggest"]})
    assert find("printable") is files.printable
    assert {"printable", "suggest", "__version__"} <= set(names())
    with pytest.raises(
        AttributeError, match="module 'anomaly_clip' has no attribute 'cheap'"
    ) as error:
        find("cheap")
    assert (error.value.name, error.value.obj) == ("cheap", anomaly_clip)  # Python's suggestion
    del anomaly_clip.printable  # type: ignore[attr-defined]  # kept for the next use


def test_other_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="module 'anomaly_clip' has no attribute 'lode'"):
        anomaly_clip.lode  # type: ignore[attr-defined]  # noqa: B018
    assert not hasattr(anomaly_clip, "read_image")


@pytest.mark.parametrize(
    ("method", "backbone", "message"),
    [
        ("SDP", "demo", "backbone 'demo': give its settings, such as backbone={\"pretrained\": 'd"),
        ("WinCLIP", 3, 'backbone int: give its settings, such as backbone={"pretrained": "..."}'),
        ("PaDiM", "resnet18", "such as backbone={\"name\": 'resnet18'}"),
        ("LinearProbe", "resnet18", "such as backbone={\"name\": 'resnet18'}"),
    ],
)
def test_a_backbone_given_by_a_word_is_refused_in_a_sentence(
    method: str, backbone: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=r"^backbone") as caught:
        getattr(anomaly_clip, method)(backbone=backbone)
    assert message in str(caught.value)
