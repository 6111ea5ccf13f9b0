"""Shared functions of the benchmarks, their stored results, and the help of each script."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
RESULTS = sorted((BENCHMARKS / "results").glob("*.json"))
PARTS = {"common", "bare", "flops", "gpu_lab", "gpu_zero_shot", "gpu_equality", "gpu_training"}
PARTS |= {"musc_sequences"}
PARTS |= {f"soak_{part}" for part in ("common", "full", "fuzz", "kills", "mutations", "processes")}
SCRIPTS = sorted(file.stem for file in BENCHMARKS.glob("*.py") if file.stem not in PARTS)


@pytest.fixture(autouse=True, scope="module")
def _folder() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield


@pytest.fixture
def common() -> ModuleType:
    return import_module("common")


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.stem)
def test_a_stored_result_has_a_header_and_bounds(file: Path, common: ModuleType) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{file.name} contains {constant}, which is not valid JSON")

    content = json.loads(file.read_text(encoding="utf-8"), parse_constant=refuse)
    assert content["benchmark"] == file.stem
    header = content["header"]
    assert set(common.HEADER) <= set(header) <= {*common.HEADER, "note"}
    assert header["commit"]
    assert header["date"]
    unknown = [key for key in common.HEADER if header[key] is None]
    assert not unknown or "note" in header or unknown == ["threads"]
    for bound in content["bounds"].values():
        assert (
            {"value", "bound", "rule", "met"}
            <= set(bound)
            <= {"value", "bound", "rule", "met", "goal"}
        )
        value, rule, met = bound["value"], bound["rule"], bound["met"]
        assert rule in ("at most", "at least")
        if value is None:
            assert met is None
        elif value != bound["bound"]:  # values are rounded to six digits
            assert met == ((value < bound["bound"]) == (rule == "at most"))


def test_each_result_has_a_script() -> None:
    assert len(RESULTS) >= 16
    assert {file.stem for file in RESULTS} <= set(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_prints_its_help(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = import_module(name)
    assert Path(module.__file__ or "").parent == BENCHMARKS
    monkeypatch.setattr("sys.argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        module.main()
    assert stop.value.code == 0
    assert (module.__doc__ or "").split()[0] in capsys.readouterr().out


class Clock:
    """A clock that tasks advance."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_timer_interleaves_tasks_and_keeps_the_minimum(common: ModuleType) -> None:
    clock = Clock()
    order: list[str] = []
    seconds = {"a": iter([1.0, 5.0, 4.0, 6.0]), "b": iter([0.5, 2.0, 7.0, 3.0])}

    def task(name: str) -> None:
        order.append(name)
        clock.now += next(seconds[name])

    tasks = {"a": lambda: task("a"), "b": lambda: task("b")}
    assert common.fastest(3, tasks, clock=clock) == {"a": 4.0, "b": 2.0}  # without the warm-up
    assert order == ["a", "b"] * 4


def test_without_a_warm_up_the_first_round_counts(common: ModuleType) -> None:
    clock = Clock()
    seconds = iter([1.0, 5.0])

    def task() -> None:
        clock.now += next(seconds)

    assert common.fastest(2, {"a": task}, clock=clock, warm_up=0) == {"a": 1.0}


def test_bounds_are_met_on_the_right_side(common: ModuleType) -> None:
    assert common.at_most(1.25, 1.25)["met"] is True
    assert common.at_most(1.2500001, 1.25) == {
        "value": 1.25, "bound": 1.25, "rule": "at most", "met": False,
    }  # fmt: skip
    assert common.at_least(0.5, 0.4)["met"] is True
    assert common.at_least(0.3, 0.4)["met"] is False
    assert common.at_least(None, 0.4)["met"] is None


@pytest.mark.parametrize(("value", "status"), [(1.0, 0), (3.0, 1), (None, 0)])
def test_a_report_is_one_object_and_its_status_reflects_the_bounds(
    common: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    value: float | None,
    status: int,
) -> None:
    monkeypatch.setattr("sys.argv", ["/somewhere/thing.py", "--rounds", "3"])
    bounds = {"first": common.at_most(0.5, 1), "second": common.at_most(value, 2)}
    assert common.report("thing", {"seconds": 4.5}, bounds) == status
    written = json.loads(capsys.readouterr().out)
    assert list(written) == ["benchmark", "header", "seconds", "bounds"]
    assert written["header"]["command"] == "python benchmarks/thing.py --rounds 3"
    assert set(written["header"]) == set(common.HEADER)


def test_a_report_rejects_values_that_are_not_json(common: ModuleType) -> None:
    with pytest.raises(ValueError, match="JSON"):
        common.report("thing", {"seconds": float("nan")}, {})


def test_the_header_shortens_paths_to_their_last_part(common: ModuleType, tmp_path: Path) -> None:
    header = common.header("thing", [str(tmp_path / "tiles"), "--only", "a/b", "two words"])
    assert header["command"] == "python benchmarks/thing.py tiles --only a/b 'two words'"


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    command = ["git", *identity, *words]
    return subprocess.run(
        command, cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


def test_the_commit_is_that_of_the_checkout_or_unknown(
    common: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git(tmp_path, "init", "-q")
    inner = tmp_path / "inner"
    inner.mkdir()
    (tmp_path / "file").write_text("a")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    assert common.commit(tmp_path) == git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "file").write_text("b")
    assert common.commit(tmp_path) == git(tmp_path, "rev-parse", "HEAD") + "-dirty"
    assert common.commit(inner) == "unknown"
    monkeypatch.setenv("PATH", "")  # no git
    assert common.commit(tmp_path) == "unknown"


def write_results(folder: Path, results: Mapping[str, Any], commit: str | None = None) -> None:
    for name, bounds in results.items():
        header = {
            "commit": commit,
            "date": "2026-01-02T03:04:05",
            "machine": None,
            "command": "run",
        }
        content = {"benchmark": name, "header": header, "bounds": bounds}
        (folder / f"{name}.json").write_text(json.dumps(content))


def test_the_table_has_floors_goals_and_the_number_of_missed_bounds(
    common: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = {
        "one": {"speed": common.at_least(3.0, 2, 4), "size": common.at_most(9.0, 8, 7)},
        "two": {"drift": common.at_most(None, 1), "share": common.at_most(0.5, 1, 0.5)},
        "three": {},
    }
    write_results(tmp_path, results, "abcdef0123456789-dirty")
    assert import_module("status").print_table(tmp_path) == 1
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert table[:6] == [
        ["benchmark", "name", "value", "floor", "goal", "verdict"],
        ["one", "speed", "3", ">=", "2", ">=", "4", "met"],
        ["one", "size", "9", "<=", "8", "<=", "7", "MISSED"],
        ["three", "(no", "bound)"],
        ["two", "drift", "-", "<=", "1", "not", "measured"],
        ["two", "share", "0.5", "<=", "1", "<=", "0.5", "goal", "met"],
    ]
    assert table[7] == ["one:", "abcdef012-dirty,", "2026-01-02,", "unknown", "machine:", "run"]
    assert table[-1] == ["1", "of", "4", "bounds", "are", "missed:", "one"]


def test_a_graph_pays_after_the_images_whose_saving_is_its_cost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graphs = import_module("graphs")
    times = {"torch": 0.8, "onnx": 0.4, "compile": 1.2}  # of a batch of 4
    monkeypatch.setattr(graphs, "fastest", lambda rounds, tasks: times)
    ramp = np.arange(10.0, 15.0)
    maps = {"torch": ramp, "onnx": ramp - np.array([0, 0, 0.002, 0.004, 0]), "compile": ramp}
    tasks = {name: lambda _, values=values: (None, values) for name, values in maps.items()}
    row = graphs.measured(SimpleNamespace(image_size=2), tasks, 4, {"onnx": 3.05}, 1)
    assert row["fraction"] == {"onnx": 0.5, "compile": 1.5}
    assert row["images_to_pay"] == {"onnx": 31, "compile": None}  # 3.05 s / 0.1 s, upwards
    assert row["map_difference"] == pytest.approx(0.001)


def test_all_benchmarks_are_run_by_bench() -> None:
    scripts = {
        file.stem
        for file in BENCHMARKS.glob("*.py")
        if re.search(r"return report\(|= result\(", file.read_text(encoding="utf-8"))
    }
    run = [benchmark.name for benchmark in import_module("bench").BENCHMARKS]
    assert sorted(run) == sorted(scripts - {"common", "soak"})  # soak: make soak


def test_bench_gives_data_where_it_is_needed() -> None:
    bench = import_module("bench")
    benchmark = bench.Benchmark("a", (("", "tiles"),), (("--weights", "resnet"),), ("--fast",))
    with pytest.raises(LookupError, match=r"--tiles"):
        bench.arguments_of(benchmark, {"tiles": None, "resnet": Path("r")})
    assert bench.arguments_of(benchmark, {"tiles": Path("t")}) == ["--fast", "t"]
    given = {"tiles": Path("t"), "resnet": Path("r")}
    assert bench.arguments_of(benchmark, given) == ["--fast", "t", "--weights", "r"]


SCRIPT = """
import json, sys
ends = json.loads(open(sys.argv[1]).read())
print("a line before the result")
if ends["result"] is not None:
    print(json.dumps(ends["result"]))
sys.exit(ends["status"])
"""


@pytest.fixture
def bench_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, Path]:
    """Replace all benchmarks by one script, whose end a file determines."""
    bench = import_module("bench")
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "thing.py").write_text(SCRIPT)
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    monkeypatch.setattr(bench, "BENCHMARKS", (bench.Benchmark("thing", (("", "tiles"),)),))
    monkeypatch.setattr(bench, "commit", lambda: "abc")
    return bench, tmp_path


@pytest.mark.parametrize(
    ("value", "status", "expected", "message"),
    [
        (1.0, 0, 0, "thing: done"),
        (3.0, 1, 1, "thing: done"),  # a missed bound is a result
        (None, 0, 0, "thing: not run: a line before the result"),
        (None, 1, 1, "thing: failed with exit status 1; its stored result is unchanged"),
    ],
)
def test_bench_stores_results_of_complete_runs(
    common: ModuleType,
    bench_script: tuple[ModuleType, Path],
    capsys: pytest.CaptureFixture[str],
    value: float | None,
    status: int,
    expected: int,
    message: str,
) -> None:
    bench, folder = bench_script
    results = folder / "results"
    results.mkdir()
    write_results(results, {"thing": {"speed": common.at_most(2.0, 2)}}, "old")
    before = (results / "thing.json").read_text()
    bounds = {"speed": common.at_most(value, 2)}
    result = {"benchmark": "thing", "header": {"commit": "abc"}, "bounds": bounds}
    ends = folder / "ends.json"
    ends.write_text(json.dumps({"result": None if value is None else result, "status": status}))
    assert bench.main(["--tiles", str(ends)], results) == expected
    assert message in capsys.readouterr().err
    after = (results / "thing.json").read_text()
    assert (after == before) == (value is None)
    if value is not None:
        assert json.loads(after) == result
        assert bench.main(["--tiles", str(ends)], results) == expected
        assert "thing: not run: measured at this commit" in capsys.readouterr().err


def test_bench_names_what_is_missing(
    bench_script: tuple[ModuleType, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    bench, folder = bench_script
    assert bench.main([], folder) == 0
    assert "thing: not run: it needs --tiles" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench.main(["--tiles", str(folder / "nowhere")], folder)
    assert "nowhere does not exist" in capsys.readouterr().err


def test_the_table_of_clip_methods_has_mean_minimum_and_maximum_over_seeds() -> None:
    module = import_module("clip_methods_demo")
    rows = module.table(
        {
            "SDP": {
                501: {"image_auroc": 0.9, "pixel_auroc": 0.8, "pixel_ap": 0.5, "pixel_pro": None},
                502: {"image_auroc": 0.7, "pixel_auroc": 0.9, "pixel_ap": 0.6, "pixel_pro": None},
            }
        }
    )
    assert rows["SDP"]["mean"] == {"image_auroc": 0.8, "pixel_auroc": 0.85, "pixel_ap": 0.55}
    assert rows["SDP"]["min"] == {"image_auroc": 0.7, "pixel_auroc": 0.8, "pixel_ap": 0.5}
    assert rows["SDP"]["max"] == {"image_auroc": 0.9, "pixel_auroc": 0.9, "pixel_ap": 0.6}
    assert rows["SDP"]["seeds"]["502"]["image_auroc"] == 0.7


def test_bounds_of_clip_methods_need_both_rows() -> None:
    module = import_module("clip_methods_demo")
    mean = {"image_auroc": 0.9, "pixel_auroc": 0.9, "pixel_ap": 0.5}
    rows = {
        "SDP": {"mean": mean},
        "SDP+": {"mean": {**mean, "pixel_auroc": 0.87}},
        "APRIL-GAN": {"mean": mean},
        "APRIL-GAN, random weights": {"mean": {"pixel_ap": 0.05}},
    }
    bounds = module.bounds_of(rows)
    assert {name: bound["met"] for name, bound in bounds.items()} == {
        "SDP+ over SDP, image_auroc": True,
        "SDP+ over SDP, pixel_auroc": False,
        "SDP+ over SDP, pixel_ap": True,
        "APRIL-GAN, pixel_ap over that of random weights": True,
    }
    assert module.bounds_of({"SDP": rows["SDP"], "APRIL-GAN": rows["APRIL-GAN"]}) == {}


def test_each_row_of_the_clip_methods_has_a_configuration_and_its_own_seeds() -> None:
    module = import_module("clip_methods_demo")
    for name, row in module.ROWS.items():
        assert (module.CONFIGS / f"{row.config}.yaml").is_file()
        assert row.fit_of is None or module.ROWS[row.fit_of].config == row.config
        line = module.fit_line(name, 502)
        assert (line is None) == (not row.fitted)
        if line and row.weights:
            assert line[line.index("--data.auxiliary.seed") + 1] == "1502"
            assert line[line.index("--data.seed") + 1] == "502"
    fit = Path("fit")
    crane = module.test_line("AnomalyCLIP, inference of Crane", 502, fit)
    assert crane[-2:] == ["--model.inference", "crane"]
    assert crane[2] == "fit/checkpoints/last.ckpt"
    assert len({module.folder_of(name) for name in module.ROWS}) == len(module.ROWS)


def test_photographs_are_scored_with_the_weights_of_a_fit_on_the_demo() -> None:
    module = import_module("clip_methods_demo")
    line = module.photograph_line("APRIL-GAN, 4 shots", "tiles", "DIR", Path("fit"))
    assert line[line.index("--model.linear_layers") + 1] == "fit/linear_layers.pth"
    assert line[-2:] == ["--data.shots", "4"]
    rows = ["SDP", "CLIP-ADA", "AnomalyCLIP", "AnomalyCLIP, random weights", "APRIL-GAN, 4 shots"]
    assert module.photograph_rows("tiles", rows) == ["SDP", "AnomalyCLIP", "APRIL-GAN, 4 shots"]
    assert module.photograph_rows("brain", rows) == ["SDP", "AnomalyCLIP"]
