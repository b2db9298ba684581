"""Exported ViTs load in timm and transformers, with nothing missing or unexpected, and compute the same."""

import json

import golden_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints.importers.engine import export_tensors, layouts
from zoo.nn.partitioning import unbox
from zoo.nn.vit import ViT, ViTConfig, resize_positions

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")
from safetensors.torch import save_file  # noqa: E402

TINY = {"image_size": (12, 8), "patch_size": (4, 4), "width": 24, "depth": 2, "num_heads": 3, "mlp_width": 40}
DINO = dict(**{**TINY, "mlp_width": 48, "image_size": (12, 12)}, positions="class", layer_scale=0.5, mask_token=True)
FRESH = {
    "plain": ("timm-vit", ViTConfig(**TINY, classes=5)),
    "registers": ("timm-vit", ViTConfig(**TINY, registers=2, positions="patches", layer_scale=0.1, qk_norm=True)),
    "mean": ("timm-vit", ViTConfig(**TINY, classes=3, class_token=False, pool="mean", norm_after_pool=True)),
    "distilled": ("timm-vit", ViTConfig(**TINY, classes=3, distilled=True)),
    "clip": ("timm-vit", ViTConfig(**TINY, pre_norm=True, patch_bias=False, activation="quick_gelu", epsilon=1e-5)),
    "gated": ("timm-vit", ViTConfig(**TINY, gated=True, activation="silu", layer_scale=0.1)),
    "bare": ("timm-vit", ViTConfig(**TINY, positions="none", pool="none", qkv_bias=False)),
    "hub": ("hub-vit", ViTConfig(**TINY, epsilon=1e-12, antialias=False, pooler=True)),
    "dinov2": ("hub-dinov2", ViTConfig(**DINO, antialias=False)),
    "dinov2_registers": ("hub-dinov2", ViTConfig(**DINO, registers=3, classes=4, pool="token+mean")),
    "hub_classifier": ("hub-vit", ViTConfig(**TINY, epsilon=1e-12, antialias=False, classes=5)),
}


def reference(layout, config, tensors, folder):
    """Features of the reference library, as a function of images."""
    state = {k: torch.from_numpy(np.array(v)) for k, v in tensors.items()}
    if layout == "timm-vit":
        args = {"num_classes": config.get("num_classes", 1000), **config["model_args"]}
        model = timm.create_model(config["architecture"], **args)
        model.load_state_dict(state, strict=True)
        model.eval()

        def run(x):
            tokens = model.forward_features(x)
            return {"tokens": tokens, "pooled": model.forward_head(tokens, pre_logits=True), "logits": model(x)}
    else:
        (folder / "config.json").write_text(json.dumps(config))
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        kind = getattr(transformers, config["architectures"][0])
        model, info = kind.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
        model.eval()

        def run(x):
            out = getattr(model, model.base_model_prefix, model)(x)
            logits = {"logits": model(x).logits} if hasattr(model, "classifier") else {"pooled": out.pooler_output}
            return {"tokens": out.last_hidden_state, **logits}

    return lambda images: run(torch.from_numpy(np.array(images)).permute(0, 3, 1, 2))


def agree(module, variables, run, images):
    with torch.no_grad():
        theirs = run(images)
    ours = jax.jit(module.apply)(variables, images)
    for key in set(ours) & set(theirs):
        if not (key == "pooled" and module.config.pool == "none"):
            golden_cases.close(ours[key], theirs[key].numpy())


@pytest.mark.parametrize("name", FRESH)
def test_a_fresh_model_loads_in_the_reference_library(name, tmp_path):
    layout, config = FRESH[name]
    module = ViT(config)
    x = np.asarray(jax.random.normal(jax.random.key(1), (2, *config.image_size, 3)))
    variables = unbox(module.init(jax.random.key(0), jnp.asarray(x)))
    tensors = export_tensors(layout, module, variables)
    agree(module, variables, reference(layout, layouts()[layout].to_config(module), tensors, tmp_path), x)


@pytest.mark.parametrize("name", golden_cases.names("vit_"))
def test_an_imported_model_loads_back(name, tmp_path):
    case = golden_cases.load(name)
    run = reference(case.imported.layout.name, case.config, export_tensors(case.imported), tmp_path)
    agree(case.module, case.variables, run, case.inputs["images"])


def test_positions_are_resampled_as_timm_does():
    from timm.layers import resample_abs_pos_embed

    table = np.random.default_rng(0).normal(size=(2 + 7 * 5, 6)).astype(np.float32)
    for new in ((3, 3), (14, 10), (9, 4), (7, 6)):
        theirs = resample_abs_pos_embed(torch.from_numpy(table)[None], new, (7, 5), num_prefix_tokens=2)[0]
        golden_cases.close(resize_positions(jnp.asarray(table), (7, 5), new, prefix=2), theirs.numpy())
        patches = torch.from_numpy(table[2:]).reshape(1, 7, 5, 6).permute(0, 3, 1, 2)
        plain = torch.nn.functional.interpolate(patches, size=new, mode="bicubic").permute(0, 2, 3, 1).reshape(-1, 6)
        golden_cases.close(resize_positions(jnp.asarray(table), (7, 5), new, 2, antialias=False)[2:], plain.numpy())
