"""Checks of ``score`` in memory, on the method that a test leaves behind."""

from __future__ import annotations

import contextlib
import gc
import io
import random
import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from anomaly_clip.backbones.frozen import FrozenBackbone
from anomaly_clip.records import Scores
from anomaly_clip.testing.subject import Flat, Scorer, Subject, flat

__all__ = [
    "constant_images_have_finite_scores",
    "floating_images_score_like_uint8",
    "global_random_states_are_unused",
    "gradients_are_not_needed",
    "grey_images_have_finite_scores",
    "half_precision_stays_close",
    "image_alone_scores_as_in_a_batch",
    "images_stay_unchanged",
    "inference_mode_is_supported",
    "memory_does_not_grow",
    "neighbours_of_other_categories_do_not_matter",
    "nothing_is_printed",
    "one_image_has_scores",
    "order_does_not_matter",
    "scores_are_deterministic",
    "scores_are_finite",
    "scores_have_their_shapes",
    "scores_have_their_types",
    "scores_stay_on_the_device",
    "strided_images_score_alike",
    "weights_stay_unchanged",
    "wrong_categories_are_refused",
    "wrong_images_are_refused",
]

TOLERANCE = 1e-3
"""Largest difference that summation in another order may cause, as a fraction of the range.

Frozen networks in float32 differ by about 1e-6 of a feature between batch sizes; nearest
neighbours, inverse covariances and softmaxes with a low temperature amplify that.
"""


def _scorer(subject: Subject) -> Scorer:
    subject.require(subject.scores, "is not a detector")
    return subject.scorer


def _inductive(subject: Subject) -> Scorer:
    subject.require(not subject.is_transductive, "is transductive: scores depend on other images")
    return _scorer(subject)


def scores_have_their_shapes(subject: Subject) -> None:
    """``image_score`` is (B,), ``anomaly_map`` (B, h, w), ``score_parts`` (B, parts) if any."""
    scorer = _scorer(subject)
    scores, count = scorer.score(), len(scorer.images)
    assert scores["image_score"].shape == (count,), tuple(scores["image_score"].shape)
    if "anomaly_map" in scores:
        shape = tuple(scores["anomaly_map"].shape)
        assert len(shape) == 3, f"anomaly_map is {shape}, not (B, h, w)"
        assert shape[0] == count, f"anomaly_map is {shape} for {count} images"
    names = scorer.method.score_part_names
    assert ("score_parts" in scores) == bool(names), f"score_part_names is {names}"
    if "score_parts" in scores:
        shape = tuple(scores["score_parts"].shape)
        assert shape == (count, len(names)), f"score_parts is {shape} for the names {names}"
    unknown = {name.partition(".")[0] for name in scores} - set(Scores.__annotations__)
    assert not unknown, f"score returns unknown keys: {', '.join(sorted(unknown))}"


def scores_have_their_types(subject: Subject) -> None:
    """All scores are float32 tensors."""
    for name, value in _scorer(subject).score().items():
        assert isinstance(value, Tensor), f"{name} is a {type(value).__name__}"
        assert value.dtype == torch.float32, f"{name} is {value.dtype}"


def scores_stay_on_the_device(subject: Subject) -> None:
    """Scores are on the device of the method; no tensor comes from another one."""
    scorer = _scorer(subject)
    device = scorer.method.device
    for name, value in scorer.score(scorer.images.to(device)).items():
        assert value.device == device, f"{name} is on {value.device}, the method on {device}"


def scores_are_finite(subject: Subject) -> None:
    """Scores and maps of photographs are finite and not all equal."""
    scores = _scorer(subject).score()
    _check_finite(scores)
    spread = float(scores["image_score"].std())
    assert spread > 0, "all images have the same score"


def scores_are_deterministic(subject: Subject) -> None:
    """Scoring twice gives the same numbers to the bit."""
    scorer = _scorer(subject)
    _check_equal(scorer.score(), scorer.score(), "a second call")


def image_alone_scores_as_in_a_batch(subject: Subject) -> None:
    """An image has the same score alone as in a batch, up to the order of sums."""
    scorer = _inductive(subject)
    alone = [
        scorer.score(scorer.images[row : row + 1], scorer.categories[row : row + 1])
        for row in range(len(scorer.images))
    ]
    joined = {key: torch.cat([scores[key] for scores in alone]) for key in alone[0]}
    _check_close(scorer.score(), joined, TOLERANCE, "an image alone")


def order_does_not_matter(subject: Subject) -> None:
    """Permuted images have permuted scores."""
    scorer = _scorer(subject)
    scores, rows = scorer.score(), list(range(len(scorer.images)))
    for order in (rows[::-1], rows[2:] + rows[:2]):
        permuted = scorer.score(scorer.images[order], [scorer.categories[row] for row in order])
        expected = {key: value[order] for key, value in scores.items()}
        _check_close(expected, permuted, TOLERANCE, f"the order {order}")


def neighbours_of_other_categories_do_not_matter(subject: Subject) -> None:
    """A batch of several categories has the scores of one batch per category."""
    scorer = _inductive(subject)
    names = sorted(set(scorer.categories))
    subject.require(len(names) > 1, "is a model of one category")
    together = scorer.score()
    for name in names:
        rows = [row for row, category in enumerate(scorer.categories) if category == name]
        apart = scorer.score(scorer.images[rows], [name] * len(rows))
        expected = {key: value[rows] for key, value in together.items()}
        _check_close(expected, apart, TOLERANCE, f"a batch of {name} only")


def one_image_has_scores(subject: Subject) -> None:
    """A batch of one image keeps its batch dimension; a transductive method may refuse it."""
    scorer = _scorer(subject)
    image = scorer.images[:1]
    if subject.is_transductive and _refusal(lambda: scorer.score(image)):
        return
    for name, value in scorer.score(image).items():
        assert len(value) == 1, f"{name} is {tuple(value.shape)} for one image"


def constant_images_have_finite_scores(subject: Subject) -> None:
    """Black, white and grey images, whose features have no contrast, have finite scores."""
    scorer = _scorer(subject)
    shape = scorer.images.shape[1:]
    images = torch.stack([torch.full(shape, value, dtype=torch.uint8) for value in (0, 255, 127)])
    _check_finite(scorer.score(images, 3 * scorer.categories[:1]))


def grey_images_have_finite_scores(subject: Subject) -> None:
    """Images with three equal channels have finite scores."""
    scorer = _scorer(subject)
    grey = scorer.images.float().mean(dim=1, keepdim=True).to(torch.uint8)
    _check_finite(scorer.score(grey.expand_as(scorer.images).contiguous()))


def strided_images_score_alike(subject: Subject) -> None:
    """Images that are not contiguous in memory, such as permuted arrays, have the same scores."""
    scorer = _scorer(subject)
    strided = scorer.images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    _check_close(scorer.score(), scorer.score(strided), TOLERANCE, "images with other strides")


def floating_images_score_like_uint8(subject: Subject) -> None:
    """Images that the caller has normalised have the scores of their uint8 originals."""
    scorer = _scorer(subject)
    backbone = scorer.method.backbone
    normalised = (scorer.images.float() / 255 - backbone.mean) / backbone.std
    _check_close(scorer.score(), scorer.score(normalised), TOLERANCE, "normalised images")


def images_stay_unchanged(subject: Subject) -> None:
    """Scoring does not write into its input."""
    scorer = _scorer(subject)
    images, categories = scorer.images.clone(), list(scorer.categories)
    scorer.score(images, categories)
    assert torch.equal(images, scorer.images), "score has changed the images"
    assert categories == scorer.categories, "score has changed the categories"


def weights_stay_unchanged(subject: Subject) -> None:
    """Scoring changes no parameter and no buffer."""
    scorer = _scorer(subject)
    before = {key: value.clone() for key, value in scorer.method.state_dict().items()}
    scorer.score()
    after = scorer.method.state_dict()
    assert list(after) == list(before), "score has added or removed tensors of the state"
    changed = [key for key, value in before.items() if not _same(value, after[key])]
    assert not changed, f"score has changed {changed[0]}"


def gradients_are_not_needed(subject: Subject) -> None:
    """Scores carry no graph without gradients, and none reaches the frozen backbone."""
    scorer = _scorer(subject)
    for name, value in scorer.score().items():
        assert not value.requires_grad, f"{name} requires a gradient"
    trainable = [n for n, p in scorer.method.backbone.named_parameters() if p.requires_grad]
    assert not trainable, f"the frozen backbone trains {trainable[0]}"


def inference_mode_is_supported(subject: Subject) -> None:
    """Scores in torch.inference_mode equal those in torch.no_grad."""
    scorer = _scorer(subject)
    with torch.inference_mode():
        inferred = flat(scorer.method.score(scorer.images, scorer.categories))
    _check_equal(scorer.score(), inferred, "inference mode")


def global_random_states_are_unused(subject: Subject) -> None:
    """Scores do not depend on global random states, and leave those of torch and NumPy alone."""
    scorer = _scorer(subject)
    first = scorer.score()
    with subject.isolated():
        torch.manual_seed(12345)
        np.random.seed(12345)
        random.seed(12345)
        before = torch.get_rng_state(), random.getstate()
        drawn = np.random.RandomState(12345).random()  # the first number of NumPy's generator
        again = scorer.score()
        assert torch.equal(before[0], torch.get_rng_state()), "score draws from torch's generator"
        assert before[1] == random.getstate(), "score draws from Python's generator"
        assert drawn == np.random.random(), "score draws from NumPy's generator"
    _check_equal(first, again, "another global seed")


def nothing_is_printed(subject: Subject) -> None:
    """Scoring prints nothing and warns of nothing."""
    scorer = _scorer(subject)
    printed = io.StringIO()
    with (
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
        warnings.catch_warnings(record=True) as warned,
    ):
        warnings.simplefilter("always")
        scorer.score()
    assert not printed.getvalue(), f"score prints {printed.getvalue()!r}"
    assert not warned, f"score warns: {warned[0].message}"


def memory_does_not_grow(subject: Subject) -> None:
    """Scoring batch after batch keeps no further tensors."""
    scorer = _scorer(subject)
    scorer.score()
    gc.collect()
    gc.freeze()  # from here on, get_objects returns new objects only
    try:
        used = []
        for shift in range(1, 6):  # images that were not seen before
            scorer.score(torch.roll(scorer.images, shift, dims=-1))
            gc.collect()
            used.append(_new_tensor_bytes())
    finally:
        gc.unfreeze()
    grown = used[-1] - used[0]
    assert grown <= 0, f"four batches have left {grown:,} bytes of tensors in memory"


def half_precision_stays_close(subject: Subject) -> None:
    """With the backbone in bf16 under autocast, scores differ by less than the stated bound."""
    scorer = _scorer(subject)
    subject.require(isinstance(scorer.method.backbone, FrozenBackbone), "has no frozen backbone")
    expected = scorer.score()
    low = subject.load()
    low.method.backbone.cast(torch.bfloat16)
    with torch.autocast(low.images.device.type, torch.bfloat16):
        scores = low.score()
    for name, value in scores.items():
        assert value.dtype == torch.float32, f"{name} is {value.dtype} under autocast"
    _check_finite(scores)
    _check_close(expected, scores, subject.half_precision_bound, "bf16")


def wrong_images_are_refused(subject: Subject) -> None:
    """One image without a batch, four channels, integers and unscaled floats raise ValueError.

    Floating-point images from 0 to 1 are right for a backbone that does not normalise.
    """
    scorer = _scorer(subject)
    images = scorer.images
    _check_refused(lambda: scorer.score(images[0]), "an image without a batch dimension")
    _check_refused(lambda: scorer.score(torch.cat([images, images[:, :1]], 1)), "four channels")
    _check_refused(lambda: scorer.score(images.long()), "int64 images")
    full = images.float()
    full[..., 0, 0], full[..., 0, 1] = 0, 255
    _check_refused(lambda: scorer.score(full), "floating-point images from 0 to 255")
    if bool((scorer.method.backbone.mean != 0).all()):
        _check_refused(lambda: scorer.score(full / 255), "floating-point images from 0 to 1")


def wrong_categories_are_refused(subject: Subject) -> None:
    """A single text, or a list of another length, raises ValueError."""
    scorer = _scorer(subject)
    method, images, names = scorer.method, scorer.images, scorer.categories
    _check_refused(lambda: method.score(images, names[0]), "a text as categories")  # type: ignore[arg-type]
    _check_refused(lambda: method.score(images, names[:-1]), "too few categories")


# -- comparisons -----------------------------------------------------------------------------------


def _check_finite(scores: Flat) -> None:
    for name, value in scores.items():
        bad = int((~value.isfinite()).sum())
        assert not bad, f"{name} has {bad} values that are not finite"


def _check_equal(first: Flat, second: Flat, by: str) -> None:
    for name, value in first.items():
        assert _same(value, second[name]), f"{by} changes {name}"


def _check_close(expected: Flat, actual: Flat, bound: float, by: str) -> None:
    """Compare scores by a fraction of their range over all images."""
    for name, value in expected.items():
        assert isinstance(value, Tensor)
        difference = float((value - actual[name]).abs().max())
        spread = float(value.max() - value.min()) if value.numel() > 1 else float(value.abs().max())
        apart = difference / spread if spread else difference
        assert apart <= bound, f"{by} changes {name} by {apart:.2g} of its range, above {bound:g}"


def _same(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.equal(
        torch.nan_to_num(first.detach()), torch.nan_to_num(second.detach())
    )


def _check_refused(call: Callable[[], object], what: str) -> None:
    message = _refusal(call)
    assert message is not None, f"score takes {what} without a word"
    assert message, f"the refusal of {what} has no message"


def _refusal(call: Callable[[], object]) -> str | None:
    """Return the message of the ValueError that a call raises; None without one."""
    try:
        call()
    except ValueError as error:
        return str(error).strip()
    return None


def _new_tensor_bytes() -> int:
    """Return the bytes of the storages of all tensors since the last ``gc.freeze``."""
    storages = {}
    for entry in gc.get_objects():
        # isinstance would ask lazy objects for their class, which imports and warns.
        if issubclass(type(entry), Tensor) and entry.device.type != "meta":
            storage = entry.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
