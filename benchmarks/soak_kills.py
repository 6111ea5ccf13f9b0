"""Part of the soak: fits that are killed at random steps and inside saves, then resumed."""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from soak_common import CHECKPOINT, Ended, Hook, Row, in_parallel, run_main

from anomaly_clip.testing.callbacks import SignalAtStep
from anomaly_clip.testing.run_files import compare_checkpoints, load
from anomaly_clip.testing.subject import Subject

__all__ = ["TRAINED", "kills", "subject_of"]

TRAINED = (
    "SDP+",
    "CLIP-ADA",
    "TAB",
    "RD4AD",
    "SimpleNet",
    "RegAD",
    "linear probe",
    "contrastive",
)
"""Cases of tests/contract_subjects.py that are trained by gradient descent."""
EPOCHS = 3
MEMORY = Path("/dev/shm")
INSIDE = ("half", "rename", "renamed")
"""Places inside a save: half of the file is written; all is written; it is renamed."""


class Place(NamedTuple):
    """Folders of a trial."""

    name: str
    run: Path
    temporary: Path
    """Folder that TMPDIR names."""


class Fit(NamedTuple):
    """A method, its uninterrupted fit, and the words of fits to be killed."""

    name: str
    subject: Subject
    whole: Path
    """Last checkpoint of the uninterrupted fit."""
    epochs: int
    batches: int
    """Batches of an epoch."""


class Trial(NamedTuple):
    """Outcome of one kill."""

    place: str
    counts: list[str]
    problem: str | None


def subject_of(name: str) -> Subject:
    """Return a case of tests/contract_subjects.py."""
    from contract_subjects import cases

    case = cases()[name]
    options = {"max_epochs": EPOCHS} if name in TRAINED else {}
    bound = case.half_precision_bound
    return Subject.of(case.kind, case.arguments, case.data, options, bound)


def kills(count: int, seed: int, jobs: int, names: tuple[str, ...] = TRAINED) -> Iterator[Row]:
    """Kill fits at ``count`` steps and inside half as many saves; yield a row for each kind.

    After each kill, the last checkpoint must load, the resumed fit must equal an uninterrupted
    one to the bit, and neither a temporary file nor one in ``TMPDIR`` may be left.

    Args:
        count: Number of kills at steps.
        seed: Seed of steps and saves.
        jobs: Number of trials at the same time.
        names: Methods, which take turns.
    """
    with tempfile.TemporaryDirectory(prefix="soak_") as disk, _memory() as memory:
        fits = list(in_parallel([partial(_whole_fit, name) for name in names], jobs))
        rng = random.Random(seed)
        places = _places(Path(disk), memory)
        for kind, number in (("step", count), ("save", max(1, count // 2))):
            rows: dict[str, Row] = {}
            tasks: list[Callable[[], Trial]] = []
            wheres: list[dict[str, Any]] = []
            for trial in range(number):
                fit = fits[trial % len(fits)]
                place = places[trial // len(fits) % len(places)]
                here = Place(place[0], place[1] / f"{kind}{trial}", place[2] / f"{kind}{trial}")
                words, prepare, where = _planned(kind, fit, trial, rng)
                tasks.append(partial(_trial, fit, here, words, prepare))
                wheres.append({"method": fit.name, "seed": seed, "trial": trial, **where})
            for where, done in zip(wheres, in_parallel(tasks, jobs), strict=True):
                how = f"SIGKILL at a {kind}" if kind == "step" else "killed inside a save"
                row = rows.setdefault(done.place, Row("kills", how, done.place))
                row.tried += 1
                for name in done.counts:
                    row.count(name)
                if done.problem is not None:
                    row.fail(done.problem, **where)
            yield from rows.values()


class _memory:
    """A folder in memory, where the system has one."""

    def __enter__(self) -> Path | None:
        self.folder = None
        if os.access(MEMORY, os.W_OK) and MEMORY.is_dir():
            self.folder = Path(tempfile.mkdtemp(prefix="soak_", dir=MEMORY))
        return self.folder

    def __exit__(self, *_: object) -> None:
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def _places(disk: Path, memory: Path | None) -> list[tuple[str, Path, Path]]:
    runs, temporary = disk / "runs", disk / "tmp"
    places = [("TMPDIR on the run's file system", runs, temporary)]
    if memory is not None and memory.stat().st_dev != disk.stat().st_dev:
        places.append(("run on disk, TMPDIR in memory", runs, memory / "tmp"))
        places.append(("run in memory, TMPDIR on disk", memory / "runs", temporary))
    return places


def _whole_fit(name: str) -> Fit:
    subject = subject_of(name)
    subject.__dict__["folder"] = Path(tempfile.mkdtemp(prefix="fit_")).resolve()
    words, folder = subject.words("fit", "--output.page", "false")
    ended = run_main(words, subject.variables)
    if ended.code:
        raise RuntimeError(f"{name}: the uninterrupted fit ends with {ended.code}: {ended.stderr}")
    whole = folder / "checkpoints" / "last.ckpt"
    content = load(whole)
    done = content["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["completed"]
    epochs = content["epoch"]
    return Fit(name, subject, whole, epochs, max(1, done // max(1, epochs)))


def _planned(
    kind: str, fit: Fit, trial: int, rng: random.Random
) -> tuple[list[str], Hook | None, dict[str, Any]]:
    """Return the words of a fit to be killed, what kills it, and a description."""
    every = ["--output.checkpoint_every_n_steps", str(rng.choice((1, 1, 2, 3)))]
    if kind == "step":
        epoch, batch = rng.randrange(fit.epochs), rng.randrange(fit.batches)
        callback = fit.subject.with_callback(
            SignalAtStep, number=int(signal.SIGKILL), epoch=epoch, batch=batch
        )
        words, _ = fit.subject.words("fit", "--output.page", "false", *every, **callback)
        return words, None, {"epoch": epoch, "batch": batch, "every": every[-1]}
    how, number = INSIDE[trial % len(INSIDE)], rng.randint(1, fit.epochs)
    size = int(fit.whole.stat().st_size * rng.uniform(0.05, 0.95))
    words, _ = fit.subject.words("fit", "--output.page", "false", *every)
    return words, Hook(CHECKPOINT, how, size, number), {"inside": how, "save": number}


def _trial(fit: Fit, place: Place, words: list[str], hook: Hook | None) -> Trial:
    place.temporary.mkdir(parents=True, exist_ok=True)
    variables = {**fit.subject.variables, "TMPDIR": str(place.temporary)}
    first, second = place.run / "killed", place.run / "resumed"
    ended = run_main(
        [*words, "--output.folder", str(first)], variables, None if hook is None else hook.install
    )
    counts: list[str] = []
    try:
        problem = _after(fit, place, words, variables, ended, (first, second), hook, counts)
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    shutil.rmtree(place.run, ignore_errors=True)
    shutil.rmtree(place.temporary, ignore_errors=True)
    return Trial(place.name, counts, problem)


def _after(
    fit: Fit,
    place: Place,
    words: list[str],
    variables: dict[str, str],
    ended: Ended,
    folders: tuple[Path, Path],
    hook: Hook | None,
    counts: list[str],
) -> str | None:
    """Return what is wrong after a kill; None if nothing is."""
    if ended.code not in (-signal.SIGKILL, -signal.SIGXFSZ):
        return f"not killed, but exit code {ended.code}: {ended.last_line}"
    first, second = folders
    last = first / "checkpoints" / "last.ckpt"
    if hook is not None:
        counts.append("hit a save")
        if any(path for path in first.rglob(".*.tmp.ckpt")):
            counts.append("left a part of a file")
    if not last.exists():
        counts.append("before the first save")
        lost = [path.name for path in place.temporary.iterdir()]
        return f"left in TMPDIR: {lost[0]}" if lost else None
    load(last)
    resumed = run_main(
        [*_resuming(words), "--output.folder", str(second), "--ckpt_path", str(last)], variables
    )
    if resumed.code:
        return f"the resumed fit ends with {resumed.code}: {resumed.stderr.strip()[-250:]}"
    counts.append("resumed")
    compare_checkpoints(fit.whole, second / "checkpoints" / "last.ckpt")
    left = [path for path in place.run.rglob("*") if ".tmp" in path.name]
    left += list(place.temporary.iterdir())
    return f"left over: {left[0]}" if left else None


def _resuming(words: list[str]) -> list[str]:
    """Return the words of a fit without the callback that kills it."""
    import yaml

    words = list(words)
    place = words.index("--config") + 1
    content = yaml.safe_load(Path(words[place]).read_text(encoding="utf-8"))
    content["trainer"].pop("callbacks", None)
    file = Path(words[place]).with_suffix(".resumed.yaml")
    file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    words[place] = str(file)
    return words
