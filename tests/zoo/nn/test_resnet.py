"""ResNets against torchvision, timm, PyCIL, mammoth and the CIFAR-10 code: features, statistics, stems, shards."""

import dataclasses

import golden_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from checkpoints.importers.engine import export_tensors, import_tensors
from checkpoints.importers.layout import ImporterError
from zoo.nn.heads import Pick
from zoo.nn.norm import BatchNorm
from zoo.nn.partitioning import abstract_variables, axis_names, shardings, unbox
from zoo.nn.resnet import DEPTHS, ResNet, ResNetConfig, average_pool

CASES = golden_cases.names("resnet_")


def forward(case, train, **kwargs):
    mutable = ["batch_stats"] if train else False
    apply = jax.jit(lambda v, x: case.module.apply(v, x, train=train, mutable=mutable, **kwargs))
    return apply(case.variables, case.inputs["x"])


def compare(found, outputs, prefix):
    stages = [k for k in outputs if k.startswith(f"{prefix}stage")]
    assert len(stages) == len(found["stages"])
    for number, stage in enumerate(found["stages"]):
        golden_cases.close(stage, outputs[f"{prefix}stage{number}"])
    golden_cases.close(found["pooled"], outputs[f"{prefix}pooled"])
    if f"{prefix}logits" in outputs:
        golden_cases.close(found["logits"], outputs[f"{prefix}logits"])


@pytest.mark.parametrize("name", CASES)
def test_every_feature_equals_the_references_in_evaluation(name):
    case = golden_cases.load(name)
    compare(forward(case, False), case.outputs, "")


@pytest.mark.parametrize("name", CASES)
def test_training_uses_and_keeps_the_batchs_statistics_like_the_reference(name):
    case = golden_cases.load(name)
    found, mutated = forward(case, True)
    compare(found, case.outputs, "train.")
    variables = {"params": case.variables["params"], **mutated}
    after = export_tensors(dataclasses.replace(case.imported, variables=variables))
    own = {k.removeprefix("stats."): v for k, v in case.outputs.items() if k.startswith("stats.")}
    kept = [k for k in own if k in after]
    assert len(kept) == len([k for k in after if "running" in k]) > 4
    for key in kept:
        golden_cases.close(after[key], own[key])
        assert np.abs(case.tensors[key] - own[key]).max() > 1e-3, "the statistics did not move"


def test_the_cases_cover_every_stem_shortcut_and_block():
    configs = [golden_cases.load(n).module.config for n in CASES]
    assert {c.stem for c in configs} == {"imagenet", "cifar", "deep"}
    assert {c.shortcut for c in configs} == {"project", "pad", "append"}
    assert {c.block for c in configs} == {"basic", "bottleneck"}
    assert {c.average_down for c in configs} == {True, False}


def test_square_kernels_that_are_not_transposed_show(monkeypatch):
    case = golden_cases.load("resnet_torchvision_square")
    turned = {k: x.swapaxes(0, 1) if x.ndim == 4 and x.shape[0] == x.shape[1] else x for k, x in case.tensors.items()}
    wrong = import_tensors(turned)  # every shape fits
    found = jax.jit(case.module.apply)(wrong.variables, case.inputs["x"])
    assert golden_cases.error(found["logits"], case.outputs["logits"]) > 0.01


def test_published_depths():
    counts = {
        18: 11_689_512, 34: 21_797_672, 50: 25_557_032, 101: 44_549_160, 152: 60_192_808,
    }  # fmt: skip
    for depth in DEPTHS:
        config = ResNetConfig.of_depth(depth, classes=1000 if depth in counts else 10)
        params = unbox(abstract_variables(ResNet(config)))["params"]
        if depth in counts:
            assert sum(x.size for x in jax.tree.leaves(params)) == counts[depth]
        assert sum(config.blocks) * (3 if config.block == "bottleneck" else 2) + 2 == depth
    small = ResNetConfig.of_depth(18, stem="cifar")
    assert small.stem == "cifar" and small.widths == (64, 128, 256, 512)
    with pytest.raises(ValueError, match="depth must be one of 18, 20, 32, 34, 50, 56, 101, 152, got 19"):
        ResNetConfig.of_depth(19)


@pytest.fixture(scope="module")
def small():
    module = ResNet(ResNetConfig((1, 1), (4, 6), "basic", "cifar", 4, classes=3))
    x = jax.random.normal(jax.random.key(0), (8, 8, 8, 3))
    return module, unbox(module.init(jax.random.key(1), x)), x


def test_rows_that_are_masked_change_nothing(small):
    module, variables, x = small
    mask = jnp.arange(8) < 5
    apply = jax.jit(lambda x, m: module.apply(variables, x, train=True, mask=m, mutable=["batch_stats"]))
    one, stats = apply(x, mask)
    other, again = apply(x.at[5:].set(100.0), mask)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), stats, again)
    np.testing.assert_allclose(one["logits"][:5], other["logits"][:5], rtol=1e-5, atol=1e-6)
    fewer, _ = module.apply(variables, x[:5], train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(one["logits"][:5], fewer["logits"], rtol=1e-4, atol=1e-5)


def test_remat_and_bfloat16_and_gradients(small):
    module, variables, x = small
    loss = lambda m: lambda p: jnp.sum(m.apply({**variables, "params": p}, x)["logits"] ** 2)  # noqa: E731
    plain = jax.jit(jax.value_and_grad(loss(module)))(variables["params"])
    again = jax.jit(jax.value_and_grad(loss(module.clone(remat=True))))(variables["params"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), plain, again)
    for path, g in traverse_util.flatten_dict(plain[1], sep="/").items():
        assert np.isfinite(g).all() and np.abs(g).max() > 0, path
    half = module.clone(dtype=jnp.bfloat16).apply(variables, x)
    assert half["pooled"].dtype == jnp.bfloat16 and half["logits"].dtype == jnp.float32
    assert golden_cases.error(half["logits"], module.apply(variables, x)["logits"]) < 0.05


def test_statistics_are_global_under_pmap(small):
    module, variables, x = small
    _, one = module.apply(variables, x, train=True, mutable=["batch_stats"])
    spread = module.clone(axis_name="data")
    _, many = jax.pmap(lambda x: spread.apply(variables, x, train=True, mutable=["batch_stats"]), axis_name="data")(
        x.reshape(8, 1, 8, 8, 3)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b[0], rtol=1e-5, atol=1e-6), one, many)


def test_kernels_name_their_axes_and_spread(small):
    module, variables, x = small
    from jax.sharding import AxisType

    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    names = axis_names(abstract_variables(module))
    assert all(p in names for p, v in traverse_util.flatten_dict(variables, sep="/").items() if v.ndim > 1)
    where = shardings(abstract_variables(module), mesh)
    flat = {p: jax.device_put(v, where[p]) for p, v in traverse_util.flatten_dict(variables, sep="/").items()}
    assert not flat["params/stem/conv/kernel"].is_fully_replicated
    placed = traverse_util.unflatten_dict(flat, sep="/")
    np.testing.assert_allclose(
        jax.jit(module.apply)(placed, x)["logits"], module.apply(variables, x)["logits"], rtol=1e-4, atol=1e-5
    )


def test_one_array_of_several_under_a_head(small):
    module, variables, x = small
    picked = Pick(module, "pooled")
    nested = {c: {"backbone": v} for c, v in variables.items()}
    np.testing.assert_array_equal(picked.apply(nested, x), module.apply(variables, x)["pooled"])
    assert set(unbox(picked.init(jax.random.key(0), x))["params"]) == {"backbone"}


def test_pooling_of_odd_sizes_counts_only_real_pixels():
    x = jnp.arange(15.0).reshape(1, 5, 3, 1)
    y = average_pool(x, 2)[0, ..., 0]
    np.testing.assert_allclose(y, [[2.0, 3.5], [8.0, 9.5], [12.5, 14.0]])


def test_running_variance_is_unbiased_only_where_asked():
    x = jax.random.normal(jax.random.key(0), (6, 3))
    for unbiased in (True, False):
        norm = BatchNorm(0.9, unbiased=unbiased)
        variables = norm.init(jax.random.key(0), x)
        _, mutated = norm.apply(variables, x, train=True, mutable=["batch_stats"])
        expected = 0.9 + 0.1 * np.var(np.asarray(x), axis=0, ddof=int(unbiased))
        np.testing.assert_allclose(mutated["batch_stats"]["var"], expected, rtol=1e-5)


def test_networks_that_compute_something_else_are_refused():
    square = golden_cases.load("resnet_torchvision_bottleneck").tensors
    wide = square["conv1.weight"]
    five = {**square, "conv1.weight": np.zeros((*wide.shape[:2], 5, 5), np.float32)}
    with pytest.raises(ImporterError, match="a stem of kernel 5 is not supported"):
        import_tensors(five, layout="torchvision-resnet")
    second = square["layer1.0.conv2.weight"]
    grouped = {**square, "layer1.0.conv2.weight": second[:, : second.shape[1] // 2]}
    with pytest.raises(ImporterError, match="grouped or squeeze-and-excitation"):
        import_tensors(grouped, layout="torchvision-resnet")
    for config in ({"architecture": "resnetblur50"}, {"architecture": "resnext50_32x4d"}):
        with pytest.raises(ImporterError, match="only resnetN and resnetNd are"):
            import_tensors(square, config, layout="torchvision-resnet")
