"""The main example: data, ranking metrics, a real step in every placement, the command and its errors."""

import gzip
import io
import json
import zipfile
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import ndcg_score

from examples import compare
from examples.recommender import download, metrics, report, sources
from examples.recommender.checkpoints import UnfinishedRun
from examples.recommender.data import Behaviours, build_dataset, split_target
from examples.recommender.errors import UserError
from examples.recommender.network import NetworkConfig
from examples.recommender.placements import known_methods
from examples.recommender.training import Run, TrainConfig, Trainer

TINY = TrainConfig(
    epochs=2,
    batch_positives=64,
    negatives=1,
    max_steps_per_epoch=3,
    validation_users=16,
    network=NetworkConfig(embedding=4, mlp=(4,), tower=(4,)),
)
RATINGS = np.array([[2, 1, 5, 7], [1, 2, 3, 9], [1, 1, 4, 8]])
U_DATA = b"2\t1\t5\t7\n1\t2\t3\t9\n1\t1\t4\t8\n"
INTER = b"user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + U_DATA


@pytest.fixture(scope="module")
def small_dataset():
    return build_dataset(sources.synthetic(num_users=40, num_items=30))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("MTL_OPTAX_CACHE", str(folder))
    return folder


@pytest.fixture
def offline(cache, monkeypatch):
    def unreachable():
        raise UserError("cannot be reached")

    monkeypatch.setattr(download, "from_grouplens", unreachable)
    monkeypatch.setattr(download, "from_package_index", unreachable)
    return cache


def zip_of(**members: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


def write_behaviour(folder: Path, name: str, pairs: np.ndarray) -> None:
    rows = "".join(f"{user},{item},0\n" for user, item in pairs)
    (folder / f"{name}.csv.gz").write_bytes(gzip.compress(f"user,item,extra\n{rows}".encode()))


# --- data ---------------------------------------------------------------------------------------


def test_split_depends_on_the_seed_alone_and_loses_nothing():
    pairs = sources.synthetic().pairs["buy"]
    parts = split_target(pairs, seed=0)
    again = split_target(np.random.default_rng(1).permutation(pairs), seed=0)
    other = split_target(pairs, seed=1)
    for part, same in zip(parts, again, strict=True):
        np.testing.assert_array_equal(part, same)
    assert not np.array_equal(parts[2], other[2])
    together = np.concatenate(parts)
    np.testing.assert_array_equal(np.unique(together, axis=0), np.unique(pairs, axis=0))
    assert len(together) == len(pairs)


def test_held_out_pairs_leave_every_auxiliary_behaviour(small_dataset):
    behaviours = sources.synthetic(num_users=40, num_items=30)
    held_out = small_dataset.held_out > 0
    assert held_out.sum() >= 10
    viewed = np.zeros_like(held_out)
    viewed[tuple(behaviours.pairs["view"].T)] = True
    assert (viewed & held_out).sum() == held_out.sum()  # without the removal every one would leak
    assert not np.any(small_dataset.labels[held_out])
    assert not np.any(held_out[tuple(small_dataset.positives.T)])
    kept = (small_dataset.labels >> small_dataset.tasks.index("view")) & 1
    np.testing.assert_array_equal(kept.astype(bool), viewed & ~held_out)


def test_too_little_data_to_hold_out_is_an_error():
    pairs = np.array([[0, 0], [1, 1]], np.int32)
    with pytest.raises(UserError, match="too few pairs"):
        build_dataset(Behaviours("x", 2, 2, {"buy": pairs}))


def test_both_sources_give_one_canonical_text(monkeypatch):
    archive = zip_of(**{download.GROUPLENS_MEMBER: U_DATA, download.WHEEL_MEMBER: INTER})
    texts = {
        download.canonical_text(download.parse_ratings(download.read_member(archive, member)))
        for member in (download.GROUPLENS_MEMBER, download.WHEEL_MEMBER)
    }
    assert texts == {b"1,1,4,8\n1,2,3,9\n2,1,5,7\n"}


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", "..\\evil", "C:/evil"])
def test_archive_that_escapes_its_folder_is_refused(name):
    archive = zip_of(**{download.GROUPLENS_MEMBER: U_DATA, name: b"x"})
    with pytest.raises(UserError, match="outside its folder"):
        download.read_member(archive, download.GROUPLENS_MEMBER)


def test_broken_and_oversized_archives_are_refused(monkeypatch):
    archive = zip_of(**{download.GROUPLENS_MEMBER: U_DATA})
    with pytest.raises(UserError, match="corrupt"):
        download.read_member(archive[:-30], download.GROUPLENS_MEMBER)
    with pytest.raises(UserError, match="no member"):
        download.read_member(archive, download.WHEEL_MEMBER)
    monkeypatch.setattr(download, "MAX_MEMBER_BYTES", 8)
    with pytest.raises(UserError, match="larger than"):
        download.read_member(archive, download.GROUPLENS_MEMBER)


def test_download_is_cached_checked_and_mended(cache, monkeypatch):
    text = download.canonical_text(RATINGS)
    monkeypatch.setattr(download, "CONTENT_SHA256", download.hashlib.sha256(text).hexdigest())
    fetched = []
    monkeypatch.setattr(download, "from_grouplens", lambda: fetched.append(1) or text)
    for _ in range(2):
        np.testing.assert_array_equal(download.movielens_ratings(), RATINGS[[2, 1, 0]])
    assert len(fetched) == 1
    (cache / "ml-100k.csv").write_bytes(text[:-3])
    download.movielens_ratings()
    assert len(fetched) == 2
    assert [path.name for path in cache.iterdir()] == ["ml-100k.csv"]


def test_interrupted_write_leaves_nothing(cache, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(download.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        download.write_atomically(cache / "file", b"content")
    assert list(cache.iterdir()) == []


# --- metrics ------------------------------------------------------------------------------------


def test_ranking_metrics_equal_a_reference():
    generator = np.random.default_rng(0)
    scores = generator.normal(size=(20, 50)).astype(np.float32)
    known = generator.random((20, 50)) < 0.2
    relevant = (generator.random((20, 50)) < 0.3) & ~known
    relevant[0] = False
    relevant[1] = ~known[1]
    found = np.asarray(metrics.ranking_metrics(*map(jnp.asarray, (scores, known, relevant))))
    assert np.all(np.isnan(found[0]))
    for user in range(1, 20):
        shown = np.where(known[user], -1e9, scores[user])
        expected = []
        for k in metrics.CUTOFFS:
            hits = relevant[user][np.argsort(-shown)[:k]].sum()
            expected += [
                ndcg_score(relevant[user][None], shown[None], k=k),
                hits / relevant[user].sum(),
                hits / k,
            ]
        np.testing.assert_allclose(found[user], expected, rtol=1e-5)


def test_fewer_items_than_the_cutoff():
    scores = jnp.array([[3.0, 2.0, 1.0]])
    found = metrics.ranking_metrics(scores, scores > 9, jnp.array([[False, True, False]]))
    np.testing.assert_allclose(found[0, :3], [1 / np.log2(3), 1.0, 0.1], rtol=1e-6)


def test_popularity_counts_training_pairs_and_hides_known_items():
    labels = np.array([[1, 1, 0], [1, 0, 0], [0, 0, 1]], np.uint8)
    held_out = np.array([[0, 0, 0], [0, 2, 0], [2, 0, 0]], np.uint8)
    found = metrics.popularity(labels, held_out)[:, metrics.METRICS.index("ndcg@10")]
    np.testing.assert_allclose(found, [np.nan, 1.0, 1.0])


# --- training -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", ["sum", "multibalance", "metabalance", "adatask", "scale_by_mtadam"]
)
def test_a_real_step_in_each_placement(small_dataset, method):
    trainer = Trainer(small_dataset, TINY)
    step = trainer.make_step(method)
    params = trainer.network.init(jax.random.key(0))
    batch = trainer._batch(trainer._positives[:64], jax.random.key(1))
    new, _, losses, weights = jax.jit(step.update)(params, step.init(params), batch)
    assert losses.shape == weights.shape == (3,)
    for before, after in zip(jax.tree.leaves(params), jax.tree.leaves(new), strict=True):
        assert before.shape == after.shape and np.all(np.isfinite(after))
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), params, new)
    assert all(jax.tree.leaves(moved.shared["user"]))
    assert all(jax.tree.leaves(moved.heads["item_bias"]))


@pytest.mark.parametrize("method", known_methods())
def test_every_known_method_makes_a_step(small_dataset, method):
    trainer = Trainer(small_dataset, TINY)
    step = trainer.make_step(method)

    def run():
        params = trainer.network.init(jax.random.key(0))
        batch = trainer._batch(trainer._positives[:64], jax.random.key(1))
        state = step.init(params)
        return (params, state), step.update(params, state, batch)

    before, (*after, losses, weights) = jax.eval_shape(run)
    chex.assert_trees_all_equal_shapes_and_dtypes(before, tuple(after))
    chex.assert_shape((losses, weights), (3,))


def test_batch_masks_positives_of_other_behaviours(small_dataset):
    trainer = Trainer(small_dataset, TINY)
    batch = trainer._batch(trainer._positives[:64], jax.random.key(1))
    users, items = np.asarray(batch.users), np.asarray(batch.items)
    for task in range(3):
        labels = (small_dataset.labels[users, items] >> task) & 1
        np.testing.assert_array_equal(batch.labels[task], labels)
        drawn = np.arange(users.size) % 2 == 1
        np.testing.assert_array_equal(batch.mask[task], (labels > 0) | drawn)


def test_embeddings_alone_are_decayed(small_dataset):
    trainer = Trainer(small_dataset, TINY)
    params = trainer.network.init(jax.random.key(0))
    zeros = jax.tree.map(jnp.zeros_like, params)
    descent = trainer.descent()
    updates, _ = descent.update(zeros, descent.init(params), params)
    moved = [bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(updates)]
    assert sum(moved) == 2
    assert jnp.any(updates.shared["user"]["embedding"][...] != 0)


# --- report -------------------------------------------------------------------------------------


def test_holm_correction():
    corrected = report.holm(np.array([[0.01], [0.04], [0.03]]))
    np.testing.assert_allclose(corrected[:, 0], [0.03, 0.06, 0.06])


def test_rows_compare_users_with_the_baseline():
    generator = np.random.default_rng(0)
    base = generator.random((2, 50, 6))
    base[:, 0] = np.nan
    better = base + 0.1 + 0.01 * generator.random(base.shape)
    history = {"validation": np.zeros(1)}
    runs = {
        name: [Run(name, seed, values[seed], 1, 1.0, history) for seed in range(2)]
        for name, values in {"sum": base, "same": base, "better": better}.items()
    }
    floor, plain, same, ahead = report.make_rows(runs, base[0], "sum")
    assert floor.p_value is None and plain.p_value is None
    np.testing.assert_array_equal(same.p_value, 1.0)
    assert np.all(ahead.p_value < 1e-10)
    means = np.nanmean(base, axis=1)
    np.testing.assert_allclose(plain.error, np.abs(means[0] - means[1]) / 2)


# --- the command --------------------------------------------------------------------------------


def test_command_from_folder_to_files_and_resume(tmp_path, monkeypatch, capsys):
    for name, pairs in sources.synthetic(num_users=40, num_items=30).pairs.items():
        write_behaviour(tmp_path, name, pairs)
    out = tmp_path / "out"
    arguments = ["--data", str(tmp_path), "--out", str(out), "--method", "single", "sum"]
    config = compare.replace(compare.parse([*arguments, "--seeds", "2"]), train=TINY)
    monkeypatch.setattr(compare, "parse", lambda _: config)
    assert compare.main([]) == 0
    shown = capsys.readouterr().out
    assert "popularity" in shown and "paired over users" in shown.replace("\n", " ")
    results = json.loads((out / "results.json").read_text())
    assert [row["method"] for row in results["results"]] == ["popularity", "single", "sum"]
    assert results["results"][1]["p_value"]["ndcg@10"] <= 1
    assert (out / "table.md").read_text().count("±") == 13
    assert (out / "picture.png").read_bytes().startswith(b"\x89PNG")

    def fail(*_):
        raise AssertionError("a finished run was trained again")

    monkeypatch.setattr(compare.Trainer, "train", fail)
    monkeypatch.setattr(compare, "parse", lambda _: compare.replace(config, resume=True))
    assert compare.main([]) == 0
    assert json.loads((out / "results.json").read_text())["results"] == results["results"]


@pytest.mark.slow
def test_a_stopped_command_goes_on_from_its_last_epoch_bit_for_bit(tmp_path, monkeypatch, capsys):
    def config_of(out: str, *, resume: bool = False) -> compare.CompareConfig:
        arguments = ["--data", "synthetic", "--method", "multibalance", "--seeds", "2"]
        config = compare.parse([*arguments, "--out", str(tmp_path / out)])
        return compare.replace(config, train=compare.replace(TINY, epochs=3), resume=resume)

    def run(config: compare.CompareConfig, stop_at: int | None = None) -> tuple[int, list[int]]:
        epochs = []
        train = Trainer.train

        def stopping(self, method, seeds, on_epoch, *rest):
            def then(epoch, values):
                epochs.append(epoch)
                if epoch == stop_at:
                    raise KeyboardInterrupt
                on_epoch(epoch, values)

            return train(self, method, seeds, then, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "train", stopping)
            patch.setattr(compare, "parse", lambda _: config)
            return compare.main([]), epochs

    def stored(out: str) -> list[dict]:
        files = sorted((tmp_path / out / "runs").glob("*.json"))
        return [json.loads(file.read_text()) | {"seconds": None} for file in files]

    assert run(config_of("whole")) == (0, [1, 2, 3])
    assert run(config_of("stopped"), stop_at=3) == (130, [1, 2, 3])
    assert not (tmp_path / "stopped" / "runs").exists()
    assert run(config_of("stopped", resume=True)) == (0, [3])
    assert len(stored("whole")) == 2 and stored("stopped") == stored("whole")
    assert not list((tmp_path / "stopped" / compare.UNFINISHED).iterdir())


def test_other_settings_find_no_unfinished_run(tmp_path):
    carry = {"step": jnp.arange(3)}
    with UnfinishedRun(tmp_path, {"epochs": 3}) as unfinished:
        unfinished.save(2, carry)
    for settings, found in (({"epochs": 4}, 0), ({"epochs": 3}, 2)):
        with UnfinishedRun(tmp_path, settings) as unfinished:
            epoch, restored = unfinished.restore(jax.tree.map(jnp.zeros_like, carry))
        assert epoch == found
        np.testing.assert_array_equal(restored["step"], [0, 1, 2] if found else [0, 0, 0])


def error_line(capsys, *arguments: str) -> str:
    assert compare.main(list(arguments)) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("examples.compare: error: ")
    assert shown.err.count("\n") == 1
    return shown.err


def test_no_network_and_no_cache(offline, capsys):
    line = error_line(capsys)
    assert "--data synthetic" in line and "--data PATH" in line
    assert not offline.exists()


def test_other_content_than_the_pinned_hash(offline, monkeypatch, capsys):
    monkeypatch.setattr(download, "from_grouplens", lambda: b"1,1,5,0\n")
    assert "content hash" in error_line(capsys)
    assert not offline.exists()


def test_package_index_out_of_reach(cache, monkeypatch):
    monkeypatch.setattr(download, "WHEEL", "/no/such.whl")
    with pytest.raises(UserError, match="pip download failed"):
        download.from_package_index()
    assert not cache.exists()


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--method", "magic"], "unknown method 'magic'"),
        (["--epochs", "0"], "at least 1"),
        (["--seeds", "many"], "invalid int"),
        (["--resume"], "--out DIR"),
        (["--colour"], "--colour"),
        (["--data", "/no/such/folder"], "no such folder"),
        (["--data", "synthetic", "--target", "rent"], "buy, like, view"),
    ],
)
def test_bad_arguments(arguments, shown, capsys):
    assert shown in error_line(capsys, *arguments)


def test_folder_without_the_target(tmp_path, capsys):
    write_behaviour(tmp_path, "view", np.array([[0, 0]]))
    line = error_line(capsys, "--data", str(tmp_path))
    assert "buy.csv" in line and "found: view" in line and "--data synthetic" in line


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        (b"\x1f\x8bnot gzip", "cannot be read"),
        (gzip.compress(b"user,item\n1,2\n" * 99)[:-9], "cannot be read"),
        (gzip.compress(b"who,what\n1,2\n"), "columns user and item"),
        (gzip.compress(b"user,item\n1\n"), "fewer columns"),
        (gzip.compress(b"\xff\xfe\x00"), "cannot be read"),
    ],
    ids=["no gzip", "cut short", "wrong header", "short row", "not text"],
)
def test_unreadable_folder(tmp_path, capsys, content, shown):
    (tmp_path / "buy.csv.gz").write_bytes(content)
    assert shown in error_line(capsys, "--data", str(tmp_path))
