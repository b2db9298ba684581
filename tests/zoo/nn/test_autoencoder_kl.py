"""Stable Diffusion's autoencoder against diffusers' numbers, and what else the module promises."""

import dataclasses
import json

import golden_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import close

from checkpoints.importers.engine import ImporterError, export_tensors, import_tensors
from checkpoints.importers.layouts import diffusers_vae
from zoo.nn import partitioning
from zoo.nn.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig, sample_latents

TINY = AutoencoderKLConfig(widths=(4, 8), num_blocks=1, norm_groups=2, latent_channels=2)
SMALL = dataclasses.replace(TINY, widths=(4,))
CASES = ["vae_new", "vae_old", "vae_bare"]


def drawn(module, seed=0):
    abstract = partitioning.unbox(partitioning.abstract_variables(module))
    leaves, tree = jax.tree.flatten(abstract)
    rng = np.random.default_rng(seed)
    made = [rng.normal(size=x.shape) / max(np.sqrt(np.prod(x.shape[:-1])), 1) for x in leaves]
    return jax.tree.unflatten(tree, [jnp.asarray(x, jnp.float32) for x in made])


def images(batch=2, side=4):
    return jnp.asarray(np.random.default_rng(0).normal(size=(batch, side, side, 3)), jnp.float32)


@pytest.mark.parametrize("name", CASES)
def test_latents_and_images_equal_the_reference(name):
    case = golden_cases.load(name)
    assert not case.imported.report.unused and not case.imported.report.missing
    config = case.module.config
    assert (config.scaling_factor, config.shift_factor) == (0.3, 0.1 if name == "vae_bare" else 0.0)
    for prefix in [""] + ["wide."] * ("wide.x" in case.inputs):
        x = jnp.asarray(case.inputs[f"{prefix}x"])
        out = jax.jit(lambda v, x: case.module.apply(v, x, train=True))(case.variables, x)
        close(out.mean, case.outputs[f"{prefix}mean"])
        close(out.logvar, case.outputs[f"{prefix}logvar"])
        close(out.reconstruction, case.outputs[f"{prefix}image"])


@pytest.mark.parametrize("name", CASES)
def test_export_gives_back_the_same_bytes(name):
    case = golden_cases.load(name)
    exported = export_tensors(case.imported)
    assert list(exported) == list(case.tensors)
    for key, value in case.tensors.items():
        assert exported[key].shape == value.shape and exported[key].tobytes() == value.tobytes(), key
    fresh = set(export_tensors("diffusers-vae", case.module, case.variables))
    assert not any(old in key for key in fresh for old in (".query.", ".key.", ".value.", ".proj_attn."))
    assert name == "vae_old" or fresh == set(case.tensors)
    again = json.loads(json.dumps(diffusers_vae.to_config(case.module)))
    assert import_tensors(case.tensors, again).module == case.module


def jitted(module, variables, method, x):
    return jax.jit(lambda v, x: module.apply(v, x, method=method))(variables, x)


def test_encode_decode_sample_and_scale():
    module, x = AutoencoderKL(TINY), images(3)
    variables, keys = drawn(module), jax.random.split(jax.random.key(0), 3)
    mean, logvar = jitted(module, variables, "encode", x)
    drawn_ones = sample_latents(mean, logvar, keys)
    noise = jnp.stack([jax.random.normal(k, mean.shape[1:]) for k in keys])
    close(drawn_ones, mean + jnp.sqrt(jnp.exp(logvar)) * noise)
    out = jax.jit(lambda v, x, k: module.apply(v, x, keys=k))(variables, x, keys)
    close(out.mean, mean)
    close(out.reconstruction, jitted(module, variables, "decode", drawn_ones))
    config = dataclasses.replace(TINY, scaling_factor=0.25, shift_factor=0.5)
    close(config.scale(jnp.array([0.5, 4.5])), [0.0, 1.0])
    close(config.unscale(config.scale(mean)), mean)
    assert AutoencoderKLConfig.sd().scaling_factor == 0.18215


def test_the_log_variance_is_kept_within_bounds():
    module, x = AutoencoderKL(TINY), images()
    variables = drawn(module)
    variables["params"]["quant"]["bias"] = jnp.array([0.0, 0.0, 1e3, -1e3])
    _, logvar = jitted(module, variables, "encode", x)
    assert (logvar[..., 0] == 20).all() and (logvar[..., 1] == -30).all()


def test_half_precision_is_near():
    case = golden_cases.load("vae_new")
    x = jnp.asarray(case.inputs["x"])
    out = jax.jit(case.module.clone(dtype=jnp.bfloat16).apply)(case.variables, x)
    assert out.mean.dtype == out.reconstruction.dtype == jnp.float32
    assert golden_cases.error(out.mean, case.outputs["mean"]) < 0.05
    assert golden_cases.error(out.reconstruction, case.outputs["image"]) < 0.1


def gradients(module):
    x, keys = images(), jax.random.split(jax.random.key(0), 2)
    loss = lambda v: jnp.sum(module.apply(v, x, keys=keys).reconstruction ** 2)  # noqa: E731
    value, gradient = jax.jit(jax.value_and_grad(loss))(drawn(module))
    # a softmax does not see what all its keys share
    found = {"/".join(k.key for k in path): g for path, g in jax.tree.leaves_with_path(gradient)}
    return value, {path: g for path, g in found.items() if not path.endswith("key/bias")}


def test_gradients_reach_every_parameter():
    for path, g in gradients(AutoencoderKL(TINY))[1].items():
        assert np.isfinite(g).all() and np.abs(g).max() > 1e-5, path


@pytest.mark.slow
def test_rematerialisation_changes_nothing():
    value, gradient = gradients(AutoencoderKL(SMALL))
    value_again, gradient_again = gradients(AutoencoderKL(SMALL, remat=True))
    close(value_again, value, 1e-6)
    assert len(gradient) > 20 and all(
        np.abs(gradient_again[k] - g).max() <= 1e-4 * np.abs(g).max() for k, g in gradient.items()
    )


def test_without_a_config_only_the_published_one_is_known():
    with pytest.raises(ImporterError, match="--config FILE"):
        import_tensors(golden_cases.load("vae_new").tensors)
    shapes = {
        f"encoder.down_blocks.{i}.resnets.0.conv2.weight": (w, w, 3, 3) for i, w in enumerate((128, 256, 512, 512))
    }
    shapes["decoder.conv_in.weight"] = (512, 4, 3, 3)
    shapes = {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes.items()}
    assert diffusers_vae.configure(None, shapes).config == AutoencoderKLConfig.sd()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act_fn": "relu"}, "act_fn = 'relu'"),
        ({"down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]}, "AttnDownEncoderBlock2D"),
        ({"latents_mean": [0.0]}, "latents_mean"),
        ({"new_entry": 1}, "new_entry is unknown"),
    ],
)
def test_a_config_that_this_zoo_does_not_implement_is_refused(change, message):
    case = golden_cases.load("vae_new")
    with pytest.raises(ImporterError, match=message):
        import_tensors(case.tensors, {**case.config, **change})


def test_bad_arguments_are_named():
    module, x = AutoencoderKL(TINY), images()
    variables = drawn(module)
    with pytest.raises(ValueError, match="in_channels=3"):
        module.apply(variables, x[..., :2])
    with pytest.raises(ValueError, match="divisible by 2, got 3 x 4"):
        module.apply(variables, x[:, :3])
    with pytest.raises(ValueError, match="latent_channels=2"):
        module.apply(variables, x, method="decode")
