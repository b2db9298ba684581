"""``zoo eval``: the evaluations of a run's recipe, on its finished state or on an exported model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainers.phases import Alternate, Evaluate, Phase
from trainers.recipe import Recipe, UserError
from trainers.state import TrainState


def recipe_from(kind: type[Recipe], settings: Mapping[str, Any]) -> Recipe:
    """A recipe from its resolved settings.

    Raises:
      UserError: a setting the recipe does not have (the run was made by another version).
    """

    def build(default: Any, plain: Any, path: str) -> Any:
        if dataclasses.is_dataclass(default):
            names = {f.name for f in dataclasses.fields(default)}
            unknown = sorted(set(plain) - names)
            if unknown:
                raise UserError(f"the recipe has no setting {path}{unknown[0]!r}; the run is of another version")
            values = {k: build(getattr(default, k), v, f"{path}{k}.") for k, v in plain.items()}
            return dataclasses.replace(default, **values)
        return tuple(plain) if isinstance(plain, list) else plain

    return build(kind(), settings, "")


def evaluate_folder(folder: Path) -> dict[str, Any]:
    """Evaluates a run's final state (averaged weights where an evaluation reads them) or an exported model.

    Only what measures the *final* weights is measured: evaluations of earlier phases or sessions are in the run's
    ``metrics.jsonl``.

    Raises:
      UserError: the folder is neither, the run is not complete, its data changed, or the recipe is of another version.
      CheckpointError: damaged or missing checkpoints.
    """
    from trainers.evaluation import Evaluator
    from trainers.parallel import Parallel, Placement
    from trainers.run import RUN_FILE, read_run, recipe_module

    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; give a run or an exported model")
    exported = not (folder / RUN_FILE).exists()
    if exported and not (folder / "model.json").exists():
        raise UserError(f"{folder} holds neither {RUN_FILE} nor model.json; give a run or an exported model")
    if exported:
        found, variables = _exported(folder)
    else:
        found, variables = read_run(folder), {}
        if not found.get("complete"):
            raise UserError(
                f"{folder}: this run is not complete; finish it with: zoo train {found['method']} --workdir {folder}"
            )
    recipe = recipe_from(recipe_module(found["method"]).Recipe, found["recipe"])
    run = recipe.build()
    if run.data_fingerprint != found["data"]:
        raise UserError(f"{folder} was trained on other data (checksum {found['data']}, now {run.data_fingerprint})")
    evaluations = final_evaluations(run.phases)
    artefacts: Mapping[str, Any] = {}
    if exported:
        variables = run.from_export(variables) if run.from_export else variables
        state = _state(variables, None)
    else:
        state, artefacts = _final_state(folder)
    evaluator = Evaluator(Placement(Parallel(devices=1)), recipe.seed)
    metrics: dict[str, float] = {}
    for evaluation in evaluations:
        try:
            values, _ = evaluator(evaluation, state, artefacts)
        except KeyError as missing:
            if not exported:
                raise
            raise UserError(
                f"{folder}: the exported model lacks {missing}, which the evaluation {evaluation.name!r} needs; "
                "evaluate its run's folder"
            ) from None
        metrics |= {f"{evaluation.name}/{k}": v for k, v in values.items()}
    if not evaluations:  # the method measures itself within its phases
        metrics = dict(found["metrics"])
    weights = "exported" if exported else "final"
    return {"method": found["method"], "folder": str(folder), "weights": weights, "metrics": metrics}


def final_evaluations(phases: Sequence[Phase]) -> list[Evaluate]:
    """The evaluations whose weights are the run's last: those after, or within, the last phase that changes them."""
    found: list[Evaluate] = []
    for phase in reversed(phases):
        if not isinstance(phase, Evaluate):
            return [*phase.evaluate, *found] if isinstance(phase, Alternate) else found
        found.insert(0, phase)
    return found


def _exported(folder: Path) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    import jax
    import jax.numpy as jnp

    from checkpoints.model import load_model

    model = load_model(folder.absolute())
    lacking = [k for k in ("method", "recipe", "data", "metrics") if k not in model.info]
    if lacking:
        raise UserError(f"{folder}: the model does not say its {lacking[0]}, so nothing can evaluate it")
    return model.info, jax.tree.map(jnp.asarray, dict(model.variables))


def _final_state(folder: Path) -> tuple[TrainState, Mapping[str, Any]]:
    """The state of a run's newest checkpoint, as far as evaluations read it, and its artefacts."""
    import jax
    import jax.numpy as jnp

    from checkpoints.store import Store
    from trainers import artefacts
    from trainers.trees import nest

    store = Store(folder.absolute() / "checkpoints")
    if not (steps := store.steps()):
        raise UserError(f"{folder} has no checkpoint; evaluate {folder / 'model'}")
    read = ("params", "collections", "average")
    meta, leaves = (store.manifest(steps[-1])[k] for k in ("meta", "leaves"))
    flat = store.read(steps[-1], [p for p in leaves if p.split("/")[0] in read])
    params, collections, average = (jax.tree.map(jnp.asarray, nest(flat, part)) for part in read)
    return _state({"params": params, **collections}, average or None), artefacts.load(
        folder / "artefacts", meta["artefacts"]
    )


def _state(variables: Mapping[str, Any], average: Mapping[str, Any] | None) -> TrainState:
    blank = dict.fromkeys((f.name for f in dataclasses.fields(TrainState)), None)
    collections = {c: v for c, v in variables.items() if c != "params"}
    return TrainState(
        **{**blank, "params": variables.get("params", {}), "collections": collections, "average": average}
    )
