"""The examples of one file: each runs, prints what its docstring shows, and stands alone."""

import ast
import gzip
import importlib
import io
import re
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from sampling import sampled

import mtl_optax as mtl


def made_ratings():
    """Rows user, film, stars, time; every user rates half of the films."""
    rng = np.random.default_rng(0)
    user, film = np.nonzero(rng.random((40, 150)) < 0.5)
    return np.stack([user, film, rng.integers(1, 6, len(user)), np.zeros_like(user)], axis=1)


def made_molecules():
    """Descriptors and eleven properties."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 8)).astype(np.float32)
    return x, x @ rng.normal(size=(8, 11))


# The arguments of `main`, for a run of a few steps on few data.
SMALL = {
    "device_mesh": lambda module: {"steps": 2, "examples": 2000},
    "esmm_missing_conversions": lambda module: {"steps": 3, "examples": 2000},
    "large_tables": lambda module: {"users": 3000, "items": 2000, "steps": 2},
    "mmoe_emtl": lambda module: {"steps": 2, "examples": 500},
    "molecules": lambda module: {"data": made_molecules(), "steps": 2},
    "one_gradient_a_step": lambda module: {"steps": 3, "examples": 300},
    "own_method": lambda module: {"steps": 2, "examples": 100},
    "physics_informed": lambda module: {"steps": 2},
    "ppo_actor_critic": lambda module: {"seeds": 2, "updates": 1},
    "ranking_on_representation": lambda module: {"steps": 2, "examples": 2000},
    "retrieval_and_rating": lambda module: {"ratings": made_ratings(), "steps": 2},
    "several_loaders": lambda module: {"visits": 2600, "epochs": 1},
    "target_with_auxiliaries": lambda module: {"pairs": module.made_data(30, 100), "steps": 2},
    "transformer_mtp": lambda module: {"steps": 1},
}
NAMES = sorted([*SMALL, "keras_jax", "several_processes"])


def load(name):
    return importlib.import_module(f"examples.{name}")


def without_numbers(line):
    return " ".join(re.sub(r"-?\b(\d[\d.]*(e[+-]?\d+)?|nan|inf)", "#", line).split())


def shown(module):
    """The output in a docstring: the indented lines at its end."""
    return re.search(r"\n((?:    .*\n)+)\Z", f"{module.__doc__.rstrip()}\n").group(1).splitlines()


def test_the_table_and_these_tests_name_every_example(root):
    files = {path.stem for path in (root / "examples").glob("*.py")} - {"__init__", "compare"}
    table = (root / "examples" / "README.md").read_text(encoding="utf-8")
    assert sorted(files) == NAMES
    assert sorted(re.findall(r"^\| \[`(\w+)`\]\(\1\.py\)", table, flags=re.M)) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_one_file_of_its_own(name, root):
    source = (root / "examples" / f"{name}.py").read_text(encoding="utf-8")
    tree = ast.parse(source)
    assert source.count("\n") <= 150
    imported = {
        getattr(node, "module", None) or node.names[0].name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert not [module for module in imported if module.startswith("examples")]
    doc = ast.get_docstring(tree, clean=False)
    assert f"    python -m examples.{name}" in doc
    assert re.search(r"two CPU cores", doc)


@pytest.mark.parametrize("name", sampled(sorted(SMALL), ["own_method"]))
def test_an_example_prints_what_its_docstring_shows(name, capsys, monkeypatch):
    module = load(name)
    if hasattr(module, "METHODS"):  # one of them is enough: each is compiled for some seconds
        monkeypatch.setattr(module, "METHODS", dict([*module.METHODS.items()][-1:]))
    module.main(**SMALL[name](module))
    printed, expected = (
        [without_numbers(line) for line in lines]
        for lines in (capsys.readouterr().out.splitlines(), shown(module))
    )
    assert printed[-1] == expected[-1]
    assert set(printed) <= set(expected)


@pytest.mark.slow
def test_several_processes_prints_what_its_docstring_shows(capsys, monkeypatch):
    module = load("several_processes")
    found = {name: module.train(name, steps=1) for name in module.METHODS}
    monkeypatch.setattr(module, "launch", lambda steps, processes: [found] * processes)
    module.main(["--steps", "1"])
    printed = capsys.readouterr().out.splitlines()
    assert list(map(without_numbers, printed)) == list(map(without_numbers, shown(module)))


# --- Keras, which is no requirement ----------------------------------------------------------------


@pytest.fixture
def keras_jax(monkeypatch):
    """The example of Keras, which broadcasts, and warns of itself."""
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    with warnings.catch_warnings(), jax.numpy_rank_promotion("allow"):
        warnings.simplefilter("ignore")
        pytest.importorskip("keras")
        yield load("keras_jax")


@pytest.mark.slow
def test_keras_prints_what_the_docstring_shows(keras_jax, capsys):
    keras_jax.main(examples=400, epochs=2)
    printed = capsys.readouterr().out.splitlines()
    assert list(map(without_numbers, printed)) == list(map(without_numbers, shown(keras_jax)))


@pytest.mark.slow
def test_a_keras_model_keeps_the_state_of_its_method(keras_jax, tmp_path):
    module = keras_jax
    x, y = module.made_data(256)
    losses = {task: module.keras.losses.MeanSquaredError() for task in module.TASKS}
    models = [module.Balanced(module.build(), module.METHODS["metabalance"]) for _ in range(2)]
    for model in models:
        model.compile(optimizer=module.keras.optimizers.Adam(), loss=losses)
        model.build((None, 16))
    first, second = models
    first.fit(x, y, batch_size=64, epochs=2, verbose=0)
    first.save_weights(tmp_path / "model.weights.h5")
    second.load_weights(tmp_path / "model.weights.h5")
    for weight, again in zip(first.balance, second.balance, strict=True):
        np.testing.assert_array_equal(weight.value, again.value)
    state = second.structure.unflatten([weight.value for weight in second.balance])
    assert int(state.balance_count) == 8 and np.all(state.rule_state[0] >= 0)
    mean = second.network.layers[2].moving_mean
    assert np.abs(mean.value).max() > 0, "the statistics of the network moved too"


# --- what a copy of a program must not get wrong ---------------------------------------------------


@pytest.mark.slow
def test_balancing_helps_an_actor_and_entropy_as_a_task_ruins_it(capsys, monkeypatch):
    module = load("ppo_actor_critic")
    rows = ("imtl_g", "imtl_g, entropy a task")
    monkeypatch.setattr(module, "METHODS", {name: module.METHODS[name] for name in rows})
    module.main()
    printed = capsys.readouterr().out
    balanced, with_entropy = (float(found) for found in re.findall(r"fifth +(\d+)", printed))
    assert balanced > 250 and with_entropy < 80, printed


def test_entropy_is_a_part_of_the_actor_unless_it_is_a_task():
    module = load("ppo_actor_critic")
    model = module.ActorCritic(module.CartPole, nnx.Rngs(0))
    batch = {"observation": jax.random.normal(jax.random.key(0), (6, 4))}
    names = ("action", "log_prob", "advantage", "value")
    batch |= {name: jnp.arange(6.0) for name in names} | {"action": jnp.arange(6) % 2}
    together = model.losses(batch, module.TASKS)
    apart = model.losses(batch, (*module.TASKS, "entropy"))
    np.testing.assert_allclose(together["actor"], apart["actor"] + apart["entropy"], rtol=1e-6)
    assert together["critic"] == apart["critic"]
    # Of two actions that are nearly alike it is almost log(2).
    np.testing.assert_allclose(apart["entropy"], -module.ENTROPY * np.log(2), rtol=0.01)


def test_ratings_are_read_from_a_file(tmp_path):
    file = tmp_path / "u.data"
    file.write_text("1\t242\t3\t881250949\n2\t302\t5\t891717742\n")
    rows = load("retrieval_and_rating").movielens(file)
    assert rows.tolist() == [[1, 242, 3, 881250949], [2, 302, 5, 891717742]]


@pytest.mark.parametrize("reached", [True, False])
def test_ratings_are_fetched_once_from_either_source_and_checked(tmp_path, monkeypatch, reached):
    module = load("retrieval_and_rating")
    lines = "2\t1\t5\t7\n1\t2\t3\t9\n"
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    with zipfile.ZipFile(tmp_path / "archive.whl", "w") as archive:
        archive.writestr("ml-100k/u.data", lines)
        archive.writestr("recbole/dataset_example/ml-100k/ml-100k.inter", header + lines)
    content, fetched = (tmp_path / "archive.whl").read_bytes(), []

    def open_url(*_, **__):
        fetched.append("url")
        if not reached:
            raise OSError
        return io.BytesIO(content)

    def download(command, check):
        fetched.append("wheel")
        folder = command[command.index("--dest") + 1]
        Path(folder, "archive.whl").write_bytes(content)

    monkeypatch.setenv("MTL_OPTAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module.urllib.request, "urlopen", open_url)
    monkeypatch.setattr(module.subprocess, "run", download)
    with pytest.raises(SystemExit, match="not MovieLens-100K"):
        module.movielens(None)
    digest = SimpleNamespace(hexdigest=lambda: "0fccc4b62e2f6aa246014ac7b8946c15")
    monkeypatch.setattr(module.hashlib, "sha256", lambda text: digest)
    for _ in range(2):
        assert module.movielens(None).tolist() == [[1, 2, 3, 9], [2, 1, 5, 7]]
    assert fetched == (["url"] if reached else ["url", "wheel"]) * 2


def test_molecules_are_read_from_a_wheel(tmp_path):
    module = load("molecules")
    names = ["Elements", "XYZ_Ang", *module.COLUMNS.values()]
    row = ["['O','H','H']", "[[0.,0.,0.],[0.96,0.,0.],[-0.*^-6,9.6*^-1,0.]]", *["1.5*^-1"] * 11]
    cells = ",".join(f'"{cell}"' for cell in row)
    with zipfile.ZipFile(tmp_path / "q.whl", "w") as archive:
        archive.writestr("q/data/qm9_part1.csv", f"{','.join(names)}\n\n{cells}\n{cells}\n")
        archive.writestr("q/data/qm9_polarizability.csv", "a\n1\n")
    x, y = module.read(tmp_path / "q.whl")
    assert x.shape == (2, 305)
    np.testing.assert_array_equal(x[0, :5], [2, 0, 0, 1, 0])  # of H, C, N, O, F
    assert x[0, 5:].reshape(15, 20).any(axis=1).nonzero()[0].tolist() == [0, 3]  # H-H and H-O
    np.testing.assert_allclose(y, 0.15)


def test_a_folder_of_behaviours_is_read(tmp_path):
    module = load("target_with_auxiliaries")
    for task, rows in {"buy": "7,30\n9,10", "fav": "9,10", "view": "8,10\n7,30\n7,20"}.items():
        (tmp_path / f"{task}.csv.gz").write_bytes(gzip.compress(f"user,item\n{rows}\n".encode()))
    pairs = {task: rows.tolist() for task, rows in module.read(tmp_path).items()}
    assert pairs == {"buy": [[0, 2], [2, 0]], "fav": [[2, 0]], "view": [[1, 0], [0, 2], [0, 1]]}


def test_a_purchase_held_out_is_in_no_training_data():
    module = load("target_with_auxiliaries")
    made = module.made_data(20, 100)
    pairs, held = module.hold_out(made, np.random.default_rng(0))
    assert sorted(held[:, 0]) == list(range(20))
    out = set(map(tuple, held))
    assert out <= set(map(tuple, made["buy"]))
    for task, rows in pairs.items():
        assert set(map(tuple, rows)) == set(map(tuple, made[task])) - out


@pytest.mark.slow
def test_rows_that_are_read_move_as_in_a_step_on_whole_tables():
    """The first step of Adam on the distinct rows is that on the tables; other rows stay."""
    module = load("large_tables")
    sizes = {"user": 3000, "item": 2000}
    batch = module.made_data(sizes, module.BATCH, seed=1)
    keys = dict(zip(sizes, jax.random.split(jax.random.key(0)), strict=True))
    tables = {n: jax.random.normal(keys[n], (size, module.WIDTH)) for n, size in sizes.items()}
    graph, dense = nnx.split(module.Dense(nnx.Rngs(0)))
    moved = []
    for way in (module.whole_tables, module.rows_read):
        init, step = way(graph, mtl.sum_tasks(module.TASKS))
        params = dict(tables), dense
        moved.append(jax.jit(step)(params, init(params), batch)[0][0])
    for name, table in tables.items():
        np.testing.assert_allclose(moved[1][name], moved[0][name], atol=1e-5)
        others = np.setdiff1d(np.arange(len(table)), batch[0][name])
        assert len(others) > 0
        np.testing.assert_array_equal(moved[1][name][others], table[others])


def test_the_own_method_weights_by_agreement_with_the_target():
    module = load("own_method")
    method = module.by_agreement(("a", "b", "c"), target="b", decay=0.0)
    # a agrees with b and is twice as long; c points the other way.
    grads = jnp.array([[2.0, 0.0], [1.0, 0.0], [-3.0, 0.0]])
    update, state = method.update(grads, method.init(jnp.zeros(2)), jnp.zeros(2))
    np.testing.assert_allclose(mtl.head_weights(state), [0.5, 1.0, 0.0], rtol=1e-6)
    np.testing.assert_allclose(update, [2.0, 0.0], rtol=1e-6)


@pytest.mark.slow
def test_the_loss_of_the_load_is_not_weighed():
    """A weight of the tasks does not change the gradient that the load gives a router."""
    module = load("transformer_mtp")
    graph, params = nnx.split(module.Transformer(nnx.Rngs(0)))
    text = np.tile(np.arange(40, 40 + module.LENGTH + 3), (2, 1))

    def load_alone(params, fork):
        losses, load = nnx.merge(graph, params).losses(text, fork)
        return {task: 0.0 * loss + load * (task == "1 ahead") for task, loss in losses.items()}

    routers = []
    for weight in (1.0, 100.0):
        method = mtl.fixed_weights(module.TASKS, dict.fromkeys(module.TASKS, weight))
        state = method.init(jax.ShapeDtypeStruct((2, module.LENGTH, module.WIDTH), jnp.float32))
        _, (grads, _) = jax.jit(mtl.fork_value_and_grad(load_alone, method))(params, state)
        routers.append(grads["mixtures"][0]["router"]["kernel"][...])
    assert np.any(routers[0])
    np.testing.assert_allclose(routers[0], routers[1], rtol=1e-6)
