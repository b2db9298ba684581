"""What we export of BERT's kin loads in the library, with no key missing or unexpected, and computes the same."""

import dataclasses
import json

import golden_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
hf = pytest.importorskip("transformers")
st = pytest.importorskip("safetensors.numpy")

from checkpoints.importers.engine import export_tensors, layouts  # noqa: E402
from zoo.nn.bert import BERT, BERTConfig  # noqa: E402
from zoo.nn.partitioning import unbox  # noqa: E402

torch.set_num_threads(1)
TINY = BERTConfig(vocab_size=31, width=16, depth=2, num_heads=2, mlp_width=24, max_positions=14)
ROBERTA = dataclasses.replace(TINY, token_types=1, pad_id=1, epsilon=1e-5, mlm_activation="gelu")
DISTIL = dataclasses.replace(TINY, token_types=0, attention_out_dropout=0.0)
KINDS = {
    "BertModel": ("hub-bert", dataclasses.replace(TINY, pooler=True)),
    "BertForMaskedLM": ("hub-bert", dataclasses.replace(TINY, head="mlm", activation="gelu_tanh")),
    "BertForPreTraining": ("hub-bert", dataclasses.replace(TINY, head="mlm", pooler=True, next_sentence=True)),
    "BertForSequenceClassification": (
        "hub-bert", dataclasses.replace(TINY, pooler=True, head="classifier", num_labels=3)),
    "BertLMHeadModel": ("hub-bert", dataclasses.replace(TINY, head="mlm", causal=True, cross_attention=True)),
    "RobertaModel": ("hub-roberta", dataclasses.replace(ROBERTA, pooler=True)),
    "RobertaForMaskedLM": ("hub-roberta", dataclasses.replace(ROBERTA, head="mlm", activation="relu")),
    "RobertaForSequenceClassification": (
        "hub-roberta", dataclasses.replace(ROBERTA, head="cross", head_activation="tanh")),
    "RobertaForCausalLM": ("hub-roberta", dataclasses.replace(ROBERTA, head="mlm", causal=True)),
    "DistilBertModel": ("hub-distilbert", DISTIL),
    "DistilBertForMaskedLM": ("hub-distilbert", dataclasses.replace(DISTIL, head="mlm")),
    "DistilBertForSequenceClassification": (
        "hub-distilbert", dataclasses.replace(DISTIL, head="classifier", num_labels=4, head_activation="relu")),
}  # fmt: skip
IDS = np.array([[3, 4, 5, 6, 7], [8, 9, 1, 1, 1]], np.int32)
REAL = IDS != 1


def perturbed(variables):
    leaves, tree = jax.tree.flatten(unbox(variables))
    random = np.random.default_rng(0)
    return tree.unflatten([x + 0.3 * random.standard_normal(x.shape).astype(np.float32) for x in leaves])


def loaded(kind, tensors, config, folder):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    st.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    plain = kind in ("BertModel", "RobertaModel") and not any("pooler" in k for k in tensors)
    options = {"add_pooling_layer": False} if plain else {}
    model, info = getattr(hf, kind).from_pretrained(folder, output_loading_info=True, **options)
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    assert not info["mismatched_keys"], info
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_model_loads_in_the_library(kind, tmp_path):
    layout, config = KINDS[kind]
    module = BERT(config)
    inputs = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), module.example_inputs())
    variables = perturbed(module.init(jax.random.key(0), **inputs))
    written = layouts()[layout].to_config(module)
    assert written["architectures"] == [kind]
    model = loaded(kind, export_tensors(layout, module, variables), written, tmp_path)
    context = jax.random.normal(jax.random.key(1), (2, 3, 16)) if config.cross_attention else None
    ours = module.apply(variables, jnp.asarray(IDS), jnp.asarray(REAL), context=context)
    extra = {} if context is None else {"encoder_hidden_states": torch.tensor(np.array(context))}
    with torch.no_grad():
        theirs = model(torch.tensor(IDS).long(), torch.tensor(REAL).long(), output_hidden_states=True, **extra)
    golden_cases.close(ours["tokens"], theirs.hidden_states[-1])
    if "pooler_output" in theirs and theirs.pooler_output is not None:
        golden_cases.close(ours["pooled"], theirs.pooler_output)
    if config.next_sentence:
        golden_cases.close(ours["next_sentence"], theirs.seq_relationship_logits)
        golden_cases.close(ours["logits"], theirs.prediction_logits)
    elif config.head == "cross":
        golden_cases.close(ours["scores"], theirs.logits[:, 0])
    elif config.head != "none":
        golden_cases.close(ours["logits"], theirs.logits)


@pytest.mark.parametrize("name", [n for p in ("bert", "roberta", "distilbert") for n in golden_cases.names(p)])
def test_an_import_goes_back_to_the_library(name, tmp_path):
    case = golden_cases.load(name)
    kind = case.config["architectures"][0]
    if not hasattr(hf, kind) or "linear.weight" in case.tensors:
        pytest.skip("the library has no such head")
    loaded(kind, export_tensors(case.imported), case.imported.layout.to_config(case.module), tmp_path)
