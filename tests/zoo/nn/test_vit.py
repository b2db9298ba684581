"""ViT against timm's and the hub's outputs, and what must hold whatever the weights are."""

import dataclasses

import golden_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from checkpoints.importers.engine import ImporterError, export_tensors, import_tensors, layouts
from zoo.nn import partitioning
from zoo.nn.vit import ViT, ViTConfig, resize_positions

CASES = golden_cases.names("vit_")


@pytest.mark.parametrize("name", CASES)
def test_every_feature_equals_the_reference(name):
    case = golden_cases.load(name)
    assert not case.imported.report.missing and not case.imported.report.unused
    apply = jax.jit(case.module.apply)
    out = apply(case.variables, case.inputs["images"])
    for key, reference in case.outputs.items():
        mode, feature = key.split(".")
        if mode == "other":
            golden_cases.close(apply(case.variables, case.inputs["other"])[feature], reference)
        elif mode == "masked":
            hidden = apply(case.variables, case.inputs["images"], masked=case.inputs["masked"])
            golden_cases.close(hidden[feature], reference)
            assert golden_cases.error(out[feature], reference) > 1e-2
        else:
            golden_cases.close(out[feature], reference)


@pytest.mark.parametrize("name", CASES)
def test_exports_are_the_same_bytes(name):
    case = golden_cases.load(name)
    again = export_tensors(case.imported)
    assert list(again) == list(case.tensors)
    for key, x in case.tensors.items():
        assert again[key].dtype == x.dtype and again[key].tobytes() == x.tobytes(), key


def tiny(**changes):
    settings = {
        "image_size": (8, 8),
        "patch_size": (4, 4),
        "width": 16,
        "depth": 2,
        "num_heads": 2,
        "mlp_width": 24,
        "classes": 3,
    }
    return ViTConfig(**{**settings, **changes})


def ready(config, **settings):
    module = ViT(config, **settings)
    x = jax.random.normal(jax.random.key(1), (2, *config.image_size, 3))
    return module, partitioning.unbox(module.init(jax.random.key(0), x)), x


FULL = {"registers": 2, "layer_scale": 0.5, "qk_norm": True, "gated": True, "activation": "silu", "pre_norm": True}


def test_remat_changes_neither_outputs_nor_gradients_and_all_parameters_learn():
    config = tiny(**FULL)
    module, variables, x = ready(config)
    weigh = jax.random.normal(jax.random.key(2), (config.width,))

    def loss(v, module):
        out = module.apply(v, x)
        return jnp.mean(out["tokens"] @ weigh) + jnp.mean(out["logits"] ** 2)

    plain = jax.jit(jax.value_and_grad(lambda v: loss(v, module)))(variables)
    again = jax.jit(jax.value_and_grad(lambda v: loss(v, module.clone(remat=True))))(variables)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), plain, again)
    for path, g in jax.tree_util.tree_flatten_with_path(plain[1])[0]:
        # a key's bias shifts all scores of a query alike: only with qk_norm does it matter
        assert np.isfinite(g).all() and np.abs(g).max() > 0, jax.tree_util.keystr(path)


def test_bfloat16_is_near_and_logits_stay_float32():
    module, variables, x = ready(tiny())
    exact, half = module.apply(variables, x), module.clone(dtype=jnp.bfloat16).apply(variables, x)
    assert half["tokens"].dtype == jnp.bfloat16 and half["logits"].dtype == jnp.float32
    for key in exact:
        assert golden_cases.error(half[key].astype(jnp.float32), exact[key]) < 0.05, key


def test_sharded_over_8_devices_equals_one():
    module, variables, x = ready(tiny())
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("fsdp", "tensor"))
    placed = partitioning.shardings(partitioning.abstract_variables(module), mesh)
    sharded = jax.tree_util.tree_map_with_path(
        lambda path, a: jax.device_put(a, placed["/".join(p.key for p in path)]), variables
    )
    assert not sharded["params"]["layer0"]["up"]["kernel"].sharding.is_fully_replicated
    golden_cases.close(jax.jit(module.apply)(sharded, x)["logits"], module.apply(variables, x)["logits"])


def test_abstract_variables_has_every_parameter():
    for config in (tiny(distilled=True), tiny(**FULL), tiny(classes=0, pooler=True)):
        module, variables, _ = ready(config)
        abstract = partitioning.unbox(partitioning.abstract_variables(module))
        assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, abstract)


def test_dropout_belongs_to_each_example():
    module, variables, x = ready(tiny(dropout=0.3, attention_dropout=0.2, drop_path=0.5))
    keys = jax.random.split(jax.random.key(3), 2)
    pooled = lambda x, keys: np.asarray(module.apply(variables, x, True, keys)["pooled"])  # noqa: E731
    both = pooled(x, keys)
    np.testing.assert_allclose(both[::-1], pooled(x[::-1], keys[::-1]), rtol=1e-5, atol=1e-6)
    assert np.abs(both - pooled(x, None)).max() > 1e-2
    assert np.abs(both - pooled(x, keys[::-1])).max() > 1e-2


@pytest.mark.parametrize("rate", ["dropout", "attention_dropout", "drop_path"])
def test_each_rate_does_something_and_only_with_keys(rate):
    module, variables, x = ready(tiny(**{rate: 0.5}))
    keys = jax.random.split(jax.random.key(3), 2)
    plain = ViT(tiny()).apply(variables, x)["pooled"]
    np.testing.assert_array_equal(module.apply(variables, x, True)["pooled"], plain)
    assert np.abs(module.apply(variables, x, True, keys)["pooled"] - plain).max() > 1e-3


def test_resizing_keeps_the_prefix_and_constants():
    table = jnp.concatenate([jnp.full((2, 3), 7.0), jnp.ones((20, 3))])
    for antialias in (True, False):
        new = resize_positions(table, (4, 5), (7, 3), prefix=2, antialias=antialias)
        np.testing.assert_allclose(new, np.r_[np.full((2, 3), 7.0), np.ones((21, 3))], rtol=1e-6)
    assert resize_positions(table, (4, 5), (4, 5), 2) is table
    with pytest.raises(ValueError, match=r"22 rows, but 1 \+ 4 x 5"):
        resize_positions(table, (4, 5), (2, 2), 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3}, "num_heads must divide width"),
        ({"image_size": (9, 8)}, "9 x 8 is not a multiple of patch_size 4 x 4"),
        ({"pool": "max"}, "pool must be one of"),
        ({"activation": "tanh"}, "activation must be one of"),
        ({"positions": "some"}, "positions must be one of"),
        ({"class_token": False}, "need class_token=True"),
        ({"distilled": True, "registers": 1}, "distilled needs"),
        ({"pooler": True, "pool": "mean"}, "pooler needs pool='token'"),
    ],
)
def test_bad_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_bad_images():
    module, variables, x = ready(tiny())
    with pytest.raises(ValueError, match="7 x 8 is not a multiple"):
        module.apply(variables, x[:, :7])
    with pytest.raises(ValueError, match="masked says 4 of 4 patches; mask_token is False"):
        module.apply(variables, x, masked=jnp.ones((2, 4), bool))
    with pytest.raises(ValueError, match="2 channels, but channels is 3"):
        module.apply(variables, x[..., :2])


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("vit_timm", {"architecture": "vit_base_patch16_siglip_224"}, "architecture"),
        ("vit_timm", {"global_pool": "avgmax"}, "global_pool = 'avgmax'"),
        ("vit_timm", {"model_args": {"scale_attn_norm": True}}, "scale_attn_norm"),
        ("vit_timm", {"model_args": {"act_layer": "mish", "img_size": [24, 15], "num_heads": 3}}, "act_layer = 'mish'"),
        ("vit_timm", {"architecture": None, "model_args": None}, "--config"),
        ("vit_hub", {"hidden_act": "mish"}, "hidden_act = 'mish'"),
        ("vit_hub", {"pooler_act": "relu"}, "pooler_act"),
        ("vit_hub_dinov2", {"drop_path_rate": 0.1}, "drop_path_rate"),
    ],
)
def test_configs_that_are_refused(case, change, message):
    case = golden_cases.load(case)
    changed = {k: v for k, v in {**case.config, **change}.items() if v is not None}
    with pytest.raises(ImporterError, match=message):
        import_tensors(case.tensors, changed, case.imported.layout.name)


def test_layouts_say_how_images_are_prepared():
    timm, hub = layouts()["timm-vit"], layouts()["hub-vit"]
    cfg = {
        "input_size": [3, 224, 224],
        "mean": [0.5] * 3,
        "std": [0.2] * 3,
        "interpolation": "bicubic",
        "crop_pct": 0.9,
    }
    found = timm.preprocessing({"pretrained_cfg": cfg}, None)
    assert found == {"size": (224, 224), "mean": (0.5,) * 3, "std": (0.2,) * 3, "interpolation": "bicubic", "crop": 0.9}
    written = {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}, "resample": 3,
               "image_mean": [0.4] * 3, "image_std": [0.2] * 3}  # fmt: skip
    found = hub.preprocessing({}, written)
    assert found == {
        "size": (224, 224),
        "mean": (0.4,) * 3,
        "std": (0.2,) * 3,
        "interpolation": "bicubic",
        "crop": 0.875,
    }
    assert hub.preprocessing({}, {"size": 384})["size"] == (384, 384)


def test_presets_have_the_published_sizes():
    count = lambda c: sum(x.size for x in jax.tree.leaves(partitioning.abstract_variables(ViT(c))))  # noqa: E731
    assert count(ViTConfig.base(classes=1000)) == 86_567_656
    assert count(ViTConfig.small(classes=1000)) == 22_050_664
    assert count(ViTConfig.large(classes=1000)) == 304_326_632
    assert dataclasses.replace(ViTConfig.base(32, 384)).grid == (12, 12)
