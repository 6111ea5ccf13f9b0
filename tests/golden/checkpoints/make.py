"""Create a set of tiny runs and checkpoints of every method, or compare with such a set.

    python tests/golden/checkpoints/make.py FOLDER
    python tests/golden/checkpoints/make.py --compare FOLDER

A set belongs to the version that created it: later versions must read its files (see
``tests/test_golden_checkpoints.py``). ``--compare`` runs the stored configurations again and
reports for every method whether all numbers are bit-identical, as they should be after a
refactoring. The set must then have been created on the same machine. The script uses only the
command line of the package, the names in ``anomaly_clip.methods``, and files.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import io
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

Numbers = dict[str, Any]

CLIP = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 32, "layers": 4, "width": 24, "head_width": 12, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
}
CATEGORIES = ("disc", "weave")
SIDE = 40
"""Side of an image in pixels."""
STRIDES = (3, 2, 2, 1)
"""Strides between rows, columns, ... of tensors that are stored as views of few numbers."""
MANY = 10_000
"""Number of rows from which all strides are 1; the token embedding has more rows."""
FEW, LARGE = 2048, 150_000
"""Tensors of fewer values are stored in full; checkpoints of fewer bytes are not thinned."""
VERBS = ("fit", "validate", "test")

QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
QUIET += ["--trainer.enable_model_summary=false", "--trainer.log_every_n_steps=1"]
QUIET += ["--trainer.num_sanity_val_steps=0", "--data.num_workers=0"]
MVTEC = ["--data=MVTecAD", "--data.root=mvtec", *QUIET]
FIRST, SECOND = (f"--data.categories=[{name}]" for name in CATEGORIES)
PROMPTS = ['--model.prompts.templates=["a photo of a {}.", "the {}."]']
PLAIN = ["--output.page=false"]
"""Leave out the gallery, which would take more space than everything else."""
LAYERS = ["features.0", "features.1", "features.2"]


def _clip(method: str, part: str = "backbone") -> list[str]:
    option = f"--model.{part}"
    return [f"--model={method}", f"{option}.name=clip.json", f"{option}.pretrained=clip.pt"]


def _cnn(method: str, name: str, file: str, image_size: int) -> list[str]:
    words = [
        f"--model={method}",
        f"--model.backbone.name={name}",
        f"--model.image_size={image_size}",
    ]
    return [*words, f"--model.backbone.weights={file}"]


def _small(method: str, layers: Sequence[str]) -> list[str]:
    words = _cnn(method, "mobilenet_v3_small", "mobilenet.pt", 64 if len(layers) == 3 else 32)
    return [*words, f"--model.layers={json.dumps(layers)}", "--model.sigma=2"]


PADIM = [*_small("PaDiM", LAYERS[1:]), "--model.num_channels=8", *MVTEC]
SIMPLENET = [*_small("SimpleNet", LAYERS[1:]), "--model.pretrain_dim=16", "--model.target_dim=16"]
SIMPLENET += ["--model.hidden=8", *MVTEC, FIRST]

METHODS: dict[str, dict[str, list[str]]] = {
    "sdp": {
        "test": [*_clip("SDP"), *PROMPTS, "--model.rvs.method=mean", "--model.sigma=2", *MVTEC]
    },
    "winclip": {"test": [*_clip("WinCLIP"), *PROMPTS, *MVTEC, *PLAIN]},
    "winclip_2shot": {"test": [*_clip("WinCLIP"), *PROMPTS, *MVTEC, "--data.shots=2", *PLAIN]},
    "sdp_plus": {
        "fit": [
            *_clip("SDPPlus"),
            *PROMPTS,
            "--model.rvs.method=kde",
            "--model.lr=0.01",
            *MVTEC,
            FIRST,
            "--data.auxiliary=MVTecAD",
            "--data.auxiliary.root=mvtec",
            f"--data.auxiliary.categories=[{CATEGORIES[1]}]",
            "--trainer.max_epochs=2",
            *PLAIN,
        ],
        "test": [],
    },
    "clip_ada": {
        "fit": [
            *_clip("CLIPADA"),
            "--model.feature_layer=3",
            "--model.class_token=true",
            "--model.map.eval_size=32",
            "--model.map.sigma=2",
            *MVTEC,
            "--data.synthesis.recipe=perlin",
            "--data.batch_size=4",
            "--trainer.max_steps=2",
            *PLAIN,
        ],
        "test": [],
    },
    "padim": {"fit": [*PADIM, FIRST], "test": []},
    "padim_calibrated": {
        "fit": [*PADIM, FIRST, "--calibrate=true", "--calibration.folds=2"],
        "test": [],
    },
    "patchcore": {
        "fit": [*_small("PatchCore", LAYERS[1:]), *MVTEC, FIRST, *PLAIN],
        "test": [],
    },
    "rd4ad": {
        "fit": [*_small("RD4AD", LAYERS), *MVTEC, FIRST, "--trainer.max_epochs=2", *PLAIN],
        "test": [],
    },
    "simplenet": {"fit": [*SIMPLENET, "--trainer.max_epochs=2", *PLAIN], "test": []},
    "regad": {
        "fit": [
            *_cnn("RegAD", "resnet18", "resnet18.pt", 64),
            "--model.shots=2",
            "--model.rounds=2",
            "--model.sigma=2",
            *MVTEC,
            FIRST,
            "--data.train_categories=others",
            "--trainer.max_epochs=2",
            *PLAIN,
        ],
        "test": [],
    },
    "linear_probe": {
        "fit": [
            *_cnn("LinearProbe", "resnet18", "resnet18.pt", 32),
            "--data=MixedWM38",
            "--data.root=wafers",
            "--data.test_share=0.4",
            *QUIET,
            "--trainer.max_epochs=3",
            *PLAIN,
        ],
        "test": [],
    },
    "tab": {
        "fit": [
            *_cnn("TAB", "resnet18", "resnet18.pt", 64),
            *_clip("TAB", "text")[1:],
            "--model.prompts.preset=two_class",
            "--model.optim.passes=1",
            *MVTEC,
            "--data.synthesis.recipe=nsa",
            "--data.synthesis.mode=pair",
            "--data.val_split=synthetic",
            "--data.val_share=0.4",
            "--data.batch_size=4",
            "--trainer.max_epochs=1",
        ],
        "validate": [],
    },
    "contrastive": {
        "fit": [
            *_clip("Contrastive"),
            *PROMPTS,
            "--data=Demo",
            "--data.num_scenes=4",
            "--data.picture_size=64",
            "--data.batch_size=2",
            *QUIET,
            "--trainer.max_epochs=1",
        ],
    },
}
"""Options by folder and command; an empty list means the checkpoint of the preceding fit."""

SWEEP = """\
program: anomaly_clip
method: grid
metric: {name: train/loss, goal: minimize}
parameters:
  model.adaptor_lr: {values: [0.0001, 0.01]}
command: [anomaly_clip, fit, "${args}"]
"""


# -- data and weights ------------------------------------------------------------------------------


def write_images(root: Path) -> None:
    """Write two categories in MVTec-AD's layout, each with 4 training and 3 + 3 test images."""
    from PIL import Image

    rng = np.random.default_rng(0)
    y, x = np.mgrid[:SIDE, :SIDE]
    for category in CATEGORIES:
        for split, kind, count in (("train", "good", 4), ("test", "good", 3), ("test", "spot", 3)):
            for number in range(count):
                phase = rng.uniform(-2, 2)
                if category == CATEGORIES[0]:
                    grey = 80 + 100.0 * (np.hypot(x - 20 - phase, y - 20) < 13)
                else:
                    grey = 120 + 50 * np.sin(0.9 * x + phase) * np.sin(0.9 * y)
                image = grey[..., None] * np.array([1.0, 0.9, 0.7])
                image += 8 * rng.integers(-2, 3, (SIDE, SIDE, 1))  # coarse noise compresses well
                if kind != "good":
                    row, column, radius = rng.uniform(8, 32), rng.uniform(8, 32), rng.uniform(3, 6)
                    mask = np.hypot(x - column, y - row) < radius
                    image[mask] += rng.choice([-60, 60], 3)
                    file = root / category / "ground_truth" / kind / f"{number:03d}_mask.png"
                    file.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(255 * mask.astype(np.uint8)).save(file, optimize=True)
                file = root / category / split / kind / f"{number:03d}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                pixels = np.clip(image, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(file, optimize=True)


def write_wafers(file: Path) -> None:
    """Write wafer maps of 4 classes, 6 of each, in MixedWM38's format."""
    rng = np.random.default_rng(1)
    y, x = np.mgrid[:52, :52] - 25.5
    disc = np.hypot(x, y) < 26
    patterns = np.zeros((4, 8), int)
    patterns[1, 0] = patterns[2, 3] = patterns[3, 0] = patterns[3, 3] = 1
    maps, targets = [], []
    for pattern in patterns:
        for _ in range(6):
            broken = rng.random((52, 52)) < 0.02
            if pattern[0]:
                broken |= np.hypot(x - rng.uniform(-3, 3), y) < 9
            if pattern[3]:
                broken |= np.hypot(x, y) > rng.uniform(20, 23)
            maps.append(disc * (1 + broken))
            targets.append(pattern)
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(file, np.stack(maps).astype(np.uint8), np.stack(targets).astype(np.uint8))


def write_weights(folder: Path) -> None:
    """Write a CLIP and two CNNs with random weights, whose large tensors are views of few numbers.

    The files are ``.pt`` files, because safetensors would store each view in full.
    """
    import open_clip
    import torch
    from torchvision import models

    (folder / "clip.json").write_text(json.dumps(CLIP, indent=2) + "\n", encoding="utf-8")
    networks = {
        "clip.pt": open_clip.CLIP(**CLIP),
        "mobilenet.pt": models.mobilenet_v3_small(weights=None),
        "resnet18.pt": models.resnet18(weights=None),
    }
    rng = np.random.default_rng(2)
    for name, network in networks.items():
        state = {
            key: _drawn(key, value, rng)
            for key, value in network.state_dict().items()
            if not key.endswith("num_batches_tracked") and not key.startswith(("fc", "classifier"))
        }
        if name != "clip.pt":
            state |= _statistics(network, state, rng)
        torch.save(state, folder / name)


def _drawn(key: str, like: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Return random weights for a tensor of this name and shape, in half precision."""
    import torch

    if not like.is_floating_point() or like.ndim == 0:
        return like.clone()
    if like.ndim == 1:  # scales and variances are near one, shifts and means near zero
        middle = 1.0 if key.endswith(("weight", "running_var")) else 0.0
        return torch.from_numpy(middle + 0.1 * rng.uniform(-1, 1, like.shape)).half()
    spread = math.sqrt(2 / math.prod(like.shape[1:])) if like.ndim > 2 else like.shape[-1] ** -0.5
    if "embedding" in key:
        spread = 0.5
    strides, length = _strides(like.shape)
    return torch.from_numpy(rng.normal(0, spread, length)).half().as_strided(like.shape, strides)


def _statistics(
    network: torch.nn.Module, state: Mapping[str, torch.Tensor], rng: np.random.Generator
) -> dict[str, torch.Tensor]:
    """Return BatchNorm statistics, without which features would grow from layer to layer."""
    import torch

    network.load_state_dict(dict(state), strict=False)
    for layer in network.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = None  # average over all batches
    coarse = torch.from_numpy(rng.normal(0, 1, (32, 3, 12, 12))).float()
    network.train()(torch.nn.functional.interpolate(coarse, (64, 64), mode="bilinear"))
    fitted = network.state_dict()
    return {key: fitted[key].half() for key in state if "running" in key}


def _strides(shape: Sequence[int]) -> tuple[tuple[int, ...], int]:
    """Return the strides of a view of few numbers, and the size of its storage."""
    strides = STRIDES[-len(shape) :] if shape[0] < MANY else (1, 1)
    return strides, 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))


def thin(file: Path) -> None:
    """Turn the large tensors of a large checkpoint into views of few numbers.

    Names, types and shapes stay. Weights that were initialised as such views hardly change.
    Optimiser states are dropped.
    """
    import torch

    if file.stat().st_size < LARGE:
        return
    content = torch.load(file, map_location="cpu", weights_only=True)
    content["optimizer_states"] = []
    content["state_dict"] = {key: _view(value) for key, value in content["state_dict"].items()}
    torch.save(content, file)


def _view(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    if tensor.numel() < FEW or not 2 <= tensor.ndim <= len(STRIDES):
        return tensor.clone()
    strides, length = _strides(tensor.shape)
    places = torch.arange(length).as_strided(tensor.shape, strides).reshape(-1).numpy()
    few = np.zeros(length, dtype=tensor.numpy().dtype)
    few[places] = tensor.reshape(-1).numpy()
    return torch.from_numpy(few).as_strided(tensor.shape, strides)


# -- runs and their numbers ------------------------------------------------------------------------


class Recorder:
    """Digest of everything that ``score`` returns, including maps in full precision."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self.calls = 0
        self._depth = 0

    def watch(self) -> None:
        """Wrap ``score`` of all methods of the package for the rest of the process."""
        import anomaly_clip.methods as package

        watched: set[type] = set()
        for name in package.__all__:
            for kind in getattr(package, name).__mro__:
                if "score" in vars(kind) and kind not in watched:
                    watched.add(kind)
                    kind.score = self._watched(kind.score)

    def take(self) -> str | None:
        """Return the digest since the last call; None if nothing was scored."""
        digest = self.digest.hexdigest() if self.calls else None
        self.digest, self.calls = hashlib.sha256(), 0
        return digest

    def _watched(self, score: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(score)
        def wrapped(*args: Any, **options: Any) -> Any:
            self._depth += 1  # one method may call another's score
            try:
                scores = score(*args, **options)
            finally:
                self._depth -= 1
            if not self._depth:
                self.calls += 1
                for key, value in _leaves(scores):
                    self.digest.update(f"{key} {digest_of(value)} ".encode())
            return scores

        wrapped.__isabstractmethod__ = getattr(score, "__isabstractmethod__", False)  # type: ignore[attr-defined]
        return wrapped


def digest_of(tensor: torch.Tensor) -> str:
    """Return the sha256 of a tensor's type, shape and values."""
    import torch

    data = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{data.dtype} {tuple(data.shape)} ".encode())
    digest.update(data.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def run(*words: str, code: int = 0) -> None:
    """Run a command line in this process.

    Raises:
        RuntimeError: If the exit code is not the expected one; the message contains the output.
    """
    from anomaly_clip.cli import main

    with contextlib.redirect_stderr(io.StringIO()) as output, contextlib.redirect_stdout(output):
        status = main(words)
    if status != code:
        command = f"anomaly_clip {' '.join(words)}"
        raise RuntimeError(f"{command}: exit code {status}, expected {code}\n{output.getvalue()}")


def run_method(name: str, verbs: Mapping[str, Sequence[str]], recorder: Recorder) -> Numbers:
    """Run the commands of one method into ``name/<verb>`` and return its numbers."""
    import torch

    numbers: Numbers = {}
    checkpoint = Path(name, "fit", "checkpoints", "last.ckpt")
    for verb, words in verbs.items():
        folder = Path(name, verb)
        options = list(words) or ["--ckpt_path", str(checkpoint)]
        recorder.take()
        run(verb, *options, f"--output.folder={folder}")
        values: Numbers = {"logged": logged(folder), "scores": recorder.take()}
        if verb == "fit":
            state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
            values["tensors"] = {key: digest_of(value) for key, value in sorted(state.items())}
            thin(checkpoint)
            for exported in folder.glob("*.*"):  # the same weights, not thinned
                if exported.suffix in (".pt", ".pth", ".safetensors"):
                    exported.unlink()
        if (folder / "metrics.json").is_file():
            values["metrics"] = metrics_of(folder)
            # For methods without maps, this digest takes the place of the digest of the maps.
            values["table"] = hashlib.sha256((folder / "scores.csv").read_bytes()).hexdigest()
        numbers[verb] = values
    return numbers


def metrics_of(folder: Path) -> Numbers:
    """Return a run's metrics: their mean, and those of each category."""
    content = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return {part: content[part] for part in ("mean", "categories")}


def logged(folder: Path) -> dict[str, float]:
    """Return the last value of everything that a run logged, except times."""
    values: dict[str, float] = {}
    for file in sorted(folder.glob("logs/**/metrics.csv")):
        with file.open(newline="", encoding="utf-8") as opened:
            for row in csv.DictReader(opened):
                values |= {name: float(value) for name, value in row.items() if value}
    return {name: values[name] for name in sorted(values) if "wait" not in name}


@contextlib.contextmanager
def interruption(method: str, when: Callable[[Any], bool]) -> Iterator[None]:
    """Interrupt training, as Ctrl-C would, as soon as ``when(method)`` is true."""
    import anomaly_clip.methods as package

    kind = getattr(package, method)
    step = kind.training_step

    @wraps(step)
    def interrupted(self: Any, *args: Any) -> Any:
        if when(self):
            raise KeyboardInterrupt
        return step(self, *args)

    kind.training_step = interrupted
    try:
        yield
    finally:
        kind.training_step = step


def run_several() -> Numbers:
    """Run ``compare``, and interrupted runs of ``each`` and ``sweep``; return their numbers."""
    last = [CATEGORIES[1]]
    with interruption("PaDiM", lambda m: m.trainer.datamodule.categories == last):
        run("each", *PADIM, "--output.folder=each", code=130)
    Path("sweep.yaml").write_text(SWEEP, encoding="utf-8")
    root = ["--output.root=.", "--output.name=sweep"]
    with interruption("SimpleNet", lambda m: m.adaptor_lr == 0.01):
        run("sweep", "sweep.yaml", *SIMPLENET, "--trainer.max_epochs=2", *root, code=130)
    weights = ["--weights", "mobilenet.pt", "random", "--folder", "compare", "--pictures", "1"]
    # ``--weights`` replaces this option.
    padim = [word for word in PADIM if not word.startswith("--model.backbone.weights")]
    run("compare", *weights, *padim, FIRST, *PLAIN)
    return several_numbers()


def several_numbers() -> Numbers:
    """Finish the interrupted runs, return the numbers of all, and restore the interrupted runs."""
    for name in ("each", "sweep"):
        shutil.copytree(name, f"{name}-interrupted")
    [record] = Path("sweep").glob("*/sweep.json")  # in 1, in later versions in 1-sweep
    content = json.loads(record.read_text(encoding="utf-8"))
    record.write_text(json.dumps({**content, "directory": os.getcwd()}), encoding="utf-8")
    run("each", "--resume", "each")
    run("sweep", "--resume", str(record.parent))
    with record.with_name("sweep.csv").open(newline="", encoding="utf-8") as file:
        goals = [float(row["train/loss"]) for row in csv.DictReader(file)]
    numbers: Numbers = {
        "each": {"metrics": metrics_of(Path("each"))},
        "sweep": {"logged": dict(enumerate(goals, start=1))},
        "compare": {"metrics": metrics_of(Path("compare", "mobilenet"))},
    }
    for name in ("each", "sweep"):
        shutil.rmtree(name)
        Path(f"{name}-interrupted").rename(name)
    return numbers


# -- the set ---------------------------------------------------------------------------------------


def make(folder: Path) -> None:
    """Create a set.

    Raises:
        SystemExit: If the folder exists, or a file of the set contains a path of this machine.
    """
    from anomaly_clip import __version__

    if folder.exists():
        raise SystemExit(f"{folder} exists: choose a new folder")
    folder.mkdir(parents=True)
    with _inside(folder):
        write_images(Path("mvtec"))
        write_wafers(Path("wafers", "MixedWM38.npz"))
        write_weights(Path())
        recorder = Recorder()
        recorder.watch()
        methods = {}
        for name, verbs in METHODS.items():
            methods[name] = run_method(name, verbs, recorder)
            print(f"finished: {name}")
        numbers = {"version": __version__, "methods": methods, "several": run_several()}
        Path("numbers.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
        _clean(Path())
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder}: {size / 1e6:.2f} MB")


def _clean(folder: Path) -> None:
    """Remove paths of this machine, and pages, which can be generated from the other files.

    Raises:
        SystemExit: If a file that is not JSON, YAML or CSV contains such a path.
    """
    here = f"{Path.cwd()}"
    for file in sorted(folder.rglob("*")):
        if not file.is_file():
            continue
        if file.name == "report.html":
            file.unlink()
        elif here.encode() in (content := file.read_bytes()):
            if file.suffix not in (".json", ".yaml", ".csv"):
                raise SystemExit(f"{file} contains the path {here}: remove it from the file")
            text = content.decode().replace(f"{here}/", "").replace(here, ".")
            file.write_text(text, encoding="utf-8")


def compare(folder: Path) -> int:
    """Run a set's configurations again, print the comparison, and return an exit code."""
    before = json.loads((folder / "numbers.json").read_text(encoding="utf-8"))
    recorder = Recorder()
    recorder.watch()
    equal = True
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch).resolve() / "set"
        shutil.copytree(folder, root)
        with _inside(root):
            for name, expected in before["methods"].items():
                verbs = {}
                for verb in expected:
                    kept = Path("before", f"{name}-{verb}.yaml")
                    kept.parent.mkdir(exist_ok=True)
                    shutil.copy(Path(name, verb, f"config-{verb}.yaml"), kept)
                    verbs[verb] = ["--config", str(kept)]
                shutil.rmtree(name)
                equal &= _report(name, expected, partial(run_method, name, verbs, recorder))
            equal &= _report("each, sweep, compare", before["several"], _several_again)
    return 0 if equal else 1


def _several_again() -> Numbers:
    """Run the stored comparison again, finish the interrupted runs, and return the numbers."""
    record = json.loads(Path("compare", "compare.json").read_text(encoding="utf-8"))
    shutil.rmtree("compare")
    weights = ["--weights", *record["weights"].values(), "--folder", "compare", "--pictures", "1"]
    run("compare", *weights, *record["options"])
    return several_numbers()


def _report(name: str, expected: Numbers, again: Callable[[], Numbers]) -> bool:
    """Print a method's comparison on one line and return whether its numbers are equal."""
    try:
        numbers = json.loads(json.dumps(again()))
    except Exception as error:  # the other methods are still worth comparing
        print(f"{name}: FAILED: {error}")
        return False
    ours, theirs = dict(_leaves(numbers)), dict(_leaves(expected))
    differing = [key for key in theirs if key not in ours or ours[key] != theirs[key]]
    differing += [key for key in ours if key not in theirs]
    if not differing:
        print(f"{name}: bit-identical ({len(theirs)} values)")
        return True
    both = ((ours.get(key), theirs.get(key)) for key in differing)
    apart = [abs(a - b) for a, b in both if isinstance(a, float) and isinstance(b, float)]
    largest = f"; largest numeric difference {max(apart):.3g}" if apart else ""
    print(f"{name}: DIFFERS in {len(differing)} values, such as {differing[0]}{largest}")
    return False


def _leaves(numbers: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(numbers, dict):
        for key in sorted(numbers, key=str):
            yield from _leaves(numbers[key], f"{path}/{key}" if path else str(key))
    else:
        yield path, numbers


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """Change the working directory to a set, as all paths in the set are relative to it."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def main(words: Iterable[str]) -> int:
    """Create or compare a set, on one thread, offline and with a separate cache."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("folder", type=Path, help="folder of the set, named after its version")
    parser.add_argument("--compare", action="store_true", help="compare with the set in FOLDER")
    options = parser.parse_args(list(words))
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["ANOMALY_CLIP_CACHE"] = cache
        if options.compare:
            return compare(options.folder)
        make(options.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
