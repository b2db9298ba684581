"""Independent Metropolis-Hastings against a loop from the definition, and its limit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.ops.metropolis import acceptance, metropolis_hastings


def reference(density, uniforms, zero):
    """One chain at a time."""
    n, chains = density.shape
    index, accepted = np.zeros(chains, int), np.zeros((n - 1, chains), bool)
    for c in range(chains):
        for i in range(1, n):
            new, old = density[i, c], density[index[c], c]
            if zero == "accept":
                new, old = (v if v > 0 else 0.0 for v in (new, old))
                p = min(1.0, new / old) if old > 0 else 1.0
            else:
                with np.errstate(all="ignore"):
                    p = np.float32(new) / np.float32(old)
                p = 0.0 if np.isnan(p) or p < 0 else min(1.0, p)
            if uniforms[i - 1, c] < p:
                index[c], accepted[i - 1, c] = i, True
    return index, accepted


@pytest.mark.parametrize("zero", ["accept", "reject"])
def test_chains_equal_the_definition(zero):
    rng = np.random.default_rng(0)
    density = rng.gamma(1.0, size=(5, 200)).astype(np.float32)
    density[rng.uniform(size=density.shape) < 0.2] = 0
    density[rng.uniform(size=density.shape) < 0.1] = np.nan
    density[rng.uniform(size=density.shape) < 0.1] *= -1
    uniforms = rng.uniform(size=(4, 200)).astype(np.float32)
    found = jax.jit(lambda d, u: metropolis_hastings(d, u, zero))(density, uniforms)
    index, accepted = reference(density, uniforms, zero)
    np.testing.assert_array_equal(found.index, index)
    np.testing.assert_array_equal(found.accepted, accepted)
    assert 0.2 < accepted.mean() < 0.8


def test_equal_densities_are_always_accepted():
    found = metropolis_hastings(jnp.full((4, 3), 0.7), jnp.full((3, 3), 0.9999))
    np.testing.assert_array_equal(found.index, 3)
    assert np.asarray(found.accepted).all()


def test_one_proposal_is_kept():
    found = metropolis_hastings(jnp.ones((1, 2, 3)), jnp.zeros((0, 2, 3)))
    assert found.index.shape == (2, 3) and not np.asarray(found.index).any() and found.accepted.shape == (0, 2, 3)


def test_frequencies_tend_to_the_losses():
    """Three operations of losses 1, 2, 3 are chosen in those proportions, within 3 sigma."""
    chains, n = 6000, 40
    op = jax.random.randint(jax.random.key(0), (n, chains), 0, 3)
    uniforms = jax.random.uniform(jax.random.key(1), (n - 1, chains))
    index = metropolis_hastings(op + 1.0, uniforms).index
    chosen = np.asarray(op)[np.asarray(index), np.arange(chains)]
    for k, p in enumerate((1 / 6, 2 / 6, 3 / 6)):
        assert abs(np.mean(chosen == k) - p) < 3 * np.sqrt(p * (1 - p) / chains)


def test_acceptance_by_hand():
    new, old = jnp.array([1.0, 4.0, 0.0, 0.0, -1.0, jnp.nan, 1.0]), jnp.array([2.0, 2.0, 2.0, 0.0, 2.0, 2.0, -3.0])
    np.testing.assert_allclose(acceptance(new, old), [0.5, 1, 0, 1, 0, 0, 1])
    np.testing.assert_allclose(acceptance(new, old, "reject"), [0.5, 1, 0, 0, 0, 0, 0])
    assert float(acceptance(jnp.array(1.0), jnp.array(0.0), "reject")) == 1  # as x / 0 is infinite
    assert float(acceptance(jnp.array(0.5), jnp.array(jnp.nan))) == 1
    assert float(acceptance(jnp.array(0.5), jnp.array(jnp.inf))) == 0
    # a uniform as large as the ratio does not move
    assert not bool(metropolis_hastings(jnp.array([[2.0], [1.0]]), jnp.array([[0.5]])).accepted[0, 0])


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="at least one proposal"):
        metropolis_hastings(jnp.ones((0, 2)), jnp.ones((0, 2)))
    with pytest.raises(ValueError, match="uniforms"):
        metropolis_hastings(jnp.ones((3, 2)), jnp.ones((3, 2)))
    with pytest.raises(ValueError, match="accept"):
        acceptance(jnp.ones(1), jnp.ones(1), "perhaps")
