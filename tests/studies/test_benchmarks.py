"""Every measurement runs once in a tiny configuration; how long it takes is not tested."""

import json
import math
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from sampling import sampled

import mtl_optax as mtl
from examples.studies.benchmarks import clients, hlo, methods, peers, places, ways
from examples.studies.benchmarks.__main__ import SECTIONS, main
from examples.studies.benchmarks.problems import TINY, Problem, encode, initial
from examples.studies.benchmarks.report import Row
from examples.studies.benchmarks.steps import steps

ROOT = Path(__file__).resolve().parents[2]
TRANSFORMER = Problem(tables=1, width=128, dense=0, bottom=(), head=())


@pytest.mark.parametrize(
    "section",
    sampled(
        [
            places.step_times,
            places.savings,
            places.products_memory,
            methods.updates,
            methods.solvers,
        ],
        [methods.updates],
    ),
)
def test_each_section_measures_something(section):
    rows = list(section(quick=True))
    assert rows
    assert all(math.isfinite(row.value) for row in rows)
    assert all(row.value > 0 for row in rows if row.unit not in ("MiB",))


@pytest.mark.slow
def test_the_table_of_each_section_is_written(tmp_path, capsys):
    assert main(["--quick", "--only", "updates", "solvers", "--out", str(tmp_path)]) == 0
    tables = [(tmp_path / f"{name}.md").read_text() for name in ("updates", "solvers")]
    assert capsys.readouterr().out == "".join(f"{table}\n" for table in tables)
    assert "| update alone |" in tables[0]


@pytest.mark.slow
def test_clients_are_measured_where_they_are_installed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(clients, "WIDTH", 4)
    installed = clients.CLIENTS["a network of Flax NNX"]
    missing = ("flax", "no_such_module", installed[2])
    monkeypatch.setattr(clients, "CLIENTS", {"here": installed, "not here": missing})
    assert clients.main(["--quick", "--out", str(tmp_path)]) == 0
    table = (tmp_path / "clients.md").read_text()
    assert "| here | flax " in table and "not here" not in table


MEMORY = {
    "dense": Problem(tables=0, dense=128, bottom=(128,) * 4, head=(), batch=16),
    "transformer": TRANSFORMER._replace(rows=512, batch=2, blocks=2, length=8),
    "tables": Problem(tables=6, rows=2000, dense=0, bottom=(32,), head=(), batch=64),
}


@pytest.mark.slow
@pytest.mark.parametrize("as_array", [False, True])
@pytest.mark.parametrize("network", MEMORY)
def test_products_add_at_most_the_parameters_and_the_largest_leaf(network, as_array):
    beyond, sizes = places.beyond_plain(MEMORY[network], 16, as_array)
    assert beyond <= sum(sizes) + max(sizes)


@pytest.mark.slow
def test_products_of_a_dense_network_add_half_the_parameters():
    beyond, sizes = places.beyond_plain(MEMORY["dense"], 16, as_array=True)
    assert beyond <= 0.5 * sum(sizes)


def test_peers_are_measured_where_they_are_installed():
    if not peers.installed():
        assert main(["--quick", "--only", "peers"]) == 2
        return
    assert list(SECTIONS["peers"](True))


def losses_in_training(method, places, count=6):
    made = steps(TINY["tables"], 2, places, method)
    return {name: np.stack([step()[0] for _ in range(count)]) for name, step in made.items()}


@pytest.mark.slow
def test_every_place_trains_the_same_model():
    """What is compared is the same work: with the plain sum of gradients, the same losses all along."""
    places = ("losses", "fork", "split", "per_task", "weighted", "weighted_by_layers")
    losses = losses_in_training(mtl.sum_tasks(2), places)
    plain = losses.pop("plain")
    assert losses.keys() == set(places)
    for found in losses.values():
        np.testing.assert_allclose(found, plain, rtol=1e-5)
    # The updates are seen in the losses, far above that tolerance.
    assert (np.abs(np.diff(plain.sum(axis=1))) > 1e-3 * plain.sum(axis=1)[1:]).all()


@pytest.mark.slow
def test_a_method_trains_the_same_model_where_it_sees_the_same_gradients():
    losses = losses_in_training(mtl.fixed_weights(2, [3.0, 0.0]), ("fork", "split", "per_task"))
    plain = losses.pop("plain")
    for found in losses.values():
        np.testing.assert_allclose(found, losses["split"], rtol=1e-5)
        assert np.abs(found - plain)[-1].max() > 1e-3 * plain[-1].max()


def test_verdict_compares_with_the_target():
    assert Row("s", "c", 1.0, "x", 1.0).verdict == "yes"
    assert Row("s", "c", 1.1, "x", 1.0).verdict == "no"
    assert Row("s", "c", 1.1, "x").verdict == ""


@pytest.mark.slow
def test_a_transformer_represents_each_text_alone():
    problem = TRANSFORMER._replace(rows=9, blocks=2, length=4, batch=3)
    params, batch = initial(problem, 1)
    h = encode(params.shared, batch)
    assert h.shape == (3, problem.representation)
    ids = batch["ids"]
    other = encode(params.shared, batch | {"ids": ids.at[0, 0, 1].add(1) % problem.rows})
    assert jnp.abs(other - h)[0].max() > 1e-3
    assert jnp.array_equal(other[1:], h[1:])


def ways_of(out, *arguments):
    assert ways.main(["--quick", "--rounds", "1", "--out", str(out), *arguments]) == 0
    return [ways.Point(**each) for each in json.loads((out / "ways.json").read_text())]


@pytest.mark.slow
def test_ways_are_measured_and_drawn(tmp_path):
    """Also beside TorchJD, where it is installed; a row that is there is not measured again."""
    rows = ["dense:2", "examples:4"]
    points = ways_of(tmp_path, "--rows", *rows, "--ways", "map", "examples", "representation")
    found = {point[:3] for point in points}
    dense, examples = ("plain", "representation", "map"), ("plain", "map", "examples")
    assert found >= {("dense", 2, way) for way in dense} | {
        ("examples", 4, way) for way in examples
    }
    assert (("dense", 2, "TorchJD, autogram") in found) is peers.installed()
    assert all(math.isfinite(point.ratio) and point.parameters > 0 for point in points)
    more = ways_of(
        tmp_path, "--resume", "--large", "--rows", *rows, "dense:3", "--ways", "unroll", "map"
    )
    assert [point for point in more if point[:2] != ("dense", 3)] == points
    # The losses of large networks are an array, for which there is no unrolled way.
    assert {point.way for point in more if point.number == 3} >= {"plain", "map"}
    assert not any(point.way == "unroll" for point in more)
    assert "| step | T = 2 | T = 3 |" in (tmp_path / "ways_dense.md").read_text()
    assert (tmp_path / "ways.png").stat().st_size > 0


def test_an_unknown_row_is_refused(capsys):
    for row in ("dens:2", "dense", "dense:0"):
        assert ways.main(["--rows", row]) == 2
        assert f"'{row}' is not NAME:T" in capsys.readouterr().err


def test_the_page_shows_the_stored_tables():
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    stored = re.findall(r"`(examples/studies/results/benchmarks/\S+\.md)`", page)
    assert stored
    for name in stored:
        text = (ROOT / name).read_text(encoding="utf-8")
        assert re.findall(r"(?:^\|.*\n)+", text, flags=re.M)[0] in page, name


def test_collectives_are_read_from_the_text():
    text = """
%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[] add(%a, %b)
}

%rare (p: f32[4]) -> f32[4] {
  ROOT %all-reduce.1 = f32[4]{0} all-reduce(%p), to_apply=%sum
}

%usual (p: f32[4]) -> f32[4] {
  ROOT %p = f32[4]{0} parameter(0)
}

ENTRY %main (x: f32[8,2]) -> f32[4] {
  %gather = (f32[8,2]{1,0}, f32[16,2]{1,0}) all-gather-start(%x), dimensions={0}
  %done = f32[16,2]{1,0} all-gather-done(%gather)
  %both = (f32[10]{0}, bf16[3,2]{1,0}) all-reduce(%a, %b), to_apply=%sum
  ROOT %c = f32[4]{0} conditional(%i, %p, %p), branch_computations={%usual, %rare}
}
"""
    assert hlo.collectives(text) == [
        hlo.Collective("all-reduce", 4, True),
        hlo.Collective("all-gather", 32, False),
        hlo.Collective("all-reduce", 16, False),
    ]
