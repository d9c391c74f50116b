"""Pictures are drawn from what diagnostics tells."""

import subprocess
import sys
from collections.abc import Iterator

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


def test_weights_of_blocks_as_diagnostics_names_them() -> None:
    tx = mtl.metabalance(2)
    params = {"a": jnp.zeros(2), "b": jnp.zeros(3)}
    grads = {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 3))}
    _, state = tx.update(grads, tx.init(params), params)
    told = mtl.diagnostics(state)["norms"]
    ax = plotting.plot_norms({block: value[None] for block, value in told.items()})
    labels = [line.get_label() for line in ax.get_lines()]
    assert labels == ["task 0, ['a']", "task 1, ['a']", "task 0, ['b']", "task 1, ['b']"]
    assert len({line.get_linestyle() for line in ax.get_lines()}) == 2
    ax.figure.canvas.draw()


def test_zero_norms_are_gaps() -> None:
    ax = plotting.plot_norms([[1.0, 0.0], [2.0, 3.0]])
    assert ax.get_yscale() == "log"
    assert np.isnan(ax.get_lines()[1].get_ydata()[0])
    ax.figure.canvas.draw()


def test_conflicts_average_over_steps() -> None:
    cosines = np.asarray([[[1.0, -0.2], [-0.2, 1.0]], [[1.0, -0.4], [-0.4, 1.0]]])
    ax = plotting.plot_conflicts(cosines, task_names=["click", "buy"])
    assert [text.get_text() for text in ax.texts] == ["1.00", "-0.30", "-0.30", "1.00"]
    assert ax.images[0].get_clim() == (-1, 1)
    ax.figure.canvas.draw()


def test_pareto_on_given_axes() -> None:
    _, ax = pyplot.subplots()
    runs = {"sum": HISTORY, "mgda": HISTORY[::-1]}
    assert plotting.plot_pareto(runs, tasks=(1, 0), front=HISTORY, ax=ax) is ax
    assert ax.get_legend_handles_labels()[1] == ["Pareto front", "sum", "mgda"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("loss of task 1", "loss of task 0")
    np.testing.assert_allclose(ax.get_lines()[1].get_xdata(), HISTORY[:, 1])
    ax.figure.canvas.draw()


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"history must be an array \[steps, T\]"):
        plotting.plot_weights([0.5, 0.5])
    with pytest.raises(ValueError, match="task_names must have 2 entries, found 1"):
        plotting.plot_weights(HISTORY, task_names=["click"])
    with pytest.raises(ValueError, match=r"cosines must be \[T, T\]"):
        plotting.plot_conflicts(HISTORY)
    with pytest.raises(ValueError, match="tasks must be two of 0 to 1"):
        plotting.plot_pareto(HISTORY, tasks=(0, 2))


def test_matplotlib_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "mtl_optax\[plot\]"'):
        plotting.plot_weights(HISTORY)


def test_importing_does_not_need_matplotlib() -> None:
    program = "import sys, mtl_optax.plotting; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
