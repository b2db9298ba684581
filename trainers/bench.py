"""Benchmarks: hot operations against what the machine could do, and the trainer against a hand-written loop."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trainers.recipe import Benchmark


def timed(fn: Callable, args: tuple, budget: float = 2.0, least: int = 5) -> float:
    """Median seconds of ``fn(*args)``, waiting for its result each time, over about ``budget`` seconds."""
    jax.block_until_ready(fn(*args))
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < least or (time.perf_counter() - began < budget and len(times) < 1000):
        start = time.perf_counter()
        jax.block_until_ready(fn(*args))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def roofline() -> tuple[float, float]:
    """This machine's measured float32 matmul rate (FLOP/s) and copy bandwidth (bytes/s)."""
    n = 2048
    a = jnp.ones((n, n), jnp.float32)
    flops = 2 * n**3 / timed(jax.jit(lambda x: x @ x), (a,), 1.0)
    b = jnp.ones((64 << 20,), jnp.float32)
    return flops, 2 * b.nbytes / timed(jax.jit(lambda x: x + 1.0), (b,), 1.0)


def method(name: str) -> list[dict[str, Any]]:
    """Times a method's hot operations."""
    from trainers.run import recipe_module

    peak_flops, peak_bytes = roofline()
    return [run_one(b, peak_flops, peak_bytes) for b in recipe_module(name).benchmarks()]


def run_one(b: Benchmark, peak_flops: float, peak_bytes: float) -> dict[str, Any]:
    """Times one operation against a roofline (FLOP/s, bytes/s)."""
    start = time.perf_counter()
    compiled = jax.jit(b.fn).lower(*b.args).compile()
    compile_seconds = time.perf_counter() - start
    seconds = timed(compiled, b.args)
    least = max(b.flops / peak_flops, b.bytes / peak_bytes)
    memory = compiled.memory_analysis()
    row = {
        "operation": b.name,
        "compile_seconds": round(compile_seconds, 3),
        "seconds": seconds,
        "flops": b.flops,
        "bytes": b.bytes,
        "gflops_per_second": b.flops / seconds / 1e9,
        "roofline_share": least / seconds,
        "temporary_bytes": getattr(memory, "temp_size_in_bytes", None),
        "note": b.note,
    }
    for label, fn in b.baselines.items():
        other = timed(fn, b.args, 2.0, 3)
        row[f"seconds_{label}"] = other
        row[f"speedup_over_{label}"] = other / seconds
    return row


def _overhead_case(width: int, batch: int, depth: int):
    import optax
    from flax import linen as nn

    from data.stream import training_stream
    from trainers.phases import Train
    from zoo.objectives import supervised

    class Tower(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(depth):
                x = nn.relu(nn.Dense(width)(x))
            return nn.Dense(10)(x)

    rng = np.random.default_rng(0)
    arrays = {
        "x": rng.normal(size=(4 * batch, 64)).astype(np.float32),
        "label": rng.integers(0, 10, 4 * batch).astype(np.int32),
    }
    stream = training_stream(arrays, batch)
    objective = supervised(Tower())
    return stream, objective, lambda steps: Train("bench", steps, objective, optax.adam(1e-3), stream)


def trainer() -> list[dict[str, Any]]:
    """The trainer's steps per second against a hand-written jit loop: same objective, data, logging interval."""
    cases = {"small model": (32, 64, 1, 3000), "larger model": (1024, 512, 4, 60)}
    rows = [_compare(label, *case) for label, case in cases.items()]
    rows += [{"operation": f"first step, {k} compilation cache", "seconds": s} for k, s in first_step().items()]
    return rows


def _compare(label: str, width: int, batch: int, depth: int, steps: int, repeats: int = 5) -> dict[str, Any]:
    import optax

    from trainers.loop import Loop, Settings
    from trainers.parallel import Parallel
    from trainers.recipe import Run
    from trainers.record import Record
    from zoo.base import Context, reduce_mean

    stream, objective, phase = _overhead_case(width, batch, depth)
    log_every = max(1, steps // 100)

    class Clock(Record):
        """Times the steady part of a run: between two dispatches, flushed by the log of the later one."""

        def compiled(self, seconds):
            self.began = time.perf_counter()

    def ours() -> float:
        clock = Clock()
        loop = Loop(Run([phase(steps)], export=None), Settings(Parallel(devices=1), 1, log_every, steps), record=clock)
        loop()
        return time.perf_counter() - clock.began

    tx = optax.adam(1e-3)

    def scalar(params, batch, key):
        context = Context(rng=key)
        outputs, _ = objective.forward({"params": params}, batch, context)
        loss = objective.loss(outputs, batch, context)
        return reduce_mean(loss.elements), loss.metrics

    def step(params, opt, count, batch):
        key = jax.random.fold_in(jax.random.key(0), count)
        (loss, metrics), grads = jax.value_and_grad(scalar, has_aux=True)(params, batch, key)
        updates, opt = tx.update(grads, opt, params)
        metrics = {"loss": loss, "gradient_norm": optax.tree.norm(grads), **metrics}
        return optax.apply_updates(params, updates), opt, count + 1, metrics

    jitted = jax.jit(step, donate_argnums=(0, 1, 2))

    def hand() -> float:
        params = objective.init(jax.random.key(0), stream.batch(0))["params"]
        opt, count = tx.init(params), jnp.int32(0)
        compiled = jitted.lower(params, opt, count, jax.device_put(stream.batch(0))).compile()
        began, previous, logged = time.perf_counter(), None, []
        for i, batch in zip(range(steps), stream.iterate(), strict=False):
            params, opt, count, metrics = compiled(params, opt, count, jax.device_put(batch))
            if (i + 1) % log_every == 0:
                if previous is not None:
                    logged.append(jax.device_get(previous))
                previous = metrics
        logged.append(jax.device_get(previous))
        jax.block_until_ready(params)
        return time.perf_counter() - began

    hand(), ours()
    pairs = [(hand(), ours()) for _ in range(repeats)]
    by_hand, with_trainer = min(p[0] for p in pairs), min(p[1] for p in pairs)
    return {
        "operation": f"training, {label}",
        "steps": steps,
        "milliseconds_per_step_by_hand": 1e3 * by_hand / steps,
        "milliseconds_per_step_with_trainer": 1e3 * with_trainer / steps,
        "overhead_milliseconds_per_step": 1e3 * (with_trainer - by_hand) / steps,
        "overhead_share": with_trainer / by_hand - 1,
    }


def first_step() -> dict[str, float]:
    """Seconds from starting Python to the end of the first training step, with an empty and a filled cache."""
    import os
    import subprocess
    import sys
    import tempfile
    from pathlib import Path

    program = (
        "import time; t = time.time()\n"
        "from trainers.options import prepare_jax; prepare_jax('cpu')\n"
        "from trainers import bench; from trainers.loop import Loop, Settings; from trainers.recipe import Run\n"
        "from trainers.parallel import Parallel\n"
        "Loop(Run([bench._overhead_case(256, 64, 2)[2](1)], export=None), Settings(Parallel(devices=1)))()\n"
        "print(time.time() - t)"
    )
    root = str(Path(__file__).resolve().parent.parent)
    with tempfile.TemporaryDirectory() as cache:
        env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": cache, "PYTHONPATH": root}
        found = {}
        for which in ("cold", "warm"):
            done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
            found[which] = float(done.stdout.split()[-1])
        return found


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as text."""
    lines = []
    for row in rows:
        lines.append(str(row["operation"]))
        for k, v in row.items():
            if k != "operation" and v not in (None, ""):
                lines.append(f"  {k:38} {v:.5g}" if isinstance(v, (int, float)) else f"  {k:38} {v}")
    return "\n".join(lines)
