"""Variables of torchrun and srun, and the environment of a process that shares categories."""

from __future__ import annotations

import os
import platform
import warnings

import pytest
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only

from anomaly_clip.commands import launch
from anomaly_clip.commands.launch import (
    Launch,
    as_single_process,
    device_of,
    launch_of,
    threads_of,
)
from anomaly_clip.errors import UserError

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_RESTART_COUNT": "0",
}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "7",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "4,3",
    "SLURM_TASKS_PER_NODE": "8(x2)",
}
BATCH = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "9"}


def without(variables: dict[str, str], *names: str, **more: str) -> dict[str, str]:
    return {name: text for name, text in variables.items() if name not in names} | more


def test_torchrun() -> None:
    place = launch_of(TORCHRUN)
    assert place == Launch("torchrun", 5, 8, 1, 4, "torchrun-node1-none-29500-0", False)
    assert place.variable == "WORLD_SIZE"
    alone = launch_of(without(TORCHRUN, "LOCAL_WORLD_SIZE"))
    assert alone is not None
    assert alone.local_size == 8


def test_the_name_of_a_launch_differs_between_machines_without_a_common_address(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By default, torchrun has the same address, port and number on every machine."""
    names = []
    for machine in ("node1", "node2"):
        monkeypatch.setattr(platform, "node", lambda machine=machine: machine)
        place = launch_of({**TORCHRUN, "MASTER_ADDR": "127.0.0.1"})
        assert place is not None
        names.append(place.job)
    assert len(set(names)) == 2


def test_srun() -> None:
    assert launch_of(SRUN) == Launch("srun", 5, 7, 1, 3, "srun-4711-0-0", True)
    by_hand = {name: SRUN[name] for name in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")}
    assert launch_of(by_hand) == Launch("srun", 5, 7, 1, 7, "srun-0-0-0", False)
    again = launch_of({**SRUN, "SLURM_RESTART_COUNT": "2"})
    assert again is not None
    assert again.job == "srun-4711-0-2"
    assert again.variable == "SLURM_NTASKS"


@pytest.mark.parametrize(
    ("counts", "node", "tasks"),
    [("4", 0, 4), ("4(x2),3", 1, 4), ("4(x2),3", 2, 3), ("4(x2),3", 3, None), ("", 0, None)],
)
def test_tasks_of_a_node(counts: str, node: int, tasks: int | None) -> None:
    assert launch._tasks_on_node(counts, node) == tasks


def test_torchrun_within_srun() -> None:
    """One agent of torchrun per node is a task of srun."""
    agents = {**SRUN, "SLURM_NTASKS": "2", "SLURM_PROCID": "1", **TORCHRUN}
    assert launch_of(agents) == launch_of(TORCHRUN)
    exported = without({**SRUN, **TORCHRUN}, "TORCHELASTIC_RUN_ID", WORLD_SIZE="7")
    place = launch_of(exported)
    assert place is not None
    assert (place.launcher, place.rank, place.size) == ("torchrun", 5, 7)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"WORLD_SIZE": "1"},
        {"RANK": "3"},
        {"LOCAL_RANK": "1", "MASTER_ADDR": "node1"},
        {**TORCHRUN, "WORLD_SIZE": "1", "RANK": "0"},
        {**SRUN, "SLURM_NTASKS": "1"},
        {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "1", "SLURM_ARRAY_TASK_ID": "3"},
        without(TORCHRUN, "RANK", WORLD_SIZE="1"),
    ],
)
def test_a_single_process(variables: dict[str, str]) -> None:
    assert launch_of(variables) is None


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK is missing: start the command with"),
        (without(TORCHRUN, "LOCAL_RANK"), "WORLD_SIZE is 8, but LOCAL_RANK is missing: start the"),
        ({**TORCHRUN, "RANK": "8"}, "RANK is 8, but WORLD_SIZE is 8: expected a smaller number"),
        ({**TORCHRUN, "RANK": "-1"}, "RANK is '-1': expected 0 or a positive integer"),
        ({**TORCHRUN, "WORLD_SIZE": "two"}, "WORLD_SIZE is 'two': expected 0 or a positive"),
        ({**TORCHRUN, "WORLD_SIZE": "0"}, "RANK is 5, but WORLD_SIZE is 0: expected a smaller"),
        ({**TORCHRUN, "WORLD_SIZE": ""}, "WORLD_SIZE is '': expected 0 or a positive integer"),
        (without(SRUN, "SLURM_LOCALID"), "SLURM_NTASKS is 7, but SLURM_LOCALID is missing"),
        ({**SRUN, "SLURM_PROCID": "7"}, "SLURM_PROCID is 7, but SLURM_NTASKS is 7: expected a"),
        ({**SRUN, "SLURM_NTASKS": "²"}, "SLURM_NTASKS is '²': expected 0 or a positive integer"),
        (BATCH, "Slurm has reserved 4 tasks (SLURM_NTASKS), but srun has not started this command"),
        (without(BATCH, "SLURM_PROCID"), "put srun in front of it, or reserve one task"),
        (
            {**SRUN, "SLURM_NTASKS": "4", **TORCHRUN},
            "srun has started 4 tasks (SLURM_NTASKS), but torchrun connects 2 of them: give",
        ),
        ({**SRUN, **TORCHRUN, "GROUP_WORLD_SIZE": "1"}, "torchrun connects 1 of them"),
        (
            without({**SRUN, **TORCHRUN}, "TORCHELASTIC_RUN_ID"),
            "srun has started 7 tasks (SLURM_NTASKS), but torchrun connects 8 of them",
        ),
    ],
)
def test_variables_that_make_no_sense(variables: dict[str, str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        launch_of(variables)
    assert message in str(caught.value)


def test_shares() -> None:
    place = launch_of({**SRUN, "SLURM_PROCID": "1", "SLURM_NTASKS": "3"})
    assert place is not None
    names = list("abcdefgh")
    assert place.share(names) == ["b", "e", "h"]
    assert [place.share(names, rank) for rank in (0, 2)] == [["a", "d", "g"], ["c", "f"]]
    assert place.share(["a"]) == []


@pytest.mark.parametrize(
    ("visible", "count", "local_rank", "chosen"),
    [
        (None, 0, 1, None),
        (None, 1, 1, None),
        ("3", 1, 1, None),
        ("", 0, 0, None),
        (None, 4, 3, "3"),
        (None, 2, 3, "1"),
        ("6, 4", 2, 1, "4"),
        ("GPU-1a,GPU-2b", 2, 0, "GPU-1a"),
    ],
)
def test_the_device_of_a_process(
    visible: str | None, count: int, local_rank: int, chosen: str | None
) -> None:
    assert device_of(visible, count, local_rank) == chosen


@pytest.mark.parametrize(
    ("variables", "cores", "local_size", "threads"),
    [
        ({}, 16, 4, 4),
        ({}, 2, 4, 1),
        ({"OMP_NUM_THREADS": "1"}, 16, 4, None),
        ({"SLURM_CPUS_PER_TASK": "6"}, 6, 4, 6),
    ],
)
def test_the_threads_of_a_process(
    variables: dict[str, str], cores: int, local_size: int, threads: int | None
) -> None:
    assert threads_of(variables, cores, local_size) == threads


@pytest.mark.parametrize("variables", [TORCHRUN, SRUN, {**SRUN, "SLURM_NTASKS": "2", **TORCHRUN}])
def test_libraries_see_a_single_process(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in variables.items():
        monkeypatch.setenv(name, text)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "error.json")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(launch, "_num_cores", lambda: 6)
    monkeypatch.setattr(rank_zero_only, "rank", 5)
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    before, threads = dict(os.environ), torch.get_num_threads()
    place = launch_of(os.environ)
    assert place is not None
    with as_single_process(place):
        assert not TorchElasticEnvironment.detect()
        assert not SLURMEnvironment.detect()
        assert getattr(rank_zero_only, "rank", None) == 0
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"
        assert os.environ["TORCHELASTIC_ERROR_FILE"] == "error.json"
        assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"} & set(os.environ)
        with warnings.catch_warnings(record=True) as caught:
            warnings.warn("The `srun` command is available on your system", stacklevel=1)
    assert not caught
    assert dict(os.environ) == before
    assert getattr(rank_zero_only, "rank", None) == 5
    assert chosen == [6 // place.local_size, threads]


def test_a_chosen_number_of_threads_and_one_device_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,8")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    before, place = dict(os.environ), launch_of(SRUN)
    assert place is not None
    with as_single_process(place):
        assert dict(os.environ) == before
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with as_single_process(place):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "8"
    assert dict(os.environ) == before
