"""What the documentation says is run, and what it names exists."""

import doctest
import importlib
import importlib.util
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import method_pages
import optax
import pytest
from methods_table import renewed

import mtl_optax

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MARKED = {
    "main": 'python -m pip install -e ".[examples]" && python -m examples.compare',
    "test": 'python -m pip install -e ".[test]" && python -m pytest',
}
# Modules that an extra is needed to import, and the module that the extra brings.
NEED_EXTRA = {"mtl_optax.plotting": "matplotlib"}


def module_names() -> list[str]:
    found = pkgutil.walk_packages(mtl_optax.__path__, "mtl_optax.")
    return ["mtl_optax", *sorted(module.name for module in found)]


def public_callables() -> list[str]:
    return [name for name in method_pages.public_names() if callable(getattr(mtl_optax, name))]


@pytest.fixture(autouse=True)
def default_precision() -> Iterator[None]:
    """Examples print float32 numbers, also when the suite runs in float64."""
    with jax.enable_x64(False):
        yield


@pytest.mark.parametrize(
    "name",
    [  # those of a method are alike
        pytest.param(name, marks=pytest.mark.slow if name.count(".") == 3 else ())
        for name in module_names()
    ],
)
def test_doctests(name: str) -> None:
    if name in NEED_EXTRA and importlib.util.find_spec(NEED_EXTRA[name]) is None:
        pytest.skip(f"{name} needs {NEED_EXTRA[name]}")
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples; see the output"


def test_readme_diff_applies_and_both_programs_run() -> None:
    found = re.findall(r"^```diff\n(.*?)^```", README, flags=re.M | re.S)
    assert len(found) == 1 and README[: README.index(found[0])].count("\n") <= 20
    x = jax.random.normal(jax.random.key(0), (64, 8))
    batch = {"x": x, "click": (x[:, 0] > 0).astype(x.dtype), "spend": 30.0 * x[:, 1]}
    heads = 0.3 * jax.random.normal(jax.random.key(1), (2, 4))
    start = {"shared": 0.1 * jnp.ones((8, 4)), "click": heads[0], "spend": heads[1]}
    spent = {}
    for program, left_out in {"plain": "+", "balanced": "-"}.items():
        lines = [line[1:] for line in found[0].splitlines() if not line.startswith(left_out)]
        names = {"jax": jax, "jnp": jnp, "optax": optax, "mtl": mtl_optax}
        exec(compile("\n".join(lines), f"README.md, the {program} program", "exec"), names)
        params, opt_state = start, names["tx"].init(start)
        for _ in range(3):
            params, opt_state = names["train_step"](params, opt_state, batch)
        assert jax.tree.all(jax.tree.map(lambda p: bool(jnp.isfinite(p).all()), params))
        spent[program] = params
    # Both trained, and not alike.
    moved = {name: jnp.abs(p["shared"] - start["shared"]).max() for name, p in spent.items()}
    assert min(moved.values()) > 0
    assert jnp.abs(spent["plain"]["shared"] - spent["balanced"]["shared"]).max() > 1e-4


@pytest.mark.parametrize("name", public_callables())
def test_public_callables_are_documented(name: str) -> None:
    thing = getattr(mtl_optax, name)
    text = inspect.getdoc(thing) or ""
    assert text, f"{name} has no docstring"
    if inspect.isclass(thing):  # a state: its fields are what it documents
        return
    assert re.search(r"^Examples?:$", text, flags=re.M), f"{name} has no Example: section"
    assert ">>> " in text, f"the example of {name} cannot be run"


def test_readme_lists_the_methods() -> None:
    assert renewed(README) == README, "run: python docs/methods_table.py"


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_relative_links_lead_somewhere(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_method_links_its_reference() -> None:
    for method in mtl_optax.METHODS.values():
        text = inspect.getdoc(method.factory) or ""
        _, *references = re.split(r"^References?:$", text, flags=re.M)
        assert references and "https://" in references[-1], f"{method.name} links no reference"


@pytest.mark.parametrize("marker", MARKED)
def test_readme_marks_its_commands(marker: str) -> None:
    found = re.findall(rf"<!-- {marker} -->\n```bash\n(.*?)\n```", README, flags=re.S)
    assert found == [MARKED[marker]]


def test_readme_marks_nothing_else() -> None:
    markers = re.findall(r"<!--\s*(.*?)\s*-->", README)
    assert sorted(markers) == sorted([*MARKED, "methods", "/methods"])


def test_readme_is_short() -> None:
    assert README.count("\n") <= 110


def test_versions_agree() -> None:
    version = mtl_optax.__version__
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^version: (.*)$", citation, flags=re.M) == [version]
    assert re.findall(r"Version ([0-9][0-9.]*[0-9])", README) == [version]
    released = re.findall(r"^## \[([0-9][^\]]*)\]", changelog, flags=re.M)
    assert released[0] == version


WRITTEN = [page for page in sorted((ROOT / "docs").rglob("*.md")) if page.name != "index.md"]
GENERATED = {"methods", "results", "_build"}


@pytest.mark.parametrize(
    "page",
    [p for p in WRITTEN if not GENERATED & set(p.relative_to(ROOT / "docs").parts)],
    ids=lambda page: page.stem,
)
def test_a_page_opens_with_whom_it_is_for(page: Path) -> None:
    """The line below the title, in italics."""
    assert re.match(r"# .*\n\n\*For .*\.\*\n", page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("folder", ["recipes", "coming_from"])
def test_an_index_links_every_page_of_its_folder(folder: str) -> None:
    """Also where its table of contents is not drawn, as in a checkout."""
    pages = {page.name for page in WRITTEN if page.parent.name == folder}
    text = (ROOT / "docs" / folder / "index.md").read_text(encoding="utf-8")
    assert pages == set(re.findall(r"\]\((\w+\.md)\)", text))


def test_the_first_page_links_every_page_of_its_tables_of_contents() -> None:
    text = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    contents = "".join(re.findall(r"^```{toctree}\n(.*?)^```", text, flags=re.M | re.S))
    names = set(re.findall(r"^[\w/]+$", contents, flags=re.M))
    assert "benchmarks" in names
    assert names - set(re.findall(r"\]\(([\w/]+)\.md\)", text)) == set()
