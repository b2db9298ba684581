"""A pool of models in a table: scores before and after a simulated fine-tuning, rank correlations, files."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trainers import plots
from trainers.run import write_json
from zoo.metrics.transferability import METRICS, spearman, weighted_kendall_tau


def planar_means(before: np.ndarray, after: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Class means before and after, ``[2, C, 2]``, along the principal directions of those before."""
    counts = np.bincount(labels)
    centres = []
    for x in (before, after):
        total = np.zeros((len(counts), x.shape[1]))
        np.add.at(total, labels, x)
        centres.append(total / counts[:, None])
    origin = centres[0].mean(0)
    axes = np.linalg.svd(centres[0] - origin, full_matrices=False)[2][:2]
    axes = np.pad(axes, ((0, 2 - len(axes)), (0, 0)))
    return np.stack([(c - origin) @ axes.T for c in centres])


@dataclasses.dataclass(frozen=True)
class Table:
    """All scores of a pool.

    Attributes:
      names: M models.
      metrics_of: K scores.
      accuracy: ``[M]`` after fine-tuning, NaN where unknown.
      scores: ``[2, K, M]``, of features as they are and moved; NaN where a score does not read features.
      steps: ``[M]`` accepted steps of the descent.
      energies: ``[M, 2]`` potential energy at its start and end.
      means: ``[M, 2, C, 2]`` class means before and after, in the plane.
    """

    names: tuple[str, ...]
    metrics_of: tuple[str, ...]
    accuracy: np.ndarray
    scores: np.ndarray
    steps: np.ndarray
    energies: np.ndarray
    means: np.ndarray

    def arrays(self) -> dict[str, np.ndarray]:
        """As arrays for a run's artefacts."""
        text = "\n".join((" ".join(self.metrics_of), *self.names))
        rest = {f: getattr(self, f) for f in ("accuracy", "scores", "steps", "energies", "means")}
        return {"text": np.frombuffer(text.encode(), np.uint8).copy(), **rest}

    @classmethod
    def of(cls, arrays: Mapping[str, Any]) -> Table:
        """Undoes :meth:`arrays`."""
        first, *names = bytes(np.asarray(arrays["text"])).decode().split("\n")
        rest = {k: np.asarray(v) for k, v in arrays.items() if k != "text"}
        return cls(tuple(names), tuple(first.split(" ")), **rest)

    def of_metric(self, metric: str, moved: bool) -> np.ndarray:
        """A score of all models ``[M]``."""
        return self.scores[int(moved and METRICS[metric].moves), self.metrics_of.index(metric)]

    def correlation(self, metric: str, moved: bool, measure: Callable[[Any, Any], float]) -> float:
        """Rank correlation of a score with the accuracies that are known; NaN for fewer than two."""
        known = np.isfinite(self.accuracy)
        if known.sum() < 2:
            return float("nan")
        return measure(self.of_metric(metric, moved)[known], self.accuracy[known])

    def metrics(self) -> dict[str, float]:
        """Weighted taus of every score before and after, where accuracies are known, and the descent's energies."""
        start, end = self.energies.T
        found = {"steps": float(self.steps.mean()), "energy_before": float(start.mean())}
        found["energy_after"] = float(end.mean())
        for metric in self.metrics_of:
            for moved in (False, True)[: 1 + METRICS[metric].moves]:
                tau = self.correlation(metric, moved, weighted_kendall_tau)
                if np.isfinite(tau):
                    found[f"tau_{metric}{'_ped' if moved else ''}"] = tau
        return found

    def order(self, metric: str) -> list[str]:
        """Models by a score on moved features, best first."""
        return [self.names[i] for i in np.argsort(-self.of_metric(metric, True), kind="stable")]

    def text(self, metric: str) -> str:
        """The ranked pool and the rank correlations, as printed."""
        title, width = METRICS[metric].title, max(5, *(len(n) for n in self.names))
        before, after = self.of_metric(metric, False), self.of_metric(metric, True)
        own = np.argsort(np.argsort(-before, kind="stable"), kind="stable") + 1
        pair = f"{title:>12} {title + '+PED':>12}" if METRICS[metric].moves else f"{title:>12}"
        lines = [f"{'rank':>4} {'model':{width}} {pair} {'rank without':>12} {'accuracy':>9}"]
        for place, i in enumerate(np.argsort(-after, kind="stable"), start=1):
            known = f"{self.accuracy[i]:9.3f}" if np.isfinite(self.accuracy[i]) else f"{'-':>9}"
            values = f"{before[i]:12.5g} {after[i]:12.5g}" if METRICS[metric].moves else f"{before[i]:12.5g}"
            lines.append(f"{place:4d} {self.names[i]:{width}} {values} {own[i]:12d} {known}")
        if np.isfinite(self.accuracy).sum() < 2:
            return "\n".join((*lines, "no accuracies are given, so there is nothing to correlate the ranking with"))
        heads = ("weighted tau", "+PED", "Spearman", "+PED")
        lines.append(f"{'score':8} {heads[0]:>13} {heads[1]:>8} {heads[2]:>9} {heads[3]:>8}")
        for name in self.metrics_of:
            row = [self.correlation(name, m, f) for f in (weighted_kendall_tau, spearman) for m in (False, True)]
            shown = [f"{v:.3f}" if np.isfinite(v) else "-" for v in row]
            if not METRICS[name].moves:
                shown[1] = shown[3] = "-"
            lines.append(f"{METRICS[name].title:8} {shown[0]:>13} {shown[1]:>8} {shown[2]:>9} {shown[3]:>8}")
        return "\n".join(lines)


def write_ranking(table: Table, metric: str, workdir: Path) -> None:
    """Writes ``ranking.csv``, a row a model in ranked order, and ``correlations.json``."""
    order = [table.names.index(n) for n in table.order(metric)]
    columns = [(n, m) for n in table.metrics_of for m in (False, True)[: 1 + METRICS[n].moves]]
    scratch = workdir / ".ranking.csv.tmp"
    with scratch.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        heads = [n + ("_ped" if m else "") for n, m in columns]
        out.writerow(["model", "accuracy", *heads, "steps", "energy_before", "energy_after"])
        for i in order:
            known = repr(float(table.accuracy[i])) if np.isfinite(table.accuracy[i]) else ""
            values = [repr(float(table.of_metric(n, m)[i])) for n, m in columns]
            out.writerow([table.names[i], known, *values, int(table.steps[i]), *map(float, table.energies[i])])
    scratch.replace(workdir / "ranking.csv")
    measures = {"weighted_tau": weighted_kendall_tau, "spearman": spearman}
    found = {
        n + ("_ped" if m else ""): {k: v for k, f in measures.items() if np.isfinite(v := table.correlation(n, m, f))}
        for n, m in columns
    }
    write_json(workdir / "correlations.json", found)


def draw(table: Table, metric: str, file: Path) -> None:
    """Writes the score against accuracy before and after, and where class means of the model that moved most went."""
    fig, axes = plots.figure(3, 1, (4.2, 3.6))
    title = METRICS[metric].title
    known = np.isfinite(table.accuracy)
    for axis, moved in zip(axes[0][:2], (False, True), strict=True):
        score = table.of_metric(metric, moved)
        name = f"{title} + PED" if moved and METRICS[metric].moves else title
        if known.sum() < 2:
            place = np.argsort(score, kind="stable")
            axis.barh([table.names[i] for i in place], score[place] - score.min(), color="#2a78d6")
            axis.set_xlabel(f"{name}, above the lowest")
            axis.tick_params(axis="y", labelsize=7)
            continue
        tau = table.correlation(metric, moved, weighted_kendall_tau)
        axis.scatter(score[known], table.accuracy[known], s=22, color="#2a78d6" if moved else "0.45")
        for i in np.flatnonzero(known):
            axis.annotate(table.names[i], (score[i], table.accuracy[i]), (3, 3), textcoords="offset points", fontsize=6)
        axis.margins(x=0.15)
        axis.set(xlabel=name, ylabel="accuracy after fine-tuning")
        axis.set_title(f"weighted tau {tau:.2f}", fontsize=9)
        axis.grid(alpha=0.25)
    lengths = np.linalg.norm(table.means[:, 1] - table.means[:, 0], axis=-1).max(1)
    reaches = np.ptp(table.means[:, 0], axis=1).max(1)
    shown = int(np.argmax(lengths / np.maximum(reaches, 1e-12)))  # the best model's classes are often far apart already
    before, after = table.means[shown]
    axis = axes[0][2]
    moves = after - before
    longest, reach = lengths[shown], reaches[shown]
    factor = 1.0 if longest <= 0 else max(1.0, float(f"{0.15 * reach / longest:.1g}"))
    axis.quiver(*before.T, *(factor * moves).T, angles="xy", scale_units="xy", scale=1, color="#b04030", width=0.006)
    axis.scatter(*before.T, s=16, color="0.3", zorder=3)
    if len(before) <= 20:
        for c, point in enumerate(before):
            axis.annotate(str(c), point, (4, 4), textcoords="offset points", fontsize=7)
    axis.margins(0.25)
    axis.set(xlabel="first principal direction", ylabel="second")
    axis.set_title(f"{table.names[shown]}: moves of class means x {factor:g}", fontsize=9)
    axis.grid(alpha=0.25)
    plots.save(fig, file)
