"""Every measurement runs once in a tiny configuration; how long it takes is not tested."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
from sampling import sampled

import mtl_optax as mtl
from examples.studies.benchmarks import growth, hlo, methods, peers, places, ways
from examples.studies.benchmarks.__main__ import SECTIONS, main
from examples.studies.benchmarks.problems import TINY
from examples.studies.benchmarks.report import Row
from examples.studies.benchmarks.steps import steps


@pytest.mark.parametrize(
    "section",
    sampled(
        [
            places.step_times,
            places.savings,
            places.map_memory,
            methods.updates,
            methods.solvers,
            methods.compile_times,
        ],
        [methods.updates],
    ),
)
def test_each_section_measures_something(section):
    rows = list(section(quick=True))
    assert rows
    assert all(math.isfinite(row.value) for row in rows)
    assert all(row.value > 0 for row in rows if row.unit not in ("MiB",))


def test_the_table_of_all_sections_is_written(tmp_path, capsys):
    out = tmp_path / "table.md"
    assert main(["--quick", "--only", "map", "solvers", "--out", str(out)]) == 0
    assert capsys.readouterr().out == out.read_text() + "\n"
    assert "| map memory |" in out.read_text()


def test_peers_are_measured_where_they_are_installed():
    if not peers.installed():
        assert main(["--quick", "--only", "peers"]) == 2
        return
    assert list(SECTIONS["peers"](True))


def losses_in_training(method, places, count=6):
    made = steps(TINY["recsys"], 2, places, method)
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
def test_ways_are_measured_and_drawn(tmp_path):
    """Also beside TorchJD, where it is installed."""
    assert ways.main(["--quick", "--out", str(tmp_path)]) == 0
    table = (tmp_path / "table.md").read_text()
    assert "| heads | 2 | products |" in table and "| examples | 4 | map |" in table
    assert ("| TorchJD, autogram |" in table) is peers.installed()
    assert (tmp_path / "memory.png").stat().st_size > 0


def test_growth_draws_its_points(tmp_path):
    open_before = plt.get_fignums()
    points = list(growth.measure(quick=True))
    assert {point.place for point in points} == {"fork", "split"}
    growth.plot(points, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 0
    assert plt.get_fignums() == open_before


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
