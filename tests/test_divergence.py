"""Fits with values that are not finite: the message, the exit code, and what is left."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from anomaly_clip.cli import main
from anomaly_clip.commands.divergence import FiniteValues
from anomaly_clip.commands.finite_tensors import not_finite
from anomaly_clip.errors import Diverged
from anomaly_clip.testing.processes import run_command

NAN, INF = float("nan"), float("inf")
LAST = Path("runs/SimpleNet/1-fit/checkpoints/last.ckpt")


class Poison(Callback):
    """Overwrite the first value of tensors in one step of a fit.

    Args:
        at: Number of steps before.
        hook: start: before the step. end: after it.
        name: Beginning of the tensors' names.
        value: The value.
        rank: Process in which to do so; default: all.
    """

    def __init__(
        self, at: int, hook: str, name: str, value: float = NAN, rank: int | None = None
    ) -> None:
        self.at, self.hook, self.name, self.value, self.rank = at, hook, name, value, rank
        self.steps = 0

    def _poison(self, hook: str, module: LightningModule, batch: Any) -> None:
        if hook != self.hook or self.steps != self.at:
            return
        if self.rank not in (None, module.global_rank):
            return
        tensors = dict(module.named_parameters()) | dict(module.named_buffers())
        if self.name == "trained":
            weights = {n: p for n, p in module.named_parameters() if p.requires_grad}
            tensors = {f"trained.{name}": weight for name, weight in weights.items()}
        if self.name == "image":
            batch["image"] = batch["image"].float()
            tensors = {"image": batch["image"][-1:]}
        with torch.no_grad():
            for name, tensor in tensors.items():
                if name.startswith(self.name) and tensor.is_floating_point():
                    tensor.view(-1)[:1] = self.value

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._poison("start", pl_module, batch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._poison("end", pl_module, batch)
        self.steps += 1


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def words(root: Path, method: str, *more: str) -> list[str]:
    line = ["fit", "--model", method, "--model.backbone.name", "squeezenet1_1", "--model.layers"]
    line += ["[features.4.cat]", "--model.backbone.weights", "random", "--model.image_size", "64"]
    line += ["--data", "MVTecAD", "--data.root", str(root), "--data.categories", "[bottle]"]
    line += ["--data.num_workers", "0", "--data.batch_size", "1", "--trainer.accelerator", "cpu"]
    return [*line, "--output.page=false", "--trainer.enable_model_summary=false", *more]


def poison(at: int, hook: str, name: str, value: str | None = None) -> list[str]:
    prefix = "--trainer.callbacks"
    line = [f"{prefix}+=test_divergence.Poison", f"{prefix}.at={at}", f"{prefix}.hook={hook}"]
    return [*line, f"{prefix}.name={name}", *([f"{prefix}.value={value}"] if value else [])]


def message_of(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.splitlines()[-1]


CASES = {
    "weights": (poison(3, "start", "discriminator"), "in step 8: train/loss is NaN for "),
    "the last step": (
        poison(5, "end", "adaptor", ".inf"),
        "adaptor.weight, adaptor.bias are NaN or infinite after step 12: fit again with a smaller "
        "model.adaptor_lr (now 0.0001) and model.discriminator_lr",
    ),
    "BatchNorm": (
        poison(2, "end", "discriminator.1.running_mean"),
        "discriminator.1.running_mean are NaN or infinite after step",
    ),
    "image": (poison(2, "start", "image"), "bottle/train/good/"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_fit_that_diverges_keeps_its_finite_state_under_another_name(
    case: str, mvtec_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more, message = CASES[case]
    assert main([*words(mvtec_root, "SimpleNet", "--trainer.max_epochs=3"), *more]) == 2
    last = message_of(capsys)
    assert message in last
    kept = [LAST.with_name(f"finite-step-{8 if case == 'the last step' else 4}.ckpt")]
    assert last.endswith(f"the last finite state is kept as {kept[0]}")
    assert list(Path("runs").rglob("*.ckpt")) == kept
    assert not not_finite(torch.load(kept[0], weights_only=True)["state_dict"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (poison(0, "start", "discriminator"), "nothing was learnt before"),
        (
            ["--model.adaptor_lr=1e30", "--model.discriminator_lr=1e30"],
            "smaller model.adaptor_lr (now 1e+30)",
        ),
        (poison(1, "start", "image"), "their pixels are NaN or infinite"),
    ],
)
def test_a_fit_that_diverges_at_once_leaves_no_folder(
    more: list[str], message: str, mvtec_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words(mvtec_root, "SimpleNet", "--trainer.max_epochs=2"), *more]) == 2
    assert message in message_of(capsys)
    assert not list(Path("runs").glob("*/*"))


@pytest.mark.parametrize("method", ["PaDiM", "PatchCore"])
@pytest.mark.parametrize("name", ["image", "backbone"])
def test_a_single_pass_stops(
    name: str, method: str, mvtec_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words(mvtec_root, method), *poison(1, "start", name)]) == 2
    last = message_of(capsys)
    assert "in batch 2: features is NaN for " in last
    assert f"{'their pixels' if name == 'image' else 'the frozen weights (random)'} are NaN" in last
    assert not list(Path("runs").glob("*/*"))


def test_weights_that_are_not_finite_are_refused_before_the_first_step(
    mvtec_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit = words(mvtec_root, "SimpleNet", "--trainer.max_epochs=1")
    assert main(fit) == 0
    checkpoint = torch.load(LAST, weights_only=True)
    checkpoint["state_dict"]["adaptor.bias"][0] = NAN
    torch.save(checkpoint, "bad.ckpt")
    capsys.readouterr()
    assert main([*fit, "--ckpt_path", "bad.ckpt", "--trainer.max_epochs=2"]) == 2
    assert (
        "its adaptor.bias are NaN or infinite before the first step: --ckpt_path bad.ckpt comes"
        in message_of(capsys)
    )
    assert not Path("runs/SimpleNet/2-fit").exists()


class Watched(LightningModule):
    """Method of a user's own, on plain tensors.

    Args:
        bad: Value that is not finite.
        at: Number of steps before.
    """

    def __init__(self, bad: str = "", at: int = 2) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.register_buffer("mask", torch.tensor([0.0, -INF]))
        self.register_buffer("unset", torch.tensor(NAN), persistent=False)
        self.bad, self.at = bad, at

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.layer(batch["image"]).square().mean()
        is_bad = batch_idx == self.at
        self.log("train/part", loss.detach() * (NAN if is_bad and self.bad == "part" else 1))
        if is_bad and self.bad in ("loss", "part"):
            loss = loss * INF
        return {"loss": loss, "other": torch.tensor(NAN)}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.layer.parameters(), lr=1e-3)


class Overwrite(Callback):
    """Overwrite a buffer or the optimiser's state of :class:`Watched`."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == pl_module.at and pl_module.bad == "state":
            state = trainer.optimizers[0].state[pl_module.layer[0].weight]
            state["exp_avg_sq"].fill_(INF)
        if batch_idx == pl_module.at and pl_module.bad == "mask":
            pl_module.get_buffer("mask")[0] = NAN


def fit_plain(module: LightningModule, folder: Path, **options: Any) -> Trainer:
    """Fit on five batches, with the callback and a checkpoint per step."""
    batches = [
        {"image": torch.randn(4, 2), "path": [f"{n}{i}.png" for i in "abcd"]} for n in range(5)
    ]
    checkpoint = ModelCheckpoint(
        folder, "last", every_n_train_steps=1, enable_version_counter=False, **options
    )
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        callbacks=[Overwrite(), FiniteValues(), checkpoint],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader: Any = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    trainer.fit(module, loader)
    return trainer


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("loss", "in step 3: loss is infinite for 2a.png, 2b.png, 2c.png and 1 more images: fit"),
        ("part", "loss is infinite, train/part is NaN for 2a.png"),
        ("state", "exp_avg_sq of layer.0.weight in the optimiser are NaN or infinite after step 3"),
        ("mask", "mask are NaN or infinite after step 3"),
    ],
)
@pytest.mark.parametrize("weights_only", [False, True])
def test_a_method_of_ones_own(bad: str, message: str, weights_only: bool, tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=message):
        fit_plain(Watched(bad), tmp_path, save_weights_only=weights_only)
    kept = tmp_path / "finite-step-2.ckpt"
    assert list(tmp_path.glob("*.ckpt")) == [kept]


@pytest.mark.parametrize("bad", ["loss", "state"])
def test_the_last_step_is_checked(bad: str, tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"(in|after) step 5"):
        fit_plain(Watched(bad, at=4), tmp_path)


def test_infinite_masks_and_values_that_are_not_saved_are_allowed(tmp_path: Path) -> None:
    fit_plain(Watched(), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_scaler_of_gradients_may_skip_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in precision 16-mixed: single infinite losses are skipped, endless ones are not."""
    monkeypatch.setattr("anomaly_clip.commands.divergence._has_scaler", lambda _: True)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(Watched())
    callback = FiniteValues()
    callback.on_fit_start(trainer, trainer.lightning_module)

    def step(loss: float) -> None:
        outputs = {"loss": torch.tensor(loss)}
        callback.on_train_batch_end(trainer, trainer.lightning_module, outputs, {}, 0)

    def end() -> None:
        callback.on_train_end(trainer, trainer.lightning_module)

    step(INF)
    with pytest.raises(Diverged, match="the loss of none of its steps was finite"):
        end()
    callback.on_fit_start(trainer, trainer.lightning_module)
    for loss in (INF, 1.0, *[NAN] * 19):
        step(loss)
    end()
    with pytest.raises(Diverged, match="loss is NaN"):
        step(NAN)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(NAN),
        torch.tensor([[1.0, -INF]]),
        torch.tensor([1, NAN], dtype=torch.bfloat16),
        torch.tensor([1, INF], dtype=torch.float16),
        torch.tensor([1, NAN], dtype=torch.float64),
        torch.tensor([complex(1, INF)]),
        torch.tensor([1, NAN]).to(torch.float8_e4m3fn),
        torch.tensor([0, NAN]).to_sparse(),
    ],
)
def test_values_that_are_not_finite(tensor: Tensor) -> None:
    assert not_finite({"a": torch.ones(2), "b": tensor, "c": torch.empty(0)}) == ["b"]


def test_finite_values() -> None:
    kinds = [torch.float32, torch.int64, torch.bool, torch.float16]
    assert not_finite({str(kind): torch.ones(2, dtype=kind) for kind in kinds}) == []


@pytest.fixture(scope="module")
def every_method(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """Return the module with a small fit of every method, and the folder of its data."""
    file = Path(__file__).parent / "golden" / "checkpoints" / "make.py"
    spec = importlib.util.spec_from_file_location("make_golden", file)
    assert spec is not None
    assert spec.loader is not None
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    folder = tmp_path_factory.mktemp("every")
    make.write_images(folder / "mvtec")
    make.write_wafers(folder / "wafers" / "MixedWM38.npz")
    make.write_weights(folder)
    for file in folder.glob("*.pt"):
        state = torch.load(file, weights_only=True)
        whole = {name: torch.empty(t.shape, dtype=t.dtype).copy_(t) for name, t in state.items()}
        torch.save(whole, file)
    return make, folder


@pytest.mark.slow
@pytest.mark.parametrize("hook", ["start", "end"])
@pytest.mark.parametrize(
    "name",
    ["sdp_plus", "clip_ada", "rd4ad", "simplenet", "regad", "linear_probe", "tab", "contrastive"],
)
def test_every_method_stops(
    name: str,
    hook: str,
    every_method: tuple[Any, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Weights become NaN before a step, or infinite after the first one."""
    make, folder = every_method
    monkeypatch.chdir(folder)
    line = ["fit", *make.METHODS[name]["fit"], "--output.folder", f"{name}-{hook}"]
    at = 0 if name == "tab" or hook == "end" else 1  # TAB's fit has a single step
    value = None if hook == "start" else ".inf"
    assert main([*line, *poison(at, hook, "trained", value)]) == 2
    assert "diverged" in message_of(capsys)
    left = list(Path(f"{name}-{hook}").rglob("*.ckpt"))
    assert all(file.name.startswith("finite-step-") for file in left)
    if at == 0:
        assert not Path(f"{name}-{hook}").exists()
    for file in left:
        assert not not_finite(torch.load(file, weights_only=True)["state_dict"])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["SimpleNet", "PaDiM"])
def test_processes_stop_together(method: str, mvtec_root: Path) -> None:
    """Only process 1 sees the image whose pixels are NaN."""
    epochs = ["--trainer.max_epochs=3"] if method == "SimpleNet" else []
    bad = [*poison(len(epochs), "start", "image"), "--trainer.callbacks.rank=1"]
    ddp = ["--trainer.strategy", "ddp", "--trainer.devices", "2"]
    done = run_command([*words(mvtec_root, method, *epochs), *ddp, *bad], processes=2)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2, last
    assert "the fit diverged in " in last
    assert "their pixels are NaN or infinite" in last
    assert done.stderr.count("the fit diverged") == 1
    assert not list(Path("runs").rglob("last.ckpt"))
    kept = [f"is kept as {file}" for file in Path("runs").rglob("finite-step-*.ckpt")]
    assert len(kept) == len(epochs)
    assert last.endswith("".join(kept))
