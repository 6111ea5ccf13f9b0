"""A data.root that does not exist, for every data set and verb."""

from __future__ import annotations

from pathlib import Path

import pytest

import anomaly_clip.data
from anomaly_clip.cli import main
from anomaly_clip.data.dataset import AnomalyData

DATA = [
    name
    for name in anomaly_clip.data.__all__
    if isinstance(kind := getattr(anomaly_clip.data, name), type)
    and issubclass(kind, AnomalyData)
    and kind is not AnomalyData
]
PADIM = ["--model", "PaDiM", "--model.backbone.name", "squeezenet1_1", "--model.layers"]
PADIM += ["[features.4.cat]", "--model.backbone.weights", "random", "--model.num_channels", "4"]
WINCLIP = ["--model", "WinCLIP", "--model.backbone.pretrained", "demo"]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("data", [name for name in DATA if name != "Demo"])
def test_no_such_folder(data: str, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in (["fit", *PADIM], ["check"], ["preview"]):
        words = [*verb, "--data", data, "--data.root", "photos/bad"]
        assert main(words) == 2
        error = capsys.readouterr().err
        assert error.startswith("anomaly_clip: data.root photos/bad: there is no such folder"), verb
        assert error.count("\n") == 1


@pytest.mark.parametrize("data", ["VisA", "ImageFolder", "MetaJSON", "ISIC"])
@pytest.mark.parametrize("verb", ["test", "predict", "each"])
def test_no_such_folder_with_prompts(
    verb: str, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = PADIM if verb == "each" else WINCLIP
    assert main([verb, *model, "--data", data, "--data.root", "bad"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("anomaly_clip: data.root bad: there is no such folder; expected")
    assert not list(Path().rglob("*.yaml"))


def test_the_folder_of_the_auxiliary_data(
    mvtec_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["fit", "--model", "SDPPlus", "--model.backbone.pretrained", "demo", "--data"]
    words += ["MVTecAD", "--data.root", str(mvtec_root), "--data.auxiliary", "VisA"]
    assert main([*words, "--data.auxiliary.root", "bad"]) == 2
    assert "data.root bad: there is no such folder; expected split_csv" in capsys.readouterr().err


def test_a_file_is_no_folder(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.txt").write_text("")
    assert main(["fit", *PADIM, "--data", "VisA", "--data.root", "a.txt"]) == 2
    assert "data.root a.txt is a file; expected a folder with" in capsys.readouterr().err


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_folder_is_checked_in_python(split: str) -> None:
    data = anomaly_clip.data.VisA("bad")
    with pytest.raises(FileNotFoundError, match=r"^data\.root bad: there is no such folder"):
        data.samples(split)  # type: ignore[arg-type]
