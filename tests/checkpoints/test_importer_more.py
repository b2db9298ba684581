"""Importers under hostile eyes: damaged and malicious torch files, regions, groups, what exports must not lose."""

import contextlib
import dataclasses
import json
import random
import shutil
import zipfile

import golden_cases
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from command import ROOT
from flax import linen as nn
from safetensors.numpy import load_file, save_file

from checkpoints import load_model
from checkpoints.importers import engine, importing, recognition
from checkpoints.importers.engine import export_tensors, fill, fill_missing, import_tensors, plan
from checkpoints.importers.exporting import export_model
from checkpoints.importers.importing import import_model
from checkpoints.importers.layout import ImporterError, Layout
from checkpoints.importers.planning import check
from checkpoints.importers.rules import CONV1D, CONV2D, LINEAR, Reshape, Rule, Split, batch_norm
from checkpoints.importers.sources import open_source
from checkpoints.importers.torch_file import read_index
from checkpoints.importers.writing import write_safetensors

TORCH = ROOT / "tests" / "golden" / "torch"


class Stack(nn.Module):
    """Two leaves from one source, one stacked over layers, one that may be missing."""

    @nn.compact
    def __call__(self, x):
        make = lambda name, *shape: self.param(name, nn.initializers.normal(1.0), shape)  # noqa: E731
        return make("query", 2, 3), make("key", 2, 3), make("layers", 4, 2, 3), make("fresh", 5)

    def example_inputs(self, batch=1):
        return {"x": jax.ShapeDtypeStruct((batch, 1), jnp.float32)}


STACK = Layout(
    name="stack", title="a stack", configure=lambda config, shapes: Stack(), signature=("qk",), prefixes=("net.",),
    rules=lambda module: (
        Rule("qk", ("query", "key"), (Split(0, 2),)), Rule("b.{i}", "layers[{i}]"), Rule("fresh", "fresh"),
    ),
    full_name=lambda module, name: name if name == "fresh" else f"net.{name}",
)  # fmt: skip


@pytest.fixture
def stack(monkeypatch):
    monkeypatch.setattr(recognition, "layouts", lambda: {"stack": STACK})
    monkeypatch.setattr(engine, "layouts", lambda: {"stack": STACK})
    rng = np.random.default_rng(0)
    made = {"qk": rng.normal(size=(4, 3))} | {f"b.{i}": rng.normal(size=(2, 3)) for i in range(4)}
    return {n: x.astype(np.float32) for n, x in {**made, "fresh": rng.normal(size=5)}.items()}


# parts of leaves


def test_a_region_holds_its_own_rows_and_columns_and_only_what_was_asked_for_is_read(stack):
    found = plan(STACK, Stack(), stack)
    read = []
    get = lambda name: (read.append(name), stack[name])[1]  # noqa: E731
    at = (slice(1, 3), slice(0, 2), slice(1, 3))
    leaves, bad = fill(found, get, None, lambda path: [at], {"params/layers"})
    assert set(leaves) == {"params/layers"} and not bad
    ((where, part),) = leaves["params/layers"]
    assert where == at and part.shape == (2, 2, 2)
    np.testing.assert_array_equal(part, np.stack([stack["b.1"], stack["b.2"]])[:, :, 1:])
    assert set(read) == {f"b.{i}" for i in range(4)}
    leaves, _ = fill(found, get, None, None, {"params/key"})
    assert set(leaves) == {"params/key"}
    np.testing.assert_array_equal(leaves["params/key"][0][1], stack["qk"][2:])


def test_missing_layers_of_a_region_are_each_their_own_fresh_values(stack):
    del stack["b.1"], stack["b.2"], stack["fresh"]
    found = plan(STACK, Stack(), stack)
    fresh = jax.jit(Stack().init)(jax.random.key(0), jnp.zeros((1, 1)))["params"]
    at = lambda path: [(slice(2, 5),)] if path == "params/fresh" else [(slice(2, 4), slice(0, 2), slice(0, 3))]  # noqa: E731
    leaves, _ = fill(found, stack.__getitem__, None, at, {"params/layers", "params/fresh"})
    fill_missing(found, Stack(), leaves, None, at, {"params/layers", "params/fresh"})
    ((_, rows),) = leaves["params/layers"]
    np.testing.assert_allclose(rows[0], fresh["layers"][2], rtol=1e-6)
    np.testing.assert_array_equal(rows[1], stack["b.3"])
    np.testing.assert_allclose(leaves["params/fresh"][0][1], fresh["fresh"][2:], rtol=1e-6)
    allowed = import_tensors(stack, allow_missing=("*",)).variables["params"]
    np.testing.assert_allclose(allowed["layers"][1:3], fresh["layers"][1:3], rtol=1e-6)
    np.testing.assert_allclose(allowed["fresh"], fresh["fresh"], rtol=1e-6)


def test_a_source_that_fills_leaves_of_several_groups_is_counted_once(stack, tmp_path, monkeypatch):
    stack["qk"][0, 0] = stack["qk"][3, 0] = stack["qk"][3, 1] = np.nan
    save_file(stack, tmp_path / "w.safetensors")
    outcome = {}
    for size in (1, 10**6):
        monkeypatch.setattr(importing, "PART_BYTES", size)
        outcome[size] = import_model(str(tmp_path / "w.safetensors"), tmp_path / str(size))
        assert outcome[size].report.nonfinite == {"qk": 3}
    parts = [json.loads((tmp_path / str(s) / "model.json").read_text())["parts"] for s in (1, 10**6)]
    assert [len(p) for p in parts] == [4, 1]


def test_the_name_in_the_message_is_a_pattern_too(stack):
    del stack["b.2"]
    with pytest.raises(ImporterError, match=r"1 missing: params/layers\[2\] "):
        import_tensors(stack)
    for pattern in ("params/layers[2]", "layers[2]"):
        assert import_tensors(stack, allow_missing=(pattern,)).report.missing == ("params/layers[2]",)
    stack["old.w"] = stack["new.w"] = np.zeros(1, np.float32)
    with pytest.raises(ImporterError, match="1 unused: new.w"):
        import_tensors(stack, allow_missing=("layers*",), allow_unused=("old.*",))


def test_a_slot_that_is_filled_twice_is_the_one_that_is_named(stack):
    twice = dataclasses.replace(
        STACK, rules=lambda m: (*STACK.rules(m), Rule("k2", "key"), Rule("q2", ("query", "fresh")))
    )
    found = plan(twice, Stack(), {"k2": stack["b.0"], **stack})
    assert found.mismatched == (("qk", "params/key is already filled by k2"),)
    with pytest.raises(ImporterError, match="params/key is already filled by k2"):
        check(found, twice)


def test_integers_keep_their_type_when_floats_are_converted(monkeypatch):
    class Ids(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.variable("constants", "ids", lambda: jnp.zeros(3, jnp.int32))
            return self.param("w", nn.initializers.zeros, (2,))

        def example_inputs(self, batch=1):
            return {"x": jax.ShapeDtypeStruct((batch, 1), jnp.float32)}

    rules = (Rule("w", "w"), Rule("ids", "constants/ids"))
    layout = dataclasses.replace(STACK, configure=lambda c, s: Ids(), rules=lambda m: rules, signature=("w", "ids"))
    monkeypatch.setattr(recognition, "layouts", lambda: {"stack": layout})
    source = {"w": np.array([1, np.nan], ml_dtypes.bfloat16), "ids": np.arange(3, dtype=np.int32)}
    found = import_tensors(source, dtype=jnp.float16)
    assert found.variables["constants"]["ids"].dtype == jnp.int32
    assert found.variables["params"]["w"].dtype == jnp.float16
    assert found.report.nonfinite == {"w": 1}


# words of tables


def test_operations_that_are_not_their_own_inverse():
    x = np.arange(2 * 3 * 5).reshape(2, 3, 5)
    (y,) = CONV1D.forward([x])
    assert y.shape == (5, 3, 2) and y[4, 1, 0] == x[0, 1, 4] and y[2, 2, 1] == x[1, 2, 2]
    z = np.arange(2 * 3 * 5 * 7).reshape(2, 3, 5, 7)
    np.testing.assert_array_equal(CONV2D.backward(CONV2D.forward([z]))[0], z)
    several = Rule("a", ("b", "c"), (LINEAR, Split(1, (1, 2)), Reshape((2, -1), (-1,))))
    w = np.arange(6.0).reshape(3, 2)
    one, two = Rule("a", ("b", "c"), (LINEAR, Split(1, (1, 2)))).forward([w])
    np.testing.assert_array_equal(one, w[:1].T)
    np.testing.assert_array_equal(two, w[1:].T)
    with pytest.raises(ValueError, match="reshape"):
        Reshape((4,), (2, 2)).forward([np.zeros(5)])
    with pytest.raises(ValueError, match="reshape"):
        Reshape((4, -1), (-1,)).forward([np.zeros((5, 2))])
    with pytest.raises(ValueError, match=r"a split into \(1, 2\)"):
        Split(0, (1, 2)).forward([np.zeros((4, 2))])
    with pytest.raises(ValueError, match="a split into 3"):
        Split(0, 3).forward([np.zeros((4, 2))])
    assert several.forward([w])[1].shape == (4,)
    with pytest.raises(ValueError, match="gives 1 arrays for 2 targets"):
        Rule("a", ("b", "c"), LINEAR).forward([w])


def test_running_statistics_have_a_place_each():
    assert {r.source[0]: r.target[0] for r in batch_norm("n", "m")} == {
        "n.weight": "params/m/scale", "n.bias": "params/m/bias", "n.running_mean": "batch_stats/m/mean",
        "n.running_var": "batch_stats/m/var",
    }  # fmt: skip


# recognition


def test_a_copy_without_its_original_is_unused(stack):
    tied = dataclasses.replace(STACK, duplicates=(("copy", "gone"),))
    assert plan(tied, Stack(), {**stack, "copy": stack["fresh"]}).unused == ("copy",)
    self_tied = dataclasses.replace(STACK, duplicates=(("copy", "copy"),))
    assert plan(self_tied, Stack(), {**stack, "copy": stack["fresh"]}).unused == ("copy",)


def test_a_config_does_not_outweigh_what_the_weights_are_not(stack, monkeypatch):
    other = dataclasses.replace(STACK, name="other", model_types=("other",), signature=("never",))
    monkeypatch.setattr(recognition, "layouts", lambda: {"other": other, "stack": STACK})
    with pytest.raises(ImporterError, match="the config is for other .*, but the weights look like stack"):
        recognition.recognise({"model_type": "other"}, stack)
    assert recognition.recognise({"model_type": "strange"}, stack).name == "stack"


def test_the_prefix_is_taken_off_only_what_then_is_a_model(stack):
    assert recognition.split_prefix(STACK, {f"net.{n}": 0 for n in stack})[0] == "net."
    # a model whose own names begin like a prefix
    own = dataclasses.replace(STACK, signature=("net.qk",))
    assert recognition.split_prefix(own, {f"net.{n}": 0 for n in stack})[0] == ""
    # two names that would become one
    assert recognition.split_prefix(STACK, {**stack, "net.qk": 0})[0] == ""


# exports


def test_a_model_with_weights_that_a_layout_cannot_name_is_not_written(stack):
    variables = import_tensors(stack).variables
    fewer = dataclasses.replace(STACK, rules=lambda m: STACK.rules(m)[:2])
    with pytest.raises(ImporterError, match="stack has no name for params/fresh"):
        dict(engine.export_stream(fewer, Stack(), variables))
    imported = dataclasses.replace(import_tensors(stack), layout=fewer)
    with pytest.raises(ImporterError, match="stack has no name for params/fresh"):
        export_tensors(imported)


def test_what_was_initialised_afresh_is_exported_under_its_own_name(stack, tmp_path):
    del stack["fresh"], stack["b.1"]
    for prefix, fresh in (("", "fresh"), ("net.", "fresh"), ("module.", "module.fresh")):
        source = {f"{prefix}{n}": x for n, x in stack.items()}
        back = export_tensors(import_tensors(source, allow_missing=("*",)))
        assert set(back) == {*source, fresh, f"{prefix}b.1"}
        again = import_tensors({n.removeprefix(prefix): x for n, x in back.items()})
        assert again.report.missing == ()


def test_an_export_of_files_keeps_what_was_initialised_afresh(tmp_path):
    source = tmp_path / "gpt2"
    shutil.copytree(golden_cases.FOLDER / "gpt2_hub", source, ignore=shutil.ignore_patterns("io.npz", "case.json"))
    weights = load_file(source / "model.safetensors")
    lost = weights.pop("h.1.mlp.c_fc.bias")
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    import_model(str(source), tmp_path / "model", allow_missing=("*",))
    found = export_model(tmp_path / "model", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back["h.1.mlp.c_fc.bias"].shape == lost.shape and found["left_out"] == []
    assert all(back[n].tobytes() == x.tobytes() for n, x in weights.items())
    import_model(str(tmp_path / "back"), tmp_path / "again")


def pieces(folder, weights, count=2):
    """Weights in several files with an index."""
    names, where = list(weights), {}
    for i in range(count):
        file = f"model-{i + 1:05}-of-{count:05}.safetensors"
        save_file({n: weights[n] for n in names[i::count]}, folder / file, {"format": "pt"})
        where |= dict.fromkeys(names[i::count], file)
    content = {"metadata": {"total_size": sum(x.nbytes for x in weights.values())}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    return content


def test_the_index_of_an_export_names_what_is_there(tmp_path):
    source = tmp_path / "gpt2"
    shutil.copytree(golden_cases.FOLDER / "gpt2_hub", source, ignore=shutil.ignore_patterns("io.npz", "case.json"))
    weights = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    content = pieces(source, {**weights, "extra.w": np.zeros(3, np.float32)})
    import_model(str(source), tmp_path / "model", allow_unused=("extra.*",))
    found = export_model(tmp_path / "model", tmp_path / "back")
    assert found["left_out"] == ["extra.w"]
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(content["weight_map"]) - {"extra.w"}
    import_model(str(tmp_path / "back"), tmp_path / "again")
    export_model(tmp_path / "again", tmp_path / "half", dtype="bfloat16")
    index = json.loads((tmp_path / "half" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(
        x.nbytes // (2 if x.dtype == np.float32 else 1) for x in weights.values()
    )


def test_copies_that_differ_are_refused_in_files_too(tmp_path):
    source = tmp_path / "gpt2"
    shutil.copytree(golden_cases.FOLDER / "gpt2_hub", source, ignore=shutil.ignore_patterns("io.npz", "case.json"))
    weights = load_file(source / "model.safetensors")
    embedding = next(n for n in weights if n.endswith("wte.weight"))
    save_file({**weights, "lm_head.weight": weights[embedding] + 1}, source / "model.safetensors")
    with pytest.raises(ImporterError, match="lm_head.weight differs from"):
        import_model(str(source), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_header_is_used_again_only_for_what_it_describes(tmp_path):
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    from checkpoints.importers.writing import new_header

    header = new_header({"x": (x.shape, x.dtype)}, {"who": "them"})
    for array, same in ((x, True), (x.T, False), (x.view(np.int32), False)):
        write_safetensors(tmp_path / "x.safetensors", {"x": array}, header=header)
        back = load_file(tmp_path / "x.safetensors")["x"]
        assert back.dtype == array.dtype
        np.testing.assert_array_equal(back, array)
        assert (b"them" in (tmp_path / "x.safetensors").read_bytes()) is same
    for wrong in (np.zeros((3, 3), np.float32), np.zeros((1, 3), np.float32)):
        with pytest.raises(ValueError, match="which is not what the header says"):
            write_safetensors(tmp_path / "y.safetensors", {"x": wrong}, {"x": ((2, 3), np.float32)})
    write_safetensors(tmp_path / "z.safetensors", {"ééé": x, "é": x})
    assert int.from_bytes((tmp_path / "z.safetensors").read_bytes()[:8], "little") % 8 == 0


# files


def test_weights_in_two_files_or_in_others_than_the_index_says_are_refused(tmp_path):
    x = np.ones(2, np.float32)
    for i in (1, 2):
        save_file({"w": x, f"w{i}": x}, tmp_path / f"model-{i:05}-of-00002.safetensors")
    with pytest.raises(ImporterError, match="w is also in model-00001-of-00002.safetensors"):
        open_source(str(tmp_path))
    for i in (1, 2):
        save_file({f"w{i}": x}, tmp_path / f"model-{i:05}-of-00002.safetensors")
    wrong = {"w1": "model-00002-of-00002.safetensors", "w2": "model-00001-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": wrong}))
    with pytest.raises(ImporterError, match="says that w1 is in model-00002.*, but it is not there"):
        open_source(str(tmp_path))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w1": 1}}))
    with pytest.raises(ImporterError, match="no weight_map from names to files"):
        open_source(str(tmp_path))


def test_safetensors_are_read_though_pickles_in_pieces_lie_beside_them(tmp_path):
    save_file({"w": np.ones(2, np.float32)}, tmp_path / "model.safetensors")
    index = {"weight_map": {"w": "pytorch_model-00001-of-00002.bin"}}  # which a download leaves out
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    found = open_source(str(tmp_path))
    assert list(found.files) == ["model.safetensors"] and found.index is None


@pytest.mark.parametrize("kind", [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, np.uint16])
def test_every_number_type_that_is_opened_is_read(tmp_path, kind):
    x, y = np.arange(6).reshape(2, 3).astype(kind), np.array(3).astype(kind)
    write_safetensors(tmp_path / "x.safetensors", {"first": np.ones(3), "x": x, "y": y})
    found = open_source(str(tmp_path / "x.safetensors")).tensors
    for name, expected in (("x", x), ("y", y)):
        back = found[name].read()
        assert back.dtype == expected.dtype and back.shape == expected.shape and back.tobytes() == expected.tobytes()


# torch files


@pytest.mark.parametrize("name", ["plain.pt", "legacy.pt"])
def test_a_damaged_torch_file_is_refused_or_read_and_nothing_else(tmp_path, name):
    raw = (TORCH / name).read_bytes()
    rng = random.Random(0)
    for _ in range(150):
        data = bytearray(raw)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (tmp_path / "x.pt").write_bytes(data)
        with contextlib.suppress(ImporterError):
            for ref in read_index(tmp_path / "x.pt").values():
                ref.read()


def test_an_old_file_that_lacks_one_byte_is_refused(tmp_path):
    (tmp_path / "x.pt").write_bytes((TORCH / "legacy.pt").read_bytes()[:-1])
    with pytest.raises(ImporterError, match="truncated"):
        read_index(tmp_path / "x.pt")


def hand_made(path, kind=b"ctorch\nFloatStorage\n", start=b"K\x00", shape=b"K\x04", stride=b"K\x01", then=b"",
              data=b"\0" * 16, compress=zipfile.ZIP_STORED, **extra):  # fmt: skip
    """A torch file of one tensor of four numbers, with any part of it replaced."""
    pickled = (
        b"\x80\x02}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storage" + kind
        + b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ" + start + shape + b"\x85" + stride
        + b"\x85\x89}tR" + then + b"s."
    )  # fmt: skip
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/data/0", data, compress)
        for name, content in extra.items():
            archive.writestr(f"archive/{name}", content)
    return path


MINUS_ONE = b"J\xff\xff\xff\xff"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": b"K\x01"}, "reaches beyond its storage"),
        ({"start": MINUS_ONE}, "reaches beyond its storage"),
        ({"shape": b"K\x05"}, "reaches beyond its storage"),
        ({"stride": b"K\x02"}, "reaches beyond its storage"),
        ({"start": b"K\x03", "stride": MINUS_ONE}, "reaches beyond its storage"),
        ({"data": b"\0" * 15}, "the storage 0 has 15 bytes"),
        ({"compress": zipfile.ZIP_DEFLATED}, "compressed archive"),
        ({"byteorder": b"big"}, "big-endian"),
        ({"kind": b"ccollections\nOrderedDict\n"}, "not a storage"),
        ({"kind": b"ccollections\nUserDict\n"}, "names collections.UserDict, and only plain tensors"),
        ({"kind": b"cos\nsystem\n"}, "names os.system, and only plain tensors"),
        ({"kind": b"ctorch._utils\n_rebuild_qtensor\n"}, "names torch._utils._rebuild_qtensor"),
    ],
)
def test_hand_made_torch_files_that_are_refused(tmp_path, changes, message):
    assert read_index(hand_made(tmp_path / "good.pt"))["w"].read().tolist() == [0] * 4
    with pytest.raises(ImporterError, match=message):
        read_index(hand_made(tmp_path / "bad.pt", **changes))


def test_the_last_entries_of_a_storage_may_be_read(tmp_path):
    data = np.arange(4, dtype=np.float32).tobytes()
    ref = read_index(hand_made(tmp_path / "x.pt", start=b"K\x02", shape=b"K\x02", data=data))["w"]
    assert ref.read().tolist() == [2, 3]


def test_a_pickle_cannot_point_a_tensor_at_another_file(tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(b"0123456789abcdef")
    name = str(secret).encode()
    change = b"}(X\x04\x00\x00\x00fileX" + len(name).to_bytes(4, "little") + name + b"X\x06\x00\x00\x00offsetK\x00ub"
    with pytest.raises(ImporterError, match="changes a tensor after making it"):
        read_index(hand_made(tmp_path / "x.pt", then=change))["w"].read()


def test_an_old_file_of_a_big_endian_machine_is_refused(tmp_path):
    import pickle

    raw = (TORCH / "legacy.pt").read_bytes()
    own, other = (pickle.dumps({"little_endian": x}, 2)[3:-1] for x in (True, False))
    at = raw.index(b"little_endian") + len(b"little_endian")
    flag = raw.index(b"\x88", at)
    assert flag - at < 6 and own != other
    (tmp_path / "x.pt").write_bytes(raw[:flag] + b"\x89" + raw[flag + 1 :])
    with pytest.raises(ImporterError, match="big-endian"):
        read_index(tmp_path / "x.pt")


# modules


def test_entries_of_a_timm_config_that_change_the_network_are_refused():
    case = golden_cases.load("resnet_timm_d")
    layout = recognition.layouts()["torchvision-resnet"]
    assert layout.configure({**case.config, "model_args": {"num_classes": 4}}, engine.abstract_shapes(case.tensors))
    for entry in ({"model_args": {"output_stride": 8}}, {"global_pool": "max"}, {"model_args": {"global_pool": "max"}}):
        with pytest.raises(ImporterError, match="config .* is not supported"):
            import_tensors(case.tensors, {**case.config, **entry})


def test_the_prefix_is_recorded_with_the_model(tmp_path, stack):
    save_file(stack, tmp_path / "w.safetensors")
    prefixed = {f"net.{n}": x for n, x in stack.items()}
    save_file(prefixed, tmp_path / "p.safetensors")
    for file in ("w", "p"):
        import_model(str(tmp_path / f"{file}.safetensors"), tmp_path / file)
        assert json.loads((tmp_path / file / "source.json").read_text())["prefix"] == ("net." if file == "p" else "")
        jax.tree.map(
            np.testing.assert_array_equal,
            dict(load_model(tmp_path / file, trust="test_importer_more").variables),
            import_tensors(stack).variables,
        )


def test_a_tensor_that_names_its_own_type_is_read_from_bytes(tmp_path):
    def untyped(path, kind=b"ctorch\nfloat8_e4m3fn\n", size=b"K\x04"):
        pickled = (
            b"\x80\x02}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v3\n((X\x07\x00\x00\x00storage"
            b"ctorch.storage\nUntypedStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x06tQK\x02" + size
            + b"\x85K\x01\x85\x89}" + kind + b"tRs."
        )  # fmt: skip
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickled)
            archive.writestr("archive/data/0", np.arange(6).astype(ml_dtypes.float8_e4m3fn).tobytes())
        return read_index(path)["w"].read()

    found = untyped(tmp_path / "x.pt")
    assert found.dtype == ml_dtypes.float8_e4m3fn and found.astype(int).tolist() == [2, 3, 4, 5]
    assert untyped(tmp_path / "x.pt", b"ctorch\nuint16\n", b"K\x01").dtype == np.uint16
    with pytest.raises(ImporterError, match="reaches beyond its storage"):
        untyped(tmp_path / "x.pt", b"ctorch\nuint16\n", b"K\x02")
    with pytest.raises(ImporterError, match="a tensor of the type"):
        untyped(tmp_path / "x.pt", b"ctorch\nFloatStorage\n")
