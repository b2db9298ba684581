"""Claims, executed: method against baseline over paired seeds, with trivial and A/A arms, and a verdict."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trainers.recipe import UserError
from zoo.catalogue import Card, Claim

AA_OFFSET = 1000
"""The A/A arm is the baseline again on other seeds, so that its difference from the baseline is pure noise."""
RESAMPLES = 10_000


def paired(method: np.ndarray, baseline: np.ndarray, higher_is_better: bool, effect: float) -> dict[str, Any]:
    """Compares two arms over paired seeds.

    Args:
      method, baseline: one value per seed, same order.
      higher_is_better: direction of the metric; differences are signed so that positive is better.
      effect: smallest effect of interest.

    Returns:
      The differences, their mean with a 95 % bootstrap interval, the probability of improvement (ties count half) and
      the verdict: ``confirmed`` (interval above 0 and mean at least the effect), ``contradicted`` (interval below 0)
      or ``not confirmed``.

    Raises:
      ValueError: no seeds, different lengths, or values that are not finite.
    """
    method, baseline = np.asarray(method, np.float64), np.asarray(baseline, np.float64)
    if method.shape != baseline.shape or method.ndim != 1 or not len(method):
        raise ValueError(f"paired arms need one value per seed each, got {method.shape} and {baseline.shape}")
    if not (np.isfinite(method).all() and np.isfinite(baseline).all()):
        raise ValueError("an arm returned a value that is not finite")
    difference = (method - baseline) * (1 if higher_is_better else -1)
    draws = np.random.default_rng(0).integers(0, len(difference), (RESAMPLES, len(difference)))
    low, high = np.percentile(difference[draws].mean(1), [2.5, 97.5])
    mean = float(difference.mean())
    improved = float(np.mean((difference > 0) + 0.5 * (difference == 0)))
    if len(difference) > 1 and low > 0 and mean >= effect:
        verdict = "confirmed"
    elif len(difference) > 1 and high < 0:
        verdict = "contradicted"
    else:
        verdict = "not confirmed"
    return {
        "differences": difference.tolist(),
        "mean": mean,
        "interval": [float(low), float(high)],
        "probability_of_improvement": improved,
        "effect": effect,
        "verdict": verdict,
    }


def arms_of(claim: Claim) -> dict[str, tuple[str, int]]:
    """Each arm's name in the recipe and the offset added to its seeds."""
    return {
        "method": (claim.method, 0),
        "baseline": (claim.baseline, 0),
        "trivial": (claim.trivial, 0),
        "a/a": (claim.baseline, AA_OFFSET),
    }


def run_claim(card: Card, seeds: int, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Runs every arm of a card's claim on ``seeds`` paired seeds.

    Raises:
      UserError: an arm does not return the claim's metric, or one that is not finite.
    """
    from trainers.run import recipe_hash, recipe_module, versions

    module, claim = recipe_module(card.name), card.claim
    values: dict[str, list[float]] = {a: [] for a in arms_of(claim)}
    extra: dict[str, list[Mapping[str, float]]] = {a: [] for a in values}
    seconds = dict.fromkeys(values, 0.0)
    for seed in range(seeds):
        for arm, (name, offset) in arms_of(claim).items():
            began = time.monotonic()
            found = {k: float(v) for k, v in module.arm(name, seed + offset).items()}
            seconds[arm] += time.monotonic() - began
            if claim.metric not in found:
                raise UserError(f"{card.name}: arm {name!r} returned {', '.join(found)}, not {claim.metric!r}")
            if not math.isfinite(found[claim.metric]):
                raise UserError(
                    f"{card.name}: arm {name!r} on seed {seed + offset} returned {claim.metric} {found[claim.metric]}"
                )
            values[arm].append(found[claim.metric])
            extra[arm].append(found)
            say(f"{card.name} seed {seed} {arm:9} {name:24} {claim.metric} {found[claim.metric]:.5g}")
    arrays = {a: np.array(v) for a, v in values.items()}
    compare = lambda a: paired(arrays[a], arrays["baseline"], claim.higher_is_better, claim.effect)  # noqa: E731
    registered = json.dumps([claim.metric, claim.effect, claim.higher_is_better, claim.method, claim.baseline])
    return {
        "method": card.name,
        "claim": dataclasses.asdict(claim),
        "registered": hashlib.sha256(registered.encode()).hexdigest()[:16],
        "seeds": seeds,
        "arms": {
            a: {
                "name": arms_of(claim)[a][0],
                "values": values[a],
                "mean": float(arrays[a].mean()),
                "sd": float(arrays[a].std(ddof=1)) if seeds > 1 else 0.0,
                "seconds": round(seconds[a], 2),
                "all": extra[a],
            }
            for a in values
        },
        "paired": compare("method"),
        "a/a": compare("a/a"),
        "verdict": compare("method")["verdict"],
        "recipe": recipe_hash(card.name, module.Recipe()),
        "data": module.Recipe().build().data_fingerprint,
        "versions": versions(),
    }


def store(found: Mapping[str, Any], folder: Path) -> None:
    """Keeps a claim's result as ``folder/<method>.json`` and draws its paired differences beside it."""
    from trainers import plots
    from trainers.run import write_json

    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{found['method']}.json", found)
    fig, axes = plots.figure(2, 1, (4.6, 3.0))
    left, right = axes[0]
    for i, row in enumerate(found["arms"].values()):
        left.plot([i] * len(row["values"]), row["values"], "o", color="#3060a0", alpha=0.5)
        left.plot([i - 0.25, i + 0.25], [row["mean"]] * 2, color="black")
    left.set_xticks(range(len(found["arms"])), [f"{a}\n{r['name']}" for a, r in found["arms"].items()], fontsize=6)
    left.set_ylabel(found["claim"]["metric"], fontsize=8)
    left.set_title("arms, one dot a seed", fontsize=9)
    for i, which in enumerate(("paired", "a/a")):
        row = found[which]
        right.plot([i] * len(row["differences"]), row["differences"], "o", color="#b04030", alpha=0.6)
        low, high = row["interval"]
        right.errorbar([i + 0.15], [row["mean"]], [[row["mean"] - low], [high - row["mean"]]], fmt="s", color="black")
    right.axhline(0, color="grey", linewidth=0.8)
    right.axhline(found["claim"]["effect"], color="green", linewidth=0.8, linestyle="--")
    right.set_xlim(-0.5, 1.5)
    right.set_xticks([0, 1], ["method - baseline", "baseline - baseline\n(A/A)"], fontsize=7)
    right.set_title(f"differences, positive is better: {found['verdict']}", fontsize=9)
    for axis in (left, right):
        axis.tick_params(axis="y", labelsize=7)
        axis.grid(alpha=0.25)
    fig.suptitle(f"zoo claim {found['method']}", fontsize=10)
    plots.save(fig, folder / f"{found['method']}.png")


def table(found: Mapping[str, Any]) -> str:
    """The result as text."""
    claim, rows = found["claim"], []
    rows.append(f"claim: {claim['statement']}")
    rows.append(f"{'arm':10} {'name':28} {claim['metric']:>16} {'sd':>10} {'seconds':>9}")
    for arm, row in found["arms"].items():
        rows.append(f"{arm:10} {row['name']:28} {row['mean']:16.5g} {row['sd']:10.3g} {row['seconds']:9.1f}")
    for which, label in (("paired", "method - baseline"), ("a/a", "A/A control")):
        row = found[which]
        low, high = row["interval"]
        rows.append(
            f"{label:20} {row['mean']:+.5g}  95 % [{low:+.5g}, {high:+.5g}]  P(improvement) "
            f"{row['probability_of_improvement']:.2f}"
        )
    rows.append(f"registered effect {claim['effect']:g}, {found['seeds']} paired seeds: {found['verdict'].upper()}")
    return "\n".join(rows)


def difference_from(found: Mapping[str, Any], published: Mapping[str, Any]) -> str | None:
    """How a result moves the published verdict, in one line; ``None`` if it does not."""
    if found["verdict"] == published["verdict"]:
        return None
    moved = f"{published['verdict']} ({published['paired']['mean']:+.4g})"
    if math.isclose(published["claim"]["effect"], found["claim"]["effect"]):
        return f"{found['method']}: was {moved}, now {found['verdict']} ({found['paired']['mean']:+.4g})"
    return f"{found['method']}: the registered effect changed; was {moved}, now {found['verdict']}"
