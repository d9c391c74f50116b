"""EMTL's Table 2: rendered scenes, the reader of NYUv2, metrics, and the command."""

import os
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.models.segnet_mtan import Predictions
from examples.studies.emtl import dense, dense_report
from examples.studies.emtl.__main__ import main
from examples.studies.emtl.dense_report import delta_m, loss, measure
from examples.studies.emtl.scenes import (
    BALL,
    BOX,
    CYLINDER,
    FLOOR,
    FOCAL,
    WALL,
    Ball,
    Box,
    Cylinder,
    Room,
    Scene,
    Scenes,
    directions,
    draw_scene,
    render,
    synthetic_scenes,
    trace,
)
from examples.studies.emtl.scenes_nyuv2 import read_nyuv2
from examples.studies.harness.errors import UserError
from examples.studies.harness.runs import Run
from examples.studies.harness.search import Entry


def signed_distance(thing, points):
    """Positive outside a thing (inside the room), zero on its surface; written for the test alone."""
    if isinstance(thing, Ball):
        return np.linalg.norm(points - thing.center, axis=1) - thing.radius
    if isinstance(thing, Room):
        return np.min(thing.half - np.abs(points - np.array([0, thing.half[1], 0])), axis=1)
    if isinstance(thing, Box):
        x, y, z = (points - thing.center).T
        c, s = np.cos(thing.angle), np.sin(thing.angle)
        local = np.stack([c * x - s * z, y, s * x + c * z], axis=1)
        return np.max(np.abs(local) - thing.half, axis=1)
    radial = np.hypot(points[:, 0] - thing.center[0], points[:, 2] - thing.center[1])
    return np.max([radial - thing.radius, points[:, 1] - thing.top, thing.bottom - points[:, 1]], 0)


@pytest.mark.parametrize("seed", range(4))
def test_depth_and_normals_are_exact(seed):
    scene = draw_scene(np.random.default_rng(seed))
    rays = directions(24, 32) @ scene.pose.T
    nearest, hits = trace(scene, 24, 32)
    points = scene.camera + rays * hits.distance[:, None]
    kinds = {Ball: [BALL], Box: [BOX], Cylinder: [CYLINDER], Room: [0, 1, 2, 3]}
    seen = set()
    for number, thing in enumerate(scene.things):
        here = nearest == number
        if not here.any():
            continue
        seen.add(type(thing))
        assert set(hits.kinds[here]) <= set(kinds[type(thing)])
        np.testing.assert_allclose(signed_distance(thing, points[here]), 0, atol=1e-9)
        step = 1e-6
        slopes = [
            (
                signed_distance(thing, points[here] + step * axis)
                - signed_distance(thing, points[here] - step * axis)
            )
            / (2 * step)
            for axis in np.eye(3)
        ]
        # A pixel within a millionth of an edge would differ; there is none in these scenes.
        np.testing.assert_allclose(hits.normals[here], np.stack(slopes, 1), atol=1e-5)
        # Nothing stands in front of what a ray hits, however short the way.
        for part in np.linspace(0.02, 0.999, 60):
            before = scene.camera + part * rays * hits.distance[:, None]
            assert signed_distance(thing, before).min() > -1e-9
    assert Room in seen and len(seen) > 1
    np.testing.assert_allclose(np.linalg.norm(hits.normals, axis=1), 1)
    assert np.all(np.sum(hits.normals * rays, axis=1) < 0)


def test_an_empty_room_seen_straight_ahead():
    room = Room(np.array([2.0, 1.5, 3.0]), ())
    pose = np.stack([[1.0, 0, 0], [0, -1.0, 0], [0, 0, 1.0]], axis=1)
    scene = Scene((room,), np.array([0.0, 1.0, -2.0]), pose, np.array([0.0, 2.8, 0.0]))
    _, kinds, depths, normals = render(scene, 33, 41, np.random.default_rng(0))
    assert kinds[16, 20] == WALL
    np.testing.assert_allclose(depths[16, 20], 5.0)  # z, to the wall at z = 3
    np.testing.assert_allclose(depths[kinds == WALL].max(), 5.0)
    np.testing.assert_allclose(normals[16, 20], [0, 0, -1])
    assert kinds[32, 20] == FLOOR
    np.testing.assert_allclose(normals[32, 20], [0, -1, 0], atol=1e-12)  # y points downwards
    # The camera is 1 above the floor: depth = 1 / slope of the ray.
    np.testing.assert_allclose(depths[32, 20, 0], FOCAL * 41 / 16)


def test_scenes_are_the_same_again_and_have_all_classes():
    scenes = synthetic_scenes(24, 16, 24, seed=3)
    again = synthetic_scenes(24, 16, 24, seed=3)
    for one, other in zip(scenes, again, strict=True):
        np.testing.assert_array_equal(one, other)
    assert set(np.unique(scenes.labels)) == set(range(7))
    assert scenes.images.min() >= 0 and scenes.images.max() <= 1
    assert scenes.images.std() > 0.1
    assert scenes.depths.min() > 0.1 and scenes.depths.max() < 12
    assert not np.array_equal(scenes.images, synthetic_scenes(24, 16, 24, seed=4).images)
    assert [part.dtype for part in scenes] == [np.float32, np.int32, np.float32, np.float32]


def write_nyuv2(folder, number=3, shape=(16, 24)):
    rng = np.random.default_rng(0)
    arrays = {}
    for split in ("train", "val"):
        for k in range(number):
            normal = rng.normal(size=(*shape, 3))
            normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
            parts = {
                "image": rng.random((*shape, 3)),
                "label": rng.integers(-1, 13, shape).astype(np.float64),
                "depth": rng.random((*shape, 1)) * (rng.random((*shape, 1)) > 0.2),
                "normal": normal,
            }
            for name, array in parts.items():
                (folder / split / name).mkdir(parents=True, exist_ok=True)
                np.save(folder / split / name / f"{k}.npy", array)
                arrays[split, name, k] = array
    return arrays


def test_nyuv2_is_read_as_it_is_stored(tmp_path):
    arrays = write_nyuv2(tmp_path, number=11)  # 10 comes after 9, not after 1
    train, val = read_nyuv2(tmp_path)
    for split, scenes in (("train", train), ("val", val)):
        assert scenes.images.shape == (11, 16, 24, 3) and scenes.depths.shape == (11, 16, 24, 1)
        for k in (2, 10):
            for name, part in zip(("image", "label", "depth", "normal"), scenes, strict=True):
                np.testing.assert_allclose(part[k], arrays[split, name, k], rtol=1e-6)
    assert train.labels.dtype == np.int32 and train.labels.min() == -1


def test_nyuv2_says_what_is_wrong(tmp_path):
    with pytest.raises(UserError, match=r"train.image: no 0.npy"):
        read_nyuv2(tmp_path)
    write_nyuv2(tmp_path)
    label = tmp_path / "val" / "label" / "1.npy"
    np.save(label, np.full((16, 24), 13))
    with pytest.raises(UserError, match="labels must be -1 to 12"):
        read_nyuv2(tmp_path)
    label.unlink()
    with pytest.raises(UserError, match=r"1.npy"):
        read_nyuv2(tmp_path)
    for k in range(3):
        np.save(label.with_name(f"{k}.npy"), np.zeros((16, 24)))
        np.save(tmp_path / "train" / "image" / f"{k}.npy", np.zeros((3, 16, 24)))  # channels first
    with pytest.raises(UserError, match="must have one height and width"):
        read_nyuv2(tmp_path)


def by_hand():
    """Two images of 1 x 2 pixels, one of the four pixels without any label."""
    normals = np.array([[[[0, 0, -1], [1, 0, 0]]], [[[0, 1, 0], [0, 0, 0]]]], np.float32)
    scenes = Scenes(
        np.zeros((2, 1, 2, 3), np.float32),
        np.array([[[0, 1]], [[1, -1]]], np.int32),
        np.array([[[[2.0], [4.0]]], [[[1.0], [0.0]]]], np.float32),
        normals,
    )
    turn = np.deg2rad(25.0)
    found = np.array(
        [[[[0, 0, -1], [np.cos(turn), np.sin(turn), 0]]], [[[1, 0, 0], [1, 0, 0]]]], np.float32
    )
    logits = np.zeros((2, 1, 2, 4), np.float32)
    logits[0, 0, 0, 0] = logits[0, 0, 1, 1] = logits[1, 0, 0, 0] = logits[1, 0, 1, 3] = 2.0
    depth = np.array([[[[2.5], [3.0]]], [[[1.0], [9.0]]]], np.float32)
    return Predictions(logits, depth, found), scenes


def test_metrics_by_hand():
    predictions, scenes = by_hand()
    found = measure(predictions, scenes)
    # Class 0: 1 of 2 in the union; class 1: 1 of 2; classes 2 and 3 are nowhere among labelled pixels.
    np.testing.assert_allclose(found[:2], [50, 200 / 3])
    np.testing.assert_allclose(found[2:4], [(0.5 + 1) / 3, (0.25 + 0.25) / 3], rtol=1e-6)
    np.testing.assert_allclose(found[4:6], [(0 + 25 + 90) / 3, 25], rtol=1e-4)
    np.testing.assert_allclose(found[6:], [100 / 3, 100 / 3, 200 / 3])


def test_losses_by_hand():
    predictions, scenes = by_hand()
    losses = [float(loss(t, part, scenes)) for t, part in enumerate(predictions)]
    right = -np.log(np.exp(2) / (np.exp(2) + 3))
    expected = [
        (2 * right + right + 2)
        / 3,  # the third pixel's class has the logit 0 where 2 is the largest
        1.5 / 3,
        (0 + 1 - np.cos(np.deg2rad(25)) + 1) / 3,
    ]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    nothing = scenes._replace(
        labels=0 * scenes.labels - 1, depths=0 * scenes.depths, normals=0 * scenes.normals
    )
    assert [float(loss(t, part, nothing)) for t, part in enumerate(predictions)] == [0, 0, 0]


def test_delta_m():
    base = np.array([40, 60, 0.5, 0.2, 25, 20, 30, 55, 70.0])
    signs = [1, 1, -1, -1, -1, -1, 1, 1, 1]
    np.testing.assert_allclose(delta_m(base, base), 0)
    better = base * (1 + 0.1 * np.array(signs))
    np.testing.assert_allclose(delta_m(np.stack([base, better]), base), [0, -10])
    # The paper's own row of EMTL against its STL row: -5.40 (Table 2; both rounded as printed).
    stl = np.array([38.31, 63.76, 0.6754, 0.2780, 25.01, 19.21, 30.15, 57.20, 69.18])
    emtl = np.array([40.23, 65.53, 0.5595, 0.2155, 24.70, 19.28, 30.04, 57.24, 69.48])
    np.testing.assert_allclose(delta_m(emtl, stl), -5.40, atol=0.15)


@pytest.mark.slow
def test_mirrored_scenes():
    scenes = jax.tree.map(jnp.asarray, synthetic_scenes(2, 8, 8, seed=0))
    found = dense.mirror(scenes, jnp.array([True, False]))
    for part, mirrored in zip(scenes, found, strict=True):
        np.testing.assert_array_equal(mirrored[1], part[1])
    np.testing.assert_array_equal(found.images[0], scenes.images[0, :, ::-1])
    np.testing.assert_array_equal(found.labels[0], scenes.labels[0, :, ::-1])
    np.testing.assert_array_equal(found.normals[0, ..., 0], -scenes.normals[0, :, ::-1, 0])
    np.testing.assert_array_equal(found.normals[0, ..., 1:], scenes.normals[0, :, ::-1, 1:])


def trainer(**changes):
    config = replace(dense.QUICK, **changes)
    return dense.DenseTrainer(dense.load(None, config), config)


@pytest.mark.slow
def test_a_row_trains_alone_as_side_by_side(monkeypatch):
    """Two real steps of two runs, as on a CPU and as on an accelerator.

    Without XLA's optimisations, which the tests leave out, the losses differ by 0.2 %: the test calls
    itself in a process that has them.
    """
    if os.environ.get("MTL_OPTAX_XLA") != "default":
        this = f"{__file__}::test_a_row_trains_alone_as_side_by_side"
        alone = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "slow", this]
        environment = os.environ | {"MTL_OPTAX_XLA": "default", "XLA_FLAGS": ""}
        done = subprocess.run(alone, env=environment, capture_output=True, text=True)
        assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout
        return
    (entry,) = (row for row in dense.shared_rows(2) if row.label == "EMTL")
    alone = trainer(steps=2)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    together = trainer(steps=2)
    monkeypatch.undo()
    plans = entry.trials(2, 3, alone.config)
    assert alone.slots(1, np.array([0]))[0].shape == (1, 1, 1, 4)  # runs, parts, steps, images
    for run, other in zip(
        *(made.train(entry.parsed(), plans) for made in (alone, together)), strict=True
    ):
        assert run.test["metrics"].shape == (9,) and np.isfinite(run.test["metrics"]).all()
        assert run.history["losses"].shape == run.history["weights"].shape == (2, 3)
        assert np.abs(np.diff(run.history["losses"], axis=0)).min() > 0
        # A convolution is a matrix product there, whose sums have another order.
        np.testing.assert_allclose(run.history["losses"], other.history["losses"], rtol=1e-4)
        np.testing.assert_allclose(run.best_value, other.best_value, rtol=1e-3)


@pytest.mark.slow
def test_single_tasks_share_nothing():
    """The gradient of a task's loss is zero in the networks of the other tasks."""
    network = dense.DenseNetwork(7, (4,), separate=True)
    params = network.init(0)
    assert params.shared.size == 0 and len(params.heads) == 3
    scenes = synthetic_scenes(1, 8, 8, seed=0)
    images = network.encode(params.shared, scenes)
    grads = jax.jit(jax.jacrev(network.decode))(params.heads, images, scenes)
    for task, heads in enumerate(grads):
        assert [bool(np.any(head)) for head in heads] == [head == task for head in range(3)]


def runs_by_hand():
    base = np.array([40, 60, 0.5, 0.2, 25, 20, 30, 55, 70.0])
    make = lambda label, seed, factor: Run(  # noqa: E731
        label, seed, {}, {"metrics": base * factor}, 2, 1.0, {"validation": np.array([-3.0, -1.0])}
    )
    signs = np.array([1, 1, -1, -1, -1, -1, 1, 1, 1])
    return {
        "STL": [make("STL", 0, 1.0), make("STL", 1, 1.0)],
        "LS": [make("LS", 0, 1 - 0.02 * signs), make("LS", 1, np.ones(9))],
        "EMTL": [make("EMTL", 0, 1 + 0.1 * signs), make("EMTL", 1, 1 + 0.2 * signs)],
    }


def test_the_table_and_the_files(tmp_path):
    runs = runs_by_hand()
    scenes = synthetic_scenes(2, 8, 8, seed=0)
    dense_report.write(runs, "SYNTHETIC SCENES: 2 images", "Made by `command`.", tmp_path, scenes)
    text = (tmp_path / "table2.md").read_text()
    assert "SYNTHETIC SCENES: 2 images**" in text and "Made by `command`." in text
    assert "| EMTL | 46.00 ± 2.00 | 69.00 ± 3.00 | 0.4250 ± 0.0250 | " in text
    assert "| -15.00 ± 5.00 | -16.00 ± 4.00 |" in text
    assert (
        "The mean logarithm of the held-out losses of LS is 3.000 half-way and 1.000 at the end."
        in text.replace("\n", " ")
    )
    lines = (tmp_path / "table2.csv").read_text().splitlines()
    assert len(lines) == 1 + 3 * 2 * 10 and lines[-1] == "EMTL,test,metrics,delta-m ↓,1,-20"
    assert 5_000 < (tmp_path / "table2_scenes.png").stat().st_size < 150_000


@pytest.mark.slow
def test_the_command(tmp_path, monkeypatch, capsys):
    shown = [row for row in dense.shared_rows(2) if row.label in ("LS", "Uncertainty", "EMTL")]
    monkeypatch.setattr(dense, "shared_rows", lambda epoch: shown)
    out = tmp_path / "out"
    assert main(["table2", "--quick", "--seeds", "1", "--out", str(out)]) == 0
    text = (out / "table2.md").read_text()
    assert "SYNTHETIC SCENES" in text and "python -m examples.studies.emtl table2 --quick" in text
    assert sum(line.startswith("| ") for line in text.splitlines()) == len(shown) + 3
    stored = {path: path.stat().st_mtime_ns for path in (out / "runs").iterdir()}
    assert len(stored) == 3 * (len(shown) + 1)  # two trials and a seed of each row
    # With --resume nothing is trained again.
    capsys.readouterr()
    assert main(["table2", "--quick", "--seeds", "1", "--out", str(out), "--resume"]) == 0
    assert stored == {path: path.stat().st_mtime_ns for path in (out / "runs").iterdir()}
    assert "held-out losses of LS" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_the_command_reads_nyuv2(tmp_path, monkeypatch):
    write_nyuv2(tmp_path, number=6)
    monkeypatch.setattr(dense, "shared_rows", lambda epoch: [Entry("LS", "sum")])
    monkeypatch.setattr(dense, "NYUV2", dense.QUICK)
    out = tmp_path / "out"
    command = ["table2", "--data", str(tmp_path), "--seeds", "1", "--steps", "2", "--out", str(out)]
    assert main(command) == 0
    text = (out / "table2.md").read_text()
    assert "NYUv2 arrays" in text and "SYNTHETIC" not in text
    assert not (out / "table2_scenes.png").exists()
    assert "mIoU" in text
