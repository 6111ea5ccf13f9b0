"""Doubtful masks: what is read right, and what is said before a test starts and by ``check``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import save_picture
from PIL import Image

from anomaly_clip.cli import main
from anomaly_clip.data import Demo, ImageFolder, MVTecAD, Sample
from anomaly_clip.data.info import MaskRule
from anomaly_clip.data.mask_checks import InspectedMask, inspect_mask, mask_findings

SIDE = 64


def discs(count: int) -> list[np.ndarray]:
    """Return masks with one disc each."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    centres = [(20 + 3 * number, 40 - 2 * number) for number in range(count)]
    return [
        (((rows - y) ** 2 + (columns - x) ** 2) < 90).astype(np.uint8) * np.uint8(255)
        for y, x in centres
    ]


def inspected(folder: Path, *masks: np.ndarray, category: str = "plank") -> list[InspectedMask]:
    samples = [
        Sample(folder / f"{n}.png", category, True, save_picture(folder / category / f"{n}.png", m))
        for n, m in enumerate(masks)
    ]
    return [inspect_mask(sample, MaskRule()) for sample in samples]


def texts(masks: list[InspectedMask], **options: Any) -> dict[str, str]:
    return {f.kind: f.text for f in mask_findings(masks, MaskRule(), **options)}


def test_clean_masks_are_no_remark(tmp_path: Path) -> None:
    ones = [mask // 255 for mask in discs(2)]
    bits = [mask > 0 for mask in discs(2)]
    whole = np.full((SIDE, SIDE), 255, np.uint8)  # a whole defective surface, among others
    assert texts(inspected(tmp_path, *discs(3), *ones, *bits, whole)) == {}


def test_properties_of_a_mask_by_hand(tmp_path: Path) -> None:
    mask = np.zeros((4, 10), np.uint8)
    mask[1:3, 2:5] = 255
    mask[0, 0] = 9
    (properties,) = inspected(tmp_path, mask)
    assert properties[1:7] == ((10, 4), (0, 9, 255), 7, 1, 127, 6 / 40)
    assert properties.border == 0
    assert not properties.has_classes
    assert properties.is_grey
    assert properties.name == "plank/0.png"


def test_inverted_masks(tmp_path: Path) -> None:
    remarks = texts(inspected(tmp_path, *[255 - mask for mask in discs(3)]))
    assert list(remarks) == ["mask inverted"]
    assert remarks["mask inverted"].startswith(
        "3 of 3 masks cover more than 90 % of their image, such as plank/0.png (93 %), "
    )
    assert "inverted?" in remarks["mask inverted"]


def test_one_inverted_mask_among_others(tmp_path: Path) -> None:
    first, *others = discs(5)
    (text,) = texts(inspected(tmp_path, 255 - first, *others)).values()
    assert text.startswith("1 of 5 masks cover more than 90 % of their image, such as plank/0.png")


def test_one_category_of_inverted_masks(tmp_path: Path) -> None:
    clean = inspected(tmp_path, *discs(6))
    inverted = inspected(tmp_path, *[255 - mask for mask in discs(2)], category="tile")
    (text,) = texts([*clean, *inverted]).values()
    assert "tile/0.png (93 %) and tile/1.png" in text


def test_large_defects_are_not_inverted(tmp_path: Path) -> None:
    """Such as a lesion that fills the photograph, and a disc that touches the border."""
    lesion = np.full((SIDE, SIDE), 255, np.uint8)
    for corner in (np.s_[:12, :12], np.s_[:12, -12:], np.s_[-12:, :12], np.s_[-12:, -12:]):
        lesion[corner] = 0
    half = np.zeros((SIDE, SIDE), np.uint8)
    half[:40] = 255
    assert texts(inspected(tmp_path, lesion, half, lesion.copy())) == {}


@pytest.mark.parametrize("quality", [50, 75, 95])
def test_noise_of_jpeg(tmp_path: Path, quality: int) -> None:
    masks = discs(4)
    samples = []
    for number, mask in enumerate(masks):
        file = tmp_path / f"{number}.jpg"
        Image.fromarray(mask).save(file, quality=quality)
        samples.append(Sample(file, "plank", True, file))
    remarks = texts([inspect_mask(sample, MaskRule()) for sample in samples])
    assert list(remarks) == ["mask grey"]
    assert "4 of 4 masks have grey values" in remarks["mask grey"]
    assert remarks["mask grey"].endswith("set data.mask_level 127")
    # With that level, the masks are those that were saved, and there is nothing to remark.
    rule = MaskRule(level=127)
    again = [inspect_mask(sample, rule) for sample in samples]
    assert mask_findings(again, rule, level_is_set=True) == []
    assert [mask.marked for mask in again] == [int((mask > 0).sum()) for mask in masks]


def test_soft_edges_and_a_grey_background(tmp_path: Path) -> None:
    soft = [np.asarray(Image.fromarray(m).resize((50, 50), 2)) for m in discs(2)]
    assert list(texts(inspected(tmp_path, *soft))) == ["mask grey"]
    raised = [np.where(mask > 0, 255, 1).astype(np.uint8) for mask in discs(2)]
    (text,) = texts(inspected(tmp_path, *raised)).values()
    assert "values 1 to 1 count as defect" in text
    assert "set data.mask_level 127" in text
    dim = [np.where(mask > 0, 90, 30).astype(np.uint8) for mask in discs(2)]
    (text,) = texts(inspected(tmp_path, *dim)).values()
    assert text.endswith("set data.mask_level 60")


def test_numbers_of_classes_are_said_of_own_masks_only(tmp_path: Path) -> None:
    classes = np.zeros((SIDE, SIDE), np.uint8)
    classes[5:20, 5:20], classes[30:33, 5:60], classes[50, 50] = 1, 2, 3
    bright = (classes * 80).astype(np.uint8)
    masks = inspected(tmp_path, classes, bright, discs(1)[0])
    assert texts(masks, is_own=False) == {}
    (finding,) = mask_findings(masks, MaskRule())
    assert not finding.is_problem
    assert finding.text == (
        "2 of 3 masks have several values (1, 2, 3, 80, 160, 240), such as plank/0.png and "
        "plank/1.png: all of them count as defect"
    )


def test_empty_masks(tmp_path: Path) -> None:
    empty = np.zeros((SIDE, SIDE), np.uint8)
    masks = inspected(tmp_path, empty, discs(1)[0])
    assert texts(masks, sampled=True)["mask empty"] == (
        "1 of 2 inspected masks of anomalous images are empty, such as plank/0.png: nothing is "
        "marked as defect"
    )
    ones = inspected(tmp_path, discs(1)[0] // 255)
    rule = MaskRule(level=127)
    again = [inspect_mask(mask.sample, rule) for mask in ones]
    (finding,) = mask_findings(again, rule, level_is_set=True)
    assert "plank/0.png (largest value 1): nothing is marked" in finding.text
    assert finding.text.endswith("at data.mask_level 127")


def test_grey_masks_of_a_published_set_are_no_remark(tmp_path: Path) -> None:
    soft = np.asarray(Image.fromarray(discs(1)[0]).resize((50, 50), 2))
    file = save_picture(tmp_path / "m.png", soft)
    rule = MaskRule(grey=True)
    mask = inspect_mask(Sample(file, "colon", True, file), rule)
    assert mask_findings([mask], rule) == []
    assert mask.marked == int((soft > 127).sum())


# -- the commands ------------------------------------------------------------------------------


@pytest.fixture
def product(tmp_path: Path) -> Path:
    """Write a user's folder: 3 normal and 3 defective photographs, with clean masks."""
    rng = np.random.default_rng(0)
    root = tmp_path / "product"
    for name in ("good", "bad"):
        for number in range(3):
            noise = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
            save_picture(root / name / f"{name}{number}.png", noise)
    for number, mask in enumerate(discs(3)):
        save_picture(root / "masks" / f"bad{number}.png", mask)
    return root


Command = Callable[..., int]


@pytest.fixture
def command(tiny_clip_config: str, tmp_path: Path, product: Path) -> Command:
    """Return a function that runs a verb of SDP, or ``check``, on the folder."""

    def run(verb: str, *more: str) -> int:
        words = ["--data=ImageFolder", f"--data.root={product}", "--data.category=plank"]
        if verb != "check":
            words += ["--model=SDP", f"--model.backbone.name={tiny_clip_config}"]
            words += ["--model.backbone.pretrained=random", "--model.rvs.method=mean"]
            words += ["--data.num_workers=0", "--trainer.accelerator=cpu"]
            words += [f"--output.root={tmp_path / 'runs'}"]
        return main([verb, *words, *more])

    return run


def invert(masks: Path) -> None:
    for file in masks.iterdir():
        save_picture(file, 255 - np.asarray(Image.open(file)))


def as_jpeg(masks: Path) -> None:
    for file in masks.iterdir():
        Image.open(file).save(file.with_suffix(".jpg"), quality=75)
        file.unlink()


def shrink(masks: Path) -> None:
    """Save masks that are one pixel too small; the image's side is 64, and 2 % are 1.28."""
    for file in masks.iterdir():
        Image.open(file).crop((0, 0, SIDE - 1, SIDE)).save(file)


def two_classes(masks: Path) -> None:
    for file in masks.iterdir():
        mask = np.asarray(Image.open(file)) // 255
        mask[:5, :5] = 2
        save_picture(file, mask)


@pytest.mark.parametrize(
    ("change", "message", "code"),
    [
        (invert, "3 of 3 masks cover more than 90 % of their image", 1),
        (as_jpeg, "3 of 3 masks have grey values", 1),
        (two_classes, "3 of 3 masks have several values (1, 2)", 0),
        (shrink, "masks differ in size from their image by up to 1 pixels", 0),
    ],
)
def test_the_same_remark_by_test_and_check(
    product: Path,
    command: Command,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Path], None],
    message: str,
    code: int,
) -> None:
    assert command("check") == 0
    assert command("test", "--output.page=false") == 0
    before = capsys.readouterr()
    change(product / "masks")
    assert command("check") == code
    out = capsys.readouterr().out
    assert message in out
    assert command("test", "--output.page=false") == 0
    err = capsys.readouterr().err
    assert message in err
    assert message not in before.out + before.err
    assert err.index(message) < err.index("test SDP")  # before the test starts


def test_jpeg_masks_at_their_level_give_the_metrics_of_clean_masks(
    product: Path, command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clean, noisy, level = (tmp_path / name for name in ("clean", "noisy", "level"))
    quiet = ["--output.page=false"]
    assert command("test", f"--output.folder={clean}", *quiet) == 0
    as_jpeg(product / "masks")
    assert command("test", f"--output.folder={noisy}", *quiet) == 0
    capsys.readouterr()
    assert command("test", f"--output.folder={level}", "--data.mask_level=127", *quiet) == 0
    assert "grey values" not in capsys.readouterr().err
    contents = [(folder / "metrics.csv").read_text() for folder in (clean, noisy, level)]
    assert contents[0] == contents[2] != contents[1]
    assert '"mask_level": 127' in (level / "metrics.json").read_text()
    assert "mask_level" not in (clean / "metrics.json").read_text()


def test_sizes_that_do_not_fit_are_refused_before_the_test(
    product: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    mask = product / "masks" / "bad1.png"
    for size, text in (
        ((32, 32), "exactly 2 times as large: enlarge the mask by the nearest pixel"),
        ((192, 192), "so the mask is exactly 3 times as large: reduce it by the nearest pixel"),
        ((60, 64), "the mask is 60 x 64 pixels, but its image bad1.png is 64 x 64: make the sizes"),
    ):
        Image.open(mask).resize(size, 0).save(mask)
        assert command("test", "--output.page=false") == 2
        err = capsys.readouterr().err
        assert text in " ".join(err.split())
        assert "test SDP" not in err
        assert command("check") == 1
        assert text in " ".join(capsys.readouterr().out.split())


def test_a_mask_on_its_side(
    product: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (SIDE, 48, 3), dtype=np.uint8)
    save_picture(product / "bad" / "bad1.png", pixels)
    mask = discs(2)[1][:48]
    save_picture(product / "masks" / "bad1.png", mask)
    assert command("test") == 2
    assert "so the mask lies on its side: turn it by 90 degrees" in capsys.readouterr().err
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels.transpose(1, 0, 2)).save(product / "bad" / "bad1.png", exif=exif)
    assert command("test") == 2
    assert "turned by its EXIF orientation: turn the mask in the same way" in (
        capsys.readouterr().err
    )


def test_predict_uses_no_masks(
    product: Path, command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    masks = product / "masks"
    (masks / "bad0.png").unlink()
    save_picture(masks / "nobody.png", discs(1)[0])
    save_picture(masks / "bad1.png", discs(1)[0][:9])
    assert command("test") == 2
    assert "its mask is missing" in capsys.readouterr().err
    assert command("predict", f"--output.folder={tmp_path / 'scores'}") == 0
    assert "masks of" not in capsys.readouterr().err
    assert len((tmp_path / "scores" / "scores.csv").read_text().splitlines()) == 7
    assert len(list((tmp_path / "scores" / "maps").rglob("*.png"))) == 6


def test_a_missing_mask_is_described_with_what_is_there(
    product: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    masks = product / "masks"
    (masks / "bad0.png").rename(masks / "bad0-seg.png")
    assert command("test") == 2
    err = " ".join(capsys.readouterr().err.split())
    expected = "expected bad0_mask.png (or bad0.png, bad0_gt.png, bad0_label.png) in "
    assert f"bad/bad0.png: its mask is missing, {expected}" in err
    assert "there are bad0-seg.png, bad1.png, bad2.png: add the mask, or set data.mask_end" in err


def test_a_shared_mask_is_described_with_both_paths(
    product: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    (product / "bad" / "bad0.png").rename(product / "bad" / "same.png")
    (product / "bent").mkdir()
    (product / "bad" / "bad1.png").rename(product / "bent" / "same.png")
    (product / "masks" / "bad0.png").rename(product / "masks" / "same.png")
    (product / "masks" / "bad1.png").unlink()
    assert command("test") == 2
    message = "the mask of two images, bad/same.png and bent/same.png"
    assert message in " ".join(capsys.readouterr().err.split())


def fit_words(root: Path, folder: Path) -> list[str]:
    words = ["--model=PaDiM", "--model.backbone.weights=random", "--model.image_size=32"]
    words += ["--data=MVTecAD", f"--data.root={root}", "--data.categories=[bottle]"]
    words += ["--data.num_workers=0"]
    return [*words, "--trainer.accelerator=cpu", f"--output.folder={folder}"]


@pytest.mark.slow
def test_a_fit_without_validation_uses_no_masks(
    mvtec_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    masks = mvtec_root / "bottle" / "ground_truth" / "scratch"
    (masks / "000_mask.png").unlink()
    save_picture(mvtec_root / "bottle" / "ground_truth" / "good" / "000_mask.png", discs(1)[0])
    assert main(["fit", *fit_words(mvtec_root, tmp_path / "fit")]) == 0
    words = [f"--ckpt_path={tmp_path / 'fit' / 'checkpoints' / 'last.ckpt'}"]
    assert main(["predict", *words, f"--output.folder={tmp_path / 'scores'}"]) == 0
    capsys.readouterr()
    assert main(["test", *words, f"--output.folder={tmp_path / 'test'}"]) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert "its mask is missing, expected 000_mask.png (or 000.png, 000_gt.png, " in err


def test_masks_of_an_auxiliary_set_are_inspected_before_the_fit(
    mvtec_root: Path, product: Path
) -> None:
    invert(product / "masks")
    auxiliary = ImageFolder(str(product), "plank")
    data = MVTecAD(str(mvtec_root), auxiliary=auxiliary, image_size=16)
    data.setup("fit")
    assert "product: 3 of 3 masks cover more than 90 %" in data.masks.remarks[0]
    data.setup("test")
    assert data.masks.remarks == []


def test_at_most_200_masks_are_inspected(
    product: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    invert(product / "masks")
    monkeypatch.setattr("anomaly_clip.data.mask_checks.INSPECTED", 2)
    ImageFolder(str(product), "plank", image_size=16).setup("test")
    err = capsys.readouterr().err
    assert "2 of 2 inspected masks cover more than 90 % of their image, such as masks/bad0" in err


def test_a_level_without_effect_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    Demo(categories=["oak wood board"], mask_level=9, image_size=16).setup("test")
    assert "data.mask_level 9 has no effect" in capsys.readouterr().err
