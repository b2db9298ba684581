"""Reformulators against the released heads' numbers, and the set network against a loop."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from zoo.nn.bert import BERT, BERTConfig
from zoo.nn.partitioning import unbox
from zoo.nn.reformulators import (
    DenseReformulator,
    FeedbackScorer,
    SetReformulator,
    SparseMLMReformulator,
    SparseTokenReformulator,
)

GOLDEN = np.load(Path(__file__).parents[2] / "golden" / "lol_official.npz")
IDS, MASK = jnp.asarray(GOLDEN["ids"], jnp.int32), jnp.asarray(GOLDEN["mask"]) > 0
TYPES = jnp.zeros(IDS.shape, jnp.int32)


class Fixed(nn.Module):
    """A body that gives the golden hidden states and vocabulary scores."""

    @nn.compact
    def __call__(self, ids, padding_mask=None, token_types=None, train=False, keys=None):
        return {"tokens": jnp.asarray(GOLDEN["hidden"]), "logits": jnp.asarray(GOLDEN["logits"])}


@pytest.mark.parametrize("log", [0, 1])
def test_the_mlm_head_is_the_released_one(log):
    module = SparseMLMReformulator(Fixed(), log_saturation=bool(log))
    got = module.apply({}, IDS, MASK, TYPES)
    np.testing.assert_allclose(got, GOLDEN[f"mlm_{log}"], atol=1e-6)
    assert not np.asarray(got)[:, [0, 99, 101, 998]].any()
    assert np.asarray(got)[:, 100].any() and np.asarray(got)[:, 999].any()
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize("log", [0, 1])
def test_the_token_head_is_the_released_one(log):
    module = SparseTokenReformulator(Fixed(), 1010, log_saturation=bool(log))
    weight = {"kernel": jnp.asarray(GOLDEN["seq_w"].T), "bias": jnp.asarray(GOLDEN["seq_b"])}
    got = module.apply({"params": {"weights": {"weight": weight}}}, IDS, MASK, TYPES)
    np.testing.assert_allclose(got, GOLDEN[f"seq_{log}"], atol=1e-6)


def test_the_dense_head_is_the_released_one():
    module = DenseReformulator(Fixed(), 5)
    params = {
        "projection": {"kernel": jnp.asarray(GOLDEN["dense_w"].T), "bias": jnp.asarray(GOLDEN["dense_b"])},
        "norm": {"scale": jnp.ones(5), "bias": jnp.zeros(5)},
    }
    np.testing.assert_allclose(module.apply({"params": params}, IDS, MASK, TYPES), GOLDEN["dense"], atol=1e-5)


def test_the_passage_scorer_is_the_released_one():
    dense, out = ({"kernel": jnp.asarray(GOLDEN[f"score_{n}_w"].T), "bias": jnp.asarray(GOLDEN[f"score_{n}_b"])}
                  for n in ("dense", "out"))  # fmt: skip
    params = {"dense": dense, "norm": {"scale": jnp.ones(5), "bias": jnp.zeros(5)}, "out": out}
    hidden, ends = jnp.asarray(GOLDEN["hidden"]), jnp.asarray(GOLDEN["sep"], jnp.int32)
    logits, real = FeedbackScorer().apply({"params": params}, hidden, ends)
    np.testing.assert_array_equal(real, ~np.isnan(GOLDEN["score"]))
    np.testing.assert_allclose(np.asarray(logits)[real], GOLDEN["score"][np.asarray(real)], rtol=1e-4, atol=1e-5)


def test_token_types_reach_bodies_that_have_two_kinds_only():
    ids, mask = jnp.array([[5, 6, 7, 0]]), jnp.array([[True, True, True, False]])
    types = jnp.array([[0, 1, 1, 0]])
    for kinds in (2, 1):
        module = DenseReformulator(BERT(BERTConfig(9, 8, 1, 2, 8, 12, kinds)), 4)
        variables = unbox(module.init(jax.random.key(0), ids, mask, types))
        same = np.allclose(module.apply(variables, ids, mask, types), module.apply(variables, ids, mask, 0 * types))
        assert same == (kinds == 1)
    # padding is not read
    other = module.apply(variables, ids.at[0, 3].set(8), mask, types)
    np.testing.assert_allclose(other, module.apply(variables, ids, mask, types), atol=1e-6)


def test_the_set_network_is_its_loop():
    rng = np.random.default_rng(1)
    q, p = rng.normal(size=(3, 4)).astype(np.float32), rng.normal(size=(3, 5, 4)).astype(np.float32)
    sizes = np.array([[5, 2], [1, 0], [3, 3]])
    module = SetReformulator((6,), 7.0)
    variables = module.init(jax.random.key(0), jnp.asarray(q), jnp.asarray(p), jnp.asarray(sizes))
    w = variables["params"]["scorer"]
    got = module.apply(variables, jnp.asarray(q), jnp.asarray(p), jnp.asarray(sizes))
    assert got.shape == (3, 2, 4)
    for b in range(3):
        scores = []
        for j in range(5):
            x = np.concatenate([q[b], p[b, j], [q[b] @ p[b, j]]])
            h = np.maximum(x @ np.asarray(w["hidden1"]["kernel"]) + np.asarray(w["hidden1"]["bias"]), 0)
            scores.append((h @ np.asarray(w["out"]["kernel"]) + np.asarray(w["out"]["bias"]))[0])
        for r, k in enumerate(sizes[b]):
            e = np.exp([0.0, *scores[:k]])
            mean = (e[0] * q[b] + sum(e[1 + j] * p[b, j] for j in range(k))) / e.sum()
            np.testing.assert_allclose(got[b, r], 7 * mean / np.linalg.norm(mean), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got[1, 1], 7 * q[1] / np.linalg.norm(q[1]), rtol=1e-5)  # no feedback: the query
