"""Classes of the working folder, for names that a user has typed, and for no others."""

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers import save_picture

from anomaly_clip.cli import main
from anomaly_clip.commands.working_folder import import_named_classes
from anomaly_clip.errors import UserError

NAMES = ("wf_method", "wf_data", "wf_helper", "wf_pack", "wf_broken")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "wf_method.py").write_text("import wf_helper\nclass Mine: ...\nclass Other: ...\n")
    (tmp_path / "wf_helper.py").write_text("import sys\nPATH = list(sys.path)\n")
    (tmp_path / "wf_broken.py").write_text("import wf_no_such_library\n")
    (tmp_path / "wf_pack" / "deep").mkdir(parents=True)
    (tmp_path / "wf_pack" / "deep" / "er.py").write_text("class Mine:\n    class Inner: ...\n")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    yield tmp_path
    assert sys.path == before
    for name in [n for n in sys.modules if n.split(".")[0] in NAMES]:
        del sys.modules[name]


def imported(words: str) -> bool:
    import_named_classes(words.split())
    return "wf_method" in sys.modules


@pytest.mark.parametrize(
    "words",
    [
        "fit --model wf_method.Mine",
        "test --model=wf_method.Mine",
        "test --data wf_method.Mine --model SDP",
        "fit --trainer.callbacks+ wf_method.Mine",
        "fit --trainer.logger wf_method.Mine",
        "fit --model.class_path wf_method.Mine",
        "check --data wf_method.Mine",
        "report RUN --verify --allow wf_method.Mine",
    ],
)
def test_names_on_the_command_line(words: str) -> None:
    assert imported(words)


def test_the_folder_is_searched_last_and_helpers_are_found(folder: Path) -> None:
    assert imported("fit --model wf_method.Mine")
    assert sys.modules["wf_helper"].PATH[-1] == str(folder)


def test_a_list_of_callbacks() -> None:
    import_named_classes(["fit", "--trainer.callbacks", "[{class_path: wf_method.Mine}]"])
    assert "wf_method" in sys.modules


@pytest.mark.parametrize(
    "content",
    [
        "model: {class_path: wf_method.Mine}",
        "model: wf_method.Mine",
        "trainer: {callbacks: [{class_path: wf_method.Mine}]}",
        "data: {class_path: VisA, init_args: {auxiliary: {class_path: wf_method.Mine}}}",
        "model: model.yaml",
    ],
)
def test_names_in_a_configuration(content: str, folder: Path) -> None:
    (folder / "mine.yaml").write_text(content)
    (folder / "model.yaml").write_text("class_path: wf_method.Mine")
    assert imported("fit --config mine.yaml")


def test_a_package_and_a_class_within_a_class() -> None:
    import_named_classes(["fit", "--model", "wf_pack.deep.er.Mine"])
    import_named_classes(["fit", "--data", "wf_pack.deep.er.Mine.Inner"])
    assert hasattr(sys.modules["wf_pack.deep.er"], "Mine")


def test_names_of_others_are_not_imported(folder: Path) -> None:
    run = folder / "runs" / "mine" / "1"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "last.ckpt").touch()
    for name in ("config-fit.yaml", "config-each.yaml"):
        (run / name).write_text("model: {class_path: wf_method.Mine}")
    for words in (f"test --ckpt_path {run}", f"each --resume {run}", f"report {run}"):
        assert not imported(words)
    assert not imported(f"fit --output.name wf_method.Mine --data.root {folder}/wf_method.py")


def test_a_library_is_not_replaced(folder: Path) -> None:
    for name in ("torch", "json", "xmlrpc"):
        (folder / f"{name}.py").write_text("raise SystemExit")
    import_named_classes(["fit", "--model", "torch.nn.Linear", "--data", "xmlrpc.client.Fault"])
    assert "json" in importlib.import_module("json").__file__  # type: ignore[operator]


def test_a_file_with_the_name_of_an_installed_module(folder: Path) -> None:
    for module in ("colorsys", "json"):  # not loaded, or loaded
        (folder / f"{module}.py").write_text("class Mine: ...")
        with pytest.raises(UserError, match=f"{module}.py in this folder is not imported.*rename"):
            import_named_classes(["fit", "--model", f"{module}.Mine"])
    import_named_classes(["fit", "--model", "json.JSONDecoder"])  # of the library


def test_errors_of_the_module_keep_their_traceback() -> None:
    with pytest.raises(ModuleNotFoundError, match="wf_no_such_library"):
        main(["fit", "--model", "wf_broken.Mine"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--model wf_metod.Mine", "--model wf_metod.Mine: no module wf_metod.py in this folder"),
        ("--model wf_method.Min", "wf_method has no class Min; did you mean Mine?"),
        ("--config mine.yaml", "--config mine.yaml: no module wf_absent.py in this folder"),
    ],
)
def test_mistakes(
    words: str, expected: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "mine.yaml").write_text("data: {class_path: wf_absent.Data}")
    with pytest.raises(UserError, match=r"in this folder|has no class"):
        import_named_classes(["fit", *words.split()])
    assert main(["fit", *words.split()]) == 2
    out = capsys.readouterr().err.splitlines()
    assert len(out) == 1
    assert expected in out[0]


def test_files_in_place_of_a_class_are_no_modules(folder: Path) -> None:
    import_named_classes(["fit", "--data", "absent.yaml", "--model", "null"])
    (folder / "long.yaml").write_text("model: &a [*a]")
    import_named_classes(["fit", "--config", "long.yaml"])


def test_a_name_in_a_run_folder_is_refused_with_the_way_out(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = folder / "runs" / "mine" / "1"
    run.mkdir(parents=True)
    (run / "config-each.yaml").write_text("model: {class_path: wf_method.Mine}\ndata: Demo\n")
    (run / "each.json").write_text(f'{{"directory": "{folder}"}}')
    assert main(["each", "--resume", str(run)]) == 2
    assert "set PYTHONPATH=." in capsys.readouterr().err
    assert "wf_method" not in sys.modules


@pytest.mark.slow
def test_a_method_and_data_of_the_folder_run_in_several_processes(folder: Path) -> None:
    (folder / "wf_method.py").write_text(
        "import torch\nfrom anomaly_clip.methods import PatchCore\n"
        "class Mine(PatchCore):\n"
        '    """Mine."""\n'
        "    def __init__(self) -> None:\n"
        "        super().__init__(\n"
        '            {"name": "resnet18", "weights": "random"}, image_size=32, coreset=1.0,\n'
        "        )\n"
    )
    (folder / "wf_data.py").write_text(
        'from anomaly_clip.data import ImageFolder\nclass Photos(ImageFolder):\n    """Photos."""\n'
    )
    rng = np.random.default_rng(0)
    for number in range(16):
        for kind in ("good", "bad"):
            pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            save_picture(folder / "photos" / kind / f"{number}.png", pixels)
    code = "import sys; from anomaly_clip.cli import main; sys.exit(main(sys.argv[1:]))"
    (folder / "bin").mkdir()
    program = folder / "bin" / "command.py"
    program.write_text(code.replace("; ", "\n"))
    options = (
        "--model wf_method.Mine --data wf_data.Photos --data.root photos --data.test_share 0.5"
    )
    processes = "--trainer.accelerator cpu --trainer.strategy ddp --trainer.devices 2"
    words = ["each", *options.split(), *processes.split()]
    done = subprocess.run(
        [sys.executable, program, *words], capture_output=True, text=True, check=False
    )
    assert not done.returncode, done.stderr
    assert list(folder.glob("runs/*/*/metrics.json"))
