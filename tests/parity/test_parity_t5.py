"""What we export of T5 loads in the library, with no key missing or unexpected, and computes and writes the same."""

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
from zoo.nn.partitioning import unbox  # noqa: E402
from zoo.nn.t5 import T5, T5Config, greedy  # noqa: E402

torch.set_num_threads(1)
TINY = T5Config(
    vocab_size=31, width=16, head_dim=4, num_heads=2, mlp_width=24, depth=2, decoder_depth=2, buckets=8, max_distance=12
)
KINDS = {
    "original": ("T5ForConditionalGeneration", TINY),
    "v1_1": ("T5ForConditionalGeneration", dataclasses.replace(
        TINY, activation="gelu_tanh", gated=True, tied=False, rescale=False)),
    "encoder": ("T5EncoderModel", dataclasses.replace(TINY, decoder_depth=0, activation="gelu")),
}  # fmt: skip
IDS = np.array([[3, 4, 5, 6, 7], [8, 9, 1, 1, 1]], np.int32)
REAL = IDS != 1
SAID = np.array([[0, 5, 6, 7], [0, 9, 8, 2]], np.int32)


def loaded(kind, tensors, config, folder):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    st.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model, info = getattr(hf, kind).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    assert not info["mismatched_keys"], info
    return model.eval()


@pytest.mark.parametrize("name", KINDS)
def test_a_fresh_model_loads_in_the_library(name, tmp_path):
    kind, config = KINDS[name]
    module = T5(config)
    inputs = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), module.example_inputs())
    leaves, tree = jax.tree.flatten(unbox(module.init(jax.random.key(0), **inputs)))
    random = np.random.default_rng(0)
    variables = tree.unflatten([x + 0.3 * random.standard_normal(x.shape).astype(np.float32) for x in leaves])
    written = layouts()["hub-t5"].to_config(module)
    assert written["architectures"] == [kind]
    model = loaded(kind, export_tensors("hub-t5", module, variables), written, tmp_path)
    ids, real, said = jnp.asarray(IDS), jnp.asarray(REAL), jnp.asarray(SAID)
    decodes = {"decoder_ids": said} if config.decoder_depth else {}
    ours = module.apply(variables, ids, real, **decodes)
    theirs_in = {"input_ids": torch.tensor(IDS).long(), "attention_mask": torch.tensor(REAL).long()}
    decodes = {"decoder_input_ids": torch.tensor(SAID).long()} if config.decoder_depth else {}
    with torch.no_grad():
        theirs = model(**theirs_in, **decodes)
    if not config.decoder_depth:
        golden_cases.close(ours["encoder_tokens"], theirs.last_hidden_state)
        return
    golden_cases.close(ours["encoder_tokens"], theirs.encoder_last_hidden_state)
    golden_cases.close(ours["logits"], theirs.logits)
    words = model.generate(**theirs_in, max_new_tokens=8, do_sample=False, num_beams=1, eos_token_id=None)
    np.testing.assert_array_equal(greedy(module, variables, ids, real, 8), words[:, 1:])


@pytest.mark.parametrize("name", golden_cases.names("t5"))
def test_an_import_goes_back_to_the_library(name, tmp_path):
    case = golden_cases.load(name)
    written = case.imported.layout.to_config(case.module)
    loaded(case.config["architectures"][0], export_tensors(case.imported), written, tmp_path)
