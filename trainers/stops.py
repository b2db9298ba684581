"""What ends a run before its last step: a metric that is not finite, a signal, a metric that no longer improves."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trainers.errors import Diverged, UserError
from trainers.feed import host_batch
from trainers.phases import Alternate, Stop
from trainers.state import TrainState
from trainers.step import make_step
from trainers.trees import flatten


def metric_names(phase: Alternate, epochs: Mapping[str, int], state: TrainState, artefacts: Any) -> list[str]:
    """The step's metric names in the order they are computed, which is how ``state.fault`` counts them."""
    names: list[str] = []

    def traced(*args):
        out = make_step(phase, epochs)(*args)
        names.extend(out[1])
        return out

    def repeated(update):
        return jax.tree.map(lambda x: jnp.stack([jnp.asarray(x)] * update.repeats)[None], host_batch(update, 0))

    batches = {n: repeated(u) for n, u in phase.updates.items()}
    jax.eval_shape(traced, state, batches, artefacts, 1)
    return names


def diverged(
    phase: Alternate,
    epochs: Mapping[str, int],
    state: TrainState,
    artefacts: Any,
    begun: Mapping[str, int],
    fault: np.ndarray,
    folder: Path | None,
) -> Diverged:
    """The error of a run whose metrics are not finite; its batch is written to a file it can be replayed from.

    Args:
      phase, epochs, state, artefacts: what ``make_step`` takes.
      begun: each stream's position at the phase's first step.
      fault: the step and the number of the metric.
      folder: where the batch goes; ``None`` for nowhere.
    """
    step, metric = int(fault[0]), metric_names(phase, epochs, state, artefacts)[int(fault[1])]
    name = metric.split("/")[0] if len(phase.updates) > 1 else next(iter(phase.updates))
    update = phase.updates[name]
    flat = flatten(host_batch(update, begun[name] + step * update.repeats))
    ids = next((v for k, v in flat.items() if k.split("/")[-1] == "index"), np.zeros(0, int))
    where = f"; its batch held examples {', '.join(map(str, ids[:6]))}, ..."
    if folder is not None:
        file = folder / f"fault-{phase.name}-{step}.npz"
        np.savez(file, **{k.replace("/", "."): v for k, v in flat.items()})
        where += f" and is kept in {file}"
    return Diverged(f"{metric} is not finite at step {step} of phase {phase.name!r}{where}")


def watch(stop: Stop, monitor: Mapping[str, Any], seen: Mapping[str, float]) -> tuple[dict[str, Any], bool]:
    """The monitor after an evaluation, and whether the phase should stop.

    Raises:
      UserError: the watched metric was not measured; those that were are named.
    """
    if stop.metric not in seen:
        raise UserError(f"early stopping watches {stop.metric!r}; there are {', '.join(sorted(seen))}")
    value, best = seen[stop.metric], float(monitor["best"])
    better = value > best if stop.higher_is_better else value < best
    since = 0 if better else int(monitor["since"]) + 1
    new = {
        "value": jnp.float32(value),
        "evaluations": monitor["evaluations"] + 1,
        "best": jnp.float32(value if better else best),
        "since": jnp.int32(since),
    }
    return new, since >= stop.patience


@contextlib.contextmanager
def signals(loop: Any) -> Iterator[None]:
    """SIGTERM (pre-emption) and SIGINT set ``loop.asked``: it saves at the next step boundary and leaves.

    A second signal leaves at once.
    """

    def ask(number, frame):
        if loop.asked:
            raise KeyboardInterrupt
        loop.asked = number

    before = {}
    with contextlib.suppress(ValueError):  # not in the main thread: signals are somebody else's
        before = {n: signal.signal(n, ask) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
