"""One truth under every parallelism: one device, jit on a mesh, pmap, several processes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import toy

from trainers.parallel import Parallel, Placement
from trainers.recipe import UserError
from trainers.trees import flatten, to_host

WAYS = {
    "jit on 8": Parallel(),
    "jit on 2 x 4 (data x fsdp)": Parallel(fsdp=4, fsdp_minimum=1),
    "jit on 4 x 2 (data x tensor)": Parallel(tensor=2),
    "pmap on 8": Parallel("pmap"),
}


def final(parallel, calls=1):
    loop = toy.loop(parallel=parallel, calls=calls, steps=20)
    result = loop()
    return flatten(to_host(result.state)), result


@pytest.fixture(scope="module")
def single():
    return final(Parallel(devices=1))


@pytest.mark.parametrize("way", WAYS)
def test_every_parallelism_gives_the_single_device_state(way, single):
    state, result = final(WAYS[way])
    assert state.keys() == single[0].keys()
    for path, value in single[0].items():
        np.testing.assert_allclose(state[path], value, rtol=1e-5, atol=1e-5, err_msg=path)
    # who was seen, in which order, and how often, is exact
    for path in ("collections/memory/index", "collections/memory/next", "loss/body/0/seen", "loss/body/seen", "step"):
        if path in state:
            np.testing.assert_array_equal(state[path], single[0][path], err_msg=path)
    assert result.metrics.keys() == single[1].metrics.keys()


def test_scanned_steps_equal_single_ones(single):
    state, result = final(Parallel(devices=1), calls=3)
    for path, value in single[0].items():
        np.testing.assert_allclose(state[path], value, rtol=1e-6, atol=1e-6, err_msg=path)
    assert result.metrics == pytest.approx(single[1].metrics, rel=1e-5)


def test_pmap_memory_is_bitwise_equal_on_every_device():
    loop = toy.loop(parallel=Parallel("pmap"), steps=20)
    seen = []
    local = loop.place.local
    loop.place.local = lambda state: seen.append(state) or local(state)
    loop()
    stacked = seen[-1]
    for path, leaf in flatten(stacked).items():
        shards = [np.asarray(s.data) for s in leaf.addressable_shards]
        assert len(shards) == 8
        for other in shards[1:]:
            np.testing.assert_array_equal(other, shards[0], err_msg=path)


def test_fsdp_shards_parameters_and_moments():
    place = Placement(Parallel(fsdp=4))
    sharded = place.leaf_sharding("params/body/kernel", (64, 128))
    assert sharded.spec == jax.sharding.PartitionSpec(None, "fsdp")
    assert place.leaf_sharding("optimizer/main/0/mu/body/kernel", (64, 128)).spec == sharded.spec
    assert place.leaf_sharding("params/body/bias", (128,)).spec == jax.sharding.PartitionSpec()  # too small
    assert place.leaf_sharding("collections/memory/values", (64, 128)).spec == jax.sharding.PartitionSpec()


def test_tensor_rules_come_first():
    spec = jax.sharding.PartitionSpec(None, "tensor")
    place = Placement(Parallel(tensor=2), ((r"body/kernel$", spec),))
    assert place.leaf_sharding("params/body/kernel", (64, 128)).spec == spec
    assert place.leaf_sharding("params/head/kernel", (64, 128)).spec == jax.sharding.PartitionSpec()


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        (Parallel(devices=9), "--devices 9 asked for, but there are 8"),
        (Parallel(fsdp=3), "does not divide 8"),
        (Parallel("pmap", fsdp=2), "--mode pmap replicates"),
        (Parallel(fsdp=0), "--fsdp 0"),
    ],
)
def test_impossible_placements_say_why(parallel, message):
    with pytest.raises(UserError, match=message):
        Placement(parallel)


def test_batches_that_do_not_divide_say_so():
    with pytest.raises(UserError, match="--batch-size 12 does not divide over 8 devices"):
        Placement(Parallel()).check_batch(12)


PROCESS = """
import os, sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize("127.0.0.1:" + sys.argv[1], 2, int(sys.argv[2]))
assert len(jax.devices()) == 8 and len(jax.local_devices()) == 4
import numpy as np, toy
from trainers.parallel import Parallel
from trainers.trees import flatten, to_host
loop = toy.loop(parallel=Parallel(fsdp=int(sys.argv[4]), fsdp_minimum=1), first=2, steps=20)
state = flatten(to_host(loop().state))
if jax.process_index() == 0:
    np.savez(sys.argv[3], **{k.replace("/", "|"): v for k, v in state.items()})
"""


def test_two_processes_equal_one(tmp_path):
    fsdp = 8  # every parameter is spread over both processes
    alone = flatten(to_host(toy.loop(first=2, steps=20)().state))
    root = Path(__file__).resolve().parents[2]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}",
    }
    out = tmp_path / "state.npz"
    children = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(port), str(rank), str(out), str(fsdp)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    said = [c.communicate(timeout=240)[0] for c in children]
    assert all(c.returncode == 0 for c in children), said[0][-2000:] + said[1][-2000:]
    found = np.load(out)
    for path, value in alone.items():
        np.testing.assert_allclose(found[path.replace("/", "|")], value, rtol=1e-5, atol=1e-5, err_msg=path)
