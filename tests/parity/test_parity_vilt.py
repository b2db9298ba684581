"""What we export of ViLT loads in the library, with no key missing or unexpected, and computes the same."""

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
from zoo.nn.vilt import SingleStreamVLM, ViLTConfig  # noqa: E402

torch.set_num_threads(1)
TINY = ViLTConfig(
    vocab_size=31, width=16, depth=2, num_heads=2, mlp_width=24, max_positions=8, image_size=12, patch_size=4
)
KINDS = {
    "ViltModel": "none", "ViltForMaskedLM": "mlm", "ViltForQuestionAnswering": "vqa",
    "ViltForImageAndTextRetrieval": "matching",
}  # fmt: skip


def loaded(kind, tensors, config, folder):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    st.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    options = {"add_pooling_layer": False} if not any("pooler" in k for k in tensors) else {}
    model, info = getattr(hf, kind).from_pretrained(folder, output_loading_info=True, **options)
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    assert not info["mismatched_keys"], info
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_model_loads_in_the_library(kind, tmp_path):
    labels = {"num_labels": 5} if KINDS[kind] == "vqa" else {}
    module = SingleStreamVLM(dataclasses.replace(TINY, head=KINDS[kind], **labels))
    random = np.random.default_rng(0)
    ids, real = np.array([[3, 4, 5, 6], [7, 8, 9, 0]], np.int32), np.array([[True] * 4, [True] * 3 + [False]])
    images = random.standard_normal((2, 8, 16, 3)).astype(np.float32)
    pixels = np.ones((2, 8, 16), bool)
    pixels[1, 4:], pixels[1, :, 8:] = False, False
    leaves, tree = jax.tree.flatten(unbox(module.init(jax.random.key(0), jnp.asarray(ids), jnp.asarray(images))))
    variables = tree.unflatten([x + 0.3 * random.standard_normal(x.shape).astype(np.float32) for x in leaves])
    written = layouts()["hub-vilt"].to_config(module)
    assert written["architectures"] == [kind]
    model = loaded(kind, export_tensors("hub-vilt", module, variables), written, tmp_path)
    ours = module.apply(variables, jnp.asarray(ids), jnp.asarray(images), jnp.asarray(real), jnp.asarray(pixels))
    with torch.no_grad():
        theirs = model(
            torch.tensor(ids).long(), torch.tensor(real).long(),
            pixel_values=torch.tensor(images).permute(0, 3, 1, 2), pixel_mask=torch.tensor(pixels).long(),
        )  # fmt: skip
    if kind == "ViltModel":
        golden_cases.close(ours["pooled"], theirs.pooler_output)
        golden_cases.close(ours["text_tokens"], theirs.last_hidden_state[:, :4])
    else:
        golden_cases.close(ours["scores"][:, None] if kind.endswith("Retrieval") else ours["logits"], theirs.logits)


@pytest.mark.parametrize("name", golden_cases.names("vilt"))
def test_an_import_goes_back_to_the_library(name, tmp_path):
    case = golden_cases.load(name)
    tensors = export_tensors(case.imported)
    if "mlm_score.bias" in tensors:
        pytest.skip("an older version's names: the newest library no longer knows them")
    loaded(case.config["architectures"][0], tensors, case.imported.layout.to_config(case.module), tmp_path)
