"""Every command that a published table prints is accepted, down to the resize rule."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import Namespace

from anomaly_clip.cli import main
from anomaly_clip.commands.experiment import ExperimentCLI, arrange
from anomaly_clip.commands.library_messages import quieten
from anomaly_clip.commands.option_parser import OptionParser
from anomaly_clip.data.auxiliary import take_image_size
from anomaly_clip.data.dataset import AnomalyData
from anomaly_clip.reporting.published_reader import load_published

ROOT = Path(__file__).parent.parent
VERBS = {"fit": "fit", "each": "fit", "test": "test"}
"""The verb whose options a verb takes."""


class ParserOnly(ExperimentCLI):
    """Command line that ends as soon as its parser is built, which takes most of the time."""

    built: ParserOnly

    def parse_arguments(self, parser: Any, args: Any) -> None:
        ParserOnly.built = self
        raise InterruptedError


Parsers = dict[str, tuple[Any, Any]]


@pytest.fixture(scope="module")
def parsers() -> Parsers:
    """Return, by verb, the parser of the command line and that of the verb's options."""
    quieten()
    built = {}
    for verb in set(VERBS.values()):
        with pytest.raises(InterruptedError):
            ParserOnly([verb])
        built[verb] = ParserOnly.built.parser, ParserOnly.built._parser(verb)
    return built


@pytest.fixture(scope="module")
def data_parser() -> OptionParser:
    """Return a parser that builds data modules."""
    parser = OptionParser()
    parser.add_subclass_arguments(AnomalyData, "data")
    return parser


@pytest.fixture
def printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> list[str]:
    """Return all lines that all tables print, in a folder that has only ``configs``."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    for table in load_published().tables:
        assert main(["report", "--table", table, "--dry-run"]) == 0
    return list(dict.fromkeys(capsys.readouterr().out.splitlines()))


Accept = Callable[[str], None]


@pytest.fixture
def accept(parsers: Parsers, data_parser: OptionParser) -> Accept:
    """Return a function that parses a printed line as the command line does.

    It also builds the data module and gives it the image size of the model, which is where a
    resize rule that does not fit is noticed. The model, whose weights may be large, is not built.
    """

    def parse(line: str) -> None:
        program, verb, *words = shlex.split(line)
        assert program == "anomaly_clip"
        options = VERBS[verb]
        whole, of_verb = parsers[options]
        config = whole.parse_args(arrange([options, *words]))[options]
        data = data_parser.parse_object({"data": config.data.clone()})
        take_image_size(data_parser.instantiate_classes(data).data, image_size(config.model))
        if verb == "fit":
            leave_checkpoint(of_verb.dump(config, skip_none=False), config.output.folder)

    return parse


def image_size(model: Namespace) -> int:
    backbone = model.init_args.backbone
    size: int = model.init_args.get("image_size") or backbone.get("image_size") or 240
    return size


def leave_checkpoint(config: str, folder: str) -> None:
    """Leave what a fit leaves for the test that follows it."""
    checkpoint = Path(folder) / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": {}}, checkpoint)
    (Path(folder) / "config-fit.yaml").write_text(config, encoding="utf-8")


def of_verbs(lines: list[str], *verbs: str) -> list[str]:
    return [line for line in lines if line.split()[1] in verbs]


def sample(lines: list[str]) -> Iterator[str]:
    """Yield a line of each form, that is verb and number of files, and all with a resize rule."""
    seen = set()
    for line in lines:
        words = shlex.split(line)
        form = words[1], words.count("--config"), "--ckpt_path" in words
        if form not in seen or "--data.resize" in words:
            yield line
        seen.add(form)


def test_a_command_of_each_form_is_accepted(printed: list[str], accept: Accept) -> None:
    lines = [line for line in of_verbs(printed, *VERBS) if "runs/tab" not in line]
    for line in sample(lines):
        accept(line)


@pytest.mark.slow
def test_every_command_is_accepted(printed: list[str], accept: Accept) -> None:
    lines = of_verbs(printed, *VERBS)
    assert len(lines) > 90
    for line in lines:
        accept(line)


def test_only_these_verbs_are_printed(
    printed: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    reports = of_verbs(printed, "report")
    assert len(of_verbs(printed, *VERBS)) + len(reports) == len(printed)
    assert len(reports) == sum(bool(table.runs) for table in load_published().tables.values())
    for line in reports:
        # The arguments are valid, but the runs are still to be made.
        assert main(shlex.split(line)[1:]) == 2
        assert "there is no such folder" in capsys.readouterr().err


def test_a_resize_rule_that_does_not_fit_is_noticed(accept: Accept) -> None:
    line = "anomaly_clip each --config padim --data.root x --data.resize '{rule: square}'"
    with pytest.raises(ValueError, match=r"data\.resize\.size 256: rule square does not crop"):
        accept(line)
