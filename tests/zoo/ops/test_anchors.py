"""Anchors: how they are chosen, what makes two lists the same, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.ops.anchors import (
    AnchorSet,
    check_anchors,
    check_same_anchors,
    farthest_points,
    nearest_to_centroids,
    random_inputs,
    select_anchors,
)

KEY = jax.random.key(0)


def test_uniform_anchors_are_different_and_depend_on_the_key_only():
    ids = np.asarray(select_anchors(KEY, 10, n=12))
    assert len(set(ids.tolist())) == 10 and ids.min() >= 0 and ids.max() < 12 and ids.dtype == np.int32
    np.testing.assert_array_equal(ids, select_anchors(KEY, 10, n=12))
    assert not np.array_equal(ids, select_anchors(jax.random.key(1), 10, n=12))
    # a prefix: asking for fewer gives the first of them
    np.testing.assert_array_equal(select_anchors(KEY, 4, n=12), ids[:4])
    seen = np.concatenate([select_anchors(jax.random.key(s), 3, n=6) for s in range(40)])
    assert set(seen.tolist()) == set(range(6))


def test_stratified_anchors_take_one_of_each_class_in_turn():
    labels = np.array([2, 0, 0, 1, 0, 2, 0, 0, 2, 1])
    ids = np.asarray(select_anchors(KEY, 9, "stratified", labels=jnp.asarray(labels)))
    # the same loop, from the definition
    order = np.asarray(jax.random.permutation(KEY, 10))
    by_class = {c: [i for i in order if labels[i] == c] for c in (0, 1, 2)}
    expected, turn = [], 0
    while len(expected) < 9:
        for c in (0, 1, 2):
            if turn < len(by_class[c]) and len(expected) < 9:
                expected.append(by_class[c][turn])
        turn += 1
    np.testing.assert_array_equal(ids, expected)
    np.testing.assert_array_equal(labels[ids], [0, 1, 2, 0, 1, 2, 0, 2, 0])
    chosen = jax.jit(lambda k, y: select_anchors(k, 9, "stratified", labels=y))(KEY, jnp.asarray(labels))
    np.testing.assert_array_equal(chosen, expected)


def test_top_m_anchors_are_common_and_sorted():
    ids = np.asarray(select_anchors(KEY, 5, "top_m", n=50, top_m=7))
    assert ids.max() < 7 and (np.diff(ids) > 0).all()
    seen = np.concatenate([select_anchors(jax.random.key(s), 5, "top_m", n=50, top_m=7) for s in range(20)])
    assert set(seen.tolist()) == set(range(7))


def test_farthest_points_are_a_greedy_loop_on_the_sphere():
    x = np.random.default_rng(3).normal(size=(30, 4)).astype(np.float32)
    x[7] *= 50  # length must not count
    ids = np.asarray(farthest_points(KEY, jnp.asarray(x), 8))
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    expected = [ids[0]]
    while len(expected) < 8:
        distance = np.linalg.norm(unit[:, None] - unit[expected][None], axis=2).min(1)
        expected.append(int(distance.argmax()))
    np.testing.assert_array_equal(ids, expected)
    np.testing.assert_array_equal(ids, select_anchors(KEY, 8, "farthest", latents=jnp.asarray(x)))
    assert {int(farthest_points(jax.random.key(s), jnp.asarray(x), 1)[0]) for s in range(20)} != {int(ids[0])}
    # duplicates: every point is still chosen once
    same = jnp.ones((5, 3))
    assert sorted(np.asarray(farthest_points(KEY, same, 5)).tolist()) == [0, 1, 2, 3, 4]


def test_kmeans_anchors_are_real_samples_near_the_centroids():
    rng = np.random.default_rng(0)
    centres = np.eye(4)[:3] * np.array([[1.0], [5.0], [0.2]])
    x = np.repeat(centres, 10, 0) + 0.02 * centres.max(1).repeat(10)[:, None] * rng.normal(size=(30, 4))
    ids = np.asarray(nearest_to_centroids(KEY, jnp.asarray(x, jnp.float32), 3))
    assert sorted(ids // 10) == [0, 1, 2]
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    for i in ids:
        group = np.arange(10) + 10 * (i // 10)
        assert i == group[np.linalg.norm(unit[group] - unit[group].mean(0), axis=1).argmin()]
    np.testing.assert_array_equal(ids, select_anchors(KEY, 3, "kmeans", latents=jnp.asarray(x, jnp.float32)))
    all_of_them = nearest_to_centroids(KEY, jnp.ones((4, 2)), 4)
    assert sorted(np.asarray(all_of_them).tolist()) == [0, 1, 2, 3]


def test_random_inputs_fill_the_range_of_the_data():
    like = jnp.linspace(-2.0, 3.0, 24).reshape(4, 3, 2)
    made = np.asarray(random_inputs(KEY, like, 500))
    assert made.shape == (500, 3, 2) and -2 <= made.min() < -1.9 and 2.9 < made.max() <= 3


def test_the_hash_knows_ids_and_their_order():
    a = AnchorSet.of([3, 1, 2], latents=jnp.ones((3, 4)))
    check_same_anchors(a, AnchorSet.of(jnp.array([3, 1, 2]), latents=jnp.zeros((3, 9))))
    for other in ([1, 3, 2], [3, 1], [3, 1, 4], [3, 1, 2, 2]):
        with pytest.raises(ValueError, match="models were projected on different anchors"):
            check_same_anchors(a, AnchorSet.of(other))
    assert len(jax.tree.leaves(a)) == 3  # a pytree: ids, latents, hash
    with pytest.raises(ValueError, match="2 anchor latents for 3 anchor ids"):
        AnchorSet.of([3, 1, 2], latents=jnp.ones((2, 4)))
    with pytest.raises(ValueError, match="4 anchor inputs for 3 anchor ids"):
        AnchorSet.of([3, 1, 2], inputs=jnp.ones((4, 4)))


def test_anchors_without_direction_are_refused_and_duplicates_noticed():
    latents = np.ones((3, 2), np.float32)
    check_anchors(AnchorSet.of([5, 6, 9], jnp.asarray(latents)))
    latents[1] = 0
    with pytest.raises(ValueError, match=r"anchor 1 \(id 6\) has zero length"):
        check_anchors(AnchorSet.of([5, 6, 9], jnp.asarray(latents)))
    latents[2, 0] = np.inf
    with pytest.raises(ValueError, match=r"anchor 2 \(id 9\) is not finite"):
        check_anchors(AnchorSet.of([5, 6, 9], jnp.asarray(latents)))
    with pytest.warns(UserWarning, match=r"2 of 4 anchors are duplicates \(first: id 6\)"):
        check_anchors(AnchorSet.of([6, 5, 6, 6]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 3, "method": "best", "n": 5}, "anchor method must be one of uniform, stratified"),
        ({"k": 3, "method": "stratified"}, "'stratified' needs labels"),
        ({"k": 3, "method": "farthest"}, "'farthest' needs latents"),
        ({"k": 3, "method": "kmeans"}, "'kmeans' needs latents"),
        ({"k": 3, "method": "top_m", "n": 9}, "'top_m' needs top_m"),
        ({"k": 3, "method": "fixed", "n": 9}, "'fixed' needs ids"),
        ({"k": 3}, "needs the number of candidates n"),
        ({"k": 6, "n": 5}, r"number of anchors must be in \[1, 5\], the candidates; got 6"),
        ({"k": 0, "n": 5}, r"number of anchors must be in \[1, 5\]"),
        ({"k": 5, "method": "top_m", "n": 9, "top_m": 4}, r"must be in \[1, 4\], the candidates; got 5"),
        ({"k": 5, "method": "top_m", "n": 9, "top_m": 10}, r"top_m must be in \[1, 9\]"),
        ({"k": 2, "method": "fixed", "n": 4, "ids": np.array([1, 4])}, r"anchor id 4 is not in \[0, 4\)"),
        ({"k": 2, "method": "fixed", "n": 4, "ids": np.array([1, -1])}, r"anchor id -1 is not in \[0, 4\)"),
        ({"k": 3, "method": "fixed", "n": 4, "ids": np.array([1, 2])}, "must be 3 integer ids"),
        ({"k": 2, "method": "fixed", "n": 4, "ids": np.array([1.0, 2.0])}, "must be 2 integer ids"),
    ],
)
def test_impossible_choices_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        select_anchors(KEY, **arguments)


def test_fixed_anchors_come_back_as_given():
    np.testing.assert_array_equal(select_anchors(KEY, 3, "fixed", n=9, ids=np.array([8, 0, 3])), [8, 0, 3])
