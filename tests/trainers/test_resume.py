"""Exact resumption: kills, other topologies, damaged checkpoints, folders of other runs."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import toy
import unkillable

from checkpoints.store import Store
from trainers.errors import Interrupted
from trainers.parallel import Parallel
from trainers.trees import flatten, to_host

SMALL = ['{"steps": 12}']


def test_a_run_killed_at_random_moments_ends_bitwise_equal(tmp_path):
    found = unkillable.check("toy", SMALL, 2, tmp_path)
    assert sum(found["kills"].values()) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("name", "devices"), [("toy", 1), ("toy-scan", 1), ("toy-jit", 8), ("toy-pmap", 8)])
def test_twenty_kills(tmp_path, name, devices):
    found = unkillable.check(name, ['{"steps": 300}'], 20, tmp_path, seed=1, devices=devices)
    assert sum(found["kills"].values()) == 20


def stopped(folder: Path, parallel: Parallel, at: int = 21) -> None:
    """Runs the toy into a folder until just after checkpoint ``at``, as a pre-emption would leave it."""
    loop = toy.loop(folder, parallel, steps=16)
    save = loop._save

    def save_and_stop(state, phase, step):
        save(state, phase, step)
        if loop.done >= at:
            raise Interrupted("pre-empted")

    loop._save = save_and_stop
    with pytest.raises(Interrupted):
        loop()
    loop.record.close()


@pytest.fixture(scope="module")
def whole():
    """The uninterrupted run on one device."""
    return flatten(to_host(toy.loop(steps=16)().state))


MOVES = {
    "8 by fsdp -> 1": (Parallel(fsdp=4, fsdp_minimum=1), Parallel(devices=1)),
    "8 by fsdp -> 2": (Parallel(fsdp=4, fsdp_minimum=1), Parallel(devices=2)),
    "8 by fsdp -> 4": (Parallel(fsdp=4, fsdp_minimum=1), Parallel(devices=4, fsdp=2, fsdp_minimum=1)),
    "1 -> 8 by fsdp": (Parallel(devices=1), Parallel(fsdp=4, fsdp_minimum=1)),
    "8 by pmap -> 1": (Parallel("pmap"), Parallel(devices=1)),
    "1 -> 8 by pmap": (Parallel(devices=1), Parallel("pmap")),
}


@pytest.fixture(scope="module")
def pre_empted(tmp_path_factory):
    """Folders of runs that were stopped half-way, by the topology they ran on."""
    made = {}

    def folder(parallel):
        if parallel not in made:
            made[parallel] = tmp_path_factory.mktemp("run")
            stopped(made[parallel], parallel)
        return made[parallel]

    return folder


@pytest.mark.parametrize("move", MOVES)
def test_checkpoints_move_between_topologies(tmp_path, whole, pre_empted, move):
    before, after = MOVES[move]
    shutil.copytree(pre_empted(before), tmp_path / "run")
    loop = toy.loop(tmp_path / "run", after, steps=16)
    state = flatten(to_host(loop().state))
    loop.record.close()
    for path, value in whole.items():
        np.testing.assert_allclose(state[path], value, rtol=1e-5, atol=1e-5, err_msg=path)


def test_every_example_is_consumed_once_per_epoch_across_a_stop(tmp_path):
    stopped(tmp_path, Parallel(devices=1), at=10)
    loop = toy.loop(tmp_path, Parallel(devices=1), steps=16)
    seen = np.zeros(toy.N, int)
    save = loop._save

    def look(state, phase, step):
        if phase == 1:
            seen[:] = np.asarray(state.loss["main"]["seen"])
        save(state, phase, step)

    loop._save = look
    loop()
    loop.record.close()
    # 52 examples in batches of 16: 4 steps an epoch, 16 steps are 4 epochs
    np.testing.assert_array_equal(seen, 4)


def test_a_truncated_newest_checkpoint_costs_one_interval(tmp_path, whole):
    stopped(tmp_path, Parallel(devices=1))
    steps = Store(tmp_path / "checkpoints").steps()
    newest = tmp_path / "checkpoints" / str(steps[-1])
    largest = max((f for f in newest.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    loop = toy.loop(tmp_path, Parallel(devices=1), steps=16)
    notes = []
    loop.record.note = notes.append
    state = flatten(to_host(loop().state))
    loop.record.close()
    assert any(str(steps[-1]) in n for n in notes), notes
    assert any(f"resuming from checkpoint {steps[-2]}" in n for n in notes), notes
    for path, value in whole.items():
        np.testing.assert_array_equal(state[path], value, err_msg=path)


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path):
    stopped(tmp_path, Parallel(devices=1))
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"phase": "both", "step": 9999, "loss": 0.0}\n{"phase": "bo')
    loop = toy.loop(tmp_path, Parallel(devices=1), steps=16)
    loop()
    loop.record.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert 9999 not in [line["step"] for line in lines]
    keys = [(line["phase"], line["step"], tuple(sorted(line))) for line in lines]
    assert len(set(keys)) == len(keys)


def test_a_signal_saves_and_the_run_goes_on(tmp_path, whole):
    loop = toy.loop(tmp_path, Parallel(devices=1), steps=16)
    advance = loop.record.advance

    def ask(step):
        advance(step)
        if step == 5:
            loop.asked = 15

    loop.record.advance = ask
    with pytest.raises(Interrupted, match="at step 5: its state is saved"):
        loop()
    loop.record.close()
    again = toy.loop(tmp_path, Parallel(devices=1), steps=16)
    state = flatten(to_host(again().state))
    again.record.close()
    for path, value in whole.items():
        np.testing.assert_array_equal(state[path], value, err_msg=path)


def test_typed_keys_are_never_carried(whole):
    assert not any(jax.dtypes.issubdtype(v.dtype, jax.dtypes.prng_key) for v in whole.values())
