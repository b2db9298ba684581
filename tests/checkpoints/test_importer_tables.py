"""Tables of rules run both ways: matching, rearranging, and saying what does not fit."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import linen as nn

from checkpoints.importers import engine, recognition
from checkpoints.importers.engine import export_tensors, import_tensors, plan
from checkpoints.importers.layout import ImporterError, Layout, choose, depth, refuse
from checkpoints.importers.patterns import match, substitute
from checkpoints.importers.rules import CONV2D, LINEAR, Fuse, Reshape, Rule, Split, Transpose, linear, norm


class Toy(nn.Module):
    """A leaf of each sort: plain, split from one, fused from two, stacked over layers."""

    width: int = 3

    @nn.compact
    def __call__(self, x):
        make = lambda name, *shape: self.param(name, nn.initializers.normal(1.0), shape)  # noqa: E731
        w = self.width
        return {
            "out": x @ make("kernel", w, 4),
            "q": make("query", w, 2), "k": make("key", w, 1), "both": make("both", 2, 5),
            "layers": make("layers", 3, w, w), "scale": make("norm_scale", w), "heads": make("heads", w, 2, 2),
        }  # fmt: skip

    def example_inputs(self, batch=1):
        return {"x": jax.ShapeDtypeStruct((batch, self.width), jnp.float32)}


RULES = (
    Rule("fc.weight", "kernel", LINEAR),
    Rule("qk.weight", ("query", "key"), (Split(0, (2, 1)), LINEAR)),
    Rule(("left.w", "right.w"), "both", Fuse(0, 2)),
    Rule("block.{i}.w", "layers[{i}]", LINEAR),
    Rule("ln.gamma", "norm_scale"),
    Rule("ln.weight", "norm_scale"),
    Rule("heads.weight", "heads", (Reshape((4, -1), (2, 2, -1)), Transpose((2, 0, 1)))),
)
TOY = Layout(
    name="toy", title="a toy", configure=lambda config, shapes: Toy(), rules=lambda module: RULES, model_types=("toy",),
    signature=("fc.weight", "qk.weight"), prefixes=("toy.",), buffers=("*.counter",),
    duplicates=(("copy.weight", "fc.weight"),),
)  # fmt: skip


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setattr(recognition, "layouts", lambda: {"toy": TOY})
    monkeypatch.setattr(engine, "layouts", lambda: {"toy": TOY})


def tensors(prefix=""):
    rng = np.random.default_rng(0)
    made = {
        "heads.weight": (4, 3), "block.2.w": (3, 3), "fc.weight": (4, 3), "qk.weight": (3, 3), "left.w": (1, 5),
        "right.w": (1, 5), "block.0.w": (3, 3), "block.1.w": (3, 3), "ln.gamma": (3,),
    }  # fmt: skip
    return {prefix + n: rng.normal(size=s).astype(np.float32) for n, s in made.items()}


def test_every_leaf_is_the_right_rearrangement():
    source = tensors()
    params = import_tensors(source).variables["params"]
    np.testing.assert_array_equal(params["kernel"], source["fc.weight"].T)
    np.testing.assert_array_equal(params["query"], source["qk.weight"][:2].T)
    np.testing.assert_array_equal(params["key"], source["qk.weight"][2:].T)
    np.testing.assert_array_equal(params["both"], np.concatenate([source["left.w"], source["right.w"]]))
    for i in range(3):
        np.testing.assert_array_equal(params["layers"][i], source[f"block.{i}.w"].T)
    for n in range(3):
        for h in range(2):
            for d in range(2):
                assert params["heads"][n, h, d] == source["heads.weight"][2 * h + d, n]


@pytest.mark.parametrize("prefix", ["", "toy.", "module."])
def test_the_way_back_gives_the_same_names_order_and_bytes(prefix):
    source = tensors(prefix)
    source[f"{prefix}bn.counter"] = np.int64(7).reshape(())
    source[f"{prefix}copy.weight"] = source[f"{prefix}fc.weight"].copy()
    imported = import_tensors(source)
    back = export_tensors(imported)
    assert list(back) == list(source)
    for name, x in source.items():
        assert back[name].dtype == x.dtype and back[name].tobytes() == x.tobytes() and back[name].shape == x.shape
    assert imported.report.duplicates == ("copy.weight",)
    assert imported.report.buffers == ("bn.counter",)
    assert set(imported.report.reshaped) == {n.removeprefix(prefix) for n in source} - {
        "bn.counter", "copy.weight", "ln.gamma"
    }  # fmt: skip


def test_a_model_that_was_never_imported_is_written_in_the_first_names_of_the_table():
    variables = import_tensors(tensors()).variables
    fresh = export_tensors("toy", Toy(), variables)
    assert set(fresh) == set(tensors())
    again = import_tensors(fresh).variables
    jax.tree.map(np.testing.assert_array_equal, again, variables)


def test_number_types_stay_or_become_what_is_asked():
    source = {n: x.astype(ml_dtypes.bfloat16) for n, x in tensors().items()}
    kept = import_tensors(source).variables["params"]
    assert {str(x.dtype) for x in jax.tree.leaves(kept)} == {"bfloat16"}
    wide = import_tensors(source, dtype=jnp.float32).variables["params"]
    assert {str(x.dtype) for x in jax.tree.leaves(wide)} == {"float32"}
    np.testing.assert_array_equal(wide["kernel"], source["fc.weight"].T.astype(np.float32))


def test_missing_and_unused_are_refused_by_name_unless_allowed():
    source = tensors()
    del source["block.1.w"], source["ln.gamma"]
    source["extra.weight"] = np.zeros(2, np.float32)
    with pytest.raises(
        ImporterError, match=r"2 missing: params/layers\[1\], params/norm_scale.*1 unused: extra.weight"
    ):
        import_tensors(source)
    allowed = import_tensors(source, allow_missing=("layers*", "norm_scale"), allow_unused=("extra.*",))
    params = allowed.variables["params"]
    fresh = Toy().init(jax.random.key(0), jnp.zeros((1, 3)))["params"]
    np.testing.assert_array_equal(params["layers"][0], source["block.0.w"].T)
    np.testing.assert_allclose(params["layers"][1], fresh["layers"][1], rtol=1e-6)
    np.testing.assert_array_equal(params["layers"][2], source["block.2.w"].T)
    np.testing.assert_allclose(params["norm_scale"], fresh["norm_scale"], rtol=1e-6)
    assert allowed.report.missing == ("params/layers[1]", "params/norm_scale")
    assert allowed.report.unused == ("extra.weight",)
    with pytest.raises(ImporterError, match="1 missing: params/norm_scale"):
        import_tensors(source, allow_missing=("layers*",), allow_unused=("*",))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "fc.weight",
            np.zeros((3, 4), np.float32),
            r"fc.weight: \[4, 3\] after rearranging.*\[3, 4\]; it looks transposed",
        ),
        ("qk.weight", np.zeros((4, 3), np.float32), r"qk.weight: float32\[4, 3\] cannot be rearranged"),
        ("heads.weight", np.zeros((5, 3), np.float32), "heads.weight: .*cannot be rearranged"),
        ("block.3.w", np.zeros((3, 3), np.float32), r"block.3.w: layer 3 of 3"),
        ("fc.weight", np.zeros((4, 3), np.int8), "int8 where params/kernel holds floating numbers"),
        ("ln.weight", np.zeros(3, np.float32), "params/norm_scale is already filled by ln.gamma"),
    ],
)
def test_what_does_not_fit_is_named(name, value, message):
    with pytest.raises(ImporterError, match=message):
        import_tensors({**tensors(), name: value})


def test_half_of_a_fused_pair_is_not_enough():
    source = tensors()
    del source["right.w"]
    with pytest.raises(ImporterError, match="missing: params/both.*unused: left.w"):
        import_tensors(source)


def test_a_tied_copy_that_differs_is_refused():
    source = tensors()
    with pytest.raises(ImporterError, match="copy.weight differs from fc.weight"):
        import_tensors({**source, "copy.weight": source["fc.weight"] + 1})


def test_layers_of_different_number_types_are_refused():
    source = tensors()
    source["block.1.w"] = source["block.1.w"].astype(np.float16)
    with pytest.raises(ImporterError, match="block.1.w is float16, but other layers are float32"):
        import_tensors(source)


def test_what_is_not_finite_is_counted_by_source():
    source = tensors()
    source["fc.weight"][0, 0] = np.nan
    source["block.1.w"][1] = np.inf
    report = import_tensors(source).report
    assert report.nonfinite == {"fc.weight": 1, "block.1.w": 3}
    assert "WARNING: 4 NaN or infinite entries in block.1.w, fc.weight" in str(report)


def test_config_and_weights_that_contradict_each_other_are_refused():
    other = {"a.weight": np.zeros(2, np.float32)}
    with pytest.raises(ImporterError, match=r"config is for toy \(model_type 'toy'\), but the weights do not"):
        import_tensors(other, {"model_type": "toy"})
    with pytest.raises(ImporterError, match="no known layout .*model_type 'unheard'.*a.weight"):
        import_tensors(other, {"model_type": "unheard"})
    with pytest.raises(ImporterError, match="--as 'tyo' is unknown; there are toy"):
        import_tensors(tensors(), layout="tyo")
    with pytest.raises(ImporterError, match="holds no weights"):
        import_tensors({})


def test_two_layouts_that_fit_alike_need_a_choice(monkeypatch):
    twin = dataclasses.replace(TOY, name="twin")
    both = lambda: {"toy": TOY, "twin": twin}  # noqa: E731
    monkeypatch.setattr(recognition, "layouts", both)
    monkeypatch.setattr(engine, "layouts", both)
    with pytest.raises(ImporterError, match="fit toy and twin alike; choose one with --as"):
        import_tensors(tensors())
    assert import_tensors(tensors(), layout="twin").layout.name == "twin"
    sharper = dataclasses.replace(twin, signature=(*TOY.signature, "ln.gamma"))
    monkeypatch.setattr(recognition, "layouts", lambda: {"toy": TOY, "twin": sharper})
    assert engine.recognise(None, tensors()).name == "twin"
    monkeypatch.setattr(recognition, "layouts", lambda: {"toy": dataclasses.replace(TOY, absent=("ln.gamma",))})
    with pytest.raises(ImporterError, match="no known layout"):
        engine.recognise(None, tensors())


def test_a_name_that_fits_two_rules_is_the_tables_fault(monkeypatch):
    loose = dataclasses.replace(TOY, rules=lambda m: (*RULES, Rule("ln.{x}", "norm_scale"), Rule("ln.gamma", "kernel")))
    with pytest.raises(ImporterError, match="ln.gamma fits 2 rules"):
        plan(loose, Toy(), tensors())


def test_planning_a_model_of_any_size_allocates_nothing():
    class Wide(Toy):
        width: int = 1 << 20

    big = Wide()
    shapes = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in tensors().items()}
    found = plan(TOY, big, {"block.0.w": jax.ShapeDtypeStruct((1 << 20, 1 << 20), jnp.float32), **shapes})
    assert any(name == "fc.weight" for name, _ in found.mismatched)  # and no terabyte was asked for


def test_patterns():
    assert match("a.{i}.b{j}", "a.3.b12") == {"i": 3, "j": 12}
    assert match("a.{i}.b", "a.x.b") is None
    assert match("a.{i}", "a.03") is None
    assert match("a.{i}.{i}", "a.1.2") is None
    assert match("l{i+1}", "l3") == {"i": 2}
    assert match("l{i+1}", "l0") is None
    assert match("*.w", "x.y.w") == {}
    assert match("a.b", "axb") is None
    assert substitute("l{i+1}/k[{i}]", {"i": 4}) == "l5/k[4]"


@pytest.mark.parametrize(
    "op",
    [
        LINEAR,
        Transpose((1, 0)),
        Reshape((6, 4), (2, 3, 4)),
        Reshape((-1, 4), (3, -1, 4)),
        Split(0, 3),
        Split(1, (1, 3)),
    ],
)
def test_operations_undo_themselves(op):
    x = np.arange(24.0).reshape(6, 4)
    (back,) = op.backward(op.forward([x]))
    np.testing.assert_array_equal(back, x)


def test_convolutions_are_rows_columns_in_out():
    x = np.arange(2 * 3 * 5 * 7).reshape(2, 3, 5, 7)
    (y,) = CONV2D.forward([x])
    assert y.shape == (5, 7, 3, 2)
    assert y[4, 6, 2, 1] == x[1, 2, 4, 6] and y[0, 6, 1, 0] == x[0, 1, 0, 6]


def test_helpers_of_tables():
    assert [r.target for r in linear("a", "b")] == [("params/b/kernel",), ("params/b/bias",)]
    assert [r.source for r in norm("a", "b")] == [("a.weight",), ("a.bias",)]
    names = dict.fromkeys(["enc.layer.0.w", "enc.layer.11.w", "enc.layer.2.w", "enc.layers.40.w"])
    assert depth(names, "enc.layer.{i}.") == 12
    assert depth(names, "dec.{i}.") == 0
    assert choose({"act": "gelu"}, "act", {"gelu": 1}, "relu") == 1
    with pytest.raises(ImporterError, match="config act = 'swish' is not supported; supported: 'gelu'"):
        choose({"act": "swish"}, "act", {"gelu": 1}, "gelu")
    refuse({"scale": 1.0}, scale=1.0, other=False)
    with pytest.raises(ImporterError, match="config other = True is not supported; only False is"):
        refuse({"other": True}, other=False)
