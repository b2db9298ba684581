"""Masks from maps: Otsu's threshold by exhaustive search, proxy masks, Dice by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from zoo.ops.segmentation import class_activation_map, dice, otsu_threshold, proxy_mask


def test_otsu_is_the_cut_of_greatest_variance_between():
    rng = np.random.default_rng(0)
    values = np.clip(np.concatenate([rng.normal(0.2, 0.05, 300), rng.normal(0.7, 0.1, 100)]), 0, 1).astype(np.float32)
    best, cut = -1.0, None
    for t in np.arange(1, 256) / 256:
        low, high = values[values < t], values[values >= t]
        if len(low) and len(high):
            between = len(low) * len(high) * (low.mean() - high.mean()) ** 2
            best, cut = (between, t) if between > best else (best, cut)
    assert float(otsu_threshold(jnp.asarray(values))) == pytest.approx(cut, abs=2 / 256)
    # two values: the first cut above the lower one
    assert float(otsu_threshold(jnp.asarray([0.0, 0.0, 1.0]))) == pytest.approx(1 / 256)


def test_masks_are_cut_by_image():
    maps = np.full((2, 4, 4, 1), 0.2, np.float32)
    maps[0, :2] = 0.8
    maps[1, :, 3] = 0.25
    same = np.asarray(proxy_mask(jnp.asarray(maps), (4, 4)))
    assert same[0, :2].all() and not same[0, 2:].any() and same[1, :, 3].all() and not same[1, :, :3].any()
    big = np.asarray(proxy_mask(jnp.asarray(maps), (8, 8), 0.5))
    assert big.shape == (2, 8, 8) and big[0, :3].all() and not big[0, 5:].any()
    assert not np.asarray(proxy_mask(jnp.ones((1, 2, 2, 1)), (4, 4))).any()


def test_dice():
    p = jnp.asarray([[[1, 1], [0, 0]], [[0, 0], [0, 0]], [[0, 0], [0, 0]]], bool)
    t = jnp.asarray([[[1, 0], [1, 1]], [[0, 0], [0, 0]], [[1, 0], [0, 0]]], bool)
    np.testing.assert_allclose(dice(p, t), [2 / 5, 1, 0], rtol=1e-6)


def test_a_class_activation_map_averages_to_the_logit():
    rng = np.random.default_rng(1)
    features, weights = rng.normal(size=(2, 3, 4, 5)).astype(np.float32), rng.normal(size=(6, 5)).astype(np.float32)
    maps = np.asarray(class_activation_map(jnp.asarray(features), jnp.asarray(weights), jnp.asarray([4, 1])))
    assert maps.shape == (2, 3, 4, 1)
    np.testing.assert_allclose(maps[1, 2, 3, 0], features[1, 2, 3] @ weights[1], rtol=1e-5)
    logits = features.mean((1, 2)) @ weights.T
    np.testing.assert_allclose(maps.mean((1, 2, 3)), [logits[0, 4], logits[1, 1]], rtol=1e-4)
