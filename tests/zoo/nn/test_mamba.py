"""Mamba against transformers (golden cases), against a loop, and against itself token by token."""

import dataclasses
import functools
import gzip
import json

import golden_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import PartitionSpec as P

from checkpoints.importers import engine
from zoo.nn.generation import generate
from zoo.nn.mamba import PRESETS, Mamba, MambaConfig, selective_scan
from zoo.nn.partitioning import abstract_variables, axis_names, shardings, unbox

CASES = ["mamba_tied", "mamba_biased_untied", "mamba_square", "mamba_headless", "mamba_original"]
KEYS = ["mamba-130m", "mamba-370m", "mamba-790m", "mamba-1.4b", "mamba-2.8b", "mamba-2.8b-original"]


@functools.partial(jax.jit, static_argnums=0, static_argnames=("hidden_states",))
def apply(module, variables, ids=None, padding_mask=None, **options):
    return module.apply(variables, ids, padding_mask, **options)


def rechunked(module, chunk):
    return module.clone(chunk=chunk)


def features(out):
    named = {"last": out.last_hidden_state, "stream": out.hidden_states, "logits": out.logits}
    return {k: v for k, v in named.items() if v is not None}


@pytest.mark.parametrize(("name", "chunk"), [*((name, 64) for name in CASES), ("mamba_tied", 4)])
def test_equals_the_reference(name, chunk):
    case = golden_cases.load(name)
    module, given = rechunked(case.module, chunk), case.inputs
    calls = {
        "plain": {"ids": given["ids"]},
        "short": {"ids": given["ids"][:, :5]},
        "left": {"ids": given["ids"], "padding_mask": given["left"]},
        "right": {"ids": given["ids"], "padding_mask": given["right"]},
        "embeddings": {"embeddings": given["embeddings"], "padding_mask": given["left"]},
    }  # the call with padding on the left is made in training mode, which is no different

    @jax.jit
    def run(variables, calls):
        named = {k: {"train": k == "left", **call} for k, call in calls.items()}
        return {k: features(module.apply(variables, hidden_states=True, **call)) for k, call in named.items()}

    ours = run(case.variables, calls)
    ours["train"] = ours["left"]
    for key, reference in case.outputs.items():
        call, feature = key.split(".")
        golden_cases.close(ours[call][feature], reference)  # at padding too: it means as little, but the same


@pytest.mark.parametrize(("length", "chunk"), [(7, 64), (7, 7), (8, 4), (10, 4), (5, 1)])
def test_the_scan_is_the_loop_of_its_definition(length, chunk):
    rng = np.random.default_rng(0)
    batch, channels, n = 2, 3, 4
    x, write, read = (rng.normal(size=(batch, length, k)).astype(np.float32) for k in (channels, n, n))
    step = rng.uniform(0.01, 1.5, (batch, length, channels)).astype(np.float32)
    decay = -rng.uniform(0.1, 4, (channels, n)).astype(np.float32)
    state = rng.normal(size=(batch, channels, n)).astype(np.float32)
    expected, h = np.zeros_like(x), state.astype(np.float64)
    for b in range(batch):
        for t in range(length):
            for c in range(channels):
                for k in range(n):
                    h[b, c, k] = (
                        np.exp(step[b, t, c] * decay[c, k]) * h[b, c, k] + step[b, t, c] * write[b, t, k] * x[b, t, c]
                    )
                expected[b, t, c] = np.dot(read[b, t], h[b, c])
    y, last = selective_scan(*map(jnp.asarray, (x, step, decay, write, read, state)), chunk=chunk)
    golden_cases.close(y, expected, 2e-6)
    golden_cases.close(last, h, 2e-6)


def test_memory_is_bounded_by_the_chunk_backwards_too():
    batch, channels, n = 1, 32, 16

    def temporaries(length, chunk):
        shapes = [(batch, length, channels)] * 2 + [(channels, n)] + [(batch, length, n)] * 2 + [(batch, channels, n)]
        arguments = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
        loss = lambda *a: selective_scan(*a, chunk=chunk)[0].sum()  # noqa: E731
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4))).lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    whole = 2048 * channels * n * 4
    assert temporaries(2048, 64) < whole  # one array of all states would be that large; a naive scan keeps several
    assert temporaries(2048, 2048) > 2 * whole


@pytest.mark.parametrize("name", ["mamba_tied", "mamba_biased_untied"])
def test_one_token_at_a_time_gives_what_the_whole_sequence_gives(name):
    case = golden_cases.load(name)
    module, ids = case.module, jnp.asarray(case.inputs["ids"])

    @functools.partial(jax.jit, static_argnums=2)
    def stepwise(variables, ids, first):
        out = module.apply(variables, ids[:, :first], cache=module.init_cache(ids.shape[0]))

        def step(cache, token):
            one = module.apply(variables, token[:, None], cache=cache)
            return one.cache, one.logits[:, 0]

        _, rest = jax.lax.scan(step, out.cache, ids[:, first:].T)
        return jnp.concatenate([out.logits, rest.swapaxes(0, 1)], axis=1)

    for first in (1, 6):  # fewer tokens than the convolution sees, and more
        golden_cases.close(stepwise(case.variables, ids, first), case.outputs["plain.logits"])


def test_generation_continues_as_full_passes_do_after_padding_on_the_left():
    case = golden_cases.load("mamba_tied")
    prompt = jnp.asarray(case.inputs["ids"])[:, :5]
    sequence = jnp.pad(prompt, ((0, 0), (0, 3)))
    for last in range(4, 7):  # what stands behind a token has no say in what follows it
        logits = apply(case.module, case.variables, sequence).logits
        sequence = sequence.at[:, last + 1].set(jnp.argmax(logits[:, last], -1))
    padded, real = jnp.pad(prompt, ((0, 0), (3, 0))), jnp.pad(jnp.ones_like(prompt, bool), ((0, 0), (3, 0)))
    run = jax.jit(generate, static_argnums=(0, 3))
    np.testing.assert_array_equal(run(case.module, case.variables, padded, 3, real), sequence[:, 5:])


@pytest.mark.parametrize("sides", [(4, 0), (0, 5), (2, 3)])
def test_more_padding_changes_nothing(sides):
    case = golden_cases.load("mamba_tied")
    ids = np.pad(case.inputs["ids"], ((0, 0), sides), constant_values=3)
    mask = np.pad(case.inputs["right"], ((0, 0), sides))
    logits = apply(case.module, case.variables, ids, mask).logits
    golden_cases.close(np.asarray(logits)[mask], case.outputs["right.logits"][case.inputs["right"]])


def test_rematerialisation_changes_neither_outputs_nor_gradients_and_these_reach_everything():
    case = golden_cases.load("mamba_biased_untied")
    every = np.resize(np.arange(50), (5, 10))
    ids = jnp.concatenate([case.inputs["ids"], every])

    def loss(variables, remat):
        logits = case.module.clone(remat=remat).apply(variables, ids).logits
        return -jnp.mean(jax.nn.log_softmax(logits)[..., 3])

    kept, again = (jax.jit(jax.value_and_grad(functools.partial(loss, remat=r)))(case.variables) for r in (False, True))
    golden_cases.close(again[0], kept[0], 1e-6)
    for x, y in zip(jax.tree.leaves(again[1]), jax.tree.leaves(kept[1]), strict=True):
        golden_cases.close(x, y)
    for path, grad in traverse_util.flatten_dict(kept[1], sep="/").items():
        per_layer = np.abs(grad).reshape(grad.shape[0], -1).max(1) if "/layers/" in path else np.abs(grad).max()
        assert np.isfinite(grad).all() and (per_layer > 1e-9).all(), path
    assert "remat" in str(jax.make_jaxpr(functools.partial(loss, remat=True))(case.variables))


def test_bfloat16_is_near_and_logits_and_stream_stay_float32():
    case = golden_cases.load("mamba_tied")
    half = case.module.clone(dtype=jnp.bfloat16)
    out = apply(half, case.variables, case.inputs["ids"], hidden_states=True, cache=half.init_cache(3))
    assert out.logits.dtype == out.hidden_states.dtype == out.cache.state.dtype == jnp.float32
    assert out.last_hidden_state.dtype == out.cache.conv.dtype == jnp.bfloat16
    golden_cases.close(out.logits, case.outputs["plain.logits"], 0.05)
    other = half.clone(config=dataclasses.replace(half.config, float32_stream=False))
    assert apply(other, case.variables, case.inputs["ids"], hidden_states=True).hidden_states.dtype == jnp.bfloat16


def test_on_eight_devices_by_fsdp_and_tensor_logits_are_the_same():
    case = golden_cases.load("mamba_tied")
    mesh = jax.make_mesh((1, 4, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    places = shardings(abstract_variables(case.module), mesh)
    flat = traverse_util.flatten_dict(case.variables, sep="/")
    placed = {path: jax.device_put(x, places[path]) for path, x in flat.items()}
    assert placed["params/layers/in/kernel"].sharding.spec == P(None, "fsdp", "tensor")
    assert placed["params/layers/log_decay"].sharding.spec == P(None, "tensor", None)
    spread = apply(case.module, traverse_util.unflatten_dict(placed, sep="/"), case.inputs["ids"]).logits
    golden_cases.close(spread, case.outputs["plain.logits"])


def test_programs_do_not_grow_with_depth_and_matrices_have_axis_names():
    sizes = []
    for layers in (2, 8):
        module = Mamba(MambaConfig(vocab_size=32, hidden_size=16, num_layers=layers))
        abstract = abstract_variables(module)
        ids = jax.ShapeDtypeStruct((2, 9), jnp.int32)
        sizes.append(len(jax.jit(module.apply).lower(unbox(abstract), ids).as_text()))
    assert abs(sizes[1] - sizes[0]) < 0.01 * sizes[0]
    named = axis_names(abstract)
    for path, leaf in traverse_util.flatten_dict(unbox(abstract), sep="/").items():
        layered = path.startswith("params/layers/")
        if leaf.ndim - layered >= 2:
            assert (named[path][0] == "layers") == layered
            assert len(named[path]) == leaf.ndim


def test_initial_steps_and_decays_are_the_papers():
    config = MambaConfig(vocab_size=32, hidden_size=64, num_layers=2, state_size=4)
    params = unbox(Mamba(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))["params"]["layers"]
    steps = np.asarray(jax.nn.softplus(params["step_bias"]))
    assert steps.min() >= 0.0009 and steps.max() <= 0.11
    assert np.log(steps).std() == pytest.approx(np.log(100) / 12**0.5, rel=0.1)  # log-uniform over two decades
    np.testing.assert_allclose(np.exp(params["log_decay"]), np.broadcast_to([1, 2, 3, 4], (2, 128, 4)), rtol=1e-6)
    assert (params["step_bias"][0] != params["step_bias"][1]).any()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"head": "both"}, "head must be one of tied, untied, none, got 'both'"),
        ({"state_size": 0}, "state_size must be at least 1, got 0"),
        ({"conv_size": -1}, "conv_size must be at least 1, got -1"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        MambaConfig(**changes)


def test_calls_that_make_no_sense_are_refused():
    case = golden_cases.load("mamba_tied")
    with pytest.raises(ValueError, match="got neither"):
        case.module.apply(case.variables)
    with pytest.raises(ValueError, match="embeddings are 15 wide, but hidden_size = 16"):
        case.module.apply(case.variables, embeddings=jnp.zeros((1, 2, 15)))
    zeros = jnp.zeros((1, 2, 3))
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        selective_scan(zeros, zeros, jnp.zeros((3, 3)), zeros, zeros, jnp.zeros((1, 3, 3)), chunk=0)


@pytest.mark.parametrize("name", CASES)
def test_export_is_the_import_backwards(name):
    case = golden_cases.load(name)
    back = engine.export_tensors(case.imported)
    assert list(back) == list(case.tensors)
    for key, value in case.tensors.items():
        np.testing.assert_array_equal(back[key], value)
    layout = case.imported.layout
    fresh = engine.export_tensors(layout.name, case.module, case.variables)
    once = engine.import_tensors(fresh, layout.to_config(case.module))
    assert (once.layout, once.module) == (layout, case.module)
    jax.tree.map(np.testing.assert_array_equal, once.variables, case.variables)
    names = {k for k in case.tensors if "lm_head" not in k or case.module.config.head == "untied"}
    assert set(fresh) == {k if k.startswith(("backbone.", "lm_head")) else f"backbone.{k}" for k in names}


def test_all_sizes_are_in_the_weights():
    case = golden_cases.load("mamba_tied")
    alone = engine.import_tensors(case.tensors)
    assert alone.module == case.module
    jax.tree.map(np.testing.assert_array_equal, alone.variables, case.variables)
    without = engine.layouts()["hub-mamba"].configure(case.config, {})
    assert (without.config.channels, without.config.rank) == (case.module.config.channels, case.module.config.rank)


@pytest.mark.parametrize("name", KEYS)
def test_published_key_lists_are_the_presets(name):
    said = json.loads(gzip.decompress((golden_cases.FOLDER.parent / "keys" / f"{name}.json.gz").read_bytes()))
    shapes = {k: jax.ShapeDtypeStruct(tuple(v), jnp.float32) for k, v in said["keys"].items()}
    layout, _, names = engine.identify(said["config"], shapes, None)
    assert layout.name == said["layout"]
    short = {s: shapes[n] for s, n in names.items()}
    module = layout.configure(said["config"], short)
    ours = PRESETS[name.removesuffix("-original")]
    assert module == Mamba(ours)
    found = engine.plan(layout, module, short)
    assert not (found.missing or found.unused or found.mismatched)
    assert sum(x.size for x in jax.tree.leaves(unbox(abstract_variables(Mamba(ours))))) == said["total"]


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("mamba_tied", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("mamba_tied", {"model_type": "mamba2"}, "model_type = 'mamba2'"),
        ("mamba_tied", {"hidden_size": 32}, "the config says hidden_size = 32, but the weights have 16"),
        ("mamba_tied", {"num_hidden_layers": 2}, "the config says 2 layers, but the weights have 3"),
        ("mamba_original", {"rms_norm": False}, "rms_norm = False"),
        ("mamba_original", {"ssm_cfg": {"layer": "Mamba2"}}, "layer = 'Mamba2'"),
        ("mamba_original", {"ssm_cfg": {"headdim": 64}}, "ssm_cfg has headdim"),
        ("mamba_original", {"attn_layer_idx": [1]}, "attn_layer_idx"),
        ("mamba_original", {"d_intermediate": 5}, "d_intermediate = 5"),
    ],
)
def test_entries_that_are_not_implemented_are_refused_by_name(name, change, said):
    case = golden_cases.load(name)
    layout = case.imported.layout
    short = {k.removeprefix("backbone."): v for k, v in case.tensors.items()}
    with pytest.raises(engine.ImporterError, match=said):
        layout.configure(case.config | change, engine.abstract_shapes(short))


def test_what_a_library_cannot_express_is_not_exported_to_it():
    odd = Mamba(MambaConfig(hidden_size=16, inner_size=24))
    for name in ("hub-mamba", "mamba-ssm"):
        with pytest.raises(engine.ImporterError, match="cannot express"):
            engine.layouts()[name].to_config(odd)
    with pytest.raises(engine.ImporterError, match="sizes are read from the weights"):
        engine.layouts()["mamba-ssm"].configure({}, {})
