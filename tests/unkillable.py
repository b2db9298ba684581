"""Kills a run again and again, restarts it each time, and compares what is left with the uninterrupted run, bit by bit.

    python tests/unkillable.py dbpm --kills 20 -- --steps 60      # any recipe, any of its options

Every kill is a SIGKILL at a random moment of a random kind: between steps, within a save, within an evaluation, at the
start of a phase.  The final state (parameters, optimiser, masks, memories), ``metrics.jsonl`` and the exported model
must be bitwise those of the run that nobody touched.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("step", "save", "evaluate", "phase")


def child(workdir: str, name: str, options: list[str], plan: dict | None) -> None:
    """Runs (or resumes) a recipe in this process, which kills itself as planned."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from trainers import loop as loop_module
    from trainers.cli import _train
    from trainers.evaluation import Evaluator
    from trainers.options import prepare_jax

    prepare_jax("cpu")
    if plan is not None:
        left = {"count": plan["nth"]}

        def strike() -> None:
            left["count"] -= 1
            if left["count"] == 0:
                threading.Timer(plan["delay"], lambda: os.kill(os.getpid(), signal.SIGKILL)).start()

        def wrapped(method):
            def call(*args, **kwargs):
                strike()
                return method(*args, **kwargs)

            return call

        place = {
            "step": (loop_module.Feed, "next"),
            "save": (loop_module.Loop, "_save"),
            "evaluate": (Evaluator, "__call__"),
            "phase": (loop_module.Loop, "_train"),
        }[plan["kind"]]
        setattr(*place, wrapped(getattr(*place)))
    if name.startswith("toy"):
        import toy

        toy.main(name, workdir, options)
    else:
        sys.exit(_train([name, "--workdir", workdir, "--no-progress", *options]))


def run(workdir: Path, name: str, options: list[str], plan: dict | None, devices: int = 1) -> int:
    """One life of the run in a process of its own; its exit status (negative: the signal that ended it)."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, __file__, "--child", json.dumps([str(workdir), name, options, plan])]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode not in (0, -signal.SIGKILL):
        raise AssertionError(f"the run failed by itself:\n{done.stdout[-1500:]}{done.stderr[-3000:]}")
    return done.returncode


def state_of(workdir: Path) -> dict:
    """Every array of the final checkpoint, by path."""
    from checkpoints.store import Store

    store = Store(workdir / "checkpoints")
    return store.read(store.steps()[-1])


def compare(one: Path, other: Path) -> list[str]:
    """What differs between two finished runs: paths of arrays, lines of the metrics."""
    import numpy as np

    left, right = state_of(one), state_of(other)
    wrong = sorted(set(left) ^ set(right))
    wrong += [p for p in left if p in right and np.asarray(left[p]).tobytes() != np.asarray(right[p]).tobytes()]
    if (one / "metrics.jsonl").read_text() != (other / "metrics.jsonl").read_text():
        wrong.append("metrics.jsonl")
    return wrong


def check(name: str, options: list[str], kills: int, folder: Path, seed: int = 0, devices: int = 1) -> dict:
    """Runs once untouched and once through ``kills`` kills; raises AssertionError if anything differs.

    Returns:
      How many kills of each kind struck, and the seconds it took.
    """
    began, rng = time.time(), random.Random(seed)
    calm, haunted = folder / "calm", folder / "haunted"
    assert run(calm, name, options, None, devices) == 0
    struck = dict.fromkeys(KINDS, 0)
    attempts = 0
    while sum(struck.values()) < kills and attempts < 3 * kills:
        attempts += 1
        kind = KINDS[attempts % len(KINDS)] if attempts <= len(KINDS) else rng.choice(KINDS)
        # a resumed run starts one training phase at least, but perhaps no second one
        nth = {"step": rng.randint(1, 12), "phase": 1}.get(kind, rng.randint(1, 2))
        plan = {"kind": kind, "nth": nth, "delay": rng.random() * 0.15}
        if run(haunted, name, options, plan, devices) == 0:
            break  # it finished before the blow fell
        struck[kind] += 1
    assert run(haunted, name, options, None, devices) == 0
    wrong = compare(calm, haunted)
    assert not wrong, f"{name}: after {struck} these differ: {', '.join(wrong[:8])}"
    return {"recipe": name, "kills": struck, "seconds": round(time.time() - began, 1)}


def main() -> None:
    """The command line."""
    if sys.argv[1:2] == ["--child"]:
        child(*json.loads(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("options", nargs="*")
    asked = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as folder:
        print(check(asked.name, asked.options, asked.kills, Path(folder), asked.seed, asked.devices))


if __name__ == "__main__":
    main()
