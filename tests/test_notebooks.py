"""Every notebook runs from top to bottom and prints what is stored in it.

`python tests/test_notebooks.py` runs them and stores their outputs.
"""

import os
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# An absolute path in an output would be one of the machine that ran it.
MACHINE_PATH = re.compile(r"(?:^|[\s\"'(=])(?:/(?:home|root|tmp|usr|work|opt|Users|var)/|[A-Z]:\\)")
NUMBER = re.compile(r"[-+]?\d+(?:\.\d*)?(?:e[-+]?\d+)?")
# Losses after hundreds of steps in float32, printed with few digits: rounding differs between
# processors and releases of XLA, and training amplifies it.
TOLERANCE = {"rel": 0.03, "abs": 0.003}
# What a reader has: the pictures in the page, one device. The stored outputs are those of a CPU.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    "PYTHONPATH": str(ROOT),
    "XLA_FLAGS": "",
}


def read(path: Path) -> Any:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def execute(path: Path, folder: Path) -> Any:
    """The notebook with the outputs of a run in `folder`."""
    notebook = read(path)
    resources = {"metadata": {"path": str(folder)}}
    client = nbclient.NotebookClient(
        notebook, timeout=300, resources=resources, record_timing=False
    )
    executed = client.execute()
    executed.metadata = read(path).metadata  # the kernel adds its versions
    return executed


def shown(cell: Any) -> tuple[str, list[str]]:
    """What a reader sees below a cell: all its text, and the kinds of everything else."""
    text, kinds = "", []
    for output in cell.outputs:
        data = output.get("data", {})
        text += output.get("text", "") + data.get("text/plain", "")
        kinds += sorted(kind for kind in data if kind != "text/plain")
    return text, kinds


def differs(found: str, stored: str) -> bool:
    """Whether two texts differ in more than the last digits of numbers."""
    if NUMBER.split(found) != NUMBER.split(stored):
        return True
    pairs = zip(NUMBER.findall(found), NUMBER.findall(stored), strict=True)
    return any(float(a) != pytest.approx(float(b), **TOLERANCE) for a, b in pairs)


def test_there_are_two_notebooks() -> None:
    assert [path.name for path in NOTEBOOKS] == ["physics.ipynb", "quickstart.ipynb"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_kept_and_clean(path: Path) -> None:
    notebook = read(path)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert any("image/png" in output.get("data", {}) for output in outputs(notebook))
    assert [output for output in outputs(notebook) if output.output_type == "error"] == []
    assert [output for output in outputs(notebook) if output.get("name") == "stderr"] == []
    texts = [shown(cell)[0] for cell in cells] + [cell.source for cell in notebook.cells]
    assert [text for text in texts if MACHINE_PATH.search(text)] == []


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_run_shows_what_is_stored(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    stored, found = read(path), execute(path, tmp_path)
    assert [output for output in outputs(found) if output.output_type == "error"] == []
    for before, after in zip(code_cells(stored), code_cells(found), strict=True):
        (old_text, old_kinds), (text, kinds) = shown(before), shown(after)
        assert kinds == old_kinds, after.source
        assert not differs(text, old_text), f"stored:\n{old_text}\nfound:\n{text}"


@pytest.mark.parametrize(
    ("found", "different"),
    [
        ("click 0.401, spend 128.0", False),
        ("click 0.402, spend 127.5", False),
        ("click 0.501, spend 128.0", True),
        ("click 0.401, spend -128.0", True),
        ("click 0.401, buy 128.0", True),
        ("click 0.401", True),
        ("", True),
    ],
)
def test_what_counts_as_different(found: str, different: bool) -> None:
    assert differs(found, "click 0.401, spend 128.0") == different


if __name__ == "__main__":
    os.environ.update(ENVIRONMENT)
    for notebook_path in NOTEBOOKS:
        with tempfile.TemporaryDirectory() as directory:
            nbformat.write(execute(notebook_path, Path(directory)), notebook_path)
