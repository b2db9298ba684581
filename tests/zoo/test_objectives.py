"""The combinators: what they share, what they freeze, and that each equals its parts."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

from zoo.base import Context, Loss, batch_mask, example_elements, reduce_mean
from zoo.hosts import two_views
from zoo.objectives import (
    apply_module,
    ema_teacher,
    frozen_tower,
    init_module,
    memory_bank,
    supervised,
    weighted_sum,
)

BATCH = {**{k: jnp.asarray(v[:6]) for k, v in toy.arrays().items()}, "index": jnp.arange(6), "mask": jnp.arange(6) < 5}
CONTEXT = Context(rng=jax.random.key(1), step=jnp.int32(0))


class Net(nn.Module):
    """Logits and features."""

    @nn.compact
    def __call__(self, x):
        h = nn.relu(nn.Dense(8, name="body")(x))
        return nn.Dense(4, name="head")(h), h


def evaluate(objective, variables, context=CONTEXT, batch=BATCH):
    outputs, mutated = objective.forward(variables, batch, context)
    return outputs, mutated, objective.loss(outputs, batch, context.replace(collections=variables))


def test_supervised_is_masked_cross_entropy():
    objective = supervised(Net())
    variables = objective.init(jax.random.key(0), BATCH)
    outputs, mutated, loss = evaluate(objective, variables)
    logits, h = Net().apply(variables, BATCH["x"])
    expected = -jax.nn.log_softmax(logits)[jnp.arange(6), BATCH["label"]]
    np.testing.assert_allclose(loss.elements.values, np.where(BATCH["mask"], expected, 0), rtol=1e-6)
    np.testing.assert_array_equal(outputs["embedding"], h)
    hits = (np.argmax(logits, 1) == BATCH["label"])[:5].mean()
    assert float(loss.metrics["accuracy"]) == pytest.approx(hits) and mutated == {}


def test_supervised_takes_another_loss():
    objective = supervised(Net(), loss=lambda logits, label: jnp.sum((logits - label[:, None]) ** 2, -1))
    _, _, loss = evaluate(objective, objective.init(jax.random.key(0), BATCH))
    assert "accuracy" not in loss.metrics and float(loss.elements.values[0]) > 0


def test_two_views_sends_both_views_through_one_encoder():
    def augment(key, x):
        return x + jax.random.normal(key, x.shape), 2 * x

    objective = two_views(toy.Encoder(), augment, lambda a, b, m: jnp.sum(a * b, -1))
    variables = objective.init(jax.random.key(0), BATCH)
    outputs, _, loss = evaluate(objective, variables)
    keys = CONTEXT.example_keys(BATCH, "views")
    noise = jax.vmap(lambda k: jax.random.normal(k, (toy.D,)))(keys)
    z1 = toy.Encoder().apply(variables, BATCH["x"] + noise)
    z2 = toy.Encoder().apply(variables, 2 * BATCH["x"])
    np.testing.assert_allclose(outputs["z1"], z1, atol=1e-6)
    np.testing.assert_allclose(outputs["z2"], z2, atol=1e-6)
    np.testing.assert_allclose(loss.elements.values, np.where(BATCH["mask"], np.sum(z1 * z2, -1), 0), atol=1e-6)


class Keyed(nn.Module):
    """Returns a number drawn from each example's dropout key."""

    @nn.compact
    def __call__(self, x, keys=None, train=False):
        assert train == (keys is not None)
        return jnp.zeros((x.shape[0], 1)) if keys is None else jax.vmap(lambda k: jax.random.normal(k, (1,)))(keys)


def test_the_two_views_drop_out_differently_and_evaluation_does_not():
    objective = two_views(Keyed(), lambda key, x: (x, x), lambda a, b, m: a[:, 0])
    outputs, _ = objective.forward({"params": {}}, {**BATCH, "row": jnp.arange(6)}, CONTEXT)
    both = np.concatenate([outputs["z1"], outputs["z2"]]).ravel()
    assert len(set(both.tolist())) == 12
    outputs, _ = objective.forward({"params": {}}, BATCH, CONTEXT.replace(train=False))
    assert not np.any(outputs["z1"])


class Counting(nn.Module):
    """Counts its training passes."""

    @nn.compact
    def __call__(self, x, train=False):
        count = self.variable("batch_stats", "count", lambda: jnp.zeros(()))
        fixed = self.variable("constants", "scale", lambda: jnp.ones(()))
        if train and not self.is_initializing():
            count.value += 1
        return x * fixed.value


def test_modules_change_their_statistics_in_training_only_and_never_constants():
    variables = init_module(Counting(), jax.random.key(0), BATCH, BATCH["x"])
    assert float(variables["batch_stats"]["count"]) == 0
    _, mutated = apply_module(Counting(), variables, BATCH["x"], batch=BATCH, context=CONTEXT)
    assert float(mutated["batch_stats"]["count"]) == 1 and "constants" not in mutated
    _, mutated = apply_module(Counting(), variables, BATCH["x"], batch=BATCH, context=CONTEXT.replace(train=False))
    assert mutated == {}


def test_weighted_sum_shares_one_forward_pass():
    calls = []

    def forward(variables, batch, context):
        calls.append(1)
        return {"z": batch["x"][:, 0] * variables["params"]["w"]}, {}

    from zoo.base import Objective

    init = lambda rng, batch: {"params": {"w": jnp.float32(2)}}  # noqa: E731
    first = Objective(
        init, forward, lambda o, b, c: Loss(example_elements(o["z"], b)), provides=("index",), name="first"
    )
    second = Objective(init, forward, lambda o, b, c: Loss(example_elements(o["z"] ** 2, b), {"t": jnp.float32(3)},
                                                           {"m": jnp.float32(1)}), name="second")  # fmt: skip
    both = weighted_sum({"a": (0.5, first), "b": (2.0, second)})
    variables = both.init(jax.random.key(0), BATCH)
    outputs, _, loss = evaluate(both, variables)
    assert len(calls) == 1 and both.unit == "example" and both.provides == ("index",)
    z = np.where(BATCH["mask"], np.asarray(BATCH["x"][:, 0]) * 2, 0)
    np.testing.assert_allclose(loss.elements.values, 0.5 * z, rtol=1e-6)
    assert float(loss.terms["b"]) == pytest.approx(2 * np.sum(z**2) / 5, rel=1e-5)
    assert float(loss.terms["b/t"]) == 6 and float(loss.metrics["b/m"]) == 1
    np.testing.assert_array_equal(outputs["z"], outputs["a"]["z"])


def test_weighted_sum_merges_parameters_of_different_parts():
    a, b = supervised(Net(), name="a"), two_views(toy.Encoder(), toy.noisy, toy.contrast, name="b")
    both = weighted_sum({"a": (1.0, a), "b": (0.5, b)})
    variables = both.init(jax.random.key(0), {**BATCH})
    assert set(variables["params"]) == {"body", "head"}


def test_ema_teacher_follows_without_gradient():
    def loss(student, teacher, batch, context):
        return Loss(example_elements(jnp.sum((student["logits"] - teacher["logits"] - 1) ** 2, -1), batch))

    objective = ema_teacher(supervised(Net()), loss, decay=0.9)
    variables = objective.init(jax.random.key(0), BATCH)
    assert "teacher" in objective.provides
    other = {**variables, "params": jax.tree.map(lambda p: p + 0.5, variables["params"])}

    def scalar(params, teacher):
        v = {"params": params, "teacher": teacher}
        outputs, _ = objective.forward(v, BATCH, CONTEXT)
        return reduce_mean(objective.loss(outputs, BATCH, CONTEXT).elements)

    student_grad, teacher_grad = jax.grad(scalar, (0, 1))(other["params"], variables["teacher"])
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(teacher_grad)) == 0
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(student_grad)) > 0
    moved = objective.after_step(other, objective.forward(other, BATCH, CONTEXT)[0], BATCH, CONTEXT)["teacher"]
    for t, old, p in zip(*(jax.tree.leaves(x) for x in (moved, variables["teacher"], other["params"])), strict=True):
        np.testing.assert_allclose(t, 0.9 * old + 0.1 * p, rtol=1e-5, atol=1e-7)
    ramp = ema_teacher(supervised(Net()), loss, decay=lambda step: jnp.where(step == 0, 0.0, 1.0))
    moved = ramp.after_step(other, {"student": None}, BATCH, CONTEXT)["teacher"]
    np.testing.assert_allclose(moved["head"]["bias"], other["params"]["head"]["bias"])


def ring(size, by_index=False):
    def loss(outputs, bank, batch, context):
        return Loss(example_elements(jnp.sum(outputs["embedding"], -1), batch), {}, {"filled": jnp.sum(bank["filled"])})

    return memory_bank(supervised(Net()), loss, size, by_index=by_index)


def test_a_ring_keeps_the_newest_real_rows_in_global_order():
    objective = ring(7)
    variables = objective.init(jax.random.key(0), BATCH)
    assert variables["memory"]["values"].shape == (7, 8)
    for step in range(2):
        batch = {**BATCH, "index": BATCH["index"] + 10 * step}
        outputs, _, loss = evaluate(objective, variables, batch=batch)
        assert float(loss.metrics["filled"]) == [0, 5][step]  # filled after the loss, never before it
        variables = {**variables, **objective.after_step(variables, outputs, batch, CONTEXT)}
    bank = variables["memory"]
    # 10 real rows into 7 places: rows 5, 6, 7 and 8, 9 wrapped to 0..2
    assert bank["index"].tolist() == [12, 13, 14, 3, 4, 10, 11] and int(bank["next"]) == 3
    np.testing.assert_allclose(bank["values"][5], outputs["embedding"][0], rtol=1e-6)
    assert bank["filled"].all()


def test_a_bank_by_index_holds_each_example_in_its_row():
    objective = ring(9, by_index=True)
    variables = objective.init(jax.random.key(0), BATCH)
    batch = {**BATCH, "index": jnp.array([8, 2, 4, 0, 1, 3])}
    outputs, _, _ = evaluate(objective, variables, batch=batch)
    bank = objective.after_step(variables, outputs, batch, CONTEXT)["memory"]
    np.testing.assert_allclose(bank["values"][8], outputs["embedding"][0], rtol=1e-6)
    assert bank["filled"].tolist() == [True, True, True, False, True, False, False, False, True]


def test_a_frozen_tower_is_a_constant_and_gets_no_gradient():
    tower = {"w": jnp.eye(toy.D)[:, :3]}
    objective = frozen_tower(supervised(Net()), lambda v, b: b["x"] @ v["w"], tower, "tower")
    variables = objective.init(jax.random.key(0), BATCH)
    np.testing.assert_array_equal(variables["constants"]["tower"]["w"], tower["w"])
    outputs, _ = objective.forward(variables, BATCH, CONTEXT)
    np.testing.assert_allclose(outputs["tower"], BATCH["x"][:, :3], rtol=1e-6)
    assert "tower" in objective.provides

    def scalar(constants):
        return jnp.sum(objective.forward({**variables, "constants": constants}, BATCH, CONTEXT)[0]["tower"])

    assert not np.any(jax.grad(scalar)(variables["constants"])["tower"]["w"])


def test_combinators_train_together():
    """A frozen tower in a bank in a sum: built, differentiated and stepped."""
    base = frozen_tower(supervised(Net()), lambda v, b: b["x"] @ v, jnp.ones((toy.D, 2)), "tower")

    def loss(outputs, bank, batch, context):
        near = outputs["embedding"] @ bank["values"].T * bank["filled"]
        return Loss(example_elements(jnp.sum(near, 1) + jnp.sum(outputs["tower"], 1), batch))

    both = weighted_sum({"class": (1.0, base), "bank": (0.1, memory_bank(base, loss, 8))})
    variables = both.init(jax.random.key(0), BATCH)
    outputs, _, _ = evaluate(both, variables)
    changed = both.after_step(variables, outputs, BATCH, CONTEXT)
    assert int(changed["memory"]["next"]) == 5

    def scalar(params):
        _, _, found = evaluate(both, {**variables, **changed, "params": params})
        return reduce_mean(found.elements) + sum(found.terms.values())

    assert optax.tree.norm(jax.grad(scalar)(variables["params"])) > 0
    assert batch_mask(BATCH).sum() == 5
