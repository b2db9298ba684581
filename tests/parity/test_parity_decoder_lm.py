"""What DecoderLM exports loads in transformers, and gives the same outputs there.  Needs torch and transformers."""

import dataclasses

import golden_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints.importers import engine
from zoo.nn.decoder_lm import DecoderConfig, DecoderLM
from zoo.nn.partitioning import unbox

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SMALL = DecoderConfig(vocab_size=40, hidden_size=24, num_layers=2, num_heads=4, mlp_dim=32, max_positions=32)
ROTARY = dataclasses.replace(SMALL, positions="rotary", num_kv_heads=2)
LLAMA = dataclasses.replace(
    ROTARY, norm="rms", gated=True, activation="silu", qkv_bias=False, out_bias=False, mlp_bias=False, head="untied"
)
LLAMA3 = {"rope_scaling": "llama3", "rope_factor": 8.0, "rope_original_positions": 16, "rope_theta": 500.0}
FRESH = {
    "gpt2": ("hub-gpt2", SMALL),
    "gpt2-bare": ("hub-gpt2", dataclasses.replace(SMALL, head="none")),
    "opt": ("hub-opt", dataclasses.replace(SMALL, position_offset=2, activation="relu")),
    "opt-350m": ("hub-opt", dataclasses.replace(
        SMALL, position_offset=2, activation="relu", block="post", final_norm=False, embedding_dim=12)),
    "llama": ("hub-llama", LLAMA),
    "llama3": ("hub-llama", dataclasses.replace(LLAMA, head_dim=16, head="tied", **LLAMA3)),
    "llama-linear": ("hub-llama", dataclasses.replace(LLAMA, rope_scaling="linear", rope_factor=4.0)),
    "llama-biased": ("hub-llama", dataclasses.replace(LLAMA, qkv_bias=True, out_bias=True, mlp_bias=True)),
    "llama-bare": ("hub-llama", dataclasses.replace(LLAMA, head="none")),
    "mistral": ("hub-llama", dataclasses.replace(LLAMA, window=3)),
    "qwen2": ("hub-llama", dataclasses.replace(LLAMA, qkv_bias=True, head="tied")),
    "qwen2-window": ("hub-llama", dataclasses.replace(LLAMA, qkv_bias=True, window=3)),
    "qwen3": ("hub-llama", dataclasses.replace(LLAMA, qk_norm=True, head_dim=10)),
    "phi": ("hub-phi", dataclasses.replace(
        ROTARY, block="parallel", head="untied", head_bias=True, rotary_fraction=0.7, qk_norm=True)),
    "phi3": ("hub-phi3", dataclasses.replace(LLAMA, window=3, rotary_fraction=0.4)),
}  # fmt: skip
IMPORTED = ["gpt2_hub", "opt_post", "llama_llama3", "llama_biased_tied_linear", "mistral_window", "phi_square_normed",
            "phi3_fused", "qwen2_square_window", "qwen3_square_biased"]  # fmt: skip


def randomised(module):
    """Initialised, with no scale or bias left at 1 or 0."""
    variables = unbox(module.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
    leaves, tree = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [x + 0.2 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, moved)


def in_transformers(layout, module, tensors, config):
    """The reference model with our weights; all of them fit and none is lacking, tied copies apart."""
    settings = transformers.AutoConfig.for_model(**config)
    settings._attn_implementation = "eager"
    model = getattr(transformers, config["architectures"][0])(settings)
    found = model.load_state_dict({k: torch.tensor(np.asarray(v)) for k, v in tensors.items()}, strict=False)
    assert not found.unexpected_keys
    assert set(found.missing_keys) <= ({"lm_head.weight"} if module.config.head == "tied" else set())
    model.tie_weights()
    return model.eval()


def compare(module, variables, model):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, module.config.vocab_size, (2, 9))
    mask = np.arange(9) >= np.array([[0], [4]])
    ours = module.apply(variables, jnp.asarray(ids), jnp.asarray(mask))
    given = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask).long()}
    if model.config.model_type != "opt":
        given["position_ids"] = (given["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        theirs = model(**given)
    if module.config.head == "none":
        golden_cases.close(np.asarray(ours.last_hidden_state)[mask], theirs.last_hidden_state.numpy()[mask])
    else:
        golden_cases.close(np.asarray(ours.logits)[mask], theirs.logits.numpy()[mask])


@pytest.mark.parametrize("name", FRESH)
def test_a_module_of_ours_runs_in_transformers(name):
    layout, config = FRESH[name]
    module = DecoderLM(config)
    variables = randomised(module)
    tensors = engine.export_tensors(layout, module, variables)
    said = engine.layouts()[layout].to_config(module)
    assert said["model_type"] == name.split("-")[0].replace("llama3", "llama")
    compare(module, variables, in_transformers(layout, module, tensors, said))


@pytest.mark.parametrize("name", IMPORTED)
def test_an_import_with_other_weights_runs_in_transformers(name):
    case = golden_cases.load(name)
    layout, module = case.imported.layout, case.module
    variables = jax.tree.map(lambda x: x + 0.1, case.variables)
    tensors = engine.export_tensors(layout.name, module, variables)
    compare(module, variables, in_transformers(layout.name, module, tensors, layout.to_config(module)))


@pytest.mark.parametrize("name", ["llama_llama3", "opt_post", "gpt2_hub"])
def test_saved_to_a_folder_it_loads_by_from_pretrained(name, tmp_path):
    save_file = pytest.importorskip("safetensors.numpy").save_file
    json = pytest.importorskip("json")
    case = golden_cases.load(name)
    layout = case.imported.layout
    save_file(engine.export_tensors(layout.name, case.module, case.variables), tmp_path / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(layout.to_config(case.module)))
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    compare(case.module, case.variables, model.eval())
