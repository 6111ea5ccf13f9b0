"""Releases: notes from the changelog, tags, forms for issues, checks before a commit, line ends."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import TESTS

from anomaly_clip import __version__

ROOT = TESTS.parent
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml"))
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def script(name: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / ".ci" / name), *words],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


# -- notes and tags ------------------------------------------------------------------------------


def test_notes_are_the_section_of_the_version(tmp_path: Path) -> None:
    file = tmp_path / "CHANGELOG.md"
    file.write_text("## Unreleased\n\n## 1.10.0 - 2026-01-02\n\n### Added\n- b\n\n## 1.1.0\n- a\n")
    assert script("release_notes", "1.10.0", str(file)).stdout == "### Added\n- b\n"
    assert script("release_notes", "1.1.0", str(file)).stdout == "- a\n"


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("1.1", "has no section for version 1.1: add"),
        ("1x1.0", "has no section for version 1x1.0: add"),
        ("1.2.0", "the section for version 1.2.0 in CHANGELOG.md is empty: list its changes"),
        ("", "expected a version, such as 0.2.0"),
    ],
)
def test_a_version_without_notes_fails_in_one_sentence(
    version: str, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "CHANGELOG.md"
    file.write_text("## Unreleased\n\n## 1.2.0 - 2026-01-02\n\n### Added\n\n## 1.1.0\n- a\n")
    done = script("release_notes", *([version, str(file)] if version else []))
    assert done.returncode == 2
    assert done.stdout == ""
    [line] = done.stderr.replace(f"{tmp_path}/", "").splitlines()
    assert message in line


def test_this_version_has_notes_whose_links_hold_elsewhere() -> None:
    """A release's page is not in the folder of CHANGELOG.md, to which relative links refer."""
    notes = script("release_notes", __version__).stdout
    assert "### Added" in notes
    assert re.findall(r"\]\((?!https://)", notes) == []
    assert len(notes) < 125_000  # the forge's limit of a release's text


def test_the_changelog_has_its_versions_in_order() -> None:
    titles = re.findall(r"^## (.+)$", CHANGELOG, re.MULTILINE)
    assert titles[0] == "Unreleased"
    assert titles[1].split()[0] == __version__
    versions = [tuple(map(int, title.split()[0].split("."))) for title in titles[1:]]
    assert versions == sorted(versions, reverse=True)
    assert all(re.fullmatch(r"[\d.]+( - \d{4}-\d\d-\d\d)?", title) for title in titles[1:])


def test_a_tag_that_is_not_the_version_builds_nothing(tmp_path: Path) -> None:
    done = script("dist", str(tmp_path), GITHUB_REF_TYPE="tag", GITHUB_REF_NAME="v9.8.7")
    assert done.returncode == 1
    assert f"the tag is v9.8.7, the version is {__version__}: correct one" in done.stderr


# -- forms ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", FORMS, ids=lambda file: file.stem)
def test_a_form_asks_for_what_an_answer_needs(file: Path) -> None:
    form = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert form["name"]
    assert form["description"]
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    identifiers = [field["id"] for field in fields]
    assert len(identifiers) == len(set(identifiers))
    assert all(field["attributes"]["label"] for field in fields)
    assert any(field.get("validations", {}).get("required") for field in fields)


def test_a_bug_report_has_version_command_and_traceback() -> None:
    text = (ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text(encoding="utf-8")
    assert "`anomaly_clip --version`" in text
    assert "`--traceback`" in text


# -- checks before a commit ----------------------------------------------------------------------


def hooks() -> dict[str, list[dict[str, Any]]]:
    """Return the hooks of each repository of tools."""
    text = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    return {repository["repo"]: repository["hooks"] for repository in yaml.safe_load(text)["repos"]}


def test_checks_before_a_commit_are_those_of_make_lint() -> None:
    names = {hook["id"] for group in hooks().values() for hook in group}
    assert {"ruff-check", "ruff-format", "codespell", "mypy", "prose"} <= names
    for hook in hooks()["local"]:
        program, *files = hook["entry"].split()
        assert program.startswith(".venv/bin/")
        assert all((ROOT / file).is_file() for file in files)
    [mypy] = [hook for hook in hooks()["local"] if hook["id"] == "mypy"]
    assert mypy["stages"] == ["pre-push"]


def test_checks_leave_files_of_other_programs_alone() -> None:
    text = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    pattern = re.compile(yaml.safe_load(text)["exclude"])
    for path in (
        *("tests/golden/clip_ad/meta.json", "benchmarks/results/gpu.json", ".ci/tools.txt"),
        "LICENSE",
    ):
        assert (ROOT / path).is_file()
        assert pattern.search(path), path
    for path in ("tests/golden/README.md", "tests/test_releases.py", "README.md", ".ci/run"):
        assert not pattern.search(path), path


def attributes(*paths: str) -> dict[tuple[str, str], str]:
    """Return the attributes that git gives to paths."""
    done = subprocess.run(
        ["git", "-C", str(ROOT), "check-attr", "text", "eol", "--", *paths],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    lines = [line.split(": ") for line in done.stdout.splitlines()]
    return {(path, name): value for path, name, value in lines}


def test_git_changes_no_byte_of_golden_files_and_weights() -> None:
    golden = "tests/golden/checkpoints/0.1.0/padim/test/metrics.csv"
    weights = "anomaly_clip/assets/demo_clip.safetensors"
    values = attributes(golden, weights, "README.md")
    assert values[golden, "text"] == values[weights, "text"] == "unset"
    assert values["README.md", "eol"] == "lf"
