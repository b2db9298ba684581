"""Image augmentations: ranges, what they may move, keys, jit and vmap."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.ops import images

IMAGE = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (8, 6, 3)), jnp.float32)
KEYS = jax.random.split(jax.random.key(0), 64)
ALL = {
    "flip": images.random_flip,
    "crop": functools.partial(images.random_crop, padding=2),
    "brightness": images.random_brightness,
    "contrast": images.random_contrast,
    "cutout": functools.partial(images.cutout, size=3),
}


@pytest.mark.parametrize("name", ALL)
def test_shape_range_determinism_and_variety(name):
    many = jax.jit(jax.vmap(ALL[name], (0, None)))(KEYS, IMAGE)
    assert many.shape == (64, 8, 6, 3) and many.dtype == jnp.float32
    assert float(many.min()) >= -1 and float(many.max()) <= 1
    np.testing.assert_allclose(ALL[name](KEYS[3], IMAGE), many[3], atol=1e-6)
    assert len({np.asarray(m).tobytes() for m in many}) > 1


def test_flip_mirrors_columns_half_of_the_time():
    many = np.asarray(jax.vmap(images.random_flip, (0, None))(KEYS, IMAGE))
    mirrored = [np.array_equal(m, np.asarray(IMAGE)[:, ::-1]) for m in many]
    same = [np.array_equal(m, np.asarray(IMAGE)) for m in many]
    assert all(a or b for a, b in zip(mirrored, same, strict=True)) and 16 < sum(mirrored) < 48


def test_crop_cuts_a_window_of_the_reflected_image():
    wide = np.pad(np.asarray(IMAGE), ((2, 2), (2, 2), (0, 0)), mode="reflect")
    windows = {wide[i : i + 8, j : j + 6].tobytes() for i in range(5) for j in range(5)}
    found = [np.asarray(images.random_crop(k, IMAGE, 2)).tobytes() for k in KEYS]
    assert set(found) <= windows and len(set(found)) > 10
    with pytest.raises(ValueError, match=r"padding must be in \[0, 6\) for a 8 x 6 image, got 6"):
        images.random_crop(KEYS[0], IMAGE, 6)


def test_brightness_adds_one_number():
    small = IMAGE * 0.5
    change = np.asarray(images.random_brightness(KEYS[0], small, 0.2) - small)
    assert np.ptp(change) < 1e-6 and 0 < abs(change.mean()) <= 0.2
    with pytest.raises(ValueError, match="most must not be negative"):
        images.random_brightness(KEYS[0], IMAGE, -1.0)


def test_contrast_scales_around_the_channel_mean():
    small = np.asarray(IMAGE * 0.5)
    found = np.asarray(images.random_contrast(KEYS[1], jnp.asarray(small), 0.5, 0.6))
    mean = small.mean((0, 1))
    factor = (found - mean) / (small - mean)
    assert np.ptp(factor[np.abs(small - mean) > 0.05]) < 1e-3 and 0.5 <= np.median(factor) <= 0.6
    with pytest.raises(ValueError, match="0 < lower < upper"):
        images.random_contrast(KEYS[0], IMAGE, 1.0, 0.5)


def test_cutout_fills_one_square_that_may_stick_out():
    for key in KEYS[:16]:
        filled = np.asarray(images.cutout(key, jnp.ones((8, 6, 1)), 3))[..., 0] == 0
        rows, columns = np.flatnonzero(filled.any(1)), np.flatnonzero(filled.any(0))
        assert filled.sum() == len(rows) * len(columns) and 2 <= len(rows) <= 3 and 2 <= len(columns) <= 3
    with pytest.raises(ValueError, match="size must be at least 1"):
        images.cutout(KEYS[0], IMAGE, 0)


def test_composition_gives_each_step_its_own_key():
    draw = lambda key, image: image + jax.random.normal(key, ())  # noqa: E731
    twice = images.compose(draw, draw)(KEYS[0], jnp.zeros((1, 1, 1)))
    parts = [jax.random.normal(jax.random.fold_in(KEYS[0], i), ()) for i in range(2)]
    assert float(twice[0, 0, 0]) == pytest.approx(float(parts[0] + parts[1]), rel=1e-5)
    assert float(parts[0]) != float(parts[1])
