"""Encoders into one vector: pooling, projection and norm by definition, padding, dropout, shared parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.nn.bert import BERT, BERTConfig
from zoo.nn.mlp import MLP
from zoo.nn.partitioning import unbox
from zoo.nn.retriever import DenseRetriever, WeightedWords, query_tower, shared_towers, two_towers

IDS = jnp.array([[2, 7, 9, 3], [2, 5, 0, 0], [2, 0, 0, 0]])


def variables(module, seed=0):
    found = unbox(module.init(jax.random.key(seed), IDS))
    # no parameter at its initial value, so that none can be left out
    leaves, tree = jax.tree.flatten(found)
    keys = jax.random.split(jax.random.key(9), len(leaves))
    return jax.tree.unflatten(
        tree, [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    )


def test_words_mean_projection_and_norm():
    module = DenseRetriever(WeightedWords(12, 6), 5, "mean")
    v = variables(module)
    p = jax.tree.map(np.asarray, v["params"])
    got = module.apply(v, IDS)
    for row, ids in zip(got, np.asarray(IDS), strict=True):
        words = [p["body"]["word"]["embedding"][i] * p["body"]["weight"][i] for i in ids if i]
        x = np.mean(words, 0) @ p["projection"]["kernel"] + p["projection"]["bias"]
        x = (x - x.mean()) / np.sqrt(x.var() + 1e-5)
        np.testing.assert_allclose(row, x * p["norm"]["scale"] + p["norm"]["bias"], atol=1e-5)
    assert got.dtype == jnp.float32


def test_first_token_of_a_transformer_without_norm():
    body = BERT(BERTConfig(12, 8, 1, 2, 16, 6, 0, dropout=0.5, attention_dropout=0.5))
    module = DenseRetriever(body, 3, "first", norm=False)
    v = variables(module)
    tokens = body.apply({"params": v["params"]["body"]}, IDS, padding_mask=IDS != 0)["tokens"]
    p = v["params"]["projection"]
    np.testing.assert_allclose(module.apply(v, IDS), tokens[:, 0] @ p["kernel"] + p["bias"], atol=1e-5)
    # padding changes nothing, dropout does and belongs to each example
    longer = jnp.concatenate([IDS, jnp.zeros((3, 2), jnp.int32)], 1)
    np.testing.assert_allclose(module.apply(v, longer), module.apply(v, IDS), atol=1e-5)
    keys = jax.random.split(jax.random.key(1), 3)
    dropped = module.apply(v, IDS, train=True, keys=keys)
    assert not np.allclose(dropped, module.apply(v, IDS), atol=1e-3)
    np.testing.assert_allclose(module.apply(v, IDS[1:], train=True, keys=keys[1:]), dropped[1:], atol=1e-5)
    np.testing.assert_allclose(module.apply(v, IDS, train=False, keys=keys), module.apply(v, IDS), atol=1e-6)


def test_an_orthogonal_start_keeps_inner_products():
    module = DenseRetriever(WeightedWords(12, 6), None, "mean", norm=False)
    v = unbox(module.init(jax.random.key(0), IDS))
    table = v["params"]["body"]["word"]["embedding"]
    mean = jnp.stack([table[IDS[i]][IDS[i] != 0].mean(0) for i in range(3)])
    out = module.apply(v, IDS)
    np.testing.assert_allclose(out @ out.T, mean @ mean.T, atol=1e-5)


def test_another_padding_id():
    module = DenseRetriever(WeightedWords(12, 4), None, "mean", pad_id=1)
    v = variables(module)
    np.testing.assert_allclose(
        module.apply(v, jnp.array([[4, 5, 1]])), module.apply(v, jnp.array([[4, 5, 1, 1]])), atol=1e-6
    )
    with pytest.raises(ValueError, match="pooling must be first or mean, got 'max'"):
        DenseRetriever(WeightedWords(12, 4), None, "max")


def test_towers():
    module = DenseRetriever(WeightedWords(12, 4), None, "mean")
    shared = shared_towers(module)
    params = unbox(shared.init(jax.random.key(0), IDS, None))
    assert list(params) == ["encoder"]
    np.testing.assert_array_equal(shared.query(params, IDS, None), shared.document(params, IDS, None))
    both = two_towers(module, DenseRetriever(WeightedWords(12, 4), 4, "first"))
    params = unbox(both.init(jax.random.key(0), IDS, IDS))
    assert sorted(params) == ["document", "query"]
    np.testing.assert_allclose(both.query(params, IDS, None), module.apply({"params": params["query"]}, IDS), atol=1e-6)
    assert not np.allclose(both.query(params, IDS, None), both.document(params, IDS, None))
    alone = query_tower(MLP((3,), 2))
    x = jnp.ones((2, 5))
    params = alone.init(jax.random.key(0), x, None)
    assert alone.query(params, x, None).shape == (2, 2)
    np.testing.assert_array_equal(alone.document(params, x[:, :2], None), x[:, :2])
