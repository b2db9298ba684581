"""Heads over similarities: standardising over the batch by hand, and the released head's numbers."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.nn.stitching_heads import RelativeHead, StitchingHead, batch_standardise

GOLDEN = np.load(Path(__file__).parents[2] / "golden" / "relative_representations_official.npz")


def test_standardising_over_the_batch():
    h = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32) * [1, 10, 0.01] + [0, 5, -2]
    expected = (h - h.mean(0)) / np.sqrt(h.var(0) + 1e-5)
    np.testing.assert_allclose(batch_standardise(jnp.asarray(h)), expected, rtol=1e-4, atol=1e-5)
    mask = np.array([True, True, False, True, False])
    found = batch_standardise(jnp.asarray(h), jnp.asarray(mask))
    kept = h[mask]
    np.testing.assert_allclose(found[mask], (kept - kept.mean(0)) / np.sqrt(kept.var(0) + 1e-5), rtol=1e-4, atol=1e-5)
    # other rows decide: the same row in another batch comes out differently
    assert not np.allclose(batch_standardise(jnp.asarray(h))[0], batch_standardise(jnp.asarray(h[:3]))[0])


def test_devices_standardise_together():
    h = jnp.asarray(np.random.default_rng(1).normal(size=(6, 2)), jnp.float32)
    mask = jnp.array([True, True, True, False, True, False])
    shards = jax.vmap(lambda a, m: batch_standardise(a, m, axis_name="d"), axis_name="d")
    found = shards(h.reshape(3, 2, 2), mask.reshape(3, 2)).reshape(6, 2)
    np.testing.assert_allclose(found, batch_standardise(h, mask), rtol=1e-5, atol=1e-6)


def parameters():
    hidden = {"kernel": GOLDEN["head/1.weight"].T, "bias": GOLDEN["head/1.bias"]}
    norm = {"scale": GOLDEN["head/0.weight"], "bias": GOLDEN["head/0.bias"]}
    out = {"kernel": GOLDEN["head/last.weight"].T, "bias": GOLDEN["head/last.bias"]}
    return {"params": jax.tree.map(jnp.asarray, {"norm": norm, "hidden": hidden, "out": out})}


def test_the_released_head():
    r = 3.0 * jnp.asarray(GOLDEN["cosine"])  # rows are normalised again
    found = StitchingHead(3, "batch").apply(parameters(), r)
    np.testing.assert_allclose(found, GOLDEN["head"], rtol=1e-4, atol=1e-5)


def test_the_deployable_head_reads_each_row_by_itself():
    r = jnp.asarray(GOLDEN["cosine"])
    head, p = StitchingHead(3), jax.tree.map(np.asarray, parameters()["params"])
    found = head.apply(parameters(), r)
    np.testing.assert_allclose(head.apply(parameters(), r[2:3]), found[2:3], rtol=1e-5)
    layer = lambda v: (v - v.mean(1, keepdims=True)) / np.sqrt(v.var(1, keepdims=True) + 1e-5)  # noqa: E731
    unit = np.asarray(r) / np.linalg.norm(r, axis=1, keepdims=True)
    h = np.tanh((layer(unit) * p["norm"]["scale"] + p["norm"]["bias"]) @ p["hidden"]["kernel"] + p["hidden"]["bias"])
    np.testing.assert_allclose(found, layer(h) @ p["out"]["kernel"] + p["out"]["bias"], rtol=1e-4, atol=1e-5)
    silu = StitchingHead(3, activation="silu").apply(parameters(), r)
    assert np.abs(np.asarray(silu - found)).max() > 0.01
    for change in ({"standardise": "none"}, {"activation": "relu"}):
        with pytest.raises(ValueError, match="standardise must be 'layer' or 'batch'"):
            StitchingHead(3, **change).init(jax.random.key(0), r)


def test_a_plain_head():
    r = jnp.asarray(GOLDEN["cosine"])
    variables = RelativeHead(2, (4,)).init(jax.random.key(0), r)
    p = variables["params"]
    h = jnp.tanh(r @ p["hidden1"]["kernel"] + p["hidden1"]["bias"])
    found = RelativeHead(2, (4,)).apply(variables, r)
    np.testing.assert_allclose(found, h @ p["out"]["kernel"] + p["out"]["bias"], rtol=1e-5, atol=1e-6)
