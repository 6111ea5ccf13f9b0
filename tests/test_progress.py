"""Bars on a terminal, log lines elsewhere, timed by a clock that only the tests move."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from io import StringIO
from itertools import pairwise
from typing import Any

import pytest
from rich import box
from rich.console import Console
from rich.table import Table
from standing_clock import StandingClock

from anomaly_clip import progress
from anomaly_clip.progress import LogProgress, duration, rate, say, show_table, track

Capture = pytest.CaptureFixture[str]


# -- track, in a file --------------------------------------------------------------------------


def work_through(steps: Iterable[Any], clock: StandingClock, seconds: float) -> None:
    start = clock.now
    for number, _ in enumerate(steps, start=1):
        clock.now = start + number * seconds


def test_lines_by_hand(clock: StandingClock, capsys: Capture) -> None:
    work_through(track(range(6612), "checking", clock=clock), clock, 0.01)
    out = capsys.readouterr()
    assert out.out == ""
    assert out.err.splitlines() == [
        "checking: 1,000 of 6,612, 100 per second, 56 s left",
        "checking: 4,000 of 6,612, 100 per second, 26 s left",
        "checking: 6,612 in 1 min 6 s",
    ]


def test_a_step_of_unknown_length_shows_no_time_left(clock: StandingClock, capsys: Capture) -> None:
    work_through(track(iter(range(8)), "reading", clock=clock), clock, 4)
    assert capsys.readouterr().err.splitlines() == [
        "reading: 3, 0.25 per second",
        "reading: 8 in 32 s",
    ]
    work_through(track(iter(range(8)), "reading", 8, clock), clock, 4)
    assert "reading: 3 of 8, 0.25 per second, 20 s left" in capsys.readouterr().err


def test_log_lines_become_rarer(clock: StandingClock, capsys: Capture) -> None:
    work_through(track(range(36_000), "encoding", clock=clock), clock, 1)
    done = [
        int(line.split()[1].replace(",", "")) for line in capsys.readouterr().err.splitlines()[:-1]
    ]
    assert done[:4] == [10, 40, 70, 100]
    gaps = [b - a for a, b in pairwise(done)]
    assert gaps == [max(30, -(-a // 10)) for a in done[:-1]]
    assert len(done) < 70


@pytest.mark.parametrize("items", [[], range(3), iter(()), iter("abc")])
def test_a_short_step_writes_nothing(items: Iterable[object], capsys: Capture) -> None:
    expected = list(items) if not isinstance(items, Iterator) else None
    yielded = list(track(items, "counting"))
    assert expected is None or yielded == expected
    assert capsys.readouterr().err == ""


def test_items_are_consumed_lazily(capsys: Capture) -> None:
    taken: list[int] = []

    def source() -> Iterator[int]:
        for number in range(5):
            taken.append(number)
            yield number

    for number in track(source(), "counting"):
        assert taken == list(range(number + 1))


def test_a_failed_step_has_no_last_line(clock: StandingClock, capsys: Capture) -> None:
    def fail() -> None:
        for number in track(range(10), "checking", clock=clock):
            clock.now += 5
            if number == 4:
                raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        fail()
    assert capsys.readouterr().err == "checking: 2 of 10, 0.2 per second, 40 s left\n"


def test_more_items_than_announced(clock: StandingClock, capsys: Capture) -> None:
    work_through(track(iter(range(4)), "checking", 2, clock), clock, 12)
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "checking: 4 in 48 s"
    assert all("-" not in line for line in lines)


def test_other_processes_are_silent(
    clock: StandingClock, terminal: None, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr("lightning.fabric.utilities.rank_zero.rank_zero_only.rank", 1)
    work_through(track(range(3), "counting", clock=clock), clock, 100)
    monkeypatch.delenv("FORCE_COLOR")
    work_through(track(range(3), "counting", clock=clock), clock, 100)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (3599.7, "1 h 0 min"), (1e5, "27 h 46 min")],
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("speed", "words"),
    [(99.97, "100"), (100.4, "100"), (12345.6, "12,346"), (2.0, "2"), (1 / 90, "0.0111")],
)
def test_rates(speed: float, words: str) -> None:
    assert rate(speed) == f"{words} per second"


def test_no_elapsed_time_means_no_rate(clock: StandingClock, chatty: None, capsys: Capture) -> None:
    LogProgress("waiting", clock).log(0, 5)
    LogProgress("waiting", clock).log(3, 5)
    assert capsys.readouterr().err == "waiting: 0 of 5\nwaiting: 3 of 5\n"


# -- track, on a terminal ----------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3])
def test_a_terminal_sees_a_bar(count: int, terminal: None, capsys: Capture) -> None:
    assert list(track(range(count), "counting [x]")) == list(range(count))
    out = capsys.readouterr()
    assert "counting [x]" in out.err
    assert out.out == ""


def test_a_dumb_terminal_sees_lines(
    terminal: None,
    clock: StandingClock,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    work_through(track(range(3), "counting", clock=clock), clock, 20)
    assert "counting: 1 of 3, 0.05 per second, 40 s left" in capsys.readouterr().err


def test_steps_within_steps_share_the_screen(terminal: None, capsys: Capture) -> None:
    for outer in track("ab", "outer"):
        for _ in track(iter(range(3)), f"inner {outer}"):
            say(f"[{outer}] :smile:")
    err = capsys.readouterr().err
    assert "inner a" in err
    assert "inner b" in err
    assert err.count("[a] :smile:") == 3  # literally, without markup or emoji
    assert err.count("\x1b[?25l") == 1  # only one display hides the cursor
    assert progress._displays == []


def test_a_bar_is_gone_after_an_error(terminal: None, capsys: Capture) -> None:
    def fail() -> None:
        for _ in track(range(3), "outer"):
            for _ in track(range(3), "inner"):
                raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        fail()
    assert progress._displays == []
    assert list(track(range(2), "again")) == [0, 1]


METRICS = ["image\nAUROC", "anoma-\nlous", "pixel\nF1-max", "model.\nlr"]


def wide_table() -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=0, title="a title", caption="a remark")
    table.add_column("category", overflow="fold")
    for name in METRICS:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row("metal_nut_with_a_long_name", "100.0", "12,345", "99.9", "0.00012")
    table.add_row("mean", "100.0", "67,890", "88.8", "–", style="bold")
    return table


@pytest.mark.parametrize("width", [10, 25, 40, 46, 50, 80, 200])
def test_a_narrow_terminal_shows_every_cell(width: int) -> None:
    file = StringIO()
    console = Console(file=file, width=width, force_terminal=True, color_system=None)
    show_table(wide_table(), console)
    text = file.getvalue()
    for cell in ("100.0", "12,345", "67,890", "88.8", "0.00012", "mean", "a title", "a remark"):
        assert cell in (" ".join(text.split()) if " " in cell else text), cell
    assert "…" not in text
    names = [line.split("100.0")[0] for line in text.splitlines()]  # a name may be folded
    assert "metal_nut_with_a_long_name" in "".join("".join(names).split())
    if width <= 25:
        lines = [line.rstrip() for line in text.splitlines()]
        start = lines.index("category mean")
        block = ["  image AUROC   100.0", "  anomalous     67,890", "  pixel F1-max  88.8"]
        assert lines[start + 1 : start + 5] == [*block, "  model.lr      –"]


def test_a_table_in_a_file_is_as_wide_as_necessary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    file = StringIO()
    show_table(wide_table(), Console(file=file, force_terminal=False))
    assert "metal_nut_with_a_long_name" in file.getvalue()
    assert "100.0" in file.getvalue()


# -- in a notebook -----------------------------------------------------------------------------


def test_a_notebook_has_bars_only_with_widgets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without widgets, rich would warn at each step and leave empty results in the cell."""
    installed: dict[str, object] = {}
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", installed.get)
    assert not progress.sees_bars()
    installed["ipywidgets"] = object()
    assert progress.sees_bars()


def test_messages_in_a_notebook_are_no_results(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    say("a message")
    assert capsys.readouterr().err == "a message\n"
