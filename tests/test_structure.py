"""The house stays as ``docs/architecture.md`` draws it."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from pathlib import Path

import pytest
from structure import ROOT, House

LONGEST = 500
MEDIAN = 180
TESTED = 0.75
CLOSURES = {"sdp": 24, "padim": 22, "clip_ada": 25, "sdp_plus": 33}
"""Files of the package that an import of a method may need, at most."""


@pytest.fixture(scope="module")
def house() -> House:
    return House()


def make_package(root: Path, files: dict[str, str]) -> House:
    for name, text in {"__init__": "", **files}.items():
        path = root / "anomaly_clip" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return House(root)


def test_closures_follow_imports_in_functions_and_reexports(tmp_path: Path) -> None:
    built = make_package(
        tmp_path,
        {
            "a": "from anomaly_clip import b\ndef f():\n    import anomaly_clip.c\n",
            "b": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import anomaly_clip.d\n",
            "c": "from anomaly_clip.room import Thing\n",
            "d": "",
            "room/__init__": "from anomaly_clip.room.thing import Thing\n"
            "from anomaly_clip.d import other\n",
            "room/thing": "class Thing: ...\n",
        },
    )
    assert built.closure("a") == {"b", "c", "room.thing"}
    assert built.closure("d") == set()


def test_an_import_against_the_floors_is_named(tmp_path: Path) -> None:
    built = make_package(
        tmp_path,
        {
            "methods/sdp": "import anomaly_clip.data.dataset\nimport anomaly_clip.maps\n",
            "data/dataset": "import anomaly_clip.records\n",
            "records": "import anomaly_clip.data.dataset\n",
            "maps": "",
        },
    )
    assert built.against_floors() == [
        "methods.sdp -> data.dataset",
        "records -> data.dataset",
    ]


@pytest.mark.parametrize(
    ("test", "counts"),
    [
        ("from anomaly_clip.room.thing import Thing\nThing()\n", True),
        ("from anomaly_clip.room import Thing as T\nT.made().used()\n", True),
        ("from anomaly_clip.room import thing\nthing.make(1)\n", True),
        ("from anomaly_clip.room.thing import Thing\nprint(Thing)\n", False),
        ("from anomaly_clip.room.other import Thing\nThing()\n", False),
        ("# Thing()\n", False),
    ],
)
def test_a_test_of_a_module_calls_what_it_defines(test: str, counts: bool, tmp_path: Path) -> None:
    built = make_package(
        tmp_path,
        {
            "room/__init__": "from anomaly_clip.room.thing import Thing\n",
            "room/thing": "class Thing: ...\ndef make(x): ...\n",
            "room/other": "class Thing: ...\n",
        },
    )
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_thing.py").write_text(test)
    assert built.tested()["room.thing"] is counts


def test_no_import_is_against_the_floors(house: House) -> None:
    assert house.against_floors() == []


@pytest.mark.parametrize("method", CLOSURES)
def test_a_method_needs_few_files(house: House, method: str) -> None:
    closure = house.closure(f"methods.{method}")
    assert 5 < len(closure) <= CLOSURES[method], sorted(closure)


def test_files_stay_short(house: House) -> None:
    lines = {name: count for name, count in house.lines.items() if not name.endswith("__init__")}
    assert {name: count for name, count in lines.items() if count > LONGEST} == {}
    assert statistics.median(lines.values()) <= MEDIAN


def test_most_modules_have_a_test_of_their_name(house: House) -> None:
    tested = house.tested()
    assert sum(tested.values()) / len(tested) >= TESTED


def test_the_picture_names_every_file_once(house: House) -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    drawn = Counter(re.findall(r"^\| `([\w/]+)\.py` \|", text, re.MULTILINE))
    files = {name.replace(".", "/") for name in house.modules if not name.endswith("__init__")}
    assert set(drawn) == files
    assert set(drawn.values()) == {1}


def test_folders_are_one_deep(house: House) -> None:
    assert max(name.removesuffix(".__init__").count(".") for name in house.modules) == 1
