"""T5 against the library (golden cases), its cache against the full pass, and its own rules."""

import dataclasses
import functools

import golden_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from checkpoints.importers.engine import ImporterError, export_tensors, import_tensors
from checkpoints.importers.layouts import hub_t5
from zoo.nn.partitioning import abstract_variables, axis_names, shardings, unbox
from zoo.nn.t5 import T5, T5Config, greedy, relative_buckets

CASES = golden_cases.names("t5")
TINY = T5Config(
    vocab_size=31, width=16, head_dim=4, num_heads=2, mlp_width=24, depth=2, decoder_depth=3, buckets=8, max_distance=12
)
IDS = jnp.array([[3, 4, 5, 6, 7, 8], [9, 10, 11, 0, 0, 0]], jnp.int32)
REAL = jnp.array([[True] * 6, [True] * 3 + [False] * 3])
SAID = jnp.array([[0, 5, 9, 2, 4], [0, 7, 7, 3, 1]], jnp.int32)


def runs(case):
    """The calls of a case: name -> (arguments, outputs)."""
    names = sorted({k.partition(".")[0] for k in case.inputs})
    part = lambda arrays, run: {k[len(run) + 1 :]: v for k, v in arrays.items() if k.startswith(f"{run}.")}  # noqa: E731
    arguments = {k: jnp.asarray(v) for k, v in case.inputs.items()}
    return {run: (part(arguments, run), part(case.outputs, run)) for run in names}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_library(name):
    case = golden_cases.load(name)
    for run, (inputs, outputs) in runs(case).items():
        train = {"train": True, "keys": jax.random.split(jax.random.key(0), 3)} if run == "train" else {}
        apply = jax.jit(functools.partial(case.module.apply, hidden_states=True, **train))
        found = apply(case.variables, **inputs)
        assert set(found) == set(outputs), run
        for key, value in outputs.items():
            golden_cases.close(jnp.stack(found[key]) if "hidden" in key else found[key], value)


@pytest.mark.parametrize("name", [n for n in CASES if n != "t5_encoder"])
def test_the_cache_gives_the_same_logits_and_words(name):
    case = golden_cases.load(name)
    inputs = runs(case)["padded"][0]
    ids, mask, said = inputs["ids"], inputs["padding_mask"], inputs["decoder_ids"]
    model, variables = case.module, case.variables
    full = runs(case)["padded"][1]

    @jax.jit
    def steps(variables):
        cache = model.apply(variables, jnp.asarray(full["encoder_tokens"]), said.shape[1], method="init_cache")

        def one(cache, word):
            logits, cache = model.apply(variables, cache, word, mask, method="step")
            return cache, logits

        return jax.lax.scan(one, cache, said.T)

    cache, logits = steps(variables)
    # the reference masks the decoder's padding too, which the cache has no need of
    real = np.asarray(inputs["decoder_padding_mask"])
    golden_cases.close(jnp.moveaxis(logits, 0, 1)[real], full["logits"][real])
    assert int(cache["index"]) == said.shape[1]
    words = jax.jit(lambda v: greedy(model, v, ids, mask, case.outputs["greedy"].shape[1]))(variables)
    np.testing.assert_array_equal(words, case.outputs["greedy"])


@pytest.mark.parametrize("name", CASES)
def test_export_gives_back_the_file(name):
    case = golden_cases.load(name)
    back = export_tensors(case.imported)
    assert list(back) == list(case.tensors)
    for key, value in case.tensors.items():
        assert back[key].tobytes() == value.tobytes(), key
    config = case.imported.layout.to_config(case.module)
    assert import_tensors(case.tensors, config).module == case.module
    assert config["architectures"] == case.config["architectures"]


def test_buckets_are_the_library_s():
    with np.load(golden_cases.FOLDER / "t5_buckets.npz") as found:
        kinds = [k for k in found.files if k != "distance"]
        assert len(kinds) == 8
        for kind in kinds:
            both, buckets, farthest = map(int, kind.split("_"))
            ours = relative_buckets(found["distance"], bool(both), buckets, farthest)
            np.testing.assert_array_equal(ours, found[kind])


@pytest.mark.parametrize("name", [n for n in CASES if n != "t5_square"])
def test_a_model_never_imported_is_written_under_the_library_s_names(name):
    case = golden_cases.load(name)
    written = export_tensors(case.imported.layout.name, case.module, case.variables)
    prefix, report = case.imported.source["prefix"], case.imported.report
    kept = {*case.tensors} - {*case.imported.buffers} - {n for d in report.duplicates for n in (d, prefix + d)}
    assert set(written) == kept
    for key, value in written.items():
        np.testing.assert_array_equal(value, case.tensors[key])


def test_presets_are_the_published_sizes():
    count = lambda config: sum(x.size for x in jax.tree.leaves(unbox(abstract_variables(T5(config)))))  # noqa: E731
    assert count(T5Config.small()) == 60_506_624
    assert count(T5Config.base()) == 222_903_552
    assert count(T5Config.v1_1_base()) == 247_577_856


@pytest.fixture(scope="module")
def tiny():
    module = T5(TINY)
    # the fresh weights are for wide models: larger ones make every part of this one matter
    variables = unbox(jax.jit(module.init)(jax.random.key(0), IDS, decoder_ids=SAID))
    return module, jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), variables)


def test_layers_are_stacked_and_named(tiny):
    module, variables = tiny
    names = axis_names(abstract_variables(module))
    assert names["params/encoder/layers/attention/query/kernel"] == ("layers", "embed", "heads")
    assert names["params/decoder/layers/cross_attention/out/kernel"] == ("layers", "heads", "embed")
    assert variables["params"]["encoder"]["layers"]["up"]["kernel"].shape == (2, 16, 24)
    assert variables["params"]["decoder"]["layers"]["up"]["kernel"].shape == (3, 16, 24)


def test_padding_changes_nothing(tiny):
    module, variables = tiny
    apply = jax.jit(module.apply)
    long = apply(variables, IDS, REAL, SAID)
    short = apply(variables, IDS[1:, :3], None, SAID[1:])
    golden_cases.close(long["encoder_tokens"][1:, :3], short["encoder_tokens"])
    golden_cases.close(long["logits"][1:], short["logits"])
    assert set(module.apply(variables, IDS)) == {"encoder_tokens"}


def test_the_decoder_does_not_see_later_words(tiny):
    module, variables = tiny
    apply = jax.jit(module.apply)
    one, two = (apply(variables, IDS, REAL, x)["logits"] for x in (SAID, SAID.at[:, 3].set(8)))
    np.testing.assert_array_equal(one[:, :3], two[:, :3])
    assert (one[:, 3:] != two[:, 3:]).any()


def test_every_weight_has_a_gradient_and_remat_has_the_same(tiny):
    module, variables = tiny

    def total(module, variables):
        out = module.apply(variables, IDS, REAL, SAID)
        return jnp.sum(jnp.sin(out["logits"])) + jnp.sum(jnp.sin(out["encoder_tokens"]))

    grads = jax.jit(jax.grad(lambda v: total(module, v)))(variables)["params"]
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(g).all(), path
        layers = g.reshape(g.shape[0] if "layers" in str(path) else 1, -1)
        assert np.abs(layers).max(1).min() > 0, path
    again = dataclasses.replace(module, remat=True)
    other = jax.jit(jax.grad(lambda v: total(again, v)))(variables)["params"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), grads, other)


def test_bfloat16_is_near(tiny):
    module, variables = tiny
    out = jax.jit(module.apply)(variables, IDS, REAL, SAID)
    half = jax.jit(dataclasses.replace(module, dtype=jnp.bfloat16).apply)(variables, IDS, REAL, SAID)
    assert (half["tokens"].dtype, half["logits"].dtype) == (jnp.bfloat16, jnp.float32)
    assert golden_cases.error(half["logits"], out["logits"]) < 0.1
    param = dataclasses.replace(module, param_dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(unbox(abstract_variables(param)))} == {jnp.dtype(jnp.bfloat16)}


def test_sharded_equals_single(tiny):
    module, variables = tiny
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("data", "fsdp", "tensor"))
    places = shardings(abstract_variables(module), mesh)
    assert places["params/encoder/layers/up/kernel"].spec == PartitionSpec(None, "fsdp", "tensor")
    placed = jax.tree_util.tree_map_with_path(
        lambda path, x: jax.device_put(x, places["/".join(p.key for p in path)]), variables
    )
    out = jax.jit(module.apply)(placed, IDS, REAL, SAID)
    golden_cases.close(out["logits"], module.apply(variables, IDS, REAL, SAID)["logits"])


def test_dropout_belongs_to_the_example_and_differs_by_layer():
    module = T5(dataclasses.replace(TINY, dropout=0.5))
    variables = jax.jit(module.init)(jax.random.key(0), IDS, decoder_ids=SAID)
    keys = jax.random.split(jax.random.key(1), 2)
    apply = jax.jit(module.apply, static_argnames="train")
    run = lambda ids, said, keys, train=True: apply(variables, ids, None, said, train=train, keys=keys)["logits"]  # noqa: E731
    dropped = run(IDS, SAID, keys)
    assert not np.allclose(dropped, run(IDS, SAID, None))
    np.testing.assert_array_equal(run(IDS, SAID, keys, False), run(IDS, SAID, None))
    np.testing.assert_allclose(run(IDS[::-1], SAID[::-1], keys[::-1]), dropped[::-1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"activation": "silu"}, "activation must be one of gelu"),
        ({"buckets": 7}, "buckets must be even and at least 4, got 7"),
        ({"max_distance": 4}, "max_distance must exceed half the buckets \\(4\\), got 4"),
    ],
)
def test_impossible_configurations(changes, says):
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(TINY, **changes)


@pytest.mark.parametrize(
    ("changes", "inputs", "says"),
    [
        ({}, {}, "either ids or embeddings, got neither"),
        ({}, {"ids": IDS, "embeddings": jnp.ones((2, 6, 16))}, "ids or embeddings, got both"),
        ({}, {"ids": IDS, "decoder_ids": SAID, "decoder_embeddings": jnp.ones((2, 5, 16))}, "embeddings, got both"),
        ({"decoder_depth": 0}, {"ids": IDS, "decoder_ids": SAID}, "there is no decoder"),
    ],
)
def test_impossible_calls(changes, inputs, says):
    module = T5(dataclasses.replace(TINY, **changes))
    with pytest.raises(ValueError, match=says):
        jax.eval_shape(lambda: module.init(jax.random.key(0), **inputs))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"feed_forward_proj": "gated-silu"}, "feed_forward_proj = 'gated-silu' is not supported"),
        ({"dense_act_fn": "gelu"}, "dense_act_fn = 'gelu'"),
        ({"num_layers": 4}, "4 and 2 layers, but the weights \\(3, 2\\)"),
        ({"num_decoder_layers": 4}, "3 and 4 layers, but the weights \\(3, 2\\)"),
        ({"model_type": "umt5"}, "model_type = 'umt5'"),
        ({"is_decoder": True}, "is_decoder = True"),
        ({"feed_forward_proj": "gated-gelu", "is_gated_act": True, "dense_act_fn": "gelu_new"}, "missing"),
    ],
)
def test_configs_that_would_be_another_model_are_refused(changes, says):
    case = golden_cases.load("t5_original")
    with pytest.raises(ImporterError, match=says):
        import_tensors(case.tensors, {**case.config, **changes}, "hub-t5")


def test_what_a_file_without_config_or_with_a_false_copy_gets():
    case = golden_cases.load("t5_original")
    with pytest.raises(ImporterError, match="give --config FILE"):
        import_tensors(case.tensors)
    head = {"lm_head.weight": case.tensors["shared.weight"] + 1}
    with pytest.raises(ImporterError, match="lm_head.weight differs from shared.weight"):
        import_tensors({**case.tensors, **head}, case.config)
    config = {k: v for k, v in case.config.items() if k != "scale_decoder_outputs"} | {"tie_word_embeddings": False}
    assert not import_tensors({**case.tensors, **head}, config).module.config.tied


def test_models_that_the_library_lacks_have_no_config():
    for changes, says in (({"activation": "tanh"}, "no T5 with activation"), ({"tied": False}, "set rescale=False")):
        with pytest.raises(ImporterError, match=says):
            hub_t5.to_config(T5(dataclasses.replace(TINY, **changes)))
