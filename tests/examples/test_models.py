"""The models of examples/models: shapes, the split into shared parameters and heads, formulas."""

import functools
import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampling import sampled

import mtl_optax as mtl

pytest.importorskip("flax")
from flax import nnx

from examples.models import dcn_v2, esmm, segnet_mtan
from examples.models.dcn_v2 import DCNv2
from examples.models.deepfm import DeepFM
from examples.models.layers import Features, FeatureSpec, head_task, is_head
from examples.models.mmoe import MMoE
from examples.models.ple import PLE
from examples.models.segnet_mtan import SegNetMTAN, SegNetSingle
from examples.models.shared_bottom import SharedBottom

SPEC, BATCH = FeatureSpec(3, (5, 7)), 6
SMALL = {
    SharedBottom: {"embedding": 4, "bottom": (8, 6), "tower": (5,)},
    MMoE: {"embedding": 4, "experts": 3, "expert": (6,), "tower": (5,)},
    PLE: {"embedding": 4, "shared_experts": 2, "task_experts": 2, "expert": (6,), "tower": (5,)},
    DCNv2: {"embedding": 4, "numerical": (6, 4), "deep": (8, 6), "tower": (5,)},
    DeepFM: {"embedding": 4, "deep": (8, 6), "tower": (5,)},
}
DEFAULTS = FeatureSpec(3, (10, 20))
tabular = pytest.mark.parametrize("model_class", sampled(SMALL, [DCNv2]))


def batch(seed=0, spec=SPEC, size=BATCH):
    rng = np.random.default_rng(seed)
    ids = [rng.permutation(np.arange(size) % n) for n in spec.vocabulary_sizes]
    numbers = rng.normal(size=(size, spec.num_numerical))
    columns = np.stack(ids, axis=1) if ids else np.zeros((size, 0))
    return Features(jnp.asarray(numbers, jnp.float32), jnp.asarray(columns, jnp.int32))


def abstract(model_class, *arguments, **options):
    """The graph and the shapes of a model, without computing anything."""
    make = lambda: model_class(*arguments, **options, rngs=nnx.Rngs(0))  # noqa: E731
    return nnx.split(nnx.eval_shape(make))


def build(model_class, *arguments, **options):
    """A model whose parameters, biases too, are random numbers made by numpy."""
    graphdef, shapes = abstract(model_class, *arguments, **options)
    rng = np.random.default_rng(1)
    fill = lambda leaf: jnp.asarray(0.5 * rng.normal(size=leaf.shape), leaf.dtype)  # noqa: E731
    return nnx.merge(graphdef, jax.tree.map(fill, shapes))


def build_small(model_class, tasks=2):
    return build(model_class, SPEC, tasks, **SMALL[model_class])


def loss_of(logits):
    """Losses `[T]` of unlike curvature and scale, to be unlike in their gradients."""
    scale = jnp.arange(1, len(logits) + 1)
    return scale * jnp.mean((logits - scale[:, None]) ** 2, axis=1)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@functools.cache
def found(model_class):
    """All that the tests look at, from one compiled program for each model."""
    model = build_small(model_class)
    graphdef, heads, shared = nnx.split(model, is_head, ...)
    method, traces = mtl.sum_tasks(2), []

    def merge(heads, shared):
        return nnx.merge(graphdef, heads, shared)

    def forked(params, fork, features):
        model = merge(*params)
        return loss_of(model.heads_on_copies(fork(model.represent(features)), features))

    @jax.jit
    def run(heads, shared, features):
        traces.append(1)
        params = heads, shared
        losses = lambda params: loss_of(merge(*params)(features))  # noqa: E731
        representation = merge(*params).represent(features)
        state = method.init(representation)
        nothing = jax.tree.map(lambda leaf: leaf * jnp.nan, params)
        return {
            "representation": representation,
            "logits": merge(*params)(features),
            "heads": merge(*params).heads(representation, features),
            "without heads": merge(nothing[0], shared).represent(features),
            "without shared": merge(heads, nothing[1]).heads(representation, features),
            "forked": mtl.fork_value_and_grad(forked, method)(params, state, features)[1][0],
            "plain": jax.grad(lambda params: jnp.sum(losses(params)))(params),
            "per task": mtl.per_task_value_and_grad(losses)(params)[1],
        }

    results = [run(heads, shared, batch(seed)) for seed in (1, 0)]
    assert len(traces) == 1
    return results[-1]


@tabular
def test_shapes(model_class):
    result = found(model_class)
    assert all(len(leaf) == BATCH for leaf in jax.tree.leaves(result["representation"]))
    assert result["logits"].shape == (2, BATCH) and result["logits"].dtype == jnp.float32
    assert np.isfinite(result["logits"]).all() and np.std(result["logits"], axis=1).min() > 0
    np.testing.assert_allclose(result["heads"], result["logits"], rtol=1e-6)


@tabular
@pytest.mark.parametrize("spec", [FeatureSpec(0, (5, 7)), FeatureSpec(3, ())])
def test_one_kind_of_columns_is_enough(model_class, spec):
    graphdef, shapes = abstract(model_class, spec, 3, **SMALL[model_class])
    run = lambda state, features: nnx.merge(graphdef, state)(features)  # noqa: E731
    assert jax.eval_shape(run, shapes, batch(spec=spec)).shape == (3, BATCH)


@tabular
def test_the_split_into_shared_parameters_and_heads(model_class):
    """Each half of the model runs on its own parameters, whatever the others are (here NaN)."""
    result = found(model_class)
    jax.tree.map(np.testing.assert_array_equal, result["without heads"], result["representation"])
    np.testing.assert_array_equal(result["without shared"], result["heads"])


@tabular
def test_every_parameter_has_the_gradient_of_its_tasks(model_class):
    """One of its own task alone, or those of all tasks where it is shared."""
    for part in found(model_class)["per task"]:
        for path, leaf in nnx.to_flat_state(part):
            task, size = head_task(path), np.abs(leaf[...]).max(axis=tuple(range(1, leaf.ndim)))
            assert np.isfinite(leaf[...]).all()
            expected = [task is None or task == t for t in range(2)]
            np.testing.assert_array_equal(size > 0, expected, err_msg=str(path))


@tabular
def test_a_fork_with_the_plain_sum_is_the_plain_sum(model_class):
    result = found(model_class)

    def same(one, other):
        # The same products added in another order: a few roundings of float32.
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5 * np.abs(other).max())

    jax.tree.map(same, result["forked"], result["plain"])


@pytest.mark.parametrize(
    "name, model_class",
    [
        ("shared_bottom", SharedBottom),
        ("mmoe", MMoE),
        ("ple", PLE),
        ("dcn_v2", DCNv2),
        ("deepfm", DeepFM),
        pytest.param("segnet_mtan", SegNetMTAN, marks=pytest.mark.slow),
    ],
)
def test_the_docstrings_count_the_parameters(name, model_class):
    text = importlib.import_module(f"examples.models.{name}").__doc__
    (written,) = re.findall(r"the defaults: ([\d,]+)", text)
    arguments = (7,) if model_class is SegNetMTAN else (DEFAULTS, 2)
    assert count(abstract(model_class, *arguments)[1]) == int(written.replace(",", ""))


def float64(array):
    return np.asarray(array, np.float64)


@pytest.mark.parametrize("rank", [None, 2])
def test_the_cross_layer_is_its_formula(rank, x64):
    rng = np.random.default_rng(0)
    first, inputs = rng.normal(size=(2, BATCH, 5))
    layer = dcn_v2.CrossLayer(5, rank, nnx.Rngs(0))
    matrix, bias = float64(layer.linear.kernel[...]), rng.normal(size=5)
    layer.linear.bias.set_value(jnp.asarray(bias))
    if rank:
        matrix = float64(layer.down.kernel[...]) @ matrix
        assert np.linalg.matrix_rank(matrix) == rank
    expected = np.stack(
        [x0 * (matrix.T @ x + bias) + x for x0, x in zip(first, inputs, strict=True)]
    )
    np.testing.assert_allclose(layer(jnp.asarray(first), jnp.asarray(inputs)), expected, 1e-12)


@pytest.mark.slow
def test_dcn_v2_crosses_the_embedded_features():
    """The representation is the cross network, layer by layer, beside the deep network."""
    model, features = build_small(DCNv2), batch()
    tables = [
        table.embedding[...][features.categorical[:, c]]
        for c, table in enumerate(model.categorical.tables)
    ]
    first = np.concatenate([model.numerical(features.numerical), *tables], axis=1)
    crossed = first
    for layer in model.interaction.cross:
        kernel, bias = layer.linear.kernel[...], layer.linear.bias[...]
        crossed = first * (crossed @ np.asarray(kernel) + np.asarray(bias)[None]) + crossed
    expected = np.concatenate([crossed, model.interaction.deep(jnp.asarray(first))], axis=1)
    np.testing.assert_allclose(model.represent(features), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_fm_term_is_its_formula():
    model, features = build_small(DeepFM), batch()
    numbers = float64(model.numerical.vectors[...])
    tables = [float64(table.embedding[...]) for table in model.categorical.tables]
    expected = []
    for row in range(BATCH):
        fields = [x * v for x, v in zip(float64(features.numerical[row]), numbers, strict=True)]
        ids = np.asarray(features.categorical[row])
        fields += [table[i] for table, i in zip(tables, ids, strict=True)]
        term = sum(field[-1] for field in fields)
        for i in range(len(fields)):
            for j in range(i):
                term += fields[i][:-1] @ fields[j][:-1]
        expected.append(term)
    found = float64(model.represent(features))[:, : 1 + 4].sum(axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)  # float32


@pytest.mark.slow
def test_mmoe_and_ple_mix_their_experts():
    features = batch()
    for model_class in (MMoE, PLE):
        model = build_small(model_class)
        inputs = model.inputs(features)
        for task in range(2):
            if model_class is MMoE:
                experts = list(model.experts)
            else:
                experts = [*model.shared_experts, *model.task_experts[task]]
            scores = float64(inputs) @ float64(model.gates[task].kernel[...])
            weights = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
            mixed = sum(
                weights[:, [e]] * float64(expert(inputs)) for e, expert in enumerate(experts)
            )
            expected = model.towers[task](jnp.asarray(mixed, jnp.float32))
            np.testing.assert_allclose(model(features)[task], expected, rtol=1e-4, atol=1e-5)


def test_esmm_is_the_product_of_probabilities(x64):
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 50)) * 3)
    click, conversion = 1 / (1 + np.exp(-float64(logits)))
    logs = jax.jit(esmm.log_probabilities)(*logits)
    for found, expected in zip(
        logs, (click, conversion, click * conversion, 1 - click * conversion), strict=True
    ):
        np.testing.assert_allclose(np.exp(found), expected, rtol=1e-10)
    clicks = np.arange(50) % 2
    both = (np.arange(50) % 4 == 1).astype(int)
    product = click * conversion
    expected = [
        -np.mean(np.log(np.where(clicks, click, 1 - click))),
        -np.mean(np.log(np.where(both, product, 1 - product))),
    ]
    found = jax.jit(esmm.losses)(logits, jnp.asarray(clicks), jnp.asarray(both))
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_esmm_is_finite_where_probabilities_round():
    """In float32 p q rounds to 1 at logits of 20 and to 0 at -200; its logarithms do not."""
    logits = jnp.asarray([[20.0, -200.0, 200.0, 200.0], [20.0, -200.0, 200.0, -200.0]])
    logs = jax.jit(esmm.log_probabilities)(*logits)
    # By hand: log(1 - p q) = log(2 e^-20), 0, log(2 e^-200), and 0; log(p q) = -2 e^-20, -400, 0, -200.
    np.testing.assert_allclose(logs.neither, [np.log(2) - 20, 0, np.log(2) - 200, 0], rtol=1e-6)
    np.testing.assert_allclose(
        logs.click_and_conversion, [-2 * np.exp(-20.0), -400, 0, -200], rtol=1e-6, atol=1e-30
    )
    jacobian = jax.jit(jax.jacrev(lambda x, y: esmm.losses(x, y, y)))
    for labels in (jnp.zeros(4), jnp.ones(4)):
        assert np.isfinite(jacobian(logits, labels)).all()
    # A certain and wrong prediction still has its gradient.
    assert jacobian(logits, jnp.zeros(4))[1][0, 2] > 0.4 / 4  # a mean over four


@pytest.mark.slow
def test_esmm_trains_each_tower_from_its_own_copy():
    model, features = build_small(SharedBottom), batch()
    graphdef, params = nnx.split(model)
    clicks = jnp.asarray([1, 0, 1, 0, 1, 0])
    both = jnp.asarray([1, 0, 0, 0, 1, 0])

    def forked(params, fork):
        model = nnx.merge(graphdef, params)
        copies = fork(model.represent(features))
        pair = [model.head(t, copies[1], features) for t in (0, 1)]
        first = esmm.click_loss(model.head(0, copies[0], features), clicks)
        return first, esmm.conversion_loss(*pair, both)

    def plain(params):
        return sum(esmm.losses(nnx.merge(graphdef, params)(features), clicks, both))

    method = mtl.sum_tasks(2)
    state = method.init(jax.eval_shape(model.represent, features))
    _, (grads, _) = jax.jit(mtl.fork_value_and_grad(forked, method))(params, state)
    expected = jax.jit(jax.grad(plain))(params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grads, expected
    )


SMALL_IMAGES = jax.ShapeDtypeStruct((2, 8, 12, 3), jnp.float32)


def test_pooling_and_unpooling():
    maps = jnp.asarray([[1.0, 5.0, 0.0, 0.0], [2.0, 3.0, 0.0, 0.0]]).reshape(1, 2, 4, 1)
    largest, places = segnet_mtan.pool(maps)
    np.testing.assert_array_equal(largest.ravel(), [5, 0])
    # A tie counts once: the value comes back at one place.
    spread = segnet_mtan.unpool(jnp.asarray([7.0, 9.0]).reshape(1, 1, 2, 1), places)
    np.testing.assert_array_equal(spread[0, :, :, 0], [[0, 7, 9, 0], [0, 0, 0, 0]])


def test_enlarged_maps_are_bilinear():
    found = segnet_mtan.enlarge(jnp.asarray([0.0, 4.0]).reshape(1, 1, 2, 1))
    np.testing.assert_allclose(found[0, :, :, 0], [[0, 1, 3, 4]] * 2)


def test_normals_have_length_1():
    outputs = jnp.asarray([[3.0, 0, 4.0], [0, 0, 0]])
    found = segnet_mtan.as_prediction(2, outputs)
    np.testing.assert_allclose(found, [[0.6, 0, 0.8], [0, 0, 0]], rtol=1e-6)
    grads = jax.grad(lambda x: jnp.sum(segnet_mtan.as_prediction(2, x)))(outputs)
    assert np.isfinite(grads).all()


def test_a_convolution_as_a_product():
    keys = jax.random.split(jax.random.key(0), 2)
    maps = jax.random.normal(keys[0], (2, 5, 4, 3))
    for size in (1, 3):
        kernel = jax.random.normal(keys[1], (size, size, 3, 2))
        layout = ("NHWC", "HWIO", "NHWC")
        expected = jax.lax.conv_general_dilated(
            maps, kernel, (1, 1), "SAME", dimension_numbers=layout
        )
        found = segnet_mtan.as_product(maps, kernel, (1, 1), "SAME")
        # The order of a sum of 27 numbers differs.
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_segnet_predicts_three_tasks():
    graphdef, shapes = abstract(SegNetMTAN, 5, widths=(4, 8))
    run = lambda state, images: nnx.merge(graphdef, state)(images)  # noqa: E731
    expected = [(2, 8, 12, 5), (2, 8, 12, 1), (2, 8, 12, 3)]
    assert [part.shape for part in jax.eval_shape(run, shapes, SMALL_IMAGES)] == expected
    for task, shape in enumerate(expected):
        graphdef, shapes = abstract(SegNetSingle, task, 5, widths=(4, 8))
        run = lambda state, images, g=graphdef: nnx.merge(g, state)(images)  # noqa: E731
        assert jax.eval_shape(run, shapes, SMALL_IMAGES).shape == shape


@pytest.mark.slow
def test_segnet_splits_into_shared_parameters_and_branches():
    model = SegNetMTAN(5, widths=(4, 8), rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model)
    images = jax.random.uniform(jax.random.key(0), SMALL_IMAGES.shape)
    targets = [jax.random.normal(jax.random.key(c), (2, 8, 12, c)) for c in (5, 1, 3)]

    def loss(params):
        pairs = zip(nnx.merge(graphdef, params)(images), targets, strict=True)
        return jnp.stack([jnp.mean((part - target) ** 2) for part, target in pairs])

    _, grads = jax.jit(mtl.per_task_value_and_grad(loss))(params)
    for path, leaf in nnx.to_flat_state(grads):
        task, size = head_task(path), np.abs(leaf[...]).max(axis=tuple(range(1, leaf.ndim)))
        expected = [task is None or task == t for t in range(3)]
        np.testing.assert_array_equal(size > 0, expected, err_msg=str(path))
