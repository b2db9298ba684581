"""What we export of the U-Nets and the autoencoder loads in the reference, with no key missing, and computes the same.

The official repositories of ADM, consistency models and EDM are no packages: their parts run if KINDRED_REFERENCES
names a folder with the checkouts ``guided-diffusion``, ``consistency_models`` and ``edm``.
"""

import dataclasses
import importlib
import json
import os
import sys
import types
from pathlib import Path

import golden_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from checkpoints.importers.engine import export_tensors, layouts  # noqa: E402
from zoo.nn.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig  # noqa: E402
from zoo.nn.partitioning import abstract_variables, unbox  # noqa: E402
from zoo.nn.song_unet import SongUNet, SongUNetConfig  # noqa: E402
from zoo.nn.unet2d import UNet2D, UNet2DConfig  # noqa: E402
from zoo.nn.unet2d_condition import UNet2DCondition, UNet2DConditionConfig  # noqa: E402

torch.set_num_threads(1)
REFERENCES = Path(os.environ.get("KINDRED_REFERENCES", "/nowhere"))
SD = UNet2DConditionConfig(
    widths=(4, 8), num_blocks=1, cross_attention=(True, False), num_heads=(2, 2), context_width=6, norm_groups=2
)
VAE = AutoencoderKLConfig(widths=(4, 8), num_blocks=1, norm_groups=2, latent_channels=2, sample_size=8)
rng = np.random.default_rng(0)
X4, X3 = (rng.normal(size=(2, 8, 8, c)).astype(np.float32) for c in (4, 3))
CONTEXT, TIME = rng.normal(size=(2, 5, 6)).astype(np.float32), np.array([3.0, 871.0], np.float32)


def drawn(module, seed=0):
    leaves, tree = jax.tree.flatten(unbox(abstract_variables(module)))
    draws = np.random.default_rng(seed)
    made = [draws.normal(size=x.shape) / max(np.sqrt(np.prod(x.shape[:-1])), 1) for x in leaves]
    return jax.tree.unflatten(tree, [jnp.asarray(x, jnp.float32) for x in made])


def nchw(x):
    return torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)


def nhwc(x):
    return x.detach().permute(0, 2, 3, 1).numpy()


def filled(model, tensors):
    """The model with our tensors: every key, no other."""
    state = {k: torch.tensor(np.asarray(v)) for k, v in tensors.items()}
    model.load_state_dict(state, strict=True)
    return model.eval()


def both(layout, made_here, golden):
    """(module, variables, exported) of a model made here, and of an import of the library's own."""
    case = golden_cases.load(golden)
    assert case.imported.layout.name == layout
    yield made_here, (v := drawn(made_here)), export_tensors(layout, made_here, v)
    yield case.module, case.variables, export_tensors(case.imported)


def of(kind, layout, module):
    config = json.loads(json.dumps(layouts()[layout].to_config(module)))
    return kind.from_config(config)


def test_the_latent_unet():
    for module, variables, exported in both("diffusers-unet", UNet2DCondition(SD), "sd_linear"):
        reference = filled(of(diffusers.UNet2DConditionModel, "diffusers-unet", module), exported)
        with torch.no_grad():
            theirs = reference(nchw(X4), torch.tensor(TIME), torch.tensor(CONTEXT)).sample
        ours = jax.jit(module.apply)(variables, X4, TIME, CONTEXT).prediction
        golden_cases.close(ours, nhwc(theirs))


@pytest.mark.parametrize("golden", ["vae_new", "vae_bare"])
def test_the_autoencoder(golden):
    for module, variables, exported in both("diffusers-vae", AutoencoderKL(VAE), golden):
        reference = filled(of(diffusers.AutoencoderKL, "diffusers-vae", module), exported)
        with torch.no_grad():
            latents = reference.encode(nchw(X3)).latent_dist
            image = reference.decode(latents.mean).sample
        assert reference.config.scaling_factor == module.config.scaling_factor
        ours = jax.jit(module.apply)(variables, X3)
        golden_cases.close(ours.mean, nhwc(latents.mean))
        golden_cases.close(ours.logvar, nhwc(latents.logvar))
        golden_cases.close(ours.reconstruction, nhwc(image))


def test_the_published_configs_are_the_librarys():
    for config in (UNet2DConditionConfig.sd15(), UNet2DConditionConfig.sd21()):
        with torch.device("meta"):
            model = of(diffusers.UNet2DConditionModel, "diffusers-unet", UNet2DCondition(config))
        ours = jax.tree.leaves(unbox(abstract_variables(UNet2DCondition(config))))
        assert sum(p.numel() for p in model.parameters()) == sum(x.size for x in ours)


def checkout(folder, module):
    if not (REFERENCES / folder).exists():
        pytest.skip(f"no checkout {folder} in KINDRED_REFERENCES")
    sys.path.insert(0, str(REFERENCES / folder))
    return importlib.import_module(module)


def test_adm():
    unet = checkout("guided-diffusion", "guided_diffusion.unet")
    config = UNet2DConfig(
        image_size=8, base_width=32, widths=(32, 64), num_blocks=1, attention_factors=(2,), head_width=16, num_classes=3
    )
    for order in ("legacy", "new"):
        module = UNet2D(dataclasses.replace(config, attention_order=order))
        says = layouts()["openai-unet"].to_config(module)
        # 32 groups, as published: the golden cases have fewer, to be small
        reference = unet.UNetModel(
            8, 3, says["num_channels"], 6, says["num_res_blocks"], (2,), channel_mult=(1, 2), num_classes=3,
            num_head_channels=16, use_scale_shift_norm=True, resblock_updown=True,
            use_new_attention_order=says["use_new_attention_order"],
        )  # fmt: skip
        variables = drawn(module)
        filled(reference, export_tensors("openai-unet", module, variables))
        with torch.no_grad():
            theirs = reference(nchw(X3), torch.tensor(TIME), torch.tensor([2, 0]))
        ours = jax.jit(module.apply)(variables, X3, TIME, jnp.array([2, 0])).prediction
        golden_cases.close(ours, nhwc(theirs))


def test_songunet(monkeypatch):
    package, inner = types.ModuleType("torch_utils"), types.ModuleType("torch_utils.persistence")
    inner.persistent_class = lambda c: c  # it records source code for pickles
    package.persistence = inner
    monkeypatch.setitem(sys.modules, "torch_utils", package)
    monkeypatch.setitem(sys.modules, "torch_utils.persistence", inner)
    networks = checkout("edm", "training.networks")
    fresh = SongUNet(
        SongUNetConfig(
            image_size=8, base_width=8, widths=(8, 16), num_blocks=1, noise_width=16, embedding_width=32,
            embedding="fourier", encoder="residual", filter=(1, 3, 3, 1), augment_width=0,
        )
    )  # fmt: skip
    for module, variables, exported in both("edm-songunet", fresh, "song_ncsnpp"):
        says = layouts()["edm-songunet"].to_config(module)
        reference = networks.SongUNet(**{k: v for k, v in says.items() if k != "model_type"})
        # the filters are no weights: a model that was made here exports none
        filled(reference, exported)
        with torch.no_grad():
            theirs = reference(nchw(X3), torch.tensor(TIME) / 1000, None)
        ours = jax.jit(module.apply)(variables, X3, TIME / 1000).prediction
        golden_cases.close(ours, nhwc(theirs))
