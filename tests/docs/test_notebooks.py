"""Every notebook runs from top to bottom and prints what is stored in it."""

import ast
import importlib.util
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nbclient")
from run_notebooks import ENVIRONMENT, NOTEBOOKS, ROOT, execute, read

# An absolute path in an output would be one of the machine that ran it.
MACHINE_PATH = re.compile(r"(?:^|[\s\"'(=])(?:/(?:home|root|tmp|usr|work|opt|Users|var)/|[A-Z]:\\)")
NUMBER = re.compile(r"[-+]?\d+(?:\.\d*)?(?:e[-+]?\d+)?")
# Losses after hundreds of steps in float32, printed with few digits: rounding differs between
# processors and releases of XLA, and training amplifies it.
TOLERANCE = {"rel": 0.03, "abs": 0.003}
WIDE_TOLERANCE = {"rel": 0.3, "abs": 0.003}
# A test needs no network: addresses lead nowhere, and a notebook goes on with what it has.
NO_NETWORK = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
# The tag of cells whose text is not the same everywhere: times, and results on data that is fetched.
VARIES = "varies"
# The tag of cells whose page says that the second digit differs between processors.
LAST_DIGITS = "last-digits"
MAX_BYTES = 400_000


all_notebooks = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def shown(cell: Any) -> tuple[str, list[str]]:
    """What a reader sees below a cell: all its text, and the kinds of everything else."""
    text, kinds = "", []
    for output in cell.outputs:
        data = output.get("data", {})
        text += output.get("text", "") + data.get("text/plain", "")
        kinds += sorted(kind for kind in data if kind != "text/plain")
    return text, kinds


def differs(found: str, stored: str, tolerance: dict[str, float]) -> bool:
    """Whether two texts differ in more than the last digits of numbers."""
    if NUMBER.split(found) != NUMBER.split(stored):
        return True
    pairs = zip(NUMBER.findall(found), NUMBER.findall(stored), strict=True)
    return any(float(a) != pytest.approx(float(b), **tolerance) for a, b in pairs)


def python_of(cell: Any) -> str:
    """The source without the commands of IPython."""
    lines = cell.source.splitlines()
    return "\n".join(re.sub(r"^(\s*)%.*", r"\1pass", line) for line in lines)


def imported(program: ast.AST) -> set[str]:
    """The top-level names of what a program imports."""
    modules = []
    for node in ast.walk(program):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules.append(node.module or "")
    return {module.partition(".")[0] for module in modules}


def test_there_are_six_notebooks() -> None:
    assert [path.stem for path in NOTEBOOKS] == [
        "01_quickstart",
        "02_metabalance_movielens",
        "03_one_backward_pass",
        "04_which_method",
        "05_molecules",
        "physics",
    ]


@all_notebooks
def test_it_needs_nothing_but_the_package(path: Path) -> None:
    notebook = read(path)
    assert notebook.metadata.kernelspec.name == "python3"
    install, *cells = code_cells(notebook)
    # Under its name or from the checkout: there is no address.
    assert re.findall(r"^ *%.*", install.source, re.MULTILINE) == [
        '        %pip install -q "{needed[name]}"'
    ]
    for cell in cells:
        assert not re.search(r"^\s*[%!]", cell.source, re.MULTILINE), cell.source
    modules = set().union(*(imported(ast.parse(python_of(cell))) for cell in [install, *cells]))
    known = set(sys.stdlib_module_names) | {"flax", "jax", "matplotlib", "numpy", "optax"}
    assert modules - known == {"mtl_optax"}


@all_notebooks
@pytest.mark.parametrize("missing", ["all", "matplotlib"])
@pytest.mark.parametrize(
    ("place", "source"), [("notebooks", ".."), (".", "."), ("elsewhere", "mtl_optax")]
)
def test_each_missing_package_is_installed_by_itself(
    path: Path,
    missing: str,
    place: str,
    source: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "elsewhere/mtl_optax").mkdir(parents=True)  # a clone, not the package in it
    (tmp_path / "mtl_optax").mkdir()
    (tmp_path / "mtl_optax/__init__.py").touch()
    if place == "elsewhere":
        (tmp_path / "mtl_optax/__init__.py").unlink()
    monkeypatch.chdir(tmp_path / place)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if missing in ("all", name) else name
    )
    install, *cells = code_cells(read(path))
    installed: list[str] = []
    program = re.sub(r'%pip install -q "{(.*)}"', r"installed.append(\1)", install.source)
    exec(program, {"installed": installed})
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    known = [*project["dependencies"], *project["optional-dependencies"]["notebooks"]]
    used = set().union(*(imported(ast.parse(python_of(cell))) for cell in cells))
    # Installing the package brings jax and numpy.
    names = [name for name in ("optax", "matplotlib", "flax") if name in used]
    expected = [next(each for each in known if each.startswith(name)) for name in names]
    expected = [source, *expected] if missing == "all" else ["matplotlib>=3.9"]
    assert installed == expected


@all_notebooks
def test_outputs_are_kept_and_clean(path: Path) -> None:
    assert path.stat().st_size < MAX_BYTES
    notebook = read(path)
    cells = code_cells(notebook)
    assert [sorted(set(cell.metadata) - {"tags"}) for cell in cells] == [[]] * len(cells)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert any("image/png" in output.get("data", {}) for output in outputs(notebook))
    assert [output for output in outputs(notebook) if output.output_type == "error"] == []
    assert [output for output in outputs(notebook) if output.get("name") == "stderr"] == []
    texts = [shown(cell)[0] for cell in cells] + [cell.source for cell in notebook.cells]
    assert [text for text in texts if MACHINE_PATH.search(text)] == []


@pytest.mark.slow
@all_notebooks
def test_a_run_shows_what_is_stored(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = {**ENVIRONMENT, **NO_NETWORK, "MTL_OPTAX_CACHE": str(tmp_path / "cache")}
    for name, value in here.items():
        monkeypatch.setenv(name, value)
    stored, found = read(path), execute(read(path), tmp_path)
    assert [output for output in outputs(found) if output.output_type == "error"] == []
    for before, after in zip(code_cells(stored), code_cells(found), strict=True):
        (old_text, old_kinds), (text, kinds) = shown(before), shown(after)
        assert kinds == old_kinds, after.source
        tags = after.metadata.get("tags", [])
        if VARIES not in tags:
            tolerance = WIDE_TOLERANCE if LAST_DIGITS in tags else TOLERANCE
            assert not differs(text, old_text, tolerance), f"stored:\n{old_text}\nfound:\n{text}"


def test_the_figures_of_the_molecules_are_those_of_the_table() -> None:
    table = ROOT / "examples" / "studies" / "results" / "molecules" / "table.md"
    if not table.exists():
        pytest.skip("the results are not part of this copy")
    row = re.compile(r"^\| (.+?) \| (\d+) \| (\S+) ± ([\d.]+)", re.MULTILINE)
    found = {
        name: (int(runs), float(mean), float(error))
        for name, runs, mean, error in row.findall(table.read_text("utf-8"))
    }
    notebook = read(ROOT / "notebooks" / "05_molecules.ipynb")
    (cell,) = [c.source for c in code_cells(notebook) if "RESULTS = {" in c.source]
    (shown,) = [
        ast.literal_eval(node.value)
        for node in ast.parse(cell).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "RESULTS"
    ]
    assert len(shown) == 11
    assert {name: found[name] for name in shown} == shown


@pytest.mark.slow
def test_tables_are_split_over_all_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    several = {**ENVIRONMENT, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    for name, value in several.items():
        monkeypatch.setenv(name, value)
    notebook = read(ROOT / "notebooks" / "03_one_backward_pass.ipynb")
    # Up to what the compiled steps do; the training after it takes long.
    last = next(n for n, cell in enumerate(notebook.cells) if ".cost_analysis()" in cell.source)
    notebook.cells = notebook.cells[: last + 1]
    text = "".join(shown(cell)[0] for cell in code_cells(execute(notebook, tmp_path)))
    assert "split as ('data',) over 4 device(s)" in text
    ratios = re.findall(r"(\w+) +operations (\S+) x plain", text)
    assert {name: round(float(ratio)) for name, ratio in ratios} == {
        "sum": 1,
        "representation": 1,
        "parameters": 3,
    }


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
    assert differs(found, "click 0.401, spend 128.0", TOLERANCE) == different
