"""The site: it builds without a warning and without a network, and documents every public name."""

import json
import re
import subprocess
import sys
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import jax
import method_pages
import numpy as np
import pytest
import run_pages

import mtl_optax
from mtl_optax import plotting

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
# Losses after hundreds of steps in float32: rounding differs between processors and releases of XLA,
# and training amplifies it.
TOLERANCE = {"rel": 0.05, "abs": 0.02}
PLOTS = [name for name in vars(plotting) if name.startswith("plot_")]


@pytest.fixture(autouse=True)
def what_a_reader_has() -> Iterator[None]:
    """Float32 and rank promotion, whatever the rest of the suite runs with."""
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
        yield


def documented_in_the_sources() -> set[str]:
    """The names that the sources of the site document, methods by the pages that the build writes."""
    text = (DOCS / "api" / "index.md").read_text("utf-8")
    found = re.findall(r"^\.\. (?:auto\w+|py:data):: ([\w.]+)", text, flags=re.M)
    found = {name.rsplit(".", 1)[-1] for name in found}
    return found.union(mtl_optax.METHODS, method_pages.states())


def test_the_sources_document_every_public_name() -> None:
    public = {*method_pages.public_names(), *PLOTS}
    assert sorted(public - documented_in_the_sources()) == []


def test_every_method_has_a_picture_of_its_path() -> None:
    folder = DOCS / "methods" / "paths"
    ends = json.loads((folder / "ends.json").read_text("utf-8"))
    assert sorted(ends) == sorted(mtl_optax.METHODS)
    assert sorted(file.stem for file in folder.glob("*.png")) == sorted(mtl_optax.METHODS)


def test_pages_with_programs_are_found() -> None:
    """The slow test below has something to run, on every page that should have a program."""
    names = {page.relative_to(DOCS).as_posix() for page in run_pages.pages()}
    recipes = {f"recipes/{file.name}" for file in (DOCS / "recipes").glob("*.md")}
    assert names >= {"start/first_step.md", "idea.md", "choose.md"} | recipes - {"recipes/index.md"}


@pytest.mark.slow
@pytest.mark.parametrize("page", run_pages.pages(), ids=lambda page: page.stem)
def test_programs_run_and_print_what_the_page_shows(page: Path) -> None:
    if run_pages.missing(page):
        pytest.skip(f"needs {', '.join(run_pages.missing(page))}")
    if run_pages.NEEDS.search(page.read_text("utf-8")):  # what other packages warn of is theirs
        warnings.simplefilter("ignore")
    for number, (block, printed) in enumerate(run_pages.outputs(page), 1):
        if block.shown is None:
            assert not printed, f"block {number} prints, but the page does not show what"
            continue
        shown = run_pages.NUMBER.split(block.shown), run_pages.NUMBER.findall(block.shown)
        found = run_pages.NUMBER.split(printed), run_pages.NUMBER.findall(printed)
        # Columns may move with the length of a number.
        words = [[part.split() for part in text] for text, _ in (shown, found)]
        assert words[0] == words[1], f"block {number}: run python docs/run_pages.py"
        numbers = [list(map(float, values)) for _, values in (found, shown)]
        assert numbers[0] == pytest.approx(numbers[1], **TOLERANCE), f"block {number}"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mgda", "metabalance"])
def test_paths_end_where_the_pages_say(name: str) -> None:
    import toy_paths

    found = toy_paths.ends_of(toy_paths.paths(name))
    ends = json.loads((DOCS / "methods" / "paths" / "ends.json").read_text("utf-8"))
    # The third start lies on a ridge, from which rounding decides where a path goes.
    kept = [0, 1, 3, 4]
    np.testing.assert_allclose(np.asarray(found)[kept], np.asarray(ends[name])[kept], atol=0.5)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    pytest.importorskip("furo")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    done = subprocess.run(
        [*command, "-d", str(folder / "doctrees"), str(DOCS), str(folder / "html")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder / "html"


@pytest.mark.slow
@pytest.mark.xdist_group("site")
def test_the_inventory_holds_every_public_name(site: Path) -> None:
    _, _, _, _, packed = (site / "objects.inv").read_bytes().split(b"\n", 4)
    entries = [line.split()[0] for line in zlib.decompress(packed).decode().splitlines()]
    names = {f"mtl_optax.{name}" for name in method_pages.public_names()}
    names |= {f"mtl_optax.plotting.{name}" for name in PLOTS}
    assert sorted(names - set(entries)) == []


@pytest.mark.slow
@pytest.mark.xdist_group("site")
def test_reading_the_site_needs_no_network(site: Path) -> None:
    """Scripts, styles, fonts and pictures are files of the site; formulas need none."""
    loads = re.compile(r"<(?:(?:script|img|iframe)[^>]*\ssrc|link[^>]*\shref)=\"https?:[^\"]*")
    found = {
        f"{file.relative_to(site)}: {hit}"
        for file in site.rglob("*.html")
        for hit in loads.findall(file.read_text("utf-8"))
    }
    found |= {
        str(file.relative_to(site))
        for file in site.rglob("*.css")
        if re.search(r"url\([\"']?https?:|@import [\"']https?:", file.read_text("utf-8"))
    }
    assert found == set()
    assert "<math" in (site / "methods" / "metabalance.html").read_text("utf-8")
    assert (site / "_static" / "STIXTwoMath-Regular.ttf").exists()


def test_the_page_of_results_holds_every_table(tmp_path: Path) -> None:
    import result_pages

    source, folder = tmp_path / "source", tmp_path / "page"
    result_pages.write(folder, source)
    assert "no results yet" in (folder / "index.md").read_text("utf-8")

    (source / "first").mkdir(parents=True)
    (source / "second").mkdir()
    table = "# Title\n\n![weights](weights.png)\n\n```bash\n# a comment\n```\n\n## Part\n"
    (source / "first" / "table.md").write_text(table)
    (source / "second" / "a_table.md").write_text("| a |\n|---|\n| 1 |\n")
    (source / "second" / "times.md").write_text("Milliseconds\n")
    for picture in ("first/weights.png", "second/loss_curve.png"):
        (source / picture).write_bytes(b"picture")
    result_pages.write(folder, source)
    text = (folder / "index.md").read_text("utf-8")
    assert "\n## Title\n" in text and "\n### Part\n" in text and "\n# a comment\n" in text
    assert "\n## second\n" in text and "![loss curve](files/second/loss_curve.png)" in text
    assert "\nMilliseconds\n" in text
    assert text.count("![weights](files/first/weights.png)") == 1
    assert (folder / "files" / "first" / "weights.png").read_bytes() == b"picture"
