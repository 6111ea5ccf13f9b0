"""Run the blocks of a page of the documentation, top to bottom, in one folder.

Commands of this project run in the process itself. Lines with pipes and the like, and other
programs, run in a shell, in which ``anomaly_clip`` and ``python`` are those of the tests. Python
blocks share their names, as the cells of a notebook do.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import docs_fixtures
import docs_stand_ins
import pytest
import yaml
from docs_blocks import PROGRAMS, ROOT, Block, blocks_of, program_of
from PIL import ImageShow

from anomaly_clip.cli import main
from anomaly_clip.files import CACHE_VARIABLE

START = f"""\
import runpy

runpy.run_path({docs_stand_ins.__file__!r}, run_name="docs_stand_ins")["install_on_import"]()
"""
"""Content of ``sitecustomize.py``, which Python runs at its start."""
SHELL_SYNTAX = re.compile(r"[|&;<`*?]|\$\(?\w|\$\{")
NUMBER = r"[-+]?\d[\d.,]*(?:e[-+]?\d+)?"
SECTIONS = {"model", "data", "trainer", "seed_everything", "output", "calibration", "early_stop"}
"""Top-level keys of a configuration."""
TIMEOUT = 300.0
"""Seconds after which a program of a shell line has failed."""


class PageFailure(AssertionError):
    """A block does not do what the page says."""


class PageRun:
    """Run of a page.

    Args:
        page: The page.
        folder: Its working folder, empty.
        patch: Patches of the process, undone by the caller.
    """

    def __init__(self, page: Path, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.page, self.folder, self.patch = page, folder, patch
        self.names: dict[str, Any] = {"__name__": "__main__"}
        self.output = ""
        """Output of the last block with commands or Python."""
        self.seconds: dict[str, float] = {}
        """Time of each block by its place."""
        programs = folder.parent / f"{folder.name}_programs"
        programs.mkdir()
        for name, words in (
            ("anomaly_clip", "-m anomaly_clip"),
            ("python", ""),
            ("pytest", "-m pytest -p no:cacheprovider"),
        ):
            file = programs / name
            file.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {words} "$@"\n')
            file.chmod(0o755)
        patch.setenv("PATH", str(programs), prepend=os.pathsep)
        (programs / "sitecustomize.py").write_text(START, encoding="utf-8")
        patch.setenv("PYTHONPATH", f"{programs}{os.pathsep}{ROOT}")
        patch.setenv(CACHE_VARIABLE, str(folder.parent / f"{folder.name}_cache"))
        patch.setenv("WANDB_MODE", "offline")
        patch.setattr(ImageShow, "show", lambda image, title=None: True)
        patch.syspath_prepend(str(folder))
        patch.chdir(folder)
        docs_stand_ins.install(patch.setattr)

    def run(self) -> None:
        """Run all blocks.

        Raises:
            PageFailure: If one does not do what the page says.
        """
        with own_modules(self.folder):
            for block in blocks_of(self.page):
                if "not run" in block.steering:
                    continue
                start = time.perf_counter()
                try:
                    self.run_block(block)
                except PageFailure:
                    raise
                except BaseException as error:
                    raise PageFailure(f"{block.place}: {type(error).__name__}: {error}") from error
                self.seconds[block.place] = time.perf_counter() - start

    def run_block(self, block: Block) -> None:
        """Run a block according to its language and its comments."""
        text = self.filled(block.text)
        if block.language == "setup":
            docs_fixtures.put(block.text, self.folder)
        elif block.language == "first":
            self.run_line(block, block.text, 0)
        elif "output" in block.steering:
            self.compare(block)
        elif block.file is not None:
            file = self.folder / block.file
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
            if file.suffix == ".py":
                compile(text, block.place, "exec")
        elif block.language == "python":
            code = compile(text, block.place, "exec")
            with captured() as stream:
                exec(code, self.names)
            self.output = stream.getvalue()
        elif block.language == "yaml":
            self.check_yaml(block, text)
        elif block.language == "json":
            json.loads(text)
        elif block.has_commands:
            self.output = ""
            codes = [int(code) for code in block.steering.get("exits", "0").split(",")]
            codes += [0] * (len(block.lines) - len(codes))
            for line, expected in zip(block.lines, codes, strict=True):
                self.run_line(block, line, expected)

    def filled(self, text: str) -> str:
        """Replace ``/path/to/NAME`` by the folder of the page that has this name."""

        def local(match: re.Match[str]) -> str:
            return match[1] if (self.folder / match[1]).exists() else match[0]

        return re.sub(r"/(?:path/to|new/place/of)/([\w.]+)", local, text)

    def run_line(self, block: Block, line: str, expected: int) -> None:
        """Run a command and check its exit code."""
        line = self.filled(line)
        program = program_of(line)
        if program not in PROGRAMS:
            raise PageFailure(f"{block.place}: tests may not run {program}")
        line = line.partition("  #")[0].strip()
        body, _, target = line.partition(" > ")
        if program == "cd":
            self.patch.chdir(shlex.split(line)[1])
            return
        if program == "export":
            name, _, value = shlex.split(line)[1].partition("=")
            self.patch.setenv(name, os.path.expandvars(value))
            return
        simple = program == "anomaly_clip" and not SHELL_SYNTAX.search(without_quotes(body))
        code, output = self.in_process(body, target) if simple else in_shell(line)
        self.output += output
        if code != expected:
            raise PageFailure(
                f"{block.place}: exit code {code}, not {expected}: {line}\n{output[-3000:]}"
            )

    def in_process(self, line: str, target: str) -> tuple[int, str]:
        """Run ``anomaly_clip`` here; its output goes to a file if the line says so.

        As in a process of its own, nothing is imported that an earlier line has imported from the
        reader's folder, nor is the folder on the path of modules.
        """
        words = shlex.split(line, comments=True)
        with pytest.MonkeyPatch.context() as patch, fresh_modules(self.folder):
            patch.setattr(sys, "path", [p for p in sys.path if p != str(self.folder)])
            while words[0] != "anomaly_clip":
                name, _, value = words.pop(0).partition("=")
                if name == "PYTHONPATH":
                    patch.syspath_prepend(value)
                else:
                    patch.setenv(name, value)
            with captured() as stream:
                code = main(words[1:])
        text = stream.getvalue()
        if target:
            Path(shlex.split(target)[0]).write_text(text, encoding="utf-8")
        return code, text

    def compare(self, block: Block) -> None:
        """Check that each line of a block is in the last output; numbers may differ."""
        actual = " ".join(self.output.split())
        for line in block.text.splitlines():
            words = " ".join(line.split())
            pattern = re.sub(NUMBER, "\0", words)
            pattern = re.escape(pattern).replace("\0", NUMBER).replace(re.escape("..."), ".*")
            if words and not re.search(pattern, actual):
                raise PageFailure(
                    f"{block.place}: not in the output: {line}\n{self.output[-3000:]}"
                )

    def check_yaml(self, block: Block, text: str) -> None:
        """Parse a block of YAML; if it is a configuration, parse it as one, too."""
        content = yaml.safe_load(text)
        if not isinstance(content, dict) or not SECTIONS & set(content):
            return
        file = self.folder.parent / f"{self.folder.name}_block.yaml"
        file.write_text(text, encoding="utf-8")
        words = ["fit", "--config", str(file), "--print_config"]
        words += [] if "model" in content else ["--model", "PatchCore"]
        words += [] if "data" in content else ["--data", "Demo"]
        with captured() as stream:
            code = main(words)
        if code:
            raise PageFailure(f"{block.place}: exit code {code}\n{stream.getvalue()[-3000:]}")


def without_quotes(line: str) -> str:
    """Remove quoted parts of a line, in which a shell expands nothing that pages use."""
    return re.sub(r"'[^']*'|\"[^\"]*\"", "", line)


def in_shell(line: str) -> tuple[int, str]:
    """Run a line in a shell; return its exit code and output."""
    done = subprocess.run(
        ["bash", "-c", line],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT,
    )
    return done.returncode, done.stdout


@contextlib.contextmanager
def captured() -> Iterator[io.StringIO]:
    """Collect what is printed, errors included."""
    stream = io.StringIO()
    with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        yield stream


@contextlib.contextmanager
def own_modules(folder: Path) -> Iterator[None]:
    """Forget the modules that a page has imported from its folder."""
    try:
        yield
    finally:
        _forget(folder)


@contextlib.contextmanager
def fresh_modules(folder: Path) -> Iterator[None]:
    """Begin without the modules of a folder; restore them, and forget those imported since."""
    earlier = _forget(folder)
    try:
        yield
    finally:
        _forget(folder)
        sys.modules.update(earlier)


def _forget(folder: Path) -> dict[str, ModuleType]:
    """Remove the modules of a folder from those imported, and return them."""
    removed = {}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and Path(file).is_relative_to(folder):
            removed[name] = sys.modules.pop(name)
    return removed
