"""The dbpm recipe: its settings, its views, the losses it remembers, the figure, and errors a user can mend."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.stream import DataError
from data.timeseries import bad_pairs
from trainers.phases import Alternate, Evaluate
from trainers.recipe import Data, UserError
from trainers.recipes.timeseries import dbpm
from zoo.base import Context, check_fit
from zoo.timeseries.dbpm import MiningState, PairMemory, pair_memory_stats


def write_problem(folder, steps=20):
    rng = np.random.default_rng(0)
    for part, number in (("TRAIN", 12), ("TEST", 8)):
        rows = [",".join(f"{v:.3f}" for v in rng.normal(size=steps)) + f":{'ab'[i % 2]}" for i in range(number)]
        (folder / f"Toy_{part}.ts").write_text("@classLabel true a b\n@data\n" + "\n".join(rows) + "\n")


def test_builds_pretraining_then_a_probe():
    run = dbpm.Recipe(steps=50).build()
    train, probe = run.phases
    assert isinstance(train, Alternate)
    assert isinstance(probe, Evaluate)
    update = train.updates["main"]
    assert check_fit(update.loss_transform, update.objective) is update.loss_transform
    assert update.stream.num_examples == 600
    plain = dbpm.Recipe(steps=50, mining=False).build().phases[0].updates["main"]
    assert plain.loss_transform is None


def test_reads_the_users_own_files(tmp_path):
    write_problem(tmp_path)
    run = dbpm.Recipe(data=Data("ucr", str(tmp_path)), batch_size=4).build()
    assert run.phases[0].updates["main"].stream.arrays["x"].shape == (12, 20, 1)
    assert dbpm.Recipe(data=Data("digits")).load()["train"]["other"].shape == (1348, 64, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": Data("digit")}, "unknown data set 'digit'; did you mean 'digits'"),
        ({"data": Data("ucr")}, "--data.name ucr needs --data.path DIR"),
        ({"data": Data("bad_pairs", "somewhere")}, "--data.path is read with --data.name ucr only"),
        ({"max_segments": 64}, r"--max-segments must lie in 2\.\.63 for series of 64 steps, got 64"),
        ({"temperature": 0.0}, "--temperature must be positive"),
        ({"steps": 0}, "--steps must be positive"),
        ({"scale": -1.0}, "--scale must be 0 or more"),
        ({"jitter": -1.0}, "--jitter must be 0 or more"),
        ({"warm_up": 1.0}, "--warm-up is a share of the epochs"),
        ({"beta_np": -1.0}, "--beta-np must be positive, got -1"),
    ],
)
def test_settings_that_cannot_work_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        dbpm.Recipe(**settings).build()


def test_bad_files_reach_the_user(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        dbpm.Recipe(data=Data("ucr", str(tmp_path / "none"))).build()


@pytest.fixture(scope="module")
def tiny():
    row = dbpm.example()
    objective, batch = row["objective"], jax.tree.map(jnp.asarray, row["batch"])
    forward = jax.jit(lambda v, b: objective.forward(v, b, Context(jax.random.key(1))))
    return objective, batch, jax.jit(objective.init)(jax.random.key(0), batch), forward


def test_second_view_is_made_from_the_other_series(tiny):
    objective, batch, variables, forward = tiny
    context = Context(jax.random.key(1))
    run = lambda b: forward(variables, b)[0]  # noqa: E731
    base = run(batch)
    moved = run({**batch, "other": batch["other"] + 1.0})
    # batch statistics are shared by both views, so the first moves too, but the loss tells them apart
    assert not np.allclose(base["z2"], moved["z2"])
    same = run({**batch, "other": batch["x"]})
    gap = lambda o: float(objective.loss(o, batch, context).elements.values.mean())  # noqa: E731
    assert gap(same) < gap(base)


def test_flag_metrics_and_figure(tmp_path):
    pair = np.array([0, 0, 0, 0, 0, 0, 1, 2], np.int32)
    means = jnp.array([1.0, 1.1, 0.9, 1.0, 1.05, 1.0, 0.1, 2.0])
    memory = PairMemory(means, jnp.ones(8), jnp.ones(8, jnp.int32), jnp.int32(-1))
    got = dbpm.flag_metrics(MiningState(memory, pair_memory_stats(memory, 1.5, 1.5)), pair)
    assert got["flag_precision"] == got["flag_recall"] == 1.0
    assert got["loss_noisy"] < got["loss_normal"] < got["loss_faulty"]
    mined = MiningState(memory, pair_memory_stats(memory, 1.5, 1.5))
    result = SimpleNamespace(state=SimpleNamespace(loss={"main": mined}))
    for train in ({"pair": pair}, {}):
        dbpm.draw_pairs(result, tmp_path, train, dbpm.Recipe())
        assert (tmp_path / "pairs.png").stat().st_size > 5000


def test_probe_separates_what_is_separable():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 90)
    x = np.eye(3)[y] + 0.1 * rng.normal(size=(90, 3))
    assert dbpm.linear_probe(x[:60], y[:60], x[60:], y[60:]) == 1.0
    assert dbpm.linear_probe(rng.normal(size=(60, 3)), y[:60], rng.normal(size=(30, 3)), y[60:]) < 0.7


def test_benchmarks_agree_with_their_baselines():
    loss, mining = dbpm.benchmarks()
    (baseline,) = loss.baselines.values()
    np.testing.assert_allclose(jax.jit(loss.fn)(*loss.args), baseline(*loss.args), rtol=1e-4)
    values, state = jax.jit(mining.fn)(*mining.args)
    assert values.shape == mining.args[0].shape
    assert int(state.memory.count.sum()) == int(mining.args[2].memory.count.sum()) + len(values)


def test_arms_are_those_of_the_card():
    from zoo.timeseries.dbpm import CARD

    assert {CARD.claim.method, CARD.claim.baseline, CARD.claim.trivial} == set(dbpm.ARMS)
    with pytest.raises(UserError, match="unknown arm 'simcler'; did you mean 'simclr'"):
        dbpm.arm("simcler", 0)
    assert set(dbpm.fields()) == {"x", "other", "label"}


@pytest.mark.slow
def test_mined_training_orders_the_losses_and_finds_the_bad_pairs():
    got = dbpm.arm("simclr_dbpm", 11)
    assert got["loss_noisy"] < got["loss_normal"] < got["loss_faulty"]
    assert got["flag_precision"] > 0.7


@pytest.mark.slow
def test_short_training_runs_and_keeps_its_memory(monkeypatch):
    small = dataclasses.replace(bad_pairs(0, 48, 24, 16, 2), name="bad_pairs")
    monkeypatch.setattr(dbpm, "bad_pairs", lambda seed: small)
    recipe = dbpm.Recipe(steps=6, batch_size=16, features=8, max_segments=3, warm_up=0.5)
    train = recipe.load()["train"]
    variables, mining = dbpm._train(recipe, train, "simclr_dbpm")
    np.testing.assert_array_equal(mining.memory.count, 2)
    plain, none = dbpm._train(recipe, train, "simclr")
    assert none is None
    start, _ = dbpm._train(recipe, train, "untrained_encoder")
    weights = lambda v: np.concatenate([np.ravel(x) for x in jax.tree.leaves(v["params"])])  # noqa: E731
    assert np.abs(weights(variables) - weights(start)).max() > 1e-4
    assert np.isfinite(weights(plain)).all()
