"""Checks of ``fit``, of its checkpoint, and of what is restored from it."""

from __future__ import annotations

import math

import torch

from anomaly_clip.backbones.frozen import FrozenBackbone
from anomaly_clip.methods.evaluated import Exporter
from anomaly_clip.testing import callbacks
from anomaly_clip.testing.run_files import compare_checkpoints, load, read_rows
from anomaly_clip.testing.subject import Subject, class_path

__all__ = [
    "another_backbone_is_refused",
    "checkpoint_has_no_frozen_weights",
    "checkpoint_loads_to_the_bit",
    "checkpoint_loads_without_code",
    "checkpoint_tells_its_method",
    "fit_ends_well",
    "fit_keeps_the_frozen_backbone",
    "fit_repeats_whatever_the_global_random_states",
    "fitted_values_are_finite",
    "losses_are_logged_and_finite",
    "resumed_fit_equals_an_uninterrupted_one",
    "values_that_are_not_finite_end_a_fit",
    "weights_are_exported",
]


def _fittable(subject: Subject) -> None:
    subject.require(subject.can_be_fitted, "cannot be fitted")


def _trained(subject: Subject) -> None:
    _fittable(subject)
    subject.require(subject.is_trained, "is fitted in a single pass")


def fit_ends_well(subject: Subject) -> None:
    """``fit`` ends with 0 and leaves a checkpoint and its configuration."""
    _fittable(subject)
    assert (subject.fitted / "config-fit.yaml").is_file(), "fit has written no config-fit.yaml"
    assert subject.checkpoint.stat().st_size > 0, "the checkpoint is empty"


def losses_are_logged_and_finite(subject: Subject) -> None:
    """A method that is trained logs ``train/loss``, always finite."""
    _trained(subject)
    rows = [row for file in subject.fitted.rglob("metrics.csv") for row in read_rows(file)]
    losses = [float(row["train/loss"]) for row in rows if row.get("train/loss")]
    assert losses, "no train/loss is logged"
    assert all(math.isfinite(loss) for loss in losses), f"train/loss {losses}"


def checkpoint_loads_without_code(subject: Subject) -> None:
    """The checkpoint loads with ``torch.load(weights_only=True)``."""
    _fittable(subject)
    assert "state_dict" in load(subject.checkpoint), "the checkpoint has no state_dict"


def checkpoint_tells_its_method(subject: Subject) -> None:
    """The checkpoint names its class and holds the hyper-parameters."""
    _fittable(subject)
    recorded = load(subject.checkpoint).get("hyper_parameters", {})
    assert recorded.get("_class_path"), "the checkpoint does not name its class"
    name = recorded["_class_path"].rpartition(".")[2]
    assert name == class_path(subject.kind).rpartition(".")[2], recorded["_class_path"]
    missing = set(subject.built.hparams) - set(recorded)
    assert not missing, f"the checkpoint lacks {', '.join(sorted(missing))}"


def checkpoint_has_no_frozen_weights(subject: Subject) -> None:
    """The checkpoint of a method on a frozen backbone holds its hash instead of its weights."""
    _frozen(subject)
    content = load(subject.checkpoint)
    kept = [key for key in content["state_dict"] if key.startswith("backbone.")]
    assert not kept, f"the checkpoint holds the frozen {kept[0]}"
    assert content["backbone"]["sha256"], "the checkpoint holds no hash of the backbone"


def fitted_values_are_finite(subject: Subject) -> None:
    """All fitted tensors are finite."""
    _fittable(subject)
    for key, value in load(subject.checkpoint)["state_dict"].items():
        assert not value.is_floating_point() or value.isfinite().all(), f"{key} is not finite"


def fit_keeps_the_frozen_backbone(subject: Subject) -> None:
    """The weights of the frozen backbone are the same before and after the fit."""
    _frozen(subject)
    before = subject.built.backbone.identity
    after = load(subject.checkpoint)["backbone"]["sha256"]
    assert before == after, "the fit has changed the frozen backbone"


def checkpoint_loads_to_the_bit(subject: Subject) -> None:
    """A test restores the fitted tensors of the checkpoint to the bit."""
    _fittable(subject)
    subject.require(subject.scores, "is not a detector")
    state = subject.scorer.method.state_dict()
    content = load(subject.checkpoint)
    for key, value in (content.get("best") or {"state": content["state_dict"]})["state"].items():
        assert torch.equal(value, state[key]), f"{key} differs after loading"


def another_backbone_is_refused(subject: Subject) -> None:
    """A checkpoint is refused if the backbone has other weights than at the fit."""
    _frozen(subject)
    method = subject.build()
    for parameter in method.backbone.tower.parameters():  # type: ignore[union-attr]
        parameter.data += 0.1
        break
    content, message = load(subject.checkpoint), ""
    try:
        method.on_load_checkpoint(content)
    except ValueError as error:
        message = str(error)
    assert message, "a checkpoint of another backbone is loaded without a word"
    assert "backbone" in message, message


def fit_repeats_whatever_the_global_random_states(subject: Subject) -> None:
    """With one seed, a fit gives the same numbers to the bit; its steps draw nothing global."""
    _fittable(subject)
    again = subject.succeed("fit", **subject.with_callback(callbacks.DisturbRandomStates))
    compare_checkpoints(subject.checkpoint, again / "checkpoints" / "last.ckpt")


def resumed_fit_equals_an_uninterrupted_one(subject: Subject) -> None:
    """A fit that stops after an epoch and is resumed equals another one to the bit."""
    _trained(subject)
    stopped = subject.succeed("fit", **subject.with_callback(callbacks.StopAfterEpoch))
    file = stopped / "checkpoints" / "last.ckpt"
    steps = load(file)["global_step"], load(subject.checkpoint)["global_step"]
    subject.require(steps[0] < steps[1], "trains for a single epoch here")
    resumed = subject.succeed("fit", "--ckpt_path", str(file))
    compare_checkpoints(subject.checkpoint, resumed / "checkpoints" / "last.ckpt")


def values_that_are_not_finite_end_a_fit(subject: Subject) -> None:
    """A parameter that becomes NaN ends the fit with exit code 2, and no ``last.ckpt`` stays."""
    _trained(subject)
    finished = subject.run("fit", **subject.with_callback(callbacks.SpoilParameter))
    assert finished.code == 2, f"exit code {finished.code}: {finished.last_line}"
    assert "finite" in finished.last_line or "NaN" in finished.last_line, finished.last_line
    left = sorted(path.name for path in finished.folder.rglob("last.ckpt"))
    assert not left, "the fit has left a last.ckpt"


def weights_are_exported(subject: Subject) -> None:
    """``export`` writes the trained weights as a file that loads without running code."""
    _fittable(subject)
    subject.require(isinstance(subject.built, Exporter), "has no weights for other programs")
    folder = subject.folder / "exported"
    words = ["export", "--ckpt_path", str(subject.checkpoint), "--folder", str(folder)]
    finished = subject.command(words)
    assert finished.code == 0, finished.last_line
    assert any(folder.iterdir()), "export has written nothing"


def _frozen(subject: Subject) -> None:
    _fittable(subject)
    subject.require(subject.scores, "is not a detector")
    has_one = isinstance(getattr(subject.built, "backbone", None), FrozenBackbone)
    subject.require(has_one, "has no frozen backbone")


for _check in (
    fit_repeats_whatever_the_global_random_states,
    resumed_fit_equals_an_uninterrupted_one,
):
    _check.slow = True  # type: ignore[attr-defined]
