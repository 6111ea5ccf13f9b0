from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anomaly_clip.cli import main
from anomaly_clip.commands.preview import CELL, GAP, LINE_HEIGHT, contact_sheet
from anomaly_clip.data import Demo, MVTecAD


def test_a_sheet_shows_evenly_spaced_images_with_their_masks(mvtec_root: Path) -> None:
    sheet = contact_sheet(MVTecAD(str(mvtec_root)), count=4).astype(int)
    columns = (sheet.shape[1] - GAP) // (2 * CELL + GAP)
    rows = (sheet.shape[0] - GAP) // (CELL + LINE_HEIGHT + GAP)
    assert columns * rows >= 4
    masks = []
    for place in range(4):
        left = GAP + (place % columns) * (2 * CELL + GAP) + CELL
        top = GAP + (place // columns) * (CELL + LINE_HEIGHT + GAP) + LINE_HEIGHT
        masks.append(sheet[top : top + CELL, left : left + CELL])
    # The images are rows 0, 2, 5 and 7 of the listing: good, scratch, good, scratch.
    middle = [mask[CELL // 3 : CELL // 2, CELL // 3 : CELL // 2].mean() for mask in masks]
    assert [value > 200 for value in middle] == [False, True, False, True]


def test_a_sheet_of_the_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "deep" / "sheet.png"
    words = ["preview", "--data", "Demo", "--data.num_test", "2", "--data.picture_size", "64"]
    assert main([*words, "--count", "7", "--file", str(file)]) == 0
    assert capsys.readouterr().out.strip() == str(file)
    with Image.open(file) as sheet:
        assert np.asarray(sheet).std() > 30


def test_fewer_images_than_requested() -> None:
    data = Demo(categories=["white pill"], num_train=2, picture_size=64)
    assert contact_sheet(data, "train", 48).shape[2] == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data=Demoo"], "data: there is no class Demoo: did you mean Demo?"),
        (
            ["--data=Demo", "--data.bacth_size=3"],
            "data.bacth_size: Demo has no such option: did you",
        ),
        (
            ["--data=ImageFolder", "--data.root=.", "--data.num_scenes=4"],
            "data.num_scenes: ImageFolder has no such",
        ),
        (["--data=Demo", "--cuont=3"], "unknown option --cuont: did you mean --count or --config?"),
        (["--data=Demo", "--count=0"], "--count must be 1 or more"),
        (["--data=Demo", "--file=a.txt"], "--file a.txt: expected a name ending in .png"),
        (["--data=Demo", "--split=val"], "split: expected one of 'train', 'test', got val"),
        (["--data=MVTecAD", "--data.root=/nowhere"], "data.root /nowhere: there is no such folder"),
        ([], "--data missing"),
    ],
)
def test_mistakes(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["preview", *words]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith(f"anomaly_clip: {message}")


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preview", "--help"]) == 0
    assert "--count" in capsys.readouterr().out
