"""Wide residual networks against the released network's numbers, and their shapes."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from zoo.nn.wide_resnet import WideResNet, WideResNetConfig

GOLDEN = np.load(Path(__file__).resolve().parents[2] / "golden" / "invariance_augment_wrn.npz")


def weights():
    """The golden's weights, by the released code's names."""
    rng, out = np.random.default_rng(0), {}
    for name, shape in zip(GOLDEN["names"], GOLDEN["shapes"], strict=True):
        shape = tuple(map(int, str(shape).split(",")))
        wide = name.endswith("weight") and len(shape) > 1
        v = rng.normal(size=shape).astype(np.float32) * (0.1 if wide else 0.3)
        v = np.abs(v) + 0.5 if name.endswith("running_var") else v
        v = v + 1 if "bn" in name and name.endswith("weight") else v
        out[str(name)] = v.astype(np.float32)
    return out


def variables():
    """The same as this network's variables."""
    flat = {}
    parts = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
    for name, v in weights().items():
        *path, last = name.split(".")
        if path[0].startswith("layer"):
            own = {"bn1": "norm1", "bn2": "norm2"}.get(path[2], path[2])
            where = (f"stage{path[0][-1]}_block{path[1]}", own)
        else:
            where = ({"conv1": "stem", "bn1": "norm", "linear": "head"}[path[0]],)
        if "norm" in where[-1]:
            kind = "batch_stats" if last.startswith("running") else "params"
            flat[(kind, *where, parts[last])] = jnp.asarray(v)
        else:
            v = v.transpose(2, 3, 1, 0) if v.ndim == 4 else v.T
            flat[("params", *where, "kernel" if last == "weight" else "bias")] = jnp.asarray(v)
    return traverse_util.unflatten_dict(flat)


def test_the_released_networks_numbers():
    net = WideResNet(WideResNetConfig(10, 2, classes=5))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 3, 8, 12)).astype(np.float32).transpose(0, 2, 3, 1))
    made = jax.eval_shape(lambda: net.init(jax.random.key(0), x))
    own = variables()
    assert jax.tree.map(jnp.shape, jax.tree.map(lambda v: v, own)) == jax.tree.map(
        lambda v: v.shape, jax.tree.map(lambda v: getattr(v, "value", v), made, is_leaf=lambda v: hasattr(v, "value"))
    )
    out = net.apply(own, x)
    np.testing.assert_allclose(out["logits"], GOLDEN["eval"], rtol=1e-4, atol=1e-4)
    trained, mutated = net.apply(own, x, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(trained["logits"], GOLDEN["train"], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(mutated["batch_stats"]["norm"]["mean"], GOLDEN["mean"], rtol=1e-4, atol=1e-5)
    found = mutated["batch_stats"]["stage2_block0"]["norm2"]["var"]
    np.testing.assert_allclose(found, GOLDEN["var"], rtol=1e-4, atol=1e-5)
    assert [s.shape for s in out["stages"]] == [(3, 8, 12, 32), (3, 4, 6, 64), (3, 2, 3, 128)]
    assert out["pooled"].shape == (3, 128)
    # padded rows count for nothing
    wide = jnp.concatenate([x, 9 * jnp.ones_like(x[:1])])
    masked, _ = net.apply(own, wide, train=True, mask=jnp.arange(4) < 3, mutable=["batch_stats"])
    np.testing.assert_allclose(masked["logits"][:3], trained["logits"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("depth", "width", "millions"), [(40, 2, 2.25), (28, 10, 36.5)])
def test_the_published_sizes(depth, width, millions):
    net = WideResNet(WideResNetConfig(depth, width, classes=10), remat=True)
    made = jax.eval_shape(lambda: net.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3))))["params"]
    count = sum(np.prod(v.shape) for v in jax.tree.leaves(made))
    assert abs(count / 1e6 - millions) < 0.02 * millions
    blocks = {k for k in made if k.startswith("stage")}
    assert len(blocks) == 3 * (depth - 4) // 6


def test_no_head_no_bias_and_bad_sizes():
    net = WideResNet(WideResNetConfig(10, 1, bias=False))
    x = jnp.zeros((1, 8, 8, 1))
    variables = jax.eval_shape(lambda: net.init(jax.random.key(0), x))
    assert not [p for p in traverse_util.flatten_dict(variables["params"]) if p[-1] == "bias" and "norm" not in p[-2]]
    assert "logits" not in jax.eval_shape(lambda: net.init_with_output(jax.random.key(0), x)[0])
    for depth in (9, 4, 12):
        with pytest.raises(ValueError, match="6 n"):
            WideResNetConfig(depth)
    with pytest.raises(ValueError, match="width"):
        WideResNetConfig(10, 0)
