"""Every measurement runs once in a tiny configuration; how long it takes is not tested."""

import math

import matplotlib.pyplot as plt
import pytest

from examples.benchmarks import growth, hlo, methods, peers, places
from examples.benchmarks.__main__ import SECTIONS, main
from examples.benchmarks.problems import TINY
from examples.benchmarks.report import Row, markdown
from examples.benchmarks.steps import steps


@pytest.mark.parametrize(
    "section",
    [
        places.step_times,
        places.savings,
        places.map_memory,
        methods.updates,
        methods.solvers,
        methods.compile_times,
    ],
)
def test_each_section_measures_something(section):
    rows = list(section(quick=True))
    assert rows
    assert all(math.isfinite(row.value) for row in rows)
    assert all(row.value > 0 for row in rows if row.unit not in ("MiB",))


def test_the_table_of_all_sections_is_written(tmp_path, capsys):
    out = tmp_path / "table.md"
    rows = main(["--quick", "--only", "map", "solvers", "--out", str(out)])
    assert out.read_text() == markdown(rows)
    assert "map memory" in capsys.readouterr().out


def test_peers_are_measured_where_they_are_installed():
    if not peers.installed():
        with pytest.raises(SystemExit):
            main(["--quick", "--only", "peers"])
        return
    assert list(SECTIONS["peers"](True))


def test_every_place_trains_the_same_model():
    """What is compared is the same work: the first losses agree."""
    made = steps(TINY["dense"], 2, ("fork", "split", "per_task", "balanced", "balanced_layers"))
    losses = {name: step()[0].tolist() for name, step in made.items()}
    for found in losses.values():
        assert found == pytest.approx(losses["plain"], rel=1e-5)


def test_verdict_compares_with_the_target():
    assert Row("s", "c", 1.0, "x", 1.0).verdict == "yes"
    assert Row("s", "c", 1.1, "x", 1.0).verdict == "no"
    assert Row("s", "c", 1.1, "x").verdict == ""


def test_growth_draws_its_points(tmp_path):
    points = list(growth.measure(quick=True))
    assert {point.place for point in points} == {"fork", "split"}
    growth.plot(points, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 0
    assert not plt.get_fignums()


def test_collectives_are_read_from_the_program_text():
    text = (
        "ENTRY %main (a: f32[4]) -> f32[4] {\n  %x = f32[2,2]{1,0} all-reduce(%a), to_apply=%s\n}\n"
    )
    assert hlo.collectives(text) == [hlo.Collective("all-reduce", 4, False)]
