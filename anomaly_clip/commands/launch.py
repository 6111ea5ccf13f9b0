"""Processes that torchrun or srun has started: the place of this one, read from their variables.

The processes of ``each`` share categories, not images: every process runs its own experiments, and
no process group connects them. So Lightning must not see the variables.
"""

from __future__ import annotations

import os
import platform
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only

from anomaly_clip.errors import UserError

__all__ = ["Launch", "as_single_process", "device_of", "launch_of", "threads_of"]

SIZES = {"torchrun": "WORLD_SIZE", "srun": "SLURM_NTASKS"}
"""Variable with the number of processes, by launcher."""
HIDDEN = re.compile(
    r"(LOCAL_|GROUP_|ROLE_|NODE_)?RANK|((LOCAL|GROUP|ROLE)_)?WORLD_SIZE|ROLE_NAME|MASTER_(ADDR|PORT)"
    r"|TORCHELASTIC_(?!ERROR_FILE).*|SLURM_(NTASKS|PROCID|LOCALID)"
)
"""Variables by which libraries recognise one of several processes."""
LOOPBACK = ("localhost", "127.0.0.1", "::1", "0.0.0.0")  # noqa: S104 - compared, not bound
WAY_OUT = "start the command with torchrun or srun, or unset the variable"


@dataclass(frozen=True)
class Launch:
    """Place of this process among those of one command.

    Args:
        launcher: torchrun or srun.
        rank: Number of the process, from 0.
        size: Number of processes.
        local_rank: Number of the process on its machine, from 0.
        local_size: Number of processes on this machine.
        job: Text that is the same in all processes of the command.
        is_unique: Whether no other command ever has this text.
    """

    launcher: str
    rank: int
    size: int
    local_rank: int
    local_size: int
    job: str
    is_unique: bool

    @property
    def variable(self) -> str:
        """Variable with the number of processes."""
        return SIZES[self.launcher]

    def share(self, names: Sequence[str], rank: int | None = None) -> list[str]:
        """Return the share of a process: every ``size``-th name, beginning with that at its rank.

        Example:
            >>> from anomaly_clip.commands.launch import Launch
            >>> second = Launch("srun", 1, 3, 1, 3, "7", True)
            >>> second.share(["bottle", "cable", "grid", "pill", "zipper"])
            ['cable', 'zipper']
        """
        return list(names[self.rank if rank is None else rank :: self.size])


def launch_of(variables: Mapping[str, str]) -> Launch | None:
    """Return the place of this process; None if it is the only one.

    torchrun within srun has the last word, as in Lightning.

    Args:
        variables: The environment.

    Raises:
        UserError: If the variables are incomplete, invalid or contradictory.
    """
    world, tasks = (_count(variables, name) for name in SIZES.values())
    by_torchrun = "RANK" in variables and world is not None
    if by_torchrun and (tasks or 1) > 1 and "SLURM_STEP_ID" in variables:
        is_elastic = "TORCHELASTIC_RUN_ID" in variables
        connected = (_count(variables, "GROUP_WORLD_SIZE") or 1) if is_elastic else world
        if connected != tasks:
            raise UserError(
                f"srun has started {tasks} tasks (SLURM_NTASKS), but torchrun connects "
                f"{connected} of them: give torchrun --nnodes {tasks} and a common "
                f"--rdzv_endpoint, or use srun alone"
            )
    if by_torchrun:
        return None if world == 1 else _by_torchrun(variables)
    if tasks is not None and tasks > 1:
        return _by_srun(variables)
    if world is not None and world > 1:
        raise UserError(f"WORLD_SIZE is {world}, but RANK is missing: {WAY_OUT}")
    return None


def _by_torchrun(variables: Mapping[str, str]) -> Launch:
    address = variables.get("MASTER_ADDR", LOOPBACK[0])
    if address in LOOPBACK:  # the same text on every machine
        address = platform.node()
    names = ("TORCHELASTIC_RUN_ID", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")
    job = "-".join(["torchrun", address, *(variables.get(name, "0") for name in names)])
    local_size = _count(variables, "LOCAL_WORLD_SIZE")
    return _checked(variables, "torchrun", ("RANK", "LOCAL_RANK"), local_size, job, False)


def _by_srun(variables: Mapping[str, str]) -> Launch:
    is_in_job = "SLURM_JOB_ID" in variables
    if "SLURM_PROCID" not in variables or (is_in_job and "SLURM_STEP_ID" not in variables):
        raise UserError(
            f"Slurm has reserved {variables['SLURM_NTASKS']} tasks (SLURM_NTASKS), but srun has "
            f"not started this command (no SLURM_STEP_ID): put srun in front of it, or reserve one "
            f"task"
        )
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    job = "-".join(["srun", *(variables.get(name, "0") for name in names)])
    counts = variables.get("SLURM_STEP_TASKS_PER_NODE", variables.get("SLURM_TASKS_PER_NODE", ""))
    local_size = _tasks_on_node(counts, _count(variables, "SLURM_NODEID") or 0)
    ranks = ("SLURM_PROCID", "SLURM_LOCALID")
    return _checked(variables, "srun", ranks, local_size, job, is_in_job)


def _checked(
    variables: Mapping[str, str],
    launcher: str,
    names: tuple[str, str],
    local_size: int | None,
    job: str,
    is_unique: bool,
) -> Launch:
    """Return the place of this process, once its numbers are complete and in range.

    Raises:
        UserError: If they are not.
    """
    size = int(variables[SIZES[launcher]])
    ranks = []
    for name in names:
        number = _count(variables, name)
        if number is None:
            raise UserError(
                f"{SIZES[launcher]} is {size}, but {name} is missing: start the command with "
                f"{launcher}, or unset {SIZES[launcher]}"
            )
        if number >= size:
            raise UserError(
                f"{name} is {number}, but {SIZES[launcher]} is {size}: expected a smaller number, "
                f"so {WAY_OUT}"
            )
        ranks.append(number)
    return Launch(launcher, ranks[0], size, ranks[1], local_size or size, job, is_unique)


def _count(variables: Mapping[str, str], name: str) -> int | None:
    """Return a variable's number, None without the variable.

    Raises:
        UserError: If it is not a number.
    """
    text = variables.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal()):
        raise UserError(f"{name} is {text!r}: expected 0 or a positive integer, so {WAY_OUT}")
    return int(text)


def _tasks_on_node(counts: str, node: int) -> int | None:
    """Return the number of tasks on a node, from Slurm's ``4(x2),3``; None if it is not there."""
    expanded: list[int] = []
    for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts):
        expanded += [int(tasks)] * int(times or 1)
    return expanded[node] if node < len(expanded) else None


def device_of(visible: str | None, num_devices: int, local_rank: int) -> str | None:
    """Return the value of ``CUDA_VISIBLE_DEVICES`` for one process; None to leave it as it is.

    With more processes than devices, some share one.

    Args:
        visible: The present value; None without one.
        num_devices: Number of devices that the process sees.
        local_rank: Number of the process on its machine.

    Example:
        >>> from anomaly_clip.commands.launch import device_of
        >>> device_of(None, 4, 1), device_of("4,6", 2, 1), device_of("5", 1, 3)
        ('1', '6', None)
    """
    if num_devices < 2:  # none, or srun has chosen one
        return None
    names = [str(n) for n in range(num_devices)] if visible is None else visible.split(",")
    return names[local_rank % num_devices].strip()


def threads_of(variables: Mapping[str, str], cores: int, local_size: int) -> int | None:
    """Return the number of threads of one process; None if the user or torchrun has chosen it.

    Args:
        variables: The environment.
        cores: Number of cores that the process may use.
        local_size: Number of processes on this machine.
    """
    if "OMP_NUM_THREADS" in variables:
        return None
    return _count(variables, "SLURM_CPUS_PER_TASK") or max(1, cores // local_size)


@contextmanager
def as_single_process(launch: Launch) -> Iterator[None]:
    """Let libraries see a single process with one device within the ``with`` block.

    Args:
        launch: The place of this process.
    """
    before = {name: text for name, text in os.environ.items() if HIDDEN.fullmatch(name)}
    for name in before:
        del os.environ[name]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    device = device_of(visible, torch.cuda.device_count(), launch.local_rank)
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    threads = threads_of(os.environ, _num_cores(), launch.local_size)
    threads_before, rank = torch.get_num_threads(), getattr(rank_zero_only, "rank", 0)
    if threads is not None:
        torch.set_num_threads(threads)
    rank_zero_only.rank = 0  # type: ignore[attr-defined]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*`srun` command is available.*")
            yield
    finally:
        rank_zero_only.rank = rank  # type: ignore[attr-defined]
        torch.set_num_threads(threads_before)
        if device is not None and visible is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        elif visible is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible
        os.environ.update(before)


def _num_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
