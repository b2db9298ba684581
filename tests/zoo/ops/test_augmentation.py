"""The 14 operations against PIL itself, every level and both directions, and how they are drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from zoo.ops import augmentation as aug
from zoo.ops.augmentation import OPS, AugmentationSpace, Transform, fixed_standard, wide_standard

SPACES = {
    "fixed": (fixed_standard(), 0.3, 10, 30, 4, (0.1, 1.9)),
    "wide": (wide_standard(), 0.99, 32, 135, 6, (0.01, 2.0)),
}


def pil(image, op, level, sign, shear, translate, rotate, posterize, enhance):
    """An operation by PIL, with the brief's strengths."""
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    r = level / 29
    affine = lambda *m: picture.transform(picture.size, Image.Transform.AFFINE, m)  # noqa: E731
    factor = float(level) * (enhance[1] - enhance[0]) / 29 + enhance[0]
    shift, slope = sign * int(level * translate / 29), sign * (level * shear / 29)
    assert slope == pytest.approx(sign * r * shear)
    out = {
        "identity": lambda: picture,
        "autocontrast": lambda: ImageOps.autocontrast(picture),
        "equalize": lambda: ImageOps.equalize(picture),
        "rotate": lambda: picture.rotate(sign * int(level * rotate / 29)),
        "solarize": lambda: ImageOps.solarize(picture, 256 - int(level * 256 / 29)),
        "color": lambda: ImageEnhance.Color(picture).enhance(factor),
        "posterize": lambda: ImageOps.posterize(picture, 8 - int(level * posterize / 29)),
        "contrast": lambda: ImageEnhance.Contrast(picture).enhance(factor),
        "brightness": lambda: ImageEnhance.Brightness(picture).enhance(factor),
        "sharpness": lambda: ImageEnhance.Sharpness(picture).enhance(factor),
        "shear_x": lambda: affine(1, slope, 0, 0, 1, 0),
        "shear_y": lambda: affine(1, 0, 0, slope, 1, 0),
        "translate_x": lambda: affine(1, 0, shift, 0, 1, 0),
        "translate_y": lambda: affine(1, 0, 0, 0, 1, shift),
    }[op]()
    return np.asarray(out).reshape(image.shape)


def every():
    """(op, level, sign) of the whole space."""
    grid = np.stack(np.meshgrid(np.arange(14), np.arange(30), [0, 1], indexing="ij"), -1)
    return grid.reshape(-1, 3)


def pictures(n, shape, seed=0):
    """Random images of random ranges, some of one value only."""
    rng = np.random.default_rng(seed)
    low, high = np.sort(rng.integers(0, 256, (2, n)), 0)
    return np.stack([rng.integers(a, b + 1, shape) for a, b in zip(low, high, strict=True)]).astype(np.uint8)


def applied(space, images, triples):
    t = Transform(*(jnp.asarray(triples[:, i]) for i in range(2)), jnp.asarray(triples[:, 2] == 1))
    return np.asarray(jax.jit(jax.vmap(lambda i, t: aug.augment(i, t, space)))(images, t))


@pytest.mark.parametrize(("name", "shape"), [("fixed", (9, 14, 3)), ("wide", (32, 32, 3)), ("wide", (8, 8, 1))])
def test_every_operation_level_and_direction_is_pils(name, shape):
    space, *strengths = SPACES[name]
    triples = every()
    images = pictures(len(triples), shape)
    found = applied(space, images, triples)
    assert found.dtype == np.uint8
    for image, out, (op, level, sign) in zip(images, found, triples, strict=True):
        expected = pil(image, OPS[op], int(level), 1 if sign else -1, *strengths)
        np.testing.assert_array_equal(out, expected, err_msg=f"{OPS[op]} {level} {sign}")


def test_the_stretch_is_pils_for_every_range_of_values():
    """PIL's double precision leaves some exact integers one lower; (lowest, highest) of all kinds are covered."""
    value = np.arange(256)
    pairs = [(a, b) for a in range(0, 256, 7) for b in range(a + 1, 256, 3)] + [(5, 5)]
    counts = np.stack([((value >= a) & (value <= b)).astype(np.int32) for a, b in pairs])
    found = np.asarray(jax.jit(jax.vmap(aug.autocontrast_table))(counts))
    short = 0
    for (a, b), table in zip(pairs, found, strict=True):
        image = Image.fromarray(np.clip(value, a, b).astype(np.uint8)[None])
        expected = np.asarray(ImageOps.autocontrast(image))[0]
        np.testing.assert_array_equal(table[np.clip(value, a, b)], expected, err_msg=f"{a} {b}")
        short += int(table[b] == 254)
    assert short > 20


def test_equalize_of_skewed_histograms_is_pils():
    rng = np.random.default_rng(3)
    for most in (1, 2, 3, 40, 256):
        image = (rng.beta(0.3, 2, (40, 40)) * (most - 1)).round().astype(np.uint8)
        counts = np.bincount(image.ravel(), minlength=256).astype(np.int32)
        table = np.asarray(aug.equalize_table(jnp.asarray(counts)))
        np.testing.assert_array_equal(table[image], np.asarray(ImageOps.equalize(Image.fromarray(image))))


def test_a_blend_is_rounded_between_product_and_sum():
    """All pairs of values at every level, as PIL's float arithmetic has them."""
    for space in (fixed_standard(), wide_standard()):
        a, b = (v.ravel().astype(np.uint8) for v in np.meshgrid(np.arange(0, 256, 5), np.arange(256), indexing="ij"))
        for level in range(0, 30, 4):
            factor = float(level) * (space.enhance[1] - space.enhance[0]) / 29 + space.enhance[0]
            expected = np.asarray(Image.blend(Image.fromarray(a[None]), Image.fromarray(b[None]), factor))[0]
            products = jnp.asarray(aug._products(space))[level]
            np.testing.assert_array_equal(
                aug.blend(jnp.asarray(a, jnp.int32), jnp.asarray(b, jnp.int32), products), expected
            )


def test_level_0_changes_nothing_where_the_strength_is_nothing():
    image = pictures(1, (8, 8, 3))
    for op in ("identity", "rotate", "solarize", "posterize", "shear_x", "shear_y", "translate_x", "translate_y"):
        for space, *_ in SPACES.values():
            for sign in (0, 1):
                np.testing.assert_array_equal(applied(space, image, np.array([[OPS.index(op), 0, sign]])), image)


def test_directions_by_hand():
    image = np.arange(1, 10, dtype=np.uint8).reshape(1, 3, 3, 1)
    one = AugmentationSpace(translate=1, shear=1.0, rotate=90)
    at = lambda op, sign: applied(one, image, np.array([[OPS.index(op), 29, sign]]))[0, ..., 0].tolist()  # noqa: E731
    assert at("translate_x", 1) == [[2, 3, 0], [5, 6, 0], [8, 9, 0]]
    assert at("translate_x", 0) == [[0, 1, 2], [0, 4, 5], [0, 7, 8]]
    assert at("translate_y", 1) == [[4, 5, 6], [7, 8, 9], [0, 0, 0]]
    assert at("rotate", 1) == [[3, 6, 9], [2, 5, 8], [1, 4, 7]]  # a quarter counter-clockwise
    assert at("shear_x", 1) == [[2, 3, 0], [6, 0, 0], [0, 0, 0]]  # the row at height y + 1/2 reads from x + y + 1/2


def test_floats_are_rounded_for_the_operation_and_kept_by_the_identity():
    rng = np.random.default_rng(1)
    image = rng.uniform(size=(1, 6, 6, 3)).astype(np.float32)
    space = fixed_standard()
    as_bytes = np.round(image * 255).astype(np.uint8)
    for op in ("rotate", "solarize", "color"):
        triple = np.array([[OPS.index(op), 20, 1]])
        found = applied(space, image, triple)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, applied(space, as_bytes, triple) / 255, atol=1e-7)
    np.testing.assert_array_equal(applied(space, image, np.array([[0, 20, 1]])), image)
    np.testing.assert_array_equal(aug.to_uint8(jnp.array([-1.0, np.nan, 0.5, 2.0, 0.003])), [0, 0, 128, 255, 1])
    np.testing.assert_allclose(aug.to_float(jnp.array([0, 51, 255], jnp.uint8)), [0, 0.2, 1.0], atol=1e-7)


def test_draws_are_uniform_without_identity_and_without_level_0():
    space = AugmentationSpace(("solarize", "identity", "rotate"), levels=5)
    t = aug.sample_transforms(jax.random.split(jax.random.key(0), 4000), space, 3)
    assert t.op.shape == t.level.shape == t.positive.shape == (3, 4000)
    n = 12_000
    assert set(np.unique(t.op)) == {0, 2}
    assert abs(np.mean(np.asarray(t.op) == 2) - 0.5) < 3 * np.sqrt(0.25 / n)
    assert abs(np.mean(t.positive) - 0.5) < 3 * np.sqrt(0.25 / n)
    for level in range(1, 5):
        assert abs(np.mean(np.asarray(t.level) == level) - 0.25) < 3 * np.sqrt(0.1875 / n)
    assert np.asarray(t.level).min() == 1 and np.asarray(t.level).max() == 4
    joint = np.mean((np.asarray(t.op) == 2) & np.asarray(t.positive))
    assert abs(joint - 0.25) < 0.02  # independent of each other
    assert abs(np.mean(np.asarray(t.op[0]) == np.asarray(t.op[1])) - 0.5) < 0.03  # and between proposals
    # an example's draws depend on its key only
    again = aug.sample_transforms(jax.random.split(jax.random.key(0), 4000)[7:8], space, 3)
    np.testing.assert_array_equal(again.level[:, 0], t.level[:, 7])
    standard = aug.sample_transforms(jax.random.split(jax.random.key(1), 2000), fixed_standard(), 1)
    assert set(np.unique(standard.op)) == set(range(1, 14))
    assert set(np.unique(standard.level)) == set(range(1, 30))


def test_counts_by_operation_and_level():
    space = AugmentationSpace(("identity", "rotate"), levels=3)
    t = Transform(jnp.array([[1, 1], [0, 1]]), jnp.array([[2, 2], [0, 1]]), None)
    counts = aug.transform_counts(t, jnp.array([[True, True], [True, False]]), space)
    np.testing.assert_array_equal(counts, [[1, 0, 0], [0, 0, 2]])


def test_images_of_another_range_are_refused():
    good = np.zeros((2, 4, 4, 3), np.float32)
    aug.check_images(good)
    aug.check_images(good.astype(np.uint8) + 255)
    says = r"augmentations expect \[0,1\] or uint8 before normalisation"
    for bad in (good - 0.1, good + 1.5, good.astype(np.int32)):
        with pytest.raises(ValueError, match=says):
            aug.check_images(bad)
    with pytest.raises(ValueError, match="height, width, 1 or 3"):
        aug.check_images(np.zeros((2, 4, 4, 2), np.uint8))
    t = Transform(jnp.int32(1), jnp.int32(1), jnp.bool_(True))
    with pytest.raises(ValueError, match=says):
        aug.augment(jnp.zeros((4, 4, 3), jnp.int32), t, fixed_standard())
    with pytest.raises(ValueError, match="1 or 3"):
        aug.augment(jnp.zeros((4, 4, 4), jnp.uint8), t, fixed_standard())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"ops": ("identity",)}, "besides identity"),
        ({"ops": ()}, "besides identity"),
        ({"ops": ("rotate", "blur")}, "'blur'"),
        ({"ops": ("rotate", "rotate")}, "twice"),
        ({"levels": 1}, "levels"),
        ({"posterize": 9}, "posterize"),
        ({"translate": 1 << 14}, "translate"),
        ({"translate": -1}, "translate"),
    ],
)
def test_spaces_that_cannot_work_are_refused(change, says):
    with pytest.raises(ValueError, match=says):
        AugmentationSpace(**change)


def test_nothing_is_smoothed_where_there_is_no_inside():
    thin = jnp.arange(10, dtype=jnp.int32).reshape(2, 5, 1)
    np.testing.assert_array_equal(aug.smooth(thin), thin)


def test_operations_are_the_same_inside_a_larger_program():
    """Several transformations of one image, compiled with one image shared by all, as the objective does."""
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.integers(0, 256, (16, 8, 8, 1)).astype(np.uint8))
    t = Transform(*(jnp.asarray(rng.integers(a, b, (16, 2))) for a, b in ((0, 14), (1, 30))), jnp.ones((16, 2), bool))
    t = t.replace(op=t.op.at[:, 1].set(OPS.index("sharpness")))
    several = jax.jit(jax.vmap(jax.vmap(lambda i, t: aug.augment(i, t, fixed_standard()), (None, 0))))(images, t)
    for j in range(2):
        triples = np.stack([np.asarray(v)[:, j] for v in (t.op, t.level, t.positive)], 1).astype(int)
        expected = [
            pil(np.asarray(i), OPS[op], int(level), 1, *SPACES["fixed"][1:])
            for i, (op, level, _) in zip(images, triples, strict=True)
        ]
        np.testing.assert_array_equal(several[:, j], np.stack(expected))
