"""Part of the soak: readers of images, arrays, weights, configurations and reports, fuzzed."""

from __future__ import annotations

import contextlib
import io
import json
import mmap
import os
import random
import resource
import shutil
import signal
import struct
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from common import ROOT
from soak_common import Row, in_parallel
from soak_mutations import damaged, damaged_json, damaged_text, images, packed, replaced, weights

from anomaly_clip.backbones.weight_files import read_content
from anomaly_clip.cli import main
from anomaly_clip.commands.checkpoint_content import read_checkpoint
from anomaly_clip.commands.library_messages import quieten
from anomaly_clip.commands.sweep_file import read_sweep
from anomaly_clip.data.wafer import read_wafers
from anomaly_clip.errors import UserError
from anomaly_clip.images import ReadRule, highest_value, read_header, read_image
from anomaly_clip.masks import read_mask

__all__ = ["GROWTH", "LONGEST", "TARGETS", "fuzz"]

LONGEST = 10.0
"""Processor seconds within which an input must be read."""
GROWTH = 400
"""Megabytes by which memory may grow at most while an input is read."""
PIXELS = 2_000_000
"""Limit on the size of fuzzed images, as ``data.max_pixels``."""
ALLOWED = (UserError, ValueError, OSError)
LONGEST_MESSAGE = 650
KEPT = Path(tempfile.gettempdir()) / "anomaly_clip_soak_failures"

OUTCOMES = ("read", "empty", "refused", "exit 0", "exit 1", "exit 2")

Files = Mapping[str, bytes]
"""Content by name; the first one is the input."""


@dataclass(frozen=True)
class Target:
    """Something that reads files."""

    case: str
    how: str
    share: float
    """Fraction of all inputs."""
    make: Callable[[random.Random], Files]
    read: Callable[[Path, random.Random], str]
    """Read the files in a folder; return what came of it in one word."""


# -- images, arrays, weights -----------------------------------------------------------------------


def _make_image(rng: random.Random) -> Files:
    suffix, content = rng.choice(images())
    others = [other for _, other in images()]
    name = suffix if rng.random() < 0.9 else rng.choice(("png", "tga", "pcx", "dib", "tif", "x"))
    return {f"image.{name}": damaged(rng, content, others)}


def _read_image(folder: Path, rng: random.Random) -> str:
    (file,) = folder.iterdir()
    image = read_image(file, ReadRule(bit_depth=rng.choice((8, 12, 16)), max_pixels=PIXELS))
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise AssertionError(f"read_image returns {image.dtype} {image.shape}")
    header = read_header(file)
    if header.size != image.shape[1::-1]:
        raise AssertionError(f"read_header says {header.size}, the image has {image.shape}")
    if header.deep:
        highest_value(file)
    return "read"


def _read_mask(folder: Path, rng: random.Random) -> str:
    (file,) = folder.iterdir()
    mask = read_mask(file, max_pixels=PIXELS)
    if mask.dtype != bool or mask.ndim != 2:
        raise AssertionError(f"read_mask returns {mask.dtype} {mask.shape}")
    return "read"


@cache
def _wafer_members() -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    members = {}
    for name, array in (
        ("arr_0.npy", rng.integers(0, 3, (4, 6, 6))),
        ("arr_1.npy", rng.integers(0, 2, (4, 8))),
    ):
        file = io.BytesIO()
        np.save(file, array)
        members[name] = file.getvalue()
    return members


def _make_wafers(rng: random.Random) -> Files:
    members = dict(_wafer_members())
    others = [*members.values(), b"\x93NUMPY\x01\x00\xff\xff{'descr': '|O', 'shape': (9,)}"]
    if rng.random() < 0.5:  # damage under a right checksum
        name = rng.choice(list(members))
        members[name] = damaged(rng, members[name], others)
        if rng.random() < 0.3:
            text = members[name]
            shape = b"(%d, %d" % (rng.choice((0, 2, 10**9, 2**62)), rng.choice((1, 6, 10**6)))
            members[name] = text.replace(b"(4, 6", shape).replace(
                b"<i8", rng.choice((b"|O ", b"<f8", b"<M8", b"|V8", b"<U9", b">i2", b"|b1"))
            )
        return {"a.npz": packed(members, rng)}
    return {"a.npz": damaged(rng, packed(members, rng), [packed(members, rng)])}


def _read_wafers(folder: Path, rng: random.Random) -> str:
    maps, targets = read_wafers(folder / "a.npz")
    if maps.dtype != np.uint8 or targets.dtype != np.uint8 or len(maps) != len(targets):
        raise AssertionError(f"read_wafers returns {maps.shape} and {targets.shape}")
    return "read"


def _make_weights(rng: random.Random) -> Files:
    suffix, content = rng.choice(weights())
    if content[:2] == b"PK" and rng.random() < 0.5:  # damage under right checksums
        import zipfile

        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        name = rng.choice([name for name in members if members[name]])
        members[name] = damaged(rng, members[name], list(members.values()))
        return {f"a.{suffix}": packed(members, rng)}
    if suffix == "safetensors" and rng.random() < 0.5:
        (length,) = struct.unpack("<Q", content[:8])
        head = damaged_json(rng, json.loads(content[8 : 8 + length]))
        return {"a.safetensors": struct.pack("<Q", len(head)) + head + content[8 + length :]}
    return {f"a.{suffix}": damaged(rng, content, [other for _, other in weights()])}


def _read_weights(folder: Path, rng: random.Random) -> str:
    (file,) = folder.iterdir()
    return "read" if read_content(file).content is not None else "empty"


def _read_checkpoint(folder: Path, rng: random.Random) -> str:
    (file,) = folder.iterdir()
    read_checkpoint(file)
    return "read"


# -- configurations --------------------------------------------------------------------------------


@cache
def _configs() -> list[str]:
    files = sorted((ROOT / "configs").glob("*.yaml"))
    return [file.read_text(encoding="utf-8") for file in files]


def _make_config(rng: random.Random) -> Files:
    text = rng.choice(_configs())
    if rng.random() < 0.5:
        return {"a.yaml": damaged_text(rng, text)}
    content = yaml.safe_load(text)
    if rng.random() < 0.3:
        return {"a.json": damaged_json(rng, content)}
    return {
        "a.yaml": yaml.safe_dump(replaced(rng, content), sort_keys=False).encode(
            "utf-8", "surrogatepass"
        )
    }


def _read_config(folder: Path, rng: random.Random) -> str:
    (file,) = folder.iterdir()
    verb = rng.choice(("fit", "test"))
    return _command([verb, "--config", str(file), "--print_config"])


@cache
def _sweeps() -> list[str]:
    files = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))
    return [file.read_text(encoding="utf-8") for file in files]


def _make_sweep(rng: random.Random) -> Files:
    text = rng.choice(_sweeps())
    if rng.random() < 0.4:
        return {"a.yaml": damaged_text(rng, text)}
    content = replaced(rng, yaml.safe_load(text))
    return {"a.yaml": yaml.safe_dump(content, sort_keys=False).encode("utf-8", "surrogatepass")}


def _read_sweep(folder: Path, rng: random.Random) -> str:
    sweep = read_sweep(folder / "a.yaml")
    for run in sweep.runs(sweep.method, 3, 0):
        sweep.words(run)
    return "read"


# -- reports ---------------------------------------------------------------------------------------


@cache
def _run_files() -> dict[str, bytes]:
    from run_folder import TWO, make_run

    with tempfile.TemporaryDirectory() as folder:
        make_run(Path(folder), TWO, pictures=2)
        files = {
            str(file.relative_to(folder)): file.read_bytes()
            for file in sorted(Path(folder).rglob("*"))
            if file.is_file()
        }
    content = json.loads(files["metrics.json"])
    content["run"]["protocol"]["rounds"] = 2
    content["uncertain"] = {"mean": ["pixel_auroc"]}
    files["metrics.json"] = json.dumps(content).encode()
    return files


def _make_run(rng: random.Random) -> Files:
    files = dict(_run_files())
    names = ["metrics.json", "metrics.json", "scores.csv", "curves.json", "gallery/gallery.json"]
    if rng.random() < 0.2:  # a run of predict
        content = json.loads(files.pop("metrics.json"))
        files["predict.json"] = json.dumps({"run": content["run"]}).encode()
        names[:2] = ["predict.json"]
    name = rng.choice(names)
    if name.endswith(".csv"):
        text = files[name].decode()
        files[name] = (
            damaged_text(rng, text.replace(",", ":")).replace(b":", b",")
            if rng.random() < 0.6
            else damaged(rng, text.encode(), [b'"a,b\n"', b"\r,\0,"])
        )
    else:
        files[name] = damaged_json(rng, json.loads(files[name]))
    return {name: files[name], **files}


def _read_run(folder: Path, rng: random.Random) -> str:
    more = rng.choice(([], ["--page"], ["--protocol"], ["--csv", str(folder / "t.csv")]))
    done = _command(["report", str(folder), *more])
    if more == ["--page"] and done == "exit 0":
        page = (folder / "report.html").read_bytes()
        if not page.rstrip().endswith(b"</html>"):
            raise AssertionError("report.html is cut")
    return done


def _command(words: list[str]) -> str:
    """Run the command line in this process; return its exit code.

    Raises:
        AssertionError: If it does not end with 0, 1 or 2, and one sentence unless it is 0.
    """
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code: object = main(words)
        except SystemExit as stop:
            code = stop.code
    text = err.getvalue().strip()
    last = (text.splitlines() or [""])[-1]
    if code not in (0, 1, 2):
        raise AssertionError(f"exit code {code}: {last}")
    if "Traceback" in text:
        raise AssertionError(f"a traceback: {last}")
    if code and not last.startswith("anomaly_clip"):
        raise AssertionError(f"exit code {code} without a sentence: {last}")
    if code and len(last) > LONGEST_MESSAGE:
        raise AssertionError(f"a sentence of {len(last)} characters: {last[:200]}")
    return f"exit {code}"


# Shares: a configuration takes some tenths of a second, an image some tenths of a millisecond.
TARGETS = (
    Target("images", "read_image, read_header", 0.38, _make_image, _read_image),
    Target("masks", "read_mask", 0.25, _make_image, _read_mask),
    Target("npz", "read_wafers", 0.12, _make_wafers, _read_wafers),
    Target("weights", "read_content", 0.1, _make_weights, _read_weights),
    Target("checkpoints", "read_checkpoint", 0.06, _make_weights, _read_checkpoint),
    Target("sweep files", "read_sweep and its runs", 0.05, _make_sweep, _read_sweep),
    Target("report files", "report, --page, --protocol", 0.03, _make_run, _read_run),
    Target("configurations", "--print_config", 0.01, _make_config, _read_config),
)


# -- workers ---------------------------------------------------------------------------------------


def fuzz(count: int, seed: int, jobs: int) -> Iterator[Row]:
    """Read ``count`` damaged files; yield a row for each kind.

    Allowed are success, and one sentence as ``UserError``, ``ValueError`` or ``OSError``, or with
    exit code 1 or 2. A failure is saved with its seed.

    Args:
        count: Number of inputs of all kinds together.
        seed: Seed of all inputs.
        jobs: Number of processes.
    """
    for target in TARGETS:
        row = Row("fuzz", target.case, target.how)
        number = max(1, round(count * target.share))
        slices = [range(start, number, jobs) for start in range(min(jobs, number))]
        tasks = [partial(_watched, target, seed, numbers) for numbers in slices]
        for tried, counts, failures in in_parallel(tasks, jobs):
            row.tried += tried
            for name, value in sorted(counts.items()):
                row.count(name, value)
            row.failures += failures
        yield row


Report = tuple[int, dict[str, int], list[dict[str, Any]]]


def _watched(target: Target, seed: int, numbers: range) -> Report:
    """Read inputs in a forked process; continue after one that crashes or hangs."""
    place = mmap.mmap(-1, mmap.PAGESIZE)  # the input in progress, then a count of each outcome
    with tempfile.TemporaryDirectory(dir=_fast()) as name:
        folder, log = Path(name), Path(name) / "log"
        log.touch()
        next_one = 0
        while next_one < len(numbers):
            child = os.fork()
            if child == 0:
                _work(target, seed, numbers, next_one, place, folder, log)
            problem = _watch(child, place)
            if problem is None:
                break
            next_one = struct.unpack("<q", place[:8])[0]
            _log(log, _failure(target, seed, numbers[next_one], problem))
            next_one += 1
        failures = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    counted = struct.unpack_from(f"<{len(OUTCOMES)}q", place, 8)
    counts = {name: value for name, value in zip(OUTCOMES, counted, strict=True) if value}
    return len(numbers), counts, failures


def _watch(child: int, place: mmap.mmap) -> str | None:
    """Wait for a worker; return how it ended unless it did all its inputs."""
    current, spent = -1, 0.0
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return None if code == 0 else f"the process ended with {code}"
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
            seconds = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
            now = struct.unpack("<q", place[:8])[0]
            if now != current:
                current, spent = now, seconds
            elif seconds - spent > LONGEST:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return f"no end within {LONGEST:g} s"
        time.sleep(0.05)


def _work(
    target: Target,
    seed: int,
    numbers: range,
    first: int,
    place: mmap.mmap,
    folder: Path,
    log: Path,
) -> None:
    """Read the inputs from ``first`` on, and end this process."""
    code = 70
    try:
        warnings.simplefilter("ignore")
        quieten()
        written = os.open(folder / "stderr", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        os.dup2(written, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.chdir(folder)
        peak = _memory()
        for index in range(first, len(numbers)):
            place[:8] = struct.pack("<q", index)
            number = numbers[index]
            outcome, problem = _read_one(target, seed, number, folder / "input")
            grown, peak = _memory() - peak, max(peak, _memory())
            if problem is None and grown > GROWTH:
                problem = f"memory grew by {grown:.0f} MB"
            if problem is None and os.fstat(written).st_size:
                text = os.pread(written, 200, 0).decode(errors="replace").strip()
                problem = f"a library wrote to the terminal: {text}"
            os.ftruncate(written, 0)
            os.lseek(written, 0, os.SEEK_SET)
            if problem is not None:
                _log(log, _failure(target, seed, number, problem))
            else:
                slot = 8 + 8 * OUTCOMES.index(outcome)
                struct.pack_into("<q", place, slot, struct.unpack_from("<q", place, slot)[0] + 1)
        code = 0
    except BaseException as error:  # of the fuzz itself
        _log(log, {"what": f"the fuzz: {type(error).__name__}: {error}", "seed": seed})
    finally:
        os._exit(code)


def _memory() -> float:
    """Return the largest resident size of this process, in megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _log(log: Path, entry: Mapping[str, Any]) -> None:
    with log.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def _source(target: Target, seed: int, number: int) -> random.Random:
    return random.Random(f"{target.case} {seed} {number}")


def _write(files: Files, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def _read_one(target: Target, seed: int, number: int, folder: Path) -> tuple[str, str | None]:
    """Return what came of an input, and what is wrong with it, if anything is."""
    rng = _source(target, seed, number)
    _write(target.make(rng), folder)
    try:
        return target.read(folder, rng), None
    except ALLOWED as error:
        text = str(error)
        if not text.strip():
            return "failed", f"{type(error).__name__} without a message"
        return "refused", None
    except AssertionError as error:
        return "failed", str(error) or "AssertionError"
    except BaseException as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        where = (
            ""
            if trace is None
            else f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
        )
        return "failed", f"{type(error).__name__}: {error} ({where})"


def _failure(target: Target, seed: int, number: int, problem: str) -> dict[str, Any]:
    """Save an input and describe its failure."""
    files = target.make(_source(target, seed, number))
    name = next(iter(files))
    kept = KEPT / f"{target.case.replace(' ', '_')}-{seed}-{number}-{Path(name).name}"
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_bytes(files[name])
    text = problem.encode("utf-8", "backslashreplace").decode()
    return {"what": text[:400], "seed": seed, "number": number, "file": kept.name}


def _fast() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
