"""Part of the soak: a disk that is full when a file is written, for each kind of file.

Two ways. A limit on the size of files begins when a certain file is opened: from then on nothing
of more than a few bytes is written, as on a full disk. And, where mounting is allowed, whole
commands run on small file systems of several sizes, which are full at any moment.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import yaml
from soak_common import FULL, Ended, Hook, Row, in_parallel, mounted, one_sentence, run_main, wholes
from soak_kills import subject_of

from anomaly_clip.files import CACHE_VARIABLE
from anomaly_clip.testing.subject import Subject

__all__ = ["WRITERS", "full_disks"]

BYTES = 64
"""Largest file while the disk is full."""
LIMIT = "files limited to 64 bytes from there on"
SIZES = (0.02, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95)
"""Sizes of mounted file systems, as fractions of what a command needs."""


class Writer(NamedTuple):
    """A file, and the command that writes it."""

    name: str
    command: str
    """Key of the commands in :func:`_commands`."""
    pattern: str
    is_optional: bool = False
    """True if the run does without the file: a cache, or W&B's files."""


WRITERS = (
    Writer("configuration", "fit", "*config-fit*.yaml"),
    Writer("first checkpoint", "fit", "*last*.ckpt"),
    Writer("log of a fit", "fit", "*metrics.csv"),
    Writer("validation images", "fit with validation", "*validation*"),
    Writer("log with validation", "fit with validation", "*metrics.csv"),
    Writer("metrics.json", "test", "*metrics*.json"),
    Writer("metrics.csv", "test", "*metrics*.csv"),
    Writer("scores.csv", "test", "*scores*.csv"),
    Writer("curves.json", "test", "*curves*.json"),
    Writer("maps", "test", "*maps/*.png"),
    Writer("raw maps", "test", "*maps/*.npy"),
    Writer("maps kept during a run", "test", "*.scratch/*"),
    Writer("gallery", "test", "*gallery/*.webp"),
    Writer("gallery.json", "test", "*gallery*.json"),
    Writer("page", "test", "*report*.html"),
    Writer("predict.json", "predict", "*predict*.json"),
    Writer("scores of predict", "predict", "*scores*.csv"),
    Writer("maps of predict", "predict", "*maps/*.png"),
    Writer("cache of texts", "test of the demo", "*/text/*", True),
    Writer("cache of features", "fit with features", "*/features/*", True),
    Writer("cache of images", "test with cached images", "*/pictures/*", True),
    Writer("cache of hashes", "check", "*contents.jsonl", True),
    Writer("cache of wafers", "fit of wafers", "*/wafers/*", True),
    Writer("export", "export", ""),
    Writer("preview", "preview", "*preview*.png"),
    Writer("report --csv", "report --csv", "*table*.csv"),
    Writer("report --markdown", "report --markdown", "*table*.md"),
    Writer("report --html", "report --html", "*table*.html"),
    Writer("report --page", "report --page", "*report*.html"),
    Writer("record of each", "each", "*each*.json"),
    Writer("configuration of each", "each", "*config-each*.yaml"),
    Writer("record of sweep", "sweep", "*sweep*.json"),
    Writer("result of a run of sweep", "sweep", "*result*.json"),
    Writer("table of sweep", "sweep", "*sweep*.csv"),
    Writer("record of compare", "compare", "*compare*.json"),
    Writer("table of compare", "compare", "*comparison*.csv"),
    Writer("images of compare", "compare", "*.png"),
    Writer("W&B offline", "fit with W&B", "*wandb*", True),
)
ON_SMALL_DISKS = ("fit", "test", "predict", "each", "sweep", "compare", "preview", "export")

Words = Callable[[Path], list[str]]
"""Words of a command that writes into a folder."""


def full_disks(count: int, seed: int, jobs: int) -> Iterator[Row]:
    """Fill the disk at each writer; yield a row for each.

    After it, a command must end with 2 and one sentence that names a file or folder, or with 0
    and a warning if it can do without the file; and every file that is left must be whole.

    Args:
        count: Number of writers to try, and of sizes of each small file system.
        seed: Unused: all is tried in order.
        jobs: Number of commands at the same time.
    """
    with tempfile.TemporaryDirectory(prefix="soak_full_") as name:
        base = Path(name)
        (commands, variables) = next(iter(in_parallel([partial(_prepared, base)], 1)))
        commands = {key: partial(_in_folder, words) for key, words in commands.items()}
        tasks = [
            partial(_limited, writer, commands[writer.command], variables, base / f"w{number}")
            for number, writer in enumerate(WRITERS[:count])
        ]
        yield from in_parallel(tasks, jobs)
        sizes = SIZES[:count]
        more = [
            partial(_on_small_disks, key, commands[key], variables, base / f"d{number}", sizes)
            for number, key in enumerate(ON_SMALL_DISKS[:count])
        ]
        yield from in_parallel(more, jobs)


SMALL_DEMO = (
    "--data.num_test",
    "2",
    "--data.picture_size",
    "64",
    "--data.categories",
    "[brass mesh]",
    "--data.num_workers",
    "0",
    "--trainer.accelerator",
    "cpu",
)

# -- commands --------------------------------------------------------------------------------------

HERE = "@HERE@"
"""Stands for the folder of a command in its words."""


def _in_folder(words: list[str], folder: Path) -> list[str]:
    return [word.replace(HERE, str(folder)) for word in words]


def _prepared(base: Path) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Fit and test what the commands need; return their words and variables."""
    subjects = {name: subject_of(name) for name in ("SimpleNet", "SDP", "SDP+", "linear probe")}
    for number, subject in enumerate(subjects.values()):
        (base / f"s{number}").mkdir()
        subject.__dict__["folder"] = base / f"s{number}"
    net, sdp, plus, probe = subjects.values()
    fitted = _done(net, *net.words("fit", "--output.page", "false"))
    layers = _done(plus, *plus.words("fit", "--output.page", "false"))
    tested = _done(sdp, *sdp.words("test"))
    drawn = ["--output.maps", "true", "--output.raw_maps", "true"]
    output = ["--output.folder", f"{HERE}/run"]
    fit = [*_words(net, "fit"), "--trainer.max_epochs", "2", *output]
    test = [*_words(sdp, "test"), *drawn, *output]
    data = sdp.data["init_args"]
    of_data = ["--data", "MVTecAD", "--data.root", str(data["root"])]
    each = _words(net, "each")
    report = ["report", str(tested)]
    commands = {
        "fit": fit,
        "fit with validation": [*fit, "--data.val_split", "test"],
        "fit with features": [*_words(plus, "fit"), "--trainer.max_epochs", "1", *output],
        "fit of wafers": [*_words(probe, "fit"), "--trainer.max_epochs", "1", *output],
        "fit with W&B": [
            *fit,
            *("--trainer.logger", "lightning.pytorch.loggers.WandbLogger"),
            *("--trainer.logger.save_dir", f"{HERE}/wandb", "--trainer.logger.project", "soak"),
        ],
        "test": test,
        "test of the demo": ["test", "--config", "demo", *SMALL_DEMO, *output],
        "test with cached images": [*test, "--data.cache", "true"],
        "predict": [*_words(sdp, "predict"), *output],
        "check": ["check", *of_data],
        "preview": ["preview", *of_data, "--file", f"{HERE}/preview.png"],
        "export": [
            "export",
            "--ckpt_path",
            str(layers / "checkpoints" / "last.ckpt"),
            "--folder",
            f"{HERE}/exported",
        ],
        **{
            f"report --{kind}": [*report, f"--{kind}", f"{HERE}/table.{end}"]
            for kind, end in (("csv", "csv"), ("markdown", "md"), ("html", "html"))
        },
        "report --page": ["report", "--page", f"{HERE}/tested"],
        "each": [*each, "--trainer.max_epochs", "1", *output],
        "compare": [*_compare(net, base), "--output.folder", f"{HERE}/run"],
        "sweep": [*_sweep(net, base), "--output.folder", f"{HERE}/run"],
    }
    shutil.copytree(tested, base / "tested")
    assert fitted.is_dir()
    return commands, net.variables


def _done(subject: Subject, words: list[str], folder: Path) -> Path:
    ended = run_main(words, subject.variables)
    if ended.code:
        raise RuntimeError(f"{words[0]} ends with {ended.code}: {ended.stderr[-500:]}")
    return folder


def _words(subject: Subject, verb: str) -> list[str]:
    """Return a command line without the folder of its output."""
    content = subject.configuration()
    if verb in ("predict", "test"):
        content["trainer"].pop("max_epochs", None)
    return [verb, "--config", str(subject.write(content))]


def _compare(subject: Subject, base: Path) -> list[str]:
    import torch
    from torchvision.models import mobilenet_v3_small

    other = base / "other.pt"
    torch.save(mobilenet_v3_small(weights=None).state_dict(), other)
    line = ["compare", "--weights", "random", str(other), *_words(subject, "fit")[1:]]
    return [*line, "--trainer.max_epochs", "1"]


def _sweep(subject: Subject, base: Path) -> list[str]:
    content = subject.configuration()
    content["data"]["init_args"]["val_share"] = 0.5
    content["trainer"]["max_epochs"] = 1
    file = base / "sweep.yaml"
    config = subject.write(content)
    sweep = {
        "program": "anomaly_clip",
        "method": "grid",
        "metric": {"name": "train/loss", "goal": "minimize"},
        "parameters": {"model.adaptor_lr": {"values": [0.001, 0.002]}},
        "command": ["${env}", "anomaly_clip", "fit", "--config", str(config), "${args}"],
    }
    file.write_text(yaml.safe_dump(sweep), encoding="utf-8")
    return ["sweep", str(file)]


# -- trials ----------------------------------------------------------------------------------------


def _start(folder: Path, variables: dict[str, str]) -> dict[str, str]:
    """Make the folder of a command; return its variables, with a cache of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(folder.parent / "tested", folder / "tested")
    return {**variables, CACHE_VARIABLE: str(folder / "cache")}


def _limited(writer: Writer, words: Words, variables: dict[str, str], folder: Path) -> Row:
    row = Row("full", writer.name, LIMIT, tried=1)
    environment = _start(folder, variables)
    pattern = f"{folder}{writer.pattern}" if writer.pattern else ""
    hook = Hook(pattern, "full there" if writer.is_optional else "full", BYTES)
    ended = run_main(words(folder), environment, hook.install)
    if FULL not in ended.stderr:
        row.fail(f"not reached by {writer.command}: {ended.code} {ended.last_line}")
    else:
        row.note = _short(ended)
        for problem in _problems(ended, folder, writer.is_optional):
            row.fail(problem, command=writer.command)
    shutil.rmtree(folder, ignore_errors=True)
    return row


def _on_small_disks(
    key: str, words: Words, variables: dict[str, str], folder: Path, sizes: tuple[float, ...]
) -> Row:
    row = Row("full", key, "small file system in memory")
    whole = folder.parent / f"{folder.name}whole"
    ended = run_main(words(whole), _start(whole, variables))
    if ended.code:
        row.fail(f"ends with {ended.code} with room enough: {ended.last_line}")
        return row
    shutil.rmtree(whole / "tested")
    used = sum(4 * -(-file.stat().st_size // 4096) for file in whole.rglob("*") if file.is_file())
    shutil.rmtree(whole)
    for size in sizes:
        room = int(used * size)
        with mounted(folder, 4 * used + 4096) as allowed:
            if not allowed:
                row.note = "mounting is not allowed: not tried; the limits on files stand in"
                return row
            shutil.copytree(folder.parent / "tested", folder / "tested")
            _fill(folder / "filler", room)
            environment = {**variables, CACHE_VARIABLE: str(folder / "cache")}
            ended = run_main(words(folder), environment)
            row.tried += 1
            row.count(f"exit {ended.code}")
            if ended.code:
                for problem in _problems(ended, folder, False):
                    row.fail(problem, command=key, kilobytes=room)
            else:
                for bad in wholes(folder):
                    row.fail(f"exit 0, and {bad}", command=key, kilobytes=room)
    return row


LOGGING = re.compile(r"--- Logging error ---.*?^Arguments: [^\n]*$", re.DOTALL | re.MULTILINE)


def _fill(file: Path, room: int) -> None:
    """Write a file that leaves so many kilobytes of its file system."""
    left = os.statvfs(file.parent)
    with file.open("wb") as opened:
        opened.write(bytes(max(0, left.f_bavail * left.f_frsize - 1024 * room)))


def _problems(ended: Ended, folder: Path, is_optional: bool) -> Iterator[str]:
    lines = [line for line in ended.stderr.splitlines() if line != FULL]
    ended = ended._replace(stderr="\n".join(lines))
    if is_optional:
        text = LOGGING.sub("", ended.stderr)  # W&B's own log, by Python's logging
        if ended.code or "Traceback" in text:
            yield f"exit code {ended.code}: {ended.stderr.strip()[-250:]}"
        elif str(folder) not in ended.stderr:
            yield "no warning names the folder"
    elif problem := one_sentence(ended):
        # Of each, compare and sweep, every failed category or run has its own line.
        has_lines = ended.code == 1 and "free space" in ended.stderr
        if "Traceback" in ended.stderr or not has_lines:
            yield problem
    elif "/" not in ended.last_line:
        yield f"names no file: {ended.last_line}"
    yield from wholes(folder)


def _short(ended: Ended) -> str:
    """Return the end of a command for the table, without folders."""
    words = [
        word.rpartition("/")[2] if word.startswith("/") else word
        for word in ended.last_line.replace("|", " ").split()
    ]
    return f"exit {ended.code}: {' '.join(words)[:110]}"
