"""The notebook in ``examples/``: as it is committed, and executed with random weights."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from notebook_runs import NOTEBOOK, PARAMETERS, clean, execute, read

MAX_BYTES = 400_000
SMALL = """
BACKBONE["weights"] = "random"
NUM_GOOD = 24
"""
"""Parameters of the execution in the tests."""
MACHINE = re.compile(r"(?<![\w.])/(?:home|root|tmp|work|usr|Users|var)/|[A-Z]:\\\\|0x[0-9a-f]{6}")
"""Paths and addresses of the machine on which the notebook was executed."""


def texts(cell: Any) -> Iterator[str]:
    """Yield the text of a cell's outputs; images are not text."""
    for output in cell.get("outputs", []):
        if "text" in output:
            yield output["text"]
        yield from (str(v) for k, v in output.get("data", {}).items() if k.startswith("text"))


def shown(notebook: Any) -> str:
    return "\n".join(text for cell in notebook.cells for text in texts(cell))


def test_the_notebook_is_valid_small_and_has_outputs() -> None:
    nbformat = pytest.importorskip("nbformat")
    notebook = read()
    nbformat.validate(notebook)
    assert NOTEBOOK.stat().st_size < MAX_BYTES
    assert notebook.metadata.kernelspec == {
        "display_name": "Python 3",
        "language": "python",
        "name": "python3",
    }
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert all(cell.outputs for cell in code if PARAMETERS not in cell.metadata.get("tags", []))
    assert sum("image/jpeg" in o.get("data", {}) for cell in code for o in cell.outputs) == 3
    assert "false alarms" in shown(notebook)
    assert "PyTorch was not imported" in shown(notebook)


def test_the_notebook_shows_nothing_of_the_machine() -> None:
    pytest.importorskip("nbformat")
    notebook = read()
    assert MACHINE.findall(shown(notebook)) == []
    before = json.dumps(notebook)
    assert json.dumps(clean(notebook)) == before  # no messages, times or copies of images


def test_what_differs_between_executions_is_removed() -> None:
    v4 = pytest.importorskip("nbformat").v4
    cell = v4.new_code_cell(
        "x",
        metadata={"execution": {"iopub.status.busy": "2026"}},
        outputs=[
            v4.new_output("stream", name="stderr", text="/tmp/x: 3 s"),
            v4.new_output("stream", name="stdout", text="kept"),
            v4.new_output(
                "execute_result",
                {"text/plain": "<Image at 0x7FA1>", "image/png": "p", "image/jpeg": "j"},
                execution_count=7,
            ),
        ],
    )
    notebook = clean(v4.new_notebook(cells=[v4.new_markdown_cell("a"), cell]))
    result = notebook.cells[1]
    assert [output.output_type for output in result.outputs] == ["stream", "execute_result"]
    assert result.outputs[1].data == {"text/plain": "<Image>", "image/jpeg": "j"}
    assert (result.execution_count, result.outputs[1].execution_count) == (1, 1)
    assert (result.id, result.metadata) == ("cell-02", {})


@pytest.mark.slow
def test_the_notebook_runs_as_it_is(tmp_path: Path) -> None:
    for name in ("nbclient", "nbformat", "ipykernel", "onnxruntime"):
        pytest.importorskip(name)
    folder = tmp_path / "reader"
    folder.mkdir()
    notebook = execute(read(), folder, SMALL)
    text = shown(notebook)
    assert re.search(r"new_photos\S.* p 0\.\d+ +(normal|anomalous)\n", text)
    assert re.search(r"good +\d+ of  20 called anomalous\n", text)
    assert re.search(r"With these \d+ calibration images", text)
    assert re.search(r"\d+\.png +\d+\.\d\d +anomalous\nPyTorch was not imported\n", text)
    assert {path.name for path in folder.iterdir()} == {"photos", "new_photos", "detector"}
