"""Pictures of compatibility matrices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainers import plots
from trainers.protocols import compatibility_of
from zoo.metrics.compatibility import average_accuracy, average_compatibility, compatible


def matrices_figure(
    sequences: Mapping[str, Sequence[str]],
    titles: Mapping[str, str],
    replacements: Sequence[int] = (),
    names: Sequence[str] = (),
) -> Callable[[Any, Path], None]:
    """A run's picture ``compatibility.png``: one matrix a sequence of models, the last sequence first.

    Args:
      sequences: the names of the updates of each sequence; their galleries are artefacts of the run.
      titles: by sequence.
      replacements, names: see :func:`draw_matrix`.
    """

    def draw(result: Any, workdir: Path) -> None:
        fig, axes = plots.figure(len(sequences), 1, (3.3, 3.9))
        for axis, name in zip(axes[0], reversed(sequences), strict=True):
            draw_matrix(axis, compatibility_of(result.artefacts, sequences[name]), titles[name], replacements, names)
        plots.save(fig, workdir / "compatibility.png")

    return draw


def draw_matrix(
    axis: Any, matrix: np.ndarray, title: str, replacements: Sequence[int] = (), names: Sequence[str] = ()
) -> None:
    """A compatibility matrix as a heat map with its numbers; bold where the new query beats the old one.

    Args:
      axis: a matplotlib axis.
      matrix: ``[T, T]``, NaN above the diagonal.
      title: above it; AC and AA are added.
      replacements: models that were put in from elsewhere, starred on the axes.
      names: of the models, oldest first; their numbers by default.
    """
    size, better = len(matrix), compatible(matrix)
    axis.imshow(matrix, vmin=0, vmax=1, cmap="Blues", alpha=0.75)
    for i in range(size):
        for j in range(i + 1):
            weight = "bold" if better[i, j] else "normal"
            axis.text(j, i, f"{matrix[i, j]:.2f}", ha="center", va="center", fontsize=8, weight=weight)
    named = names or [f"{t + 1}" for t in range(size)]
    names = [f"{name}*" if t in replacements else name for t, name in enumerate(named)]
    axis.set_xticks(range(size), names)
    axis.set_yticks(range(size), names)
    axis.set_xlabel("gallery of model" + (" (* put in from elsewhere)" if replacements else ""), fontsize=8)
    axis.set_ylabel("queries of model", fontsize=8)
    found = f"AC {average_compatibility(matrix):.2f}, AA {100 * average_accuracy(matrix):.1f}"
    axis.set_title(f"{title}\n{found}", fontsize=9)
