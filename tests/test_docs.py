"""README, CONTRIBUTING and docs: links, commands, examples, length."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from docs_blocks import blocks_of, pages
from helpers import save_picture, write_mvtec

from anomaly_clip.cli import main
from anomaly_clip.testing import run_checks

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("examples/*.md")])
LONGEST_README = 1200  # words; longer explanations belong in docs/


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub forms them."""
    headings = re.findall(r"^#+ (.+)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    """Return the links of a page to files or headings that do not exist."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text_of(page), flags=re.S)):
        target, _, anchor = link.partition("#")
        if re.match(r"\w+:", link):
            continue
        file = (page.parent / target).resolve() if target else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page) == []


def test_a_broken_link_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A title\n[a](page.md#a-title) [b](page.md#b) [c](no.md) [d](https://x.org)")
    assert broken_links(page) == ["page.md#b", "no.md"]


NAMED = re.compile(
    r"\b((?:docs|examples|configs)/[\w/.-]+\.(?:md|yaml|py)|[A-Z]+\.md)(?:#([\w-]+))?"
)
"""Pages and files that code, configurations and messages name."""


def named_files(text: str) -> set[str]:
    """Return the pages that a text names, with their anchors."""
    return {match[0] for match in NAMED.finditer(text)}


def missing_files(names: set[str]) -> list[str]:
    """Return those of the names that lead nowhere."""
    missing = []
    for name in sorted(names):
        file, _, anchor = name.partition("#")
        if not (ROOT / file).is_file() or (anchor and anchor not in anchors(ROOT / file)):
            missing.append(name)
    return missing


def test_pages_named_in_code_exist() -> None:
    folders = ("anomaly_clip", "configs", "benchmarks", "examples", ".github")
    suffixes = {".py", ".yaml", ".yml", ".jinja", ".js", ".md"}
    files = [f for folder in folders for f in (ROOT / folder).rglob("*") if f.suffix in suffixes]
    files += [ROOT / name for name in ("Makefile", "pyproject.toml", ".ci/run")]
    names = set().union(*(named_files(file.read_text(encoding="utf-8")) for file in files))
    assert len(names) > 20
    assert missing_files(names) == []


def test_a_page_that_is_not_there_is_noticed() -> None:
    names = named_files("see docs/data.md, docs/no.md and docs/data.md#no-such-heading")
    assert missing_files(names) == ["docs/data.md#no-such-heading", "docs/no.md"]


def test_every_page_is_listed() -> None:
    index = ROOT / "docs" / "README.md"
    listed = {
        (index.parent / link).resolve() for link in re.findall(r"\]\(([^)]+)\)", text_of(index))
    }
    assert set((ROOT / "docs").rglob("*.md")) - {index} <= listed


def test_the_readme_is_short() -> None:
    assert len(text_of(ROOT / "README.md").split()) <= LONGEST_README


def commands() -> list[str]:
    """Return the distinct commands of all pages that ``test_docs_run.py`` does not run."""
    lines: dict[str, None] = {}
    for page in PAGES:
        if page.parent.name == "options":  # generated, with usages in place of commands
            continue
        for block in blocks_of(page) if page in pages() else []:
            if "not run" in block.steering and block.has_commands:
                lines |= dict.fromkeys(line for line in block.lines if is_complete(line))
        text = re.sub(r"```.*?```", "", text_of(page), flags=re.S)
        for line in re.findall(r"`(anomaly_clip [^`]+ --(?:config|table|data) [^`]+)`", text):
            lines[line] = None
    return list(lines)


def is_complete(line: str) -> bool:
    """Return whether a line is a command of this program, not one of another or a usage."""
    return line.startswith("anomaly_clip ") and not re.search(r"\bVERB\b|\[--|\.\.\.|[|&>$]", line)


def test_commands_are_collected() -> None:
    assert len(commands()) > 3


@pytest.mark.parametrize("line", commands())
def test_every_command_parses(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    arguments = shlex.split(line, comments=True)[1:]
    if earlier := {"--ckpt_path", "--resume"}.intersection(arguments):  # names a run of the reader
        path = arguments[arguments.index(earlier.pop()) + 1]
        assert main(arguments) == 2
        assert path in capsys.readouterr().err
        return
    # Only experiments have a configuration to print.
    experiment = arguments[0] in ("fit", "validate", "test", "predict")
    helps = any(argument.endswith("help") for argument in arguments)
    arguments += [] if helps else ["--print_config" if experiment else "--help"]
    assert main(arguments) == 0
    capsys.readouterr()


def blocks(page: str, language: str) -> list[str]:
    """Return the code blocks of a page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(ROOT / page), re.MULTILINE | re.S)


HOW_TO_EXTEND = ("docs/howto/add_a_method.md", "docs/howto/add_a_data_set.md")


def example_files(*languages: str) -> list[str]:
    """Return the blocks of the pages on extensions that begin with the name of a file."""
    return [
        code
        for page in HOW_TO_EXTEND
        for language in languages or ("python", "yaml")
        for code in blocks(page, language)
        if re.match(r"# \w+\.(py|yaml)\n", code)
    ]


def test_the_files_of_the_pages_are_those_of_the_examples() -> None:
    for code in example_files():
        name, _, content = code.partition("\n")
        assert text_of(ROOT / "examples" / name.removeprefix("# ")) == content


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write the pages' files to a folder; make it importable and the working directory."""
    for code in example_files():
        name = code.partition("\n")[0].removeprefix("# ")
        (tmp_path / name).write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


TINY = ["--model.backbone.weights=random", "--model.image_size=32", "--trainer.accelerator=cpu"]


@pytest.mark.slow
def test_the_example_method_works(example: Path) -> None:
    root = write_mvtec(example)
    assert main(["each", "--config=mean_cosine.yaml", f"--data.root={root}", *TINY]) == 0
    assert (example / "runs" / "mean_cosine" / "1-each" / "metrics.json").is_file()
    test = importlib.import_module("test_mean_cosine")
    test.test_maps_are_cosine_distances_to_the_mean()


@pytest.mark.slow
def test_the_example_method_passes_the_contract(example: Path) -> None:
    test = importlib.import_module("test_mean_cosine")
    (mark,) = test.test_contract.pytestmark
    _, checks = mark.args
    outcomes = run_checks(checks)
    assert [o.message for o in outcomes if o.status not in ("passed", "not applicable")] == []
    assert sum(outcome.status == "passed" for outcome in outcomes) >= 40


def test_the_example_data_set_works(example: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("train/ok/0", "train/ok/1", "test/ok/0", "test/ng/0"):
        pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        save_picture(example / "factory" / "plank" / f"{name}.png", pixels)
    data = ["--data=my_factory.MyFactory", "--data.root=factory"]
    assert main(["check", *data]) == 0
    assert main(["fit", "--config=mean_cosine.yaml", *data, *TINY]) == 0
    assert main(["test", "--ckpt_path=runs/mean_cosine/1-fit/checkpoints/last.ckpt"]) == 0


def test_the_evidence_page_counts_the_missed_bounds() -> None:
    results = [json.loads(text_of(file)) for file in (ROOT / "benchmarks/results").glob("*.json")]
    bounds = [bound for result in results for bound in result["bounds"].values()]
    missed = [bound for bound in bounds if not bound["met"]]
    text = text_of(ROOT / "docs" / "evidence.md")
    assert f"{len(missed)} of {len(bounds)} bounds are missed" in text
    table = text.partition("### Missed bounds")[2].partition("\n## ")[0]
    shown = sorted(float(value) for value in re.findall(r"\| (-?[\d.e-]+) \| at", table))
    assert shown == pytest.approx(sorted(bound["value"] for bound in missed), rel=1e-2)


def test_the_files_of_the_pages_are_those_in_examples() -> None:
    """Ruff, mypy and the tests of the examples then hold for the pages, too."""
    files = [code.partition("\n") for code in example_files()]
    assert len(files) == 4
    for title, _, content in files:
        assert text_of(ROOT / "examples" / title.removeprefix("# ")) == content
