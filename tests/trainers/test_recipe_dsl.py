"""The DSL recipe: every backbone builds and steps, settings and files that cannot work are one clear line."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from data.stream import DataError
from trainers.recipe import Data, Optimizer, UserError
from trainers.recipes.recommendation import dsl as recipe
from zoo.base import Context, total_loss
from zoo.recommendation import dsl

TINY = recipe.Recipe(dim=4, hidden=6, layers=1, steps=4, batch_size=16, update_interval=2, density=0.3)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    rng = np.random.default_rng(0)
    lines = [f"{u},{i}" for u in range(12) for i in rng.permutation(25)[:6]]
    path = tmp_path_factory.mktemp("d") / "x.csv"
    path.write_text("\n".join(["user,item", *lines]))
    return str(path)


SLOW = [pytest.param(b, marks=pytest.mark.slow) for b in ("neumf", "multvae")]


@pytest.mark.parametrize("backbone", ["mf", "lightgcn", *SLOW])
def test_backbones_start_masked_learn_and_rank(backbone, file):
    made = dataclasses.replace(TINY, backbone=backbone, data=Data(path=file, split="random"))
    run = made.build()
    phase = run.phases[0]
    update = phase.updates["main"]
    variables = jax.jit(run.init)(jax.random.key(0))
    params, rest = variables["params"], {k: v for k, v in variables.items() if k != "params"}
    state = jax.jit(update.optimizer.init)(params)
    masks = dsl.sparse_state(state).mask
    off = [np.asarray(w)[~np.asarray(m)] for m, w in zip(*_pairs(masks, params), strict=True)]
    assert sum(o.size for o in off) > 0 and all((o == 0).all() for o in off)

    @jax.jit
    def step(params, state, batch, key):
        context = Context(key)

        def loss(p):
            out, _ = update.objective.forward({"params": p, **rest}, batch, context)
            return total_loss(update.objective.loss(out, batch, context), None, (), context)[0]

        value, grads = jax.value_and_grad(loss)(params)
        change, state = update.optimizer.update(grads, state, params)
        return optax.apply_updates(params, change), state, value

    for n in range(2):
        params, state, value = step(params, state, update.stream.batch(n), jax.random.key(n))
        assert np.isfinite(value)
    after = dsl.sparse_state(state)
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(after.mask), jax.tree.leaves(masks), strict=True))
    evaluate = phase.evaluate[0]
    seen = evaluate.init()
    variables = {"params": params, **rest}
    for n in range(evaluate.stream.steps_per_epoch):
        seen, _ = jax.jit(evaluate.update)(seen, variables, evaluate.stream.batch(n), Context(None, train=False))
    metrics = {k: float(v) for k, v in evaluate.compute(seen).items()}
    assert seen["count"] == 12 and 0 <= metrics["recall@20"] <= 1
    told = phase.report(SimpleNamespace(optimizer={"main": after}))
    counted = dsl.mask_stats(after.mask, after.fired)
    assert {k: float(v) for k, v in told.items()} == {
        "mask/density": float(counted["density"]),
        "mask/exploration": float(counted["exploration"]),
        "mask/refused": 0.0,
    }
    export = run.export(variables, {})
    known = jnp.asarray(update.stream.batch(0).get("items", np.arange(3)))
    scores = jax.jit(lambda v: export.definition.apply(v, known, method="scores"))(export.variables)
    assert scores.shape[1] == 25


def _pairs(masks, params):
    keep = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731
    flat, tree = jax.tree.flatten(masks, is_leaf=keep)
    leaves = tree.flatten_up_to(params)
    chosen = [n for n, m in enumerate(flat) if not keep(m)]
    return [flat[n] for n in chosen], [leaves[n] for n in chosen]


def test_neumf_masks_only_its_mlp_tables(file):
    made = dataclasses.replace(TINY, backbone="neumf", data=Data(path=file))
    run = made.build()
    params = jax.jit(run.init)(jax.random.key(0))["params"]
    zero = {k for k, v in params.items() if not isinstance(v, dict) and (np.asarray(v) == 0).any()}
    assert zero == {"mlp_user", "mlp_item"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"density": 0.0}, r"--density must be in \(0, 1\], got 0.0"),
        ({"update_interval": -1}, "--update-interval must be 0 .* got -1"),
        ({"update_ratio": 2.0}, r"--update-ratio must be in \[0, 1\], got 2.0"),
        ({"steps": 0}, "--total-steps must be at least 1|steps must be at least 1"),
        ({"dim": 0}, "--dim must be at least 1, got 0"),
        ({"regulariser": -1.0}, "--regulariser must be 0 or more"),
        ({"data": Data("low-rank")}, "unknown data set 'low-rank'; did you mean 'low_rank'"),
        ({"data": Data(path="/nowhere/x.csv")}, "/nowhere/x.csv: no such file"),
        ({"data": Data(path="/nowhere/x.csv", split="rand")}, "unknown --data.split 'rand'"),
        ({"optimizer": Optimizer(learning_rate=0.0)}, "learning-rate must be positive"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises((UserError, DataError), match=message):
        dataclasses.replace(TINY, **change).build()


def test_few_items_and_unknown_arms(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("user,item\n1,1\n1,2\n1,3\n2,2\n2,4\n2,1\n")
    with pytest.raises(UserError, match="has 4 items; ranking at 20 needs more"):
        dataclasses.replace(TINY, data=Data(path=str(path))).build()
    with pytest.raises(UserError, match="did you mean 'static'"):
        recipe.arm("statik", 0)


def test_popular_arm_is_the_loop():
    got = recipe.arm("popular", 0)["recall@20"]
    dataset = recipe.Recipe().load()
    count = np.bincount(dataset["train"]["item"], minlength=400)
    recalls = []
    for seen, relevant in zip(dataset["test"]["seen"], dataset["test"]["relevant"], strict=True):
        order = sorted(set(range(400)) - set(seen.tolist()), key=lambda j: (-count[j], j))[:20]
        recalls.append(len(set(order) & set(relevant.tolist())) / 8)
    assert got == pytest.approx(np.mean(recalls), abs=1e-6)


def test_figure_and_example(tmp_path, file):
    (tmp_path / "metrics.jsonl").write_text(
        '{"phase": "train", "step": 2, "ranking/recall@20": 0.1, "mask/density": 0.2, "mask/exploration": 0.3}\n'
    )
    run = dataclasses.replace(TINY, data=Data(path=file)).build()
    run.figures(SimpleNamespace(chosen=jax.jit(run.init)(jax.random.key(0))), tmp_path)
    assert (tmp_path / "sparsity.png").stat().st_size > 5000
    row = recipe.example()
    assert row["batch"]["user"].shape == (16,) and row["objective"].name == "lightgcn"


@pytest.mark.claim
def test_exploring_beats_a_static_mask():
    assert recipe.arm("dynamic", 0)["recall@20"] > recipe.arm("static", 0)["recall@20"] + 0.02
