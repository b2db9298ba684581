"""Convolutional autoencoders: shapes up and down again, the bottleneck's draw, and what training changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.nn.conv_autoencoder import ConvDecoder, ConvEncoder, GaussianBottleneck, VariationalDecoder, encoded_shape


@pytest.mark.parametrize("shape", [(8, 8, 1), (7, 5, 3)])
def test_images_come_back_in_their_shape(shape):
    widths = (4, 6)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, *shape)), jnp.float32)
    encoder, decoder = ConvEncoder(widths), ConvDecoder(shape, widths, "tanh")
    z, variables = encoder.init_with_output(jax.random.key(0), x)
    assert z.shape == (2, int(np.prod(encoded_shape(shape, widths)))) and set(variables) == {"params", "batch_stats"}
    out, _ = decoder.init_with_output(jax.random.key(1), z)
    assert out.shape == (2, *shape) and out.dtype == jnp.float32 and float(jnp.abs(out).max()) <= 1
    plain = ConvEncoder(widths, last_activation=False).apply(variables, x)
    np.testing.assert_allclose(jax.nn.gelu(plain, approximate=False), z, rtol=1e-5, atol=1e-6)


def test_encoded_shapes_round_up():
    assert encoded_shape((7, 5, 3), (4, 6)) == (2, 2, 6) and encoded_shape((28, 28, 1), (8,)) == (14, 14, 8)


def test_output_ranges():
    z = jnp.ones((1, 3)) * 40
    variables = ConvDecoder((4, 4, 1), (2,), "linear").init(jax.random.key(0), z)
    linear = ConvDecoder((4, 4, 1), (2,), "linear").apply(variables, z)
    np.testing.assert_allclose(ConvDecoder((4, 4, 1), (2,)).apply(variables, z), jax.nn.sigmoid(linear), rtol=1e-6)
    with pytest.raises(ValueError, match="output must be one of sigmoid, tanh, linear; got 'relu'"):
        ConvDecoder((4, 4, 1), (2,), "relu").init(jax.random.key(0), z)


def test_the_bottleneck_draws_from_its_gaussian():
    h = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32)
    module = GaussianBottleneck(2)
    variables = module.init(jax.random.key(0), h)
    mean, log_variance, z = module.apply(variables, h)
    np.testing.assert_array_equal(z, mean)
    p = variables["params"]
    np.testing.assert_allclose(mean, h @ p["mean"]["kernel"] + p["mean"]["bias"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(log_variance, h @ p["log_variance"]["kernel"], rtol=1e-5, atol=1e-6)
    keys = jax.vmap(lambda i: jax.random.split(jax.random.key(i), 3))(jnp.arange(2000))
    draws = jax.vmap(lambda k: module.apply(variables, h, k)[2])(keys)
    np.testing.assert_allclose(draws.mean(0), mean, atol=0.15)
    np.testing.assert_allclose(draws.std(0), jnp.exp(0.5 * log_variance), rtol=0.08)


def test_the_variational_decoder_reads_the_draw():
    h = jnp.ones((2, 4))
    module = VariationalDecoder(3, (4, 4, 1), (2,), "linear")
    variables = module.init(jax.random.key(0), h)
    still = module.apply(variables, h)
    assert still["mean"].shape == still["log_variance"].shape == (2, 3) and still["reconstruction"].shape == (
        2,
        4,
        4,
        1,
    )
    drawn = module.apply(variables, h, False, None, jax.random.split(jax.random.key(1), 2))
    assert np.abs(np.asarray(drawn["reconstruction"] - still["reconstruction"])).max() > 1e-4
