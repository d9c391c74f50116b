"""What is shipped, what it needs, and what must never be in it."""

import email
import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import mtl_optax

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]

# Places of one machine, and addresses of package indexes: put together here so that this file does
# not contain what it looks for.
FORBIDDEN = [
    "/" + "work/",
    "/" + "tmp/dev",
    "/" + "root/",
    "pypi" + ".org",
    "pythonhosted" + ".org",
    "--index" + "-url",
    "--extra-index" + "-url",
    "--find" + "-links",
]
BINARY = {".png", ".npz", ".npy", ".gz", ".pdf", ".ico"}


def requirement_name(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9_.-]+", requirement)
    assert found, requirement
    return found[0]


def lower_bounds(requirements: list[str]) -> dict[str, str]:
    pairs = (re.match(r"([A-Za-z0-9_.-]+)>=([0-9.]+)$", text) for text in requirements)
    return {found[1]: found[2] for found in pairs if found}


def tracked_files() -> list[Path]:
    """The files under version control; outside a git checkout there is nothing to ask."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True
    )
    paths = (ROOT / name for name in listed.stdout.split("\0") if name)
    return [path for path in paths if path.is_file()]


def test_runtime_needs_three_packages() -> None:
    assert sorted(map(requirement_name, PROJECT["dependencies"])) == ["jax", "numpy", "optax"]


def test_every_runtime_need_has_a_lower_bound() -> None:
    assert sorted(lower_bounds(PROJECT["dependencies"])) == ["jax", "numpy", "optax"]


def test_workflow_tries_the_lower_bounds() -> None:
    workflow = ROOT / ".github" / "workflows" / "ci.yml"
    if not workflow.exists():
        pytest.skip("the workflow is not part of this copy")
    pinned = dict(re.findall(r'"(\w+)==([0-9.]+?)(?:\.\*)?"', workflow.read_text(encoding="utf-8")))
    bounds = lower_bounds(PROJECT["dependencies"])
    bounds |= {"flax": lower_bounds(PROJECT["optional-dependencies"]["examples"])["flax"]}
    assert {name: pinned.get(name) for name in bounds} == bounds


def test_importing_needs_no_extra() -> None:
    """The library imports with every optional package hidden."""
    extras = ["flax", "matplotlib", "orbax", "pandas", "rich", "sklearn", "tqdm", "libtpu"]
    code = f"import sys\nfor name in {extras}: sys.modules[name] = None\nimport mtl_optax"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_typed() -> None:
    assert mtl_optax.__file__ is not None
    assert Path(mtl_optax.__file__).with_name("py.typed").is_file()


def test_layers() -> None:
    """The four floors: what `lint-imports` says, where it is installed."""
    pytest.importorskip("importlinter")
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run(
        [sys.executable, "-c", code, "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The members of the wheel that this checkout builds."""
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("building a wheel without a network needs hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--no-cache-dir", "--wheel-dir", str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", *options, str(ROOT)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_holds_the_package_alone(wheel: dict[str, bytes]) -> None:
    info = f"mtl_optax-{mtl_optax.__version__}.dist-info"
    assert {name.split("/")[0] for name in wheel} == {"mtl_optax", info}
    sources = [p for p in (ROOT / "mtl_optax").rglob("*") if p.suffix in (".py", ".typed")]
    expected = {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in sources}
    assert {name: wheel[name] for name in wheel if not name.startswith(info)} == expected
    assert "mtl_optax/py.typed" in wheel
    assert wheel[f"{info}/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()


def test_the_wheel_says_what_it_needs(wheel: dict[str, bytes]) -> None:
    (name,) = (name for name in wheel if name.endswith(".dist-info/METADATA"))
    metadata = email.message_from_bytes(wheel[name])
    assert (metadata["Name"], metadata["Version"]) == ("mtl_optax", mtl_optax.__version__)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == PROJECT["requires-python"]
    needs = [need for need in metadata.get_all("Requires-Dist") if "extra ==" not in need]
    assert sorted(needs) == sorted(PROJECT["dependencies"])
    assert set(metadata.get_all("Provides-Extra")) == {
        extra.replace("_", "-") for extra in PROJECT["optional-dependencies"]
    }


def test_no_file_names_a_machine_or_an_index() -> None:
    found = []
    for path in tracked_files():
        if path.suffix in BINARY:
            continue
        text = path.read_text(encoding="utf-8")
        found += [f"{path.relative_to(ROOT)}: {word}" for word in FORBIDDEN if word in text]
    assert found == []


def test_no_data_set_is_committed() -> None:
    """Only reference numbers and small fixtures: no file above two megabytes."""
    large = [path.name for path in tracked_files() if path.stat().st_size > 2_000_000]
    assert large == []
