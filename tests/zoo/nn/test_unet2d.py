"""ADM's U-Net against numbers of the official repositories, and what else the module promises."""

import dataclasses

import flax.linen as nn
import golden_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import close

from checkpoints.importers.engine import ImporterError, export_tensors, import_tensors
from checkpoints.importers.layouts import openai_unet
from zoo.nn import partitioning
from zoo.nn.unet2d import UNet2D, UNet2DConfig
from zoo.nn.unet_blocks import ResidualBlock, downsample, group_norm, resize_nearest, sinusoids, upsample

TINY = UNet2DConfig(
    base_width=4, widths=(4, 8), num_blocks=1, attention_factors=(2,), head_width=4, num_classes=3, norm_groups=2
)
SMALL = dataclasses.replace(TINY, widths=(4,), attention_factors=(1,))


def call(case, prefix="", module=None, variables=None, **settings):
    given = {k: jnp.asarray(case.inputs[prefix + k]) for k in ("x", "time", "labels") if prefix + k in case.inputs}
    apply = jax.jit(lambda v, a: (module or case.module).apply(v, **a, **settings))
    return apply(variables or case.variables, given)


def drawn(module, seed=0, batch=1):
    """Random variables without zeros, so that everything is reached."""
    abstract = partitioning.unbox(partitioning.abstract_variables(module))
    leaves, tree = jax.tree.flatten(abstract)
    rng = np.random.default_rng(seed)
    made = [rng.normal(size=x.shape) / max(np.sqrt(np.prod(x.shape[:-1])), 1) for x in leaves]
    return jax.tree.unflatten(tree, [jnp.asarray(x, jnp.float32) for x in made])


def inputs(config, batch=2, side=4, seed=0):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(batch, side, side, config.in_channels)), jnp.float32)
    given = {"x": x, "time": jnp.linspace(3.0, 900.0, batch)}
    return given | ({"labels": jnp.arange(batch) % config.num_classes} if config.num_classes else {})


@pytest.mark.parametrize("name", ["adm_legacy", "adm_new", "adm_square", "adm_flash"])
def test_every_feature_equals_the_reference(name):
    case = golden_cases.load(name)
    assert not case.imported.report.unused and not case.imported.report.missing
    for prefix in [""] + ["wide."] * ("wide.x" in case.inputs):
        # dropout 0.1 in one of the cases: without keys there is none, in training neither
        out = call(case, prefix, train=True)
        close(out.prediction, case.outputs[f"{prefix}prediction"])
        close(out.middle, case.outputs[f"{prefix}middle"])
        assert len(out.encoder) == sum(k.startswith(f"{prefix}encoder") for k in case.outputs)
        for i, feature in enumerate(out.encoder):
            close(feature, case.outputs[f"{prefix}encoder{i}"])


@pytest.mark.parametrize("name", ["adm_legacy", "adm_new", "adm_square", "adm_flash"])
def test_export_gives_back_the_same_bytes(name):
    case = golden_cases.load(name)
    for exported in (
        export_tensors(case.imported),
        export_tensors("openai-unet", case.module, case.variables),
    ):
        assert set(exported) == set(case.tensors)
        for key, value in case.tensors.items():
            assert exported[key].shape == value.shape and exported[key].tobytes() == value.tobytes(), key
    again = openai_unet.to_config(case.module)
    assert import_tensors(case.tensors, again).module == case.module


def test_half_precision_is_near_and_its_norms_are_float32():
    case = golden_cases.load("adm_legacy")
    out = call(case, module=case.module.clone(dtype=jnp.bfloat16))
    assert out.middle.dtype == jnp.bfloat16 and out.prediction.dtype == jnp.float32
    assert golden_cases.error(out.prediction, case.outputs["prediction"]) < 0.05
    x = 100.0 + jnp.arange(8.0).reshape(1, 2, 2, 2)
    y = group_norm(2, 1, 1e-5, jnp.bfloat16, "n").init_with_output(jax.random.key(0), x)[0]
    close(y.astype(jnp.float32), (x - x.mean()) / x.std(), 1e-2)


def gradients(module):
    given = inputs(module.config)
    loss = lambda v: jnp.sum(module.apply(v, **given).prediction ** 2)  # noqa: E731
    value, gradient = jax.jit(jax.value_and_grad(loss))(drawn(module))
    # a softmax does not see what all its keys share
    found = {"/".join(k.key for k in path): g for path, g in jax.tree.leaves_with_path(gradient)}
    return value, {path: g for path, g in found.items() if not path.endswith("key/bias")}


def test_gradients_reach_every_parameter():
    for path, g in gradients(UNet2D(TINY))[1].items():
        assert np.isfinite(g).all() and np.abs(g).max() > 1e-5, path


def test_rematerialisation_changes_nothing():
    value, gradient = gradients(UNet2D(SMALL))
    value_again, gradient_again = gradients(UNet2D(SMALL, remat=True))
    close(value_again, value, 1e-6)
    assert len(gradient) > 20 and all(
        np.abs(gradient_again[k] - g).max() <= 1e-4 * np.abs(g).max() for k, g in gradient.items()
    )


def test_dropout_follows_each_examples_key():
    config = dataclasses.replace(TINY, dropout=0.5)
    module, given = UNet2D(config), inputs(config, batch=3)
    variables, keys = drawn(module), jax.random.split(jax.random.key(1), 3)
    apply = jax.jit(lambda v, a, keys: module.apply(v, **a, train=True, keys=keys).prediction)
    whole = apply(variables, given, keys)
    turned = apply(variables, jax.tree.map(lambda a: a[::-1], given), keys[::-1])
    close(turned[::-1], whole)
    assert golden_cases.error(apply(variables, given, None), whole) > 0.01

    def used(variables, given, keys):
        seen = []

        def watch(call, args, kwargs, context):
            seen.extend(args[2:] if isinstance(context.module, ResidualBlock) else ())
            return call(*args, **kwargs)

        with nn.intercept_methods(watch):
            module.apply(variables, **given, keys=keys)
        return jnp.stack([jax.random.key_data(k) for k in seen])

    seen = np.asarray(jax.jit(used)(variables, given, keys)).reshape(-1, 2)
    assert len(np.unique(seen, axis=0)) == len(seen) == 3 * 10  # each layer has its own


def test_sharded_over_eight_devices_it_computes_the_same():
    config = dataclasses.replace(TINY, base_width=8, widths=(8, 8))
    module, given = UNet2D(config), inputs(config, batch=8)
    variables = drawn(module)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    places = partitioning.shardings(partitioning.abstract_variables(module), mesh)
    assert sum(any(s.spec) for s in places.values()) > 20
    put = lambda path, x: jax.device_put(x, places["/".join(p.key for p in path)])  # noqa: E731
    split = jax.tree_util.tree_map_with_path(put, variables)
    apply = jax.jit(lambda v, a: module.apply(v, **a).prediction)
    close(apply(split, given), apply(variables, given))


def test_waves_and_resampling():
    t, half = np.array([0.5, 970.0]), 3
    angles = t[:, None] * 10000.0 ** (-np.arange(half) / half)
    close(sinusoids(jnp.asarray(t, jnp.float32), 6), np.concatenate([np.cos(angles), np.sin(angles)], 1))
    angles = t[:, None] * 10000.0 ** (-np.arange(half) / (half - 1))
    ours = sinusoids(jnp.asarray(t, jnp.float32), 6, shift=1.0, sine_first=True)
    close(ours, np.concatenate([np.sin(angles), np.cos(angles)], 1))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 6, 3)), jnp.float32)
    close(downsample(x), x.reshape(2, 2, 2, 3, 2, 3).mean((2, 4)))
    close(upsample(x)[:, ::2, 1::2], x)
    for taps in [(1, 1), (1, 3, 3, 1)]:
        y = jnp.asarray(np.random.default_rng(1).normal(size=(2, 2, 3, 3)), jnp.float32)
        close(jnp.sum(upsample(y, taps) * x), 4 * jnp.sum(y * downsample(x, taps)), 1e-5)  # transposes, times 4
    close(upsample(jnp.ones((1, 4, 4, 1)), (1, 3, 3, 1))[0, 2:-2, 2:-2, 0], np.ones((4, 4)))
    close(resize_nearest(x, 7, 6), x[:, jnp.array([0, 0, 1, 1, 2, 2, 3])])
    close(resize_nearest(x, 4, 9), x[:, :, jnp.array([0, 0, 1, 2, 2, 3, 4, 4, 5])])


def test_published_networks_have_their_groups_and_heads():
    assert UNet2DConfig().norm_groups == 32 and UNet2DConfig.adm_128().heads(512) == 4
    assert UNet2DConfig.adm_256().heads(512) == 8
    x = np.random.default_rng(0).normal(size=(1, 3, 3, 64)).astype(np.float32)
    ours = group_norm(64, 32, 1e-5, jnp.float32, "n").init_with_output(jax.random.key(0), x)[0]
    grouped = x.reshape(9, 32, 2).transpose(1, 0, 2).reshape(32, -1)
    centred = (grouped - grouped.mean(1)[:, None]) / np.sqrt(grouped.var(1)[:, None] + 1e-5)
    close(ours, centred.reshape(32, 9, 2).transpose(1, 0, 2).reshape(x.shape))


@pytest.mark.parametrize("config", openai_unet.PUBLISHED, ids=lambda c: f"{c.image_size}-{c.attention_order}")
def test_the_published_are_recognised_by_shape_alone(config):
    c = config
    shapes = {
        "input_blocks.0.0.weight": (c.widths[0], 3, 3, 3), "out.2.weight": (c.out_channels, c.widths[0], 3, 3),
        "time_embed.0.weight": (4 * c.base_width, c.base_width), "label_emb.weight": (c.num_classes, 1),
    }  # fmt: skip
    for kind, place, _, width in openai_unet.walk(c):
        if kind == "attention":
            ones = (1, 1) if c.attention_order == "flash" else (1,)
            shapes[f"{place}.qkv.weight"] = (3 * width, width, *ones)
        else:
            shapes[f"{place}.in_layers.2.weight"] = shapes[f"{place}.out_layers.3.weight"] = (width, 1, 3, 3)
            shapes[f"{place}.emb_layers.1.weight"] = (width * (1 + c.scale_shift), 1)
    if not c.num_classes:
        del shapes["label_emb.weight"]
    shapes = {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes.items()}
    assert openai_unet.configure(None, shapes).config == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_head_channels": -1, "num_heads": None}, "num_head_channels and num_heads are missing"),
        ({"image_size": None}, "image_size is missing"),
        ({"num_res_blocks": 2}, "num_res_blocks = 2"),
        ({"channel_mult": "1,2,4"}, "channel_mult"),
        ({"channel_mult": ""}, "no default"),
        ({"attention_resolutions": "8"}, "attention_resolutions"),
        ({"class_cond": False}, "class_cond"),
        ({"learn_sigma": False}, "learn_sigma"),
        ({"use_scale_shift_norm": False}, "use_scale_shift_norm"),
        ({"resblock_updown": False}, "resblock_updown"),
        ({"num_head_channels": -1, "num_heads": 2, "num_heads_upsample": 1}, "num_heads_upsample"),
        ({"dims": 3}, "dims is no argument"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(change, message):
    case = golden_cases.load("adm_legacy")
    with pytest.raises(ImporterError, match=message):
        import_tensors(case.tensors, {**case.config, **change})


def test_an_unpublished_network_needs_its_arguments():
    case = golden_cases.load("adm_legacy")
    with pytest.raises(ImporterError, match="--config FILE"):
        import_tensors(case.tensors)


def test_bad_arguments_are_named():
    given = inputs(TINY)

    def make(config, **change):  # traced only
        return jax.eval_shape(lambda a: UNet2D(config).init(jax.random.key(0), **a), {**given, **change})

    for change, message in [
        ({"labels": None}, "needs labels"),
        ({"x": given["x"][:, :3]}, "divisible by 2, got 3 x 4"),
        ({"x": given["x"][..., :1]}, "in_channels=3"),
    ]:
        with pytest.raises(ValueError, match=message):
            make(TINY, **change)
    unlabelled = dataclasses.replace(TINY, num_classes=0)
    with pytest.raises(ValueError, match="takes no labels"):
        make(unlabelled)
    with pytest.raises(ValueError, match="attention_order"):
        dataclasses.replace(TINY, attention_order="old")
    with pytest.raises(ValueError, match="attention_factors"):
        dataclasses.replace(TINY, attention_factors=(3,))
    with pytest.raises(ValueError, match="head_width=3 does not divide 8"):
        make(dataclasses.replace(TINY, head_width=3))
    with pytest.raises(ValueError, match="3 heads do not divide 8"):
        make(dataclasses.replace(TINY, head_width=None, num_heads=3))
    with pytest.raises(ValueError, match="3 groups do not divide 4"):
        make(dataclasses.replace(TINY, norm_groups=3))
    with pytest.raises(ValueError, match="even"):
        sinusoids(given["time"], 5)
