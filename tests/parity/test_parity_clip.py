"""Exported CLIPs load in open_clip and transformers, with nothing missing or unexpected, and compute the same."""

import json

import golden_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints.importers.engine import export_tensors, layouts
from zoo.nn.clip import CLIP, CLIPConfig, CLIPTextConfig
from zoo.nn.clip_resnet import CLIPResNetConfig
from zoo.nn.partitioning import unbox
from zoo.nn.vit import ViTConfig

torch = pytest.importorskip("torch")
open_clip = pytest.importorskip("open_clip")
transformers = pytest.importorskip("transformers")
from safetensors.torch import save_file  # noqa: E402

TEXT = {"vocabulary": 30, "context": 8, "width": 16, "depth": 2, "num_heads": 2, "mlp_width": 24}
VIT = {"image_size": (12, 12), "patch_size": (4, 4), "width": 24, "depth": 2, "num_heads": 3, "mlp_width": 32,
       "patch_bias": False, "pre_norm": True, "epsilon": 1e-5}  # fmt: skip
QUICK, EXACT = {"activation": "quick_gelu"}, {"activation": "gelu"}
RESNET = CLIPResNetConfig((1, 1, 1, 1), width=2, num_heads=2, features=12, image_size=(64, 64))
FRESH = {
    "vit": ("openai-clip", CLIPConfig(ViTConfig(**VIT, **QUICK), CLIPTextConfig(**TEXT, **QUICK), 12)),
    "gelu": ("openai-clip", CLIPConfig(ViTConfig(**VIT, **EXACT), CLIPTextConfig(**TEXT, **EXACT, eot_id=29), 12)),
    "resnet": ("openai-clip", CLIPConfig(RESNET, CLIPTextConfig(**TEXT), 12)),
    "hub": ("hub-clip", CLIPConfig(ViTConfig(**VIT, **QUICK, antialias=False), CLIPTextConfig(**TEXT, **EXACT), 12)),
    "hub_end": (
        "hub-clip",
        CLIPConfig(ViTConfig(**VIT, **QUICK, antialias=False), CLIPTextConfig(**TEXT, **QUICK, eot_id=29), 12),
    ),
}


def reference(layout, config, tensors, folder):
    """The reference library's pooled vectors and logits, as a function of images and ids."""
    state = {k: torch.from_numpy(np.array(v)) for k, v in tensors.items()}
    if layout == "openai-clip":
        model_cfg = dict(config["model_cfg"])
        kind = open_clip.CustomTextCLIP if model_cfg.pop("custom_text", False) else open_clip.CLIP
        model = kind(**model_cfg)
        missing, unexpected = model.load_state_dict(state, strict=False)
        # batch counters are no weights: a fresh export has none
        assert not unexpected and not missing, (missing, unexpected)
        model.eval()

        def run(images, ids):
            image, text = model.encode_image(images), model.encode_text(ids)
            return image, text, model.get_logits(images, ids)[0]
    else:
        (folder / "config.json").write_text(json.dumps(config))
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        model, info = transformers.CLIPModel.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
        model.eval()

        def run(images, ids):
            out = model(input_ids=ids, pixel_values=images)
            pooled = (tower.pooler_output for tower in (out.vision_model_output, out.text_model_output))
            return *pooled, out.logits_per_image

    return run


def agree(module, variables, run, images, ids):
    with torch.no_grad():
        theirs = run(torch.from_numpy(np.array(images)).permute(0, 3, 1, 2), torch.from_numpy(np.array(ids)).long())
    ours = jax.jit(module.apply)(variables, jnp.asarray(images), jnp.asarray(ids))
    for a, b in zip((ours["image"]["pooled"], ours["text"]["pooled"], ours["logits"]), theirs, strict=True):
        golden_cases.close(a, b.numpy())


@pytest.mark.parametrize("name", FRESH)
def test_a_fresh_model_loads_in_the_reference_library(name, tmp_path):
    layout, config = FRESH[name]
    module = CLIP(config)
    images = jax.random.normal(jax.random.key(1), (2, *config.image.image_size, 3))
    ids = jnp.array([[3, 5, 29, 0, 0, 0, 0, 0], [4, 6, 7, 8, 29, 0, 0, 0], [1, 29, 0, 0, 0, 0, 0, 0]])
    variables = unbox(jax.jit(module.init)(jax.random.key(0), images, ids))
    tensors = export_tensors(layout, module, variables)
    agree(module, variables, reference(layout, layouts()[layout].to_config(module), tensors, tmp_path), images, ids)


@pytest.mark.parametrize("name", golden_cases.names("clip_"))
def test_an_imported_model_loads_back(name, tmp_path):
    case = golden_cases.load(name)
    run = reference(case.imported.layout.name, case.config, export_tensors(case.imported), tmp_path)
    agree(case.module, case.variables, run, case.inputs["images"], case.inputs["ids"])
