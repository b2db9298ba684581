"""Second moments and leading directions, lines searched, plain arrays, folded maps, and fits told apart."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from zoo.ops import moments
from zoo.ops.fingerprint import check_same_fit, fingerprint
from zoo.ops.line_search import grid_then_golden
from zoo.ops.plain_arrays import from_arrays, to_arrays
from zoo.weights.folding import fold_into_dense

ROWS = np.random.default_rng(0).normal(size=(23, 5)).astype(np.float32) + 1


def test_moments_add_up():
    exact = ROWS.astype(np.float64).T @ ROWS
    for block in (1, 7, 22, 23, 100):
        np.testing.assert_allclose(moments.moment(jnp.asarray(ROWS), block), exact, rtol=1e-5)
    acc = jnp.zeros((5, 5))
    for part in (ROWS[:9], ROWS[9:]):
        padded = jnp.asarray(np.concatenate([part, np.full((3, 5), np.nan, np.float32)]))
        acc = moments.second_moment(acc, padded, jnp.arange(len(padded)) < len(part))
    np.testing.assert_allclose(acc, exact, rtol=1e-5)
    start = jnp.eye(5)
    np.testing.assert_allclose(moments.second_moment(start, jnp.asarray(ROWS)), exact + np.eye(5), rtol=1e-5)


def test_moments_sum_over_devices():
    rows = jnp.asarray(np.resize(ROWS, (24, 5)))
    parts = jax.pmap(lambda x: jax.lax.psum(moments.second_moment(jnp.zeros((5, 5)), x), "i"), "i")(
        rows.reshape(8, 3, 5)
    )
    np.testing.assert_allclose(parts[3], rows.T @ rows, rtol=1e-5)


def test_leading_directions():
    k = ROWS.astype(np.float64).T @ ROWS
    values, vectors = np.linalg.eigh(k)
    found = np.asarray(moments.leading_directions(jnp.asarray(k, jnp.float32), 3))
    for j in range(3):
        column = vectors[:, -1 - j]
        column = column * np.sign(column[np.argmax(np.abs(column))])
        np.testing.assert_allclose(found[:, j], column, atol=1e-4)
    np.testing.assert_allclose(found.T @ found, np.eye(3), atol=1e-5)
    np.testing.assert_allclose(jnp.trace(moments.unit_trace(jnp.asarray(k, jnp.float32))), 1, rtol=1e-5)
    assert np.isfinite(np.asarray(moments.unit_trace(jnp.zeros((2, 2))))).all()
    for d in (0, 6):
        with pytest.raises(ValueError, match=rf"d must be in \[1, 5\], the dimension of a vector; got {d}"):
            moments.leading_directions(jnp.asarray(k, jnp.float32), d)


def test_lines_are_searched_in_the_right_valley():
    # two valleys; the deeper one, at 0.83, lies where golden sections of the whole interval would not look
    function = lambda x: jnp.minimum((x - 0.2) ** 2, (x - 0.83) ** 2 - 0.01)  # noqa: E731
    x, value = jax.jit(lambda: grid_then_golden(function, 0.0, 1.0, 11, 20))()
    np.testing.assert_allclose([x, value], [0.83, -0.01], atol=1e-4)
    coarse = grid_then_golden(function, 0.0, 1.0, 11, 0)
    np.testing.assert_allclose(coarse, [0.8, 0.03**2 - 0.01], atol=1e-6)
    # each section narrows: more of them come closer, and none is worse than the grid
    kink = lambda x: jnp.abs(x - 0.437)  # noqa: E731
    errors = [float(grid_then_golden(kink, 0.0, 1.0, 3, n)[1]) for n in (0, 1, 4, 16)]
    assert errors[0] > errors[1] >= errors[2] > errors[3] and errors[3] < 3e-4
    for low in (True, False):
        edge = grid_then_golden(lambda x, low=low: x if low else -x, 0.0, 1.0, 5, 8)
        np.testing.assert_allclose(edge[0], 0 if low else 1, atol=1e-6)
    with pytest.raises(ValueError, match="points must be at least 2 and sections at least 0; got 1 and 3"):
        grid_then_golden(kink, 0.0, 1.0, 1, 3)
    with pytest.raises(ValueError, match="got 2 and -1"):
        grid_then_golden(kink, 0.0, 1.0, 2, -1)


@struct.dataclass
class Inner:
    x: Any
    rest: Any = None
    size: int = struct.field(pytree_node=False, default=3)


@struct.dataclass
class Outer:
    inner: Any
    low: Any


def test_trees_become_plain_arrays_and_back():
    tree = Outer(Inner(jnp.arange(4.0), None, 7), jnp.asarray([1.5, -2.0], jnp.bfloat16))
    plain = jax.tree.map(np.asarray, to_arrays(tree))
    assert set(plain) == {"inner", "low_bits"} and set(plain["inner"]) == {"x"}
    assert plain["low_bits"].dtype == np.uint16
    like = Outer(Inner(np.zeros(1), None, 7), np.zeros(0))
    again = from_arrays(like, plain)
    assert jax.tree.structure(again) == jax.tree.structure(tree) and again.low.dtype == jnp.bfloat16
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(tree), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
    with pytest.raises(KeyError, match="x"):
        from_arrays(like, {"inner": {}, "low_bits": plain["low_bits"]})


def test_a_folded_map_is_the_map_after_the_layer():
    rng = np.random.default_rng(1)
    kernel, bias, matrix, mean, x = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in
                                     ((3, 5), (5,), (5, 2), (5,), (4, 3)))  # fmt: skip
    w, b = fold_into_dense(kernel, bias, matrix, mean)
    np.testing.assert_allclose(x @ w + b, (x @ kernel + bias - mean) @ matrix, atol=1e-5)
    w, b = fold_into_dense(kernel, None, matrix)
    np.testing.assert_allclose(x @ w + b, x @ kernel @ matrix, atol=1e-5)


def test_two_fits_refuse_to_meet():
    one, two = fingerprint({"a": jnp.arange(3.0)}), fingerprint({"a": jnp.arange(3.0) + 1})
    check_same_fit(one, np.asarray(one), "maps")
    names = ["".join(f"{int(v):08x}" for v in np.asarray(x)) for x in (one, two)]
    message = rf"different maps \(index {names[0]}, queries {names[1]}\); encode both with the params the index was"
    with pytest.raises(ValueError, match=message):
        check_same_fit(one, two, "maps")
