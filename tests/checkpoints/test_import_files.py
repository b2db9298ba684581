"""``zoo import`` and ``zoo export`` on files: whole, sharded, of torch, and every way in which they can be wrong."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import golden_cases
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from command import ROOT, contents, refused, zoo
from safetensors.numpy import load_file, save_file

from checkpoints import load_model
from checkpoints.importers.exporting import export_model
from checkpoints.importers.importing import import_model
from checkpoints.importers.layout import ImporterError
from checkpoints.importers.sources import open_source
from checkpoints.importers.torch_file import read_index
from checkpoints.importers.writing import new_header, write_safetensors

GPT2 = golden_cases.FOLDER / "gpt2_hub"
TORCH = ROOT / "tests" / "golden" / "torch"


@pytest.fixture
def source(tmp_path):
    """A folder of a hub model that may be damaged."""
    shutil.copytree(GPT2, tmp_path / "gpt2", ignore=shutil.ignore_patterns("io.npz", "case.json"))
    return tmp_path / "gpt2"


def sharded(folder: Path, pieces: int = 3) -> Path:
    """Spreads a folder's weights over several files with an index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = list(weights)
    where = {}
    for i in range(pieces):
        file = f"model-{i + 1:05}-of-{pieces:05}.safetensors"
        part = names[i::pieces]
        save_file({n: weights[n] for n in part}, folder / file, {"format": "pt"})
        where |= dict.fromkeys(part, file)
    size = sum(x.nbytes for x in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return folder


# what a user does


def test_import_load_apply_export(source, tmp_path, capsys):
    case = golden_cases.load("gpt2_hub")
    (source / "vocab.json").write_text("{}")
    (source / "merges.txt").write_text("#version: 0.2\n")
    assert zoo("import", source, "--to", tmp_path / "model") == 0
    said = capsys.readouterr().out
    assert "hub-gpt2" in said and "40 matched (6 of them re-shaped)" in said and "6 buffers kept" in said
    model = load_model(tmp_path / "model")
    jax.tree.map(np.testing.assert_array_equal, dict(model.variables), dict(case.variables))
    assert model.definition == case.module
    assert model.info["imported"]["layout"] == "hub-gpt2"
    assert model.info["imported"]["parameters"] == sum(x.size for x in jax.tree.leaves(model.variables["params"]))
    assert zoo("export", tmp_path / "model", "--to", tmp_path / "back") == 0
    assert contents(tmp_path / "back") == contents(source)
    assert zoo("export", tmp_path / "model", "--to", tmp_path / "one.safetensors") == 0
    assert (tmp_path / "one.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_many_files_and_their_index_come_back_byte_for_byte(source, tmp_path):
    sharded(source)
    import_model(str(source), tmp_path / "model")
    export_model(tmp_path / "model", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(source)
    export_model(tmp_path / "model", tmp_path / "one.safetensors")
    one = load_file(tmp_path / "one.safetensors")
    whole = load_file(GPT2 / "model.safetensors")
    assert one.keys() == whole.keys() and all(one[n].tobytes() == whole[n].tobytes() for n in whole)


def test_a_header_of_another_writer_comes_back_too(source, tmp_path):
    file = source / "model.safetensors"
    weights = load_file(file)
    # names in another order than the library's, spaces in the JSON, metadata of its own
    at, content = 0, {"__metadata__": {"z": "1", "a": "2"}}
    for name in reversed(list(weights)):
        kind = {"float32": "F32", "bool": "BOOL"}[str(weights[name].dtype)]
        content[name] = {
            "shape": list(weights[name].shape), "dtype": kind, "data_offsets": [at, at + weights[name].nbytes]
        }  # fmt: skip
        at += weights[name].nbytes
    text = json.dumps(content).encode()
    file.write_bytes(
        len(text).to_bytes(8, "little") + text + b"".join(weights[n].tobytes() for n in reversed(list(weights)))
    )
    import_model(str(source), tmp_path / "model")
    export_model(tmp_path / "model", tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == file.read_bytes()


def test_dry_run_list_report_and_json(source, tmp_path, capsys):
    assert zoo("import", source, "--dry-run", "--report") == 0
    said = capsys.readouterr().out
    assert "h.1.mlp.c_fc.weight -> params/" in said and "a dry run" in said
    assert "(re-shaped)" in said and "buffers: h.0.attn.bias" in said
    assert zoo("import", source, "--to", tmp_path / "model", "--json", "--dtype", "bfloat16") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["layout"] == "hub-gpt2" and list(found["dtypes"]) == ["bfloat16"]
    assert found["report"]["missing"] == [] and found["directory"] == str(tmp_path / "model")
    assert {str(x.dtype) for x in jax.tree.leaves(load_model(tmp_path / "model").variables)} == {"bfloat16"}
    assert zoo("import", "--list", "--json") == 0
    assert {"hub-gpt2", "torchvision-resnet"} <= {x["name"] for x in json.loads(capsys.readouterr().out)}
    assert zoo("import", "--help") == 0 and zoo("export", "--help") == 0


def test_weights_converted_on_the_way_out(source, tmp_path):
    import_model(str(source), tmp_path / "model")
    export_model(tmp_path / "model", tmp_path / "half.safetensors", dtype="float16")
    half, whole = load_file(tmp_path / "half.safetensors"), load_file(source / "model.safetensors")
    for name, x in whole.items():
        np.testing.assert_array_equal(half[name], x.astype(np.float16) if x.dtype == np.float32 else x)


def test_a_trained_model_is_cut_into_files_of_a_size(source, tmp_path):
    from checkpoints import save_model

    model = golden_cases.load("gpt2_hub")
    save_model(tmp_path / "own", model.module, model.variables, {"name": "x"}, {})
    found = export_model(tmp_path / "own", tmp_path / "back", shard_bytes=30_000)
    assert len(found["files"]) > 1 and all(size < 34_000 for size in found["files"].values())
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "back" / file)
    again = import_model(str(tmp_path / "back"), tmp_path / "again")
    assert again.layout.name == "hub-gpt2"
    jax.tree.map(np.testing.assert_array_equal, dict(load_model(tmp_path / "again").variables), dict(model.variables))


def test_the_writer_writes_what_the_library_writes(tmp_path):
    rng = np.random.default_rng(0)
    weights = {
        "b": rng.normal(size=(3, 2)).astype(np.float32), "a": np.arange(3), "é": np.ones(2, np.float16),
        "c": np.ones((2, 2), ml_dtypes.bfloat16), "d": np.zeros((0, 3), np.float32), "e": np.array([True]),
        "f": np.full((), 2.0), "g": np.arange(5, dtype=np.uint8), "h": np.arange(2, dtype=np.int32),
    }  # fmt: skip
    save_file(weights, tmp_path / "theirs.safetensors", {"format": "pt"})
    write_safetensors(tmp_path / "ours.safetensors", weights, metadata={"format": "pt"})
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    lazy = {n: (lambda n=n: weights[n].T) for n in ("b",)}
    write_safetensors(tmp_path / "lazy.safetensors", lazy, {"b": ((2, 3), np.float32)})
    np.testing.assert_array_equal(load_file(tmp_path / "lazy.safetensors")["b"], weights["b"].T)
    with pytest.raises(ValueError, match="b has 24 bytes"):
        write_safetensors(tmp_path / "x.safetensors", {"b": weights["b"]}, {"b": ((9,), np.float32)})
    assert not (tmp_path / "x.safetensors").exists() and not list(tmp_path.glob(".x*"))
    assert new_header({"a": ((2,), np.float32)}).startswith('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}')


# torch files


def test_torch_files_are_read_without_torch():
    with np.load(TORCH / "plain.npz") as expected:
        files = (("plain.pt", None), ("nested.pt", None), ("nested.pt", "state_dict"), ("legacy.pt", None))
        for name, key in files:
            refs = read_index(TORCH / name, key)
            assert list(refs) == expected.files
            for weight, ref in refs.items():
                got = ref.read()
                assert got.shape == expected[weight].shape
                np.testing.assert_array_equal(got.astype(expected[weight].dtype), expected[weight])
        assert refs["bfloat16"].read().dtype == ml_dtypes.bfloat16
        assert refs["embed.weight"].storage == refs["head.weight"].storage != refs["row"].storage


def test_the_weights_of_a_torchscript_archive_are_read_and_its_code_is_not():
    refs = read_index(TORCH / "script.pt")
    with np.load(TORCH / "script.npz") as expected:
        assert set(refs) == set(expected.files)
        for name, ref in refs.items():
            np.testing.assert_array_equal(ref.read(), expected[name])


def test_torch_is_never_imported():
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from checkpoints.importers.torch_file import read_index\n"
        "read_index(Path(sys.argv[1]))['row'].read()\n"
        "assert 'torch' not in sys.modules"
    )
    run = [sys.executable, "-c", program, str(TORCH / "plain.pt")]
    subprocess.run(run, check=True, cwd=ROOT, timeout=120)


@pytest.mark.parametrize(
    ("name", "key", "message"),
    [
        ("class.pt", None, "names __main__.Thing, and only plain tensors are read"),
        ("namespace.pt", None, "names argparse.Namespace"),
        ("complex.pt", None, "ComplexFloatStorage, which is not supported"),
        ("list.pt", None, "holds a list, not a dict of tensors"),
        ("two.pt", None, r"several dicts of weights or none \(student, teacher\); choose one with --key"),
        ("nested.pt", "ema", "--key ema: .* has no 'ema'; it has epoch, state_dict, args"),
    ],
)
def test_torch_files_that_are_refused(name, key, message):
    with pytest.raises(ImporterError, match=message):
        read_index(TORCH / name, key)


def test_one_of_several_dicts_of_weights_is_chosen():
    np.testing.assert_array_equal(read_index(TORCH / "two.pt", "teacher")["w"].read(), [0, 0])
    np.testing.assert_array_equal(read_index(TORCH / "two.pt", "student")["w"].read(), [1, 1])


def test_a_pickle_that_would_run_code_does_not(tmp_path):
    import pickle
    import zipfile

    class Evil:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    with zipfile.ZipFile(tmp_path / "evil.pt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"w": Evil()}, protocol=2))
    with pytest.raises(ImporterError, match="builtin.*exec, and only plain tensors"):
        read_index(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.01, 0.3, 0.7, 0.99])
@pytest.mark.parametrize("name", ["plain.pt", "legacy.pt"])
def test_truncated_torch_files_are_refused(tmp_path, keep, name):
    data = (TORCH / name).read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[: int(keep * len(data))])
    with pytest.raises(ImporterError, match="truncated|not a file of torch.save|damaged"):
        read_index(tmp_path / "cut.pt")


def test_a_tensor_beyond_its_storage_is_refused(tmp_path):
    import zipfile

    with zipfile.ZipFile(TORCH / "plain.pt") as old, zipfile.ZipFile(tmp_path / "bad.pt", "w") as new:
        for item in old.infolist():
            data = old.read(item.filename)
            if item.filename.endswith("data.pkl"):
                assert data.count(b"K\x05K\x04\x86") == 1  # the shape (5, 4) of the first tensor
                data = data.replace(b"K\x05K\x04\x86", b"K\x06K\x04\x86")
            new.writestr(item.filename, data)
    with pytest.raises(ImporterError, match="a tensor reaches beyond its storage"):
        read_index(tmp_path / "bad.pt")


# bad input


def cut(source):
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def wrong_dtype(source):
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"F32"', b'"F19"'))


def strange_dtype(source):
    file = source / "model.safetensors"
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    first = next(n for n, e in header.items() if n != "__metadata__" and e["dtype"] == "F32")
    header[first] |= {
        "dtype": "C64",
        "shape": [1, header[first]["data_offsets"][1] // 8 - header[first]["data_offsets"][0] // 8],
    }
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])


def lost_shard(source):
    (sharded(source) / "model-00002-of-00003.safetensors").unlink()


def lost_from_index(source):
    folder = sharded(source)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["h.9.attn.bias"] = "model-00001-of-00003.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def no_index(source):
    (sharded(source) / "model.safetensors.index.json").unlink()
    (source / "model-00001-of-00003.safetensors").unlink()


def other_config(source):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))


def config_of_another_size(source):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "n_embd": 2 * config["n_embd"]}))


def unknown_config(source):
    (source / "config.json").write_text(json.dumps({"model_type": "fancy-gpt"}))
    weights = load_file(source / "model.safetensors")
    save_file({f"fancy.{n}.x": x for n, x in weights.items()}, source / "model.safetensors")


def broken_config(source):
    (source / "config.json").write_text("{")


def list_config(source):
    (source / "config.json").write_text("[1]")


def no_weights(source):
    (source / "model.safetensors").unlink()


def missing_weight(source):
    weights = load_file(source / "model.safetensors")
    del weights["h.1.mlp.c_fc.weight"]
    save_file(weights, source / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (cut, ("model.safetensors", "truncated")),
        (wrong_dtype, ("model.safetensors", "F19")),
        (strange_dtype, ("model.safetensors", "C64", "supported")),
        (lost_shard, ("model-00002-of-00003.safetensors", "not in the folder")),
        (lost_from_index, ("h.9.attn.bias", "not there")),
        (no_index, ("2 of 3 weight files",)),
        (other_config, ("model_type 'bert'", "hub-gpt2")),
        (config_of_another_size, ("do not fit hub-gpt2", "after rearranging")),
        (unknown_config, ("no known layout", "fancy-gpt", "--list")),
        (broken_config, ("config.json", "not JSON")),
        (list_config, ("config.json", "expected a JSON object")),
        (no_weights, ("no weight file",)),
        (missing_weight, ("missing", "--allow-missing")),
    ],
)
def test_damaged_sources_are_one_line_and_leave_nothing(source, tmp_path, capsys, damage, says):
    damage(source)
    refused(capsys, "import", source, "--to", tmp_path / "model", says=says)
    assert not (tmp_path / "model").exists() and not list(tmp_path.glob(".*"))


def test_wrong_commands_are_one_line(source, tmp_path, capsys, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    (tmp_path / "file").write_text("")
    to = ("--to", tmp_path / "model")
    refused(capsys, "import", source, "--to", tmp_path / "full", says=("not empty",))
    refused(capsys, "import", source, "--to", tmp_path / "file", says=("a file is there",))
    refused(capsys, "import", source, says=("--to DIR",))
    refused(capsys, "import", says=("usage: zoo import SRC --to DIR",))
    refused(capsys, "import", tmp_path / "nothing.pt", *to, says=("no such file",))
    refused(capsys, "import", tmp_path / "file", *to, says=("unknown kind of file",))
    refused(capsys, "import", source, *to, "--as", "gpt", says=("--as 'gpt' is unknown", "hub-gpt2"))
    refused(capsys, "import", source, *to, "--as", "torchvision-resnet")
    refused(capsys, "import", source, *to, "--dtype", "int8", says=("--dtype", "bfloat16"))
    refused(capsys, "import", source, *to, "--fsdp", "0", says=("--fsdp",))
    refused(capsys, "import", source, *to, "--fsdp", "3", says=("does not divide 8 devices",))
    refused(capsys, "import", source, *to, "--key", "ema", says=("--key ema",))
    refused(capsys, "import", source, *to, "--confg", "x", says=("--config",))
    refused(capsys, "import", source, *to, "--config", tmp_path / "none.json", says=("none.json",))
    refused(capsys, "export", source, "--to", tmp_path / "out", says=("no model in",))
    assert not (tmp_path / "model").exists()
    assert zoo("import", source, *to) == 0
    capsys.readouterr()
    refused(capsys, "export", tmp_path / "model", says=("--to F",))
    refused(capsys, "export", tmp_path / "model", "--to", tmp_path / "full", says=("not empty",))
    refused(capsys, "export", tmp_path / "model", "--to", tmp_path / "file", says=("a file is there",))
    refused(capsys, "export", tmp_path / "model", "--to", tmp_path / "o", "--as", "hub-bert", says=("hub-bert",))
    refused(capsys, "export", tmp_path / "model", "--to", tmp_path / "o", "--shard-gb", "x", says=("--shard-gb",))
    assert not (tmp_path / "o").exists()


def test_a_hub_id_without_a_connection_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused(capsys, "import", "owner/name", "--to", tmp_path / "model", says=("owner/name",))


def test_nan_weights_are_imported_counted_and_warned_of(source, tmp_path, capsys):
    weights = load_file(source / "model.safetensors")
    weights["h.0.mlp.c_fc.weight"][0, :3] = np.nan
    save_file(weights, source / "model.safetensors")
    assert zoo("import", source, "--to", tmp_path / "model") == 0
    out, err = capsys.readouterr()
    assert "warning: h.0.mlp.c_fc.weight holds 3 NaN" in err and "3 NaN or infinite entries" in out
    assert load_model(tmp_path / "model").info["imported"]["nonfinite"] == {"h.0.mlp.c_fc.weight": 3}


# many devices


def test_each_device_gets_its_part_and_the_logits_are_the_same(source, tmp_path):
    from jax.sharding import AxisType

    mesh = jax.make_mesh((1, 4, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    folder = golden_cases.FOLDER / "llama_grouped"
    import_model(str(folder), tmp_path / "model")
    import_model(str(folder), tmp_path / "spread", mesh=mesh)
    case = golden_cases.load("llama_grouped")
    ids = jnp.asarray(case.inputs["ids"] if "ids" in case.inputs else next(iter(case.inputs.values())))
    one = load_model(tmp_path / "model")
    expected = one.apply(ids)
    for place in ("model", "spread"):
        many = load_model(tmp_path / place, sharding=mesh)
        kernels = [x for x in jax.tree.leaves(many.variables) if x.ndim >= 2]
        shares = [x.addressable_shards[0].data.size / x.size for x in kernels]
        assert min(shares) == 1 / 8 and sum(s < 1 for s in shares) > len(shares) / 2, shares
        found = jax.jit(many.definition.apply)(many.variables, ids)
        jax.tree.map(golden_cases.close, jax.device_get(found), jax.device_get(expected))
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(many.variables), jax.device_get(one.variables))


PROCESS = """
import sys
from checkpoints.importers import engine
filled = []
fill = engine.fill
def count(*arguments):
    leaves, bad = fill(*arguments)
    filled.extend(array.size for parts in leaves.values() for _, array in parts)
    return leaves, bad
engine.fill = count
from trainers.cli import _run
status = _run(sys.argv[1:])
print("filled", sum(filled))
sys.exit(status)
"""


def test_two_processes_write_their_own_shards(tmp_path):
    folder = golden_cases.FOLDER / "llama_grouped"
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {
        **os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "PYTHONPATH": str(ROOT),
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2",
    }  # fmt: skip
    argv = ["import", str(folder), "--to", str(tmp_path / "model"), "--distributed", "--fsdp", "4", "--tensor", "2"]
    children = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, *argv], env={**env, "JAX_PROCESS_ID": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    said = [c.communicate(timeout=240)[0] for c in children]
    assert all(c.returncode == 0 for c in children), said[0][-2000:] + said[1][-2000:]
    found, expected = load_model(tmp_path / "model"), golden_cases.load("llama_grouped")
    jax.tree.map(np.testing.assert_array_equal, dict(found.variables), dict(expected.variables))
    whole = sum(x.size for x in jax.tree.leaves(expected.variables))
    filled = [int(text.split("filled ")[1].split()[0]) for text in said]
    assert all(0.4 * whole < n < 0.7 * whole for n in filled), (filled, whole)
    assert said[0].count("holds the model") == 1 and "holds the model" not in said[1]


def test_a_mesh_needs_a_definition_that_names_its_axes(tmp_path):
    from jax.sharding import AxisType

    from checkpoints import ModelError, save_model
    from zoo.nn.mlp import MLP

    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    module = MLP((4,), 2)
    save_model(tmp_path / "m", module, module.init(jax.random.key(0), jnp.zeros((1, 3))), {}, {})
    with pytest.raises(ModelError, match="does not name its axes"):
        load_model(tmp_path / "m", sharding=mesh)


def test_opening_reads_no_weights(source):
    found = open_source(str(source))
    assert all(callable(t.read) for t in found.tensors.values())
    assert {t.file for t in found.tensors.values()} == {"model.safetensors"}
