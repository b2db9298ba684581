"""Classifiers: what is trained, what is not, and what comes out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.nn.classifiers import CosineClassifier, FixedClassifier, RetrievalHead
from zoo.ops.simplex import simplex_prototypes


def test_fixed_prototypes_are_constants():
    z = jnp.arange(6.0).reshape(2, 3)
    variables = FixedClassifier(4).init(jax.random.key(0), z)
    assert set(variables) == {"constants"} and set(variables["constants"]) == {"prototypes"}
    np.testing.assert_array_equal(variables["constants"]["prototypes"], simplex_prototypes(4))
    logits = FixedClassifier(4).apply(variables, z)
    np.testing.assert_allclose(logits, np.asarray(z) @ np.asarray(simplex_prototypes(4)).T, atol=1e-6)


def test_fixed_logits_use_the_stored_prototypes():
    z, stored = jnp.ones((1, 2)), jnp.array([[1.0, 2.0], [0.0, 0.0], [3.0, -1.0]])
    np.testing.assert_allclose(
        FixedClassifier(3).apply({"constants": {"prototypes": stored}}, z), [[3.0, 0.0, 2.0]], atol=1e-6
    )
    assert FixedClassifier(3).apply({"constants": {"prototypes": stored}}, z.astype(jnp.bfloat16)).dtype == jnp.float32


def test_fixed_with_room_to_spare():
    variables = FixedClassifier(4, 7).init(jax.random.key(0), jnp.ones((2, 7)))
    assert variables["constants"]["prototypes"].shape == (4, 7)


def test_fixed_refuses_another_size():
    with pytest.raises(ValueError, match="feature size 511 differs from simplex dimension 1023"):
        FixedClassifier(1024).init(jax.random.key(0), jnp.ones((1, 511)))


def test_cosine_classifier():
    z = jnp.array([[3.0, 4.0], [0.0, -2.0]])
    prototypes = jnp.array([[2.0, 0.0], [0.0, 5.0], [-1.0, 0.0]])
    model = CosineClassifier(3, scale=10.0)
    assert model.init(jax.random.key(0), z)["params"]["prototypes"].shape == (3, 2)
    logits = model.apply({"params": {"prototypes": prototypes}}, z)
    np.testing.assert_allclose(logits, [[6.0, 8.0, -6.0], [0.0, -10.0, 0.0]], atol=1e-5)
    masked = model.apply({"params": {"prototypes": prototypes}}, z, jnp.array([True, False, True]))
    assert np.isneginf(masked[:, 1]).all() and masked[0, 0] == logits[0, 0]


def test_retrieval_head():
    h = jnp.arange(6.0).reshape(2, 3)
    params = RetrievalHead(5).init(jax.random.key(0), h)["params"]
    assert set(params["fc"]) == {"kernel"} and params["fc"]["kernel"].shape == (3, 5)
    np.testing.assert_allclose(RetrievalHead(5).apply({"params": params}, h), h @ params["fc"]["kernel"], atol=1e-6)
    assert set(RetrievalHead(5, use_bias=True).init(jax.random.key(0), h)["params"]["fc"]) == {"kernel", "bias"}


def test_retrieval_head_of_the_same_size_is_nothing():
    h = jnp.ones((2, 3))
    assert not RetrievalHead(3).init(jax.random.key(0), h)
    np.testing.assert_array_equal(RetrievalHead(3).apply({}, h), h)
