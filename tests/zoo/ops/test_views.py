"""Augmentation stacks by letter: ranges, keys, what each may do, and how often."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.ops import views

IMAGE = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (8, 6, 3)), jnp.float32)
KEYS = jax.random.split(jax.random.key(0), 128)
ALL = {
    "crop": views.random_resized_crop,
    "blur": views.random_blur,
    "gray": views.grayscale,
    "jitter": views.colour_jitter,
    "stack": views.augmentation_stack("abcde"),
}


@functools.cache
def many(name, channels=3):
    return np.asarray(jax.jit(jax.vmap(ALL[name], (0, None)))(KEYS, IMAGE[..., :channels]))


@pytest.mark.parametrize("name", ALL)
def test_shape_range_determinism_and_variety(name):
    for channels in (3, 1):
        made = many(name, channels)
        assert made.shape == (128, 8, 6, channels) and made.dtype == np.float32
        assert np.isfinite(made).all() and made.min() >= -1 - 1e-6 and made.max() <= 1 + 1e-6
    np.testing.assert_allclose(ALL[name](KEYS[3], IMAGE), many(name)[3], atol=1e-5)
    assert name == "gray" or len({m.tobytes() for m in many(name)}) > 100


def test_a_crop_of_everything_is_the_image_and_others_are_windows():
    whole = views.random_resized_crop(KEYS[0], IMAGE, 1.0, (1.0, 1.0))
    np.testing.assert_allclose(whole, IMAGE, atol=1e-5)
    # on a ramp a window's values are a ramp again, of the window's share and place
    ramp = jnp.broadcast_to(jnp.linspace(-1, 1, 32)[:, None, None] / 2, (32, 32, 1))
    across = jnp.swapaxes(ramp, 0, 1)
    crop = jax.jit(jax.vmap(lambda k, x: views.random_resized_crop(k, x, 0.08), (0, None)))
    down, right = (np.asarray(crop(KEYS, x)) for x in (ramp, across))
    slope = 1 / 31
    tall, wide = ((m[:, 20, 20, 0] - m[:, 11, 20, 0]) / (9 * slope) for m in (down, np.swapaxes(right, 1, 2)))
    area = tall * wide
    assert area.min() >= 0.075 and area.max() <= 1.01 and area.max() > 0.9 and area.min() < 0.15
    ratio = wide / tall
    assert ratio.min() > 0.7 and ratio.max() < 1.4 and ratio.min() < 0.85 and ratio.max() > 1.2
    middle = down[:, 16, 16, 0]
    assert middle.min() < -0.2 and middle.max() > 0.2
    # a window never leaves the image
    assert down.min() >= -0.5 - 1e-6 and down.max() <= 0.5 + 1e-6


def test_blur_keeps_constants_borders_and_means():
    flat = jnp.full((8, 8, 1), 0.7)
    np.testing.assert_allclose(views.random_blur(KEYS[0], flat), flat, atol=1e-5)
    spot = jnp.zeros((9, 9, 1)).at[4, 4].set(1.0)
    soft = np.asarray(views.random_blur(KEYS[0], spot, (1.0, 1.0)))[..., 0]
    weight = np.exp(-0.5 * np.arange(-1, 2) ** 2.0)
    weight /= weight.sum()
    np.testing.assert_allclose(soft[3:6, 3:6], np.outer(weight, weight), atol=1e-5)
    assert np.count_nonzero(soft) == 9
    wide = np.asarray(views.random_blur(KEYS[0], jnp.zeros((64, 64, 1)).at[32, 32].set(1.0), (1.0, 1.0)))
    assert np.count_nonzero(np.abs(wide[32, :, 0]) > 1e-12) == 7  # a tenth of 64 is 6, made odd


def test_grayscale_is_luma():
    gray = np.asarray(views.grayscale(KEYS[0], IMAGE))
    luma = np.asarray(IMAGE) @ [0.2989, 0.5870, 0.1140]
    np.testing.assert_allclose(gray, np.repeat(luma[..., None], 3, -1), atol=2e-3)
    one = IMAGE[..., :1]
    np.testing.assert_array_equal(views.grayscale(KEYS[0], one), one)


def test_jitter_of_one_channel_is_affine_and_bounded_by_its_strength():
    small = 0.1 * IMAGE[..., :1]
    made = np.asarray(jax.vmap(lambda k: views.colour_jitter(k, small, 0.25))(KEYS))
    x = np.asarray(small).ravel()
    fits = np.asarray([np.polyfit(x, m.ravel(), 1) for m in made])
    assert fits[:, 0].min() >= 0.8 - 1e-3 and fits[:, 0].max() <= 1.2 + 1e-3
    assert fits[:, 0].min() < 0.85 and fits[:, 0].max() > 1.15
    shift = made.mean((1, 2, 3)) - x.mean()
    assert np.abs(shift).max() <= 0.2 + 1e-5 and np.abs(shift).max() > 0.15


def test_jitter_of_three_channels_moves_colours():
    flat = jnp.broadcast_to(jnp.asarray([0.3, -0.2, -0.1]), (4, 4, 3))
    made = np.asarray(jax.vmap(lambda k: views.colour_jitter(k, flat))(KEYS))
    assert (made[..., 0].argmax() is not None) and np.ptp(made[:, 0, 0] - made[:, 0, 0, :1], axis=0).max() > 0.1


def test_how_often():
    same = lambda a: np.mean([np.allclose(m, IMAGE, atol=1e-7) for m in a])  # noqa: E731
    one = {c: np.asarray(jax.vmap(views.augmentation_stack(c), (0, None))(KEYS, IMAGE)) for c in "abcde"}
    assert same(one["a"]) < 0.02
    assert 0.35 < same(one["b"]) < 0.65
    assert 0.7 < same(one["c"]) < 0.9
    assert 0.1 < same(one["d"]) < 0.32
    assert 0.35 < same(one["e"]) < 0.65
    flipped = np.mean([np.allclose(m, np.asarray(IMAGE)[:, ::-1]) for m in one["e"]])
    assert flipped == pytest.approx(1 - same(one["e"]))
    never = views.sometimes(views.grayscale, 0.0)
    np.testing.assert_array_equal(never(KEYS[0], IMAGE), IMAGE)


def test_a_word_is_its_letters_in_order_and_two_views_differ():
    stack = views.augmentation_stack("eb")
    flips = views.augmentation_stack("e")
    assert any(not np.allclose(stack(k, IMAGE), flips(k, IMAGE)) for k in KEYS[:8])
    first, second = views.two_of(views.augmentation_stack("ad"))(KEYS[0], IMAGE)
    assert not np.allclose(first, second)
    tight = views.augmentation_stack("a", smallest=1.0)
    loose = views.augmentation_stack("a", smallest=0.01)
    assert not np.allclose(tight(KEYS[0], IMAGE), loose(KEYS[0], IMAGE))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: views.augmentation_stack("az"), "distinct letters of 'abcde', got 'az'"),
        (lambda: views.augmentation_stack("aa"), "distinct letters of 'abcde', got 'aa'"),
        (lambda: views.augmentation_stack(""), "distinct letters of 'abcde', got ''"),
        (lambda: views.random_resized_crop(KEYS[0], IMAGE, 0.0), r"smallest must lie in \(0, 1\], got 0.0"),
        (lambda: views.random_resized_crop(KEYS[0], IMAGE, 0.5, (2.0, 1.0)), "ratio needs 0 < low <= high"),
        (lambda: views.random_blur(KEYS[0], IMAGE, (0.0, 1.0)), "sigma needs 0 < low <= high"),
        (lambda: views.random_blur(KEYS[0], IMAGE, extent=0.0), r"extent must lie in \(0, 1\], got 0.0"),
        (lambda: views.colour_jitter(KEYS[0], IMAGE, 0.0), r"strength must lie in \(0, 1\], got 0.0"),
    ],
)
def test_settings_that_cannot_work(call, message):
    with pytest.raises(ValueError, match=message):
        call()
