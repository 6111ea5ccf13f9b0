from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import MEAN, WORDS, Steps, quiet_trainer, save_picture, sdp_plus_command
from layouts import head_ct, visa
from safetensors.torch import load
from torch import Tensor
from torch.testing import assert_close

from anomaly_clip.backbones.clip import CLIPBackbone
from anomaly_clip.cache_files import forget_warnings, read_cached
from anomaly_clip.cli import main
from anomaly_clip.data import Demo, HeadCT, MVTecAD, Resize, VisA, transforms
from anomaly_clip.data import samples as samples_module
from anomaly_clip.data.feature_cache import FeatureCache, FeatureFiles
from anomaly_clip.data.samples import SampleDataset
from anomaly_clip.files import CACHE_VARIABLE, cache_folder
from anomaly_clip.methods import SDPPlus
from anomaly_clip.records import Encoder

SETTING = "model.feature_cache_gb"


@pytest.fixture
def auxiliary_root(tmp_path: Path) -> Path:
    return visa(tmp_path / "visa")


def fitted(
    clip: CLIPBackbone, root: Path, auxiliary_root: Path, **options: Any
) -> tuple[SDPPlus, list[float]]:
    workers, stages = options.pop("workers", 0), options.pop("stages", None)
    method = SDPPlus(clip, WORDS, MEAN, stages, sigma=2.0, lr=1e-2, **options)
    auxiliary = VisA(str(auxiliary_root), batch_size=3)
    data = MVTecAD(str(root), auxiliary=auxiliary, num_workers=workers, val_split="test")
    steps = Steps()
    quiet_trainer(max_epochs=2, callbacks=[steps]).fit(method, data)
    return method, steps.losses


def files() -> list[Path]:
    return sorted((cache_folder() / "features").rglob("*.safetensors"))


def test_cached_features_reproduce_losses_and_metrics(
    tiny_clip: CLIPBackbone, mvtec_root: Path, auxiliary_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, expected = fitted(tiny_clip, mvtec_root, auxiliary_root, feature_cache_gb=0)
    assert files() == []
    first, losses = fitted(tiny_clip, mvtec_root, auxiliary_root)
    assert losses == pytest.approx(expected, rel=2e-3)
    assert losses != expected  # half precision
    assert plain.results is not None
    assert first.results is not None
    for name, value in plain.results["mean"].items():
        assert first.results["mean"][name] == pytest.approx(value, abs=0.02), name
    # A second run neither decodes nor encodes images.
    monkeypatch.setattr(samples_module, "open_image", None)
    monkeypatch.setattr(SDPPlus, "encode", None)
    for workers in (0, 2):
        again, repeated = fitted(tiny_clip, mvtec_root, auxiliary_root, workers=workers)
        assert repeated == losses
        assert again.results == first.results


def test_stages_without_the_last_keep_the_class_token(
    tiny_clip: CLIPBackbone, mvtec_root: Path, auxiliary_root: Path
) -> None:
    parts: list[dict[str, float | None]] = []
    for gb in (0.0, 20.0):
        options: dict[str, Any] = {"stages": [1, 2], "feature_cache_gb": gb}
        method, _ = fitted(tiny_clip, mvtec_root, auxiliary_root, **options)
        assert method.results is not None
        parts.append(method.results["mean"])
    assert parts[1] == pytest.approx(parts[0], abs=0.02)


class Halves:
    """An encoder that counts the images that it sees."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        self.seen += len(images)
        return {"small": images.float().mean(dim=(2, 3)), "large": images[:, :, ::2, ::2] / 3}


def dataset(root: Path, **options: Any) -> SampleDataset:
    return MVTecAD(str(root), image_size=24, **options).dataset("test")


def fill(
    data: SampleDataset,
    encode: Halves | None = None,
    key: str = "a",
    workers: int = 0,
    cache: FeatureCache | None = None,
) -> tuple[FeatureFiles, int]:
    encode = encode or Halves()
    encoder = Encoder(encode, key, torch.device("cpu"))
    features = (cache or FeatureCache(1.0, SETTING)).fill(data, encoder, 3, workers)
    assert features is not None
    return features, encode.seen


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_are_what_the_encoder_returned(mvtec_root: Path, workers: int) -> None:
    data = dataset(mvtec_root, mask_size=20)
    features, seen = fill(data, workers=workers)
    assert seen == len(data) + 1  # one image is encoded twice, to measure the size
    plain = [data[row] for row in range(len(data))]
    data.features = features
    for row, item in enumerate(plain):
        cached_item = data[row]
        expected = Halves()(item["image"].unsqueeze(0))
        assert set(cached_item["features"]) == {"small", "large"}
        for key, value in cached_item["features"].items():
            assert value.dtype == torch.float16
            assert_close(value, expected[key][0].half(), atol=0, rtol=0)
        assert torch.equal(cached_item["mask"], item["mask"])
        assert "image" not in cached_item
        assert (cached_item["label"], cached_item["category"], cached_item["path"]) == (
            item["label"],
            item["category"],
            item["path"],
        )
    assert fill(dataset(mvtec_root, mask_size=20))[1] == 0


def test_all_dependencies_are_part_of_the_file_name(mvtec_root: Path) -> None:
    _, seen = fill(dataset(mvtec_root))
    number = seen - 1
    assert fill(dataset(mvtec_root), key="b")[1] == seen
    for options in (
        {"resize": Resize("square_crop", 30, "lanczos")},
        {"mask_size": 20},
        {"mask_filter": "nearest"},
        {"mask_threshold": 0.0},
    ):
        assert fill(dataset(mvtec_root, **options))[1] == seen, options
    changed = mvtec_root / "bottle" / "test" / "good" / "000.png"
    save_picture(changed, np.full((40, 48, 3), 7, np.uint8))
    assert fill(dataset(mvtec_root))[1] == 2
    shutil.copytree(mvtec_root, mvtec_root.parent / "moved")  # content matters, not the path
    assert fill(dataset(mvtec_root.parent / "moved"))[1] == 0
    assert number == len(dataset(mvtec_root))


def test_changed_code_recomputes_features(
    mvtec_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, seen = fill(dataset(mvtec_root))
    changed = tmp_path / "transforms.py"
    changed.write_text("something else")
    monkeypatch.setattr(transforms, "__file__", str(changed))
    assert fill(dataset(mvtec_root))[1] == seen


def test_generated_images_are_identified_by_their_pixels() -> None:
    def demo(seed: int) -> SampleDataset:
        options: dict[str, Any] = {"picture_size": 64, "num_test": 2, "image_size": 24}
        return Demo(seed=seed, categories=["steel nut"], **options).dataset("test")

    assert fill(demo(0))[1] == 3
    assert fill(demo(0))[1] == 0
    assert fill(demo(1))[1] == 3


def test_truncated_files_of_an_interrupted_run_are_recomputed(mvtec_root: Path) -> None:
    class Interrupted(Halves):
        def __call__(self, images: Tensor) -> dict[str, Tensor]:
            if self.seen > 3:
                raise KeyboardInterrupt
            return super().__call__(images)

    data = dataset(mvtec_root)
    with pytest.raises(KeyboardInterrupt):
        fill(data, Interrupted())
    kept = files()
    assert len(kept) == 3
    kept[0].write_bytes(kept[0].read_bytes()[:-9])  # as after a power failure
    kept[1].write_bytes(b"")
    features, seen = fill(data)
    assert seen == len(data) - 1 + 1
    assert not list((cache_folder() / "features").rglob("*.tmp*"))
    data.features = features
    assert len([data[row] for row in range(len(data))]) == len(files())


def flip(file: Path, *places: float) -> None:
    content = bytearray(file.read_bytes())
    for place in places:
        content[int(place * (len(content) - 1))] ^= 1
    file.write_bytes(content)


def test_lost_features_are_encoded_again(
    tiny_clip: CLIPBackbone, mvtec_root: Path, auxiliary_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, losses = fitted(tiny_clip, mvtec_root, auxiliary_root)
    for number, file in enumerate(kept := files()):  # each is damaged in another way
        if number % 3:
            flip(file, 0.2 * (number % 5), 0.5, 0.9)
        else:
            file.unlink()
            file.mkdir()
    again, repeated = fitted(tiny_clip, mvtec_root, auxiliary_root)
    assert repeated == losses
    assert again.results == first.results
    assert files() == kept
    # Files that vanish or are damaged after the start of a fit only cost time, too.
    fill_once = FeatureCache.fill
    damaged: list[Path] = []

    def fill_and_lose(self: FeatureCache, *more: Any) -> FeatureFiles | None:
        features = fill_once(self, *more)
        assert features is not None
        for file in features.files[::2]:
            file.unlink(missing_ok=True)
        flip(features.files[1], 0.7)
        damaged.append(features.files[1])
        return features

    monkeypatch.setattr(FeatureCache, "fill", fill_and_lose)
    with pytest.warns(UserWarning, match="the cache folder .* cannot be used") as warned:
        lost, repeated = fitted(tiny_clip, mvtec_root, auxiliary_root)
    assert len([w for w in warned if "cache folder" in str(w.message)]) == 1
    assert repeated == losses
    assert lost.results == first.results
    assert damaged
    assert not any(file.exists() for file in damaged)  # made again by the next run


def test_a_batch_with_lost_features_has_images(mvtec_root: Path) -> None:
    data = dataset(mvtec_root)
    data.features, _ = fill(data)
    data.features.files[1].unlink()
    with pytest.warns(UserWarning, match="No such file"):
        assert ["image" in item for item in data.__getitems__([0, 1])] == [True, True]
    assert ["image" in item for item in data.__getitems__([0, 2])] == [False, False]


def test_processes_share_the_work(mvtec_root: Path) -> None:
    """Process 0 encodes its share before the second synchronisation of process 1."""
    data = dataset(mvtec_root)
    number, counts = len(data), []

    class Synchronisation:
        def __init__(self) -> None:
            self.calls = 0

        def __call__(self, success: bool) -> bool:
            self.calls += 1
            if self.calls == 2:
                other = FeatureCache(1.0, SETTING, processes=(2, 0))
                counts.append(fill(data, cache=other)[1])
            return success

    cache = FeatureCache(1.0, SETTING, processes=(2, 1), agree=Synchronisation())
    counts.append(fill(data, cache=cache)[1])
    assert counts == [number // 2 + 1, number // 2 + 1]
    assert len(files()) == number


def test_a_machine_with_a_separate_folder_encodes_everything(mvtec_root: Path) -> None:
    data = dataset(mvtec_root)
    features, _ = fill(data, cache=FeatureCache(1.0, SETTING, processes=(2, 1)))
    assert all(file.is_file() for file in features.files)


def test_if_one_process_fails_all_do(mvtec_root: Path) -> None:
    outcomes: list[bool] = []

    def agree(success: bool) -> bool:
        outcomes.append(success)
        return False

    with pytest.raises(ValueError, match="process 0 of 1: another process could not encode"):
        fill(dataset(mvtec_root), cache=FeatureCache(1.0, SETTING, agree=agree))
    with pytest.raises(ValueError, match="features of 8 images need"):
        fill(dataset(mvtec_root), cache=FeatureCache(1e-9, SETTING, agree=agree))
    assert outcomes == [True, True, False, False]


def test_features_beyond_half_precision_are_refused(mvtec_root: Path) -> None:
    encoder = Encoder(lambda images: {"a": images * 1e6}, "a", torch.device("cpu"))
    with pytest.raises(
        ValueError,
        match=r"features a exceed the range of half precision.*000.png.*feature_cache_gb to 0",
    ):
        FeatureCache(1.0, SETTING).fill(dataset(mvtec_root), encoder, 3, 0)
    assert files() == []


@pytest.fixture
def words(
    mvtec_root: Path, auxiliary_root: Path, tiny_clip_config: str, tmp_path: Path
) -> list[str]:
    words = sdp_plus_command(mvtec_root, auxiliary_root, tiny_clip_config, tmp_path / "runs")
    return [*words, "--trainer.max_epochs", "1"]


def test_too_many_features_are_reported_in_one_line(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--model.feature_cache_gb", "1e-6"]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "model.feature_cache_gb 1e-06: features of 6 images need " in last
    assert "or set the limit to 0 to disable the cache" in last
    assert files() == []
    assert main([*words, "--model.feature_cache_gb", "-1"]) == 2
    assert "must be 0 or more" in capsys.readouterr().err


@pytest.mark.parametrize("fault", ["no folder", "full while writing", "too little space"])
def test_a_folder_that_cannot_be_used_only_costs_time(
    fault: str,
    tiny_clip: CLIPBackbone,
    mvtec_root: Path,
    auxiliary_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, losses = fitted(tiny_clip, mvtec_root, auxiliary_root)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "other"))
    if fault == "no folder":
        (tmp_path / "other").write_text("")
    elif fault == "full while writing":
        ordinary, count = Path.write_bytes, [0]

        def full(path: Path, content: bytes) -> int:
            count[0] += path.suffix == ".safetensors"
            if path.suffix == ".safetensors" and count[0] > 3:
                ordinary(path, content[: len(content) // 2])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            return ordinary(path, content)

        monkeypatch.setattr(Path, "write_bytes", full)
    else:
        usage = shutil.disk_usage("/")._replace(free=10)
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.warns(UserWarning, match=r"cannot be used \(.*ANOMALY_CLIP_CACHE") as warned:
        again, repeated = fitted(tiny_clip, mvtec_root, auxiliary_root)
    assert len([w for w in warned if "cache folder" in str(w.message)]) == 1
    assert repeated == losses  # also rounded to half precision
    assert again.results == first.results
    assert files() == []


def test_the_command_warns_in_one_line_of_a_run(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file"))
    for _ in range(2):
        with pytest.warns(UserWarning, match="cannot be used") as warned:
            assert main(words) == 0
        lines = [str(w.message) for w in warned if "cache folder" in str(w.message)]
        assert len(lines) == 1
        assert f"the cache folder {tmp_path / 'file'} cannot be used (" in lines[0]


def test_a_broken_image_is_named_when_features_are_encoded(
    words: list[str], auxiliary_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = sorted((auxiliary_root / "candle" / "Data" / "Images").rglob("*.JPG"))[0]
    broken.write_bytes(b"not an image")
    assert main(words) == 2
    assert str(broken) in capsys.readouterr().err


def size_of(folder: Path) -> int:
    """Return the size in bytes of the tensors in all files, without headers."""
    contents = [read_cached(file, file.stem) for file in folder.rglob("*.safetensors")]
    return sum(value.nbytes for content in contents for value in load(content or b"").values())


def test_the_limit_is_the_bytes_that_features_and_masks_take(
    mvtec_root: Path, tmp_path: Path
) -> None:
    data = dataset(mvtec_root)
    limit = size_of_features(data) / 1e9
    with pytest.raises(ValueError, match=r"features of 8 images need .* and 0 GB are already in"):
        fill(data, cache=FeatureCache(limit * 0.9999, SETTING, tmp_path / "below"))
    fill(data, cache=FeatureCache(limit, SETTING, tmp_path / "at"))
    assert size_of(tmp_path / "at") == pytest.approx(limit * 1e9)
    # Existing files count towards the limit, including their headers.
    used = sum(file.stat().st_size for file in (tmp_path / "at").rglob("*.safetensors"))
    more = dataset(mvtec_root, mask_size=20)
    needed = size_of_features(more)
    with pytest.raises(ValueError, match=r"features of 8 images need"):
        fill(more, cache=FeatureCache((used + needed - 1) / 1e9, SETTING, tmp_path / "at"))
    fill(more, cache=FeatureCache((used + needed + 1) / 1e9, SETTING, tmp_path / "at"))


def test_data_sets_without_masks_need_no_space_for_them(tmp_path: Path) -> None:
    data = HeadCT(str(head_ct(tmp_path / "ct")), image_size=24).dataset("test")
    limit = len(data) * 2 * (3 + 3 * 12 * 12) / 1e9
    with pytest.raises(ValueError, match="features of 4 images need"):
        fill(data, cache=FeatureCache(limit * 0.9999, SETTING))
    fill(data, cache=FeatureCache(limit, SETTING))
    assert size_of(cache_folder()) == pytest.approx(limit * 1e9)


def size_of_features(data: SampleDataset) -> int:
    """Return the expected bytes; an image has 3 + 12 x 12 x 3 values of two bytes, and a mask."""
    return len(data) * (2 * (3 + 3 * 12 * 12) + data.mask_size**2)


def test_one_gigabyte_of_the_disk_stays_free(
    mvtec_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = dataset(mvtec_root)
    needed = size_of_features(data)
    usage = shutil.disk_usage("/")

    def with_free(free: int) -> FeatureCache:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))
        return FeatureCache(1.0, SETTING, tmp_path / str(free))

    forget_warnings()
    cache, encoder = with_free(10**9 + needed - 1), Encoder(Halves(), "a", torch.device("cpu"))
    with pytest.warns(UserWarning, match="GB are free"):
        assert cache.fill(data, encoder, 3, 0) is None
    fill(data, cache=with_free(10**9 + needed + 1))


@pytest.mark.parametrize("error", [FileNotFoundError("a.png: no file"), OSError(errno.EIO, "bad")])
def test_an_image_that_one_process_cannot_read_fails_all(mvtec_root: Path, error: OSError) -> None:
    outcomes: list[bool] = []

    def agree(success: bool) -> bool:
        outcomes.append(success)
        return success

    class Failing(Halves):
        def __call__(self, images: Tensor) -> dict[str, Tensor]:
            raise error

    data = dataset(mvtec_root)
    cache = FeatureCache(1.0, SETTING, agree=agree)
    with pytest.raises(OSError, match=r"no file|bad"):
        fill(data, Failing(), cache=cache)
    assert outcomes == [False, False]
    outcomes.clear()
    fill(data, cache=cache)
    assert outcomes == [True, True, True]
    # The first two characters of a file's name name its folder.
    assert all(file.parent.name == file.stem[:2] for file in files())


def test_a_folder_that_another_process_cannot_use_is_used_by_none(mvtec_root: Path) -> None:
    answers = iter([True, False, True])  # checked; not all have written; no other failure
    cache = FeatureCache(1.0, SETTING, agree=lambda success: next(answers))
    encoder = Encoder(Halves(), "a", torch.device("cpu"))
    with pytest.warns(UserWarning, match="another process cannot use its folder"):
        assert cache.fill(dataset(mvtec_root), encoder, 3, 0) is None
