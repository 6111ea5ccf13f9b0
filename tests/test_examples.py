"""The programs in ``examples/``: the service, the watched folder, the lines of the Dockerfile."""

from __future__ import annotations

import asyncio
import csv
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import urllib.request
import venv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from calibrations import PADIM, photograph, write_photographs
from helpers import save_picture
from small_programs import write_detector

import anomaly_clip.runtime.detector as runtime
from anomaly_clip.cli import main

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
THRESHOLD = 100.0
"""The detector of these tests scores an image by its mean grey value."""


@pytest.fixture(autouse=True)
def restored_imports() -> Iterator[None]:
    """Forget the ``detector.py`` that an example has imported."""
    before = sys.path.copy()
    yield
    sys.path[:] = before
    sys.modules.pop("detector", None)


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxruntime")
    folder = write_detector(tmp_path_factory.mktemp("exported") / "detector")
    shutil.copy(runtime.__file__, folder / "detector.py")
    record = json.loads((folder / "detector.json").read_text())
    program = (folder / "detector.onnx").read_bytes()
    record["program"]["sha256"] = hashlib.sha256(program).hexdigest()
    record |= {"outputs": {"image_score": {}, "anomaly_map": {}}, "parity": {}}
    level = {"alpha": 0.25, "threshold": THRESHOLD, "as_asked": True, "sentence": "A guarantee."}
    record["calibration"] |= {
        "scores": [60.0, 80.0, THRESHOLD],
        "counts": None,
        "map_threshold": THRESHOLD,
        "bit_depth": None,
        "levels": [level],
    }
    (folder / "detector.json").write_text(json.dumps(record))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the calibrated run of a PaDiM."""
    folder = tmp_path_factory.mktemp("fit")
    write_photographs(folder / "parts" / "good", 24, seed=0)
    words = ["fit", *PADIM, f"--data.root={folder / 'parts'}", "--calibrate=true"]
    assert main([*words, "--calibration.alpha=[0.2]", f"--output.folder={folder / 'run'}"]) == 0
    return folder / "run"


def grey(path: Path, value: int) -> Path:
    return save_picture(path, np.full((20, 30, 3), value, np.uint8))


# The service


@dataclass
class Answer:
    status: int
    content: bytes

    def json(self) -> Any:
        return json.loads(self.content)


class Client:
    """Sends requests to an ASGI application in process; the body arrives in two pieces.

    FastAPI's own client needs other packages in other versions, and warns of some of them.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    def get(self, path: str) -> Answer:
        return asyncio.run(self._send("GET", path, b""))

    def post(self, path: str, content: bytes, kind: str = "application/octet-stream") -> Answer:
        return asyncio.run(self._send("POST", path, content, kind))

    async def _send(self, method: str, path: str, content: bytes, kind: str = "") -> Answer:
        path, _, query = path.partition("?")
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": query.encode(),
            "headers": [
                (b"content-type", kind.encode()),
                *([] if kind == "chunked" else [(b"content-length", b"%d" % len(content))]),
            ],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }
        middle = len(content) // 2
        pieces = [(content[:middle], True), (content[middle:], False)]
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            if not pieces:
                return {"type": "http.disconnect"}
            body, more = pieces.pop(0)
            return {"type": "http.request", "body": body, "more_body": more}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        await self.app(scope, receive, send)
        return Answer(sent[0]["status"], b"".join(each.get("body", b"") for each in sent))


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Client]:
    """Return a function that starts the service in process and returns a client."""
    pytest.importorskip("fastapi")

    def started(folder: Path) -> Client:
        monkeypatch.setenv("DETECTOR", str(folder))
        service = example("service")
        monkeypatch.setattr(service, "MAX_BYTES", 100_000)
        return Client(service.create_app())

    return started


@pytest.fixture
def client(start: Callable[[Path], Client], exported: Path) -> Client:
    return start(exported)


def test_the_service_decides(client: Client, tmp_path: Path) -> None:
    light, dark = grey(tmp_path / "light.png", 200), grey(tmp_path / "dark.png", 50)
    answer = client.post("/images/light.png", content=light.read_bytes())
    assert answer.status == 200
    assert answer.json() == {
        "decision": "anomalous",
        "p_value": 0.25,
        "score": 200.0,
        "guarantee": "A guarantee.",
    }
    answer = client.post("/images/dark", content=dark.read_bytes())  # the content has the format
    assert answer.json()["decision"] == "normal"
    assert answer.json()["p_value"] == 1.0
    assert client.get("/health").json() == {"status": "ok", "category": "plank"}


def test_the_service_draws(client: Client, tmp_path: Path) -> None:
    content = grey(tmp_path / "light.png", 200).read_bytes()
    answer = client.post("/images/light.png?overlay=true", content=content)
    (tmp_path / "overlay.png").write_bytes(answer.content)
    assert runtime.read_image(tmp_path / "overlay.png", None, 10**6).size == (30, 20)


@pytest.mark.parametrize(
    ("name", "content", "status", "message"),
    [
        ("a.png", b"no image", 400, "a.png: "),
        ("a.png", b"", 400, "a.png: "),
        ("a.dng", b"II*\0", 400, "a.dng: "),  # never the preview in a camera raw file
        ("a", b"no image", 400, "a: "),
        ("a." + "b" * 300, b"no image", 400, "a.b"),
        ("..", b"no image", 400, "..: "),
        (r"..\x.png", b"no image", 400, r"..\x.png: "),
        ("a.png", bytes(100_001), 413, "a.png: larger than 100000 bytes"),
    ],
)
def test_the_service_refuses(
    client: Client, name: str, content: bytes, status: int, message: str
) -> None:
    answer = client.post(f"/images/{name}", content=content)
    assert answer.status == status
    assert answer.json()["detail"].startswith(message)
    assert "image." not in answer.json()["detail"]


def test_the_service_refuses_content_of_unknown_size(client: Client) -> None:
    answer = client.post("/images/a.png", b"bytes", "chunked")
    assert answer.status == 413
    assert "unknown size" in answer.json()["detail"]


def test_several_threads_use_the_service(client: Client, tmp_path: Path) -> None:
    answers: dict[int, float] = {}

    def send(value: int) -> None:
        content = grey(tmp_path / f"{value}.png", value).read_bytes()
        answers[value] = client.post("/images/x.png", content=content).json()["score"]

    threads = [threading.Thread(target=send, args=(value,)) for value in range(0, 250, 25)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {value: pytest.approx(value) for value in range(0, 250, 25)}


def test_the_service_needs_a_folder(start: Callable[[Path], Client], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="not an exported detector: set the variable DETECTOR"):
        start(tmp_path / "none")


def test_without_a_calibration_there_is_only_a_score(
    start: Callable[[Path], Client], exported: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "detector"
    shutil.copytree(exported, folder)
    record = json.loads((folder / "detector.json").read_text())
    (folder / "detector.json").write_text(json.dumps(record | {"calibration": None}))
    content = grey(tmp_path / "light.png", 200).read_bytes()
    answer = start(folder).post("/images/light.png", content)
    assert answer.json() == {"decision": None, "p_value": None, "score": 200, "guarantee": None}


# The watched folder


@pytest.fixture
def watch(exported: Path, tmp_path: Path) -> Callable[..., Any]:
    """Return a function that starts to watch the folder ``photos``."""
    module, detector = example("watch_folder"), runtime.Detector(exported)
    (tmp_path / "photos").mkdir()

    def started(move: Path | None = None) -> Any:
        return module.Watcher(tmp_path / "photos", detector, tmp_path / "decisions.csv", move)

    return started


def rows(folder: Path) -> list[tuple[str, str]]:
    """Return file and decision of the rows of the results."""
    with (folder / "decisions.csv").open(newline="", encoding="utf-8") as file:
        return [(row["file"], row["decision"]) for row in csv.DictReader(file)]


def look_twice(watcher: Any) -> None:
    watcher.look()
    watcher.look()


def test_a_complete_image_is_decided_on_once(watch: Callable[..., Any], tmp_path: Path) -> None:
    watcher = watch()
    grey(tmp_path / "photos" / "light.png", 200)
    watcher.look()
    assert rows(tmp_path) == []
    watcher.look()
    assert rows(tmp_path) == [("light.png", "anomalous")]
    grey(tmp_path / "photos" / "dark.png", 50)
    look_twice(watcher)
    look_twice(watch())  # a restart
    assert rows(tmp_path) == [("light.png", "anomalous"), ("dark.png", "normal")]


def test_an_image_that_grows_is_waited_for(watch: Callable[..., Any], tmp_path: Path) -> None:
    watcher = watch()
    content = grey(tmp_path / "whole.png", 200).read_bytes()
    target = tmp_path / "photos" / "image.png"
    for end in (10, 40, len(content)):
        target.write_bytes(content[:end])
        watcher.look()
        assert rows(tmp_path) == []
    watcher.look()
    assert rows(tmp_path) == [("image.png", "anomalous")]


def test_the_same_size_at_another_time_is_a_change(
    watch: Callable[..., Any], tmp_path: Path
) -> None:
    watcher = watch()
    target = grey(tmp_path / "photos" / "image.bmp", 50)
    look_twice(watcher)
    grey(target, 200)
    os.utime(target, ns=(1, 1))
    look_twice(watcher)
    assert rows(tmp_path) == [("image.bmp", "normal"), ("image.bmp", "anomalous")]


def test_a_renamed_image_is_the_same_and_a_copy_is_not(
    watch: Callable[..., Any], tmp_path: Path
) -> None:
    watcher = watch()
    photos = tmp_path / "photos"
    grey(tmp_path / "photos" / "upload.part.png", 50).rename(photos / "upload.part")
    look_twice(watcher)
    (photos / "upload.part").rename(photos / "a.png")
    look_twice(watcher)
    (photos / "a.png").rename(photos / "b.png")
    look_twice(watcher)
    shutil.copy2(photos / "b.png", photos / "c.png")
    look_twice(watcher)
    (photos / "c.png").rename(photos / "d.png")
    look_twice(watch())
    assert rows(tmp_path) == [("a.png", "normal"), ("c.png", "normal")]


def test_other_files_are_left_alone(
    watch: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    watcher = watch()
    grey(tmp_path / "photos" / "sub" / "image.png", 50)
    grey(tmp_path / "photos" / ".hidden.png", 50)
    for name in ("a.txt", "b.txt", "c.dng"):
        (tmp_path / "photos" / name).touch()
    look_twice(watcher)
    assert rows(tmp_path) == []
    assert capsys.readouterr().err.splitlines() == [
        "files with suffix '.txt' are ignored",
        "files with suffix '.dng' are ignored",
    ]


def test_an_unreadable_image_is_reported_once_and_tried_again(
    watch: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    watcher = watch(tmp_path / "done")
    target = tmp_path / "photos" / "image.png"
    target.write_bytes(b"no image")
    look_twice(watcher)
    look_twice(watcher)
    look_twice(watch(tmp_path / "done"))
    assert rows(tmp_path) == [("image.png", "")]
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("unreadable ")
    assert target.exists()
    grey(target, 50)
    look_twice(watcher)
    assert rows(tmp_path)[1:] == [("image.png", "normal")]
    assert not target.exists()


def test_decided_images_are_moved_and_replace_nothing(
    watch: Callable[..., Any], tmp_path: Path
) -> None:
    done = tmp_path / "photos" / "done"
    for value in (50, 60, 70):
        grey(tmp_path / "photos" / "image.png", value)
        look_twice(watch(done))
    assert sorted(path.name for path in done.iterdir()) == [
        *("image.png", "image_2.png", "image_3.png")
    ]
    assert len(rows(tmp_path)) == 3


def test_a_kill_before_the_move_repeats_nothing(watch: Callable[..., Any], tmp_path: Path) -> None:
    grey(tmp_path / "photos" / "image.png", 50)
    look_twice(watch())
    watch(tmp_path / "done").look()
    assert (tmp_path / "done" / "image.png").exists()
    assert len(rows(tmp_path)) == 1


def test_a_kill_at_any_byte_of_a_row_loses_nothing(
    watch: Callable[..., Any], tmp_path: Path
) -> None:
    results = tmp_path / "decisions.csv"
    grey(tmp_path / "photos" / "a, with \n strange name.png", 50)
    grey(tmp_path / "photos" / "b.png", 200)
    look_twice(watch())
    complete = results.read_bytes()
    for end in range(len(complete)):
        results.write_bytes(complete[:end])
        look_twice(watch())
        assert results.read_bytes() == complete


def test_an_image_that_changes_while_it_is_read_waits(
    watch: Callable[..., Any], tmp_path: Path
) -> None:
    watcher = watch()
    target = grey(tmp_path / "photos" / "image.png", 50)
    predict = watcher.detector.predict

    def slow(images: list[Path]) -> Any:
        predictions = predict(images)
        grey(target, 200)
        os.utime(target, ns=(1, 1))
        return predictions

    watcher.detector = SimpleNamespace(predict=slow)
    look_twice(watcher)
    assert rows(tmp_path) == []
    watcher.detector = SimpleNamespace(predict=predict)
    look_twice(watcher)
    assert rows(tmp_path) == [("image.png", "anomalous")]


def test_a_locked_image_waits(
    watch: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    watcher = watch()
    grey(tmp_path / "photos" / "image.png", 50)

    def locked(path: Path, *_: object) -> None:
        raise PermissionError(f"{path.name}: in use")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", locked)
        look_twice(watcher)
    assert capsys.readouterr().err == "image.png: in use; the next looks try again\n"
    look_twice(watcher)
    assert rows(tmp_path) == [("image.png", "normal")]


def test_an_image_that_vanishes_is_forgotten(watch: Callable[..., Any], tmp_path: Path) -> None:
    watcher = watch()
    target = grey(tmp_path / "photos" / "image.png", 50)
    predict = watcher.detector.predict

    def late(images: list[Path]) -> Any:
        target.unlink()
        return predict(images)

    watcher.detector = SimpleNamespace(predict=late)
    look_twice(watcher)
    assert rows(tmp_path) == []


@pytest.mark.parametrize("content", ["my notes", "my,table\n1,2\n", "file,decision\n"])
def test_a_file_of_somebody_else_stays_as_it_is(
    watch: Callable[..., Any], tmp_path: Path, content: str
) -> None:
    (tmp_path / "decisions.csv").write_text(content)
    with pytest.raises(ValueError, match=r"decisions\.csv: not a file of this program"):
        watch()
    assert (tmp_path / "decisions.csv").read_text() == content


def test_ctrl_c_ends_the_watch(
    exported: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module, looks = example("watch_folder"), []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(module.time, "sleep", sleep)
    grey(tmp_path / "photos" / "image.png", 50)
    results = f"--results={tmp_path / 'decisions.csv'}"
    words = [str(tmp_path / "photos"), str(exported), results, "--interval=3"]
    assert module.main(words) == 130
    assert looks == [3, 3]
    assert rows(tmp_path) == [("image.png", "normal")]
    assert "the same command continues" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{none}", "{exported}"], "there is no such folder"),
        (["{photos}", "{photos}"], "not the folder of an exported detector"),
        (["{photos}", "{exported}", "--interval=0"], "give more than 0 seconds"),
        (["{photos}", "{exported}", "--move={photos}"], "name another folder"),
        (["{photos}", "{exported}", "--results={none}/a.csv"], "No such file or directory"),
    ],
)
def test_mistakes_of_the_watch_are_one_line(
    exported: Path,
    tmp_path: Path,
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    folders = {"none": tmp_path / "none", "photos": tmp_path / "photos", "exported": exported}
    assert example("watch_folder").main([word.format(**folders) for word in words]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


# The container


def install_lines() -> list[list[str]]:
    """Return the arguments of pip in the lines ``RUN pip ...`` of the Dockerfile."""
    text = (EXAMPLES / "Dockerfile").read_text()
    return [shlex.split(line) for line in re.findall(r"^RUN pip (.+)$", text, re.MULTILINE)]


def test_the_container_copies_files_that_exist() -> None:
    text = (EXAMPLES / "Dockerfile").read_text()
    assert len(install_lines()) == 2
    [line] = re.findall(r"^COPY (.+\.py) \./$", text, re.MULTILINE)
    assert all((EXAMPLES / name).is_file() for name in line.split())
    assert text.index("USER app") < text.index("CMD")


@pytest.fixture(scope="module")
def container(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder as the README's lines for a container fill it."""
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("container")
    assert main(["export", str(run), f"--folder={folder / 'detector'}"]) == 0
    for name in ("service.py", "watch_folder.py"):
        shutil.copy(EXAMPLES / name, folder)
    return folder


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*weights are random.*", "ignore:.*has random weights.*")
@pytest.mark.parametrize("versions", ["newest", "lowest"])
def test_the_install_lines_work_in_a_new_environment(
    container: Path, tmp_path: Path, versions: str
) -> None:
    if versions == "lowest" and sys.version_info >= (3, 13):
        pytest.skip("the lowest versions have no wheels for this Python")
    venv.create(tmp_path / "venv", with_pip=True)
    programs = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin")
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    images = save_picture(tmp_path / "defect.png", photograph(50, defect=16))

    def python(*words: str | Path) -> subprocess.CompletedProcess[str]:
        command = [programs / "python", *words]
        return subprocess.run(
            command, env=environment, cwd=container, capture_output=True, text=True, check=False
        )

    for line in install_lines():
        words = [word.replace(">=", "==") for word in line] if versions == "lowest" else line
        installed = python("-m", "pip", "--disable-pip-version-check", *words)
        if re.search(r"establish a new connection|timed out", installed.stderr):
            pytest.skip("pip reaches no index")
        assert installed.returncode == 0, installed.stderr
    assert python("-c", "import torch").returncode == 1
    checked = python("detector/detector.py", "--check")
    if checked.returncode:  # another Pillow than that of the export
        assert checked.stderr.startswith("check: images decoded or resized otherwise")
        assert "check: anomaly_map" not in checked.stderr
    decided = python("detector/detector.py", "--fail_on", "anomalous", images)
    assert decided.returncode == 3, decided.stderr
    assert decided.stdout.startswith("anomalous")

    command = [str(programs / "uvicorn"), "--factory", "service:create_app", "--port", "0"]
    with subprocess.Popen(
        command, env=environment, cwd=container, stderr=subprocess.PIPE, text=True
    ) as server:
        assert server.stderr is not None
        try:
            lines = iter(server.stderr.readline, "")
            [address] = next(
                m for m in (re.findall(r"http://[\d.:]+", line) for line in lines) if m
            )
            content = images.read_bytes()
            with urllib.request.urlopen(f"{address}/images/defect.png", content) as answer:
                assert json.load(answer)["decision"] == "anomalous"
        finally:
            server.terminate()


# The comparison


@pytest.mark.slow
def test_the_comparison_prints_a_table(tmp_path: Path) -> None:
    command: list[str | Path] = [sys.executable, EXAMPLES / "compare_methods.py"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "SDP, PaDiM, PatchCore on Demo: 1 category, percent" in run.stdout
    assert "RANDOM WEIGHTS" in (tmp_path / "comparison.html").read_text(encoding="utf-8")
    assert len(list((tmp_path / "runs").iterdir())) == 3
