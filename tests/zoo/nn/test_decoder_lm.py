"""DecoderLM against transformers (golden cases), against itself with a cache, and on a mesh."""

import dataclasses
import functools
import gzip
import json
import math

import golden_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import PartitionSpec as P

from checkpoints.importers import engine
from zoo.nn.decoder_lm import PRESETS, DecoderConfig, DecoderLM
from zoo.nn.generation import generate
from zoo.nn.partitioning import abstract_variables, axis_names, shardings, unbox
from zoo.nn.rotary import rotary_frequencies, rotary_tables, rotate

CASES = [
    "gpt2_hub", "gpt2_prefixed", "gpt2_square_untied", "opt_pre", "opt_post", "opt_square_untied", "llama_grouped",
    "llama_square", "llama_biased_tied_linear", "llama_llama3", "llama_headless", "mistral_window", "mistral_square",
    "phi_partial", "phi_square_normed", "phi3_fused", "phi3_square_tied", "qwen2_tied", "qwen2_square_window",
    "qwen3_normed", "qwen3_square_biased",
]  # fmt: skip
CACHED = ["gpt2_hub", "opt_post", "llama_llama3", "mistral_window", "phi_partial", "phi3_fused", "qwen2_tied",
          "qwen3_normed"]  # fmt: skip
KEYS = [
    "gpt2", "gpt2-xl", "opt-125m", "opt-350m", "opt-1.3b", "llama-7b", "llama-2-70b", "llama-3-8b", "llama-3.1-8b",
    "mistral-7b", "phi-2", "phi-3-mini-4k", "qwen2-0.5b", "qwen3-0.6b",
]  # fmt: skip
SMALL = DecoderConfig(
    vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, mlp_dim=48, positions="rotary",
    norm="rms", gated=True, activation="silu", head="untied", dropout=0.1, embedding_dropout=0.1, attention_dropout=0.1,
)  # fmt: skip


def features(out):
    named = {"last": out.last_hidden_state, "stream": out.hidden_states, "logits": out.logits}
    return {k: v for k, v in named.items() if v is not None}


@functools.partial(jax.jit, static_argnums=0, static_argnames=("train", "hidden_states"))
def apply(module, variables, ids=None, padding_mask=None, **options):
    return module.apply(variables, ids, padding_mask, **options)


continued = jax.jit(generate, static_argnums=(0, 3), static_argnames=("stop", "temperature"))


@functools.cache
def variables_of(config=SMALL, seed=0):
    """Random weights, none at 0 or 1."""
    module = DecoderLM(config)
    shapes = unbox(abstract_variables(module))
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    made = [
        jax.random.normal(k, x.shape) * (0.3 if len(x.shape) < 3 else 0.15) for k, x in zip(keys, leaves, strict=True)
    ]
    return module, jax.tree.unflatten(tree, made)


def some_ids(batch=2, length=9, vocab=64, seed=1):
    return jnp.asarray(np.random.default_rng(seed).integers(0, vocab, (batch, length)))


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name):
    case = golden_cases.load(name)
    given = case.inputs
    calls = {
        "plain": {"ids": given["ids"]},
        "short": {"ids": given["ids"][:, :5]},
        "left": {"ids": given["ids"], "padding_mask": given["left"]},
        "right": {"ids": given["ids"], "padding_mask": given["right"]},
        "embeddings": {"embeddings": given["embeddings"], "padding_mask": given["left"]},
    }  # the call with padding on the left is made in training mode, which without keys is no different

    @jax.jit
    def run(variables, calls):
        apply = functools.partial(case.module.apply, variables, hidden_states=True)
        return {k: features(apply(**call, train=k == "left")) for k, call in calls.items()}

    ours = run(case.variables, calls)
    ours["train"], calls["train"] = ours["left"], calls["left"]
    assert set(case.outputs) >= {"plain.stream", "left.stream", "short.last", "embeddings.last", "right.last"}
    for key, reference in case.outputs.items():
        call, feature = key.split(".")
        found, mask = ours[call][feature], calls[call].get("padding_mask")
        if mask is not None:
            mask = np.broadcast_to(mask, found.shape[:-1])
            found, reference = np.asarray(found)[mask], reference[mask]
        golden_cases.close(found, reference)


@pytest.mark.parametrize("name", CACHED)
def test_a_cache_gives_what_the_whole_sequence_gives(name):
    case = golden_cases.load(name)
    module, ids = case.module, jnp.asarray(case.inputs["ids"])

    @jax.jit
    def stepwise(variables, ids, mask):
        first = 3
        out = apply(module, variables, ids[:, :first], mask[:, :first], cache=module.init_cache(*ids.shape))

        def step(cache, token):
            one = module.apply(variables, token[0][:, None], token[1][:, None], cache=cache)
            return one.cache, one.logits[:, 0]

        cache, rest = jax.lax.scan(step, out.cache, (ids[:, first:].T, mask[:, first:].T))
        return jnp.concatenate([out.logits, rest.swapaxes(0, 1)], axis=1), cache

    for side in ("left", "right"):
        mask = jnp.asarray(case.inputs[side])
        cached, cache = stepwise(case.variables, ids, mask)
        golden_cases.close(np.asarray(cached)[mask], case.outputs[f"{side}.logits"][mask])
        assert int(cache.index) == ids.shape[1]
        np.testing.assert_array_equal(cache.mask, mask)


def test_generation_takes_the_likeliest_token_each_time_whatever_the_padding():
    module, variables = variables_of(seed=2)
    prompt = some_ids(2, 5)
    sequence = jnp.pad(prompt, ((0, 0), (0, 4)))
    for last in range(4, 8):  # what stands behind a token has no say in what follows it
        sequence = sequence.at[:, last + 1].set(jnp.argmax(apply(module, variables, sequence).logits[:, last], -1))
    np.testing.assert_array_equal(continued(module, variables, prompt, 4), sequence[:, 5:])
    pad = jnp.full((2, 3), 7, prompt.dtype)
    real, none = jnp.ones((2, 5), bool), jnp.zeros((2, 3), bool)
    left = continued(module, variables, jnp.concatenate([pad, prompt], 1), 4, jnp.concatenate([none, real], 1))
    right = continued(module, variables, jnp.concatenate([prompt, pad], 1), 4, jnp.concatenate([real, none], 1))
    np.testing.assert_array_equal(left, sequence[:, 5:])
    np.testing.assert_array_equal(right, sequence[:, 5:])
    assert len(np.unique(right)) > 2  # a model that repeats one token would show nothing


def test_sampling_depends_on_each_row_s_own_key_and_stops():
    module, variables = variables_of()
    prompt = jnp.tile(some_ids(1, 4), (3, 1))
    keys = jax.random.split(jax.random.key(3), 2)
    drawn = continued(module, variables, prompt, 4, keys=jnp.stack([keys[0], keys[1], keys[0]]), temperature=2.0)
    np.testing.assert_array_equal(drawn[0], drawn[2])
    assert (drawn[0] != drawn[1]).any()
    alone = continued(module, variables, prompt[:1], 4, keys=keys[:1], temperature=2.0)
    np.testing.assert_array_equal(alone[0], drawn[0])
    cold = continued(module, variables, prompt, 4, keys=jax.random.split(keys[0], 3), temperature=1e-4)
    stopped = np.asarray(continued(module, variables, prompt, 4, stop=int(cold[0, 1])))  # the likeliest tokens
    np.testing.assert_array_equal(stopped[:, :2], cold[:, :2])
    assert (stopped[:, 1:] == cold[0, 1]).all()
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        generate(module, variables, prompt, 0)
    with pytest.raises(ValueError, match="temperature must be above 0, got 0"):
        generate(module, variables, prompt, 1, temperature=0.0)


def test_a_full_cache_gives_nan_not_wrong_numbers():
    module, variables = variables_of()
    out = apply(module, variables, some_ids(2, 4), cache=module.init_cache(2, 5))
    out = apply(module, variables, some_ids(2, 1), cache=out.cache)
    assert np.isfinite(out.logits).all()
    assert np.isnan(apply(module, variables, some_ids(2, 1), cache=out.cache).logits).all()
    with pytest.raises(ValueError, match="6 tokens, but the cache's length is 5"):
        apply(module, variables, some_ids(2, 6), cache=module.init_cache(2, 5))


@pytest.mark.parametrize("name", ["llama_grouped", "gpt2_hub"])
def test_on_eight_devices_by_fsdp_and_tensor_logits_are_the_same(name):
    case = golden_cases.load(name)
    mesh = jax.make_mesh((1, 4, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    places = shardings(abstract_variables(case.module), mesh)
    flat = traverse_util.flatten_dict(case.variables, sep="/")
    placed = {path: jax.device_put(x, places[path]) for path, x in flat.items()}
    assert placed["params/layers/query/kernel"].sharding.spec == P(None, "fsdp", "tensor")
    assert placed["params/layers/down/kernel"].sharding.spec == P(None, "tensor", "fsdp")
    part = placed["params/layers/out/kernel"].addressable_shards[0].data
    assert part.size * 8 == flat["params/layers/out/kernel"].size
    run = jax.jit(case.module.apply)
    alone = run(case.variables, case.inputs["ids"], case.inputs["left"]).logits
    spread = run(traverse_util.unflatten_dict(placed, sep="/"), case.inputs["ids"], case.inputs["left"]).logits
    golden_cases.close(np.asarray(spread)[case.inputs["left"]], np.asarray(alone)[case.inputs["left"]])


def test_every_matrix_has_axis_names_and_layers_lead():
    for name in ("gpt2", "opt-350m", "phi-2", "qwen3-0.6b"):
        abstract = abstract_variables(DecoderLM(PRESETS[name]))
        named = axis_names(abstract)
        flat = traverse_util.flatten_dict(unbox(abstract), sep="/")
        for path, leaf in flat.items():
            layered = path.startswith("params/layers/")
            if leaf.ndim - layered >= 2:
                assert (named[path][0] == "layers") == layered
                assert len(named[path]) == leaf.ndim


def test_programs_do_not_grow_with_depth():
    sizes = []
    for layers in (2, 8):
        module = DecoderLM(dataclasses.replace(SMALL, num_layers=layers))
        shapes = unbox(abstract_variables(module))
        keys = jax.random.split(jax.random.key(0), 2)

        def loss(variables, ids, keys, module=module):
            return apply(module, variables, ids, train=True, keys=keys).logits.sum()

        sizes.append(len(jax.jit(jax.grad(loss)).lower(shapes, some_ids(), keys).as_text()))
    assert abs(sizes[1] - sizes[0]) < 0.01 * sizes[0]  # sizes are written in digits


def test_rematerialisation_changes_neither_outputs_nor_gradients():
    module, variables = variables_of()
    ids = some_ids()

    def loss(variables, remat):
        out = module.clone(remat=remat).apply(variables, ids, keys=jax.random.split(jax.random.key(0), 2))
        return jnp.mean(jax.nn.log_softmax(out.logits)[..., 0] ** 2)

    kept, again = (jax.jit(jax.value_and_grad(functools.partial(loss, remat=r)))(variables) for r in (False, True))
    golden_cases.close(again[0], kept[0], 1e-6)
    for x, y in zip(jax.tree.leaves(again[1]), jax.tree.leaves(kept[1]), strict=True):
        golden_cases.close(x, y)
    text = str(jax.make_jaxpr(jax.grad(functools.partial(loss, remat=True)))(variables))
    assert "remat" in text or "checkpoint" in text


@pytest.mark.parametrize("name", ["qwen3_square_biased", "phi_partial", "opt_post"])
def test_gradients_reach_every_parameter(name):
    case = golden_cases.load(name)
    ids, mask = case.inputs["ids"], case.inputs["left"]
    vocabulary = case.module.config.vocab_size
    every = np.resize(np.arange(vocabulary), (vocabulary + 9) // 10 * 10).reshape(-1, 10)
    ids, mask = jnp.concatenate([ids, every]), jnp.concatenate([mask, np.ones_like(every, bool)])

    def loss(variables):
        logits = case.module.apply(variables, ids, mask).logits
        return -jnp.mean(jax.nn.log_softmax(logits)[..., 3])

    grads = jax.jit(jax.grad(loss))(case.variables)
    for path, grad in traverse_util.flatten_dict(grads, sep="/").items():
        assert np.isfinite(grad).all(), path
        if case.module.config.positions == "rotary" or not path.endswith("key/bias"):
            # softmax does not see what is added to all scores of a query, so learned positions leave key biases alone
            per_layer = np.abs(grad).reshape(grad.shape[0], -1).max(1) if "/layers/" in path else np.abs(grad).max()
            assert (per_layer > 1e-9).all(), path


def test_bfloat16_is_near_and_logits_stay_float32():
    case = golden_cases.load("llama_grouped")
    half = case.module.clone(dtype=jnp.bfloat16)
    ids, mask = case.inputs["ids"], case.inputs["right"]
    out = apply(half, case.variables, ids, mask, cache=half.init_cache(*ids.shape))
    assert out.logits.dtype == jnp.float32
    assert out.last_hidden_state.dtype == out.cache.key.dtype == jnp.bfloat16
    golden_cases.close(np.asarray(out.logits)[mask], case.outputs["right.logits"][mask], 0.05)
    stored = unbox(abstract_variables(half.clone(param_dtype=jnp.bfloat16)))
    assert {x.dtype for x in jax.tree.leaves(stored)} == {jnp.dtype(jnp.bfloat16)}


def test_dropout_follows_each_example_s_key():
    module, variables = variables_of()
    keys = jax.random.split(jax.random.key(0), 3)
    ids = jnp.tile(some_ids(1), (3, 1))
    run = jax.jit(lambda ids, keys: apply(module, variables, ids, train=True, keys=keys, hidden_states=True))
    out = run(ids, keys[jnp.array([0, 1, 0])])
    np.testing.assert_array_equal(out.logits[0], out.logits[2])
    assert (out.logits[0] != out.logits[1]).any()
    golden_cases.close(run(ids[1:], keys[1:]).logits[0], out.logits[1])
    assert (apply(module, variables, ids, train=True).logits == apply(module, variables, ids).logits).all()
    # each of the three rates acts by itself, and not in the same place in both layers
    for rate in ("dropout", "embedding_dropout", "attention_dropout"):
        rates = {"dropout": 0.0, "embedding_dropout": 0.0, "attention_dropout": 0.0, rate: 0.5}
        one = apply(DecoderLM(dataclasses.replace(SMALL, **rates)), variables, ids, keys=keys)
        assert (one.logits != apply(module, variables, ids).logits).any(), rate
    assert ((out.hidden_states[0, 0] == 0).mean() > 0.02) and ((out.hidden_states[1, 0] == 0).mean() < 0.01)


def test_layers_draw_different_dropout_masks():
    layers = dataclasses.replace(SMALL, embedding_dropout=0.0, attention_dropout=0.0, dropout=0.5)
    module, variables = variables_of(layers)
    same = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), variables["params"]["layers"])
    zeros = jax.tree.map(jnp.zeros_like, {k: same[k] for k in ("down", "out")})
    zeros["down"]["bias"] = zeros["down"]["bias"] + 1
    silent = same | zeros
    variables = {"params": variables["params"] | {"layers": silent}}
    out = apply(module, variables, some_ids(), keys=jax.random.split(jax.random.key(0), 2), hidden_states=True)
    first, second = jnp.diff(out.hidden_states, axis=0)
    assert set(np.unique(np.round(first, 3))) == {0.0, 2.0}
    assert 0.3 < ((first > 1) != (second > 1)).mean() < 0.7


@pytest.mark.parametrize("name", ["gpt2_hub", "mistral_window"])
def test_more_padding_changes_nothing(name):
    case = golden_cases.load(name)
    ids, mask = case.inputs["ids"], case.inputs["right"]
    more = [np.pad(ids, ((0, 0), p), constant_values=3) for p in ((4, 0), (0, 5), (2, 3))]
    masks = [np.pad(mask, ((0, 0), p)) for p in ((4, 0), (0, 5), (2, 3))]
    for padded, padding in zip(more, masks, strict=True):
        logits = apply(case.module, case.variables, padded, padding).logits
        golden_cases.close(np.asarray(logits)[padding], case.outputs["right.logits"][mask])


def test_a_window_hides_what_lies_before_it():
    module, variables = variables_of(dataclasses.replace(SMALL, window=3, num_layers=1))
    ids = some_ids()
    other = ids.at[:, 4].set((ids[:, 4] + 1) % 64)
    changed = (apply(module, variables, ids).logits != apply(module, variables, other).logits).any((0, 2))
    np.testing.assert_array_equal(np.flatnonzero(changed), [4, 5, 6])


def test_rotary_rescalings_are_their_definitions():
    plain = rotary_frequencies(16, 500.0)
    np.testing.assert_allclose(plain, [500.0 ** (-2 * k / 16) for k in range(8)], rtol=1e-6)
    np.testing.assert_allclose(rotary_frequencies(16, 500.0, "linear", 4.0), plain / 4, rtol=1e-6)
    scaled = rotary_frequencies(16, 500.0, "llama3", 8.0, 1.0, 4.0, 32)
    for old, new in zip(plain, scaled, strict=True):
        length = 2 * math.pi / old
        smooth = (32 / length - 1.0) / (4.0 - 1.0)
        expected = old if length < 8 else old / 8 if length > 32 else (1 - smooth) * old / 8 + smooth * old
        assert new == pytest.approx(expected, rel=1e-6)
    kinds = np.select([scaled == plain, np.isclose(scaled, plain / 8)], [0, 2], 1)
    assert set(kinds) == {0, 1, 2}
    # a rotation keeps lengths, and inner products depend on the distance only
    x = jax.random.normal(jax.random.key(0), (1, 1, 1, 20))
    turned = [rotate(x, *rotary_tables(jnp.array([[p]]), plain)) for p in (0, 3, 40)]
    np.testing.assert_array_equal(turned[0], x)
    np.testing.assert_array_equal(turned[2][..., 16:], x[..., 16:])
    for y in turned:
        assert float(jnp.linalg.norm(y)) == pytest.approx(float(jnp.linalg.norm(x)), rel=1e-6)
    far = rotate(x, *rotary_tables(jnp.array([[43]]), plain))
    assert float(jnp.sum(far * turned[2])) == pytest.approx(float(jnp.sum(turned[1] * turned[0])), rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_heads": 5}, "num_heads = 5 does not divide hidden_size 768"),
        ({"num_kv_heads": 5}, "num_kv_heads = 5 must divide num_heads 12"),
        ({"num_kv_heads": 0}, "num_kv_heads = 0"),
        ({"positions": "alibi"}, "positions must be one of learned, rotary, got 'alibi'"),
        ({"norm": "batch"}, "norm must be one of layer, rms, got 'batch'"),
        ({"block": "sandwich"}, "block must be one of pre, post, parallel"),
        ({"activation": "tanh"}, "activation must be one of gelu, gelu_tanh, relu, silu"),
        ({"head": "both"}, "head must be one of tied, untied, none"),
        ({"rope_scaling": "yarn"}, "rope_scaling must be one of default, linear, llama3"),
        ({"window": 0}, "window must be at least 1"),
        ({"head_bias": True}, "head_bias needs head = 'untied'"),
        ({"positions": "rotary", "rotary_fraction": 0.05}, "rotary_fraction = 0.05 rotates 3 of 64"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        DecoderConfig(**changes)


def test_calls_that_make_no_sense_are_refused():
    module, variables = variables_of(dataclasses.replace(SMALL, positions="learned", max_positions=8))
    with pytest.raises(ValueError, match="got neither"):
        module.apply(variables)
    with pytest.raises(ValueError, match="got both"):
        apply(module, variables, some_ids(2, 3), embeddings=jnp.zeros((2, 3, 32)))
    with pytest.raises(ValueError, match="embeddings are 31 wide, but embedding_dim = 32"):
        apply(module, variables, embeddings=jnp.zeros((2, 3, 31)))
    with pytest.raises(ValueError, match="9 tokens, but max_positions = 8"):
        apply(module, variables, some_ids(2, 9))
    with pytest.raises(ValueError, match="dim must be a positive even number"):
        rotary_frequencies(7)
    with pytest.raises(ValueError, match="scaling must be one of"):
        rotary_frequencies(8, scaling="dynamic")


@pytest.mark.parametrize("name", CASES)
def test_export_is_the_import_backwards(name):
    case = golden_cases.load(name)
    back = engine.export_tensors(case.imported)
    assert list(back) == list(case.tensors)
    for key, value in case.tensors.items():
        np.testing.assert_array_equal(back[key], value)
        assert back[key].dtype == value.dtype
    # a file for a model that was never imported: the reference's names, and a config that describes the same module
    layout = case.imported.layout
    fresh = engine.export_tensors(layout.name, case.module, case.variables)
    once = engine.import_tensors(fresh, layout.to_config(case.module))
    assert (once.layout, once.module) == (layout, case.module)
    jax.tree.map(np.testing.assert_array_equal, once.variables, case.variables)
    if name in ("gpt2_prefixed", "llama_square", "opt_pre", "phi3_fused"):
        assert set(fresh) == set(case.tensors)


@pytest.mark.parametrize("name", KEYS)
def test_published_key_lists_are_the_presets(name):
    said = json.loads(gzip.decompress((golden_cases.FOLDER.parent / "keys" / f"{name}.json.gz").read_bytes()))
    shapes = {k: jax.ShapeDtypeStruct(tuple(v), jnp.float32) for k, v in said["keys"].items()}
    layout, _, names = engine.identify(said["config"], shapes, None)
    short = {s: shapes[n] for s, n in names.items()}
    module = layout.configure(said["config"], short)
    ours, theirs = PRESETS[name], module.config
    still = {"dropout": 0.0, "embedding_dropout": 0.0, "attention_dropout": 0.0}
    assert ours == dataclasses.replace(theirs, **still)
    found = engine.plan(layout, module, short)
    assert not (found.missing or found.unused or found.mismatched)
    total = sum(x.size for x in jax.tree.leaves(unbox(abstract_variables(DecoderLM(ours)))))
    assert total == said["total"]


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("gpt2_hub", {"scale_attn_weights": False}, "scale_attn_weights = False"),
        ("gpt2_hub", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        ("gpt2_hub", {"add_cross_attention": True}, "add_cross_attention = True"),
        ("gpt2_hub", {"activation_function": "mish"}, "activation_function = 'mish'"),
        ("gpt2_hub", {"architectures": ["GPT2DoubleHeadsModel"]}, "GPT2DoubleHeadsModel"),
        ("gpt2_hub", {"architectures": ["GPT2Model"]}, None),
        ("gpt2_hub", {"architectures": ["GPT2ForSequenceClassification"]}, "GPT2ForSequenceClassification"),
        ("gpt2_hub", {"n_layer": 4}, "the config says 4 layers, but the weights have 3"),
        ("opt_pre", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine = False"),
        ("opt_pre", {"layerdrop": 0.1}, "layerdrop = 0.1"),
        ("llama_grouped", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type = 'yarn'"),
        ("llama_grouped", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type = 'dynamic'"),
        ("llama_grouped", {"partial_rotary_factor": 0.5}, "rotary_fraction = 0.5"),
        ("llama_grouped", {"sliding_window": 4}, "sliding_window = 4"),
        ("llama_grouped", {"hidden_act": "quick_gelu"}, "hidden_act = 'quick_gelu'"),
        ("llama_grouped", {"num_local_experts": 8}, "num_local_experts = 8"),
        ("llama_grouped", {"model_type": "gemma"}, "model_type = 'gemma'"),
        ("llama_grouped", {"quantization_config": {"bits": 4}}, "quantization_config"),
        (
            "qwen2_tied",
            {"layer_types": None, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
            "windows in some",
        ),
        ("phi_partial", {"tie_word_embeddings": True}, "tie_word_embeddings = True"),
        ("phi3_fused", {"rope_parameters": {"rope_type": "longrope"}}, "rope_type = 'longrope'"),
        ("phi3_fused", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling = 'linear'"),
    ],
)
def test_entries_that_are_not_implemented_are_refused_by_name(name, change, said):
    case = golden_cases.load(name)
    layout, shapes = case.imported.layout, {}
    if "n_layer" in change:
        shapes = engine.abstract_shapes(case.tensors)
    if said is None:  # a bare model among its kind is no reason to refuse
        layout.configure(case.config | change, shapes)
        return
    with pytest.raises(engine.ImporterError, match=said):
        layout.configure(case.config | change, shapes)


def test_without_a_config_only_what_is_certain_is_taken():
    tensors = golden_cases.load("llama_grouped").tensors
    with pytest.raises(engine.ImporterError, match="give config.json with --config FILE"):
        engine.import_tensors(tensors)
    with pytest.raises(engine.ImporterError, match="width 24 do not tell the number of heads"):
        engine.import_tensors(golden_cases.load("gpt2_hub").tensors)
    layout = engine.layouts()["hub-gpt2"]
    shapes = {"wte.weight": (50257, 1280), "wpe.weight": (1024, 1280)}
    shapes |= {f"h.{i}.ln_1.weight": (1280,) for i in range(36)}
    found = layout.configure(None, {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes.items()}).config
    assert (found.num_heads, found.num_layers, found.mlp_dim, found.max_positions) == (20, 36, 5120, 1024)


def test_a_module_that_a_family_cannot_express_is_not_exported_as_one():
    for layout, change, said in (
        (
            "hub-gpt2",
            {"norm_epsilon": 1e-3, "block": "post"},
            "block is 'post', a file in that layout would have 'pre'",
        ),
        ("hub-llama", {"positions": "rotary", "norm": "layer"}, "hub-llama"),
        ("hub-opt", {}, "position_offset"),
    ):
        module, variables = variables_of(DecoderConfig(num_layers=1, hidden_size=8, num_heads=2, mlp_dim=8, **change))
        with pytest.raises(engine.ImporterError, match=said):
            engine.export_tensors(layout, module, variables)
