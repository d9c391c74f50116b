"""Plots are drawn from what `diagnostics` returns."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtl_optax as mtl

pyplot = pytest.importorskip("matplotlib.pyplot")
from mtl_optax import plotting  # noqa: E402

HISTORY = np.asarray([[0.5, 0.5], [0.4, 0.6], [0.2, 0.8]])


@pytest.fixture(autouse=True)
def close_figures() -> Iterator[None]:
    yield
    pyplot.close("all")


def test_weights_of_one_block() -> None:
    ax = plotting.plot_weights(jnp.asarray(HISTORY), task_names=["click", "buy"])
    assert [line.get_label() for line in ax.get_lines()] == ["click", "buy"]
    np.testing.assert_allclose(ax.get_lines()[1].get_ydata(), [0.5, 0.6, 0.8])
    ax.figure.canvas.draw()


PARAMS = {"a": jnp.zeros(2), "b": jnp.zeros(3)}
GRADS = {"a": jnp.asarray([[1.0, 2.0], [-1.0, 2.0]]), "b": jnp.ones((2, 3))}


def test_one_step_is_a_point() -> None:
    assert plotting.plot_weights(HISTORY[:1]).get_lines()[0].get_marker() == "o"
    assert plotting.plot_norms(HISTORY[:1]).get_lines()[1].get_marker() == "o"
    assert plotting.plot_weights(HISTORY).get_lines()[0].get_marker() == "None"


def read(tx: Any, entry: str, params: Any = None) -> Any:
    """An entry of `diagnostics` over two steps."""

    def step(state: Any, _: Any) -> Any:
        state = tx.update(GRADS, state, PARAMS)[1]
        return state, mtl.diagnostics(state, tx, params)[entry]

    return jax.lax.scan(step, tx.init(PARAMS), length=2)[1]


def labels(ax: Any) -> list[str]:
    return [line.get_label() for line in ax.get_lines()]


def test_blocks_as_diagnostics_names_them() -> None:
    history = read(mtl.metabalance(2), "norms", PARAMS)
    ax = plotting.plot_norms(history, task_names=["x", "y"])
    assert labels(ax) == ["x, ['a']", "y, ['a']", "x, ['b']", "y, ['b']"]
    assert len({line.get_linestyle() for line in ax.get_lines()}) == 2
    ax.figure.canvas.draw()
    with pytest.raises(ValueError, match=r"with task_names=, to arrays \[steps, T\]"):
        plotting.plot_norms(history)  # a mapping to arrays is from task names


def test_blocks_share_a_legend_of_tasks_and_blocks() -> None:
    ax = plotting.plot_weights({f"layer {b}": HISTORY for b in range(8)}, task_names=["a", "b"])
    legend = ax.get_legend()
    entries = [text.get_text() for text in legend.get_texts()]
    assert entries == ["a", "b", *(f"layer {b}" for b in range(8))]
    colors = [handle.get_color() for handle in legend.legend_handles]
    assert colors == ["C0", "C1", *["black"] * 8]
    # `get_linestyle` calls all dashes "--": what is drawn tells them apart.
    assert len({str(line._dash_pattern) for line in ax.get_lines()[::2]}) == 8
    assert ax.get_lines()[2].get_color() == "C0"  # the lines themselves keep the task's colour
    ax.figure.canvas.draw()


def test_tasks_as_diagnostics_names_them() -> None:
    names = ("click", "buy")
    ax = plotting.plot_norms(read(mtl.mgda(names), "norms"))
    assert labels(ax) == ["buy", "click"]
    np.testing.assert_allclose(ax.get_lines()[0].get_ydata(), [8**0.5] * 2, rtol=1e-6)
    blocks = read(mtl.metabalance(names, target="buy"), "weights", PARAMS)
    ax = plotting.plot_weights(blocks)
    assert labels(ax) == ["buy, ['a']", "click, ['a']", "buy, ['b']", "click, ['b']"]
    ax = plotting.plot_conflicts(read(mtl.mgda(names), "cosines"))
    assert [text.get_text() for text in ax.texts] == ["1.00", "0.75", "0.75", "1.00"]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["buy", "click"]


def test_pareto_of_named_losses() -> None:
    losses = {"buy": [3.0, 2.0], "click": [1.0, 0.5]}
    ax = plotting.plot_pareto({"sum": losses, "mgda": losses}, tasks=("click", 0))
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("loss of click", "loss of buy")
    np.testing.assert_allclose(ax.get_lines()[0].get_xdata(), [1.0, 0.5])
    assert ax.get_legend_handles_labels()[1] == ["sum", "mgda"]
    assert len(plotting.plot_pareto(losses).get_lines()) == 3  # one path, its start and its end


def test_zero_norms_are_gaps() -> None:
    ax = plotting.plot_norms([[1.0, 0.0], [2.0, 3.0]])
    assert ax.get_yscale() == "log"
    assert not np.isfinite(ax.yaxis.get_transform().transform([0.0])).any()
    ax.figure.canvas.draw()


def test_conflicts_average_over_steps() -> None:
    cosines = np.asarray([[[1.0, -0.2], [-0.2, 1.0]], [[1.0, -0.4], [-0.4, 1.0]]])
    ax = plotting.plot_conflicts(cosines, task_names=["click", "buy"])
    assert [text.get_text() for text in ax.texts] == ["1.00", "-0.30", "-0.30", "1.00"]
    assert ax.images[0].get_clim() == (-1, 1)
    ax.figure.canvas.draw()


def test_a_heat_map_stays_readable() -> None:
    cosines = np.asarray([[1.0, -0.004], [-0.004, 1.0]])
    ax = plotting.plot_conflicts(cosines, task_names=["click", "buy"])
    assert [text.get_text() for text in ax.texts] == ["1.00", "0.00", "0.00", "1.00"]
    assert {tick.get_rotation() for tick in ax.get_xticklabels()} == {0.0}
    ax = plotting.plot_conflicts(cosines, task_names=["depth estimation", "semantic segmentation"])
    assert {tick.get_rotation() for tick in ax.get_xticklabels()} == {40.0}
    ax.figure.canvas.draw()


def test_pareto_on_given_axes() -> None:
    _, ax = pyplot.subplots()
    runs = {"sum": HISTORY, "mgda": HISTORY[::-1]}
    names = ["click", "buy"]
    assert plotting.plot_pareto(runs, tasks=(1, 0), task_names=names, front=HISTORY, ax=ax) is ax
    assert ax.get_legend_handles_labels()[1] == ["Pareto front", "sum", "mgda"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("loss of buy", "loss of click")
    np.testing.assert_allclose(ax.get_lines()[1].get_xdata(), HISTORY[:, 1])
    ax.figure.canvas.draw()


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"history must be an array \[steps, T\]"):
        plotting.plot_weights([0.5, 0.5])
    with pytest.raises(ValueError, match="task_names must have 2 entries, found 1"):
        plotting.plot_weights(HISTORY, task_names=["click"])
    with pytest.raises(ValueError, match=r"an array \[\.\.\., T, T\]; found the shape \(3, 2\)"):
        plotting.plot_conflicts(HISTORY)
    with pytest.raises(ValueError, match=r"found the keys \['block'\]"):
        plotting.plot_conflicts({"block": np.eye(2)})
    with pytest.raises(ValueError, match=r"plot_norms: history must be .* shapes \[\(1,\)\]"):
        plotting.plot_norms({"block": {"task": 1.0}})
    with pytest.raises(ValueError, match="tasks must be two of 0 to 1 or of"):
        plotting.plot_pareto(HISTORY, tasks=("click", "buy"))
    with pytest.raises(ValueError, match="tasks must be two of 0 to 1"):
        plotting.plot_pareto(HISTORY, tasks=(0, 2))


def test_matplotlib_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "mtl_optax\[plot\]"'):
        plotting.plot_weights(HISTORY)


@pytest.mark.slow
def test_importing_does_not_need_matplotlib() -> None:
    program = "import sys, mtl_optax.plotting; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
