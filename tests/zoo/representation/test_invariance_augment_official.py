"""The released code's numbers: its operations, and one step of its training loop with injected uniforms."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from zoo.base import Context
from zoo.nn.mlp import MLP
from zoo.objectives import supervised
from zoo.ops.augmentation import OPS, Transform, augment, fixed_standard, wide_standard
from zoo.representation import invariance_augment as ia
from zoo.representation.invariance_augment import invariance_constrained

GOLDEN = np.load(Path(__file__).resolve().parents[2] / "golden" / "invariance_augment_official.npz")


@pytest.mark.parametrize("space", [fixed_standard, wide_standard])
def test_operations_are_the_released_ones(space):
    images, expected, triples = (GOLDEN[f"{space.__name__}_{k}"] for k in ("images", "results", "triples"))
    assert [n.lower() for n in GOLDEN[f"{space.__name__}_names"]] == [op.replace("_", "") for op in OPS]
    t = Transform(*(jnp.asarray(triples[:, i]) for i in range(2)), jnp.asarray(triples[:, 2] == 1))
    found = jax.jit(jax.vmap(lambda i, t: augment(i, t, space())))(images, t)
    np.testing.assert_array_equal(found, expected)


def variables_of(case, when):
    g = lambda name: jnp.asarray(GOLDEN[f"{case}_{when}_{name}"])  # noqa: E731
    params = {
        "hidden1": {"kernel": g("1.weight").T, "bias": g("1.bias")},
        "norm1": {"scale": g("2.weight"), "bias": g("2.bias")},
        "out": {"kernel": g("4.weight").T, "bias": g("4.bias")},
    }
    return {"params": params, "batch_stats": {"norm1": {"mean": g("2.running_mean"), "var": g("2.running_var")}}}


@pytest.mark.parametrize("case", ["two", "chains", "sampled"])
def test_a_step_is_the_released_one(case, monkeypatch):
    g = {k[len(case) + 1 :]: GOLDEN[k] for k in GOLDEN.files if k.startswith(f"{case}_")}
    n, m, b = g["uniforms"].shape[0] + 1, g["uniforms"].shape[1], len(g["x"])
    inject = lambda v: jnp.moveaxis(jnp.asarray(v).reshape(n, m, b, *v.shape[2:]), 2, 0)  # noqa: E731
    transforms = Transform(inject(g["op"]), inject(g["level"]), jnp.ones((b, n, m), bool))
    monkeypatch.setattr(ia, "_propose", lambda *_: (inject(g["proposals"]), transforms))
    choose = ia.choose_proposals
    monkeypatch.setattr(
        ia, "choose_proposals", lambda losses, _, *rest: choose(losses, jnp.asarray(g["uniforms"]), *rest)
    )
    monkeypatch.setattr(ia, "keep_clean", lambda _, gamma: jnp.asarray(g["coins"]) < 1 / (1 + gamma))
    host = supervised(MLP((6,), 3, normalise=True))
    objective = invariance_constrained(
        host,
        fixed_standard(),
        0.6,
        0.05,
        n,
        m,
        sample=case == "sampled",
        dual_start=float(g["gamma"]),
        variant="official",
    )
    batch = {"x": jnp.asarray(g["x"]), "label": jnp.asarray(g["y"])}
    variables = {**objective.init(jax.random.key(0), batch), **variables_of(case, "before")}
    context = Context(jax.random.key(0), jnp.int32(0), 10, 5)
    tx = optax.chain(
        optax.clip_by_global_norm(5.0), optax.add_decayed_weights(5e-4), optax.sgd(0.1, momentum=0.9, nesterov=True)
    )

    @jax.jit
    def step(params):
        def scalar(params):
            outputs, mutated = objective.forward({**variables, "params": params}, batch, context)
            loss = objective.loss(outputs, batch, context.replace(collections=variables))
            value = jnp.mean(loss.elements.values)
            return value + sum(loss.terms.values()), (value, loss, outputs, mutated)

        grads, (value, loss, outputs, mutated) = jax.grad(scalar, has_aux=True)(params)
        updates, _ = tx.update(grads, tx.init(params), params)
        after = objective.after_step({**variables, **mutated, "params": params}, outputs, batch, context)
        return optax.apply_updates(params, updates), value, loss.metrics, outputs["invariance"], mutated, after

    params, value, metrics, mine, mutated, after = step(variables["params"])
    np.testing.assert_array_equal(mine["op"].T.ravel(), g["chosen_op"])
    np.testing.assert_array_equal(mine["level"].T.ravel(), g["chosen_level"])
    assert 0 < float(g["acceptance"]) < 1
    np.testing.assert_allclose(metrics["acceptance"], g["acceptance"], rtol=1e-6)
    np.testing.assert_allclose(metrics["constraint"], g["constraint"], rtol=1e-5)
    np.testing.assert_allclose(value, g["loss"], rtol=1e-5)
    np.testing.assert_allclose(after["invariance"]["duals"][0], g["dual"], rtol=1e-5)
    expected = variables_of(case, "after")
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(expected["params"]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    # torch's running variance is the unbiased one, the host's is not: means only
    found = mutated["batch_stats"]["norm1"]["mean"]
    np.testing.assert_allclose(found, expected["batch_stats"]["norm1"]["mean"], rtol=1e-4, atol=1e-6)
