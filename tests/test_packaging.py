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
from types import ModuleType

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


@pytest.mark.slow
def test_importing_needs_no_extra() -> None:
    """The library imports with every optional package hidden."""
    extras = ["flax", "matplotlib", "orbax", "pandas", "rich", "sklearn", "libtpu"]
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


@pytest.mark.slow
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


def test_the_source_archive_does_without_what_it_leaves_out() -> None:
    left_out = PYPROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["exclude"]
    assert left_out == ["/examples/studies", "/examples/compare.py", "/tests/studies"]
    imports = re.compile(r"^\s*(?:from|import) examples\.(?:studies|compare)\b", re.MULTILINE)
    found = []
    for path in tracked_files():
        name = f"/{path.relative_to(ROOT).as_posix()}"
        if path.suffix == ".py" and not name.startswith(tuple(left_out)):
            found += [name] * bool(imports.search(path.read_text(encoding="utf-8")))
    assert found == []


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


def workflows() -> list[Path]:
    folder = ROOT / ".github" / "workflows"
    if not folder.exists():
        pytest.skip("the workflows are not part of this copy")
    return sorted(folder.glob("*.yml"))


def test_actions_are_pinned_by_commit() -> None:
    used = [
        f"{file.name}: {line.strip()}"
        for file in workflows()
        for line in file.read_text(encoding="utf-8").splitlines()
        if "uses:" in line
    ]
    assert used
    assert [line for line in used if not re.search(r"@[0-9a-f]{40} # v\d+\.\d+\.\d+$", line)] == []


@pytest.fixture
def release_check() -> ModuleType:
    """The script of the release workflow."""
    file = ROOT / ".github" / "release_check.py"
    if not file.exists():
        pytest.skip("the script is not part of this copy")
    spec = importlib.util.spec_from_file_location("release_check", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """The files that name a version, as they must be for the tag v1.2.3."""
    (tmp_path / "mtl_optax").mkdir()
    (tmp_path / "mtl_optax" / "__init__.py").write_text('__version__ = "1.2.3"\n')
    (tmp_path / "CITATION.cff").write_text("cff-version: 1.2.0\nversion: 1.2.3\n")
    (tmp_path / "README.md").write_text("Licensed under Apache-2.0. Version 1.2.3.\n")
    changelog = "## [Unreleased]\n\n## [1.2.3] - 2030-01-31\n\n- A change.\n\n## [0.1.0]\n"
    (tmp_path / "CHANGELOG.md").write_text(changelog)
    return tmp_path


def test_a_release_that_agrees_passes(release_check: ModuleType, released: Path) -> None:
    assert release_check.problems("v1.2.3", released) == []
    assert len(release_check.problems("v1.2.4", released)) == 5
    assert release_check.problems("1.2.3", released) == [
        "the tag must look like v1.2.3; found 1.2.3"
    ]


@pytest.mark.parametrize(
    ("name", "old", "new", "problem"),
    [
        ("mtl_optax/__init__.py", "1.2.3", "1.2.4", "must name the version 1.2.3; found 1.2.4"),
        ("CITATION.cff", "version: 1.2.3", "", "must name the version 1.2.3; found none"),
        ("README.md", "1.2.3", "1.2.2", "must name the version 1.2.3; found 1.2.2"),
        ("CHANGELOG.md", "[1.2.3] - 2030-01-31", "[1.2.3]", "must have a heading"),
        ("CHANGELOG.md", "[Unreleased]\n", "[Unreleased]\n\n- More.\n", "under Unreleased"),
    ],
)
def test_a_release_that_disagrees_does_not(
    release_check: ModuleType, released: Path, name: str, old: str, new: str, problem: str
) -> None:
    file = released / name
    file.write_text(file.read_text().replace(old, new))
    (found,) = release_check.problems("v1.2.3", released)
    assert name in found and problem in found


def test_the_workflow_sees_whether_it_passes(release_check: ModuleType, released: Path) -> None:
    script = released / ".github" / "release_check.py"
    script.parent.mkdir()
    script.write_text(Path(str(release_check.__file__)).read_text("utf-8"), "utf-8")
    for tag, code in {"v1.2.3": 0, "v1.2.4": 1}.items():
        assert subprocess.run([sys.executable, script, tag]).returncode == code


def test_this_version_is_named_everywhere(release_check: ModuleType) -> None:
    """Between releases only the heading and the entries under Unreleased may be open."""
    found = release_check.problems(f"v{mtl_optax.__version__}")
    assert [text for text in found if "must name" in text] == []


def test_pre_commit_runs_the_tools_of_ci() -> None:
    file, script = ROOT / ".pre-commit-config.yaml", ROOT / ".ci" / "run"
    if not file.exists() or not script.exists():
        pytest.skip("the configuration is not part of this copy")
    entries = re.findall(r"entry: (.*)$", file.read_text(encoding="utf-8"), flags=re.M)
    ran = script.read_text(encoding="utf-8")
    assert [entry for entry in entries if entry.split(" --")[0] not in ran] == []
    assert {entry.split()[0] for entry in entries} == {"ruff", "basedpyright", "lint-imports"}
