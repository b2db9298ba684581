"""Noise embeddings, dropout by example, and the denoising networks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.nn.denoisers import (
    Condition,
    ImageAttention,
    Mixer,
    NoiseEmbedding,
    ResidualBlock,
    ResidualMLP,
    UNet,
    group_norm,
    positional_embedding,
)
from zoo.nn.dropout import dropout, layer_keys

KEY = jax.random.key(0)
NETS = {
    "mlp": ResidualMLP(16, 2, condition=8, rate=0.5, classes=3),
    "mixer": Mixer(2, 16, 8, 16, 1, rate=0.5, classes=3),
    "unet": UNet(8, (1, 2), 1, attention=(4,), rate=0.5, classes=3),
}
X = jax.random.normal(KEY, (4, 8, 8, 2))
T = jnp.linspace(-1.5, 1.0, 4)
LABEL = jnp.array([0, 1, 2, 0])


@functools.cache
def initial(name):
    return jax.jit(NETS[name].init)(KEY, X, T, LABEL)


@functools.cache
def weights(name):
    """Weights with the layers that start at zero made to count, and the compiled network."""
    rng = np.random.default_rng(0)
    v = jax.device_get(initial(name))
    noisy = jax.tree.map(lambda p: p + rng.normal(0, 0.1, p.shape).astype(np.float32), v["params"])
    apply = jax.jit(NETS[name].apply)
    return {**v, "params": noisy}, lambda v, x, t, label=LABEL, keys=None: apply(v, x, t, label, keys)


# --- embeddings -------------------------------------------------------------------------------------------------------


def test_positional_embedding_is_its_definition():
    found = positional_embedding(jnp.array([0.0, 3.5, 250.0]), 8)
    frequencies = [10000 ** (-i / 4) for i in range(4)]
    expected = [
        [*np.cos([t * f for f in frequencies]), *np.sin([t * f for f in frequencies])] for t in (0.0, 3.5, 250.0)
    ]
    np.testing.assert_allclose(found, expected, atol=2e-5)
    with pytest.raises(ValueError, match="features must be even"):
        positional_embedding(jnp.zeros(1), 7)


def by_hand(params, h):
    h = h @ params["first"]["kernel"] + params["first"]["bias"]
    return (h / (1 + np.exp(-h))) @ params["second"]["kernel"] + params["second"]["bias"]


def test_fourier_embedding_is_its_definition():
    net = NoiseEmbedding(8, "fourier", scale=0.5)
    v = net.init(KEY, T)
    angles = 2 * np.pi * np.asarray(T)[:, None] * np.asarray(v["constants"]["frequencies"])
    expected = by_hand(jax.tree.map(np.asarray, v["params"]), np.concatenate([np.cos(angles), np.sin(angles)], 1))
    np.testing.assert_allclose(net.apply(v, T), expected, rtol=1e-4, atol=1e-5)


def test_fourier_frequencies_are_constants_of_the_given_scale():
    draw = lambda scale: NoiseEmbedding(2000, "fourier", scale).init(KEY, T)["constants"]["frequencies"]  # noqa: E731
    assert float(draw(0.02).std()) == pytest.approx(0.02, rel=0.1)
    np.testing.assert_allclose(draw(16.0) / draw(0.02), np.full(1000, 800.0), rtol=1e-4)


def test_positional_kind_multiplies_by_a_thousand():
    net = NoiseEmbedding(8, "positional")
    v = net.init(KEY, T)
    expected = by_hand(jax.tree.map(np.asarray, v["params"]), np.asarray(positional_embedding(1000 * T, 8)))
    np.testing.assert_allclose(net.apply(v, T), expected, rtol=1e-4, atol=1e-5)
    assert "constants" not in v
    with pytest.raises(ValueError, match="kind must be 'fourier' or 'positional', got 'learned'"):
        NoiseEmbedding(8, "learned").init(KEY, T)


def test_labels_are_asked_for_exactly_when_there_are_classes():
    with pytest.raises(ValueError, match="classes=3 needs labels"):
        Condition(8, classes=3).init(KEY, T)
    with pytest.raises(ValueError, match="classes=0 takes no labels"):
        Condition(8).init(KEY, T, jnp.zeros(4, jnp.int32))


# --- dropout ----------------------------------------------------------------------------------------------------------


def test_dropout_drops_its_share_and_keeps_the_mean():
    keys = jax.random.split(KEY, 50)
    x = jnp.ones((50, 400))
    found = np.asarray(dropout(x, 0.3, keys))
    assert set(np.round(np.unique(found), 5)) == {0.0, np.float32(np.round(1 / 0.7, 5))}
    assert (found == 0).mean() == pytest.approx(0.3, abs=0.02)


def test_dropout_belongs_to_the_example():
    keys = jax.random.split(KEY, 6)
    x = jnp.ones((6, 30))
    found = dropout(x, 0.5, keys)
    np.testing.assert_array_equal(found, dropout(x, 0.5, keys))
    np.testing.assert_array_equal(found[2:4], dropout(x[2:4], 0.5, keys[2:4]))
    assert not np.array_equal(found[0], found[1])
    assert not np.array_equal(found, dropout(x, 0.5, layer_keys(keys, 0)))
    assert not np.array_equal(dropout(x, 0.5, layer_keys(keys, 1)), dropout(x, 0.5, layer_keys(keys, 0)))


def test_dropout_is_off_without_keys_or_rate():
    x = jnp.ones((2, 5))
    assert dropout(x, 0.5, None) is x
    assert dropout(x, 0.0, jax.random.split(KEY, 2)) is x
    assert layer_keys(None, 3) is None
    assert dropout(x.astype(jnp.bfloat16), 0.5, jax.random.split(KEY, 2)).dtype == jnp.bfloat16


def test_bad_dropout():
    for rate in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"rate must lie in \[0, 1\)"):
            dropout(jnp.ones((2, 3)), rate, None)
    with pytest.raises(ValueError, match="one key per example: got 3 keys for 2 rows"):
        dropout(jnp.ones((2, 3)), 0.5, jax.random.split(KEY, 3))


# --- networks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETS)
def test_networks_start_at_zero_and_keep_shape(name):
    v, apply = weights(name)
    np.testing.assert_array_equal(apply(initial(name), X, T), np.zeros_like(X))
    assert apply(v, X, T).shape == X.shape


@pytest.mark.parametrize("name", NETS)
def test_every_example_is_alone_and_sees_its_noise(name):
    v, apply = weights(name)
    whole = apply(v, X, T)
    changed = X.at[1].set(-X[1])
    other = apply(v, changed, T)
    np.testing.assert_allclose(other[jnp.array([0, 2, 3])], whole[jnp.array([0, 2, 3])], rtol=1e-4, atol=1e-5)
    assert np.abs(other[1] - whole[1]).max() > 1e-3
    louder = apply(v, X, T.at[2].set(-3.0))
    assert np.abs(louder[2] - whole[2]).max() > 1e-5
    np.testing.assert_allclose(louder[0], whole[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NETS)
def test_every_weight_gets_a_gradient(name):
    v, apply = weights(name)
    grads = jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(apply({**v, "params": p}, X, T)))))(v["params"])
    for path, g in jax.tree_util.tree_flatten_with_path(grads)[0]:
        assert np.isfinite(g).all()
        assert np.abs(g).max() > 0, jax.tree_util.keystr(path)


@pytest.mark.parametrize("name", NETS)
def test_dropout_masks_repeat_with_their_keys(name):
    v, apply = weights(name)
    keys = jax.random.split(KEY, 4)
    first = apply(v, X, T, keys=keys)
    np.testing.assert_array_equal(first, apply(v, X, T, keys=keys))
    assert np.abs(first - apply(v, X, T)).max() > 1e-4
    one = keys.at[3].set(jax.random.key(9))
    other = apply(v, X, T, keys=one)
    np.testing.assert_allclose(other[:3], first[:3], rtol=1e-4, atol=1e-5)
    assert np.abs(other[3] - first[3]).max() > 1e-4


@pytest.mark.parametrize("name", NETS)
def test_labels_change_their_example_only(name):
    v, apply = weights(name)
    first, other = apply(v, X, T), apply(v, X, T, LABEL.at[3].set(1))
    np.testing.assert_allclose(first[:3], other[:3], rtol=1e-4, atol=1e-5)
    assert np.abs(first[3] - other[3]).max() > 1e-5


@pytest.mark.parametrize("name", NETS)
def test_half_precision_keeps_weights_and_interface_float32(name):
    net = NETS[name].clone(dtype="bfloat16")
    v, apply = weights(name)
    found = jax.jit(net.apply)(v, X, T, LABEL)
    assert found.dtype == jnp.float32
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(jax.eval_shape(net.init, KEY, X, T, LABEL)["params"]))
    np.testing.assert_allclose(found, apply(v, X, T), rtol=0.2, atol=0.15)


def test_mixer_mixes_every_patch_and_puts_it_back():
    v, apply = weights("mixer")
    # the answer at one pixel depends on a far one
    far = X.at[0, 7, 7, 0].add(1.0)
    assert np.abs(apply(v, far, T)[0, 0, 0] - apply(v, X, T)[0, 0, 0]).max() > 1e-6
    with pytest.raises(ValueError, match="patch=3 must divide both sides of the image, got 8 x 8"):
        Mixer(3).init(KEY, X, T)


def test_mixer_patches_are_neighbourhoods():
    """With all mixing silent, a patch's output depends on that patch alone."""
    v, apply = weights("mixer")
    silent = {k: jax.tree.map(jnp.zeros_like, p) if "down" in k else p for k, p in v["params"].items()}
    v = {**v, "params": silent}
    moved = np.abs(apply(v, X.at[0, 2, 5].add(1.0), T) - apply(v, X, T))[0].sum(-1)
    expected = np.zeros((8, 8), bool)
    expected[2:4, 4:6] = True
    np.testing.assert_array_equal(moved > 1e-6, expected)


def test_unet_sees_the_whole_image_through_its_attention():
    v, apply = weights("unet")
    far = X.at[0, 7, 7, 0].add(1.0)
    assert np.abs(apply(v, far, T)[0, 0, 0] - apply(v, X, T)[0, 0, 0]).max() > 1e-6
    paths = {k for k in v["params"] if k.endswith("attention")}
    assert paths == {"encode_1_0_attention", "middle_0_attention", "decode_1_0_attention", "decode_1_1_attention"}
    with pytest.raises(ValueError, match="3 resolutions need sides divisible by 4, got 6 x 6"):
        UNet(8, (1, 1, 1)).init(KEY, X[:, :6, :6], T)


def test_block_is_its_skip_at_first_and_scales_it():
    h = jax.random.normal(KEY, (4, 8, 8, 8))
    for resample, shape in (("none", 8), ("down", 4), ("up", 16)):
        net = ResidualBlock(8, resample=resample, skip_scale=0.5)
        v = net.init(KEY, h, jnp.ones((4, 6)))
        found = net.apply(v, h, jnp.ones((4, 6)))
        assert found.shape == (4, shape, shape, 8)
        a = np.asarray(h)
        means = a.reshape(4, 4, 2, 4, 2, 8).mean((2, 4))
        expected = {"none": a, "down": means, "up": a.repeat(2, 1).repeat(2, 2)}[resample]
        np.testing.assert_allclose(found, 0.5 * expected, rtol=1e-5, atol=1e-6)


def test_attention_is_its_definition():
    h = jax.random.normal(KEY, (2, 3, 2, 8))
    net = ImageAttention(head_features=4, skip_scale=0.5)
    v = net.init(KEY, h)
    v = {"params": {**v["params"], "out": {"kernel": jnp.eye(8), "bias": jnp.zeros(8)}}}
    p = jax.tree.map(np.asarray, v["params"])
    normed = np.asarray(group_norm("float32", 8).apply({"params": v["params"]["GroupNorm_0"]}, h)).reshape(2, 6, 8)
    qkv = normed @ p["qkv"]["kernel"] + p["qkv"]["bias"]
    expected = np.zeros((2, 6, 8))
    for b in range(2):
        for head in range(2):
            # the projection is split per head into q, k, v
            q, k, val = np.split(qkv[b].reshape(6, 2, 12)[:, head], 3, axis=-1)
            scores = np.exp(q @ k.T / 2)
            expected[b, :, 4 * head : 4 * head + 4] = scores / scores.sum(1, keepdims=True) @ val
    np.testing.assert_allclose(net.apply(v, h), 0.5 * (h + expected.reshape(h.shape)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("channels", "groups"), [(8, 2), (128, 32), (12, 3), (4, 1), (10, 2), (6, 1)])
def test_group_norm_divides_any_number_of_channels(channels, groups):
    assert group_norm("float32", channels).num_groups == groups
