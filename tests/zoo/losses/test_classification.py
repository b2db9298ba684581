"""Smoothed cross-entropy and alignment to prototypes, against loops and the released code's numbers."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from zoo.losses.classification import aligned_ce, cosine_alignment, label_smoothing_ce, prototype_ce

GOLDEN = dict(np.load(Path(__file__).parents[2] / "golden" / "oca.npz"))
RNG = np.random.default_rng(0)
H, P, Y = (
    RNG.normal(size=(5, 3)).astype(np.float32),
    RNG.normal(size=(4, 3)).astype(np.float32),
    np.array([2, 0, 3, 3, 1]),
)


def loop_ce(logits, labels, s):
    values = []
    for row, t in zip(logits.astype(np.float64), labels, strict=True):
        log_p = [v - np.log(sum(np.exp(w) for w in row)) for v in row]
        values.append((1 - s) * -log_p[t] + s * sum(-v for v in log_p) / len(row))
    return np.array(values)


def loop_cosine(h, targets):
    return np.array([1 - float(a @ b) / np.sqrt(float(a @ a) * float(b @ b)) for a, b in zip(
        h.astype(np.float64), targets.astype(np.float64), strict=True)])  # fmt: skip


@pytest.mark.parametrize("s", [0.0, 0.1, 0.3])
def test_label_smoothing_against_the_loop_and_the_released_code(s):
    x, t = GOLDEN["ls_logits"], GOLDEN["ls_target"]
    found = label_smoothing_ce(jnp.asarray(x), jnp.asarray(t), s)
    np.testing.assert_allclose(found, loop_ce(x, t, s), atol=1e-5)
    np.testing.assert_allclose(found, GOLDEN[f"ls_{s}"], atol=1e-5)


def test_limits_of_label_smoothing():
    x, t = jnp.asarray(GOLDEN["ls_logits"]), jnp.asarray(GOLDEN["ls_target"])
    np.testing.assert_allclose(label_smoothing_ce(x, t, 0.0), optax.softmax_cross_entropy_with_integer_labels(x, t),
                               atol=1e-6)  # fmt: skip
    for s in (0.0, 0.1, 1.0):
        np.testing.assert_allclose(
            label_smoothing_ce(jnp.full((2, 7), 3.0), jnp.array([0, 6]), s), np.log(7), atol=1e-6
        )
    np.testing.assert_array_equal(label_smoothing_ce(x, t), label_smoothing_ce(x, t, 0.1))
    np.testing.assert_allclose(label_smoothing_ce(x.reshape(2, 3, 5), t.reshape(2, 3)),
                               label_smoothing_ce(x, t).reshape(2, 3), atol=1e-6)  # fmt: skip
    for s in (-0.1, 1.1):
        with pytest.raises(ValueError, match=rf"smoothing must lie in \[0, 1\], got {s}"):
            label_smoothing_ce(x, t, s)


def test_half_precision_logits_are_computed_in_float32():
    low = jnp.asarray(GOLDEN["ls_logits"], jnp.bfloat16)
    found = label_smoothing_ce(low, jnp.asarray(GOLDEN["ls_target"]))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, loop_ce(np.asarray(low, np.float32), GOLDEN["ls_target"], 0.1), atol=1e-5)


def test_prototype_cross_entropy_normalises_features_and_not_prototypes():
    unit = H / np.linalg.norm(H, axis=1, keepdims=True)
    found = prototype_ce(jnp.asarray(H), jnp.asarray(P), jnp.asarray(Y), 0.2)
    np.testing.assert_allclose(found, loop_ce(unit @ P.T, Y, 0.2), atol=1e-5)
    np.testing.assert_allclose(prototype_ce(3 * jnp.asarray(H), jnp.asarray(P), jnp.asarray(Y), 0.2), found, atol=1e-5)
    scaled = prototype_ce(jnp.asarray(H), jnp.asarray(P), jnp.asarray(Y), 0.2, scale=4.0)
    np.testing.assert_allclose(scaled, loop_ce(4 * unit @ P.T, Y, 0.2), atol=1e-5)


def test_cosine_alignment():
    np.testing.assert_allclose(cosine_alignment(jnp.asarray(H), jnp.asarray(P[Y])), loop_cosine(H, P[Y]), atol=1e-5)
    np.testing.assert_allclose(cosine_alignment(2.5 * jnp.asarray(P), jnp.asarray(P)), 0, atol=1e-6)
    np.testing.assert_allclose(cosine_alignment(-jnp.asarray(P), jnp.asarray(P)), 2, atol=1e-6)


def test_aligned_cross_entropy_is_ten_and_five():
    unit = H / np.linalg.norm(H, axis=1, keepdims=True)
    expected = 10 * loop_ce(unit @ P.T, Y, 0.1) + 5 * loop_cosine(H, P[Y])
    np.testing.assert_allclose(aligned_ce(jnp.asarray(H), jnp.asarray(P), jnp.asarray(Y)), expected, atol=2e-5)
    other = aligned_ce(jnp.asarray(H), jnp.asarray(P), jnp.asarray(Y), 2.0, 3.0, 0.0)
    np.testing.assert_allclose(other, 2 * loop_ce(unit @ P.T, Y, 0.0) + 3 * loop_cosine(H, P[Y]), atol=2e-5)


def test_gradients_reach_features_and_never_prototypes():
    total = lambda h, p: jnp.sum(aligned_ce(h, p, jnp.asarray(Y)))  # noqa: E731
    h, p = jax.grad(total, (0, 1))(jnp.asarray(H).at[1].set(0.0), jnp.asarray(P))
    assert not np.asarray(p).any() and np.isfinite(np.asarray(h)).all() and np.abs(np.asarray(h[0])).max() > 0
    direct = jax.grad(lambda t: jnp.sum(cosine_alignment(jnp.asarray(H), t)))(jnp.asarray(P[Y]))
    assert not np.asarray(direct).any()
    assert not np.asarray(h[1]).any()  # a row without a direction
    # the losses look at directions only
    np.testing.assert_allclose(np.sum(np.asarray(h[2]) * H[2]), 0, atol=1e-4)
