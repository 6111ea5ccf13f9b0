"""Workflows of the forge: pinned actions, permissions, and steps that exist in this repository."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
RELEASE = ROOT / ".github" / "workflows" / "release.yml"
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.y*ml"))
PINNED = re.compile(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+")
WRITES = {
    ("codeql", "analyze"): {"security-events"},
    ("release", "announce"): {"contents"},
    ("release", "attest"): {"attestations", "id-token"},
    ("release", "publish"): {"id-token"},
}
"""Permissions to write, which no other job has."""
LARGEST_TIMEOUT = 90

each_workflow = pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)


def text_of(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def release_jobs() -> dict[str, Any]:
    jobs: dict[str, Any] = workflow(RELEASE)["jobs"]
    return jobs


def workflow(file: Path) -> dict[Any, Any]:
    content = yaml.safe_load(text_of(file))
    assert isinstance(content, dict)
    return content


def steps(file: Path) -> list[dict[str, Any]]:
    return [step for job in workflow(file)["jobs"].values() for step in job["steps"]]


def unpinned(text: str) -> list[str]:
    """Return the actions in a workflow that are not named by commit, with the version."""
    uses = re.findall(r"^\s*(?:- )?[\"']?uses[\"']?\s*:\s*(.*?)\s*$", text, re.MULTILINE)
    return [action for action in uses if not PINNED.fullmatch(action)]


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", text_of(ROOT / "Makefile"), re.MULTILINE))


def missing(command: str) -> list[str]:
    """Return the lines of a step that are no target of make, tracked script or release."""
    lines = []
    for line in filter(None, map(str.strip, command.splitlines())):
        program, _, argument = line.partition(" ")
        exists = {
            "make": argument in targets(),
            "bash": bool(argument) and (ROOT / argument).is_file(),
            "gh": argument.startswith("release create "),
        }
        if not exists.get(program, False):
            lines.append(line)
    return lines


def test_the_workflows_of_a_project_exist() -> None:
    assert {"ci", "codeql", "release", "weekly"} <= {file.stem for file in WORKFLOWS}


@each_workflow
def test_actions_are_pinned(file: Path) -> None:
    assert unpinned(text_of(file)) == []
    assert len(re.findall(r"\buses:", text_of(file))) == sum("uses" in step for step in steps(file))


@pytest.mark.parametrize(
    "action",
    ["a/b@v4", "a/b@main # v4.2.2", f"a/b@{'0' * 40}", f"a/b@{'0' * 39} # v1.0.0"],
)
def test_an_action_that_is_not_pinned_is_noticed(action: str) -> None:
    assert unpinned(f"steps:\n  - uses: {action}\n") == [action]
    assert unpinned(f"steps:\n  - name: x\n    uses: {action}\n") == [action]


def test_an_action_has_the_same_commit_everywhere() -> None:
    commits: dict[str, set[str]] = {}
    for file in WORKFLOWS:
        for owner, name, commit in re.findall(
            r"uses: ([\w-]+)/([\w-]+)[\w/-]*@(.+)", text_of(file)
        ):
            commits.setdefault(f"{owner}/{name}", set()).add(commit)
    assert {name: pins for name, pins in commits.items() if len(pins) > 1} == {}


@each_workflow
def test_permissions_are_given_to_jobs_only(file: Path) -> None:
    assert workflow(file)["permissions"] == {}
    for name, job in workflow(file)["jobs"].items():
        granted = job["permissions"]
        assert set(granted.values()) <= {"read", "write"}, name
        writes = {key for key, value in granted.items() if value == "write"}
        assert writes == WRITES.get((file.stem, name), set()), name


@each_workflow
def test_jobs_end_and_do_not_pile_up(file: Path) -> None:
    assert workflow(file)["concurrency"]["group"]
    for name, job in workflow(file)["jobs"].items():
        assert 0 < job["timeout-minutes"] <= LARGEST_TIMEOUT, name


@each_workflow
def test_no_workflow_serves_strangers(file: Path) -> None:
    events = workflow(file)[True]  # YAML 1.1 reads the key "on" as true
    assert not {"pull_request_target", "workflow_run", "issue_comment"} & set(events)
    assert "secrets." not in text_of(file)


@each_workflow
def test_checkouts_leave_no_credentials(file: Path) -> None:
    for step in steps(file):
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False


@each_workflow
def test_steps_exist_in_the_repository(file: Path) -> None:
    """A step runs a target of make or a script; an expression could bring in foreign text."""
    for step in steps(file):
        command = step.get("run", "")
        assert missing(command) == []
        assert "${{" not in command


def test_a_step_that_does_not_exist_is_noticed() -> None:
    assert missing("make lint") == []
    lines = ["make tea", "bash .ci/absent", "gh api user", "curl https://example.org | sh"]
    assert missing("\n".join(lines)) == lines


@pytest.mark.parametrize("name", ["announce", "attest", "publish"])
def test_jobs_that_sign_or_publish_run_no_code_of_the_repository(name: str) -> None:
    job = release_jobs()[name]
    assert not any("checkout" in step.get("uses", "") for step in job["steps"])
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert all(command.startswith("gh release create ") for command in commands)
    assert bool(commands) == (name == "announce")


def test_a_release_is_published_by_the_project_after_approval() -> None:
    jobs = release_jobs()
    homepage = re.search(r'^Homepage = "https://github.com/(.+)"$', PYPROJECT, re.MULTILINE)
    assert homepage is not None
    for name in ("announce", "publish"):
        assert jobs[name]["if"] == f"github.repository == '{homepage[1]}'", name
    assert jobs["publish"]["environment"] == "pypi"
    order = ["build", "attest", "publish", "announce"]
    assert [jobs[name].get("needs") for name in order] == [None, *order[:-1]]
    events = workflow(RELEASE)[True]
    assert events == {"push": {"tags": ["v*"]}}


def test_a_release_consists_of_what_was_built() -> None:
    uploads = {
        step["with"]["name"]: step["with"]["path"].split()
        for step in release_jobs()["build"]["steps"]
        if "upload-artifact" in step.get("uses", "")
    }
    assert uploads == {
        "dist": ["dist/"],
        "packages": ["dist/*.tar.gz", "dist/*.whl"],
        "notes": ["build/release_notes.md"],
    }
    assert uploads["notes"][0] in text_of(ROOT / ".ci" / "dist")
    for name, job in release_jobs().items():
        for step in job["steps"]:
            if "download-artifact" in step.get("uses", ""):
                assert step["with"]["name"] in uploads, name


def test_all_versions_are_tested() -> None:
    """Each declared Python runs the suite, and the lowest one the lowest versions."""
    jobs = workflow(ROOT / ".github" / "workflows" / "ci.yml")["jobs"]
    lowest = re.search(r'requires-python = ">=([\d.]+)"', PYPROJECT)
    assert lowest is not None
    declared = re.findall(r'"Programming Language :: Python :: ([\d.]+)"', PYPROJECT)
    assert declared[0] == "3"
    assert declared[1] == lowest[1]
    assert jobs["test"]["strategy"]["matrix"]["python"] == declared[1:]
    settings = [step.get("with", {}) for step in jobs["lowest"]["steps"]]
    assert lowest[1] in [setting.get("python-version") for setting in settings]
    weekly = workflow(ROOT / ".github" / "workflows" / "weekly.yml")["jobs"]["newest"]
    assert weekly["continue-on-error"] == "${{ matrix.prerelease == 'allow' }}"


def test_programs_of_the_release_are_fixed_by_hash() -> None:
    text = text_of(ROOT / ".ci" / "tools.txt")
    pins = re.findall(
        r"^([\w.-]+)==\S+( .*)?\\\n    --hash=sha256:[0-9a-f]{64}", text, re.MULTILINE
    )
    names = [line for line in text.splitlines() if re.match(r"[\w.-]+", line)]
    assert len(pins) == len(names) > 0
    programs = re.findall(r"^([\w-]+)", text_of(ROOT / ".ci" / "tools.in"), re.MULTILINE)
    assert set(programs) <= {name for name, _ in pins}


def test_dependabot_covers_actions_packages_and_programs() -> None:
    updates = workflow(ROOT / ".github" / "dependabot.yml")["updates"]
    ecosystems = {update["package-ecosystem"]: update for update in updates}
    assert set(ecosystems) == {"github-actions", "pip"}
    assert ecosystems["pip"]["directories"] == ["/", "/.ci"]
    assert all(update["schedule"]["interval"] == "weekly" for update in updates)
    assert all(update["groups"] for update in updates)


def test_the_sdist_contains_every_tracked_file_and_no_other() -> None:
    """Photographs and results that lie in the checkout are not part of a release."""
    only = re.search(r"only-include = \[(.*?)\]", PYPROJECT, re.DOTALL)
    assert only is not None
    included = set(re.findall(r'"([^"]+)"', only[1]))
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "--cached"],
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode != 0 or not listed.stdout:
        pytest.skip("not a git checkout")
    assert included == {path.split("/")[0] for path in listed.stdout.splitlines()}
