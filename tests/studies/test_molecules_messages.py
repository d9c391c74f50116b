"""The network of messages between atoms: what its output may not depend on, its steps, and its rows."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.studies.harness.errors import UserError
from examples.studies.molecules import data, training
from examples.studies.molecules.__main__ import main
from examples.studies.molecules.arms import ALONE, ARMS, NUM_TASKS, SUM, step_of
from examples.studies.molecules.messages import Messages
from examples.studies.molecules.training import Config, Programs, Result, Store, config_of

SIZES = (40, 20, 20)


def made(count, atoms=9, seed=0):
    """Molecules of 3 to 7 atoms, `[N, atoms, 4]`."""
    rng = np.random.default_rng(seed)
    found = np.zeros((count, atoms, 4), np.float32)
    for molecule in found:
        size = rng.integers(3, 8)
        molecule[:size, 0] = rng.integers(1, 6, size)
        molecule[:size, 1:] = 1.5 * rng.normal(size=(size, 3))
    return found


@pytest.fixture(scope="module")
def predict():
    network = Messages(batch=4)
    params = network.init(jax.random.key(0), inputs=4)

    @jax.jit
    def predict(molecules):
        batch = data.Molecules(jnp.asarray(molecules), None)
        return network.predict(params.heads, network.encode(params.shared, batch))

    return predict


@pytest.fixture
def file(tmp_path):
    rng = np.random.default_rng(1)
    path = tmp_path / "atoms.npz"
    x = made(240)
    y = (x[..., 0] > 1).sum(1)[:, None] + 0.1 * rng.normal(size=(240, NUM_TASKS))
    np.savez(path, **data.Molecules(x, y)._asdict())
    return path


# --- the network ------------------------------------------------------------------------------------


def test_an_atom_that_moves_changes_every_property(predict):
    molecules = made(4)
    moved = molecules.copy()
    moved[:, 0, 1] += 0.1
    assert (np.abs(predict(moved) - predict(molecules)) > 1e-5).all()


def test_the_order_of_the_atoms_does_not_matter(predict):
    molecules = made(4)
    order = np.random.default_rng(1).permutation(molecules.shape[1])
    np.testing.assert_allclose(predict(molecules[:, order]), predict(molecules), atol=2e-5)


def test_a_molecule_may_be_turned_mirrored_and_moved(predict):
    molecules = made(4)
    turn, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(3, 3)))
    for axes in (turn, -turn):
        turned = molecules.copy()
        turned[..., 1:] = turned[..., 1:] @ axes + 0.7
        np.testing.assert_allclose(predict(turned), predict(molecules), atol=2e-5)


def test_padding_does_not_change_the_output(predict):
    short, long = made(4, atoms=7), made(4, atoms=12)
    np.testing.assert_array_equal(short, long[:, :7])
    np.testing.assert_allclose(predict(long), predict(short), atol=2e-5)
    long[long[..., 0] == 0, 1:] = 0.5  # no atom is there, wherever it stands
    np.testing.assert_allclose(predict(long), predict(short), atol=2e-5)


# --- its training -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("arm", [SUM, "scale_invariant", "inverse_norm, representation"])
def test_steps_of_an_arm_reduce_the_losses(arm):
    network = Messages(batch=16)
    batch = data.Molecules(
        jnp.asarray(made(16)), jax.random.normal(jax.random.key(1), (16, NUM_TASKS))
    )
    params = network.init(jax.random.key(0), inputs=4)
    step = step_of(ARMS[arm], network, 3e-3, np.ones(NUM_TASKS, np.float32), 100)

    @partial(jax.jit, static_argnums=1)
    def train(params, steps):
        def one(carry, _):
            params, state, losses, _ = step.update(*carry, batch)
            return (params, state), losses

        return jax.lax.scan(one, (params, step.init(params)), length=steps)

    (trained, _), losses = train(params, 20)
    moved = jax.tree.map(lambda new, old: bool((new != old).any()), trained, params)
    assert all(jax.tree.leaves(moved))
    assert (losses[-1] < losses[0]).all()


@pytest.mark.slow
def test_errors_are_measured_over_all_molecules_in_pieces(monkeypatch):
    config = Config(batch=8, network=data.MESSAGES)
    part = data.Molecules(made(10), np.random.default_rng(0).normal(size=(10, NUM_TASKS)))
    network = Messages(config.batch)
    params = network.init(jax.random.key(0), inputs=4)
    found = network.predict(params.heads, network.encode(params.shared, part))
    expected = np.abs(found - part.properties).mean(axis=0)
    monkeypatch.setattr(training, "MEASURED", 4)
    carry = jax.tree.map(lambda leaf: leaf[None, None], (params, ()))
    data_of_splits = jax.tree.map(lambda array: jnp.stack([0 * array, array]), part)
    measured = Programs(SUM, config, 4).measure(carry, data_of_splits, np.array([1]))
    np.testing.assert_allclose(measured[0, 0], expected, rtol=1e-4)


# --- files and the command --------------------------------------------------------------------------


def test_atoms_are_padded_to_the_largest_molecule():
    found = data.atoms("['O','H']", "[[0.,0.,0.],[0.9,0.,1.*^-1]]")
    assert found.shape == (29, 4)
    np.testing.assert_allclose(found[:2], [[4, 0, 0, 0], [1, 0.9, 0, 0.1]])
    assert not found[2:].any()


def test_a_file_of_the_other_network_is_refused(file):
    assert data.load(file, data.MESSAGES).descriptors.shape == (240, 9, 4)
    with pytest.raises(UserError, match="for another --network"):
        data.load(file)


def test_atoms_are_left_as_they_are_and_properties_standardised(file):
    train, *_ = data.split(data.load(file, data.MESSAGES), SIZES, 0)
    assert set(np.unique(train.descriptors[..., 0])) == set(range(6))
    np.testing.assert_allclose(train.properties.std(axis=0), 1, atol=1e-4)


def test_rows_tell_the_networks_apart_and_older_rows_are_those_of_histograms(tmp_path):
    errors = np.ones((1, NUM_TASKS))
    network = {name: Config(network=name) for name in (data.HISTOGRAMS, data.MESSAGES)}
    Store(tmp_path, network[data.MESSAGES], resume=False).add(
        Result(SUM, 0, 1e-3, errors, errors, 1.0)
    )
    path = tmp_path / "rows.jsonl"
    entry = json.loads(path.read_text())
    del entry["about"]["network"]
    entry["arm"] = ALONE
    with path.open("a") as stream:
        stream.write(json.dumps(entry) + "\n")
    found = {
        name: [result.arm for result in Store(tmp_path, config, resume=True).results]
        for name, config in network.items()
    }
    assert found == {data.HISTOGRAMS: [ALONE], data.MESSAGES: [SUM]}


def test_the_default_size_needs_fewer_molecules_than_the_accelerators():
    small, large = (config_of(data.MESSAGES, large) for large in (False, True))
    assert small.sizes < config_of(data.HISTOGRAMS).sizes < large.sizes
    assert small.network == large.network == data.MESSAGES


@pytest.mark.slow
def test_the_command_trains_each_property_alone_and_makes_its_table(file, tmp_path):
    out = tmp_path / "out"
    asked = ["--network", "messages", "--quick", "--out", str(out)]
    assert main([*asked, "--data", str(file), "--arms", SUM]) == 0
    table = (out / "table.md").read_text()
    assert "network of messages" in table
    assert f"| {ALONE} |" in table and f"| {SUM} |" in table
    assert main([*asked, "--table"]) == 0
    assert main(["--quick", "--out", str(out), "--table"]) == 2  # no row is of histograms
