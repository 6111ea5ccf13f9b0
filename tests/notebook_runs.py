"""Execute the notebook of the examples, and write it with its outputs.

    python tests/notebook_runs.py                   download ImageNet's weights at the first use
    python tests/notebook_runs.py --weights FILE    read them from a file

What differs between two executions is removed: times, messages, and copies of images in other
formats. Needs nbclient and ipykernel.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "examples" / "own_folder.ipynb"
PARAMETERS = "parameters"
"""Tag of the cell whose values an execution may replace, as papermill names it."""
LONGEST = 600  # seconds of one cell


def read(file: Path = NOTEBOOK) -> Any:
    """Return a notebook."""
    import nbformat

    return nbformat.read(file, as_version=4)


def execute(notebook: Any, folder: Path, parameters: str = "") -> Any:
    """Execute a notebook in a folder, as a reader does, and return it with outputs.

    Args:
        notebook: The notebook, which is changed.
        folder: Working directory.
        parameters: Statements to execute after the cell of the parameters.
    """
    import nbformat
    from nbclient import NotebookClient

    cells = notebook.cells
    [place] = [n for n, cell in enumerate(cells) if PARAMETERS in cell.metadata.get("tags", [])]
    if parameters:
        cells.insert(place + 1, nbformat.v4.new_code_cell(parameters))
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=LONGEST, resources=resources, kernel_name="python3").execute()
    if parameters:
        del cells[place + 1]
    return notebook


def clean(notebook: Any) -> Any:
    """Remove what differs between two executions, and what a page does not show."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for number, cell in enumerate(code, start=1):
        cell.execution_count = number
        cell.metadata.pop("execution", None)
        cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = number
            data = output.get("data", {})
            if "image/jpeg" in data:
                data.pop("image/png", None)
            for kind in ("text/plain", "text/html"):
                if kind in data:
                    data[kind] = re.sub(r" at 0x[0-9A-Fa-f]+", "", data[kind])
    for number, cell in enumerate(notebook.cells, start=1):
        cell.id = f"cell-{number:02d}"
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def main(arguments: list[str] | None = None) -> int:
    """Execute the notebook in a temporary folder and write it."""
    import nbformat

    parser = argparse.ArgumentParser(description="Execute the notebook of the examples.")
    parser.add_argument("--weights", type=Path, help="weights of SqueezeNet 1.1")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        parameters = ""
        if options.weights is not None:
            shutil.copy(options.weights, folder)
            parameters = f'BACKBONE["weights"] = {options.weights.name!r}'
        notebook = read()
        tags = [cell.metadata.get("tags", []) for cell in notebook.cells]
        notebook = clean(execute(notebook, Path(folder), parameters))
    for cell, names in zip(notebook.cells, tags, strict=True):
        cell.metadata = {"tags": names} if names else {}
    nbformat.validate(notebook)
    NOTEBOOK.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
