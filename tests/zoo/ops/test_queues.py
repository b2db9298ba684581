"""Queues: first in, first out, whatever the batch's padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.ops.queues import enqueue, init_queue


def rows(*values):
    return {"x": jnp.array([[v, -v] for v in values], jnp.float32), "id": jnp.array(values, jnp.int32)}


def test_it_wraps_round_and_the_oldest_leave_first():
    queue = init_queue(5, rows(1))
    np.testing.assert_array_equal(queue["filled"], [False] * 5)
    queue = enqueue(queue, rows(1, 2, 3))
    np.testing.assert_array_equal(queue["filled"], [True] * 3 + [False] * 2)
    queue = enqueue(queue, rows(4, 5, 6))
    np.testing.assert_array_equal(queue["rows"]["id"], [6, 2, 3, 4, 5])
    np.testing.assert_array_equal(queue["rows"]["x"][:, 1], [-6.0, -2, -3, -4, -5])
    assert int(queue["next"]) == 1 and bool(queue["filled"].all())
    queue = enqueue(queue, rows(7, 8))
    np.testing.assert_array_equal(queue["rows"]["id"], [6, 7, 8, 4, 5])


def test_padding_takes_no_slot():
    queue = enqueue(init_queue(4, rows(1)), rows(1, 99, 2), jnp.array([True, False, True]))
    np.testing.assert_array_equal(queue["rows"]["id"], [1, 2, 0, 0])
    np.testing.assert_array_equal(queue["filled"], [True, True, False, False])
    assert int(queue["next"]) == 2
    queue = enqueue(queue, rows(9, 9, 9, 9), jnp.zeros(4, bool))
    np.testing.assert_array_equal(queue["rows"]["id"], [1, 2, 0, 0])
    assert int(queue["next"]) == 2


def test_it_equals_a_list_over_many_batches():
    kept, queue, step = [], init_queue(7, rows(1)), jax.jit(enqueue)
    rng = np.random.default_rng(0)
    for n in range(20):
        values, real = rng.integers(1, 100, 4), rng.random(4) < 0.6
        queue = step(queue, rows(*values.tolist()), jnp.asarray(real))
        kept = (kept + values[real].tolist())[-7:]
        order = [int(i) for i in np.roll(np.asarray(queue["rows"]["id"]), -int(queue["next"])) if i]
        assert order == kept, n


def test_no_gradient_and_the_rows_type():
    queue = init_queue(2, {"x": jnp.zeros((1, 2), jnp.bfloat16)})
    assert queue["rows"]["x"].dtype == jnp.bfloat16
    put = lambda x: jnp.sum(enqueue(queue, {"x": x})["rows"]["x"].astype(jnp.float32))  # noqa: E731
    np.testing.assert_array_equal(jax.grad(put)(jnp.ones((2, 2))), jnp.zeros((2, 2)))


def test_wrong_sizes_are_named():
    with pytest.raises(ValueError, match="at least 1 row, got size 0"):
        init_queue(0, rows(1))
    with pytest.raises(ValueError, match="3 rows do not fit a queue of 2; make it a multiple of the global batch"):
        enqueue(init_queue(2, rows(1)), rows(1, 2, 3))
