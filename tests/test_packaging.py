"""Wheel and sdist: metadata, content, and the commands of an installed package."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import TESTS

import anomaly_clip

hatchling = pytest.importorskip("hatchling.builders.wheel", reason="hatchling builds the wheel")
pytest.importorskip("hatch_fancy_pypi_readme", reason="it makes the links of the README absolute")

ROOT = TESTS.parent
VERSION = anomaly_clip.__version__
DEMO = 'test --config demo --data.categories "[brass washer]" --data.num_test 8'
RELATIVE = re.compile(
    r"""(?:\]\(|\b(?:href|src|srcset)=["']|^\[[^\]\n]+\]:\s+)(?![a-z][a-z+.-]*:|\#)""", re.MULTILINE
)
"""A link or an image without an address, in Markdown or HTML."""


def tracked(*paths: str) -> list[str]:
    """Return the tracked files below these paths; skip the test where there is no git."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--", *paths],
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode != 0 or not listed.stdout:
        pytest.skip("not a git checkout")
    return listed.stdout.strip("\0").split("\0")


def packaged() -> list[str]:
    """Return where the wheel has the tracked files of the package and its configurations."""
    files = tracked("anomaly_clip", "configs")
    return sorted(re.sub(r"^configs/", "anomaly_clip/configs/", file) for file in files)


# -- metadata ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def metadata() -> Any:
    """Return the metadata that hatchling writes into wheel and sdist."""
    return hatchling.WheelBuilder(str(ROOT)).metadata


def address(metadata: Any) -> str:
    """Return the address of the project, as ``[project.urls]`` has it."""
    homepage: str = metadata.core.urls["Homepage"]
    return homepage


def test_metadata_describe_the_package(metadata: Any) -> None:
    assert metadata.version == VERSION
    assert metadata.core.license_expression == "Apache-2.0"
    assert set(metadata.core.urls) == {
        *("Homepage", "Documentation", "Source", "Changelog", "Issues"),
    }
    assert all(url.startswith(address(metadata)) for url in metadata.core.urls.values())
    for name in ("Documentation", "Changelog"):
        _, _, path = metadata.core.urls[name].partition("/blob/main/")
        assert (ROOT / path).is_file(), name
    assert len(metadata.core.description.splitlines()) == 1


def test_the_extra_all_has_everything_but_the_tools_of_development(metadata: Any) -> None:
    extras = metadata.core.optional_dependencies
    assert set(extras) == {"all", "dev", "export", "heif", "siglip"}
    assert sorted(extras["all"]) == sorted(extras["export"] + extras["heif"] + extras["siglip"])


def test_links_of_the_readme_hold_on_an_index_page(metadata: Any) -> None:
    """They lead to the files of the version's tag, and images to the files themselves."""
    text = metadata.core.readme
    assert RELATIVE.findall(text) == []
    home = re.escape(address(metadata))
    links = re.findall(rf"(!?)\[[^\]]*\]\({home}/(\w+)/v{re.escape(VERSION)}/([^)\s#]+)", text)
    assert len(links) > 20
    for image, kind, path in links:
        assert kind == ("raw" if image else "blob"), path
        assert (ROOT / path).is_file(), path
    original = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.sub(rf"{home}/(raw|blob)/v{re.escape(VERSION)}/", "", text) == original


@pytest.mark.parametrize(
    ("link", "absolute"),
    [
        ("[a](docs/a.md#part)", "[a](HOME/blob/vVERSION/docs/a.md#part)"),
        ("[a](./docs/a.md)", "[a](HOME/blob/vVERSION/docs/a.md)"),
        ("![a](a.png)", "![a](HOME/raw/vVERSION/a.png)"),
        ("[![a](a.png)](b.md)", "[![a](HOME/raw/vVERSION/a.png)](HOME/blob/vVERSION/b.md)"),
        ('<img alt="a" src="a.png">', '<img alt="a" src="HOME/raw/vVERSION/a.png">'),
        ('<source srcset="a.png">', '<source srcset="HOME/raw/vVERSION/a.png">'),
        ('<a href="docs/a.md">', '<a href="HOME/blob/vVERSION/docs/a.md">'),
        ("[a]: docs/a.md", "[a]: HOME/blob/vVERSION/docs/a.md"),
        ("[a](https://x.org/a.md)", "[a](https://x.org/a.md)"),
        ("[a](#part) [a](mailto:a@x.org)", "[a](#part) [a](mailto:a@x.org)"),
        (
            "f(x)[0](y) array[:, 1] (see a.md)",
            "f(x)[0](HOME/blob/vVERSION/y) array[:, 1] (see a.md)",
        ),
    ],
)
def test_relative_links_become_absolute(link: str, absolute: str, metadata: Any) -> None:
    from hatch_fancy_pypi_readme.hooks import FancyReadmeMetadataHook

    rules = metadata.config["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    project: dict[str, Any] = {"version": VERSION}
    FancyReadmeMetadataHook(str(ROOT), {**rules, "fragments": [{"text": link}]}).update(project)
    expected = absolute.replace("HOME", address(metadata)).replace("VERSION", VERSION)
    assert project["readme"]["text"] == expected


def test_the_citation_is_that_of_this_version(metadata: Any) -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["title"] == metadata.core.raw_name
    assert citation["version"] == VERSION
    assert citation["license"] == metadata.core.license_expression
    assert citation["url"] == citation["repository-code"] == address(metadata)
    assert [author["name"] for author in citation["authors"]] == [
        author["name"] for author in metadata.core.authors
    ]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\n## {VERSION} - {citation['date-released']}\n" in changelog
    papers = [paper["url"].rpartition("/")[2] for paper in citation["references"]]
    assert papers == ["2311.00453", "2403.09493", "2312.09480"]
    for paper in citation["references"]:
        assert paper["title"]
        assert all({"given-names", "family-names"} == set(author) for author in paper["authors"])


def test_forms_and_workflows_name_the_address_of_the_project(metadata: Any) -> None:
    """Wherever a file outside of pyproject.toml has the address, it is the same."""
    home = address(metadata)
    for path in tracked(".github", "*.md", "*.cff", ".ci"):
        if Path(path).suffix in (".md", ".yml", ".cff", ""):
            text = (ROOT / path).read_text(encoding="utf-8")
            addresses = set(re.findall(r"https://github\.com/[\w-]+/anomaly_clip\b", text))
            assert addresses <= {home}, path


# -- content -------------------------------------------------------------------------------------


def test_the_wheel_has_every_file_of_the_package() -> None:
    """Templates, published tables, weights, configurations, marker of types; and nothing else."""
    builder = hatchling.WheelBuilder(str(ROOT))
    files = [file.distribution_path for file in builder.recurse_selected_project_files()]
    forced = builder.config.force_include
    assert forced == {str(ROOT / "configs"): "anomaly_clip/configs"}
    configs = [
        f"anomaly_clip/configs/{path.removeprefix('configs/')}" for path in tracked("configs")
    ]
    assert sorted([*files, *configs]) == packaged()
    suffixes = {Path(file).suffix or Path(file).name for file in packaged()}
    assert {".jinja", ".css", ".js", ".yaml", ".safetensors"} <= suffixes
    assert "anomaly_clip/py.typed" in files


class Built:
    """Wheel and sdist of this checkout, built by hatchling, and the wheel that the sdist gives."""

    def __init__(self, folder: Path) -> None:
        build(ROOT, folder)
        [self.wheel] = folder.glob("*.whl")
        [self.sdist] = folder.glob("*.tar.gz")
        with tarfile.open(self.sdist) as archive:
            names = [member.name for member in archive.getmembers() if member.isfile()]
            archive.extractall(folder / "unpacked", filter="data")
        [source] = (folder / "unpacked").iterdir()
        self.source_files = sorted(name.removeprefix(f"{source.name}/") for name in names)
        build(source, folder / "again", "--target", "wheel")
        [self.wheel_of_sdist] = (folder / "again").glob("*.whl")


def build(source: Path, folder: Path, *options: str) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "--directory", str(folder), *options]
    subprocess.run(command, cwd=source, check=True, capture_output=True)


def content(wheel: Path) -> dict[str, str]:
    """Return the sha256 of each file of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: hashlib.sha256(archive.read(name)).hexdigest() for name in archive.namelist()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return Built(tmp_path_factory.mktemp("dist"))


def test_the_files_of_a_release_have_metadata_that_the_index_accepts() -> None:
    """A newer version than twine knows ends an upload, after the tag is public."""
    from hatchling.builders.sdist import SdistBuilder

    for builder in (hatchling.WheelBuilder(str(ROOT)), SdistBuilder(str(ROOT))):
        assert builder.config.core_metadata_constructor(builder.metadata).startswith(
            "Metadata-Version: 2.4\n"
        )


@pytest.mark.slow
def test_wheel_and_sdist_have_the_files_of_the_checkout(built: Built) -> None:
    files = content(built.wheel)
    assert sorted(name for name in files if name.startswith("anomaly_clip/")) == packaged()
    for name, digest in files.items():
        path = re.sub(r"^anomaly_clip/configs/", "configs/", name)
        if name.startswith("anomaly_clip/"):
            assert digest == hashlib.sha256((ROOT / path).read_bytes()).hexdigest(), name
    [entry] = [name for name in files if name.endswith("entry_points.txt")]
    with zipfile.ZipFile(built.wheel) as archive:
        assert "anomaly_clip = anomaly_clip.__main__:main" in archive.read(entry).decode()
    sources = [file for file in tracked() if not file.startswith("tests/golden/")]
    assert built.source_files == sorted([*sources, "PKG-INFO"])


@pytest.mark.slow
def test_the_sdist_builds_the_same_wheel(built: Built) -> None:
    assert built.wheel_of_sdist.name == built.wheel.name
    assert content(built.wheel_of_sdist) == content(built.wheel)


# -- the installed package -----------------------------------------------------------------------


class Installed:
    """A fresh environment with the wheel, from which this checkout cannot be imported.

    The dependencies are those of the running environment, whose folder is on the path. Such a
    folder's own ``.pth`` files, one of which names the checkout, have no effect. ``.ci/dist``
    installs the dependencies, too.
    """

    def __init__(self, wheel: Path, folder: Path) -> None:
        environment = folder / "environment"
        subprocess.run(
            [sys.executable, "-m", "venv", str(environment)], check=True, capture_output=True
        )
        self.programs = environment / ("Scripts" if os.name == "nt" else "bin")
        pip = [str(self.programs / "python"), "-m", "pip", "install", "--no-deps", "--no-index"]
        subprocess.run([*pip, str(wheel)], check=True, capture_output=True)
        base = {"base": str(environment), "platbase": str(environment)}
        self.packages = Path(sysconfig.get_path("purelib", "venv", base))
        here = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
        (self.packages / "dependencies.pth").write_text("\n".join(here) + "\n", encoding="utf-8")
        self.folder = folder / "empty"
        self.folder.mkdir()

    def run(self, line: str) -> str:
        """Run a command line in the empty folder and return what it prints; it must end with 0."""
        program, *words = shlex.split(line)
        variables = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(
            [self.programs / program, *words],
            cwd=self.folder,
            env={**variables, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        return done.stdout


@pytest.fixture(scope="module")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(built.wheel, tmp_path_factory.mktemp("installed"))


def commands_in(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("anomaly_clip ")]


@pytest.mark.slow
def test_the_wheel_alone_is_imported(installed: Installed) -> None:
    where = installed.run('python -c "import anomaly_clip; print(anomaly_clip.__file__)"')
    assert Path(where.strip()).is_relative_to(installed.packages)
    assert installed.run("anomaly_clip --version").strip() == f"anomaly_clip {VERSION}"
    version = "from importlib.metadata import version; print(version('anomaly_clip'))"
    assert installed.run(f'python -c "{version}"').strip() == VERSION


@pytest.mark.slow
def test_configurations_are_listed_and_printed_anywhere(installed: Installed) -> None:
    listed = {line.split()[0] for line in installed.run("anomaly_clip configs").splitlines()}
    assert listed == {
        file.removeprefix("configs/").removesuffix(".yaml") for file in tracked("configs")
    }
    for name in ("sdp", "sweeps/demo", "data/visa"):
        text = (ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8")
        assert installed.run(f"anomaly_clip configs {name}") == text


@pytest.mark.slow
def test_the_demo_runs_from_an_empty_folder(installed: Installed) -> None:
    installed.run(f"anomaly_clip {DEMO}")
    [page] = installed.folder.glob("runs/demo/*/report.html")
    assert "brass washer" in page.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize(
    "printing", ["sweep sweeps/demo --dry-run", "report --table clip_ad --dry-run"]
)
def test_printed_commands_run_in_an_empty_folder(printing: str, installed: Installed) -> None:
    lines = commands_in(installed.run(f"anomaly_clip {printing}"))
    configured = [line for line in lines if "--config" in line]
    assert len(configured) >= 3
    installed.run(f"{configured[-1]} --print_config")
