"""Merging weights that fit in part, and reading them from runs and models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from checkpoints import CheckpointError, DamagedError, MergeError, Store, load_weights, merge, save_model


def target():
    return {
        "encoder/dense/kernel": jnp.zeros((2, 3)),
        "encoder/dense/bias": jnp.zeros(3),
        "head/kernel": jnp.zeros((3, 5)),
        "head/bias": jnp.zeros(5),
    }


def source():
    return {
        "encoder/dense/kernel": np.ones((2, 3), np.float32),
        "encoder/dense/bias": np.ones(3, np.float32),
        "head/kernel": np.ones((3, 7), np.float32),
        "decoder/kernel": np.ones(4, np.float32),
    }


def test_everything_that_fits_and_a_report_of_the_rest():
    own = target()
    merged, report = merge(own, source())
    assert report.matched == ("encoder/dense/kernel", "encoder/dense/bias")
    assert report.missing == ("head/bias",)
    assert report.mismatched == (("head/kernel", "float32[3, 7]", "float32[3, 5]"),)
    assert report.unused == ("head/kernel", "decoder/kernel")
    assert all(float(merged[p].min()) == 1 for p in report.matched)
    assert merged["head/kernel"] is own["head/kernel"] and merged["head/bias"] is own["head/bias"]
    assert list(merged) == list(own) and float(own["encoder/dense/bias"].max()) == 0
    text = str(report)
    assert text.startswith("2 matched; 1 mismatched: head/kernel (float32[3, 7] there, float32[3, 5] here)")
    assert "1 missing: head/bias; 2 unused: head/kernel, decoder/kernel" in text and "\n" not in text


def test_only_patterns():
    merged, report = merge(target(), source(), only=("encoder/*",))
    assert report.matched == ("encoder/dense/kernel", "encoder/dense/bias")
    assert report.missing == () and report.mismatched == ()
    merged, report = merge(target(), source(), only=("*/bias",))
    assert report.matched == ("encoder/dense/bias",) and report.missing == ("head/bias",)
    assert float(merged["encoder/dense/kernel"].max()) == 0


def test_rename_by_whole_parts_longest_first():
    theirs = {"backbone/dense/kernel": np.ones((2, 3)), "backbone/dense/bias": np.ones(3), "backboned": np.ones(1)}
    merged, report = merge(target(), theirs, rename={"backbone": "encoder"})
    assert report.matched == ("encoder/dense/kernel", "encoder/dense/bias") and report.unused == ("backboned",)
    assert merged["encoder/dense/kernel"].dtype == jnp.float32
    _, report = merge(target(), theirs, rename={"backbone": "x", "backbone/dense": "encoder/dense"})
    assert len(report.matched) == 2
    _, report = merge(target(), {"dense/bias": np.ones(3)}, rename={"": "encoder"})
    assert report.matched == ("encoder/dense/bias",)
    _, report = merge(target(), {"model/head/bias": np.ones(5)}, rename={"model": ""})
    assert report.matched == ("head/bias",)
    _, report = merge(target(), {"headxbias": np.ones(5), "head/bias": np.ones(5)}, rename={"head": "head"})
    assert report.matched == ("head/bias",) and report.unused == ("headxbias",)
    with pytest.raises(MergeError, match="a and b of the source would both become head/bias"):
        merge(target(), {"a": np.ones(5), "b": np.ones(5)}, rename={"a": "head/bias", "b": "head/bias"})


def test_nothing_matched_offers_the_nearest_names():
    with pytest.raises(MergeError, match=r"pattern 'encodr/\*' matches no parameter; nearest: encoder/dense"):
        merge(target(), source(), only=("encoder/*", "encodr/*"))
    with pytest.raises(
        MergeError, match="nothing fits: encoder/dense/kernel is not among .* nearest: encoders/dense/kernel"
    ):
        merge(target(), {"encoders/dense/kernel": np.ones((2, 3))})
    with pytest.raises(MergeError, match=r"head/kernel is float32\[3, 7\] there and float32\[3, 5\] here"):
        merge(target(), source(), only=("head/kernel",))
    with pytest.raises(MergeError, match="the source is empty"):
        merge(target(), {})


def test_dtype_and_sharding_are_the_targets():
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:4]), ("data",)), PartitionSpec("data"))
    own = {"w": jax.device_put(jnp.zeros(8, jnp.bfloat16), sharding), "n": jnp.zeros(2, jnp.int32), "host": np.zeros(2)}
    theirs = {"w": np.ones(8, np.float32), "n": np.ones(2, np.float32), "host": np.ones(2, np.float32)}
    merged, report = merge(own, theirs)
    assert merged["w"].dtype == jnp.bfloat16 and merged["w"].sharding == sharding
    assert isinstance(merged["host"], np.ndarray) and merged["host"].dtype == np.float64
    assert report.mismatched == (("n", "float32[2]", "int32[2]"),)


def make_run(root, average=True):
    tree = {"params/dense/kernel": jnp.ones((2, 2)), "collections/stats": jnp.ones(1), "step": jnp.zeros((), jnp.int32)}
    with Store(root / "checkpoints") as store:
        for step in (1, 2):
            extra = {"average/dense/kernel": jnp.full((2, 2), 10.0 * step)} if average else {}
            store.save(step, {**tree, "params/dense/kernel": jnp.full((2, 2), 1.0 * step), **extra}, {})
    return root


def test_weights_of_a_run(tmp_path):
    run = make_run(tmp_path / "run")
    for path in (run, run / "checkpoints"):
        out = load_weights(path)
        assert list(out) == ["dense/kernel"] and out["dense/kernel"][0, 0] == 20
    assert load_weights(run, weights="params")["dense/kernel"][0, 0] == 2
    plain = make_run(tmp_path / "plain", average=False)
    assert load_weights(plain)["dense/kernel"][0, 0] == 2
    (run / "checkpoints" / "2.json").write_text("{")
    notes = []
    assert load_weights(run, warn=notes.append)["dense/kernel"][0, 0] == 10
    assert len(notes) == 1 and "2" in notes[0]
    (run / "checkpoints" / "1.json").write_text("{")
    with pytest.raises(DamagedError, match="every checkpoint"):
        load_weights(run, warn=notes.append)


def test_weights_of_a_model(tmp_path):
    from zoo.catalogue import Claim

    definition = Claim("s", "m", 0.1, "a", "b", "c")
    variables = {"params": {"dense": {"kernel": jnp.ones((2, 2))}}, "constants": {"c": jnp.ones(1)}}
    save_model(tmp_path / "run" / "model", definition, variables, {}, {})
    for path in (tmp_path / "run" / "model", tmp_path / "run"):
        assert list(load_weights(path)) == ["dense/kernel"]
    save_model(tmp_path / "bare", definition, {"codes": jnp.ones(1)}, {}, {})
    with pytest.raises(CheckpointError, match="holds no parameters"):
        load_weights(tmp_path / "bare")


def test_nothing_to_read(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        load_weights(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="neither a run with a complete checkpoint nor an exported model"):
        load_weights(tmp_path)
    with pytest.raises(ValueError, match="'average' or 'params'"):
        load_weights(tmp_path, weights="best")


def test_statistics_go_with_the_parameters(tmp_path):
    from checkpoints import load_collections, merge_variables, save_model
    from zoo.nn.partitioning import unbox
    from zoo.nn.resnet import ResNet, ResNetConfig

    module = ResNet(ResNetConfig((1,), (2,), stem_width=2, classes=3))
    x = jnp.ones((2, 8, 8, 3))
    source = unbox(module.init(jax.random.key(0), x))
    source = {c: jax.tree.map(lambda a: a + 0.5, v) for c, v in source.items()}
    save_model(tmp_path / "m", module, source, {}, {})
    found = load_collections(tmp_path / "m")
    assert set(found) == {"params", "batch_stats"}
    target = {
        c: {"encoder": v, "own": {"bias": jnp.zeros(1)}} for c, v in unbox(module.init(jax.random.key(1), x)).items()
    }
    merged, report = merge_variables(target, found, ("encoder/*",), {"": "encoder"})
    for collection in source:
        jax.tree.map(np.testing.assert_array_equal, merged[collection]["encoder"], source[collection])
        np.testing.assert_array_equal(merged[collection]["own"]["bias"], 0)
    assert "batch_stats/encoder/stem/norm/mean" in report.matched and "encoder/stem/norm/scale" in report.matched
    part, report = merge_variables(target, found, ("encoder/head/*",), {"": "encoder"})
    jax.tree.map(np.testing.assert_array_equal, part["batch_stats"], target["batch_stats"])
    assert sorted(report.matched) == ["encoder/head/bias", "encoder/head/kernel"]
    plain, _ = merge_variables({"params": target["params"]}, found, ("encoder/*",), {"": "encoder"})
    assert set(plain) == {"params"}
