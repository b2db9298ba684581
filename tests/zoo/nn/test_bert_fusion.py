"""BERT as a fusion encoder, its cross-attention shown, its decoder with a cache; greedy and beam search."""

import dataclasses
import itertools
from pathlib import Path

import golden_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.nn.attention import MultiHeadAttention, attention, attention_probabilities
from zoo.nn.bert import BERT, BERTConfig
from zoo.nn.partitioning import unbox
from zoo.nn.seq2seq import beam_search, greedy

GOLDEN = np.load(Path(__file__).resolve().parents[2] / "golden" / "gear_reference.npz")
TINY = BERTConfig(vocab_size=11, width=8, depth=2, num_heads=2, mlp_width=12, max_positions=9, token_types=0)
ENCODER = dataclasses.replace(TINY, cross_attention=True)
DECODER = dataclasses.replace(TINY, cross_attention=True, causal=True, head="mlm")
IDS = jnp.array([[3, 4, 5, 6], [7, 8, 9, 0]], jnp.int32)
REAL = jnp.array([[True] * 4, [True] * 3 + [False]])
CONTEXT = jax.random.normal(jax.random.key(3), (2, 5, 8))
SEEN = jnp.array([[True] * 5, [True, True, True, False, False]])


def made(config):
    module = BERT(config)
    variables = unbox(jax.jit(module.init)(jax.random.key(0), IDS, context=CONTEXT))
    # nothing keeps a value that hides a lost weight
    noise = lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape)  # noqa: E731
    return module, jax.tree.map(noise, variables)


@pytest.fixture(scope="module")
def encoder():
    return made(ENCODER)


@pytest.fixture(scope="module")
def decoder():
    return made(DECODER)


@pytest.fixture(scope="module")
def library():
    """The library's decoder, and its weights without causality: its layers as a fusion encoder."""
    case = golden_cases.load("bert_decoder")
    config = dataclasses.replace(case.module.config, causal=False, head="none")
    return case.module, BERT(config), case.variables


def test_fusion_and_its_attention_equal_the_librarys_layers(library):
    decoder, fusion, variables = library
    g = {k: jnp.asarray(GOLDEN[k]) for k in GOLDEN.files}
    read = {"context": g["context"], "context_padding_mask": g["context_mask"]}
    found = fusion.apply(variables, g["ids"], g["query_mask"], **read, probabilities_of=0)
    real = np.asarray(g["query_mask"])
    np.testing.assert_allclose(np.asarray(found["tokens"])[real], np.asarray(g["fused"])[real], atol=1e-4)
    shown = np.moveaxis(np.asarray(found["probabilities"]), 1, 2)[real]
    np.testing.assert_allclose(shown, np.moveaxis(np.asarray(g["fused_cross"]), 1, 2)[real], atol=1e-5)
    found = decoder.apply(variables, g["ids"], **read, probabilities_of=1)
    np.testing.assert_allclose(found["logits"], g["decoder_logits"], atol=1e-4)
    np.testing.assert_allclose(found["probabilities"], g["decoder_cross"], atol=1e-5)


def test_a_cache_gives_the_librarys_logits_token_by_token(library):
    module, _, variables = library
    g = {k: jnp.asarray(GOLDEN[k]) for k in ("context", "context_mask", "ids", "decoder_logits")}
    params = unbox(variables["params"])
    cache = module.init_cache(params, g["context"], g["context_mask"], 7)
    assert cache["context_key"].shape == (2, 3, 5, 3, 8) and cache["key"].shape == (2, 3, 7, 3, 8)
    step = jax.jit(lambda cache, ids: module.apply(variables, ids, cache=cache))
    for t in range(6):
        found = step(cache, g["ids"][:, t : t + 1])
        cache = found["cache"]
        np.testing.assert_allclose(found["logits"][:, 0], g["decoder_logits"][:, t], atol=1e-4)
    assert int(cache["index"]) == 6
    # two at a time
    cache = module.init_cache(params, g["context"], g["context_mask"], 6)
    for t in (0, 2, 4):
        found = module.apply(variables, g["ids"][:, t : t + 2], cache=cache)
        cache = found["cache"]
        np.testing.assert_allclose(found["logits"], g["decoder_logits"][:, t : t + 2], atol=1e-4)


def test_without_a_context_the_fusion_encoder_is_the_encoder(encoder):
    module, variables = encoder
    plain = jax.tree.map(lambda x: x, variables["params"])
    for i in range(2):
        plain[f"layer{i}"] = {k: v for k, v in plain[f"layer{i}"].items() if not k.startswith("cross")}
    alone = BERT(TINY).apply({"params": plain}, IDS, REAL)["tokens"]
    np.testing.assert_array_equal(module.apply(variables, IDS, REAL)["tokens"], alone)
    fused = module.apply(variables, IDS, REAL, context=CONTEXT, context_padding_mask=SEEN)["tokens"]
    assert np.abs(np.asarray(fused - alone)[np.asarray(REAL)]).min() > 1e-4
    # both directions: the first token sees the last
    other = module.apply(variables, IDS.at[0, 3].set(1), REAL, context=CONTEXT)["tokens"]
    assert np.abs(np.asarray(other - module.apply(variables, IDS, REAL, context=CONTEXT)["tokens"])[0, 0]).max() > 1e-5


def test_probabilities_are_one_blocks_and_sum_to_one_over_the_real_context(encoder):
    module, variables = encoder
    run = lambda b: module.apply(variables, IDS, REAL, context=CONTEXT, context_padding_mask=SEEN, probabilities_of=b)  # noqa: E731
    first, last = run(0)["probabilities"], run(1)["probabilities"]
    for shown in (first, last):
        assert shown.shape == (2, 2, 4, 5) and shown.dtype == jnp.float32
        np.testing.assert_allclose(jnp.sum(shown, -1), jnp.ones((2, 2, 4)), rtol=1e-5)
        assert not np.asarray(shown)[1, :, :, 3:].any() and np.asarray(shown)[0].min() > 0
    assert np.abs(np.asarray(first - last)).max() > 1e-3
    again = dataclasses.replace(module, remat=True)
    found = again.apply(variables, IDS, REAL, context=CONTEXT, context_padding_mask=SEEN, probabilities_of=1)
    np.testing.assert_allclose(found["probabilities"], last, rtol=1e-5)


def test_probabilities_are_what_attention_weighs_by():
    q, k, v = (jax.random.normal(jax.random.key(i), (2, n, 3, 4)) for i, n in enumerate((3, 5, 5)))
    mask = (jnp.arange(5) < jnp.array([[5], [3]]))[:, None, None, :]
    for options in ({}, {"mask": mask}, {"mask": mask, "causal": True}, {"scale": 0.3}):
        weights = attention_probabilities(q, k, **options)
        np.testing.assert_allclose(jnp.einsum("bnts,bsnd->btnd", weights, v), attention(q, k, v, **options), atol=1e-5)
    np.testing.assert_array_equal(attention_probabilities(q, k, jnp.zeros((1, 1, 1, 5), bool)), jnp.zeros((2, 3, 3, 5)))


def test_the_module_reads_and_writes_a_cache():
    module = MultiHeadAttention(2)
    variables = unbox(module.init(jax.random.key(0), CONTEXT))
    x = CONTEXT[:, :2]
    y, found = module.apply(variables, x, CONTEXT, probabilities=True)
    np.testing.assert_array_equal(y, module.apply(variables, x, CONTEXT))
    key, value = found["cache"]
    assert key.shape == value.shape == (2, 5, 2, 4)
    np.testing.assert_allclose(module.apply(variables, x, cache=(key, value))[0], y, atol=1e-6)
    empty = jnp.zeros((2, 4, 2, 4))
    _, found = module.apply(variables, x, cache=(empty, empty), index=jnp.int32(1))
    np.testing.assert_allclose(found["cache"][0][:, 1:3], key[:, :2], atol=1e-6)
    np.testing.assert_allclose(found["cache"][1][:, 1:3], value[:, :2], atol=1e-6)
    assert not np.asarray(found["cache"][0])[:, [0, 3]].any()


def test_impossible_calls_are_named(encoder, decoder):
    module, variables = encoder
    for block, context in ((2, CONTEXT), (-1, CONTEXT), (0, None)):
        with pytest.raises(ValueError, match=f"probabilities_of = {block} needs a context and one of the 2 blocks"):
            module.apply(variables, IDS, context=context, probabilities_of=block)
    module, variables = decoder
    cache = module.init_cache(variables["params"], CONTEXT, None, 3)
    assert bool(cache["context_mask"].all())
    with pytest.raises(ValueError, match="a cache is for a decoder"):
        BERT(ENCODER).apply(variables, IDS, cache=cache)
    with pytest.raises(ValueError, match="a cache is for a decoder"):
        BERT(dataclasses.replace(DECODER, pad_id=1)).apply(variables, IDS, cache=cache)
    with pytest.raises(ValueError, match="a cache of 10 tokens, but there are positions for 9"):
        module.init_cache(variables["params"], CONTEXT, None, 10)
    with pytest.raises(ValueError, match="set config.cross_attention=True"):
        BERT(TINY).init_cache(variables["params"], CONTEXT, None, 3)


# --- greedy and beams on a table of conditional probabilities ---------------------------------------------------------

V, STOP, LENGTH = 4, 0, 3
TABLE = jnp.asarray(np.random.default_rng(5).normal(size=(2, V + 1, V, V)) * 1.5, jnp.float32)


def step(cache, ids):
    """Logits by (example, last but one, last): the cache holds the example and the token before."""
    logits = TABLE[cache["example"], jnp.where(cache["at"] == 0, V, cache["before"]), ids]
    return logits, {**cache, "before": ids, "at": cache["at"] + 1}


def cache_for(beams):
    example = jnp.repeat(jnp.arange(2), beams)
    return {"example": example, "before": jnp.zeros_like(example), "at": jnp.int32(0)}


def move(cache, rows):
    return {**cache, "before": cache["before"][rows]}


def log_probability(example, tokens, start):
    """Of a continuation, up to and with its stop."""
    before, last, total, table = V, start, 0.0, np.asarray(TABLE, np.float64)
    for token in tokens:
        row = table[example, before, last]
        total += row[token] - np.log(np.exp(row).sum())
        before, last = last, token
        if token == STOP:
            break
    return total


def test_greedy_is_the_step_by_step_argmax_and_stops():
    start = jnp.array([1, 3], jnp.int32)
    found = np.asarray(jax.jit(lambda c: greedy(step, c, start, 5, STOP))(cache_for(1)))
    for example in range(2):
        before, last, expected = V, int(start[example]), []
        while len(expected) < 5:
            token = int(np.argmax(TABLE[example, before, last]))
            before, last = last, token
            expected.append(token)
            if token == STOP:
                expected += [STOP] * (5 - len(expected))
        assert found[example].tolist() == expected
    with pytest.raises(ValueError, match="length must be at least 1"):
        greedy(step, cache_for(1), start, 0, STOP)


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_as_many_beams_as_continuations_find_the_best(penalty):
    start = jnp.array([1, 3], jnp.int32)
    beams = V**LENGTH
    run = jax.jit(lambda c: beam_search(step, c, start, LENGTH, STOP, beams, move, penalty))
    found, score = run(cache_for(beams))
    for example in range(2):
        every = {}
        for tokens in itertools.product(range(V), repeat=LENGTH):
            cut = tokens[: tokens.index(STOP) + 1] if STOP in tokens else tokens
            every[cut] = log_probability(example, cut, int(start[example])) / len(cut) ** penalty
        best = max(every, key=every.get)
        assert tuple(np.asarray(found[example]).tolist()) == best + (STOP,) * (LENGTH - len(best))
        np.testing.assert_allclose(score[example], every[best], rtol=1e-4)


def test_few_beams_equal_the_definition():
    start, beams, penalty = jnp.array([2, 1], jnp.int32), 2, 0.7
    found, score = beam_search(step, cache_for(beams), start, 5, STOP, beams, move, penalty)
    for example in range(2):
        kept = [((), 0.0)]
        for _ in range(5):
            longer = []
            for tokens, total in kept:
                if STOP in tokens:
                    longer.append((tokens, total))
                    continue
                for t in range(V):
                    own = (*tokens, t)
                    longer.append((own, log_probability(example, own, int(start[example]))))
            kept = sorted(longer, key=lambda x: -x[1])[:beams]
        tokens, total = max(kept, key=lambda x: x[1] / len(x[0]) ** penalty)
        assert tuple(np.asarray(found[example]).tolist()) == tokens + (STOP,) * (5 - len(tokens))
        np.testing.assert_allclose(score[example], total / len(tokens) ** penalty, rtol=1e-4)
    one = beam_search(step, cache_for(1), start, 5, STOP, 1, move)[0]
    np.testing.assert_array_equal(one, greedy(step, cache_for(1), start, 5, STOP))
    with pytest.raises(ValueError, match="beams must be at least 1"):
        beam_search(step, cache_for(1), start, 5, STOP, 0, move)
