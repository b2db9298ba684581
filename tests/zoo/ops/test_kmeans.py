"""k-means and product quantisation against loops, and their limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.ops.kmeans import assign, kmeans
from zoo.ops.quantisation import pq_adc_scores, pq_decode, pq_encode, pq_train

fit = jax.jit(kmeans, static_argnums=(2, 3), static_argnames=("start",))
train = jax.jit(pq_train, static_argnums=(2, 3, 4))


def blobs(seed=0, each=20, offset=0.0):
    rng = np.random.default_rng(seed)
    centres = np.array([[0, 0], [10, 0], [0, 10], [10, 10]], np.float64) + offset
    return (centres[:, None] + rng.normal(size=(4, each, 2)) * 0.3).reshape(-1, 2).astype(np.float32), centres


@pytest.mark.parametrize("start", ["++", "random"])
def test_lloyd_iterations_equal_a_loop(start):
    x = np.random.default_rng(3).normal(size=(50, 3)).astype(np.float32)
    found = [fit(jax.random.key(1), jnp.asarray(x), 4, i, start=start) for i in (0, 3)]
    centroids = np.asarray(found[0].centroids, np.float64)
    # the start is made of different points
    assert len({tuple(c) for c in centroids.astype(np.float32)} & {tuple(p) for p in x}) == 4
    for _ in range(3):
        nearest = np.array([np.argmin([np.sum((p - c) ** 2) for c in centroids]) for p in x.astype(np.float64)])
        assert len(set(nearest)) == 4
        centroids = np.stack([x[nearest == j].astype(np.float64).mean(0) for j in range(4)])
    np.testing.assert_allclose(found[1].centroids, centroids, atol=1e-5)
    nearest = np.array([np.argmin([np.sum((p - c) ** 2) for c in centroids]) for p in x])
    np.testing.assert_array_equal(found[1].assignment, nearest)
    np.testing.assert_array_equal(found[1].counts, np.bincount(nearest, minlength=4))
    np.testing.assert_allclose(
        found[1].inertia, sum(np.sum((p - centroids[j]) ** 2) for p, j in zip(x, nearest, strict=True)), rtol=1e-5
    )
    assert found[1].inertia < found[0].inertia


def test_assignment_survives_a_large_offset_and_ties_go_to_the_first():
    x, centres = blobs(offset=1e4)
    np.testing.assert_array_equal(assign(jnp.asarray(x), jnp.asarray(centres, jnp.float32), 7), np.repeat(range(4), 20))
    assert int(assign(jnp.zeros((1, 2)), jnp.array([[1.0, 0], [-1.0, 0], [0, 1.0], [0, -1.0]]))[0]) == 0


@pytest.mark.parametrize("seed", range(5))
def test_plus_plus_starts_in_every_blob(seed):
    x, centres = blobs(seed)
    start = fit(jax.random.key(seed), jnp.asarray(x), 4, 0).centroids
    assert sorted(np.argmin(((np.asarray(start)[:, None] - centres) ** 2).sum(-1), 1)) == [0, 1, 2, 3]
    done = fit(jax.random.key(seed), jnp.asarray(x), 4, 5)
    np.testing.assert_array_equal(np.sort(done.counts), [20] * 4)
    expected = np.sort(x.reshape(4, 20, 2).mean(1), 0)
    np.testing.assert_allclose(np.sort(done.centroids, 0), expected, atol=1e-5)


def test_plus_plus_draws_by_squared_distance():
    # from 0, the points 1 and 3 are drawn as 1 : 9; the pair {1, 3} likewise from either
    x = jnp.array([[0.0], [1.0], [3.0]])
    starts = jax.vmap(lambda key: kmeans(key, x, 2, 0).centroids[:, 0])(jax.random.split(jax.random.key(0), 3000))
    starts = np.asarray(starts)
    from_zero = starts[starts[:, 0] == 0, 1]
    assert abs(len(from_zero) / 3000 - 1 / 3) < 0.03
    assert abs(np.mean(from_zero == 3) - 0.9) < 0.03


def test_empty_clusters_move_to_the_farthest_points():
    # three of five centroids start in one place: two stay empty and must take the two farthest points
    x = np.array([[0, 0]] * 6 + [[5, 0], [5.5, 0], [0, 9], [-20, 0]], np.float32)
    found = fit(jax.random.key(3), jnp.asarray(x), 5, 10, start="random")
    assert (np.asarray(found.counts) > 0).all() and float(found.inertia) == 0.0
    assert {tuple(c) for c in np.asarray(found.centroids)} == {tuple(p) for p in x}


def test_several_empty_clusters_take_different_points_at_once():
    x = jnp.asarray([[0.0, 0]] * 6 + [[5, 0], [0, 9]])
    for seed in range(50):
        if not np.any(fit(jax.random.key(seed), x, 3, 0, start="random").centroids):
            break
    # all three start at the origin: the first keeps every point, the others take the farthest two, farthest first
    moved = fit(jax.random.key(seed), x, 3, 1, start="random").centroids
    np.testing.assert_allclose(moved, [[5 / 8, 9 / 8], [0, 9], [5, 0]], atol=1e-6)


def test_masked_points_have_no_say():
    x, _ = blobs()
    noise = np.full((30, 2), np.nan, np.float32)
    mask = jnp.arange(110) < 80
    for start in ("++", "random"):
        for key in range(3):
            whole = fit(jax.random.key(key), jnp.asarray(np.concatenate([x, noise])), 6, 6, mask, start=start)
            assert np.isfinite(np.asarray(whole.centroids)).all() and np.isfinite(float(whole.inertia))
            assert int(whole.counts.sum()) == 80 and (np.abs(np.asarray(whole.centroids)).max() < 12)
            other = np.concatenate([x, 50 * np.ones((30, 2), np.float32)])
            again = fit(jax.random.key(key), jnp.asarray(other), 6, 6, mask, start=start)
            np.testing.assert_array_equal(whole.centroids, again.centroids)
            np.testing.assert_array_equal(whole.inertia, again.inertia)
            # every centroid is the mean of valid points
            np.testing.assert_allclose(
                (np.asarray(whole.centroids) * np.asarray(whole.counts)[:, None]).sum(0), x.sum(0), rtol=1e-4
            )


@pytest.mark.parametrize("start", ["++", "random"])
def test_as_many_clusters_as_points_is_exact(start):
    x = np.random.default_rng(5).normal(size=(9, 2)).astype(np.float32)
    for k in (9, 14):
        found = fit(jax.random.key(0), jnp.asarray(x), k, 4, start=start)
        assert float(found.inertia) < 1e-10
        assert {tuple(np.round(c, 4)) for c in np.asarray(found.centroids)} == {tuple(np.round(p, 4)) for p in x}


def test_wrong_settings_are_named():
    x = jnp.zeros((3, 2))
    for change, message in (
        ({"k": 0}, "at least one cluster and one point; got k 0, 3 points"),
        ({"k": 2, "iterations": -1}, "iterations must not be negative, got -1"),
        ({"k": 2, "start": "first"}, "start must be"),
    ):
        with pytest.raises((ValueError, TypeError), match=message if "start" not in change else None):
            kmeans(jax.random.key(0), x, **change)
    with pytest.raises(ValueError, match="group must divide the vectors' dimension 6, got 4"):
        pq_train(jax.random.key(0), jnp.zeros((3, 6)), 4)


def test_quantisation_is_exact_with_as_many_centroids_as_vectors():
    x = jax.random.normal(jax.random.key(0), (7, 6))
    books = train(jax.random.key(1), x, 2, 8)
    codes = pq_encode(books, x)
    assert books.shape == (3, 8, 2) and codes.shape == (7, 3) and codes.dtype == jnp.uint8
    np.testing.assert_allclose(pq_decode(books, codes), x, atol=1e-5)
    queries = jax.random.normal(jax.random.key(2), (4, 6))
    np.testing.assert_allclose(pq_adc_scores(books, queries, codes), queries @ x.T, atol=1e-4)


def test_look_up_tables_score_the_decoded_vectors():
    x = jax.random.normal(jax.random.key(0), (60, 8))
    books = train(jax.random.key(1), x, 4, 5, 8)
    codes = np.asarray(pq_encode(books, x))
    queries = np.asarray(jax.random.normal(jax.random.key(2), (3, 8)))
    scores = np.zeros((3, 60))
    for q in range(3):
        for i in range(60):
            for m in range(2):
                part = np.asarray(x)[i, 4 * m : 4 * m + 4]
                nearest = np.argmin(((np.asarray(books)[m] - part) ** 2).sum(1))
                assert nearest == codes[i, m]
                scores[q, i] += np.dot(queries[q, 4 * m : 4 * m + 4], np.asarray(books)[m, nearest])
    np.testing.assert_allclose(pq_adc_scores(books, jnp.asarray(queries), jnp.asarray(codes)), scores, atol=1e-5)
    assert pq_encode(jnp.zeros((2, 257, 4)), x).dtype == jnp.int32
    masked = train(jax.random.key(1), jnp.concatenate([x, jnp.full((9, 8), jnp.nan)]), 4, 5, 8, jnp.arange(69) < 60)
    assert np.isfinite(np.asarray(masked)).all()
