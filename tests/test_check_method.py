"""The checks of the contract fail for methods that break their promises."""

from __future__ import annotations

import json
import os
import random
import unittest
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from toy import Toy

from anomaly_clip.backbones.clip import CLIPBackbone, CLIPSettings
from anomaly_clip.records import Scores
from anomaly_clip.testing import Check, Outcome, check_method, contract_table, run_checks
from anomaly_clip.testing.images import write_images
from anomaly_clip.testing.run_files import compare_checkpoints
from anomaly_clip.testing.subject import Scorer, Subject, class_path, plain


class Flawed(Toy):
    """Brightness, with the flaw under test.

    Args:
        backbone: The CLIP.
        lr: Learning rate.
        evaluator: Settings of the metrics.
    """

    flaw: ClassVar[Callable[[Flawed, Scores, torch.Tensor, list[str]], None] | None] = None
    kept: ClassVar[list[torch.Tensor]] = []

    def score(self, images: torch.Tensor, categories: list[str]) -> Scores:
        pixels = images.float() / 255
        if images.is_floating_point():
            pixels = images * self.backbone.std + self.backbone.mean
        maps = pixels.mean(dim=1) + self.offset
        scores = Scores(image_score=maps.flatten(1).mean(dim=1), anomaly_map=maps)
        if Flawed.flaw is not None:
            Flawed.flaw(self, scores, images, categories)
        return scores


@pytest.fixture(scope="module")
def scorer(tiny_clip: CLIPBackbone) -> Any:
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (4, 3, 32, 32), dtype=np.uint8))
    method = Flawed(tiny_clip)
    method.offset.requires_grad_(False)
    return Scorer(method.eval(), images, ["a", "b", "a", "b"], list("wxyz"))


@pytest.fixture
def flaw() -> Iterator[Callable[[Any], None]]:
    def set_flaw(function: Any) -> None:
        Flawed.flaw = function

    yield set_flaw
    Flawed.flaw = None
    Flawed.kept.clear()


def copy_of(scorer: Any) -> Scorer:
    return scorer._replace(method=deepcopy(scorer.method), images=scorer.images.clone())


def checks(scorer: Any, kind: type[Toy] = Flawed) -> dict[str, Check]:
    """Return the checks by name, for a method that needs no run."""
    listed = check_method(kind)
    subject = listed[0].subject
    # The values of cached properties.
    vars(subject).update(scorer=scorer, built=scorer.method)
    vars(subject)["load"] = partial(copy_of, scorer)
    return {check.name: check for check in listed}


def reshaped(method: Toy, scores: Scores, *_: Any) -> None:
    scores["image_score"] = scores["image_score"][:, None]


def doubled(method: Toy, scores: Scores, *_: Any) -> None:
    scores["anomaly_map"] = scores["anomaly_map"].double()


def elsewhere(method: Toy, scores: Scores, *_: Any) -> None:
    scores["anomaly_map"] = scores["anomaly_map"].to("meta")


def infinite(method: Toy, scores: Scores, *_: Any) -> None:
    scores["anomaly_map"][0, 0, 0] = torch.inf


def constant(method: Toy, scores: Scores, *_: Any) -> None:
    scores["image_score"].zero_()


def drawn(method: Toy, scores: Scores, *_: Any) -> None:
    scores["image_score"] += torch.rand(len(scores["image_score"]))


def drawn_by_numpy(method: Toy, scores: Scores, *_: Any) -> None:
    np.random.random()


def drawn_by_python(method: Toy, scores: Scores, *_: Any) -> None:
    random.random()


def compared(method: Toy, scores: Scores, *_: Any) -> None:
    scores["image_score"] -= scores["image_score"].amax()


def placed(method: Toy, scores: Scores, *_: Any) -> None:
    scores["image_score"] += torch.arange(len(scores["image_score"]))


def depends_on_names(method: Toy, scores: Scores, images: Any, names: list[str]) -> None:
    scores["image_score"] += len(set(names))


def squeezed(method: Toy, scores: Scores, *_: Any) -> None:
    scores["image_score"] = scores["image_score"].squeeze()


def divided(method: Toy, scores: Scores, *_: Any) -> None:
    maps = scores["anomaly_map"]
    scores["anomaly_map"] = maps / maps.flatten(1).std(dim=1)[:, None, None]


def saturated(method: Toy, scores: Scores, images: torch.Tensor, *_: Any) -> None:
    colours = images.float().std(dim=1)
    scores["anomaly_map"] = scores["anomaly_map"] / colours


def viewed(method: Toy, scores: Scores, images: torch.Tensor, *_: Any) -> None:
    scores["image_score"] += images.as_strided((len(images),), (7,)).float()


def scaled(method: Toy, scores: Scores, images: torch.Tensor, *_: Any) -> None:
    scores["image_score"] += 3 * images.float().mean()


def overwritten(method: Toy, scores: Scores, images: torch.Tensor, *_: Any) -> None:
    images[0, 0, 0, 0] += 1


def learned(method: Toy, scores: Scores, *_: Any) -> None:
    method.offset.add_(1)


def tracked(method: Toy, scores: Scores, *_: Any) -> None:
    scores["image_score"].requires_grad_(True)


def moded(method: Toy, scores: Scores, *_: Any) -> None:
    scores["image_score"] += float(torch.is_inference_mode_enabled())


def chatty(method: Toy, scores: Scores, *_: Any) -> None:
    print("scoring")


def warned(method: Toy, scores: Scores, *_: Any) -> None:
    warnings.warn("slow", stacklevel=1)


def hoarding(method: Toy, scores: Scores, images: torch.Tensor, *_: Any) -> None:
    Flawed.kept.append(images.clone())


def rounded(method: Toy, scores: Scores, *_: Any) -> None:
    if torch.is_autocast_enabled("cpu"):
        scores["anomaly_map"] = scores["anomaly_map"].round()


FLAWS: dict[str, list[Any]] = {
    "scores_have_their_shapes": [reshaped],
    "scores_have_their_types": [doubled],
    "scores_stay_on_the_device": [elsewhere],
    "scores_are_finite": [infinite, constant],
    "scores_are_deterministic": [drawn],
    "image_alone_scores_as_in_a_batch": [compared],
    "order_does_not_matter": [placed],
    "neighbours_of_other_categories_do_not_matter": [depends_on_names],
    "one_image_has_scores": [squeezed],
    "constant_images_have_finite_scores": [divided],
    "grey_images_have_finite_scores": [saturated],
    "strided_images_score_alike": [viewed],
    "floating_images_score_like_uint8": [scaled],
    "images_stay_unchanged": [overwritten],
    "weights_stay_unchanged": [learned],
    "gradients_are_not_needed": [tracked],
    "inference_mode_is_supported": [moded],
    "global_random_states_are_unused": [drawn, drawn_by_numpy, drawn_by_python],
    "nothing_is_printed": [chatty, warned],
    "memory_does_not_grow": [hoarding],
    "half_precision_stays_close": [rounded],
}


@pytest.mark.parametrize(
    ("name", "broken"),
    [(name, function) for name, functions in FLAWS.items() for function in functions],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_flaw_is_found(scorer: Any, flaw: Callable[[Any], None], name: str, broken: Any) -> None:
    flaw(None)
    assert checks(scorer)[name].run().status == "passed"
    flaw(broken)
    target = copy_of(scorer) if broken in (overwritten, learned) else scorer
    outcome = checks(target)[name].run()
    assert outcome.status == "failed"
    assert outcome.message


@pytest.mark.parametrize("name", ["wrong_images_are_refused", "wrong_categories_are_refused"])
def test_a_method_that_takes_anything_is_found(scorer: Any, name: str) -> None:
    assert checks(scorer)[name].run().status == "passed"
    method = deepcopy(scorer.method)
    method.score = lambda images, categories: Scores(image_score=torch.zeros(1))
    outcome = checks(scorer._replace(method=method))[name].run()
    assert "without a word" in outcome.message


def test_a_transductive_method_swaps_the_checks_of_batches(
    scorer: Any, flaw: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    flaw(compared)
    monkeypatch.setattr(Flawed, "transductive", True)
    listed = checks(scorer)
    assert listed["image_alone_scores_as_in_a_batch"].run().status == "not applicable"
    assert listed["order_does_not_matter"].run().status == "passed"
    flaw(placed)
    assert listed["order_does_not_matter"].run().status == "failed"


# -- settings --------------------------------------------------------------------------------------


class Undocumented(Toy):
    """A method."""


class Forgetful(Toy):
    """A method that records too little, and a tensor.

    Args:
        backbone: The CLIP.
        lr: Learning rate.
        shift: Not recorded.
    """

    def __init__(self, backbone: CLIPSettings = CLIPSettings(), shift: int = 0) -> None:
        super().__init__(backbone)
        self.shift = shift
        self.hparams.clear()
        self.hparams.update(lr=torch.zeros(1))


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        (Undocumented, "arguments_are_documented", "lacks backbone, lr"),
        (Forgetful, "hyper_parameters_are_recorded", "does not record backbone, shift"),
        (Forgetful, "hyper_parameters_are_plain", "lr is a Tensor"),
        (Forgetful, "rebuilt_from_its_hyper_parameters", "unexpected keyword argument 'lr'"),
    ],
)
def test_wrong_settings_are_found(
    scorer: Any, tiny_clip: CLIPBackbone, kind: type[Toy], name: str, words: str
) -> None:
    target = scorer._replace(method=kind(tiny_clip))
    if name == "rebuilt_from_its_hyper_parameters":
        target.method.hparams["lr"] = 1.0
    outcome = checks(target, kind)[name].run()
    assert outcome.status == "failed"
    assert words in outcome.message


def test_contradicting_needs_are_found(scorer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert checks(scorer)["needs_are_declared"].run().status == "passed"
    monkeypatch.setattr(Flawed, "can_be_fitted", False)
    assert "cannot be" in checks(scorer)["needs_are_declared"].run().message


def test_unequal_initial_weights_are_found(scorer: Any) -> None:
    check = checks(scorer)["same_seed_same_initial_weights"]
    other = deepcopy(scorer.method)
    vars(check.subject)["build"] = lambda: other
    assert check.run().status == "passed"
    other.offset.data += 1
    assert "offset" in check.run().message


# -- runs ------------------------------------------------------------------------------------------


def subject_with(folder: Path, **parts: Any) -> dict[str, Check]:
    listed = check_method(Flawed)
    vars(listed[0].subject).update(folder=folder, **parts)  # the values of cached properties
    return {check.name: check for check in listed}


def write_run(folder: Path, content: dict[str, Any], rows: list[str]) -> Path:
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps(content))
    (folder / "scores.csv").write_text("\n".join(["path,image_score", *rows]) + "\n")
    return folder


def complete() -> dict[str, Any]:
    names = ("image_auroc", "image_ap", "image_f1_max", "pixel_auroc", "pixel_ap")
    values = {**dict.fromkeys((*names, "pixel_f1_max", "pixel_pro"), 0.5)}
    run = dict.fromkeys(("weights", "checkpoint", "seed", "versions", "environment"))
    run |= {"method": "Flawed", "protocol": {"images": {"a": 2}}}
    return {"mean": values, "categories": {"a": dict(values)}, "intervals": {}, "run": run}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content.pop("intervals"), "intervals"),
        (lambda content: content["run"].pop("environment"), "environment"),
        (lambda content: content["categories"]["a"].pop("pixel_pro"), "a lacks pixel_pro"),
        (lambda content: content["mean"].update(image_ap=1.5), "image_ap of mean is 1.5"),
        (lambda content: content["run"].update(method="Other"), "Other"),
    ],
)
def test_incomplete_metrics_are_found(tmp_path: Path, change: Any, words: str) -> None:
    content = complete()
    run = write_run(tmp_path / "good", content, ["x,1", "y,2"])
    assert subject_with(tmp_path, tested=run)["test_writes_complete_metrics"].run().error is None
    change(content)
    run = write_run(tmp_path / "bad", content, ["x,1", "y,2"])
    outcome = subject_with(tmp_path, tested=run)["test_writes_complete_metrics"].run()
    assert words in outcome.message


@pytest.mark.parametrize("rows", [["x,1"], ["x,1", "x,1"], ["x,1", "y,nan"]])
def test_incomplete_scores_are_found(tmp_path: Path, rows: list[str]) -> None:
    run = write_run(tmp_path / "run", complete(), rows)
    assert subject_with(tmp_path, tested=run)["scores_file_has_each_image"].run().status == "failed"


def checkpoint(file: Path, **parts: Any) -> Path:
    content = {
        "state_dict": {"offset": torch.zeros(2)},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0)}}}],
        "lr_schedulers": [],
        "global_step": 3,
        "epoch": 1,
        "backbone": {"sha256": "0"},
        "hyper_parameters": {"_class_path": "test_check_method.Flawed", "lr": 0.5, "evaluator": 0},
    }
    torch.save({**content, **parts}, file)
    return file


@pytest.mark.parametrize(
    "change",
    [
        {"state_dict": {"offset": torch.ones(2)}},
        {"state_dict": {"offset": torch.zeros(2), "more": torch.zeros(1)}},
        {"optimizer_states": [{"state": {0: {"step": torch.tensor(4.0)}}}]},
        {"lr_schedulers": [{"last_epoch": 1}]},
        {"global_step": 4},
        {"epoch": 2},
    ],
    ids=str,
)
def test_different_checkpoints_are_found(tmp_path: Path, change: dict[str, Any]) -> None:
    first, same = checkpoint(tmp_path / "a.ckpt"), checkpoint(tmp_path / "b.ckpt")
    compare_checkpoints(first, same)
    with pytest.raises(AssertionError):
        compare_checkpoints(first, checkpoint(tmp_path / "c.ckpt", **change))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("checkpoint_tells_its_method", {"hyper_parameters": {"lr": 0.5}}),
        ("checkpoint_has_no_frozen_weights", {"state_dict": {"backbone.x": torch.zeros(1)}}),
        ("fitted_values_are_finite", {"state_dict": {"offset": torch.tensor(torch.nan)}}),
        ("fit_keeps_the_frozen_backbone", {"backbone": {"sha256": "1"}}),
        ("checkpoint_loads_to_the_bit", {"state_dict": {"offset": torch.ones(())}}),
    ],
)
def test_wrong_checkpoints_are_found(
    tmp_path: Path, scorer: Any, name: str, change: dict[str, Any]
) -> None:
    good = {"backbone": {"sha256": scorer.method.backbone.identity}}
    good |= {"state_dict": {"offset": scorer.method.offset.detach()}}
    for parts, status in ((good, "passed"), ({**good, **change}, "failed")):
        file = checkpoint(tmp_path / f"{status}.ckpt", **parts)
        listed = subject_with(tmp_path, checkpoint=file, built=scorer.method, scorer=scorer)
        assert listed[name].run().status == status


def test_a_checkpoint_of_another_backbone_that_is_taken_is_found(
    tmp_path: Path, scorer: Any
) -> None:
    file = checkpoint(tmp_path / "a.ckpt", backbone={"sha256": scorer.method.backbone.identity})
    listed = subject_with(tmp_path, checkpoint=file, built=scorer.method)
    check = listed["another_backbone_is_refused"]

    def build() -> Flawed:
        return Flawed(CLIPBackbone.of(deepcopy(scorer.method.backbone)))

    vars(check.subject)["build"] = build
    scorer.method.backbone.__dict__.pop("identity", None)
    assert check.run().status == "passed"

    def careless() -> Flawed:
        method = build()
        method.on_load_checkpoint = lambda checkpoint: None  # type: ignore[method-assign]
        return method

    vars(check.subject)["build"] = careless
    assert "without a word" in check.run().message


# -- the list of checks ----------------------------------------------------------------------------


def passes(subject: Subject) -> None:
    """Pass."""


def fails(subject: Subject) -> None:
    """Fail."""
    raise AssertionError("broken")


def skips(subject: Subject) -> None:
    """Not for this method."""
    subject.require(False, "has no map")


def outcomes() -> dict[str, Outcome]:
    subject = Subject.of(Flawed, None, None, None, 0.1)
    listed = [
        Check("passes", passes, subject),
        Check("fails", fails, subject),
        Check("skips", skips, subject),
        Check("known", fails, subject, "not yet"),
        Check("mended", passes, subject, "not yet"),
    ]
    return {outcome.check.name: outcome for outcome in run_checks(listed)}


def test_outcomes_and_what_pytest_sees() -> None:
    by_name = outcomes()
    assert {name: outcome.status for name, outcome in by_name.items()} == {
        "passes": "passed",
        "fails": "failed",
        "skips": "not applicable",
        "known": "expected failure",
        "mended": "unexpected pass",
    }
    by_name["passes"].check()
    for name, kind, words in (
        ("fails", AssertionError, "broken"),
        ("skips", unittest.SkipTest, "Flawed has no map"),
        ("known", unittest.SkipTest, "expected failure: not yet"),
        ("mended", AssertionError, "remove it from expected_failures"),
    ):
        with pytest.raises(kind, match=words):
            by_name[name].check()
    assert by_name["fails"].check.description == "Fail."
    assert str(by_name["fails"].check) == "fails"


def test_the_table_has_a_column_per_method_and_the_reasons() -> None:
    listed = list(outcomes().values())
    text = contract_table({"A": listed, "B": listed[:1]})
    assert text.splitlines()[0] == "| check | A | B |"
    assert "| `passes` | yes | yes |" in text
    assert "| `fails` | FAILED |  |" in text
    assert "- A, `known`: not yet" in text
    assert "`skips`:" not in text


def test_at_least_thirty_checks_with_a_line_each() -> None:
    listed = check_method(Flawed)
    names = [check.name for check in listed]
    assert len(names) == len(set(names)) >= 50
    assert all(check.description.endswith(".") for check in listed)
    slow = [check.name for check in check_method(Flawed, slow=True)]
    fast = [check.name for check in check_method(Flawed, slow=False)]
    assert sorted([*slow, *fast]) == sorted(names)
    words = (
        "process",
        "bit",
        "leaves",
        "calibration",
        "repeats",
        "resumed",
        "batch_size",
        "exported",
    )
    assert all(any(word in name for word in words) for name in slow)


def test_an_expected_failure_of_no_check_is_refused() -> None:
    with pytest.raises(ValueError, match="did you mean scores_are_finite"):
        check_method(Flawed, expected_failures={"scores_are_finit": "why"})


def test_an_instance_gives_its_arguments(tiny_clip_config: str) -> None:
    settings = CLIPSettings(tiny_clip_config, "random")
    subject = check_method(Toy(settings, lr=0.25), arguments={"backbone": settings})[0].subject
    assert subject.arguments["lr"] == 0.25
    assert subject.arguments["backbone"]["name"] == tiny_clip_config
    assert "_class_path" not in subject.arguments


def test_a_class_inside_a_function_cannot_be_named() -> None:
    class Hidden(Toy):
        pass

    assert class_path(Toy) == "toy.Toy"
    with pytest.raises(ValueError, match="top level"):
        class_path(Hidden)


def test_plain_values() -> None:
    settings = CLIPSettings("a", "b")
    assert plain({"x": (1, Path("p")), "y": settings})["x"] == [1, "p"]
    assert plain(settings)["name"] == "a"


def test_random_states_and_environment_of_the_caller_are_kept() -> None:
    subject = check_method(Flawed)[0].subject
    before = torch.get_rng_state(), random.getstate(), dict(os.environ)
    with subject.isolated():
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)
        assert os.environ["ANOMALY_CLIP_CACHE"] == str(subject.folder / "cache")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), dict(os.environ)) == before[1:]


def test_images_have_mvtecs_layout(tmp_path: Path) -> None:
    root = write_images(tmp_path, ["oak"], num_train=2, num_test=1)
    files = sorted(str(path.relative_to(root / "oak")) for path in root.rglob("*.png"))
    defect = files[0].split("/")[1]
    assert files == [
        f"ground_truth/{defect}/000_mask.png",
        "test/good/000.png",
        f"test/{defect}/000.png",
        "train/good/000.png",
        "train/good/001.png",
    ]


@pytest.mark.slow
def test_a_method_of_ones_own_passes(tiny_clip_config: str) -> None:
    """Run the checks on a method outside the package, which is trained."""
    settings = {"name": tiny_clip_config, "pretrained": "random"}
    exceptions = {
        "arguments_are_documented": "a toy",
        "hyper_parameters_are_recorded": "the backbone is not recorded",
        "floating_images_score_like_uint8": "brightness of the input as it is",
        "losses_are_logged_and_finite": "logs nothing",
        "rebuilt_from_its_hyper_parameters": "the backbone is not recorded",
    }
    listed = check_method(
        Toy, arguments={"backbone": settings}, expected_failures=exceptions, slow=False
    )
    failed = {
        outcome.check.name: outcome.message
        for outcome in run_checks(listed)
        if outcome.status in ("failed", "unexpected pass")
    }
    assert failed == {}
