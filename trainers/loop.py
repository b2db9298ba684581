"""The loop: runs a recipe's phases, logs, evaluates, saves, and resumes exactly where a run was cut."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trainers import artefacts as artefact_files
from trainers import resume, stops
from trainers.errors import Interrupted
from trainers.evaluation import Evaluator
from trainers.feed import Feed, bound, host_batch, streams_of
from trainers.parallel import Parallel, Placement, describe
from trainers.phases import Alternate, Evaluate, Fit
from trainers.recipe import Run
from trainers.record import Record
from trainers.state import TrainState, begin_phase, init_variables
from trainers.step import make_step, phase_key
from trainers.trees import flatten, to_host

AHEAD = 32
"""Dispatches the host may run ahead of the device."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a run is executed; none of these changes what is learned.

    Attributes:
      parallel: where arrays live.
      steps_per_call: small steps scanned in one dispatch; 0 for the recipe's choice.
      log_every, save_every: in steps; 0 for a hundredth and a tenth of the phase.
    """

    parallel: Parallel = Parallel()
    steps_per_call: int = 0
    log_every: int = 0
    save_every: int = 0


@dataclasses.dataclass
class Result:
    """What a run leaves, on the host: variables as trained and as chosen for export, artefacts, each metric's last."""

    variables: Mapping[str, Any]
    chosen: Mapping[str, Any]
    artefacts: Mapping[str, Any]
    metrics: Mapping[str, float]
    state: TrainState


class Loop:
    """Runs phases over one state.

    Args:
      run: what to do.
      settings: how.
      seed: every key is derived from it.
      record: receives metrics and progress; ``None`` for a silent run.
      store: a ``checkpoints.store.Store``; ``None`` keeps nothing.
      folder: where artefacts and fault reports go.
      recipe_hash: recorded with every checkpoint.
      init: edits the first variables (pretrained weights).
    """

    def __init__(
        self,
        run: Run,
        settings: Settings | None = None,
        seed: int = 0,
        record: Record | None = None,
        store: Any = None,
        folder: Path | None = None,
        recipe_hash: str = "",
        init: Callable[[Mapping], Mapping] | None = None,
    ):
        settings = settings or Settings()
        names = [p.name for p in run.phases]
        if len(set(names)) != len(names) or not names:
            raise ValueError(f"phases need different names, at least one; got {names}")
        self.run, self.settings, self.seed, self.record = run, settings, seed, record or Record()
        self.store, self.folder, self.recipe_hash, self.init = store, folder, recipe_hash, init
        self.place = Placement(settings.parallel, run.sharding_rules)
        self.evaluator = Evaluator(self.place, seed)
        self.artefacts: dict[str, Any] = {}
        self.metrics: dict[str, float] = {}
        self.programs: dict[tuple, Callable] = {}  # the last compiled step, which its series may use again
        self.done = 0  # steps and phases finished so far: numbers the checkpoints
        self.asked = 0  # the signal that asked the run to stop

    def __call__(self) -> Result:
        """Runs what is left of the run and returns its result.

        Raises:
          Diverged: a metric became non-finite; the last good checkpoint is kept.
          Interrupted: SIGTERM or SIGINT arrived.
        """
        with stops.signals(self):
            try:
                state, first, within = self._resume()
                for number, phase in enumerate(self.run.phases[first:], first):
                    if isinstance(phase, Alternate):
                        state = self._train(number, phase, state if within == number else self._begin(phase, state))
                    else:
                        if state is None:
                            state = resume.bare_state(self._first_variables({}), self.seed)
                        state = (self._fit if isinstance(phase, Fit) else self._evaluate_phase)(phase, state)
                    self.done += 1
                    self._save(state, number + 1, 0)
                    if self.asked and number + 1 < len(self.run.phases):
                        raise self._interrupted(phase, "its end")
            finally:
                if self.store is not None:
                    self.store.close()
        return Result(to_host(state.variables), to_host(state.chosen("average")), self.artefacts, self.metrics, state)

    def _interrupted(self, phase: Any, where: str) -> Interrupted:
        saved = "its state is saved; the same command goes on from here" if self.store else "nothing is saved"
        return Interrupted(f"stopped in phase {phase.name!r} at {where}: {saved}")

    def _begin(self, phase: Alternate, before: TrainState | None) -> TrainState:
        variables = self._first_variables(phase.updates) if before is None else before.variables
        return begin_phase(variables, phase, self.seed, before)

    def _first_variables(self, updates: Mapping) -> Mapping[str, Any]:
        rng = phase_key(jnp.uint32(self.seed), "init", jnp.int32(0))
        variables: Mapping[str, Any] = {"params": {}}
        if self.run.init is not None:
            variables = self.run.init(rng)
        elif updates:
            found = [(u.objective, jax.tree.map(jnp.asarray, host_batch(u, 0))) for u in updates.values()]
            variables = {}
            for objective, batch in reversed(found):
                variables = {**variables, **init_variables(objective, rng, batch)}
        variables = self.place.name_axes(variables)
        return self.init(variables) if self.init is not None else variables

    def _train(self, number: int, phase: Alternate, state: TrainState) -> TrainState:
        phase, epochs = bound(phase, self.artefacts), {}
        for name, update in phase.updates.items():
            streams = list(streams_of(update).values())
            for stream in streams:
                self.place.check_batch(stream.batch_size)
            epochs[name] = max(1, streams[0].steps_per_epoch // update.repeats)
        step, calls = int(state.step), self.settings.steps_per_call or self.run.steps_per_call
        log_every = self.settings.log_every or max(1, phase.steps // 100)
        save_every = self.settings.save_every or max(1, phase.steps // 10)
        begun = {n: int(p) - step * phase.updates[n].repeats for n, p in state.streams.items()}
        feed = Feed(phase, {n: int(p) for n, p in state.streams.items()}, self.place)
        self.record.phase(phase.name, step, phase.steps)
        step_fn = make_step(phase, epochs, self.place.axis_name)
        state, artefacts = self.place.put_state(state), self.place.put_artefacts(self.artefacts, phase.sharded)
        counts = [self.place.put_count(c) for c in range(calls + 1)]
        began = time.monotonic()
        shapes = tuple((path, np.shape(leaf)) for path, leaf in flatten(artefacts).items())
        shared = (phase.series, phase.steps, calls, tuple(epochs.items()), shapes)
        if phase.series is None or shared not in self.programs:
            compiled = self.place.compile(step_fn, state, feed.probe(calls), artefacts, counts[1])
            self.programs = {shared: compiled}
            self.record.compiled(time.monotonic() - began)
        compiled = self.programs[shared]
        on_epoch, epoch = (
            (jax.jit(phase.on_epoch), epochs[next(iter(epochs))]) if phase.on_epoch else (None, phase.steps)
        )
        evaluates = bool(phase.evaluate or phase.prequential or phase.report)
        events = (log_every, save_every, phase.eval_every or phase.steps, epoch)
        pending: deque = deque()

        def flush(keep: int) -> None:
            # reads results off the device, never the newest: that would wait for it
            while len(pending) > keep:
                at, metrics, fault = pending.popleft()
                due = at % log_every == 0 or at == phase.steps
                if not (due or (not pending and keep == 0)):
                    continue
                fault = np.asarray(jax.device_get(fault)).reshape(-1, 2)[0]
                if fault[0] >= 0:
                    local = self.place.local(state)
                    raise stops.diverged(phase, epochs, local, self.artefacts, begun, fault, self.folder)
                if due:
                    values = {k: float(np.ravel(v)[0]) for k, v in jax.device_get(metrics).items()}
                    self.metrics.update({f"{phase.name}/{k}": v for k, v in values.items()})
                    self.record.log(phase.name, at, values)

        stopped = False
        try:
            while step < phase.steps and not stopped:
                if on_epoch is not None and step % epoch == 0:
                    state = self._change(phase, state, on_epoch, step)
                take = min(calls, phase.steps - step, *(every - step % every for every in events))
                batches = feed.next(take, calls)
                if self.store is not None:
                    self.store.check()  # a background save that failed stops the run here, not at its end
                with self.place.guard():
                    state, metrics, fault = compiled(state, batches, artefacts, counts[take])
                step, self.done = step + take, self.done + take
                pending.append((step, metrics, fault))
                if len(pending) > AHEAD:
                    jax.block_until_ready(pending[-AHEAD][2])
                self.record.advance(step)
                last = step == phase.steps
                if step % log_every == 0 or last:
                    flush(keep=0 if last else 1)
                measured = evaluates and (last or (phase.eval_every and step % phase.eval_every == 0))
                if measured:
                    flush(keep=0)
                    state, stopped = self._evaluate(phase, state, step)
                if not (last or stopped) and (step % save_every == 0 or self.asked):
                    flush(keep=0)
                    self._save(self.place.local(state), number, step)
                    if self.asked:
                        raise self._interrupted(phase, f"step {step}")
            flush(keep=0)
        finally:
            feed.close()
        if stopped:
            self.record.note(f"{phase.name}: stopped at step {step}, {phase.stop.metric} no longer improves")
        return self.place.local(state)

    def _change(self, phase: Alternate, state: TrainState, on_epoch: Callable, step: int) -> TrainState:
        local = self.place.local(state)
        key = phase_key(jnp.uint32(self.seed), f"{phase.name}/epoch", jnp.int32(step))
        changed = dict(on_epoch(local.variables, self.place.put_replicated(self.artefacts), key))
        params = changed.pop("params", local.params)
        return self.place.put_state(local.replace(params=params, collections={**local.collections, **changed}))

    def _logged(self, phase: str, step: int, values: Mapping[str, float], prefix: str) -> None:
        self.metrics.update({f"{prefix}{k}": float(v) for k, v in values.items()})
        self.record.log(phase, step, {k: float(v) for k, v in values.items()})

    def _fit(self, phase: Fit, state: TrainState) -> TrainState:
        self.record.phase(phase.name, 0, 1)
        key = phase_key(jnp.uint32(self.seed), phase.name, jnp.int32(0))
        variables = state.chosen("average")
        result = phase.fit(variables, self.artefacts, key)
        changed = {c: jax.tree.map(jnp.asarray, v) for c, v in result.variables.items()}
        params = changed.pop("params", variables["params"])
        state = state.replace(
            params=params,
            average=None if state.average is None else params,
            collections={**state.collections, **changed},
            optimizer={n: result.edit(o) if result.edit else o for n, o in state.optimizer.items()},
        )
        if result.artefacts:
            self.artefacts = {**self.artefacts, **result.artefacts}
            if self.folder is not None and self.place.process[0] == 0:
                artefact_files.save(self.folder / "artefacts" / phase.name, result.artefacts)
        self._logged(phase.name, 1, result.metrics, f"{phase.name}/")
        self.record.advance(1)
        return state

    def _evaluate_phase(self, phase: Evaluate, state: TrainState) -> TrainState:
        self.record.phase(phase.name, 0, 1)
        values, mutated = self.evaluator(phase, state, self.artefacts)
        self._logged(phase.name, 1, values, f"{phase.name}/")
        self.record.advance(1)
        return state.replace(collections={**state.collections, **mutated})

    def _evaluate(self, phase: Alternate, state: TrainState, step: int) -> tuple[TrainState, bool]:
        """Evaluates within a training phase; the state changes only by what evaluations commit and the monitor."""
        local, seen = self.place.local(state), {}
        for evaluation in phase.evaluate:
            values, mutated = self.evaluator(evaluation, local, self.artefacts)
            seen.update({f"{evaluation.name}/{k}": v for k, v in values.items()})
            local = local.replace(collections={**local.collections, **mutated})
        if phase.report is not None:
            seen.update({k: float(v) for k, v in to_host(phase.report(local)).items()})
        if phase.prequential is not None:
            values = phase.prequential.compute(to_host(local.prequential))
            seen.update({f"{phase.prequential.name}/{k}": v for k, v in values.items()})
        self._logged(phase.name, step, seen, "")
        if phase.stop is None:
            return (self.place.put_state(local) if any(e.commit for e in phase.evaluate) else state), False
        monitor, stopped = stops.watch(phase.stop, local.monitor, seen)
        return self.place.put_state(local.replace(monitor=monitor)), stopped

    def _save(self, state: TrainState, phase: int, step: int) -> None:
        if self.store is None:
            return
        meta = {
            "phase": phase,
            "step": step,
            "recipe": self.recipe_hash,
            "metrics": dict(self.metrics),
            "parallel": dict(describe(self.settings.parallel)),
            "artefacts": artefact_files.fingerprints(self.artefacts),
            "lines": self.record.lines,
            "axes": self.place.names,
        }
        current = self.run.phases[phase if step else phase - 1]
        stop = current.stop if isinstance(current, Alternate) else None
        metric = self.metrics.get(stop.metric) if stop else None
        self.store.save(self.done, flatten(state), meta, metric, stop.higher_is_better if stop else True)

    def _resume(self) -> tuple[TrainState | None, int, int | None]:
        """The newest whole checkpoint: the state, the phase to go on with, and that phase again if it is under way."""
        found = resume.restore(self.store, self.run.phases, self.place, self.record.note) if self.store else None
        if found is None:
            self.record.rewind(0)
            return None, 0, None
        self.done, state, meta = found
        if self.folder is not None:
            self.artefacts = artefact_files.load(self.folder / "artefacts", meta["artefacts"])
        self.metrics = dict(meta["metrics"])
        self.record.rewind(meta["lines"])
        if meta["phase"] < len(self.run.phases):
            name = self.run.phases[meta["phase"]].name
            self.record.note(f"resuming from checkpoint {self.done}: phase {name!r}, step {meta['step']}")
        return state, meta["phase"], meta["phase"] if meta["step"] else None
