"""ViLT against the library (golden cases), and its own rules."""

import dataclasses
import functools

import golden_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from checkpoints.importers.engine import ImporterError, export_tensors, import_tensors
from checkpoints.importers.layouts import hub_vilt
from zoo.nn.partitioning import abstract_variables, shardings, unbox
from zoo.nn.vilt import SingleStreamVLM, ViLTConfig, patch_mask, stretch

CASES = golden_cases.names("vilt")
TINY = ViLTConfig(
    vocab_size=31, width=16, depth=2, num_heads=2, mlp_width=24, max_positions=8, image_size=12, patch_size=4,
    num_labels=5,
)  # fmt: skip
IDS = jnp.array([[3, 4, 5, 6, 7], [9, 10, 11, 0, 0]], jnp.int32)
REAL = jnp.array([[True] * 5, [True] * 3 + [False] * 2])
IMAGES = jax.random.normal(jax.random.key(5), (2, 8, 12, 3))
PIXELS = jnp.ones((2, 8, 12), bool).at[1, 4:].set(False).at[1, :, 8:].set(False)


def runs(case):
    """The calls of a case: name -> (arguments, outputs)."""
    names = sorted({k.partition(".")[0] for k in case.inputs})
    part = lambda arrays, run: {k[len(run) + 1 :]: v for k, v in arrays.items() if k.startswith(f"{run}.")}  # noqa: E731
    arguments = {k: int(v) if v.ndim == 0 else jnp.asarray(v) for k, v in case.inputs.items()}
    return {run: (part(arguments, run), part(case.outputs, run)) for run in names}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_library(name):
    case = golden_cases.load(name)
    for run, (inputs, outputs) in runs(case).items():
        fixed = {"train": True, "keys": jax.random.split(jax.random.key(0), 3)} if run == "train" else {}
        fixed |= {"image_type": inputs.pop("image_type")} if "image_type" in inputs else {}
        found = jax.jit(functools.partial(case.module.apply, hidden_states=True, **fixed))(case.variables, **inputs)
        assert set(found) == {*outputs, "text_tokens", "image_tokens"}, run
        length = found["text_tokens"].shape[1]
        np.testing.assert_array_equal(
            jnp.concatenate([found.pop("text_tokens"), found.pop("image_tokens")], 1), found["tokens"]
        )
        # the library drops and fills patches outside the images: those alone are not compared
        real = found["mask"].at[:, :length].set(True)
        np.testing.assert_array_equal(real, outputs["mask"])
        np.testing.assert_array_equal(found.pop("mask")[:, :length], inputs.get("padding_mask", True))
        for key in ("tokens", "hidden_states"):
            found[key] = jnp.where(real[..., None], jnp.asarray(found[key]), 0.0)
        for key, value in found.items():
            golden_cases.close(value, outputs[key])


@pytest.mark.parametrize("name", CASES)
def test_export_gives_back_the_file(name):
    case = golden_cases.load(name)
    back = export_tensors(case.imported)
    assert list(back) == list(case.tensors)
    for key, value in case.tensors.items():
        assert back[key].tobytes() == value.tobytes(), key
    config = case.imported.layout.to_config(case.module)
    assert import_tensors(case.tensors, config).module == case.module
    assert config["architectures"] == case.config["architectures"]


@pytest.mark.parametrize("name", [n for n in CASES if n != "vilt_mlm"])
def test_a_model_never_imported_is_written_under_the_library_s_names(name):
    case = golden_cases.load(name)
    written = export_tensors(case.imported.layout.name, case.module, case.variables)
    prefix, report = case.imported.source["prefix"], case.imported.report
    kept = {*case.tensors} - {*case.imported.buffers} - {n for d in report.duplicates for n in (d, prefix + d)}
    assert set(written) == kept
    for key, value in written.items():
        np.testing.assert_array_equal(value, case.tensors[key])


def test_presets_are_the_published_sizes():
    abstract = unbox(abstract_variables(SingleStreamVLM(ViLTConfig.b32())))
    assert sum(x.size for x in jax.tree.leaves(abstract)) == 111_595_008


def test_stretching_a_table_to_its_own_size_changes_nothing_and_corners_stay():
    np.testing.assert_allclose(stretch(3, jnp.array([3]), 3)[0], np.eye(3), atol=1e-7)
    weights = stretch(5, jnp.array([4, 2, 1]), 7)
    np.testing.assert_allclose(weights.sum(-1), [[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]], atol=1e-6)
    np.testing.assert_allclose(weights[0, :4] @ jnp.arange(7.0), [0, 2, 4, 6], atol=1e-5)
    np.testing.assert_allclose(weights[1, :2] @ jnp.arange(7.0), [0, 6], atol=1e-5)


def test_a_patch_is_real_where_its_first_pixel_is():
    mask = jnp.zeros((1, 8, 9), bool).at[0, :5, :4].set(True)
    np.testing.assert_array_equal(patch_mask(mask, 2, 2)[0], [[True, False], [True, False]])
    np.testing.assert_array_equal(patch_mask(mask.at[0, :5, 4].set(True), 2, 2)[0], [[True, True], [True, True]])
    # 14 rows are 3 patches of 4 and a rest, which spreads them: rows 0, 4 and 9 decide
    rest = jnp.arange(14)[None, :, None] < jnp.array([9])[:, None, None]
    np.testing.assert_array_equal(patch_mask(rest, 3, 1)[0, :, 0], [True, True, False])


@pytest.fixture(scope="module")
def tiny():
    module = SingleStreamVLM(dataclasses.replace(TINY, head="mlm"))
    variables = unbox(jax.jit(module.init)(jax.random.key(0), IDS, IMAGES))
    return module, jax.tree.map(lambda x: x + 0.2 * jax.random.normal(jax.random.key(x.size), x.shape), variables)


def test_padding_of_text_and_frame_changes_nothing(tiny):
    module, variables = tiny
    apply = jax.jit(module.apply)
    long = apply(variables, IDS, IMAGES, REAL, PIXELS)
    short = apply(variables, IDS[1:, :3], IMAGES[1:, :4, :8])
    for key in ("pooled", "logits", "text_tokens"):
        ours = long[key][1:] if key == "pooled" else long[key][1:, :3]
        golden_cases.close(ours, short[key])
    golden_cases.close(long["image_tokens"][1:, :3], short["image_tokens"])
    other = apply(variables, IDS, jnp.where(PIXELS[..., None], IMAGES, 9.0), REAL, PIXELS)
    np.testing.assert_array_equal(other["pooled"], long["pooled"])


@pytest.mark.parametrize("head", ["mlm", "vqa", "matching"])
def test_every_weight_has_a_gradient_and_remat_has_the_same(head):
    module = SingleStreamVLM(dataclasses.replace(TINY, head=head))
    variables = unbox(jax.jit(module.init)(jax.random.key(0), IDS, IMAGES))

    def total(module, variables):
        out = module.apply(variables, IDS, IMAGES, REAL, token_types=IDS % 2)
        return sum(jnp.sum(jnp.sin(3 * out[k])) for k in ("tokens", "pooled", "logits", "scores") if k in out)

    grads = jax.jit(jax.grad(lambda v: total(module, v)))(variables)["params"]
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(g).all(), path
        if "key" not in str(path[-2]) or path[-1].key != "bias":  # softmax does not see a shift of all scores
            assert np.abs(g).max() > 0, path
    if head == "mlm":
        again = dataclasses.replace(module, remat=True)
        other = jax.jit(jax.grad(lambda v: total(again, v)))(variables)["params"]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), grads, other)


def test_bfloat16_is_near(tiny):
    module, variables = tiny
    out = jax.jit(module.apply)(variables, IDS, IMAGES, REAL)
    half = jax.jit(dataclasses.replace(module, dtype=jnp.bfloat16).apply)(variables, IDS, IMAGES, REAL)
    assert (half["tokens"].dtype, half["logits"].dtype) == (jnp.bfloat16, jnp.float32)
    assert golden_cases.error(half["logits"], out["logits"]) < 0.05
    param = dataclasses.replace(module, param_dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(unbox(abstract_variables(param)))} == {jnp.dtype(jnp.bfloat16)}


def test_sharded_equals_single(tiny):
    module, variables = tiny
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("data", "fsdp", "tensor"))
    places = shardings(abstract_variables(module), mesh)
    assert places["params/layer0/up/kernel"].spec == PartitionSpec("fsdp", "tensor")
    assert places["params/image/patch/kernel"].spec == PartitionSpec(None, None, None, "fsdp")
    placed = jax.tree_util.tree_map_with_path(
        lambda path, x: jax.device_put(x, places["/".join(p.key for p in path)]), variables
    )
    apply = jax.jit(module.apply)
    golden_cases.close(apply(placed, IDS, IMAGES, REAL)["logits"], apply(variables, IDS, IMAGES, REAL)["logits"])


@pytest.mark.parametrize("where", ["dropout", "attention_dropout"])
def test_dropout_belongs_to_the_example(where):
    module = SingleStreamVLM(dataclasses.replace(TINY, **{where: 0.5}))
    variables = jax.jit(module.init)(jax.random.key(0), IDS, IMAGES)
    keys = jax.random.split(jax.random.key(1), 2)
    apply = jax.jit(module.apply, static_argnames="train")
    run = lambda ids, images, keys, train=True: apply(variables, ids, images, train=train, keys=keys)["tokens"]  # noqa: E731
    dropped = run(IDS, IMAGES, keys)
    assert not np.allclose(dropped, run(IDS, IMAGES, None))
    np.testing.assert_array_equal(run(IDS, IMAGES, keys, False), run(IDS, IMAGES, None))
    np.testing.assert_allclose(run(IDS[::-1], IMAGES[::-1], keys[::-1]), dropped[::-1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_heads": 3}, "num_heads must divide width 16, got 3"),
        ({"head": "nlvr"}, "head must be one of none, matching, mlm, vqa, got 'nlvr'"),
        ({"activation": "silu"}, "activation must be one of gelu"),
        ({"pooler": False, "head": "vqa"}, "set pooler=True"),
        ({"patch_size": 16}, "patch_size must not exceed image_size 12, got 16"),
    ],
)
def test_impossible_configurations(changes, says):
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(TINY, **changes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"ids": None}, "either ids or embeddings, got neither"),
        ({"embeddings": jnp.ones((2, 5, 16))}, "either ids or embeddings, got both"),
        ({"images": None}, "either images or image_embeddings, got neither"),
        ({"image_embeddings": jnp.ones((2, 5, 16))}, "either images or image_embeddings, got both"),
        ({"ids": jnp.zeros((2, 9), jnp.int32)}, "have 9 tokens, but there are positions for 8"),
        ({"image_type": 2}, "image_type must be below config.modalities = 2, got 2"),
        ({"images": jnp.ones((2, 3, 12, 3))}, "at least a patch of 4"),
        ({"images": jnp.ones((2, 8, 12, 1))}, "images must be \\[B, H, W, 3\\]"),
    ],
)
def test_impossible_calls(changes, says):
    with pytest.raises(ValueError, match=says):
        jax.eval_shape(
            lambda: SingleStreamVLM(TINY).init(jax.random.key(0), **{"ids": IDS, "images": IMAGES, **changes})
        )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"max_image_length": 200}, "max_image_length = 200 is not supported"),
        ({"num_images": 2}, "num_images = 2"),
        ({"image_size": [32, 32]}, "image_size = \\[32, 32\\] is not supported"),
        ({"num_hidden_layers": 3}, "num_hidden_layers = 3, but the weights hold 2"),
        ({"hidden_act": "silu"}, "hidden_act = 'silu'"),
        ({"model_type": "flava"}, "model_type = 'flava'"),
        ({"qkv_bias": False}, "unused"),
    ],
)
def test_configs_that_would_be_another_model_are_refused(changes, says):
    case = golden_cases.load("vilt_model")
    with pytest.raises(ImporterError, match=says):
        import_tensors(case.tensors, {**case.config, **changes}, "hub-vilt")


def test_the_rest_of_the_layout():
    case = golden_cases.load("vilt_model")
    with pytest.raises(ImporterError, match="give --config FILE"):
        import_tensors(case.tensors)
    found = hub_vilt.preprocessing(None, {"image_mean": [0.1, 0.2, 0.3], "resample": 2})
    assert found == {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.5, 0.5), "interpolation": "bilinear"}
