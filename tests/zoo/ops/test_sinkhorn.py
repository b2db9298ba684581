"""Sinkhorn and streamed log-sum-exp against loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.ops import sinkhorn

LOGITS = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32) * 3


def loop(steps):
    plan = np.exp(LOGITS.astype(np.float64))
    for _ in range(steps):
        plan /= plan.sum(1, keepdims=True)
        plan /= plan.sum(0, keepdims=True)
    return plan / plan.sum()


@pytest.mark.parametrize("steps", [0, 1, 2, 10])
def test_normalises_rows_then_columns(steps):
    got = sinkhorn.sinkhorn_normalize(jnp.asarray(LOGITS), steps)
    np.testing.assert_allclose(np.exp(got), loop(steps), rtol=1e-5)


def test_many_steps_reach_both_marginals_at_any_scale():
    plan = np.exp(sinkhorn.sinkhorn_normalize(jnp.asarray(LOGITS * 100), 2000))
    np.testing.assert_allclose(plan.sum(0), 1 / 5, rtol=1e-4)
    np.testing.assert_allclose(np.exp(sinkhorn.sinkhorn_normalize(jnp.asarray(LOGITS), 200)).sum(1), 1 / 7, rtol=1e-5)


@pytest.mark.parametrize("chunk", [1, 3, 7, 50])
def test_streaming_equals_the_whole(chunk):
    big = jnp.asarray(LOGITS * 100)
    size = min(chunk, 7)
    rows = lambda start: jax.lax.dynamic_slice_in_dim(big, start, size)  # noqa: E731
    largest, total = sinkhorn.streaming_logsumexp(rows, 7, 5, chunk)
    np.testing.assert_allclose(largest + np.log(total), jax.nn.logsumexp(big, 0), rtol=1e-6)
    np.testing.assert_array_equal(largest, big.max(0))
    mask = jnp.array([False, True, False, False, True, True, False])
    largest, total = sinkhorn.streaming_logsumexp(rows, 7, 5, chunk, mask)
    np.testing.assert_allclose(largest + np.log(total), jax.nn.logsumexp(big[np.array([1, 4, 5])], 0), rtol=1e-6)
    largest, total = sinkhorn.streaming_logsumexp(rows, 7, 5, chunk, jnp.zeros(7, bool))
    assert (largest == -jnp.inf).all() and (total == 0).all()


def test_streaming_gradient_is_the_softmax():
    def value(x):
        take = lambda start: jax.lax.dynamic_slice_in_dim(x, start, 3)  # noqa: E731
        largest, total = sinkhorn.streaming_logsumexp(take, 7, 5, 3)
        return jnp.sum(jnp.arange(1.0, 6) * (largest + jnp.log(total)))

    want = jax.nn.softmax(jnp.asarray(LOGITS), 0) * jnp.arange(1.0, 6)
    np.testing.assert_allclose(jax.grad(value)(jnp.asarray(LOGITS)), want, atol=1e-6)


def test_streamed_columns_are_those_of_the_plan():
    take = lambda start: jax.lax.dynamic_slice_in_dim(jnp.asarray(LOGITS), start, 3)  # noqa: E731
    for steps in (1, 4):
        columns = np.asarray(sinkhorn.sinkhorn_columns(take, 7, 5, steps, 3))
        rows = np.log(
            np.exp(LOGITS - (np.asarray(sinkhorn.sinkhorn_columns(take, 7, 5, steps - 1, 3)) if steps > 1 else 0)).sum(
                1
            )
        )  # noqa: E501
        plan = np.exp(LOGITS - rows[:, None] - columns) / 5
        np.testing.assert_allclose(plan, loop(steps), rtol=1e-5)


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="chunk of at least 1; got 7 rows, chunk 0"):
        sinkhorn.streaming_logsumexp(lambda s: jnp.ones((7, 2)), 7, 2, 0)
    with pytest.raises(ValueError, match="got 0 rows"):
        sinkhorn.streaming_logsumexp(lambda s: jnp.ones((0, 2)), 0, 2, 4)
