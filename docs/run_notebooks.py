"""Runs the notebooks.

`python docs/run_notebooks.py [NAME ...]` runs them and stores their outputs in them.
"""

import copy
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbclient
import nbformat

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# What a reader has: the pictures in the page, one device. The stored outputs are those of a CPU.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    "PYTHONPATH": str(ROOT),
    "XLA_FLAGS": "",
}


def read(path: Path) -> Any:
    """A notebook, if it is valid."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def execute(notebook: Any, folder: Path) -> Any:
    """The notebook with the outputs of a run in `folder`."""
    metadata = copy.deepcopy(notebook.metadata)
    resources = {"metadata": {"path": str(folder)}}
    client = nbclient.NotebookClient(
        notebook, timeout=300, resources=resources, record_timing=False
    )
    executed = client.execute()
    executed.metadata = metadata  # the kernel adds its versions
    return executed


if __name__ == "__main__":
    os.environ.update(ENVIRONMENT)
    chosen = sys.argv[1:] or [path.stem for path in NOTEBOOKS]
    for notebook_path in [ROOT / "notebooks" / f"{name}.ipynb" for name in chosen]:
        with tempfile.TemporaryDirectory() as directory:
            nbformat.write(execute(read(notebook_path), Path(directory)), notebook_path)
