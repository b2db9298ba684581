"""The sampled margin loss against a loop written from its definition and the released code's numbers."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.losses.margin import distances, margin_loss, margin_triplets

GOLD = np.load(Path(__file__).resolve().parents[2] / "golden" / "dynamic_subspace_official.npz")


def loop(d, y, k, beta=1.2, alpha=0.2, cutoff=0.5, fill=False):
    """Anchor by anchor: all positives in order; as many negatives, the closest beyond the cutoff, in order."""
    total, active = 0.0, 0
    for a in range(len(y)):
        positives = [j for j in range(len(y)) if y[j] == y[a] and j != a][:k]
        others = sorted((j for j in range(len(y)) if y[j] != y[a]), key=lambda j: d[a, j])
        negatives = [j for j in others if d[a, j] >= cutoff][: len(positives)]
        if fill:
            negatives += [j for j in others if d[a, j] < cutoff][: len(positives) - len(negatives)]
        for p, n in zip(positives, sorted(negatives), strict=False):
            near, far = max(0, d[a, p] - beta + alpha), max(0, beta - d[a, n] + alpha)
            total += near + far
            active += near > 0 or far > 0
    return total / max(active, 1)


@pytest.mark.parametrize("name", ["wide", "tight"])
def test_equals_the_released_loss_and_its_gradient(name):
    z, y = jnp.asarray(GOLD[f"{name}_z"]), jnp.asarray(GOLD[f"{name}_y"], jnp.int32)
    value, grad = jax.value_and_grad(lambda z: margin_loss(distances(z), y, per_class=4))(z)
    assert float(value) == pytest.approx(float(GOLD[f"{name}_loss"]), abs=1e-5)
    np.testing.assert_allclose(grad, GOLD[f"{name}_grad"], atol=1e-5)
    assert float(value) == pytest.approx(loop(np.asarray(distances(z)), GOLD[f"{name}_y"], 3), abs=1e-5)


@pytest.mark.parametrize("settings", [{}, {"cutoff": 0.9}, {"cutoff": 0.9, "fill": True}, {"beta": 0.8, "alpha": 0.5}])
def test_values_are_those_of_the_definition(settings):
    rng = np.random.default_rng(1)
    z = rng.normal(size=(12, 3))
    z = (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)
    y = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2])
    d = np.sqrt(((z[:, None] - z[None]) ** 2).sum(-1) + 1e-8)
    np.testing.assert_allclose(distances(jnp.asarray(z)), d, atol=2e-4)
    got = float(margin_loss(jnp.asarray(d), jnp.asarray(y), per_class=4, **settings))
    assert got == pytest.approx(loop(d, y, 3, **settings), abs=1e-5)


def test_a_hand_case():
    # 0 and 1 are of one class; the nearer of 2 and 3 at the cutoff or beyond is 0's negative
    d = jnp.asarray([[0, 1.1, 0.5, 0.9], [1.1, 0, 0.4, 1.5], [0.5, 0.4, 0, 0.3], [0.9, 1.5, 0.3, 0]])
    y = jnp.asarray([0, 0, 1, 1])
    found, starved = margin_triplets(d, y, per_class=2)
    assert found.unit == "triplet" and not bool(starved)
    np.testing.assert_array_equal(found.index, [[0, 1, 2], [1, 0, 3], [2, 3, 0], [3, 2, 0]])
    np.testing.assert_allclose(found.values, [0.1 + 0.9, 0.1, 0.9, 0.5], atol=1e-6)
    assert float(margin_loss(d, y, per_class=2)) == pytest.approx(2.5 / 4)
    # 2 has no negative beyond a cutoff of 0.6: its triplet does not exist, unless nearer ones may fill up
    found, _ = margin_triplets(d, y, per_class=2, cutoff=0.6)
    np.testing.assert_array_equal(found.mask, [True, True, False, True])
    found, _ = margin_triplets(d, y, per_class=2, cutoff=0.6, fill=True)
    np.testing.assert_array_equal(found.index[2], [2, 3, 1])


def test_a_separated_batch_costs_nothing():
    d = jnp.asarray(np.where(np.arange(6)[:, None] // 3 == np.arange(6) // 3, 0.99, 1.41))
    y = jnp.arange(6) // 3
    value, grad = jax.value_and_grad(lambda d: margin_loss(d, y, per_class=3))(d)
    assert float(value) == 0 and float(jnp.abs(grad).max()) == 0


def test_one_class_is_flagged_and_padding_does_not_exist():
    d = jnp.asarray(np.random.default_rng(0).uniform(0.6, 1.8, (6, 6)))
    y = jnp.asarray([0, 0, 0, 1, 1, 1])
    found, starved = margin_triplets(d, jnp.zeros(6, jnp.int32), per_class=3)
    assert bool(starved) and not np.asarray(found.mask).any() and (np.asarray(found.values) == 0).all()
    mask = jnp.arange(6) < 3
    found, starved = margin_triplets(d, y, mask, per_class=3)
    assert bool(starved) and not np.asarray(found.mask).any()
    mask = jnp.asarray([1, 1, 0, 1, 1, 0], bool)
    found, starved = margin_triplets(d, y, mask, per_class=3)
    rows = np.asarray(found.index)[np.asarray(found.mask)]
    assert not bool(starved) and len(rows) == 4 and set(rows.ravel().tolist()) == {0, 1, 3, 4}


def test_an_anchor_needs_a_positive():
    with pytest.raises(ValueError, match="per_class must be at least 2, got 1"):
        margin_triplets(jnp.ones((2, 2)), jnp.arange(2), per_class=1)
