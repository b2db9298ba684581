"""DDPM++ and NCSN++ against numbers of the official repository, and what else the module promises."""

import dataclasses

import golden_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import close

from checkpoints.importers.engine import ImporterError, export_tensors, import_tensors
from checkpoints.importers.layouts import edm_songunet
from zoo.nn import partitioning
from zoo.nn.song_unet import SongUNet, SongUNetConfig, edm_denoise, edm_precondition

TINY = SongUNetConfig(
    image_size=4, base_width=4, widths=(4, 8), num_blocks=1, noise_width=4, embedding_width=8, num_classes=3,
    augment_width=2,
)  # fmt: skip
SMALL = dataclasses.replace(TINY, widths=(4,), attention_factors=(1,))
CASES = ["song_ddpmpp", "song_ncsnpp", "song_skip", "song_square"]
ARGUMENTS = ("x", "noise", "labels", "augment")


def call(case, prefix="", module=None, **settings):
    given = {k: jnp.asarray(case.inputs[prefix + k]) for k in ARGUMENTS if prefix + k in case.inputs}
    apply = jax.jit(lambda v, a: (module or case.module).apply(v, **a, **settings))
    return apply(case.variables, given)


def drawn(module, seed=0):
    abstract = partitioning.unbox(partitioning.abstract_variables(module))
    leaves, tree = jax.tree.flatten(abstract)
    rng = np.random.default_rng(seed)
    made = [rng.normal(size=x.shape) / max(np.sqrt(np.prod(x.shape[:-1])), 1) for x in leaves]
    return jax.tree.unflatten(tree, [jnp.asarray(x, jnp.float32) for x in made])


def inputs(config, batch=2, side=4, seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=(batch, *shape)), jnp.float32)  # noqa: E731
    given = {"x": normal(side, side, config.in_channels), "noise": normal(), "augment": normal(config.augment_width)}
    return given | {"labels": jnp.arange(batch) % config.num_classes}


@pytest.mark.parametrize("name", CASES)
def test_every_feature_equals_the_reference(name):
    case = golden_cases.load(name)
    assert not case.imported.report.unused and not case.imported.report.missing
    for prefix in [""] + ["wide."] * ("wide.x" in case.inputs):
        out = call(case, prefix, train=True)
        close(out.prediction, case.outputs[f"{prefix}prediction"])
        close(out.middle, case.outputs[f"{prefix}middle"])
        assert len(out.encoder) == sum(k.startswith(f"{prefix}encoder") for k in case.outputs)
        for i, feature in enumerate(out.encoder):
            close(feature, case.outputs[f"{prefix}encoder{i}"])


def test_the_denoiser_equals_the_reference():
    case = golden_cases.load("song_ddpmpp")
    x, sigma = jnp.asarray(case.inputs["denoise.x"]), jnp.asarray(case.inputs["denoise.sigma"])
    network = lambda y, c: case.module.apply(case.variables, y, c, jnp.array([2, 0])).prediction  # noqa: E731
    close(jax.jit(lambda x, s: edm_denoise(network, x, s))(x, sigma), case.outputs["denoised"])
    c_skip, c_out, c_in, c_noise = edm_precondition(jnp.array([0.5, 2.0]), 0.5)
    close(c_skip, [0.5, 0.25 / 4.25])
    close(c_out, [np.sqrt(0.125), 1 / np.sqrt(4.25)])
    close(c_in, [np.sqrt(2.0), 1 / np.sqrt(4.25)])
    close(c_noise, np.log([0.5, 2.0]) / 4)


@pytest.mark.parametrize("name", CASES)
def test_export_gives_back_the_same_bytes(name):
    case = golden_cases.load(name)
    exported = export_tensors(case.imported)
    assert list(exported) == list(case.tensors)
    for key, value in case.tensors.items():
        assert exported[key].shape == value.shape and exported[key].tobytes() == value.tobytes(), key
    assert set(export_tensors("edm-songunet", case.module, case.variables)) == set(case.tensors)
    assert import_tensors(case.tensors, edm_songunet.to_config(case.module)).module == case.module


def test_half_precision_is_near():
    case = golden_cases.load("song_ncsnpp")
    out = call(case, module=case.module.clone(dtype=jnp.bfloat16))
    assert out.middle.dtype == jnp.bfloat16 and out.prediction.dtype == jnp.float32
    assert golden_cases.error(out.prediction, case.outputs["prediction"]) < 0.05


def gradients(module):
    given = inputs(module.config)
    loss = lambda v: jnp.sum(module.apply(v, **given).prediction ** 2)  # noqa: E731
    value, gradient = jax.jit(jax.value_and_grad(loss))(drawn(module))
    # a softmax does not see what all its keys share
    found = {"/".join(k.key for k in path): g for path, g in jax.tree.leaves_with_path(gradient["params"])}
    return value, {path: g for path, g in found.items() if not path.endswith("key/bias")}


@pytest.mark.parametrize("config", [SMALL, pytest.param(TINY, marks=pytest.mark.slow)], ids=["small", "tiny"])
def test_gradients_reach_every_parameter(config):
    for path, g in gradients(SongUNet(config))[1].items():
        assert np.isfinite(g).all() and np.abs(g).max() > 1e-5, path


@pytest.mark.slow
def test_rematerialisation_changes_nothing():
    value, gradient = gradients(SongUNet(SMALL))
    value_again, again = gradients(SongUNet(SMALL, remat=True))
    close(value_again, value, 1e-6)
    assert len(gradient) > 20
    for path, g in gradient.items():
        assert np.abs(again[path] - g).max() <= 1e-4 * np.abs(g).max(), path


def test_dropout_follows_each_examples_key():
    config = dataclasses.replace(SMALL, dropout=0.5)
    module, given = SongUNet(config), inputs(config, batch=3)
    variables, keys = drawn(module), jax.random.split(jax.random.key(1), 3)
    apply = jax.jit(lambda v, a, keys: module.apply(v, **a, train=True, keys=keys).prediction)
    whole = apply(variables, given, keys)
    turned = apply(variables, jax.tree.map(lambda a: a[::-1], given), keys[::-1])
    close(turned[::-1], whole)
    assert golden_cases.error(apply(variables, given, None), whole) > 0.01


def test_a_forgotten_label_is_no_label():
    config = dataclasses.replace(SMALL, label_dropout=0.5)
    module, given = SongUNet(config), inputs(config, batch=16)
    variables, keys = drawn(module), jax.random.split(jax.random.key(1), 16)
    apply = jax.jit(lambda v, a, keys: module.apply(v, **a, train=True, keys=keys).prediction)
    told, untold = (apply(variables, given | {"labels": y}, None) for y in (given["labels"], jnp.full(16, -1)))
    some = apply(variables, given, keys)
    differs = lambda other: np.abs(some - other).max((1, 2, 3)) > 1e-5  # noqa: E731
    kept, lost = ~differs(told), ~differs(untold)
    assert (kept ^ lost).all() and 3 < lost.sum() < 13


@pytest.mark.slow
def test_sharded_over_eight_devices_it_computes_the_same():
    config = dataclasses.replace(TINY, base_width=8, widths=(8, 8))
    module, given = SongUNet(config), inputs(config, batch=8)
    variables = drawn(module)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    places = partitioning.shardings(partitioning.abstract_variables(module), mesh)
    put = lambda path, x: jax.device_put(x, places["/".join(p.key for p in path)])  # noqa: E731
    split = jax.tree_util.tree_map_with_path(put, variables)
    apply = jax.jit(lambda v, a: module.apply(v, **a).prediction)
    close(apply(split, given), apply(variables, given))


def test_frequencies_are_drawn_once_and_are_no_parameters():
    config = dataclasses.replace(SMALL, embedding="fourier", noise_width=512, num_classes=0)
    module, given = SongUNet(config), inputs(TINY)
    del given["labels"]
    made = jax.jit(lambda key: module.init(key, **given)["constants"]["frequencies"])(jax.random.key(0))
    assert made.shape == (256,) and 13 < made.std() < 19


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder_type": "skip"}, "encoder_type = 'skip', but the weights say 'standard'"),
        ({"channel_mult": [1, 2, 3]}, "channel_mult"),
        ({"attn_resolutions": [8]}, "attn_resolutions"),
        ({"img_channels": 1}, "in_channels = 1"),
        ({"model_type": "DhariwalUNet"}, "model_type = 'DhariwalUNet'"),
        ({"new_entry": 1}, "new_entry is no argument"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(change, message):
    case = golden_cases.load("song_ddpmpp")
    with pytest.raises(ImporterError, match=message):
        import_tensors(case.tensors, change, layout="edm-songunet")


def test_rates_come_from_the_config():
    case = golden_cases.load("song_ddpmpp")
    config = {"dropout": 0.13, "label_dropout": 0.2, "attn_resolutions": [4, 16], "sigma_data": 0.5, "img_channels": 3}
    made = import_tensors(case.tensors, config).module.config
    assert made == dataclasses.replace(case.module.config, dropout=0.13, label_dropout=0.2)


def test_unknown_filters_and_resolutions_are_refused():
    tensors = golden_cases.load("song_ddpmpp").tensors
    odd = {k: np.zeros((1, 1, 3, 3), np.float32) if k.endswith("resample_filter") else v for k, v in tensors.items()}
    with pytest.raises(ImporterError, match="3"):
        import_tensors(odd)
    with pytest.raises(ImporterError, match="enc.4x4_block0.conv1.weight missing"):
        import_tensors({k: v for k, v in tensors.items() if k != "enc.4x4_block0.conv1.weight"})
    with pytest.raises(ImporterError, match="--config FILE"):
        import_tensors({k: v for k, v in tensors.items() if not k.endswith("resample_filter")})
    with pytest.raises(ImporterError, match="halves"):
        import_tensors({k.replace("2x2", "3x3"): v for k, v in tensors.items()})


def test_bad_arguments_are_named():
    given = inputs(TINY)

    def make(config, **change):  # traced only
        return jax.eval_shape(lambda a: SongUNet(config).init(jax.random.key(0), **a), {**given, **change})

    for change, message in [
        ({"labels": None}, "needs labels"),
        ({"x": given["x"][:, :3]}, "divisible by 2, got 3 x 4"),
        ({"x": given["x"][..., :1]}, "in_channels=3"),
        ({"augment": given["augment"][:, :1]}, "augment_width=2"),
    ]:
        with pytest.raises(ValueError, match=message):
            make(TINY, **change)
    with pytest.raises(ValueError, match="takes no labels"):
        make(dataclasses.replace(TINY, num_classes=0))
    with pytest.raises(ValueError, match="encoder must be one of"):
        dataclasses.replace(TINY, encoder="none")
    with pytest.raises(ValueError, match="attention_factors"):
        dataclasses.replace(TINY, attention_factors=(4,))
