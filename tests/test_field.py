"""Input as people have it, one table row per input: command, exit code, text on the screen.

Each row belongs to a kind of input that users of such tools have reported in public; F01 to F28
number the kinds (F05 and F21, metrics and weights, have tests of their own). Every kind has several
rows, because a rule that covers only one input is no rule.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
from field_files import (
    MASK,
    Build,
    all_of,
    alpha,
    blurred,
    brighter_test_image,
    broken_link,
    camera,
    configuration,
    copy_to_test,
    folder_png,
    int32_images,
    inverted,
    inverted_mvtec,
    jpeg,
    kolektor,
    ksdd2_copies,
    labelled,
    line_scan,
    linked,
    linked_image,
    loco,
    loop,
    masks,
    mvtec,
    mvtec_ad_2,
    mvtec_copies,
    mvtec_gt,
    named_masks,
    normal_masks,
    other_content,
    own_normal_masks,
    photos,
    pipe,
    planes,
    rename,
    silhouettes,
    sized_masks,
    spoil_two,
    system,
    truncate,
    two_folders,
    with_exif,
    with_text,
)
from test_interruption import CODES, sent

from anomaly_clip.cli import main

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Row:
    """One input.

    Args:
        kind: Identifier of the kind of input.
        name: The input.
        build: Makes the files, in the working folder.
        words: The command.
        code: Its exit code.
        shown: Texts on the screen, whose white space is ignored.
        before: Commands that must succeed before, such as a fit.
        hidden: Texts that must not be on the screen.
    """

    kind: str
    name: str
    build: Build
    words: Sequence[str]
    code: int
    shown: Sequence[str]
    before: Sequence[Sequence[str]] = ()
    hidden: Sequence[str] = field(default=("Traceback",))


# -- commands --------------------------------------------------------------------------------------

MODEL: tuple[str, ...] = ("--model=PatchCore", "--model.backbone.name=squeezenet1_1")
MODEL += ("--model.backbone.weights=random", "--model.layers=[features.4]", "--model.image_size=32")
RUN = ("--data.num_workers=0", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false")


def fit(*options: str, data: str = "ImageFolder", root: str = "data") -> list[str]:
    chosen = [f"--data={data}", f"--data.root={root}", *RUN, "--output.folder=fit"]
    return ["fit", *MODEL, *chosen, "--trainer.enable_model_summary=false", *options]


def later(verb: str, *options: str) -> list[str]:
    """Return a test or predict with the checkpoint of :func:`fit`."""
    return [verb, "--ckpt_path=fit/checkpoints/last.ckpt", f"--output.folder={verb}", *options]


def check(*options: str, data: str = "ImageFolder", root: str = "data") -> list[str]:
    return ["check", f"--data={data}", f"--data.root={root}", *options]


def each(data: str, root: str = "data") -> list[str]:
    return ["each", *fit("--output.page=false", data=data, root=root)[1:]]


def mvtec_test() -> list[str]:
    return later("test")


def zero_shot(verb: str, *options: str) -> list[str]:
    model = ["--model=SDP", "--model.backbone.pretrained=demo", "--model.backbone.name=demo"]
    chosen = ["--data=ImageFolder", "--data.root=data", "--data.category=plank", *RUN]
    return [verb, *model, *chosen, "--output.folder=run", *options]


FITTED = [fit()]
MVTEC_FIT = [fit(data="MVTecAD")]


Case = tuple[str, Build, Sequence[str], int, Sequence[str]]
"""A row without kind and earlier commands."""
Before = Sequence[Sequence[str]]


def rows(kind: str, before: Before, cases: Sequence[Case]) -> list[Row]:
    return [Row(kind, *case, before) for case in cases]


def rows_at(
    kind: str, code: int, cases: Sequence[tuple[str, Build, Sequence[str], Sequence[str], Before]]
) -> list[Row]:
    return [
        Row(kind, name, build, words, code, shown, before)
        for name, build, words, shown, before in cases
    ]


def rows_after(
    kind: str, cases: Sequence[tuple[str, Build, Sequence[str], int, Sequence[str], Before]]
) -> list[Row]:
    return [Row(kind, *case) for case in cases]


def rows_of(
    cases: Sequence[tuple[str, str, Build, Sequence[str], int, Sequence[str], Before]],
) -> list[Row]:
    return [Row(*case) for case in cases]


# -- the table -------------------------------------------------------------------------------------

ROWS: list[Row] = [
    # F01: normal images and nothing else
    Row("F01", "MVTec layout without masks, fit", mvtec, fit(data="MVTecAD"), 0, ["6 images"]),
    Row(
        "F01",
        "MVTec layout without masks, test",
        mvtec,
        later("test"),
        0,
        ["plate 8 4", "–"],
        [fit(data="MVTecAD")],
    ),
    Row("F01", "good alone", partial(photos, "data/good", 8), fit(), 0, ["good/ (8) is normal"]),
    Row(
        "F01",
        "flat folder of good photographs",
        partial(photos, "data"),
        fit("--data.normal=all"),
        0,
        ["all are normal (data.normal all)"],
    ),
    Row("F01", "flat folder, no option", partial(photos, "data"), fit(), 2, ["--data.normal all"]),
    Row(
        "F01",
        "one mask missing among others",
        all_of(partial(mvtec, with_masks=True), partial(os.remove, MASK)),
        later("test"),
        2,
        ["3.png: its mask is missing"],
        [fit(data="MVTecAD")],
    ),
    Row("F01", "each without masks", mvtec, each("MVTecAD"), 0, ["plate"]),
    # F02: cameras with fewer than 16 bits
    *(
        Row(
            "F02",
            f"{bits} bits in 16, {suffix}{', colour' if colour else ''}",
            partial(camera, "data/good", bits, suffix, colour),
            fit(),
            0,
            [f"6 images with 16 bits per channel: {bits} are used (chosen by the highest value"],
        )
        for bits, suffix, colour in [
            (10, "png", False),
            (12, "tiff", False),
            (12, "png", True),
            (14, "pgm", False),
            (12, "ppm", True),
        ]
    ),
    Row(
        "F02",
        "more bits than at fit",
        all_of(partial(camera, "data/good", 10), partial(camera, "new/good", 12)),
        later("test", "--data.root=new", "--data.bit_depth=12"),
        2,
        ["data.bit_depth 12 differs from that of the fit (10)"],
        [fit()],
    ),
    *rows(
        "F02",
        (),
        [
            ("32 bits", int32_images, fit(), 2, ["have no defined range"]),
            ("32 bits, check", int32_images, check(), 1, ["have no defined range"]),
            (
                "a brighter test image, check",
                brighter_test_image,
                check(data="MVTecAD"),
                1,
                ["12 are used", "bright.png", "12 bits end at 4095"],
            ),
        ],
    ),
    Row("F02", "check", partial(camera, "data/good", 12), check(), 0, ["12 are used"]),
    # F10: formats by content
    Row(
        "F10",
        "jfif next to png",
        all_of(
            partial(photos, "data/good", 6),
            partial(photos, "jpeg", 2, 5, "jpg"),
            partial(shutil.move, "jpeg/0.jpg", "data/good/b.jfif"),
            partial(shutil.move, "jpeg/1.jpg", "data/good/noextension"),
        ),
        fit(),
        0,
        ["good/ (8) is normal"],
    ),
    *(
        Row(
            "F10",
            f"a folder of {suffix}",
            partial(photos, "data/good", 6, 0, suffix),
            fit(),
            0,
            ["6 images"],
        )
        for suffix in ("gif", "webp", "jp2", "tga", "dib")
    ),
    *(
        Row(
            "F10",
            f"{name} with the extension of an image",
            all_of(
                partial(photos, "data/good", 6),
                partial(Path("data/good/x.png").write_bytes, content),
            ),
            fit(),
            2,
            ["x.png: not an image but", shown],
        )
        for name, content, shown in [
            ("EPS", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript"),
            ("PDF", b"%PDF-1.4\n", "PDF"),
            ("LFS pointer", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
            ("web page", b"<!DOCTYPE html><html></html>", "web page"),
        ]
    ),
    Row(
        "F10",
        "other files are counted",
        all_of(
            partial(photos, "data/good", 6), partial(Path("data/good/notes.txt").write_text, "x")
        ),
        fit(),
        0,
        ["not used: files that are not images, such as good/notes.txt (1)"],
    ),
    # F19: large images
    Row(
        "F19",
        "above the limit",
        partial(photos, "data/good"),
        fit("--data.max_pixels=1000"),
        2,
        ["data.max_pixels 1000: raise it", "0.png"],
    ),
    Row(
        "F19",
        "a line scan",
        all_of(partial(photos, "data/good"), partial(line_scan, "data/good/scan.png")),
        fit(),
        0,
        ["aspect ratio by up to 400.00 (40 x 16000 pixels)"],
    ),
    Row(
        "F19",
        "a line scan in TIFF, above PIL's limit",
        all_of(
            partial(photos, "data/good"), partial(line_scan, "data/good/scan.tif", 4096, 45_000)
        ),
        fit(),
        0,
        ["7 images"],
    ),
    Row(
        "F19", "check", partial(photos, "data/good"), check("--data.max_pixels=9"), 1, ["raise it"]
    ),
    # F26: texts in images
    *(
        Row(
            "F26",
            name,
            partial(
                make,
            ),
            fit(),
            0,
            ["6 images"],
        )
        for name, make in [
            ("a long text in a PNG", partial(with_text, "x" * 3_000_000, True)),
            ("a long text, not compressed", partial(with_text, "x" * 3_000_000, False)),
            ("many texts", partial(with_text, "x" * 900_000, True, 90)),
            ("a large EXIF block", partial(with_exif, 60_000)),
        ]
    ),
    # F03: masks next to their images
    *(
        Row("F03", name, build, [*fit(), "--data.test_share=0.25"], 0, ["(8) is normal", shown])
        for name, build, shown in [
            (
                "mask next to good and cut",
                all_of(labelled, partial(masks, "data/mask")),
                "masks are in mask/",
            ),
            (
                "labels in upper case",
                all_of(labelled, partial(masks, "data/Labels", ending="_label")),
                "masks are in Labels/",
            ),
            (
                "black and white images of another name",
                all_of(labelled, partial(masks, "data/marks")),
                "marks/ contains black-and-white images: masks",
            ),
            (
                "silhouettes are photographs",
                all_of(labelled, partial(silhouettes, "data/hole")),
                "cut/ (4) and hole/ (4) defective",
            ),
        ]
    ),
    Row(
        "F03",
        "photographs in mask",
        all_of(labelled, partial(photos, "data/mask", 3, 9)),
        fit(),
        2,
        ["data/mask: a folder of this name should contain masks"],
    ),
    # F04: own results
    *rows_at(
        "F04",
        0,
        [
            (
                "predict on the working folder, twice",
                partial(photos, "good", 6),
                later("predict", "--data.root=.", "--output.folder=second"),
                ["6 images", "folders of results"],
                [fit(root="."), later("predict", "--data.root=.")],
            ),
            (
                "results with raw maps",
                partial(photos, "good", 6),
                later("predict", "--data.root=.", "--output.folder=second"),
                ["6 images"],
                [fit(root="."), later("predict", "--data.root=.", "--output.raw_maps=true")],
            ),
            (
                "a folder of runs",
                partial(photos, "good", 6),
                later("predict", "--data.root=.", "--output.folder=runs/b/1"),
                ["6 images"],
                [fit(root="."), later("predict", "--data.root=.", "--output.folder=runs/a/1")],
            ),
            (
                "results in the folder of the photographs",
                partial(photos, "good", 6),
                later("predict", "--data.root=.", "--output.folder=."),
                ["6 images"],
                [fit(root="."), later("predict", "--data.root=.", "--output.folder=.")],
            ),
            (
                "a contact sheet and a copied drawing",
                partial(photos, "good", 6),
                later("predict", "--data.root=.", "--output.folder=second"),
                ["6 images", "drawings of this program"],
                [fit(root="."), ["preview", "--data=ImageFolder", "--data.root=."]],
            ),
            (
                "check after predict",
                partial(photos, "good", 6),
                check(root="."),
                ["6 images in"],
                [fit(root="."), later("predict", "--data.root=.")],
            ),
        ],
    ),
    # F06: inverted masks; F07: grey values in masks
    *rows_of(
        [
            (
                "F06",
                "test",
                inverted,
                later("test"),
                0,
                ["4 of 4 masks cover", "inverted?"],
                FITTED,
            ),
            ("F06", "check", inverted, check(), 1, ["inverted?"], ()),
            ("F06", "MVTec layout", inverted_mvtec, mvtec_test(), 0, ["inverted?"], MVTEC_FIT),
            ("F06", "a mask in the alpha channel", alpha, check(), 0, [], ()),
            ("F07", "JPEG", jpeg, later("test"), 0, ["grey values", "data.mask_level"], FITTED),
            ("F07", "JPEG, check", jpeg, check(), 1, ["data.mask_level"], ()),
            ("F07", "level", jpeg, later("test", "--data.mask_level=127"), 0, [], FITTED),
            ("F07", "blurred PNG", blurred, check(), 1, ["grey values"], ()),
        ]
    ),
    # F09: damaged photographs
    *rows(
        "F09",
        FITTED,
        [
            (
                "one of six is cut in half",
                all_of(labelled, partial(photos, "new"), partial(truncate, "new/5.png")),
                later("predict", "--data.root=new"),
                1,
                ["5 of 6 images scored; 1 could not be read", "new/5.png"],
            ),
            (
                "an empty file and a text",
                all_of(labelled, partial(photos, "new"), spoil_two),
                later("predict", "--data.root=new", "--data.batch_size=1"),
                1,
                ["4 of 6 images scored; 2 could not be read"],
            ),
            (
                "none can be read",
                all_of(labelled, partial(photos, "new", 1), partial(truncate, "new/0.png")),
                later("predict", "--data.root=new"),
                2,
                ["new/0.png"],
            ),
            (
                "test",
                all_of(labelled, partial(copy_to_test, True)),
                later("test", "--data.root=other"),
                2,
                ["0.png", "data.unreadable skip"],
            ),
            (
                "test, skip",
                all_of(labelled, partial(copy_to_test, True)),
                later("test", "--data.root=other", "--data.unreadable=skip"),
                1,
                ["without 1 unreadable image"],
            ),
        ],
    ),
    Row(
        "F09",
        "fit, skip",
        all_of(labelled, partial(truncate, "data/good/0.png")),
        fit("--data.unreadable=skip"),
        1,
        ["without 1 unreadable image"],
    ),
    # F11: separate planes
    *rows(
        "F11",
        (),
        [
            ("fit", planes, fit(), 2, ["planes.tif: a TIFF with separate planes of 16 bits"]),
            ("check", planes, check(), 1, ["planes.tif", "separate planes of 16 bits"]),
            ("skip", planes, fit("--data.unreadable=skip"), 1, ["1 unreadable image"]),
            ("interleaved", partial(camera, "data/good", 16, "tiff", True), fit(), 0, ["6 images"]),
        ],
    ),
    # F25: names and sizes of masks
    *rows_after(
        "F25",
        [
            ("NAME_gt", partial(named_masks, "_gt"), later("test"), 0, ["masks are in"], FITTED),
            ("MVTec layout, NAME_gt", mvtec_gt, mvtec_test(), 0, [], MVTEC_FIT),
            (
                "another ending",
                partial(named_masks, "-seg"),
                later("test", "--data.mask_ending=-seg"),
                0,
                ["masks are in"],
                [fit("--data.mask_ending=-seg")],
            ),
            (
                "two pixels off",
                partial(sized_masks, 122),
                later("test"),
                0,
                ["differ in size"],
                FITTED,
            ),
            ("half the size", partial(sized_masks, 60), later("test"), 2, ["2 times as"], FITTED),
        ],
    ),
    # F08: copies of a file
    *rows(
        "F08",
        (),
        [
            ("KSDD2, fit", ksdd2_copies, fit(data="KSDD2"), 0, ["6 images", "cop"]),
            ("KSDD2, check", ksdd2_copies, check(data="KSDD2"), 1, ["(copy)"]),
            ("MVTec layout", mvtec_copies, fit(data="MVTecAD"), 0, ["6 images"]),
            ("other content is no copy", other_content, fit(data="MVTecAD"), 0, ["7 images"]),
        ],
    ),
    # F12: signals
    *(
        Row("F12", f"{name}, {verb}", partial(mvtec), words, CODES[name], [shown], before)
        for name, verb, words, shown, before in [
            ("SIGTERM", "fit", fit(*sent("SIGTERM", "train"), data="MVTecAD"), "by SIGTERM", ()),
            ("SIGHUP", "fit", fit(*sent("SIGHUP", "train"), data="MVTecAD"), "by SIGHUP", ()),
            ("SIGINT", "fit", fit(*sent("SIGINT", "train"), data="MVTecAD"), "interrupted", ()),
            (
                "SIGTERM",
                "test",
                later("test", *sent("SIGTERM", "test")),
                "by SIGTERM",
                MVTEC_FIT,
            ),
            (
                "SIGTERM",
                "predict",
                later("predict", *sent("SIGTERM", "predict")),
                "by",
                MVTEC_FIT,
            ),
        ]
    ),
    # F13: null on the command line
    *(
        Row("F13", name, partial(photos, "data/good"), fit(option), 0, ["6 images"])
        for name, option in [
            ("pro_steps", "--model.evaluator.pro_steps=null"),
            ("resize.size", "--data.resize.size=null"),
            ("shots", "--data.shots=null"),
            ("mask_level", "--data.mask_level=null"),
            ("synthesis", "--data.synthesis=null"),
        ]
    ),
    # F14: layouts that are named
    *(
        Row("F14", f"{name}, {words[0]} {words[-1]}", build, words, 2, [name])
        for name, build in [("MVTec LOCO", loco), ("KolektorSDD", kolektor)]
        for words in [
            check(data="MVTecAD"),
            check(data="ImageFolder"),
            check(data="KSDD2"),
            fit(data="MVTecAD"),
        ]
    ),
    Row("F14", "MVTec AD 2", mvtec_ad_2, fit(data="MVTecAD2"), 0, ["6 images"]),
    # F15: masks of normal images
    *rows_after(
        "F15",
        [
            ("empty", partial(normal_masks, 0), mvtec_test(), 0, [], MVTEC_FIT),
            (
                "not empty",
                partial(normal_masks, 255),
                mvtec_test(),
                2,
                ["the mask of a normal image is not empty"],
                MVTEC_FIT,
            ),
            ("check", partial(normal_masks, 255), check(data="MVTecAD"), 1, ["not empty"], ()),
            ("own folder", own_normal_masks, later("test"), 2, ["is not empty"], FITTED),
        ],
    ),
    # F16: names
    *(
        Row(
            "F16",
            name,
            all_of(partial(photos, "data/good"), partial(photos, "new", 1), partial(rename, stem)),
            later("predict", "--data.root=new"),
            0,
            ["1 image"],
            FITTED,
        )
        for name, stem in [
            ("latin-1", b"plan\xe8te"),
            ("255 bytes", b"x" * 251),
            ("long and not ASCII", "ä".encode() * 125),
            ("line break", b"two\nlines"),
            ("dash and quotes", b"-'\""),
        ]
    ),
    # F17: links; F18: files of systems
    *rows_of(
        [
            ("F17", "linked folder", linked, fit(), 0, ["good/ (12 in 2 folders) is normal"], ()),
            ("F17", "loop", loop, fit(), 0, ["6 images"], ()),
            ("F17", "link to an image", linked_image, fit(), 0, ["7 images"], ()),
            ("F17", "broken link", broken_link, fit(), 2, ["lost.png"], ()),
            ("F18", "@eaDir", partial(system, "data/good/@eaDir"), fit(), 0, ["6 images"], ()),
            ("F18", "__MACOSX", partial(system, "data/__MACOSX"), fit(), 0, ["6 images"], ()),
            ("F18", "$RECYCLE.BIN", partial(system, "data/$RECYCLE.BIN"), fit(), 0, ["6 im"], ()),
            ("F18", "folder called 0.png", folder_png, fit(), 0, ["6 images"], ()),
            ("F18", "named pipe", pipe, fit(), 0, ["6 images"], ()),
            ("F18", "check of a pipe", pipe, check(), 0, ["6 images in"], ()),
        ]
    ),
    # F20: one image, a pattern
    *(
        Row("F20", root, two_folders, later("predict", f"--data.root={root}"), code, shown, FITTED)
        for root, code, shown in [
            ("new/0.png", 0, ["1 image "]),
            ("new/*.png", 0, ["6 images"]),
            ("**/1.png", 0, ["images"]),
            ("new/*.tif", 2, ["new/*.tif"]),
            ("nowhere", 2, ["there is no such"]),
        ]
    ),
    # F22: prompts longer than CLIP's context; F23 and F24: words that look like numbers
    *(
        Row("F22", name, partial(photos, "data"), zero_shot("predict", *options), code, shown)
        for name, options, code, shown in [
            ("80 letters", ["--data.category=" + "laser cut plank " * 30], 2, ["data.category"]),
            ("one letter repeated", ["--data.category=" + "q" * 400], 2, ["tokens"]),
            ("a sentence", ["--data.category=a plank of wood"], 0, ["6 images"]),
            ("prompts", [], 0, ["6 images"]),
        ]
    ),
    *(
        Row(
            "F23",
            category,
            partial(photos, "data/good"),
            later("predict", "--data.root=data"),
            0,
            ["6 images"],
            [fit(f"--data.category={category}")],
        )
        for category in ["6E2", "012", "0x1F", "yes", "1_000", "2024-01-01"]
    ),
    *(
        Row("F24", option, partial(mvtec, category=category), fit(option, data="MVTecAD"), *seen)
        for category, option, seen in [
            ("01", "--data.categories=[01]", (0, ["6 images"])),
            ("01", '--data.categories=["01"]', (0, ["6 images"])),
            ("1e3", "--data.categories=[1e3]", (0, ["6 images"])),
            ("yes", "--data.categories=[yes]", (0, ["6 images"])),
            ("01", "--data.categories=[02]", (2, ["'02' is not in data"])),
            ("01", "--data.categories=01", (2, ["such as '[01, 02]'"])),
            ("01", "--data.categories=part: left", (2, ["""such as '["part: left"]'"""])),
        ]
    ),
    # F27: configurations and roots
    *(
        Row("F27", name, partial(configuration, encoding), ["fit", "--config=c.yaml"], code, shown)
        for name, encoding, code, shown in [
            ("UTF-16", "utf-16", 2, ["c.yaml", "UTF-8"]),
            ("latin-1", "latin-1", 2, ["c.yaml", "UTF-8"]),
            ("UTF-8 with a byte order mark", "utf-8-sig", 0, ["6 images"]),
        ]
    ),
    *(
        Row("F27", f"no such root, {words[0]}", str, words, 2, ["nowhere: there is no such folder"])
        for words in [
            fit(root="nowhere"),
            check(root="nowhere"),
            check(data="VisA", root="nowhere"),
        ]
    ),
    # F28: a complete fit on other images
    *(
        Row(
            "F28",
            name,
            all_of(partial(photos, "data/good", 8), partial(photos, "other/good", 8, 5)),
            [*fit(*options), "--ckpt_path=fit/checkpoints/last.ckpt"],
            2,
            ["fit"],
            FITTED,
        )
        for name, options in [
            ("other images", ["--data.root=other"]),
            ("the same images", []),
            ("other images, other folder", ["--data.root=other", "--output.folder=second"]),
            ("more epochs", ["--trainer.max_epochs=2"]),
        ]
    ),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.kind}-{row.name}".replace(" ", "-"))
def test_input_as_people_have_it(
    row: Row,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    row.build()
    for words in row.before:
        assert main(list(words)) == 0, words
    capsys.readouterr()
    code = main(list(row.words))
    screen = " ".join("".join(capsys.readouterr()).split())
    assert code == row.code, screen
    for text in row.shown:
        assert text in screen, screen
    for text in row.hidden:
        assert text not in screen, screen


def test_every_kind_has_several_rows() -> None:
    kinds = [row.kind for row in ROWS]
    assert {kind: kinds.count(kind) for kind in set(kinds) if kinds.count(kind) < 4} == {}
