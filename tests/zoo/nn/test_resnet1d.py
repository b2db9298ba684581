"""The 1-D ResNet and its batch normalisation: the official forward pass, masks, shards and shapes."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.nn.heads import ProjectionHead, WithHead
from zoo.nn.norm import BatchNorm
from zoo.nn.resnet1d import ResNet1D

GOLDEN = Path(__file__).parents[2] / "golden"
TINY = ResNet1D((1, 1), (4, 8), features=5)


def series(rows=4, steps=12, channels=2, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(rows, steps, channels)), jnp.float32)


def from_torch(weights, blocks):
    """The official state dict as this module's variables."""
    params, stats = {}, {}

    def conv(path, name):
        return {"kernel": weights[name + ".weight"].transpose(2, 1, 0)}

    def norm(name):
        affine = {"scale": weights[name + ".weight"], "bias": weights[name + ".bias"]}
        return affine, {"mean": weights[name + ".running_mean"], "var": weights[name + ".running_var"]}

    params["stem_conv"] = conv("stem_conv", "conv1")
    params["stem_norm"], stats["stem_norm"] = norm("bn1")
    for s, number in enumerate(blocks, start=1):
        for b in range(number):
            p, t = {}, {}
            for i in (1, 2, 3):
                if f"layer{s}.{b}.conv{i}.weight" in weights:
                    p[f"conv{i}"] = conv(f"conv{i}", f"layer{s}.{b}.conv{i}")
                    p[f"norm{i}"], t[f"norm{i}"] = norm(f"layer{s}.{b}.bn{i}")
            if f"layer{s}.{b}.shortcut.0.weight" in weights:
                p["shortcut_conv"] = conv("shortcut_conv", f"layer{s}.{b}.shortcut.0")
                p["shortcut_norm"], t["shortcut_norm"] = norm(f"layer{s}.{b}.shortcut.1")
            params[f"stage{s}_block{b + 1}"], stats[f"stage{s}_block{b + 1}"] = p, t
    params["features"] = {"kernel": weights["fc.weight"].T, "bias": weights["fc.bias"]}
    return {"params": params, "batch_stats": stats}


@pytest.mark.parametrize(("name", "blocks"), [("basic", (1, 2, 1, 1)), ("bottleneck", (1, 1, 2, 1))])
def test_forward_equals_the_released_network(name, blocks):
    g = np.load(GOLDEN / f"dbpm_resnet_{name}.npz")
    variables = from_torch({k[2:]: g[k] for k in g.files if k.startswith("w.")}, blocks)
    module = ResNet1D(blocks, (4, 4, 6, 8), 5, bottleneck=name == "bottleneck")
    x = jnp.asarray(g["x"].transpose(0, 2, 1))
    shapes = jax.tree.map(jnp.shape, jax.eval_shape(lambda: module.init(jax.random.key(0), x)))
    assert shapes == jax.tree.map(np.shape, variables)
    np.testing.assert_allclose(module.apply(variables, x), g["eval"], rtol=1e-4, atol=1e-5)
    trained, _ = module.apply(variables, x, True, mutable=["batch_stats"])
    np.testing.assert_allclose(trained, g["train"], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("depth", "parameters"), [(18, 3_980_160), (34, 7_354_496), (50, 16_483_712)])
def test_depths_have_the_sizes_of_the_released_networks(depth, parameters):
    shapes = jax.eval_shape(lambda: ResNet1D(depth).init(jax.random.key(0), jnp.zeros((1, 16, 12))))
    assert sum(int(np.prod(p.shape)) for p in jax.tree.leaves(shapes["params"])) == parameters


def test_padded_rows_change_neither_features_nor_statistics():
    x = series(6)
    variables = TINY.init(jax.random.key(0), x)
    mask = jnp.array([True, True, False, True, True, False])
    run = jax.jit(lambda v, x, m: TINY.apply(v, x, True, m, mutable=["batch_stats"]))
    z, stats = run(variables, jnp.where(mask[:, None, None], x, 1e3), mask)
    alone, wanted = TINY.apply(variables, x[mask], True, mutable=["batch_stats"])
    np.testing.assert_allclose(z[mask], alone, rtol=1e-4, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), stats, wanted)


def test_uneven_shards_have_the_statistics_of_the_whole_batch():
    x = series(8)
    mask = jnp.array([1, 1, 1, 0, 1, 0, 0, 0], bool)  # one shard has a single real row, another none
    variables = TINY.init(jax.random.key(0), x)
    whole, wanted = TINY.apply(variables, x, True, mask, mutable=["batch_stats"])
    module = TINY.clone(axis_name="d")
    shards = jax.pmap(lambda x, m: module.apply(variables, x, True, m, mutable=["batch_stats"]), axis_name="d")
    z, stats = shards(x.reshape(4, 2, 12, 2), mask.reshape(4, 2))
    np.testing.assert_allclose(z.reshape(8, 5)[mask], np.asarray(whole)[mask], rtol=1e-4, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[2], b, rtol=1e-5, atol=1e-6), stats, wanted)


def test_batch_norm_by_hand():
    x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
    norm = BatchNorm()
    variables = norm.init(jax.random.key(0), x, True)
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], 0.0)  # initialising records nothing
    y, changed = norm.apply(variables, x, True, mutable=["batch_stats"])
    np.testing.assert_allclose(y, [[-1, -1], [1, 1]], rtol=1e-4)
    np.testing.assert_allclose(changed["batch_stats"]["mean"], [0.2, 2.0], rtol=1e-6)
    np.testing.assert_allclose(changed["batch_stats"]["var"], [0.9 + 0.1, 0.9 + 10.0], rtol=1e-6)
    np.testing.assert_allclose(
        norm.apply({**variables, **changed}, x)[0, 0], (1 - 0.2) / np.sqrt(1.0 + 1e-5), rtol=1e-5
    )


def test_batch_norm_is_stable_far_from_zero():
    x = 1e4 + series(64, 1, 3)[:, 0]
    y, _ = BatchNorm().init_with_output(jax.random.key(0), x, True)
    np.testing.assert_allclose(np.std(y, axis=0), 1.0, atol=0.01)


def test_evaluation_treats_each_series_by_itself():
    x = series(4)
    variables = TINY.init(jax.random.key(0), x)
    np.testing.assert_allclose(TINY.apply(variables, x)[1:2], TINY.apply(variables, x[1:2]), rtol=1e-5, atol=1e-6)


def test_half_precision_keeps_float32_parameters():
    x = series(2)
    module = TINY.clone(dtype="bfloat16")
    variables = module.init(jax.random.key(0), x)
    assert {p.dtype for p in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    z = module.apply(variables, x)
    assert z.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(z), TINY.apply(variables, x), atol=0.1)


def test_features_none_leaves_the_average_over_time():
    module = TINY.clone(features=None)
    z, _ = module.init_with_output(jax.random.key(0), series(3))
    assert z.shape == (3, 8)
    assert (z >= 0).all()


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_short_series_work(steps):
    z, _ = TINY.init_with_output(jax.random.key(0), series(2, steps))
    assert z.shape == (2, 5)


def test_head_sits_on_the_encoder_and_keeps_its_weights_apart():
    module = WithHead(TINY, ProjectionHead((6,), 3))
    x = series(4)
    variables = module.init(jax.random.key(0), x)
    assert set(variables["params"]) == {"encoder", "head"}
    h = TINY.apply({c: variables[c]["encoder"] for c in ("params", "batch_stats")}, x)
    head = variables["params"]["head"]
    hidden = np.maximum(h @ head["hidden1"]["kernel"] + head["hidden1"]["bias"], 0)
    np.testing.assert_allclose(
        module.apply(variables, x), hidden @ head["out"]["kernel"] + head["out"]["bias"], rtol=1e-4, atol=1e-5
    )
    _, changed = module.apply(variables, x, True, mutable=["batch_stats"])
    assert set(changed["batch_stats"]) == {"encoder"}


def test_axis_reaches_the_encoder_under_the_head():
    module = WithHead(TINY, ProjectionHead((6,), 3))
    x = series(8)
    variables = module.init(jax.random.key(0), x)
    whole, _ = module.apply(variables, x, True, mutable=["batch_stats"])
    mapped = module.clone(axis_name="d")
    shards = jax.pmap(lambda x: mapped.apply(variables, x, True, mutable=["batch_stats"])[0], axis_name="d")
    np.testing.assert_allclose(shards(x.reshape(4, 2, 12, 2)).reshape(8, 3), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("module", "message"),
    [(ResNet1D(20), "depth must be 18, 34 or 50"), (ResNet1D((1, 1)), r"2 stages \(1, 1\) need as many widths")],
)
def test_impossible_networks_are_refused(module, message):
    with pytest.raises(ValueError, match=message):
        module.init(jax.random.key(0), series(1))
