"""Cross-encoders: how pairs are joined, both heads against BERT itself, dropout, and texts without their tags."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.text import Tokenizer
from zoo.nn.bert import BERT, BERTConfig
from zoo.nn.cross_encoder import CrossEncoder, check_tags, join_pairs

CONFIG = BERTConfig(40, 16, 1, 2, 24, 16, 2)
TAGS = (3, 4, 5)
QUERIES = jnp.asarray([[1, 3, 20, 4, 2, 0, 0], [1, 9, 3, 21, 22, 4, 2]])
ITEMS = jnp.asarray([[30, 5, 31, 2, 0], [32, 33, 5, 2, 0]])
PACKED = jnp.asarray([[1, 3, 20, 4, 2, 30, 5, 31, 2, 0, 0, 0], [1, 9, 3, 21, 22, 4, 2, 32, 33, 5, 2, 0]])
TYPES = jnp.asarray([[0, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 0]])


@pytest.fixture(scope="module", params=["cls", "emb"])
def model(request):
    module = CrossEncoder(CONFIG, request.param, TAGS)
    return module, module.init(jax.random.key(0), PACKED, TYPES)


def test_pairs_are_joined_with_their_types():
    ids, types = join_pairs(QUERIES, ITEMS)
    np.testing.assert_array_equal(ids[0], [1, 3, 20, 4, 2, 0, 0, 30, 5, 31, 2, 0])
    np.testing.assert_array_equal(types[0], [0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 0])
    _, other = join_pairs(QUERIES, jnp.where(ITEMS == 0, 9, ITEMS), pad_id=9)
    np.testing.assert_array_equal(other, types)


def test_padding_between_the_parts_changes_nothing(model):
    module, variables = model
    packed = module.apply(variables, PACKED, TYPES)
    apart = module.apply(variables, *join_pairs(QUERIES, ITEMS))
    for name in packed:
        np.testing.assert_allclose(apart[name], packed[name], atol=1e-5)


def test_scores_are_those_of_berts_states(model):
    module, variables = model
    cls = module.head == "cls"
    config = dataclasses.replace(CONFIG, head="cross" if cls else "none", pooler=cls)
    real = PACKED != 0
    out = BERT(config).apply({"params": variables["params"]["body"]}, PACKED, padding_mask=real, token_types=TYPES)
    found = module.apply(variables, PACKED, TYPES)
    if cls:
        pooled = np.asarray(out["pooled"])
        own = variables["params"]["body"]["classifier"]["out"]
        kernel, bias = (np.asarray(jax.tree.leaves(own[k])[0]) for k in ("kernel", "bias"))
        np.testing.assert_allclose(found["scores"], (pooled @ kernel + bias)[:, 0], atol=1e-5)
        assert set(found) == {"scores"}
        return
    states = np.asarray(out["tokens"])
    for i, (start, end, title) in enumerate([(1, 3, 6), (2, 5, 9)]):
        query = (states[i, start] + states[i, end]) / 2
        np.testing.assert_allclose(found["query"][i], query, atol=1e-5)
        np.testing.assert_allclose(found["item"][i], states[i, title], atol=1e-5)
        np.testing.assert_allclose(found["scores"][i], query @ states[i, title], atol=1e-4)
    np.testing.assert_allclose(found["scores"], np.sum(found["query"] * found["item"], -1), rtol=1e-5)
    assert "classifier" not in variables["params"]["body"] and "pooler" not in variables["params"]["body"]


def test_dropout_needs_training_and_keys(model):
    module, variables = model
    keys = jax.random.split(jax.random.key(1), 2)
    plain = module.apply(variables, PACKED, TYPES)["scores"]
    np.testing.assert_array_equal(module.apply(variables, PACKED, TYPES, False, keys)["scores"], plain)
    assert not np.allclose(module.apply(variables, PACKED, TYPES, True, keys)["scores"], plain)


def test_the_item_reads_the_query(model):
    module, variables = model
    if module.head == "cls":
        pytest.skip("only the other head has vectors")
    other = PACKED.at[0, 2].set(25)
    a, b = (np.asarray(module.apply(variables, x, TYPES)["item"]) for x in (PACKED, other))
    assert not np.allclose(a[0], b[0], atol=1e-4) and np.allclose(a[1], b[1], atol=1e-6)


def test_an_encoder_that_counts_positions_itself():
    config = BERTConfig(40, 16, 1, 2, 24, 20, 1, pad_id=1)
    module = CrossEncoder(config, "emb", TAGS, pad_id=1)
    query, item = jnp.asarray([[7, 3, 20, 4, 2, 1, 1]]), jnp.asarray([[30, 5, 31, 2, 1]])
    apart = join_pairs(query, item, 1)
    packed = (jnp.asarray([[7, 3, 20, 4, 2, 30, 5, 31, 2, 1, 1, 1]]), apart[1])
    variables = module.init(jax.random.key(0), *packed)
    np.testing.assert_allclose(
        module.apply(variables, *apart)["scores"], module.apply(variables, *packed)["scores"], atol=1e-5
    )


def test_a_tokenizers_packed_pairs_are_the_same():
    tokenizer = Tokenizer.train(["one two three", "four five"], 60)
    ids, types = tokenizer.encode_pairs(["one two"], ["four"], 6, 4)
    query = jnp.asarray(tokenizer.encode(["one two"], 6))
    item = jnp.asarray([[*tokenizer.ids("four"), tokenizer.sep]])
    joined = join_pairs(query, item, tokenizer.pad)
    module = CrossEncoder(BERTConfig(tokenizer.vocab_size, 16, 1, 2, 24, 16, 2), pad_id=tokenizer.pad)
    variables = module.init(jax.random.key(0), jnp.asarray(ids), jnp.asarray(types))
    np.testing.assert_allclose(
        module.apply(variables, *joined)["scores"],
        module.apply(variables, jnp.asarray(ids), jnp.asarray(types))["scores"], atol=1e-5,
    )  # fmt: skip


def test_texts_without_their_tags_are_refused():
    check_tags(ITEMS, {"title": 5})
    with pytest.raises(ValueError, match=r"item text must contain exactly one title tag, found 0 \(row 1\)"):
        check_tags(ITEMS.at[1, 2].set(30), {"title": 5})
    with pytest.raises(ValueError, match=r"query text must contain exactly one end tag, found 2 \(row 0\)"):
        check_tags(QUERIES.at[0, 1].set(4).at[0, 5].set(3), {"start": 3, "end": 4}, "query")
    with pytest.raises(ValueError, match=r"found 0 \(row 0\); the text has 9 tokens and is cut to 5"):
        check_tags(ITEMS.at[0, 1].set(30), {"title": 5}, "item", 5, [9, 4])
    with pytest.raises(ValueError, match=r"found 0 \(row 0\)$"):
        check_tags(ITEMS.at[0, 1].set(30), {"title": 5}, "item", 5, [5, 4])
    with pytest.raises(ValueError, match="head must be one of cls, emb, got 'dot'"):
        CrossEncoder(CONFIG, "dot")
    for tags in (None, (3, 3, 5)):
        with pytest.raises(ValueError, match="head 'emb' needs tags, three different ids"):
            CrossEncoder(CONFIG, "emb", tags)
