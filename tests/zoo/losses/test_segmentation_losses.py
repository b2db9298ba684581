"""Segmentation losses against loops written from their definitions, hand values and empty masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.losses.segmentation import dice_ce, dice_loss

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(3, 4, 5)).astype(np.float32)
TARGET = RNG.random((3, 4, 5)) < 0.4
VALID = RNG.random((3, 4, 5)) < 0.7
VALID[2] = False


def reference(weight, smooth):
    dice, both = np.zeros(3), np.zeros(3)
    for b in range(3):
        inter = p_sum = t_sum = entropy = count = 0.0
        for i in range(4):
            for j in range(5):
                if VALID[b, i, j]:
                    p, t = 1 / (1 + np.exp(-float(LOGITS[b, i, j]))), float(TARGET[b, i, j])
                    inter, p_sum, t_sum, count = inter + p * t, p_sum + p, t_sum + t, count + 1
                    entropy -= np.log(p) if t else np.log(1 - p)
        dice[b] = 1 - (2 * inter + smooth) / (p_sum + t_sum + smooth)
        both[b] = dice[b] + weight * (entropy / count if count else 0)
    return dice, both


def test_both_losses_are_their_definitions_and_count_valid_places_only():
    dice, both = reference(0.3, 0.5)
    target, valid = jnp.asarray(TARGET), jnp.asarray(VALID)
    p = jax.nn.sigmoid(LOGITS)
    spoilt, wild = np.where(VALID, p, np.nan), np.where(VALID, LOGITS, 1e30)
    np.testing.assert_allclose(dice_loss(jnp.asarray(spoilt), target, valid, 0.5), dice, atol=1e-5)
    np.testing.assert_allclose(dice_ce(jnp.asarray(wild), target, valid, 0.3, 0.5), both, atol=1e-5)
    assert dice[2] == both[2] == 0
    grad = jax.grad(lambda z: jnp.sum(dice_ce(z, target, valid)))(jnp.asarray(wild))
    assert np.isfinite(grad).all() and (np.asarray(grad)[~VALID] == 0).all() and (np.asarray(grad)[0][VALID[0]]).any()


def test_hand_values():
    p, t = jnp.asarray([[1.0, 1.0, 0.5, 0.0]]), jnp.asarray([[1.0, 0.0, 1.0, 0.0]])
    # 2 * 1.5 + 1 over 2.5 + 2 + 1
    np.testing.assert_allclose(dice_loss(p, t), [1 - 4 / 5.5], rtol=1e-6)
    # cross-entropy of logit 0 is log 2 everywhere, of which weight 1 by default
    np.testing.assert_allclose(dice_ce(jnp.zeros((1, 4)), t), [1 - 3 / 5 + np.log(2)], rtol=1e-6)
    np.testing.assert_allclose(dice_loss(t, t), [0.0], atol=1e-6)


def test_empty_masks_cost_nothing_and_have_a_gradient():
    empty = jnp.zeros((2, 3, 3))
    np.testing.assert_allclose(dice_loss(empty, empty), [0, 0], atol=1e-7)
    assert np.isfinite(jax.grad(lambda z: jnp.sum(dice_ce(z, empty)))(empty - 200)).all()
    with pytest.raises(ValueError, match="smooth must be positive, got 0"):
        dice_loss(empty, empty, smooth=0)
