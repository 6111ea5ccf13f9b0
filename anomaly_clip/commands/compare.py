"""``anomaly_clip compare``: one method with several backbones or weights, side by side.

The TAB paper compares detectors in this way, once with ImageNet weights and once with weights
aligned with text. Every backbone gets its own run of ``each``. One table then shows the
differences, and ``compare_images`` draws the maps and features of all backbones.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from anomaly_clip.commands.batch import (
    DryRunCLI,
    check_directory,
    check_new_folder,
    forbid_distributed_launch,
    pop_resume,
    working_in,
)
from anomaly_clip.commands.compare_candidates import (
    Candidate,
    backbones,
    sets_of_weights,
)
from anomaly_clip.commands.compare_images import check_layer, draw_embeddings, draw_maps
from anomaly_clip.commands.each import run_each
from anomaly_clip.commands.experiment import arrange, known_options
from anomaly_clip.commands.interruption import advise
from anomaly_clip.commands.library_messages import quieten
from anomaly_clip.errors import UserError, user_errors
from anomaly_clip.files import write_csv, write_json
from anomaly_clip.methods.evaluated import EvaluatedModule
from anomaly_clip.metric_values import CLASS_METRICS, MetricValues, uncertain_metrics, with_means
from anomaly_clip.progress import say, show_table, track
from anomaly_clip.reporting.metrics_table import heading, marked_percent
from anomaly_clip.results.folder import METRICS_FILE, create_run_folder
from anomaly_clip.results.warnings import (
    UNCERTAIN_WARNING,
    selection_warning,
    transductive_remark,
    weights_remark,
)

__all__ = ["run_compare"]

PRINTED_METRICS = ("image_auroc", "pixel_auroc", *CLASS_METRICS)
"""Metrics of the TAB paper, printed if the run has them. The files contain all metrics."""
OPTIONS_FILE = "compare.json"
"""Record of the compared backbones or weights, and of the options."""

RunMetrics = dict[str, Any]
"""Content of a run's ``metrics.json``."""


def run_compare(words: Sequence[str]) -> int:
    """Run a method with each backbone; return exit code 1 if a category failed.

    Raises:
        UserError: If the command line is invalid, a run cannot be built, or no category was
            finished with all backbones.
    """
    words, resumed = pop_resume(words, OPTIONS_FILE)
    if resumed is None:
        options, rest = _parser().parse_known_args(words)
        return _run(options, rest)
    if words:
        raise UserError(
            f"--resume continues the run with its original options: leave out {words[0]}"
        )
    with user_errors():
        record = json.loads((resumed / OPTIONS_FILE).read_text(encoding="utf-8"))
    with working_in(record.get("directory"), resumed) as folder:
        kind = "backbones" if "backbones" in record else "weights"
        line = [f"--{kind}", *record[kind].values(), "--output.folder", str(folder)]
        for name in ("pictures", "embedding"):  # runs of 0.1.0 have no record of them
            line += [f"--{name}", str(record[name])] if record.get(name) is not None else []
        options = _parser().parse_args(line)
        return _run(options, record["options"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="anomaly_clip compare",
        usage="anomaly_clip compare --weights FIRST SECOND [...] --config FILE [--dry-run] "
        "[options of each]\n       anomaly_clip compare --backbones FIRST SECOND [...] --config "
        "FILE [--dry-run] [options of each]\n       anomaly_clip compare --resume RUN",
        description="Fit and test a detector once per backbone, or once per set of weights of one "
        "backbone (a file, imagenet or random). The table shows the differences from the first "
        "one. --resume continues an interrupted run, inside the fit in progress, and skips the "
        "fits that are finished.",
        allow_abbrev=False,
    )
    compared = parser.add_mutually_exclusive_group(required=True)
    compared.add_argument("--weights", nargs="+", help="two or more sets of weights")
    compared.add_argument(
        "--backbones",
        nargs="+",
        metavar="BACKBONE",
        help="two or more backbones of any kind, each as [LABEL=]NAME[:WEIGHTS], in quotes if "
        "options of the model follow, such as "
        "'vit_small_patch14_dinov2 image_size=448 layers=[6,9]'",
    )
    parser.add_argument(
        "--output.root",
        dest="root",
        type=Path,
        default=Path("runs"),
        metavar="DIR",
        help="parent of the comparison's folder; default: runs",
    )
    parser.add_argument(
        "--output.name",
        dest="name",
        default="compare",
        help="name of the comparison's folder; default: compare",
    )
    parser.add_argument(
        "--output.folder",
        "--folder",
        dest="folder",
        type=Path,
        metavar="DIR",
        help="the comparison's folder itself; an interrupted comparison in it continues",
    )
    parser.add_argument("--dry-run", action="store_true", help="list the commands of each")
    parser.add_argument(
        "--pictures", type=int, default=4, help="images drawn per category; default: 4"
    )
    parser.add_argument(
        "--embedding",
        metavar="LAYER",
        help="also plot a t-SNE of the test images' features of a layer, such as layer3 or pooled; "
        "of a transformer, layer3 ends its third quarter, and numbers are its blocks",
    )
    return parser


def _run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Run a method with each backbone; see :func:`run_compare`."""
    kind = "weights" if options.backbones is None else "backbones"
    with user_errors():
        candidates = (
            sets_of_weights(options.weights)
            if options.backbones is None
            else backbones(options.backbones)
        )
    labels = [candidate.label for candidate in candidates]
    if options.dry_run:
        for candidate in candidates:
            print(shlex.join(["anomaly_clip", "each", *rest, *_assigned(candidate.options)]))
        return 0
    forbid_distributed_launch("compare")
    if options.folder is None:
        with user_errors():
            folder = create_run_folder(options.root.expanduser(), options.name, "compare")
    else:
        folder = options.folder.expanduser()
        if not (folder / OPTIONS_FILE).is_file():
            check_new_folder("compare", folder, labels)
    record = _options_record(folder, kind, candidates, rest)
    record |= {"pictures": options.pictures, "embedding": options.embedding}
    try:
        for candidate in candidates:
            if not (folder / candidate.label / "config-each.yaml").is_file():
                _check_buildable(candidate, rest, folder, options.embedding)
    except Exception:
        with contextlib.suppress(OSError):  # the folder does not exist, or has results
            folder.rmdir()
        raise
    write_json(folder / OPTIONS_FILE, record)
    code = 0
    again = f"anomaly_clip compare --resume {shlex.quote(str(folder))}"
    for label, _, more in candidates:
        run = folder / label
        line = ["--resume", str(run)] if (run / "config-each.yaml").is_file() else [
            *rest, *more, "--output.folder", str(run)
        ]  # fmt: skip
        say(f"compare {label}")
        with advise(lambda: f"resume with {again}"), contextlib.redirect_stdout(io.StringIO()):
            code = max(code, run_each(["each", *line]))
    runs = {label: _read_metrics(folder / label, again) for label in labels}
    common = [
        category
        for category in runs[labels[0]]["categories"]
        if all(category in run["categories"] for run in runs.values())
    ]
    if not common:
        raise UserError(
            f"no category was finished with all of {', '.join(labels)}: see the failures above, "
            f"then resume with {again}"
        )
    rows = _comparison_rows(runs, common)
    _write_comparison(folder, runs, rows)
    table = _comparison_table(runs, rows)
    show_table(table)
    with user_errors():
        for category in track(common, "drawing images"):
            draw_maps(folder, labels, category, options.pictures)
        if options.embedding:
            draw_embeddings(folder, labels, common, options.embedding)
    say(f"results: {folder}")
    return code


def _assigned(options: Sequence[str]) -> list[str]:
    """Return options and values as ``--option=value``."""
    return [f"{options[i]}={options[i + 1]}" for i in range(0, len(options), 2)]


def _options_record(
    folder: Path, kind: str, candidates: Sequence[Candidate], options: Sequence[str]
) -> dict[str, Any]:
    """Return what is compared and the options, merged with those already recorded in the folder.

    Raises:
        UserError: If the folder contains another comparison.
    """
    full = {candidate.label: candidate.word for candidate in candidates}
    if not (folder / OPTIONS_FILE).is_file():
        directory = {"directory": str(Path.cwd())}
        return {kind: full, "options": list(options), **directory}
    before = json.loads((folder / OPTIONS_FILE).read_text(encoding="utf-8"))
    check_directory(folder, before.get("directory"))
    compared = before.get(kind, {})
    changed = [label for label, word in full.items() if compared.get(label, word) != word]
    if changed or not compared or before["options"] != list(options):
        label = changed[0] if changed else None
        if not compared:
            difference = f"it has no {kind}"
        elif label:
            difference = f"the {kind} {label} were {compared[label]}"
        else:
            difference = f"its options were {' '.join(before['options']) or 'none'}"
        raise UserError(
            f"--output.folder {folder} has another comparison ({difference}): choose another folder"
        )
    return {**before, kind: {**compared, **full}}


def _check_buildable(
    candidate: Candidate, options: Sequence[str], folder: Path, layer: str | None
) -> None:
    """Check that a run can be built, before the runs ahead of it take hours.

    Raises:
        UserError: If it cannot be built.
    """
    more = [*candidate.options, "--output.folder", str(folder / candidate.label)]
    quieten()
    with user_errors(known_options):
        plan = DryRunCLI(args=arrange(["fit", *options, *more]))
        plan.writer.abandon()
        _ = plan.datamodule.categories
        if layer and isinstance(plan.model, EvaluatedModule):
            check_layer(plan.model, layer)


def _read_metrics(folder: Path, again: str) -> RunMetrics:
    file = folder / METRICS_FILE
    if not file.is_file():
        raise UserError(
            f"{file} is missing, as no category could be tested with this backbone: see the "
            f"failures above, then resume with {again}"
        )
    metrics: RunMetrics = json.loads(file.read_text(encoding="utf-8"))
    return metrics


def _comparison_rows(
    runs: Mapping[str, RunMetrics], categories: Sequence[str]
) -> dict[str, dict[str, MetricValues]]:
    """Return metrics by category and label of weights; ``mean`` has the means over categories."""
    results = {
        label: with_means({name: run["categories"][name] for name in categories}, {})
        for label, run in runs.items()
    }
    rows = {
        name: {label: run_results["categories"][name] for label, run_results in results.items()}
        for name in categories
    }
    return {**rows, "mean": {label: run_results["mean"] for label, run_results in results.items()}}


def _write_comparison(
    folder: Path, runs: Mapping[str, RunMetrics], rows: Mapping[str, Mapping[str, MetricValues]]
) -> None:
    """Write all metrics as CSV (one row per category and backbone) and as JSON."""
    names = list(next(iter(runs.values()))["mean"])
    lines = (
        [category, label, *(metrics[name] for name in names)]
        for category, by_label in rows.items()
        for label, metrics in by_label.items()
    )
    write_csv(folder / "comparison.csv", ["category", "weights", *names], lines)
    records = {label: run["run"] for label, run in runs.items()}
    write_json(folder / "comparison.json", {"figures": rows, "runs": records})


def _comparison_table(
    runs: Mapping[str, RunMetrics], rows: Mapping[str, Mapping[str, MetricValues]]
) -> Table:
    """Return the printed table, with differences from the first run."""
    first, *others = runs
    record = runs[first]["run"]
    remarks_by_label = {label: weights_remark(run["run"]["weights"]) for label, run in runs.items()}
    title = [f"{record['method']} on {record['protocol']['data']}, percent"]
    remarks = transductive_remark(record["protocol"]), selection_warning(record["protocol"])
    title += [remark for remark in remarks if remark is not None]
    printed = [name for name in PRINTED_METRICS if name in runs[first]["mean"]]
    uncertain = {label: uncertain_metrics(run) for label, run in runs.items()}
    notes = [
        f"{', '.join(x for x in runs if remarks_by_label[x] == remark)}: {remark}"
        for remark in dict.fromkeys(remarks_by_label.values())
        if remark is not None
    ]
    names = [run.get(category, ()) for run in uncertain.values() for category in rows]
    if any(set(printed) & set(metrics) for metrics in names):
        notes.append(UNCERTAIN_WARNING)
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=0,  # there are many columns, and the box separates them
        title=Text("\n".join(title)),
        title_style="bold",
        caption="\n".join(notes) or None,
    )
    table.add_column("category", overflow="fold")
    for name in printed:
        table.add_column(f"{heading(name)}\n{first}", justify="right", overflow="fold")
        for label in others:
            table.add_column(f"{heading(name)}\n{label}", justify="right", overflow="fold")
            table.add_column("+/-", justify="right", no_wrap=True)
    for category, by_label in rows.items():
        cells: list[str] = []
        for name in printed:
            reference = by_label[first][name]
            cells += marked_percent(by_label[first], [name], uncertain[first].get(category, ()))
            for label in others:
                value = by_label[label][name]
                difference = "–"
                if value is not None and reference is not None:
                    difference = f"{100 * (value - reference):+.1f}"
                marked = uncertain[label].get(category, ())
                cells += [*marked_percent(by_label[label], [name], marked), difference]
        if category == "mean":
            table.add_section()
        table.add_row(Text(category), *cells, style="bold" if category == "mean" else None)
    return table
