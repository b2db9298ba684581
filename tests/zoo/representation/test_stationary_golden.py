"""The released code's numbers (tests/golden/stationary.md)."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.metrics.compatibility import (
    average_accuracy,
    average_compatibility,
    class_templates,
    compatibility_matrix,
    identification_top1,
)
from zoo.ops.simplex import simplex_prototypes
from zoo.representation.stationary import hoc_loss

GOLDEN = np.load(Path(__file__).parents[2] / "golden" / "stationary_official.npz")


@pytest.mark.parametrize("k", [2, 3, 10])
def test_simplex(k):
    np.testing.assert_allclose(simplex_prototypes(k), GOLDEN[f"simplex{k}"], atol=1e-6)


def test_the_released_simplex_of_1024():
    np.testing.assert_allclose(
        simplex_prototypes(1024)[jnp.array([0, 511, 1023])], GOLDEN["simplex1024_rows"], atol=1e-5
    )


@pytest.mark.parametrize("mu", [10, 3])
def test_hoc(mu):
    new, old, label = (jnp.asarray(GOLDEN[f"hoc_{k}"]) for k in ("new", "old", "label"))
    loss, grad = jax.value_and_grad(lambda h: jnp.mean(hoc_loss(h, old, label, float(mu))))(new)
    np.testing.assert_allclose(loss, GOLDEN[f"hoc_loss_{mu}"], atol=1e-5)
    np.testing.assert_allclose(grad, GOLDEN[f"hoc_grad_{mu}"], atol=1e-6)


def test_figures_of_a_matrix():
    assert average_compatibility(GOLDEN["matrix"]) == pytest.approx(float(GOLDEN["ac"]))
    assert 100 * average_accuracy(GOLDEN["matrix"]) == pytest.approx(float(GOLDEN["aa"]))


def test_identification():
    q, ql, g, gl = (jnp.asarray(GOLDEN[k]) for k in ("query", "query_label", "gallery", "gallery_label"))
    found = identification_top1(q, ql, class_templates(g, gl, 7))
    assert float(found) == pytest.approx(float(GOLDEN["identification"]), abs=1e-6)
    assert compatibility_matrix([q], [g], ql, gl, 7)[0, 0] == pytest.approx(float(found))
