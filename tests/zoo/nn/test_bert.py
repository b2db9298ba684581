"""BERT, RoBERTa and DistilBERT against the library (golden cases), and their own rules."""

import dataclasses
import functools

import golden_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from checkpoints.importers.engine import ImporterError, export_tensors, import_tensors
from checkpoints.importers.layouts import hub_bert, hub_distilbert, hub_roberta
from zoo.nn.bert import BERT, BERTConfig
from zoo.nn.bert_heads import l2_normalise, masked_mean
from zoo.nn.partitioning import abstract_variables, shardings, unbox

CASES = [n for p in ("bert", "roberta", "distilbert") for n in golden_cases.names(p)]
TINY = BERTConfig(
    vocab_size=31, width=16, depth=2, num_heads=2, mlp_width=24, max_positions=12, pooler=True, next_sentence=True
)  # fmt: skip
IDS = jnp.array([[3, 4, 5, 6, 7, 8], [9, 10, 11, 0, 0, 0]], jnp.int32)
REAL = jnp.array([[True] * 6, [True] * 3 + [False] * 3])


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
        found = jax.jit(functools.partial(case.module.apply, hidden_states=True, **train))(case.variables, **inputs)
        assert set(found) == set(outputs), run
        found["hidden_states"] = jnp.stack(found["hidden_states"])
        for key, value in outputs.items():
            golden_cases.close(found[key], value)


@pytest.mark.parametrize("name", CASES)
def test_export_gives_back_the_file(name):
    case = golden_cases.load(name)
    back = export_tensors(case.imported)
    assert list(back) == list(case.tensors)
    for key, value in case.tensors.items():
        assert back[key].tobytes() == value.tobytes(), key
    # the config written for it describes the same module
    config = case.imported.layout.to_config(case.module)
    again = import_tensors(case.tensors, config)
    assert again.module == case.module
    assert config["architectures"] == case.config["architectures"]


@pytest.mark.parametrize("name", [n for n in CASES if n != "bert_pretraining"])
def test_a_model_never_imported_is_written_under_the_library_s_names(name):
    case = golden_cases.load(name)
    written = export_tensors(case.imported.layout.name, case.module, case.variables)
    prefix, report = case.imported.source["prefix"], case.imported.report
    kept = {*case.tensors} - {*case.imported.buffers} - {n for d in report.duplicates for n in (d, prefix + d)}
    assert set(written) == kept
    for key, value in written.items():
        np.testing.assert_array_equal(value, case.tensors[key])


def test_presets_are_the_published_sizes():
    count = lambda config: sum(x.size for x in jax.tree.leaves(unbox(abstract_variables(BERT(config)))))  # noqa: E731
    assert count(BERTConfig.base()) == 109_482_240
    assert count(BERTConfig.large()) == 335_141_888
    assert count(BERTConfig.roberta_base()) == 124_645_632
    assert count(BERTConfig.distilbert_base()) == 66_362_880


@pytest.fixture(scope="module")
def tiny():
    config = dataclasses.replace(TINY, head="mlm")
    module = BERT(config)
    return module, unbox(module.init(jax.random.key(0), IDS))


def test_padding_changes_nothing(tiny):
    module, variables = tiny
    long = module.apply(variables, IDS, REAL)
    short = module.apply(variables, IDS[1:, :3])
    golden_cases.close(long["tokens"][1:, :3], short["tokens"])
    golden_cases.close(long["logits"][1:, :3], short["logits"])
    other = module.apply(variables, IDS.at[1, 4].set(20), REAL)
    np.testing.assert_array_equal(other["tokens"][1, :3], long["tokens"][1, :3])


def test_causal_tokens_do_not_see_later_ones():
    module = BERT(dataclasses.replace(TINY, causal=True))
    variables = module.init(jax.random.key(0), IDS)
    one, two = (module.apply(variables, x)["tokens"] for x in (IDS, IDS.at[:, 4].set(1)))
    np.testing.assert_array_equal(one[:, :4], two[:, :4])
    assert (one[:, 4:] != two[:, 4:]).any()


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_dual_encoder_vectors_ignore_padding(pooling):
    module = BERT(dataclasses.replace(TINY, head="dual", pooling=pooling, projection=5))
    variables = module.init(jax.random.key(0), IDS)
    long, short = module.apply(variables, IDS, REAL)["embedding"], module.apply(variables, IDS[1:, :3])["embedding"]
    golden_cases.close(long[1:], short)
    np.testing.assert_allclose(jnp.linalg.norm(long, axis=-1), 1.0, rtol=1e-6)
    mean = module.apply(variables, IDS, REAL, head_mask=REAL.at[:, 0].set(False))["embedding"]
    assert bool(jnp.allclose(mean, long)) == (pooling == "cls")


def test_colbert_vectors_are_units_where_the_head_mask_says():
    module = BERT(dataclasses.replace(TINY, head="colbert", projection=4))
    variables = module.init(jax.random.key(0), IDS)
    keep = REAL.at[0, 2].set(False)
    lengths = jnp.linalg.norm(module.apply(variables, IDS, REAL, head_mask=keep)["vectors"], axis=-1)
    np.testing.assert_allclose(lengths, keep.astype(jnp.float32), rtol=1e-6)


def test_a_row_without_tokens_is_zero_not_nan():
    x, mask = jnp.ones((2, 3, 4)), jnp.array([[True, True, False], [False] * 3])
    np.testing.assert_array_equal(masked_mean(x, mask), [[1.0] * 4, [0.0] * 4])
    np.testing.assert_array_equal(l2_normalise(jnp.zeros((2, 4))), jnp.zeros((2, 4)))
    np.testing.assert_allclose(l2_normalise(jnp.array([3.0, 4.0])), [0.6, 0.8], rtol=1e-6)


def total(module, variables, **options):
    out = module.apply(variables, IDS, REAL, token_types=IDS % 2, **options)
    return sum(jnp.sum(jnp.sin(x.astype(jnp.float32))) for x in jax.tree.leaves(out))


def test_every_weight_has_a_gradient_and_remat_has_the_same(tiny):
    module, variables = tiny
    grads = jax.jit(jax.grad(lambda v: total(module, v)))(variables)["params"]
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(g).all(), path
        if "key" not in str(path[-2]) or path[-1].key != "bias":  # softmax does not see a shift of all scores
            assert np.abs(g).max() > 0, path
    again = dataclasses.replace(module, remat=True)
    assert jax.tree.structure(unbox(again.init(jax.random.key(0), IDS))) == jax.tree.structure(variables)
    other = jax.jit(jax.grad(lambda v: total(again, v)))(variables)["params"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), grads, other)


def test_bfloat16_is_near(tiny):
    module, variables = tiny
    out = module.apply(variables, IDS, REAL)
    half = dataclasses.replace(module, dtype=jnp.bfloat16).apply(variables, IDS, REAL)
    assert half["tokens"].dtype == jnp.bfloat16
    assert half["logits"].dtype == jnp.float32
    assert golden_cases.error(half["logits"].astype(jnp.float32), out["logits"]) < 0.05
    param = dataclasses.replace(module, param_dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(unbox(abstract_variables(param)))} == {jnp.dtype(jnp.bfloat16)}


def test_sharded_equals_single(tiny):
    module, variables = tiny
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("data", "fsdp", "tensor"))
    places = shardings(abstract_variables(module), mesh)
    assert places["params/layer0/up/kernel"].spec == jax.sharding.PartitionSpec("fsdp", "tensor")
    flat = jax.tree_util.tree_map_with_path(
        lambda path, x: jax.device_put(x, places["/".join(p.key for p in path)]), variables
    )
    out = jax.jit(module.apply)(flat, IDS, REAL)
    golden_cases.close(out["logits"], module.apply(variables, IDS, REAL)["logits"])


@pytest.mark.parametrize("where", ["dropout", "attention_dropout", "attention_out_dropout", "head_dropout"])
def test_dropout_belongs_to_the_example(where):
    still = {"dropout": 0.0, "attention_dropout": 0.0, "attention_out_dropout": 0.0, "head_dropout": 0.0}
    module = BERT(dataclasses.replace(TINY, head="classifier", **{**still, where: 0.5}))
    variables = module.init(jax.random.key(0), IDS)
    keys = jax.random.split(jax.random.key(1), 2)
    run = lambda ids, keys, train=True: module.apply(variables, ids, train=train, keys=keys)["logits"]  # noqa: E731
    dropped = run(IDS, keys)
    assert not np.allclose(dropped, run(IDS, None))
    np.testing.assert_array_equal(run(IDS, keys, False), run(IDS, None))
    np.testing.assert_allclose(run(IDS[::-1], keys[::-1]), dropped[::-1], rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_heads": 3}, "num_heads must divide width 16, got 3"),
        ({"head": "ner"}, "head must be one of none, mlm"),
        ({"activation": "silu"}, "activation must be one of gelu"),
        ({"pooling": "max"}, "pooling must be cls or mean, got 'max'"),
        ({"head": "colbert"}, "needs projection"),
        ({"head": "classifier", "pooler": False, "next_sentence": False}, "set pooler=True"),
        ({"pooler": False}, "set pooler=True"),
    ],
)
def test_impossible_configurations(changes, says):
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(TINY, **changes)


@pytest.mark.parametrize(
    ("changes", "inputs", "says"),
    [
        ({}, {}, "either ids or embeddings, got neither"),
        ({}, {"ids": IDS, "embeddings": jnp.ones((2, 6, 16))}, "got both"),
        ({}, {"ids": jnp.zeros((1, 13), jnp.int32)}, "have 13 tokens, but there are positions for 12"),
        ({"pad_id": 1}, {"ids": jnp.zeros((1, 11), jnp.int32)}, "have 11 tokens, but there are positions for 10"),
        ({"token_types": 0}, {"ids": IDS, "token_types": IDS}, "leave them out"),
        ({}, {"ids": IDS, "context": jnp.ones((2, 3, 16))}, "set config.cross_attention=True"),
    ],
)
def test_impossible_calls(changes, inputs, says):
    module = BERT(dataclasses.replace(TINY, **changes))
    with pytest.raises(ValueError, match=says):
        jax.eval_shape(lambda: module.init(jax.random.key(0), **inputs))


@pytest.mark.parametrize(
    ("case", "changes", "says"),
    [
        ("bert_model", {"position_embedding_type": "relative_key"}, "position_embedding_type = 'relative_key'"),
        ("bert_model", {"hidden_act": "silu"}, "hidden_act = 'silu' is not supported; supported: 'gelu'"),
        ("bert_model", {"num_hidden_layers": 2}, "num_hidden_layers = 2, but the weights hold 3"),
        ("bert_model", {"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ("bert_model", {"is_encoder_decoder": True}, "is_encoder_decoder = True"),
        ("bert_model", {"add_cross_attention": True}, "without is_decoder"),
        ("bert_model", {"model_type": "electra"}, "model_type = 'electra'"),
        ("bert_model", {"hidden_size": 32, "num_attention_heads": 4}, "24"),
        ("roberta_model", {"pad_token_id": None}, "pad_token_id = None"),
        ("distilbert_model", {"n_layers": 3}, "n_layers = 3, but the weights hold 2"),
        ("distilbert_model", {"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ("distilbert_model", {"activation": "silu"}, "activation = 'silu'"),
    ],
)
def test_configs_that_would_be_another_model_are_refused(case, changes, says):
    case = golden_cases.load(case)
    with pytest.raises(ImporterError, match=says):
        import_tensors(case.tensors, {**case.config, **changes}, case.imported.layout.name)


@pytest.mark.parametrize("name", ["bert_mlm", "roberta_mlm", "distilbert_mlm"])
def test_without_a_config_or_with_an_untied_copy(name):
    case = golden_cases.load(name)
    with pytest.raises(ImporterError, match="give --config FILE"):
        import_tensors(case.tensors)
    copy = {"bert": "cls.predictions.decoder", "roberta": "lm_head.decoder", "distilbert": "vocab_projector"}
    copy = f"{copy[name.split('_')[0]]}.weight"
    table = next(v for k, v in case.tensors.items() if k.endswith("word_embeddings.weight"))
    again = import_tensors({**case.tensors, copy: table.copy()}, case.config)
    assert again.report.duplicates == (copy,)
    assert export_tensors(again)[copy].tobytes() == table.tobytes()
    with pytest.raises(ImporterError, match="differs from"):
        import_tensors({**case.tensors, copy: table + 1}, case.config)


@pytest.mark.parametrize("name", ["bert_classifier", "roberta_classifier", "distilbert_classifier"])
def test_token_classifiers_are_refused(name):
    case = golden_cases.load(name)
    hidden = ("pooler.", "classifier.dense.", "pre_classifier.")
    tensors = {k: v for k, v in case.tensors.items() if not any(h in k for h in hidden)}
    tensors = {k.replace("classifier.out_proj", "classifier"): v for k, v in tensors.items()}
    with pytest.raises(ImporterError, match="not supported"):
        import_tensors(tensors, case.config)


def test_an_encoder_without_a_prefix_is_recognised_by_its_config_alone():
    case = golden_cases.load("roberta_model")
    assert case.imported.layout.name == "hub-roberta"
    with pytest.raises(ImporterError, match="hub-bert and hub-roberta alike"):
        import_tensors(case.tensors)


@pytest.mark.parametrize("layout", [hub_bert, hub_roberta, hub_distilbert])
def test_a_model_of_another_kind_has_no_config_there(layout):
    config = {"hub_roberta": TINY, "hub_distilbert": TINY}.get(layout.__name__.split(".")[-1])
    if config is None:
        assert layout.to_config(BERT(TINY))["model_type"] == "bert"
    else:
        with pytest.raises(ImporterError, match="not a"):
            layout.to_config(BERT(config))
