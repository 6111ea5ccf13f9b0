"""Every command and every Python block of the documentation runs, unless a comment says why not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from docs_blocks import REASONS, ROOT, blocks_of, complaint, counts, pages
from docs_runner import PageFailure, PageRun

PAGES = {str(page.relative_to(ROOT)): page for page in pages()}
CHEAP = ("docs/decisions.md",)
"""Pages whose blocks take less than 0.2 s; ``make test`` runs them, ``make docs-test`` all."""


def run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PageRun:
    folder = tmp_path / "page"
    folder.mkdir()
    page_run = PageRun(page, folder, monkeypatch)
    try:
        page_run.run()
    finally:
        for place, seconds in page_run.seconds.items():
            print(f"{seconds:7.1f} s  {place}")
    return page_run


@pytest.mark.slow
@pytest.mark.docs
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", [name for name in PAGES if name not in CHEAP])
def test_a_page_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(PAGES[name], tmp_path, monkeypatch)


@pytest.mark.docs
@pytest.mark.parametrize("name", CHEAP)
def test_a_cheap_page_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(PAGES[name], tmp_path, monkeypatch)


def test_no_block_stays_untested_without_a_reason() -> None:
    blocks = [block for page in PAGES.values() for block in blocks_of(page)]
    complaints = [f"{b.place}: {message}" for b in blocks if (message := complaint(b))]
    assert complaints == []
    number = counts(blocks)
    assert set(number) <= {"run", "text", *REASONS}
    assert number["run"] > 40


def page_of(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("docs_blocks.ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    return page


TEXT = """\
<!-- run: photo -->
# A page
<!-- exits: 2 -->
```console
$ anomaly_clip nonsense
anomaly_clip: unknown verb
```
<!-- output -->
```
anomaly_clip: unknown verb 'nonsense': known: fit, ...preview
```
```python
# my_value.py
value = 3
```
```python
from my_value import value

print(value + 1)
```
<!-- output -->
```text
5
```
<!-- not run: needs a GPU -->
```
anomaly_clip fit --trainer.devices 8
```
"""


def test_a_small_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = page_of(tmp_path, TEXT, monkeypatch)
    blocks = blocks_of(page)
    assert [complaint(block) for block in blocks] == [None] * len(blocks)
    assert counts(blocks) == {"run": 4, "text": 1, "needs a GPU": 1}
    page_run = run(page, tmp_path, monkeypatch)
    assert page_run.output == "4\n"
    assert len(page_run.seconds) == 6
    assert (page_run.folder / "photo.jpg").is_file()


IMPORTING = """\
```python
# my_value.py
value = 3
```
```python
import my_value
```
```
anomaly_clip check --data Demo
```
```python
import sys

print(sys.modules["my_value"] is my_value)
```
"""


def test_a_command_does_not_see_what_the_page_has_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    def main(words: list[str]) -> int:
        seen.append("my_value" in sys.modules or str(tmp_path / "page") in sys.path)
        return 0

    monkeypatch.setattr("docs_runner.main", main)
    page_run = run(page_of(tmp_path, IMPORTING, monkeypatch), tmp_path, monkeypatch)
    assert seen == [False]
    assert page_run.output == "True\n"


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("```\nanomaly_clip nonsense\n```\n", "exit code 2, not 0"),
        ("```python\n1 / 0\n```\n", "page.md:1: ZeroDivisionError"),
        ("```python\nprint(1)\n```\n<!-- output -->\n```\ntwo\n```\n", "not in the output: two"),
        ("```yaml\nmodel: {class_path: PaDim}\n```\n", "page.md:1: exit code 2"),
        ("```yaml\ndata: Demo\ntrainr: {max_epochs: 1}\n```\n", "page.md:1: exit code 2"),
        ("<!-- run: nothing -->\n", "no such folder"),
    ],
)
def test_a_wrong_page_fails(
    block: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = page_of(tmp_path, block, monkeypatch)
    with pytest.raises(PageFailure, match=message):
        run(page, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- not run: too lazy -->\n```\nanomaly_clip check\n```\n", "'too lazy' is not one of"),
        ("```\na tree of files\n```\n", "give the language text"),
        ("```text\nanomaly_clip fit\n```\n", "text with a command"),
        ("```rust\nfn main() {}\n```\n", "language rust is not tested"),
        ("```\nwandb sweep x.yaml\n```\n", "no program that tests may run"),
        ("<!-- not run: needs a GPU -->\nno block\n", "no block follows"),
    ],
)
def test_a_block_without_a_reason_is_reported(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = page_of(tmp_path, text, monkeypatch)
    if message == "no block follows":
        with pytest.raises(ValueError, match=message):
            blocks_of(page)
        return
    (block,) = blocks_of(page)
    assert message in (complaint(block) or "")
