"""TorchScript archives are read without running anything."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from weight_forms import change_archive, write_archive

from anomaly_clip.backbones.torchscript import ArchiveError, _View, is_archive, read_archive


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("archive") / "ViT.pt"
    write_archive(path)
    return path


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("quick_gelu", [False, True])
def test_tensors_and_activation(tmp_path: Path, half: bool, quick_gelu: bool) -> None:
    state = write_archive(tmp_path / "ViT.pt", quick_gelu, half)
    content = read_archive(tmp_path / "ViT.pt")
    assert content.activation == ("QuickGELU" if quick_gelu else "GELU")
    assert set(content.state) == {*state, "attn_mask"}
    for key, value in state.items():
        assert content.state[key].dtype == value.dtype
        assert torch.equal(content.state[key], value)


def test_files_of_torch_save_are_no_archives(tmp_path: Path, archive: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pt")
    for path, expected in ((tmp_path / "a.pt", False), (archive, True)):
        with zipfile.ZipFile(path) as file:
            assert is_archive(file.namelist()) is expected


class Payload:
    """An object whose pickle calls a function."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


def global_call(module: str, name: str) -> bytes:
    """Return a pickle that calls ``module.name("ran")``."""
    return f"c{module}\n{name}\n(V".encode() + b"ran\ntR."


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(Payload(os.mkdir, "ran")),
        pickle.dumps(Payload(os.mkdir, "ran"), protocol=4),
        pickle.dumps(Payload(eval, "__import__('os').mkdir('ran')")),
        global_call("posix", "mkdir"),
        global_call("os", "mkdir"),
        global_call("torch.jit._pickle", "os.mkdir"),
        global_call("torch", "load"),
        global_call("torch._utils", "_rebuild_tensor"),
        global_call("collections", "namedtuple"),
        global_call("builtins", "getattr"),
        global_call("anomaly_clip.backbones.torchscript", "read_archive"),
    ],
)
def test_a_pickle_with_code_runs_nothing(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.chdir(tmp_path)
    changed = change_archive(archive, tmp_path / "evil.pt", {"data.pkl": content})
    with pytest.raises(ArchiveError, match="could run code, and is rejected"):
        read_archive(changed)
    assert [path.name for path in tmp_path.iterdir()] == ["evil.pt"]


def test_code_and_constants_are_never_read(archive: Path, tmp_path: Path) -> None:
    evil = pickle.dumps(Payload(os.mkdir, str(tmp_path / "ran")))
    with zipfile.ZipFile(archive) as file:
        names = [name.partition("/")[2] for name in file.namelist()]
    others = {name: evil for name in names if name.startswith(("code/", "constants"))}
    assert len(others) > 2
    changed = change_archive(archive, tmp_path / "other.pt", others)
    assert read_archive(changed).state.keys() == read_archive(archive).state.keys()
    assert not (tmp_path / "ran").exists()


STORAGE = b"(Vstorage\nctorch\nFloatStorage\nV0\nVcpu\nI616\ntQ"  # that of the text's 77 positions


def tensor(offset: int, size: str, stride: str) -> bytes:
    """Return a pickle of an object with one tensor as its attribute ``a``."""
    head = b"c__torch__\nModel\n)\x81}Va\nctorch._utils\n_rebuild_tensor_v2\n("
    return head + STORAGE + f"I{offset}\n({size}t({stride}tI00\n}}tRsb.".encode()


def test_a_view_within_its_storage(archive: Path, tmp_path: Path) -> None:
    content = tensor(6, "I2\nI3\n", "I3\nI1\n")
    changed = change_archive(archive, tmp_path / "a.pt", {"data.pkl": content})
    first = read_archive(archive).state["positional_embedding"]
    assert torch.equal(read_archive(changed).state["a"], first.flatten()[6:12].view(2, 3))


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (0, "I617\n", "I1\n"),
        (1, "I616\n", "I1\n"),
        (-1, "I2\n", "I1\n"),
        (5, "I2\n", "I-1\n"),
        (0, "I1000000000000\n", "I0\n"),
        (0, "I2\n", "I616\n"),
    ],
)
def test_a_view_outside_its_storage_is_refused(
    archive: Path, tmp_path: Path, offset: int, size: str, stride: str
) -> None:
    content = tensor(offset, size, stride)
    changed = change_archive(archive, tmp_path / "a.pt", {"data.pkl": content})
    with pytest.raises(ArchiveError, match="exceeds its 616 elements"):
        read_archive(changed)


@pytest.mark.parametrize(
    ("size", "stride"),
    [
        ((2, 2), (0, 1)),
        ((4,), (0,)),
        ((2, 2), (1, 1)),
        ((2, 1, 2), (1, 7, 1)),
        ((3, 2), (1, 2)),
        ((2, 3), (2, 1)),
    ],
)
def test_a_view_that_repeats_elements_is_refused(
    archive: Path, tmp_path: Path, size: tuple[int, ...], stride: tuple[int, ...]
) -> None:
    view = torch.arange(6).as_strided(size, stride)
    assert len(view.unique()) < view.numel()
    with pytest.raises(ArchiveError, match="repeats elements"):
        _View()(torch.arange(6), 0, size, stride)
    texts = ("".join(f"I{number}\n" for number in numbers) for numbers in (size, stride))
    changed = change_archive(archive, tmp_path / "a.pt", {"data.pkl": tensor(0, *texts)})
    with pytest.raises(ArchiveError, match=r"a tensor .* with strides .* repeats elements"):
        read_archive(changed)


@pytest.mark.parametrize(
    ("size", "stride"),
    [
        ((2, 2), (2, 1)),
        ((2, 2), (1, 2)),
        ((3, 2), (1, 3)),
        ((2, 1), (1, 0)),
        ((1, 4), (0, 1)),
        ((2, 2), (4, 1)),
        ((), ()),
        ((0, 3), (3, 1)),
    ],
)
def test_views_of_slices_and_transposes_are_read(
    size: tuple[int, ...], stride: tuple[int, ...]
) -> None:
    view = _View()(torch.arange(6), 0, size, stride)
    assert torch.equal(view, torch.arange(6).as_strided(size, stride))
    assert len(view.unique()) == view.numel()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.pkl": b""}, "data.pkl is damaged"),
        ({"data.pkl": b"\x80\x02"}, "data.pkl is damaged"),
        ({"data.pkl": b"(Vstorage\ntQ."}, "data.pkl is damaged"),
        ({"data.pkl": b"(VfileNV0\nVcpu\nI1\ntQ."}, "is damaged"),
        ({"data/0": b"1234"}, "the tensor data/0 has 4 bytes"),
        ({"byteorder": b"big"}, "byte order is b'big'"),
    ],
)
def test_damaged_archives(
    archive: Path, tmp_path: Path, changes: dict[str, bytes], message: str
) -> None:
    changed = change_archive(archive, tmp_path / "a.pt", changes)
    with pytest.raises(ArchiveError, match=message):
        read_archive(changed)


def test_entries_that_are_compressed_or_missing(archive: Path, tmp_path: Path) -> None:
    for name, kind, message in (
        ("data.pkl", zipfile.ZIP_DEFLATED, "is compressed"),
        ("data/1", None, "has no entry"),
    ):
        with zipfile.ZipFile(archive) as old, zipfile.ZipFile(tmp_path / "a.pt", "w") as new:
            for entry in old.infolist():
                if not entry.filename.endswith(f"/{name}"):
                    new.writestr(entry.filename, old.read(entry))
                elif kind is not None:
                    new.writestr(entry.filename, old.read(entry), kind)
        with pytest.raises(ArchiveError, match=message):
            read_archive(tmp_path / "a.pt")


def test_modules_in_a_circle_and_shared_ones_come_to_an_end(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = b"c__torch__\nModel\n)\x81"
    circle = model + b"p1\n}Va\ng1\nsb."
    changed = change_archive(archive, tmp_path / "a.pt", {"data.pkl": circle})
    assert read_archive(changed).state == {}
    shared = model + b"p0\n0"
    for level in range(40):  # each object has the one before as two of its attributes
        shared += model + f"}}Va\ng{level}\nsVb\ng{level}\nsbp{level + 1}\n0".encode()
    shared += b"g40\n."
    monkeypatch.setattr("anomaly_clip.backbones.torchscript.MAX_ATTRIBUTES", 1000)
    changed = change_archive(archive, tmp_path / "b.pt", {"data.pkl": shared})
    with pytest.raises(ArchiveError, match="more than 1000 attributes"):
        read_archive(changed)


def test_attributes_cannot_change_the_reader(archive: Path, tmp_path: Path) -> None:
    """BUILD sets attributes; on a function of the reader this fails."""
    for target in (b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nFloatStorage\n"):
        content = target + b"(N}V__call__\ncollections\nOrderedDict\nstb."
        content = content.replace(b"V__call__\ncoll", b"V__call__\nccoll")
        changed = change_archive(archive, tmp_path / "a.pt", {"data.pkl": content})
        with pytest.raises(ArchiveError, match="is damaged"):
            read_archive(changed)
    assert read_archive(archive).state
