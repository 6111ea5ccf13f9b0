"""The package structure matches ``docs/architecture.md``."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from pathlib import Path

import pytest
from structure import ROOT, PackageStructure

LONGEST = 500
MEDIAN = 185
TESTED = 0.75
CLOSURES = {
    "sdp": 40,
    "padim": 45,
    "clip_ada": 42,
    "sdp_plus": 44,
    "object_agnostic": 43,
    "april_gan": 44,
}
"""Maximum number of the package's modules that the import of a method loads."""


@pytest.fixture(scope="module")
def package() -> PackageStructure:
    return PackageStructure()


def make_package(root: Path, files: dict[str, str]) -> PackageStructure:
    for name, text in {"__init__": "", **files}.items():
        path = root / "anomaly_clip" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return PackageStructure(root)


def test_closures_follow_imports_in_functions_and_reexports(tmp_path: Path) -> None:
    built = make_package(
        tmp_path,
        {
            "a": "from anomaly_clip import b\ndef f():\n    import anomaly_clip.c\n",
            "b": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import anomaly_clip.d\n",
            "c": "from anomaly_clip.part import Thing\n",
            "d": "",
            "part/__init__": "from anomaly_clip.part.thing import Thing\n"
            "from anomaly_clip.d import other\n",
            "part/thing": "class Thing: ...\n",
        },
    )
    assert built.closure("a") == {"b", "c", "part.thing"}
    assert built.closure("d") == set()


def test_a_forbidden_import_is_reported(tmp_path: Path) -> None:
    built = make_package(
        tmp_path,
        {
            "methods/sdp": "import anomaly_clip.data.dataset\nimport anomaly_clip.maps\n",
            "data/dataset": "import anomaly_clip.records\n",
            "records": "import anomaly_clip.data.dataset\n",
            "maps": "",
        },
    )
    assert built.forbidden_imports() == [
        "methods.sdp -> data.dataset",
        "records -> data.dataset",
    ]


@pytest.mark.parametrize(
    ("test", "counts"),
    [
        ("from anomaly_clip.part.thing import Thing\nThing()\n", True),
        ("from anomaly_clip.part import Thing as T\nT.made().used()\n", True),
        ("from anomaly_clip.part import thing\nthing.make(1)\n", True),
        ("from anomaly_clip.part.thing import Thing\nprint(Thing)\n", False),
        ("from anomaly_clip.part.other import Thing\nThing()\n", False),
        ("# Thing()\n", False),
    ],
)
def test_a_module_is_tested_if_its_test_calls_it(test: str, counts: bool, tmp_path: Path) -> None:
    built = make_package(
        tmp_path,
        {
            "part/__init__": "from anomaly_clip.part.thing import Thing\n",
            "part/thing": "class Thing: ...\ndef make(x): ...\n",
            "part/other": "class Thing: ...\n",
        },
    )
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_thing.py").write_text(test)
    assert built.tested()["part.thing"] is counts


def test_no_import_is_forbidden(package: PackageStructure) -> None:
    assert package.forbidden_imports() == []


@pytest.mark.parametrize("method", CLOSURES)
def test_a_method_needs_few_modules(package: PackageStructure, method: str) -> None:
    closure = package.closure(f"methods.{method}")
    assert 5 < len(closure) <= CLOSURES[method], sorted(closure)


def test_files_stay_short(package: PackageStructure) -> None:
    lines = {name: count for name, count in package.lines.items() if not name.endswith("__init__")}
    assert {name: count for name, count in lines.items() if count > LONGEST} == {}
    assert statistics.median(lines.values()) <= MEDIAN


def test_most_modules_have_a_test_file_of_their_name(package: PackageStructure) -> None:
    tested = package.tested()
    assert sum(tested.values()) / len(tested) >= TESTED


def test_the_architecture_page_lists_every_module_once(package: PackageStructure) -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    listed = Counter(re.findall(r"^\| `([\w/]+)\.py` \|", text, re.MULTILINE))
    files = {name.replace(".", "/") for name in package.modules if not name.endswith("__init__")}
    assert set(listed) == files
    assert set(listed.values()) == {1}


def test_folder_depth_is_one(package: PackageStructure) -> None:
    assert max(name.removesuffix(".__init__").count(".") for name in package.modules) == 1
