"""One image, a pattern or a list as ``data.root``."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import save_picture

from anomaly_clip.cli import main
from anomaly_clip.data import ImageFolder
from anomaly_clip.data.path_selection import PathSelection


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with images at three depths, a run, masks and other files."""
    monkeypatch.chdir(tmp_path)
    root = Path("photos")
    for name in ("a.png", "b.jpg", "sub/c.png", "sub/deep/d.png", "run/maps/e.png", "masks/f.png"):
        save_picture(root / name)
    for name in ("sub/@eaDir/g.png", "__old/h.png", ".cache/i.png"):
        save_picture(root / name)
    (root / "run" / "config-test.yaml").touch()
    (root / "notes.txt").touch()
    return root


PATTERNS = {
    "photos/a.png": "a.png",
    "photos/*.png": "a.png",
    "photos/*.[jp]*g": "a.png b.jpg",
    "photos/?.jpg": "b.jpg",
    "photos/**/*.png": "a.png sub/c.png sub/deep/d.png",
    "photos/**": "a.png b.jpg sub/c.png sub/deep/d.png",
    "photos/*/*.png": "sub/c.png",
    "*/sub/*.png": "sub/c.png",
    "photos/s*": "sub/c.png sub/deep/d.png",
    "photos/masks/*.png": "masks/f.png",
    "photos/run/maps/*.png": "run/maps/e.png",  # named, so it is meant
}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("absolute", [False, True])
def test_patterns(photos: Path, pattern: str, absolute: bool) -> None:
    start = f"{Path.cwd()}/" if absolute else ""
    data = ImageFolder(f"{start}{pattern}", image_size=16)
    assert not data.has_labels
    images = {s.image.relative_to(f"{start}photos").as_posix() for s in data.samples("test")}
    assert " ".join(sorted(images)) == PATTERNS[pattern]
    assert pattern in data.summary("predict")


def test_what_a_pattern_leaves_out_is_told(photos: Path) -> None:
    remarks = " ".join(ImageFolder("photos/**").remarks)
    for text in (
        "folders of results, such as run",
        "folders that have the name of a mask folder, such as masks",
        "other files that match the pattern, such as notes.txt",
        "folders that match the pattern, such as sub",
    ):
        assert f"not used: {text}" in remarks or text in remarks


def test_lists(photos: Path) -> None:
    data = ImageFolder(["photos/b.jpg", "photos/sub", "photos/a*"], image_size=16)
    assert [s.image.name for s in data.samples("test")] == ["a.png", "b.jpg", "c.png", "d.png"]
    assert data.root == Path("photos")
    assert data.category == "photos"
    assert ImageFolder(["photos"]).selection.is_folder
    mixed = ImageFolder(["photos/a.png", str(Path("photos/sub/c.png").absolute())], image_size=16)
    assert len(mixed.samples("test")) == 2


@pytest.mark.parametrize(("root", "category"), [("photos/sub/c.png", "sub"), ("*/*.png", "photos")])
def test_the_category_is_the_name_of_the_folder(photos: Path, root: str, category: str) -> None:
    expected = {"*/*.png": Path.cwd().name.replace("_", " ")}.get(root, category)
    assert ImageFolder(root).category == expected


def test_a_path_that_exists_is_no_pattern(photos: Path) -> None:
    for name in ("photos [1]/a*b.png", "photos [1]/a?.png", "[x]/1.png"):
        save_picture(Path(name))
    assert len(ImageFolder("photos [1]", image_size=16).samples("test")) == 2
    assert len(ImageFolder("photos [1]/a*b.png", image_size=16).samples("test")) == 1
    assert len(ImageFolder("photos [1]/*.png", image_size=16).samples("test")) == 2
    assert len(ImageFolder(["x"], image_size=16).samples("test")) == 1  # as the parser reads [x]


@pytest.mark.parametrize(
    ("root", "message"),
    [
        ("photos/*.bmp", "matches nothing; photos/ contains a.png, b.jpg, "),
        ("photos/*.txt", "photos/*.txt: matches no image, but notes.txt"),
        ("nowhere/*.png", "nowhere/*.png: there is no such file, and as a pattern"),
        ("photos/notes.txt", "photos/notes.txt: not an image of a known format"),
        ("nowhere", "nowhere: there is no such folder; expected images"),
        ("[photos/a.png, photos/z.png]", "photos/z.png: there is no such file or folder"),
        ("[]", "is empty: name a folder, images or a pattern"),
        ("photos/.c*", "matches nothing"),
    ],
)
def test_mistakes(
    photos: Path, root: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "--data=ImageFolder", f"--data.root={root}"]) == 2
    assert message in capsys.readouterr().err


def test_other_data_sets_need_a_folder(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for data in ("MVTecAD", "BrainMRI", "IndustrialFolders"):
        assert main(["check", f"--data={data}", "--data.root=photos/a.png"]) == 2
        assert "photos/a.png is a file; expected a folder with" in capsys.readouterr().err


def test_check_and_preview_of_a_pattern(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--data=ImageFolder", "--data.root=photos/**/*.png"]
    main(["check", *words])
    out = capsys.readouterr().out
    assert "remark: 3 images without labels: data.root photos/**/*.png" in out
    assert "other images" not in out
    assert main(["preview", *words]) == 0


FIT = ["--model=PaDiM", "--model.backbone.weights=random", "--model.image_size=32"]
FIT += ["--data=ImageFolder", "--data.num_workers=0", "--trainer.accelerator=cpu"]


def test_the_verbs(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = "--data.root=photos/**/*.png"
    assert main(["fit", *FIT, root]) == 2
    assert "photos/**/*.png: nothing tells which images are normal" in capsys.readouterr().err
    assert main(["fit", *FIT, root, "--data.normal=all", "--output.folder=fit"]) == 0
    words = ["--ckpt_path=fit/checkpoints/last.ckpt", "--output.folder=scores"]
    assert main(["test", *words]) == 2
    assert "only a folder tells which images are normal" in capsys.readouterr().err
    assert main(["predict", *words, "--data.root=photos/b.jpg", "--output.page=false"]) == 0
    assert "photos/b.jpg,photos," in Path("scores/scores.csv").read_text()


def test_a_pattern_without_quotes(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--data=ImageFolder", "--data.root", "photos/a.png", "photos/b.jpg"]
    assert main(["check", *words]) == 2
    assert "and a pattern of files needs quotes" in capsys.readouterr().err


def test_links_in_a_pattern_are_followed_once(photos: Path) -> None:
    (photos / "sub" / "loop").symlink_to("..")
    (photos / "extra").symlink_to("sub")
    assert len(PathSelection(["photos/**/*.png"]).find().images) == 3
