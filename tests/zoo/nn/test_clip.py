"""CLIP against open_clip's and the hub's outputs, and what must hold whatever the weights are."""

import dataclasses

import golden_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from checkpoints.importers.engine import ImporterError, export_tensors, import_tensors, layouts
from zoo.nn import partitioning
from zoo.nn.clip import CLIP, CLIPConfig, CLIPTextConfig
from zoo.nn.clip_resnet import CLIPResNet, CLIPResNetConfig
from zoo.nn.vit import ViTConfig

CASES = golden_cases.names("clip_")
CHANGES = {"train": {"train": True}, "masked": {}, "other": {}, "eval": {}}


def run(case, mode):
    """Our outputs in a mode, and the collections it changed."""
    inputs = {k: case.inputs[k] for k in ("images", "ids")}
    if mode == "masked":
        inputs = {"ids": case.inputs["ids"], "padding_mask": case.inputs["padding_mask"]}
    if mode == "other":
        inputs = {"images": case.inputs["other"]}
    apply = jax.jit(lambda v, x: case.module.apply(v, **x, train=mode == "train", mutable=["batch_stats"]))
    return apply(case.variables, inputs)


@pytest.mark.parametrize("name", CASES)
def test_every_feature_equals_the_reference(name):
    case = golden_cases.load(name)
    assert not case.imported.report.missing and not case.imported.report.unused
    found = {mode: run(case, mode) for mode in {k.split(".")[0] for k in case.outputs} - {"stats"}}
    for key, reference in case.outputs.items():
        mode, *path = key.split(".")
        if mode == "stats":
            new = dataclasses.replace(case.imported, variables={**case.variables, **found["train"][1]})
            exported = export_tensors(new)
            ours = [exported[k] for k in case.tensors if k.endswith(("running_mean", "running_var"))]
            golden_cases.close(np.concatenate(ours), reference)
            continue
        ours = found[mode][0]
        for part in path:
            ours = ours["stages"][int(part[5:]) - 1] if part.startswith("stage") else ours[part]
        golden_cases.close(ours, reference)


@pytest.mark.parametrize("name", CASES)
def test_exports_are_the_same_bytes(name):
    case = golden_cases.load(name)
    again = export_tensors(case.imported)
    assert list(again) == list(case.tensors)
    for key, x in case.tensors.items():
        assert again[key].dtype == x.dtype and again[key].tobytes() == x.tobytes(), key


TEXT = CLIPTextConfig(vocabulary=30, context=8, width=16, depth=1, num_heads=2, mlp_width=24)
VIT = ViTConfig((8, 8), (4, 4), 3, 24, 1, 2, 24, "quick_gelu", patch_bias=False, pre_norm=True, epsilon=1e-5)
RESNET = CLIPResNetConfig((1, 1, 1, 1), width=2, num_heads=2, features=12, image_size=(32, 32))
CONFIGS = {"vit": CLIPConfig(VIT, TEXT, 12), "resnet": CLIPConfig(RESNET, TEXT, 12)}


def ready(kind="vit", **settings):
    config = CONFIGS[kind]
    module = CLIP(config, **settings)
    inputs = {
        "images": jax.random.normal(jax.random.key(1), (2, *config.image.image_size, 3)),
        "ids": jnp.array([[3, 5, 29, 0, 0], [4, 6, 7, 8, 29]]),
    }
    return module, partitioning.unbox(module.init(jax.random.key(0), **inputs)), inputs


@pytest.mark.parametrize("kind", ["vit", pytest.param("resnet", marks=pytest.mark.slow)])
def test_remat_changes_neither_outputs_nor_gradients_and_all_parameters_learn(kind):
    module, variables, inputs = ready(kind)
    stats = {k: v for k, v in variables.items() if k != "params"}
    if kind == "resnet":  # the text tower is the other case's
        module, inputs = CLIPResNet(RESNET), {"images": inputs["images"]}
        variables, stats = ({k: v["image"] for k, v in tree.items()} for tree in (variables, stats))
    else:  # all tokens in all places: every row of both tables counts
        inputs["ids"] = jnp.stack([jnp.arange(8), 29 - jnp.arange(8)])
    weights = jax.random.normal(jax.random.key(2), (12,))

    def loss(params, module):
        out, _ = module.apply({"params": params, **stats}, **inputs, train=True, mutable=["batch_stats"])
        towers = [out] if kind == "resnet" else [out["image"], out["text"]]
        logits = 0.0 if kind == "resnet" else jnp.sum(out["logits"] * jnp.array([[1.0, 2.0], [-1.0, 0.5]]))
        return logits + sum(jnp.sum(jnp.tanh(tower["tokens"]) @ weights) for tower in towers)

    plain, again = (
        jax.jit(jax.value_and_grad(lambda v, m=m: loss(v, m)))(variables["params"])
        for m in (module, module.clone(remat=True))
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * (1 + np.abs(b).max())), plain, again
    )
    for path, g in jax.tree_util.tree_flatten_with_path(plain[1])[0]:
        assert np.isfinite(g).all() and np.abs(g).max() > 0, jax.tree_util.keystr(path)


@pytest.mark.parametrize("kind", CONFIGS)
def test_bfloat16_is_near_and_logits_stay_float32(kind):
    module, variables, inputs = ready(kind)
    exact = jax.jit(module.apply)(variables, **inputs)
    half = jax.jit(module.clone(dtype=jnp.bfloat16).apply)(variables, **inputs)
    assert half["image"]["pooled"].dtype == half["text"]["tokens"].dtype == jnp.bfloat16
    assert half["logits"].dtype == half["logit_scale"].dtype == jnp.float32
    for tower in ("image", "text"):
        for key in ("pooled", "tokens"):
            assert golden_cases.error(half[tower][key].astype(jnp.float32), exact[tower][key]) < 0.06, (tower, key)


@pytest.mark.parametrize("kind", CONFIGS)
def test_sharded_over_8_devices_equals_one(kind):
    module, variables, inputs = ready(kind)
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("fsdp", "tensor"))
    abstract = partitioning.abstract_variables(module)
    assert jax.tree.map(jnp.shape, partitioning.unbox(abstract)) == jax.tree.map(jnp.shape, variables)
    placed = partitioning.shardings(abstract, mesh)
    sharded = jax.tree_util.tree_map_with_path(
        lambda path, a: jax.device_put(a, placed["/".join(p.key for p in path)]), variables
    )
    assert not sharded["params"]["text"]["layer0"]["up"]["kernel"].sharding.is_fully_replicated
    ours, one = (jax.jit(module.apply)(v, **inputs) for v in (sharded, variables))
    golden_cases.close(ours["logits"], one["logits"])


def test_methods_embeddings_and_padding_agree():
    module, variables, inputs = ready()
    ids = inputs["ids"]
    call = jax.jit(lambda *args, **kwargs: module.apply(variables, *args, method="encode_text", **kwargs))
    whole = jax.jit(module.apply)(variables, **inputs)
    text = call(ids)
    golden_cases.close(whole["text"]["pooled"], text["pooled"])
    image = module.apply(variables, inputs["images"], method="encode_image")
    golden_cases.close(whole["image"]["tokens"], image["tokens"])
    table = module.apply(variables, ids, method="embed_text")
    golden_cases.close(call(ids, table)["pooled"], text["pooled"])
    golden_cases.close(call(None, table, eot=jnp.array([2, 4]))["pooled"], text["pooled"])
    real = jnp.arange(5)[None] <= jnp.array([[2], [4]])
    golden_cases.close(call(None, table, real)["pooled"], text["pooled"])
    golden_cases.close(call(None, table)["pooled"], text["tokens"][:, -1])
    golden_cases.close(text["pooled"][0], text["tokens"][0, 2])
    # longer padding, same outputs; and what stands in masked places does not matter, wherever they are
    longer = jnp.pad(ids, ((0, 0), (0, 3)))
    more = call(longer, padding_mask=jnp.pad(real, ((0, 0), (0, 3))))
    golden_cases.close(more["pooled"], text["pooled"])
    holes = real.at[:, 1].set(False)
    golden_cases.close(call(ids.at[:, 1].set(9), padding_mask=holes)["pooled"], call(ids, padding_mask=holes)["pooled"])
    assert golden_cases.error(call(ids, padding_mask=holes)["pooled"], text["pooled"]) > 1e-2
    # and a text does not see what follows it
    golden_cases.close(call(ids.at[0, 3:].set(9))["pooled"][0], text["pooled"][0])


def test_dropout_belongs_to_each_example():
    text = dataclasses.replace(TEXT, attention_dropout=0.4)
    module = CLIP(CLIPConfig(dataclasses.replace(VIT, attention_dropout=0.4), text, 12))
    _, variables, inputs = ready()
    keys = jax.random.split(jax.random.key(3), 2)
    apply = jax.jit(lambda x, keys: module.apply(variables, **x, keys=keys))
    pooled = lambda x, keys: np.stack([apply(x, keys)[tower]["pooled"] for tower in ("image", "text")])  # noqa: E731
    both = pooled(inputs, keys)
    swapped = pooled(jax.tree.map(lambda a: a[::-1], inputs), keys[::-1])
    np.testing.assert_allclose(both[:, ::-1], swapped, rtol=1e-5, atol=1e-6)
    for change in (pooled(inputs, None) - both, pooled(inputs, keys[::-1]) - both):
        assert (np.abs(change).max(axis=(1, 2)) > 1e-3).all()


def test_padded_rows_do_not_count_in_batch_statistics():
    module, variables, inputs = ready("resnet")
    mask = jnp.array([True, True, False])
    padded = jnp.concatenate([inputs["images"], 9 + inputs["images"][:1]])
    call = jax.jit(lambda x, mask: module.apply(variables, images=x, train=True, mask=mask, mutable=["batch_stats"]))
    (one, stats), (two, masked) = call(inputs["images"], None), call(padded, mask)
    golden_cases.close(two["image"]["pooled"][:2], one["image"]["pooled"], 1e-4)
    jax.tree.map(lambda a, b: golden_cases.close(a, b, 1e-4), masked, stats)


def test_other_image_sizes_run():
    for kind, size in (("vit", (12, 20)), ("resnet", (64, 96))):
        module, variables, _ = ready(kind)
        run = lambda x, m=module, v=variables: m.apply(v, x, method="encode_image")  # noqa: E731
        out = jax.eval_shape(run, jnp.ones((1, *size, 3)))
        places = (size[0] // 4) * (size[1] // 4) if kind == "vit" else 2 * 3
        assert out["tokens"].shape == (1, 1 + places, 12)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "give images, ids or embeddings"),
        ({"ids": jnp.zeros((1, 9), int)}, "9 tokens, but context is 8"),
        ({"embeddings": jnp.zeros((1, 4, 5))}, "5 wide, but the text tower's width is 16"),
        ({"images": jnp.zeros((1, 9, 8, 3))}, "9 x 8 is not a multiple"),
    ],
)
def test_bad_inputs(kwargs, message):
    module, variables, _ = ready()
    with pytest.raises(ValueError, match=message):
        module.apply(variables, **kwargs)


def test_bad_configurations():
    for make, message in (
        (lambda: CLIPConfig(RESNET, TEXT, 13), "image.features must be features"),
        (lambda: dataclasses.replace(TEXT, num_heads=3), "num_heads must divide width"),
        (lambda: dataclasses.replace(TEXT, activation="x"), "activation must be one of"),
        (lambda: dataclasses.replace(RESNET, num_heads=3), "num_heads must divide 64"),
        (lambda: dataclasses.replace(RESNET, blocks=(1, 1)), "blocks must be four"),
        (lambda: dataclasses.replace(RESNET, image_size=(48, 32)), "48 x 32 is not a multiple of 32"),
        (
            lambda: CLIP(CONFIGS["vit"]).init(jax.random.key(0), method="encode_text"),
            "encode_text needs ids or embeddings",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            make()


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("clip_openai_vit", {"model_cfg": None, "preprocess_cfg": None}, "open_clip_config.json"),
        ("clip_openai_vit", {"model_cfg": {"init_logit_bias": -10}}, "init_logit_bias"),
        ("clip_openai_vit", {"model_cfg": {"vision_cfg": {"timm_model_name": "vit"}}}, "timm_model_name"),
        ("clip_openai_vit", {"model_cfg": {"vision_cfg": {"pool_type": "none"}}}, "pool_type = 'none'"),
        ("clip_openai_vit", {"model_cfg": {"text_cfg": {"no_causal_mask": True}}}, "no_causal_mask"),
        ("clip_openai_vit", {"model_cfg": {"text_cfg": {"pool_type": "last"}}}, "pool_type = 'last'"),
        ("clip_hub", {"text_config": {"eos_token_id": [1, 2]}}, "eos_token_id"),
        ("clip_hub", {"vision_config": {"hidden_act": "mish"}}, "hidden_act = 'mish'"),
    ],
)
def test_configs_that_are_refused(case, change, message):
    case = golden_cases.load(case)
    changed = {k: v for k, v in {**case.config, **change}.items() if v is not None}
    with pytest.raises(ImporterError, match=message):
        import_tensors(case.tensors, changed, case.imported.layout.name)


def test_openais_own_file_needs_no_config():
    module, variables, _ = ready()
    layout = layouts()["openai-clip"]
    tensors = export_tensors("openai-clip", module, variables)
    whole = {
        **tensors,
        **{k: np.int64(n) for k, n in (("input_resolution", 8), ("context_length", 8), ("vocab_size", 30))},
    }
    wide = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in whole.items()}
    wide["positional_embedding"] = jax.ShapeDtypeStruct((8, 128), np.float16)
    wide["visual.conv1.weight"] = jax.ShapeDtypeStruct((192, 3, 4, 4), np.float16)
    found = layout.configure(None, wide).config
    assert (found.text.num_heads, found.image.num_heads, found.image.image_size) == (2, 3, (8, 8))
    assert found.text.activation == found.image.activation == "quick_gelu"
    assert layout.preprocessing(None, None)["mean"] == (0.48145466, 0.4578275, 0.40821073)
    said = {"model_cfg": {"vision_cfg": {"image_size": 224}}, "preprocess_cfg": {"mean": [0.5] * 3}}
    assert layout.preprocessing(said, None)["size"] == (224, 224)
    assert layout.preprocessing(said, None)["mean"] == (0.5, 0.5, 0.5)


def test_hub_preprocessing_is_read():
    written = {"size": 224, "crop_size": 224, "do_center_crop": True, "resample": 3}
    found = layouts()["hub-clip"].preprocessing({}, written)
    assert found["size"] == (224, 224) and found["interpolation"] == "bicubic" and found["crop"] == 1.0
    assert found["std"] == (0.26862954, 0.26130258, 0.27577711)


@pytest.mark.slow
def test_the_larger_presets_have_the_published_sizes():
    for config, total in (
        (CLIPConfig.vit_b16(), 149_620_737),
        (CLIPConfig.vit_l14(), 427_616_513),
        (CLIPConfig.vit_l14(336), 427_944_193),
    ):
        params = partitioning.abstract_variables(CLIP(config))["params"]
        assert sum(x.size for x in jax.tree.leaves(params)) == total


def test_presets_have_the_published_sizes():
    def count(config):
        return sum(x.size for x in jax.tree.leaves(partitioning.abstract_variables(CLIP(config))["params"]))

    assert count(CLIPConfig.vit_b32()) == 151_277_313
    assert count(CLIPConfig.rn50()) == 102_007_137
