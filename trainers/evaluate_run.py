"""``zoo eval``: the evaluations of a run's recipe, on its finished state or on an exported model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainers.recipe import Recipe, UserError


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
    """Evaluates a run's folder (averaged weights where kept) or an exported model.

    Raises:
      UserError: the folder is neither, or the run has no evaluation.
    """
    import jax
    import jax.numpy as jnp

    from checkpoints.model import load_model
    from trainers.evaluation import Evaluator
    from trainers.parallel import Parallel, Placement
    from trainers.phases import Alternate, Evaluate
    from trainers.run import RUN_FILE, recipe_module
    from trainers.state import TrainState

    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; give a run or an exported model")
    if (folder / RUN_FILE).exists():
        found = json.loads((folder / RUN_FILE).read_text())
        if not found.get("complete"):
            raise UserError(f"{folder}: this run is not complete; finish it with: zoo train {found['method']}"
                            f" --workdir {folder}")  # fmt: skip
        model_folder = folder / "model"
    elif (folder / "model.json").exists():
        model_folder = folder
    else:
        raise UserError(f"{folder} holds neither {RUN_FILE} nor model.json; give a run or an exported model")
    model = load_model(model_folder)
    method, settings = model.info["method"], model.info["recipe"]
    recipe = recipe_from(recipe_module(method).Recipe, settings)
    run = recipe.build()
    if run.data_fingerprint != model.info["data"]:
        raise UserError(
            f"{folder} was trained on other data (checksum {model.info['data']}, now {run.data_fingerprint})"
        )
    evaluations: dict[str, Evaluate] = {}
    for phase in run.phases:
        if isinstance(phase, Evaluate):
            evaluations[phase.name] = phase
        elif isinstance(phase, Alternate):
            evaluations |= {e.name: e for e in phase.evaluate}
    variables = jax.tree.map(jnp.asarray, dict(model.variables))
    blank = dict.fromkeys((f.name for f in dataclasses.fields(TrainState)), None)
    collections = {c: v for c, v in variables.items() if c != "params"}
    state = TrainState(**{**blank, "params": variables.get("params", {}), "collections": collections})
    evaluator = Evaluator(Placement(Parallel(devices=1)), recipe.seed)
    metrics: dict[str, float] = {}
    for name, evaluation in evaluations.items():
        values, _ = evaluator(evaluation, state, {})
        metrics |= {f"{name}/{k}": v for k, v in values.items()}
    if not evaluations:  # closed-form methods measure within their phases
        metrics = dict(model.info["metrics"])
    return {"method": method, "folder": str(folder), "weights": "exported", "metrics": metrics}
