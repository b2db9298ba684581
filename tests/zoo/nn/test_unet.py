"""The U-Net: sizes, parameters by hand, what each size contributes, norms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.nn.unet import DoubleConv, UNet, instance_norm

TINY = UNet(2, (3, 4, 5))


@functools.cache
def started():
    return TINY.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))


def test_the_parameters_by_hand():
    def block(a, b):
        return 9 * a * b + b + 9 * b * b + b

    want = block(1, 3) + block(3, 4) + block(4, 5) + (4 * 5 * 4 + 4) + block(8, 4) + (4 * 4 * 3 + 3) + block(6, 3)
    assert sum(x.size for x in jax.tree.leaves(started())) == want + 3 * 2 + 2
    # the published network
    full = jax.eval_shape(lambda: UNet().init(jax.random.key(0), jnp.zeros((1, 16, 16, 1))))
    assert sum(x.size for x in jax.tree.leaves(full)) == 31_030_658


def test_any_size_comes_back_and_a_border_is_the_inputs_own():
    x = np.random.default_rng(0).normal(size=(2, 7, 9, 1)).astype(np.float32)
    y = TINY.apply(started(), jnp.asarray(x))
    assert y.shape == (2, 7, 9, 2) and y.dtype == jnp.float32
    # 7 to 8 rows: none before, one after; 9 to 12 columns: one before, two after
    wide = np.pad(x, [(0, 0), (0, 1), (1, 2), (0, 0)], mode="edge")
    np.testing.assert_allclose(y, TINY.apply(started(), jnp.asarray(wide))[:, :7, 1:10], atol=1e-6)


def test_every_size_reaches_the_result_and_skips_keep_places():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 8, 8, 1)), jnp.float32)
    grads = jax.grad(lambda v: jnp.sum(jnp.square(TINY.apply(v, x))))(started())["params"]
    assert set(grads) == {"down0", "down1", "down2", "up0", "up1", "double0", "double1", "head"}
    for name, part in grads.items():
        assert all(np.abs(leaf).sum() > 0 for leaf in jax.tree.leaves(part)), name
    # without its skip, the first block still learns through the sizes below it
    kernel = started()["params"]["up0"]["conv1"]["kernel"].at[:, :, :3].set(0.0)
    up = {**started()["params"]["up0"], "conv1": {**started()["params"]["up0"]["conv1"], "kernel": kernel}}
    below = {"params": {**started()["params"], "up0": up}}
    grads = jax.grad(lambda v: jnp.sum(jnp.square(TINY.apply(v, x))))(below)["params"]["down0"]
    assert all(np.abs(leaf).sum() > 0 for leaf in jax.tree.leaves(grads))
    # without what comes from below, the network is the first block, the last one on its skip, and the head
    cut = jax.tree.map(lambda v: v, started())["params"]
    cut = {**cut, "double0": jax.tree.map(jnp.zeros_like, cut["double0"])}
    block = DoubleConv(3)
    skip = block.apply({"params": cut["down0"]}, x)
    y = block.apply({"params": cut["up0"]}, jnp.concatenate([skip, jnp.zeros_like(skip)], -1))
    y = y @ cut["head"]["kernel"][0, 0] + cut["head"]["bias"]
    np.testing.assert_allclose(TINY.apply({"params": cut}, x), y, atol=1e-5)


def test_places_that_are_far_away_do_not_matter():
    # sizes 16, 8, 4: a result sees 2 + 2 places at full, 2 + 2 at half and 2 at quarter size to each side, and cells
    x = jnp.zeros((1, 64, 4, 1)).at[0, 32, 1, 0].set(1.0)
    seen = np.abs(np.asarray(TINY.apply(started(), x) - TINY.apply(started(), jnp.zeros_like(x)))).sum((0, 2, 3)) > 1e-9
    assert 32 - 22 <= np.flatnonzero(seen).min() < 32 - 4 and 32 + 4 < np.flatnonzero(seen).max() <= 32 + 24


def test_average_pools_leaks_and_volumes():
    block = DoubleConv(2, slope=0.5)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(1, 4, 4, 1)), jnp.float32)
    y = np.asarray(block.apply(block.init(jax.random.key(0), x), x))
    assert (y < 0).any() and (np.asarray(DoubleConv(2).apply(block.init(jax.random.key(0), x), x)) >= 0).all()
    average = UNet(1, (2, 2), pool="average")
    variables = average.init(jax.random.key(0), x)
    assert np.abs(average.apply(variables, x) - UNet(1, (2, 2)).apply(variables, x)).max() > 1e-4
    shape = jax.eval_shape(lambda: UNet(3, (2, 2)).init_with_output(jax.random.key(0), jnp.zeros((1, 5, 4, 3, 2)))[0])
    assert shape.shape == (1, 5, 4, 3, 3)


def test_norms():
    x = np.random.default_rng(3).normal(2.0, 3.0, size=(2, 4, 6, 2)).astype(np.float32)
    y = np.asarray(instance_norm(jnp.asarray(x)))
    for b in range(2):
        for c in range(2):
            one = x[b, :, :, c]
            np.testing.assert_allclose(y[b, :, :, c], (one - one.mean()) / np.sqrt(one.var() + 1e-5), atol=1e-5)
    x = jnp.asarray(x)
    instance = DoubleConv(2, "instance")
    variables = instance.init(jax.random.key(0), x)
    assert set(variables["params"]["conv1"]) == {"kernel"}
    np.testing.assert_allclose(instance.apply(variables, 7 * x), instance.apply(variables, x), atol=1e-3)
    batch = DoubleConv(2, "batch")
    variables = batch.init(jax.random.key(0), x)
    out, changed = batch.apply(variables, x, True, jnp.asarray([True, False]), mutable=["batch_stats"])
    alone, same = batch.apply(variables, x[:1], True, mutable=["batch_stats"])
    np.testing.assert_allclose(out[:1], alone, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), changed, same)
    assert float(changed["batch_stats"]["norm1"]["var"][0]) != 1


@pytest.mark.parametrize("wrong", [{"norm": "layer"}, {"pool": "min"}, {"widths": ()}])
def test_unknown_settings_are_named(wrong):
    with pytest.raises(ValueError, match="expected norm in"):
        UNet(1, **{"widths": (2, 2), **wrong}).init(jax.random.key(0), jnp.zeros((1, 4, 4, 1)))
