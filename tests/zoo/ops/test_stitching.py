"""Stitching: which encoder, whose anchors, whose head; and what cannot be joined."""

import jax.numpy as jnp
import numpy as np
import pytest

from zoo.ops.anchors import AnchorSet
from zoo.ops.stitching import Stitchable, own_and_stitched, stitch, stitching_matrix


def model(scale, ids=(0, 1), relative=True, width=3):
    anchors = AnchorSet.of(list(ids), jnp.full((len(ids), width), 10.0 * scale))
    represent = (lambda z, a: z * 1000 + a[:1]) if relative else None
    return Stitchable(lambda x: x * scale, lambda r: r + 0.5 * scale, represent, anchors, width)


def test_the_first_encodes_and_projects_and_the_second_decodes():
    x = jnp.array([[1.0, 2.0, 3.0]])
    one, two = model(2.0), model(7.0)
    np.testing.assert_allclose(stitch(one, two)(x), x * 2000 + 20 + 3.5)
    np.testing.assert_allclose(stitch(two, one)(x), x * 7000 + 70 + 1.0)
    a, b = model(2.0, relative=False), model(7.0, relative=False)
    np.testing.assert_allclose(stitch(a, b)(x), x * 2 + 3.5)


def test_rows_of_the_table_are_encoders():
    x = jnp.ones((1, 3))
    models = {"a": model(2.0), "b": model(7.0), "c": model(1.0)}
    table = stitching_matrix(models, x, lambda out: out[0, 0])
    expected = [[s * 1010 + 0.5 * t for t in (2, 7, 1)] for s in (2, 7, 1)]
    np.testing.assert_allclose(table, expected)
    parallel = stitching_matrix(models, {"a": x, "b": 2 * x, "c": 3 * x}, lambda out: out[0, 0])
    np.testing.assert_allclose(parallel[1], [14000 + 70 + 0.5 * t for t in (2, 7, 1)])


def test_absolute_latents_of_other_widths_leave_holes():
    models = {"a": model(2.0, relative=False), "b": model(7.0, relative=False, width=4)}
    table = stitching_matrix(models, jnp.ones((1, 3)), lambda out: out[0, 0])
    np.testing.assert_allclose(table, [[3.0, np.nan], [np.nan, 10.5]])
    own, stitched = own_and_stitched(table)
    assert own == 6.75 and np.isnan(stitched)
    assert own_and_stitched(np.array([[1.0, 2.0], [4.0, 3.0]])) == (2.0, 3.0)


def test_what_does_not_belong_together_is_refused():
    with pytest.raises(ValueError, match="models were projected on different anchors"):
        stitch(model(1.0), model(1.0, ids=(1, 0)))
    with pytest.raises(ValueError, match="reads relative representations, the other's absolute"):
        stitch(model(1.0), model(1.0, relative=False))
    with pytest.raises(ValueError, match="have 3 dimensions, the second's head reads 4"):
        stitch(model(1.0, relative=False), model(1.0, relative=False, width=4))
