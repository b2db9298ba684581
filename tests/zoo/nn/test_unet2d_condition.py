"""Stable Diffusion's U-Net against diffusers' numbers, and what else the module promises."""

import dataclasses
import json

import golden_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import close

from checkpoints.importers.engine import ImporterError, export_tensors, import_tensors
from checkpoints.importers.layouts import diffusers_unet
from zoo.nn import partitioning
from zoo.nn.unet2d_condition import UNet2DCondition, UNet2DConditionConfig

TINY = UNet2DConditionConfig(
    widths=(4, 8), num_blocks=1, cross_attention=(True, False), num_heads=(2, 2), context_width=6, norm_groups=2
)
SMALL = dataclasses.replace(TINY, widths=(4,), cross_attention=(True,), num_heads=(2,))
CASES = ["sd_conv", "sd_linear", "sd_square"]


def call(case, prefix="", module=None, **settings):
    names = ("x", "time", "context", "padding_mask")
    given = {k: jnp.asarray(case.inputs[prefix + k]) for k in names if prefix + k in case.inputs}
    apply = jax.jit(lambda v, a: (module or case.module).apply(v, **a, **settings))
    return apply(case.variables, given)


def drawn(module, seed=0):
    abstract = partitioning.unbox(partitioning.abstract_variables(module))
    leaves, tree = jax.tree.flatten(abstract)
    rng = np.random.default_rng(seed)
    made = [rng.normal(size=x.shape) / max(np.sqrt(np.prod(x.shape[:-1])), 1) for x in leaves]
    return jax.tree.unflatten(tree, [jnp.asarray(x, jnp.float32) for x in made])


def inputs(config, batch=2, side=4, tokens=3, seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=(batch, *shape)), jnp.float32)  # noqa: E731
    return {
        "x": normal(side, side, config.in_channels), "time": jnp.linspace(3.0, 900.0, batch),
        "context": normal(tokens, config.context_width),
    }  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_every_feature_equals_the_reference(name):
    case = golden_cases.load(name)
    assert not case.imported.report.unused and not case.imported.report.missing
    for prefix in [""] + ["odd."] * ("odd.padding_mask" in case.inputs):
        out = call(case, prefix, train=True)
        close(out.prediction, case.outputs[f"{prefix}prediction"])
        close(out.middle, case.outputs[f"{prefix}middle"])
        assert len(out.encoder) == sum(k.startswith(f"{prefix}encoder") for k in case.outputs)
        for i, feature in enumerate(out.encoder):
            close(feature, case.outputs[f"{prefix}encoder{i}"])


@pytest.mark.parametrize("name", CASES)
def test_export_gives_back_the_same_bytes(name):
    case = golden_cases.load(name)
    for exported in (export_tensors(case.imported), export_tensors("diffusers-unet", case.module, case.variables)):
        assert set(exported) == set(case.tensors)
        for key, value in case.tensors.items():
            assert exported[key].shape == value.shape and exported[key].tobytes() == value.tobytes(), key
    again = json.loads(json.dumps(diffusers_unet.to_config(case.module)))
    assert import_tensors(case.tensors, again).module == case.module


def test_longer_padding_changes_nothing():
    module, given = UNet2DCondition(SMALL), inputs(SMALL)
    variables, mask = drawn(module), jnp.array([[True, True, True], [True, False, False]])
    apply = jax.jit(lambda v, a, m: module.apply(v, **a, padding_mask=m).prediction)
    longer = {**given, "context": jnp.pad(given["context"], ((0, 0), (0, 2), (0, 0)), constant_values=9.0)}
    close(apply(variables, longer, jnp.pad(mask, ((0, 0), (0, 2)))), apply(variables, given, mask))


def test_half_precision_is_near():
    case = golden_cases.load("sd_conv")
    out = call(case, module=case.module.clone(dtype=jnp.bfloat16))
    assert out.middle.dtype == jnp.bfloat16 and out.prediction.dtype == jnp.float32
    assert golden_cases.error(out.prediction, case.outputs["prediction"]) < 0.05


def gradients(module):
    given = inputs(module.config)
    loss = lambda v: jnp.sum(module.apply(v, **given).prediction ** 2)  # noqa: E731
    value, gradient = jax.jit(jax.value_and_grad(loss))(drawn(module))
    # a softmax does not see what all its keys share
    found = {"/".join(k.key for k in path): g for path, g in jax.tree.leaves_with_path(gradient)}
    return value, {path: g for path, g in found.items() if not path.endswith("key/bias")}


@pytest.mark.parametrize("config", [SMALL, pytest.param(TINY, marks=pytest.mark.slow)], ids=["small", "tiny"])
def test_gradients_reach_every_parameter(config):
    for path, g in gradients(UNet2DCondition(config))[1].items():
        assert np.isfinite(g).all() and np.abs(g).max() > 1e-5, path


@pytest.mark.slow
def test_rematerialisation_changes_nothing():
    value, gradient = gradients(UNet2DCondition(SMALL))
    value_again, gradient_again = gradients(UNet2DCondition(SMALL, remat=True))
    close(value_again, value, 1e-6)
    assert len(gradient) > 20 and all(
        np.abs(gradient_again[k] - g).max() <= 1e-4 * np.abs(g).max() for k, g in gradient.items()
    )


def test_dropout_follows_each_examples_key():
    config = dataclasses.replace(SMALL, dropout=0.5)
    module, given = UNet2DCondition(config), inputs(config, batch=3)
    variables, keys = drawn(module), jax.random.split(jax.random.key(1), 3)
    apply = jax.jit(lambda v, a, keys: module.apply(v, **a, train=True, keys=keys).prediction)
    whole = apply(variables, given, keys)
    turned = apply(variables, jax.tree.map(lambda a: a[::-1], given), keys[::-1])
    close(turned[::-1], whole)
    assert golden_cases.error(apply(variables, given, None), whole) > 0.01


@pytest.mark.slow
def test_sharded_over_eight_devices_it_computes_the_same():
    config = dataclasses.replace(TINY, widths=(8, 8), context_width=8)
    module, given = UNet2DCondition(config), inputs(config, batch=8)
    variables = drawn(module)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    places = partitioning.shardings(partitioning.abstract_variables(module), mesh)
    put = lambda path, x: jax.device_put(x, places["/".join(p.key for p in path)])  # noqa: E731
    split = jax.tree_util.tree_map_with_path(put, variables)
    apply = jax.jit(lambda v, a: module.apply(v, **a).prediction)
    close(apply(split, given), apply(variables, given))


@pytest.mark.parametrize("config", diffusers_unet.PUBLISHED, ids=["sd15", "sd21"])
def test_the_published_are_recognised_by_shape_alone(config):
    shapes = {f"down_blocks.{i}.resnets.0.conv2.weight": (w, w, 3, 3) for i, w in enumerate(config.widths)}
    shapes["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"] = (1280, config.context_width)
    shapes["conv_in.weight"] = (320, 9, 3, 3)
    shapes = {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes.items()}
    assert diffusers_unet.configure(None, shapes).config == dataclasses.replace(config, in_channels=9)
    assert diffusers_unet.configure(diffusers_unet.to_config(UNet2DCondition(config)), shapes).config == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"addition_embed_type": "text_time"}, "addition_embed_type = 'text_time'"),
        ({"class_embed_type": "timestep"}, "class_embed_type"),
        ({"act_fn": "gelu"}, "act_fn = 'gelu'"),
        ({"down_block_types": ["DownBlock2D", "AttnDownBlock2D"]}, "AttnDownBlock2D"),
        ({"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]}, "does not mirror"),
        ({"layers_per_block": [1, 2]}, "layers_per_block"),
        ({"transformer_layers_per_block": [1, 2]}, "transformer_layers_per_block"),
        ({"cross_attention_dim": [6, 7]}, "cross_attention_dim"),
        ({"downsample_padding": 0}, "downsample_padding = 0"),
        ({"norm_num_groups": None}, "norm_num_groups"),
        ({"time_embedding_dim": 5}, "time_embedding_dim = 5"),
        ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift"),
        ({"new_entry": 1}, "new_entry is unknown"),
    ],
)
def test_a_config_that_this_zoo_does_not_implement_is_refused(change, message):
    case = golden_cases.load("sd_conv")
    with pytest.raises(ImporterError, match=message):
        import_tensors(case.tensors, {**case.config, **change})


def test_an_unpublished_network_needs_its_config():
    with pytest.raises(ImporterError, match="--config FILE"):
        import_tensors(golden_cases.load("sd_conv").tensors)
    tensors = {k: v for k, v in golden_cases.load("sd_conv").tensors.items() if "resnets.0.conv2" not in k}
    with pytest.raises(ImporterError, match="--config FILE"):
        import_tensors(tensors)


def test_bad_arguments_are_named():
    given = inputs(TINY)

    def make(**change):  # traced only
        return jax.eval_shape(lambda a: UNet2DCondition(TINY).init(jax.random.key(0), **a), {**given, **change})

    with pytest.raises(ValueError, match="in_channels=4"):
        make(x=given["x"][..., :3])
    with pytest.raises(ValueError, match="context_width=6"):
        make(context=given["context"][..., :5])
    with pytest.raises(ValueError, match="num_heads must have one entry"):
        dataclasses.replace(TINY, num_heads=(2,))
    with pytest.raises(ValueError, match="must divide"):
        dataclasses.replace(TINY, num_heads=(2, 3))
