"""``anomaly_clip benchmark``: time, memory and differences of the runtimes of a detector."""

from __future__ import annotations

import argparse
import contextlib
import platform
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from anomaly_clip import __version__
from anomaly_clip.commands.detector_options import (
    DetectorSource,
    add_detector_options,
    detector_source,
    split_words,
)
from anomaly_clip.commands.library_messages import quieten
from anomaly_clip.errors import UserError, check_above, check_at_least, suggest, user_errors
from anomaly_clip.exporting.folder import RECORD
from anomaly_clip.exporting.measurement import (
    RUNTIMES,
    Subject,
    subject_of_detector,
    subject_of_folder,
)
from anomaly_clip.exporting.parity import Difference
from anomaly_clip.exporting.timing import Choice, Timing, available_cores, choose, measure
from anomaly_clip.files import json_text, printable, write_json
from anomaly_clip.methods.base import AnomalyMethod
from anomaly_clip.progress import number_of, say, show_table

__all__ = ["load_for_timing", "run_benchmark"]

PACKAGES = ("torch", "onnxruntime", "openvino", "numpy")
NOTHING_MEASURED = 1
MEGABYTE = 1e6
LOADER = f"{__name__}:load_for_timing"


class _Parser(argparse.ArgumentParser):
    """Parser whose mistakes are one sentence."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self.prog} --help lists the options")


def run_benchmark(words: Sequence[str]) -> int:
    """Measure the runtimes of a detector.

    Returns:
        0, or 1 if no row could be measured.

    Raises:
        UserError: If the command line is invalid, or no detector can be loaded.
    """
    verb_words, settings = split_words(words[1:])
    options = _parser().parse_args(verb_words)
    quieten()
    with user_errors(), tempfile.TemporaryDirectory() as scratch:
        _check(options)
        subject = _subject(options, settings, Path(scratch))
        rows = measure(
            subject.programs,
            options.batch_sizes,
            subject.images,
            threads=options.threads,
            seconds=options.seconds,
            watch=_watched,
        )
        differences = [subject.differences(row) for row in rows]
        choice = choose(rows, differences, subject.reference)
        content = _content(subject, rows, differences, choice, options)
        if options.json not in (None, "-"):
            write_json(Path(options.json), content)
    if options.json == "-":
        print(json_text(content))
    else:
        _show(subject, rows, differences, choice, options)
    return NOTHING_MEASURED if all(row.error is not None for row in rows) else 0


def load_for_timing(source: Mapping[str, Any]) -> AnomalyMethod:
    """Load the detector that is timed in another process; return its method.

    Args:
        source: Fields of a ``DetectorSource``.
    """
    return DetectorSource(**source).load().detector.method


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="anomaly_clip benchmark",
        description="Measure the runtimes at hand, so that a format is chosen by numbers: time per "
        "image, memory, size, differences from torch, and decisions that flip. A run, a checkpoint "
        "or a configuration is exported into a temporary folder first; of an exported folder, what "
        "it holds is measured. Each row has a process of its own, and the rows take turns.",
        allow_abbrev=False,
    )
    add_detector_options(parser)
    parser.add_argument(
        "--batch_sizes", type=_numbers, default=[1, 8], help="images per batch; default: '[1, 8]'"
    )
    parser.add_argument("--threads", type=int, help="threads of each row; default: all cores")
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="measured seconds of each row; default: 3"
    )
    parser.add_argument(
        "--runtimes",
        type=_names,
        default=list(RUNTIMES),
        help=f"some of {', '.join(RUNTIMES)}; default: all that are installed",
    )
    parser.add_argument(
        "--images", type=int, default=8, help="number of images to compare on; default: 8"
    )
    parser.add_argument("--json", help="write the numbers as JSON to this file; - prints them")
    return parser


def _names(text: str) -> list[str]:
    names = [name.strip(" '\"") for name in text.strip(" []()").split(",")]
    return [name for name in names if name]


def _numbers(text: str) -> list[int]:
    try:
        return [int(name) for name in _names(text)]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: give whole numbers, such as '[1, 8]'"
        ) from None


def _check(options: argparse.Namespace) -> None:
    options.threads = available_cores() if options.threads is None else options.threads
    check_at_least("--threads", options.threads, 1)
    check_above("--seconds", options.seconds, 0)
    check_at_least("--images", options.images, 2)
    if not options.batch_sizes or not options.runtimes:
        name = "--runtimes" if options.batch_sizes else "--batch_sizes"
        raise UserError(f"{name} is empty: leave it out, or name some")
    for size in options.batch_sizes:
        check_at_least("--batch_sizes", size, 1)
    for name in options.runtimes:
        if name not in RUNTIMES:
            raise UserError(f"--runtimes {name}: unknown, {suggest(name, RUNTIMES)}")
    options.batch_sizes = list(dict.fromkeys(options.batch_sizes))
    options.runtimes = [name for name in RUNTIMES if name in options.runtimes]
    if options.json not in (None, "-") and Path(options.json).is_dir():
        raise UserError(f"--json {options.json} is a folder: name a file in it")


def _subject(options: argparse.Namespace, settings: Mapping[str, str], scratch: Path) -> Subject:
    folder = _exported_folder(options.run)
    if folder is None:
        source = detector_source(options, settings)
        loaded = source.load()
        if loaded.detector.method.transductive:
            raise UserError(
                f"{type(loaded.detector.method).__name__} scores images by each other, so that "
                f"there is no time of one image: time its test or predict instead"
            )
        fields = {name: _plain(value) for name, value in asdict(source).items()}
        job = {"loader": LOADER, "source": fields}
        return subject_of_detector(
            loaded.detector,
            job,
            scratch,
            options.runtimes,
            options.images,
            options.root,
            loaded.method,
        )
    given = {
        "--ckpt_path": options.ckpt_path,
        "--config": options.config,
        "--data.category": options.category,
        "--references": options.references,
        "--calibration.file": options.calibration,
        **{f"--{name}": value for name, value in settings.items()},
    }
    for name, value in given.items():
        if value is not None:
            raise UserError(
                f"{name}: {folder} is an exported detector, which keeps its settings; leave the "
                f"option out, or give the run that it was exported from"
            )
    if options.root is not None and not options.root.exists():
        raise UserError(f"--data.root {options.root}: there is no such folder; correct the path")
    return subject_of_folder(folder, options.runtimes, options.images, options.root)


def _plain(value: Any) -> Any:
    return str(value.absolute()) if isinstance(value, Path) else value


def _exported_folder(run: str | None) -> Path | None:
    """Return the folder of an exported detector; None for anything else."""
    if run is None:
        return None
    path = Path(run)
    if path.name == RECORD and path.is_file():
        return path.parent
    return path if (path / RECORD).is_file() else None


def _watched(rows: Sequence[Timing], title: str) -> Iterator[Timing]:
    """Yield the rows, with a line on the screen for each round."""
    if rows:
        say(f"{title}: {number_of(len(rows), 'row')}")
    yield from rows


# -- results ---------------------------------------------------------------------------------------


def _content(
    subject: Subject,
    rows: Sequence[Timing],
    differences: Sequence[Difference | None],
    choice: Choice,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Return all numbers as JSON."""
    versions: dict[str, str | None] = {"anomaly_clip": __version__}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {
        "method": subject.method,
        "category": subject.category,
        "calibrated": subject.calibration is not None,
        "images": {"count": len(subject.images), "source": subject.source},
        "reference": subject.reference,
        "threads": options.threads,
        "machine": f"{platform.system()} {platform.machine()}",
        "versions": versions,
        "rows": [_row(row, difference) for row, difference in zip(rows, differences, strict=True)],
        "reading": {"seconds": subject.reading.seconds, "images": subject.reading.images},
        "choice": {
            "row": None if choice.row is None else choice.row.name,
            "sentence": choice.sentence,
        },
        "remarks": subject.remarks,
    }


def _row(row: Timing, difference: Difference | None) -> dict[str, Any]:
    content: dict[str, Any] = {
        "runtime": row.program.runtime,
        "precision": row.program.precision,
        "batch_size": row.batch_size,
        "error": row.error,
    }
    if row.error is not None:
        return content
    low, high = row.quartiles
    return {
        **content,
        "ms_per_image": 1000 * row.seconds,
        "quartiles_ms": [1000 * low, 1000 * high],
        "fastest_ms": 1000 * min(row.times) / row.batch_size,
        "fastest_processor_ms": 1000 * min(row.processor) / row.batch_size,
        "batches_timed": len(row.times),
        "start_seconds": row.start,
        "peak_memory_bytes": row.memory,
        "file_bytes": row.program.bytes,
        "difference": None if difference is None else difference.as_dict(),
    }


def _show(
    subject: Subject,
    rows: Sequence[Timing],
    differences: Sequence[Difference | None],
    choice: Choice,
    options: argparse.Namespace,
) -> None:
    """Print the table, the failures, and the choice."""
    console = Console(highlight=False, soft_wrap=True, markup=False)
    threads = "1 thread" if options.threads == 1 else f"{options.threads} threads"
    title = f"{subject.method}, {subject.category}, {threads}, {subject.source}"
    console.print(printable(title))
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("runtime", overflow="fold")
    for heading in ("batch", "ms an image", "quartiles", "start s", "memory MB", "file MB"):
        table.add_column(heading, justify="right")
    for heading in ("maps", "scores", "flips"):
        table.add_column(heading, justify="right")
    for row, difference in zip(rows, differences, strict=True):
        precision = row.program.precision
        name = row.program.runtime + ("" if precision == "float32" else f" {precision}")
        style = "bold" if row is choice.row else None
        table.add_row(Text(name), str(row.batch_size), *_cells(row, difference), style=style)
    show_table(table, console)
    for row in rows:
        if row.error is not None:
            console.print(printable(f"{row.name}: {row.error}"))
    for remark in subject.remarks:
        console.print(printable(f"remark: {remark}"))
    console.print(
        f"maps, scores: largest difference from {subject.reference}, as a share of the range of "
        f"the maps and of the largest score; flips: decisions that differ"
        + ("" if subject.calibration else " (-: the detector is not calibrated)")
    )
    console.print(
        printable(
            f"Decoding and resizing take {1000 * subject.reading.seconds:.3g} ms an image besides, "
            f"with any runtime ({subject.reading.images})."
        )
    )
    console.print(printable(choice.sentence), style="bold")


def _cells(row: Timing, difference: Difference | None) -> list[str]:
    if row.error is not None:
        return ["failed", *["-"] * 7]
    low, high = (1000 * value for value in row.quartiles)
    size = row.program.bytes
    cells = [
        _number(1000 * row.seconds),
        f"{_number(low)}-{_number(high)}",
        "-" if row.start is None else f"{row.start:.1f}",
        "-" if row.memory is None else f"{row.memory / MEGABYTE:.0f}",
        "-" if size is None else f"{size / MEGABYTE:.1f}",
    ]
    if difference is None:
        return [*cells, "-", "-", "-"]
    maps = difference.anomaly_map
    return [
        *cells,
        "-" if maps is None else f"{maps:.0e}",
        f"{difference.image_score:.0e}",
        "-" if difference.flips is None else str(difference.flips),
    ]


def _number(value: float) -> str:
    """Return a number with three significant digits and without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
