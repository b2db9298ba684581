"""Encoders into one vector: pooling, projection and norm by definition, padding, dropout, shared parameters, files."""

import dataclasses
import functools
import json

import golden_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import AxisType
from safetensors.numpy import load_file

from checkpoints.definition import decode, encode
from checkpoints.importers.engine import ImporterError, export_tensors, import_tensors
from checkpoints.importers.exporting import export_model
from checkpoints.importers.importing import import_model
from checkpoints.model import load_model, save_model
from zoo.nn.bert import BERT, BERTConfig
from zoo.nn.mlp import MLP
from zoo.nn.partitioning import abstract_variables, axis_names, shardings, unbox
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


# --- published weights ------------------------------------------------------------------------------------------------

CASES = golden_cases.names("dense_retriever")
flat = functools.partial(traverse_util.flatten_dict, sep="/")


@pytest.mark.parametrize("name", CASES)
def test_equals_the_published_class(name):
    case = golden_cases.load(name)
    runs = sorted(k.partition(".")[0] for k in case.inputs)
    assert len(runs) >= 2
    for run in runs:
        train = {"train": True, "keys": jax.random.split(jax.random.key(0), 3)} if run == "train" else {}
        found = jax.jit(functools.partial(case.module.apply, **train))(case.variables, case.inputs[f"{run}.ids"])
        golden_cases.close(found, case.outputs[f"{run}.vector"])


def test_what_is_read_of_each():
    star, square, ance = (golden_cases.load(f"dense_retriever_{n}") for n in ("star", "square", "ance"))
    for case, features, pooler in ((star, 20, False), (square, None, False), (ance, 16, True)):
        module = case.module
        assert case.imported.layout.name == "hub-dense-retriever" and case.imported.source["prefix"] == "roberta."
        assert (module.features, module.pooling, module.norm, module.pad_id) == (features, "first", True, 1)
        assert (module.body.config.pooler, module.body.config.head, module.body.config.pad_id) == (pooler, "none", 1)
    # what is no weight of the retriever is kept, and nothing else is
    kept = {n for n in ance.tensors if n.startswith(("classifier.", "lm_head."))}
    assert len(kept) == 10 and set(ance.imported.buffers) == {*kept, "roberta.embeddings.position_ids"}
    stated = import_tensors(square.tensors, {**square.config, "output_embedding_size": 24}).module
    assert stated.features == 24 and square.imported.layout.to_config(stated)["output_embedding_size"] == 24
    assert not star.imported.buffers and not square.imported.buffers


@pytest.mark.parametrize("name", CASES)
def test_export_gives_back_the_file(name):
    case = golden_cases.load(name)
    back = export_tensors(case.imported)
    assert list(back) == list(case.tensors)
    assert all(back[k].tobytes() == x.tobytes() for k, x in case.tensors.items())
    written = export_tensors("hub-dense-retriever", case.module, case.variables)
    assert set(written) == set(case.tensors) - set(case.imported.buffers)
    assert all(np.array_equal(x, case.tensors[k]) for k, x in written.items())
    config = case.imported.layout.to_config(case.module)
    assert config["architectures"] == ["RobertaDot"] and config["model_type"] == "roberta"
    assert config.get("output_embedding_size") == case.module.features
    assert import_tensors(written, config).module == case.module


def test_files_in_and_out(tmp_path):
    case = golden_cases.load("dense_retriever_ance")
    found = import_model(str(golden_cases.FOLDER / case.name), tmp_path / "in")
    model = load_model(tmp_path / "in")
    assert found.layout.name == "hub-dense-retriever" and model.definition == case.module
    ids = jnp.asarray(case.inputs["padded.ids"])
    golden_cases.close(model.definition.apply(model.variables, ids), case.outputs["padded.vector"])
    export_model(tmp_path / "in", tmp_path / "out")
    source = golden_cases.FOLDER / case.name / "model.safetensors"
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == source.read_bytes()
    with pytest.raises(ImporterError, match="DenseRetriever cannot be written as hub-roberta"):
        export_model(tmp_path / "in", tmp_path / "other", "hub-roberta")
    # a model that was trained here finds its layout alone
    save_model(tmp_path / "own", case.module, case.variables, {}, {})
    assert export_model(tmp_path / "own", tmp_path / "new")["layout"] == "hub-dense-retriever"
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert import_tensors(load_file(tmp_path / "new" / "model.safetensors"), config).module == case.module


def test_a_retriever_is_never_taken_for_its_encoder_nor_the_other_way():
    star, encoder = golden_cases.load("dense_retriever_star"), golden_cases.load("roberta_mlm")
    # without a config the names alone decide, and only then is the config asked for
    for case in (star, encoder):
        with pytest.raises(ImporterError, match=f"{case.imported.layout.name}: weights tell neither"):
            import_tensors(case.tensors)
    for lost in ("embeddingHead.weight", "norm.weight"):
        with pytest.raises(ImporterError, match="do not fit hub-roberta: .* unused"):
            import_tensors({k: v for k, v in star.tensors.items() if k != lost}, star.config)
    with pytest.raises(ImporterError, match="1 missing: params/norm/bias"):
        import_tensors({k: v for k, v in star.tensors.items() if k != "norm.bias"}, star.config)
    with pytest.raises(ImporterError, match="an encoder alone is hub-roberta's"):
        import_tensors(encoder.tensors, encoder.config, "hub-dense-retriever")
    body = {"allow_unused": ("embeddingHead.*", "norm.*")}
    alone = import_tensors(star.tensors, star.config, "hub-roberta", **body)
    assert isinstance(alone.module, BERT)
    with pytest.raises(ImporterError, match="hub-dense-retriever has no name for"):
        export_tensors("hub-dense-retriever", star.module.body, {"params": star.variables["params"]["body"]})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"zoo": {"head": "dual"}}, "config zoo = {'head': 'dual'} is not supported"),
        ({"add_cross_attention": True, "is_decoder": True}, "add_cross_attention = True"),
        ({"pad_token_id": None}, "pad_token_id = None"),
        ({"hidden_act": "silu"}, "hidden_act = 'silu'"),
        ({"output_embedding_size": 24}, r"\[20\] after rearranging|\[24, 20\] after rearranging"),
        ({"num_hidden_layers": 3}, "num_hidden_layers = 3, but the weights hold 2"),
    ],
)
def test_configs_that_would_be_another_model_are_refused(changes, says):
    case = golden_cases.load("dense_retriever_star")
    with pytest.raises(ImporterError, match=says):
        import_tensors(case.tensors, {**case.config, **changes})


def test_what_the_library_has_no_class_for_is_not_written():
    case = golden_cases.load("dense_retriever_star")
    write = lambda module: export_tensors("hub-dense-retriever", module, case.variables)  # noqa: E731
    # number types are not the file's business, the other settings are
    assert write(case.module.clone(dtype=jnp.bfloat16)).keys() == write(case.module).keys()
    body = case.module.body
    assert write(case.module.clone(body=body.clone(remat=True, dtype=jnp.bfloat16)))
    with pytest.raises(ImporterError, match="pad_id is 3, a file in that layout would have 1"):
        write(case.module.clone(pad_id=3))
    other = body.clone(config=dataclasses.replace(body.config, normalise=False))
    with pytest.raises(ImporterError, match="body.normalise is False, a file in that layout would have True"):
        write(case.module.clone(body=other))
    with pytest.raises(ImporterError, match="reads the first token and has a norm"):
        write(case.module.clone(pooling="mean"))
    with pytest.raises(ImporterError, match="reads the first token and has a norm"):
        case.imported.layout.to_config(case.module.clone(norm=False))
    words = DenseRetriever(WeightedWords(12, 6), None, "first", pad_id=1)
    for module in (words, body, case.module.clone(body=BERT(dataclasses.replace(body.config, head="mlm")))):
        with pytest.raises(ImporterError, match="not a dense retriever over RoBERTa"):
            case.imported.layout.to_config(module)
    with pytest.raises(ImporterError, match="not a RoBERTa"):
        case.imported.layout.to_config(case.module.clone(body=BERT(dataclasses.replace(body.config, pad_id=None))))


def test_it_is_a_definition_whose_axes_are_named():
    module = golden_cases.load("dense_retriever_square").module
    assert decode(encode(module)) == module
    typed = module.clone(param_dtype=jnp.bfloat16, body=module.body.clone(param_dtype=jnp.bfloat16, remat=True))
    abstract = abstract_variables(typed)
    names, shapes = axis_names(abstract), flat(unbox(abstract))
    assert all(x.dtype == jnp.bfloat16 for x in shapes.values())
    assert all(len(names[p]) == 2 for p, x in shapes.items() if x.ndim == 2)
    assert {p: x.shape for p, x in flat(unbox(abstract_variables(module))).items()} == {
        p: x.shape for p, x in shapes.items()
    }
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    where = shardings(abstract, mesh)
    spread = sum(x.size for p, x in shapes.items() if any(where[p].spec))
    assert spread > 0.5 * sum(x.size for x in shapes.values())
    assert module.example_inputs(3)["ids"].shape == (3, 2)
    assert abstract_variables(DenseRetriever(WeightedWords(12, 6)))["params"]["body"]
