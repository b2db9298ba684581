"""The temperature of a pair: limits, both networks against loops, blocks, starts, and the encoder under its heads."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.base import Shared
from zoo.nn.heads import MultiHeadProjector
from zoo.nn.mlp import MLP
from zoo.nn.pair_temperature import (
    AdaptiveHeads,
    PairTemperature,
    aligned_scores,
    bounded_temperature,
    pair_scores,
)

RNG = np.random.default_rng(0)
Z1, Z2 = (jnp.asarray(RNG.normal(size=(n, 2, 3)), jnp.float32) for n in (4, 5))


def stirred(net, seed=1):
    params = net.init(jax.random.key(0), Z1, Z2)["params"]
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return structure.unflatten([jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])


def tau_of(score, low, high):
    return low + (high - low) / (1 + math.exp(-score))


def test_temperatures_lie_between_their_limits():
    tau = bounded_temperature(jnp.asarray([-200.0, -1.0, 0.0, 2.0, 200.0]), 0.1, 1.5)
    np.testing.assert_allclose(tau, [0.1, tau_of(-1, 0.1, 1.5), 0.8, tau_of(2, 0.1, 1.5), 1.5], rtol=1e-6)
    assert bounded_temperature(jnp.zeros(1, jnp.bfloat16)).dtype == jnp.float32
    assert float(bounded_temperature(jnp.float32(-100.0))) == pytest.approx(0.01)
    assert float(bounded_temperature(jnp.float32(100.0))) == pytest.approx(2.0)
    for low, high, text in ((0.0, 1.0, "must be positive"), (1.0, 1.0, "upper must exceed lower"),
                            (-1.0, 1.0, "must be positive"), (2.0, 1.0, "upper 1.0")):  # fmt: skip
        with pytest.raises(ValueError, match=text):
            bounded_temperature(jnp.zeros(1), low, high)


@pytest.mark.parametrize(("normalise", "offset"), [(True, True), (False, False)])
def test_dot_is_one_network_for_all_heads_and_symmetric(normalise, offset):
    net = PairTemperature("dot", 4, 3, offset, normalise, 0.1, 1.5)
    p = stirred(net)
    added = float(p["offset"][0]) if offset else 0.0
    assert ("offset" in p) == offset and (added != 0) == offset
    found = net.apply({"params": p}, Z1, Z2)

    def phi(z):
        z = z / np.linalg.norm(z) if normalise else z
        h = np.maximum(z @ p["hidden"]["kernel"] + p["hidden"]["bias"], 0)
        return h @ p["out"]["kernel"] + p["out"]["bias"]

    for c in range(2):
        for i in range(4):
            for j in range(5):
                want = tau_of(float(phi(np.asarray(Z1[i, c])) @ phi(np.asarray(Z2[j, c]))) + added, 0.1, 1.5)
                assert float(found[c, i, j]) == pytest.approx(want, rel=1e-5)
    np.testing.assert_allclose(net.apply({"params": p}, Z2, Z1), jnp.swapaxes(found, 1, 2), rtol=1e-5)


def test_concat_is_a_network_per_head_on_the_pair_in_order():
    net = PairTemperature("concat", 4, normalise=False, lower=0.1, upper=1.5)
    p = stirred(net)
    assert p["hidden_kernel"].shape == (2, 6, 4) and p["out"].shape == (2, 5)
    found = net.apply({"params": p}, Z1, Z2)
    for c in range(2):
        for i in range(4):
            for j in range(5):
                pair = np.concatenate([Z1[i, c], Z2[j, c]])
                h = np.maximum(pair @ p["hidden_kernel"][c] + p["hidden_bias"][c], 0)
                want = tau_of(float(h @ p["out"][c, :-1] + p["out"][c, -1]), 0.1, 1.5)
                assert float(found[c, i, j]) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("kind", ["dot", "concat"])
def test_aligned_scores_are_the_diagonal_and_blocks_change_nothing(kind, monkeypatch):
    net = PairTemperature(kind, 4)
    p = stirred(net)
    codes, last = net.apply({"params": p}, jnp.concatenate([Z1, Z2]), method="embed")
    a, b = codes[:4], codes[4:8]
    whole = pair_scores(a, b, last)
    np.testing.assert_allclose(aligned_scores(a, b, last), jnp.diagonal(whole, axis1=1, axis2=2).T, rtol=1e-5)
    value = lambda a, b: jnp.sum(jnp.sin(pair_scores(a, b, last)))  # noqa: E731
    grads = jax.grad(value, (0, 1))(a, b)
    monkeypatch.setattr("zoo.nn.pair_temperature.BLOCK", 3 * 4 * 2 * 4)
    np.testing.assert_allclose(pair_scores(a, b, last), whole, rtol=1e-5)
    for g, want in zip(jax.grad(value, (0, 1))(a, b), grads, strict=True):
        np.testing.assert_allclose(g, want, rtol=1e-4, atol=1e-6)


def test_no_tensor_of_all_pairs_features_is_built(monkeypatch):
    monkeypatch.setattr("zoo.nn.pair_temperature.BLOCK", 1)
    net = PairTemperature("concat", 64)
    z = jnp.ones((40, 2, 8))
    text = str(jax.make_jaxpr(lambda z: net.init_with_output(jax.random.key(0), z, z)[0])(z))
    assert "40,40,2,64" not in text and "40,40,2,16" not in text and "1,40,2,64" in text


@pytest.mark.parametrize("kind", ["dot", "concat"])
def test_it_starts_midway_and_can_leave(kind):
    net = PairTemperature(kind, 16, lower=0.2, upper=1.2)
    p = net.init(jax.random.key(0), Z1, Z2)["params"]
    np.testing.assert_allclose(net.apply({"params": p}, Z1, Z2), 0.7, atol=0.05 if kind == "dot" else 1e-6)
    grads = jax.grad(lambda p: jnp.sum(net.apply({"params": p}, Z1, Z2)))(p)
    assert float(jnp.abs(grads["out"]["kernel"] if kind == "dot" else grads["out"]).max()) > 1e-4
    if kind == "dot":
        assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads))


def test_it_computes_in_float32():
    for kind in ("dot", "concat"):
        net = PairTemperature(kind, 4)
        p = jax.tree.map(lambda x: x.astype(jnp.bfloat16), net.init(jax.random.key(0), Z1, Z2)["params"])
        codes, last = net.apply({"params": p}, Z1.astype(jnp.bfloat16), method="embed")
        assert codes.dtype == jnp.float32 and (last is None or last.dtype == jnp.float32)
    with pytest.raises(Exception, match="kind"):
        PairTemperature("sum").init(jax.random.key(0), Z1, Z2)


# --- heads ------------------------------------------------------------------------------------------------------------


def test_heads_are_independent_perceptrons_of_one_shape():
    x = jnp.asarray(RNG.normal(size=(5, 3)), jnp.float32)
    heads = MultiHeadProjector(3, 6, 4)
    p = heads.init(jax.random.key(0), x)["params"]
    z = heads.apply({"params": p}, x)
    assert z.shape == (5, 3, 4)
    w = p["heads"]
    assert w["hidden1"]["kernel"].shape == (3, 3, 6) and w["out"]["kernel"].shape == (3, 6, 4)
    for c in range(3):
        h = np.maximum(x @ w["hidden1"]["kernel"][c] + w["hidden1"]["bias"][c], 0)
        np.testing.assert_allclose(z[:, c], h @ w["out"]["kernel"][c] + w["out"]["bias"][c], rtol=1e-5, atol=1e-6)
    assert not np.allclose(w["out"]["kernel"][0], w["out"]["kernel"][1])
    # rows of its own for each head
    own = heads.apply({"params": p}, jnp.stack([x, 2 * x, x], 1))
    np.testing.assert_allclose(own[:, 0], z[:, 0], rtol=1e-5)
    np.testing.assert_allclose(own[:, 1], heads.apply({"params": p}, 2 * x)[:, 1], rtol=1e-5)


def test_normalised_heads_keep_statistics_of_real_rows_by_head():
    x = jnp.asarray(RNG.normal(size=(5, 3)), jnp.float32)
    heads = MultiHeadProjector(2, 6, 4, normalise=True)
    v = heads.init(jax.random.key(0), x)
    mask = jnp.asarray([1, 1, 1, 1, 0], bool)
    z, kept = heads.apply(v, x, True, mask, mutable=["batch_stats"])
    assert kept["batch_stats"]["heads"]["norm1"]["mean"].shape == (2, 6)
    w = v["params"]["heads"]
    for c in range(2):
        h = np.asarray(x @ w["hidden1"]["kernel"][c] + w["hidden1"]["bias"][c])
        mean, var = h[:4].mean(0), h[:4].var(0)
        np.testing.assert_allclose(kept["batch_stats"]["heads"]["norm1"]["mean"][c], 0.1 * mean, rtol=1e-4, atol=1e-6)
        h = np.maximum((h - mean) / np.sqrt(var + 1e-5), 0)
        np.testing.assert_allclose(z[:, c], h @ w["out"]["kernel"][c] + w["out"]["bias"][c], rtol=1e-4, atol=1e-5)


def test_heads_refuse_what_they_cannot_take():
    with pytest.raises(ValueError, match="num_heads must be at least 1, got 0"):
        MultiHeadProjector(0).init(jax.random.key(0), jnp.ones((2, 3)))
    with pytest.raises(ValueError, match=r"expected features \[B, D\] or \[B, 3, D\], got \(2, 4, 3\)"):
        MultiHeadProjector(3).init(jax.random.key(0), jnp.ones((2, 4, 3)))


@pytest.mark.parametrize(
    ("fields", "keys"),
    [
        ({}, {"projection", "heads", "temperature", "temperature_last"}),
        ({"temperature": "concat"}, {"projection", "heads", "temperature", "temperature_last"}),
        ({"temperature": "table"}, {"projection", "heads", "temperature_table"}),
        ({"temperature": "none"}, {"projection", "heads"}),
        ({"predictor": 5}, {"projection", "heads", "temperature", "temperature_last", "prediction",
                            "predicted_heads", "predicted_temperature"}),
        ({"predictor": 5, "temperature": "none"}, {"projection", "heads", "prediction", "predicted_heads"}),
    ],
)  # fmt: skip
def test_an_encoder_under_heads_says_what_it_provides(fields, keys):
    module = AdaptiveHeads(MLP((4,), 6), 2, 5, 3, temperature_hidden=4, **fields)
    assert set(module.provides) == keys
    x = jnp.asarray(RNG.normal(size=(4, 7)), jnp.float32)
    out, v = module.init_with_output(jax.random.key(0), x)
    assert set(out) == keys
    np.testing.assert_array_equal(out["projection"], out["heads"][:, 0])
    assert out["heads"].shape == (4, 2, 3)
    # the encoder stands alone under its name
    features = MLP((4,), 6).apply({"params": v["params"]["encoder"]}, x)
    again = MultiHeadProjector(2, 5, 3).apply({"params": v["params"]["projector"]}, features)
    np.testing.assert_allclose(out["heads"], again, rtol=1e-5)
    if "prediction" in keys:
        np.testing.assert_array_equal(out["prediction"], out["predicted_heads"][:, 0])
        predicted = MultiHeadProjector(2, 5, 3).apply({"params": v["params"]["predictor"]}, out["heads"])
        np.testing.assert_allclose(out["predicted_heads"], predicted, rtol=1e-5)
    for name in keys & {"temperature_last", "temperature_table"}:
        assert isinstance(out[name], Shared)
    if "temperature_table" in keys:
        assert out["temperature_table"].value.shape == (2, 3, 3) and not np.any(out["temperature_table"].value)


def test_targets_temperatures_stop_their_rows_but_not_the_network():
    module = AdaptiveHeads(MLP((4,), 6), 2, 5, 3, temperature_hidden=4, predictor=5)
    x = jnp.asarray(RNG.normal(size=(4, 7)), jnp.float32)
    v = module.init(jax.random.key(0), x)
    by = lambda key: jax.grad(lambda p: jnp.sum(module.apply({"params": p}, x)[key] ** 2))(v["params"])  # noqa: E731
    largest = lambda g: max(float(jnp.abs(x).max()) for x in jax.tree.leaves(g))  # noqa: E731
    stopped, flowing = by("temperature"), by("predicted_temperature")
    assert largest(stopped["encoder"]) == 0 < largest(flowing["encoder"])
    assert largest(stopped["projector"]) == 0 < largest(stopped["temperature"])
    plain = AdaptiveHeads(MLP((4,), 6), 2, 5, 3, temperature_hidden=4)
    v = plain.init(jax.random.key(0), x)
    g = jax.grad(lambda p: jnp.sum(plain.apply({"params": p}, x)["temperature"] ** 2))(v["params"])
    assert largest(g["encoder"]) > 0
