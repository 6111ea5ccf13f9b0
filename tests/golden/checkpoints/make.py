"""Make a set of tiny runs and checkpoints, one of every method, or compare with one.

    python tests/golden/checkpoints/make.py FOLDER
    python tests/golden/checkpoints/make.py --compare FOLDER

A set belongs to the version that made it: later versions must read its files (see
``tests/test_golden_checkpoints.py``). ``--compare`` runs its stored configurations again and says
of every method whether all numbers are equal to the bit, as after a refactoring they are; for that
the set must come from the same machine. It takes nothing of the package but the command line, the
names in ``anomaly_clip.methods`` and files.
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
"""Pixels of an image."""
STRIDES = (3, 2, 2, 1)
"""Between numbers of neighbouring rows, columns, ... of a tensor that is a view of few numbers."""
MANY = 10_000
"""Rows of a tensor, as that of the tokens, from which on one follows at the next number."""
FEW, LARGE = 2048, 150_000
"""Numbers of a tensor that is stored as it is, and bytes of a checkpoint that is not thinned."""
VERBS = ("fit", "validate", "test")

QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
QUIET += ["--trainer.enable_model_summary=false", "--trainer.log_every_n_steps=1"]
QUIET += ["--trainer.num_sanity_val_steps=0", "--data.num_workers=0"]
MVTEC = ["--data=MVTecAD", "--data.root=mvtec", *QUIET]
FIRST, SECOND = (f"--data.categories=[{name}]" for name in CATEGORIES)
PROMPTS = ['--model.prompts.templates=["a photo of a {}.", "the {}."]']
PLAIN = ["--output.page=false"]
"""No gallery, which takes more room than all the rest."""
LAYERS = ["features.0", "features.1", "features.2"]


def _clip(method: str, part: str = "backbone") -> list[str]:
    own = f"--model.{part}"
    return [f"--model={method}", f"{own}.name=clip.json", f"{own}.pretrained=clip.pt"]


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
"""Options by folder and verb; a verb behind a fit takes its checkpoint and configuration."""

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
    """Write two categories in MVTec-AD's layout: 4 training images, 3 and 3 test images each."""
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
                image += 8 * rng.integers(-2, 3, (SIDE, SIDE, 1))  # coarse, so that it packs well
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
    """Write maps of 4 classes, 6 of each, in the form of MixedWM38."""
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

    They are ``.pt`` files, as a safetensors file would hold each view in full.
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
    """Return random weights of a tensor's kind and shape, in half precision."""
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
    """Return the statistics of BatchNorm, as otherwise features grow from layer to layer."""
    import torch

    network.load_state_dict(dict(state), strict=False)
    for layer in network.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = None  # the mean over all that it sees
    coarse = torch.from_numpy(rng.normal(0, 1, (32, 3, 12, 12))).float()
    network.train()(torch.nn.functional.interpolate(coarse, (64, 64), mode="bilinear"))
    found = network.state_dict()
    return {key: found[key].half() for key in state if "running" in key}


def _strides(shape: Sequence[int]) -> tuple[tuple[int, ...], int]:
    """Return the strides of a view of few numbers, and how many these are."""
    strides = STRIDES[-len(shape) :] if shape[0] < MANY else (1, 1)
    return strides, 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))


def thin(file: Path) -> None:
    """Turn the large tensors of a large checkpoint into views of few numbers.

    Names, types and shapes stay, and weights that began as such views hardly change. States of
    optimisers are left out.
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
    """Keep a digest of all that ``score`` returns, maps in full precision included."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self.calls = 0
        self._depth = 0

    def watch(self) -> None:
        """Wrap ``score`` of all methods of the package, for the rest of the process."""
        import anomaly_clip.methods as package

        known: set[type] = set()
        for name in package.__all__:
            for kind in getattr(package, name).__mro__:
                if "score" in vars(kind) and kind not in known:
                    known.add(kind)
                    kind.score = self._watched(kind.score)

    def take(self) -> str | None:
        """Return the digest since the last call, None if nothing was scored."""
        found = self.digest.hexdigest() if self.calls else None
        self.digest, self.calls = hashlib.sha256(), 0
        return found

    def _watched(self, score: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(score)
        def wrapped(*args: Any, **options: Any) -> Any:
            self._depth += 1  # one method may score through another
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
    """Return the sha256 of a tensor's type, shape and numbers."""
    import torch

    data = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{data.dtype} {tuple(data.shape)} ".encode())
    digest.update(data.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def run(*words: str, code: int = 0) -> None:
    """Run a command line in this process.

    Raises:
        RuntimeError: If it ends with another code than expected; it says what the command said.
    """
    from anomaly_clip.cli import main

    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(said):
        found = main(words)
    if found != code:
        raise RuntimeError(f"anomaly_clip {' '.join(words)}: exit code {found}\n{said.getvalue()}")


def run_method(name: str, verbs: Mapping[str, Sequence[str]], recorder: Recorder) -> Numbers:
    """Run the verbs of one method into ``name/<verb>`` and return its numbers."""
    import torch

    numbers: Numbers = {}
    checkpoint = Path(name, "fit", "checkpoints", "last.ckpt")
    for verb, words in verbs.items():
        folder = Path(name, verb)
        own = list(words) or ["--ckpt_path", str(checkpoint)]
        recorder.take()
        run(verb, *own, f"--output.folder={folder}")
        found: Numbers = {"logged": logged(folder), "scores": recorder.take()}
        if verb == "fit":
            state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
            found["tensors"] = {key: digest_of(value) for key, value in sorted(state.items())}
            thin(checkpoint)
            for exported in folder.glob("*.*"):  # the same weights again, in full
                if exported.suffix in (".pt", ".pth", ".safetensors"):
                    exported.unlink()
        if (folder / "metrics.json").is_file():
            found["metrics"] = metrics_of(folder)
            # The file's digest says of the methods without maps what the maps' says of the others.
            found["table"] = hashlib.sha256((folder / "scores.csv").read_bytes()).hexdigest()
        numbers[verb] = found
    return numbers


def metrics_of(folder: Path) -> Numbers:
    """Return the mean and the categories of a run's metrics."""
    content = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return {part: content[part] for part in ("mean", "categories")}


def logged(folder: Path) -> dict[str, float]:
    """Return the last value of all that a run logged, but for times."""
    values: dict[str, float] = {}
    for file in sorted(folder.glob("logs/**/metrics.csv")):
        with file.open(newline="", encoding="utf-8") as opened:
            for row in csv.DictReader(opened):
                values |= {name: float(value) for name, value in row.items() if value}
    return {name: values[name] for name in sorted(values) if "wait" not in name}


@contextlib.contextmanager
def interruption(method: str, when: Callable[[Any], bool]) -> Iterator[None]:
    """Interrupt a training when something holds of the method, as Ctrl-C would."""
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
    """Run each, sweep and compare; the former two are left as an interruption leaves them."""
    last = [CATEGORIES[1]]
    with interruption("PaDiM", lambda m: m.trainer.datamodule.categories == last):
        run("each", *PADIM, "--output.folder=each", code=130)
    Path("sweep.yaml").write_text(SWEEP, encoding="utf-8")
    root = ["--output.root=.", "--output.name=sweep"]
    with interruption("SimpleNet", lambda m: m.adaptor_lr == 0.01):
        run("sweep", "sweep.yaml", *SIMPLENET, "--trainer.max_epochs=2", *root, code=130)
    weights = ["--weights", "mobilenet.pt", "random", "--folder", "compare", "--pictures", "1"]
    # Its weights are those of ``--weights``.
    padim = [word for word in PADIM if not word.startswith("--model.backbone.weights")]
    run("compare", *weights, *padim, FIRST, *PLAIN)
    return several_numbers()


def several_numbers() -> Numbers:
    """Finish copies of the interrupted runs and return the numbers of all."""
    for name in ("each", "sweep"):
        shutil.copytree(name, f"{name}-interrupted")
    record = Path("sweep", "1", "sweep.json")
    content = json.loads(record.read_text(encoding="utf-8"))
    record.write_text(json.dumps({**content, "directory": os.getcwd()}), encoding="utf-8")
    run("each", "--resume", "each")
    run("sweep", "--resume", "sweep/1")
    with Path("sweep", "1", "sweep.csv").open(newline="", encoding="utf-8") as file:
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
    """Make a set.

    Raises:
        SystemExit: If the folder exists, or a file of the set names a folder of this machine.
    """
    from importlib.metadata import version

    if folder.exists():
        raise SystemExit(f"{folder} exists: name a new folder")
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
            print(f"made: {name}")
        numbers = {"version": version("anomaly_clip"), "methods": methods, "several": run_several()}
        Path("numbers.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
        _clean(Path())
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder}: {size / 1e6:.2f} MB")


def _clean(folder: Path) -> None:
    """Leave out what a machine should not tell, and pages, which are made of the rest.

    Raises:
        SystemExit: If something of it is left.
    """
    here = f"{Path.cwd()}"
    for file in sorted(folder.rglob("*")):
        if not file.is_file():
            continue
        if file.name == "report.html":
            file.unlink()
        elif here.encode() in (content := file.read_bytes()):
            if file.suffix not in (".json", ".yaml", ".csv"):
                raise SystemExit(f"{file} names {here}")
            text = content.decode().replace(f"{here}/", "").replace(here, ".")
            file.write_text(text, encoding="utf-8")


def compare(folder: Path) -> int:
    """Run a set's configurations again, print how the numbers compare, return an exit code."""
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
                equal &= _judge(name, expected, partial(run_method, name, verbs, recorder))
            equal &= _judge("each, sweep, compare", before["several"], _several_again)
    return 0 if equal else 1


def _several_again() -> Numbers:
    """Run a stored comparison again, finish what was interrupted, and return the numbers."""
    record = json.loads(Path("compare", "compare.json").read_text(encoding="utf-8"))
    shutil.rmtree("compare")
    weights = ["--weights", *record["weights"].values(), "--folder", "compare", "--pictures", "1"]
    run("compare", *weights, *record["options"])
    return several_numbers()


def _judge(name: str, expected: Numbers, again: Callable[[], Numbers]) -> bool:
    """Print one line on a method and return whether its numbers are equal."""
    try:
        found = json.loads(json.dumps(again()))
    except Exception as error:  # the other methods are still of interest
        print(f"{name}: FAILED: {error}")
        return False
    ours, theirs = dict(_leaves(found)), dict(_leaves(expected))
    differing = [key for key in theirs if key not in ours or ours[key] != theirs[key]]
    differing += [key for key in ours if key not in theirs]
    if not differing:
        print(f"{name}: equal to the bit ({len(theirs)} values)")
        return True
    both = ((ours.get(key), theirs.get(key)) for key in differing)
    apart = [abs(a - b) for a, b in both if isinstance(a, float) and isinstance(b, float)]
    largest = f"; largest difference of a number {max(apart):.3g}" if apart else ""
    print(f"{name}: DIFFERS in {len(differing)} values, as {differing[0]}{largest}")
    return False


def _leaves(numbers: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(numbers, dict):
        for key in sorted(numbers, key=str):
            yield from _leaves(numbers[key], f"{path}/{key}" if path else str(key))
    else:
        yield path, numbers


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """Work in a folder, as all names in a set are relative to it."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def main(words: Iterable[str]) -> int:
    """Make or compare, on one thread, without a network and with a cache of its own."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("folder", type=Path, help="of the set, which is named after the version")
    parser.add_argument("--compare", action="store_true", help="compare with the set in the folder")
    asked = parser.parse_args(list(words))
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["ANOMALY_CLIP_CACHE"] = cache
        if asked.compare:
            return compare(asked.folder)
        make(asked.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
