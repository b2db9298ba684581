"""The store: round trips, completeness from disk, fall-back, retention, and errors in one line."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from checkpoints.store import CheckpointError, DamagedError, Store, StoreError


def small_tree(scale=1.0):
    return {
        "params/dense/kernel": jnp.arange(12.0).reshape(3, 4) * scale,
        "params/dense/bias": jnp.ones(4, jnp.bfloat16) * scale,
        "rng": jax.random.key(7),
        "keys": jax.random.split(jax.random.key(3), 5),
        "empty": jnp.zeros((0, 3)),
        "no keys": jax.random.split(jax.random.key(3), 0),
        "count": jnp.asarray(3, jnp.int32),
        "flag": jnp.asarray(True),
        "host": np.arange(4, dtype=np.int32),
    }


def abstract_of(tree, sharding=None):
    return {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=sharding) for k, v in tree.items()}


def plain(x):
    return np.asarray(jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x)


def assert_same(a, b):
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype, path
        np.testing.assert_array_equal(plain(a[path]), plain(b[path]), err_msg=path)


def save_steps(root, steps, keep=3, **kwargs):
    with Store(root, keep=keep) as store:
        for step in steps:
            store.save(step, small_tree(step), {"phase": "train", "position": {"main": step}}, **kwargs)
    return Store(root, keep=keep)


def truncate(folder: Path):
    for path in folder.rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_round_trip_with_keys_bfloat16_and_empty_leaves(tmp_path):
    store = save_steps(tmp_path, [5])
    assert store.steps() == [5]
    tree = store.restore(5, abstract_of(small_tree()))
    assert_same(tree, {k: jnp.asarray(v) for k, v in small_tree(5).items()})
    manifest = store.manifest(5)
    assert manifest["meta"] == {"phase": "train", "position": {"main": 5}}
    assert manifest["leaves"]["params/dense/kernel"]["shape"] == [3, 4]
    assert manifest["leaves"]["params/dense/bias"]["dtype"] == "bfloat16"
    assert all("crc32" in leaf for leaf in manifest["leaves"].values())
    assert jax.random.uniform(tree["rng"]) == jax.random.uniform(jax.random.key(7))


def test_read_gives_some_leaves_on_the_host(tmp_path):
    store = save_steps(tmp_path, [1])
    out = store.read(1, ["params/dense/kernel"])
    assert list(out) == ["params/dense/kernel"] and isinstance(out["params/dense/kernel"], np.ndarray)
    np.testing.assert_array_equal(out["params/dense/kernel"], np.arange(12.0).reshape(3, 4))
    assert len(store.read(1)) == len(small_tree())
    with pytest.raises(CheckpointError, match="nowhere"):
        store.read(1, ["nowhere"])


def test_a_tree_of_nothing(tmp_path):
    with Store(tmp_path) as store:
        store.save(0, {}, {})
        store.save(1, {"e": jnp.zeros((0,))}, {})
    assert Store(tmp_path).restore(0, {}) == {}
    assert Store(tmp_path).restore(1, {"e": jax.ShapeDtypeStruct((0,), jnp.float32)})["e"].shape == (0,)


def test_the_copy_is_taken_before_save_returns(tmp_path):
    # a donated state must not change the checkpoint in flight
    step = jax.jit(lambda x: x * 0 - 1.0, donate_argnums=0)
    x = jnp.arange(1_000_000.0) + 1
    expected = np.array(x)
    with Store(tmp_path) as store:
        store.save(1, {"x": x}, {})
        for _ in range(3):
            x = step(x)
        x.block_until_ready()
    np.testing.assert_array_equal(Store(tmp_path).read(1)["x"], expected)


def test_saving_a_step_again_replaces_it(tmp_path):
    save_steps(tmp_path, [4])
    with Store(tmp_path) as store:
        store.save(4, small_tree(9.0), {"second": True})
        store.wait()
        assert store.steps() == [4]
        store.save(4, small_tree(11.0), {"third": True})
    store = Store(tmp_path)
    assert store.steps() == [4] and store.manifest(4)["meta"] == {"third": True}
    np.testing.assert_array_equal(store.read(4, ["params/dense/kernel"])["params/dense/kernel"][0, 1], 11.0)
    assert len(list(tmp_path.iterdir())) == 2


def test_steps_come_from_complete_folders_only(tmp_path):
    store = save_steps(tmp_path, [1, 2])
    (tmp_path / "7.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "7.json").write_text("{}")
    (tmp_path / "8").mkdir()
    (tmp_path / "8.json").write_text("{}")  # a folder that Orbax has not finished
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "2.json").unlink()
    assert store.steps() == [1]
    assert Store(tmp_path / "nowhere").steps() == []
    with pytest.raises(CheckpointError, match="step 2 .* there: 1$"):
        store.manifest(2)


def test_what_kills_left_behind_goes_with_the_next_save_but_nothing_else(tmp_path):
    (tmp_path / "7.orbax-checkpoint-tmp").mkdir(parents=True)
    (tmp_path / "7.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "figures").mkdir()
    Store(tmp_path)  # opening changes nothing
    assert (tmp_path / "7.orbax-checkpoint-tmp").exists()
    save_steps(tmp_path, [8])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["8", "8.json", "figures", "notes.txt"]


def test_keeps_the_newest_and_the_best(tmp_path):
    with Store(tmp_path, keep=2) as store:
        for step, metric in enumerate([0.1, 0.9, None, 0.3, 0.2, float("nan")]):
            store.save(step, small_tree(step), {}, metric=metric)
    assert store.steps() == [1, 4, 5]
    with Store(tmp_path / "lower", keep=1) as store:
        for step, metric in enumerate([0.5, 0.1, 0.9, 0.8]):
            store.save(step, small_tree(step), {}, metric=metric, higher_is_better=False)
    assert store.steps() == [1, 3]


def test_nothing_is_deleted_before_a_newer_step_is_complete(tmp_path, monkeypatch):
    store = save_steps(tmp_path, [1], keep=1)
    checkpointer, _ = store._orbax()
    monkeypatch.setattr(checkpointer, "wait_until_finished", lambda: (_ for _ in ()).throw(OSError("disk full")))
    monkeypatch.setattr(checkpointer, "save", lambda *a, **k: None)
    store.save(2, small_tree(), {})
    with pytest.raises(StoreError, match="disk full"):
        store.wait()
    assert 1 in store.steps()


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_from_8_devices_to_fewer_and_back(tmp_path, devices):
    def mesh(n):
        return NamedSharding(Mesh(np.array(jax.devices()[:n]), ("data",)), PartitionSpec("data"))

    x = np.arange(64.0, dtype=np.float32).reshape(16, 4)
    keys = jax.random.split(jax.random.key(1), 8)
    with Store(tmp_path) as store:
        store.save(1, {"x": jax.device_put(x, mesh(8)), "keys": jax.device_put(keys, mesh(8))}, {})
        store.wait()
        target = {
            "x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=mesh(devices)),
            "keys": jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=mesh(devices)),
        }
        few = store.restore(1, target)
        assert few["x"].sharding == mesh(devices) and len(few["keys"].sharding.device_set) == devices
        np.testing.assert_array_equal(few["x"], x)
        np.testing.assert_array_equal(plain(few["keys"]), plain(keys))
        store.save(2, few, {})
        store.wait()
        back = store.restore(
            2, {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=mesh(8)) for k, v in target.items()}
        )
    assert back["x"].sharding == mesh(8)
    np.testing.assert_array_equal(back["x"], x)


def test_what_does_not_fit_is_named_in_one_line(tmp_path):
    store = save_steps(tmp_path, [1])
    abstract = abstract_of(small_tree())
    wrong = {**abstract, "params/dense/kernel": jax.ShapeDtypeStruct((3, 5), jnp.float32)}
    with pytest.raises(
        CheckpointError, match=r"params/dense/kernel is float32\[3, 4\] there and float32\[3, 5\] here"
    ) as e:
        store.restore(1, wrong)
    assert "\n" not in str(e.value) and str(tmp_path) in str(e.value)
    with pytest.raises(CheckpointError, match=r"bias is bfloat16\[4\] there and float32\[4\] here"):
        store.restore(1, {**abstract, "params/dense/bias": jax.ShapeDtypeStruct((4,), jnp.float32)})
    with pytest.raises(CheckpointError, match="missing there: extra; unexpected there: flag"):
        store.restore(1, {**{k: v for k, v in abstract.items() if k != "flag"}, "extra": abstract["count"]})
    # a step that does not fit is an error, not a reason to fall back
    with pytest.raises(CheckpointError, match="kernel"):
        store.restore_latest(lambda manifest: wrong, warn=pytest.fail)


def test_a_truncated_newest_step_costs_one_interval(tmp_path):
    store = save_steps(tmp_path, [1, 2, 3])
    truncate(tmp_path / "3")
    warnings = []
    step, tree, manifest = store.restore_latest(lambda m: abstract_of(small_tree()), warnings.append)
    assert step == 2 and manifest["meta"]["position"] == {"main": 2}
    assert_same(tree, {k: jnp.asarray(v) for k, v in small_tree(2).items()})
    assert len(warnings) == 1 and str(tmp_path / "3") in warnings[0] and "\n" not in warnings[0]
    with pytest.raises(DamagedError):
        store.restore(3, abstract_of(small_tree()))
    # the run goes on, and the damaged step neither counts among those kept nor comes back
    store.keep = 1
    store.save(3, small_tree(3), {})
    store.close()
    assert store.steps() == [3]
    assert store.restore_latest(lambda m: abstract_of(small_tree()), pytest.fail)[0] == 3


def test_a_damaged_newer_step_does_not_push_out_sound_ones(tmp_path):
    store = save_steps(tmp_path, [10, 20, 30], keep=3)
    truncate(tmp_path / "30")
    store.keep = 1
    assert store.restore_latest(lambda m: abstract_of(small_tree()), lambda line: None)[0] == 20
    store.save(25, small_tree(25), {})
    store.close()
    assert store.steps() == [25]


@pytest.mark.parametrize("damage", ["manifest", "checksum", "folder", "no sizes", "file gone"])
def test_other_damage_is_noticed(tmp_path, damage):
    store = save_steps(tmp_path, [1, 2])
    manifest = tmp_path / "2.json"
    if damage == "manifest":
        manifest.write_text(manifest.read_text()[:-40])
    elif damage == "checksum":
        crc = str(store.manifest(2)["leaves"]["params/dense/kernel"]["crc32"])
        manifest.write_text(manifest.read_text().replace(crc, str(int(crc) ^ 1)))
    elif damage == "no sizes":  # killed between the folder's rename and the manifest's second writing
        manifest.write_text(json.dumps({k: v for k, v in store.manifest(2).items() if k != "files"}))
        truncate(tmp_path / "2")
    elif damage == "file gone":
        next((tmp_path / "2" / "d").iterdir()).unlink()
    else:
        (tmp_path / "2" / "_METADATA").unlink()
        (tmp_path / "2" / "manifest.ocdbt").unlink()
    warnings = []
    assert store.restore_latest(lambda m: abstract_of(small_tree()), warnings.append)[0] == 1
    assert len(warnings) == 1 and "2" in warnings[0]
    if damage == "checksum":
        assert "checksum of params/dense/kernel" in warnings[0]


def test_no_step_is_none_and_only_damaged_ones_are_an_error(tmp_path):
    assert Store(tmp_path).restore_latest(lambda m: {}, pytest.fail) is None
    store = save_steps(tmp_path, [1])
    (tmp_path / "1.json").write_text("")
    with pytest.raises(DamagedError, match="every checkpoint"):
        store.restore_latest(lambda m: {}, lambda line: None)


def test_a_background_error_is_raised_once_and_saving_goes_on(tmp_path, monkeypatch):
    store = Store(tmp_path)
    store.save(1, small_tree(), {})
    store.wait()
    checkpointer, _ = store._orbax()
    real = checkpointer.wait_until_finished

    def fail():
        real()
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpointer, "wait_until_finished", fail)
    # Orbax calls it itself before it begins: only the wait of our thread shall fail
    monkeypatch.setattr(checkpointer, "save", lambda *a, **k: None)
    store.save(2, small_tree(), {})
    store._saving.done.wait(10)
    with pytest.raises(StoreError, match="checkpoint 2 .*No space left") as e:
        store.check()
    assert str(tmp_path) in str(e.value)
    monkeypatch.undo()
    store.check()
    store.save(3, small_tree(), {})
    store.close()
    assert store.steps() == [1, 3]


def test_a_hung_save_is_named(tmp_path, monkeypatch):
    store = Store(tmp_path, deadline=0.2)
    store.save(1, small_tree(), {})
    try:
        store.wait()
    except StoreError:
        store.deadline = 60
        store.wait()
    store.deadline = 0.2
    checkpointer, _ = store._orbax()
    monkeypatch.setattr(checkpointer, "save", lambda *a, **k: None)
    monkeypatch.setattr(checkpointer, "wait_until_finished", lambda: time.sleep(5))
    store.save(2, small_tree(), {})
    time.sleep(0.3)
    with pytest.raises(StoreError, match="checkpoint 2 .* hangs"):
        store.check()
    with pytest.raises(StoreError, match="hangs"):
        store.close()


def test_a_place_that_cannot_be_written_is_one_clear_error(tmp_path):
    save_steps(tmp_path / "d", [1])
    blocked = tmp_path / "file"
    blocked.write_text("mine")
    with pytest.raises(StoreError, match="cannot save checkpoint 3") as e:
        Store(blocked / "checkpoints").save(3, small_tree(), {})
    assert isinstance(e.value, OSError) and "\n" not in str(e.value) and str(blocked) in str(e.value)
    assert blocked.read_text() == "mine"


READ_ONLY = """
import ctypes, os, sys
if os.geteuid() == 0 and len(sys.argv) == 2:  # the superuser writes everywhere: give that capability up first
    ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:], "again"])
if os.access(sys.argv[1], os.W_OK):
    sys.exit(77)
os.environ["JAX_PLATFORMS"] = "cpu"
import jax.numpy as jnp
from checkpoints.store import Store, StoreError
store = Store(sys.argv[1])
try:
    store.save(2, {"x": jnp.ones(3)}, {})
    store.close()
except StoreError as error:
    print(error)
assert store.steps() == [1] and store.read(1)["count"] == 3
"""


def test_a_read_only_folder(tmp_path):
    save_steps(tmp_path, [1])
    before = sorted(p.name for p in tmp_path.rglob("*"))
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    tmp_path.chmod(0o555)
    try:
        done = subprocess.run([sys.executable, "-c", READ_ONLY, tmp_path], env=env, capture_output=True, text=True)
    finally:
        tmp_path.chmod(0o755)
    if done.returncode == 77:
        pytest.skip("every folder is writable here")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"cannot save checkpoint 2 in {tmp_path}: "), done.stdout
    assert "Traceback" not in done.stderr
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_a_full_disk(tmp_path, monkeypatch):
    import errno

    store = save_steps(tmp_path, [1])

    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("checkpoints.store.write_text", full)
    with pytest.raises(StoreError, match="No space left on device"):
        store.save(2, small_tree(), {})
    assert store.steps() == [1]


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="keep must be at least 1"):
        Store(tmp_path, keep=0)
    with pytest.raises(ValueError, match="must not be negative"):
        Store(tmp_path).save(-1, {}, {})
    with pytest.raises(ValueError, match="meta of step 1 must be JSON"):
        Store(tmp_path).save(1, {}, {"f": test_bad_arguments})


PROGRAM = """
import os, sys
os.environ["JAX_PLATFORMS"] = "cpu"
import jax.numpy as jnp
from checkpoints.store import Store
store = Store(sys.argv[1], keep=2)
x = jnp.arange(50_000.0)
for step in range(1, 100_000):
    store.save(step, {"x": x * step, "y": x + step}, {"step": step})
    print(step, flush=True)
"""


def test_killed_at_any_moment_the_newest_complete_step_is_sound(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM))
    generator = np.random.default_rng(0)
    for _ in range(3):
        child = subprocess.Popen([sys.executable, program, tmp_path / "c"], env=env, stdout=subprocess.PIPE)
        for _ in range(3):
            child.stdout.readline()
        time.sleep(generator.uniform(0, 0.4))
        child.send_signal(signal.SIGKILL)
        child.communicate()
        store = Store(tmp_path / "c")
        abstract = {k: jax.ShapeDtypeStruct((50_000,), jnp.float32) for k in "xy"}
        step, tree, manifest = store.restore_latest(lambda m: abstract, pytest.fail)  # noqa: B023
        assert step == manifest["meta"]["step"] == store.steps()[-1]
        np.testing.assert_array_equal(tree["x"], np.arange(50_000, dtype=np.float32) * step)
        np.testing.assert_array_equal(tree["y"], np.arange(50_000, dtype=np.float32) + step)


TWO = """
import os, sys
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
import jax, numpy as np
rank, port, root = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from checkpoints.store import Store
sharding = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), P("data"))
x = np.arange(16.0, dtype=np.float32).reshape(8, 2)
def make(scale):
    return jax.make_array_from_callback((8, 2), sharding, lambda i: x[i] * scale)
abstract = {"x": jax.ShapeDtypeStruct((8, 2), np.float32, sharding=sharding)}
store = Store(root, keep=2)
for step in (1, 2, 3, 3):
    store.save(step, {"x": make(step)}, {"step": step})
store.wait()
assert store.steps() == [2, 3], store.steps()
if rank == 0:  # damage that one process alone may notice
    (store.root / "3.1.json").write_text("")
warnings = []
from jax.experimental import multihost_utils
multihost_utils.sync_global_devices("damaged")
step, tree, manifest = store.restore_latest(lambda m: abstract, warnings.append)
assert step == 2 and len(warnings) == 1, (step, warnings)
for shard in tree["x"].addressable_shards:
    np.testing.assert_array_equal(shard.data, x[shard.index] * 2)
store.save(4, tree, {})
store.close()
from checkpoints.model import load_model, save_model
from zoo.catalogue import Claim
if rank == 0:  # one process exports; the others need not be there
    save_model(root + "/model", Claim("s", "m", 0.1, "a", "b", "c"), {"params": {"w": np.ones(3)}}, {}, {})
    assert load_model(root + "/model").variables["params"]["w"].sum() == 3
multihost_utils.sync_global_devices("exported")
"""


def test_two_processes_write_one_checkpoint(tmp_path):
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    env["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-c", TWO]
    children = [
        subprocess.Popen([*command, str(r), str(port), str(tmp_path)], env=env, stdout=-1, stderr=subprocess.STDOUT)
        for r in range(2)
    ]
    out = [c.communicate(timeout=120)[0].decode() for c in children]
    assert [c.returncode for c in children] == [0, 0], "\n".join(out)
    store = Store(tmp_path)
    assert store.steps() == [2, 4]
    x = store.restore(4, {"x": jax.ShapeDtypeStruct((8, 2), jnp.float32)})["x"]
    np.testing.assert_array_equal(x, np.arange(16.0).reshape(8, 2) * 2)
    assert "crc32" not in store.manifest(4)["leaves"]["x"]
